"""Castling-ViT against numbers from the authors' module in a ViT, its counts, its layers' options, and folding."""

import pytest
import timm
import torch
from timm.models.mvitv2 import MultiScaleVitCfg
from torch import nn

from _golden import castling_cases, castling_part, castling_tensors
from _models import CASTLING, CLOSE, build, count_macs, create, filtered, images, numel, refused
from vitlinear.layers.linear_angular import LinearAngular
from vitlinear.models import CastlingVisionTransformer

MODELS = [name for name, case in castling_cases().items() if case['kind'] == 'model']
DISTILLED = ['levit_distilled', 'deit_distilled']


def layers(model: nn.Module) -> list[LinearAngular]:
    """Those that are linear-angular; the last of pvt_v2 has softmax."""
    return list(model.castling_layers().values())


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('name', MODELS)
def test_golden_models(name: str, grad: bool):
    """Features and logits, of square images and others, in one and in the other form."""
    assert len(MODELS) == 4
    case, x = castling_cases()[name], castling_tensors()[f'{name}/input']
    model = CastlingVisionTransformer(
        **{k: case[k] for k in ('img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads', 'num_classes')},
        attn_kwargs=dict(aux_mode='always' if case['sparse_reg'] else 'off', aux_kappa=0.))
    model.load_state_dict(filtered(castling_part(case['params']), model))
    model.train(case['training'])
    with torch.set_grad_enabled(grad):
        features = model.forward_features(x)
        torch.testing.assert_close(features, castling_tensors()[f'{name}/features'], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(model(x), castling_tensors()[f'{name}/output'], rtol=1e-4, atol=2e-5)
        model.set_castling(mode='off')
        linear = castling_tensors()[name.replace('_aux', '_lin') + '/output']
        torch.testing.assert_close(model(x), linear, rtol=1e-4, atol=2e-5)


# counts

# architecture, parameters, G operations at inference, and of some those that the auxiliary branch adds
TABLE = [
    ('castling_deit_tiny_patch16_224', 5_717_740, 1.137, .179),
    ('castling_deit_small_patch16_224', 22_051_312, 4.366, None),
    ('castling_deit_base_patch16_224', 86_568_952, 17.097, None),
    ('castling_deit_tiny_distilled_patch16_224', 5_911_124, 1.143, None),
    ('castling_deit_small_distilled_patch16_224', 22_437_080, 4.388, .361),
    ('castling_deit_base_distilled_patch16_224', 87_339_488, 17.184, None),
    ('castling_levit_128s', 8_845_762, .346, .034),
    ('castling_levit_128', 10_626_968, .451, None),
    ('castling_levit_192', 12_780_071, .765, None),
    ('castling_levit_256', 22_083_116, 1.312, None),
    ('castling_levit_384', 45_730_632, 2.736, .163),
    ('castling_mvitv2_tiny', 24_092_281, 4.187, .39),
    ('castling_mvitv2_small', 34_758_289, 6.371, None),
    ('castling_mvitv2_base', 51_300_808, 9.343, .90),
    ('castling_pvt_v2_b0', 3_198_424, .574, None),
    ('castling_pvt_v2_b1', 12_138_296, 2.204, None),
    ('castling_pvt_v2_b2', 21_062_745, 4.223, None),
]
# the same with queries and keys as narrow as LeViT's
NARROW = [
    ('castling_levit_128s', 7_772_482, .289), ('castling_levit_128', 9_207_192, .376),
    ('castling_levit_192', 10_942_375, .625), ('castling_levit_256', 18_887_724, 1.084),
    ('castling_levit_384', 39_119_688, 2.287)]


@pytest.mark.parametrize(('name', 'parameters', 'gmacs', 'aux'), TABLE + [(*row, 'key') for row in NARROW])
def test_counts(name: str, parameters: int, gmacs: float, aux):
    model = timm.create_model(name, device='meta', **(dict(qk_width='key') if aux == 'key' else {}))
    assert numel(model) == parameters
    macs = count_macs(model, 224, 224)
    assert round(macs / 1e9, 3) == gmacs
    if isinstance(aux, float):
        model.set_castling(mode='always')
        added = (count_macs(model, 224, 224) - macs) / 1e9
        assert added == pytest.approx(aux, abs=.0006 if aux < .3 or 'deit' in name else .01)


def test_registered_models():
    assert sorted(timm.list_models('castling_*')) == sorted(['castling_nano', *(name for name, *_ in TABLE)])
    for name, *_ in TABLE:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.num_classes == 1000 and cfg.input_size == (3, 224, 224) and cfg.crop_pct == .9
        assert cfg.license == 'apache-2.0' and cfg.fixed_input_size == ('deit' in name)
        assert 'reconstructed' in timm.model_entrypoint(name).__doc__


def test_nano():
    model = timm.create_model('castling_nano')
    assert 1_000_000 < numel(model) < 2_000_000 and len(layers(model)) == 9
    maps = model.forward_intermediates(images(1, 3, 32, 32), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 16, 16), (64, 8, 8), (128, 4, 4), (160, 2, 2)]


