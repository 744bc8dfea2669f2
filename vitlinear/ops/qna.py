"""Learned-query local attention: Arar, Shamir, Bermano, 'Learned Queries for Efficient Local Attention' (QnA),
CVPR 2022, arXiv 2112.11435.

Each head attends with L learned queries, the same at every position, to the k x k window around a position. A pixel's
score is then one number in all the windows that hold it, so softmax attention becomes two window sums:

    c = <q_l, W_k x>        e = exp(c)        z = sum_l  window_sum(S_l exp(r_l) e_l v) / window_sum(exp(r_l) e_l)

with a learned relative bias r and a learned scale S for each tap, query and head. The scale stands outside the softmax
and has either sign. Taps outside the map take no part. Written from a description of the authors' released code,
https://github.com/moabarar/qna.

There are three ways to evaluate it: 'conv' takes both window sums in one depthwise convolution, without memory for
windows; 'shift' passes over the k^2 taps with the true maximum of each window; `reference.qna_attention` unfolds the
windows.

Heads are the last axis throughout, (d, heads) and not (heads, d): a score, which is broadcast over the channels of a
head, then runs along memory.
"""
import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from ._common import (
    differentiate,
    is_eager,
)

# Scores are clamped this far below the maximum of their map, where exp is still a normal float32.
MAX_SPREAD = 80.

# Smallest normal float32. A denominator below it, which only 'conv' can meet, is taken for it and so has an inverse.
TINY = 2. ** -126

# Scores up to this size need no shift: their exponentials, the sums of these and the inverse sums are normal float32.
MAX_SCORE = 40.

# Bytes of products of weights and values that inference holds at a time, within the caches of two cores. Measured on
# maps of 56 x 56 x 64: a quarter of it takes 1.7 times as long, four times as much 2.2 times as long in float32.
BAND = 2 ** 21

