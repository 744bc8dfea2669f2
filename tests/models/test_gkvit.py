"""GKViT: counts of parameters and operations, initialisation, checkpoints and recipes."""
import csv
import math
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from _models import blank, count_macs, filtered, numel, on_meta
from vitlinear.layers import RandomWalkAttention
from vitlinear.models.gkvit import GraphKernelVisionTransformer
from vitlinear.ops.primitives.walk_series.signed import MAX_DOUBLINGS
from vitlinear.tools.train import build_parser

VARIANTS = ['gkvit_nano', 'gkvit_tiny', 'gkvit_small', 'gkvit_base', 'gkvit_large']
SMALL = dict(embed_dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4), num_classes=5)
WALK = dict(mode='walk')


@pytest.fixture(scope='module', params=VARIANTS)
def variant(request) -> str:
    return request.param


def small(seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model('gkvit_nano', **{**SMALL, **kwargs})


# parameters and operations

@pytest.mark.parametrize(('name', 'total', 'encoder'), [
    ('gkvit_nano', 3_107_976, 2_850_976),
    ('gkvit_tiny', 11_793_704, 11_280_704),
    ('gkvit_small', 20_409_068, 19_896_068),
    ('gkvit_base', 35_358_428, 34_845_428),
    ('gkvit_large', 63_172_388, 62_659_388),
])
def test_parameters(name: str, total: int, encoder: int):
    """As designed with walks; signed weights, the default, have no temperature for each head."""
    for kwargs in (WALK, {}):
        model = timm.create_model(name, device='meta', attn_kwargs=kwargs)
        layers = [b.attn for stage in model.stages for b in stage.blocks]
        temperatures = 0 if kwargs else sum(layer.num_heads for layer in layers)
        assert not list(model.buffers())
        assert numel(model) == total - temperatures
        model.reset_classifier(0)
        assert numel(model) == encoder - temperatures
        assert {layer.head_dim for layer in layers} == {32}


def closed_form(model: nn.Module, H: int, W: int, degrees: int = 2, core: int = 2 * MAX_DOUBLINGS) -> int:
    """Multiply-accumulates from shapes.

    A block of N positions and C channels in heads of r: 4 N C^2 in projections; 4 N C r in sums over tokens and
    outputs; r^3 in the product of two sums, in each doubling and in each squaring between them; 8 N C^2 + 36 N C in
    the MLP. Walks take N C in the degrees of queries and as much in those of keys, signed weights two products of each
    of two Gram matrices. Maps of no more than r positions take N x N matrices instead: N^2 r in edges, in one step, in
    each doubling and, signed, in two Gram matrices; N^3 in two steps, in each squaring and in powers of Gram matrices.
    """
    signed = model.stages[0].blocks[0].attn.mode == 'spectral'
    degrees, core = (0, core + 4 if core else 0) if signed else (degrees, core)
    total = 0
    for i, stage in enumerate(model.stages):
        conv = (stage.downsample if i else model.patch_embed).proj
        H, W = (math.ceil(n / conv.stride[0]) for n in (H, W))
        N, C = H * W, conv.out_channels
        total += N * conv.kernel_size[0] ** 2 * conv.in_channels * C
        for block in stage.blocks:
            heads, r = block.attn.num_heads, block.attn.head_dim
            total += 12 * N * C ** 2 + 36 * N * C
            if N > r or not signed:
                total += 4 * N * C * r + degrees * N * C + core * heads * r ** 3
            else:
                total += heads * N ** 2 * ((2 + 2 * signed + MAX_DOUBLINGS) * r + (4 * signed + MAX_DOUBLINGS) * N)
    return total + model.head.weight.numel()


@pytest.mark.parametrize(('name', 'size'), [
    ('gkvit_nano', (224, 224)), ('gkvit_nano', (512, 512)), ('gkvit_nano', (75, 101)), ('gkvit_tiny', (224, 160)),
    ('gkvit_small', (224, 224))])
@pytest.mark.parametrize('attn_kwargs', [{}, dict(mode='walk')])
def test_operations(name: str, size: tuple[int, int], attn_kwargs):
    model = timm.create_model(name, device='meta', attn_kwargs=attn_kwargs)
    assert count_macs(model, *size) == closed_form(model, *size)


def test_operations_are_linear():
    """In images; and in pixels, but for the r x r sums of each image."""
    model = on_meta('gkvit_nano')
    assert count_macs(model, 40, 24, batch=3) == 3 * count_macs(model, 40, 24)
    fixed = closed_form(model, 256, 256) - closed_form(model, 256, 256, core=0) + model.head.weight.numel()
    assert count_macs(model, 512, 512) - fixed == 4 * (count_macs(model, 256, 256) - fixed)


# structure

def test_maps():
    model = small().eval()
    assert [f['reduction'] for f in model.feature_info] == [4, 8, 16, 32]
    for H, W in ((64, 64), (65, 97), (3, 40)):
        maps = model.forward_intermediates(torch.randn(1, 3, H, W), intermediates_only=True)
        for m, channels, stride in zip(maps, SMALL['embed_dims'], (4, 8, 16, 32), strict=True):
            assert m.shape == (1, channels, math.ceil(H / stride), math.ceil(W / stride))


def test_options_reach_the_attention():
    model = small(attn_kwargs=dict(mode='walk', init_beta=0.))
    layers = [b.attn for stage in model.stages for b in stage.blocks]
    assert all(type(m) is RandomWalkAttention and m.mode == 'walk' and m.theta is None for m in layers)
    model = small(attn_layer='softmax')
    assert not any(isinstance(m, RandomWalkAttention) for m in model.modules())
    with pytest.raises(TypeError, match='temperature'):
        small(attn_kwargs=dict(temperature=1.))
    with pytest.raises(TypeError, match='fpc_reduction'):
        small(fpc_reduction=2)


def test_initialisation(variant: str):
    """The same whether a model is made at once or on 'meta'; betas and temperatures where the layer's options say."""
    torch.manual_seed(0)
    kwargs = dict(depths=(1, 1, 1, 1), num_classes=10, attn_kwargs=WALK)
    models = [timm.create_model(variant, **kwargs), timm.create_model(variant, device='meta', **kwargs)]
    models[1] = blank(models[1])
    models[1].init_weights(needs_reset=True)
    for model in models:
        for name, p in model.named_parameters():
            if name.endswith('theta'):
                torch.testing.assert_close(p.detach(), torch.full_like(p, -2.), rtol=0, atol=.01)
            elif name.endswith('log_temperature'):
                torch.testing.assert_close(p.detach(), torch.full_like(p, math.log(4)))
            elif '.attn.' in name and p.ndim == 2:
                assert p.std().item() == pytest.approx(.02, rel=.05), name


def test_no_weight_decay():
    """On betas and temperatures, with the biases and norms."""
    model = small(attn_kwargs=WALK)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=.05)
    free = {names[id(p)] for group in optimizer.param_groups if not group['weight_decay'] for p in group['params']}
    walks = {name for name in names.values() if name.endswith(('theta', 'log_temperature'))}
    assert len(walks) == 10 and walks <= free


