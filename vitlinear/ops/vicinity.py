"""Vicinity attention: linear attention that favours near positions, along each axis of the map.

Paper: 'Vicinity Vision Transformer', arXiv 2206.10552, TPAMI 45(10), 2023.

The weight of key j for query i is

    w_ij = (q_i . k_j) [cos(a_i - a_j) + cos(b_i - b_j)],   a = (pi/2) row / H,   b = (pi/2) column / W,

with q and k rectified, so that every weight is >= 0. Since cos(a_i - a_j) = cos a_i cos a_j + sin a_i sin a_j, the
weight is the dot product of `[u cos a, u sin a, u cos b, u sin b]` for u = q_i and u = k_j, and the sum over keys can
be taken before it meets the queries. The paper speaks of the Manhattan distance; this sum of two cosines is what the
authors' released code computes, and what its weights were trained with.
"""
import math
from functools import lru_cache, partial
from typing import Any, Callable

import torch
import torch.nn.functional as F

from ._common import (
    differentiate,
    use_bands,
)

LOCALITIES = ('2d', '2d_product', '1d', 'none')
IMPLEMENTATIONS = ('auto', 'separable', 'features')
CLAMP_MIN = 1e-4
CLAMP_MAX = 1e4

# Measured on two cores: positions from which the row and column form wins over the feature form, and input elements of
# a band of rows, or of several images, in inference.
SEPARABLE_FROM = 1024
BAND = 2 ** 20


def _clamp_magnitude_(x: torch.Tensor) -> torch.Tensor:
    sign = x.sign()
    return x.abs_().clamp_(CLAMP_MIN, CLAMP_MAX).mul_(sign)


