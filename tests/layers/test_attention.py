"""Softmax and plain linear attention, and the choice of a mechanism by name."""
from functools import partial

import pytest
import timm
import torch
from torch import nn

import vitlinear  # noqa: F401
from vitlinear.layers import (
    ATTENTION_LAYERS,
    LinearAttention,
    SoftmaxAttention,
    VicinityAttention,
    get_attention_layer,
)
from vitlinear.ops import reference


def compare(actual, expected, *args, **tolerance):
    cotangent = None
    results = []
    for fn in (actual, expected):
        out = fn(*args)
        cotangent = torch.randn_like(out) if cotangent is None else cotangent
        results.append([out, *torch.autograd.grad(out, args, cotangent)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize('name', ['softmax', 'linear'])
@pytest.mark.parametrize('qkv_bias', [True, False])
@pytest.mark.parametrize('heads, H, W', [(1, 5, 8), (2, 9, 4), (4, 1, 1)])
def test_module_against_dense_form(name: str, qkv_bias: bool, heads: int, H: int, W: int):
    torch.manual_seed(0)
    dim = 8
    module = ATTENTION_LAYERS[name](dim, heads, qkv_bias=qkv_bias, dtype=torch.float64)
    for p in module.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, H, W, dim, dtype=torch.float64, requires_grad=True)

    def by_hand(x, *params):
        q, k, v = module.qkv(x).flatten(1, 2).chunk(3, dim=-1)
        q, k, v = (u.unflatten(-1, (heads, -1)).transpose(1, 2) for u in (q, k, v))
        out = getattr(reference, f'{name}_attention')(q, k, v)
        return module.proj(out.transpose(1, 2).flatten(2)).unflatten(1, (H, W))

    assert (module.qkv.bias is not None) == qkv_bias
    compare(lambda x, *p: module(x), by_hand, x, *module.parameters(), rtol=1e-9, atol=1e-11)


def test_softmax_rows_are_weighted_means():
    q, k = torch.randn(2, 1, 1, 6, 4, dtype=torch.float64)
    out = reference.softmax_attention(q, k, torch.ones(1, 1, 6, 2, dtype=torch.float64))
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize('name', sorted(ATTENTION_LAYERS))
@pytest.mark.parametrize('dim, heads', [(12, 5), (12, 0), (0, 1), (12, -3)])
def test_head_divisibility(name: str, dim: int, heads: int):
    with pytest.raises(ValueError, match=f'dim={dim}|num_heads={heads}'):
        ATTENTION_LAYERS[name](dim, heads)


@pytest.mark.parametrize('name', sorted(ATTENTION_LAYERS))
def test_module_contract(name: str):
    """Any H and W, dtype and device arguments, each image for itself, an unknown argument is an error."""
    torch.manual_seed(0)
    cls = ATTENTION_LAYERS[name]
    module = cls(16, 2, dtype=torch.float64)
    x = torch.randn(4, 5, 3, 16, dtype=torch.float64)
    out = module(x)
    assert out.shape == x.shape and out.dtype == x.dtype
    for i in range(4):
        torch.testing.assert_close(module(x[i:i + 1]), out[i:i + 1], rtol=1e-10, atol=1e-12)
    module(torch.randn(2, 1, 11, 16, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert cls(16, 2, device='meta')(torch.empty(2, 3, 4, 16, device='meta')).shape == (2, 3, 4, 16)
    with pytest.raises(TypeError, match='qkv_scale'):
        cls(16, 2, qkv_scale=2.)


def test_registry():
    assert get_attention_layer('vicinity') is VicinityAttention
    assert get_attention_layer('softmax') is SoftmaxAttention
    assert get_attention_layer('linear') is LinearAttention
    factory = partial(VicinityAttention, clamp=False)
    assert get_attention_layer(factory) is factory
    with pytest.raises(ValueError) as e:
        get_attention_layer('vincinity')
    assert "'vincinity'" in str(e.value) and all(name in str(e.value) for name in ATTENTION_LAYERS)


SWAPS = {
    **{name: dict(attn_layer=name) for name in ATTENTION_LAYERS},
    'default': dict(),
    'class': dict(attn_layer=LinearAttention, attn_kwargs=dict(qkv_bias=False)),
    'factory': dict(attn_layer=partial(VicinityAttention, fpc_reduction=2), attn_kwargs={}),
    **{f'vicinity {name}': dict(attn_kwargs=dict(locality=name)) for name in ('2d_product', '1d', 'none')},
}


def test_swapping_in_a_backbone():
    """Everything but the attention gets the same weights: outputs differ by the mechanism alone."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 28)
    outputs, shared = {}, None
    for name, kwargs in SWAPS.items():
        torch.manual_seed(0)
        model = timm.create_model('vvt_nano', num_classes=10, **kwargs).eval()
        shared = shared or {k: v for k, v in model.state_dict().items() if '.attn.' not in k}
        assert set(shared) == {k for k in model.state_dict() if '.attn.' not in k}, name
        model.load_state_dict(shared, strict=False)
        for k, p in model.named_parameters():
            if '.attn.' in k and p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -.5, generator=torch.Generator().manual_seed(len(k)))
        out = model(x)
        out.square().sum().backward()
        assert out.shape == (2, 10) and torch.isfinite(out).all(), name
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters()), name
        outputs[name] = out.detach()
    names = list(outputs)
    for i, a in enumerate(names):
        for b in names[:i]:
            same_thing = {a, b} in ({'default', 'vicinity'}, {'class', 'linear'})  # biases start at zero
            assert ((outputs[a] - outputs[b]).abs().max() > 1e-3) != same_thing, (a, b)


def test_unknown_name_in_a_backbone():
    expected = f"Unknown attn_layer 'nosuch', expected one of {', '.join(sorted(ATTENTION_LAYERS))}"
    with pytest.raises(ValueError, match=expected):
        timm.create_model('vvt_nano', attn_layer='nosuch')


def test_unknown_attn_kwargs_in_a_backbone():
    with pytest.raises(TypeError, match='temperature'):
        timm.create_model('vvt_nano', attn_kwargs=dict(temperature=1.))
