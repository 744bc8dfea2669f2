"""Launches of the kernels of depthwise convolutions: layouts, tiles, grids. Importing this does not load Triton."""
import torch

from ..._numerics import sum_dtype

# Rows, columns and channels of a tile; short maps of one row take its columns in their place.
TILE = 4, 16, 64
WARPS = 8


def _kernels():
    from . import kernels  # loads Triton
    return kernels


def _tiles(x: torch.Tensor, weight: torch.Tensor) -> tuple[int, int, int, int]:
    """Rows, columns and channels of a tile, and the tiles of positions of all images."""
    BH, BW, BC = TILE if weight.shape[2] > 1 else (1, TILE[0] * TILE[1], TILE[2])
    return BH, BW, BC, x.shape[0] * -(-x.shape[1] // BH) * -(-x.shape[2] // BW)


def _convolve(x, weight, bias, gelu, flip):
    out = torch.empty_like(x)
    (_, H, W, C), (BH, BW, BC, parts) = x.shape, _tiles(x, weight)
    if out.numel():
        _kernels().depthwise_kernel[parts * -(-C // BC),](
            x, weight, weight if bias is None else bias, out, H, W, C, KH=weight.shape[2], KW=weight.shape[3],
            GELU=gelu, BIAS=bias is not None, FLIP=flip, BH=BH, BW=BW, BC=BC, num_warps=WARPS)
    return out


def depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """`depthwise(x) + bias` in the type of x, and its GELU with `gelu`."""
    return _convolve(x.contiguous(), weight.contiguous(), bias, gelu, False)


def depthwise_backward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        grad: torch.Tensor,
        gelu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias, in two kernels; the convolution is computed once more for that of the GELU."""
    x, weight, grad = x.contiguous(), weight.contiguous(), grad.to(x.dtype).contiguous()
    (_, H, W, C), (BH, BW, BC, parts), (_, _, KH, KW) = x.shape, _tiles(x, weight), weight.shape
    partial = x.new_empty(parts, KH * KW + 1, C, dtype=sum_dtype(x.dtype))
    grad_y = torch.empty_like(grad) if gelu else grad
    if x.numel():
        _kernels().depthwise_backward_kernel[parts * -(-C // BC),](
            x, grad, weight, weight if bias is None else bias, grad_y, partial, H, W, C,
            KH=KH, KW=KW, TAPS=1 << (KH * KW).bit_length(), GELU=gelu, BIAS=bias is not None,
            BH=BH, BW=BW, BC=BC, num_warps=WARPS)
    sums = partial.sum(dim=0)
    grad_bias = sums.new_empty(0) if bias is None else sums[-1].to(bias.dtype)
    return _convolve(grad_y, weight, None, False, True), sums[:-1].t().reshape(weight.shape).to(weight.dtype), grad_bias
