"""XNorm attention in row blocks: XN(K^T V) times the output projection is one matrix for each image."""
import torch
from torch import nn

from ..layers import XNormAttention
from ..ops._numerics import inverse_norm
from ..ops.xnorm import normalise_sums
from .onednn import call_linear, linear_gelu
from .rows import block_sizes, branch, put, without_form

# Positions from which an image goes by itself and K^T V is multiplied into the output projection. Measured on one core:
# that is faster by a tenth or more from 28 x 28 positions on, and slower by as much at 14 x 14.
FOLD_FROM_POSITIONS = 512
EPS = 1e-6


def _project(layer: XNormAttention, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
    """Queries, keys and values (positions, 3, heads, d)."""
    x = x if norm is None else norm(x)
    return call_linear(x.flatten(0, -2), layer.qkv).unflatten(1, (3, layer.num_heads, layer.head_dim))


def _normalised(layer: XNormAttention, kv: torch.Tensor, num_keys: int) -> torch.Tensor:
    return normalise_sums(kv, num_keys, layer.gamma_q, layer.gamma_kv, layer.kv_axis, EPS)


@branch(XNormAttention, linears=('qkv', 'proj'))
def xnorm(layer: XNormAttention, x: torch.Tensor, norm: nn.Module | None, out: torch.Tensor | None) -> torch.Tensor:
    """See `rows.BRANCHES`."""
    if torch.is_autocast_enabled('cpu'):
        return without_form(layer, x, norm, out)
    B, H, W, C = x.shape
    add = norm is not None
    images, rows = block_sizes(H, 4 * W * max(C, 3 * layer.attn_dim), share=1 / 2)  # sums are float32
    dtype = torch.promote_types(x.dtype, torch.float32)
    if H * W < FOLD_FROM_POSITIONS:
        for b in range(0, B, images):
            group = slice(b, b + images)
            q, k, v = _project(layer, x[group], norm).unflatten(0, (-1, H * W)).permute(2, 0, 3, 1, 4).to(dtype)
            y = (q * inverse_norm(q, -1, EPS)) @ _normalised(layer, k.transpose(-2, -1) @ v, H * W)
            y = call_linear(y.transpose(1, 2).flatten(2).to(x.dtype), layer.proj).unflatten(1, (H, W))
            out = put(out, group, x, layer.proj_drop(y), add)
        return out

    # only the normalised queries outlive a block
    queries = x.new_empty(H, W, layer.attn_dim)
    weight = layer.proj.weight.to(dtype).unflatten(1, (layer.num_heads, -1)).permute(1, 2, 0)  # (heads, e, C)
    for b in range(B):
        kv = x.new_zeros(layer.num_heads, layer.head_dim, layer.head_dim, dtype=dtype)
        for i in range(0, H, rows):
            # each (positions, heads, d)
            q, k, v = _project(layer, x[b, i:i + rows], norm).to(dtype).unbind(1)
            kv.baddbmm_(k.permute(1, 2, 0), v.transpose(0, 1))
            torch.mul(q, inverse_norm(q, -1, EPS), out=queries[i:i + rows].view_as(q))
        folded = (_normalised(layer, kv, H * W) @ weight).flatten(0, 1).t().to(x.dtype).contiguous()
        for i in range(0, H, rows):
            y = layer.proj_drop(linear_gelu(queries[i:i + rows], folded, layer.proj.bias))
            out = put(out, (b, slice(i, i + rows)), x, y, add)
    return out
