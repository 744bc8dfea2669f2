"""Launches of the kernels of sums over tokens: strides, tiles, grids. Importing this does not load Triton.

Arguments are those of the functions of `torch.py`, maps (B, heads, N, d) of any strides; a missing total is an empty
tensor among results. Results never share memory with arguments.
"""
from collections.abc import Sequence

import torch

from ..._numerics import sum_dtype
from ..._triton import dot_precision, next_size
from .positions import factors
from .torch import CLAMP_MAX, CLAMP_MIN

# Channels of a head and of its values; larger tiles leave the registers.
MAX_CHANNELS = 128

# Channels of a head up to which 48 KiB of shared memory are enough for every type, and what more of them need.
SMALL_CHANNELS = 64
LARGE_SHARED_MEMORY = 144 * 1024

# Entries of the float32 sums that a program holds in registers, 32 for each of its 256 threads: with 64, compilations
# for compute capability 8.0 leave the registers.
MAX_SUMS = 2 * 64 * 64

# Sums are split among programs until there are so many, a fixed number so that results are the same on every card. As
# partial sums are written and read once more, each split has at least so many tiles.
MAX_PROGRAMS = 512
MIN_TILES = 4

WARPS, STAGES = 8, 2
CLAMP_BLOCK = 1024  # entries of a program


def _kernels():
    from . import kernels  # loads Triton
    return kernels


def _map(x: torch.Tensor) -> torch.Tensor:
    """A map that has the channels of a head side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def tile_positions(F: int, wide: bool, channels: int) -> int:
    """Positions of a tile: as many as registers and 48 KiB of shared memory hold; `wide` is for float32 maps."""
    return 64 >> int(wide) + int(channels > SMALL_CHANNELS) + int(wide and F > 0)


def max_sums(element_size: int) -> int:
    """Entries of the sums that a program keeps, by the bytes of an entry of the keys."""
    return MAX_SUMS * 2 // max(2, element_size)


def _tiles(F: int, *maps: torch.Tensor) -> tuple[int, int]:
    """Positions of a tile, and how many tiles there are."""
    size = tile_positions(F, any(x.element_size() > 2 for x in maps), max(x.shape[3] for x in maps))
    return size, -(-maps[0].shape[2] // size)


def empty_map(like: torch.Tensor, channels: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(B, heads, N, channels) with the heads of a position side by side, as projections take them."""
    B, heads, N, _ = like.shape
    return like.new_empty(B, N, heads, channels, dtype=dtype).transpose(1, 2)


