"""Any checkpoint of our models as a folder for the Hub: `vitlinear convert FILE --model NAME --output FOLDER`.

    vitlinear convert vvt_small_224.pth --model vvt_small --tag in1k --output vvt_small.in1k
    vitlinear convert checkpoint_300 --model qna_vit_tiny --tag in1k --output qna_vit_tiny.in1k

FILE is a file of the authors (PyTorch, or msgpack of Flax, for which neither jax nor flax is needed), a checkpoint of
`vitlinear train` or of timm's train.py, or a state dict in a .pth or .safetensors file. Nothing in it is ever run. The
folder is what `timm.create_model('local-dir:FOLDER', pretrained=True)` loads. Classes and channels follow the file; how
images are to be prepared is taken from a training checkpoint, else from the cfg of the model, unless flags say so.
"""
import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import ParseKwargs
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn

import vitlinear

from ..models import backbone_of, is_ours
from ..models._castling import SCHEDULE_ARGUMENTS
from ..models._timm import read_weights
from ..zoo._flax import is_flax
from ..zoo.hub import sha256
from . import _errors, _flags
from ._errors import UsageError, suggest, usage_errors
from ._flags import RUN_SETTINGS
from .export import add_flags, check_target, data_cfg, export_model, merged, read_facts, report, split_name
from .info import architectures

__all__ = ['convert', 'variant_of']

_HEAD_BIAS = re.compile(r'(?:^|[./])(?:head|head\.fc|head\.linear|head_logits|classifier|fc)[./]bias$')


def _is_of_host(state_dict: dict[str, torch.Tensor], model: nn.Module) -> bool:
    is_of_host = backbone_of(model.pretrained_cfg['architecture']).is_of_host
    return is_of_host is not None and is_of_host(state_dict, model)


def _fits(state_dict: dict[str, torch.Tensor], architecture: str, kwargs: dict[str, Any]) -> str | None:
    """None if the weights are of that architecture, else why they are not."""
    logger = logging.getLogger('vitlinear.models')
    level = logger.level
    logger.setLevel(logging.ERROR)  # no warnings about heads of other sizes while models are tried on
    try:
        model = timm.create_model(architecture, device='meta', **kwargs)
        try:
            backbone_of(architecture).checkpoint_filter_fn(dict(state_dict), model)
        except (ValueError, KeyError, RuntimeError) as e:
            return (str(e) or type(e).__name__).splitlines()[0]
    finally:
        logger.setLevel(level)
    return None


def variant_of(state_dict: dict[str, torch.Tensor], architecture: str) -> str | None:
    """Which architecture of a family weights belong to, None if it is none of them.

    Args:
        state_dict: Weights, named as their authors or we do.
        architecture: Any architecture of the family; taken if the weights fit several.
    """
    family = backbone_of(architecture).family
    names = [architecture, *(name for name in architectures() if backbone_of(name).family is family)]
    return _inferred(state_dict, architecture) or next((n for n in names if _fits(state_dict, n, {}) is None), None)


def _inferred(state_dict: dict[str, torch.Tensor], architecture: str) -> str | None:
    """What a family's own `infer_variant` says: its filter may resize what tells variants apart."""
    infer = backbone_of(architecture).infer_variant
    try:
        return None if infer is None else infer(dict(state_dict))
    except (AttributeError, KeyError, RuntimeError, ValueError):
        return None


def _run_arguments(path: Path) -> dict[str, Any]:
    """What a training checkpoint of `vitlinear train` or timm's train.py says about itself; empty for other files."""
    if path.name.endswith('.safetensors') or is_flax(path):
        return {}
    try:
        checkpoint = load_checkpoint_metadata(str(path))
    except Exception:
        return {}  # a format from before zip files, which cannot be mapped; the weights are read on their own
    if not isinstance(checkpoint, dict):
        return {}
    out = dict(ema=any(checkpoint.get(k) is not None for k in ('state_dict_ema', 'model_ema')))
    if isinstance(checkpoint.get('arch'), str) and 'state_dict' in checkpoint:
        out['arch'] = checkpoint['arch'].partition('.')[0]
        settings = checkpoint.get('args')
        out.update({k: getattr(settings, k) for k in RUN_SETTINGS if getattr(settings, k, None) not in (None, '', {})})
    return out


