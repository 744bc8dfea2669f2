"""XNorm attention against its textbook form, by its properties, at zero and in half precision."""
import copy
import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from _numerics import TIGHT, assert_close, in_row_blocks, value_and_grads
from vitlinear.layers import XNormAttention, XNormClassAttention
from vitlinear.ops import reference, token_apply, token_sums, xnorm_attention

AXES = ['key', 'value']


def randn(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(B: int = 2, heads: int = 3, N: int = 7, M: int = 11, d: int = 4, e: int = 5, dtype=torch.float64):
    """Queries, keys, values and scales of either sign."""
    shapes = ((B, heads, N, d), (B, heads, M, d), (B, heads, M, e), (heads,), (heads,))
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def create(*args, cls=XNormAttention, seed: int = 0, **kwargs) -> nn.Module:
    """A module in eval mode whose every parameter counts."""
    torch.manual_seed(seed)
    module = cls(*args, **kwargs)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=1. if p.ndim == 1 else p[0].numel() ** -.5)
    return module.eval()


# the ways to evaluate a module

def through_autograd(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def through_inference(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x)


def through_torchscript(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.jit.script(module)(x)


PATHS: dict[str, Callable] = {
    'autograd': through_autograd, 'inference': through_inference, 'row blocks': in_row_blocks,
    'torchscript': through_torchscript}


# against the textbook form

def test_scales_are_one_by_default():
    q, k, v, *_ = inputs()
    ones = torch.ones(3, dtype=torch.float64)
    assert_close(xnorm_attention(q, k, v), reference.xnorm_attention(q, k, v, ones, ones))


def by_hand(module: XNormAttention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = module.qkv(x).flatten(1, 2).chunk(3, dim=-1)
    q, k, v = (u.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for u in (q, k, v))
    out = reference.xnorm_attention(q, k, v, module.gamma_q, module.gamma_kv, module.kv_axis)
    return module.proj(out.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])


CONFIGS = [
    dict(), dict(attn_dim=6, qkv_bias=False), dict(attn_ratio=.5, kv_axis='value'), dict(attn_ratio=1.5)]


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('kwargs', CONFIGS)
def test_module(kwargs, path: str):
    module = create(8, 2, dtype=torch.float64, **kwargs)
    for H, W in ((1, 1), (5, 8), (30, 20)):  # the last is above FOLD_FROM
        x = randn(3, H, W, 8)
        out = PATHS[path](module, x)
        assert out.shape == x.shape
        assert_close(out, by_hand(module, x))


@pytest.mark.parametrize('kwargs', CONFIGS)
def test_module_gradients(kwargs):
    module = create(8, 2, dtype=torch.float64, **kwargs)
    x = randn(2, 5, 3, 8)
    params = dict(module.named_parameters())

    def call(fn, x, *values):
        return torch.func.functional_call(Caller(module, fn), {f'module.{k}': v for k, v in zip(params, values)}, (x,))

    class Caller(nn.Module):
        def __init__(self, module, fn):
            super().__init__()
            self.module, self.fn = module, fn

        def forward(self, x):
            return self.fn(self.module, x)

    results = [
        value_and_grads(partial(call, fn), x, *params.values()) for fn in (lambda m, x: m(x), by_hand)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize('path', ['inference', 'row blocks'])
def test_other_memory_formats(path: str):
    module, x = create(8, 2, dtype=torch.float64), randn(2, 6, 9, 8)
    expected = module(x)
    for strided in (x.transpose(1, 2).contiguous().transpose(1, 2), x.permute(3, 0, 1, 2).contiguous().permute(
            1, 2, 3, 0), torch.cat([x, x], dim=2)[:, :, :9]):
        assert_close(PATHS[path](module, strided), expected)


# what the operator is

def test_cosine():
    """A cosine between queries and columns of K^T V times the scales, and so bounded by them."""
    q, k, v, gamma_q, gamma_kv = inputs(N=200)
    out = xnorm_attention(q, k, v, gamma_q, gamma_kv)
    columns = (k.transpose(-2, -1) @ v).transpose(-2, -1)  # (B, heads, e, d)
    cosine = nn.functional.cosine_similarity(q.unsqueeze(3), columns.unsqueeze(2), dim=-1)
    gamma = (gamma_q * gamma_kv).reshape(-1, 1, 1)
    assert_close(out, gamma * cosine)
    assert (out.abs() <= gamma.abs() * (1 + 1e-12)).all() and (out.abs() > .9 * gamma.abs()).any()


def test_other_axis_is_no_cosine():
    """Its bound is the root of d as much."""
    k = torch.eye(4, dtype=torch.float64).repeat(1, 1, 2, 1)
    v = torch.ones(1, 1, 8, 1, dtype=torch.float64)
    q = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    assert xnorm_attention(q, k, v).item() == pytest.approx(1.)
    assert xnorm_attention(q, k, v, kv_axis='value').item() == pytest.approx(2.)


@pytest.mark.parametrize('kv_axis', AXES)
def test_scale_invariance(kv_axis: str):
    args = inputs()
    expected = xnorm_attention(*args, kv_axis=kv_axis)
    for i in range(3):
        for scale in (1e-2, 3., 1e6):
            scaled = [x * scale if i == j else x for j, x in enumerate(args)]
            assert_close(xnorm_attention(*scaled, kv_axis=kv_axis), expected)
    repeated = [args[0], *(torch.cat([x, x, x], dim=2) for x in args[1:3]), *args[3:]]
    assert_close(xnorm_attention(*repeated, kv_axis=kv_axis), expected)


def test_order_of_the_products():
    """Without norms it is Q K^T V, whichever product comes first."""
    q, k, v, *_ = inputs()
    sums, _ = token_sums(k, v)
    assert_close(token_apply(q, sums), (q @ k.transpose(-2, -1)) @ v)


@pytest.mark.parametrize('path', PATHS)
def test_permutation_of_positions(path: str):
    module, x = create(8, 2, dtype=torch.float64), randn(2, 6, 9, 8)
    order = torch.randperm(54, generator=torch.Generator().manual_seed(0))
    permuted = x.flatten(1, 2)[:, order].unflatten(1, (9, 6))
    expected = PATHS[path](module, x).flatten(1, 2)[:, order]
    assert_close(PATHS[path](module, permuted).flatten(1, 2), expected)


def test_parameters():
    """As many for a map of any size: 4 C E weights, 3 E + C biases, two scales for each head."""
    for kwargs, E in ((dict(), 24), (dict(attn_dim=12), 12), (dict(attn_ratio=.5), 12)):
        for cls in (XNormAttention, XNormClassAttention):
            module = cls(24, 6, **kwargs)
            assert sum(p.numel() for p in module.parameters()) == 4 * 24 * E + 3 * E + 24 + 2 * 6
            assert module.gamma_q.eq(1).all() and module.gamma_kv.eq(1).all() and not list(module.buffers())
    assert XNormAttention(24, 6, qkv_bias=False).qkv.bias is None


# class attention

def test_class_attention():
    """One query, keys and values of the class token and of all positions."""
    module = create(8, 2, cls=XNormClassAttention, attn_dim=6, dtype=torch.float64)
    x = randn(2, 10, 8).requires_grad_()
    q, (k, v) = module.q(x[:, :1]), module.kv(x).chunk(2, dim=-1)
    q, k, v = (u.unflatten(-1, (2, 3)).transpose(1, 2) for u in (q, k, v))
    expected = reference.xnorm_attention(q, k, v, module.gamma_q, module.gamma_kv)
    expected = module.proj(expected.transpose(1, 2).flatten(2))
    out = module(x)
    assert out.shape == (2, 1, 8)
    assert_close(out, expected)
    assert_close(torch.jit.script(module)(x), expected)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), [x, *module.parameters()]) for o in (out, expected))):
        assert_close(a, b)
    order = torch.tensor([0, 3, 1, 2, 9, 8, 7, 6, 5, 4])
    assert_close(module(x[:, order]), expected)


