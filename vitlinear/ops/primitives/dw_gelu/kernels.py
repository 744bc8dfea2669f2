"""Kernels of depthwise convolutions of channels-last maps, with the bias and the GELU that follow in the same pass.

A program takes a tile of rows, columns and channels: what neighbouring taps share comes from the cache, so that memory
is read and written about once. Sums are float32. Offsets within an image are 32-bit numbers. Sizes of images are no
constants, so a new one compiles nothing.
"""
import triton
import triton.language as tl


@triton.jit
def _place(H, W, C, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """Image, rows and columns of positions, and channels of a program; programs beside each other share rows."""
    row_tiles, column_tiles, channel_tiles = tl.cdiv(H, BH), tl.cdiv(W, BW), tl.cdiv(C, BC)
    i = tl.program_id(0)
    part = i // channel_tiles
    p = tl.arange(0, BH * BW)
    w = part % column_tiles * BW + p % BW
    h = part // column_tiles % row_tiles * BH + p // BW
    c = i % channel_tiles * BC + tl.arange(0, BC)
    return part.to(tl.int64), (part // column_tiles // row_tiles).to(tl.int64), h, w, c


@triton.jit
def _load(x, image, h, w, c, H, W, C):
    """(positions, channels), zeros outside the map."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x += image * H * W * C
    return tl.load(x + (((h * W + w) * C)[:, None] + c[None, :]), mask=inside[:, None] & (c < C)[None, :], other=0.)


@triton.jit
def _store(x, value, image, h, w, c, H, W, C):
    x += image * H * W * C
    at = ((h * W + w) * C)[:, None] + c[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=((h < H) & (w < W))[:, None] & (c < C)[None, :])


@triton.jit
def _convolve(
        x, weight, bias, image, h, w, c, H, W, C, KH: tl.constexpr, KW: tl.constexpr, FLIP: tl.constexpr,
        BIAS: tl.constexpr, wide: tl.constexpr):
    y = tl.zeros([h.shape[0], c.shape[0]], wide)
    if BIAS:
        y += tl.load(bias + c, mask=c < C, other=0.).to(wide)[None, :]
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            tap = KH * KW - 1 - i * KW - j if FLIP else i * KW + j
            f = tl.load(weight + c * (KH * KW) + tap, mask=c < C, other=0.).to(wide)
            y += _load(x, image, h + (i - KH // 2), w + (j - KW // 2), c, H, W, C).to(wide) * f[None, :]
    return y


@triton.jit(do_not_specialize=['H', 'W'])
def depthwise_kernel(
        x, weight, bias, out, H, W, C,
        KH: tl.constexpr, KW: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr, FLIP: tl.constexpr,
        BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """`depthwise(x) + bias`, and its GELU with GELU; FLIP turns the kernel round, as backward passes need.

    Grid: images, tiles of rows, columns and channels. Maps are (B, H, W, C), the weight (C, 1, KH, KW).
    """
    _, image, h, w, c = _place(H, W, C, BH, BW, BC)
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    y = _convolve(x, weight, bias, image, h, w, c, H, W, C, KH, KW, FLIP, BIAS, wide)
    if GELU:
        y = 0.5 * y * (1. + tl.erf(y * 0.7071067811865476))
    _store(out, y, image, h, w, c, H, W, C)


@triton.jit(do_not_specialize=['H', 'W'])
def depthwise_backward_kernel(
        x, grad, weight, bias, grad_y, partial, H, W, C,
        KH: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr,
        BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """Gradient of the convolution, with GELU, and parts of those of weight and bias.

    Grid as above. `grad_y` is (B, H, W, C); `partial` (tiles of positions, KH KW + 1, C) has the bias last; TAPS is a
    power of 2 above KH KW.
    """
    part, image, h, w, c = _place(H, W, C, BH, BW, BC)
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    g = _load(grad, image, h, w, c, H, W, C).to(wide)
    if GELU:
        y = _convolve(x, weight, bias, image, h, w, c, H, W, C, KH, KW, False, BIAS, wide)
        g *= 0.5 * (1. + tl.erf(y * 0.7071067811865476)) + y * tl.exp(-0.5 * y * y) * 0.3989422804014327
        _store(grad_y, g, image, h, w, c, H, W, C)
    tap = tl.arange(0, TAPS)[:, None]
    sums = tl.where(tap == KH * KW, tl.sum(g, axis=0)[None, :], 0.)
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            a = _load(x, image, h + (i - KH // 2), w + (j - KW // 2), c, H, W, C).to(wide)
            sums += tl.where(tap == i * KW + j, tl.sum(a * g, axis=0)[None, :], 0.)
    at = partial + (part * (KH * KW + 1) + tap) * C + c[None, :]
    tl.store(at, sums, mask=(tap <= KH * KW) & (c < C)[None, :])
