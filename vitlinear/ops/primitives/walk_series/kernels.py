"""The series of a walk in one kernel: a program doubles the terms of one head's series in its registers."""
import triton
import triton.language as tl

from ..kernels import dot


@triton.jit
def _load(x, i, j, rows, columns, row_stride, column_stride):
    return tl.load(x + i * row_stride + j * column_stride, mask=(i < rows) & (j < columns), other=0.)


@triton.jit
def series_kernel(
        step, start, out, heads, R, E, num_doublings,
        step_image, step_head, step_row, step_column, start_image, start_head, start_row, start_column,
        PRECISION: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr):
    """`sum_j step^j start` over j < 2^num_doublings. Grid: B heads; `out` is (B, heads, R, E)."""
    pair = tl.program_id(0).to(tl.int64)
    image, head = pair // heads, pair % heads
    r, c, e = tl.arange(0, BR)[:, None], tl.arange(0, BR)[None, :], tl.arange(0, BE)[None, :]
    power = _load(step + image * step_image + head * step_head, r, c, R, R, step_row, step_column)
    y = _load(start + image * start_image + head * start_head, r, e, R, E, start_row, start_column)
    for _ in range(num_doublings - 1):
        y += dot(power, y, PRECISION)
        power = dot(power, power, PRECISION)
    if num_doublings > 0:
        y += dot(power, y, PRECISION)
    tl.store(out + pair * R * E + r * E + e, y, mask=(r < R) & (e < E))