def _table(locality: str, grid: Sequence[int], like: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Factors (N, F) of positions, and F; 0 for one factor of 1."""
    if locality == 'none':
        return like, 0
    table = factors(locality, (grid[0], grid[1]), like).t().contiguous()
    return table, table.shape[1]


def _weighted_sums(k, v, locality, grid, with_total, unit, eps, weights):
    """As `torch.token_sums`; `weights` (B, heads, N) count keys in the total, None stands for ones."""
    k, v, dtype = _map(k), _map(v), sum_dtype(k.dtype)
    (B, heads, N, D), E = k.shape, v.shape[3]
    table, F = _table(locality, grid, k.new_empty(0, dtype=dtype))
    pairs, rows, BD, BE, (BN, tiles) = B * heads, max(F, 1) * D, next_size(D), next_size(E), _tiles(F, k, v)
    group = max(1, min(F, max_sums(k.element_size()) // (BD * BE)))
    groups = max(F, 1) // group
    tiles_each = -(-tiles // max(1, min(-(-tiles // MIN_TILES), MAX_PROGRAMS // max(1, pairs * groups))))
    splits = max(1, -(-tiles // max(1, tiles_each)))
    out = k.new_empty(splits, pairs * rows * (E + with_total), dtype=dtype)
    if out.numel():
        _kernels().sums_kernel[pairs * groups, splits](
            k, v, k if weights is None else weights, table, out, N, heads, D, E, tiles_each,
            *k.stride()[:3], *v.stride()[:3], eps,
            FACTORS=F, GROUP=group, TOTAL=int(with_total), WEIGHTED=weights is not None, UNIT=unit,
            PRECISION=dot_precision(k), BN=BN, BD=BD, BE=BE, num_warps=WARPS, num_stages=STAGES)
    out = out[0] if splits == 1 else out.sum(dim=0)
    size = pairs * rows * E
    return out[:size].view(B, heads, rows, E), out[size:].view(B, heads, rows) if with_total else out.new_empty(0)


def token_sums(
        k: torch.Tensor,
        v: torch.Tensor,
        locality: str,
        grid: Sequence[int],
        with_total: bool,
        unit: bool,
        eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `torch.token_sums`."""
    return _weighted_sums(k, v, locality, grid, with_total, unit, eps, None)


def token_sums_backward(
        k: torch.Tensor,
        v: torch.Tensor,
        grad: torch.Tensor,
        grad_total: torch.Tensor,
        locality: str,
        grid: Sequence[int],
        with_total: bool,
        unit: bool,
        eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of k and v."""
    k, v, grad = _map(k), _map(v), grad.contiguous()
    (B, heads, N, D), E = k.shape, v.shape[3]
    table, F = _table(locality, grid, grad)
    grad_k, grad_v = empty_map(k, D), empty_map(v, E)
    BN, tiles = _tiles(F, k, v)
    if B * heads * tiles:
        _kernels().sums_backward_kernel[B * heads * tiles,](
            k, v, grad, grad_total.contiguous(), table, grad_k, grad_v,
            N, heads, D, E, tiles, *k.stride()[:3], *v.stride()[:3], eps,
            FACTORS=F, TOTAL=with_total, UNIT=unit,
            PRECISION=dot_precision(k), BN=BN, BD=next_size(D), BE=next_size(E), num_warps=WARPS, num_stages=STAGES)
    return grad_k, grad_v


def token_apply(
        q: torch.Tensor,
        sums: torch.Tensor,
        total: torch.Tensor | None,
        base: torch.Tensor | None,
        locality: str,
        grid: Sequence[int],
        clamp: bool,
        unit: bool,
        eps: float,
        dtype: torch.dtype | None,
) -> torch.Tensor:
    """As `torch.token_apply`."""
    q, sums, base = _map(q), sums.contiguous(), None if base is None else _map(base)
    (B, heads, N, D), E = q.shape, sums.shape[3]
    table, F = _table(locality, grid, sums)
    out = empty_map(q, E, dtype)
    BN, tiles = _tiles(F, q, out)
    if B * heads * tiles:
        _kernels().apply_kernel[B * heads * tiles,](
            q, sums, sums if total is None else total.contiguous(), table, q if base is None else base, out,
            N, heads, D, E, tiles, *q.stride()[:3], *(q if base is None else base).stride()[:3], eps,
            FACTORS=F, DIVIDE=total is not None, CLAMP=clamp, UNIT=unit, BASE=base is not None,
            LOW=CLAMP_MIN, HIGH=CLAMP_MAX,
            PRECISION=dot_precision(q), BN=BN, BD=next_size(D), BE=next_size(E), num_warps=WARPS, num_stages=STAGES)
    return out


def token_apply_backward(
        q: torch.Tensor,
        sums: torch.Tensor,
        total: torch.Tensor | None,
        base: torch.Tensor | None,
        grad: torch.Tensor,
        locality: str,
        grid: Sequence[int],
        clamp: bool,
        unit: bool,
        eps: float,
        dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of all four, in two kernels: the second sums what the first makes of each query."""
    grad_base = grad.new_empty(0) if base is None else grad.to(base.dtype)
    q, sums, grad = _map(q), sums.contiguous(), _map(grad)
    (B, heads, N, D), E = q.shape, sums.shape[3]
    table, F = _table(locality, grid, sums)
    grad_q, grad_y, grad_weight = empty_map(q, D), grad, None
    if total is not None:
        # float16 would not hold gradients over small sums of weights
        grad_y = empty_map(q, E, torch.bfloat16 if q.dtype == torch.bfloat16 else sums.dtype)
        grad_weight = q.new_empty(B, heads, N, dtype=sums.dtype)
    BN, tiles = _tiles(F, q, grad_y)
    if B * heads * tiles:
        _kernels().apply_backward_kernel[B * heads * tiles,](
            q, grad, sums, sums if total is None else total.contiguous(), table, grad_q, grad_y,
            sums if grad_weight is None else grad_weight,
            N, heads, D, E, tiles, *q.stride()[:3], *grad.stride()[:3], eps,
            FACTORS=F, DIVIDE=total is not None, CLAMP=clamp, UNIT=unit, LOW=CLAMP_MIN, HIGH=CLAMP_MAX,
            PRECISION=dot_precision(q), BN=BN, BD=next_size(D), BE=next_size(E), num_warps=WARPS, num_stages=STAGES)
    return grad_q, *_weighted_sums(q, grad_y, locality, grid, total is not None, unit, eps, grad_weight), grad_base


def clamp_magnitude(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """As `torch.clamp_magnitude`, contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _kernels().clamp_kernel[-(-x.numel() // CLAMP_BLOCK),](
            x, out, x.numel(), LOW=low, HIGH=high, BLOCK=CLAMP_BLOCK)
    return out


def clamp_magnitude_backward(x: torch.Tensor, grad: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Gradient of x."""
    x, grad = x.contiguous(), grad.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _kernels().clamp_backward_kernel[-(-x.numel() // CLAMP_BLOCK),](
            x, grad, out, x.numel(), LOW=low, HIGH=high, BLOCK=CLAMP_BLOCK)
    return out
