"""Linear-angular attention against numbers from the authors' code, against its matrices of all pairs, by its
properties, at zero and in half precision."""
import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _golden import castling_cases, castling_part
from _linear_angular import (
    CHUNKS,
    GOLDEN,
    LAYERS,
    attention,
    create,
    golden_map,
    golden_module,
    heads_of,
    inputs,
    randn,
    scalar,
)
from _numerics import TIGHT, assert_close, in_row_blocks, saved_bytes
from vitlinear.layers import LinearAngularAttention
from vitlinear.ops import masked_softmax, reference
from vitlinear.ops._numerics import inverse_norm
from vitlinear.ops.local import local_attention, subsample

ZERO = [name for name in LAYERS if name.startswith('zero_token')]
FINITE = [name for name in LAYERS if name not in ZERO]
WITH_GRADIENTS = [name for name in LAYERS if 'grads' in castling_cases()[name]]
WITH_INTERMEDIATES = [name for name in LAYERS if 'inter' in castling_cases()[name]]


def unit(x: torch.Tensor) -> torch.Tensor:
    return x * inverse_norm(x).to(x.dtype)


# the ways to evaluate a module

def through_autograd(module: LinearAngularAttention, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def through_inference(module: LinearAngularAttention, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x)


def through_chunks(module: LinearAngularAttention, x: torch.Tensor) -> torch.Tensor:
    module.aux.chunk = 17
    return module(x)


def through_expanded_convolution(module: LinearAngularAttention, x: torch.Tensor) -> torch.Tensor:
    module = copy.deepcopy(module)
    module.reparameterize()
    assert len(module.dconv.weight) == module.proj.in_features
    return module(x)


def through_torchscript(module: LinearAngularAttention, x: torch.Tensor) -> torch.Tensor:
    return torch.jit.script(module)(x)


PATHS: dict[str, Callable] = {
    'autograd': through_autograd, 'inference': through_inference, 'chunks': through_chunks, 'row blocks': in_row_blocks,
    'expanded': through_expanded_convolution}


@pytest.mark.parametrize('path', PATHS)
def test_golden_layers(path: str):
    assert len(LAYERS) == 31 and len(FINITE) == 29
    for name in FINITE:
        out = PATHS[path](golden_module(name), golden_map(name))
        torch.testing.assert_close(out, golden_map(name, 'output'), **GOLDEN, msg=lambda m, name=name: f'{name}: {m}')


@pytest.mark.parametrize('chunk', CHUNKS)
@pytest.mark.parametrize('name', WITH_GRADIENTS)
def test_golden_gradients(name: str, chunk: int | None):
    module, x = golden_module(name, chunk), golden_map(name).requires_grad_()
    module(x).backward(golden_map(name, 'cotangent'))
    assert_close(x.grad, golden_map(name, 'grad_input'), rtol=2e-4, atol=2e-5)
    expected = castling_part(f'{name}/grad_params')
    assert expected.keys() == dict(module.named_parameters()).keys() and len(WITH_GRADIENTS) == 6
    for key, p in module.named_parameters():
        assert_close(p.grad, expected[key], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('name', WITH_INTERMEDIATES)
def test_golden_intermediates(name: str):
    module, case, expected = golden_module(name), castling_cases()[name], castling_part(f'{name}/inter')
    with torch.no_grad():
        q, k, v = heads_of(module, golden_map(name))
        found = dict(
            q_unit=unit(q), k_unit=unit(k), v=v, kv=unit(k).transpose(2, 3) @ v, dconv_v=local_attention(
                v, module.dconv.weight))
        found['q_kv'] = found['q_unit'] @ found['kv']
        aux = None
        if case['sparse_reg']:
            everything = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
            found['masked_attn'] = masked_softmax(q, k, everything, scalar(case['threshold']))
            aux = found['sv'] = masked_softmax(q, k, v, scalar(case['threshold']), chunk=17)
        found['pre_proj'] = attention(q, k, v, module.dconv.weight, aux=aux).transpose(1, 2).flatten(2)
    assert found.keys() == expected.keys() == set(case['inter']) and len(WITH_INTERMEDIATES) == 4
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], **GOLDEN, msg=lambda m, key=key: f'{key}: {m}')


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3), H=st.integers(1, 7), W=st.integers(1, 7), P=st.integers(0, 3), heads=st.integers(1, 3),
    d=st.integers(1, 4), e=st.integers(1, 4), k=st.sampled_from([1, 3, 5, 9]), conv=st.sampled_from(['1d', '2d']),
    stride=st.integers(1, 3))
