"""Train a classifier: `python -m vitlinear train --config configs/NAME.yaml --data-dir DIR`, also under torchrun.

Flags, defaults, YAML files and checkpoints are those of timm's train.py, of which this is a subset built from timm's
library. Ours: an interrupted run that is resumed into its own folder ends with the weights of an uninterrupted one,
bit for bit on one kind of machine; CPUs can train in several processes; wrong input gets an answer in one line; and
--castling-ramp, for the auxiliary branch of Castling models.

    vitlinear train ... --output runs --experiment a
    vitlinear train ... --output runs --experiment a --resume runs/a/last.pth.tar
"""
import argparse
import importlib
import math
import os
import sys
import time
from collections import OrderedDict
from contextlib import nullcontext
from datetime import datetime
from typing import Any, Callable, ContextManager, Dict, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import yaml
from PIL import Image, ImageOps
from timm import utils
from timm.data import FastCollateMixup, Mixup, create_loader
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint

import vitlinear  # noqa: F401  registers the models

from . import _script
from ._script import Progress, RunError, UsageError, clock, natural_int, positive_int, usage_errors
from ..models import CastlingSchedule

# Destinations of the flags of timm's train.py that are left out, with timm's defaults: a YAML may hold them unchanged.
UNSUPPORTED = {
    'train_num_samples': None, 'val_num_samples': None, 'dataset_trust_remote_code': False, 'fuser': '',
    'fast_norm': False, 'torchcompile_mode': None, 'torchscript': False, 'model_dtype': None, 'no_ddp_bb': False,
    'local_rank': 0, 'lr_noise': None, 'lr_noise_pct': 0.67, 'lr_noise_std': 1.0, 'epoch_repeats': 0., 'aug_splits': 0,
    'jsd_loss': False, 'resplit': False, 'drop_connect': None, 'drop_block': None, 'bn_momentum': None, 'bn_eps': None,
    'sync_bn': False, 'dist_bn': 'reduce', 'split_bn': False, 'val_interval': 1, 'recovery_interval': 0,
    'save_images': False, 'tta': 0, 'use_multi_epochs_loader': False, 'log_wandb': False, 'wandb_project': None,
    'wandb_tags': [], 'wandb_resume_id': '', 'train_img_sizes': None, 'train_batch_sizes': None,
    'train_size_probs': None, 'train_size_schedule': 'constant', 'train_size_schedule_spread': 0.65,
    'train_size_random_mix': 0.1, 'train_batches_per_epoch': None, 'train_steps_per_epoch': None,
    'variable_batch_loss_scale': 'none', 'naflex_loader': False, 'naflex_train_seq_lens': [128, 256, 576, 784, 1024],
    'naflex_max_seq_len': 576, 'naflex_patch_sizes': None, 'naflex_patch_size_probs': None,
    'naflex_loss_scale': 'linear', 'naflex_patchify_channels_first': False, 'kd_model_name': None,
    'kd_distill_type': 'logit', 'kd_loss_type': 'kl', 'distill_loss_weight': None, 'task_loss_weight': None,
    'kd_temperature': 4.0, 'kd_student_feature_dim': None, 'kd_teacher_feature_dim': None,
    'kd_token_distill_type': 'soft',
}
# Arguments that may differ between a run and its continuation without changing what is computed.
_NOT_COMPUTED = {'resume', 'output', 'experiment', 'log_interval', 'checkpoint_hist', 'device_modules', 'pin_mem',
                 'data', 'data_dir', 'dataset_download', 'start_epoch', 'validation_batch_size', 'synchronize_step',
                 'rank', 'local_rank', 'no_resume_opt'}


