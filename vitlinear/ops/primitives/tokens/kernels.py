"""Kernels of sums over tokens. A program takes one head of one image, and a tile of its positions or one after another.

Every map is read once in its own type; positional factors, norms, clamps and divisors stay in registers, and products
accumulate in float32. Maps are given by their strides of images, heads and positions, and have a head's channels side
by side. Sizes of images are no constants, so a new one compiles nothing.

Names of arguments are those of `torch.py`; a table has the factors of each position side by side, and FACTORS = 0
stands for one factor of 1, without a table.
"""
import triton
import triton.language as tl

from ..kernels import clamp_magnitude, dot, inverse_norm, is_unclamped


@triton.jit
def _load(x, n, c, inside, size, stride):
    """Positions n and channels c of a map, in either order by the shapes of both."""
    return tl.load(x + n.to(tl.int64) * stride + c, mask=inside & (c < size), other=0.)


@triton.jit
def _store(x, value, n, c, inside, size, heads):
    """To positions n, counted over images and of one head, of a map whose heads lie side by side."""
    tl.store(x + n * heads * size + c, value.to(x.dtype.element_ty), mask=inside & (c < size))


@triton.jit
def _load_matrix(x, i, j, rows, columns, row_stride, column_stride):
    return tl.load(x + i * row_stride + j * column_stride, mask=(i < rows) & (j < columns), other=0.)


@triton.jit
def _factor(table, n, i, inside, FACTORS: tl.constexpr):
    return tl.load(table + n.to(tl.int64) * FACTORS + i, mask=inside, other=0.)


@triton.jit
def _accumulate(s, z, x, y, f, w, TOTAL: tl.constexpr, PRECISION: tl.constexpr):
    """Adds a tile of keys (channels, positions), times a factor of each position, to sums with and without values."""
    x *= f[None, :]
    s += dot(x.to(y.dtype), y, PRECISION)
    if TOTAL:
        z += tl.sum(x * w[None, :], axis=1)
    return s, z


