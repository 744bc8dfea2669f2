"""What several mechanisms need."""
from typing import Tuple

import torch


def check_heads(dim: int, num_heads: int, name: str = 'dim') -> int:
    """Head dimension of `dim` channels in `num_heads` heads.

    Raises:
        ValueError: Either is not positive, or `dim` is not divisible by `num_heads`.
    """
    if dim <= 0 or num_heads <= 0 or dim % num_heads:
        raise ValueError(f'{name}={dim} must be a positive multiple of num_heads={num_heads}.')
    return dim // num_heads


def use_bands(x: torch.Tensor) -> bool:
    """Whether to evaluate a large map in bands of rows that fit the caches, instead of at once.

    That needs a loop over the size of the map, so it is for eager inference on a CPU: neither autograd nor a tracer or
    compiler sees it. Where memory traffic and page faults dominate, it is several times faster.
    """
    return (
        x.device.type == 'cpu'
        and not torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


def split_heads(x: torch.Tensor, num_parts: int, num_heads: int) -> Tuple[torch.Tensor, ...]:
    """Split a (B, H, W, num_parts * num_heads * d) map into `num_parts` of (B, num_heads, H, W, d)."""
    B, H, W, C = x.shape
    x = x.reshape(B, H, W, num_parts, num_heads, C // (num_parts * num_heads))
    return x.permute(3, 0, 4, 1, 2, 5).unbind(0)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, num_heads, H, W, d) to (B, H, W, num_heads * d)."""
    return x.permute(0, 2, 3, 1, 4).flatten(3)
