"""Sums over tokens whose backward passes keep queries, keys and values as they came, and no copies by factor.

The gradient of a sum over keys is what the keys make of the gradient of the sums, and the other way round: both passes
are `sums` and `apply` of `positions.py`. Asked for a graph, they differentiate the plain operations.
"""
from functools import lru_cache, partial

import torch

from ..._numerics import (
    as_operand,
    at_least_float32,
    differentiate,
    inverse_norm,
    no_autocast_backward,
    product,
)
from . import torch as plain
from .positions import apply, apply_alone, sums, transposed


@lru_cache
def _bounds(low: float, high: float, dtype: torch.dtype) -> list[float]:
    """Bounds as a dtype holds them: 1e-4 is no binary fraction."""
    return torch.tensor([low, high], dtype=dtype, device='cpu').tolist()


def _unclamped(grad: torch.Tensor, clamped: torch.Tensor, low: float = 1e-4, high: float = 1e4) -> torch.Tensor:
    """Gradient through a clamp of magnitudes, from its result: what was not clamped lies strictly inside the bounds."""
    return torch.ops.aten.hardtanh_backward(grad, clamped.abs(), *_bounds(low, high, clamped.dtype))


def _unit_backward(grad: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Gradient of x from that of `x / |x|`."""
    unit = x * inverse
    return torch.addcmul(grad, unit, (unit * grad).sum(dim=-1, keepdim=True), value=-1).mul_(inverse)


class _ClampMagnitude(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, low, high):
        out = x.abs().clamp_(low, high).mul_(x.sign())
        ctx.bounds = low, high
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, = ctx.saved_tensors
        return _unclamped(grad, out, *ctx.bounds), None, None


def clamp_magnitude(x, low=1e-4, high=1e4):
    """As `torch.clamp_magnitude`; keeps its result alone."""
    return _ClampMagnitude.apply(x, low, high)


class _TokenSums(torch.autograd.Function):

    @staticmethod
    def forward(ctx, k, v, locality, grid, with_total, unit, eps):
        ctx.save_for_backward(k, v)
        ctx.args = locality, grid, with_total, unit, eps
        return plain.token_sums(k, v, *ctx.args)

    @staticmethod
    @no_autocast_backward
    def backward(ctx, grad, grad_total):
        k, v = ctx.saved_tensors
        locality, grid, with_total, unit, eps = ctx.args
        if torch.is_grad_enabled():
            form = partial(plain.token_sums, locality=locality, grid=grid, with_total=with_total, unit=unit, eps=eps)
            return (*differentiate(form, (k, v), (grad, grad_total)), *[None] * 5)
        keys, values, grad = as_operand(k), as_operand(v), grad.flatten(0, 1)
        x = keys
        if unit:
            inverse = inverse_norm(x, -1, eps)
            keys = x * inverse.to(x.dtype)
        grad_v = apply(keys, grad, locality, grid)
        grad_k = apply(values, transposed(grad, locality), locality, grid)
        if with_total:
            grad_k += apply_alone(grad_total.flatten(0, 1), locality, grid)
        if unit:
            grad_k = _unit_backward(grad_k, at_least_float32(x), inverse)
        return grad_k.view(k.shape).to(k.dtype), grad_v.view(v.shape).to(v.dtype), *[None] * 5


class _TokenMoments(torch.autograd.Function):

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return plain.token_moments(q, k, v)

    @staticmethod
    @no_autocast_backward
    def backward(ctx, grad_q, grad_k, grad_sums):
        q, k, v = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiate(plain.token_moments, (q, k, v), (grad_q, grad_k, grad_sums))
        queries, keys, values = as_operand(q), as_operand(k), as_operand(v)
        grad_q, grad_k, grad_sums = [g.flatten(0, 1) for g in (grad_q, grad_k, grad_sums)]
        grad_q = product(queries, (grad_q + grad_q.transpose(1, 2)).to(queries.dtype))
        grad_k = product(keys, (grad_k + grad_k.transpose(1, 2)).to(keys.dtype))
        grad_k += product(values, grad_sums.transpose(1, 2).to(values.dtype))
        grad_v = product(keys, grad_sums.to(keys.dtype))
        return tuple(g.view(x.shape).to(x.dtype) for g, x in ((grad_q, q), (grad_k, k), (grad_v, v)))


class _TokenApply(torch.autograd.Function):

    @staticmethod
    def forward(ctx, q, matrices, total, base, locality, grid, clamp, unit, eps, dtype):
        ctx.args, ctx.dtype = (locality, grid, clamp, unit, eps), dtype
        if total is None:
            ctx.save_for_backward(q, matrices, base)
            return plain.token_apply(q, matrices, None, locality, grid, clamp, unit, eps, base, dtype)
        x, e = as_operand(q), matrices.shape[3]
        both = apply(x, plain.with_total(matrices, total, x), locality, grid)
        out, weight = both[:, :, :e], both[:, :, e:e + 1] + eps
        numerator = None
        if clamp:
            sign = out.sign()
            numerator = out.abs().clamp_(plain.CLAMP_MIN, plain.CLAMP_MAX).mul_(sign)
            out = numerator / weight.clamp(max=plain.CLAMP_MAX)
            out = out.abs_().clamp_(plain.CLAMP_MIN, plain.CLAMP_MAX).mul_(sign)
        else:
            out = out / weight
        ctx.save_for_backward(q, matrices, base, total, numerator, weight, out)
        out = out.view(*q.shape[:3], -1)
        return plain.in_order(out if base is None else out + base, q.dtype if dtype is None else dtype)

    @staticmethod
    @no_autocast_backward
    def backward(ctx, grad):
        q, matrices, base, *rest = ctx.saved_tensors
        locality, grid, clamp, unit, eps = ctx.args
        if torch.is_grad_enabled():
            def form(q, matrices, total, base):
                return plain.token_apply(q, matrices, total, locality, grid, clamp, unit, eps, base, ctx.dtype)
            return *differentiate(form, (q, matrices, rest[0] if rest else None, base), (grad,)), *[None] * 6
        grad_base = None if base is None else grad.to(base.dtype)
        queries = as_operand(q)
        if grad.dtype in (torch.float32, torch.float64):
            grad = grad.flatten(0, 1)
        else:
            grad = grad.to(torch.float32, memory_format=torch.contiguous_format).flatten(0, 1)
        if rest:
            total, numerator, weight, out = rest
            if clamp:
                grad = _unclamped(grad, out)
            grad = grad / (weight.clamp(max=plain.CLAMP_MAX) if clamp else weight)
            grad_weight = (grad * out).sum(dim=-1, keepdim=True).neg_()
            if clamp:
                grad = _unclamped(grad, numerator)
                grad_weight = grad_weight * (weight < plain.CLAMP_MAX)
            g = torch.cat([grad, grad_weight], dim=2)
            both = torch.cat([matrices, total.unsqueeze(3)], dim=3).flatten(0, 1)
        else:
            g, both = grad, matrices.flatten(0, 1)
        if queries.dtype == torch.bfloat16:
            g = g.to(torch.bfloat16)
        grad_q = apply(g, transposed(both, locality), locality, grid)
        if unit:
            inverse = inverse_norm(queries, -1, eps)
            grad_q = _unit_backward(grad_q, at_least_float32(queries), inverse)
            g = grad * inverse
        grad_both = sums(queries, g, locality, grid).view(*matrices.shape[:3], -1)
        grad_matrices = grad_both[..., :matrices.shape[3]]
        grad_total = grad_both[..., -1] if rest else None
        return grad_q.view(q.shape).to(q.dtype), grad_matrices, grad_total, grad_base, *[None] * 6


def token_sums(k, v, locality='none', grid=(0, 0), with_total=False, unit=False, eps=1e-6):
    """As `torch.token_sums`; keeps k and v alone."""
    return _TokenSums.apply(k, v, locality, grid, with_total, unit, eps)


def token_moments(q, k, v):
    """As `torch.token_moments`; keeps q, k and v alone."""
    return _TokenMoments.apply(q, k, v)


def token_apply(
        q, sums, total=None, locality='none', grid=(0, 0), clamp=False, unit=False, eps=1e-6, base=None,
        dtype=None):
    """As `torch.token_apply`; keeps q and the sums, with a division its result, divisor and, clamped, numerators."""
    return _TokenApply.apply(q, sums, total, base, locality, grid, clamp, unit, eps, dtype)