def test_any_shape(B, H, W, P, heads, d, e, k, conv, stride):
    args = inputs((H, W), P, conv, k, stride, B, heads, d, e)
    options = dict(grid=(H, W), num_prefix_tokens=P, stride=stride)
    out = attention(*args, **options)
    assert_close(out, reference.linear_angular_attention(*args, **options), rtol=1e-7, atol=1e-9)


CONFIGS = [
    dict(), dict(qkv_bias=True, conv='2d', res_kernel_size=3), dict(ref_keys=20), dict(
        aux_mode='always', aux_threshold=.1), dict(aux_mode='always', aux_kappa=3., aux_max_keys=None, conv='2d')]


@pytest.mark.parametrize('path', [*PATHS, 'torchscript'])
@pytest.mark.parametrize('kwargs', CONFIGS)
def test_module(kwargs, path: str):
    """The module's formula with the textbook core."""
    for H, W in ((1, 1), (5, 8), (7, 3)):
        module, x = create(8, 2, dtype=torch.float64, **kwargs), randn(2, H, W, 8)
        q, k, v = heads_of(module, x)
        threshold = 1.
        if kwargs.get('aux_mode'):
            threshold = max(kwargs.get('aux_threshold', .02), kwargs.get('aux_kappa', 0.) / (H * W))
        expected = reference.linear_angular_attention(
            q, k, v, module.dconv.weight, (H, W), threshold=threshold,
            kv_scale=kwargs['ref_keys'] / (H * W) if 'ref_keys' in kwargs else 1.)
        expected = module.proj(expected.transpose(1, 2).flatten(2)).unflatten(1, (H, W))
        out = {**PATHS, 'torchscript': through_torchscript}[path](module, x)
        assert out.shape == x.shape
        assert_close(out, expected, rtol=1e-7, atol=1e-9)


def test_softmax_in_its_place():
    module, x = create(8, 2, softmax=True, attn_drop=.5, dtype=torch.float64), randn(2, 5, 3, 8)
    expected = reference.softmax_attention(*heads_of(module, x)).transpose(1, 2).flatten(2)
    for run in (through_inference, through_torchscript):
        assert_close(run(module, x), module.proj(expected).unflatten(1, (5, 3)))
    assert list(module.state_dict()) == ['qkv.weight', 'proj.weight', 'proj.bias'] and not list(module.buffers())
    before = copy.deepcopy(module)
    module.reparameterize()
    assert torch.equal(module(x), before(x))
    assert not torch.equal(module.train()(x), module(x))


# the kernel

def test_angular_kernel():
    """Of angles the linear part keeps, the remainder is (arcsin c - c) / pi, at most 1/2 - 1/pi."""
    q, k = unit(randn(200, 6)), unit(randn(300, 6, seed=1))
    k[:2] = torch.stack([q[0], -q[0]])  # where the remainder is largest
    c = (q @ k.t()).clamp(-1., 1.)
    similarity = 1 - c.arccos() / math.pi
    kept = .5 + c / math.pi
    remainder = similarity - kept
    torch.testing.assert_close(remainder, (c.arcsin() - c) / math.pi, rtol=0, atol=1e-14)
    bound = .5 - 1 / math.pi
    assert remainder.abs().max().item() == pytest.approx(bound, abs=1e-7) and abs(bound - .18169) < 1e-5
    assert .1816 < kept.min() and kept.max() < .8184 and 0 <= similarity.min() and similarity.max() <= 1
    for value, expected in ((.3, .0015), (.5, .0075), (.9, .070)):
        assert (math.asin(value) - value) / math.pi == pytest.approx(expected, abs=6e-4)
    # the weights of the function are the linear part: values of which one counts, seen beside its identity
    v = torch.zeros(1, 1, 300, 2, dtype=torch.float64)
    v[..., 0], v[0, 0, 5, 1] = 1., 1.
    out = attention(q[None, None], k[None, None, :200], v[:, :, :200], torch.zeros(1, 1, 1, 1, dtype=torch.float64))
    sums = .5 + (c[:, :200] / math.pi).sum(dim=1)
    expected = c[:, 5] / math.pi + torch.where(torch.arange(200) == 5, .5, 0.)
    torch.testing.assert_close(out[0, 0, :, 1] / out[0, 0, :, 0], expected / sums, **TIGHT)


