"""Castling-ViT against numbers from the authors' module in a ViT, its parameter and operation counts, the switch from
training to inference, and weights of the backbones with softmax attention."""
import copy
import logging
import pickle
import re
import sys
from functools import lru_cache
from typing import Callable, Dict, List, Tuple

import pytest
import timm
import torch
from _golden import castling_cases, castling_part, castling_tensors
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import vitlinear  # noqa: F401
from vitlinear.tools import cli
from vitlinear.layers import LinearAngularAttention, levit
from vitlinear.layers.linear_angular import LinearAngular
from vitlinear.tools.export import count_macs
from vitlinear.zoo.records import read_record
from vitlinear.models import (
    CastlingLevit,
    CastlingMultiScaleVit,
    CastlingPyramid,
    CastlingSchedule,
    CastlingVisionTransformer,
)
from vitlinear.models._castling import Castling

MODELS = [name for name, case in castling_cases().items() if case['kind'] == 'model']
GOLDEN = dict(rtol=1e-4, atol=2e-5)
CLOSE = dict(rtol=1e-4, atol=1e-5)
CFG = MultiScaleVitCfg(depths=(1, 1), embed_dim=8, num_heads=1)
# one small model of each form, at an image size where no grid is larger than 16 x 16
FORMS: Dict[str, Tuple[str, Dict]] = {
    'nano': ('castling_nano', dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratios=2.)),
    'levit': ('castling_levit_128s', dict(
        img_size=32, embed_dim=(16, 24), stem_widths=(8, 16), stem_strides=(2, 2), key_dim=4, num_heads=(2, 3),
        depth=(1, 1), distilled=False)),
    'levit_distilled': ('castling_levit_128s', dict(
        img_size=32, embed_dim=(16, 24), stem_widths=(8, 16), stem_strides=(2, 2), key_dim=4, num_heads=(2, 3),
        depth=(1, 1))),
    'mvitv2': ('castling_mvitv2_tiny', dict(img_size=32, model_cfg=CFG)),
    'pvt_v2': ('castling_pvt_v2_b0', dict(
        img_size=32, embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratios=2.)),
    'deit': ('castling_deit_tiny_patch16_224', dict(img_size=32, patch_size=8, embed_dim=24, depth=2)),
    'deit_distilled': ('castling_deit_tiny_distilled_patch16_224', dict(
        img_size=32, patch_size=8, embed_dim=24, depth=2)),
}
DISTILLED = ['levit_distilled', 'deit_distilled']
ANY_SIZE = ['nano', 'levit', 'mvitv2', 'pvt_v2']


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    return sys.modules[type(model).__module__].checkpoint_filter_fn(state_dict, model)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(form: str, **kwargs) -> nn.Module:
    name, small = FORMS[form]
    return timm.create_model(name, **{'num_classes': 5, **small, **kwargs})


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that no initialisation gives, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d))
             for p in (m.weight, m.running_var if hasattr(m, 'running_var') else m.weight)}
    with torch.no_grad():
        for p in [*model.parameters(), *(v for k, v in model.named_buffers() if 'running' in k)]:
            if id(p) in norms:
                p.copy_(.7 + .6 * torch.rand(p.shape, generator=g))
            else:
                p.copy_(torch.randn(p.shape, generator=g) * (.2 if p.ndim == 1 else p[0].numel() ** -.5))
    return model.eval()


def create(form: str, seed: int = 0, **kwargs) -> nn.Module:
    return randomize(build(form, **kwargs), seed)


def layers(model: nn.Module) -> List[LinearAngular]:
    """Those that are linear-angular; the last of pvt_v2 has softmax."""
    return [m for m in model.modules() if isinstance(m, LinearAngular) and m.dconv is not None]


# the authors' numbers

def golden_model(name: str) -> CastlingVisionTransformer:
    case = castling_cases()[name]
    model = CastlingVisionTransformer(
        img_size=case['img_size'], patch_size=case['patch_size'], embed_dim=case['embed_dim'], depth=case['depth'],
        num_heads=case['num_heads'], num_classes=case['num_classes'], attn_kwargs=dict(
            aux_mode='always' if case['sparse_reg'] else 'off', aux_kappa=0.))
    model.load_state_dict(checkpoint_filter_fn(castling_part(case['params']), model))
    return model.train(case['training'])


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('name', MODELS)
def test_golden_models(name: str, grad: bool):
    """Features and logits, of square images and others, in one and in the other form."""
    assert len(MODELS) == 4
    model, x = golden_model(name), castling_tensors()[f'{name}/input']
    with torch.set_grad_enabled(grad):
        features = model.forward_features(x)
        torch.testing.assert_close(features, castling_tensors()[f'{name}/features'], **GOLDEN)
        torch.testing.assert_close(model(x), castling_tensors()[f'{name}/output'], **GOLDEN)
        model.set_castling(mode='off')
        linear = castling_tensors()[name.replace('_aux', '_lin') + '/output']
        torch.testing.assert_close(model(x), linear, **GOLDEN)


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


@pytest.mark.parametrize('name, parameters, gmacs, aux', TABLE)
def test_counts(name: str, parameters: int, gmacs: float, aux):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {layer.aux.mode for layer in layers(model)} == {'off'}
    macs = count_macs(model, (3, 224, 224))
    assert round(macs / 1e9, 3) == gmacs
    if aux is not None:
        model.set_castling(mode='always')
        added = (count_macs(model, (3, 224, 224)) - macs) / 1e9
        assert added == pytest.approx(aux, abs=.0006 if aux < .3 or 'deit' in name else .01)


@pytest.mark.parametrize('name, parameters, gmacs', [
    ('castling_levit_128s', 7_772_482, .289), ('castling_levit_128', 9_207_192, .376),
    ('castling_levit_192', 10_942_375, .625), ('castling_levit_256', 18_887_724, 1.084),
    ('castling_levit_384', 39_119_688, 2.287)])
def test_counts_with_the_keys_of_levit(name: str, parameters: int, gmacs: float):
    model = timm.create_model(name, device='meta', qk_width='key')
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(count_macs(model, (3, 224, 224)) / 1e9, 3) == gmacs


def test_the_list_is_complete():
    assert sorted(timm.list_models('castling_*')) == sorted(['castling_nano', *(name for name, *_ in TABLE)])


def test_nano():
    model = timm.create_model('castling_nano')
    assert isinstance(model, CastlingPyramid) and 1_000_000 < sum(p.numel() for p in model.parameters()) < 2_000_000
    assert len(model.castling_layers()) == len(layers(model)) == 9
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


