"""Vicinity attention against its O(N^2) form, against the authors' steps one by one, and in half precision."""
import math
from contextlib import nullcontext
from typing import Callable, Tuple

import pytest
import torch
from _numerics import TIGHT, assert_close, saved_bytes, value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st

from vitlinear.layers import VicinityAttention
from vitlinear.ops import clamp_magnitude, reference, vicinity, vicinity_attention
from vitlinear.ops.vicinity import CLAMP_MAX, CLAMP_MIN, LOCALITIES, SEPARABLE_FROM

FORMS = [(locality, 'features') for locality in LOCALITIES] + [('2d', 'separable'), ('2d', 'auto'), ('1d', 'auto')]
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


@pytest.mark.parametrize('H, W', GRIDS)
@pytest.mark.parametrize('locality, impl', FORMS)
def test_dense_form(locality: str, impl: str, H: int, W: int):
    q, k, v = inputs(2, 3, H, W, d=4, e=4)
    assert_same(
        lambda *x: vicinity_attention(*x, locality=locality, clamp=False, impl=impl),
        lambda *x: dense(*x, locality), q, k, v)


@pytest.mark.parametrize('impl', ['features', 'separable'])
@pytest.mark.parametrize('heads, d, e', [(1, 3, 7), (2, 5, 1), (5, 1, 2)])
def test_dense_form_of_any_value_width(impl: str, heads: int, d: int, e: int):
    q, k, v = inputs(2, heads, 4, 6, d, e)
    out = vicinity_attention(q, k, v, impl=impl)
    assert out.shape == (2, heads, 4, 6, e)
    assert_same(
        lambda *x: vicinity_attention(*x, clamp=False, impl=impl), lambda *x: dense(*x, '2d'), q, k, v)


@pytest.mark.parametrize('locality', LOCALITIES)
@pytest.mark.parametrize('clamp', [False, True])
@pytest.mark.parametrize('H, W', [(11, 93), (16, 64), (25, 41)])  # one position below, at and above the switch
def test_dense_form_around_the_switch(H: int, W: int, clamp: bool, locality: str):
    assert (H * W - SEPARABLE_FROM) in (-1, 0, 1)
    q, k, v = inputs(1, 2, H, W, d=3, e=3)
    expected = steps if clamp else dense
    assert_same(
        lambda *x: vicinity_attention(*x, locality=locality, clamp=clamp), lambda *x: expected(*x, locality), q, k, v)


@pytest.mark.parametrize('H, W, by_axes', [(11, 93, False), (16, 64, True)])
def test_auto_switches_by_size(monkeypatch, H: int, W: int, by_axes: bool):
    calls = []
    monkeypatch.setattr(vicinity, '_by_axes', lambda q, k, v, clamp, eps: calls.append(1) or v)
    vicinity_attention(*inputs(1, 1, H, W, 2, 2))
    assert bool(calls) == by_axes
    vicinity_attention(*inputs(1, 1, H, W, 2, 2), impl='features')
    vicinity_attention(*inputs(1, 1, H, W, 2, 2), locality='1d')
    assert bool(calls) == by_axes and len(calls) <= 1


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('locality, impl', FORMS[:5])
def test_clamped_steps(locality: str, impl: str, scale: Tuple[float, float]):
    """Every clamp is at work at one of the scales, see the next test."""
    q, k, v = inputs(2, 2, 5, 6, d=4, e=4, scale=scale)
    q[:, 0, 2] = 0  # dead queries, for exact zeros
    k[0, 1, ..., 1] = 0
    mask = settled(q, k, v, locality)
    assert mask.double().mean() > .6
    assert_same(
        lambda *x: vicinity_attention(*x, locality=locality, impl=impl), lambda *x: steps(*x, locality), q, k, v,
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


@pytest.mark.parametrize('impl', ['features', 'separable'])
@pytest.mark.parametrize('fpc_reduction, scale', [(1, 1.), (4, 1.), (1, .01), (2, 8.)])
def test_module_steps(impl: str, fpc_reduction: int, scale: float):
    """All six clamps of the authors' block in float64, outputs and gradients of input and parameters."""
    torch.manual_seed(0)
    C, heads, H, W = 12, 3, 6, 4
    module = VicinityAttention(C, heads, 2, fpc_reduction, impl=impl, dtype=torch.float64)
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
    for impl in ('features', 'separable') if locality == '2d' else ('features',):
        out = vicinity_attention(q, k, v, locality, clamp, impl=impl)
        assert out.shape == expected.shape
        if expected[mask].numel():
            assert_close(out[mask], expected[mask])


@settings(max_examples=30, deadline=None)
@given(
    H=st.integers(1, 8), W=st.integers(1, 8), scale=st.sampled_from(SCALES),
    locality=st.sampled_from(['2d', '2d_product', 'none']), impl=st.sampled_from(['features', 'separable']),
    seed=st.integers(0, 10 ** 6))
def test_transposition(H, W, scale, locality, impl, seed):
    """A transposed map gives the transposed output."""
    impl = impl if locality == '2d' else 'features'
    qkv = inputs(2, 2, H, W, 3, 3, scale, seed)
    out = vicinity_attention(*qkv, locality=locality, impl=impl)
    transposed = vicinity_attention(*(x.transpose(2, 3) for x in qkv), locality=locality, impl=impl)
    mask = settled(*qkv, locality)
    if mask.any():
        assert_close(transposed.transpose(2, 3)[mask], out[mask])


@pytest.mark.parametrize('impl', ['features', 'separable'])
@pytest.mark.parametrize('H, W', [(5, 8), (9, 4)])
def test_module_transposition(impl: str, H: int, W: int):
    module = VicinityAttention(16, 2, impl=impl, dtype=torch.float64)
    x = torch.randn(2, H, W, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x.transpose(1, 2)), module(x).transpose(1, 2), **TIGHT)