def test_permutations():
    """All but the convolution takes tokens as a set."""
    q, k, v, weight = inputs((4, 4), conv='1d', k=3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def permuted(weight):
        aux = masked_softmax(q, k, v, scalar(.05))
        together = attention(q, k, v, weight, aux=aux)
        args = [x[:, :, order] for x in (q, k, v)]
        aux = masked_softmax(*args, scalar(.05))
        return together[:, :, order], attention(*args, weight, aux=aux)

    assert_close(*permuted(torch.zeros_like(weight)))
    a, b = permuted(weight)
    assert (a - b).abs().max() > .1
    # the rest is that convolution
    local = local_attention(v, weight)
    assert_close(a - local[:, :, order], b - local_attention(v[:, :, order], weight))


def test_scale_invariance():
    """Lengths of queries, of keys and of all values together do not matter to the normed part."""
    q, k, v, weight = inputs()
    local = local_attention(v, weight)
    out = attention(q, k, v, weight)
    assert_close(attention(5 * q, .1 * k, v, weight), out)
    assert_close(attention(q, k, 1e3 * v, weight) - 1e3 * local, out - local, rtol=1e-7, atol=1e-9)


def test_one_row_into_the_next():
    """'1d' reads across the ends of rows and prefix tokens, '2d' does neither."""
    v = torch.zeros(1, 1, 1 + 2 * 4, 1, dtype=torch.float64)
    v[0, 0, 4] = 1.  # the last of the first row, after one prefix token
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    flat = local_attention(v, ones[..., :1]).flatten()
    assert flat.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    grid = local_attention(v, ones, (2, 4), 1).flatten()
    assert grid.tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1]


def test_subsample():
    x = torch.arange(2. + 15).reshape(1, 1, 17, 1)
    assert subsample(x, (3, 5), 2, 2).flatten().tolist() == [0, 1, 2, 4, 6, 12, 14, 16]


# zero

@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('name', ZERO)
def test_zero_token(name: str, grad: bool):
    """Where the authors' code has NaN for the whole image; elsewhere the numbers are theirs."""
    module, case = golden_module(name), castling_cases()[name]
    x, theirs = golden_map(name).requires_grad_(), golden_map(name, 'output')
    with torch.set_grad_enabled(grad):
        out = module(x)
    assert theirs.isnan().float().mean(dim=(1, 2, 3)).tolist() == case['nan_fraction_per_image'] == [0., 1.]
    torch.testing.assert_close(out, golden_map(name, 'output_guarded'), **GOLDEN)
    torch.testing.assert_close(out[0], theirs[0], **GOLDEN)
    if grad:
        zero = (x == 0).all(dim=-1)
        assert zero.sum() > 0
        out.backward(randn(*out.shape, dtype=torch.float32))
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())
        assert x.grad[zero].abs().max() < 10 and x.grad.abs().max() < 100


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unit_at_zero(dtype: torch.dtype):
    x = torch.tensor([[0., 0.], [3., 4.], [1e-7, 0.], [0., -2e-6]], dtype=torch.float64)
    x = x[:2 if dtype == torch.float16 else 4].to(dtype).requires_grad_()
    out = unit(x)
    assert inverse_norm(x).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.tensor([[0., 0.], [.6, .8], [0., 0.], [0., -1.]], dtype=dtype)[:len(x)]
    torch.testing.assert_close(out, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-9)
    out.sum().backward()
    assert torch.isfinite(x.grad).all() and not x.grad[0].any()
    assert len(x) == 2 or not x.grad[2].any()


