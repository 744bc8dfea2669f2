"""The series of a walk whose backward pass keeps the step and the result, and none of the powers between.

With z = (I - B)^-1 y, the gradient of y is w = (I - B^T)^-1 grad, one more series, and that of B is w z^T: that of the
inverse, which the series is but for the terms that it leaves out.
"""
from functools import partial

import torch

from ..._numerics import differentiate, no_autocast_backward
from . import torch as plain


class _WalkSeries(torch.autograd.Function):

    @staticmethod
    def forward(ctx, step, start, num_doublings):
        out = plain.walk_series(step, start, num_doublings)
        ctx.num_doublings = num_doublings
        ctx.save_for_backward(step, start, out)
        return out

    @staticmethod
    @no_autocast_backward
    def backward(ctx, grad):
        step, start, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            series = partial(plain.walk_series, num_doublings=ctx.num_doublings)
            return *differentiate(series, (step, start), (grad,)), None
        grad_start = plain.walk_series(step.transpose(-2, -1), grad, ctx.num_doublings)
        return grad_start @ out.transpose(-2, -1), grad_start, None


def walk_series(step, start, num_doublings=7):
    """As `torch.walk_series`; keeps its arguments and result."""
    return _WalkSeries.apply(step, start, num_doublings)