@settings(max_examples=15, deadline=None)
@given(
    H=st.integers(1, 6), W=st.integers(1, 6), impl=st.sampled_from(['features', 'separable']), clamp=st.booleans(),
    seed=st.integers(0, 10 ** 6))
def test_batch_of_one(H, W, impl, clamp, seed):
    """An image's output is its own: alone, in a batch, and beside a brighter one."""
    qkv = inputs(4, 2, H, W, 3, 3, seed=seed)
    qkv = tuple(torch.cat([x[:3], 5 * x[3:]]) for x in qkv)
    together = vicinity_attention(*qkv, clamp=clamp, impl=impl)
    for i in range(4):
        alone = vicinity_attention(*(x[i:i + 1] for x in qkv), clamp=clamp, impl=impl)
        torch.testing.assert_close(together[i:i + 1], alone, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('impl', ['features', 'separable'])
def test_strided_inputs(impl: str):
    """The views that a fused projection hands over, and expanded ones, count as any other tensor."""
    x = torch.randn(2, 4, 6, 3 * 2 * 5, dtype=torch.float64).abs()
    views = x.reshape(2, 4, 6, 3, 2, 5).permute(3, 0, 4, 1, 2, 5).unbind(0)
    out = vicinity_attention(*views, impl=impl)
    torch.testing.assert_close(out, vicinity_attention(*(u.contiguous() for u in views), impl=impl), **TIGHT)
    q = views[0][:, :1].expand(2, 2, 4, 6, 5)
    assert_same(
        lambda k, v: vicinity_attention(q, k, v, impl=impl), lambda k, v: steps(q, k, v), views[1], views[2])


@pytest.mark.parametrize('impl', ['features', 'separable'])
@pytest.mark.parametrize('clamp', [False, True])
def test_inputs_stay_as_they_are(impl: str, clamp: bool):
    qkv = inputs(1, 2, 3, 4, 3, 3, dtype=torch.float32)
    before = [x.clone() for x in qkv]
    vicinity_attention(*qkv, clamp=clamp, impl=impl)
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


def test_clamp_magnitude_scripted():
    x = torch.tensor([0., 1e-6, -1e-6, 3., -1e6])
    assert torch.equal(torch.jit.script(clamp_magnitude)(x), clamp_magnitude(x))


# gradients by finite differences

@pytest.mark.parametrize('H, W', [(2, 3), (3, 1)])
@pytest.mark.parametrize('locality', LOCALITIES)
@pytest.mark.parametrize('clamp', [False, True])
def test_gradcheck(clamp: bool, locality: str, H: int, W: int):
    """Away from every bound, so that the clamps let all gradients through."""
    g = torch.Generator().manual_seed(0)
    # all positive: no sum comes near zero
    q, k, v = (
        (.5 + torch.rand(2, 2, H, W, n, generator=g, dtype=torch.float64)).requires_grad_() for n in (3, 3, 2))
    assert torch.autograd.gradcheck(
        lambda *x: vicinity_attention(*x, locality=locality, clamp=clamp, impl='features'), (q, k, v))


@pytest.mark.parametrize('impl', ['features', 'separable'])
@pytest.mark.parametrize('scale', [(.03, .03, .003), (30., 30., 30.), (20., 20., 1.)])
def test_gradcheck_where_clamped(impl: str, scale: Tuple[float, float, float]):
    q, k, v = inputs(1, 2, 3, 4, 3, 3)
    q, k, v = ((s * (x + .1 * x.sign())).requires_grad_() for s, x in zip(scale, (q, k, v)))
    sites = []
    steps(q, k, v, sites=sites)
    # dead units sit at the kink of a magnitude, where no difference quotient exists: differentiate the others
    alive = [x.detach() != 0 for x in (q, k, v)]

    def attention(*values: torch.Tensor) -> torch.Tensor:
        full = [torch.zeros_like(a, dtype=torch.float64).masked_scatter(a, x) for a, x in zip(alive, values)]
        return vicinity_attention(*full, impl=impl)

    values = [x.detach()[a].requires_grad_() for x, a in zip((q, k, v), alive)]
    active = [int(((t.abs() < 1e-4) & (t != 0)).sum() + (t.abs() > 1e4).sum()) for t in sites]
    assert any(active), active
    assert torch.autograd.gradcheck(attention, values, eps=1e-7 * min(scale), atol=1e-4, rtol=1e-4)


# memory

@pytest.mark.parametrize('impl, maps', [('features', 5.2), ('separable', 9.5)])
def test_saved_for_backward(impl: str, maps: float):
    """Stage 1 at 224 px: so many (N, d) maps at most, less than half of what autograd keeps of the authors' steps."""
    qkv = inputs(1, 1, 56, 56, 48, 48, dtype=torch.float32)
    qkv = [x.requires_grad_() for x in qkv]
    one_map = 56 * 56 * 48 * 4
    ours = saved_bytes(lambda *x: vicinity_attention(*x, impl=impl), *qkv)
    plain = saved_bytes(steps, *qkv)
    assert ours <= maps * one_map, ours / one_map
    assert ours < plain / 2, (ours / one_map, plain / one_map)


def test_clamp_magnitude_saves_its_output_only():
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda x: clamp_magnitude(x * 2.), x) == 4000