def _classes(state_dict: dict[str, torch.Tensor]) -> int | None:
    """Number of classes of weights, 0 if they have no head."""
    found = {v.numel() for k, v in state_dict.items() if v.ndim == 1 and _HEAD_BIAS.search(k)}
    return found.pop() if len(found) == 1 else None if found else 0


def _load(path: Path, architecture: str, kwargs: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> nn.Module:
    """A model with exactly these weights: nothing missing, nothing left over, no head replaced."""
    other, reason = _inferred(state_dict, architecture), None
    if other in (None, architecture):
        with usage_errors(f'--model {architecture}'):
            reason = _fits(state_dict, architecture, kwargs)
        other = variant_of(state_dict, architecture) if reason else None
    if other:
        raise UsageError(
            f'{path} holds no weights of {architecture}: it is a checkpoint of {other}, give --model {other}')
    if reason:
        raise UsageError(f'{path} holds no weights of {architecture}. {reason}')
    with usage_errors(str(path)):
        model = timm.create_model(architecture, **kwargs)
        channels = model.in_chans
        mapped = backbone_of(architecture).checkpoint_filter_fn(dict(state_dict), model)
        first = model.pretrained_cfg['first_conv']
        weight = mapped.get(f'{first}.weight')
        if weight is not None and weight.ndim == 4 and weight.shape[1] != channels:
            if 'in_chans' in kwargs:
                raise UsageError(f'{path} takes {weight.shape[1]} channels, not {channels}')
            return _load(path, architecture, dict(kwargs, in_chans=weight.shape[1]), state_dict)
        own = model.state_dict()
        kept = [k for k, v in mapped.items() if k in own and v.data_ptr() == own[k].data_ptr() and v.numel()]
        host = _is_of_host(state_dict, model)
        if host:  # what it has not, the model keeps
            kept = [k for k in kept if k in state_dict]
        if kept:
            raise UsageError(f'{path}: {kept[0]} does not fit {architecture} with {model.num_classes} classes')
        surplus, missing = sorted(mapped.keys() - own.keys()), sorted(own.keys() - mapped.keys())
        if surplus or missing:
            told = [f'has {k} to spare' for k in surplus[:1]] + [f'lacks {k}' for k in missing[:1]]
            raise UsageError(f'{path} does not fit {architecture}: it {" and ".join(told)}')
        both = state_dict.keys() & mapped.keys() if host else None
        sizes = [sum(v.numel() for k, v in d.items() if both is None or k in both) for d in (state_dict, mapped)]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f'{path} holds {sizes[0]:,} numbers and the model {sizes[1]:,}, so that some would be resized or '
                f'left out: give the arguments that the model was made with, such as --model-kwargs img_size=384')
        model.load_state_dict(mapped)
    return model.eval()


