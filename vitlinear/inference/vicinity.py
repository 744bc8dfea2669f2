"""Vicinity attention in row blocks: a pass for keys and values, and one for queries.

Only queries and the sums over keys live across the blocks. Projections are evaluated with positions last: the factors
vary along the innermost axis then, and the elementwise passes stay vectorised.
"""
import torch
import torch.nn.functional as F
from torch import nn

from ..layers import VicinityAttention
from ..ops.primitives.tokens.positions import kept_factors
from ..ops.primitives.tokens.torch import CLAMP_MAX, CLAMP_MIN
from .onednn import call_linear
from .rows import block_sizes, branch


def _positions_last(layer: VicinityAttention, x: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values of positions (B, N, C), as (B, 3, heads, d, N)."""
    if x.dtype == torch.bfloat16:  # oneDNN has this product
        weight = layer.qkv.weight.expand(len(x), -1, -1)
        x = torch.baddbmm(layer.qkv.bias.unsqueeze(1), weight, x.transpose(1, 2))
    else:
        x = call_linear(x, layer.qkv).transpose(1, 2).contiguous()
    return x.unflatten(1, [3, layer.num_heads, -1])


@branch(VicinityAttention, linears=('qkv', 'proj'))
def vicinity(
        layer: VicinityAttention,
        x: torch.Tensor,
        norm: nn.Module | None,
        out: torch.Tensor | None,
) -> torch.Tensor:
    """See `rows.BRANCHES`."""
    B, H, W, C = x.shape
    N = H * W
    images, rows = block_sizes(H, 4 * W * C)  # sums are float32
    blocks = []  # rows, positions
    for i in range(0, H, rows):
        blocks.append((slice(i, i + rows), slice(i * W, (i + rows) * W)))
    for b in range(0, B, images):
        group, size = slice(b, b + images), min(images, B - b)
        kv = mean = queries = None
        for block, where in blocks:
            y = x[group, block].flatten(1, 2)
            if norm is not None:
                y = norm(y)
            dtype = torch.promote_types(y.dtype, torch.float32)
            block_mean = y.sum(dim=1, dtype=dtype).div_(N)
            y = _positions_last(layer, y)  # (size, 3, heads, d, positions)
            if queries is None:
                # bfloat16 has the range that sums over positions need; products of it are summed in float32
                product = torch.bfloat16 if y.dtype == torch.bfloat16 else dtype
                table = kept_factors(layer.locality, (H, W), dtype, x.device)
                table = table.unsqueeze(1).to(product).contiguous()  # (F, 1, N), positions last
                queries = y[:, 0] if len(blocks) == 1 else y.new_empty(size, *y.shape[2:-1], N)
            F.relu_(y[:, :2])
            if len(blocks) > 1:
                queries[..., where] = y[:, 0]
            k, v = y[:, 1].to(product), y[:, 2].to(product)
            with torch.autocast('cpu', enabled=False):
                # (size, heads, F d, e + 1), the last column without values
                k = (k.unsqueeze(2) * table[..., where]).flatten(2, 3)
                block_kv = (k @ F.pad(v, [0, 0, 0, 1], value=1.).transpose(-2, -1)).to(dtype)
            kv, mean = (block_kv, block_mean) if kv is None else (kv.add_(block_kv), mean.add_(block_mean))
        if layer.clamp:
            sums = kv[..., :-1]  # the authors leave the sums of the denominator as they are
            sign = sums.sign()
            sums.abs_().clamp_(CLAMP_MIN, CLAMP_MAX).mul_(sign)
        kv = kv.to(product).transpose(-2, -1)
        gate = (1 + layer.fpc(mean.to(x.dtype))).view(size, 1, 1, C).to(queries.dtype)
        for block, where in blocks:
            q = queries[..., where].to(product)
            with torch.autocast('cpu', enabled=False):
                y = (kv @ (q.unsqueeze(2) * table[..., where]).flatten(2, 3)).to(dtype)
            y, weight = y[:, :, :-1], y[:, :, -1:] + layer.eps
            if layer.clamp:
                sign, weight = y.sign(), weight.clamp_(max=CLAMP_MAX)
                y.abs_().clamp_(CLAMP_MIN, CLAMP_MAX).div_(weight).clamp_(CLAMP_MIN, CLAMP_MAX).mul_(sign)
            else:
                y.div_(weight)
            y = y.to(queries.dtype)
            y = call_linear(y.permute(0, 3, 1, 2).flatten(2), layer.proj).unflatten(1, [-1, W])
            block_gate = gate
            if layer.clamp:
                # the upper bound is met after the gate, which exceeds 1, as well
                block_gate = y.sign().mul_(gate)
                y.abs_().clamp_(min=CLAMP_MIN)
                torch.minimum(y, CLAMP_MAX / gate, out=y)
            if out is None:
                out = y.new_empty(x.shape, dtype=y.dtype if norm is None else torch.result_type(x, y))
            if norm is None:
                torch.mul(y, block_gate, out=out[group, block])
            else:
                torch.addcmul(x[group, block], y, block_gate, out=out[group, block])
    return out