def build_parser() -> _script.Parser:
    parser = _script.Parser('train', UNSUPPORTED, description=__doc__.splitlines()[0].partition(':')[0] + '.')
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file, or name of a packaged config')

    flag = parser.add_argument_group('data').add_argument
    _script.add_data_flags(flag)
    flag('--train-split', default='train', metavar='NAME', help='split to train on')
    flag('--val-split', default='validation', metavar='NAME', help='split to evaluate on, none if empty')

    flag = parser.add_argument_group('model').add_argument
    flag('--model', default='resnet50', metavar='NAME', help='any model that timm can create')
    flag('--pretrained', action='store_true', help='start from the published weights')
    flag('--pretrained-path', metavar='FILE', help='take these as the published weights, adapting the head')
    flag('--initial-checkpoint', default='', metavar='FILE', help='start from the weights in this file')
    flag('--resume', default='', metavar='FILE', help='continue the run that wrote this checkpoint')
    flag('--no-resume-opt', action='store_true', help='with --resume, start with a fresh optimizer')
    _script.add_input_flags(flag)
    flag('-b', '--batch-size', type=positive_int, default=128, metavar='N', help='images per step and process')
    flag('-vb', '--validation-batch-size', type=positive_int, metavar='N', help='the same for evaluation')
    flag('--grad-accum-steps', type=positive_int, default=1, metavar='N', help='steps whose gradients make one update')
    flag('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass')
    flag('--head-init-scale', type=float, metavar='X', help='factor on the initial weights of the classifier')
    flag('--head-init-bias', type=float, metavar='X', help='initial bias of the classifier')
    flag('--drop', type=float, default=0.0, metavar='P', help='dropout rate')
    flag('--drop-path', type=float, metavar='P', help='stochastic depth rate')
    flag('--castling-ramp', type=float, nargs=2, metavar='SHARE', help='of all updates: between these two the '
         'auxiliary branch of a Castling model fades, before them it is on (without this flag it is off)')

    flag = parser.add_argument_group('device').add_argument
    _script.add_device_flags(flag)
    flag('--synchronize-step', action='store_true', help='wait for the GPU at the end of each update')
    flag('--device-modules', nargs='+', metavar='MODULE', help='modules to import first')

    flag = parser.add_argument_group('optimizer').add_argument
    flag('--opt', default='sgd', metavar='NAME', help="any of timm's optimizers")
    flag('--opt-eps', type=float, metavar='X', help='epsilon')
    flag('--opt-betas', type=float, nargs='+', metavar='X', help='betas')
    flag('--momentum', type=float, default=0.9, metavar='X', help='momentum')
    flag('--weight-decay', type=float, default=2e-5, metavar='X', help='weight decay')
    flag('--clip-grad', type=float, metavar='X', help='clip gradients to this')
    flag('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='what --clip-grad limits')
    flag('--layer-decay', type=float, metavar='X', help='factor on the learning rate from each layer to the one below')
    flag('--layer-decay-min-scale', type=float, default=0, metavar='X', help='lower limit of that factor')
    flag('--layer-decay-no-opt-scale', type=float, metavar='X', help='freeze layers whose factor falls below this')
    flag('--opt-kwargs', nargs='*', default={}, action=utils.ParseKwargs, metavar='K=V', help='optimizer arguments')

    flag = parser.add_argument_group('schedule').add_argument
    flag('--epochs', type=positive_int, default=300, metavar='N', help='epochs')
    flag('--start-epoch', type=natural_int, metavar='N', help='number of the first epoch')
    flag('--sched', default='cosine', metavar='NAME', help='cosine, tanh, step, multistep, poly, wsd, ...')
    flag('--sched-on-updates', action='store_true', help='change the learning rate at every update')
    flag('--lr', type=float, metavar='X', help='learning rate, instead of --lr-base')
    flag('--lr-base', type=float, default=0.1, metavar='X', help='learning rate at a batch of --lr-base-size')
    flag('--lr-base-size', type=positive_int, default=256, metavar='N', help='batch that --lr-base refers to')
    flag('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'), help='growth with the batch (default by --opt)')
    flag('--lr-cycle-mul', type=float, default=1.0, metavar='X', help='growth of the cycles')
    flag('--lr-cycle-decay', type=float, default=0.5, metavar='X', help='factor on the learning rate at each cycle')
    flag('--lr-cycle-limit', type=positive_int, default=1, metavar='N', help='cycles')
    flag('--lr-k-decay', type=float, default=1.0, metavar='X', help='k-decay of cosine and poly')
    flag('--warmup-lr', type=float, default=1e-5, metavar='X', help='learning rate at the start of warmup')
    flag('--min-lr', type=float, default=0, metavar='X', help='lowest learning rate')
    flag('--warmup-epochs', type=natural_int, default=5, metavar='N', help='epochs of warmup')
    flag('--warmup-prefix', action='store_true', help='add warmup to --epochs instead of counting it in')
    flag('--cooldown-epochs', type=natural_int, default=0, metavar='N', help='epochs at --min-lr, at the end')
    flag('--patience-epochs', type=natural_int, default=10, metavar='N', help='patience of plateau')
    flag('--decay-epochs', type=float, default=90, metavar='N', help='epochs between two steps')
    flag('--decay-milestones', type=natural_int, nargs='+', default=[90, 180, 270], metavar='N', help='for multistep')
    flag('--decay-rate', '--dr', type=float, default=0.1, metavar='X', help='factor of each step')

    flag = parser.add_argument_group('augmentation and regularisation').add_argument
    flag('--no-aug', action='store_true', help='no augmentation at all')
    flag('--train-crop-mode', metavar='MODE', help='rrc, rkrc or rkrr')
    flag('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='X', help='area of the random crop')
    flag('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], metavar='X', help='aspect ratio of the random crop')
    flag('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip')
    flag('--vflip', type=float, default=0., metavar='P', help='probability of a vertical flip')
    flag('--color-jitter', type=float, default=0.4, metavar='X', help='strength of the colour jitter')
    flag('--color-jitter-prob', type=float, metavar='P', help='probability of colour jitter')
    flag('--grayscale-prob', type=float, metavar='P', help='probability of losing the colours')
    flag('--gaussian-blur-prob', type=float, metavar='P', help='probability of blur')
    flag('--aa', metavar='POLICY', help='rand-m9-mstd0.5-inc1, augmix-m3, v0, ...')
    flag('--aug-repeats', type=float, default=0, metavar='X', help='copies of an image among the processes')
    flag('--reprob', type=float, default=0., metavar='P', help='probability of random erasing')
    flag('--remode', default='pixel', metavar='MODE', help='what erasing writes: const, rand or pixel')
    flag('--recount', type=positive_int, default=1, metavar='N', help='erased rectangles')
    flag('--mixup', type=float, default=0.0, metavar='ALPHA', help='mixup, if above 0')
    flag('--cutmix', type=float, default=0.0, metavar='ALPHA', help='cutmix, if above 0')
    flag('--cutmix-minmax', type=float, nargs='+', metavar='X', help='range of the cutmix area, instead of alpha')
    flag('--mixup-prob', type=float, default=1.0, metavar='P', help='probability of mixing a batch')
    flag('--mixup-switch-prob', type=float, default=0.5, metavar='P', help='share of cutmix when both are on')
    flag('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='what shares one mixing factor')
    flag('--mixup-off-epoch', type=natural_int, default=0, metavar='N', help='stop mixing at this epoch, never if 0')
    flag('--smoothing', type=float, default=0.1, metavar='X', help='label smoothing')
    flag('--train-interpolation', default='random', metavar='NAME', help='interpolation of the random crop')
    flag('--bce-loss', action='store_true', help='binary cross entropy')
    flag('--bce-sum', action='store_true', help='sum it over classes')
    flag('--bce-target-thresh', type=float, metavar='X', help='binarise its targets at this value')
    flag('--bce-pos-weight', type=float, metavar='X', help='its weight of positives')

    flag = parser.add_argument_group('moving average of the weights').add_argument
    flag('--model-ema', action='store_true', help='keep one; it is what gets evaluated')
    flag('--model-ema-force-cpu', action='store_true', help='keep it on the CPU and do not evaluate it')
    flag('--model-ema-decay', type=float, default=0.9998, metavar='X', help='decay')
    flag('--model-ema-warmup', action='store_true', help='let the decay grow from zero')

    flag = parser.add_argument_group('run').add_argument
    flag('--seed', type=natural_int, default=42, metavar='N', help='seed of everything random')
    flag('--worker-seeding', default='all', choices=('all', 'part'), help='whether workers seed numpy as well')
    flag('--log-interval', type=positive_int, default=50, metavar='N', help='updates between two lines of progress')
    flag('--checkpoint-hist', type=positive_int, default=10, metavar='N', help='numbered checkpoints to keep')
    _script.add_loader_flags(flag)
    flag('--output', default='', metavar='DIR', help='folder of the runs (default: output/train)')
    flag('--experiment', default='', metavar='NAME', help='folder of this run (default: time, model, size)')
    flag('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'), help='what the best checkpoint is best in')
    return parser


class Saver(utils.CheckpointSaver):
    """timm's saver, leaving good files in place until the new ones are complete, whenever the process is killed."""

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        new = f'{dst}.new'
        super()._duplicate(src, new)
        os.replace(new, dst)
        if os.path.exists(new):  # renaming a hard link over another one of the same file does nothing
            os.unlink(new)

    def resume(self, path: str, state: Optional[Dict[str, Any]]) -> None:
        """Take up the history that came with the checkpoint `path`, if that lies in the folder of this saver."""
        if state is None or os.path.realpath(os.path.dirname(path)) != os.path.realpath(self.checkpoint_dir):
            return
        epoch, metric = state['pending']
        if metric is not None and (state['best_metric'] is None or self.cmp(metric, state['best_metric'])):
            self._duplicate(path, self._checkpoint_path(epoch))  # the run may have died before doing so
        self.load_state_dict(state)
        if self.checkpoint_files and self.checkpoint_files[0][1] == self.best_metric:
            self._duplicate(self.checkpoint_files[0][0], os.path.join(self.checkpoint_dir, 'model_best.pth.tar'))


def seed_epoch(seed: int, rank: int, epoch: int) -> None:
    """Seed every generator as a function of the arguments alone, so that a resumed epoch draws what it would have."""
    utils.random_seed(int(np.random.SeedSequence([seed, rank, epoch]).generate_state(1)[0]))


def make_model(args: argparse.Namespace) -> nn.Module:
    overlay = {}
    for path in (args.pretrained_path, args.initial_checkpoint):
        if path and not os.path.isfile(path):
            raise UsageError(f'checkpoint {path} does not exist')
    if args.pretrained_path:
        overlay = {'pretrained_cfg_overlay': {'file': args.pretrained_path, 'num_classes': -1}}  # -1: adapt the head
    model = _script.create_model(
        args,
        pretrained=args.pretrained,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        **overlay,
    )
    if args.initial_checkpoint:
        with usage_errors(f'--initial-checkpoint {args.initial_checkpoint}'):
            _script.load_weights(model, args.initial_checkpoint)
    with usage_errors(f'model {args.model}'), torch.no_grad():
        head = model.get_classifier()
        if args.head_init_scale is not None:
            head.weight.mul_(args.head_init_scale)
            head.bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            nn.init.constant_(head.bias, args.head_init_bias)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
    return model


def posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
    """timm's operation of that name, for 0 bits too: Pillow 13 refuses what was a black image before."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else image.point([0] * 256 * len(image.getbands()))


def mend_posterize(transforms: Sequence[Any]) -> None:
    for transform in transforms:
        policy = [op for group in getattr(transform, 'policy', ()) for op in group]
        for op in (*getattr(transform, 'ops', ()), *policy):
            if op.name.startswith('Posterize'):
                op.aug_fn = posterize


def make_loaders(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        device: torch.device,
) -> Tuple[Any, Optional[Any], Optional[Mixup]]:
    """Loaders of the training and evaluation data, and the mixup that the training loop itself has to apply."""
    channels = data_config['input_size'][0]
    if args.dataset_download and args.distributed:
        if args.local_rank == 0:
            _script.open_dataset(args, args.train_split, channels, is_training=True)
        dist.barrier()  # the other processes find the data on disk
    train_set = _script.open_dataset(args, args.train_split, channels, is_training=True)
    _script.check_classes(train_set, args.train_split, args.num_classes)
    if len(train_set) // args.world_size < args.batch_size:
        raise UsageError(
            f'{len(train_set)} training images are fewer than one batch of {args.batch_size}'
            + (f' in each of {args.world_size} processes' if args.distributed else ''))
    if args.aug_repeats and not args.distributed:
        raise UsageError('--aug-repeats needs several processes (torchrun)')

    mix, collate_fn, mixup_fn = None, None, None
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None:
        mix = Mixup if args.no_prefetcher else FastCollateMixup
        mix = mix(
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

    common = {
        'input_size': data_config['input_size'],
        'mean': data_config['mean'],
        'std': data_config['std'],
        'num_workers': args.workers,
        'pin_memory': args.pin_mem,
        'device': device,
        'distributed': args.distributed,
        'use_prefetcher': not args.no_prefetcher,
        'persistent_workers': False,  # new ones take their seeds from the epoch's generator
    }
    with usage_errors('augmentation'):
        train_loader = create_loader(
            train_set,
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob,
            gaussian_blur_prob=args.gaussian_blur_prob,
            auto_augment=args.aa,
            num_aug_repeats=args.aug_repeats,
            interpolation=(not args.no_aug and args.train_interpolation) or data_config['interpolation'],
            collate_fn=collate_fn,
            worker_seeding=args.worker_seeding,
            **common,
        )
    mend_posterize(train_set.transform.transforms)
    if not args.val_split:
        return train_loader, None, mixup_fn
    eval_set = _script.open_dataset(args, args.val_split, channels)
    _script.check_classes(eval_set, args.val_split, args.num_classes)
    if _script.class_index(eval_set) != _script.class_index(train_set):
        raise UsageError(f'splits {args.train_split} and {args.val_split} do not have the same classes')
    eval_loader = create_loader(
        eval_set,
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        **common,
    )
    return train_loader, eval_loader, mixup_fn


def make_loss(args: argparse.Namespace, mixing: bool) -> nn.Module:
    if args.bce_loss and (mixing or args.smoothing):
        return BinaryCrossEntropy(
            smoothing=0. if mixing else args.smoothing,  # mixing smooths the targets itself
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    if mixing:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def set_lr(args: argparse.Namespace) -> None:
    """Derive args.lr from --lr-base and the global batch unless it is given, by timm's rule."""
    if args.lr:
        return
    if not args.lr_base_scale:
        args.lr_base_scale = 'sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear'
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    args.lr = args.lr_base * (ratio ** 0.5 if args.lr_base_scale == 'sqrt' else ratio)


def read_resume(args: argparse.Namespace) -> Dict[str, Any]:
    """Everything but the tensors of the --resume file, or what is wrong with it."""
    if not os.path.isfile(args.resume):
        raise UsageError(f'--resume {args.resume}: no such file')
    if args.sched == 'plateau':
        raise UsageError('--resume: checkpoints do not hold the state of --sched plateau, such runs cannot be resumed')
    try:
        checkpoint = utils.load_checkpoint_metadata(args.resume)
    except Exception as e:
        raise UsageError(f'--resume {args.resume}: damaged, or not a checkpoint') from e
    if not isinstance(checkpoint, dict) or not {'epoch', 'state_dict', 'optimizer'} <= checkpoint.keys():
        raise UsageError(f'--resume {args.resume}: not a training checkpoint (weights alone: --initial-checkpoint)')
    if checkpoint.get('arch', args.model).partition('.')[0] != args.model.partition('.')[0]:
        raise UsageError(f'--resume {args.resume}: a checkpoint of {checkpoint["arch"]}, not of {args.model}')
    return checkpoint


def changed_arguments(before: argparse.Namespace, now: argparse.Namespace) -> str:
    """What differs between the arguments of a run and those of its continuation and has an effect on the weights."""
    keys = vars(before).keys() & vars(now).keys() - _NOT_COMPUTED
    pairs = [(k, getattr(before, k), getattr(now, k)) for k in sorted(keys)]
    return ', '.join(f'{k} {old} -> {new}' for k, old, new in pairs if old != new)


def make_output(args: argparse.Namespace, args_text: str, size: int) -> str:
    name = args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(size)])
    folder = os.path.join(args.output or './output/train', name)
    last = os.path.join(folder, 'last.pth.tar')
    if os.path.exists(last):
        if not args.resume:
            raise UsageError(f'{folder} holds a run: continue it with --resume {last} or give another --experiment')
        if os.path.realpath(os.path.dirname(args.resume)) != os.path.realpath(folder):
            raise UsageError(f'{folder} holds another run than the one to resume: give another --experiment')
    with usage_errors(f'output folder {folder}'):
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, 'args.yaml'), 'w') as f:
            f.write(args_text)
    return folder