def test_all_zero():
    for kwargs in (dict(), dict(aux_mode='always'), dict(conv='2d')):
        module = create(8, 2, **kwargs)
        with torch.no_grad():
            module.proj.bias.zero_()
        x = torch.zeros(1, 3, 4, 8, requires_grad=True)
        out = module(x)
        out.sum().backward()
        assert not out.any() and torch.isfinite(x.grad).all()


def test_memory_of_the_linear_form():
    """Linear in the tokens: four times the map, four times the bytes."""
    module = create(16, 2)
    sizes = [saved_bytes(module, randn(1, n, n, 16, dtype=torch.float32).requires_grad_()) for n in (28, 56)]
    assert sizes[1] < 4.01 * sizes[0] and sizes[1] < 20 * 56 * 56 * 16 * 4


# half precision

ERRORS = {torch.bfloat16: .02, torch.float16: .004}


@pytest.mark.parametrize('autocast', [True, False])
@pytest.mark.parametrize('path', ['autograd', 'inference', 'row blocks'])
@pytest.mark.parametrize('dtype', ERRORS)
@pytest.mark.parametrize('kwargs', [dict(), dict(aux_mode='always', aux_threshold=0.), dict(conv='2d', ref_keys=196)])
def test_half_precision(kwargs, dtype: torch.dtype, path: str, autocast: bool):
    """Sums over 3136 tokens that have something in common."""
    module, x = create(16, 2, **kwargs), 1 + randn(1, 56, 56, 16, dtype=torch.float32)
    expected = module(x).detach()
    if autocast:
        with torch.autocast('cpu', dtype=dtype):
            out = PATHS[path](module, x)
    else:
        out = PATHS[path](module.to(dtype), x.to(dtype))
    assert out.dtype == dtype and torch.isfinite(out).all()
    assert (out.float() - expected).abs().max() < ERRORS[dtype] * expected.abs().max()


@pytest.mark.parametrize('dtype', ERRORS)
def test_gradients_in_half_precision(dtype: torch.dtype):
    module, x = create(16, 2, aux_mode='always', aux_kappa=.5), randn(1, 28, 28, 16, dtype=torch.float32)
    cotangent = randn(1, 28, 28, 16, seed=1, dtype=torch.float32)
    expected = torch.autograd.grad(module(x), list(module.parameters()), cotangent)
    with torch.autocast('cpu', dtype=dtype):
        out = module(x)
    mixed = torch.autograd.grad(out, list(module.parameters()), cotangent.to(dtype))
    half = torch.autograd.grad(module.to(dtype)(x.to(dtype)), list(module.parameters()), cotangent.to(dtype))
    for grads in (mixed, half):
        for grad, wide in zip(grads, expected):
            assert torch.isfinite(grad).all()
            assert (grad.float() - wide).norm() < 4 * ERRORS[dtype] * wide.norm()


@pytest.mark.parametrize('dtype', ERRORS)
def test_large_values_and_many_tokens_in_half_precision(dtype: torch.dtype):
    """Sums of 16384 values of 30 are beyond what float16 holds."""
    q, k = (1 + .1 * randn(1, 1, 128 * 128, 8, seed=i) for i in range(2))
    v = 30 + randn(1, 1, 128 * 128, 8, seed=2)
    weight = randn(1, 1, 9, 1)
    expected = attention(q, k, v, weight)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = attention(*(x.to(dtype) for x in (q, k, v, weight)))
        assert out.dtype == dtype and torch.isfinite(out).all()
        assert (out - expected).abs().max() < ERRORS[dtype] * expected.abs().max()


# construction

