"""Flags that commands share, and YAML configs, whose keys and values are checked against them."""
import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from timm import utils

from ._errors import UsageError, suggest


def _integer(value: str, at_least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected an integer, not {value!r}') from None
    if number < at_least:
        raise argparse.ArgumentTypeError(f'must be {at_least} or more, not {number}')
    return number


def _share(value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected a number, not {value!r}') from None
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f'must be between 0 and 1, not {value}')
    return share


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
        return self.checked(read_yaml(path, 'config'), path)

    def checked(self, config: dict[str, Any], path: Path) -> dict[str, Any]:
        """The values of a config, each in the type of its flag."""
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


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file, or a UsageError that begins with `what` and the path.

    A few lines may stand for any amount of data through aliases, and a few brackets for any depth: both have bounds.
    """
    try:
        text = path.read_text(encoding='utf-8')
        node = yaml.compose(text, Loader=yaml.SafeLoader) if len(text) <= 2 ** 20 else None
        if len(text) > 2 ** 20 or (node is not None and _yaml_size(node, {}) > 100_000):
            raise UsageError(f'{what} {path} holds more than a file of settings: 100,000 values or 1 MiB of text')
        data = yaml.safe_load(text)
    except RecursionError:
        raise UsageError(f'{what} {path} is nested too deeply') from None
    except (OSError, ValueError, TypeError, yaml.YAMLError) as e:
        raise UsageError(f'{what} {path} cannot be read as YAML: {" ".join(str(e).split())}') from e
    if not isinstance(data, dict):
        raise UsageError(f'{what} {path} must hold "key: value" lines')
    return data


def _yaml_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Values that a node stands for, aliases written out; infinitely many where it holds itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # for aliases within
        below = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for entry in below for part in (entry if isinstance(entry, tuple) else (entry,))]
        sizes[id(node)] = 1 + sum(_yaml_size(part, sizes) for part in parts)
    return sizes[id(node)]


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


# what the settings of a run say about its model and images, beside the classes
RUN_SETTINGS = (
    'input_size', 'img_size', 'in_chans', 'mean', 'std', 'crop_pct', 'interpolation', 'model_kwargs', 'gp')


def add_data_flags(flag: Callable) -> None:
    flag('data', nargs='?', metavar='DIR', help='data folder, the same as --data-dir')
    flag('--data-dir', metavar='DIR', help='data folder')
    flag('--dataset', default='', metavar='NAME', help='torch/fashion_mnist, torch/cifar100, ...; a folder if empty')
    flag('--dataset-download', action='store_true', help='let torchvision download the data')
    flag('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    flag('--input-img-mode', metavar='MODE', help='PIL mode of the images (default: by number of channels)')
    flag('--input-key', metavar='KEY', help='key of the images in the dataset')
    flag('--max-unreadable', type=_share, default=.1, metavar='SHARE', help='share of image files to go on without')
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
