"""What a deployment may do to a model without changing its function."""
import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import Attention, BatchNormAct2d, ConvNormAct, DropPath, LayerScale, Mlp
from timm.models.vision_transformer import Block as TokenBlock
from torch import nn

from ..layers import (
    LinearAngularAttention,
    LinearAttention,
    QnAAttention,
    RandomWalkAttention,
    SoftmaxAttention,
    WindowAttention,
    XNormAttention,
    XNormClassAttention,
)
from ..layers._fold import fold_batch_norm
from ..layers.castling import CastlingTokenAttention
from ..layers.linear_angular import LinearAngular
from ..layers.mlp import ConvMlp
from ..layers.qna import FoldedQnAAttention
from ..layers.xnorm_block import ClassBlock, LocalPatchInteraction, XNormBlock
from ..ops._dispatch import PLAIN_TENSORS
from .fold import reparameterize
from .onednn import CONVOLUTIONS, LINEARS, PackedConv2d, PackedLinear, available, packed

__all__ = ['STEPS', 'optimize_for_inference']

# Blocks that add `scale(branch(...))`, and their scales and branches.
_BLOCKS = {XNormBlock, ClassBlock, TokenBlock}
_BRANCHES = (('ls1', 'attn'), ('ls2', 'mlp'), ('ls3', 'lpi'))
# Branches that end in a linear layer or convolution, but for dropout, and its name.
_LAST_LAYERS = {
    **dict.fromkeys([
        Attention, CastlingTokenAttention, FoldedQnAAttention, LinearAngularAttention, LinearAttention, QnAAttention,
        RandomWalkAttention, SoftmaxAttention, WindowAttention, XNormAttention, XNormClassAttention], 'proj'),
    **dict.fromkeys([ConvMlp, Mlp], 'fc2'),
    LocalPatchInteraction: 'conv2',
}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_QUANTIZED_MODULES = ('torch.ao.nn.', 'torch.nn.quantized', 'torch.nn.intrinsic', 'torchao.')


def _castling(model: nn.Module, sample: torch.Tensor | None, tol: float) -> int:
    """Remove the auxiliary branches."""
    layers = [m for m in model.modules() if isinstance(m, LinearAngular) and m.aux is not None and m.aux.mode != 'off']
    if layers and sample is None:
        raise ValueError(
            f'sample=None, but {len(layers)} layers of the {type(model).__name__} have an auxiliary branch: outputs '
            'with and without it are compared on a batch of images (B, in_chans, H, W), as for switch_to_inference.')
    for m in model.modules():
        if hasattr(type(m), 'switch_to_inference'):
            m.switch_to_inference(sample, tol)
    for layer in layers:
        if layer.aux.mode == 'always':
            raise ValueError(
                f"aux_mode='always' in a {type(model).__name__}, which has no switch_to_inference: create it with "
                "aux_mode='train' or 'off'.")
        layer.aux.mode = 'off'  # as it is in evaluation
    return len(layers)


