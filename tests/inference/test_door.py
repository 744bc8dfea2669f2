"""Row blocks behind one door: the values of the plain way, and who is sent the plain way."""
import copy
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import vitlinear
from _models import images, randomize
from vitlinear import inference
from vitlinear.inference import door

_SMALL = dict(num_classes=5)
_PYRAMID = dict(_SMALL, embed_dims=(16, 24), depths=(1, 2), num_heads=(2, 3), mlp_ratios=2.)
FAMILIES: dict[str, dict[str, Any]] = {
    'vvt_nano': _PYRAMID,
    'xvit_pyramid_nano': _PYRAMID,
    'gkvit_nano': _PYRAMID,
    'castling_nano': _PYRAMID,
    'qna_vit_nano': dict(
        _SMALL, embed_dims=(16, 32), depths=(1, 2), window_depths=(0, 1), num_heads=(2, 4), window_heads=(1, 2),
        mlp_ratios=2.),
    'xvit_tiny': dict(_SMALL, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, init_values=.5),
    'castling_levit_128s': dict(
        _SMALL, img_size=32, embed_dim=(16, 24), stem_widths=(8, 16), stem_strides=(2, 2), key_dim=4,
        num_heads=(2, 3), depth=(1, 1)),
}
SIZES = [(1, 32, 32), (3, 45, 37), (2, 32, 71), (5, 33, 32)]
CLOSE = dict(rtol=2e-5, atol=2e-5)


def create(name: str, **kwargs: Any) -> nn.Module:
    return randomize(timm.create_model(name, **{**FAMILIES[name], **kwargs}))


@contextmanager
def plainly() -> Iterator[None]:
    """Every model goes the plain way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, 'applies', lambda model, x: False)
        yield


def plain(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with plainly(), torch.no_grad():
        return model(x)


def in_blocks(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output, of which at least one part has come out of the door."""
    runs, run = [], inference.run
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, 'run', lambda *args: runs.append(1) or run(*args))
        out = model(x)
    assert runs == [1]
    return out


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and torch.isfinite(actual).all()
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize('block', [None, 4096, 1])
@pytest.mark.parametrize('name', FAMILIES)
def test_values(name: str, block: int | None, nan_memory):
    model = create(name)
    for B, H, W in SIZES:
        x = images(B, 3, H, W)
        before = x.clone()
        with nullcontext() if block is None else inference.row_block_bytes(block):
            out = in_blocks(model, x)
        assert_near(out, plain(model, x), 1e-5)
        assert torch.equal(x, before)


@pytest.mark.parametrize('block', [None, 4096])
@pytest.mark.parametrize('name', FAMILIES)
def test_values_in_bfloat16(name: str, block: int | None, nan_memory):
    """No farther from float64 than the plain way, but for chance."""
    model, x = create(name).to(torch.bfloat16), images(3, 3, 45, 37).to(torch.bfloat16)
    expected, way = plain(copy.deepcopy(model).double(), x.double()), plain(model, x)
    with nullcontext() if block is None else inference.row_block_bytes(block):
        out = in_blocks(model, x)
    assert out.dtype == torch.bfloat16
    error, usual = ((y.double() - expected).norm() / expected.norm() for y in (out, way))
    assert error <= 1.5 * usual + .02


