"""Learned-query attention over windows in plain operations: both window sums as one convolution, or tap by tap.

Heads are the last axis throughout, (d, heads) and not (heads, d): a score, which is broadcast over the channels of a
head, then runs along memory.
"""
import math

import torch
import torch.nn.functional as F

from ..._dispatch import PLAIN_TENSORS, is_eager, may_read, scripts_as
from ..._numerics import at_least_float32

# Scores are clamped this far below the maximum of their map, where exp is still a normal float32.
MAX_SPREAD = 80.

# Scores up to this size need no shift: their exponentials, the sums of these and the inverse sums are normal float32.
MAX_SCORE = 40.


def window_kernel(
        rel_pos_bias: torch.Tensor,
        attn_scale: torch.Tensor | None,
        num_queries: int,
        head_dim: int,
        scale: float = 1.,
) -> torch.Tensor:
    """Kernel of the convolution, (L * (d + 1) * heads, 1, k, k), from (L * heads, 1, k, k) biases and scales.

    The last of the d + 1 is for the sum of weights, the denominator.
    """
    k = rel_pos_bias.shape[3]
    bias = at_least_float32(rel_pos_bias).reshape(num_queries, 1, -1, k, k)
    denominator = (bias - bias.detach().amax(dim=(3, 4), keepdim=True)).exp()
    numerator = denominator if scale == 1. else denominator * scale
    if attn_scale is not None:
        numerator = numerator * attn_scale.reshape(num_queries, 1, -1, k, k)
    return torch.cat([numerator.expand(-1, head_dim, -1, -1, -1), denominator], dim=1).reshape(-1, 1, k, k)


def window_weights(score: torch.Tensor, shift: bool) -> torch.Tensor:
    """exp(score) in float32 at least; with `shift` up to a factor per image, query and head: the largest is 1."""
    score = at_least_float32(score)
    if shift:
        score = (score - score.detach().amax(dim=(1, 2), keepdim=True)).clamp(min=-80.)
    return score.exp()


def _strides(x: torch.Tensor, stride: int) -> list[int]:
    return [stride, stride]


@scripts_as(_strides)
def _eager_strides(x: torch.Tensor, stride: int) -> list[int]:
    """1 for a map of one position, where it makes no difference to the result.

    PyTorch 2.14 leaves the bfloat16 weight gradient of a strided depthwise convolution of such a map uninitialised on
    CPUs with AMX. Graphs, which hold for every size, keep the stride.
    """
    if type(x) in PLAIN_TENSORS and is_eager() and x.shape[1] == 1 and x.shape[2] == 1:
        return [1, 1]
    return [stride, stride]


