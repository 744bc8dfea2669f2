"""Linear-angular attention against numbers from the authors' code, against its matrices of all pairs, by its
properties, at zero and in half precision."""
import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from _golden import castling_cases, castling_part, castling_tensors
from _numerics import TIGHT, assert_close, saved_bytes
from vitlinear.layers import LinearAngularAttention
from vitlinear.layers.linear_angular import MaskedSoftmax
from vitlinear.ops import linear_angular_attention as attention
from vitlinear.ops import masked_softmax, reference
from vitlinear.ops._numerics import inverse_norm
from vitlinear.ops.local import local_attention, subsample
from vitlinear.ops.primitives.few_keys import autograd as few_keys
from vitlinear.ops.primitives.few_keys import pool_keys

LAYERS = [name for name, case in castling_cases().items() if case['kind'] == 'attention']
ZERO = [name for name in LAYERS if name.startswith('zero_token')]
FINITE = [name for name in LAYERS if name not in ZERO]
WITH_GRADIENTS = [name for name in LAYERS if 'grads' in castling_cases()[name]]
WITH_INTERMEDIATES = [name for name in LAYERS if 'inter' in castling_cases()[name]]
WITH_MASK = [name for name in LAYERS if 'mask' in castling_cases()[name]]
GOLDEN = dict(rtol=1e-4, atol=2e-5)
CHUNKS = [None, 17]


def randn(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def create(*args, seed: int = 0, **kwargs) -> LinearAngularAttention:
    """A module in eval mode whose every parameter counts."""
    torch.manual_seed(seed)
    module = LinearAngularAttention(*args, **kwargs)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=.3 if name.startswith('dconv') else 1. if p.ndim == 1 else p[0].numel() ** -.5)
    return module.eval()


