"""What the attention layers share: heads of maps, checks of channels, LeCun initialisation."""
import math

import torch
from torch import nn


def lecun_normal_(weight: torch.Tensor) -> None:
    """Truncated normal of variance 1 / fan_in in place, cut at two standard deviations as in Flax."""
    std = math.sqrt(1. / weight[0].numel()) / .87962566103423978  # that of a standard normal cut at two
    nn.init.trunc_normal_(weight, std=std, a=-2. * std, b=2. * std)


def init_lecun_(layer: nn.Module) -> None:
    """LeCun normal weight and zero bias of a linear layer or convolution, in place."""
    lecun_normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def check_heads(dim: int, num_heads: int, name: str = 'dim') -> int:
    """Head dimension of `dim` channels in `num_heads` heads.

    Raises:
        ValueError: Either is not positive, or `dim` is not divisible by `num_heads`.
    """
    if dim <= 0 or num_heads <= 0 or dim % num_heads:
        raise ValueError(f'{name}={dim} must be a positive multiple of num_heads={num_heads}.')
    return dim // num_heads


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) in channels-last memory, in operations that torch.func's vmap knows."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, d) to (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)
