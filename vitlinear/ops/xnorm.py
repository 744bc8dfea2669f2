"""XNorm attention: Song and Lee, 'X-ViT: High Performance Linear Vision Transformer without Softmax', arXiv 2205.13805,
a renamed version of UFO-ViT, arXiv 2109.14382.

No softmax and no feature map. Keys and values are multiplied first, d x d for each head, and two l2 norms take the
place of the softmax:

    out = XN(Q) XN(K^T V),    XN(t) = gamma t / |t|

The norm of Q is over its channels, that of K^T V over the channels of the keys, the same that Q contracts with. So

    out[n, j] = gamma_q gamma_kv cos(Q[n, :], (K^T V)[:, j]),

the cosine between a position and the j-th column of K^T V.

Documented: the order of the products, a learned scale for each head, the two axes (by a reader's note of the formula;
copies of it that circulate take the norm of K^T V over the channels of the values, which is no cosine). Ours, where the
paper is silent: a scale of its own for Q and for K^T V, both 1 at first, and what happens at zero. The authors have not
released code.
"""
from typing import Optional

import torch

from ._common import inverse_norm

KV_AXES = ('key', 'value')

# Shorter vectors have no direction: they give zero, and get no gradient.
EPS = 1e-6

# In inference: positions from which an image goes by itself and K^T V is multiplied into the output projection, and
# elements of a band of rows. Measured on one core: that is faster by a tenth or more from 28 x 28 positions on, and
# slower by as much at 14 x 14; bands from half to twice as large take the same time within the noise.
FOLD_FROM = 512
BAND = 2 ** 19


class _Sum(torch.autograd.Function):
    """k^T v, (B, heads, d, e), which keeps its arguments as they come: no copies by head, none in float32."""

    @staticmethod
    def forward(ctx, k, v, dtype: torch.dtype):
        ctx.save_for_backward(k, v)
        return k.to(dtype).transpose(-2, -1) @ v.to(dtype)

    @staticmethod
    def backward(ctx, grad):
        k, v = ctx.saved_tensors
        grad_k = v.to(grad.dtype) @ grad.transpose(-2, -1)
        grad_v = k.to(grad.dtype) @ grad
        return grad_k.to(k.dtype), grad_v.to(v.dtype), None


class _UnitProduct(torch.autograd.Function):
    """q / |q| times a (B, heads, d, e) matrix; keeps its arguments alone."""

    @staticmethod
    def forward(ctx, q, matrix, eps: float):
        ctx.save_for_backward(q, matrix)
        ctx.eps = eps
        q = q.to(matrix.dtype)
        return (q * inverse_norm(q, -1, eps)) @ matrix

    @staticmethod
    def backward(ctx, grad):
        q, matrix = ctx.saved_tensors
        dtype, q = q.dtype, q.to(matrix.dtype)
        inverse = inverse_norm(q, -1, ctx.eps)
        unit = q * inverse
        grad_unit = grad @ matrix.transpose(-2, -1)
        grad_q = inverse * (grad_unit - unit * (unit * grad_unit).sum(dim=-1, keepdim=True))
        return grad_q.to(dtype), unit.transpose(-2, -1) @ grad, None


def _normalise_sum(
        kv: torch.Tensor,
        num_keys: int,
        gamma_q: Optional[torch.Tensor],
        gamma_kv: Optional[torch.Tensor],
        kv_axis: str,
        eps: float,
) -> torch.Tensor:
    """XN(K^T V) of (..., heads, d, e) with both scales."""
    # the norm takes any factor out; with this one, the sum does not depend on the number of keys when it meets eps
    kv = kv * num_keys ** -0.5
    kv = kv * inverse_norm(kv, -2 if kv_axis == 'key' else -1, eps)
    if gamma_q is not None:
        kv = kv * gamma_q.to(kv.dtype).view(-1, 1, 1)
    if gamma_kv is not None:
        kv = kv * gamma_kv.to(kv.dtype).view(-1, 1, 1)
    return kv


def _xnorm_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gamma_q: Optional[torch.Tensor],
        gamma_kv: Optional[torch.Tensor],
        kv_axis: str,
        eps: float,
) -> torch.Tensor:
    dtype = v.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if torch.jit.is_scripting():
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        kv = _normalise_sum(k.transpose(-2, -1) @ v, k.shape[2], gamma_q, gamma_kv, kv_axis, eps)
        out = (q * inverse_norm(q, -1, eps)) @ kv
    else:
        kv = _normalise_sum(_Sum.apply(k, v, wide), k.shape[2], gamma_q, gamma_kv, kv_axis, eps)
        out = _UnitProduct.apply(q, kv, eps)
    return out.to(dtype)


def _check_kv_axis(kv_axis: str) -> None:
    if kv_axis not in KV_AXES:
        raise ValueError(f"Unknown kv_axis '{kv_axis}', expected one of {', '.join(KV_AXES)}.")


def xnorm_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gamma_q: Optional[torch.Tensor] = None,
        gamma_kv: Optional[torch.Tensor] = None,
        kv_axis: str = 'key',
        eps: float = EPS,
) -> torch.Tensor:
    """XNorm attention, linear in the number of positions: `XN(q) XN(k^T v)`.

    Sums and norms are float32 (float64 for float64 input), with autocast off.

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
        (B, heads, N, e) in the dtype of `v`.

    Raises:
        ValueError: `kv_axis` is unknown.
    """
    if not torch.jit.is_scripting():
        _check_kv_axis(kv_axis)
    if not torch.jit.is_scripting() and q.device.type != 'meta':
        with torch.autocast(device_type=q.device.type, enabled=False):
            return _xnorm_attention(q, k, v, gamma_q, gamma_kv, kv_axis, eps)
    return _xnorm_attention(q, k, v, gamma_q, gamma_kv, kv_axis, eps)
