"""X-ViT: its parameter and operation counts, its parts by hand, any image size, and timm's contract for flat models."""
import copy
import logging
import math
from functools import lru_cache

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models import create_feature_extractor, group_parameters
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vitlinear  # noqa: F401
from vitlinear.layers import XNormAttention, XNormClassAttention
from vitlinear.ops import reference
from vitlinear.layers.xnorm_block import ClassBlock, FourierPosition, LocalPatchInteraction
from vitlinear.models import xvit, xvit_pyramid

FLAT = ['xvit_tiny', 'xvit_small', 'xvit_medium', 'xvit_base']
PYRAMIDS = ['xvit_pyramid_nano', 'xvit_pyramid_tiny', 'xvit_pyramid_small', 'xvit_pyramid_base']
# xvit_tiny, made small
SMALL = dict(img_size=48, embed_dim=16, depth=3, num_heads=2, attn_dim=8, init_values=1., num_classes=10)
CLOSE = dict(rtol=1e-4, atol=1e-5)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def create(seed: int = 0, **kwargs) -> nn.Module:
    """With weights large enough to make every part count, and batch norms that are not the identity."""
    torch.manual_seed(seed)
    model = timm.create_model('xvit_tiny', **{**SMALL, **kwargs})
    for name, p in model.named_parameters():
        if p.ndim == 1:
            scale = name.endswith('weight') or 'gamma' in name  # of norms, attention and layer scale
            nn.init.normal_(p, mean=1. if scale else 0., std=.1)
        else:
            nn.init.normal_(p, std=1. if name in ('pos_embed', 'cls_token') else p[0].numel() ** -.5)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=.1)
            nn.init.uniform_(m.running_var, .5, 2.)
    return model.eval()


@pytest.fixture(scope='module')
def model() -> nn.Module:
    """For tests that leave it as it is."""
    return create()


@lru_cache(maxsize=None)
def default(name: str) -> nn.Module:
    return timm.create_model(name, device='meta')


def numel(model: nn.Module, *but: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not any(b in name for b in but))


# counts

@pytest.mark.parametrize('name, total', [
    ('xvit_tiny', 10_217_744), ('xvit_small', 20_787_960), ('xvit_medium', 37_478_328), ('xvit_base', 63_985_864),
    ('xvit_pyramid_nano', 1_393_440), ('xvit_pyramid_tiny', 7_528_804), ('xvit_pyramid_small', 18_685_674),
    ('xvit_pyramid_base', 36_174_206)])
def test_parameters(name: str, total: int):
    model = copy.deepcopy(default(name))
    for classes in (1000, 0, 100):
        model.reset_classifier(classes)
        assert numel(model) == total + (classes - 1000) * (model.num_features + 1), classes


def test_nano_fits_into_5_mb():
    model = timm.create_model('xvit_pyramid_nano', num_classes=10, in_chans=1, device='meta')
    assert 1_000_000 < numel(model) <= 1_250_000


@pytest.mark.parametrize('name, xcit', [
    ('xvit_tiny', 'xcit_tiny_24_p16_224'), ('xvit_small', 'xcit_small_12_p16_224'),
    ('xvit_medium', 'xcit_small_24_p16_224')])
def test_skeleton(name: str, xcit: str):
    """As wide in attention as outside of it and with Fourier positions, it has XCiT's parameters, its scales apart."""
    model = timm.create_model(name, attn_dim=default(name).embed_dim, pos_embed='fourier', device='meta')
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


def count_macs(model: nn.Module, H: int, W: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, H, W, device='meta'))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize('name, size, gmacs', [
    ('xvit_tiny', 224, 1.90), ('xvit_small', 224, 3.74), ('xvit_medium', 224, 7.01), ('xvit_base', 224, 11.98),
    ('xvit_tiny', 384, 5.59), ('xvit_small', 384, 10.99)])
def test_operations(name: str, size: int, gmacs: float):
    """Within 1 % of the count that the recalled GFLOPs were compared with, some heads of which were wider."""
    expected = closed_form(default(name), size, size)
    assert expected / 1e9 == pytest.approx(gmacs, rel=.01)
    if name in ('xvit_tiny', 'xvit_small') and size == 224:
        assert count_macs(default(name), size, size) == expected


