"""X-ViT: parameter and operation counts, its parts by hand, positions, pooling, and what a flat model has of its own.

What it shares with other backbones is in test_contract.py.
"""
import copy
import math

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from _models import CLOSE, build, count_macs, create, filtered, images, numel, on_meta, refused
from vitlinear.layers import XNormAttention, XNormClassAttention
from vitlinear.layers.xnorm_block import FourierPosition, LocalPatchInteraction
from vitlinear.ops import reference

FLAT = ['xvit_tiny', 'xvit_small', 'xvit_medium', 'xvit_base']
PYRAMIDS = ['xvit_pyramid_nano', 'xvit_pyramid_tiny', 'xvit_pyramid_small', 'xvit_pyramid_base']


@pytest.fixture(scope='module')
def model() -> nn.Module:
    """For tests that leave it as it is."""
    return create('xvit')


# counts

@pytest.mark.parametrize(('name', 'total'), [
    ('xvit_tiny', 10_217_744), ('xvit_small', 20_787_960), ('xvit_medium', 37_478_328), ('xvit_base', 63_985_864),
    ('xvit_pyramid_nano', 1_393_440), ('xvit_pyramid_tiny', 7_528_804), ('xvit_pyramid_small', 18_685_674),
    ('xvit_pyramid_base', 36_174_206)])
def test_parameters(name: str, total: int):
    model = copy.deepcopy(on_meta(name))
    for classes in (1000, 0, 100):
        model.reset_classifier(classes)
        assert numel(model) == total + (classes - 1000) * (model.num_features + 1), classes


@pytest.mark.parametrize(('name', 'xcit'), [
    ('xvit_tiny', 'xcit_tiny_24_p16_224'), ('xvit_small', 'xcit_small_12_p16_224'),
    ('xvit_medium', 'xcit_small_24_p16_224')])
def test_skeleton(name: str, xcit: str):
    """As wide in attention as outside of it and with Fourier positions, it has XCiT's parameters, its scales apart."""
    model = timm.create_model(name, attn_dim=on_meta(name).embed_dim, pos_embed='fourier', device='meta')
    theirs = timm.create_model(xcit, device='meta')
    assert numel(model, 'gamma_q', 'gamma_kv') == numel(theirs, 'temperature')
    assert len(model.blocks) == len(theirs.blocks)


def closed_form(model: nn.Module, H: int, W: int) -> int:
    """Multiply-accumulates of a flat model from shapes: 4 N C E + 2 N E d for the attention of a layer."""
    total = 0
    for layer in model.patch_embed:
        H, W = math.ceil(H / 2), math.ceil(W / 2)
        total += H * W * layer.conv.weight.numel()
    N, C = H * W, model.embed_dim
    for block in model.blocks:
        E, d = block.attn.attn_dim, block.attn.head_dim
        total += 4 * N * C * E + 2 * N * E * d + 2 * 9 * N * C + 2 * N * C * block.mlp.fc1.out_features
    for block in model.cls_blocks:
        E, d = block.attn.attn_dim, block.attn.head_dim
        total += 2 * C * E + 2 * (N + 1) * C * E + (N + 2) * E * d + 2 * C * block.mlp.fc1.out_features
    return total + model.head.weight.numel()


@pytest.mark.parametrize(('name', 'size', 'gmacs'), [
    ('xvit_tiny', 224, 1.90), ('xvit_small', 224, 3.74), ('xvit_medium', 224, 7.01), ('xvit_base', 224, 11.98),
    ('xvit_tiny', 384, 5.59), ('xvit_small', 384, 10.99)])
def test_operations(name: str, size: int, gmacs: float):
    """Within 1 % of the count that the recalled GFLOPs were compared with, some heads of which were wider."""
    expected = closed_form(on_meta(name), size, size)
    assert expected / 1e9 == pytest.approx(gmacs, rel=.01)
    if name in ('xvit_tiny', 'xvit_small') and size == 224:
        assert count_macs(on_meta(name), size, size) == expected


def test_operations_are_linear_in_pixels():
    for name in ('xvit_small', 'xvit_pyramid_small'):
        model = timm.create_model(name, num_classes=0, device='meta')
        a, b, c = (count_macs(model, n, 256) for n in (256, 512, 1024))
        assert c - b == 2 * (b - a)