def convert(
        path: Path,
        model: str,
        folder: Path,
        tag: str | None = None,
        use_ema: bool | None = None,
        labels: Sequence[str] | None = None,
        facts: dict[str, Any] | None = None,
        finite: bool = True,
        **settings: Any,
) -> Any:
    """Write a checkpoint as a folder for the Hub.

    Args:
        path: The checkpoint.
        model: Architecture, or architecture.tag.
        folder: Folder to write.
        tag: Tag of the weights, if neither `model` nor the name of the folder says.
        use_ema: Take the moving average, or not; if it is there where not said.
        labels: Names of the classes.
        facts: Fields of the record.
        finite: Refuse NaN and Inf among the weights.
        settings: input_size, mean, std, crop_pct, interpolation and model_kwargs as `vitlinear train` takes them.

    Returns:
        The record.
    """
    architecture, _, named = model.partition('.')
    if not is_ours(architecture):
        raise UsageError(f'--model {model}: no model of vitlinear{suggest(architecture, architectures())}')
    if not path.is_file():
        raise UsageError(f'{path} is no file')
    tag = split_name(folder, architecture, tag or named, 'converted')
    check_target(folder)
    with usage_errors(str(path)):
        run = _run_arguments(path)
        if use_ema and not run.get('ema'):
            raise UsageError(f'--ema: {path} holds no moving average')
        try:
            state_dict = read_weights(path, use_ema=use_ema is not False)
        except ValueError as e:
            raise UsageError(str(e).splitlines()[0]) from e
    if run.get('arch', architecture) != architecture:
        raise UsageError(f"{path} is a checkpoint of {run['arch']}: give --model {run['arch']}")
    settings = {**{k: v for k, v in run.items() if k in RUN_SETTINGS}, **{k: v for k, v in settings.items() if v}}

    kwargs = {k: v for k, v in (settings.get('model_kwargs') or {}).items() if k not in SCHEDULE_ARGUMENTS}
    state_dict.pop('castling_step', None)
    classes = _classes(state_dict)
    if classes is None:
        raise UsageError(f'{path} has several heads, which no model of ours has')
    if settings.get('gp') is not None:
        kwargs['global_pool'] = settings['gp']
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for what weights of another backbone leave to the model: the same file each time
        made = _load(path, architecture, dict(kwargs, num_classes=classes), state_dict)
    known = timm.models.get_arch_pretrained_cfgs(architecture).get(f'{architecture}.{tag}')
    if known and known.num_classes == made.num_classes:  # the preparation of images that the tag is known for
        made.pretrained_cfg = {**made.pretrained_cfg, **known.to_dict(remove_source=True)}
    if made.pretrained_cfg.get('num_classes') != made.num_classes:
        made.pretrained_cfg.pop('label_names', None)
    channels = made.in_chans
    if channels != made.pretrained_cfg['input_size'][0]:
        size = settings.get('input_size') or [channels, *made.pretrained_cfg['input_size'][1:]]
        made.pretrained_cfg['input_size'] = (channels, *size[1:])
        for name in ('mean', 'std'):
            if not settings.get(name):
                raise UsageError(
                    f'{path} takes {channels} channel(s), and how their values are to be scaled is not known: give '
                    f'--mean and --std')
    if 'img_size' in kwargs and not settings.get('input_size'):  # the model was made for it
        size = kwargs['img_size']
        settings['input_size'] = (channels, *([size] * 2 if isinstance(size, int) else size))
    args = argparse.Namespace(**{**dict.fromkeys(RUN_SETTINGS), **settings})
    labels = labels or made.pretrained_cfg.get('label_names')
    cfg = data_cfg(made, args, labels)
    found = dict(provenance=dict(
        trained_by=f'someone this record does not know: converted from {path.name}, sha256 {sha256(path)}',
        mechanism=f'as implemented in vitlinear {vitlinear.__version__}',
        configuration=f'that of {architecture}',
    ))
    made.pretrained_cfg['architecture'] = architecture
    if _is_of_host(state_dict, made):
        found['limits'] = (
            'A start for training: the weights are those of a backbone with softmax attention, and what it has not '
            'is as initialised.')
    return export_model(made, folder, tag, cfg, merged(found, facts or {}), finite=finite)


@_errors.command('convert')
def main(argv: Sequence[str] | None) -> None:
    parser = _flags.Parser('convert', {}, description='Write a checkpoint of any kind as a folder for the Hub.')
    parser.add_argument('file', type=Path, metavar='FILE', help='checkpoint: .pth, .safetensors, msgpack of Flax')
    parser.add_argument('--model', required=True, metavar='NAME', help='architecture, or architecture.tag')
    parser.add_argument('--output', required=True, type=Path, metavar='FOLDER', help='folder to write')
    flag = parser.add_argument
    add_flags(flag)
    flag('--input-size', nargs=3, type=_flags.positive_int, metavar='N', help='channels, height and width of images')
    flag('--mean', type=float, nargs='+', metavar='X', help='mean pixel value, per channel, images being 0 to 1')
    flag('--std', type=float, nargs='+', metavar='X', help='standard deviation of pixels, per channel')
    flag('--crop-pct', type=float, metavar='PCT', help='part of the image that the evaluation crop keeps')
    flag('--interpolation', metavar='NAME', help='interpolation of the evaluation resize')
    flag('--model-kwargs', nargs='*', action=ParseKwargs, metavar='K=V', help='constructor arguments')
    args = parser.parse_args(argv)
    names = 'input_size', 'mean', 'std', 'crop_pct', 'interpolation', 'model_kwargs'
    report(convert(
        args.file, args.model, args.output, args.tag, args.ema, args.labels, read_facts(args.facts),
        not args.allow_non_finite, **{name: getattr(args, name) for name in names}))