# checkpoints

def test_checkpoints():
    """Their own with a head for other classes, and no other's."""
    source, model = small(), small(seed=1, num_classes=7)
    loaded = filtered({'model': source.state_dict()}, model)
    model.load_state_dict(loaded)
    assert torch.equal(model.stages[0].blocks[0].attn.theta, source.stages[0].blocks[0].attn.theta)
    for other, words in (
            (dict(depths=(1, 1, 1, 1)), 'another variant: its stages have'),
            (dict(embed_dims=(8, 16, 24, 40), num_heads=(1, 2, 3, 4)), 'another variant'),
            (dict(attn_kwargs=dict(init_beta=0.)), 'incomplete: .*theta')):
        with pytest.raises(ValueError, match=words):
            filtered(small(**other).state_dict(), small())
    with pytest.raises(ValueError, match='no GraphKernelVisionTransformer weights'):
        filtered({'conv1.weight': torch.zeros(1)}, small())


def test_no_weights_are_claimed(variant: str):
    cfg = timm.get_pretrained_cfg(variant)
    assert cfg.license == 'apache-2.0' and not cfg.fixed_input_size and cfg.paper_ids is None
    assert cfg.tag == 'untrained' and not cfg.has_weights
    assert isinstance(on_meta(variant), GraphKernelVisionTransformer)


# recipes

@pytest.mark.parametrize(('name', 'drop_path'), [
    ('nano', 0.), ('tiny', .1), ('small', .1), ('base', .3), ('large', .4)])
def test_recipe(name: str, drop_path: float):
    args = build_parser().parse(['--config', f'gkvit_{name}_in1k'])
    assert (args.model, args.drop_path, args.lr) == (f'gkvit_{name}', drop_path, None)
    assert args.lr_base * args.batch_size * 8 / args.lr_base_size == pytest.approx(1e-3)
    assert (args.epochs, args.opt, args.weight_decay) == (300, 'adamw', .05)


@pytest.mark.slow
def test_encoder_costs(monkeypatch, capsys, tmp_path):
    """scripts/encoder_costs.py: its MiT has the sizes published for SegFormer, and results/ hold what it counts now."""
    script = Path(__file__).resolve().parents[2] / 'scripts' / 'encoder_costs.py'
    out = tmp_path / 'costs.csv'
    monkeypatch.setattr(sys, 'argv', [str(script), '--sizes', '512', '--out', str(out)])
    runpy.run_path(str(script), run_name='__main__')
    with open(out, newline='') as f:
        rows = {(row['model'], row['size'], row['peer']): row for row in csv.DictReader(f)}
    for name, peer, published in (
            ('tiny', 'mit_b1', 13.1), ('small', 'mit_b2', 24.2), ('base', 'mit_b3', 44.0), ('large', 'mit_b5', 81.4)):
        row = rows[f'gkvit_{name}', '512', peer]
        assert float(row['peer_params_m']) == pytest.approx(published, abs=.1)
    row = rows['gkvit_small', '512', 'pvt_v2_b2']
    encoder = timm.create_model('gkvit_small', num_classes=0, device='meta')
    theirs = timm.create_model('pvt_v2_b2', num_classes=0, device='meta')
    ratio = sum(p.numel() for p in encoder.parameters()) / sum(p.numel() for p in theirs.parameters())
    assert row['params_saved'] == f'{100 - 100 * ratio:.1f}'
    saved = 100 - 100 * float(row['gmacs']) / float(row['peer_gmacs'])
    assert float(row['macs_saved']) == pytest.approx(saved, abs=.06)
    published = (script.parents[1] / 'results' / 'encoder_costs.csv').read_text().splitlines()
    assert set(out.read_text().splitlines()) == {line for line in published if ',1024,' not in line}