def test_heads_and_layer_scale():
    for name, heads in zip(FLAT, (4, 8, 8, 8), strict=True):
        layers = [m for m in on_meta(name).modules() if isinstance(m, (XNormAttention, XNormClassAttention))]
        assert {m.num_heads for m in layers} == {heads} and len(layers) == len(on_meta(name).blocks) + 2
        values = {m.init_values for m in on_meta(name).modules() if hasattr(m, 'init_values')}
        assert values == {1. if len(on_meta(name).blocks) == 12 else 1e-5}
    for name in PYRAMIDS:
        assert {b.attn.head_dim for stage in on_meta(name).stages for b in stage.blocks} <= {24, 32}


# parts

def test_by_hand(model):
    """The whole model from its parameters: residual order, layer scales, both kinds of attention, head."""
    x = images(2, 3, 48, 32)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True, output_fmt='NHWC')
        y = x
        for i, layer in enumerate(model.patch_embed):
            y = nn.functional.conv2d(y, layer.conv.weight, stride=2, padding=1)
            y = nn.functional.batch_norm(
                y, layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias)
            y = nn.functional.gelu(y) if i < 3 else y
        y = y.permute(0, 2, 3, 1) + resample_abs_pos_embed_nhwc(model.pos_embed, [3, 2])
        for block, expected in zip(model.blocks, maps, strict=True):
            y = y + attention_by_hand(block.attn, block.norm1(y)) * block.ls1.gamma
            local = block.norm3(y).permute(0, 3, 1, 2)
            local = block.lpi.conv2(block.lpi.norm(nn.functional.gelu(block.lpi.conv1(local))))
            y = y + local.permute(0, 2, 3, 1) * block.ls3.gamma
            y = y + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(y)))) * block.ls2.gamma
            torch.testing.assert_close(expected, y, **CLOSE)

        token, tokens = model.cls_token.expand(2, -1, -1), y.flatten(1, 2)
        for block in model.cls_blocks:
            u = block.norm1(torch.cat([token, tokens], dim=1))
            token = token + class_attention_by_hand(block.attn, u) * block.ls1.gamma
            token = token + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(token)))) * block.ls2.gamma
        features = model.norm(token[:, 0])
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), features, **CLOSE)
        torch.testing.assert_close(model(x), model.head(features), **CLOSE)
        assert model(x).std() > .1


def attention_by_hand(attn: XNormAttention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (
        u.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for u in attn.qkv(x).flatten(1, 2).chunk(3, dim=-1))
    out = reference.xnorm_attention(q, k, v, attn.gamma_q, attn.gamma_kv)
    return attn.proj(out.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])


def class_attention_by_hand(attn: XNormClassAttention, u: torch.Tensor) -> torch.Tensor:
    q, k, v = (
        t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (attn.q(u[:, :1]), *attn.kv(u).chunk(2, dim=-1)))
    out = reference.xnorm_attention(q, k, v, attn.gamma_q, attn.gamma_kv)
    return attn.proj(out.transpose(1, 2).flatten(2))


