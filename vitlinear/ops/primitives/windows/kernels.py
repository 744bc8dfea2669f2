"""Kernels of learned-query attention over windows: a program takes a tile of positions and some heads.

A window's softmax takes the maximum of its own scores and biases, so that it is exact for scores of any size. Scores
and values are read in their own type, once from memory and for each tap from the cache; sums are float32. Offsets
within an image are 32-bit numbers, whose registers decide how many programs run at a time. Sizes of images are no
constants.

Names: score (B, H, W, L, heads), v (B, H, W, D, heads), the bias r and the scale S of a tap (L heads, K^2), windows of
side K on (H2, W2), every `stride`-th position.
"""
import triton
import triton.language as tl


@triton.jit
def _place(H, W, heads, P: tl.constexpr, BH: tl.constexpr):
    """Image, row and column of positions and whether they are on the map, heads, and which tile of positions it is."""
    head_tiles, tiles = tl.cdiv(heads, BH), tl.cdiv(H * W, P)
    part = tl.program_id(0) // head_tiles
    n = part % tiles * P + tl.arange(0, P)
    a = tl.program_id(0) % head_tiles * BH + tl.arange(0, BH)
    return (part // tiles).to(tl.int64), n // W, n % W, n < H * W, a, part.to(tl.int64)


@triton.jit
def _row(x, image, h, w, inside, i, a, H, W, rows, heads, wide: tl.constexpr, other=0.):
    """(positions, heads) of row i of a map (B, H, W, rows, heads)."""
    at = ((h * W + w) * rows + i) * heads
    x += image * H * W * rows * heads
    return tl.load(x + (at[:, None] + a[None, :]), mask=inside[:, None] & (a < heads)[None, :], other=other).to(wide)


@triton.jit
def _at_rows(h, w, inside, d, a, W, D, heads):
    """Where an image's (positions, channels, heads) are in memory, and which are."""
    at = (h * W + w) * D * heads
    mask = inside[:, None, None] & (d < D)[None, :, None] & (a < heads)[None, None, :]
    return at[:, None, None] + (d[None, :, None] * heads + a[None, None, :]), mask


@triton.jit
def _rows(x, image, h, w, inside, d, a, H, W, D, heads, wide: tl.constexpr):
    """(positions, channels, heads) of a map (B, H, W, D, heads)."""
    at, mask = _at_rows(h, w, inside, d, a, W, D, heads)
    return tl.load(x + image * H * W * D * heads + at, mask=mask, other=0.).to(wide)


@triton.jit
def _of_tap(x, query, a, tap, heads, K: tl.constexpr, wide: tl.constexpr):
    """(1, heads) biases or scales of a tap and query."""
    return tl.load(x + (query * heads + a) * (K * K) + tap, mask=a < heads, other=0.).to(wide)[None, :]


@triton.jit
def _logit(
        score, bias, image, h, w, inside, query, tap, a, H, W, L, heads, stride, K: tl.constexpr, wide: tl.constexpr):
    """Where the tap of each window is, whether it is on the map, and its score and bias, -inf beside the map."""
    h = h * stride + tap // K - K // 2
    w = w * stride + tap % K - K // 2
    inside = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    s = _row(score, image, h, w, inside, query, a, H, W, L, heads, wide, float('-inf'))
    return h, w, inside, s + _of_tap(bias, query, a, tap, heads, K, wide)


@triton.jit
def _log_sum(
        score, bias, image, h, w, inside, query, a, H, W, L, heads, stride, K: tl.constexpr, wide: tl.constexpr):
    """Maximum of the logits of each window, and the sum of their exponentials over it."""
    largest = tl.full([h.shape[0], a.shape[0]], float('-inf'), wide)
    for tap in range(K * K):
        _, _, _, x = _logit(score, bias, image, h, w, inside, query, tap, a, H, W, L, heads, stride, K, wide)
        largest = tl.where(x > largest, x, largest)
        largest = tl.where(x == x, largest, x)
    largest = tl.where(largest == float('-inf'), 0., largest)  # positions beyond the map
    total = tl.zeros([h.shape[0], a.shape[0]], wide)
    for tap in range(K * K):
        _, _, _, x = _logit(score, bias, image, h, w, inside, query, tap, a, H, W, L, heads, stride, K, wide)
        total += tl.exp(x - largest)
    return largest, tl.where(total == 0., 1., total)


@triton.jit(do_not_specialize=['H', 'W', 'H2', 'W2'])
def windows_kernel(
        score, v, bias, tap_scale, out, H, W, H2, W2, L, D, heads, stride, scale,
        SCALED: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """`scale sum_l sum_t S_lt softmax_t(score_l + r_lt) v`, S = 1 without SCALED; `out` is (B, H2, W2, D, heads)."""
    image, h, w, inside, a, _ = _place(H2, W2, heads, P, BH)
    d = tl.arange(0, BD)
    wide: tl.constexpr = tl.float64 if v.dtype.element_ty == tl.float64 else tl.float32
    y = tl.zeros([P, BD, BH], wide)
    for query in range(L):
        largest, total = _log_sum(score, bias, image, h, w, inside, query, a, H, W, L, heads, stride, K, wide)
        for tap in range(K * K):
            i, j, on_map, x = _logit(score, bias, image, h, w, inside, query, tap, a, H, W, L, heads, stride, K, wide)
            weight = tl.exp(x - largest) / total * scale
            if SCALED:
                weight *= _of_tap(tap_scale, query, a, tap, heads, K, wide)
            y += weight[:, None, :] * _rows(v, image, i, j, on_map, d, a, H, W, D, heads, wide)
    at, mask = _at_rows(h, w, inside, d, a, W2, D, heads)
    tl.store(out + image * H2 * W2 * D * heads + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['H', 'W', 'H2', 'W2'])
def windows_parameters_kernel(
        score, v, bias, tap_scale, grad, log_sum, inner, partial, H, W, H2, W2, L, D, heads, stride, scale,
        SCALED: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """What pixels need of their windows for gradients, and parts of the gradients of biases and scales.

    `log_sum` and `inner` (B, H2, W2, L, heads) are the logarithm of the sum of exponentials, and `sum_t a_t da_t` for
    weights a; `partial` is (tiles of positions, 2, L, K^2, heads), the second for scales, or without it.
    """
    image, h, w, inside, a, part = _place(H2, W2, heads, P, BH)
    d = tl.arange(0, BD)
    wide: tl.constexpr = tl.float64 if v.dtype.element_ty == tl.float64 else tl.float32
    g = _rows(grad, image, h, w, inside, d, a, H2, W2, D, heads, wide)
    mask = inside[:, None] & (a < heads)[None, :]
    for query in range(L):
        largest, total = _log_sum(score, bias, image, h, w, inside, query, a, H, W, L, heads, stride, K, wide)
        dot = tl.zeros([P, BH], wide)
        for tap in range(K * K):
            i, j, on_map, x = _logit(score, bias, image, h, w, inside, query, tap, a, H, W, L, heads, stride, K, wide)
            u = tl.sum(g * _rows(v, image, i, j, on_map, d, a, H, W, D, heads, wide), axis=1) * scale
            if SCALED:
                u *= _of_tap(tap_scale, query, a, tap, heads, K, wide)
            dot += tl.exp(x - largest) / total * u
        at = (((h * W2 + w) * L + query) * heads)[:, None] + a[None, :]
        tl.store(log_sum + image * H2 * W2 * L * heads + at, largest + tl.log(total), mask=mask)
        tl.store(inner + image * H2 * W2 * L * heads + at, dot, mask=mask)
        for tap in range(K * K):
            i, j, on_map, x = _logit(score, bias, image, h, w, inside, query, tap, a, H, W, L, heads, stride, K, wide)
            weight = tl.exp(x - largest) / total
            u = tl.sum(g * _rows(v, image, i, j, on_map, d, a, H, W, D, heads, wide), axis=1) * scale
            to = partial + ((part * (2 if SCALED else 1) * L + query) * (K * K) + tap) * heads + a
            if SCALED:
                tl.store(to + L * (K * K) * heads, tl.sum(weight * u, axis=0), mask=a < heads)
                u *= _of_tap(tap_scale, query, a, tap, heads, K, wide)
            tl.store(to, tl.sum(weight * (u - dot), axis=0), mask=a < heads)


@triton.jit(do_not_specialize=['H', 'W', 'H2', 'W2'])
def windows_pixels_kernel(
        score, v, bias, tap_scale, grad, log_sum, inner, grad_score, grad_v,
        H, W, H2, W2, L, D, heads, stride, scale,
        SCALED: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """Gradients of scores and values: each pixel gathers from the windows that hold it."""
    image, h, w, inside, a, _ = _place(H, W, heads, P, BH)
    d = tl.arange(0, BD)
    wide: tl.constexpr = tl.float64 if v.dtype.element_ty == tl.float64 else tl.float32
    value = _rows(v, image, h, w, inside, d, a, H, W, D, heads, wide)
    dv = tl.zeros([P, BD, BH], wide)
    for query in range(L):
        s = _row(score, image, h, w, inside, query, a, H, W, L, heads, wide)
        ds = tl.zeros([P, BH], wide)
        for tap in range(K * K):
            i, j = h - tap // K + K // 2, w - tap % K + K // 2
            there = inside & (i >= 0) & (j >= 0) & (i % stride == 0) & (j % stride == 0)
            i, j = i // stride, j // stride
            there = there & (i < H2) & (j < W2)
            g = _rows(grad, image, i, j, there, d, a, H2, W2, D, heads, wide)
            z = _row(log_sum, image, i, j, there, query, a, H2, W2, L, heads, wide, float('inf'))
            weight = tl.exp(s + _of_tap(bias, query, a, tap, heads, K, wide) - z)
            times = tl.full([1, BH], 1., wide) * scale
            if SCALED:
                times *= _of_tap(tap_scale, query, a, tap, heads, K, wide)
            u = tl.sum(g * value, axis=1) * times
            ds += weight * (u - _row(inner, image, i, j, there, query, a, H2, W2, L, heads, wide))
            dv += (weight * times)[:, None, :] * g
        at = (((h * W + w) * L + query) * heads)[:, None] + a[None, :]
        tl.store(
            grad_score + image * H * W * L * heads + at, ds.to(grad_score.dtype.element_ty),
            mask=inside[:, None] & (a < heads)[None, :])
    at, mask = _at_rows(h, w, inside, d, a, W, D, heads)
    tl.store(grad_v + image * H * W * D * heads + at, dv.to(grad_v.dtype.element_ty), mask=mask)