@pytest.mark.parametrize('name', FAMILIES)
def test_autocast(name: str):
    model, x = create(name), images(2, 3, 45, 37)
    expected = plain(model, x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out, way = in_blocks(model, x), plain(model, x)
    assert out.dtype == way.dtype
    error, usual = ((y.float() - expected).norm() / expected.norm() for y in (out, way))
    assert error <= 1.5 * usual + .02


@pytest.mark.parametrize('name', FAMILIES)
def test_each_image_for_itself(name: str):
    model, x = create(name), images(5, 3, 32, 32)
    with inference.row_block_bytes(4096):
        together = in_blocks(model, x)
        for i in range(len(x)):
            assert_near(in_blocks(model, x[i:i + 1]), together[i:i + 1], 1e-5)


@pytest.mark.parametrize('name', FAMILIES)
def test_inference_mode(name: str):
    """The result of a pass does not depend on the mode of one before it."""
    model, x = create(name), images(2, 3, 32, 32)
    expected = plain(model, x)
    with torch.inference_mode():
        assert inference.applies(model, x)
        assert_near(model(x), expected, 1e-5)
    assert_near(in_blocks(model, x), expected, 1e-5)
    model(x).sum().backward()  # nothing that inference mode has kept is in the way
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', FAMILIES)
def test_maps_are_left_alone(name: str, nan_memory):
    """Maps and features that a caller holds, and images, stay as they were."""
    model, x = create(name), images(2, 3, 32, 32)
    before = x.clone()
    with torch.no_grad(), inference.row_block_bytes(4096):
        with plainly():
            expected = model.forward_intermediates(x, intermediates_only=True)
        _, maps = model.forward_intermediates(x)
        features = model.forward_features(x)
        held = [t.clone() for t in (features, *maps)]
        model.forward_head(features)
        model(x)
    for a, b in zip((features, *maps), held, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(maps, expected, strict=True):
        assert_near(a, b, 1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize('name', FAMILIES)
def test_copies(name: str):
    model, x = create(name), images(2, 3, 32, 32)
    expected = in_blocks(model, x)
    assert torch.equal(in_blocks(copy.deepcopy(model), x), expected)
    assert torch.equal(in_blocks(pickle.loads(pickle.dumps(model)), x), expected)


# who is sent the plain way

class DoubledLinear(nn.Linear):
    """An adapter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class DoubledConv2d(nn.Conv2d):
    """An adapter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Negated(nn.Module):
    """A layer that the package does not know."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return -self.layer(*args)


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Weight(nn.Parameter):
    """A weight whose products are doubled, as those of quantised tensors are their own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
        return 2 * out if function in (nn.functional.linear, torch.conv2d) else out


def _layer(model: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    """The last linear layer or convolution before the head, with its parent and name."""
    name, layer = [
        (name, m) for name, m in model.named_modules()
        if type(m) in (nn.Linear, nn.Conv2d) and not name.startswith('head')][-1]
    parent, _, own = name.rpartition('.')
    return model.get_submodule(parent), own, layer


def _hook(model: nn.Module) -> None:
    _layer(model)[2].register_forward_hook(lambda m, args, out: 2 * out)


def _pre_hook(model: nn.Module) -> None:
    _layer(model)[2].register_forward_pre_hook(lambda m, args: (2 * args[0],))


def _adapter(model: nn.Module) -> None:
    parent, name, layer = _layer(model)
    adapter = copy.copy(layer)
    adapter.__class__ = DoubledLinear if type(layer) is nn.Linear else DoubledConv2d
    setattr(parent, name, adapter)


def _foreign(model: nn.Module) -> None:
    parent, name, layer = _layer(model)
    setattr(parent, name, Negated(layer).eval())


def _patched(model: nn.Module) -> None:
    layer = _layer(model)[2]
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)


def _parametrised(model: nn.Module) -> None:
    parametrize.register_parametrization(_layer(model)[2], 'weight', Twice())
    model.eval()


def _subclass(model: nn.Module) -> None:
    layer = _layer(model)[2]
    layer.weight = Weight(layer.weight.data)


def _training(model: nn.Module) -> None:
    parent, name, layer = _layer(model)
    dropout = nn.Sequential(layer, nn.Dropout(1.))
    setattr(parent, name, dropout)
    dropout.train()


@pytest.mark.parametrize('attach', [
    _hook, _pre_hook, _adapter, _foreign, _patched, _parametrised, _subclass, _training])
@pytest.mark.parametrize('name', FAMILIES)
def test_attached(name: str, attach: Callable[[nn.Module], None]):
    """What is attached deep in a model has its effect, the same as where autograd records."""
    model, x = create(name), images(2, 3, 32, 32)
    with torch.no_grad():
        assert inference.applies(model, x)
        untouched = model(x)
        attach(model)
        assert not inference.applies(model, x)
        out = model(x)
    assert (out - untouched).abs().max() > 1e-4
    torch.testing.assert_close(out, model(x).detach(), **CLOSE)


@pytest.mark.parametrize('name', FAMILIES)
def test_every_child_is_called(name: str):
    """A hook on any layer fires, and sends the model the plain way."""
    model, x = create(name), images(1, 3, 32, 32)
    with torch.no_grad():
        seen: set[str] = set()
        handles = [
            m.register_forward_hook(lambda *args, n=n: seen.add(n)) for n, m in model.named_modules() if n]
        with torch.enable_grad():
            model(x)
        recorded = set(seen)
        for handle in handles:
            handle.remove()
        assert inference.applies(model, x)
        for layer_name in sorted(recorded):
            seen.clear()
            handle = model.get_submodule(layer_name).register_forward_hook(lambda *args: seen.add('fired'))
            assert not inference.applies(model, x), layer_name
            model(x)
            handle.remove()
            assert seen, layer_name


@pytest.mark.parametrize('name', FAMILIES)
def test_modes(name: str):
    """Autograd, training, tracing, transforms and other tensors go the plain way."""
    model, x = create(name), images(1, 3, 32, 32)
    assert not inference.applies(model, x)
    with torch.no_grad():
        assert inference.applies(model, x)
        assert not inference.applies(model, x.as_subclass(type('Image', (torch.Tensor,), {})))
        assert not inference.applies(model, torch.empty(1, 3, 32, 32, device='meta'))
        assert not torch.func.vmap(lambda y: y + inference.applies(model, y))(x).sub(x).any()
        assert not inference.applies(copy.deepcopy(model).train(), x)
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        try:
            assert not inference.applies(model, x)
        finally:
            handle.remove()
        assert door.is_unmodified(model)


@pytest.mark.parametrize('name', ['vvt_nano', 'xvit_pyramid_nano', 'gkvit_nano', 'xvit_tiny', 'castling_levit_128s'])
def test_forward_mode(name: str):
    """Dual numbers go the plain way, under no_grad as elsewhere, and come out with their tangents."""
    model, x, tangent = create(name).double(), images(1, 3, 32, 32).double(), images(1, 3, 32, 32, seed=1).double()
    expected = torch.func.jvp(model, (x,), (tangent,))[1]
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        assert not inference.applies(model, dual)
        found = forward_ad.unpack_dual(model(dual)).tangent
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_row_block_bytes():
    with pytest.raises(ValueError, match='size=0 must be positive'), inference.row_block_bytes(0):
        pass
    with pytest.raises(KeyError), inference.row_block_bytes(1):
        raise KeyError
    model, x = create('vvt_nano'), images(1, 3, 32, 32)
    assert_near(in_blocks(model, x), plain(model, x), 1e-5)


def test_keep_freed_memory():
    assert inference.keep_freed_memory() is None


def test_python_calls():
    """Of the package's functions in one pass, what an image costs beside its arithmetic; the door is asked once."""
    model, x = timm.create_model('vvt_small').eval(), images(1, 3, 224, 224)
    root, calls = os.path.dirname(vitlinear.__file__) + os.sep, []

    def profile(frame, event, arg):
        if event == 'call' and frame.f_code.co_filename.startswith(root):
            calls.append(frame.f_code.co_name)

    with torch.no_grad():
        model(x)
        sys.setprofile(profile)
        try:
            model(x)
        finally:
            sys.setprofile(None)
    assert 0 < len(calls) <= 350, {name: calls.count(name) for name in set(calls)}
    assert calls.count('applies') == 1
