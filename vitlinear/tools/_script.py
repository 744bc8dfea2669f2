"""What the commands share around a model: making it, loading weights, evaluation, progress."""
import argparse
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import timm
import torch
import torch.nn as nn
from timm import utils
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from tqdm import tqdm

from ..models import BACKBONES, is_ours
from ..models._timm import read_weights
from ..zoo.files import check_archive
from ._datasets import left_out
from ._errors import UsageError, suggest, usage_errors


def check_device(name: str) -> None:
    with usage_errors(f'--device {name}'):
        device = torch.device(name)
    if device.type == 'cuda' and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UsageError(
            f'--device {name}: {torch.cuda.device_count()} CUDA GPUs are usable here; use --device cpu to run without')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise UsageError('--device mps: no such GPU here; use --device cpu')


def autocast_for(args: argparse.Namespace, device: torch.device) -> Callable[[], AbstractContextManager]:
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))


def create_model(args: argparse.Namespace, **kwargs) -> nn.Module:
    """timm.create_model, with input errors reported as such."""
    if ':' not in args.model:  # hf-hub:, local-dir: and the like carry their own names
        arch = args.model.partition('.')[0]
        if not timm.is_model(arch):
            raise UsageError(f'unknown model {args.model}{suggest(arch, timm.list_models())}')
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)  # None: as the weights want
    with usage_errors(f'model {args.model}'):
        return timm.create_model(
            args.model,
            in_chans=in_chans,
            num_classes=args.num_classes,
            global_pool=args.gp,
            **kwargs,
            **args.model_kwargs,
        )


def load_weights(model: nn.Module, path: str, use_ema: bool = True, new_head: bool = True) -> None:
    """timm's load_checkpoint, for checkpoints of the authors of our models as well.

    Args:
        model: Model to load into.
        path: Checkpoint file.
        use_ema: Prefer the moving average of the weights.
        new_head: Let one of our models keep its own classifier where the checkpoint's has other classes.
    """
    backbone = BACKBONES.get(type(model).__module__.rpartition('.')[2])
    if backbone is None or not type(model).__module__.startswith('vitlinear.'):
        if not path.endswith(('.safetensors', '.npz', '.npy')):
            check_archive(path)
        load_checkpoint(model, path, use_ema)
        return
    own = model.state_dict()
    state_dict = backbone.checkpoint_filter_fn(read_weights(path, use_ema), model)
    kept = [k for k, v in state_dict.items() if k in own and v.data_ptr() == own[k].data_ptr()]
    if kept and not new_head:
        raise UsageError(f'{path} has a head for other than {model.num_classes} classes: give --num-classes')
    model.load_state_dict(state_dict)


def classes_of_file(args: argparse.Namespace) -> int | None:
    """For how many classes the classifier of args.pretrained_path counts; where it is for others, timm drops it.

    Our own models fit it themselves, whatever its names.
    """
    architecture = args.model.partition('.')[0]
    if is_ours(architecture):
        return args.num_classes
    names = timm.get_pretrained_cfg(architecture).classifier or ()
    bias = read_weights(args.pretrained_path).get(f'{names if isinstance(names, str) else names[0]}.bias')
    return -1 if bias is None else len(bias)


def create_evaluated_model(args: argparse.Namespace, pretrained: bool = False) -> nn.Module:
    """The model to evaluate, with the weights of args.checkpoint, or with the published ones where that is empty.

    Args:
        args: Arguments that hold the model's and input flags, checkpoint, use_ema and seed.
        pretrained: Load the published weights first even where there is a checkpoint.
    """
    if args.checkpoint and not os.path.isfile(args.checkpoint):
        raise UsageError(f'checkpoint {args.checkpoint} does not exist')
    utils.random_seed(args.seed)
    model = create_model(args, pretrained=pretrained or not args.checkpoint)
    if args.checkpoint:
        with usage_errors(f'checkpoint {args.checkpoint}'):
            load_weights(model, args.checkpoint, args.use_ema, new_head=False)
    return model


def data_config_for(model: nn.Module, args: argparse.Namespace, use_test_size: bool = False) -> dict[str, Any]:
    """How images are to be prepared: as `args` say, else as the model's cfg says; means and deviations per channel."""
    channels = args.input_size[0] if args.input_size else args.in_chans or getattr(model, 'in_chans', 3)
    for name in ('mean', 'std'):
        if len(getattr(args, name) or [0]) not in (1, channels):
            raise UsageError(f'--{name} takes one number or one for each of the {channels} channels')
    config = resolve_data_config({**vars(args), 'in_chans': channels}, model=model, use_test_size=use_test_size)
    config['input_size'] = (channels, *config['input_size'][1:])
    return config


def put_on_device(
        model: nn.Module,
        args: argparse.Namespace,
        input_size: tuple[int, int, int],
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
) -> None:
    """Move a model and send a blank image through it, so that a wrong size is an answer, no traceback mid-epoch."""
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    model.to(device=device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    training = model.training
    model.eval()
    shape = 'x'.join(str(n) for n in input_size)
    with usage_errors(f'the model does not take images of {shape} (channels x height x width)'):
        with torch.no_grad(), autocast():
            model(torch.zeros(1, *input_size, device=device))
    model.train(training)


def evaluate(
        model: nn.Module,
        loader: Iterable,
        args: argparse.Namespace,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        progress: 'Progress',
        distributed: bool = False,
) -> 'OrderedDict[str, float]':
    """Mean loss and accuracies over the data, every image counted once however many processes share them.

    Those with a negative target, which could not be read, are left out.

    Returns:
        loss, top1 and top5; the accuracies in percent.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=device)
    limit, seen = evaluation_sample_limit(loader), 0  # those after it fill up the batches of the last process
    with torch.inference_mode():
        for input, target in loader:
            if args.no_prefetcher:
                input, target = input.to(device), target.to(device)
            if args.channels_last:
                input = input.contiguous(memory_format=torch.channels_last)
            with autocast():
                output = model(input)
            output = output[0] if isinstance(output, (tuple, list)) else output
            if limit is not None:
                output, target = output[:max(0, limit - seen)], target[:max(0, limit - seen)]
                seen += len(target)
            if left_out(loader.dataset):
                output, target = output[target >= 0], target[target >= 0]
            evaluator.update(output, target)
            progress.step(len(input))
    progress.close()
    return evaluator.compute(distributed=distributed)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


class Progress:
    """A bar on a terminal, a line every `interval` steps elsewhere; both on stderr, and neither unless `show`."""

    def __init__(self, label: str, steps: int, interval: int, show: bool = True) -> None:
        self.label, self.steps, self.interval, self.show = label, steps, max(1, interval), show
        self.bar = None
        if show and sys.stderr.isatty():
            self.bar = tqdm(total=steps, desc=label, leave=False, dynamic_ncols=True, file=sys.stderr)
        self.done = self.images = 0
        self.start = time.monotonic()

    def step(self, images: int, status: str = '') -> None:
        self.done += 1
        self.images += images
        if not self.show:
            return
        seconds = max(time.monotonic() - self.start, 1e-9)
        status = f'{status}{self.images / seconds:.0f} images/s'
        if self.bar is not None:
            self.bar.set_postfix_str(status, refresh=False)
            self.bar.update()
        elif self.done % self.interval == 0 or self.done == self.steps:
            left = clock(seconds / self.done * (self.steps - self.done))
            print(f'{self.label} [{self.done}/{self.steps}] {status}, {left} left', file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
