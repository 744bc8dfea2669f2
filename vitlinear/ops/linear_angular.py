"""Linear-angular attention: You et al., 'Castling-ViT: Compressing Self-Attention via Switching Towards Linear-Angular
Attention at Vision Transformer Inference', CVPR 2023, arXiv 2211.10526.

The angular kernel of two vectors with c = cos(q, k) splits into a part that is linear in c and a small remainder:

    1 - arccos(c) / pi = 1/2 + c / pi + R(c),    |R| <= 1/2 - 1/pi

The linear part needs no weight of a single pair. Learned modules stand in for R: a depthwise convolution D of the
values, and while training softmax attention A whose weights count above a threshold alone. With unit(x) = x / |x| over
the d channels of a head,

    y = unit(v / 2 + unit(q) (unit(k)^T v) / pi [+ A v]) + D v,    A = a [a > threshold],  a = softmax(q k^T / sqrt(d)).

From the authors' module, https://github.com/GATECH-EIC/Castling-ViT: the identity v / 2 in place of the kernel's
constant part, and the norm in place of a division by sums of weights. Added here: the guard of the norms, pooled keys
and chunks of queries in A, queries on a coarser grid than keys, two-dimensional convolutions and `kv_scale`.
"""
import math

import torch

from ._numerics import inverse_norm, no_autocast
from .local import subsample
from .primitives.tokens import token_apply, token_sums


@no_autocast
def linear_angular_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        local: torch.Tensor,
        grid: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        stride: int = 1,
        kv_scale: float = 1.,
        aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """`unit(v / 2 + kv_scale unit(q) (unit(k)^T v) / pi + aux) + D v` at the position of each query.

    Cost: 2 (N + M) d e operations a head. Sums and norms are float32 (float64 for float64 input),
    with autocast off.

    Args:
        q: Queries (B, heads, N, d).
        k: Keys (B, heads, M, d).
        v: Values (B, heads, M, e).
        local: The convolution D v of the values, (B, heads, M, e), see `local_attention`.
        grid: Rows and columns of keys and values, for `stride` other than 1.
        num_prefix_tokens: Tokens in front of those of the grid, among queries and keys.
        stride: Of the queries' grid in that of the keys.
        kv_scale: N_ref / M keeps the parts of the sum in the ratio that they have for N_ref keys; 1 is as published.
        aux: What the auxiliary branch adds, (B, heads, N, e), see `primitives/few_keys`.

    Returns:
        (B, heads, N, e) in the dtype of v.
    """
    sums, _ = token_sums(k, v, unit=True)
    if stride != 1:
        assert grid is not None, 'A stride needs the grid of the keys.'
        v, local = [subsample(x, grid, stride, num_prefix_tokens) for x in (v, local)]
    # twice the sum, which the norm takes out again: the identity then needs no pass of its own
    y = token_apply(q, sums * (2. / math.pi * kv_scale), unit=True, base=v, dtype=sums.dtype)
    if aux is not None:
        y = torch.add(y, aux.to(y.dtype), alpha=2.)
    return torch.addcmul(local.to(y.dtype), y, inverse_norm(y)).to(v.dtype)
