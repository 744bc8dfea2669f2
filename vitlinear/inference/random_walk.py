"""Attention by signed walks in row blocks: what queries meet, times the output projection, is one matrix an image."""
from itertools import pairwise

import torch
from torch import nn

from ..layers import RandomWalkAttention
from ..ops._numerics import at_least_float32
from ..ops.primitives.walk_series.signed import MAX_DOUBLINGS, signed_series
from .onednn import linear_gelu
from .rows import block_sizes, branch, without_form

# Positions from which an image goes by itself, in row blocks. Measured on one core: a 128 x 128 map of 64 channels
# takes 16 ms in blocks, 30 ms at once (float32).
BLOCKS_FROM_POSITIONS = 512


@branch(RandomWalkAttention, linears=('qkv', 'proj'))
def random_walk(
        layer: RandomWalkAttention,
        x: torch.Tensor,
        norm: nn.Module | None,
        out: torch.Tensor | None,
) -> torch.Tensor:
    """See `rows.BRANCHES`."""
    _, H, W, C = x.shape
    if layer.mode != 'spectral' or H * W < BLOCKS_FROM_POSITIONS:
        return without_form(layer, x, norm, out)
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
    if out is None or not out.is_contiguous():
        out = x.new_empty(x.shape, dtype=dtype if norm is None else torch.promote_types(x.dtype, dtype))
    _, rows = block_sizes(H, 4 * 3 * W * C, share=1 / 4)  # of float32 queries, keys and values
    ends = [*range(0, H, rows), H]
    with torch.autocast('cpu', enabled=False):
        for image, image_out in zip(x, out, strict=True):
            blocks = [image[i:j].reshape(-1, C) for i, j in pairwise(ends)]
            queries = x.new_empty(H * W, C, dtype=dtype)  # one block: many small ones would stay with the allocator
            block_queries = queries.split(rows * W)
            y = _sums(layer, blocks, norm, block_queries)
            # what is left sums over channels, not over positions, so that half precision will do; one product for both
            proj = layer.proj.weight.to(y.dtype).unflatten(1, (layer.num_heads, -1)).permute(1, 2, 0)
            proj = (y @ proj).flatten(0, 1).t().to(dtype).contiguous()
            bias = layer.proj.bias.to(dtype)
            for block, q, block_out in zip(blocks, block_queries, image_out.flatten(0, 1).split(rows * W), strict=True):
                z = linear_gelu(q, proj, bias)
                if norm is None:
                    block_out.copy_(z)
                else:
                    torch.add(block, z, out=block_out)
    return out


def _sums(
        layer: RandomWalkAttention,
        blocks: list[torch.Tensor],
        norm: nn.Module | None,
        queries: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """What queries meet (heads, r, r): one pass over the blocks. Puts queries (n, C) into `queries`."""
    heads, r, dtype = layer.num_heads, layer.head_dim, queries[0].dtype
    weight, bias = layer.qkv.weight.to(dtype), layer.qkv.bias
    bias = None if bias is None else bias.to(dtype)
    grams, y = 0, 0
    for block, q_block in zip(blocks, queries, strict=True):
        qkv = linear_gelu((block if norm is None else norm(block)).to(dtype), weight, bias)
        qkv = qkv.view(len(block), 3, heads, r)
        q_block.view(-1, heads, r).copy_(qkv[:, 0])
        q, k, v = at_least_float32(qkv).permute(1, 2, 0, 3)
        grams = grams + torch.cat([q.transpose(1, 2) @ q, k.transpose(1, 2) @ k])
        y = y + k.transpose(1, 2) @ v
    g_q, g_k = grams.unsqueeze(0).chunk(2, dim=1)
    beta = layer.beta()
    beta = None if beta is None else beta.view(-1, 1, 1)
    return signed_series(g_q, g_k, y.unsqueeze(0), beta, MAX_DOUBLINGS)[0]
