"""Positional factors of tokens on a grid, and the two ways to evaluate sums with them.

A kernel of positions that is a sum of products, `kappa(i, j) = sum_f phi_f(i) phi_f(j)`, lets a sum over keys be taken
before it meets the queries: once for each of the F factors. For '2d', the sum of a kernel of rows and one of columns,
the sums factor through one matrix for each row and one for each column: half the operations, and no map is multiplied
by the factors.
"""
import math
from functools import lru_cache

import torch

from ..._dispatch import is_eager, is_specialised, scripts_as
from ..._numerics import as_operand, product

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
    if locality == '1d':
        return angles(H * W, like)
    rows = angles(H, like).unsqueeze(2).expand(2, H, W)
    columns = angles(W, like).unsqueeze(1).expand(2, H, W)
    if locality == '2d_product':
        return (rows.unsqueeze(1) * columns.unsqueeze(0)).reshape(4, H * W)
    return torch.cat([rows, columns]).reshape(4, H * W)


@lru_cache(maxsize=64)
def _kept_factors(
        locality: str, grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return build_factors(locality, grid, torch.empty(0, dtype=dtype, device=device))


@scripts_as(build_factors)
def factors(locality: str, grid: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """As `build_factors`; eager code keeps the tables of the last sizes, by dtype and device."""
    if is_eager() and type(like) in (torch.Tensor, torch.nn.Parameter) and like.device.type != 'meta':
        return _kept_factors(locality, (int(grid[0]), int(grid[1])), like.dtype, like.device)
    return build_factors(locality, grid, like)


def _never(locality: str, grid: tuple[int, int]) -> bool:
    return False


@scripts_as(_never)
def through_rows_and_columns(locality: str, grid: tuple[int, int]) -> bool:
    """Whether to evaluate through rows and columns; graphs for every size get the factors."""
    return locality == '2d' and is_specialised() and grid[0] * grid[1] >= ROWS_AND_COLUMNS_FROM_POSITIONS


def weighted(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, d) and (F, N) to (B, heads, N, F d): a copy of x for each factor."""
    return (x.unsqueeze(3) * table.t().unsqueeze(2)).flatten(3)


def regroup(x: torch.Tensor, num_factors: int) -> torch.Tensor:
    """(B, heads, F d, e) to (B, heads, F e, d): each of the F matrices transposed."""
    return x.unflatten(2, [num_factors, -1]).transpose(-2, -1).flatten(2, 3)


def _axis_tables(grid: tuple[int, int], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    table = factors('2d', grid, like).unflatten(1, grid)
    return table[:2, :, 0], table[2:, 0]  # (2, H), (2, W)


def sums(x: torch.Tensor, y: torch.Tensor, locality: str, grid: tuple[int, int]) -> torch.Tensor:
    """`sum_n phi_f(n) x_n y_n^T` over the positions, F matrices below each other.

    Args:
        x: (B, heads, N, d).
        y: (B, heads, N, e).
        locality: One of LOCALITIES; 'none' has one factor, 1.
        grid: Rows and columns of the positions, of no account for 'none'.

    Returns:
        (B, heads, F d, e) in float32 at least.
    """
    x, y = as_operand(x), as_operand(y)
    if through_rows_and_columns(locality, grid):
        x, y = x.unflatten(2, grid), y.unflatten(2, grid)
        B, heads, H, W, d = x.shape
        rows = product(x.transpose(-2, -1), y).reshape(B, heads, H, -1)
        columns = product(x.permute(0, 1, 3, 4, 2), y.transpose(2, 3)).reshape(B, heads, W, -1)
        row_table, column_table = _axis_tables(grid, rows)
        return torch.cat([row_table @ rows, column_table @ columns], dim=2).view(B, heads, 4 * d, -1)
    if locality != 'none':
        x = weighted(x, factors(locality, grid, x))
    return product(x.transpose(-2, -1), y)


def sums_alone(x: torch.Tensor, locality: str, grid: tuple[int, int]) -> torch.Tensor:
    """`sum_n phi_f(n) x_n`, (B, heads, F d); as `sums`."""
    x = as_operand(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if locality == 'none':
        return x.sum(dim=2, dtype=dtype)
    if through_rows_and_columns(locality, grid):
        x = x.unflatten(2, grid)
        rows, columns = x.sum(dim=3, dtype=dtype), x.sum(dim=2, dtype=dtype)
        row_table, column_table = _axis_tables(grid, rows)
        return torch.cat([row_table @ rows, column_table @ columns], dim=2).flatten(2)
    x = x.to(dtype)
    return (factors(locality, grid, x) @ x).flatten(2)


def apply(x: torch.Tensor, matrices: torch.Tensor, locality: str, grid: tuple[int, int]) -> torch.Tensor:
    """`sum_f phi_f(n) x_n M_f` at each position.

    Args:
        x: (B, heads, N, d).
        matrices: (B, heads, F d, e), as `sums` returns them; in half precision they are rounded to it.
        locality: As for `sums`.
        grid: As for `sums`.

    Returns:
        (B, heads, N, e) in float32 at least.
    """
    x = as_operand(x)
    if through_rows_and_columns(locality, grid):
        rows, columns = matrices.unflatten(2, [4, -1]).flatten(3).split(2, dim=2)  # (B, heads, 2, d e)
        row_table, column_table = _axis_tables(grid, rows)
        size = [x.shape[3], matrices.shape[3]]
        x = x.unflatten(2, grid)
        rows = (row_table.t() @ rows).unflatten(3, size).to(x.dtype)
        columns = (column_table.t() @ columns).unflatten(3, size).to(x.dtype)
        return (product(x, rows) + product(x.transpose(2, 3), columns).transpose(2, 3)).flatten(2, 3)
    if locality != 'none':
        x = weighted(x, factors(locality, grid, x))
    return product(x, matrices.to(x.dtype))


def apply_alone(vectors: torch.Tensor, locality: str, grid: tuple[int, int]) -> torch.Tensor:
    """`sum_f phi_f(n) z_f` at each position, (B, heads, F d) to (B, heads, N, d), N being 1 for 'none'."""
    if locality == 'none':
        return vectors.unsqueeze(2)
    table = factors(locality, grid, vectors)
    return table.t() @ vectors.unflatten(2, [table.shape[0], -1])
