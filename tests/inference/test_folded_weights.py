"""Learned queries in row blocks are folded once, and folded anew when a weight changes, however that happens."""
import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from _numerics import in_row_blocks
from _qna import create_layer, randn
from vitlinear.layers import QnAAttention


def noise(p: torch.Tensor) -> torch.Tensor:
    return randn(*p.shape, seed=7, dtype=p.dtype)


def add_in_place(module, name):
    with torch.no_grad():
        module.get_parameter(name).add_(noise(module.get_parameter(name)))


def through_data(module, name):
    module.get_parameter(name).data.mul_(noise(module.get_parameter(name)))


def new_data(module, name):
    p = module.get_parameter(name)
    p.data = noise(p)


def new_parameter(module, name):
    owner, _, leaf = name.rpartition('.')
    setattr(module.get_submodule(owner), leaf, nn.Parameter(noise(module.get_parameter(name))))


def optimizer_step(module, name):
    p = module.get_parameter(name)
    p.grad = noise(p)
    torch.optim.SGD([p], lr=.5).step()


def load(module, name):
    module.load_state_dict({**module.state_dict(), name: noise(module.get_parameter(name))})


def numpy_view(module, name):
    """Neither the address nor the version of the tensor changes."""
    module.get_parameter(name).detach().numpy()[...] += noise(module.get_parameter(name)).numpy()


CHANGES = [add_in_place, through_data, new_data, new_parameter, optimizer_step, load, numpy_view]
PARAMETERS = [
    'query', 'k.weight', 'k.bias', 'v.weight', 'v.bias', 'rel_pos_bias', 'attn_scale', 'proj.weight', 'proj.bias']


@pytest.mark.parametrize('change', CHANGES)
def test_inference_follows_the_weights(change: Callable):
    """Whichever of them changes, however, without a word to the module."""
    for name in PARAMETERS:
        module, x = create_layer(8, 2, qkv_bias=True, proj_bias=True), randn(2, 5, 6, 8)
        assert set(PARAMETERS) == set(dict(module.named_parameters()))
        before = in_row_blocks(module, x)
        change(module, name)
        out = in_row_blocks(module, x)
        # a bias of the keys adds a constant to the scores, which drops out
        assert ((out - before).abs().max() > 1e-2) == (name != 'k.bias'), name
        torch.testing.assert_close(out, module(x), rtol=1e-5, atol=1e-5)


def test_inference_follows_conversions():
    module, x = create_layer(8, 2), randn(2, 5, 6, 8)
    before = in_row_blocks(module, x)
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        module.to(dtype)
        out = in_row_blocks(module, x.to(dtype))
        assert out.dtype == dtype
        fresh = QnAAttention(8, 2, dtype=dtype).eval()
        fresh.load_state_dict(module.state_dict())
        assert torch.equal(in_row_blocks(fresh, x.to(dtype)), out)
    module.float()
    torch.testing.assert_close(in_row_blocks(module, x), before, rtol=.05, atol=.05)
    torch.testing.assert_close(in_row_blocks(module, x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('copier', [copy.deepcopy, lambda m: torch.load(saved(m), weights_only=False)])
def test_copies_are_their_own(copier: Callable):
    module, x = create_layer(8, 2), randn(2, 5, 6, 8)
    out = in_row_blocks(module, x)
    other = copier(module)
    assert torch.equal(in_row_blocks(other, x), out)
    add_in_place(other, 'v.weight')
    assert (in_row_blocks(other, x) - out).abs().max() > 1e-3
    assert torch.equal(in_row_blocks(module, x), out)


def saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_inference_mode_then_training():
    """What was folded under inference mode is used outside of it, and gradients pass it by."""
    module, x = create_layer(8, 2), randn(2, 5, 6, 8)
    with torch.inference_mode():
        expected = in_row_blocks(module, x)
    torch.testing.assert_close(in_row_blocks(module, x), expected.clone(), rtol=1e-6, atol=1e-6)
    module(x.requires_grad_()).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
