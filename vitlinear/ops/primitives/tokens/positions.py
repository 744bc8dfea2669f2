"""Positional factors of tokens on a grid, and the two ways to evaluate sums with them.

A kernel of positions that is a sum of products, `kappa(i, j) = sum_f phi_f(i) phi_f(j)`, lets a sum over keys be taken
before it meets the queries: once for each of the F factors. For '2d', the sum of a kernel of rows and one of columns,
the sums factor through one matrix for each row and one for each column: half the operations, and no map is multiplied
by the factors.
"""
import math
from functools import lru_cache

import torch

from ..._dispatch import PLAIN_TENSORS, is_eager, is_specialised, scripts_as
from ..._numerics import product, sum_dtype

LOCALITIES = ('2d', '2d_product', '1d', 'none')

# Positions of a map from which rows and columns win over the factors. Measured on one core, forward and backward of 8
# maps: 196 positions take 17.9 ms through rows and columns and 16.9 through the factors, 784 take 32 and 41.
ROWS_AND_COLUMNS_FROM_POSITIONS = 256


def angles(size: int, like: torch.Tensor) -> torch.Tensor:
    """(2, size) cosines and sines of (pi / 2) n / size, in the dtype of `like`."""
    angle = torch.arange(size, device=like.device, dtype=like.dtype) * (math.pi / 2 / size)
    return torch.stack([angle.cos(), angle.sin()])


