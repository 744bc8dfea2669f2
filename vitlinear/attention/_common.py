"""What several mechanisms need."""
from typing import Type

import torch
import torch.nn.functional as F
from torch import nn


def check_heads(dim: int, num_heads: int, name: str = 'dim') -> int:
    """Head dimension of `dim` channels in `num_heads` heads.

    Raises:
        ValueError: Either is not positive, or `dim` is not divisible by `num_heads`.
    """
    if dim <= 0 or num_heads <= 0 or dim % num_heads:
        raise ValueError(f'{name}={dim} must be a positive multiple of num_heads={num_heads}.')
    return dim // num_heads


# Positions from which a convolution beats a matrix product: it reorders its weight at each call.
POINTWISE_FROM = 256


def is_eager() -> bool:
    """Whether the code runs as written, so that it may choose by the size of a map; not for TorchScript."""
    return not torch.jit.is_tracing() and not torch.compiler.is_compiling()


def use_bands(x: torch.Tensor) -> bool:
    """Whether to evaluate a large map in bands of rows that fit the caches, instead of at once.

    That needs a loop over the size of the map, so it is for eager inference on a CPU: neither autograd nor a tracer or
    compiler sees it. Where memory traffic and page faults dominate, it is several times faster.
    """
    return isinstance(x, torch.Tensor) and x.device.type == 'cpu' and not torch.is_grad_enabled() and is_eager()


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_plain(layer: nn.Module, layer_type: Type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer is what its weight and bias say: no adapter, quantised or parametrised layer, no hooks."""
    return type(layer) is layer_type and not has_hooks(layer)


def pointwise(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A linear layer on a contiguous (B, H, W, C) map, for inference on a CPU.

    As a 1x1 convolution it adds its bias on the way; measured on large maps, that saves 10 to 20 % in bfloat16, and on
    AMD CPUs half of the time in float32, where PyTorch's convolutions are that much faster than its matrix products.
    """
    if x.shape[0] * x.shape[1] * x.shape[2] >= POINTWISE_FROM and is_plain(layer):
        return F.conv2d(x.permute(0, 3, 1, 2), layer.weight[:, :, None, None], layer.bias).permute(0, 2, 3, 1)
    return layer(x)


def band_rows(rows: int, row_elements: int, band_elements: int, least: int = 1) -> int:
    """Rows of a band, at least `least`, when `rows` of them are cut evenly into bands of `band_elements` at most."""
    bands = -(-rows * row_elements // band_elements)
    return max(least, -(-rows // bands))


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, H, W, num_heads * d) to (B, num_heads, H, W, d)."""
    B, H, W, C = x.shape
    return x.reshape(B, H, W, num_heads, C // num_heads).permute(0, 3, 1, 2, 4)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, num_heads, H, W, d) to (B, H, W, num_heads * d)."""
    return x.permute(0, 2, 3, 1, 4).flatten(3)