IMPLS = ('auto', 'conv', 'shift')


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _split(joint: torch.Tensor, num_queries: int, num_heads: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """(B, H, W, (d + 1 + L) heads) to values (B, H, W, d + 1, heads) and scores (B, H, W, L, heads)."""
    B, H, W, C = joint.shape
    joint = joint.view(B, H, W, C // num_heads, num_heads)
    return joint[:, :, :, :-num_queries], joint[:, :, :, -num_queries:]


def _weights(
        score: torch.Tensor,
        dtype: torch.dtype,
        shift: bool = True,
        max_spread: float = MAX_SPREAD,
) -> torch.Tensor:
    """exp(score), (B, H, W, L, heads), with `shift` up to a factor per sample, query and head.

    The factor, which the division takes out again, makes the largest weight 1.
    """
    score = _at_least_float32(score)
    if shift:
        score = (score - score.detach().amax(dim=(1, 2), keepdim=True)).clamp(min=-max_spread)
    return score.exp().to(dtype)


def _depthwise(x: torch.Tensor, kernel: torch.Tensor, stride: int, pad_rows: int) -> torch.Tensor:
    """Depthwise cross-correlation of a (B, H, W, C) map with (C, 1, k, k), zeros outside the map."""
    padding = [pad_rows, kernel.shape[3] // 2]
    x = F.conv2d(x.permute(0, 3, 1, 2), kernel, None, [stride, stride], padding, [1, 1], kernel.shape[0])
    return x.permute(0, 2, 3, 1)


def _conv_form(
        values: torch.Tensor,
        score: torch.Tensor,
        kernel: torch.Tensor,
        stride: int,
        pad_rows: int,
        shift: bool = True,
        tiny: float = TINY,
) -> torch.Tensor:
    """Both window sums in one depthwise convolution.

    Args:
        values: (B, H, W, d + 1, heads), a 1 below the values of each head: the sum of the ones is the denominator.
        score: (B, H, W, L, heads).
        kernel: (L * (d + 1) * heads, 1, k, k) from `_window_kernel`.
        stride: Of the windows.
        pad_rows: Rows of zeros above and below.
        shift: See `_weights`.

    Returns:
        (B, Ho, Wo, d, heads).
    """
    L, rows, heads = score.shape[3], values.shape[3], values.shape[4]
    products = _weights(score, values.dtype, shift).unsqueeze(4) * values.unsqueeze(3)
    sums = _depthwise(products.flatten(3), kernel, stride, pad_rows)
    sums = sums.view(sums.shape[0], sums.shape[1], sums.shape[2], L, rows, heads)
    inverse = sums[:, :, :, :, -1:].clamp(min=tiny).reciprocal()
    out = sums[:, :, :, 0, :-1] * inverse[:, :, :, 0]
    for i in range(1, L):
        out = torch.addcmul(out, sums[:, :, :, i, :-1], inverse[:, :, :, i])
    return out


class _ConvForm(torch.autograd.Function):
    """`_conv_form` that keeps scores and values for its backward, not their products or the window sums."""

    @staticmethod
    def forward(ctx, joint: torch.Tensor, kernel: torch.Tensor, num_queries: int, num_heads: int, stride: int,
                shift: bool):
        ctx.args = num_queries, num_heads, stride, shift
        ctx.save_for_backward(joint, kernel)
        values, score = _split(joint, num_queries, num_heads)
        return _conv_form(values, score, kernel, stride, kernel.shape[3] // 2, shift)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        if torch.is_grad_enabled():
            joint, kernel = ctx.saved_tensors
            L, heads, stride, shift = ctx.args

            def plain(joint, kernel):
                with torch.autocast(device_type=joint.device.type, enabled=False):
                    return _conv_form(*_split(joint, L, heads), kernel, stride, kernel.shape[3] // 2, shift)
            return (*differentiate(plain, (joint, kernel), grad), None, None, None, None)
        with torch.autocast(device_type=grad.device.type, enabled=False):
            return _ConvForm._backward(grad, *ctx.saved_tensors, *ctx.args)

    @staticmethod
    def _backward(grad, joint, kernel, L: int, heads: int, stride: int, shift: bool):
        values, score = _split(joint, L, heads)
        shape = (L, values.shape[3], heads)
        weights = _weights(score, joint.dtype, shift).unsqueeze(4)
        products = (weights * values.unsqueeze(3)).flatten(3)
        padding = kernel.shape[3] // 2
        sums = _depthwise(products, kernel, stride, padding).unflatten(3, shape)
        inverse = sums[..., -1:, :].clamp(min=TINY).reciprocal()

        grad_sums = torch.empty_like(sums)
        grad_num = grad_sums[..., :-1, :]
        torch.mul(grad.unsqueeze(3), inverse, out=grad_num)
        torch.mul((grad_num * sums[..., :-1, :]).sum(dim=4, keepdim=True), -inverse, out=grad_sums[..., -1:, :])
        grad_products, grad_kernel, _ = torch.ops.aten.convolution_backward(
            grad_sums.flatten(3).permute(0, 3, 1, 2), products.permute(0, 3, 1, 2), kernel, None, [stride, stride],
            [padding, padding], [1, 1], False, [0, 0], kernel.shape[0], [True, True, False])
        grad_products = grad_products.permute(0, 2, 3, 1).unflatten(3, shape) * weights
        grad_score = (grad_products * values.unsqueeze(3)).sum(dim=4)
        grad_joint = torch.cat([grad_products.sum(dim=3), grad_score], dim=3)
        return grad_joint.flatten(3), grad_kernel, None, None, None, None


def _window_kernel(
        rel_pos_bias: torch.Tensor,
        attn_scale: Optional[torch.Tensor],
        num_queries: int,
        head_dim: int,
        scale: float = 1.,
) -> torch.Tensor:
    """Kernel of the convolution, (L * (d + 1) * heads, 1, k, k), from (L * heads, 1, k, k) biases and scales."""
    k = rel_pos_bias.shape[3]
    bias = _at_least_float32(rel_pos_bias).reshape(num_queries, 1, -1, k, k)
    denominator = (bias - bias.detach().amax(dim=(3, 4), keepdim=True)).exp()
    numerator = denominator * scale
    if attn_scale is not None:
        numerator = numerator * attn_scale.reshape(num_queries, 1, -1, k, k)
    kernel = torch.cat([numerator.expand(-1, head_dim, -1, -1, -1), denominator], dim=1)
    return kernel.reshape(-1, 1, k, k)


def _shift_form(
        v: torch.Tensor,
        score: torch.Tensor,
        rel_pos_bias: torch.Tensor,
        attn_scale: Optional[torch.Tensor],
        stride: int,
        pad_rows: int,
        scale: float = 1.,
) -> torch.Tensor:
    """Tap by tap, with the maximum of each window taken from its scores: exact for scores of any size.

    As `_conv_form`, with values (B, H, W, d, heads), and (L * heads, 1, k, k) biases and scales in place of its kernel.
    """
    k = rel_pos_bias.shape[3]
    out_dtype = v.dtype
    padding = [0, 0, 0, 0, k // 2, k // 2, pad_rows, pad_rows]
    v = F.pad(_at_least_float32(v), padding)
    L, heads = score.shape[3], score.shape[4]
    score = F.pad(_at_least_float32(score), padding, value=-math.inf)
    bias = rel_pos_bias.to(v.dtype).reshape(L, heads, k * k).permute(2, 0, 1)
    weights = torch.stack([_tap(score, tap, k, stride) + bias[tap] for tap in range(k * k)]).softmax(dim=0) * scale
    if attn_scale is not None:
        weights = weights * attn_scale.to(v.dtype).reshape(L, heads, k * k).permute(2, 0, 1)[:, None, None, None]
    weights = weights.sum(dim=4)  # over the queries, before the values are touched
    out = weights[0].unsqueeze(3) * _tap(v, 0, k, stride)
    for tap in range(1, k * k):
        out = torch.addcmul(out, weights[tap].unsqueeze(3), _tap(v, tap, k, stride))
    return out.to(out_dtype)


def _tap(x: torch.Tensor, tap: int, kernel_size: int, stride: int) -> torch.Tensor:
    """What each window of a padded map (B, H, W, ...) holds at one of its k^2 taps."""
    i, j = tap // kernel_size, tap % kernel_size
    rows, cols = x.shape[1] - kernel_size + 1, x.shape[2] - kernel_size + 1
    return x[:, i:i + rows:stride, j:j + cols:stride]


def _exact_form(score: torch.Tensor, rel_pos_bias: torch.Tensor) -> Tuple[str, bool]:
    """The cheapest evaluation that is exact for these scores and biases: its name, and whether it needs a shift."""
    score = _at_least_float32(score.detach())
    low, high = torch.aminmax(score.contiguous())
    bias_low, bias_high = torch.aminmax(rel_pos_bias.detach())
    room = MAX_SPREAD - (bias_high - bias_low).item()
    largest = max(-low.item(), high.item())
    if largest <= MAX_SCORE and largest <= room:
        return 'conv', False
    spread = score.amax(dim=(1, 2)) - score.amin(dim=(1, 2))
    return 'conv' if bool((spread <= room).all()) else 'shift', True


def _check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"Unknown impl '{impl}', expected one of {', '.join(IMPLS)}.")


def _check_kernel_size(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size={kernel_size} must be odd and positive.')


def qna_attention(
        score: torch.Tensor,
        v: torch.Tensor,
        rel_pos_bias: torch.Tensor,
        attn_scale: Optional[torch.Tensor] = None,
        stride: int = 1,
        impl: str = 'auto',
) -> torch.Tensor:
    """Learned-query attention over the windows of a map.

    Weights are float32, or float64 for float64 input. Window sums in 'conv' are in the dtype of the values, float32
    for float16.

    Args:
        score: Products of queries and keys (B, H, W, L, heads).
        v: Values (B, H, W, d, heads).
        rel_pos_bias: Bias of each tap (L * heads, 1, k, k), k odd.
        attn_scale: Scale of each tap after the softmax (L * heads, 1, k, k), None for 1.
        stride: Of the windows.
        impl: 'conv' is exact while the scores of a map spread over less than 80 and stays finite beyond that; 'shift'
            is exact for all scores, in k^2 passes. 'auto' looks at the scores in eager mode on a CPU and is 'conv'
            elsewhere, where looking at them would wait for the device or could not be compiled.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), d, heads) in the dtype of `v`.

    Raises:
        ValueError: `impl` is unknown, k is even, or `stride` is not positive.
    """
    _check_impl(impl)
    _check_kernel_size(rel_pos_bias.shape[3])
    if stride < 1:
        raise ValueError(f'stride={stride} must be positive.')
    return _attend_to(score, v, rel_pos_bias, attn_scale, stride, impl)


def _attend_to(
        score: torch.Tensor,
        v: torch.Tensor,
        rel_pos_bias: torch.Tensor,
        attn_scale: Optional[torch.Tensor],
        stride: int,
        impl: str,
        scale: float = 1.,
) -> torch.Tensor:
    """`_attend` for scores and values that are apart."""
    L, heads = score.shape[3], score.shape[4]
    with torch.autocast(device_type=v.device.type, enabled=False):
        joint = torch.cat([v, torch.ones_like(v[:, :, :, :1]), score.to(v.dtype)], dim=3).flatten(3)
        kernel = _window_kernel(rel_pos_bias, attn_scale, L, v.shape[3], scale)
        return _attend(joint, kernel, rel_pos_bias, attn_scale, L, heads, stride, impl, scale)


def _attend(
        joint: torch.Tensor,
        kernel: torch.Tensor,
        rel_pos_bias: torch.Tensor,
        attn_scale: Optional[torch.Tensor],
        num_queries: int,
        num_heads: int,
        stride: int,
        impl: str = 'auto',
        scale: float = 1.,
        pad_rows: int = -1,
) -> torch.Tensor:
    """The evaluation that `impl` and the scores call for; arguments as for `_conv_form` and `_shift_form`."""
    dtype = joint.dtype
    trains = torch.is_grad_enabled() and (joint.requires_grad or kernel.requires_grad)
    # the sums of small weights are no normal float16; the backward of depthwise convolutions on CPUs takes eight times
    # as long in bfloat16 as in float32
    if dtype == torch.float16 or (dtype == torch.bfloat16 and trains and joint.device.type == 'cpu'):
        joint = joint.float()
    kernel = kernel.to(joint.dtype)
    pad_rows = kernel.shape[3] // 2 if pad_rows < 0 else pad_rows
    values, score = _split(joint, num_queries, num_heads)
    if not torch.jit.is_scripting():
        shift = True
        if impl == 'auto' and joint.device.type == 'cpu' and is_eager():
            impl, shift = _exact_form(score, rel_pos_bias)
        if impl == 'shift':
            return _shift_form(
                values[:, :, :, :-1], score, rel_pos_bias, attn_scale, stride, pad_rows, scale).to(dtype)
        if trains and is_eager():
            return _ConvForm.apply(joint, kernel, num_queries, num_heads, stride, shift).to(dtype)
        return _conv_form(values, score, kernel, stride, pad_rows, shift).to(dtype)
    if impl == 'shift':
        return _shift_form(values[:, :, :, :-1], score, rel_pos_bias, attn_scale, stride, pad_rows, scale).to(dtype)
    return _conv_form(values, score, kernel, stride, pad_rows).to(dtype)


def _unit_query(query: torch.Tensor, num_heads: int, normalize: bool = True) -> torch.Tensor:
    """Queries (L, heads * d) as they meet the keys, (L, heads, d): of unit length, scaled by d^-1/2."""
    query = _at_least_float32(query).reshape(query.shape[0], num_heads, -1)
    scale = query.shape[2] ** -0.5
    if normalize:
        query = query / (torch.linalg.vector_norm(query, dim=-1, keepdim=True) + 1e-6)
    return query * scale