def train_one_epoch(
        epoch: int,
        task: ClassificationTask,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        device: torch.device,
        autocast: Callable[[], ContextManager],
        scaler: Optional[utils.NativeScaler],
        scheduler: Any,
        mixup_fn: Optional[Callable],
        progress: Progress,
        time_left: Callable[[int], str],
        castling: Optional[CastlingSchedule] = None,
) -> 'OrderedDict[str, float]':
    task.get_trainable_module().train()
    accum = args.grad_accum_steps
    whole = len(loader) // accum * accum  # batches in full groups; those after them make a smaller last one
    num_updates = epoch * progress.steps
    loss_sum, images = 0., 0
    group_images = 0
    optimizer.zero_grad()
    for i, (input, target) in enumerate(loader):
        update = (i + 1) % accum == 0 or i + 1 == len(loader)
        group = accum if i < whole else len(loader) - whole
        if args.no_prefetcher:
            input, target = input.to(device), target.to(device)
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
        if args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)

        with nullcontext() if update else task.no_sync():
            with autocast():
                loss = task(input, target)['loss']
            value = loss.item()
            lr = sum(g['lr'] for g in optimizer.param_groups) / len(optimizer.param_groups)
            if not math.isfinite(value):
                raise RunError(f'loss is {value} in epoch {epoch}, update {i // accum}, at learning rate {lr:.3g}')
            second_order = getattr(optimizer, 'is_second_order', False)
            params = task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
            if scaler is not None:
                scaler(loss / group, optimizer, args.clip_grad, args.clip_mode, params, second_order, update)
            else:
                (loss / group).backward(create_graph=second_order)
                if update:
                    if args.clip_grad is not None:
                        utils.dispatch_clip_grad(params, args.clip_grad, mode=args.clip_mode)
                    optimizer.step()
        loss_sum += value * len(input)
        images += len(input)
        group_images += len(input)
        if not update:
            continue

        optimizer.zero_grad()
        num_updates += 1
        task.update_ema(step=num_updates)
        if castling is not None:
            castling.step(num_updates)
        if args.synchronize_step and device.type == 'cuda':
            torch.cuda.synchronize()
        progress.step(
            group_images * args.world_size,
            f'loss {loss_sum / images:.4f}, lr {lr:.3g}, run {time_left(num_updates)} left, ')
        group_images = 0
        if scheduler is not None:
            scheduler.step_update(num_updates=num_updates, metric=loss_sum / images)
    progress.close()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    mean = torch.tensor(loss_sum / images, device=device)
    metrics = OrderedDict(loss=(utils.reduce_tensor(mean, args.world_size) if args.distributed else mean).item())
    if castling is not None:  # what is left of the branch on this process's last batch, in the mean over the layers
        with autocast():
            stats = castling.model.castling_stats(input).values()
        metrics.update((f'castling_{k}', sum(s[k] for s in stats) / len(stats)) for k in ('density', 'mass', 'gap'))
    return metrics


