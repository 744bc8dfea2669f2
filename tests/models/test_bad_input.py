"""What cannot work is refused with a message that names the argument, its value, and what is valid."""
import random
from collections import Counter

import pytest
import timm
import torch

from _models import images, refused
from vitlinear.layers import VicinityAttention
from vitlinear.ops import vicinity_attention


@pytest.fixture(scope='module')
def model() -> torch.nn.Module:
    return timm.create_model('vvt_nano', num_classes=5).eval()


@pytest.mark.parametrize(('shape', 'words'), [
    ((2, 1, 32, 32), ['3 input channels', 'in_chans', 'got 1', '[2, 1, 32, 32]']),
    ((2, 32, 32, 3), ['3 input channels', 'in_chans', 'got 32']),  # channels last by mistake
    ((0, 3, 32, 32), ['at least one image', '[0, 3, 32, 32]']),
    ((2, 3, 0, 32), ['at least one image and one pixel', '[2, 3, 0, 32]']),
    ((2, 3, 32, 0), ['at least one image and one pixel', '[2, 3, 32, 0]']),
    ((3, 32, 32), ['(B, 3, H, W)', '3 dimensions']),
    ((1, 2, 3, 32, 32), ['(B, 3, H, W)', '5 dimensions']),
])
def test_input(model, shape, words):
    for method in ('__call__', 'forward_features', 'forward_intermediates'):
        with refused(*words):
            getattr(model, method)(torch.zeros(shape))


def test_input_of_features_only():
    model = timm.create_model('vvt_nano', features_only=True)
    with pytest.raises((ValueError, RuntimeError), match='channels'):
        model(torch.zeros(2, 1, 32, 32))


@pytest.mark.parametrize(('kwargs', 'words'), [
    (dict(attn_layer='quadratic'), ["attn_layer 'quadratic'", 'linear', 'softmax', 'vicinity']),
    (dict(embed_dims=(30, 64, 128, 160), num_heads=(4, 2, 4, 5)), ['30 / 2', 'num_heads=4']),
    (dict(num_heads=7), ['num_heads=7', '32 / 2']),
    (dict(embed_dims=(33, 64, 128, 160)), ['dim=33', 'feature_reduction=2']),
    (dict(depths=(1, -1, 1, 1)), ['depths=(1, -1, 1, 1)', 'positive']),
    (dict(depths=()), ['depths=()']),
    (dict(embed_dims=(0, 64, 128, 160)), ['embed_dims=(0, 64, 128, 160)', 'positive']),
    (dict(mlp_ratios=(4., 4., 0., 4.)), ['mlp_ratios=(4.0, 4.0, 0.0, 4.0)', 'positive']),
    (dict(mlp_ratios=.001), ['mlp_ratio']),
    (dict(embed_dims=(32, 64, 128)), ['embed_dims=(32, 64, 128)', 'one entry per stage', 'depths=(1, 3, 4, 1)']),
    (dict(global_pool='max'), ["global_pool 'max'", "'avg'", "''"]),
    (dict(num_classes=-1), ['num_classes=-1', 'negative']),
    (dict(in_chans=0), ['in_chans=0', 'positive']),
    (dict(patch_stride=0), ['patch_stride=0', 'positive']),
    (dict(patch_size=4), ['patch_size=4', 'odd']),
    (dict(patch_size=1, patch_stride=2), ['patch_size=1', 'patch_stride=2']),
    (dict(attn_kwargs=dict(locality='3d')), ["locality '3d'", '2d, 2d_product, 1d, none']),
    (dict(attn_kwargs=dict(feature_reduction=0)), ['feature_reduction=0']),
    (dict(attn_kwargs=dict(fpc_reduction=0)), ['fpc_reduction=0', 'between 1']),
    (dict(attn_kwargs=dict(fpc_reduction=99)), ['fpc_reduction=99', 'dim=32']),
    (dict(drop_path_rate=-.1), ['drop_path_rate=-0.1']),
    (dict(drop_path_rate=1.5), ['drop_path_rate=1.5']),
    (dict(drop_rate=1.5), ['1.5']),
    (dict(proj_drop_rate=1.5), ['1.5']),
])
def test_construction(kwargs, words):
    with refused(*words):
        timm.create_model('vvt_nano', **kwargs)


@pytest.mark.parametrize('kwargs', [
    dict(img_sizes=32), dict(qkv_bias=True), dict(window_size=7), dict(attn_kwargs=dict(temperature=1.))])
def test_unknown_arguments(kwargs):
    wrong = next(iter(kwargs)) if 'attn_kwargs' not in kwargs else 'temperature'
    for name in ('vvt_nano', 'vvt_large'):
        with pytest.raises(TypeError, match=wrong):
            timm.create_model(name, device='meta', **kwargs)