def test_documented_defaults():
    for name, *_ in TABLE:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.num_classes == 1000 and cfg.input_size == (3, 224, 224) and cfg.crop_pct == .9
        assert cfg.license == 'apache-2.0' and cfg.fixed_input_size == ('deit' in name)
        doc = timm.model_entrypoint(name).__doc__
        assert 'reconstructed' in doc


# options of the layers

@pytest.mark.parametrize('form', FORMS)
def test_scale_with_size(form: str):
    """At the image size of the training it changes nothing, elsewhere it does."""
    options = dict(dynamic_img_size=True) if form.startswith('deit') else {}
    a, b = create(form, **options), create(form, scale_with_size=True, **options)
    x = images(2, 3, 32, 32)
    assert torch.equal(a(x), b(x))
    x = images(2, 3, 64, 48)
    assert (a(x) - b(x)).abs().max() > 1e-4
    for layer in layers(b):
        layer.kv_scale = None
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize('kwargs', [dict(img_size=36), dict(patch_size=(8, 4)), dict(img_size=(32, 64))])
def test_scale_with_size_of_other_grids(kwargs):
    """Images that patches do not divide, patches and images that are not square."""
    a, b = create('deit', **kwargs), create('deit', scale_with_size=True, **kwargs)
    x = images(2, 3, *a.patch_embed.img_size)
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize('form', FORMS)
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


