"""Linear-angular attention: You et al., 'Castling-ViT: Compressing Self-Attention via Switching Towards Linear-Angular
Attention at Vision Transformer Inference', CVPR 2023, arXiv 2211.10526.

The angular kernel of two vectors with c = cos(q, k) splits into a part that is linear in c and a small remainder:

    1 - arccos(c) / pi = 1/2 + c / pi + R(c),    |R| <= 1/2 - 1/pi

The linear part needs no weight of a single pair. Learned modules stand in for R: a depthwise convolution D of the
values, and while training softmax attention A whose weights count above a threshold alone. With |x| the length of a
vector of d channels of a head, q^ = q / |q| and k^ = k / |k|,

    y = unit(v / 2 + q^ (k^T v) / pi [+ A v]) + D v        A = a [a > threshold],  a = softmax(q k^T / sqrt(d))

A has no parameters, so that training checkpoints fit the form without it, and at a threshold of 1 it is exactly zero.
Written from a description of the authors' released module, https://github.com/GATECH-EIC/Castling-ViT: the identity
v / 2 in place of the kernel's constant part is theirs, as is the norm in place of a division by sums of weights.

Ours: the guard of the norms, pooled keys and chunks of queries in A, thresholds relative to the number of keys, their
ramp, queries on a coarser grid than keys, '2d' convolutions and `kv_scale`.
"""
import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ._common import inverse_norm

CONVS = ('1d', '2d')
AUX_MODES = ('off', 'train', 'always')


def subsample(x: torch.Tensor, grid: Tuple[int, int], stride: int, num_prefix_tokens: int = 0) -> torch.Tensor:
    """Every `stride`-th row and column of the grid among the tokens, (B, heads, N, d) to (B, heads, N', d)."""
    prefix, x = x[:, :, :num_prefix_tokens], x[:, :, num_prefix_tokens:]
    B, heads, _, d = x.shape
    x = x.reshape(B, heads, grid[0], grid[1], d)[:, :, ::stride, ::stride].reshape(B, heads, -1, d)
    return torch.cat([prefix, x], dim=2) if num_prefix_tokens else x


def pool_keys(
        x: torch.Tensor,
        grid: Optional[Tuple[int, int]],
        max_keys: Optional[int],
        num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """Means over square cells of the grid, the smallest that leave `max_keys` cells at most; prefix tokens stay.

    Args:
        x: Keys or values (B, heads, N, d).
        grid: Rows and columns, None for tokens that are not on a grid and stay as they are.
        max_keys: Cells to keep, None for no pooling.
        num_prefix_tokens: Tokens in front of those of the grid.
    """
    if grid is None or max_keys is None:
        return x
    H, W = grid
    side = 1
    while -(-H // side) * -(-W // side) > max_keys:
        side += 1
    if side == 1:
        return x
    prefix, x = x[:, :, :num_prefix_tokens], x[:, :, num_prefix_tokens:]
    B, heads, _, d = x.shape
    x = x.reshape(B * heads, H, W, d).permute(0, 3, 1, 2)
    x = F.avg_pool2d(x, side, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)
    return torch.cat([prefix, x.reshape(B, heads, -1, d)], dim=2)


def _masked_softmax(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        threshold: torch.Tensor,
        dropout_p: float = 0.,
) -> torch.Tensor:
    attn = (q @ k.transpose(-2, -1) * q.shape[-1] ** -.5).softmax(dim=-1)
    attn = torch.where(attn > threshold, attn, 0.)
    return F.dropout(attn, dropout_p) @ v


def masked_softmax_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        threshold: torch.Tensor,
        dropout_p: float = 0.,
        chunk: Optional[int] = None,
) -> torch.Tensor:
    """`A v` with the softmax weights above a threshold; the others count as 0 and the rows are not rescaled.

    It runs in float32 (float64 for float64 input) with autocast off.

    Args:
        q: Queries (B, heads, N, d).
        k: Keys (B, heads, M, d).
        v: Values (B, heads, M, e).
        threshold: Scalar tensor. The gradient passes through the weights above it alone, never to the threshold.
        dropout_p: Share of the weights to drop.
        chunk: Queries to take at a time, whose weights are computed again in the backward pass, so that no more than
            `chunk * M` of them per head are ever kept; None for all.

    Returns:
        (B, heads, N, e) in the dtype of `v`.
    """
    out_dtype = v.dtype
    if out_dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    threshold = threshold.to(q.dtype)
    if not torch.jit.is_scripting() and q.device.type != 'meta':
        with torch.autocast(device_type=q.device.type, enabled=False):
            return _in_chunks(q, k, v, threshold, dropout_p, chunk).to(out_dtype)
    return _masked_softmax(q, k, v, threshold, dropout_p).to(out_dtype)


@torch.jit.unused
def _in_chunks(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        threshold: torch.Tensor,
        dropout_p: float,
        chunk: Optional[int],
) -> torch.Tensor:
    N = q.shape[2]
    if chunk is None or N <= chunk:
        return _masked_softmax(q, k, v, threshold, dropout_p)
    parts = []
    for i in range(0, N, chunk):
        args = (q[:, :, i:i + chunk], k, v, threshold, dropout_p)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_masked_softmax, *args, use_reentrant=False))
        else:
            parts.append(_masked_softmax(*args))
    return torch.cat(parts, dim=2)