# The bounds as each dtype holds them: 1e-4 is no half precision number.
_BOUNDS = {
    dtype: tuple(torch.tensor([CLAMP_MIN, CLAMP_MAX], dtype=dtype).tolist())
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def _clamp_magnitude_backward(grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Gradient from the output alone: an entry that was not clamped lies strictly inside the bounds."""
    return torch.ops.aten.hardtanh_backward(grad, output.abs(), *_BOUNDS[output.dtype])


class _ClampMagnitude(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        x = _clamp_magnitude_(x.clone())
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return _clamp_magnitude_backward(grad, *ctx.saved_tensors)


def _scriptable_clamp(x: torch.Tensor, lower: float = CLAMP_MIN, upper: float = CLAMP_MAX) -> torch.Tensor:
    return x.abs().clamp(lower, upper) * x.sign()


def clamp_magnitude(x: torch.Tensor) -> torch.Tensor:
    """`sign(x) * clamp(|x|, 1e-4, 1e4)` (authors' code): zero stays zero, the gradient is 0 from the bounds on.

    Args:
        x: Any shape.

    Returns:
        Tensor like `x`. Training keeps the output only, not the intermediates of the formula.
    """
    if torch.jit.is_scripting():
        return _scriptable_clamp(x)
    return _ClampMagnitude.apply(x)


def _angle_table(size: int, like: torch.Tensor) -> torch.Tensor:
    """(2, size) cosines and sines of (pi/2) n / size, in the dtype of `like`."""
    angles = torch.arange(size, device=like.device, dtype=like.dtype) * (math.pi / 2 / size)
    return torch.stack([angles.cos(), angles.sin()])


def _position_features(H: int, W: int, locality: str, like: torch.Tensor) -> torch.Tensor:
    """(F, 1, H W) factors whose products, summed over F, give the positional part of the kernel."""
    if locality == 'none':
        return torch.ones(1, 1, H * W, device=like.device, dtype=like.dtype)
    if locality == '1d':
        return _angle_table(H * W, like).unsqueeze(1)
    rows = _angle_table(H, like).unsqueeze(-1).expand(2, H, W)
    columns = _angle_table(W, like).unsqueeze(-2).expand(2, H, W)
    if locality == '2d_product':
        return (rows.unsqueeze(1) * columns.unsqueeze(0)).reshape(4, 1, H * W)
    return torch.cat([rows, columns]).reshape(4, 1, H * W)


@lru_cache(maxsize=16)
def _known_table(build: Callable[..., torch.Tensor], dtype: torch.dtype, *size: Any) -> torch.Tensor:
    with torch.inference_mode(False):
        return build(*size, torch.empty(0, dtype=dtype, device='cpu'))


def _table(build: Callable[..., torch.Tensor], like: torch.Tensor, *size: Any) -> torch.Tensor:
    """`build(*size, like)`, which inference on a CPU remembers."""
    if use_bands(like) and type(like) is torch.Tensor:
        return _known_table(build, like.dtype, *size)
    return build(*size, like)


def _normalise(
        numerator: torch.Tensor,
        denominator: torch.Tensor,
        clamp: bool,
        eps: float,
        upper: float = CLAMP_MAX,
) -> torch.Tensor:
    if not clamp:
        return numerator / (denominator + eps)
    # the authors clamp the reciprocal; as the denominator is >= 0, capping it is the same
    return clamp_magnitude(clamp_magnitude(numerator) / (denominator + eps).clamp(max=upper))


def _normalise_(numerator: torch.Tensor, denominator: torch.Tensor, clamp: bool, eps: float) -> torch.Tensor:
    """`_normalise` in place, without gradients."""
    if not clamp:
        return numerator.div_(denominator + eps)
    sign, divisor = numerator.sign(), (denominator + eps).clamp_(max=CLAMP_MAX)
    return numerator.abs_().clamp_(CLAMP_MIN, CLAMP_MAX).div_(divisor).clamp_(CLAMP_MIN, CLAMP_MAX).mul_(sign)


def _weighted(x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(B, heads, d, N) and (F, 1, N) to (B, heads, F d, N), a copy of x for each positional factor."""
    return (x.unsqueeze(2) * features).flatten(2, 3)


def _regroup(x: torch.Tensor, num: int) -> torch.Tensor:
    """(B, heads, F d, e) to (B, heads, F e, d)."""
    return x.unflatten(2, [num, -1]).transpose(-2, -1).flatten(2, 3)


def _append_ones(v: torch.Tensor) -> torch.Tensor:
    """One more channel, of ones, so that the same products give numerators and denominators."""
    return F.pad(v, [0, 0, 0, 1], value=1.)


def _sum_keys(k: torch.Tensor, v: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Sums over keys (B, heads, F d, e + 1), the last column without values."""
    return _weighted(k, features) @ _append_ones(v).transpose(-2, -1)


def _clamp_sums(kv: torch.Tensor) -> torch.Tensor:
    """Clamp the sums with values; the authors leave those of the denominator as they are."""
    return torch.cat([clamp_magnitude(kv[..., :-1]), kv[..., -1:]], dim=-1)


def _by_features(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        features: torch.Tensor,
        clamp: bool,
        eps: float,
) -> torch.Tensor:
    """(B, heads, d, N) queries, keys and values and (F, 1, N) factors: one product over the F d kernel features.

    For TorchScript, which cannot compile `_ByFeatures`, and for second derivatives.
    """
    kv = _sum_keys(k, v, features)
    if clamp:
        kv = _clamp_sums(kv)
    out = kv.transpose(-2, -1) @ _weighted(q, features)
    return _normalise(out[:, :, :-1], out[:, :, -1:], clamp, eps)


class _ByFeatures(torch.autograd.Function):
    """One product over the F d kernel features, with a backward pass that keeps no copies for each factor.

    Shapes as for `_by_features`; kept are q, k, v, numerators and outputs. With G = [grad_numerator, grad_denominator]
    weighted by each factor, grad_q = M G and grad_M = q G^T, so neither the features of q nor their gradients are
    formed; likewise for k with the weighted values.
    """

    @staticmethod
    def forward(ctx, q, k, v, features, clamp: bool, eps: float):
        e = v.shape[2]
        kv = _sum_keys(k, v, features)
        if clamp:
            kv = _clamp_sums(kv)
        out = kv.transpose(-2, -1) @ _weighted(q, features)  # (B, heads, e + 1, N)
        numerator, denominator = out[:, :, :e], out[:, :, e:] + eps
        if clamp:
            numerator = _clamp_magnitude_(numerator)
            out = _clamp_magnitude_(numerator / denominator.clamp(max=CLAMP_MAX))
        else:
            out = numerator / denominator
        ctx.clamp, ctx.eps = clamp, eps
        ctx.save_for_backward(q, k, v, features, kv, numerator if clamp else None, denominator, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, features, kv, numerator, denominator, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = partial(_by_features, features=features, clamp=ctx.clamp, eps=ctx.eps)
            return (*differentiate(plain, (q, k, v), grad), None, None, None)
        e, num = v.shape[2], features.shape[0]
        divisor = denominator.clamp(max=CLAMP_MAX) if ctx.clamp else denominator
        if ctx.clamp:
            grad = _clamp_magnitude_backward(grad, out)
        grad = grad / divisor
        grad_denominator = -(grad * out).sum(dim=2, keepdim=True)
        if ctx.clamp:
            grad = _clamp_magnitude_backward(grad, numerator)
            grad_denominator = grad_denominator * (denominator < CLAMP_MAX)
        grad = _weighted(torch.cat([grad, grad_denominator], dim=2), features)  # (B, heads, F (e + 1), N)
        grad_kv = _regroup(grad @ q.transpose(-2, -1), num)  # (B, heads, F d, e + 1)
        grad_q = _regroup(kv, num).transpose(-2, -1) @ grad
        if ctx.clamp:
            grad_kv = torch.cat([_clamp_magnitude_backward(grad_kv[..., :e], kv[..., :e]), grad_kv[..., e:]], dim=-1)
        grad_k = _regroup(grad_kv, num).transpose(-2, -1) @ _weighted(_append_ones(v), features)
        grad_v = grad_kv[..., :e].transpose(-2, -1) @ _weighted(k, features)
        return grad_q, grad_k, grad_v, None, None, None


def _by_axes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, clamp: bool, eps: float) -> torch.Tensor:
    """The '2d' kernel through one matrix per row and one per column, half the operations and no feature copies.

    The row angle is constant along a row, so sums over keys factor through row marginals, and likewise for columns.
    """
    B, heads, H, W, d = q.shape
    e = v.shape[-1]
    rows, columns = _table(_angle_table, q, H), _table(_angle_table, q, W)

    row_kv = rows @ (k.transpose(-2, -1) @ v).reshape(B, heads, H, d * e)  # (B, heads, 2, d e)
    k_t, v_t = k.transpose(2, 3), v.transpose(2, 3)
    column_kv = columns @ (k_t.transpose(-2, -1) @ v_t).reshape(B, heads, W, d * e)
    if clamp:
        row_kv, column_kv = clamp_magnitude(row_kv), clamp_magnitude(column_kv)
    row_k = rows @ k.sum(dim=3)  # (B, heads, 2, d)
    column_k = columns @ k.sum(dim=2)

    q_t = q.transpose(2, 3)
    numerator = q @ (rows.t() @ row_kv).reshape(B, heads, H, d, e)
    numerator = numerator + (q_t @ (columns.t() @ column_kv).reshape(B, heads, W, d, e)).transpose(2, 3)
    denominator = q @ (rows.t() @ row_k).unsqueeze(-1)
    denominator = denominator + (q_t @ (columns.t() @ column_k).unsqueeze(-1)).transpose(2, 3)
    return _normalise(numerator, denominator, clamp, eps)


def _vicinity_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        locality: str,
        clamp: bool,
        eps: float,
        impl: str,
) -> torch.Tensor:
    dtype = v.dtype
    if dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    B, heads, H, W, _ = q.shape
    if not torch.jit.is_scripting():
        # graphs that are traced or exported shall hold for every size; compiled ones are made for theirs
        by_size = not torch.jit.is_tracing() and not torch.compiler.is_exporting()
        if impl == 'separable' or (impl == 'auto' and locality == '2d' and by_size and H * W >= SEPARABLE_FROM):
            return _by_axes(q, k, v, clamp, eps).to(dtype)
    if torch.jit.is_scripting():
        features = _position_features(H, W, locality, q)
    else:
        features = _table(_position_features, q, H, W, locality)
    # positions last: the factors vary along the innermost axis then, and the elementwise passes stay vectorised
    q, k, v = [x.flatten(2, 3).transpose(-2, -1).contiguous() for x in (q, k, v)]
    if torch.jit.is_scripting():
        out = _by_features(q, k, v, features, clamp, eps)
    else:
        out = _ByFeatures.apply(q, k, v, features, clamp, eps)
    return out.transpose(-2, -1).unflatten(2, [H, W]).to(dtype)


def _check_options(locality: str, impl: str) -> None:
    if locality not in LOCALITIES:
        raise ValueError(f"Unknown locality '{locality}', expected one of {', '.join(LOCALITIES)}.")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown impl '{impl}', expected one of {', '.join(IMPLEMENTATIONS)}.")
    if impl == 'separable' and locality != '2d':
        raise ValueError(f"impl='separable' evaluates locality '2d' only, not '{locality}'.")


def vicinity_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        locality: str = '2d',
        clamp: bool = True,
        eps: float = 1e-4,
        impl: str = 'auto',
) -> torch.Tensor:
    """Vicinity attention over all positions of a map, linear in H W.

    Sums and angle tables are float32 (float64 for float64 input), with autocast off.

    Args:
        q: Queries (B, heads, H, W, d), all >= 0.
        k: Keys (B, heads, H, W, d), all >= 0.
        v: Values (B, heads, H, W, e).
        locality: '2d', the published kernel; '2d_product' takes the product of the two cosines; '1d' one cosine over
            row-major positions n / (H W); 'none' plain linear attention.
        clamp: Push magnitudes of sums, numerators, reciprocals and outputs into [1e-4, 1e4], as the released weights
            were trained. The sums grow with H W, so large maps meet the cap; without it this is the paper's formula.
        eps: Added to the denominator.
        impl: Order of evaluation, same result up to rounding: 'separable' ('2d' only), 'features', or 'auto' by size.

    Returns:
        (B, heads, H, W, e) in the dtype of `v`.

    Raises:
        ValueError: `locality` or `impl` is unknown, or the two do not go together.
    """
    if not torch.jit.is_scripting():
        _check_options(locality, impl)
    if not torch.jit.is_scripting() and q.device.type != 'meta':
        with torch.autocast(device_type=q.device.type, enabled=False):
            return _vicinity_attention(q, k, v, locality, clamp, eps, impl)
    return _vicinity_attention(q, k, v, locality, clamp, eps, impl)
