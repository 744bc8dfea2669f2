"""Pyramids in TorchScript, torch.export, torch.compile and traces."""
import copy

import pytest
import torch

from _pyramids import BACKBONES, CLOSE, FAMILIES, TWO_STAGES, create, family, images


@pytest.mark.parametrize('backbone', BACKBONES)
def test_torchscript(backbone: str):
    """One scripted model for every size and batch."""
    model = create(backbone, scriptable=True)
    scripted = torch.jit.script(model)
    for shape in ((2, 3, 32, 32), (1, 3, 40, 24), (1, 3, 64, 64)):
        torch.testing.assert_close(scripted(images(*shape)), model(images(*shape)), **CLOSE)
        with torch.no_grad():
            torch.testing.assert_close(scripted(images(*shape)), model(images(*shape)), **CLOSE)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_export(backbone: str):
    model, x = create(backbone, depths=(1, 2, 1, 1)), images(2, 3, 32, 32)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), **CLOSE)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_export_dynamic_batch(backbone: str):
    model = create(backbone, **TWO_STAGES[family(backbone)])
    batch = torch.export.Dim('batch', min=1, max=64)
    exported = torch.export.export(model, (images(2, 3, 32, 32),), dynamic_shapes=({0: batch},)).module()
    for b in (1, 2, 5):
        torch.testing.assert_close(exported(images(b, 3, 32, 32)), model(images(b, 3, 32, 32)), **CLOSE)


def test_export_dynamic_size():
    """Sizes stay free: graphs hold one order of evaluation for all of them."""
    model = create(**TWO_STAGES['vvt_nano'])
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(model, (images(2, 3, 64, 96),), dynamic_shapes=(dynamic,)).module()
    for shape in ((2, 3, 64, 96), (3, 3, 96, 64), (2, 3, 128, 80)):
        torch.testing.assert_close(exported(images(*shape)), model(images(*shape)), **CLOSE)


@pytest.mark.parametrize('backbone, backend, train', [
    *((name, 'eager', True) for name in BACKBONES), *((name, 'eager', False) for name in FAMILIES),
    *((name, 'aot_eager', True) for name in FAMILIES)])
def test_compile(backbone: str, backend: str, train: bool):
    """One graph, forward and backward."""
    torch._dynamo.reset()
    model = create(backbone, **TWO_STAGES[family(backbone)]).train(train)
    x = images(2, 3, 64, 48)
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    out, expected = compiled(x), model(x)
    torch.testing.assert_close(out, expected, **CLOSE)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(compiled.parameters(), model.parameters()):
        size = b.grad.abs().max()
        torch.testing.assert_close(a.grad / size, b.grad / size, **CLOSE)
    if not train:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), **CLOSE)


@pytest.mark.parametrize('backbone', FAMILIES)
def test_trace(backbone: str):
    model = create(backbone)
    with torch.no_grad():
        traced = torch.jit.trace(model, images(2, 3, 32, 32))
        torch.testing.assert_close(traced(images(2, 3, 32, 32, seed=1)), model(images(2, 3, 32, 32, seed=1)), **CLOSE)
