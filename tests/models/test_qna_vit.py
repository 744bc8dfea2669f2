"""QnA-ViT's parameter and operation counts, structure, initialisation, sizes and arguments."""
import copy
import math

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vitlinear  # noqa: F401
from _golden import qna_state_shapes
from _qna import SMALL, VARIANTS, default, images, randomize
from vitlinear.layers import ATTENTION_LAYERS, QnAAttention, WindowAttention
from vitlinear.layers.qna_block import SamePatchEmbed
from vitlinear.models.qna_vit import QnAVisionTransformer, checkpoint_filter_fn
from vitlinear.ops.primitives.window_softmax import cut_map


@pytest.mark.parametrize('patch_size, stride', [(4, 4), (3, 1), (3, 2), (7, 4), (2, 2), (5, 3)])
def test_stem_padding(patch_size: int, stride: int):
    """Every pixel is seen and every output has one at least, with the odd row of zeros at the end."""
    stem = SamePatchEmbed(1, 1, patch_size, stride)
    nn.init.ones_(stem.proj.weight)
    for n in range(1, 14):
        total = max(0, (math.ceil(n / stride) - 1) * stride + patch_size - n)
        seen = [sum(0 <= i * stride - total // 2 + j < n for j in range(patch_size)) for i in range(-(-n // stride))]
        out = stem(torch.ones(1, 1, n, n))[0, 0]
        assert out.shape == (len(seen), len(seen)) and min(seen) > 0
        assert torch.equal(out, torch.outer(torch.tensor(seen), torch.tensor(seen)).float())


@pytest.fixture(scope='module', params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.mark.parametrize('name, total, backbone, classes_100, tensors', [
    ('qna_vit_tiny', 15_715_560, 15_202_560, 15_253_860, 214),
    ('qna_vit_tiny_7x7', 15_753_960, 15_240_960, 15_292_260, 214),
    ('qna_vit_small', 24_971_560, 24_458_560, 24_509_860, 358),
    ('qna_vit_base', 55_670_008, 54_901_008, 54_977_908, 358),
])
def test_parameters(name: str, total: int, backbone: int, classes_100: int, tensors: int):
    model = copy.deepcopy(default(name))
    assert not list(model.buffers()) and len(list(model.parameters())) == tensors
    for classes, expected in ((1000, total), (0, backbone), (100, classes_100)):
        model.reset_classifier(classes)
        assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize('how', ['img_size', 'set_input_size'])
def test_parameters_at_384(how: str):
    """With tables for windows of 24 and 12 positions a side."""
    if how == 'img_size':
        model = timm.create_model('qna_vit_base', device='meta', img_size=384)
    else:
        model = copy.deepcopy(default('qna_vit_base'))
        model.set_input_size(384)
    assert sum(p.numel() for p in model.parameters()) == 55_900_408


# operations

def count_macs(model: nn.Module, H: int, W: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, model.in_chans, H, W, device='meta'))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def closed_form(model: nn.Module, H: int, W: int) -> int:
    """Multiply-accumulates from shapes, for windows that divide the maps."""
    def qna(attn: QnAAttention, N: int, M: int) -> int:
        L, heads, k = attn.num_queries, attn.num_heads, attn.kernel_size
        dim, out = attn.v.in_features, attn.v.out_features
        fold = L * out * dim
        return fold + N * dim * (out + L * heads) + M * k * k * L * (out + heads) + M * out * out

    stem = model.patch_embed.proj
    H, W = (math.ceil(n / model.patch_embed.stride) for n in (H, W))
    total = H * W * stem.weight.numel()
    for i, stage in enumerate(model.stages):
        if i > 0:
            N = H * W
            H, W = math.ceil(H / 2), math.ceil(W / 2)
            down, M = stage.downsample, H * W
            total += M * (down.skip.weight.numel() + 2 * down.mlp.fc1.weight.numel()) + qna(down.attn, N, M)
        N = H * W
        for block in stage.blocks:
            total += 2 * N * block.mlp.fc1.weight.numel()
            if isinstance(block.attn, WindowAttention):
                C, (h, w) = block.attn.proj.in_features, block.attn.window_size
                total += 4 * N * C * C + 2 * N * min(h, H) * min(w, W) * C
            else:
                total += qna(block.attn, N, N)
    return total + model.head.weight.numel()


@pytest.mark.parametrize('name, size, gmacs', [
    ('qna_vit_tiny', 224, 2.428), ('qna_vit_tiny_7x7', 224, 2.516), ('qna_vit_small', 224, 4.351),
    ('qna_vit_base', 224, 9.515), ('qna_vit_base', 384, 30.0)])
def test_operations(name: str, size: int, gmacs: float):
    """The count of the formula is within 1 % of that for the authors' steps; 2.5, 2.6, 4.4 and 9.7 G are published."""
    model = default(name) if size == 224 else timm.create_model(name, device='meta', img_size=size)
    expected = closed_form(model, size, size)
    assert expected / 1e9 == pytest.approx(gmacs, rel=.01)
    if name != 'qna_vit_small':  # the deep ones take a second each
        assert count_macs(model, size, size) == expected


def test_operations_with_several_windows():
    """Twice the side has four times the operations at a fixed window size, the folding of the weights apart."""
    model = timm.create_model('qna_vit_nano', device='meta', num_classes=0)
    model.head = nn.Linear(160, 0, bias=False, device='meta')
    counts = [count_macs(model, n, n) for n in (64, 128)]
    assert counts == [closed_form(model, n, n) for n in (64, 128)]
    fold = sum(
        m.num_queries * m.v.weight.numel() for m in model.modules() if isinstance(m, QnAAttention))
    assert counts[1] - fold == 4 * (counts[0] - fold)


# stochastic depth, norms, initialisation, training

@pytest.mark.parametrize('name, rate, T', [
    ('qna_vit_tiny', .05, 16), ('qna_vit_base', .5, 28), ('qna_vit_nano', .3, 12)])
def test_drop_path_schedule(name: str, rate: float, T: int):
    """Linear in execution order, where a downsampling block drops its MLP branch and never its attention."""
    model = timm.create_model(name, device='meta', drop_path_rate=rate)
    rates, branches = [], 0
    for i, stage in enumerate(model.stages):
        if i > 0:
            rates.append(getattr(stage.downsample.drop_path2, 'drop_prob', 0.))
            branches += rates[-1] > 0
        for block in stage.blocks:
            rates.append(getattr(block.drop_path2, 'drop_prob', 0.))
            assert getattr(block.drop_path1, 'drop_prob', 0.) == rates[-1]
            branches += 2 * (rates[-1] > 0)
    assert len(rates) == T
    assert rates == pytest.approx([rate * i / (T - 1) for i in range(T)], abs=1e-7)
    # no other module drops
    assert sum(isinstance(m, timm.layers.DropPath) for m in model.modules()) == branches == 2 * (T - 1) - 3


def test_downsampling_attention_is_never_dropped():
    model = randomize(QnAVisionTransformer(**SMALL, drop_path_rate=.5, num_classes=5)).train()
    down = model.stages[1].downsample
    down.drop_path2 = timm.layers.DropPath(1., scale_by_keep=False)
    x = images(2, 8, 6, 5)
    y = down.attn(down.norm1(x.permute(0, 2, 3, 1)))
    expected = down.skip(x) + y.permute(0, 3, 1, 2)
    torch.testing.assert_close(down(x), expected)
    assert y.abs().max() > .1


def test_structure(variant: str):
    model, cfg = default(variant), qna_state_shapes()[variant]['config']
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.approximate for m in model.modules() if isinstance(m, nn.GELU)} == {'tanh'}
    for i, stage in enumerate(model.stages):
        kinds = [type(block.attn) for block in stage.blocks]
        assert kinds == [WindowAttention] * cfg['lsa_layers'][i] + [QnAAttention] * cfg['qna_layers'][i]
        for block in stage.blocks:
            assert block.attn.proj.bias is None
            if isinstance(block.attn, WindowAttention):
                assert block.attn.num_heads == cfg['lsa_heads'][i] and block.attn.qkv.bias is None
                assert block.attn.window_size == (cfg['lsa_window'][i],) * 2
        if i > 0:
            attn = stage.downsample.attn
            assert (attn.num_heads, attn.kernel_size, attn.stride) == (
                cfg['qna_heads'][i], cfg['qna_receptive_field'][i - 1], 2)
    assert {m.num_queries for m in model.modules() if isinstance(m, QnAAttention)} == {2}
    assert isinstance(model.norm, nn.LayerNorm) and model.patch_embed.proj.bias is None


def check_initialisation(model: nn.Module) -> None:
    """Mean and standard deviation of every weight within 5 standard errors."""
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        owner, _, kind = name.rpartition('.')
        module, n = modules[owner], p.numel()
        if kind in ('bias', 'rel_pos_bias', 'relative_position_bias_table'):
            assert p.eq(0).all(), name
        elif isinstance(module, nn.LayerNorm):
            assert p.eq(1).all(), name
        else:
            std = module.attn_scale_std if kind == 'attn_scale' else p[0].numel() ** -.5
            if kind == 'query':  # a standard normal cut at two, over the root of the head dimension
                std = .87962566 * module.head_dim ** -.5
            assert abs(p.mean().item()) < 5 * std / math.sqrt(n), name
            assert abs(p.std().item() - std) < 5 * std / math.sqrt(2 * n), name
            if kind == 'weight':  # cut at two as well
                assert p.abs().max() <= 2 * std / .87962566 * (1 + 1e-5), name


@pytest.mark.parametrize('how', ['created', 'after to_empty'])
def test_initialisation(how: str):
    torch.manual_seed(0)
    if how == 'created':
        model = timm.create_model('qna_vit_nano')
    else:
        model = timm.create_model('qna_vit_nano', device='meta').to_empty(device='cpu')
        for p in model.parameters():
            nn.init.constant_(p.data, math.nan)
        model.init_weights(needs_reset=True)
    check_initialisation(model)
    head = copy.deepcopy(model)
    head.reset_classifier(300)
    check_initialisation(head)


def test_new_branches_say_next_to_nothing():
    """About 0.011 standard deviations for unit input, in place of a layer scale."""
    torch.manual_seed(0)
    model = timm.create_model('qna_vit_tiny', depths=(1, 1, 1, 1), window_depths=(0, 0, 0, 0))
    for stage, channels in zip(model.stages, (64, 128, 256, 512)):
        branch = stage.blocks[0].attn(images(1, 14, 14, channels))
        assert branch.std().item() == pytest.approx(.011, rel=.35)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_initialisation_in_half_precision(dtype: torch.dtype):
    """Quantiles taken in half precision would throw some weights to the bounds of the truncation."""
    torch.manual_seed(0)
    for name, module in timm.create_model('qna_vit_nano', dtype=dtype).named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            weight = module.weight.detach().float()
            std = weight[0].numel() ** -.5
            assert weight.std().item() == pytest.approx(std, rel=.15), name
            assert (weight.abs() > 2.25 * std).float().mean() < .01, name


def test_no_weight_decay():
    """Of what the authors exempt; timm adds biases and norms."""
    model = timm.create_model('qna_vit_nano', device='meta')
    names = model.no_weight_decay()
    kinds = ('rel_pos_bias', 'attn_scale', 'relative_position_bias_table')
    assert names == {n for n, _ in model.named_parameters() if n.endswith(kinds)} and len(names) == 2 * 10 + 2
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=.05)
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] > 0 for p in group['params']}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim > 1 and name not in names), name