def test_local_patch_interaction():
    """Two convolutions with biases, or one without; 5 x 5 or 3 x 3 pixels, each channel for itself."""
    for num, reach, parameters in ((2, 2, 2 * 10 * 4 + 8), (1, 1, 9 * 4 + 8)):
        lpi = LocalPatchInteraction(4, num).eval()
        assert numel(lpi) == parameters
        x = torch.zeros(1, 9, 9, 4)
        a = lpi(x)
        x[0, 4, 4, 1] = 1
        changed = (lpi(x) - a)[0].abs() > 1e-7
        assert changed[4 - reach:5 + reach, 4 - reach:5 + reach, 1].any() and not changed[..., [0, 2, 3]].any()
        assert not changed[:4 - reach].any() and not changed[:, 5 + reach:].any()
    assert create('xvit', lpi_convs=1)(images(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(('patch_size', 'convs'), [(2, 1), (4, 2), (8, 3), (16, 4), (32, 5)])
def test_patch_size(patch_size: int, convs: int):
    model = create('xvit', patch_size=patch_size)
    assert [layer.conv.out_channels for layer in model.patch_embed] == [16 // 2 ** i for i in reversed(range(convs))]
    assert {info['reduction'] for info in model.feature_info} == {patch_size}
    maps = model.forward_intermediates(images(1, 3, 50, 33), intermediates_only=True)
    assert maps[0].shape[2:] == (math.ceil(50 / patch_size), math.ceil(33 / patch_size))


# positions

@pytest.mark.parametrize('size', [96, (96, 32), (40, 70)])
def test_set_input_size(size):
    """The resized positions become the model's own: the same output at that size, without resizing any more."""
    model = create('xvit')
    model.pos_embed.requires_grad_(False)
    H, W = (size, size) if isinstance(size, int) else size
    x = images(1, 3, H, W)
    expected = model(x)
    model.set_input_size(size)
    assert model.pos_embed.shape[1:3] == (math.ceil(H / 16), math.ceil(W / 16)) and model.img_size == (H, W)
    assert not model.pos_embed.requires_grad
    torch.testing.assert_close(model(x), expected, **CLOSE)
    created = create('xvit', img_size=(H, W))
    assert created.pos_embed.shape == model.pos_embed.shape
    model.load_state_dict(created.state_dict())
    assert not any('pos' in k for k in build('xvit', pos_embed='none').state_dict())
    fourier = create('xvit', pos_embed='fourier')
    expected = fourier(x)
    fourier.set_input_size(size)
    assert torch.equal(fourier(x), expected) and fourier.pos_embed is None


def test_fourier_positions():
    """Sines and cosines of the parts of the sides, columns after rows, and no two places alike."""
    module = FourierPosition(64)
    nn.init.eye_(module.proj.weight)
    nn.init.zeros_(module.proj.bias)
    table = module(torch.empty(1, 5, 7, 64))[0]
    assert table.shape == (5, 7, 64)
    for i, j in ((0, 0), (4, 2), (2, 6)):
        for freq in (0, 1, 15):
            for start, angle in ((0, 2 * math.pi * (i + 1) / 5), (32, 2 * math.pi * (j + 1) / 7)):
                angle *= 10000 ** (-freq / 16)
                assert table[i, j, start + freq].item() == pytest.approx(math.sin(angle), abs=1e-5)
                assert table[i, j, start + 16 + freq].item() == pytest.approx(math.cos(angle), abs=1e-5)
    assert torch.cdist(table.flatten(0, 1), table.flatten(0, 1)).add(torch.eye(35)).min() > .01
    half = copy.deepcopy(module).bfloat16()(torch.empty(1, 5, 7, 64, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16 and (half[0].float() - table).abs().max() < .02


# pooling and classifier

def test_pooling(model):
    x = images(2, 3, 48, 32)
    features = model.forward_features(x)
    assert features.shape == (2, 16, 3, 2)
    other = copy.deepcopy(model)
    other.reset_classifier(5, 'avg')
    assert other.cls_token is None and len(other.cls_blocks) == 0 and other.global_pool == 'avg'
    torch.testing.assert_close(
        other.forward_head(features, pre_logits=True), model.norm(features.mean(dim=(2, 3))), **CLOSE)
    other(x).sum().backward()
    assert all(p.grad is not None for p in other.parameters())
    other.reset_classifier(0, '')
    torch.testing.assert_close(other(x), model.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), **CLOSE)
    other.reset_classifier(7)  # classes by position
    assert other.global_pool == '' and other(x).shape == (2, 7, 3, 2)

    created = create('xvit', global_pool='avg')
    assert 'cls_token' not in created.state_dict() and created(x).shape == (2, 5)
    for mode in (True, False):
        created.train(mode).bfloat16().reset_classifier(5, 'token')
        assert len(created.cls_blocks) == 2 and created.cls_token.dtype == torch.bfloat16
        assert .01 < created.cls_token.std() < .03 and all(m.training == mode for m in created.modules())
        assert created(x.bfloat16()).shape == (2, 5)
        created.reset_classifier(0, '')


def test_reset_keeps_class_attention(model):
    other = copy.deepcopy(model)
    x = images(2, 3, 48, 32)
    other.reset_classifier(0)
    torch.testing.assert_close(other(x), model.forward_head(model.forward_features(x), pre_logits=True))
    other.reset_classifier(3, 'token')
    assert other(x).shape == (2, 3) and torch.equal(other.cls_token, model.cls_token)
    assert other.head.weight.std() < .05
    created = create('xvit', num_classes=0)
    assert list(created.state_dict()) == [k for k in model.state_dict() if not k.startswith('head.')]


# features

def test_intermediates(model):
    x = images(2, 3, 40, 50)
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, maps[-1]) and torch.equal(last, model.forward_features(x))
    for fmt, convert in (('NHWC', lambda m: m.permute(0, 2, 3, 1)), ('NLC', lambda m: m.flatten(2).transpose(1, 2))):
        for a, b in zip(maps, model.forward_intermediates(x, output_fmt=fmt, intermediates_only=True), strict=True):
            assert torch.equal(convert(a), b)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True, output_fmt='NHWC')
    for a, b in zip(maps, normed, strict=True):
        assert torch.equal(model.norm(a.permute(0, 2, 3, 1)), b)
    for indices, expected in ((2, [1, 2]), ([0, 2], [0, 2]), ([-2], [1])):
        some = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert all(torch.equal(a, maps[i]) for a, i in zip(some, expected, strict=True))
    calls = []
    handle = model.blocks[2].register_forward_hook(lambda *args: calls.append(1))
    last, some = model.forward_intermediates(x, indices=[1], stop_early=True)
    handle.remove()
    assert torch.equal(last, maps[1]) and torch.equal(some[0], maps[1]) and not calls


@pytest.mark.parametrize('prune_norm', [True, False])
@pytest.mark.parametrize('prune_head', [True, False])
def test_prune(prune_norm: bool, prune_head: bool):
    model = create('xvit').train()
    x = images(2, 3, 40, 50)
    expected = create('xvit').train().forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1], prune_norm, prune_head) == [0, 1]
    assert len(model.blocks) == 2 and isinstance(model.norm, nn.Identity) == prune_norm
    assert (model.cls_token is None) == (model.num_classes == 0) == (model.global_pool == '') == prune_head
    for a, b in zip(model.forward_intermediates(x, intermediates_only=True), expected, strict=True):
        assert torch.equal(a, b)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# training

