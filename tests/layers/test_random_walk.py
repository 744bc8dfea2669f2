"""Random walk attention: against dense graphs, its series against solvers, the properties of the kernel, precision."""
import copy
import math
from typing import Optional, Tuple

import pytest
import torch
from _numerics import assert_close, saved_bytes, value_and_grads
from torch import nn

from vitlinear.layers import RandomWalkAttention
from vitlinear.ops import random_walk_attention, reference
from vitlinear.ops import random_walk as rw

SIZES = [(9, 9), (12, 7), (5, 11), (4, 4), (4, 3), (1, 1)]  # with r = 4: up to 4 nodes have a form of their own
F64 = dict(dtype=torch.float64)


def randn(*shape: int, seed: int = 0, **kwargs) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**kwargs)


def inputs(N: int, M: int, r: int = 4, e: int = 5, heads: int = 3, **kwargs) -> Tuple[torch.Tensor, ...]:
    return tuple(randn(2, heads, n, d, seed=i, **kwargs) for i, (n, d) in enumerate(((N, r), (M, r), (M, e))))


def kernel(q: torch.Tensor, k: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """The weights themselves (B, heads, N, M)."""
    identity = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return random_walk_attention(q, k, identity, *args, **kwargs)


def sums(p_q: torch.Tensor, p_k: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """H_q and H_k from features, with sums over nodes as in the formulas."""
    d_q = p_q @ p_k.sum(dim=-2, keepdim=True).mT
    d_k = p_k @ p_q.sum(dim=-2, keepdim=True).mT
    return p_q.mT @ (p_q / d_q), p_k.mT @ (p_k / d_k)


# dense references

@pytest.mark.parametrize('N, M', SIZES)
@pytest.mark.parametrize('features', ['softmax', 'elu'])
def test_walk(N: int, M: int, features: str):
    """Values and all gradients. Ten doublings leave nothing of beta = 0.9 in float64."""
    temperature, beta = torch.tensor([1., 2.5, 6.], **F64), torch.tensor([.1, .5, .9], **F64)

    def actual(q, k, v, beta, temperature=None):
        return random_walk_attention(q, k, v, beta, temperature, features=features, doublings=10)

    def expected(q, k, v, beta, temperature=None):
        p_q, p_k = (reference.random_walk_features(x, temperature) for x in (q, k))
        return reference.random_walk_attention(p_q, p_k, v, beta)

    args = (*inputs(N, M), beta, *([temperature] if features == 'softmax' else []))
    for a, b in zip(value_and_grads(actual, *args), value_and_grads(expected, *args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('N, M', SIZES)
@pytest.mark.parametrize('heads', [1, 3])
def test_spectral(N: int, M: int, heads: int):
    beta = torch.tensor([.1, .5, .9][:heads], **F64)

    def actual(q, k, v, beta):
        return random_walk_attention(q, k, v, beta, mode='spectral', features='signed', doublings=10)

    args = (*inputs(N, M, heads=heads), beta)
    expected = value_and_grads(reference.spectral_walk_attention, *args)
    for a, b in zip(value_and_grads(actual, *args), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('N, M', SIZES)
@pytest.mark.parametrize('weight', [.3, .95])
def test_references_agree(N: int, M: int, weight: float):
    """The definition over all N + M nodes, the form with M x M and the one with r x r, for both kinds of edges."""
    q, k, v = inputs(N, M)
    beta = torch.full((3,), weight ** 2, **F64)
    p_q, p_k = (reference.random_walk_features(x, torch.full((3,), 3., **F64)) for x in (q, k))
    edges = p_q @ p_k.mT
    stationary = (1 - weight ** 2) * reference.random_walk_graph(
        edges / edges.sum(dim=-1, keepdim=True), edges.mT / edges.mT.sum(dim=-1, keepdim=True), v, beta)
    assert_close(reference.random_walk_attention(p_q, p_k, v, beta), stationary)
    assert_close(reference.random_walk_solve(p_q, p_k, v, beta), stationary)

    q, k = (x / torch.linalg.svdvals(x).pow(16).sum(dim=-1).pow(1 / 16)[..., None, None] for x in (q, k))
    edges = q @ k.mT
    expected = reference.random_walk_graph(edges, edges.mT, v, beta)
    assert_close(reference.spectral_walk_attention(q, k, v, beta), expected)


def test_one_step_is_linear_attention():
    q, k, v = inputs(12, 7)
    expected = reference.linear_attention(q, k, v, eps=0.)
    assert_close(random_walk_attention(q, k, v, features='elu'), expected)
    assert_close(random_walk_attention(q, k, v, torch.zeros(3, **F64), features='elu'), expected)
    assert_close(
        random_walk_attention(q, k, v, mode='spectral', features='signed'),
        reference.spectral_walk_attention(q, k, v, torch.zeros(3, **F64)))


@pytest.mark.parametrize('beta', [None, .5])
@pytest.mark.parametrize('temperature', [None, 3.])
def test_both_forms_agree(beta: Optional[float], temperature: Optional[float]):
    """That of TorchScript, whose gradients are autograd's, and the one with a backward pass of its own."""
    beta, temperature = (None if x is None else torch.full((3, 1, 1), x, **F64) for x in (beta, temperature))
    more = [x for x in (beta, temperature) if x is not None]

    def unpack(fn):
        def call(q, k, v, *more):
            more = list(more)
            b = None if beta is None else more.pop(0)
            return fn(q, k, v, b, None if temperature is None else more.pop(0))
        return call

    def plain(q, k, v, b, t):
        return rw._walk(q, k, v, t, b, rw.DOUBLINGS)

    def own(q, k, v, b, t):
        return random_walk_attention(q, k, v, b, t, features='elu' if t is None else 'softmax')

    for sizes in ((12, 7), (4, 3)):
        args = (*inputs(*sizes), *more)
        for a, b in zip(value_and_grads(unpack(own), *args), value_and_grads(unpack(plain), *args), strict=True):
            assert_close(a, b)


def test_gradcheck():
    args = [x.requires_grad_() for x in (
        *(x[:1] for x in inputs(4, 3, r=2, e=1, heads=1)), torch.tensor([.8], **F64), torch.tensor([2.], **F64))]
    assert torch.autograd.gradcheck(random_walk_attention, args)

    def plain(q, k, v, beta, temperature):
        return rw._walk(q, k, v, temperature.reshape(-1, 1, 1), beta.reshape(-1, 1, 1), rw.DOUBLINGS)

    assert torch.autograd.gradgradcheck(plain, args)


@pytest.mark.parametrize('beta', [None, .5])
def test_both_signed_forms_agree(beta: Optional[float]):
    """That of compilers, whose gradients are autograd's, and the one with a backward pass of its own."""
    more = [] if beta is None else [torch.full((3, 1, 1), beta, **F64)]
    own, plain = (
        value_and_grads(lambda q, k, v, b=None, form=form: form(q, k, v, b, rw.DOUBLINGS), *inputs(12, 7), *more)
        for form in (rw._Spectral.apply, rw._spectral))
    for a, b in zip(own, plain, strict=True):
        assert_close(a, b)


# the series

@pytest.mark.parametrize('doublings', [5, 6, 7, 10])
def test_truncation(doublings: int):
    """At beta = 0.9 walks that are left out have a weight of 1e-6 after seven doublings; rows always sum to 1."""
    q, k, _ = inputs(40, 30, r=8)
    beta, temperature = torch.full((3,), .9, **F64), torch.full((3,), 4., **F64)
    weights = kernel(q, k, beta, temperature, doublings=doublings)
    p_q, p_k = (reference.random_walk_features(x, temperature) for x in (q, k))
    identity = torch.eye(30, **F64).expand(2, 3, -1, -1)
    exact = reference.random_walk_solve(p_q, p_k, identity, beta)
    left_out = .9 ** 2 ** doublings
    assert (weights - exact).abs().max() < left_out + 1e-12
    assert (weights - exact).abs().max() > .01 * left_out or doublings == 10
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 40, **F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize('features', ['softmax', 'elu'])
def test_series_is_the_solve_in_float32(features: str):
    """At the largest beta to less than 1e-5, on feature maps of the usual size."""
    q, k, v = (randn(1, 2, 1024, 32, seed=i) for i in range(3))
    beta, temperature = torch.full((2,), rw.MAX_BETA, **F64), torch.full((2,), 4., **F64)
    p_q, p_k = (reference.random_walk_features(x, temperature if features == 'softmax' else None) for x in (q, k))
    exact = reference.random_walk_solve(p_q, p_k, v, beta)
    out = random_walk_attention(
        q.float(), k.float(), v.float(), beta.float(), temperature.float(), features=features)
    assert (out - exact).norm() < 1e-5 * exact.norm()
    solved = reference.random_walk_solve(p_q.float(), p_k.float(), v.float(), beta.float())
    assert (out - solved).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize('beta, error', [(.5, 1e-6), (.9, 1e-5), (.99, 1e-4), (.999, 1e-3)])
def test_conditioning(beta: float, error: float):
    """Errors in float32 grow no faster than 1 / (1 - beta), the condition of the core."""
    q, k, v = (randn(1, 2, 1024, 32, seed=i) for i in range(3))
    b, temperature = torch.full((2,), beta, **F64), torch.full((2,), 4., **F64)
    exact = random_walk_attention(q, k, v, b, temperature, doublings=16)
    out = random_walk_attention(q.float(), k.float(), v.float(), b.float(), temperature.float(), doublings=16)
    assert (out - exact).norm() < error * exact.norm()


def test_series():
    """Of steps that are not symmetric."""
    step, start = .3 * randn(2, 6, 6), randn(2, 6, 3, seed=1)
    powers, expected = torch.eye(6, **F64).expand(2, 6, 6), torch.zeros(2, 6, 3, **F64)
    for _ in range(8):
        expected, powers = expected + powers @ start, powers @ step
    assert_close(rw.walk_series(step, start, 3), expected)


def test_no_more_doublings_than_float32_sees():
    """In training on a CPU; a float64 module, evaluation and compiled graphs take them all."""
    assert [rw._enough_doublings(torch.tensor([.01, beta])) for beta in (.01, .107, .3, .5, .7, .9, math.nan)] == [
        2, 3, 4, 5, 6, 7, 7]
    module, x = RandomWalkAttention(16, 2, mode='walk'), torch.randn(2, 5, 5, 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(module.qkv.weight)
    taken, series = [], rw.walk_series

    def count(step, start, doublings):
        taken.append(doublings)
        return series(step, start, doublings)

    outs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rw, 'walk_series', count)
        for beta in (.107, .8):
            nn.init.constant_(module.theta, math.log(beta / (rw.MAX_BETA - beta)))
            for training in (True, False):
                params = list(module.train(training).parameters())
                out = module(x)
                outs.append([out, *torch.autograd.grad(out.square().sum(), params)])
        module.double().train()(x.double())
    assert taken == [3, 3, 7, 7, 7, 7, 7, 7, 7]  # a gradient is another series
    for short, full in zip(outs[::2], outs[1::2]):
        for a, b in zip(short, full, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_at_the_largest_beta():
    """Those of the inverse, to 1e-5 of those of the series that is evaluated."""
    args = *inputs(40, 30, r=8), torch.full((3, 1, 1), rw.MAX_BETA, **F64), torch.full((3, 1, 1), 4., **F64)
    plain = value_and_grads(lambda q, k, v, b, t: rw._walk(q, k, v, t, b, rw.DOUBLINGS), *args)
    for a, b in zip(value_and_grads(random_walk_attention, *args), plain, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


# the kernel

@pytest.mark.parametrize('features', ['softmax', 'elu'])
@pytest.mark.parametrize('beta', [0., .5, .9])
def test_weights_are_a_distribution(features: str, beta: float):
    """Positive rows that sum to 1, so outputs lie within the range of the values."""
    q, k, v = (10 * x for x in inputs(12, 7))
    beta, temperature = torch.full((3,), beta, **F64), torch.full((3,), 4., **F64)
    weights = kernel(q, k, beta, temperature, features=features)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 12, **F64), rtol=1e-10, atol=0)
    out = random_walk_attention(q, k, v, beta, temperature, features=features)
    assert_close(out, weights @ v)
    assert (out <= v.amax(dim=2, keepdim=True) + 1e-9).all() and (out >= v.amin(dim=2, keepdim=True) - 1e-9).all()


def test_invariances():
    """Order of the keys, of the queries, and the size of both."""
    q, k, v = inputs(12, 7)
    beta, temperature = torch.full((3,), .8, **F64), torch.full((3,), 4., **F64)
    out = random_walk_attention(q, k, v, beta, temperature)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert_close(random_walk_attention(q, k[:, :, order], v[:, :, order], beta, temperature), out)
    assert_close(random_walk_attention(q.flip(2), k, v, beta, temperature), out.flip(2))
    assert_close(random_walk_attention(1e3 * q, .1 * k, v, beta, temperature), out, rtol=1e-4, atol=1e-4)
    # features of any size, from which degrees take it out again
    p_q, p_k = (reference.random_walk_features(x, temperature) for x in (q, k))
    expected = reference.random_walk_solve(p_q, p_k, v, beta)
    assert_close(reference.random_walk_solve(50 * p_q, .02 * p_k, v, beta), expected)


@pytest.mark.parametrize('temperature', [None, 1., 4., 16.])
def test_core_is_never_singular(temperature: Optional[float]):
    """Eigenvalues of H_k H_q lie in [0, 1], with 1 at known vectors: those of the core start at 1 - beta."""
    q, k, _ = (3 * x for x in inputs(50, 30, r=8))
    t = None if temperature is None else torch.full((3, 1, 1), temperature, **F64)
    p_q, p_k = rw._features(q, t), rw._features(k, t)
    h_q, h_k = sums(p_q, p_k)
    values = torch.linalg.eigvals(h_k @ h_q)
    assert values.imag.abs().max() < 1e-9
    assert values.real.min() > -1e-9 and values.real.max() < 1 + 1e-9
    right, left = p_k.sum(dim=2).unsqueeze(-1), p_q.sum(dim=2).unsqueeze(-2)
    assert_close(h_k @ h_q @ right, right)
    assert_close(left @ h_k @ h_q, left)


@pytest.mark.parametrize('scale', [1e-3, 1., 1e3])
def test_spectral_norm_is_bounded(scale: float):
    """By 1, of which the bound leaves at least r^(-1/8), so that beta < 1 is enough for the series to converge."""
    for i in range(5):
        q, k, _ = (scale * x for x in inputs(40, 30, r=8))
        q[..., :i] *= 10
        k[..., :i] = k[..., :1]
        norm = torch.linalg.matrix_norm(kernel(q, k, mode='spectral', features='signed'), ord=2)
        bounds = [torch.linalg.matrix_norm(x, ord=2) / rw._norm_bound(x.mT @ x)[..., 0, 0].sqrt() for x in (q, k)]
        assert norm.max() <= 1 + 1e-9
        assert all(8 ** (-1 / 16) - 1e-9 <= b.min() and b.max() <= 1 + 1e-9 for b in bounds)


def second_eigenvalue(p_q: torch.Tensor, p_k: torch.Tensor) -> torch.Tensor:
    h_q, h_k = sums(p_q, p_k)
    return torch.linalg.eigvals(h_k @ h_q).real.sort(dim=-1).values[..., -2]


def beyond_one_step(features: str, beta: float = .9) -> float:
    """Share of the walk's output that is neither the output of one step nor the mean over the tokens."""
    q, k, v = (randn(1, 2, 256, 32, seed=i) for i in range(3))
    centres = randn(1, 2, 10, 32, seed=4)
    q, k = (.5 * x + centres[:, :, torch.arange(256) % 10] for x in (q, k))  # ten kinds of tokens
    temperature = torch.full((2,), 4., **F64)
    out = random_walk_attention(q, k, v, torch.full((2,), beta, **F64), temperature, features=features)
    one = random_walk_attention(q, k, v, None, temperature, features=features)
    basis = torch.stack([one.flatten(2), out.mean(dim=2, keepdim=True).expand_as(out).flatten(2)], dim=-1)
    rest = out.flatten(2).unsqueeze(-1) - basis @ torch.linalg.lstsq(basis, out.flatten(2).unsqueeze(-1)).solution
    return (rest.norm() / (out - out.mean(dim=2, keepdim=True)).norm()).item()


def test_steps_beyond_the_first_make_a_difference():
    """With softmax features at their first temperature; with elu + 1 they lead to the mean and nowhere else."""
    q, k = (randn(1, 2, 1024, 32, seed=i) for i in range(2))
    module = RandomWalkAttention(64, 2, mode='walk', **F64)
    peaked = [rw._features(x, module.temperature().reshape(-1, 1, 1)) for x in (q, k)]
    flat = [rw._features(x, None) for x in (q, k)]
    assert second_eigenvalue(*peaked).min() > .1
    assert second_eigenvalue(*flat).max() < .01
    assert beyond_one_step('softmax') > 5 * beyond_one_step('elu')


def test_long_walks_forget_where_they_began():
    """Towards beta = 1 outputs become one mean of the values, which is the same for every query."""
    q, k, v = inputs(12, 7)
    temperature = torch.full((3,), 4., **F64)
    spread = [
        random_walk_attention(q, k, v, torch.full((3,), b, **F64), temperature, doublings=16).std(dim=2).mean()
        for b in (0., .5, .9, .999)]
    assert spread == sorted(spread, reverse=True) and spread[-1] < .1 * spread[0]


# precision and gradients

@pytest.mark.parametrize('dtype, error', [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize('mode, features', [('walk', 'softmax'), ('walk', 'elu'), ('spectral', 'signed')])
def test_half_precision(dtype: torch.dtype, error: float, mode: str, features: str):
    """Inputs and outputs are rounded and nothing in between, whether autocast is on or not."""
    args = [randn(1, 2, 1024, 16, seed=i).to(dtype) for i in range(3)]
    beta, temperature = torch.full((2,), .9), torch.full((2,), 4.)
    out = random_walk_attention(*args, beta, temperature, mode, features)
    wide = random_walk_attention(*(x.float() for x in args), beta, temperature, mode, features)
    assert out.dtype == dtype and torch.equal(out, wide.to(dtype))
    with torch.autocast('cpu', dtype=dtype):
        again = random_walk_attention(*(x.float() for x in args), beta, temperature, mode, features)
    assert torch.equal(wide, again)
    exact = random_walk_attention(*(x.double() for x in (*args, beta, temperature)), mode, features)
    assert (out.double() - exact).abs().max() < error * exact.abs().max()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kwargs', [dict(mode='walk'), dict(mode='walk', features='elu'), dict(mode='spectral')])
@pytest.mark.parametrize('value', [0., 1., 300.])
def test_many_equal_tokens(dtype: torch.dtype, kwargs, value: float):
    """16,384 of them, where sums over tokens leave the range of half precision."""
    torch.manual_seed(0)
    module = RandomWalkAttention(32, 1, init_beta=.89, **kwargs).to(dtype)
    x = torch.full((1, 128, 128, 32), value, dtype=dtype, requires_grad=True)
    out = module(x)
    out.float().mean().backward()
    assert out.dtype == dtype and torch.isfinite(out).all() and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    with torch.no_grad():
        torch.testing.assert_close(module(x), out, rtol=.02, atol=.02 * out.abs().max().item())


@pytest.mark.parametrize('kwargs', [dict(mode='walk'), dict(mode='walk', features='elu'), dict(mode='spectral')])
def test_zero_queries_and_keys(kwargs):
    module = RandomWalkAttention(8, 2, **kwargs)
    nn.init.zeros_(module.qkv.weight)
    module(torch.randn(1, 4, 4, 8)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_queries_without_a_key():
    """Where queries and keys share no anchor degrees meet their bound: finite, and gradients those of the formula."""
    q = torch.eye(4, **F64)[:2].expand(1, 1, 2, 4) + .01 * randn(1, 1, 2, 4)
    k = torch.eye(4, **F64)[2:].expand(1, 1, 2, 4) + .01 * randn(1, 1, 2, 4, seed=1)
    v, beta, temperature = randn(1, 1, 2, 3, seed=2), *(torch.full((1, 1, 1), x, **F64) for x in (.5, 16.))
    p_q, p_k = rw._features(q, temperature), rw._features(k, temperature)
    assert (p_q @ p_k.mean(dim=2, keepdim=True).mT).max() < rw.MIN_DEGREE
    args = q, k, v, beta, temperature
    forms = rw._walk, rw._walk_of_few, rw._Walk.apply
    plain, *others = (
        value_and_grads(lambda q, k, v, b, t, form=form: form(q, k, v, t, b, rw.DOUBLINGS), *args) for form in forms)
    for other in others:
        for a, b in zip(other, plain, strict=True):
            assert torch.isfinite(a).all()
            assert_close(a, b)


def test_gradients_stay_bounded_towards_one():
    """Those of queries; that of beta itself vanishes, since its parameter saturates."""
    q, k, v = (randn(1, 2, 64, 8, seed=i) for i in range(3))
    temperature, sizes = torch.full((2,), 4., **F64), []
    for beta in (.5, .9, .99, .999):
        _, grad, *_ = value_and_grads(
            lambda q, beta=beta: random_walk_attention(
                q, k, v, torch.full((2,), beta, **F64), temperature, doublings=14), q) + (None,)
        sizes.append(grad.norm().item())
    assert max(sizes) < 3 * sizes[0]

    module, grads = RandomWalkAttention(16, 2, mode='walk', **F64), []
    x = randn(1, 8, 8, 16)
    for theta in (0., 4., 8.):
        nn.init.constant_(module.theta, theta)
        module.zero_grad()
        (module(x) * randn(1, 8, 8, 16, seed=1)).sum().backward()
        grads.append(module.theta.grad.norm().item())
    assert grads[0] > 3 * grads[1] > 9 * grads[2] > 0


def test_saved_memory():
    """Queries, keys and values, not their features; under autocast in half precision."""
    q, k, v = (torch.randn(1, 2, 1024, 32, requires_grad=True) for _ in range(3))
    beta, temperature = torch.full((2,), .5, requires_grad=True), torch.full((2,), 4., requires_grad=True)
    size = saved_bytes(random_walk_attention, q, k, v, beta, temperature)
    assert size < 3.2 * q.nbytes
    plain = saved_bytes(
        lambda q, k, v, b, t: rw._walk(q, k, v, t, b, rw.DOUBLINGS), q, k, v, beta.detach().view(2, 1, 1),
        temperature.detach().view(2, 1, 1))
    assert plain > 2.5 * size
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    assert saved_bytes(random_walk_attention, *half, beta, temperature) < 1.7 * q.nbytes
    for args, most in (((q, k, v), 3.2), (half, 1.7)):
        assert saved_bytes(lambda *x: random_walk_attention(*x, beta, mode='spectral', features='signed'), *args) < \
            most * q.nbytes


# the module

VARIANTS = [
    {}, dict(init_beta=0.), dict(features='elu'), dict(features='elu', init_beta=0.), dict(mode='spectral'),
    dict(mode='spectral', init_beta=0.), dict(qkv_bias=False), dict(shared_anchors=True)]


def module_of(dim: int = 16, heads: int = 2, **kwargs) -> RandomWalkAttention:
    """With weights large enough to make every part count."""
    torch.manual_seed(0)
    module = RandomWalkAttention(dim, heads, **{**F64, 'mode': 'walk', **kwargs})
    for name, p in module.named_parameters():
        if name in ('theta', 'log_temperature'):
            p.data += torch.randn_like(p)
        else:
            nn.init.normal_(p, std=dim ** -.5)
    return module


@pytest.mark.parametrize('kwargs', VARIANTS, ids=str)
@pytest.mark.parametrize('H, W', [(5, 8), (1, 1)])
def test_module(kwargs, H: int, W: int):
    """Against the dense graph, with the gradients of all parameters."""
    module, x = module_of(**kwargs), randn(2, H, W, 16)

    def by_hand(x, *params):
        *q, k, v = (u.unflatten(-1, (2, -1)).transpose(1, 2) for u in module.qkv(x).flatten(1, 2).split(16, dim=-1))
        q = q[0] if q else k
        beta = torch.zeros(2, **F64) if module.theta is None else .9 * module.theta.sigmoid()
        if kwargs.get('mode') == 'spectral':
            out = reference.spectral_walk_attention(q, k, v, beta)
        else:
            t = None if module.log_temperature is None else module.log_temperature.exp()
            p_q, p_k = (reference.random_walk_features(u, t) for u in (q, k))
            out = reference.random_walk_attention(p_q, p_k, v, beta)
        return module.proj(out.transpose(1, 2).flatten(2)).unflatten(1, (H, W))

    params = list(module.parameters())
    results = []
    for fn in (lambda x, *p: module(x), by_hand):
        x = x.detach().requires_grad_()
        out = fn(x, *params)
        results.append([out, *torch.autograd.grad((out * randn(*out.shape, seed=3)).sum(), [x, *params])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # what seven doublings leave out, and its derivative


def test_parameters():
    """4 (C^2 + C) weights and a temperature and a beta for each head; ablations have none that they do not use."""
    def count(**kwargs):
        module = RandomWalkAttention(64, 2, device='meta', **{'mode': 'walk', **kwargs})
        return sum(p.numel() for p in module.parameters())

    default = RandomWalkAttention(64, 2)
    assert (default.mode, default.features, default.log_temperature) == ('spectral', 'signed', None)
    weights = 4 * (64 ** 2 + 64)
    assert count() == weights + 2 * 2
    assert count(features='elu') == count(init_beta=0.) == count(mode='spectral') == weights + 2
    assert count(features='elu', init_beta=0.) == count(mode='spectral', init_beta=0.) == weights
    assert count(qkv_bias=False) == weights + 4 - 3 * 64
    assert count(shared_anchors=True) == weights + 4 - (64 ** 2 + 64)


def test_initial_values():
    module = RandomWalkAttention(64, 2, mode='walk')
    torch.testing.assert_close(module.beta(), torch.full((2,), .107))
    torch.testing.assert_close(module.temperature(), torch.full((2,), 4.))
    assert module.theta.mean().item() == pytest.approx(-2, abs=.01)
    module = RandomWalkAttention(64, 2, mode='walk', init_beta=.45, init_temperature=10.)
    nn.init.constant_(module.theta, float('nan'))
    nn.init.constant_(module.log_temperature, float('nan'))
    module.reset_parameters()
    torch.testing.assert_close(module.beta(), torch.full((2,), .45))
    torch.testing.assert_close(module.temperature(), torch.full((2,), 10.))
    assert RandomWalkAttention(64, 2, init_beta=0.).beta() is None
    assert RandomWalkAttention(64, 2, mode='walk', features='elu').temperature() is None


def test_learned_values_stay_in_range():
    module = RandomWalkAttention(64, 2, mode='walk')
    for value, beta, temperature in ((-1e4, 0., .5), (1e4, .9, 16.)):
        nn.init.constant_(module.theta, value)
        nn.init.constant_(module.log_temperature, value)
        torch.testing.assert_close(module.beta(), torch.full((2,), beta))
        torch.testing.assert_close(module.temperature(), torch.full((2,), temperature))
        assert torch.isfinite(module(torch.randn(1, 4, 4, 64))).all()


@pytest.mark.parametrize('kwargs', VARIANTS, ids=str)
@pytest.mark.parametrize('band, kept', [(1, 2 ** 23), (3000, 2 ** 23), (3000, 0), (2 ** 18, 2 ** 23)])
def test_inference_in_bands(monkeypatch, kwargs, band: int, kept: int):
    """The same as at once, alone and with the norm and the sum around it, for images of any layout."""
    monkeypatch.setattr(rw, 'BANDS_FROM', 30)
    monkeypatch.setattr(rw, 'BAND', band)
    monkeypatch.setattr(rw, 'KEPT', kept)
    module, norm = module_of(**kwargs).eval(), nn.LayerNorm(16, **F64)
    for shape in ((1, 13, 11, 16), (3, 5, 7, 16), (2, 40, 1, 16), (2, 1, 40, 16), (2, 4, 4, 16)):
        contiguous = randn(*shape)
        for x in (contiguous, contiguous.transpose(1, 2).contiguous().transpose(1, 2)):
            expected = module(x).detach(), (x + module(norm(x))).detach()
            before = x.clone()
            for context in (torch.no_grad, torch.inference_mode):
                with context():
                    assert_close(module(x), expected[0])
                    assert_close(module.in_bands(x, norm), expected[1])
            assert torch.equal(x, before)
            with torch.no_grad():
                assert_close(module.in_bands(x, norm, x), expected[1])


@pytest.mark.parametrize('dtype, error', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_precision_of_inference(monkeypatch, dtype: torch.dtype, error: float):
    """In half precision, and under autocast, as in training."""
    monkeypatch.setattr(rw, 'BANDS_FROM', 30)
    monkeypatch.setattr(rw, 'BAND', 3000)
    module, norm, x = module_of(), nn.LayerNorm(16, **F64), randn(2, 13, 11, 16)
    exact = (x + module(norm(x))).detach()
    module.float(), norm.float()
    with torch.no_grad():
        with torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32):
            mixed = module.in_bands(x.float(), norm)
        low = [copy.deepcopy(m).to(dtype) for m in (module, norm)]
        half = low[0].in_bands(x.to(dtype), low[1])
    assert mixed.dtype == torch.float32 and half.dtype == dtype
    for out in (mixed, half):
        assert (out.double() - exact).abs().max() < error * exact.abs().max()


@pytest.mark.parametrize('train', [False, True])
def test_amp_is_close_to_float32(train: bool):
    """To 1e-2, also with most of the weight on long walks."""
    module, x = module_of(64, 2, dtype=torch.float32), randn(2, 28, 28, 64).float()
    nn.init.constant_(module.theta, 3.)
    nn.init.constant_(module.log_temperature, math.log(4))
    module.train(train)
    with torch.set_grad_enabled(train):
        expected = module(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = module(x)
    assert out.dtype == torch.bfloat16 and (out.float() - expected).abs().max() < 1e-2 * expected.abs().max()


def test_inference_respects_what_replaces_a_layer(monkeypatch):
    monkeypatch.setattr(rw, 'BANDS_FROM', 1)
    module, x, calls = module_of(), randn(1, 8, 8, 16), []
    for layer in (module.qkv, module.proj):
        handle = layer.register_forward_hook(lambda m, args, out: calls.append(m) or 2 * out)
        expected = module(x).detach()
        with torch.no_grad():
            assert_close(module(x), expected)
        assert calls == [layer, layer]
        calls.clear()
        handle.remove()


@pytest.mark.parametrize('kwargs', VARIANTS, ids=str)
def test_torchscript(kwargs):
    module = module_of(**kwargs)
    scripted = torch.jit.script(module)
    for shape in ((2, 5, 8, 16), (1, 3, 3, 16)):
        x = randn(*shape)
        assert_close(scripted(x), module(x))
        with torch.no_grad():
            assert_close(scripted(x), module(x))


@pytest.mark.parametrize('kwargs', [{}, dict(mode='spectral')], ids=str)
def test_export_has_no_solver(kwargs):
    """And sizes stay free."""
    module, x = module_of(**kwargs), randn(2, 5, 8, 16)
    dynamic = dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(module.eval(), (x,), dynamic_shapes=(dynamic,))
    operators = {str(node.target) for node in exported.graph.nodes if node.op == 'call_function'}
    assert not [name for name in operators if any(word in name for word in ('linalg', 'solve', 'inv', 'autograd'))]
    assert any('exp' in name or 'softmax' in name for name in operators) or kwargs
    for shape in ((2, 5, 8, 16), (3, 7, 4, 16)):
        assert_close(exported.module()(randn(*shape)), module(randn(*shape)))


# bad input

@pytest.mark.parametrize('kwargs, words', [
    (dict(mode='jump'), ["mode 'jump'", 'walk', 'spectral']),
    (dict(features='relu'), ["features 'relu'", "mode='walk'", 'softmax', 'elu']),
    (dict(mode='spectral', features='elu'), ["features 'elu'", "mode='spectral'", 'signed']),
    (dict(features='signed'), ["features 'signed'", 'softmax']),
    (dict(init_beta=.9), ['init_beta=0.9', 'between 0 and 0.9']),
    (dict(init_beta=-.1), ['init_beta=-0.1']),
    (dict(init_beta=float('nan')), ['init_beta=nan']),
    (dict(init_temperature=.1), ['init_temperature=0.1', '0.5', '16']),
    (dict(init_temperature=17), ['init_temperature=17']),
    (dict(num_heads=3), ['dim=16', 'num_heads=3']),
])
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError) as e:
        RandomWalkAttention(**{'dim': 16, 'num_heads': 2, 'mode': 'walk', **kwargs})
    assert all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize('kwargs, words', [
    (dict(), ['temperature=None', "features='softmax'"]),
    (dict(mode='jump'), ["mode 'jump'"]),
    (dict(mode='spectral'), ["features 'softmax'", 'signed']),
    (dict(features='elu', doublings=0), ['doublings=0', 'positive']),
])
def test_bad_options_of_the_function(kwargs, words):
    with pytest.raises(ValueError) as e:
        random_walk_attention(*inputs(4, 4), **kwargs)
    assert all(word in str(e.value) for word in words), e.value