def test_where_softmax_stays():
    """In the last stage of the PVTv2 models alone, or where it is asked for."""
    for name, stages in (('castling_pvt_v2_b2', [1, 1, 1, 0]), ('castling_levit_192', [1, 1, 1]), (
            'castling_mvitv2_tiny', [1, 1, 1, 1])):
        model = timm.create_model(name, device='meta')
        for stage, linear in zip(model.stages, stages, strict=True):
            assert {m.aux is not None for m in stage.modules() if isinstance(m, LinearAngular)} == {bool(linear)}
    # the first attention of LeViT's second stage has the keys of the first
    for form, limit, kept in (
            ('nano', 64, [False, True]), ('pvt_v2', 15, [False, False]), ('pvt_v2', 16, [False, True]),
            ('mvitv2', 16, [False, True]), ('levit', 16, [False, False, True]), ('deit', 16, [False, False]),
            ('deit', 17, [True, True])):
        model = build(form, softmax_below=limit)
        found = [m.aux is None for m in model.modules() if isinstance(m, LinearAngular)]
        assert found == kept, form
        assert model(images(2, 3, 32, 32)).shape == (2, 5)
        assert len(model.castling_layers()) == found.count(False)


# options of the layers

@pytest.mark.parametrize('form', CASTLING)
def test_scale_with_size(form: str):
    """At the image size of the training it changes nothing, elsewhere it does."""
    options = dict(dynamic_img_size=True) if form.startswith('deit') else {}
    a, b = create(form, **options), create(form, scale_with_size=True, **options)
    x = images(2, 3, 32, 32)
    assert torch.equal(a(x), b(x))
    x = images(2, 3, 64, 48)
    assert (a(x) - b(x)).abs().max() > 1e-4


@pytest.mark.parametrize('kwargs', [dict(img_size=36), dict(patch_size=(8, 4)), dict(img_size=(32, 64))])
def test_scale_with_size_of_other_grids(kwargs):
    """Images that patches do not divide, patches and images that are not square."""
    a, b = create('deit', **kwargs), create('deit', scale_with_size=True, **kwargs)
    x = images(2, 3, *a.patch_embed.img_size)
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize('form', CASTLING)
def test_convolutions_on_the_grid(form: str):
    model = create(form, attn_kwargs=dict(conv='2d', res_kernel_size=3))
    assert {tuple(m.dconv.weight.shape[1:]) for m in layers(model)} == {(1, 3, 3)}
    x = images(2, 3, 32, 32)
    out = model(x)
    assert out.shape == (2, 5) and torch.isfinite(out).all()
    one_row = create(form, attn_kwargs=dict(conv='1d', res_kernel_size=3))
    with torch.no_grad():
        for a, b in zip(layers(model), layers(one_row)):
            a.dconv.weight.zero_()
            b.dconv.weight.zero_()
        b_state = one_row.state_dict()
        model.load_state_dict({k: b_state[k] if '.dconv.' not in k else v for k, v in model.state_dict().items()})
    torch.testing.assert_close(model(x), one_row(x), **CLOSE)  # they differ in nothing else
    assert (model(x) - out).abs().max() > 1e-3


def test_the_grid_of_a_vision_transformer():
    """It follows `set_input_size`; where there is none, '2d' convolutions are refused and keys are not pooled."""
    model = create('deit', attn_kwargs=dict(conv='2d', res_kernel_size=3))
    model.set_input_size((32, 64))
    assert {m.grid for m in layers(model)} == {(4, 8)}
    assert model(images(1, 3, 32, 64)).shape == (1, 5)
    model.set_input_size(patch_size=16)
    assert {m.grid for m in layers(model)} == {(2, 4)}
    for kwargs in (dict(dynamic_img_size=True), dict(patch_drop_rate=.5)):
        with pytest.raises(ValueError, match="conv='2d' needs a fixed grid"):
            build('deit', attn_kwargs=dict(conv='2d'), **kwargs)
        model = create('deit', attn_kwargs=dict(aux_mode='always', aux_max_keys=4), **kwargs)
        assert {m.grid for m in layers(model)} == {None}
        assert {s['keys'] for s in model.castling_stats(images(1, 3, 32, 32)).values()} == {17}
    model = create('deit', attn_kwargs=dict(aux_max_keys=4))
    assert {s['keys'] for s in model.castling_stats(images(1, 3, 32, 32)).values()} == {5}
    with pytest.raises(ValueError, match='neither attn_mask nor is_causal'):
        model.blocks[0].attn(torch.zeros(1, 17, 24), is_causal=True)


