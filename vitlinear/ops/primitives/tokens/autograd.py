"""Sums over tokens whose backward passes keep queries, keys and values as they came, and no copies by factor.

The gradient of a sum over keys is what the keys make of the gradient of the sums, and the other way round: both passes
are `sums` and `apply` of `positions.py`. Asked for a graph, they differentiate the plain operations.
"""
from functools import partial

import torch

from ..._numerics import as_operand, at_least_float32, differentiate, inverse_norm, no_autocast_backward
from . import torch as plain
from .positions import apply, apply_alone, regroup, sums, sums_alone

# The bounds of the clamp as each dtype holds them: 1e-4 is no binary fraction.
_BOUNDS = {dtype: torch.tensor([plain.CLAMP_MIN, plain.CLAMP_MAX], dtype=dtype).tolist()
           for dtype in (torch.float32, torch.float64)}


def _unclamped(grad: torch.Tensor, clamped: torch.Tensor) -> torch.Tensor:
    """Gradient through a clamp of magnitudes, from its result: what was not clamped lies strictly inside the bounds."""
    return torch.ops.aten.hardtanh_backward(grad, clamped.abs(), *_BOUNDS[clamped.dtype])


def _transposed(matrices: torch.Tensor, locality: str) -> torch.Tensor:
    return matrices.transpose(-2, -1) if locality == 'none' else regroup(matrices, 2 if locality == '1d' else 4)


def _unit_backward(grad: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Gradient of x from that of `x / |x|`."""
    unit = x * inverse
    return torch.addcmul(grad, unit, (unit * grad).sum(dim=-1, keepdim=True), value=-1).mul_(inverse)


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
        keys, inverse = k, None
        if unit:
            inverse, keys = inverse_norm(k, -1, eps), as_operand(k)
            keys = keys * inverse.to(keys.dtype)
        grad_v = apply(keys, grad, locality, grid)
        grad_k = apply(v, _transposed(grad, locality), locality, grid)
        if with_total:
            grad_k += apply_alone(grad_total, locality, grid)
        if unit:
            grad_k = _unit_backward(grad_k, at_least_float32(k), inverse)
        return grad_k.to(k.dtype), grad_v.to(v.dtype), *[None] * 5


class _TokenGram(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return plain.token_gram(x)

    @staticmethod
    @no_autocast_backward
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiate(plain.token_gram, (x,), (grad,))
        return apply(x, grad + grad.transpose(-2, -1), 'none', (0, 0)).to(x.dtype)


class _TokenApply(torch.autograd.Function):

    @staticmethod
    def forward(ctx, q, matrices, total, base, locality, grid, clamp, unit, eps, dtype):
        ctx.args, ctx.dtype = (locality, grid, clamp, unit, eps), dtype
        if total is None:
            ctx.save_for_backward(q, matrices, base)
            return plain.token_apply(q, matrices, None, locality, grid, clamp, unit, eps, base, dtype)
        out = apply(q, matrices, locality, grid)
        weight = apply(q, total.unsqueeze(3), locality, grid).add_(eps)
        numerator = None
        if clamp:
            sign = out.sign()
            numerator = out.abs_().clamp_(plain.CLAMP_MIN, plain.CLAMP_MAX).mul_(sign)
            out = numerator / weight.clamp(max=plain.CLAMP_MAX)
            out = out.abs_().clamp_(plain.CLAMP_MIN, plain.CLAMP_MAX).mul_(sign)
        else:
            out = out.div_(weight)
        ctx.save_for_backward(q, matrices, base, total, numerator, weight, out)
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
        grad, grad_total = at_least_float32(grad), None
        if rest:
            total, numerator, weight, out = rest
            if clamp:
                grad = _unclamped(grad, out)
            grad = grad / (weight.clamp(max=plain.CLAMP_MAX) if clamp else weight)
            grad_weight = (grad * out).sum(dim=-1, keepdim=True).neg_()
            if clamp:
                grad = _unclamped(grad, numerator)
                grad_weight = grad_weight * (weight < plain.CLAMP_MAX)
            grad_total = sums_alone(q * grad_weight, locality, grid)
        g = grad.to(torch.bfloat16) if as_operand(q).dtype == torch.bfloat16 else grad
        grad_q = apply(g, _transposed(matrices, locality), locality, grid)
        if unit:
            inverse = inverse_norm(q, -1, eps)
            grad_q = _unit_backward(grad_q, at_least_float32(q), inverse)
            g = grad * inverse
        if rest:
            grad_q = torch.addcmul(grad_q, grad_weight, apply_alone(total, locality, grid))
        return grad_q.to(q.dtype), sums(q, g, locality, grid), grad_total, grad_base, *[None] * 6


def token_sums(k, v, locality='none', grid=(0, 0), with_total=False, unit=False, eps=1e-6):
    """As `torch.token_sums`; keeps k and v alone."""
    return _TokenSums.apply(k, v, locality, grid, with_total, unit, eps)


def token_gram(x):
    """As `torch.token_gram`; keeps x alone."""
    return _TokenGram.apply(x)


def token_apply(
        q, sums, total=None, locality='none', grid=(0, 0), clamp=False, unit=False, eps=1e-6, base=None,
        dtype=None):
    """As `torch.token_apply`; keeps q and the sums, with a division its result, divisor and, clamped, numerators."""
    return _TokenApply.apply(q, sums, total, base, locality, grid, clamp, unit, eps, dtype)