def test_operations_are_linear_in_pixels():
    for name in ('xvit_small', 'xvit_pyramid_small'):
        model = timm.create_model(name, num_classes=0, device='meta')
        a, b, c = (count_macs(model, n, 256) for n in (256, 512, 1024))
        assert c - b == 2 * (b - a)


def test_shapes():
    for name, heads in zip(FLAT, (4, 8, 8, 8)):
        model = default(name)
        attentions = [m for m in model.modules() if isinstance(m, (XNormAttention, XNormClassAttention))]
        assert {m.num_heads for m in attentions} == {heads} and len(model.cls_blocks) == 2
        assert len(attentions) == len(model.blocks) + 2
        values = {m.init_values for m in model.modules() if hasattr(m, 'init_values')}
        assert values == {1. if len(model.blocks) == 12 else 1e-5}
    for name in PYRAMIDS:
        for stage in default(name).stages:
            for block in stage.blocks:
                assert isinstance(block.attn, XNormAttention)
                assert block.attn.head_dim in (24, 32)
                ratio = block.attn.attn_dim / block.mlp.fc2.out_features
                assert ratio == (.75 if name == 'xvit_pyramid_nano' else .5)


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


def test_class_attention_leaves_the_map(model):
    x = model.forward_features(images(2, 3, 48, 32))
    before = x.detach().clone()
    token = model.cls_token.repeat(2, 1, 1)
    for block in model.cls_blocks:
        assert isinstance(block, ClassBlock)
        token = block(token, x.flatten(2).transpose(1, 2))
        assert token.shape == (2, 1, 16)
    assert torch.equal(x, before)


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
    assert create(lpi_convs=1)(images(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize('patch_size, convs', [(2, 1), (4, 2), (8, 3), (16, 4), (32, 5)])
def test_patch_size(patch_size: int, convs: int):
    model = create(patch_size=patch_size)
    assert [layer.conv.out_channels for layer in model.patch_embed] == [16 // 2 ** i for i in reversed(range(convs))]
    assert {info['reduction'] for info in model.feature_info} == {patch_size}
    maps = model.forward_intermediates(images(1, 3, 50, 33), intermediates_only=True)
    assert maps[0].shape[2:] == (math.ceil(50 / patch_size), math.ceil(33 / patch_size))


# positions

@pytest.mark.parametrize('pos_embed', ['learn', 'fourier', 'none'])
@pytest.mark.parametrize('size', [(48, 48), (64, 48), (33, 47), (1, 1), (1, 99), (224, 31)])
def test_any_size(pos_embed: str, size):
    model = create(pos_embed=pos_embed)
    x = images(2, 3, *size)
    grid = (math.ceil(size[0] / 16), math.ceil(size[1] / 16))
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert all(m.shape == (2, 16, *grid) for m in maps) and len(maps) == 3
    out = model(x)
    assert out.shape == (2, 10) and torch.isfinite(out).all()
    with torch.no_grad():
        torch.testing.assert_close(model(x), out.detach(), rtol=1e-3, atol=1e-4)
    for i in range(2):
        torch.testing.assert_close(model(x[i:i + 1]), out[i:i + 1], rtol=1e-3, atol=1e-4)
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_without_positions_only_convolutions_see_where():
    """A constant shift of content and of padding: with 'none' nothing else changes, with the others all does."""
    x = torch.zeros(1, 3, 208, 208)
    x[:, :, 96:112, 96:112] = images(1, 3, 16, 16)
    moved = x.roll((-32, 32), (2, 3))
    for pos_embed, same in (('none', True), ('learn', False), ('fourier', False)):
        model = create(pos_embed=pos_embed, depth=1)
        with torch.no_grad():
            a, b = (model.patch_embed(u) for u in (x, moved))
            a, b = (m[0, :, i:i + 3, j:j + 3] for m, i, j in ((a, 5, 5), (b, 3, 7)))
            assert torch.allclose(a, b, atol=1e-6)
            a, b = (model._embed(u) for u in (x, moved))
            assert torch.allclose(a[0, 5:8, 5:8], b[0, 3:6, 7:10], atol=1e-4) == same


def test_resized_positions_keep_their_place():
    """A ramp over the rows stays one at any size, and the given size is taken as it is."""
    model = create(img_size=(64, 48))
    assert model.pos_embed.shape == (1, 4, 3, 16)
    with torch.no_grad():
        model.pos_embed.copy_(torch.arange(4.).reshape(1, 4, 1, 1).expand_as(model.pos_embed))
    for layer in model.patch_embed:
        nn.init.zeros_(layer.bn.weight)
        nn.init.zeros_(layer.bn.bias)
    assert torch.equal(model._embed(torch.zeros(1, 3, 64, 48)), model.pos_embed)
    for H, W in ((128, 48), (32, 100), (64, 64)):
        out = model._embed(torch.zeros(1, 3, H, W))[0, :, :, 0]
        assert (out - out[:, :1]).abs().max() < 1e-5 and (out[1:] > out[:-1]).all()
        assert out.mean().item() == pytest.approx(1.5, abs=1e-4)


@pytest.mark.parametrize('size', [96, (96, 32), (40, 70)])
def test_set_input_size(size):
    """The resized positions become the model's own: the same output at that size, without resizing any more."""
    model = create()
    model.pos_embed.requires_grad_(False)
    H, W = (size, size) if isinstance(size, int) else size
    x = images(1, 3, H, W)
    expected = model(x)
    model.set_input_size(size)
    assert model.pos_embed.shape[1:3] == (math.ceil(H / 16), math.ceil(W / 16)) and model.img_size == (H, W)
    assert not model.pos_embed.requires_grad
    torch.testing.assert_close(model(x), expected, **CLOSE)
    created = create(img_size=(H, W))
    assert created.pos_embed.shape == model.pos_embed.shape
    model.load_state_dict(created.state_dict())
    fourier = create(pos_embed='fourier')
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
    other.reset_classifier(10, 'avg')
    assert other.cls_token is None and len(other.cls_blocks) == 0 and other.global_pool == 'avg'
    torch.testing.assert_close(
        other.forward_head(features, pre_logits=True), model.norm(features.mean(dim=(2, 3))), **CLOSE)
    other(x).sum().backward()
    assert all(p.grad is not None for p in other.parameters())
    other.reset_classifier(0, '')
    torch.testing.assert_close(other(x), model.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), **CLOSE)
    other.reset_classifier(7)  # classes by position
    assert other.global_pool == '' and other(x).shape == (2, 7, 3, 2)

    created = create(global_pool='avg')
    assert 'cls_token' not in created.state_dict() and created(x).shape == (2, 10)
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
    created = create(num_classes=0)
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
    model = create().train()
    x = images(2, 3, 40, 50)
    expected = create().train().forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1], prune_norm, prune_head) == [0, 1]
    assert len(model.blocks) == 2 and isinstance(model.norm, nn.Identity) == prune_norm
    assert (model.cls_token is None) == (model.num_classes == 0) == (model.global_pool == '') == prune_head
    for a, b in zip(model.forward_intermediates(x, intermediates_only=True), expected, strict=True):
        assert torch.equal(a, b)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_features_only():
    features = timm.create_model('xvit_tiny', features_only=True, **{**SMALL, 'num_classes': 0}).eval()
    assert features.feature_info.channels() == [16] * 3 and features.feature_info.reduction() == [16] * 3
    model = timm.create_model('xvit_tiny', **SMALL).eval()
    features.load_state_dict({
        f'model.{k}': v for k, v in model.state_dict().items() if not k.startswith(('cls_', 'head.', 'norm.'))})
    x = images(1, 3, 40, 50)
    for a, b in zip(features(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.equal(a, b) and a.shape == (1, 16, 3, 4)
    taps = timm.create_model('xvit_small', features_only=True, out_indices=(3, 5, 7, 11), device='meta')
    assert [m.shape for m in taps(torch.empty(1, 3, 64, 96, device='meta'))] == [(1, 384, 4, 6)] * 4


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
    model = timm.create_model('xvit_tiny', **{
        **SMALL, 'drop_rate': .3, 'pos_drop_rate': .1, 'proj_drop_rate': .2, 'drop_path_rate': .4})
    for name in ('drop_path1', 'drop_path2', 'drop_path3'):
        rates = [getattr(getattr(block, name), 'drop_prob', 0.) for block in model.blocks]
        assert rates == pytest.approx([0., .2, .4])
    assert model.head_drop.p == .3 and model.pos_drop.p == .1
    assert {m.p for m in [*model.blocks.modules(), *model.cls_blocks.modules()] if isinstance(m, nn.Dropout)} == {.2}
    x = images(2, 3, 48, 48)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


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


@pytest.mark.parametrize('name', ['xvit_tiny', 'xvit_pyramid_nano'])
def test_weight_decay(name: str):
    """None for biases, norms, scales, positions and the class token."""
    model = timm.create_model(name)
    optimizer = create_optimizer_v2(model, opt='adamw', weight_decay=.05)
    by_id = {id(p): key for key, p in model.named_parameters()}
    exempt = {by_id[id(p)] for group in optimizer.param_groups if not group['weight_decay'] for p in group['params']}
    for key in by_id.values():
        scale = any(part in key for part in ('norm', '.bn.', 'gamma', 'pos_embed', 'cls_token'))
        assert (key in exempt) == (scale or key.endswith('bias')), key


def test_learns():
    torch.manual_seed(0)
    model = timm.create_model('xvit_tiny', **{**SMALL, 'num_classes': 4}).train()
    x, y = images(4, 3, 48, 48), torch.arange(4)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=4e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .5 * losses[0], losses


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype):
    model, x = create(), images(2, 3, 64, 64)
    expected = model(x).detach()
    with torch.autocast('cpu', dtype=dtype):
        mixed = model(x)
    mixed.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    half = model.to(dtype)(x.to(dtype))
    size = expected.abs().max()
    for out in (mixed, half):
        assert out.dtype == dtype and (out.float() - expected).abs().max() < (
            .1 if dtype == torch.bfloat16 else .02) * size


def test_black_images():
    """Of biases and positions alone, with everything finite."""
    model = create(pos_embed='none').train()
    out = model(torch.zeros(2, 3, 48, 48))
    out.sum().backward()
    assert torch.isfinite(out).all() and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize('how', ['created', 'after to_empty'])
@pytest.mark.parametrize('pos_embed', ['learn', 'fourier'])
def test_initialisation(how: str, pos_embed: str):
    torch.manual_seed(0)
    kwargs = {**SMALL, 'embed_dim': 64, 'pos_embed': pos_embed, 'init_values': 1e-5}
    if how == 'created':
        model = timm.create_model('xvit_tiny', **kwargs)
    else:
        model = timm.create_model('xvit_tiny', device='meta', **kwargs).to_empty(device='cpu')
        for t in [*model.parameters(), *model.buffers()]:
            t.data.fill_(math.nan if t.is_floating_point() else 7)
        model.init_weights(needs_reset=True)
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        owner, _, kind = name.rpartition('.')
        if kind == 'bias':
            assert p.eq(0).all(), name
        elif kind == 'gamma':
            assert p.eq(1e-5).all(), name
        elif kind in ('gamma_q', 'gamma_kv') or p.ndim == 1:
            assert p.eq(1).all(), name
        else:
            module = modules[owner]
            std = .02
            if isinstance(module, nn.Conv2d):
                std = math.sqrt(2 / (9 * module.out_channels / module.groups))
            assert abs(p.mean().item()) < 5 * std / p.numel() ** .5, name
            assert abs(p.std().item() - std) < 5 * std / (2 * p.numel()) ** .5, name
    for name, b in model.named_buffers():
        assert b.eq(1 if name.endswith('running_var') else 0).all(), name


# checkpoints

def test_checkpoints(caplog):
    source = create()
    state = {'state_dict': {f'module.{k}': v for k, v in source.state_dict().items()}}
    target = create(seed=1)
    target.load_state_dict(xvit.checkpoint_filter_fn(state, target))
    x = images(1, 3, 48, 48)
    assert torch.equal(target(x), source(x))
    assert list(xvit.checkpoint_filter_fn(source.state_dict(), target)) == list(source.state_dict())

    wide = create(seed=1, img_size=(96, 64))  # positions are resized
    wide.load_state_dict(xvit.checkpoint_filter_fn(source.state_dict(), wide))
    x = images(1, 3, 96, 64)
    torch.testing.assert_close(wide(x), source(x), **CLOSE)

    pooled = create(seed=1, global_pool='avg')  # class attention is left out
    pooled.load_state_dict(xvit.checkpoint_filter_fn(source.state_dict(), pooled))
    assert torch.equal(pooled.forward_features(x), source.forward_features(x))
    with pytest.raises(ValueError, match='incomplete: cls_token'):
        xvit.checkpoint_filter_fn(pooled.state_dict(), source)

    with caplog.at_level(logging.WARNING):
        other = create(seed=1, num_classes=4)
        other.load_state_dict(xvit.checkpoint_filter_fn(source.state_dict(), other))
    assert '10 classes' in caplog.text and torch.equal(other.forward_features(x), source.forward_features(x))


@pytest.mark.parametrize('kwargs, words', [
    (dict(depth=2), ['another variant', '[3]', '[2]']),
    (dict(embed_dim=32), ['another variant', 'shape']),
    (dict(pos_embed='fourier'), ['incomplete', 'pos_fourier']),
    (dict(attn_dim=16), ['another variant', 'qkv']),
])
def test_checkpoints_of_other_variants(kwargs, words):
    with pytest.raises(ValueError) as e:
        xvit.checkpoint_filter_fn(create().state_dict(), timm.create_model('xvit_tiny', **{**SMALL, **kwargs}))
    assert all(word in str(e.value) for word in words), e.value


def test_checkpoints_of_other_families():
    flat, pyramid = create(), timm.create_model('xvit_pyramid_nano')
    with pytest.raises(ValueError, match='holds no XNormVisionTransformer weights'):
        xvit.checkpoint_filter_fn(pyramid.state_dict(), flat)
    with pytest.raises(ValueError, match='holds no XNormPyramid weights'):
        xvit_pyramid.checkpoint_filter_fn(flat.state_dict(), pyramid)
    assert xvit_pyramid.checkpoint_filter_fn(pyramid.state_dict(), pyramid).keys() == pyramid.state_dict().keys()


def test_pretrained_with_other_channels_and_size(tmp_path):
    source = create()
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    model = timm.create_model(
        'xvit_tiny', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth'), num_classes=10),
        **{**SMALL, 'in_chans': 1, 'num_classes': 5, 'img_size': 96})
    assert model.pos_embed.shape == (1, 6, 6, 16)
    torch.testing.assert_close(
        model.patch_embed[0].conv.weight, source.patch_embed[0].conv.weight.sum(dim=1, keepdim=True))
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


# export and compilation

def test_torchscript():
    for kwargs in (dict(), dict(pos_embed='fourier', global_pool='avg', lpi_convs=1)):
        model = create(**kwargs)
        scripted = torch.jit.script(model)
        for shape in ((2, 3, 48, 48), (1, 3, 40, 70)):
            torch.testing.assert_close(scripted(images(*shape)), model(images(*shape)), **CLOSE)


def test_feature_extractor(model):
    extractor = create_feature_extractor(model, {'blocks.1': 'a', 'head': 'b'})
    for shape in ((2, 3, 48, 48), (1, 3, 40, 70)):
        out = extractor(images(*shape))
        maps = model.forward_intermediates(images(*shape), intermediates_only=True, output_fmt='NHWC')
        torch.testing.assert_close(out['a'], maps[1], **CLOSE)
        torch.testing.assert_close(out['b'], model(images(*shape)), **CLOSE)


def test_export_with_free_sizes():
    model = create(depth=1)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(model, (images(2, 3, 48, 80),), dynamic_shapes=(dynamic,)).module()
    for shape in ((2, 3, 48, 80), (3, 3, 96, 64), (4, 3, 41, 50)):
        torch.testing.assert_close(exported(images(*shape)), model(images(*shape)), **CLOSE)


@pytest.mark.parametrize('backend, train', [('eager', False), ('aot_eager', True)])
def test_compile(backend: str, train: bool):
    torch._dynamo.reset()
    model = create(depth=1).train(train)
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    x = images(2, 3, 64, 48)
    out, expected = compiled(x), model(x)
    torch.testing.assert_close(out, expected, **CLOSE)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(compiled.parameters(), model.parameters()):
        size = b.grad.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(a.grad / size, b.grad / size, rtol=1e-3, atol=1e-4)


# other mechanisms, bad input

@pytest.mark.parametrize('attn_layer', ['softmax', 'linear', 'vicinity'])
def test_other_mechanisms(attn_layer: str):
    """In the blocks; class attention stays XNorm's."""
    model = timm.create_model('xvit_tiny', attn_layer=attn_layer, **SMALL)
    assert not any(isinstance(m, XNormAttention) for m in model.modules())
    assert len([m for m in model.modules() if isinstance(m, XNormClassAttention)]) == 2
    assert model(images(1, 3, 48, 48)).shape == (1, 10)
    custom = timm.create_model('xvit_tiny', attn_kwargs=dict(kv_axis='value', attn_dim=4), **SMALL)
    assert custom.blocks[0].attn.kv_axis == 'value' and custom.blocks[0].attn.attn_dim == 4


@pytest.mark.parametrize('kwargs, words', [
    (dict(patch_size=12), ['patch_size=12', 'power of two']),
    (dict(patch_size=1), ['patch_size=1', 'power of two from 2']),
    (dict(embed_dim=20), ['embed_dim=20', 'multiple of 8', 'patch_size=16']),
    (dict(embed_dim=0), ['embed_dim=0', 'positive']),
    (dict(depth=0), ['depth=0', 'positive']),
    (dict(class_depth=0), ['class_depth=0', 'positive']),
    (dict(num_heads=3), ['attn_dim=8', 'num_heads=3']),
    (dict(num_heads=0), ['num_heads=0', 'positive']),
    (dict(mlp_ratio=-1.), ['mlp_ratio=-1.0', 'positive']),
    (dict(mlp_ratio=.01), ['mlp_ratio=0.01', 'embed_dim=16']),
    (dict(global_pool='max'), ["global_pool 'max'", "'token', 'avg' or ''"]),
    (dict(pos_embed='rope'), ["pos_embed 'rope'", 'learn, fourier, none']),
    (dict(lpi_convs=3), ['lpi_convs=3', '1 or 2']),
    (dict(drop_path_rate=1.), ['drop_path_rate=1.0', '[0, 1)']),
    (dict(num_classes=-1), ['num_classes=-1']),
    (dict(in_chans=0), ['in_chans=0', 'positive']),
    (dict(img_size=0), ['img_size=0', 'positive']),
    (dict(img_size=(32, -1)), ['img_size=(32, -1)', 'positive']),
    (dict(attn_layer='nosuch'), ["attn_layer 'nosuch'", 'xnorm']),
])
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError) as e:
        timm.create_model('xvit_tiny', **{**SMALL, **kwargs})
    assert all(word in str(e.value) for word in words), e.value


def test_bad_calls(model):
    for shape, word in (((2, 1, 48, 48), 'in_chans'), ((2, 3, 0, 48), 'one pixel'), ((3, 48, 48), 'B, 3, H, W')):
        with pytest.raises(ValueError, match=word):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="'NHW', expected 'NCHW', 'NHWC' or 'NLC'"):
        model.forward_intermediates(torch.zeros(1, 3, 48, 48), output_fmt='NHW')
    with pytest.raises(ValueError, match='img_size=-3'):
        model.set_input_size(-3)
    head = model.head
    for args in ((3, 'max'), (-1, 'avg'), (-1,)):
        with pytest.raises(ValueError, match="'max'|num_classes=-1"):
            model.reset_classifier(*args)
    assert model.head is head and model.global_pool == 'token' and model.num_classes == 10
    assert len(model.cls_blocks) == 2
    with pytest.raises(TypeError, match='window_size'):
        timm.create_model('xvit_tiny', window_size=7, **SMALL)