# zero

@pytest.mark.parametrize('script', [False, True])
@pytest.mark.parametrize('kv_axis', AXES)
@pytest.mark.parametrize('which', [(0,), (1,), (2,), (0, 1, 2)])
def test_zero_vectors(which, kv_axis: str, script: bool):
    """Zero in, zero out, and no gradient where a vector has no direction."""
    args = inputs(dtype=torch.float32)
    for i in which:
        args[i].zero_()
    args = [x.requires_grad_() for x in args]
    fn = torch.jit.script(xnorm_attention) if script else xnorm_attention
    out = fn(*args, kv_axis=kv_axis)
    assert out.eq(0).all()
    out.backward(randn(*out.shape, dtype=torch.float32))
    assert all(x.grad.eq(0).all() for x in args)


@pytest.mark.parametrize('path', PATHS)
def test_zero_map(path: str):
    """Without biases a black image has no direction at all; with one that is not black, others stay as they are."""
    module = create(8, 2, qkv_bias=False)
    x = randn(2, 25, 30, 8, dtype=torch.float32)
    expected = through_autograd(module, x)
    x[0] = 0
    out = PATHS[path](module, x)
    torch.testing.assert_close(out[0], module.proj.bias.expand_as(out[0]))
    torch.testing.assert_close(out[1], expected[1], rtol=1e-4, atol=1e-5)