# image sizes

def test_set_input_size():
    """The same as a model made for that size, and as one into which the weights are loaded."""
    source = randomize(timm.create_model('qna_vit_nano', num_classes=5))
    state = {k: v.clone() for k, v in source.state_dict().items()}
    for size in (48, (64, 40)):
        made = timm.create_model('qna_vit_nano', num_classes=5, img_size=size).eval()
        made.load_state_dict(checkpoint_filter_fn(state, made))
        changed = copy.deepcopy(source)
        changed.set_input_size(size)
        H, W = (size, size) if isinstance(size, int) else size
        assert changed.stages[2].blocks[0].attn.window_size == (H // 8, W // 8)
        assert changed.stages[3].blocks[0].attn.window_size == (H // 16, math.ceil(W / 16))
        assert changed.state_dict().keys() == made.state_dict().keys()
        for k, v in made.state_dict().items():
            assert torch.equal(changed.state_dict()[k], v), k
            assert torch.equal(v, state[k]) == (not k.endswith('relative_position_bias_table')), k
        x = images(1, 3, H, W)
        assert torch.equal(changed(x), made(x)) and not torch.equal(changed(x), source(x))
    with pytest.raises(ValueError, match='img_size=0'):
        source.set_input_size(0)


def test_windows_cover_larger_maps():
    """At another size the same weights run: a map no larger than the window is one, a larger one is cut."""
    model = randomize(timm.create_model('qna_vit_nano', num_classes=5))
    attn = model.stages[2].blocks[0].attn
    assert attn.window_size == (8, 8)
    for size, map_size, window in (
            ((64, 64), (8, 8), (8, 8)), ((20, 30), (3, 4), (3, 4)), ((128, 64), (16, 8), (8, 8))):
        x = images(1, *map_size, attn.qkv.in_features)
        parts, columns, *sides = cut_map(x, attn.window_size)
        assert [tuple(part.shape[1:3]) for part in parts] == [map_size] and columns == 1 and tuple(sides) == window
        assert model.forward_features(images(1, 3, *size)).shape[2:] == (-(-size[0] // 16), -(-size[1] // 16))


# construction

@pytest.mark.parametrize('kwargs, words', [
    (dict(window_depths=(0, 0, 0)), ['window_depths=(0, 0, 0)', 'one entry per stage']),
    (dict(window_depths=(0, 0, 9, 1)), ['window_depths=(0, 0, 9, 1)', 'depths=(2, 3, 3, 1)']),
    (dict(window_depths=(0, -1, 0, 1)), ['window_depths=(0, -1, 0, 1)']),
    (dict(window_heads=(1, 2, 3, 5)), ['128', 'num_heads=3']),
    (dict(window_heads=0), ['window_heads=(0, 0, 0, 0)', 'positive']),
    (dict(num_heads=(4, 8, 16)), ['num_heads=(4, 8, 16)', 'one entry per stage']),
    (dict(num_heads=7), ['32', 'num_heads=7']),
    (dict(kernel_size=2), ['kernel_size=2', 'odd']),
    (dict(kernel_size=(3, 3, 3)), ['kernel_size=(3, 3, 3)', 'one entry per stage']),
    (dict(num_queries=0), ['num_queries=0', 'positive']),
    (dict(img_size=0), ['img_size=0', 'positive']),
    (dict(img_size=(32, -1)), ['img_size=(32, -1)', 'positive']),
    (dict(patch_size=1), ['patch_size=1', 'patch_stride=2']),
    (dict(patch_stride=0), ['patch_stride=0', 'positive']),
    (dict(attn_layer='nosuch'), ["attn_layer 'nosuch'", 'qna', 'window']),
    (dict(depths=(2, 3, 0, 1)), ['depths=(2, 3, 0, 1)', 'positive']),
    (dict(embed_dims=(32, 64, 128)), ['embed_dims=(32, 64, 128)', 'one entry per stage']),
    (dict(mlp_ratios=-1.), ['mlp_ratios=(-1.0, -1.0, -1.0, -1.0)', 'positive']),
    (dict(drop_path_rate=1.), ['drop_path_rate=1.0']),
    (dict(global_pool='max'), ["global_pool 'max'"]),
    (dict(num_classes=-1), ['num_classes=-1']),
    (dict(in_chans=0), ['in_chans=0']),
])
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError) as e:
        timm.create_model('qna_vit_nano', device='meta', **kwargs)
    assert all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize('kwargs', [
    dict(img_sizes=32), dict(qkv_bias=True), dict(window_size=7), dict(attn_kwargs=dict(temperature=1.))])
def test_unknown_arguments(kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs.get('attn_kwargs', kwargs)))):
        timm.create_model('qna_vit_nano', device='meta', **kwargs)


def test_arguments_of_the_mechanism():
    """`num_queries` and `kernel_size` are those of the model unless `attn_kwargs` say otherwise."""
    model = timm.create_model('qna_vit_nano', device='meta', num_queries=3, kernel_size=(3, 5, 7, 3))
    assert {m.num_queries for m in model.modules() if isinstance(m, QnAAttention)} == {3}
    sizes = [[b.attn.kernel_size for b in s.blocks if isinstance(b.attn, QnAAttention)] for s in model.stages]
    assert sizes == [[3, 3], [5, 5, 5], [7, 7], []]
    assert [s.downsample.attn.kernel_size for s in list(model.stages)[1:]] == [3, 5, 7]
    model = timm.create_model('qna_vit_nano', device='meta', attn_kwargs=dict(kernel_size=9, num_queries=1))
    assert {b.attn.kernel_size for b in model.stages[1].blocks} == {9}
    assert {b.attn.num_queries for b in model.stages[1].blocks} == {1}
    assert model.stages[1].downsample.attn.num_queries == 2


@pytest.mark.parametrize('attn_layer', sorted(ATTENTION_LAYERS))
def test_other_mechanisms(attn_layer: str):
    """In place of learned queries at stride 1; windowed and downsampling blocks stay."""
    torch.manual_seed(0)
    model = timm.create_model('qna_vit_nano', num_classes=5, attn_layer=attn_layer)
    kinds = [type(b.attn) for b in model.stages[1].blocks]
    assert kinds == [ATTENTION_LAYERS[attn_layer]] * 3
    assert type(model.stages[2].blocks[0].attn) is WindowAttention
    assert type(model.stages[1].downsample.attn) is QnAAttention
    randomize(model)
    out = model(images(2, 3, 40, 28))
    out.square().sum().backward()
    assert out.shape == (2, 5) and torch.isfinite(out).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(images(2, 3, 40, 28)), out.detach(), rtol=1e-3, atol=1e-4)


