"""What the command line programs share: flags, configs, checks of what the user gave, evaluation, progress.

Everything a user can get wrong is raised as a `UsageError`, which `run_script` prints as one line.
"""
import argparse
import difflib
import logging
import math
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import yaml
from timm import utils
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from tqdm import tqdm

from ..models import BACKBONES

_logger = logging.getLogger(__name__)


class UsageError(Exception):
    """The user asked for something that cannot be done."""

    exit_code = 2


class RunError(UsageError):
    """A run that started well and cannot go on."""

    exit_code = 1


def run_script(name: str, script: Callable[[], None]) -> int:
    """Call `script` and turn what stops it into one line on stderr and an exit code."""
    speaks = os.environ.get('LOCAL_RANK', '0') == '0'  # all processes meet the same mistake: one line a machine
    try:
        script()
    except UsageError as e:
        if speaks or isinstance(e, RunError):
            rank = f' (rank {os.environ["RANK"]})' if isinstance(e, RunError) and 'RANK' in os.environ else ''
            print(f'vitlinear {name}: error{rank}: {e}', file=sys.stderr, flush=True)
        return e.exit_code
    except KeyboardInterrupt as e:
        if speaks:
            print(f'\nvitlinear {name}: interrupted. {e}'.rstrip(), file=sys.stderr, flush=True)
        return 130
    return 0


def command(name: str) -> Callable[[Callable], Callable[..., int]]:
    """Decorator that makes a command's `main` of a function of the words of the command line, see `run_script`."""
    return lambda run: lambda argv=None: run_script(name, partial(run, argv))


@contextmanager
def usage_errors(doing: str):
    """Report whatever the libraries below object to as a `UsageError` that says what was being done."""
    try:
        yield
    except UsageError:
        raise
    except Exception as e:
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UsageError(f'{doing}: {reason}') from e


def suggest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f', did you mean {" or ".join(near)}?' if near else ''


def _integer(value: str, at_least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected an integer, not {value!r}') from None
    if number < at_least:
        raise argparse.ArgumentTypeError(f'must be {at_least} or more, not {number}')
    return number


natural_int = partial(_integer, at_least=0)
positive_int = partial(_integer, at_least=1)


class Parser(argparse.ArgumentParser):
    """Parser that knows which flags of timm's script it leaves out.

    Args:
        name: Subcommand, 'train' or 'validate', which is also the stem of timm's script.
        unsupported: Flags of timm's script that this program does not have, by destination, with timm's defaults.
    """

    def __init__(self, name: str, unsupported: dict[str, Any], **kwargs) -> None:
        super().__init__(prog=f'vitlinear {name}', allow_abbrev=False, **kwargs)
        self.name = name
        self.unsupported = unsupported

    def error(self, message: str) -> None:
        raise UsageError(message)

    def refusal(self, dest: str, shown: str) -> str:
        return (
            f"{shown} belongs to timm's {self.name}.py and is not supported by vitlinear {self.name}; run timm's "
            f"script for it: python -m vitlinear run {self.name}.py ..."
        )

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line on top of the `--config` file, if one is given; positional DIR becomes data_dir."""
        argv = list(sys.argv[1:] if argv is None else argv)
        if any(action.dest == 'config' for action in self._actions):
            first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            first.error = self.error
            first.add_argument('-c', '--config', default='')
            config = first.parse_known_args(argv)[0].config
            if config:
                self.set_defaults(**self.load_config(find_config(config)))
        args, rest = self.parse_known_args(argv)
        for word in rest:
            flag = word.partition('=')[0]
            dest = flag.lstrip('-').replace('-', '_')
            if word.startswith('-') and dest in self.unsupported:
                raise UsageError(self.refusal(dest, flag))
            if word.startswith('-'):
                raise UsageError(f'unknown flag {flag}{suggest(flag, self._option_string_actions)}')
        if rest:
            raise UsageError(f'unexpected argument {rest[0]!r}')
        for dest, value in vars(args).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f'--{dest.replace("_", "-")}: {value} is not a number to work with')
        if args.data:
            args.data_dir = args.data_dir or args.data
        return args

    def load_config(self, path: Path) -> dict[str, Any]:
        """Read a YAML of timm's train.py and check every key and value against the parser."""
        try:
            config = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            raise UsageError(f'config {path} cannot be read as YAML: {" ".join(str(e).split())}') from e
        if not isinstance(config, dict):
            raise UsageError(f'config {path} must hold "key: value" lines')
        actions = {a.dest: a for a in self._actions if a.dest not in ('help', 'config')}
        values = {}
        for key, value in config.items():
            if key in actions:
                try:
                    values[key] = _typed(actions[key], value)
                except (ValueError, argparse.ArgumentTypeError) as e:
                    raise UsageError(f'config {path}: {key}: {e}') from e
            elif key not in self.unsupported:
                raise UsageError(f'config {path}: unknown key {key}{suggest(str(key), actions)}')
            elif value != self.unsupported[key]:  # at its default it changes nothing: timm's own args.yaml lists all
                raise UsageError(f'config {path}: ' + self.refusal(key, f'key {key}'))
        return values


def _typed(action: argparse.Action, value: Any) -> Any:
    def scalar(v: Any) -> Any:
        if action.type in (None, str):
            if not isinstance(v, str):
                raise ValueError(f'expected a string, not {v!r}')
        else:
            if isinstance(v, bool) or not isinstance(v, (int, float, str)):
                raise ValueError(f'expected a number, not {v!r}')
            try:
                v = action.type(str(v))  # strings too: YAML reads 1e-3 as one
            except ValueError:
                raise ValueError(f'expected a number, not {v!r}') from None
        if action.choices and v not in action.choices:
            raise ValueError(f'{v!r} is not one of {", ".join(action.choices)}')
        return v

    if value is None and action.default in (None, ''):
        return action.default
    if isinstance(action, utils.ParseKwargs):
        if not isinstance(value, dict):
            raise ValueError(f'expected a mapping, not {value!r}')
        return value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f'expected true or false, not {value!r}')
        return value
    if action.nargs in ('+', '*') or isinstance(action.nargs, int):
        if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
            number = f' of {action.nargs}' if isinstance(action.nargs, int) else ''
            raise ValueError(f'expected a list{number}, not {value!r}')
        return [scalar(v) for v in value]
    return scalar(value)


