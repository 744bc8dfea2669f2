"""XNorm attention: Song and Lee, 'X-ViT: High Performance Linear Vision Transformer without Softmax', arXiv 2205.13805,
a renamed version of UFO-ViT, arXiv 2109.14382.

No softmax and no feature map. Keys and values are multiplied first, d x d for each head, and two l2 norms take the
place of the softmax:

    out = XN(Q) XN(K^T V),    XN(t) = gamma t / |t|

The norm of Q is over its channels, that of K^T V over the channels of the keys, the same that Q contracts with. So
out[n, j] = gamma_q gamma_kv cos(Q[n, :], (K^T V)[:, j]), the cosine between a position and the j-th column of K^T V.

From the paper: the order of the products, a learned scale for each head, the two axes (by a reader's note of the
formula; copies of it that circulate take the norm of K^T V over the channels of the values, which is no cosine). Added
here, where the paper is silent: a scale of its own for Q and for K^T V, and what happens at zero. The authors have not
released code.
"""
import torch

from ._numerics import check_choice, inverse_norm, no_autocast
from .primitives.tokens import token_apply, token_sums

KV_AXES = ('key', 'value')


def normalise_sums(
        sums: torch.Tensor,
        num_keys: int,
        gamma_q: torch.Tensor | None,
        gamma_kv: torch.Tensor | None,
        kv_axis: str,
        eps: float = 1e-6,
) -> torch.Tensor:
    """XN(K^T V) of (..., heads, d, e) with both scales (heads,); arguments as for `xnorm_attention`."""
    # sums grow with the root of the number of keys, and with them what counts as zero
    inverse = inverse_norm(sums, -2 if kv_axis == 'key' else -1, eps * num_keys ** 0.5)
    if gamma_q is not None and gamma_kv is not None:
        return sums * (inverse * (gamma_q * gamma_kv).to(sums.dtype).view(-1, 1, 1))
    gamma = gamma_kv if gamma_q is None else gamma_q
    return sums * (inverse if gamma is None else inverse * gamma.to(sums.dtype).view(-1, 1, 1))


@no_autocast
def xnorm_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gamma_q: torch.Tensor | None = None,
        gamma_kv: torch.Tensor | None = None,
        kv_axis: str = 'key',
        eps: float = 1e-6,
) -> torch.Tensor:
    """XNorm attention: `XN(q) XN(k^T v)`.

    Cost: 2 (N + M) d e operations a head. Sums and norms are float32 (float64 for float64 input), with autocast off.

    Args:
        q: Queries (B, heads, N, d).
        k: Keys (B, heads, M, d).
        v: Values (B, heads, M, e).
        gamma_q: Scale of the normalised queries of each head (heads,), 1 by default.
        gamma_kv: Scale of the normalised `k^T v` of each head (heads,), 1 by default.
        kv_axis: Axis of the norm of `k^T v`: 'key', the paper's, which makes the result a cosine times the scales, or
            'value', as in copies that circulate.
        eps: Queries, and columns of `k^T v / sqrt(M)`, of this norm or a smaller one count as zero.

    Returns:
        (B, heads, N, e) in the dtype of q.

    Raises:
        ValueError: `kv_axis` is unknown.
    """
    check_choice('kv_axis', kv_axis, 'key value')
    sums, _ = token_sums(k, v)
    return token_apply(q, normalise_sums(sums, k.shape[2], gamma_q, gamma_kv, kv_axis, eps), unit=True, eps=eps)