def test_checkpointing(model):
    model, x = copy.deepcopy(model), images(2, 3, 48, 48)  # in eval mode, where batch norms forget
    calls, grads = [0], []
    for block in model.blocks:
        block.norm2.register_forward_hook(lambda *args: calls.__setitem__(0, calls[0] + 1))
    for enable, runs in ((False, 1), (True, 2)):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        calls[0] = 0
        model(x).square().sum().backward()
        assert calls[0] == runs * 3
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_drop_rates():
    model = build('xvit', drop_rate=.3, pos_drop_rate=.1, proj_drop_rate=.2, drop_path_rate=.4)
    for name in ('drop_path1', 'drop_path2', 'drop_path3'):
        rates = [getattr(getattr(block, name), 'drop_prob', 0.) for block in model.blocks]
        assert rates == pytest.approx([0., .2, .4])
    assert model.head_drop.p == .3 and model.pos_drop.p == .1
    assert {m.p for m in [*model.blocks.modules(), *model.cls_blocks.modules()] if isinstance(m, nn.Dropout)} == {.2}


def test_layer_decay(model):
    """The stem and positions learn slowest, then block by block, class attention, and the head at the full rate."""
    groups = param_groups_layer_decay(model, weight_decay=.05, layer_decay=.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: group['lr_scale'] for group in groups for p in group['params']}
    assert scale.keys() == set(names.values())
    order = ['patch_embed.0.conv.weight', *(f'blocks.{i}.norm1.weight' for i in range(3)), 'cls_blocks.0.norm1.weight',
             'cls_blocks.1.norm1.weight']
    scales = [scale[name] for name in order]
    assert scales == sorted(scales) and len(set(scales)) == len(scales)
    assert scale['pos_embed'] == scales[0] and scale['cls_token'] == scale['cls_blocks.0.mlp.fc1.bias']
    assert scale['head.weight'] == 1. and scale['norm.weight'] >= scales[-1]
    groups = group_parameters(model, model.group_matcher(coarse=True))
    assert sorted(n for g in groups.values() for n in g) == sorted(names.values())


def test_weight_decay(model):
    """None for biases, norms, scales, positions and the class token."""
    optimizer = create_optimizer_v2(model, opt='adamw', weight_decay=.05)
    by_id = {id(p): key for key, p in model.named_parameters()}
    exempt = {by_id[id(p)] for group in optimizer.param_groups if not group['weight_decay'] for p in group['params']}
    parts = ('norm', '.bn.', 'gamma', 'pos_embed', 'cls_token', 'bias')
    assert exempt == {key for key in by_id.values() if any(part in key for part in parts)}


# checkpoints

