"""Learned-query attention against numbers from the authors' code, against its windows written out, and in half
precision."""
import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from _golden import qna_cases, qna_layer, qna_part, qna_tensors
from _numerics import TIGHT, assert_close, in_row_blocks, value_and_grads
from _qna import create_layer, randn
from vitlinear.layers import QnAAttention
from vitlinear.layers._common import lecun_normal_
from vitlinear.ops import qna_attention, reference

LAYERS = [name for name, case in qna_cases().items() if case['kind'] == 'qna_layer']
WITH_GRADIENTS = [name for name in LAYERS if 'grads' in qna_cases()[name]]
OVERFLOW = 'qna_k3_s1_q2_overflow'
GOLDEN = dict(rtol=1e-4, atol=2e-5)
SIZES = [(1, 1), (1, 7), (5, 8), (9, 4), (7, 7)]  # 1 to 7 taps: smaller than the window, of its size, larger


def inputs(B: int, H: int, W: int, heads: int, d: int, k: int, L: int = 2, spread: float = 2., dtype=torch.float64):
    """Scores, values, biases and scales."""
    score, v = spread * randn(B, H, W, L, heads), randn(B, H, W, d, heads, seed=1)
    bias, scale = (s * randn(L * heads, 1, k, k, seed=i) for i, s in ((2, .6), (3, .5)))
    return tuple(x.to(dtype) for x in (score, v, bias, scale))


