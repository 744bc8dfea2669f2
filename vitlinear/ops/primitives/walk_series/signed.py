"""What signed walks need besides the series: bounds of norms, the length of a series, and when edges are smaller."""
import torch

from ..._dispatch import is_eager, may_read, scripts_as
from . import walk_series

MAX_DOUBLINGS = 7  # the terms left out are 1e-6 of the sum at beta = 0.9


def _always_long(beta: torch.Tensor) -> int:
    return 7


@scripts_as(_always_long)
def enough_doublings(beta: torch.Tensor) -> int:
    """Doublings of the series of this beta: on a CPU no more than float32 sees, which reading beta tells."""
    if beta.dtype != torch.float32 or not may_read(beta.detach()):
        return MAX_DOUBLINGS
    largest = beta.detach().max().item()
    return next((n for n in range(1, MAX_DOUBLINGS) if largest ** 2 ** n <= 2 ** -24), MAX_DOUBLINGS)


def _never(num_queries: int, num_keys: int, num_channels: int) -> bool:
    return False


@scripts_as(_never)
def by_edges(num_queries: int, num_keys: int, num_channels: int) -> bool:
    """Whether N x M matrices are no larger than r x r ones; graphs for every size get one form."""
    return is_eager() and max(num_queries, num_keys) <= num_channels


def norm_bound(gram: torch.Tensor) -> torch.Tensor:
    """(..., 1, 1) upper bound of the largest eigenvalue of Gram matrices, at most r^(1/8) times it: a Schatten norm."""
    # scaled by the trace first, so that the powers stay in range, as do the gradients of maps that are zero
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp_min(1e-12)[..., None, None]
    gram = gram / trace
    gram = gram @ gram
    gram = gram @ gram
    return trace * gram.square().sum(dim=(-2, -1), keepdim=True).clamp_min(1e-20).pow(0.125)


def signed_series(
        g_q: torch.Tensor,
        g_k: torch.Tensor,
        sums: torch.Tensor,
        beta: torch.Tensor | None,
        num_doublings: int,
) -> torch.Tensor:
    """What queries meet (B, heads, r, e), from Gram matrices (B, heads, r, r) and `k^T v`."""
    grams = torch.stack([g_q, g_k])
    bounds = norm_bound(grams)
    roots = bounds.rsqrt()  # one root of their product would leave the range of float32
    sums = sums * (roots[0] * roots[1])
    if beta is None:
        return sums
    grams = grams / bounds
    return walk_series(beta * grams[1] @ grams[0], sums, num_doublings)
