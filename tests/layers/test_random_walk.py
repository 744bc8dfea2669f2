"""Random walk attention: references that agree, properties of the kernel, and the layer."""
import math

import pytest
import torch
from torch import nn

from _numerics import assert_close, in_row_blocks
from vitlinear.layers import RandomWalkAttention
from vitlinear.ops import random_walk_attention, reference, use, walk_series
from vitlinear.ops.primitives.walk_series.signed import norm_bound

F64 = dict(dtype=torch.float64)


def randn(*shape: int, seed: int = 0, **kwargs) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**kwargs)


def inputs(N: int, M: int, r: int = 4, e: int = 5, heads: int = 3) -> tuple[torch.Tensor, ...]:
    return tuple(randn(2, heads, n, d, seed=i) for i, (n, d) in enumerate(((N, r), (M, r), (M, e))))


def kernel(q: torch.Tensor, k: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """The weights themselves (B, heads, N, M)."""
    identity = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return random_walk_attention(q, k, identity, *args, **kwargs)


@pytest.mark.parametrize(('N', 'M'), [(9, 9), (12, 7), (5, 11), (4, 3), (1, 1)])
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


@pytest.mark.parametrize('implementation', sorted(walk_series.implementations))
@pytest.mark.parametrize('radius', [0., .5, .9])
def test_series_is_the_solve(implementation: str, radius: float):
    """And so are its gradients; 10 doublings leave nothing in float64."""
    step = randn(2, 3, 4, 4)
    step = (step * (radius / torch.linalg.matrix_norm(step, ord=2)[..., None, None])).requires_grad_()
    start = randn(2, 3, 4, 5, seed=1).requires_grad_()
    with use(implementation):
        out = walk_series(step, start, 10)
    expected = torch.linalg.solve(torch.eye(4, **F64) - step, start)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(torch.autograd.grad(out.sin().sum(), (step, start)),
                    torch.autograd.grad(expected.sin().sum(), (step, start)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('beta', [0., .107, .5, .9])
def test_weights_of_walks_are_a_distribution(beta: float):
    q, k, v = inputs(12, 9)
    beta, temperature = torch.full((3,), beta, **F64), torch.tensor([1., 4., 16.], **F64)
    weights = kernel(q, k, beta, temperature, mode='walk')
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 12, **F64))
    out = random_walk_attention(q, k, v, beta, temperature, mode='walk')
    assert (out.amax(dim=2) <= v.amax(dim=2) + 1e-12).all()


def test_norm_of_signed_steps_is_bounded():
    """Of one step by 1, whatever the size of queries and keys; the bound is at most r^(1/8) too large."""
    for size in (1e-3, 1., 1e3):
        q, k, _ = inputs(12, 9)
        q, k = size * q, k / size
        norms = torch.linalg.matrix_norm(kernel(q, k), ord=2)
        assert (norms <= 1).all()
        for x in (q, k):
            ratio = norm_bound(x.mT @ x)[..., 0, 0].sqrt() / torch.linalg.matrix_norm(x, ord=2)
            assert (ratio >= 1 - 1e-12).all()
            assert (ratio <= 4 ** (1 / 16) + 1e-12).all()


def test_steps_beyond_the_first_make_a_difference():
    q, k, v = inputs(40, 30, r=8)
    beta = torch.full((3,), .9, **F64)
    for mode, temperature in (('spectral', None), ('walk', torch.full((3,), 4., **F64))):
        many = random_walk_attention(q, k, v, beta, temperature, mode)
        one = random_walk_attention(q, k, v, None, temperature, mode)
        assert (many - one).abs().max() > .05 * one.abs().max()


# the layer

VARIANTS = [dict(mode='walk'), dict(mode='walk', init_beta=0.), {}, dict(init_beta=0.), dict(qkv_bias=False)]


def module_of(dim: int = 16, heads: int = 2, **kwargs) -> RandomWalkAttention:
    """With weights large enough to make every part count."""
    torch.manual_seed(0)
    module = RandomWalkAttention(dim, heads, **{**F64, **kwargs})
    for name, p in module.named_parameters():
        if name in ('theta', 'log_temperature'):
            p.data += torch.randn_like(p)
        else:
            nn.init.normal_(p, std=dim ** -.5)
    return module


@pytest.mark.parametrize('kwargs', VARIANTS, ids=str)
@pytest.mark.parametrize(('H', 'W'), [(5, 8), (1, 1)])
def test_module(kwargs, H: int, W: int):
    """Against the dense graph, with the gradients of all parameters."""
    module, x = module_of(**kwargs), randn(2, H, W, 16)

    def by_hand(x):
        q, k, v = (u.unflatten(-1, (2, -1)).transpose(1, 2) for u in module.qkv(x).flatten(1, 2).split(16, dim=-1))
        beta = torch.zeros(2, **F64) if module.theta is None else .9 * module.theta.sigmoid()
        if module.mode == 'spectral':
            out = reference.spectral_walk_attention(q, k, v, beta)
        else:
            p_q, p_k = (reference.random_walk_features(u, module.log_temperature.exp()) for u in (q, k))
            out = reference.random_walk_attention(p_q, p_k, v, beta)
        return module.proj(out.transpose(1, 2).flatten(2)).unflatten(1, (H, W))

    params, results = list(module.parameters()), []
    for fn in (module, by_hand):
        x = x.detach().requires_grad_()
        out = fn(x)
        results.append([out, *torch.autograd.grad((out * randn(*out.shape, seed=3)).sum(), [x, *params])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # what seven doublings leave out, and its derivative
    module.reparameterize()
    torch.testing.assert_close(module(x), results[0][0])


@pytest.mark.parametrize(('dtype', 'error'), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('kwargs', VARIANTS, ids=str)
def test_row_blocks(kwargs, dtype: torch.dtype, error: float):
    """Maps above and below the size from which an image goes by itself, in half precision as well."""
    module = module_of(**kwargs)
    for H, W in ((26, 23), (5, 8)):
        x = randn(2, H, W, 16)
        exact = module(x).detach()
        out = in_row_blocks(module.to(dtype), x.to(dtype), 3000)
        assert out.dtype == dtype
        assert (out.double() - exact).abs().max() < error * exact.abs().max()
        module.double()


def test_parameters():
    """4 (C^2 + C) weights, a beta for each head and, of walks, a temperature."""
    def count(**kwargs):
        return sum(p.numel() for p in RandomWalkAttention(64, 2, device='meta', **kwargs).parameters())

    default = RandomWalkAttention(64, 2)
    assert (default.mode, default.log_temperature) == ('spectral', None)
    weights = 4 * (64 ** 2 + 64)
    assert count(mode='walk') == weights + 2 * 2
    assert count() == count(mode='walk', init_beta=0.) == weights + 2
    assert count(init_beta=0.) == weights
    assert count(qkv_bias=False) == weights + 2 - 3 * 64


def test_initial_values():
    module = RandomWalkAttention(64, 2, mode='walk')
    torch.testing.assert_close(module.beta(), torch.full((2,), .107))
    torch.testing.assert_close(module.temperature(), torch.full((2,), 4.))
    module = RandomWalkAttention(64, 2, mode='walk', init_beta=.45, init_temperature=10.)
    nn.init.constant_(module.theta, float('nan'))
    nn.init.constant_(module.log_temperature, float('nan'))
    module.reset_parameters()
    torch.testing.assert_close(module.beta(), torch.full((2,), .45))
    torch.testing.assert_close(module.temperature(), torch.full((2,), 10.))
    assert RandomWalkAttention(64, 2, init_beta=0.).beta() is None
    assert RandomWalkAttention(64, 2).temperature() is None


def test_learned_values_stay_in_range():
    module = RandomWalkAttention(64, 2, mode='walk')
    for value, beta, temperature in ((-1e4, 0., .5), (1e4, .9, 16.)):
        nn.init.constant_(module.theta, value)
        nn.init.constant_(module.log_temperature, value)
        torch.testing.assert_close(module.beta(), torch.full((2,), beta))
        torch.testing.assert_close(module.temperature(), torch.full((2,), temperature))
        assert torch.isfinite(module(torch.randn(1, 4, 4, 64))).all()


@pytest.mark.parametrize('kwargs', [{}, dict(mode='walk')])
def test_amp_is_close_to_float32(kwargs):
    """To 1e-2, also with most of the weight on long walks."""
    module, x = module_of(64, 2, dtype=torch.float32, **kwargs), randn(2, 28, 28, 64).float()
    nn.init.constant_(module.theta, 3.)
    if kwargs:
        nn.init.constant_(module.log_temperature, math.log(4))
    expected = module(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.parametrize(('kwargs', 'words'), [
    (dict(mode='jump'), ["mode 'jump'", 'walk', 'spectral']),
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
