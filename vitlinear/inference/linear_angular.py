"""Linear-angular attention: projections go through oneDNN, and products of bfloat16 stay bfloat16.

That type has the range that sums over positions need; oneDNN accumulates them in float32.
"""
import math

import torch
from torch import nn

from ..layers import LinearAngularAttention
from ..layers._common import merge_heads
from ..layers.linear_angular import LinearAngular
from ..ops import split_heads
from ..ops._numerics import inverse_norm
from ..ops.local import subsample
from .onednn import call_linear
from .rows import add_to, branch


def attend(
        layer: LinearAngular,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grid: tuple[int, int],
        stride: int = 1,
) -> torch.Tensor:
    """`layer.attend(q, k, v, grid, stride=stride)` of (B, heads, N, d) queries, keys and values."""
    if layer.aux is None or layer.aux.is_on() or v.dtype != torch.bfloat16:
        return layer.attend(q, k, v, grid, stride=stride)
    kv_scale = 1. if layer.ref_keys is None else layer.ref_keys / k.shape[2]
    with torch.autocast('cpu', enabled=False):
        local = layer.dconv(v, grid)
        kv = (k * inverse_norm(k).to(k.dtype)).transpose(-2, -1) @ v
        if stride != 1:
            v, local = [subsample(x, grid, stride) for x in (v, local)]
        y = torch.addcmul(v, q @ kv, inverse_norm(q).to(q.dtype), value=2. / math.pi * kv_scale)
        return torch.addcmul(local, y, inverse_norm(y).to(y.dtype))


@branch(LinearAngularAttention, linears=('qkv', 'proj'))
def linear_angular(
        layer: LinearAngularAttention,
        x: torch.Tensor,
        norm: nn.Module | None,
        out: torch.Tensor | None,
) -> torch.Tensor:
    """See `rows.BRANCHES`."""
    q, k, v = split_heads(call_linear(x if norm is None else norm(x), layer.qkv), 3, layer.num_heads)
    y = merge_heads(attend(layer, q, k, v, (x.shape[1], x.shape[2]))).view(x.shape)
    return add_to(x, layer.proj_drop(call_linear(y, layer.proj)), norm, out)
