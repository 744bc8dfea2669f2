"""Learned-query attention over windows by kernels. The backward pass keeps the arguments alone."""
from typing import Any

import torch

from ..._numerics import sum_dtype
from ..._triton import power_of_2, too_large
from ..by_kernels import by_kernels
from . import torch as plain

MAX_CHANNELS = 64  # of a head
TILE = 2048  # positions, channels and heads of a tile
WARPS = 4


def _refuses(score, v, *args, **kwargs):
    if v.shape[3] > MAX_CHANNELS:
        return f'heads have {v.shape[3]} channels, and kernels take {MAX_CHANNELS}'
    return too_large(v) or too_large(score)


def _tile(D: int, heads: int) -> tuple[int, int, int]:
    """Positions, channels and heads of a tile."""
    BD, BH = power_of_2(D), min(32, power_of_2(heads))
    return min(64, max(1, TILE // (BD * BH))), BD, BH


def _launch(name: str, score, v, bias, tap_scale, out_grid, stride, scale, at_pixels, *tensors) -> None:
    """A kernel with what all of them take."""
    from . import kernels  # loads Triton
    (B, H, W, D, heads), (H2, W2) = v.shape, out_grid
    (P, BD, BH), positions = _tile(D, heads), H * W if at_pixels else H2 * W2
    if B * positions * heads:
        getattr(kernels, name)[B * -(-positions // P) * -(-heads // BH),](
            score, v, bias, bias if tap_scale is None else tap_scale, *tensors,
            H, W, H2, W2, score.shape[3], D, heads, stride, scale, SCALED=tap_scale is not None, K=bias.shape[3],
            P=P, BD=BD, BH=BH, num_warps=WARPS)


def _contiguous(*tensors: torch.Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def launch(
        score: torch.Tensor,
        v: torch.Tensor,
        rel_pos_bias: torch.Tensor,
        attn_scale: torch.Tensor | None,
        stride: int,
        scale: float,
) -> torch.Tensor:
    """As `torch.window_attention`."""
    score, v, rel_pos_bias, attn_scale = _contiguous(score, v, rel_pos_bias, attn_scale)
    grid = -(-v.shape[1] // stride), -(-v.shape[2] // stride)
    out = v.new_empty(v.shape[0], *grid, *v.shape[3:])
    _launch('windows_kernel', score, v, rel_pos_bias, attn_scale, grid, stride, scale, False, out)
    return out


def launch_backward(
        score: torch.Tensor,
        v: torch.Tensor,
        rel_pos_bias: torch.Tensor,
        attn_scale: torch.Tensor | None,
        grad: torch.Tensor,
        stride: int,
        scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of all four, in two kernels: one over windows, one over pixels."""
    score, v, rel_pos_bias, attn_scale, grad = _contiguous(score, v, rel_pos_bias, attn_scale, grad)
    B, H2, W2, D, heads = grad.shape
    L, K, wide = score.shape[3], rel_pos_bias.shape[3], sum_dtype(v.dtype)
    log_sum, inner = score.new_empty(2, B, H2, W2, L, heads, dtype=wide)
    tiles = B * -(-H2 * W2 // _tile(D, heads)[0])
    partial = score.new_empty(tiles, 1 if attn_scale is None else 2, L, K * K, heads, dtype=wide)
    args = score, v, rel_pos_bias, attn_scale, (H2, W2), stride, scale
    _launch('windows_parameters_kernel', *args, False, grad, log_sum, inner, partial)
    grad_score, grad_v = torch.empty_like(score), torch.empty_like(v)
    _launch('windows_pixels_kernel', *args, True, grad, log_sum, inner, grad_score, grad_v)
    sums = partial.sum(dim=0).transpose(2, 3).reshape(-1, L * heads, 1, K, K)
    grad_scale = sums.new_empty(0) if attn_scale is None else sums[1].to(attn_scale.dtype)
    return grad_score, grad_v, sums[0].to(rel_pos_bias.dtype), grad_scale


def _fake(score, v, rel_pos_bias, attn_scale, stride, scale):
    H2, W2 = -(-v.shape[1] // stride), -(-v.shape[2] // stride)
    return v.new_empty(v.shape[0], H2, W2, v.shape[3], v.shape[4])


def _fake_backward(score, v, rel_pos_bias, attn_scale, grad, stride, scale):
    grad_scale = score.new_empty(0) if attn_scale is None else attn_scale.new_empty(attn_scale.shape)
    return (score.new_empty(score.shape), v.new_empty(v.shape), rel_pos_bias.new_empty(rel_pos_bias.shape), grad_scale)


_window_attention = by_kernels(
    'window_attention', plain.window_attention, launch, launch_backward, _fake, _fake_backward, 4, _refuses)


def window_attention(score, v, rel_pos_bias, attn_scale=None, stride=1, scale=1., kernel=None):
    """As `torch.window_attention`, exact for scores of any size; `kernel` is of no use to it."""
    return _window_attention(score, v, rel_pos_bias, attn_scale, stride, scale)


window_attention.refuses = _refuses