@triton.jit(do_not_specialize=['N', 'tiles_each'])
def sums_kernel(
        k, v, weights, table, out,
        N, heads, D, E, tiles_each,
        k_image, k_head, k_position, v_image, v_head, v_position, eps,
        FACTORS: tl.constexpr, GROUP: tl.constexpr, TOTAL: tl.constexpr, WEIGHTED: tl.constexpr, UNIT: tl.constexpr,
        PRECISION: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """`S_f = sum_n phi_f(n) k_n v_n^T` and `Z_f = sum_n phi_f(n) w_n k_n` over some tiles, for GROUP of the factors.

    Grid: (B heads groups, splits), the groups of one head beside each other, as they read the same. `weights` are
    (B heads, N), 1 without WEIGHTED; `out` has for each split S of all heads and then, with TOTAL, Z of all heads;
    `tiles_each` are the tiles of a split.
    """
    groups: tl.constexpr = 1 if FACTORS == 0 else FACTORS // GROUP
    pairs, split = tl.num_programs(0) // groups, tl.program_id(1)
    pair, first_factor = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups * GROUP
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    k += (pair // heads) * k_image + (pair % heads) * k_head
    v += (pair // heads) * v_image + (pair % heads) * v_head
    wide: tl.constexpr = out.dtype.element_ty
    operand: tl.constexpr = wide if k.dtype.element_ty != v.dtype.element_ty else v.dtype.element_ty

    s0 = tl.zeros([BD, BE], wide)
    z0 = tl.zeros([BD], wide)
    s1, z1, s2, z2, s3, z3 = s0, z0, s0, z0, s0, z0
    first = split * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(N, BN))):
        n = tile * BN + tl.arange(0, BN)
        inside = n < N
        x = _load(k, n[None, :], d[:, None], inside[None, :], D, k_position).to(wide)
        y = _load(v, n[:, None], e[None, :], inside[:, None], E, v_position).to(operand)
        if UNIT:
            x *= inverse_norm(tl.sum(x * x, axis=0), eps)[None, :]
        w = tl.full([BN], 1., wide)
        if WEIGHTED:
            w = tl.load(weights + pair * N + n, mask=inside, other=0.)
        f = tl.full([BN], 1., wide)
        if FACTORS > 0:
            f = _factor(table, n, first_factor, inside, FACTORS)
        s0, z0 = _accumulate(s0, z0, x, y, f, w, TOTAL, PRECISION)
        if GROUP > 1:
            f = _factor(table, n, first_factor + 1, inside, FACTORS)
            s1, z1 = _accumulate(s1, z1, x, y, f, w, TOTAL, PRECISION)
        if GROUP > 2:
            f = _factor(table, n, first_factor + 2, inside, FACTORS)
            s2, z2 = _accumulate(s2, z2, x, y, f, w, TOTAL, PRECISION)
            f = _factor(table, n, first_factor + 3, inside, FACTORS)
            s3, z3 = _accumulate(s3, z3, x, y, f, w, TOTAL, PRECISION)

    rows = D * (FACTORS if FACTORS > 0 else 1)
    out += split.to(tl.int64) * pairs * rows * (E + TOTAL)
    total = out + pairs * rows * E + pair * rows
    out += pair * rows * E
    for i in tl.static_range(GROUP):
        s, z = s0, z0
        if i == 1:
            s, z = s1, z1
        if i == 2:
            s, z = s2, z2
        if i == 3:
            s, z = s3, z3
        row = (first_factor + i) * D + d
        tl.store(out + row[:, None] * E + e[None, :], s, mask=(d[:, None] < D) & (e[None, :] < E))
        if TOTAL:
            tl.store(total + row, z, mask=d < D)


@triton.jit
def _place(N, heads, tiles, BN: tl.constexpr):
    """Image and head of a program and which of all heads that is, its positions and whether they are on the map."""
    pair, n = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    return pair, pair // heads, pair % heads, n, n < N


@triton.jit
def _numerators(
        x, sums, total, table, n, d, e, inside, D, E,
        FACTORS: tl.constexpr, DIVIDE: tl.constexpr, PRECISION: tl.constexpr, wide: tl.constexpr):
    """`sum_f phi_f(n) x_n S_f` and, with DIVIDE, `sum_f phi_f(n) x_n . Z_f` of a tile."""
    y = tl.zeros([n.shape[0], e.shape[0]], wide)
    weight = tl.zeros([n.shape[0]], wide)
    for i in tl.static_range(FACTORS if FACTORS > 0 else 1):
        part = dot(x, _load_matrix(sums + i * D * E, d[:, None], e[None, :], D, E, E, 1), PRECISION)
        f = tl.full([n.shape[0]], 1., wide)
        if FACTORS > 0:
            f = _factor(table, n, i, inside, FACTORS)
        y += part * f[:, None]
        if DIVIDE:
            z = tl.load(total + i * D + d, mask=d < D, other=0.)
            weight += f * tl.sum(x.to(wide) * z[None, :], axis=1)
    return y, weight


@triton.jit(do_not_specialize=['N', 'tiles'])
def apply_kernel(
        q, sums, total, table, base, out,
        N, heads, D, E, tiles,
        q_image, q_head, q_position, base_image, base_head, base_position, eps,
        FACTORS: tl.constexpr, DIVIDE: tl.constexpr, CLAMP: tl.constexpr, UNIT: tl.constexpr, BASE: tl.constexpr,
        LOW: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
        BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """`o_n = sum_f phi_f(n) q_n S_f` with what follows it: a division, a norm, a map that is added.

    Grid: B heads tiles. `sums` are (B heads, FACTORS D, E), `total` (B heads, FACTORS D), `out` (B, N, heads, E).
    """
    pair, image, head, n, inside = _place(N, heads, tiles, BN)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    wide: tl.constexpr = sums.dtype.element_ty
    rows = D * (FACTORS if FACTORS > 0 else 1)
    x = _load(q + image * q_image + head * q_head, n[:, None], d[None, :], inside[:, None], D, q_position)
    y, weight = _numerators(
        x, sums + pair * rows * E, total + pair * rows, table, n, d, e, inside, D, E, FACTORS, DIVIDE, PRECISION, wide)
    if UNIT:
        y *= inverse_norm(tl.sum(x.to(wide) * x.to(wide), axis=1), eps)[:, None]
    if DIVIDE:
        weight += eps
        if CLAMP:
            weight = tl.where(weight > HIGH, HIGH, weight)
            y = clamp_magnitude(clamp_magnitude(y, LOW, HIGH) / weight[:, None], LOW, HIGH)
        else:
            y /= weight[:, None]
    if BASE:
        base += image * base_image + head * base_head
        y += _load(base, n[:, None], e[None, :], inside[:, None], E, base_position)
    _store(out + head * E, y, image * N + n.to(tl.int64)[:, None], e[None, :], inside[:, None], E, heads)


@triton.jit(do_not_specialize=['N', 'tiles'])
def apply_backward_kernel(
        q, grad, sums, total, table, grad_q, grad_y, grad_weight,
        N, heads, D, E, tiles,
        q_image, q_head, q_position, grad_image, grad_head, grad_position, eps,
        FACTORS: tl.constexpr, DIVIDE: tl.constexpr, CLAMP: tl.constexpr, UNIT: tl.constexpr,
        LOW: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
        BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """Gradient of q and, with DIVIDE, of numerators and divisors, which are computed once more.

    Grid: B heads tiles. `grad` is that of the result (B, heads, N, E), `grad_q` (B, N, heads, D), `grad_y`
    (B, N, heads, E) and `grad_weight` (B heads, N); the gradient of the sums is what `sums_kernel` makes of the last
    two.
    """
    pair, image, head, n, inside = _place(N, heads, tiles, BN)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    wide: tl.constexpr = sums.dtype.element_ty
    rows = D * (FACTORS if FACTORS > 0 else 1)
    sums += pair * rows * E
    total += pair * rows
    x = _load(q + image * q_image + head * q_head, n[:, None], d[None, :], inside[:, None], D, q_position)
    grad += image * grad_image + head * grad_head
    g = _load(grad, n[:, None], e[None, :], inside[:, None], E, grad_position).to(wide)

    g_weight = tl.zeros([BN], wide)
    if DIVIDE:
        y, weight = _numerators(x, sums, total, table, n, d, e, inside, D, E, FACTORS, DIVIDE, PRECISION, wide)
        weight += eps
        if CLAMP:
            divisor = tl.where(weight > HIGH, HIGH, weight)[:, None]
            ratio = clamp_magnitude(y, LOW, HIGH) / divisor
            g = tl.where(is_unclamped(ratio, LOW, HIGH), g, 0.) / divisor
            g_weight = tl.where(weight < HIGH, -tl.sum(g * ratio, axis=1), 0.)
            g = tl.where(is_unclamped(y, LOW, HIGH), g, 0.)
        else:
            g /= weight[:, None]
            g_weight = -tl.sum(g * y, axis=1) / weight
        tl.store(grad_weight + pair * N + n, g_weight, mask=inside)
        _store(grad_y + head * E, g, image * N + n.to(tl.int64)[:, None], e[None, :], inside[:, None], E, heads)

    operand: tl.constexpr = wide if x.dtype == tl.float16 else x.dtype  # gradients leave the range of float16
    dx = tl.zeros([BN, BD], wide)
    for i in tl.static_range(FACTORS if FACTORS > 0 else 1):
        s = _load_matrix(sums + i * D * E, e[:, None], d[None, :], E, D, 1, E)
        part = dot(g.to(operand), s, PRECISION)
        if DIVIDE:
            part += g_weight[:, None] * tl.load(total + i * D + d, mask=d < D, other=0.)[None, :]
        if FACTORS > 0:
            part *= _factor(table, n, i, inside, FACTORS)[:, None]
        dx += part
    if UNIT:
        inverse = inverse_norm(tl.sum(x.to(wide) * x.to(wide), axis=1), eps)[:, None]
        unit = x.to(wide) * inverse
        dx = (dx - unit * tl.sum(unit * dx, axis=1)[:, None]) * inverse
    _store(grad_q + head * D, dx, image * N + n.to(tl.int64)[:, None], d[None, :], inside[:, None], D, heads)


@triton.jit(do_not_specialize=['N', 'tiles'])
def sums_backward_kernel(
        k, v, grad, grad_total, table, grad_k, grad_v,
        N, heads, D, E, tiles,
        k_image, k_head, k_position, v_image, v_head, v_position, eps,
        FACTORS: tl.constexpr, TOTAL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
        BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """`dk_n = sum_f phi_f(n) (v_n dS_f^T + dZ_f)` and `dv_n = sum_f phi_f(n) k_n dS_f`.

    Grid: B heads tiles. `grad` is that of S (B heads, FACTORS D, E), `grad_total` of Z (B heads, FACTORS D), `grad_k`
    (B, N, heads, D) and `grad_v` (B, N, heads, E).
    """
    pair, image, head, n, inside = _place(N, heads, tiles, BN)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    wide: tl.constexpr = grad.dtype.element_ty
    rows = D * (FACTORS if FACTORS > 0 else 1)
    grad += pair * rows * E
    grad_total += pair * rows
    x = _load(k + image * k_image + head * k_head, n[:, None], d[None, :], inside[:, None], D, k_position)
    y = _load(v + image * v_image + head * v_head, n[:, None], e[None, :], inside[:, None], E, v_position)
    unit = x.to(wide)
    inverse = tl.full([BN], 1., wide)
    if UNIT:
        inverse = inverse_norm(tl.sum(unit * unit, axis=1), eps)
        unit *= inverse[:, None]

    dx = tl.zeros([BN, BD], wide)
    dy = tl.zeros([BN, BE], wide)
    for i in tl.static_range(FACTORS if FACTORS > 0 else 1):
        g = _load_matrix(grad + i * D * E, d[:, None], e[None, :], D, E, E, 1)
        part_y = dot(unit.to(x.dtype), g, PRECISION)
        g = _load_matrix(grad + i * D * E, e[:, None], d[None, :], E, D, 1, E)
        part_x = dot(y, g, PRECISION)
        if TOTAL:
            part_x += tl.load(grad_total + i * D + d, mask=d < D, other=0.)[None, :]
        if FACTORS > 0:
            f = _factor(table, n, i, inside, FACTORS)[:, None]
            part_x *= f
            part_y *= f
        dx += part_x
        dy += part_y
    if UNIT:
        dx = (dx - unit * tl.sum(unit * dx, axis=1)[:, None]) * inverse[:, None]
    at = image * N + n.to(tl.int64)[:, None]
    _store(grad_k + head * D, dx, at, d[None, :], inside[:, None], D, heads)
    _store(grad_v + head * E, dy, at, e[None, :], inside[:, None], E, heads)


@triton.jit(do_not_specialize=['size'])
def clamp_kernel(x, out, size, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr):
    """`sign(x) clamp(|x|, LOW, HIGH)`."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < size, other=0.)
    wide: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    tl.store(out + i, clamp_magnitude(a.to(wide), LOW, HIGH).to(a.dtype), mask=i < size)


@triton.jit(do_not_specialize=['size'])
def clamp_backward_kernel(x, grad, out, size, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient through `clamp_kernel`: 0 from the bounds on."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < size, other=0.)
    wide: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    g = tl.load(grad + i, mask=i < size, other=0.)
    tl.store(out + i, tl.where(is_unclamped(a.to(wide), LOW, HIGH), g, 0.), mask=i < size)