def depthwise_windows(x: torch.Tensor, kernel: torch.Tensor, stride: int, pad_rows: int) -> torch.Tensor:
    """Depthwise cross-correlation of a (B, H, W, C) map with (C, 1, k, k), zeros outside the map."""
    padding = [pad_rows, kernel.shape[3] // 2]
    x = F.conv2d(x.permute(0, 3, 1, 2), kernel, None, _eager_strides(x, stride), padding, [1, 1], kernel.shape[0])
    return x.permute(0, 2, 3, 1)


def convolved_windows(
        values: torch.Tensor,
        score: torch.Tensor,
        kernel: torch.Tensor,
        stride: int,
        pad_rows: int,
        shift: bool = True,
) -> torch.Tensor:
    """Both window sums in one depthwise convolution.

    Args:
        values: (B, H, W, d + 1, heads), a 1 below the values of each head.
        score: (B, H, W, L, heads).
        kernel: From `window_kernel`, in the dtype of `values`.
        stride: Of the windows.
        pad_rows: Rows of zeros above and below.
        shift: See `window_weights`.

    Returns:
        (B, Ho, Wo, d, heads).
    """
    L, rows, heads = score.shape[3], values.shape[3], values.shape[4]
    products = window_weights(score, shift).to(values.dtype).unsqueeze(4) * values.unsqueeze(3)
    sums = depthwise_windows(products.flatten(3), kernel, stride, pad_rows).unflatten(3, [L, rows, heads])
    # a denominator below the smallest normal float32 is taken for it and so has an inverse
    inverse = sums[:, :, :, :, -1:].clamp(min=2. ** -126).reciprocal()
    out = sums[:, :, :, 0, :-1] * inverse[:, :, :, 0]
    for i in range(1, L):
        out = torch.addcmul(out, sums[:, :, :, i, :-1], inverse[:, :, :, i])
    return out


def with_ones(v: torch.Tensor) -> torch.Tensor:
    """(B, H, W, d, heads) to (B, H, W, d + 1, heads)."""
    return F.pad(v, [0, 0, 0, 1], value=1.)


def window_sums(
        score: torch.Tensor,
        v: torch.Tensor,
        kernel: torch.Tensor,
        stride: int = 1,
        shift: bool = True,
) -> torch.Tensor:
    """`sum_l window_sum(S_l exp(r_l) e_l v) / window_sum(exp(r_l) e_l)`, e = exp(score), for each window.

    Cost: 2 L k^2 (d + 1) operations a position and head, bound by the L (d + 1) channels that are convolved.

    Args:
        score: (B, H, W, L, heads), which should spread over less than 80 in a map; results stay finite beyond that.
        v: Values (B, H, W, d, heads).
        kernel: From `window_kernel`.
        stride: Of the windows.
        shift: See `window_weights`.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), d, heads) in the dtype of v.
    """
    dtype = v.dtype
    if dtype == torch.float16:
        v = v.float()  # the sums of small weights are no normal float16
    out = convolved_windows(with_ones(v), score, kernel.to(v.dtype), stride, kernel.shape[3] // 2, shift)
    return out.to(dtype)


def _tap(x: torch.Tensor, tap: int, kernel_size: int, stride: int) -> torch.Tensor:
    """What each window of a padded map (B, H, W, ...) holds at one of its k^2 taps."""
    i, j = tap // kernel_size, tap % kernel_size
    rows, cols = x.shape[1] - kernel_size + 1, x.shape[2] - kernel_size + 1
    return x[:, i:i + rows:stride, j:j + cols:stride]


def shifted_windows(
        score: torch.Tensor,
        v: torch.Tensor,
        rel_pos_bias: torch.Tensor,
        attn_scale: torch.Tensor | None,
        stride: int = 1,
        scale: float = 1.,
        pad_rows: int | None = None,
) -> torch.Tensor:
    """The same tap by tap, with the maximum of each window taken from its scores: exact for scores of any size.

    Cost: as `window_sums`, in k^2 passes over the values. Arguments as there and for `window_kernel`.
    """
    k, dtype = rel_pos_bias.shape[3], v.dtype
    pad = k // 2 if pad_rows is None else pad_rows
    padding = [0, 0, 0, 0, k // 2, k // 2, pad, pad]
    v, score = F.pad(at_least_float32(v), padding), F.pad(at_least_float32(score), padding, value=-math.inf)
    L, heads = score.shape[3], score.shape[4]
    bias = rel_pos_bias.to(v.dtype).reshape(L, heads, k * k).permute(2, 0, 1)
    weights = torch.stack([_tap(score, tap, k, stride) + bias[tap] for tap in range(k * k)]).softmax(dim=0) * scale
    if attn_scale is not None:
        weights = weights * attn_scale.to(v.dtype).reshape(L, heads, k * k).permute(2, 0, 1)[:, None, None, None]
    weights = weights.sum(dim=4)  # over the queries, before the values are touched
    out = weights[0].unsqueeze(3) * _tap(v, 0, k, stride)
    for tap in range(1, k * k):
        out = torch.addcmul(out, weights[tap].unsqueeze(3), _tap(v, tap, k, stride))
    return out.to(dtype)


def _moderate(score: torch.Tensor, rel_pos_bias: torch.Tensor) -> str:
    return 'moderate'


@scripts_as(_moderate)
def spread_of(score: torch.Tensor, rel_pos_bias: torch.Tensor) -> str:
    """How scores spread: 'small' ones need no shift, 'moderate' ones a convolution can take, 'large' ones it cannot.

    On a CPU in eager mode this looks at them; elsewhere, where looking would wait for the device or could not be
    compiled, they count as moderate.
    """
    score, bias = at_least_float32(score.detach()), rel_pos_bias.detach()
    if not may_read(score):
        return 'moderate'
    low, high = torch.aminmax(score.contiguous())
    bias_low, bias_high = torch.aminmax(bias)
    room = MAX_SPREAD - (bias_high - bias_low).item()
    largest = max(-low.item(), high.item())
    if largest <= MAX_SCORE and largest <= room:
        return 'small'
    spread = score.amax(dim=(1, 2)) - score.amin(dim=(1, 2))
    return 'moderate' if bool((spread <= room).all()) else 'large'


def window_attention(
        score: torch.Tensor,
        v: torch.Tensor,
        rel_pos_bias: torch.Tensor,
        attn_scale: torch.Tensor | None = None,
        stride: int = 1,
        scale: float = 1.,
        kernel: torch.Tensor | None = None,
) -> torch.Tensor:
    """`scale sum_l sum_t S_lt softmax_t(score_l + r_lt) v` for the taps t of each window.

    Cost: 2 L k^2 (d + 1) operations a position and head.

    Args:
        score: (B, H, W, L, heads).
        v: Values (B, H, W, d, heads).
        rel_pos_bias: r (L * heads, 1, k, k).
        attn_scale: S (L * heads, 1, k, k), None for 1.
        stride: Of the windows.
        scale: Of the result.
        kernel: What `window_kernel` makes of r, S and the scale, where that is known.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), d, heads) in the dtype of v.
    """
    spread = spread_of(score, rel_pos_bias)
    if spread == 'large':
        return shifted_windows(score, v, rel_pos_bias, attn_scale, stride, scale)
    if kernel is None:
        kernel = window_kernel(rel_pos_bias, attn_scale, score.shape[3], v.shape[3], scale)
    return window_sums(score, v, kernel, stride, spread != 'small')