def test_queries_of_a_downsampling_block_are_where_they_were_taken():
    """A value that differs at one key alone reaches a query through the identity only at that position."""
    layer = layers(create('levit'))[1]
    with torch.no_grad():
        layer.dconv.weight.zero_()
        layer.q.ln.linear.weight.zero_()
        layer.q.ln.bn.bias.zero_()
        layer.q.ln.bn.running_mean.zero_()  # queries of zero: only the identity is left
    x = images(1, 16, 5, 6)
    out = layer(x)
    for i, j, hit in ((2, 4, (1, 2)), (1, 4, None), (4, 0, (2, 0)), (3, 3, None)):
        changed = x.clone()
        changed[0, :, i, j] += 1.
        difference = (layer(changed) - out).abs().sum(dim=(0, 1)) > 1e-5
        assert difference.nonzero().tolist() == ([] if hit is None else [list(hit)])


def test_dropout_of_the_branch():
    model = build('deit', attn_drop_rate=.3, proj_drop_rate=.2)
    assert {(m.aux.drop, m.proj_drop.p) for m in layers(model)} == {(.3, .2)}


# inference

class Doubled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize('name', [f'stages.0.blocks.0.{name}' for name in ('attn.qkv', 'attn.proj.ln', 'mlp.ln2')])
def test_inference_respects_what_replaces_a_layer(name: str):
    """Adapters, quantised layers and hooks take part in inference; only plain layers are evaluated by their weights."""
    model, x, calls = create('levit'), images(2, 3, 32, 32), []
    layer = model.get_submodule(name)
    for part in (layer, layer.linear, layer.bn):
        handle = part.register_forward_hook(lambda *args: calls.append(1))
        with torch.no_grad():
            before = model(x)
        handle.remove()
    assert len(calls) == 3
    doubled = Doubled(layer.linear.in_channels, layer.linear.out_channels, 1, bias=False)
    doubled.load_state_dict(layer.linear.state_dict())
    layer.linear = doubled
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **CLOSE)
    assert (expected - before).abs().max() > 1e-3


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('form', CASTLING)
def test_fuse(form: str, dtype: torch.dtype):
    """Batch norms are gone and convolutions repeated; outputs stay."""
    model, x = create(form), images(2, 3, 32, 32)
    expected, parameters = model(x), numel(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    copied = timm.models.reparameterize_model(model)  # timm's function leaves the model alone
    torch.testing.assert_close(copied(x), expected, **CLOSE)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.to(dtype).train().fuse() is model and not model.training
    assert list(copied.state_dict()) == list(model.state_dict())
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {dtype}
    for layer in layers(model):
        assert len(layer.dconv.weight) == layer.value_channels()
    assert numel(model) != parameters
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            out = model(x.to(dtype))
        assert out.dtype == dtype
        bound = 1e-4 if dtype == torch.float32 else .06
        assert (out.float() - expected).abs().max() < bound * expected.abs().max()
    with pytest.raises(RuntimeError):
        create(form).load_state_dict(model.state_dict())


@pytest.mark.parametrize('form', DISTILLED)
def test_distilled_models(form: str):
    """Two outputs for distillation in training, their mean otherwise."""
    model, x = create(form), images(2, 3, 32, 32)
    model.set_distilled_training(True)
    assert torch.is_tensor(model(x))
    out = model.train()(x)
    assert isinstance(out, tuple) and [tuple(y.shape) for y in out] == [(2, 5)] * 2 and not torch.equal(*out)
    model.set_distilled_training(False)
    assert torch.is_tensor(model(x))
    model.reset_classifier(3)
    assert model.eval()(x).shape == (2, 3) and len(model.get_classifier()) == 2
    model.set_distilled_training(True)
    model.schedule_castling(10)
    assert len(model.train()(x)) == 2
    model.castling_stats(x)
    model.switch_to_inference(x, tol=1e9)


# construction

@pytest.mark.parametrize(('form', 'kwargs', 'words'), [
    ('nano', dict(softmax_below=-1), ['softmax_below=-1']),
    ('nano', dict(img_size=0), ['img_size=0']),
    ('nano', dict(attn_kwargs=dict(conv='3d')), ["conv '3d'"]),
    ('nano', dict(num_heads=3), ['num_heads=3']),
    ('levit', dict(qk_width='values'), ["qk_width 'values'", 'value, key']),
    ('levit', dict(stem_widths=(8, 9)), ['stem_widths=(8, 9)', 'embed_dim[0]=16']),
    ('levit', dict(stem_widths=(16,)), ['stem_widths=(16,)', 'stem_strides=(2, 2)']),
    ('levit', dict(attn_kwargs=dict(aux_mode='on')), ["aux mode 'on'"]),
    ('mvitv2', dict(model_cfg=MultiScaleVitCfg(use_cls_token=True)), ['class token']),
    ('mvitv2', dict(model_cfg=MultiScaleVitCfg(mode='avg')), ["mode='avg'", 'convolutions']),
    ('deit', dict(qk_norm=True), ['qk_norm']),
    ('deit', dict(attn_kwargs=dict(res_kernel_size=2)), ['res_kernel_size=2']),
])
def test_bad_arguments(form: str, kwargs, words):
    with refused(*words):
        build(form, **kwargs)