def local_attention(
        v: torch.Tensor,
        weight: torch.Tensor,
        grid: Optional[Tuple[int, int]] = None,
        num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """The convolution D of the values, one kernel per head for all its channels, zeros outside.

    Args:
        v: Values (B, heads, N, d), fastest where heads and channels are last in memory.
        weight: (heads, 1, k, 1), along the tokens in their order; or (heads, 1, k, k), on the grid, where prefix tokens
            have no part. (heads * d, 1, ...) with the kernel of a head for each of its channels is taken as well.
        grid: Rows and columns of the tokens, for the second form.
        num_prefix_tokens: Tokens in front of those of the grid.

    Returns:
        (B, heads, N, d).
    """
    B, heads, N, d = v.shape
    C, k = heads * d, weight.shape[2]
    if weight.shape[0] != C:
        weight = weight.repeat_interleave(d, dim=0)
    x = v.transpose(1, 2).reshape(B, N, C)
    if weight.shape[3] == 1:
        x = F.conv2d(x.unsqueeze(1).permute(0, 3, 1, 2), weight.transpose(2, 3), None, [1, 1], [0, k // 2], [1, 1], C)
    else:
        assert grid is not None, 'Two-dimensional kernels need the grid of the tokens.'
        x = x[:, num_prefix_tokens:].reshape(B, grid[0], grid[1], C).permute(0, 3, 1, 2)
        x = F.conv2d(x, weight, None, [1, 1], [k // 2, k // 2], [1, 1], C)
    x = x.permute(0, 2, 3, 1).reshape(B, -1, heads, d).transpose(1, 2)
    if weight.shape[3] != 1 and num_prefix_tokens:
        x = F.pad(x, [0, 0, num_prefix_tokens, 0])
    return x


def linear_angular_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weight: torch.Tensor,
        grid: Optional[Tuple[int, int]] = None,
        num_prefix_tokens: int = 0,
        stride: int = 1,
        kv_scale: float = 1.,
        aux: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """`unit(v / 2 + kv_scale q^ (k^T v) / pi + aux) + D v` at the position of each query.

    It runs in float32 (float64 for float64 input) with autocast off; in bfloat16 without autograd the products take
    and return bfloat16, which has the range that their sums need.

    Args:
        q: Queries (B, heads, N, d).
        k: Keys (B, heads, M, d).
        v: Values (B, heads, M, e).
        weight: Kernels of D, see `local_attention`.
        grid: Rows and columns of keys and values; for `stride` other than 1 and two-dimensional kernels.
        num_prefix_tokens: Tokens in front of those of the grid, among queries and keys.
        stride: Of the queries' grid in that of the keys.
        kv_scale: N_ref / M keeps the parts of the sum in the ratio that they have for N_ref keys; 1 is as published.
        aux: What the auxiliary branch adds, (B, heads, N, e).

    Returns:
        (B, heads, N, e) in the dtype of `v`.
    """
    if not torch.jit.is_scripting() and q.device.type != 'meta':
        with torch.autocast(device_type=q.device.type, enabled=False):
            return _linear_angular_attention(q, k, v, weight, grid, num_prefix_tokens, stride, kv_scale, aux)
    return _linear_angular_attention(q, k, v, weight, grid, num_prefix_tokens, stride, kv_scale, aux)


def _linear_angular_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weight: torch.Tensor,
        grid: Optional[Tuple[int, int]],
        num_prefix_tokens: int,
        stride: int,
        kv_scale: float,
        aux: Optional[torch.Tensor],
        scale: float = 2. / math.pi,
) -> torch.Tensor:
    out_dtype = v.dtype
    if out_dtype != torch.float64 and (out_dtype != torch.bfloat16 or torch.is_grad_enabled()):
        q, k, v = q.float(), k.float(), v.float()
    local = local_attention(v, weight.to(v.dtype), grid, num_prefix_tokens)
    kv = (k * inverse_norm(k).to(k.dtype)).transpose(-2, -1) @ v
    if stride != 1:
        assert grid is not None, 'A stride needs the grid of the keys.'
        v, local = [subsample(x, grid, stride, num_prefix_tokens) for x in (v, local)]
    # twice the sum, which the norm takes out again: the identity then needs no pass of its own
    y = torch.addcmul(v, q @ kv, inverse_norm(q).to(q.dtype), value=scale * kv_scale)
    if aux is not None:
        y = torch.add(y, aux.to(y.dtype), alpha=2.)
    return torch.addcmul(local, y, inverse_norm(y).to(y.dtype)).to(out_dtype)
