"""Learned-query local attention: Arar, Shamir, Bermano, 'Learned Queries for Efficient Local Attention' (QnA),
CVPR 2022, arXiv 2112.11435.

Each head attends with L learned queries, the same at every position, to the k x k window around a position. A pixel's
score is then one number in all the windows that hold it, so softmax attention becomes two window sums:

    c = <q_l, W_k x>        e = exp(c)        z = sum_l  window_sum(S_l exp(r_l) e_l v) / window_sum(exp(r_l) e_l)

with a learned relative bias r and a learned scale S for each tap, query and head. From the paper: the queries, the
window sums, the bias. From a description of the authors' code, https://github.com/moabarar/qna: the scale, which stands
outside the softmax and has either sign, queries of unit length, and taps outside the map that take no part.

Without kernels both window sums are one depthwise convolution, and scores that spread too far for float32 are
taken tap by tap; nothing needs memory for windows. Heads are the last axis throughout, (d, heads).
"""
import torch

from ._numerics import at_least_float32, no_autocast
from .primitives.windows import window_attention


def unit_query(query: torch.Tensor, num_heads: int, normalize: bool = True) -> torch.Tensor:
    """Queries (L, heads * d) as they meet the keys, (L, heads, d): of unit length, scaled by d^-1/2."""
    query = at_least_float32(query).unflatten(1, [num_heads, -1])
    if normalize:
        query = query / (torch.linalg.vector_norm(query, dim=-1, keepdim=True) + 1e-6)
    return query * query.shape[2] ** -0.5


@no_autocast
def fold_queries(
        query: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (L * heads, C) and bias (L * heads,) of the projection that gives scores: queries times that of keys.

    Args:
        query: (L, heads, d), from `unit_query`.
        weight: Of the keys (heads * d, C).
        bias: Of the keys (heads * d,), or None.
    """
    heads, d = query.shape[1], query.shape[2]
    folded = (query.transpose(0, 1) @ weight.to(query.dtype).unflatten(0, [heads, d])).transpose(0, 1).flatten(0, 1)
    if bias is not None:
        bias = (query * bias.to(query.dtype).unflatten(0, [heads, d])).sum(dim=2).flatten().to(weight.dtype)
    return folded.to(weight.dtype), bias


@no_autocast
def key_scores(k: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Products of keys (B, H, W, heads * d) with queries (L, heads, d) from `unit_query`: (B, H, W, L, heads)."""
    heads, d = query.shape[1], query.shape[2]
    return torch.einsum('bhwad,lad->bhwla', at_least_float32(k).unflatten(3, [heads, d]), query)


@no_autocast
def qna_attention(
        score: torch.Tensor,
        v: torch.Tensor,
        rel_pos_bias: torch.Tensor,
        attn_scale: torch.Tensor | None = None,
        stride: int = 1,
        scale: float = 1.,
        kernel: torch.Tensor | None = None,
) -> torch.Tensor:
    """Learned-query attention over the windows of a map.

    Cost: 2 L k^2 (d + 1) operations a position and head. Weights are float32, or float64 for float64 input; window sums
    are in the dtype of the values, float32 for float16. By kernels and on a CPU in eager mode the result is exact for
    scores of any size; elsewhere scores count up to 80 below the maximum of their map.

    Args:
        score: Products of queries and keys (B, H, W, L, heads).
        v: Values (B, H, W, d, heads).
        rel_pos_bias: Bias of each tap (L * heads, 1, k, k), k odd.
        attn_scale: Scale of each tap after the softmax (L * heads, 1, k, k), None for 1.
        stride: Of the windows.
        scale: Of the result.
        kernel: What `window_kernel` makes of bias and scales, where that is known.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), d, heads) in the dtype of `v`.

    Raises:
        ValueError: k is even, or `stride` is not positive.
    """
    if rel_pos_bias.shape[3] % 2 == 0:
        raise ValueError(f'rel_pos_bias has windows of side {rel_pos_bias.shape[3]}, which must be odd.')
    if stride < 1:
        raise ValueError(f'stride={stride} must be positive.')
    return window_attention(score, v, rel_pos_bias, attn_scale, stride, scale, kernel)
