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
from typing import Callable, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ._common import (
    InferenceCache,
    band_rows,
    check_heads,
    differentiate,
    init_lecun_,
    is_eager,
    is_plain,
    linear,
    one_ahead,
    pointwise,
    use_bands,
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


def _init_query(query: torch.Tensor, head_dim: int) -> None:
    nn.init.trunc_normal_(query, std=1., a=-2., b=2.)
    with torch.no_grad():
        query.mul_(head_dim ** -0.5)


class QnAAttention(nn.Module):
    """Learned-query local attention: queries shared by all positions, softmax over k x k windows.

    Linear in H W, and its memory does not depend on k. Paper: arXiv 2112.11435.

    The queries are folded into the key projection, and that is one matrix product with the value projection. Inference
    on a CPU keeps the folded weights, compares the weights they came from each time, and takes large maps in bands of
    rows. Layers that are not plain linear ones (adapters, hooks) are called as they are.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            kernel_size: int = 3,
            stride: int = 1,
            num_queries: int = 2,
            attn_dim: Optional[int] = None,
            out_dim: Optional[int] = None,
            qkv_bias: bool = False,
            proj_bias: bool = False,
            normalize_query: bool = True,
            attn_scale: str = 'learned',
            attn_scale_std: float = 0.02,
            impl: str = 'auto',
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            kernel_size: Side k of the windows, odd.
            stride: Of the windows: the output has ceil(H / stride) rows.
            num_queries: Learned queries L of each head, whose results are added.
            attn_dim: Channels of keys and values, `dim` by default.
            out_dim: Channels of the output, `attn_dim` by default.
            qkv_bias: Bias of the key and value projections.
            proj_bias: Bias of the output projection.
            normalize_query: Give the queries unit length.
            attn_scale: Scale of the taps after the softmax: 'learned', 'none' (1) or 'avg' (1 / L).
            attn_scale_std: Standard deviation of a new learned scale. The authors' value makes a new layer nearly
                silent; with 1 it starts like a convolution of random kernels.
            impl: Evaluation, see `qna_attention`.

        Raises:
            ValueError: `attn_dim` is not divisible by `num_heads`, or another argument is out of range.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        attn_dim = dim if attn_dim is None else attn_dim
        out_dim = attn_dim if out_dim is None else out_dim
        for name, value in (('dim', dim), ('stride', stride), ('num_queries', num_queries), ('out_dim', out_dim)):
            if value < 1:
                raise ValueError(f'{name}={value} must be positive.')
        _check_kernel_size(kernel_size)
        _check_impl(impl)
        if attn_scale not in ('learned', 'none', 'avg'):
            raise ValueError(f"Unknown attn_scale '{attn_scale}', expected one of learned, none, avg.")
        self.num_heads = num_heads
        self.head_dim = check_heads(attn_dim, num_heads, 'dim' if attn_dim == dim else 'attn_dim')
        self.kernel_size = kernel_size
        self.stride = stride
        self.num_queries = num_queries
        self.normalize_query = normalize_query
        self.attn_scale_std = attn_scale_std
        self.scale = 1. / num_queries if attn_scale == 'avg' else 1.
        self.impl = impl
        self.query = nn.Parameter(torch.empty(num_queries, attn_dim, **dd))
        self.k = nn.Linear(dim, attn_dim, bias=qkv_bias, **dd)
        self.v = nn.Linear(dim, attn_dim, bias=qkv_bias, **dd)
        taps = (num_queries * num_heads, 1, kernel_size, kernel_size)
        self.rel_pos_bias = nn.Parameter(torch.empty(taps, **dd))
        self.attn_scale = nn.Parameter(torch.empty(taps, **dd)) if attn_scale == 'learned' else None
        self.proj = nn.Linear(attn_dim, out_dim, bias=proj_bias, **dd)
        self._cache = InferenceCache()
        self.reset_parameters()
        for layer in (self.k, self.v, self.proj):
            init_lecun_(layer)

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Initialise queries, biases and scales as the authors do, the scales with the layer's standard deviation."""
        _init_query(self.query, self.head_dim)
        nn.init.zeros_(self.rel_pos_bias)
        if self.attn_scale is not None:
            nn.init.normal_(self.attn_scale, std=self.attn_scale_std)

    def train(self, mode: bool = True) -> 'QnAAttention':
        self._cache.clear()
        return super().train(mode)

    def fold(self, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weights of one projection to values, ones and scores, its bias, the window kernel, and the output's."""
        heads, d = self.num_heads, self.head_dim
        query = _unit_query(self.query, self.num_heads, self.normalize_query).transpose(0, 1)  # (heads, L, d)
        k = self.k.weight.to(query.dtype).reshape(heads, d, -1)
        v = self.v.weight.to(query.dtype).reshape(heads, d, -1)
        ones = query.new_zeros(heads, 1, k.shape[2])
        weight = torch.cat([v, ones, query @ k], dim=1).transpose(0, 1).reshape(-1, k.shape[2])

        ones = query.new_ones(heads, 1)
        v_bias = query.new_zeros(heads, d)
        score_bias = query.new_zeros(heads, self.num_queries)
        if self.v.bias is not None and self.k.bias is not None:
            v_bias = self.v.bias.to(query.dtype).reshape(heads, d)
            score_bias = (query @ self.k.bias.to(query.dtype).reshape(heads, d, 1)).squeeze(2)
        bias = torch.cat([v_bias, ones, score_bias], dim=1).t().reshape(-1)

        kernel = _window_kernel(self.rel_pos_bias, self.attn_scale, self.num_queries, d, self.scale)
        proj = self.proj.weight.reshape(-1, heads, d).transpose(1, 2).flatten(1)
        if dtype != torch.float16:
            kernel = kernel.to(dtype)  # a float16 one would lose the taps that matter where others lie outside the map
        return weight.to(dtype), bias.to(dtype), kernel, proj.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) to (B, ceil(H / stride), ceil(W / stride), out_dim)."""
        dtype = x.dtype
        if not torch.jit.is_scripting():
            if not self._is_plain():
                return self._by_layers(x)
            if use_bands(x):
                return self.in_bands(x)
            if x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
                with torch.autocast(device_type=x.device.type, enabled=False):
                    return self._forward(x.to(dtype), dtype)
        return self._forward(x, dtype)

    def _forward(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight, bias, kernel, proj = self.fold(dtype)
        x = _attend(
            F.linear(x, weight, bias), kernel, self.rel_pos_bias, self.attn_scale, self.num_queries, self.num_heads,
            self.stride, self.impl, self.scale)
        proj_bias = self.proj.bias
        return F.linear(x.flatten(3), proj, None if proj_bias is None else proj_bias.to(dtype))

    @torch.jit.unused
    def _is_plain(self) -> bool:
        return is_plain(self.k) and is_plain(self.v) and is_plain(self.proj)

    @torch.jit.unused
    def _by_layers(self, x: torch.Tensor) -> torch.Tensor:
        """Through the layers as they are, whatever they have become."""
        heads, d = self.num_heads, self.head_dim
        k, v = self.k(x).unflatten(3, (heads, d)), self.v(x).unflatten(3, (heads, d)).transpose(3, 4)
        with torch.autocast(device_type=x.device.type, enabled=False):
            query = _unit_query(self.query, heads, self.normalize_query)
            score = torch.einsum('bhwad,lad->bhwla', _at_least_float32(k), query)
        x = _attend_to(score, v, self.rel_pos_bias, self.attn_scale, self.stride, self.impl, self.scale)
        return self.proj(x.transpose(3, 4).flatten(3))

    @torch.jit.unused
    def in_bands(
            self,
            x: torch.Tensor,
            norm: Optional[nn.Module] = None,
            out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """`forward(x)`, or `x + forward(norm(x))`, for some images or some rows at a time, for inference.

        Args:
            x: Map (B, H, W, C).
            norm: Norm in front of the layer, with which the map itself is added to the result.
            out: Where the result may be put, `x` itself with a norm, or None.
        """
        if not self._is_plain():
            return self._by_layers(x) if norm is None else x + self._by_layers(norm(x))
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
        sources: List[torch.Tensor] = [
            p for p in (self.query, self.k.weight, self.k.bias, self.v.weight, self.v.bias, self.rel_pos_bias,
                        self.attn_scale, self.proj.weight) if p is not None]
        if self.training:
            weight, bias, kernel, proj = self.fold(dtype)
        else:
            weight, bias, kernel, proj = self._cache.get(sources, dtype, self.fold)
        proj_bias = None if self.proj.bias is None else self.proj.bias.to(dtype)

        with torch.autocast('cpu', enabled=False):
            return _in_bands(
                self, x, norm, kernel, lambda y: linear(y.to(dtype), weight, bias),
                lambda y: linear(y, proj, proj_bias), out)

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The layer with its queries folded into the projection for good, for inference: `FoldedQnAAttention`.

        Layers that are not plain linear ones (adapters, hooks) cannot be folded: the layer itself is returned then.
        """
        return FoldedQnAAttention(self) if self._is_plain() else self


@torch.jit.unused
def _in_bands(
        layer: nn.Module,
        x: torch.Tensor,
        norm: Optional[nn.Module],
        kernel: torch.Tensor,
        project: Callable[[torch.Tensor], torch.Tensor],
        output: Callable[[torch.Tensor], torch.Tensor],
        out: Optional[torch.Tensor],
) -> torch.Tensor:
    """Attention of `layer` to a map (B, H, W, C), or that of the normed map and the map itself, in bands of rows."""
    B, H, W, _ = x.shape
    s, p = layer.stride, layer.kernel_size // 2
    Ho, Wo = (H - 1) // s + 1, (W - 1) // s + 1
    row = W * s * kernel.shape[0] * kernel.element_size()
    images = max(1, BAND // (Ho * row))
    rows = band_rows(Ho, row, BAND, least=2 * p)

    def bands() -> Iterator[Tuple[Tuple[slice, slice], torch.Tensor, int, int]]:
        for b in range(0, B, images):
            for i in range(0, Ho, rows):
                # inside the map a band brings its own context, at its edge one row of windows too many is taken
                last = min(i + rows, Ho)
                inside = i * s >= p and (last - 1) * s + p < H
                skip = 0 if inside else min(i, -(-p // s))
                top = i * s - p if inside else (i - skip) * s
                band = x[b:b + images, top:(last - 1) * s + p + 1]
                where = slice(b, b + images), slice(i, last)
                yield where, band if norm is None else norm(band), skip, 0 if inside else p

    for where, band, skip, pad_rows in one_ahead(bands()) if out is x else bands():
        y = _attend(
            project(band), kernel, layer.rel_pos_bias, layer.attn_scale, layer.num_queries, layer.num_heads, s,
            layer.impl, layer.scale, pad_rows=pad_rows)
        i = where[1]
        y = output(y[:, skip:skip + i.stop - i.start].flatten(3))
        if norm is None:
            out = y.new_empty(B, Ho, Wo, y.shape[3]) if out is None else out
            out[where] = y
        else:
            out = x.new_empty(x.shape, dtype=torch.result_type(x, y)) if out is None else out
            torch.add(x[where], y, out=out[where])
    return out


class FoldedQnAAttention(nn.Module):
    """What `QnAAttention.fuse` makes of a layer: the same function, one projection to values, ones and scores.

    Its weights are those of the folded form, so that nothing is computed from them or compared in a call. The form of
    `QnAAttention` cannot be had back from them.
    """

    def __init__(self, attn: QnAAttention):
        super().__init__()
        self.num_heads = attn.num_heads
        self.kernel_size = attn.kernel_size
        self.stride = attn.stride
        self.num_queries = attn.num_queries
        self.scale = attn.scale
        self.impl = attn.impl
        weight, bias, kernel, proj = attn.fold(attn.proj.weight.dtype)
        self.joint = _linear(weight, bias)
        self.proj = _linear(proj, attn.proj.bias)
        self.register_buffer('kernel', kernel)
        self.register_buffer('rel_pos_bias', attn.rel_pos_bias.detach())
        self.register_buffer('attn_scale', None if attn.attn_scale is None else attn.attn_scale.detach())
        self.train(attn.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) to (B, ceil(H / stride), ceil(W / stride), out_dim)."""
        if not torch.jit.is_scripting():
            if use_bands(x):
                return self.in_bands(x)
            if x.device.type != 'meta':
                return self._forward(x)
        return self.proj(self._attend(self.joint(x)))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        return _attend(
            x, self.kernel, self.rel_pos_bias, self.attn_scale, self.num_queries, self.num_heads, self.stride,
            self.impl, self.scale).flatten(3)

    @torch.jit.unused
    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.joint(x)
        with torch.autocast(device_type=x.device.type, enabled=False):
            x = self._attend(x)
        return self.proj(x)

    @torch.jit.unused
    def in_bands(
            self,
            x: torch.Tensor,
            norm: Optional[nn.Module] = None,
            out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """`forward(x)`, or `x + forward(norm(x))`, for some images or some rows at a time, for inference.

        Args:
            x: Map (B, H, W, C).
            norm: Norm in front of the layer, with which the map itself is added to the result.
            out: Where the result may be put, `x` itself with a norm, or None.
        """
        if torch.is_autocast_enabled('cpu'):
            return self._forward(x) if norm is None else x + self._forward(norm(x))
        return _in_bands(
            self, x, norm, self.kernel, lambda y: pointwise(y, self.joint), lambda y: pointwise(y, self.proj), out)


def _linear(weight: torch.Tensor, bias: Optional[torch.Tensor]) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device='meta')
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer

class QnAUpsample(nn.Module):
    """Upsampling by learned-query local attention, (B, H, W, dim) to (B, r H, r W, out_dim). Ours.

    The paper (arXiv 2112.11435) says that the layer can upsample, the authors' code does not show how. Here each of
    the r x r positions that a position becomes has queries and relative biases of its own and attends to the k x k
    window around it; keys, values and the output projection are shared.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            scale_factor: int = 2,
            kernel_size: int = 3,
            out_dim: Optional[int] = None,
            qkv_bias: bool = False,
            proj_bias: bool = False,
            impl: str = 'auto',
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            scale_factor: Rows and columns r that each row and column becomes.
            kernel_size: Side k of the windows, odd.
            out_dim: Channels of the output, `dim` by default.
            qkv_bias: Bias of the key and value projections.
            proj_bias: Bias of the output projection.
            impl: Evaluation, see `qna_attention`.

        Raises:
            ValueError: `dim` is not divisible by `num_heads`, or another argument is out of range.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        out_dim = dim if out_dim is None else out_dim
        for name, value in (('scale_factor', scale_factor), ('out_dim', out_dim)):
            if value < 1:
                raise ValueError(f'{name}={value} must be positive.')
        _check_kernel_size(kernel_size)
        _check_impl(impl)
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.scale_factor = scale_factor
        self.impl = impl
        self.query = nn.Parameter(torch.empty(scale_factor ** 2, dim, **dd))
        self.k = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.rel_pos_bias = nn.Parameter(
            torch.empty(scale_factor ** 2 * num_heads, 1, kernel_size, kernel_size, **dd))
        self.proj = nn.Linear(dim, out_dim, bias=proj_bias, **dd)
        self.reset_parameters()
        for layer in (self.k, self.v, self.proj):
            init_lecun_(layer)

    def reset_parameters(self) -> None:
        """Initialise queries and biases as in `QnAAttention`."""
        _init_query(self.query, self.head_dim)
        nn.init.zeros_(self.rel_pos_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) to (B, r H, r W, out_dim)."""
        B, H, W, _ = x.shape
        r, heads, d = self.scale_factor, self.num_heads, self.head_dim
        k, v = self.k(x).unflatten(3, (heads, d)), self.v(x).unflatten(3, (heads, d)).transpose(3, 4)
        with torch.autocast(device_type=x.device.type, enabled=False):
            score = torch.einsum('bhwad,uad->bhwua', _at_least_float32(k), _unit_query(self.query, heads))
            # nothing is added over the queries, so each is a group of heads of its own over the same values
            x = qna_attention(
                score.flatten(3).unsqueeze(3), v.repeat(1, 1, 1, 1, r * r), self.rel_pos_bias, impl=self.impl)
        x = self.proj(x.unflatten(4, (r, r, heads)).permute(0, 1, 4, 2, 5, 6, 3).flatten(5))
        return x.reshape(B, r * H, r * W, -1)