def test_one_zero_query():
    args = [x.requires_grad_() for x in inputs(dtype=torch.float32)]
    q = args[0].detach().clone()
    q[:, :, 2] = 0
    q.requires_grad_()
    out = xnorm_attention(q, *args[1:])
    out.square().sum().backward()
    assert out[:, :, 2].eq(0).all() and q.grad[:, :, 2].eq(0).all() and q.grad[:, :, 3].ne(0).all()
    assert all(torch.isfinite(x.grad).all() for x in args[1:])


# precision


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('path', ['autograd', 'inference', 'row blocks', 'torchscript'])
def test_module_in_half_precision(path: str, dtype: torch.dtype):
    module = create(16, 2, attn_dim=8)
    x = 3 * randn(2, 40, 25, 16, dtype=torch.float32) + 2
    expected = module(x).detach()
    with torch.autocast('cpu', dtype=dtype):
        mixed = PATHS[path](module, x)
    half = PATHS[path](copy.deepcopy(module).to(dtype), x.to(dtype))
    for out in (mixed, half):
        assert out.dtype == dtype
        error = (out.float() - expected).abs().max() / expected.abs().max()
        assert error < (.05 if dtype == torch.bfloat16 else .01)


# contract

@pytest.mark.parametrize('kwargs, words', [
    (dict(dim=12, num_heads=5), ['dim=12', 'num_heads=5']),
    (dict(dim=12, num_heads=2, attn_dim=5), ['attn_dim=5', 'num_heads=2']),
    (dict(dim=12, num_heads=4, attn_dim=0), ['attn_dim=0', 'positive']),
    (dict(dim=12, num_heads=4, attn_ratio=.5), ['12 * 0.5', 'num_heads=4']),
    (dict(dim=12, num_heads=4, attn_ratio=-1.), ['12 * -1.0', 'positive']),
    (dict(dim=12, num_heads=4, kv_axis='both'), ["kv_axis 'both'", 'key, value']),
])
@pytest.mark.parametrize('cls', [XNormAttention, XNormClassAttention])
def test_bad_arguments(cls, kwargs, words):
    with pytest.raises(ValueError) as e:
        cls(**kwargs)
    assert all(word in str(e.value) for word in words), e.value


def test_dropout():
    module = create(8, 2, proj_drop=.5)
    x = randn(2, 30, 20, 8, dtype=torch.float32)
    assert torch.equal(module(x), module(x))
    module.train()
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert not torch.equal(module(x), module(x))
            assert .3 < module(x).eq(0).float().mean() < .7


def test_export_with_free_sizes():
    module = create(8, 2)
    dynamic = dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    x = randn(2, 6, 5, 8, dtype=torch.float32)
    exported = torch.export.export(module, (x,), dynamic_shapes=(dynamic,))
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    exported = torch.export.load(io.BytesIO(stream.getvalue())).module()
    for shape in ((2, 6, 5, 8), (3, 40, 30, 8)):
        x = randn(*shape, dtype=torch.float32)
        torch.testing.assert_close(exported(x), module(x), rtol=1e-4, atol=1e-5)
