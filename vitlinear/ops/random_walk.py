"""Attention by random walks between queries and keys, of any number of steps.

The idea is that of 'Improving Vision Attention with Random Walk Graph Kernel', https://openreview.net/forum?id=LTvSyvRaJO
(ICLR 2023 submission, withdrawn). From its abstract: queries and keys are the nodes of a bipartite graph, ordinary
attention is one step, and all numbers of steps are the inverse of a small matrix. Neither code nor formulas are public:
everything below is added here.

'spectral', the default: S = q k^T scaled to a norm of at most 1, O = sum_j beta^j (S S^T)^j S V. With Gram matrices
G_q = q^T q and G_k = k^T k this is q (sum_j beta^j (G_k G_q)^j) k^T V, so only r x r matrices are multiplied.

'walk': with features P = softmax(t x / rms(x)) over r channels, edges weigh S = P_q P_k^T and nodes d_q = S 1,
d_k = S^T 1. A walk goes from a query to a key and returns with probability beta; a key counts as it is stopped at:

    O = (1 - beta) D_q^-1 P_q (I - beta H_k H_q)^-1 (P_k^T V),    H_q = P_q^T D_q^-1 P_q,    H_k = P_k^T D_k^-1 P_k.

Rows of this kernel sum to 1, and beta = 0 is normalised linear attention (arXiv 2006.16236). The inverse is a series.
"""
import torch

from ._numerics import at_least_float32, check_choice, no_autocast
from .primitives.tokens import token_apply, token_moments, token_sums
from .primitives.walk_series import walk_series
from .primitives.walk_series.signed import by_edges, enough_doublings, norm_bound, signed_series

MODES = ('spectral', 'walk')


def _spectral(q, k, v, beta: torch.Tensor | None, num_doublings: int) -> torch.Tensor:
    if by_edges(q.shape[2], k.shape[2], q.shape[3]):  # fewer nodes than channels: the N x M edges are smaller
        q, k, v, dtype = at_least_float32(q), at_least_float32(k), at_least_float32(v), v.dtype
        c_q, c_k = norm_bound(q @ q.transpose(-2, -1)), norm_bound(k @ k.transpose(-2, -1))
        edges = q @ k.transpose(-2, -1) * (c_q.rsqrt() * c_k.rsqrt())
        out = edges @ v
        out = out if beta is None else walk_series(beta * (edges @ edges.transpose(-2, -1)), out, num_doublings)
        return out.to(dtype)
    g_q, g_k, sums = token_moments(q, k, v)
    return token_apply(q, signed_series(g_q, g_k, sums, beta, num_doublings))


def _walk(q, k, v, beta: torch.Tensor | None, temperature: torch.Tensor, num_doublings: int) -> torch.Tensor:
    p_q, p_k = [(x * ((x * x).mean(dim=-1, keepdim=True).add(1e-6).rsqrt() * temperature)).softmax(dim=-1)
                for x in (at_least_float32(q), at_least_float32(k))]
    inverse_q = (p_q @ p_k.mean(dim=2).unsqueeze(3)).clamp_min(1e-6).reciprocal()
    sums = token_sums(p_k, v)[0] / k.shape[2]
    if beta is not None:
        inverse_k = (p_k @ p_q.mean(dim=2).unsqueeze(3)).clamp_min(1e-6).reciprocal()
        h_q = token_sums(p_q, p_q * inverse_q)[0] / q.shape[2]
        h_k = token_sums(p_k, p_k * inverse_k)[0] / k.shape[2]
        # the factor lets rows of the kernel sum to 1 although the series ends
        sums = walk_series(beta * h_k @ h_q, sums, num_doublings) * ((1 - beta) / (1 - beta.pow(2 ** num_doublings)))
    return token_apply(p_q * inverse_q, sums).to(v.dtype)


@no_autocast
def random_walk_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
        mode: str = 'spectral',
) -> torch.Tensor:
    """Attention by random walks of any number of steps. Added here, see the top of this file.

    Cost: 2 (N + M) (r e + r^2) operations a head, and 14 products of r x r matrices. Sums run in float32 (float64 for
    float64 input), with autocast off.

    Args:
        q: Queries (B, heads, N, r).
        k: Keys (B, heads, M, r).
        v: Values (B, heads, M, e).
        beta: Probability (heads,) to return from a key to a query, below 1; None for one step.
        temperature: How peaked the features of 'walk' are (heads,), which needs it.
        mode: 'spectral', signed weights over no degrees, or 'walk'.

    Returns:
        (B, heads, N, e) in the dtype of v.

    Raises:
        ValueError: `mode` is unknown, or 'walk' has no `temperature`.
    """
    check_choice('mode', mode, 'spectral walk')
    num_doublings = 7
    if beta is not None:
        num_doublings, beta = enough_doublings(beta), at_least_float32(beta).view(-1, 1, 1)
    if mode == 'spectral':
        return _spectral(q, k, v, beta, num_doublings)
    if temperature is None:
        raise ValueError("temperature=None, but mode='walk' needs a (heads,) tensor.")
    return _walk(q, k, v, beta, at_least_float32(temperature).view(-1, 1, 1), num_doublings)
