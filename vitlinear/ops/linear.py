"""Plain kernel attention: Katharopoulos et al., 'Transformers are RNNs', arXiv 2006.16236, equations 5 to 7.

The softmax kernel exp(q . k) becomes phi(q) . phi(k) with phi(u) = elu(u) + 1, so the sum over keys can be taken
before it meets the queries: N d^2 operations instead of N^2 d, and no notion of position.
"""
import torch
import torch.nn.functional as F

from ._numerics import at_least_float32, no_autocast
from .primitives.tokens import token_apply, token_sums


@no_autocast
def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Kernel attention `o_i = phi(q_i) (sum_j phi(k_j) v_j^T) / (phi(q_i) . sum_j phi(k_j) + eps)`.

    Cost: 2 (N + M) d e operations a head. Features and sums are float32 (float64 for float64 input), with autocast off.

    Args:
        q: Queries (B, heads, N, d).
        k: Keys (B, heads, M, d).
        v: Values (B, heads, M, e).
        eps: Added to the denominator.

    Returns:
        (B, heads, N, e) in the dtype of v.
    """
    q, k = F.elu(at_least_float32(q)) + 1, F.elu(at_least_float32(k)) + 1
    sums, total = token_sums(k, v, with_total=True)
    return token_apply(q, sums, total, eps=eps).to(v.dtype)
