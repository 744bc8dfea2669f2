"""The door: whether a forward pass may run in row blocks, asked once, and the pass itself."""
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..ops._dispatch import PLAIN_TENSORS
from .onednn import CONVOLUTIONS, LINEARS, is_cpu_inference
from .rows import CHILDREN, call_part

# Types that are what they seem: those of adapters, quantised and parametrised layers come from elsewhere.
_PLAIN_ORIGINS = ('torch.nn.modules.', 'timm.', 'vitlinear.')
_plain_types: dict[type[nn.Module], bool] = {}


def is_unmodified(model: nn.Module) -> bool:
    """Whether nothing is attached to a model in evaluation mode: no hooks, adapters, patched or quantised layers."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    modules = [model]
    for m in modules:  # grows on the way; no calls, as it runs in every forward pass
        kind, own = type(m), m.__dict__
        if kind not in _plain_types:
            _plain_types[kind] = f'{kind.__module__}.'.startswith(_PLAIN_ORIGINS)
        if not _plain_types[kind] or own['training'] or own['_forward_hooks'] or own['_forward_pre_hooks']:
            return False
        weight, children = own['_parameters'].get('weight'), own['_modules']
        if 'forward' in own or (weight is not None and type(weight) not in PLAIN_TENSORS):
            return False
        linears, convolutions = CHILDREN.get(kind, ((), ()))
        for name in linears:
            if type(children[name]) not in LINEARS:
                return False
        for name in convolutions:
            if type(children[name]) not in CONVOLUTIONS:
                return False
        for child in children.values():
            if child is not None:
                modules.append(child)
    return True


def applies(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether a forward pass may run in row blocks: eager inference on a CPU by a model that nothing is attached to.

    Costs about 0.1 ms for a model of 250 modules.
    """
    return is_cpu_inference(x) and is_unmodified(model)


def run(parts: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    """The parts of a model, one after the other, each in its row-block form where its type has one.

    No map is kept for longer than the next part takes. A map that nobody else can see is overwritten.

    Args:
        parts: Modules or functions from tensor to tensor.
        x: Input of the first, which is left as it is.
    """
    owned = False
    for part in parts:
        x, owned = call_part(part, x, owned)
    return x