def heads_of(module: LinearAngularAttention, x: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values (B, heads, N, d) of a map."""
    qkv = module.qkv(x).flatten(1, 2).chunk(3, dim=-1)
    return [u.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for u in qkv]


def unit(x: torch.Tensor) -> torch.Tensor:
    return x * inverse_norm(x).to(x.dtype)


def scalar(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


# the ways to evaluate a module

def through_autograd(module: LinearAngularAttention, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def through_inference(module: LinearAngularAttention, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x)


def through_chunks(module: LinearAngularAttention, x: torch.Tensor) -> torch.Tensor:
    module.aux.chunk = 17
    return module(x)


def through_layers(module: LinearAngularAttention, x: torch.Tensor) -> torch.Tensor:
    """A hook keeps the projections from being taken by their weights."""
    calls = []
    handles = [layer.register_forward_hook(lambda *args: calls.append(1)) for layer in (module.qkv, module.proj)]
    with torch.no_grad():
        out = module(x)
    for handle in handles:
        handle.remove()
    assert len(calls) == 2
    return out


def through_expanded_convolution(module: LinearAngularAttention, x: torch.Tensor) -> torch.Tensor:
    module = copy.deepcopy(module)
    module.reparameterize()
    assert len(module.dconv.weight) == module.proj.in_features
    return module(x)


def through_torchscript(module: LinearAngularAttention, x: torch.Tensor) -> torch.Tensor:
    return torch.jit.script(module)(x)


PATHS: dict[str, Callable] = {
    'autograd': through_autograd, 'inference': through_inference, 'chunks': through_chunks, 'layers': through_layers,
    'expanded': through_expanded_convolution}


# the authors' numbers

def golden_module(name: str, chunk: int | None = None) -> LinearAngularAttention:
    """Their state dict fits with and without the auxiliary branch."""
    case = castling_cases()[name]
    config = case['constructor']
    module = LinearAngularAttention(
        config['in_channels'], config['num_heads'], qkv_bias=config['qkv_bias'],
        res_kernel_size=config['res_kernel_size'], aux_mode='always' if case['sparse_reg'] else 'off',
        aux_threshold=.02 if case['threshold'] is None else case['threshold'], aux_max_keys=None, aux_chunk=chunk)
    module.load_state_dict(castling_part(case['params']) or castling_part('params:' + case['params']), strict=True)
    return module.train(case['training'])


def golden_map(name: str, what: str = 'input') -> torch.Tensor:
    """Tokens as a map; those that are on no grid as one row, since their order is all that counts."""
    x, case = castling_tensors()[f'{name}/{what}'], castling_cases()[name]
    H, W = case['grid'] if case['grid'] and not case['prefix_tokens'] else (1, case['L'])
    return x.unflatten(1, (H, W))


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


@pytest.mark.parametrize('chunk', CHUNKS)
def test_golden_masks(chunk: int | None):
    assert len(WITH_MASK) == 17
    for name in WITH_MASK:
        module, case = golden_module(name, chunk), castling_cases()[name]
        with torch.no_grad():
            stats = module.aux.stats(*heads_of(module, golden_map(name)))
        assert (stats['tokens'], stats['keys']) == (case['L'], case['L'])
        # an entry whose distance from the threshold is below the error of float32 may fall on either side
        entries = 0 if case['mask']['closest_to_threshold'] > 1e-6 else 1.5 / len(golden_map(name)) / case['L'] ** 2
        assert stats['density'] == pytest.approx(case['mask']['density'], rel=0, abs=max(entries, 1e-9)), name
        assert stats['rows_with_entry'] == pytest.approx(case['mask']['rows_with_entry'], rel=0, abs=1e-9), name
        assert stats['mass'] == pytest.approx(case['mask']['mass'], rel=1e-5, abs=2 * entries), name


# against all pairs

def inputs(grid=(3, 5), P: int = 0, conv: str = '1d', k: int = 3, stride: int = 1, B: int = 2, heads: int = 3,
           d: int = 4, e: int = 5, dtype=torch.float64):
    """Queries, keys, values and kernels; M keys on the grid and P in front, of which a query for every stride-th."""
    H, W = grid
    N = P + -(-H // stride) * -(-W // stride)
    shapes = (
        (B, heads, N, d), (B, heads, P + H * W, d), (B, heads, P + H * W, e), (heads, 1, k, k if conv == '2d' else 1))
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


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


# the switch

def both(name: str) -> list[torch.Tensor]:
    """With and without the branch."""
    module, x = golden_module(name), golden_map(name)
    out = module(x)
    module.aux.mode = 'off'
    return [out, module(x)]


@pytest.mark.parametrize('grad', [True, False])
def test_an_empty_mask_changes_nothing(grad: bool):
    """Bit by bit; and the golden outputs are equal as well."""
    with torch.set_grad_enabled(grad):
        assert torch.equal(*both('castle_empty_mask_aux'))
        assert torch.equal(*both('aux_threshold_1'))
        assert not torch.equal(*both('aux_threshold_0p5'))
    tensors = castling_tensors()
    assert torch.equal(tensors['castle_empty_mask_aux/output'], tensors['castle_empty_mask_lin/output'])


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('grad', [True, False])
def test_an_empty_mask_in_any_type(grad: bool, dtype: torch.dtype):
    for kwargs in (dict(aux_threshold=1.), dict(aux_threshold=.1, aux_kappa=36.), dict(aux_threshold=0.)):
        module, x = create(8, 2, aux_mode='always', **kwargs).to(dtype), randn(2, 6, 6, 8, dtype=dtype)
        if kwargs['aux_threshold'] == 0.:
            module.aux.ramp.fill_(1.)
        with torch.set_grad_enabled(grad):
            out = module(x)
            module.aux.mode = 'off'
            assert torch.equal(out, module(x))


def test_the_gap_of_a_small_map():
    """49 keys and 0.02: no mask is empty."""
    name = 'castle_nonempty_7x7_aux'
    out, without = both(name)
    recorded = castling_cases()[name]['gap_to_linear_form']
    gap = (out - without).norm() / out.norm()
    assert recorded == pytest.approx(.0529, abs=5e-5) and gap.item() == pytest.approx(recorded, rel=1e-4)
    torch.testing.assert_close(without, golden_map('castle_nonempty_7x7_lin', 'output'), **GOLDEN)


@settings(max_examples=40, deadline=None)
@given(N=st.integers(1, 60), scale=st.sampled_from([0., .01, 1., 100.]), seed=st.integers(0, 99), share=st.floats(
    .01, .99), chunk=st.sampled_from([None, 1, 7]))
def test_few_keys_always_leave_an_entry(N, scale, seed, share, chunk):
    """The largest of N weights is at least 1 / N, so below that each row has one, whatever the logits."""
    q, k = scale * randn(1, 2, 5, 3, seed=seed), randn(1, 2, N, 3, seed=seed + 1)
    aux = MaskedSoftmax('always', threshold=share / N, chunk=chunk)
    stats = aux.stats(q, k, k)
    assert stats['rows_with_entry'] == 1. and stats['density'] >= 1 / N - 1e-9
    assert stats['mass'] > share / N
    aux = MaskedSoftmax('always', threshold=share / N, kappa=N)  # a threshold of 1
    stats = aux.stats(q, k, k)
    assert (stats['rows_with_entry'], stats['density'], stats['mass']) == (0., 0., 0.)


@pytest.mark.parametrize('threshold, kappa', [(.02, 0.), (.02, 2.), (0., 2.), (.5, 2.), (1., 0.), (.02, 200.)])
def test_thresholds(threshold: float, kappa: float):
    """From max(threshold, kappa / N) to 1, in steps that multiply it."""
    aux = MaskedSoftmax(threshold=threshold, kappa=kappa)
    for N in (1, 49, 99, 101, 196):
        first = max(threshold, kappa / N)
        aux.reset_parameters()
        assert aux.threshold_for(N).item() == pytest.approx(first, rel=1e-6)
        values = []
        for ramp in (0., .25, .5, .75, 1.):
            aux.ramp.fill_(ramp)
            assert aux.threshold_for(N).ndim == 0
            values.append(aux.threshold_for(N).item())
            assert values[-1] == pytest.approx(first ** (1 - ramp), rel=1e-5)
        assert values[-1] == 1.  # exactly: then no weight survives
    aux.threshold.fill_(.3)
    aux.ramp.fill_(0.)
    assert aux.threshold_for(10 ** 6).item() == pytest.approx(.3)
    aux.init_non_persistent_buffers()
    assert (aux.threshold.item(), aux.ramp.item(), aux.weight.item()) == (pytest.approx(threshold), 0., 1.)


def test_the_threshold_itself_does_not_count():
    """Four equal weights are 1/4 each, exactly; and a single one is 1, which is the last threshold of a ramp."""
    v = randn(1, 2, 4, 3)
    zeros = torch.zeros(1, 2, 5, 3, dtype=torch.float64)
    for N, first in ((4, .25), (1, 1.)):
        q, k = zeros, zeros[:, :, :N]
        assert not masked_softmax(q, k, v[:, :, :N], scalar(first)).any()
        below = masked_softmax(q, k, v[:, :, :N], scalar(first * .999))
        assert_close(below, v[:, :, :N].mean(dim=2, keepdim=True).expand(-1, -1, 5, -1))
        assert MaskedSoftmax('always', threshold=first).stats(q, k, v)['density'] == 0.


def test_threshold_passes_no_gradient_and_weights_below_it_neither():
    """The mask is a constant: the gradient is that of the softmax with its cotangent cut to the mask."""
    q, k, v, _ = (x.requires_grad_() for x in inputs((4, 4)))
    threshold = scalar(.08).requires_grad_()
    out = masked_softmax(q, k, v, threshold, chunk=5)
    cotangent = randn(*out.shape, seed=9)
    grads = torch.autograd.grad(out, [q, k, v], cotangent, retain_graph=True)
    assert torch.autograd.grad(out, threshold, cotangent, allow_unused=True) == (None,)
    attn = (q @ k.transpose(2, 3) / 2).softmax(dim=-1)
    mask = (attn > .08).double()
    assert 0 < mask.mean() < 1
    by_hand = torch.autograd.grad([attn, v], [q, k, v], [
        mask * (cotangent @ v.transpose(2, 3)), (mask * attn).transpose(2, 3) @ cotangent])
    for a, b in zip(grads, by_hand):
        assert_close(a, b)


@pytest.mark.parametrize('mode, train, on', [
    ('off', True, False), ('off', False, False), ('train', True, True), ('train', False, False),
    ('always', True, True), ('always', False, True)])
def test_modes(mode: str, train: bool, on: bool):
    x, always, off = randn(2, 5, 6, 8, dtype=torch.float32), create(8, 2, aux_mode='always'), create(8, 2)
    expected = (always if on else off)(x)
    assert (always(x) - off(x)).abs().max() > .01
    calls = []
    module = create(8, 2, aux_mode=mode).train(train)
    module.aux.register_forward_hook(lambda *args: calls.append(1))
    assert torch.equal(module(x), expected)
    assert len(calls) == on and module.aux.is_on() == on
    scripted = torch.jit.script(create(8, 2, aux_mode=mode).train(train))
    torch.testing.assert_close(scripted(x), expected, rtol=1e-5, atol=1e-6)


def test_weight_and_dropout():
    """A factor of what the branch adds, and dropout of its weights in training alone."""
    x = randn(2, 5, 6, 8, dtype=torch.float32)
    module = create(8, 2, aux_mode='always', attn_drop=.5)
    q, k, v = heads_of(module, x)
    full = module.aux(q, k, v)
    torch.testing.assert_close(full, masked_softmax(q, k, v, scalar(.02)))
    module.aux.weight.fill_(.25)
    torch.testing.assert_close(module.aux(q, k, v), full / 4)
    module.aux.weight.fill_(0.)
    assert torch.equal(module(x), create(8, 2)(x))
    module.aux.weight.fill_(1.)
    assert torch.equal(module(x), create(8, 2, aux_mode='always')(x))
    module.train()
    torch.manual_seed(0)
    assert not torch.equal(module(x), module(x))
    module.aux.chunk = 7
    mean = torch.stack([module.aux(q, k, v).detach() for _ in range(300)]).mean(dim=0)
    assert (mean - full).abs().max() < .3 * full.abs().max()
    off = create(8, 2, attn_drop=.5).train()
    assert torch.equal(off(x), off(x))


# pooled keys

@pytest.mark.parametrize('grid, max_keys, side', [
    ((14, 14), 196, 1), ((28, 28), 196, 2), ((56, 56), 196, 4), ((15, 14), 196, 2), ((13, 7), 20, 3), ((1, 9), 4, 3),
    ((3, 5), 1, 5), ((4, 4), 15, 2)])
def test_pooled_keys(grid, max_keys: int, side: int):
    """Means over cells; those at the lower and right edge may be smaller, and are means of what they hold."""
    (H, W), P = grid, 2
    x = randn(2, 3, P + H * W, 4)
    out = pool_keys(x, grid, max_keys, P)
    rows, columns = -(-H // side), -(-W // side)
    assert out.shape[2] == P + rows * columns <= P + max_keys
    assert torch.equal(out[:, :, :P], x[:, :, :P])
    maps = x[:, :, P:].unflatten(2, grid)
    for i in range(rows):
        for j in range(columns):
            cell = maps[:, :, i * side:(i + 1) * side, j * side:(j + 1) * side].mean(dim=(2, 3))
            torch.testing.assert_close(out[:, :, P + i * columns + j], cell)
    if side > 1:  # it is the smallest that does
        assert -(-H // (side - 1)) * -(-W // (side - 1)) > max_keys
    assert pool_keys(x, grid, None, P) is x and pool_keys(x, None, max_keys, P) is x


def test_pooled_branch():
    """Explicit averages as keys and values, and a threshold relative to their number."""
    module = MaskedSoftmax('always', threshold=.01, kappa=1.5, max_keys=6, chunk=5)
    q, k, v = (randn(2, 3, 1 + 4 * 6, 4, seed=i) for i in range(3))
    small = [
        torch.cat([x[:, :, :1], x[:, :, 1:].unflatten(2, (2, 2, 3, 2)).mean(dim=(3, 5)).flatten(2, 3)], dim=2)
        for x in (k, v)]
    assert small[0].shape[2] == 7
    expected = (q @ small[0].transpose(2, 3) / 2).softmax(dim=-1)
    expected = torch.where(expected > float(torch.tensor(1.5 / 7)), expected, 0.)
    assert_close(module(q, k, v, (4, 6), 1), expected @ small[1])
    stats = module.stats(q, k, v, (4, 6), 1)
    assert (stats['tokens'], stats['keys']) == (25, 7)
    assert stats['density'] == pytest.approx((expected > 0).double().mean().item())
    assert stats['mass'] == pytest.approx(expected.sum(dim=-1).mean().item(), rel=1e-6)
    module = create(8, 2, aux_mode='always', aux_max_keys=9, aux_threshold=0.)
    keys = []
    module.aux.register_forward_pre_hook(lambda m, args: keys.append(m.stats(*args)['keys']))
    module(randn(1, 12, 9, 8, dtype=torch.float32))
    assert keys == [9]


# memory

def test_memory_of_the_branch(monkeypatch):
    """Neither what is kept for the backward pass nor any step of it holds more than chunk * keys weights per head."""
    B, heads, H, W, d, chunk = 1, 2, 56, 56, 4, 100
    q, k, v = (randn(B, heads, H * W, d, seed=i, dtype=torch.float32).requires_grad_() for i in range(3))
    steps = []
    step = few_keys.attend
    monkeypatch.setattr(few_keys, 'attend', lambda q, k, *args: steps.append(
        (q.shape[2], k.shape[2])) or step(q, k, *args))

    def kept(chunk: int | None, max_keys: int | None, queries: int = H * W) -> int:
        module = MaskedSoftmax('always', threshold=0., max_keys=max_keys, chunk=chunk)
        return saved_bytes(lambda *args: module(*args, (H, W)), q[:, :, :queries], k, v)

    weights = 4 * B * heads * H * W
    assert kept(None, None, 392) >= weights * 392  # of 49 keys and up this is all that counts
    steps.clear()
    size = kept(chunk, 196)
    assert max(n for n, _ in steps) == chunk and {m for _, m in steps} == {196}
    maps = 3 * weights * d
    assert size < 2 * maps < weights * 196 / 8
    assert kept(None, 196) > weights * 196

    steps.clear()
    module = MaskedSoftmax('always', threshold=0., max_keys=196, chunk=chunk)
    module(q, k, v, (H, W)).sum().backward()
    assert len(steps) == 2 * math.ceil(H * W / chunk) and max(n * m for n, m in steps) == chunk * 196
    steps.clear()
    with torch.no_grad():
        module(q, k, v, (H, W))
    assert not steps  # the plain operations, in chunks as well


def test_memory_of_the_linear_form():
    """Linear in the tokens: four times the map, four times the bytes."""
    module = create(16, 2)
    sizes = [saved_bytes(module, randn(1, n, n, 16, dtype=torch.float32).requires_grad_()) for n in (28, 56)]
    assert sizes[1] < 4.01 * sizes[0] and sizes[1] < 20 * 56 * 56 * 16 * 4


# half precision

ERRORS = {torch.bfloat16: .02, torch.float16: .004}


@pytest.mark.parametrize('autocast', [True, False])
@pytest.mark.parametrize('path', ['autograd', 'inference', 'layers'])
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


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize('name', ['qkv', 'proj'])
def test_replaced_layers(name: str):
    """Only plain layers are evaluated by their weights."""
    module, x = create(8, 2), randn(1, 5, 4, 8, dtype=torch.float32)
    layer = getattr(module, name)
    doubled = Doubled(layer.in_features, layer.out_features, bias=layer.bias is not None)
    doubled.load_state_dict(layer.state_dict())
    setattr(module, name, doubled)
    expected = module(x).detach()
    torch.testing.assert_close(through_inference(module, x), expected, rtol=1e-4, atol=1e-5)
    setattr(module, name, layer)
    assert (through_inference(module, x) - expected).abs().max() > 1e-2
