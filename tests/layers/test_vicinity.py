"""Vicinity attention against its O(N^2) form, against the authors' steps one by one, and in half precision."""
import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _numerics import TIGHT, assert_close, saved_bytes, value_and_grads
from vitlinear.layers import VicinityAttention
from vitlinear.ops import clamp_magnitude, reference, vicinity_attention
from vitlinear.ops.primitives.tokens.positions import LOCALITIES
from vitlinear.ops.primitives.tokens.torch import CLAMP_MAX, CLAMP_MIN

GRIDS = [(1, 1), (1, 7), (6, 1), (5, 8), (9, 4), (7, 7)]


# magnitudes of queries and keys and of values: between them they set every clamp to work
SCALES = [(1e-3, 1e-3), (.02, .02), (1., 1.), (1., 1e-5), (30., 30.), (300., 300.), (1e-3, 1e7)]


def inputs(B: int, heads: int, H: int, W: int, d: int, e: int, scale=(1., 1.), seed: int = 0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q, k = (scale[0] * torch.randn(B, heads, H, W, d, generator=g, dtype=torch.float64).relu() for _ in range(2))
    v = scale[1] * torch.randn(B, heads, H, W, e, generator=g, dtype=torch.float64)
    return tuple(x.to(dtype) for x in (q, k, v))


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2, 3)


def dense(q, k, v, locality: str) -> torch.Tensor:
    H, W = q.shape[2:4]
    return reference.vicinity_attention(flat(q), flat(k), flat(v), H, W, locality).unflatten(2, (H, W))


def assert_same(actual: Callable, expected: Callable, *args: torch.Tensor, settled=None) -> None:
    """Outputs and their gradients, of the `settled` ones if given."""
    factor = 1. if settled is None else settled.double()
    results = [value_and_grads(lambda *x, fn=fn: fn(*x) * factor, *args) for fn in (actual, expected)]
    for a, b in zip(*results):
        assert_close(a, b)


def magnitude(t: torch.Tensor) -> torch.Tensor:
    return t.sign() * t.abs().clamp(1e-4, 1e4)


def steps(q, k, v, locality: str = '2d', eps: float = 1e-4, sites=None) -> torch.Tensor:
    """The authors' evaluation, with all features written out and a clamp after each of its four steps."""
    H, W = q.shape[2:4]
    row = torch.arange(H, dtype=q.dtype).repeat_interleave(W) * (math.pi / 2 / H)
    column = torch.arange(W, dtype=q.dtype).repeat(H) * (math.pi / 2 / W)
    factors = {
        '2d': [row.cos(), row.sin(), column.cos(), column.sin()],
        '2d_product': [f(row) * g(column) for f in (torch.cos, torch.sin) for g in (torch.cos, torch.sin)],
        '1d': [f(torch.arange(H * W, dtype=q.dtype) * (math.pi / 2 / (H * W))) for f in (torch.cos, torch.sin)],
        'none': [torch.ones(H * W, dtype=q.dtype)],
    }[locality]
    Q, K = (torch.cat([flat(u) * f[:, None] for f in factors], dim=-1) for u in (q, k))
    kv = K.transpose(-2, -1) @ flat(v)
    z = 1 / ((Q * K.sum(dim=-2, keepdim=True)).sum(dim=-1, keepdim=True) + eps)
    n = Q @ magnitude(kv)
    o = magnitude(n) * magnitude(z)
    if sites is not None:
        sites += [kv, z, n, o]
    return magnitude(o).unflatten(2, (H, W))