@pytest.mark.parametrize(('args', 'words'), [
    ((3, 'max'), ["global_pool 'max'", "'avg'", "''"]),
    ((-1, None), ['num_classes=-1', 'negative']),
    ((-1, ''), ['num_classes=-1', 'negative']),
])
def test_failed_reset_leaves_the_model(model, args, words):
    x = images(1, 3, 32, 32)
    before, head = model(x), model.head
    with refused(*words):
        model.reset_classifier(*args)
    assert model.head is head and model.num_classes == 5 and model.global_pool == 'avg'
    assert torch.equal(model(x), before)


@pytest.mark.parametrize('output_fmt', ['NLC', 'nchw', ''])
def test_output_format(model, output_fmt: str):
    with refused(f"'{output_fmt}'", 'NCHW', 'NHWC'):
        model.forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt=output_fmt)


@pytest.mark.parametrize('indices', [[4], [-5], 5, [0, 9]])
def test_indices(model, indices):
    with pytest.raises((AssertionError, ValueError, IndexError)):
        model.forward_intermediates(torch.zeros(1, 3, 32, 32), indices=indices)


@pytest.mark.parametrize(('kwargs', 'words'), [
    (dict(locality='3d'), ["locality '3d'", '2d, 2d_product, 1d, none']),
])
def test_vicinity_attention(kwargs, words):
    """The function refuses what the module refuses: a typing error must not select another kernel."""
    q = torch.rand(1, 1, 3, 4, 2)
    with refused(*words):
        vicinity_attention(q, q, q, **kwargs)
    with pytest.raises(TypeError, match='sr_ratio'):
        VicinityAttention(16, 2, sr_ratio=2)


def test_unknown_name():
    with pytest.raises(RuntimeError, match='vvt_huge'):
        timm.create_model('vvt_huge')
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'):
        timm.create_model('vvt_tiny.nosuch')


@pytest.mark.parametrize(('name', 'kwargs', 'words'), [
    ('castling_deit_tiny_patch16_224', dict(num_heads=0), ['num_heads=0']),
    ('castling_deit_tiny_patch16_224', dict(num_heads=5), ['num_heads=5', 'divisible']),
    ('castling_deit_tiny_patch16_224', dict(img_size=(1,)), ['img_size=(1,)']),
    ('castling_deit_tiny_patch16_224', dict(global_pool='median'), ["global_pool='median'", 'avg']),
    ('castling_deit_tiny_patch16_224', dict(norm_layer={'a': 1}), ["norm_layer={'a': 1}"]),
    ('castling_levit_128s', dict(act_layer='x'), ["act_layer='x'"]),
    ('castling_levit_128s', dict(global_pool='max'), ["global_pool='max'", 'avg']),
    ('castling_levit_128s', dict(key_dim=0), ['key_dim=0']),
    ('castling_mvitv2_tiny', dict(global_pool='token'), ["global_pool='token'"]),
    ('xvit_tiny', dict(mlp_ratio=float('inf')), ['mlp_ratio=inf']),
])
def test_construction_of_parts_of_timm(name: str, kwargs, words):
    with refused(*words):
        timm.create_model(name, **kwargs)


@pytest.mark.slow
def test_random_arguments():
    """A thousand constructions of chance: made, or refused with an error that says so."""
    values = [
        0, -1, 1, 3, .5, 1.5, float('nan'), float('inf'), None, 'x', '', True, (), (1,), (1, 2, 3, 4), (0, 0, 0, 0), {},
        {'a': 1}, 'avg', 'token', (32, 32), 224]
    names = [
        'num_classes', 'in_chans', 'img_size', 'depths', 'depth', 'embed_dims', 'embed_dim', 'num_heads', 'mlp_ratios',
        'mlp_ratio', 'drop_rate', 'drop_path_rate', 'patch_size', 'patch_stride', 'global_pool', 'attn_layer',
        'attn_kwargs', 'window_size', 'kernel_size', 'qkv_bias', 'out_indices', 'softmax_below', 'castling_steps',
        'castling_ramp', 'key_dim', 'window_depths', 'init_values', 'act_layer', 'norm_layer', 'window_heads']
    models = [
        'vvt_nano', 'xvit_tiny', 'xvit_pyramid_nano', 'castling_nano', 'castling_levit_128s', 'castling_mvitv2_tiny',
        'castling_deit_tiny_patch16_224', 'qna_vit_nano', 'gkvit_nano']
    rng, outcomes = random.Random(0), Counter()
    for _ in range(1000):
        name, kwargs = rng.choice(models), {k: rng.choice(values) for k in rng.sample(names, rng.choice([1, 1, 2]))}
        try:
            timm.create_model(name, device='meta', **kwargs)
            outcomes['made'] += 1
        except (TypeError, ValueError):
            outcomes['refused'] += 1
        except RuntimeError:  # torch's, of sizes below zero, which it words itself
            outcomes['refused by torch'] += 1
    assert outcomes['made'] > 50 and outcomes['refused by torch'] < 20, outcomes
