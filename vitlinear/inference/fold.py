"""The simpler forms for inference that layers know of, folded in float64 where that is ours to decide."""
from copy import deepcopy

from timm.models.levit import ConvNorm, LinearNorm, NormLinear
from torch import nn

from ..layers._fold import fold_batch_norm, wide_dtype

_HOOKS = ('fuse', 'reparameterize', 'switch_to_deploy')


def _fold_norm_linear(layer: NormLinear) -> nn.Linear:
    """LeViT's batch norm and product (`NormLinear`) as one product, folded in float64."""
    weight = layer.linear.weight
    wide = deepcopy(layer).to(wide_dtype(weight.device))
    linear, norm = wide.linear, wide.bn
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    bias = linear.weight @ shift if linear.bias is None else linear.weight @ shift + linear.bias
    linear.weight, linear.bias = nn.Parameter(linear.weight * scale), nn.Parameter(bias)
    return linear.to(weight.dtype).requires_grad_(weight.requires_grad)


def _folded(layer: nn.Module, hook: str) -> nn.Module:
    """What a layer makes of itself; timm's layers fold in the type that they have, so in float32 here."""
    kinds = type(layer), type(getattr(layer, 'linear', None)), type(getattr(layer, 'bn', None))
    if kinds in ((ConvNorm, nn.Conv2d, nn.BatchNorm2d), (LinearNorm, nn.Linear, nn.BatchNorm1d)):
        return fold_batch_norm(layer.linear, layer.bn)
    if kinds == (NormLinear, nn.Linear, nn.BatchNorm1d):
        return _fold_norm_linear(layer)
    if type(layer).__module__.startswith('vitlinear.'):
        out = getattr(layer, hook)()
        return out if hook == 'fuse' else layer
    found = [(p.device, p.dtype) for p in layer.parameters() if p.is_floating_point()]
    out = getattr(layer.float() if found else layer, hook)()
    out = out if hook == 'fuse' else layer
    return out.to(*found[0]) if found else out


def reparameterize(model: nn.Module) -> int:
    """Let each layer below `model` that has a simpler form for inference take it, in place.

    As `timm.models.reparameterize_model`, with which timm's layers round as their type does: here batch norms are
    folded in float64, other layers of timm in float32, and all keep their type and device.

    Returns:
        How many layers took another form.
    """
    count = 0
    for name, child in list(model.named_children()):
        hook = next((h for h in _HOOKS if hasattr(type(child), h)), None)
        if hook is not None:
            before = {k: id(p) for k, p in child.named_parameters()}
            child = _folded(child, hook)
            count += before != {k: id(p) for k, p in child.named_parameters()}
            setattr(model, name, child)
        count += reparameterize(child)
    return count
