"""The simpler forms for inference that layers know of, folded in float64 where that is ours to decide."""
from copy import deepcopy

from timm.models.levit import ConvNorm, LinearNorm, NormLinear
from torch import nn

from ..layers._fold import fold_batch_norm, wide_dtype

_HOOKS = ('fuse', 'reparameterize', 'switch_to_deploy')


def _folded_linear(layer: nn.Module) -> nn.Linear:
    """The product that LeViT's product and batch norm (`LinearNorm`), or norm and product (`NormLinear`), make."""
    weight = layer.linear.weight
    wide = deepcopy(layer).to(wide_dtype(weight.device))
    linear, norm = wide.linear, wide.bn
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    out = nn.Linear(linear.in_features, linear.out_features, device='meta')
    if isinstance(layer, LinearNorm):
        folded, bias = linear.weight * scale[:, None], shift
    else:
        folded, bias = linear.weight * scale, linear.weight @ shift
    if linear.bias is not None:
        bias = bias + (linear.bias * scale if isinstance(layer, LinearNorm) else linear.bias)
    grad = weight.requires_grad
    out.weight, out.bias = (nn.Parameter(t.detach().to(weight.dtype), requires_grad=grad) for t in (folded, bias))
    return out.train(layer.training)


def _folded(layer: nn.Module, hook: str) -> nn.Module:
    """What a layer makes of itself; timm's layers fold in the type that they have, so in float32 here."""
    if type(layer) is ConvNorm and type(layer.linear) is nn.Conv2d and type(layer.bn) is nn.BatchNorm2d:
        return fold_batch_norm(layer.linear, layer.bn)
    if type(layer) in (LinearNorm, NormLinear) and type(layer.linear) is nn.Linear and type(layer.bn) is nn.BatchNorm1d:
        return _folded_linear(layer)
    if type(layer).__module__.startswith('vitlinear.'):
        out = getattr(layer, hook)()
        return out if hook == 'fuse' else layer
    kinds = [(p.device, p.dtype) for p in layer.parameters() if p.is_floating_point()]
    out = getattr(layer.float() if kinds else layer, hook)()
    out = out if hook == 'fuse' else layer
    return out.to(*kinds[0]) if kinds else out


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