def test_expanded_convolution():
    """Once for all calls; the state dict is another, gradients reach it where they did."""
    for conv in ('1d', '2d'):
        module, x = create(12, 3, conv=conv, res_kernel_size=5), randn(2, 6, 5, 12, dtype=torch.float32)
        module.dconv.weight.requires_grad_(conv == '1d')
        expected, before = module(x), module.dconv.weight
        module.reparameterize()
        assert module.dconv.weight.shape == (12, 1, 5, 5 if conv == '2d' else 1)
        assert torch.equal(module.dconv.weight[::4], before) and not module.dconv.training
        assert module.dconv.weight.requires_grad == (conv == '1d')
        assert torch.equal(module(x), expected)
        once = module.dconv
        module.reparameterize()
        assert module.dconv is once


@pytest.mark.parametrize('kwargs, words', [
    (dict(num_heads=3), ['dim=8', 'num_heads=3']),
    (dict(num_heads=0), ['dim=8', 'num_heads=0']),
    (dict(res_kernel_size=4), ['res_kernel_size=4', 'odd']),
    (dict(res_kernel_size=-1), ['res_kernel_size=-1', 'positive']),
    (dict(conv='3d'), ["conv '3d'", '1d, 2d']),
    (dict(ref_keys=0), ['ref_keys=0', 'positive']),
    (dict(aux_mode='on'), ["aux mode 'on'", 'off, train, always']),
    (dict(aux_threshold=-.1), ['threshold=-0.1', '[0, 1]']),
    (dict(aux_threshold=1.5), ['threshold=1.5', '[0, 1]']),
    (dict(aux_kappa=-1.), ['kappa=-1.0', 'negative']),
    (dict(aux_max_keys=0), ['max_keys=0', 'positive', 'None']),
    (dict(aux_chunk=0), ['chunk=0', 'positive', 'None']),
])
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError) as e:
        LinearAngularAttention(8, **{'num_heads': 2, **kwargs})
    assert all(word in str(e.value) for word in words), e.value


def test_unknown_arguments():
    with pytest.raises(TypeError, match='temperature'):
        LinearAngularAttention(8, 2, temperature=1.)


def test_a_grid_is_asked_for():
    q, k, v, weight = inputs(conv='2d')
    with pytest.raises(AssertionError, match='grid'):
        attention(q, k, v, weight)
    with pytest.raises(AssertionError, match='grid'):
        attention(q, k, v, weight[..., :1], stride=2)


def test_shapes_and_defaults():
    module = LinearAngularAttention(16)
    assert (module.num_heads, module.ref_keys, module.aux.mode) == (8, None, 'off')
    assert (module.aux.threshold.item(), module.aux.kappa) == (pytest.approx(.02), 0.)
    assert {name: tuple(v.shape) for name, v in module.state_dict().items()} == {
        'qkv.weight': (48, 16), 'proj.weight': (16, 16), 'proj.bias': (16,), 'dconv.weight': (8, 1, 9, 1)}
    module = LinearAngularAttention(12, 3, conv='2d', aux_mode='always', device='meta', dtype=torch.bfloat16)
    assert module(torch.empty(2, 5, 9, 12, device='meta', dtype=torch.bfloat16)).shape == (2, 5, 9, 12)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {('meta', torch.bfloat16)}
    assert {b.device.type for b in module.buffers()} == {'meta'}
    assert 'chunk=512' in str(module.aux) and "mode=always" in str(module.aux)


def test_settings_are_no_state():
    """Neither in the state dict nor lost in copies."""
    module, x = create(8, 2, aux_mode='always'), randn(1, 5, 4, 8, dtype=torch.float32)
    module.aux.threshold.fill_(.1)
    other = copy.deepcopy(module)
    assert torch.equal(other(x), module(x)) and other.aux.threshold is not module.aux.threshold
    fresh = create(8, 2, seed=1, aux_mode='always')
    fresh.load_state_dict(module.state_dict())
    assert fresh.aux.threshold.item() == pytest.approx(.02)
