"""What the kernels share. They call no libdevice function and transpose no product, which Triton 3.4 to 3.7 gets wrong
on Hopper."""
import triton
import triton.language as tl

from .. import _triton

INTERPRETED = tl.constexpr(_triton.INTERPRETED)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """`a @ b` accumulated in float32, with b in the type of a; float16 meets wider numbers in TF32."""
    if INTERPRETED:  # which multiplies the bits of bfloat16
        wide: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
        return tl.dot(a.to(wide), b.to(wide), input_precision='ieee', out_dtype=wide)
    if a.dtype == tl.float16 and b.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b, input_precision=PRECISION)
    return tl.dot(a, b.to(a.dtype), input_precision=PRECISION)


@triton.jit
def inverse_norm(square, eps):
    """`1 / |x|` from `|x|^2`, 0 where `|x| <= eps`: such a vector has no direction."""
    return tl.where(square > eps * eps, 1. / tl.sqrt(tl.where(square > eps * eps, square, 1.)), 0.)


@triton.jit
def clamp_magnitude(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """`sign(x) clamp(|x|, LOW, HIGH)`; what is no number stays none."""
    a = tl.abs(x)
    a = tl.where(a < LOW, LOW, a)
    a = tl.where(a > HIGH, HIGH, a)
    return tl.where(x == 0., 0., tl.where(x < 0., -a, a))


@triton.jit
def is_unclamped(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Where a clamp of magnitudes passes gradients: strictly between its bounds."""
    return (tl.abs(x) > LOW) & (tl.abs(x) < HIGH)