def test_dead_queries_and_keys():
    """Tokens whose q is dead give exact zeros, an all-dead head too, and finite gradients."""
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 3, 3, 2, 2, dtype=torch.float32))
    for impl in ('features', 'separable'):
        out = vicinity_attention(q * 0, k, v, impl=impl)
        assert out.eq(0).all()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
        assert vicinity_attention(q, k * 0, v, impl=impl).eq(0).all()


# saturation

@pytest.mark.parametrize('impl', ['features', 'separable'])
def test_saturated(impl: str):
    """Constant maps: the sums grow with N, the cap of 1e4 then undoes the normalisation, as in the authors' code."""
    for size, value in ((4, .5), (30, .5), (30, 100.), (4, 1e-7)):
        q = k = torch.ones(1, 1, size, size, 1, dtype=torch.float64) * 3
        v = torch.full_like(q, value)
        kernel = reference.vicinity_kernel(size, size)
        denominator = 9 * kernel.sum(-1).reshape(1, 1, size, size, 1)
        unclamped = vicinity_attention(q, k, v, clamp=False, impl=impl)
        torch.testing.assert_close(unclamped, value * denominator / (denominator + 1e-4), **TIGHT)
        out = vicinity_attention(q, k, v, impl=impl)
        if size == 30 and value == .5:
            assert denominator.min() > 1e4 and (denominator * value).max() < 1e4 or (out <= 1.).all()
        if size == 30 and value == 100.:
            # numerators cut at 1e4, then divided by the capped 1e4
            torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-6, atol=0)
        torch.testing.assert_close(out, steps(q, k, v), **TIGHT)


def test_saturated_grows_with_the_denominator():
    """Between the cap of the denominators and that of the numerators the output is numerator / 1e4."""
    q = k = torch.full((1, 1, 20, 20, 1), 5., dtype=torch.float64)
    v = torch.full_like(q, .1)
    denominator = 25 * reference.vicinity_kernel(20, 20).sum(-1).reshape(1, 1, 20, 20, 1)
    assert denominator.min() > 1e4 and denominator.max() * .1 < 1e4
    for impl in ('features', 'separable'):
        torch.testing.assert_close(vicinity_attention(q, k, v, impl=impl), .1 * denominator / 1e4, **TIGHT)


# half precision

