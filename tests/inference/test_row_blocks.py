"""Row blocks give what the plain way gives, and write over nothing that others hold."""
import re

import pytest
import torch
from torch import nn

from _pyramids import BACKBONES, CLOSE, FAMILIES, create, images
from vitlinear import inference
from vitlinear.inference.rows import BRANCHES
from vitlinear.layers.block import PatchEmbed
from vitlinear.layers.mlp import ConvMlp, Mlp

pytestmark = pytest.mark.usefixtures('nan_memory')


@pytest.fixture(scope='module', params=FAMILIES)
def model(request) -> nn.Module:
    """For tests that leave it as it is."""
    return create(request.param)


@pytest.mark.parametrize('size', [(32, 32), (72, 40), (9, 64), (1, 1)])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('band', [1, 3000, 20000, 2 ** 21])
def test_inference_equals_training_graph(model, band: int, context, batch: int, size):
    """Whatever the inference path cuts into bands: none, some rows at a time, or single rows."""
    x = images(batch, 3, *size)
    expected = model(x)
    assert expected.requires_grad
    with context(), inference.row_block_bytes(band):
        assert inference.applies(model, x)
        out = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(out, expected.detach(), **CLOSE)
    for a, b in zip(maps, model.forward_intermediates(x, intermediates_only=True)):
        torch.testing.assert_close(a, b.detach(), **CLOSE)
        assert a.stride() == b.stride()


@pytest.mark.parametrize('band', [1, 3000, 2 ** 21])
@pytest.mark.parametrize('layer', [ConvMlp, Mlp])
def test_mlp_in_row_blocks(layer: type[nn.Module], band: int):
    """Where errors at the seams of blocks cannot average out; context is read before it is overwritten."""
    torch.manual_seed(0)
    mlp, norm = layer(6, 24).double().eval(), nn.LayerNorm(6).double()
    form = BRANCHES[layer]
    for shape in ((1, 37, 11, 6), (3, 8, 50, 6), (2, 1, 40, 6), (2, 40, 1, 6), (1, 1, 1, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        x_t = torch.randn(shape[0], shape[2], shape[1], 6, dtype=torch.float64).transpose(1, 2)
        for u in (x, x_t):
            before, expected, total = u.clone(), mlp(u).detach(), (u + mlp(norm(u))).detach()
            with torch.no_grad(), inference.row_block_bytes(band):
                torch.testing.assert_close(form(mlp, u, None, None), expected, rtol=1e-12, atol=1e-12)
                assert torch.equal(u, before)
                assert form(mlp, u, norm, u) is u
            torch.testing.assert_close(u, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('stem', [True, False])
@pytest.mark.parametrize('where', [
    '', 'patch_embed', 'stages', r'stages.\d', r'stages.\d.downsample', r'stages.\d.blocks.\d', '.*norm.*', '.*'])
@pytest.mark.parametrize('backbone', FAMILIES)
def test_inference_overwrites_nothing_that_others_hold(backbone: str, where: str, stem: bool):
    """Neither images nor what hooks have been given."""
    model, x = create(backbone, depths=(2, 2, 2, 2)).eval(), images(1, 3, 64, 64)
    if not stem:
        model.in_chans = model.stages[0].blocks[0].norm1.weight.numel()
        model.patch_embed = nn.Identity()
        x = images(1, model.in_chans, 16, 16).contiguous(memory_format=torch.channels_last)
    before, expected = x.clone(), model(x).detach()
    held = []

    def hold(module, args, output):
        held.extend((t, t.clone()) for t in (*args, output) if isinstance(t, torch.Tensor))

    for name, module in model.named_modules():
        if re.fullmatch(where, name):
            module.register_forward_hook(hold)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **CLOSE)
    assert held
    assert all(torch.equal(a, b) for a, b in [*held, (x, before)])


def test_inference_respects_what_replaces_a_layer():
    """Adapters, quantised layers and hooks take part in inference; only plain layers are evaluated by their weights."""
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model = create().eval()
    x = images(1, 3, 256, 256)
    calls = []
    block = model.stages[0].blocks[0]
    for layer in (block.attn.qkv, block.attn.proj, block.norm2, block.mlp, block.mlp.fc1, block.mlp.dwconv):
        handle = layer.register_forward_hook(lambda module, args, output: calls.append(module))
        with torch.no_grad():
            model(x)
        assert set(calls) == {layer}
        calls.clear()
        handle.remove()
    for parent, name in ((block.attn, 'qkv'), (block.attn, 'proj'), (block.mlp, 'fc1'), (block.mlp, 'fc2')):
        layer = getattr(parent, name)
        doubled = Doubled(layer.in_features, layer.out_features)
        doubled.load_state_dict(layer.state_dict())
        setattr(parent, name, doubled)
        expected = model(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, **CLOSE)
        setattr(parent, name, layer)


class Stored(torch.Tensor):
    """A weight in a form of its own, for which there is a linear layer and nothing else; as torchao's in 8 bits."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: torch.Tensor):
        self.weight = weight

    def __tensor_flatten__(self):
        return ['weight'], None

    @staticmethod
    def __tensor_unflatten__(inner, metadata, size, stride):
        return Stored(inner['weight'])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return func(args[0], args[1].weight, *args[2:])
        if func.__name__ not in ('__get__', '__set__', 'detach', 'requires_grad_'):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.detach.default:
            raise NotImplementedError(func)
        return cls(args[0].weight)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_inference_with_weights_in_another_form(backbone: str):
    model, x = create(backbone).eval(), images(2, 3, 64, 48)
    expected = model(x).detach()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(Stored(module.weight.detach()), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **CLOSE)


@pytest.mark.parametrize('backbone', FAMILIES)
def test_training_without_gradients_keeps_dropout(backbone: str):
    """Training mode under no_grad, as when batch statistics are gathered, drops as with gradients."""
    model = create(backbone, proj_drop_rate=.5, drop_rate=.2, drop_path_rate=.3).train()
    x = images(2, 3, 32, 24)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    with torch.no_grad():
        out = model(x)
    torch.testing.assert_close(out, expected.detach(), **CLOSE)
    torch.manual_seed(2)
    with torch.no_grad():
        assert not torch.allclose(out, model(x))
        assert not torch.allclose(model(x), model.eval()(x))


@pytest.mark.parametrize('backbone', FAMILIES)
def test_frozen_weights_with_gradients_of_the_input(backbone: str):
    model, x = create(backbone), images(1, 3, 32, 32)
    expected = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x)[0]
    model.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x)[0], expected, **CLOSE)


@pytest.mark.parametrize('size', [3, 40])
def test_patch_embed(size: int):
    """Maps with fewer values than the kernel, whose format the convolution is spared, and larger ones."""
    torch.manual_seed(0)
    embed = PatchEmbed(8, 16).double()
    x = torch.randn(2, 8, size, size + 1, dtype=torch.float64)
    assert (x.numel() < embed.proj.weight.numel()) == (size == 3)
    expected = embed(x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            y = inference.run((embed,), x.contiguous(memory_format=memory_format))
        torch.testing.assert_close(y, expected)
        assert y.permute(0, 2, 3, 1).is_contiguous()
