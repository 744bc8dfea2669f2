"""What the checkpoint filters of all families do: unwrap a file's containers and see whether it fits the model."""
import logging
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import nn

_logger = logging.getLogger(__name__)


def unwrap(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Take the weights out of `{'model': ...}` or `{'state_dict': ...}`, and 'module.' off their names."""
    for key in ('model', 'state_dict'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    return {k[len('module.'):] if k.startswith('module.') else k: v for k, v in state_dict.items()}


def not_a_checkpoint_of(state_dict: dict[str, Any], model: nn.Module) -> ValueError:
    return ValueError(
        f'The checkpoint holds no {type(model).__name__} weights; '
        f"its first entries are {', '.join(list(state_dict)[:3]) or 'none'}.")


def last_blocks(keys: Iterable[str], pattern: str = r'(?:stages\.(\d+)\.)?blocks\.(\d+)\.') -> dict[int, int]:
    """Number of the last block of each stage in state dict keys; a model without stages counts as one.

    Args:
        keys: Names of weights.
        pattern: Matches those within blocks, with the numbers of stage and block as groups.
    """
    last: dict[int, int] = {}
    for m in filter(None, (re.match(pattern, k) for k in keys)):
        stage, block = int(m[1] or 0), int(m[2])
        last[stage] = max(last.get(stage, block), block)
    return dict(sorted(last.items()))


def check_size(architecture: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments out of a file that make a model of another order of size than the architecture's own.

    Building one of a hundred thousand blocks takes minutes and gigabytes, whatever its weights say.

    Args:
        architecture: Name that timm knows.
        arguments: For its constructor.

    Raises:
        ValueError: The model would have more than 16 times the blocks, or 256 times the numbers, of the registered one.
    """
    blocks, numbers = _registered_size(architecture)
    for name in ('depths', 'depth'):
        values = arguments.get(name, ())
        values = values if isinstance(values, (list, tuple)) else [values]
        if sum(n for n in values if isinstance(n, (int, float))) > 16 * blocks:
            raise ValueError(f'{name}={values} makes more than 16 times the {blocks} blocks of {architecture}.')
    made = _numbers(timm.create_model(architecture, **{**arguments, 'device': 'meta'}))
    if made > 256 * numbers:
        raise ValueError(
            f'The arguments make a model of {made:,} numbers, more than 256 times the {numbers:,} of {architecture}.')


@lru_cache
def _registered_size(architecture: str) -> tuple[int, int]:
    """Blocks and numbers of an architecture without arguments."""
    model = timm.create_model(architecture, device='meta')
    return sum(1 + n for n in last_blocks(model.state_dict()).values()) or 64, _numbers(model)


def _numbers(model: nn.Module) -> int:
    return sum(x.numel() for x in (*model.parameters(), *model.buffers()))


def fit(
        state_dict: dict[str, torch.Tensor],
        model: nn.Module,
        stem: str = 'patch_embed.proj',
        heads: tuple[str, ...] = ('head.', 'head_dist.'),
) -> dict[str, torch.Tensor]:
    """See that a state dict in our names is one of the model's architecture, and fit its classifier to the model.

    A classifier for another number of classes is replaced by the model's own, with a warning. The stem may differ in
    its input channels, which timm adapts.

    Args:
        state_dict: Weights.
        model: The model to load them into.
        stem: Name of the first convolution.
        heads: How the names of classifiers begin.

    Raises:
        ValueError: The weights belong to another architecture or variant, or some are missing.
    """
    own = model.state_dict()
    if f'{stem}.weight' not in state_dict:
        raise not_a_checkpoint_of(state_dict, model)
    theirs, ours = last_blocks(state_dict), last_blocks(own)
    if theirs != ours:
        raise ValueError(
            f'The checkpoint is of another variant: its stages have {[1 + n for n in theirs.values()]} blocks, '
            f'the model has {[1 + n for n in ours.values()]}.')
    missing = [k for k in own if k not in state_dict and not k.startswith(heads)]
    if missing:
        raise ValueError(f"The checkpoint is incomplete: {', '.join(missing[:3])} are among the weights it lacks.")
    for k, v in state_dict.items():
        if k in own and v.shape != own[k].shape and not k.startswith((*heads, f'{stem}.')):
            raise ValueError(
                f'The checkpoint is of another variant: {k} has shape {tuple(v.shape)}, '
                f'the model expects {tuple(own[k].shape)}.')

    state_dict = {k: v for k, v in state_dict.items() if k in own or not k.startswith(heads)}
    other = [k for k in state_dict if k.startswith(heads) and state_dict[k].shape != own[k].shape]
    if other:
        _logger.warning(
            f"The checkpoint's head has {len(state_dict[other[0]])} classes, the model {len(own[other[0]])}: "
            f'the head is not loaded.')
        state_dict.update({k: own[k] for k in other})
    return state_dict


def own_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The filter of architectures that nobody else published: a state dict of ours, or a container of one; as `fit`."""
    return fit(unwrap(state_dict), model)