@pytest.mark.parametrize('aux_mode', ['off', 'always'])
@pytest.mark.parametrize('form', ANY_SIZE)
def test_any_size(form: str, aux_mode: str):
    """Strides round up; gradients reach everything."""
    model = create(form, attn_kwargs=dict(aux_mode=aux_mode))
    strides = [f['reduction'] for f in model.feature_info]
    for H, W in ((32, 32), (33, 47), (17, 9), (5, 64), (1, 1)):
        x = images(2, 3, H, W)
        model.zero_grad()
        out = model(x)
        assert out.shape == (2, 5) and torch.isfinite(out).all()
        out.square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [m.shape[2:] for m in maps] == [(-(-H // s), -(-W // s)) for s in strides]
        with torch.no_grad():
            torch.testing.assert_close(model(x), out.detach(), **CLOSE)


@pytest.mark.parametrize('name, reductions', [
    ('castling_nano', [2, 4, 8, 16]), ('castling_levit_128s', [16, 32, 64]), ('castling_levit_384', [16, 32, 64]),
    ('castling_mvitv2_tiny', [4, 8, 16, 32]), ('castling_pvt_v2_b0', [4, 8, 16, 32]),
    ('castling_deit_tiny_patch16_224', [16] * 3), ('castling_deit_tiny_distilled_patch16_224', [16] * 3)])
def test_features_only(name: str, reductions):
    model = timm.create_model(name, features_only=True, device='meta')
    assert model.feature_info.reduction() == reductions
    size = (224, 224) if 'deit' in name else (96, 160)
    for m, r, channels in zip(
            model(torch.empty(2, 3, *size, device='meta')), reductions, model.feature_info.channels(), strict=True):
        assert m.shape == (2, channels, -(-size[0] // r), -(-size[1] // r))


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


# the switch: what it measures

class OneLayer(Castling, nn.Module):
    def __init__(self, name: str):
        super().__init__()
        case = castling_cases()[name]
        config = case['constructor']
        self.attn = LinearAngularAttention(
            config['in_channels'], config['num_heads'], qkv_bias=config['qkv_bias'],
            aux_threshold=case['threshold'], aux_max_keys=None)
        self.attn.load_state_dict(castling_part('params:' + case['params']))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x.unsqueeze(1))


@pytest.mark.parametrize('name', ['castle_nonempty_7x7_aux', 'castle_empty_mask_aux', 'aux_8x10_nonsquare_grad'])
def test_stats_of_golden_masks(name: str):
    model, case, x = OneLayer(name), castling_cases()[name], castling_tensors()[f'{name}/input']
    stats = model.castling_stats(x)['attn']
    expected = dict(case['mask'], tokens=case['L'], keys=case['L'])
    if 'castle' in name:
        other = castling_tensors()[name.replace('_aux', '_lin') + '/output']
        output = castling_tensors()[f'{name}/output']
        expected['gap'] = ((output - other).norm() / output.norm()).item()
        assert expected['gap'] == pytest.approx(case.get('gap_to_linear_form', 0.), rel=1e-4)
    for key, value in stats.items():
        tolerance = dict(rel=1e-3) if key == 'gap' else dict(rel=1e-5) if key == 'mass' else dict(rel=0, abs=1e-9)
        if key in expected:
            assert value == pytest.approx(expected[key], **tolerance), key
    assert stats.keys() == {'tokens', 'keys', 'density', 'rows_with_entry', 'mass', 'gap'}
    # means over batches, those of a loader too
    assert model.castling_stats([x[:1], (x[1:], torch.zeros(1))])['attn'] == pytest.approx(
        {k: (a + b) / 2 for (k, a), (_, b) in zip(
            model.castling_stats(x[:1])['attn'].items(), model.castling_stats(x[1:])['attn'].items())})


def test_stats_by_hand():
    """Of the second block, whose input is that with the branch on in the first; the weight counts in the gap."""
    model, x = create('deit', attn_kwargs=dict(aux_threshold=.1, aux_kappa=0.)), images(2, 3, 32, 32)
    model.set_castling(mode='always', weight=.5)
    seen = {}
    attn = model.blocks[1].attn
    handle = attn.register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out))
    with torch.no_grad():
        model(x)
        handle.remove()
        q, k, v = attn.qkv(seen['x']).reshape(2, 17, 3, 3, 8).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / 8 ** .5).softmax(dim=-1)
        mask = weights > .1
        attn.aux.mode = 'off'
        gap = (seen['out'] - attn(seen['x'])).norm() / seen['out'].norm()
    for mode in ('off', 'train', 'always'):
        model.set_castling(mode=mode)
        stats = model.castling_stats(x)
        assert list(stats) == ['blocks.0.attn', 'blocks.1.attn']
        assert {layer.aux.mode for layer in layers(model)} == {mode}
        assert stats['blocks.1.attn'] == pytest.approx(dict(
            tokens=17, keys=17, density=mask.float().mean().item(),
            rows_with_entry=mask.any(dim=-1).float().mean().item(),
            mass=(weights * mask).sum(dim=-1).mean().item(), gap=gap.item()), rel=1e-4)
        assert 0 < stats['blocks.1.attn']['density'] < 1 and gap > .001


@pytest.mark.parametrize('form', FORMS)
def test_stats_leave_no_trace(form: str):
    """Neither in modes nor in batch norms nor in the count of a schedule; the keys of all layers are counted."""
    model = create(form, castling_steps=10).train()
    before = copy.deepcopy(model.state_dict())
    stats = model.castling_stats(images(2, 3, 32, 32))
    assert list(stats) == list(model.castling_layers()) and len(stats) == len(layers(model))
    keys = dict(
        nano=[64, 64], levit=[64, 64, 16], levit_distilled=[64, 64, 16], mvitv2=[64, 16], pvt_v2=[64],
        deit=[17, 17], deit_distilled=[18, 18])[form]
    assert [s['keys'] for s in stats.values()] == keys and model.training
    assert {layer.aux.mode for layer in layers(model)} == {'train'}
    assert all(not layer.aux._forward_pre_hooks and not layer._forward_hooks for layer in layers(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises((ValueError, RuntimeError), match='channels'):
        model.castling_stats(images(2, 7, 32, 32))
    assert model.training and {layer.aux.mode for layer in layers(model)} == {'train'}
    with pytest.raises(ValueError, match='at least one batch'):
        model.castling_stats([])


def test_set_castling():
    model = create('nano')
    buffers = [(layer.aux.threshold, layer.aux.weight, layer.aux.ramp) for layer in layers(model)]
    model.set_castling(threshold=.1)
    model.set_castling(mode='always', weight=.5)
    model.set_castling(ramp=.25)
    for layer, kept in zip(layers(model), buffers):
        assert layer.aux.mode == 'always'
        assert [b.item() for b in kept] == pytest.approx([.1, .5, .25])
        assert layer.aux.threshold is kept[0] and layer.aux.ramp is kept[2]  # a compiled model goes on with them
    for kwargs, words in (
            (dict(mode='on', weight=9.), "mode 'on'"), (dict(threshold=1.1, weight=9.), 'threshold=1.1'),
            (dict(ramp=-.1, weight=9.), 'ramp=-0.1')):
        with pytest.raises(ValueError, match=re.escape(words)):
            model.set_castling(**kwargs)
    assert {layer.aux.weight.item() for layer in layers(model)} == {.5}


# the switch itself

@pytest.mark.parametrize('how', [dict(ramp=1.), dict(threshold=1.), dict(weight=0.)])
@pytest.mark.parametrize('form', FORMS)
def test_switch_with_empty_masks(form: str, how: Dict):
    """Bit by bit the same outputs, the same parameters under the same names."""
    model, x = create(form, attn_kwargs=dict(aux_mode='train')), images(3, 3, 32, 32)
    keys = list(model.state_dict())
    assert keys == list(create(form).state_dict()) and not any('aux' in k for k in keys)
    model.set_castling(**how)
    model.set_castling(mode='always')
    with_branch = model(x)
    model.set_castling(mode='train')
    assert model.switch_to_inference(x) is model
    assert torch.equal(model(x), with_branch) and list(model.state_dict()) == keys
    assert {layer.aux.mode for layer in layers(model)} == {'off'}
    if form not in DISTILLED:
        assert torch.equal(create(form)(x), with_branch)


@pytest.mark.parametrize('mode', ['train', 'always'])
@pytest.mark.parametrize('form', FORMS)
def test_switch_with_masks_that_are_not_empty(form: str, mode: str):
    """An error with the measured gap and a tolerance that would do; the model is left as it was."""
    model, x = create(form, castling_steps=20).train(), images(3, 3, 32, 32)
    model.set_castling(mode=mode, weight=.75)
    before = copy.deepcopy(model)
    reference = copy.deepcopy(model).eval()
    outs = []
    for m in ('always', 'off'):
        reference.set_castling(mode=m)
        outs.append(reference(x))
    gap = (outs[0] - outs[1]).abs().max().item()
    with pytest.raises(ValueError, match='changes by ([0-9.e+-]+), more than tol=0.0') as e:
        model.switch_to_inference(x)
    assert float(re.search('changes by (\\S+),', str(e.value))[1]) == pytest.approx(gap, rel=.01)
    assert model.training and {layer.aux.mode for layer in layers(model)} == {mode}
    assert all(a.aux.weight == b.aux.weight for a, b in zip(layers(model), layers(before)))
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match='more than tol'):
        model.switch_to_inference(x, tol=gap * .9)
    tol = float(re.search('tol=(\\S+)\\.$', str(e.value))[1])
    assert gap <= tol < 5 * gap
    model.switch_to_inference(x, tol=tol)
    assert torch.equal(model.eval()(x), outs[1])
    assert 'castling_step' not in model.state_dict()
    assert torch.equal(before.switch_to_inference().eval()(x), outs[1])  # without a sample nothing is compared


def test_switch_looks_at_broken_outputs():
    model = create('deit', attn_kwargs=dict(aux_mode='always'))
    with torch.no_grad():
        model.head.bias[0] = float('nan')
    with pytest.raises(ValueError, match='changes by nan'):
        model.switch_to_inference(images(1, 3, 32, 32), tol=1e9)


def test_switch_of_some_layers():
    """A layer that is off already takes no part in the comparison."""
    model, x = create('deit', attn_kwargs=dict(aux_mode='always')), images(1, 3, 32, 32)
    first, second = layers(model)
    first.aux.mode = 'off'
    second.aux.threshold.fill_(1.)
    out = model(x)
    assert torch.equal(model.switch_to_inference(x)(x), out)


def test_modes_of_modules_are_kept():
    """Those of frozen norms in a model in training, for example."""
    model, x = create('levit', attn_kwargs=dict(aux_mode='train')).train(), images(2, 3, 32, 32)
    model.stem.conv1.bn.eval()
    model.stages[1].blocks.eval()
    modes = [m.training for m in model.modules()]
    assert 0 < sum(modes) < len(modes)
    model.castling_stats(x)
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ValueError, match='more than tol'):
        model.switch_to_inference(x)
    with pytest.raises((ValueError, RuntimeError)):
        model.switch_to_inference(images(2, 4, 32, 32))
    assert [m.training for m in model.modules()] == modes
    model.switch_to_inference(x, tol=1e9)
    assert [m.training for m in model.modules()] == modes


# schedules

def thresholds(model: nn.Module) -> List[float]:
    stats = model.castling_stats(images(1, 3, 32, 32)).values()
    return [layer.aux.threshold_for(s['keys']).item() for layer, s in zip(layers(model), stats)]


def ramp_at(step: float, total: int, ramp=(.1, .7)) -> float:
    return min(max((step / total - ramp[0]) / (ramp[1] - ramp[0]), 0.), 1.)


def test_schedule():
    """Each layer from its own threshold to 1 on a logarithmic scale, then off."""
    model = create('nano')
    first = [2 / 64, 2 / 64]
    schedule = CastlingSchedule(model, 20)
    for step in range(20):
        t = ramp_at(step, 20)
        assert thresholds(model) == pytest.approx([x ** (1 - t) for x in first], rel=1e-5), step
        assert {layer.aux.mode for layer in layers(model)} == {'off' if step >= 14 else 'train'}
        assert [layer.aux.ramp.item() for layer in layers(model)] == pytest.approx([t] * 2)
        schedule.step()
    other = create('nano')
    CastlingSchedule(other, 20).step(8)  # as a resumed training does
    schedule.step(8)
    assert thresholds(other) == thresholds(model) == pytest.approx([x ** .5 for x in first], rel=1e-5)
    assert {layer.aux.mode for layer in layers(model)} == {'train'}
    schedule.step()
    assert schedule.steps == 9

    model = create('nano')
    schedule = CastlingSchedule(model, 7, ramp=(0., .5), kappa=6.4)
    values = []
    for _ in range(7):
        values.append(thresholds(model)[0])
        schedule.step()
    assert values == pytest.approx([.1 ** (1 - ramp_at(i, 7, (0., .5))) for i in range(7)], rel=1e-5)
    model.switch_to_inference(images(1, 3, 32, 32))


def test_first_thresholds():
    """At least 0.02, and above 1 / keys, so that a mask of few keys can be empty."""
    assert thresholds(create('mvitv2')) == pytest.approx([2 / 64, 2 / 16])
    assert thresholds(create('deit_distilled')) == pytest.approx([2 / 18] * 2)
    assert thresholds(create('nano', attn_kwargs=dict(aux_kappa=0.))) == pytest.approx([.02, .02])
    model = timm.create_model('castling_levit_128s', device='meta')
    assert {layer.aux.kappa for layer in layers(model)} == {2.}


@pytest.mark.parametrize('make, words', [
    (lambda: CastlingSchedule(timm.create_model('vvt_nano'), 10), 'VicinityVisionTransformer has no layers'),
    (lambda: CastlingSchedule(build('deit', softmax_below=99), 10), 'has no layers'),
    (lambda: CastlingSchedule(build('deit'), 0), 'total_steps=0'),
    (lambda: CastlingSchedule(build('deit'), 10, kappa=-1.), 'kappa=-1.0'),
    (lambda: CastlingSchedule(build('deit'), 10, ramp=(.5, .5)), 'ramp=(0.5, 0.5)'),
    (lambda: CastlingSchedule(build('deit', castling_steps=5), 10), 'by itself already'),
    (lambda: build('deit').schedule_castling(0), 'castling_steps=0'),
    (lambda: build('levit', castling_steps=-1), 'castling_steps=-1'),
    (lambda: build('mvitv2', castling_steps=10, castling_ramp=(.9, 1.1)), 'ramp=(0.9, 1.1)'),
    (lambda: build('nano', castling_ramp=(.7, .1)), 'ramp=(0.7, 0.1)'),
])
def test_bad_schedules(make: Callable, words: str):
    with pytest.raises(ValueError) as e:
        make()
    assert words in str(e.value)


def train(model: nn.Module, steps: range) -> List[float]:
    """Steps of gradient descent on images of their own, and the ramp in each."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=.05)
    ramps = []
    for step in steps:
        loss = model(images(2, 3, 32, 32, seed=step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ramps.append(layers(model)[0].aux.ramp.item())
    return ramps


def state(model: nn.Module) -> Dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: Dict[str, torch.Tensor], b: Dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize('form', FORMS)
def test_counted_forwards(form: str):
    """The model follows the ramp of a CastlingSchedule by itself, in training mode alone."""
    model = create(form, castling_steps=10)
    assert {layer.aux.mode for layer in layers(model)} == {'train'} and model.castling_step == 0
    x, ramps = images(2, 3, 32, 32), []
    kept = [layer.aux.ramp for layer in layers(model)]
    for step in range(9):
        model.train()
        assert model.castling_step == step
        model(x)
        ramps.append(layers(model)[0].aux.ramp.item())
        assert {layer.aux.ramp.item() for layer in layers(model)} == {ramps[-1]}
        # 'off' is the forward pass in which the ramp is over, no earlier: there the branch adds exactly nothing
        assert {layer.aux.mode for layer in layers(model)} == {'train' if step < 7 else 'off'}
        model.eval()
        model(x)
        model(x)
    assert ramps == pytest.approx([ramp_at(step, 10) for step in range(9)]) and ramps[-2:] == [1., 1.]
    assert all(layer.aux.ramp is ramp for layer, ramp in zip(layers(model), kept))


def test_the_branch_is_on_until_its_masks_are_empty():
    """Also where the ramp ends between two steps."""
    model = create('deit', castling_steps=7).train()
    for step in range(7):
        model(images(1, 3, 32, 32))
        ramp = layers(model)[0].aux.ramp.item()
        assert ramp == pytest.approx(ramp_at(step, 7))
        assert {layer.aux.mode for layer in layers(model)} == {'train' if ramp < 1. else 'off'}


def test_both_schedules_agree():
    counting, stepping = create('nano', castling_steps=10), create('nano')
    schedule = CastlingSchedule(stepping, 10)
    ramps = []
    for step in range(10):
        ramps.append(layers(stepping)[0].aux.ramp.item())
        train(stepping, range(step, step + 1))
        schedule.step()
    assert train(counting, range(10)) == pytest.approx(ramps)
    mine = {k: v for k, v in state(counting).items() if k != 'castling_step'}
    assert same(mine, state(stepping))
    assert not same(mine, state(stepping) if train(plain := create('nano'), range(10)) is None else state(plain))


@pytest.mark.parametrize('form', ['nano', 'levit', 'deit'])
def test_exact_resume(form: str):
    """Saved at a step and loaded into a new model: the same parameters and the same ramp."""
    model = create(form, castling_steps=10)
    ramps = train(model, range(3))
    saved = state(model)
    assert saved['castling_step'] == 3
    ramps += train(model, range(3, 9))
    other = create(form, seed=5, castling_steps=10)
    other.load_state_dict(saved)
    assert train(other, range(3, 9)) == ramps[3:] and ramps[3] > 0
    assert same(state(other), state(model))


def test_loading_into_the_other_form():
    """Strictly, and either way."""
    training, inference = create('nano', castling_steps=10), create('nano', seed=1)
    train(training, range(4))
    saved = training.state_dict()
    inference.load_state_dict(saved, strict=True)
    assert 'castling_step' in saved  # and that dict is left alone
    assert list(checkpoint_filter_fn(saved, inference)) == list(inference.state_dict())
    training.switch_to_inference(tol=float('inf'))
    assert same(state(training), state(inference)) and list(training.state_dict()) == list(inference.state_dict())
    x = images(2, 3, 32, 32)
    assert torch.equal(training.eval()(x), inference.eval()(x))
    again = create('nano', seed=2, castling_steps=10)
    train(again, range(2))
    again.load_state_dict(inference.state_dict(), strict=True)
    assert again.castling_step == 0  # weights to start from
    wrapper, fresh = nn.ModuleDict(dict(model=again)), nn.ModuleDict(dict(model=create('nano')))
    fresh.load_state_dict(wrapper.state_dict(), strict=True)
    wrapper.load_state_dict(fresh.state_dict(), strict=True)


@pytest.mark.parametrize('steps', [0, 10])
def test_pretrained_weights_begin_a_schedule(tmp_path, steps: int):
    """Through create_model, where a checkpoint has a count or has none."""
    trained = create('nano', castling_steps=steps)
    train(trained, range(3))
    torch.save(trained.state_dict(), tmp_path / 'a.pth')
    name, small = FORMS['nano']
    overlay = dict(file=str(tmp_path / 'a.pth'), num_classes=5)
    for castling_steps in (0, 10):
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, castling_steps=castling_steps, **small)
        weights = state(model)
        assert weights.pop('castling_step', torch.tensor(0)) == 0
        assert same(weights, {k: v for k, v in state(trained).items() if k != 'castling_step'})


@pytest.mark.parametrize('copier', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_count_for_themselves(copier: Callable):
    model = create('deit', castling_steps=10)
    train(model, range(3))
    other = copier(model)
    assert train(other, range(3, 8)) == train(copier(model), range(3, 8))
    assert (other.castling_step, model.castling_step) == (8, 3)
    assert layers(model)[0].aux.ramp < layers(other)[0].aux.ramp
    third = copier(model).switch_to_inference()
    third.train()(images(1, 3, 32, 32))
    assert not hasattr(third, 'castling_step') and not third._forward_pre_hooks
    model(images(1, 3, 32, 32))
    assert model.castling_step == 4  # taking the copy's hook away left this one


def test_moving_average_of_a_scheduled_model():
    """It is evaluated in the linear form at any time, and its state dict resumes."""
    model = create('nano', castling_steps=10)
    average = ModelEmaV3(model, decay=.5)
    for step in range(4):
        train(model, range(step, step + 1))
        average.update(model)
    assert average.module.castling_step == 4 and not average.module.training
    linear = create('nano')
    linear.load_state_dict(average.module.state_dict())
    x = images(2, 3, 32, 32)
    assert torch.equal(average.module(x), linear(x))
    assert not torch.equal(average.module(x), model.eval()(x))


def test_a_new_schedule_replaces_the_old():
    model = create('nano', castling_steps=4)
    train(model, range(4))
    assert layers(model)[0].aux.mode == 'off'
    model.schedule_castling(20, ramp=(0., 1.))
    assert model.castling_step == 0 and layers(model)[0].aux.mode == 'train' and len(model._forward_pre_hooks) == 1
    assert train(model, range(5)) == pytest.approx([i / 20 for i in range(5)])


def test_gradient_checkpointing_counts_once():
    model = create('deit', castling_steps=10)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing(True)
    assert train(model, range(6)) == train(other, range(6))
    for (k, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(a, b, **CLOSE, msg=k)


# compilation

@pytest.mark.parametrize('form, backend', [('deit', 'aot_eager'), ('levit', 'eager')])
def test_compiled_training(form: str, backend: str):
    """Two graphs, of the ramp and of the rest, with the results of the model as written; none is compiled again."""
    torch._dynamo.reset()
    model = create(form, castling_steps=10, attn_kwargs=dict(aux_chunk=9))
    expected = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model.train(), backend=counter, fullgraph=True)
    for step in range(9):
        for m in (compiled, expected.train()):
            m.zero_grad()
            loss = m(images(2, 3, 32, 32, seed=step)).square().mean()
            loss.backward()
        assert layers(model)[0].aux.ramp == layers(expected)[0].aux.ramp, step
        assert counter.frame_count == 2, step
        for a, b in zip(model.parameters(), expected.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max().item() + 1e-7)
    assert model.castling_step == expected.castling_step == 9 and layers(model)[0].aux.ramp == 1.


def test_compiled_training_with_a_schedule():
    """As long as thresholds rise; the end of the branch is another graph."""
    torch._dynamo.reset()
    model = create('deit').train()
    expected = copy.deepcopy(model)
    counter = CompileCounterWithBackend('eager')
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    schedules = [CastlingSchedule(m, 10) for m in (model, expected)]
    x = images(2, 3, 32, 32)
    outs = []
    for step in range(9):
        outs.append(compiled(x))
        torch.testing.assert_close(outs[-1], expected(x), **CLOSE)
        assert counter.frame_count == (1 if step < 7 else 2)
        for schedule in schedules:
            schedule.step()
    assert not torch.equal(outs[0], outs[4])
    torch.testing.assert_close(outs[-1], model.eval()(x), **CLOSE)


# inference

@pytest.mark.parametrize('limit', [0, 10 ** 6])
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('form', FORMS)
def test_inference_equals_training_graph(monkeypatch, form: str, train: bool, limit: int):
    """However small maps are evaluated; batch norms in training take their batch without gradients as well."""
    monkeypatch.setattr(levit, 'LINEAR_UP_TO', limit)
    model, x = create(form, attn_kwargs=dict(aux_mode='train')).train(train), images(3, 3, 32, 32)
    expected = copy.deepcopy(model)(x).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(copy.deepcopy(model)(x), expected, **CLOSE)
    if train:
        return
    fused = copy.deepcopy(model).fuse()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected, **CLOSE)
        wide = copy.deepcopy(model).double()
        torch.testing.assert_close(wide(x.double()).float(), expected, **CLOSE)


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
@pytest.mark.parametrize('form', FORMS)
def test_fuse(form: str, dtype: torch.dtype):
    """Batch norms are gone and convolutions repeated; outputs stay."""
    model, x = create(form), images(2, 3, 32, 32)
    expected, parameters = model(x), sum(p.numel() for p in model.parameters())
    fused = model.to(dtype).train().fuse()
    assert fused is model and not model.training
    heads = [m for k, m in model.named_modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert not heads and {p.dtype for p in model.parameters()} == {dtype}
    for layer in layers(model):
        assert len(layer.dconv.weight) == layer.value_channels()
    assert sum(p.numel() for p in model.parameters()) != parameters
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            out = model(x.to(dtype))
        assert out.dtype == dtype
        bound = 1e-4 if dtype == torch.float32 else .06
        assert (out.float() - expected).abs().max() < bound * expected.abs().max()
    with pytest.raises(RuntimeError):
        create(form).load_state_dict(model.state_dict())


@pytest.mark.parametrize('form', FORMS)
def test_reparameterize_model(form: str):
    """timm's function leaves the model alone and returns a fused one."""
    model, x = create(form), images(2, 3, 32, 32)
    before = state(model)
    fused = timm.models.reparameterize_model(model)
    assert same(state(model), before) and len(layers(fused)[0].dconv.weight) == layers(fused)[0].value_channels()
    torch.testing.assert_close(fused(x), model(x), **CLOSE)
    torch.testing.assert_close(model.fuse()(x), fused(x), **CLOSE)
    wrapped = timm.models.reparameterize_model(nn.Sequential(create(form)))
    torch.testing.assert_close(wrapped(x), fused(x), **CLOSE)


@pytest.mark.parametrize('form', ['nano', 'levit', 'deit'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(form: str, dtype: torch.dtype):
    for aux_mode in ('off', 'always'):
        model, x = create(form, attn_kwargs=dict(aux_mode=aux_mode)), images(2, 3, 32, 32)
        expected = model(x)
        with torch.autocast('cpu', dtype=dtype), torch.no_grad():
            mixed = model(x)
        with torch.no_grad():
            half = model.to(dtype)(x.to(dtype))
        for out in (mixed, half):
            assert out.dtype == dtype and torch.isfinite(out).all()
            assert (out.float() - expected).abs().max() < (
                .1 if dtype == torch.bfloat16 else .02) * expected.abs().max()


def operators(program: torch.export.ExportedProgram) -> set:
    """Of the graph and the graphs within it, such as those without autocast."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == 'call_function'}


EXPORTED = {
    'nano': {}, 'levit': {}, 'mvitv2': {}, 'deit': dict(dynamic_img_size=True)}


@pytest.mark.parametrize('form', EXPORTED)
def test_export(form: str):
    """One graph for any batch and size; after the switch nothing of the branch is in it."""
    model = create(form, attn_kwargs=dict(aux_mode='always'), **EXPORTED[form])
    if form == 'deit':
        found = operators(torch.export.export(model, (images(2, 3, 32, 32),)))
        assert any('softmax' in op for op in found) and any('.pow.' in op for op in found)  # weights and thresholds
    model.switch_to_inference()
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (images(2, 3, 64, 96),), dynamic_shapes=(dynamic,))
    assert not [op for op in operators(program) if 'softmax' in op or '.pow.' in op]
    exported = program.module()
    for shape in ((2, 3, 64, 96), (3, 3, 96, 64), (2, 3, 128, 32)):
        torch.testing.assert_close(exported(images(*shape)), model(images(*shape)), **CLOSE)


def test_scale_with_size_is_exported():
    """It follows the size of the image."""
    model = create('deit', scale_with_size=True, dynamic_img_size=True)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(model, (images(2, 3, 64, 96),), dynamic_shapes=(dynamic,)).module()
    for shape in ((2, 3, 64, 96), (3, 3, 96, 64)):
        torch.testing.assert_close(exported(images(*shape)), model(images(*shape)), **CLOSE)


def test_onnx(tmp_path):
    """For any batch and size, without a softmax."""
    onnx, runtime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model, path = create('nano').switch_to_inference(), tmp_path / 'model.onnx'
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    torch.onnx.export(
        model, (images(2, 3, 64, 96),), path, dynamo=True, dynamic_shapes=(dynamic,), verbose=False)
    assert 'Softmax' not in {node.op_type for node in onnx.load(path).graph.node}
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for shape in ((2, 3, 64, 96), (1, 3, 32, 64)):
        out = session.run(None, {session.get_inputs()[0].name: images(*shape).numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(out), model(images(*shape)).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('form', ['nano', 'levit', 'deit'])
def test_torchscript(form: str):
    """Also with the branch, and after a schedule that the switch has ended."""
    for kwargs in (dict(), dict(attn_kwargs=dict(aux_mode='always')), dict(castling_steps=5)):
        model, x = create(form, scriptable=True, **kwargs), images(2, 3, 32, 32)
        if 'castling_steps' in kwargs:
            model.switch_to_inference()
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), **CLOSE)


# initialisation

@pytest.mark.parametrize('form', FORMS)
def test_init_weights_after_to_empty(form: str):
    """Everything is there again, thresholds, ramp and count included."""
    torch.manual_seed(0)
    expected = build(form, castling_steps=10, attn_kwargs=dict(aux_threshold=.1))
    model = build(form, castling_steps=10, attn_kwargs=dict(aux_threshold=.1), device='meta')
    assert {v.device.type for v in [*model.parameters(), *model.buffers()]} == {'meta'}
    model = model.to_empty(device='cpu')
    for v in [*model.parameters(), *model.buffers()]:
        v.data.fill_(float('nan') if v.is_floating_point() else 99)
    model.init_weights(needs_reset=True)
    for name, v in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.isfinite(v).all(), name
    for name, v in expected.named_buffers():
        assert torch.equal(v, model.get_buffer(name)), name
    assert model.castling_step == 0
    assert torch.isfinite(model.train()(images(2, 3, 32, 32))).all()


@pytest.mark.parametrize('form', FORMS)
def test_created_on_device_and_dtype(form: str):
    model = build(form, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = build(form, device='meta', castling_steps=5)
    assert model(torch.empty(2, 3, 32, 32, device='meta')).shape == (2, 5)
    assert {v.device.type for v in [*model.parameters(), *model.buffers()]} == {'meta'}


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


# weights of the backbones with softmax attention

LEVIT = dict(img_size=64, embed_dim=(16, 24), key_dim=4, num_heads=(2, 3), depth=(1, 2))
MVIT = dict(img_size=32, num_classes=5)
MVIT_CFG = MultiScaleVitCfg(depths=(1, 1), embed_dim=8, num_heads=1, stride_kv=((1, 1), (2, 2)))
PVT = dict(embed_dims=(8, 16, 16, 16), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2), mlp_ratios=(2, 2, 2, 2))
DEIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=3)
# a host, and our model for its weights
HOSTS: Dict[str, Tuple[Callable, str, Dict]] = {
    'levit': (lambda: timm.create_model('levit_128s', num_classes=5, **LEVIT), 'castling_levit_128s', dict(
        LEVIT, qk_width='key')),
    'levit_conv': (lambda: timm.create_model('levit_conv_128s', num_classes=5, **LEVIT), 'castling_levit_128s', dict(
        LEVIT, qk_width='key')),
    'mvitv2': (lambda: MultiScaleVit(MVIT_CFG, **MVIT), 'castling_mvitv2_tiny', dict(img_size=32, model_cfg=MVIT_CFG)),
    'pvt_v2': (lambda: timm.create_model('pvt_v2_b0', num_classes=5, sr_ratios=(1, 1, 1, 1), **PVT),
               'castling_pvt_v2_b0', dict(PVT, img_size=64)),
    'pvt_v2_reduced': (lambda: timm.create_model('pvt_v2_b0', num_classes=5, sr_ratios=(8, 4, 2, 1), **PVT),
                       'castling_pvt_v2_b0', dict(PVT, img_size=64)),
    'deit': (lambda: timm.create_model('deit_tiny_patch16_224', num_classes=5, **DEIT),
             'castling_deit_tiny_patch16_224', DEIT),
    'deit_distilled': (lambda: timm.create_model('deit_tiny_distilled_patch16_224', num_classes=5, **DEIT),
                       'castling_deit_tiny_distilled_patch16_224', DEIT),
}


@lru_cache(maxsize=None)
def host(name: str) -> nn.Module:
    """For tests that leave it as it is; without positions in its attention, which ours has not."""
    model = randomize(HOSTS[name][0]())
    with torch.no_grad():
        for key, p in model.named_parameters():
            if 'attention_bias' in key or 'rel_pos' in key:
                p.zero_()
    return model


def ours(name: str, **kwargs) -> nn.Module:
    _, model, options = HOSTS[name]
    return timm.create_model(model, **{'num_classes': 5, **options, **kwargs}).eval()


@pytest.mark.parametrize('name', HOSTS)
def test_host_weights(name: str, caplog):
    """All weights that our model has a place for are the host's, and the convolutions of the values the model's."""
    model, theirs = ours(name), host(name).state_dict()
    with caplog.at_level(logging.WARNING, 'vitlinear'):
        loaded = checkpoint_filter_fn(theirs, model)
    assert 'softmax attention' in caplog.text
    own = model.state_dict()
    model.load_state_dict(loaded, strict=True)
    for key, value in loaded.items():
        if '.dconv.' in key:
            assert torch.equal(value, own[key])
        elif '.attn.qkv.' in key and name.startswith('pvt'):
            parts = [theirs[key.replace('.qkv.', f'.{part}.')] for part in ('q', 'kv')]
            assert torch.equal(value, torch.cat(parts))
        else:
            assert torch.equal(value.flatten(), theirs[key].flatten()), key
    gone = {k for k in theirs if k not in loaded and not re.search(r'\.attn\.(q|kv)\.', k)}
    assert all(re.search(r'attention_bias|rel_pos|\.attn\.(sr|norm)\.', k) for k in gone), gone
    assert model(images(2, 3, 64, 64) if name[:3] in ('lev', 'pvt') else images(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize('name', [name for name in HOSTS if name != 'pvt_v2_reduced'])
def test_host_with_its_softmax(name: str, caplog):
    """With softmax kept in all layers, the host's weights make the host's outputs: each is in its place."""
    model = ours(name, softmax_below=10 ** 6)
    with caplog.at_level(logging.WARNING, 'vitlinear'):
        model.load_state_dict(checkpoint_filter_fn(host(name).state_dict(), model), strict=True)
    assert 'softmax attention' not in caplog.text
    x = images(2, 3, 64, 64) if name[:3] in ('lev', 'pvt') else images(2, 3, 32, 32)
    torch.testing.assert_close(model(x), host(name)(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('theirs, name, kwargs', [
    ('levit_128s', 'castling_levit_128s', dict(qk_width='key')),
    ('levit_conv_128s', 'castling_levit_128s', dict(qk_width='key')),
    ('levit_384', 'castling_levit_384', dict(qk_width='key')),
    ('mvitv2_tiny', 'castling_mvitv2_tiny', {}),
    ('pvt_v2_b0', 'castling_pvt_v2_b0', {}),
    ('deit_tiny_patch16_224', 'castling_deit_tiny_patch16_224', {}),
    ('deit_tiny_distilled_patch16_224', 'castling_deit_tiny_distilled_patch16_224', {})])
def test_published_hosts_fit(theirs: str, name: str, kwargs):
    """By name and shape."""
    model = timm.create_model(name, device='meta', **kwargs)
    loaded = checkpoint_filter_fn(shapes(theirs), model)
    assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize('wide', ['levit_128s', 'levit_conv_128s'])
def test_narrow_keys_are_refused(wide: str):
    model = timm.create_model('castling_levit_128s', device='meta')
    with pytest.raises(ValueError, match="qk_width='key'"):
        checkpoint_filter_fn(shapes(wide), model)


@lru_cache(maxsize=None)
def shapes(name: str) -> Dict[str, torch.Tensor]:
    return timm.create_model(name, device='meta').state_dict()


@pytest.mark.parametrize('name', HOSTS)
def test_other_backbones_are_refused(name: str):
    model = ours(name)
    for other in HOSTS:
        if other.split('_')[0] != name.split('_')[0]:
            with pytest.raises(ValueError, match='checkpoint'):
                checkpoint_filter_fn(host(other).state_dict(), model)
    for wrong in ('vvt_nano', 'resnet18', 'mvitv2_base', 'deit_base_patch16_224', 'levit_384'):
        with pytest.raises(ValueError, match='checkpoint'):
            checkpoint_filter_fn(shapes(wrong), model)
    with pytest.raises(ValueError, match='checkpoint'):
        checkpoint_filter_fn({}, model)


def test_a_token_too_few_or_too_many():
    for theirs, name in (('deit', 'deit_distilled'), ('deit_distilled', 'deit')):
        with pytest.raises(ValueError, match='checkpoint is of another variant'):
            checkpoint_filter_fn(host(theirs).state_dict(), ours(name))


@pytest.mark.parametrize('own', [True, False])
@pytest.mark.parametrize('name', ['deit', 'deit_distilled'])
def test_positions_are_resized(name: str, own: bool):
    """To another image size as timm does."""
    theirs = (randomize(ours(name)) if own else host(name)).state_dict()
    model = ours(name, img_size=(48, 32))
    loaded = checkpoint_filter_fn(theirs, model)
    prefix = model.num_prefix_tokens
    expected = timm.layers.resample_abs_pos_embed(theirs['pos_embed'], (6, 4), num_prefix_tokens=prefix)
    assert torch.equal(loaded['pos_embed'], expected) and expected.shape == (1, 24 + prefix, 24)
    model.load_state_dict(loaded, strict=True)


@pytest.mark.parametrize('name', HOSTS)
def test_incomplete_hosts(name: str):
    theirs = host(name).state_dict()
    missing = next(k for k in theirs if 'mlp' in k)
    with pytest.raises(ValueError, match='incomplete|no .* weights'):
        checkpoint_filter_fn({k: v for k, v in theirs.items() if k != missing}, ours(name))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('wrap', [
    lambda s: s, lambda s: {'model': s}, lambda s: {'state_dict': {f'module.{k}': v for k, v in s.items()}}])
def test_own_weights_are_left_alone(form: str, wrap: Callable):
    model = create(form)
    theirs = model.state_dict()
    loaded = checkpoint_filter_fn(wrap(theirs), model)
    assert list(loaded) == list(theirs) and all(loaded[k] is v for k, v in theirs.items())
    headless = {k: v for k, v in theirs.items() if not k.startswith('head')}
    assert checkpoint_filter_fn(headless, model).keys() == headless.keys()
    # sorted by name, as safetensors does
    assert checkpoint_filter_fn(dict(sorted(theirs.items())), model).keys() == theirs.keys()


@pytest.mark.parametrize('name', [*HOSTS, *FORMS])
def test_other_classes(name: str, caplog):
    """The head is the model's own, with a warning; none is fine."""
    if name in HOSTS and name not in FORMS:
        make, theirs = (lambda **kwargs: ours(name, **kwargs)), host(name).state_dict()
    else:
        make, theirs = (lambda **kwargs: create(name, seed=1, **kwargs)), create(name).state_dict()
    model = make(num_classes=3)
    with caplog.at_level(logging.WARNING, 'vitlinear'):
        loaded = checkpoint_filter_fn(theirs, model)
    assert '5 classes' in caplog.text and '3' in caplog.text
    heads = [k for k, v in model.state_dict().items() if k.startswith('head') and len(v.shape) and len(v) == 3]
    assert heads and all(torch.equal(loaded[k], model.state_dict()[k]) for k in heads)
    model.load_state_dict(loaded, strict=True)
    model = make(num_classes=0)
    model.load_state_dict(checkpoint_filter_fn(theirs, model), strict=True)


@pytest.mark.parametrize('ours_, theirs', [
    ('castling_levit_128', 'castling_levit_128s'), ('castling_levit_256', 'castling_levit_384'),
    ('castling_mvitv2_tiny', 'castling_mvitv2_base'), ('castling_pvt_v2_b0', 'castling_pvt_v2_b1'),
    ('castling_deit_tiny_patch16_224', 'castling_deit_small_patch16_224'),
    ('castling_deit_tiny_distilled_patch16_224', 'castling_deit_tiny_patch16_224'),
    ('castling_levit_128s', 'castling_nano')])
def test_another_variant(ours_: str, theirs: str):
    with pytest.raises(ValueError, match='another variant|incomplete|holds no'):
        checkpoint_filter_fn(shapes(theirs), timm.create_model(ours_, device='meta'))


# construction

@pytest.mark.parametrize('form, kwargs, words', [
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
    with pytest.raises(ValueError) as e:
        build(form, **kwargs)
    assert all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize('form', FORMS)
def test_unknown_arguments(form: str):
    for kwargs in (dict(img_sizes=32), dict(attn_kwargs=dict(temperature=1.))):
        with pytest.raises(TypeError, match=next(iter(kwargs.get('attn_kwargs', kwargs)))):
            build(form, device='meta', **kwargs)


@pytest.mark.parametrize('form, cls', [
    ('nano', CastlingPyramid), ('levit', CastlingLevit), ('mvitv2', CastlingMultiScaleVit),
    ('deit', CastlingVisionTransformer)])
def test_wrong_input(form: str, cls):
    model = create(form)
    assert isinstance(model, cls)
    wrong = [] if form == 'deit' else [torch.zeros(1, 4, 32, 32), torch.zeros(3, 32, 32), torch.zeros(0, 3, 32, 32)]
    for x in wrong:
        with pytest.raises(ValueError, match='Expected'):
            model(x)


def test_dropout_of_the_branch():
    model = build('deit', attn_drop_rate=.3, proj_drop_rate=.2)
    assert {(m.aux.drop, m.proj_drop.p) for m in layers(model)} == {(.3, .2)}


# conversion

@pytest.mark.parametrize('name', ['levit', 'pvt_v2_reduced', 'deit', 'deit_distilled'])
def test_convert_host_weights(name: str, capsys, tmp_path):
    """`vitlinear convert` of a backbone with softmax attention, to a folder and back."""
    torch.save(host(name).state_dict(), tmp_path / 'host.pth')
    _, arch, options = HOSTS[name]
    folder = tmp_path / f'{arch}.host'
    words = [f'{k}={v!r}'.replace(' ', '') for k, v in options.items()]
    code = cli.main([
        'convert', str(tmp_path / 'host.pth'), '--model', arch, '--output', str(folder), '--model-kwargs', *words])
    told = capsys.readouterr()
    assert code == 0, told.err
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    expected = checkpoint_filter_fn(host(name).state_dict(), model)  # with the convolutions of this model
    assert same(model.state_dict(), expected) and model.num_classes == 5
    x = images(2, 3, 64, 64) if name[:3] in ('lev', 'pvt') else images(2, 3, 32, 32)
    assert torch.isfinite(model(x)).all()
    assert 'start for training' in read_record(folder).limits
    weights = (folder / 'model.safetensors').read_bytes()
    assert cli.main([
        'convert', str(tmp_path / 'host.pth'), '--model', arch, '--output', str(tmp_path / 'again'), '--tag', 'host',
        '--model-kwargs', *words]) == 0
    assert (tmp_path / 'again' / 'model.safetensors').read_bytes() == weights


def test_convert_refuses(capsys, tmp_path):
    """Positions of another image size, which would be resized, and keys of another width."""
    torch.save(host('deit').state_dict(), tmp_path / 'deit.pth')
    torch.save(host('levit').state_dict(), tmp_path / 'levit.pth')
    for file, arch, options, words in (
            ('deit', 'castling_deit_tiny_patch16_224', dict(DEIT, img_size=48), 'resized'),
            ('levit', 'castling_levit_128s', LEVIT, "qk_width='key'")):
        options = [f'{k}={v!r}'.replace(' ', '') for k, v in options.items()]
        code = cli.main([
            'convert', str(tmp_path / f'{file}.pth'), '--model', arch, '--output', str(tmp_path / 'x'), '--tag', 'a',
            '--model-kwargs', *options])
        assert code == 2 and words in capsys.readouterr().err and not (tmp_path / 'x').exists()