def train(args: argparse.Namespace) -> None:
    args.device_modules = sorted({*(args.device_modules or ()), 'vitlinear'})  # timm's train.py needs it, on args.yaml
    for module in args.device_modules:
        with usage_errors(f'--device-modules {module}'):
            importlib.import_module(module)
    del args.config
    args_text = yaml.safe_dump(vars(args), default_flow_style=False)
    _script.check_device(args.device)
    device = utils.init_distributed_device(args)
    primary = utils.is_primary(args)
    resumed = read_resume(args) if args.resume else {}
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    autocast = _script.autocast_for(args, device)
    scaler = utils.NativeScaler() if args.amp and args.amp_dtype == 'float16' and device.type == 'cuda' else None

    utils.random_seed(args.seed)
    model = make_model(args)
    args.num_classes = args.num_classes or model.num_classes
    data_config = _script.data_config_for(model, args)
    train_loader, eval_loader, mixup_fn = make_loaders(args, data_config, device)
    model.to(device=device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    _script.check_forward(model, data_config['input_size'], device, autocast)

    set_lr(args)
    changes = changed_arguments(resumed.get('args') or argparse.Namespace(), args)
    if changes and primary:
        print(f'not an exact continuation, arguments differ: {changes}', file=sys.stderr, flush=True)
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    task = ClassificationTask(model, make_loss(args, mixing), device=device, verbose=False)
    updates = math.ceil(len(train_loader) / args.grad_accum_steps)
    metric_name = args.eval_metric if eval_loader is not None else 'loss'
    with usage_errors(f'optimizer {args.opt}'):
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    resume_epoch = None
    if args.resume:
        with usage_errors(f'--resume {args.resume}'):
            resume_epoch = resume_task_checkpoint(
                task,
                args.resume,
                optimizer=None if args.no_resume_opt else optimizer,
                loss_scaler=None if args.no_resume_opt else scaler,
            )
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device='cpu' if args.model_ema_force_cpu else None,
        )
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    with usage_errors(f'schedule {args.sched}'):
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=metric_name == 'loss'),
            updates_per_epoch=updates,
        )
    start_epoch = args.start_epoch if args.start_epoch is not None else resume_epoch or 0
    castling = None
    if args.castling_ramp:
        with usage_errors(f'--castling-ramp {" ".join(map(str, args.castling_ramp))}'):
            castling = CastlingSchedule(model, num_epochs * updates, args.castling_ramp)
        castling.step(start_epoch * updates)
    if scheduler is not None and start_epoch:
        scheduler.step_update(start_epoch * updates) if args.sched_on_updates else scheduler.step(start_epoch)

    folder, saver, summary = '', None, ''
    if primary:
        folder = make_output(args, args_text, data_config['input_size'][-1])
        summary = os.path.join(folder, 'summary.csv')
        saver = Saver(
            model,
            optimizer,
            args=args,
            amp_scaler=scaler,
            checkpoint_dir=folder,
            decreasing=metric_name == 'loss',
            max_history=args.checkpoint_hist,
            task=task,
        )
        if args.resume:
            saver.resume(args.resume, resumed.get('saver'))
        utils.trim_summary(summary, start_epoch)
        size = 'x'.join(str(n) for n in data_config['input_size'])
        print(
            f'{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {size} images, '
            f'{args.num_classes} classes\n{len(train_loader.dataset)} training images, '
            f'{len(eval_loader.dataset) if eval_loader else 0} for evaluation; {updates} updates an epoch of '
            f'{args.batch_size * args.world_size * args.grad_accum_steps} images; learning rate {args.lr:.4g}\n'
            f'epochs {start_epoch} to {num_epochs - 1} into {folder}', flush=True)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile)
    eval_model = task.get_eval_model()  # before DDP: evaluation needs no communication between batches
    if args.distributed:
        task.prepare_distributed(device_ids=None if device.type == 'cpu' else [device])

    start = time.monotonic()

    def time_left(done: int) -> str:
        first, total = start_epoch * updates, num_epochs * updates
        return clock((time.monotonic() - start) / max(1, done - first) * (total - done))

    epoch = start_epoch
    try:
        for epoch in range(start_epoch, num_epochs):
            epoch_start = time.monotonic()
            seed_epoch(args.seed, args.rank, epoch)
            if hasattr(train_loader.sampler, 'set_epoch'):
                train_loader.sampler.set_epoch(epoch)
            if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
                train_loader.mixup_enabled = False
                if mixup_fn is not None:
                    mixup_fn.mixup_enabled = False
            train_metrics = train_one_epoch(
                epoch, task, train_loader, optimizer, args, device, autocast, scaler, scheduler, mixup_fn,
                Progress(f'epoch {epoch}', updates, args.log_interval, primary), time_left, castling)

            models = {'': (model, eval_model)}
            if task.has_ema() and not args.model_ema_force_cpu:
                models[' (EMA)'] = (task.get_trainable_module(ema=True), task.get_eval_model(ema=True))
            eval_metrics = None
            for suffix, (module, eval_module) in models.items():
                if args.distributed:
                    utils.distribute_bn(module, args.world_size, reduce=True)
                if not all(p.isfinite().all() for p in module.parameters()):
                    raise RunError(f'weights{suffix} are not finite after epoch {epoch}')
                if eval_loader is not None:
                    progress = Progress(f'evaluation{suffix}', len(eval_loader), args.log_interval, primary)
                    eval_metrics = _script.evaluate(
                        eval_module, eval_loader, args, device, autocast, progress, args.distributed)
                    if not math.isfinite(eval_metrics['loss']):
                        raise RunError(f'evaluation loss{suffix} is {eval_metrics["loss"]} after epoch {epoch}')

            metric = (eval_metrics or train_metrics)[metric_name]
            if primary:
                lr = sum(g['lr'] for g in optimizer.param_groups) / len(optimizer.param_groups)
                utils.update_summary(epoch, train_metrics, eval_metrics, summary, lr=lr)
                saver.save_checkpoint(epoch, metric=metric)
                text = f'epoch {epoch}: train loss {train_metrics["loss"]:.4f}'
                if eval_metrics:
                    text += (f', eval loss {eval_metrics["loss"]:.4f}, top-1 {eval_metrics["top1"]:.2f} %, '
                             f'top-5 {eval_metrics["top5"]:.2f} %')
                print(f'{text}, {time.monotonic() - epoch_start:.1f} s', flush=True)
            if scheduler is not None:
                scheduler.step(epoch + 1, metric)
    except (KeyboardInterrupt, RunError) as e:
        last = os.path.join(folder, 'last.pth.tar')
        if primary:
            hint = f'--output {args.output or "./output/train"} --experiment {os.path.basename(folder)} --resume {last}'
            told = f'continue with {hint}' if os.path.exists(last) else 'no checkpoint was written yet'
            kept = f'the last checkpoint is {last}' if os.path.exists(last) else told
            e.args = (f'Stopped in epoch {epoch}; {told}' if isinstance(e, KeyboardInterrupt) else f'{e}; {kept}',)
        raise
    if primary and saver.best_metric is not None:
        percent = '' if metric_name == 'loss' else ' %'
        name = {'top1': 'top-1', 'top5': 'top-5', 'loss': 'loss'}[metric_name]
        print(f'best {name} {saver.best_metric:.4g}{percent} in epoch {saver.best_epoch}: '
              f'{os.path.join(folder, "model_best.pth.tar")}', flush=True)
    if args.distributed:
        dist.destroy_process_group()


def main(argv: Optional[Sequence[str]] = None) -> int:
    return _script.run_script('train', lambda: train(build_parser().parse(argv)))


if __name__ == '__main__':
    sys.exit(main())
