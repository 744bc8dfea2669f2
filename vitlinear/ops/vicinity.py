"""Vicinity attention: linear attention that favours near positions, along each axis of the map.

Paper: 'Vicinity Vision Transformer', arXiv 2206.10552, TPAMI 45(10), 2023. The weight of key j for query i is

    w_ij = (q_i . k_j) [cos(a_i - a_j) + cos(b_i - b_j)],   a = (pi/2) row / H,   b = (pi/2) column / W,

with q and k rectified, so that every weight is >= 0. Since cos(a_i - a_j) = cos a_i cos a_j + sin a_i sin a_j, it is a
sum of four products of a factor of i and one of j, phi = (cos a, sin a, cos b, sin b), and with each of them the sum
over keys can be taken before it meets the queries:

    o_i = sum_f phi_f(i) q_i S_f / (sum_f phi_f(i) q_i . Z_f),
    S_f = sum_j phi_f(j) k_j v_j^T,    Z_f = sum_j phi_f(j) k_j.

From the paper: linear cost, rectified features, locality along each axis. From the authors' code: the sum of two
cosines where the paper speaks of the Manhattan distance, and the clamps; released weights were trained with both.
Added here: the other localities.
"""
import torch

from ._numerics import check_choice, no_autocast
from .primitives.tokens import clamp_magnitude, token_apply, token_sums


@no_autocast
def vicinity_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        locality: str = '2d',
        clamp: bool = True,
        eps: float = 1e-4,
) -> torch.Tensor:
    """Vicinity attention over all positions of a map.

    Cost: 16 H W d e operations a head, half of that on large maps for '2d', and no memory beyond a few maps. Sums are
    float32 (float64 for float64 input), with autocast off.

    Args:
        q: Queries (B, heads, H, W, d), all >= 0.
        k: Keys (B, heads, H, W, d), all >= 0.
        v: Values (B, heads, H, W, e).
        locality: '2d', the published kernel; '2d_product' takes the product of the two cosines; '1d' one cosine over
            row-major positions n / (H W); 'none' plain linear attention.
        clamp: Push magnitudes of sums, numerators, reciprocals and outputs into [1e-4, 1e4], as the released weights
            were trained. The sums grow with H W, so large maps meet the cap; without it this is the paper's formula.
        eps: Added to the denominator.

    Returns:
        (B, heads, H, W, e) in the dtype of q.

    Raises:
        ValueError: `locality` is unknown.
    """
    check_choice('locality', locality, '2d 2d_product 1d none')
    grid = (q.shape[2], q.shape[3])
    sums, total = token_sums(k.flatten(2, 3), v.flatten(2, 3), locality, grid, with_total=True)
    if clamp:
        sums = clamp_magnitude(sums)  # the authors leave the sums of the denominator as they are
    out = token_apply(q.flatten(2, 3), sums, total, locality, grid, clamp, eps=eps)
    return out.unflatten(2, grid)
