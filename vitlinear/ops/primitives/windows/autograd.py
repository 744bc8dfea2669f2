"""Window sums whose backward pass keeps scores and values, not their products or the sums."""
from functools import partial

import torch

from ..._numerics import at_least_float32, differentiate, no_autocast_backward
from . import torch as plain


def _widened(v: torch.Tensor) -> torch.Tensor:
    # float16 holds no sums of small weights; on CPUs the backward pass takes eight times as long in bfloat16
    return v if v.dtype == torch.bfloat16 and v.is_cuda else at_least_float32(v)


class _WindowSums(torch.autograd.Function):

    @staticmethod
    def forward(ctx, score, v, kernel, stride, shift):
        ctx.args = stride, shift
        ctx.save_for_backward(score, v, kernel)
        return plain.window_sums(score, _widened(v), kernel, stride, shift).to(v.dtype)

    @staticmethod
    @no_autocast_backward
    def backward(ctx, grad):
        score, v, kernel = ctx.saved_tensors
        stride, shift = ctx.args
        if torch.is_grad_enabled():
            form = partial(plain.window_sums, stride=stride, shift=shift)
            return *differentiate(form, ctx.saved_tensors, (grad,)), None, None
        values = plain.with_ones(_widened(v))
        dtype, kernel_dtype, kernel = values.dtype, kernel.dtype, kernel.to(values.dtype)
        shape = [score.shape[3], *values.shape[3:]]  # L, d + 1, heads
        weights = plain.window_weights(score, shift).to(dtype).unsqueeze(4)
        products = (weights * values.unsqueeze(3)).flatten(3)
        padding = kernel.shape[3] // 2
        sums = plain.depthwise_windows(products, kernel, stride, padding).unflatten(3, shape)
        inverse = sums[..., -1:, :].clamp(min=2. ** -126).reciprocal()

        grad_sums = torch.empty_like(sums)
        grad_numerators = grad_sums[..., :-1, :]
        torch.mul(grad.to(dtype).unsqueeze(3), inverse, out=grad_numerators)
        torch.mul(
            (grad_numerators * sums[..., :-1, :]).sum(dim=4, keepdim=True), -inverse, out=grad_sums[..., -1:, :])
        grad_products, grad_kernel, _ = torch.ops.aten.convolution_backward(
            grad_sums.flatten(3).permute(0, 3, 1, 2), products.permute(0, 3, 1, 2), kernel, None, [stride, stride],
            [padding, padding], [1, 1], False, [0, 0], kernel.shape[0], [True, True, False])
        grad_products = grad_products.permute(0, 2, 3, 1).unflatten(3, shape) * weights
        grad_score = (grad_products * values.unsqueeze(3)).sum(dim=4)
        grad_v = grad_products.sum(dim=3)[..., :-1, :]
        return grad_score.to(score.dtype), grad_v.to(v.dtype), grad_kernel.to(kernel_dtype), None, None


def window_attention(score, v, rel_pos_bias, attn_scale=None, stride=1, scale=1., kernel=None):
    """As `torch.window_attention`; keeps scores, values and the kernel alone, unless scores spread far."""
    spread = plain.spread_of(score, rel_pos_bias)
    if spread == 'large':
        return plain.shifted_windows(score, v, rel_pos_bias, attn_scale, stride, scale)
    if kernel is None:
        kernel = plain.window_kernel(rel_pos_bias, attn_scale, score.shape[3], v.shape[3], scale)
    return _WindowSums.apply(score, v, kernel, stride, spread != 'small')