def _has_hooks(*modules: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def _is_batch_norm(module: nn.Module) -> bool:
    return type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.running_mean is not None


def _fuse(model: nn.Module) -> int:
    """The simpler forms that layers know of, and batch norms after convolutions."""
    count = reparameterize(model)
    for m in model.modules():
        if type(m) is ConvNormAct:
            pairs = [('conv', 'bn')]
        elif type(m) is nn.Sequential:
            names = [name for name, _ in m.named_children()]
            pairs = list(pairwise(names))
        else:
            continue
        for conv_name, norm_name in pairs:
            conv, norm = getattr(m, conv_name), getattr(m, norm_name)
            if type(conv) is nn.Conv2d and _is_batch_norm(norm) and not _has_hooks(conv, norm):
                setattr(m, conv_name, fold_batch_norm(conv, norm))
                act = getattr(norm, 'act', nn.Identity())
                plain = type(getattr(norm, 'drop', act)) is nn.Identity or type(norm) is nn.BatchNorm2d
                setattr(m, norm_name, act if plain else nn.Sequential(norm.drop, act))
                count += 1
    return count


@torch.no_grad()
def _layer_scale(model: nn.Module) -> int:
    """Layer scales into the linear layer or convolution before them."""
    count = 0
    for m in model.modules():
        for scale_name, branch_name in _BRANCHES if type(m) in _BLOCKS else ():
            scale, branch = getattr(m, scale_name, None), getattr(m, branch_name, None)
            if type(scale) is not LayerScale:
                continue
            last = getattr(branch, _LAST_LAYERS.get(type(branch), ''), None)
            if type(last) not in (*LINEARS, *CONVOLUTIONS) or _has_hooks(scale, branch, last):
                continue
            wide = torch.promote_types(last.weight.dtype, torch.float32)
            gamma = scale.gamma.to(wide)
            weight = last.weight * gamma.view(-1, *[1] * (last.weight.ndim - 1))
            last.weight = nn.Parameter(weight.to(last.weight.dtype), last.weight.requires_grad)
            if last.bias is not None:
                last.bias = nn.Parameter((last.bias * gamma).to(last.bias.dtype), last.bias.requires_grad)
            setattr(m, scale_name, nn.Identity())
            count += 1
    return count


@torch.no_grad()
def _channels_last(model: nn.Module) -> int:
    """Weights of dense convolutions in channels-last memory."""
    count = 0
    for m in model.modules():
        if type(m) not in CONVOLUTIONS or m.weight.shape[1] == 1:
            continue
        if not m.weight.is_contiguous(memory_format=torch.channels_last):
            weight = m.weight.contiguous(memory_format=torch.channels_last)
            m.weight = nn.Parameter(weight, m.weight.requires_grad)
            count += 1
    return count


def _pack(model: nn.Module) -> int:
    """Linear layers and convolutions whose weights oneDNN keeps in the form that it needs, in place of plain ones."""
    count = 0
    for m in list(model.modules()):
        for name, child in list(m.named_children()):
            weight = getattr(child, 'weight', None)
            if type(child) not in (*LINEARS, *CONVOLUTIONS) or weight.device.type != 'cpu' or _has_hooks(child):
                continue
            new = packed(child) if available(weight.dtype) else None
            if new is not None:
                setattr(m, name, new)
                count += 1
    return count


_STEPS: dict[str, Callable[..., int]] = {
    'castling': _castling,
    'fuse': _fuse,
    'layer_scale': _layer_scale,
    'channels_last': _channels_last,
    'pack': _pack,
}
STEPS = tuple(_STEPS)


def _freeze(model: nn.Module) -> None:
    model.eval()
    model.requires_grad_(False)
    for m in model.modules():
        # without effect in evaluation mode; should someone put a layer into training mode, it has none there either
        if isinstance(m, _DROPOUTS):
            m.p = 0.
        elif isinstance(m, DropPath):
            m.drop_prob = 0.
        if getattr(m, 'grad_checkpointing', False):
            m.grad_checkpointing = False
    for m in model.modules():
        if isinstance(m, (PackedLinear, PackedConv2d)):
            m.packed.clear()  # of a model that is optimised again, whose weights may be new


def _refuse_state_dict(model: nn.Module, *args: Any) -> None:
    raise RuntimeError(
        f'This {type(model).__name__} was optimised for inference and loads no checkpoint, since its weights have '
        'another form: create the model anew, load the checkpoint and call optimize_for_inference.')


def _check(model: Any, steps: Sequence[str]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f'model={model!r:.80} must be a torch.nn.Module, not {type(model).__name__}.')
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError('The model is a TorchScript module: optimise the model, then script it.')
    if hasattr(model, '_orig_mod'):
        raise TypeError('The model is the result of torch.compile: optimise the model, then compile it.')
    for name in steps:
        if name not in _STEPS:
            raise ValueError(f"Unknown step '{name}', expected some of {', '.join(STEPS)}.")
    for name, m in model.named_modules():
        if type(m).__module__.startswith(_QUANTIZED_MODULES):
            raise TypeError(f"'{name}' is quantised ({type(m).__name__}): optimise the model, then quantise it.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if type(tensor) not in PLAIN_TENSORS or tensor.is_quantized:
            raise TypeError(
                f"'{name}' is a {type(tensor).__name__}, not a plain tensor: optimise the model, then quantise or "
                'distribute it.')


def optimize_for_inference(
        model: nn.Module,
        steps: Sequence[str] | None = None,
        sample: torch.Tensor | None = None,
        tol: float = 0.,
        inplace: bool = False,
) -> nn.Module:
    """A model with the same function up to rounding, and less to compute. Ours.

    The result is used like the model, features, TorchScript and export included. It is in evaluation mode, its
    parameters take no gradients, dropout and stochastic depth are off for good, and it loads no checkpoints: its state
    dict is another. To go back, create the model anew and load its checkpoint. Of models of others that part is done
    that applies to them.

    The steps:

    * 'castling' removes the auxiliary branches of Castling models, see `Castling.switch_to_inference`.
    * 'fuse' folds batch norms into the convolutions before them and gives each layer the simplest form that it knows
      (timm's `fuse()`, `reparameterize()` and `switch_to_deploy()`): learned queries in the projection to scores,
      expanded convolutions of Castling models, scales and temperatures of heads. Folded in float64 or float32, rounded
      once.
    * 'layer_scale' folds layer scales into the linear layers and convolutions before them.
    * 'channels_last' keeps the weights of convolutions in channels-last memory.
    * 'pack' has oneDNN keep linear layers and convolutions in the form that it would bring them into in each call: for
      inference on CPUs in float32 and bfloat16. Such weights are held twice, from the first call on.

    Not done, since it gains nothing: the affine part of layer norms could go into the layers that follow, but PyTorch's
    layer norm takes as long without it, and twice as long in float32.

    Args:
        model: Any model; before it is compiled, scripted or quantised.
        steps: Names of the steps to do, all if None. They are done in the order above.
        sample: Images (B, in_chans, H, W) on which a Castling model is compared with and without its auxiliary
            branches; needed if there are any.
        tol: Largest difference of an output that is let pass there.
        inplace: Change the model itself, not a copy of it.

    Returns:
        The model. Its attribute `optimized` lists the steps done with the number of layers that each has changed.

    Raises:
        TypeError: `model` is no module, or a scripted, compiled or quantised one.
        ValueError: A step is unknown, `sample` is missing, or the auxiliary branches are still at work.
    """
    steps = STEPS if steps is None else (steps,) if isinstance(steps, str) else tuple(steps)
    _check(model, steps)
    if not inplace:
        model = copy.deepcopy(model)
    done: dict[str, int] = dict(getattr(model, 'optimized', ()))
    if 'castling' in steps:
        done['castling'] = done.get('castling', 0) + _castling(model, sample, tol)
    if not hasattr(model, 'optimized'):
        model.register_load_state_dict_pre_hook(_refuse_state_dict)
    model.eval()
    for name, step in _STEPS.items():
        if name in steps and name != 'castling':
            done[name] = done.get(name, 0) + step(model)
    _freeze(model)
    optimized: tuple[tuple[str, int], ...] = tuple(done.items())
    model.optimized = optimized
    return model