def config_folder() -> Path:
    """Folder of the packaged configs: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next((d for d in (package / 'configs', package.parent / 'configs') if d.is_dir()), package / 'configs')


def find_config(name: str) -> Path:
    """Path of a config given as a file or as the bare name of a packaged one."""
    if os.path.isfile(name):
        return Path(name)
    packaged = {p.stem: p for p in sorted(config_folder().glob('*.yaml'))}
    stem = name[:-len('.yaml')] if name.endswith('.yaml') else name
    if stem in packaged:
        return packaged[stem]
    raise UsageError(f'config {name} is neither a file nor a packaged config{suggest(stem, packaged)}')


def add_data_flags(flag: Callable) -> None:
    flag('data', nargs='?', metavar='DIR', help='data folder, the same as --data-dir')
    flag('--data-dir', metavar='DIR', help='data folder')
    flag('--dataset', default='', metavar='NAME', help='torch/fashion_mnist, torch/cifar100, ...; a folder if empty')
    flag('--dataset-download', action='store_true', help='let torchvision download the data')
    flag('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    flag('--input-img-mode', metavar='MODE', help='PIL mode of the images (default: by number of channels)')
    flag('--input-key', metavar='KEY', help='key of the images in the dataset')
    flag('--target-key', metavar='KEY', help='key of the labels in the dataset')


def add_input_flags(flag: Callable) -> None:
    flag('--num-classes', type=positive_int, metavar='N', help="classes (default: the model's)")
    flag('--gp', metavar='POOL', help="global pooling (default: the model's)")
    flag('--img-size', type=positive_int, metavar='N', help='side of the input images')
    flag('--in-chans', type=positive_int, metavar='N', help='channels of the input images')
    flag('--input-size', nargs=3, type=positive_int, metavar='N', help='channels, height and width of the input')
    flag('--crop-pct', type=float, metavar='PCT', help='part of the image that the evaluation crop keeps')
    flag('--mean', type=float, nargs='+', metavar='X', help='mean pixel value, per channel, images being 0 to 1')
    flag('--std', type=float, nargs='+', metavar='X', help='standard deviation of pixels, per channel')
    flag('--interpolation', default='', metavar='NAME', help='interpolation of the evaluation resize')
    flag('--channels-last', action='store_true', help='channels-last memory format')
    flag('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs, metavar='K=V', help='constructor arguments')
    flag('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')


def add_device_flags(flag: Callable) -> None:
    flag('--device', default='cuda', help='cuda, cuda:1, cpu, mps, ...')
    flag('--amp', action='store_true', help='mixed precision')
    flag('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='dtype of mixed precision')


def add_loader_flags(flag: Callable) -> None:
    flag('-j', '--workers', type=natural_int, default=4, metavar='N', help='data loading processes')
    flag('--pin-mem', action='store_true', help='page-locked memory in the data loader')
    flag('--no-prefetcher', action='store_true', help="normalise images in the workers, without timm's prefetcher")


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
        load_checkpoint(model, path, use_ema)
        return

    def filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        own = model.state_dict()
        state_dict = backbone.checkpoint_filter_fn(state_dict, model)
        kept = [k for k, v in state_dict.items() if k in own and v.data_ptr() == own[k].data_ptr()]
        if kept and not new_head:
            raise UsageError(f'{path} has a head for other than {model.num_classes} classes: give --num-classes')
        return state_dict

    load_checkpoint(model, path, use_ema, filter_fn=filter_fn)


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
    channels = args.input_size[0] if args.input_size else args.in_chans or getattr(model, 'in_chans', 3)
    for name in ('mean', 'std'):
        if len(getattr(args, name) or [0]) not in (1, channels):
            raise UsageError(f'--{name} takes one number or one for each of the {channels} channels')
    config = resolve_data_config(vars(args), model=model, use_test_size=use_test_size)
    if args.in_chans and not args.input_size:
        config['input_size'] = (args.in_chans, *config['input_size'][1:])
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

    Returns:
        loss, top1 and top5; the accuracies in percent.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=device, max_samples=evaluation_sample_limit(loader))
    with torch.inference_mode():
        for input, target in loader:
            if args.no_prefetcher:
                input, target = input.to(device), target.to(device)
            if args.channels_last:
                input = input.contiguous(memory_format=torch.channels_last)
            with autocast():
                output = model(input)
            evaluator.update(output[0] if isinstance(output, (tuple, list)) else output, target)
            progress.step(len(target))
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