def settled(q, k, v, locality: str = '2d') -> torch.Tensor:
    """Mask of the outputs whose numerator is not zero up to rounding.

    Sums that are clamped to +-1e-4 or +-1e4 may cancel, and the next clamp pushes what rounding leaves to either side.
    """
    sites = []
    steps(q, k, v, locality, sites=sites)
    numerator = sites[2].abs()
    return (numerator > 1e-9 * numerator.max()).unflatten(2, q.shape[2:4])


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('locality', LOCALITIES[:5])
def test_clamped_steps(locality: str, scale: tuple[float, float]):
    """Every clamp is at work at one of the scales, see the next test."""
    q, k, v = inputs(2, 2, 5, 6, d=4, e=4, scale=scale)
    q[:, 0, 2] = 0  # dead queries, for exact zeros
    k[0, 1, ..., 1] = 0
    mask = settled(q, k, v, locality)
    assert mask.double().mean() > .6
    assert_same(
        lambda *x: vicinity_attention(*x, locality=locality), lambda *x: steps(*x, locality), q, k, v,
        settled=mask)


def test_clamped_steps_reach_every_clamp():
    low, high = torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    for scale in SCALES:
        q, k, v = inputs(2, 2, 5, 6, d=4, e=4, scale=scale)
        sites = []
        steps(q, k, v, sites=sites)
        low |= torch.tensor([bool(((t.abs() < 1e-4) & (t != 0)).any()) for t in sites])
        high |= torch.tensor([bool((t.abs() > 1e4).any()) for t in sites])
    assert low.tolist() == [True] * 4
    assert high.tolist() == [True, False, True, True]  # a reciprocal is at most 1 / eps = 1e4


