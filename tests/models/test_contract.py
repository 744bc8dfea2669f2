"""timm's contract, for the backbones that are no pyramids of ours: see test_pyramid.py for those."""
import copy
import logging
import math
import re

import pytest
import timm
import torch
from torch import nn

from _models import CLOSE, FORMS, blank, build, check_initialisation, create, filtered, images

ANY_SIZE = [form for form in FORMS if 'deit' not in form]
# a compiler takes its time
FEW = ['nano', 'levit', 'mvitv2', 'deit', 'xvit', 'xvit_fourier']
FREE = {'deit': dict(dynamic_img_size=True), 'deit_distilled': dict(dynamic_img_size=True)}


@pytest.mark.parametrize('form', ANY_SIZE)
def test_any_size(form: str):
    """Strides round up, gradients reach everything, and no image sees the others of its batch."""
    model = create(form)
    strides = [info['reduction'] for info in model.feature_info]
    for H, W in ((48, 48), (33, 47), (5, 64), (1, 1), (1, 99)):
        x = images(2, 3, H, W)
        model.zero_grad()
        out = model(x)
        assert out.shape == (2, 5) and torch.isfinite(out).all()
        out.square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [m.shape[2:] for m in maps] == [(math.ceil(H / s), math.ceil(W / s)) for s in strides]
        with torch.no_grad():
            torch.testing.assert_close(model(x[1:]), out[1:].detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('size', [32, 160])
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('form', FORMS)
def test_inference_equals_training_graph(form: str, train: bool, size: int):
    """Small maps and large ones; batch norms in training take their batch without gradients as well."""
    model = create(form, **FREE.get(form, {})).train(train)
    x = images(2, 3, size, size)
    expected = copy.deepcopy(model)(x).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(copy.deepcopy(model)(x), expected, **CLOSE)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('form', FEW)
def test_half_precision(form: str, dtype: torch.dtype):
    for kwargs in (dict(), dict(attn_kwargs=dict(aux_mode='always'))) if 'xvit' not in form else (dict(),):
        model, x = create(form, **kwargs), images(2, 3, 32, 32)
        expected = model(x).detach()
        with torch.autocast('cpu', dtype=dtype):
            mixed = model(x)
        mixed.float().square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        with torch.no_grad():
            half = model.to(dtype)(x.to(dtype))
        for out in (mixed, half):
            assert out.dtype == dtype and torch.isfinite(out).all()
            assert (out.float() - expected).abs().max() < (
                .1 if dtype == torch.bfloat16 else .02) * expected.abs().max()


@pytest.mark.parametrize('form', FEW)
def test_torchscript(form: str):
    model = create(form, scriptable=True)
    scripted = torch.jit.script(model)
    for shape in ((2, 3, 32, 32), (1, 3, 40, 72)) if form in ANY_SIZE else ((2, 3, 32, 32),):
        torch.testing.assert_close(scripted(images(*shape)), model(images(*shape)), **CLOSE)


@pytest.mark.parametrize('form', FEW)
def test_export(form: str):
    """One graph for any batch and size."""
    kwargs = dict(dynamic_img_size=True, scale_with_size=True) if form == 'deit' else {}
    model = create(form, **kwargs)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(model, (images(2, 3, 64, 96),), dynamic_shapes=(dynamic,)).module()
    for shape in ((2, 3, 64, 96), (3, 3, 96, 64)):
        torch.testing.assert_close(exported(images(*shape)), model(images(*shape)), **CLOSE)


@pytest.mark.parametrize(('backend', 'train'), [('eager', False), ('aot_eager', True)])
def test_compile(backend: str, train: bool):
    torch._dynamo.reset()
    model = create('xvit', depth=1).train(train)
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    x = images(2, 3, 64, 48)
    out, expected = compiled(x), model(x)
    torch.testing.assert_close(out, expected, **CLOSE)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(compiled.parameters(), model.parameters(), strict=True):
        size = b.grad.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(a.grad / size, b.grad / size, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('form', FORMS)
def test_initialisation_after_to_empty(form: str):
    """Everything is there again, thresholds and the count of a schedule included."""
    torch.manual_seed(0)
    kwargs = dict(embed_dim=64, init_values=1e-5) if 'xvit' in form else dict(
        castling_steps=10, attn_kwargs=dict(aux_threshold=.1))
    expected, model = build(form, **kwargs), build(form, device='meta', **kwargs)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {'meta'}
    model = blank(model)
    model.init_weights(needs_reset=True)
    if 'xvit' in form:
        check_initialisation(expected, 1e-5)
        check_initialisation(model, 1e-5)
    assert all(torch.isfinite(t).all() for t in [*model.parameters(), *model.buffers()])
    assert all(torch.equal(t, model.get_buffer(name)) for name, t in expected.named_buffers())
    assert torch.isfinite(model.train()(images(2, 3, 32, 32))).all()


@pytest.mark.parametrize('form', FORMS)
def test_created_on_device_and_dtype(form: str):
    assert {p.dtype for p in build(form, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    model = build(form, device='meta', **({} if 'xvit' in form else dict(castling_steps=5)))
    assert model(torch.empty(2, 3, 32, 32, device='meta')).shape == (2, 5)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {'meta'}


@pytest.mark.parametrize(('name', 'reductions'), [
    ('castling_nano', [2, 4, 8, 16]), ('castling_levit_128s', [16, 32, 64]), ('castling_levit_384', [16, 32, 64]),
    ('castling_mvitv2_tiny', [4, 8, 16, 32]), ('castling_pvt_v2_b0', [4, 8, 16, 32]),
    ('castling_deit_tiny_patch16_224', [16] * 3), ('castling_deit_tiny_distilled_patch16_224', [16] * 3),
    ('xvit_tiny', [16] * 3)])
def test_features_only(name: str, reductions):
    model = timm.create_model(name, features_only=True, device='meta')
    assert model.feature_info.reduction() == reductions
    size = (224, 224) if 'deit' in name else (96, 160)
    for m, r, channels in zip(
            model(torch.empty(2, 3, *size, device='meta')), reductions, model.feature_info.channels(), strict=True):
        assert m.shape == (2, channels, -(-size[0] // r), -(-size[1] // r))


# checkpoints

@pytest.mark.parametrize('form', FORMS)
def test_own_checkpoints(form: str):
    """As they are, from containers, in any order, with or without a head."""
    source, model = create(form), create(form, seed=1)
    state = source.state_dict()
    for wrapped in (state, {'model': state}, {'state_dict': {f'module.{k}': v for k, v in state.items()}}):
        loaded = filtered(wrapped, model)
        assert list(loaded) == list(state)
        assert all(torch.equal(loaded[k], v) for k, v in state.items())
    headless = {k: v for k, v in state.items() if not k.startswith('head')}
    assert filtered(headless, model).keys() == headless.keys()
    assert filtered(dict(sorted(state.items())), model).keys() == state.keys()


@pytest.mark.parametrize('form', FORMS)
def test_other_classes(form: str, caplog):
    """The head is the model's own, with a warning; a model without one takes the rest."""
    state, model = create(form).state_dict(), create(form, seed=1, num_classes=3)
    with caplog.at_level(logging.WARNING, 'vitlinear'):
        loaded = filtered(state, model)
    assert '5 classes' in caplog.text
    own = model.state_dict()
    heads = [k for k, v in own.items() if k.startswith('head') and v.ndim and len(v) == 3]
    assert heads and all(torch.equal(v, own[k] if k in heads else state[k]) for k, v in loaded.items())
    model.load_state_dict(loaded, strict=True)
    model = create(form, num_classes=0)
    model.load_state_dict(filtered(state, model), strict=True)


@pytest.mark.parametrize('form', FORMS)
def test_other_checkpoints_are_refused(form: str):
    model = create(form)
    for other in ('vvt_nano', 'resnet18', 'xvit_pyramid_nano'):
        with pytest.raises(ValueError, match='checkpoint'):
            filtered(timm.create_model(other, device='meta').state_dict(), model)
    with pytest.raises(ValueError, match='holds no'):
        filtered({}, model)
    state = model.state_dict()
    gone = next(k for k in state if 'mlp' in k)
    with pytest.raises(ValueError, match=f'incomplete: {re.escape(gone)}'):
        filtered({k: v for k, v in state.items() if k != gone}, model)


# bad input

@pytest.mark.parametrize('form', ANY_SIZE)
def test_bad_input(form: str):
    model = create(form)
    for shape in ((1, 4, 32, 32), (3, 32, 32), (0, 3, 32, 32), (2, 3, 0, 32)):
        with pytest.raises(ValueError, match='Expected'):
            model(torch.zeros(shape))


@pytest.mark.parametrize('form', FORMS)
def test_unknown_arguments(form: str):
    for wrong, kwargs in (('img_sizes', dict(img_sizes=32)), ('tau', dict(attn_kwargs=dict(tau=1.)))):
        with pytest.raises(TypeError, match=wrong):
            build(form, device='meta', **kwargs)


@pytest.mark.parametrize('form', FORMS)
def test_reset_classifier(form: str):
    """At any time, in the model's type and mode; also to none and back."""
    for mode in (True, False):
        model = create(form).train(mode).bfloat16()
        for classes in (0, 3):
            model.reset_classifier(classes)
            assert model.num_classes == classes
            heads = [m for name, m in model.named_modules() if name.startswith('head')]
            assert heads and all(m.training == mode for m in heads)
        with torch.no_grad():
            out = model.eval()(images(2, 3, 32, 32).bfloat16())
        assert out.shape == (2, 3) and out.dtype == torch.bfloat16
        assert isinstance(model.get_classifier(), (nn.Module, tuple))