def assert_same(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """A value and its gradients, of which those of a score that meets no other are zero up to rounding."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


# the ways to evaluate a module

def through_autograd(module: QnAAttention, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def through_inference(module: QnAAttention, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x)


def through_torchscript(module: QnAAttention, x: torch.Tensor) -> torch.Tensor:
    return torch.jit.script(module)(x)


PATHS: dict[str, Callable] = {
    'autograd': through_autograd, 'inference': through_inference, 'row blocks': in_row_blocks}


# the authors' numbers

def golden_module(name: str,) -> QnAAttention:
    case = qna_cases()[name]
    config = case['config']
    module = QnAAttention(
        config['in_features'], config['heads'], config['kernel_size'], config['stride'], config['n_queries'],
        attn_dim=config['features'], out_dim=config.get('out_features'), qkv_bias=config['use_bias'],
        proj_bias=config['use_bias'], normalize_query=config['normalize_q'],
        attn_scale={'normal': 'learned'}.get(config['attn_scale'], config['attn_scale']))
    module.load_state_dict(qna_layer(qna_part('params:' + case['param_set'])))
    return module.eval()


@pytest.mark.parametrize('path', PATHS)
def test_golden_layers(path: str,):
    assert len(LAYERS) == 24 + 4 + 2
    for name in LAYERS:
        x, expected = (qna_tensors()[f'{name}/{what}'] for what in ('input', 'output'))
        out = PATHS[path](golden_module(name), x)
        torch.testing.assert_close(out, expected, **GOLDEN, msg=lambda m, name=name: f'{name}: {m}')


@pytest.mark.parametrize('name', [name for name in LAYERS if name.endswith(('nonsq', 'outfeat', 'none', 'avg'))])
def test_golden_layers_scripted(name: str):
    x, expected = (qna_tensors()[f'{name}/{what}'] for what in ('input', 'output'))
    torch.testing.assert_close(through_torchscript(golden_module(name), x), expected, **GOLDEN)


@pytest.mark.parametrize('path', ['autograd'])
@pytest.mark.parametrize('name', WITH_GRADIENTS)
def test_golden_gradients(name: str, path: str,):
    module = golden_module(name)
    x = qna_tensors()[f'{name}/input'].clone().requires_grad_()
    PATHS[path](module, x).backward(qna_tensors()[f'{name}/cotangent'])
    assert_close(x.grad, qna_tensors()[f'{name}/grad_input'], rtol=1e-4, atol=1e-5)
    expected = qna_layer(qna_part(f'{name}/grad_params'))
    assert expected.keys() == dict(module.named_parameters()).keys() and len(WITH_GRADIENTS) == 4
    for key, p in module.named_parameters():
        assert_close(p.grad, expected[key], rtol=1e-4, atol=1e-5)


# its windows written out


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3), H=st.integers(1, 9), W=st.integers(1, 9), heads=st.integers(1, 4), d=st.integers(1, 4),
    k=st.sampled_from([1, 3, 5, 9]), L=st.integers(1, 3), stride=st.integers(1, 4),
    spread=st.sampled_from([0., 1., 10.]))
def test_any_shape(B, H, W, heads, d, k, L, stride, spread):
    args = inputs(B, H, W, heads, d, k, L, spread)
    out = qna_attention(*args, stride=stride)
    assert_close(out, reference.qna_attention(*args, stride=stride))


@pytest.mark.parametrize('kwargs', [
    dict(), dict(kernel_size=5, stride=2, attn_dim=12, num_queries=3), dict(qkv_bias=True, proj_bias=True, out_dim=5),
    dict(normalize_query=False), dict(attn_scale='none'), dict(attn_scale='avg'), dict(num_queries=1, kernel_size=1)])
def test_module_by_hand(kwargs,):
    """The module's formula with the textbook core, input and parameter gradients included."""
    module = create_layer(6, 3, dtype=torch.float64, **kwargs)
    d = module.query.shape[1] // 3

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        query = module.query.unflatten(1, (3, d)) / math.sqrt(d)
        if module.normalize_query:
            query = query / (module.query.unflatten(1, (3, d)).norm(dim=2, keepdim=True) + 1e-6)
        keys = torch.nn.functional.linear(x, module.k.weight, module.k.bias)
        score = torch.einsum('bhwad,lad->bhwla', keys.unflatten(3, (3, d)), query)
        v = module.v(x).unflatten(3, (3, d)).transpose(3, 4)
        out = reference.qna_attention(score, v, module.rel_pos_bias, module.attn_scale, module.stride)
        return module.proj((out * module.scale).transpose(3, 4).flatten(3))

    assert module.scale == (.5 if kwargs.get('attn_scale') == 'avg' else 1.)
    assert (module.attn_scale is None) == ('attn_scale' in kwargs)
    x = randn(2, 7, 4, 6, dtype=torch.float64).requires_grad_()
    results = []
    for fn in (module, by_hand):
        out = fn(x)
        cotangent = randn(*out.shape, seed=1, dtype=torch.float64)
        results.append([out, *torch.autograd.grad(out, [x, *module.parameters()], cotangent)])
    assert_same(*results)
    assert_close(through_inference(module, x), results[1][0])
    assert_close(in_row_blocks(module, x), results[1][0])


@pytest.mark.parametrize('needed', range(4))
def test_gradients_of_some_inputs(needed: int):
    """Frozen scores, values or kernels leave the other gradients as they are."""
    args = inputs(2, 5, 4, 2, 3, 3)
    expected = value_and_grads(qna_attention, *args)[1 + needed]
    args = [x.clone().requires_grad_(i == needed) for i, x in enumerate(args)]
    out = qna_attention(*args)
    assert_close(
        torch.autograd.grad(out, args[needed], randn(*out.shape, seed=1, dtype=torch.float64))[0], expected)


# properties

@pytest.mark.parametrize('stride', [1, 2])
def test_constants_in_scores_and_biases_drop_out(stride: int,):
    score, v, bias, scale = inputs(2, 6, 5, 3, 2, 3)
    expected = qna_attention(score, v, bias, scale, stride)
    per_map = 5 * randn(2, 1, 1, 2, 3, seed=5, dtype=torch.float64)
    per_kernel = 5 * randn(6, 1, 1, 1, seed=6, dtype=torch.float64)
    assert_close(qna_attention(score + per_map, v, bias + per_kernel, scale, stride), expected)


@pytest.mark.parametrize('k, stride, size', [(3, 1, (6, 5)), (3, 2, (7, 4)), (7, 1, (4, 9)), (5, 3, (2, 2))])
def test_border(k: int, stride: int, size,):
    """Equal scores: a depthwise convolution with the scales, over the number of taps inside the map."""
    (H, W), (L, heads, d) = size, (2, 3, 2)
    _, v, _, scale = inputs(2, H, W, heads, d, k, L)
    out = qna_attention(
        torch.full((2, H, W, L, heads), 3., dtype=torch.float64), v, torch.zeros_like(scale), scale, stride)
    kernel = scale.view(L, heads, 1, k, k).sum(0).repeat(d, 1, 1, 1)
    conv = nn.functional.conv2d(
        v.flatten(3).permute(0, 3, 1, 2), kernel, stride=stride, padding=k // 2, groups=d * heads)
    taps = nn.functional.conv2d(
        torch.ones(1, 1, H, W, dtype=torch.float64), torch.ones(1, 1, k, k, dtype=torch.float64), stride=stride,
        padding=k // 2)
    assert taps.min() < k * k
    assert_close(out.flatten(3).permute(0, 3, 1, 2), conv / taps)


def test_weights_sum_to_one_for_each_query():
    score, v, bias, _ = inputs(2, 5, 6, 2, 3, 3)
    v = v[:1, :1, :1].expand_as(v)
    assert_close(qna_attention(score, v, bias), 2 * v)


def test_reach():
    """A position counts in the windows that hold it and nowhere else, its score by dividing as well."""
    score, v, bias, scale = inputs(1, 9, 9, 2, 2, 5)
    expected = qna_attention(score, v, bias, scale)
    score, v = score.clone(), v.clone()
    score[:, 4, 2] += 4.
    v[:, 4, 2] += 1.
    changed = (qna_attention(score, v, bias, scale) - expected).abs().amax(dim=(0, 3, 4)) > 1e-9
    assert changed[2:7, :5].all() and changed.sum() == 25


def test_transposition():
    """A transposed map with transposed kernels gives the transposed output; so does a mirrored one."""
    score, v, bias, scale = inputs(2, 7, 4, 2, 3, 3)
    expected = qna_attention(score, v, bias, scale)
    out = qna_attention(*(x.transpose(1, 2) for x in (score, v)), *(x.mT for x in (bias, scale)))
    assert_close(out.transpose(1, 2), expected)
    out = qna_attention(*(x.flip(1) for x in (score, v)), *(x.flip(2) for x in (bias, scale)))
    assert_close(out.flip(1), expected)


def test_inputs_stay_as_they_are():
    args = inputs(1, 4, 5, 2, 2, 3, dtype=torch.float32)
    before = [x.clone() for x in args]
    value_and_grads(lambda *x: qna_attention(*x), *args)
    qna_attention(*args)
    module, x = create_layer(6, 2), randn(2, 5, 4, 6)
    y = x.clone()
    in_row_blocks(module, x)
    assert torch.equal(x, y) and all(torch.equal(a, b) for a, b in zip(args, before))


@pytest.mark.parametrize('path', PATHS)
def test_strided_input(path: str):
    module, x = create_layer(6, 2, stride=2), randn(2, 8, 10, 6)
    for strided in (x.transpose(1, 2).contiguous().transpose(1, 2), x.repeat_interleave(2, 3)[..., ::2], x[:1].expand(
            2, 8, 10, 6), x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        torch.testing.assert_close(
            PATHS[path](module, strided), PATHS[path](module, strided.contiguous()), rtol=1e-5, atol=1e-6)


# scores that spread far

@pytest.mark.parametrize('spread', [79., 200., 1e4])
def test_far_spread(spread: float):
    """On a CPU the function looks at the scores and is exact at any spread, and finite, gradients included."""
    score, v, bias, scale = inputs(2, 12, 12, 2, 3, 3)
    score = score / (score.amax(dim=(1, 2), keepdim=True) - score.amin(dim=(1, 2), keepdim=True)) * spread
    expected = reference.qna_attention(score, v, bias, scale)
    args = [x.float() for x in (score, v, bias, scale)]
    out, *grads = value_and_grads(qna_attention, *args)
    assert all(torch.isfinite(g).all() for g in (out, *grads))
    # float32 scores of this size have an error of 6e-8 times their size, and so has the exponent
    assert_close(out.double(), expected, rtol=1e-4, atol=1e-5 + 1e-7 * spread)
    assert out.abs().max() <= 2 * (v.abs().max() * scale.abs().max())


def test_far_spread_with_steep_biases():
    """Weights at the clamp times small taps are no normal float32, whose inverse would be infinite."""
    score, v, bias, scale = inputs(1, 8, 8, 2, 3, 3)
    score, bias = torch.zeros_like(score), torch.zeros_like(bias)
    score[:, 0, 0], bias[:, :, 0, 0] = 85., 12.
    args = [x.float() for x in (score, v, bias, scale)]
    assert torch.isfinite(qna_attention(*args)).all()


# half precision

# three times the largest error that was measured on these maps, over the largest output
ERRORS = {torch.bfloat16: .04, torch.float16: .004}


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('dtype', ERRORS)
def test_half_precision(dtype: torch.dtype, path: str, autocast: bool):
    module, x = create_layer(16, 2), randn(2, 56, 56, 16)
    expected = module(x).detach()
    if autocast:
        with torch.autocast('cpu', dtype=dtype):
            out = PATHS[path](module, x)
    else:
        out = PATHS[path](module.to(dtype), x.to(dtype))
    assert out.dtype == dtype and torch.isfinite(out).all()
    assert (out.float() - expected).abs().max() < ERRORS[dtype] * expected.abs().max()


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('dtype', ERRORS)
def test_gradients_in_half_precision(dtype: torch.dtype, autocast: bool):
    module, x = create_layer(16, 2), randn(2, 56, 56, 16).requires_grad_()
    cotangent = randn(2, 56, 56, 16, seed=1)
    expected = torch.autograd.grad(module(x), [x, *module.parameters()], cotangent)
    if autocast:
        with torch.autocast('cpu', dtype=dtype):
            out = module(x)
        assert out.dtype == dtype
    else:
        module, x = module.to(dtype), x.detach().to(dtype).requires_grad_()
        out = module(x)
    grads = torch.autograd.grad(out, [x, *module.parameters()], cotangent.to(dtype))
    for (name, p), grad, wide in zip([('x', x), *module.named_parameters()], grads, expected):
        assert grad.dtype == p.dtype and torch.isfinite(grad).all(), name
        assert (grad.float() - wide).abs().max() < 4 * ERRORS[dtype] * wide.abs().max(), name


@pytest.mark.parametrize('dtype', ERRORS)
def test_large_input_in_half_precision(dtype: torch.dtype):
    """Scores beyond 11, whose exponential float16 cannot hold, and beyond 89, which float32 cannot."""
    for size in (20., 200.):
        module, x = create_layer(16, 2), size * randn(2, 14, 14, 16)
        assert (module.k(x) @ torch.ones(16)).abs().max() > 11
        for out in (through_inference(module.to(dtype), x.to(dtype)), module(x.to(dtype))):
            assert torch.isfinite(out).all()


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('dtype', [torch.float32, *ERRORS])
def test_steep_biases(dtype: torch.dtype, path: str):
    """Where the favoured tap lies outside the map, the others share the window, however small their exponentials."""
    module, x = create_layer(8, 2), randn(1, 6, 6, 8)
    with torch.no_grad():
        module.rel_pos_bias[:, :, 0, 0] = 20.
    expected = module.double()(x.double()).detach()
    out = PATHS[path](module.to(dtype), x.to(dtype))
    assert (out.double() - expected).abs().max() < ERRORS.get(dtype, 1e-5) * expected.abs().max()


class Adapted(nn.Linear):
    """A linear layer with a low-rank addition, as adapters make them."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.down = nn.Parameter(torch.randn(2, layer.in_features))
        self.up = nn.Parameter(torch.randn(layer.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.down.t() @ self.up.t()


@pytest.mark.parametrize('layer', ['k', 'v', 'proj'])
def test_adapted_layers(layer: str):
    module, x = create_layer(8, 2), randn(2, 5, 6, 8)
    before = through_inference(module, x)
    adapted = Adapted(getattr(module, layer))
    merged = copy.deepcopy(module)
    with torch.no_grad():
        getattr(merged, layer).weight += adapted.up @ adapted.down
    setattr(module, layer, adapted)
    expected = merged(x).detach()
    assert (expected - before).abs().max() > 1e-2
    for path in (through_autograd, through_inference):
        torch.testing.assert_close(path(module, x).detach(), expected, rtol=1e-4, atol=1e-5)
    module(x).sum().backward()
    assert adapted.up.grad.abs().max() > 0


# construction

@pytest.mark.parametrize('kwargs, words', [
    (dict(kernel_size=4), ['kernel_size=4', 'odd']),
    (dict(kernel_size=0), ['kernel_size=0', 'odd and positive']),
    (dict(kernel_size=-3), ['kernel_size=-3', 'odd and positive']),
    (dict(attn_scale='ones'), ["attn_scale 'ones'", 'learned, none, avg']),
    (dict(num_heads=3), ['dim=8', 'num_heads=3']),
    (dict(attn_dim=10, num_heads=4), ['attn_dim=10', 'num_heads=4']),
    (dict(attn_dim=0), ['dim=0']),
    (dict(num_queries=0), ['num_queries=0', 'positive']),
    (dict(stride=0), ['stride=0', 'positive']),
    (dict(out_dim=0), ['out_dim=0', 'positive']),
    (dict(out_dim=-2), ['out_dim=-2', 'positive']),
])
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError) as e:
        QnAAttention(8, **{'num_heads': 2, **kwargs})
    assert all(word in str(e.value) for word in words), e.value


def test_shapes_and_defaults():
    module = QnAAttention(12, 3)
    assert (module.kernel_size, module.stride, module.num_queries) == (3, 1, 2)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        'query': (2, 12), 'rel_pos_bias': (6, 1, 3, 3), 'attn_scale': (6, 1, 3, 3), 'k.weight': (12, 12),
        'v.weight': (12, 12), 'proj.weight': (12, 12)}
    module = QnAAttention(12, 3, 5, 2, attn_dim=24, out_dim=7, device='meta', dtype=torch.bfloat16)
    assert module(torch.empty(2, 5, 9, 12, device='meta', dtype=torch.bfloat16)).shape == (2, 3, 5, 7)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {('meta', torch.bfloat16)}


def test_initialisation():
    """Biases of zero, scales of 0.02, queries of variance about 1 / d, and a branch that says next to nothing."""
    torch.manual_seed(0)
    module = QnAAttention(256, 32)
    assert not module.rel_pos_bias.any()
    assert module.attn_scale.std().item() == pytest.approx(.02, rel=.15)
    assert module.query.abs().max() <= 2 * 8 ** -.5
    assert module.query.std().item() == pytest.approx(.8796 * 8 ** -.5, rel=.1)
    for layer in (module.k, module.v, module.proj):
        assert layer.weight.std().item() == pytest.approx(1 / 16, rel=.02)
        assert layer.weight.abs().max() <= 2 / 16 / .8796 + 1e-6
    assert module(torch.randn(2, 28, 28, 256)).std().item() == pytest.approx(.011, rel=.2)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('shape', [(64, 400), (64, 4, 10, 10)])
def test_lecun_normal(shape, dtype: torch.dtype):
    torch.manual_seed(0)
    weight = torch.empty(shape, dtype=dtype)
    lecun_normal_(weight)
    assert weight.float().std().item() == pytest.approx(.05, rel=.03)
    assert weight.float().abs().max().item() == pytest.approx(2 * .05 / .8796, rel=.01)
    assert abs(weight.float().mean().item()) < .05 / 30