@pytest.mark.parametrize('fpc_reduction, scale', [(1, 1.), (4, 1.), (1, .01), (2, 8.)])
def test_module_steps(fpc_reduction: int, scale: float):
    """All six clamps of the authors' block in float64, outputs and gradients of input and parameters."""
    torch.manual_seed(0)
    C, heads, H, W = 12, 3, 6, 4
    module = VicinityAttention(C, heads, 2, fpc_reduction, dtype=torch.float64)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=scale * .5)
    x = torch.randn(2, H, W, C, dtype=torch.float64, requires_grad=True)

    def by_steps(x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid((x.mean((1, 2)) @ module.fpc.fc1.weight.T).relu() @ module.fpc.fc2.weight.T)
        q, k, v = (x @ module.qkv.weight.T + module.qkv.bias).chunk(3, dim=-1)
        q, k, v = (u.reshape(2, H, W, heads, 2).permute(0, 3, 1, 2, 4) for u in (q.relu(), k.relu(), v))
        o = steps(q, k, v).permute(0, 2, 3, 1, 4).reshape(2, H, W, C // 2)
        y = magnitude(o @ module.proj.weight.T + module.proj.bias)
        return magnitude(y + y * gate[:, None, None])

    cotangent = torch.randn(2, H, W, C, dtype=torch.float64)
    results = []
    for fn in (module, by_steps):
        out = fn(x)
        results.append([out, *torch.autograd.grad(out, [x, *module.parameters()], cotangent)])
    for actual, expected in zip(*results):
        assert_close(actual, expected)


@pytest.mark.parametrize('clamp', [False, True])
def test_kernel_of_one_axis(clamp: bool):
    """On a single row the rows add a constant 1 to the weights of the columns, and the other way round."""
    q, k, v = inputs(1, 2, 1, 9, 3, 3)
    by_row = vicinity_attention(q, k, v, clamp=clamp)
    by_column = vicinity_attention(*(x.transpose(2, 3) for x in (q, k, v)), clamp=clamp)
    torch.testing.assert_close(by_row, by_column.transpose(2, 3), **TIGHT)

    q, k, v = (flat(x) for x in (q, k, v))
    angle = torch.arange(9, dtype=torch.float64) * math.pi / 18
    weights = (q @ k.transpose(-2, -1)) * (1 + (angle[:, None] - angle).cos())
    if not clamp:
        expected = weights @ v / (weights.sum(-1, keepdim=True) + 1e-4)
        torch.testing.assert_close(flat(by_row), expected, **TIGHT)


def test_kernel_favours_near_positions():
    """With q . k constant the output for a one-hot value is the kernel itself, largest at its own position."""
    H, W = 4, 5
    ones = torch.ones(1, 1, H, W, 1, dtype=torch.float64)
    v = torch.eye(H * W, dtype=torch.float64).reshape(1, 1, H, W, H * W)
    for locality in LOCALITIES:
        weights = flat(vicinity_attention(ones, ones, v, locality=locality, clamp=False, eps=0.))[0, 0]
        kernel = reference.vicinity_kernel(H, W, locality)
        torch.testing.assert_close(weights, kernel / kernel.sum(-1, keepdim=True), **TIGHT)
        assert locality == 'none' or weights.argmax(dim=-1).tolist() == list(range(H * W))


@settings(max_examples=40, deadline=None)
@given(
    H=st.integers(1, 7), W=st.integers(1, 7), heads=st.integers(1, 3), d=st.integers(1, 4), e=st.integers(1, 4),
    scale=st.sampled_from(SCALES), clamp=st.booleans(), locality=st.sampled_from(LOCALITIES),
    seed=st.integers(0, 10 ** 6))
def test_any_shape(H, W, heads, d, e, scale, clamp, locality, seed):
    q, k, v = inputs(1, heads, H, W, d, e, scale, seed)
    expected = steps(q, k, v, locality) if clamp else dense(q, k, v, locality)
    mask = settled(q, k, v, locality) if clamp else slice(None)
    out = vicinity_attention(q, k, v, locality, clamp)
    assert out.shape == expected.shape
    if expected[mask].numel():
        assert_close(out[mask], expected[mask])


@settings(max_examples=30, deadline=None)
@given(
    H=st.integers(1, 8), W=st.integers(1, 8), scale=st.sampled_from(SCALES),
    locality=st.sampled_from(['2d', '2d_product', 'none']), seed=st.integers(0, 10 ** 6))
def test_transposition(H, W, scale, locality, seed):
    """A transposed map gives the transposed output."""
    qkv = inputs(2, 2, H, W, 3, 3, scale, seed)
    out = vicinity_attention(*qkv, locality=locality)
    transposed = vicinity_attention(*(x.transpose(2, 3) for x in qkv), locality=locality)
    mask = settled(*qkv, locality)
    if mask.any():
        assert_close(transposed.transpose(2, 3)[mask], out[mask])


@pytest.mark.parametrize('H, W', [(5, 8), (9, 4)])
def test_module_transposition(H: int, W: int):
    module = VicinityAttention(16, 2, dtype=torch.float64)
    x = torch.randn(2, H, W, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x.transpose(1, 2)), module(x).transpose(1, 2), **TIGHT)


@pytest.mark.parametrize('clamp', [False, True])
def test_inputs_stay_as_they_are(clamp: bool):
    qkv = inputs(1, 2, 3, 4, 3, 3, dtype=torch.float32)
    before = [x.clone() for x in qkv]
    vicinity_attention(*qkv, clamp=clamp)
    assert all(torch.equal(x, y) for x, y in zip(qkv, before))


# clamp_magnitude

def test_clamp_magnitude():
    x = torch.tensor(
        [0., -0., 1e-30, -1e-30, 5e-5, -5e-5, 2e-4, -2e-4, 1., -3., 9999., 2e4, -2e4, 1e30, math.inf, -math.inf],
        dtype=torch.float64, requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    out, expected = clamp_magnitude(x), magnitude(plain)
    assert torch.equal(out, expected)
    cotangent = torch.randn_like(x)
    out.backward(cotangent)
    expected.backward(cotangent)
    assert torch.equal(x.grad, plain.grad)
    assert x.detach()[2] == 1e-30  # the input is not changed in place


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_clamp_magnitude_at_bounds(dtype: torch.dtype):
    """Clamped entries land on the bound exactly; there the output no longer tells whether it was: gradient 0."""
    x = torch.tensor([1e-4, -1e-4, 1e4, -1e4, 1e-5, 1e5, 2e-4, 5e3], dtype=dtype, requires_grad=True)
    out = clamp_magnitude(x)
    low, high = torch.tensor([CLAMP_MIN, CLAMP_MAX], dtype=dtype)
    assert torch.equal(out.detach()[:6], torch.stack([low, -low, high, -high, low, high]))
    out.sum().backward()
    assert x.grad.tolist() == [0] * 6 + [1, 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_clamp_magnitude_of_any_value(values):
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    out = clamp_magnitude(x)
    assert torch.equal(out, magnitude(x))
    inside = (x.detach().abs() > CLAMP_MIN) & (x.detach().abs() < CLAMP_MAX)
    out.sum().backward()
    assert torch.equal(x.grad, inside.double())


def test_clamp_magnitude_saves_its_output_only():
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda x: clamp_magnitude(x * 2.), x) == 4000


def test_dead_queries_and_keys():
    """Tokens whose q is dead give exact zeros, an all-dead head too, and finite gradients."""
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 3, 3, 2, 2, dtype=torch.float32))
    out = vicinity_attention(q * 0, k, v)
    assert out.eq(0).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    assert vicinity_attention(q, k * 0, v).eq(0).all()