def test_inference_follows_training():
    """A step, then inference, then a step: neither sees old weights."""
    torch.manual_seed(0)
    model, x = randomize(timm.create_model('qna_vit_nano', num_classes=5)), images(2, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    seen = []
    for _ in range(3):
        with torch.no_grad():
            seen.append(model(x))
        torch.testing.assert_close(seen[-1], model(x).detach(), rtol=1e-4, atol=1e-4)
        model(x).square().mean().backward()  # in eval mode, as a head is tuned
        optimizer.step()
    assert (seen[0] - seen[1]).abs().max() > 1e-3 and (seen[1] - seen[2]).abs().max() > 1e-3
    names = set(model.state_dict())
    assert names == set(dict(model.named_parameters()))


def test_nano():
    model = timm.create_model('qna_vit_nano')
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 2_000_000
    _, maps = model.forward_intermediates(images(1, 3, 32, 32))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 16, 16), (64, 8, 8), (128, 4, 4), (160, 2, 2)]
    assert [f['reduction'] for f in model.feature_info] == [2, 4, 8, 16]


def test_documented_defaults(variant: str):
    cfg = default(variant).pretrained_cfg
    assert cfg['num_classes'] == 1000 and cfg['input_size'] == (3, 224, 224) and cfg['crop_pct'] == .875
    assert cfg['mean'] == (0.485, 0.456, 0.406) and cfg['std'] == (0.229, 0.224, 0.225)
    assert cfg['interpolation'] == 'bicubic' and cfg['license'] == 'mit' and not cfg['fixed_input_size']
    assert cfg['first_conv'] == 'patch_embed.proj' and cfg['classifier'] == 'head'