def test_checkpoints():
    """Learned positions are resized; class attention is left out where there is none, and missed where there is."""
    source, state = create('xvit'), create('xvit').state_dict()
    wide, pooled = create('xvit', seed=1, img_size=(96, 64)), create('xvit', seed=1, global_pool='avg')
    for target, size in ((wide, (96, 64)), (pooled, (48, 48))):
        target.load_state_dict(filtered(state, target))
        x = images(1, 3, *size)
        torch.testing.assert_close(target.forward_features(x), source.forward_features(x), **CLOSE)
    with pytest.raises(ValueError, match='incomplete: cls_token'):
        filtered(pooled.state_dict(), source)


@pytest.mark.parametrize(('kwargs', 'words'), [
    (dict(depth=2), ['another variant', '[3]', '[2]']),
    (dict(embed_dim=32), ['another variant', 'shape']),
    (dict(pos_embed='fourier'), ['incomplete', 'pos_fourier']),
    (dict(attn_dim=16), ['another variant', 'qkv']),
])
def test_checkpoints_of_other_variants(kwargs, words):
    with refused(*words):
        filtered(build('xvit').state_dict(), build('xvit', **kwargs))


def test_pretrained_with_other_channels_and_size(tmp_path):
    source = create('xvit')
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=5)
    model = build('xvit', pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=3, img_size=96)
    assert model.pos_embed.shape == (1, 6, 6, 16)
    torch.testing.assert_close(
        model.patch_embed[0].conv.weight, source.patch_embed[0].conv.weight.sum(dim=1, keepdim=True))
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


# other mechanisms, bad input

@pytest.mark.parametrize('attn_layer', ['softmax', 'linear', 'vicinity'])
def test_other_mechanisms(attn_layer: str):
    """In the blocks; class attention stays XNorm's."""
    model = build('xvit', attn_layer=attn_layer)
    assert not any(isinstance(m, XNormAttention) for m in model.modules())
    assert len([m for m in model.modules() if isinstance(m, XNormClassAttention)]) == 2
    assert model(images(1, 3, 48, 48)).shape == (1, 5)
    custom = build('xvit', attn_kwargs=dict(kv_axis='value', attn_dim=4))
    assert custom.blocks[0].attn.kv_axis == 'value' and custom.blocks[0].attn.attn_dim == 4


@pytest.mark.parametrize(('kwargs', 'words'), [
    (dict(patch_size=12), ['patch_size=12', 'power of two']),
    (dict(embed_dim=20), ['embed_dim=20', 'multiple of 8', 'patch_size=16']),
    (dict(embed_dim=0), ['embed_dim=0', 'positive']),
    (dict(class_depth=0), ['class_depth=0', 'positive']),
    (dict(num_heads=3), ['attn_dim=8', 'num_heads=3']),
    (dict(mlp_ratio=-1.), ['mlp_ratio=-1.0', 'positive']),
    (dict(mlp_ratio=.01), ['mlp_ratio=0.01', 'embed_dim=16']),
    (dict(global_pool='max'), ["global_pool 'max'", "'token', 'avg' or ''"]),
    (dict(pos_embed='rope'), ["pos_embed 'rope'", 'learn, fourier, none']),
    (dict(lpi_convs=3), ['lpi_convs=3', '1 or 2']),
    (dict(drop_path_rate=1.), ['drop_path_rate=1.0', '[0, 1)']),
    (dict(num_classes=-1), ['num_classes=-1']),
    (dict(img_size=(32, -1)), ['img_size=(32, -1)', 'positive']),
    (dict(attn_layer='nosuch'), ["attn_layer 'nosuch'", 'xnorm']),
])
def test_bad_arguments(kwargs, words):
    with refused(*words):
        build('xvit', **kwargs)


def test_bad_calls(model):
    with pytest.raises(ValueError, match="'NHW', expected 'NCHW', 'NHWC' or 'NLC'"):
        model.forward_intermediates(torch.zeros(1, 3, 48, 48), output_fmt='NHW')
    with pytest.raises(ValueError, match='img_size=-3'):
        model.set_input_size(-3)
    head = model.head
    for args in ((3, 'max'), (-1, 'avg'), (-1,)):
        with pytest.raises(ValueError, match=r"'max'|num_classes=-1"):
            model.reset_classifier(*args)
    assert model.head is head and model.global_pool == 'token' and model.num_classes == 5
    assert len(model.cls_blocks) == 2
    with pytest.raises(TypeError, match='window_size'):
        build('xvit', window_size=7)
