"""Depthwise convolutions by kernels. The backward pass keeps the arguments, neither the convolution nor its GELU."""
import torch

from ..._triton import too_large
from ..by_kernels import by_kernels
from . import launch
from . import torch as plain

MAX_TAPS = 49


def _refuses(x, weight, *args, **kwargs):
    taps = weight.shape[2] * weight.shape[3]
    return too_large(x) if taps <= MAX_TAPS else f'{taps} taps are more than the {MAX_TAPS} that kernels take'


def _plain(x, weight, bias, gelu):
    return plain.depthwise_gelu(x, weight, bias) if gelu else plain.depthwise(x, weight, bias)


def _fake(x, weight, bias, gelu):
    return x.new_empty(x.shape)


def _fake_backward(x, weight, bias, grad, gelu):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), \
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


_depthwise = by_kernels(
    'depthwise', _plain, launch.depthwise, launch.depthwise_backward, _fake, _fake_backward, 3, _refuses)


def _cast(x):
    """The map in the type of autocast, which casts PyTorch's convolutions; weights are read as they are."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def depthwise(x, weight, bias=None):
    """As `torch.depthwise`."""
    return _depthwise(_cast(x), weight, bias, False)


def depthwise_gelu(x, weight, bias=None):
    """As `torch.depthwise_gelu`."""
    return _depthwise(_cast(x), weight, bias, True)


depthwise.refuses = depthwise_gelu.refuses = _refuses