@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('locality, impl', FORMS)
def test_half_precision(locality: str, impl: str, dtype: torch.dtype, tolerance: float):
    q, k, v = (x.requires_grad_() for x in inputs(2, 2, 9, 7, 8, 8, dtype=dtype))
    out = vicinity_attention(q, k, v, locality, impl=impl)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = vicinity_attention(*wide, locality, impl=impl)
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))  # sums and tables in float32, one rounding at the end
    out.float().sum().backward()
    expected.sum().backward()
    for x, y in zip((q, k, v), wide):
        assert x.grad.dtype == dtype and torch.isfinite(x.grad).all()
        torch.testing.assert_close(x.grad.float(), y.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('impl', ['features', 'separable'])
def test_autocast_leaves_sums_alone(impl: str, dtype: torch.dtype):
    qkv = inputs(2, 2, 9, 7, 8, 8, dtype=torch.float32)

    def attention(*x):
        return vicinity_attention(*x, impl=impl)

    def attention_in_autocast(*x):
        with torch.autocast('cpu', dtype=dtype):
            out = attention(*x)
            assert torch.is_autocast_enabled('cpu')
        return out

    expected = value_and_grads(attention, *qkv)
    actual = value_and_grads(attention_in_autocast, *qkv)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


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
@pytest.mark.parametrize('impl', ['features', 'separable'])
def test_large_map_in_half_precision(impl: str, clamp: bool):
    """Sums over 128 x 128 positions pass 65504, the largest half-precision number."""
    q, k, v = inputs(1, 1, 128, 128, 4, 4, scale=(3., 3.), dtype=torch.float16)
    assert (k.float() * v.float().abs()).sum() > 65504
    out = vicinity_attention(q, k, v, clamp=clamp, impl=impl)
    assert out.dtype == torch.float16 and torch.isfinite(out).all()
    if not clamp:
        assert out.float().abs().max() <= v.abs().max().float()  # a weighted mean of the values
        wide = vicinity_attention(q.double(), k.double(), v.double(), clamp=False, impl=impl)
        torch.testing.assert_close(out.double(), wide, rtol=1e-3, atol=1e-4)


def test_scripted_equals_eager():
    qkv = inputs(1, 2, 5, 6, 3, 3, dtype=torch.float32)
    scripted = torch.jit.script(vicinity_attention)
    for locality, impl in FORMS:
        for clamp in (False, True):
            torch.testing.assert_close(
                scripted(*qkv, locality, clamp, 1e-4, impl), vicinity_attention(*qkv, locality, clamp, 1e-4, impl))


def test_dtype_and_device_arguments():
    module = VicinityAttention(8, 2, device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {('meta', torch.bfloat16)}
    assert module(torch.empty(2, 3, 4, 8, device='meta', dtype=torch.bfloat16)).shape == (2, 3, 4, 8)
    assert not list(VicinityAttention(8, 2).buffers())


@pytest.mark.parametrize('locality', ['2d', '2d_product', '1d', 'none'])
@pytest.mark.parametrize('clamp', [True, False])
def test_bands_of_inference(monkeypatch, locality: str, clamp: bool):
    """Without autograd, a large map is evaluated in bands of rows: same result, whatever their height."""
    torch.manual_seed(0)
    attn = VicinityAttention(24, 3, locality=locality, clamp=clamp).double()
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=.3)
    x = torch.randn(3, 33, 17, 24, dtype=torch.float64)
    norm = torch.nn.LayerNorm(24).double()
    expected, summed = attn(x), x + attn(norm(x))
    monkeypatch.setattr(attn, '_forward', None)  # not to be called
    strided = torch.cat([x, x], dim=2)[:, :, :17]
    for band in (1, 2000, 7000, 2 ** 15, 2 ** 18):  # of some rows, of an image, of two, of all
        monkeypatch.setattr(vicinity, 'BAND', band)
        with torch.no_grad():
            torch.testing.assert_close(attn(x), expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(attn.in_bands(x, norm), summed, rtol=1e-9, atol=1e-9)
            for copy in (x.clone(), strided.clone(memory_format=torch.preserve_format), strided[:]):
                before = copy.clone()
                torch.testing.assert_close(attn.in_bands(copy, norm, copy), summed, rtol=1e-9, atol=1e-9)
                assert not torch.equal(copy, before)
                copy.copy_(before)


@pytest.mark.parametrize('images', [1, 3])
def test_without_bands(images: int):
    """A layer whose order of evaluation is chosen is not taken in bands, with the norm and sum of a block as well."""
    torch.manual_seed(0)
    attn, norm = VicinityAttention(24, 3, impl='features').double(), torch.nn.LayerNorm(24).double()
    x = torch.randn(images, 33, 17, 24, dtype=torch.float64)
    expected = x + attn(norm(x))
    with torch.no_grad():
        torch.testing.assert_close(attn.in_bands(x, norm), expected, rtol=1e-9, atol=1e-9)
        assert attn.in_bands(x, norm, x) is x
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_bands_of_inference_in_half_precision(monkeypatch, dtype: torch.dtype):
    torch.manual_seed(0)
    attn = VicinityAttention(32, 2)
    norm = torch.nn.LayerNorm(32)
    x = torch.randn(2, 30, 30, 32)
    monkeypatch.setattr(vicinity, 'BAND', 5000)
    with torch.no_grad():
        expected = attn(x)
        with torch.autocast('cpu', dtype):
            mixed = attn(x)
            summed, parts = attn.in_bands(x, norm), x + attn(norm(x))
        half = attn.to(dtype)(x.to(dtype))
    assert mixed.dtype == half.dtype == dtype and summed.dtype == torch.float32
    assert (summed - parts).abs().max() < .01 * parts.abs().max()
    for out in (mixed, half):
        assert (out.float() - expected).abs().max() < .03 * expected.abs().max()
