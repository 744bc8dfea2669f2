"""Datasets by timm's names, opened or refused with one line."""
import argparse
import logging
import os
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_loader

from ._errors import RunError, UsageError, suggest

_logger = logging.getLogger(__name__)

_TORCH_DATASETS = (
    'cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist', 'imagenet', 'image_folder', 'folder',
    'places365', 'inaturalist', 'inat',
)
_SPLIT_FOLDERS = {'train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test'}


class FolderDataset(ImageDataset):
    """timm's dataset of image files, going on without those that cannot be read, and naming them.

    In training the next file takes the place of one that cannot be read. In evaluation nothing does: its target is -1,
    for `_script.evaluate` to leave out.
    """

    def __init__(self, dataset: ImageDataset, is_training: bool, max_unreadable: float) -> None:
        super().__init__(dataset.reader.root, reader=dataset.reader, input_img_mode=dataset.input_img_mode)
        self.is_training, self.max_unreadable = is_training, max_unreadable
        self.unreadable = torch.zeros(len(self), dtype=torch.bool).share_memory_()  # by all processes that load

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._read(index)
        while image is None:
            if not self.is_training:
                blank = Image.new(self.input_img_mode, (32, 32))
                return self.transform(blank) if self.transform else blank, -1
            self.check_readable()
            index = (index + 1) % len(self)
            image = self._read(index)
        return self.transform(image) if self.transform else image, self.reader.samples[index][1]

    def _read(self, index: int) -> Image.Image | None:
        path = self.reader.samples[index][0]
        try:
            if not os.path.isfile(path):  # a pipe would be waited for without end
                raise OSError('no regular file')
            with open(path, 'rb') as file:
                image = Image.open(file)
                image.load()
                return image if image.mode == self.input_img_mode else image.convert(self.input_img_mode)
        except MemoryError:
            raise
        except Exception as e:  # decoders raise whatever they stumble over
            if not self.unreadable[index]:
                _logger.warning(f'skipped {path}, not a readable image: {e}')
            self.unreadable[index] = True
            return None

    def check_readable(self) -> None:
        """Raise RunError, with a list, where more than the allowed share of the files could not be read."""
        found = self.unreadable.nonzero().flatten().tolist()
        if len(found) > len(self) * self.max_unreadable:
            names = [self.reader.samples[i][0] for i in found]
            raise RunError(
                f'{len(found)} of {len(self)} images could not be read, more than --max-unreadable allows: '
                + ', '.join(names[:20]) + (', ...' if len(names) > 20 else ''))


def check_readable(dataset: torch.utils.data.Dataset) -> None:
    """As `FolderDataset.check_readable`; nothing for other datasets."""
    if isinstance(dataset, FolderDataset):
        dataset.check_readable()


def left_out(dataset: torch.utils.data.Dataset) -> int:
    """How many images could not be read so far."""
    return int(dataset.unreadable.sum()) if isinstance(dataset, FolderDataset) else 0


def open_dataset(
        args: argparse.Namespace,
        split: str,
        channels: int,
        is_training: bool = False,
        whole_folder: bool = False,
) -> torch.utils.data.Dataset:
    """timm.data.create_dataset, for map-style datasets, with the data checked.

    Args:
        args: Arguments that hold the data flags, batch_size and seed.
        split: Name of the split.
        channels: Channels that the model takes.
        is_training: Whether the split is trained on.
        whole_folder: Take the folder itself for the split when it holds no folders named like splits.
    """
    prefix, _, rest = args.dataset.partition('/')
    prefix = prefix.lower()
    if prefix in ('hfids', 'tfds', 'wds'):
        raise UsageError(f"dataset {args.dataset} is a stream: use timm's script, python -m vitlinear run train.py ...")
    if prefix not in ('', 'torch', 'hfds') or (prefix == 'torch' and rest.lower() not in _TORCH_DATASETS):
        near = suggest(f'torch/{rest or prefix}', [f'torch/{name}' for name in _TORCH_DATASETS])
        raise UsageError(f'unknown dataset {args.dataset}{near}')
    root = args.data_dir
    if prefix != 'hfds':
        if not root:
            raise UsageError('no data: give --data-dir')
        if not os.path.exists(root) and not args.dataset_download:
            raise UsageError(f'data folder {root} does not exist')
    try:
        dataset = create_dataset(
            args.dataset,
            root=root,
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            input_img_mode=args.input_img_mode or ('RGB' if channels == 3 else 'L'),
            input_key=args.input_key,
            target_key=args.target_key,
        )
    except Exception as e:
        hint = ' (--dataset-download fetches it)' if 'download=True' in str(e) else ''
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UsageError(f'{args.dataset or "image folder"} in {root}, split {split}: {reason}{hint}') from e

    if isinstance(dataset, ImageDataset) and hasattr(dataset.reader, 'samples') and os.path.isdir(root):
        folder = dataset.reader.root
        if folder == root:
            folders = sorted(e.name for e in os.scandir(root) if e.is_dir())
            if not whole_folder or _SPLIT_FOLDERS.intersection(folders):
                raise UsageError(f'no folder for split {split} in {root}, which holds {", ".join(folders[:8])}')
        if not args.class_map:
            filled = {os.path.relpath(file, folder).split(os.sep)[0] for file, _ in dataset.reader.samples}
            for entry in sorted(os.scandir(folder), key=lambda e: e.name):
                if entry.is_dir() and not entry.name.startswith('.') and entry.name not in filled:
                    raise UsageError(f'class folder {entry.path} holds no images')
        dataset = FolderDataset(dataset, is_training, args.max_unreadable)
    elif prefix == 'torch':
        found = len(dataset[0][0].getbands())
        if found != channels:
            raise UsageError(
                f'{args.dataset} has images of {found} channel(s), the model takes {channels}: give --in-chans {found}')
    return dataset


def evaluation_loader(
        dataset: torch.utils.data.Dataset,
        config: dict[str, Any],
        args: argparse.Namespace,
        device: torch.device,
) -> Any:
    """timm.data.create_loader, for images prepared as `config` says.

    Args:
        dataset: The images.
        config: What `_script.data_config_for` gives.
        args: Arguments that hold the loader flags and batch_size.
        device: Where the batches go.
    """
    return create_loader(
        dataset,
        **config,
        batch_size=args.batch_size,
        use_prefetcher=not args.no_prefetcher,
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=device,
    )


def class_index(dataset: torch.utils.data.Dataset) -> dict[str, int] | None:
    """Class names and indices of a dataset that knows them."""
    index = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    if index is None and hasattr(dataset, 'classes'):
        index = {str(name): i for i, name in enumerate(dataset.classes)}
    return index


def check_classes(dataset: torch.utils.data.Dataset, split: str, num_classes: int) -> None:
    index = class_index(dataset)
    found = max(index.values()) + 1 if index else num_classes
    if found != num_classes:
        raise UsageError(
            f'split {split} has {found} classes and the head of the model {num_classes}: give --num-classes {found}, '
            f'or other data')