def build_factors(locality: str, grid: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """(F, H W) factors phi_f of a grid's positions, row by row, in the dtype of `like`; F is 2 for '1d', 4 else."""
    H, W = grid
    if locality == 'none':
        return torch.ones(1, H * W, dtype=like.dtype, device=like.device)
    if locality == '1d':
        return angles(H * W, like)
    rows = angles(H, like).unsqueeze(2).expand(2, H, W)
    columns = angles(W, like).unsqueeze(1).expand(2, H, W)
    if locality == '2d_product':
        return (rows.unsqueeze(1) * columns.unsqueeze(0)).reshape(4, H * W)
    return torch.cat([rows, columns]).reshape(4, H * W)


@lru_cache(maxsize=64)
def kept_factors(locality: str, grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As `build_factors`; the last tables are kept, with the factors of a position side by side in memory.

    In that order a map that is multiplied by them comes out as `weighted` needs it, without a copy.
    """
    with torch.inference_mode(False), torch.no_grad():
        return build_factors(locality, grid, torch.empty(0, dtype=dtype, device=device)).t().contiguous().t()


@scripts_as(build_factors)
def factors(locality: str, grid: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """As `build_factors`; eager code keeps the tables of the last sizes, by dtype and device."""
    if is_eager() and type(like) in PLAIN_TENSORS and like.device.type != 'meta':
        return kept_factors(locality, (int(grid[0]), int(grid[1])), like.dtype, like.device)
    return build_factors(locality, grid, like)


def _never(locality: str, grid: tuple[int, int]) -> bool:
    return False


@scripts_as(_never)
def through_rows_and_columns(locality: str, grid: tuple[int, int]) -> bool:
    """Whether to evaluate through rows and columns; graphs for every size get the factors."""
    return locality == '2d' and is_specialised() and grid[0] * grid[1] >= ROWS_AND_COLUMNS_FROM_POSITIONS


def weighted(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(n, N, d) and (F, N) to (n, N, F d): a copy of x for each factor."""
    return (x.unsqueeze(2) * table.t().unsqueeze(2)).flatten(2)


def transposed(matrices: torch.Tensor, locality: str) -> torch.Tensor:
    """(n, F d, e) to (n, F e, d): each of the F matrices transposed."""
    if locality == 'none':
        return matrices.transpose(1, 2)
    return matrices.unflatten(1, [2 if locality == '1d' else 4, -1]).transpose(2, 3).flatten(1, 2)


def _axis_tables(grid: tuple[int, int], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    table = factors('2d', grid, like).unflatten(1, grid)
    return table[:2, :, 0], table[2:, 0]  # (2, H), (2, W)


def sums(x: torch.Tensor, y: torch.Tensor, locality: str, grid: tuple[int, int]) -> torch.Tensor:
    """`sum_n phi_f(n) x_n y_n^T` over the positions, F matrices below each other.

    Args:
        x: (n, N, d), from `as_operand`.
        y: (n, N, e), from `as_operand`.
        locality: One of LOCALITIES; 'none' has one factor, 1.
        grid: Rows and columns of the positions, of no account for 'none'.

    Returns:
        (n, F d, e) in float32 at least.
    """
    if through_rows_and_columns(locality, grid):
        n, _, d = x.shape
        x, y = x.unflatten(1, grid), y.unflatten(1, grid)
        rows = product(x.flatten(0, 1).transpose(1, 2), y.flatten(0, 1)).view(n, grid[0], -1)
        x, y = x.transpose(1, 2).flatten(0, 1), y.transpose(1, 2).flatten(0, 1)
        columns = product(x.transpose(1, 2), y).view(n, grid[1], -1)
        row_table, column_table = _axis_tables(grid, rows)
        return torch.cat([row_table @ rows, column_table @ columns], dim=1).view(n, 4 * d, -1)
    if locality != 'none':
        x = weighted(x, factors(locality, grid, x))
    return product(x.transpose(1, 2), y)


def sums_alone(x: torch.Tensor, locality: str, grid: tuple[int, int]) -> torch.Tensor:
    """`sum_n phi_f(n) x_n`, (n, F d); as `sums`."""
    dtype = sum_dtype(x.dtype)
    if locality == 'none':
        return x.sum(dim=1, dtype=dtype)
    if through_rows_and_columns(locality, grid):
        x = x.unflatten(1, grid)
        rows, columns = x.sum(dim=2, dtype=dtype), x.sum(dim=1, dtype=dtype)
        row_table, column_table = _axis_tables(grid, rows)
        return torch.cat([row_table @ rows, column_table @ columns], dim=1).flatten(1)
    x = x.to(dtype)
    return (factors(locality, grid, x) @ x).flatten(1)


def apply(x: torch.Tensor, matrices: torch.Tensor, locality: str, grid: tuple[int, int]) -> torch.Tensor:
    """`sum_f phi_f(n) x_n M_f` at each position.

    Args:
        x: (n, N, d), from `as_operand`.
        matrices: (n, F d, e), as `sums` returns them; for bfloat16 they are rounded to it.
        locality: As for `sums`.
        grid: As for `sums`.

    Returns:
        (n, N, e) in float32 at least.
    """
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # sums may leave the range of float16
    if through_rows_and_columns(locality, grid):
        n, N, d = x.shape
        rows, columns = matrices.reshape(n, 4, -1).split(2, dim=1)  # (n, 2, d e)
        row_table, column_table = _axis_tables(grid, rows)
        rows = (row_table.t() @ rows).to(dtype).view(n * grid[0], d, -1)
        columns = (column_table.t() @ columns).to(dtype).view(n * grid[1], d, -1)
        x = x.unflatten(1, grid)
        by_row = product(x.flatten(0, 1), rows).view(n, grid[0], grid[1], -1)
        by_column = product(x.transpose(1, 2).flatten(0, 1), columns).view(n, grid[1], grid[0], -1)
        return (by_row + by_column.transpose(1, 2)).view(n, N, -1)
    if locality != 'none':
        x = weighted(x, factors(locality, grid, x))
    return product(x, matrices.to(dtype))


def apply_alone(vectors: torch.Tensor, locality: str, grid: tuple[int, int]) -> torch.Tensor:
    """`sum_f phi_f(n) z_f` at each position, (n, F d) to (n, N, d), N being 1 for 'none'."""
    if locality == 'none':
        return vectors.unsqueeze(1)
    table = factors(locality, grid, vectors)
    return table.t() @ vectors.unflatten(1, [table.shape[0], -1])
