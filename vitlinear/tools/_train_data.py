"""The loaders of `vitlinear train`."""
import argparse
from collections.abc import Sequence
from typing import Any

import PIL
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from timm.data import FastCollateMixup, Mixup, create_loader

from . import _datasets
from ._errors import UsageError, usage_errors

# of timm's create_loader, named as our flags are
_LOADER_ARGUMENTS = (
    'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob',
    'grayscale_prob', 'gaussian_blur_prob', 'worker_seeding')


def posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
    """timm's operation of that name, for 0 bits too: Pillow 13 refuses what was a black image before."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else image.point([0] * 256 * len(image.getbands()))


def mend_posterize(transforms: Sequence[Any]) -> None:
    """Give timm's augmentations the operation above, where Pillow is one that refuses 0 bits."""
    if int(PIL.__version__.partition('.')[0]) < 13:
        return
    for transform in transforms:
        policy = [op for group in getattr(transform, 'policy', ()) for op in group]
        for op in (*getattr(transform, 'ops', ()), *policy):
            if op.name.startswith('Posterize'):
                op.aug_fn = posterize


def make_loaders(
        args: argparse.Namespace,
        data_config: dict[str, Any],
        device: torch.device,
) -> tuple[Any, Any | None, Mixup | None]:
    """Loaders of the training and evaluation data, and the mixup that the training loop itself has to apply."""
    channels = data_config['input_size'][0]
    if args.dataset_download and args.distributed:
        if args.local_rank == 0:
            _datasets.open_dataset(args, args.train_split, channels, is_training=True)
        dist.barrier()  # the other processes find the data on disk
    train_set = _datasets.open_dataset(args, args.train_split, channels, is_training=True)
    _datasets.check_classes(train_set, args.train_split, args.num_classes)
    if len(train_set) // args.world_size < args.batch_size:
        raise UsageError(
            f'{len(train_set)} training images are fewer than one batch of {args.batch_size}'
            + (f' in each of {args.world_size} processes' if args.distributed else ''))
    if args.aug_repeats and not args.distributed:
        raise UsageError('--aug-repeats needs several processes (torchrun)')

    collate_fn, mixup_fn = None, None
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None:
        mix = (Mixup if args.no_prefetcher else FastCollateMixup)(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
        collate_fn, mixup_fn = (None, mix) if args.no_prefetcher else (mix, None)
        if args.batch_size % 2:
            raise UsageError(f'mixup and cutmix need an even --batch-size, not {args.batch_size}')

    common = dict(
        **{name: data_config[name] for name in ('input_size', 'mean', 'std')},
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=device,
        distributed=args.distributed,
        use_prefetcher=not args.no_prefetcher,
        persistent_workers=False,  # new ones take their seeds from the epoch's generator
    )
    with usage_errors('augmentation'):
        train_loader = create_loader(
            train_set,
            batch_size=args.batch_size,
            is_training=True,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            auto_augment=args.aa,
            num_aug_repeats=args.aug_repeats,
            interpolation=(not args.no_aug and args.train_interpolation) or data_config['interpolation'],
            collate_fn=collate_fn,
            **{name: getattr(args, name) for name in _LOADER_ARGUMENTS},
            **common,
        )
    mend_posterize(train_set.transform.transforms)
    if not args.val_split:
        return train_loader, None, mixup_fn
    eval_set = _datasets.open_dataset(args, args.val_split, channels)
    _datasets.check_classes(eval_set, args.val_split, args.num_classes)
    if _datasets.class_index(eval_set) != _datasets.class_index(train_set):
        raise UsageError(f'splits {args.train_split} and {args.val_split} do not have the same classes')
    eval_loader = create_loader(
        eval_set,
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        **common,
    )
    return train_loader, eval_loader, mixup_fn