# saturation

def test_saturated():
    """Constant maps: the sums grow with N, the cap of 1e4 then undoes the normalisation, as in the authors' code."""
    for size, value in ((4, .5), (30, .5), (30, 100.), (4, 1e-7)):
        q = k = torch.ones(1, 1, size, size, 1, dtype=torch.float64) * 3
        v = torch.full_like(q, value)
        kernel = reference.vicinity_kernel(size, size)
        denominator = 9 * kernel.sum(-1).reshape(1, 1, size, size, 1)
        unclamped = vicinity_attention(q, k, v, clamp=False)
        torch.testing.assert_close(unclamped, value * denominator / (denominator + 1e-4), **TIGHT)
        out = vicinity_attention(q, k, v)
        if size == 30 and value == .5:
            assert denominator.min() > 1e4
            assert (denominator * value).max() < 1e4
            torch.testing.assert_close(out, value * denominator / 1e4, **TIGHT)
        if size == 30 and value == 100.:
            # numerators cut at 1e4, then divided by the capped 1e4
            torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-6, atol=0)
        torch.testing.assert_close(out, steps(q, k, v), **TIGHT)


# half precision

@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize('autocast', [False, True])
def test_module_in_half_precision(autocast: bool, dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    module = VicinityAttention(32, 2)
    x = torch.randn(2, 12, 10, 32)
    expected = module(x).detach()
    with torch.autocast('cpu', dtype=dtype) if autocast else nullcontext():
        out = module(x) if autocast else module.to(dtype)(x.to(dtype))
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize('clamp', [False, True])
def test_large_map_in_half_precision(clamp: bool):
    """Sums over 128 x 128 positions pass 65504, the largest half-precision number."""
    q, k, v = inputs(1, 1, 128, 128, 4, 4, scale=(3., 3.), dtype=torch.float16)
    assert (k.float() * v.float().abs()).sum() > 65504
    out = vicinity_attention(q, k, v, clamp=clamp)
    assert out.dtype == torch.float16 and torch.isfinite(out).all()
    if not clamp:
        assert out.float().abs().max() <= v.abs().max().float()  # a weighted mean of the values
        wide = vicinity_attention(q.double(), k.double(), v.double(), clamp=False)
        torch.testing.assert_close(out.double(), wide, rtol=1e-3, atol=1e-4)


def test_dtype_and_device_arguments():
    module = VicinityAttention(8, 2, device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {('meta', torch.bfloat16)}
    assert module(torch.empty(2, 3, 4, 8, device='meta', dtype=torch.bfloat16)).shape == (2, 3, 4, 8)
    assert not list(VicinityAttention(8, 2).buffers())
