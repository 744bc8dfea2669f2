"""QnA-ViT against numbers from the authors' code, its parameter and operation counts, its initialisation, and the
authors' checkpoints."""
import copy
import logging
import math
from functools import cache

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vitlinear  # noqa: F401
from _golden import qna_cases, qna_part, qna_state_shapes, qna_tensors
from _numerics import assert_close
from vitlinear.layers import ATTENTION_LAYERS, QnAAttention, WindowAttention
from vitlinear.layers.qna_block import QnADownsample, SamePatchEmbed
from vitlinear.layers.window import resize_relative_position_bias_table
from vitlinear.models.qna_vit import QnAVisionTransformer, _from_flax, checkpoint_filter_fn, infer_variant

VARIANTS = ['qna_vit_tiny', 'qna_vit_tiny_7x7', 'qna_vit_small', 'qna_vit_base']
MODELS = [name for name, case in qna_cases().items() if case['kind'] == 'model']
LAYER = dict(rtol=1e-4, atol=2e-5)
MODEL = dict(rtol=1e-3, atol=1e-4)
# qna_vit_tiny, made small
SMALL = dict(
    embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), window_depths=(0, 0, 1, 1), num_heads=(2, 4, 6, 8),
    window_heads=(1, 1, 2, 4))


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that no initialisation gives, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean = 1. if 'norm' in name and name.endswith('weight') else 0.
            p.copy_(mean + torch.randn(p.shape, generator=g) * (.2 if p.ndim == 1 else p[0].numel() ** -.5))
    return model.eval()


# the authors' numbers

@cache
def golden_model(name: str) -> QnAVisionTransformer:
    """For tests that leave it as it is."""
    case = qna_cases()[name]
    config = case['config']
    windows, qna = config['lsa_layers'], config['qna_layers']
    model = QnAVisionTransformer(
        img_size=64,  # whose maps the authors' windows cover in the last two stages
        num_classes=case['num_classes'],
        embed_dims=[config['base_dim'] * 2 ** i for i in range(4)],
        depths=[a + b for a, b in zip(windows, qna)],
        window_depths=windows,
        num_heads=config['qna_heads'],
        window_heads=config['lsa_heads'],
        kernel_size=config['qna_receptive_field'],
        num_queries=config['qna_num_queries'],
    )
    for i, stage in enumerate(model.stages):
        for block in stage.blocks:
            if isinstance(block.attn, WindowAttention):
                assert block.attn.window_size == (config['lsa_window'][i],) * 2
    model.load_state_dict(checkpoint_filter_fn(qna_part('params:' + case['param_set']), model))
    return model.eval()


def modules_by_flax_path(name: str) -> dict[str, nn.Module]:
    """Modules of ours that compute what an intermediate of the authors holds."""
    model, config = golden_model(name), qna_cases()[name]['config']
    modules = {'StemBlock_0': model.patch_embed, 'ClassificationHead_0/LayerNorm_0': model.norm}
    for i, stage in enumerate(model.stages):
        windows = config['lsa_layers'][i]
        for j, block in enumerate(stage.blocks):
            kind = f'LSAStage_{i}/MSA_Block_{j + 1}' if j < windows else f'QnAStage_{i}/QnA_Block_{j - windows + 1}'
            modules[kind] = block
        if i > 0:
            modules[f'QnAStage_{i - 1}/QnA_Block_{config["qna_layers"][i - 1] + 1}_stride_2'] = stage.downsample
            modules[f'QnAStage_{i - 1}'] = stage.downsample
    return modules


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('name', MODELS)
def test_golden_models(name: str, grad: bool):
    """Logits and every block, with two windows in each stage at 128 x 64."""
    model, case, maps = golden_model(name), qna_cases()[name], {}
    modules = modules_by_flax_path(name)
    handles = [
        module.register_forward_hook(lambda m, args, out, path=path: maps.__setitem__(path, out))
        for path, module in modules.items()]
    x = qna_tensors()[case['input']].permute(0, 3, 1, 2)
    with torch.set_grad_enabled(grad):
        logits = model(x)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits, qna_tensors()[case['output']], **MODEL)
    compared = set(maps) & set(case['intermediates'])
    assert set(maps) == compared and len(MODELS) == 3
    # the others are outputs of a whole stage of the authors: of its last block or, where it is empty, of the one before
    assert all('/' not in path for path in set(case['intermediates']) - compared)
    for path in compared:
        expected = qna_tensors()[case['intermediates'][path]]
        out = maps[path]
        if isinstance(modules[path], (QnADownsample, SamePatchEmbed)):  # (B, C, H, W)
            out = out.permute(0, 2, 3, 1)
        if path.startswith('LSAStage'):  # the authors cut the map into windows before these blocks
            w = modules[path].attn.window_size[0]
            out = out.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        torch.testing.assert_close(out, expected, **MODEL, msg=lambda m, path=path: f'{path}: {m}')


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('name', MODELS)
def test_golden_gradients(name: str, checkpointing: bool):
    model, case = copy.deepcopy(golden_model(name)), qna_cases()[name]
    model.set_grad_checkpointing(checkpointing)
    x = qna_tensors()[case['input']].permute(0, 3, 1, 2).clone().requires_grad_()
    model(x).backward(qna_tensors()[case['grads']['cotangent']])
    assert_close(x.grad.permute(0, 2, 3, 1), qna_tensors()[case['grads']['grad_input']], rtol=1e-3, atol=1e-4)

    # the mapping of names, from parameters that hold their number
    paths = list(case['grads']['grad_param_l2_norms'])
    shapes = qna_part('params:' + case['param_set'])
    numbered = _from_flax({path: torch.full_like(shapes[path], i) for i, path in enumerate(paths)})
    assert numbered.keys() == dict(model.named_parameters()).keys()
    for key, number in numbered.items():
        norm = case['grads']['grad_param_l2_norms'][paths[int(number.flatten()[0])]]
        assert model.get_parameter(key).grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('name, prefix', [
    ('block_s1', 'QnAStage_0/QnA_Block_1/'), ('block_s2', 'QnAStage_0/QnA_Block_2_stride_2/')])
def test_golden_blocks(name: str, prefix: str, grad: bool):
    config = qna_cases()[name]['config']
    model = QnAVisionTransformer(
        embed_dims=(config['dim'], 16), depths=(1, 1), window_depths=(0, 0), num_heads=(config['heads'],) * 2,
        window_heads=1, kernel_size=config['kernel_size'], num_classes=0)
    block = model.stages[0].blocks[0] if name == 'block_s1' else model.stages[1].downsample
    state = _from_flax({prefix + k: v for k, v in qna_part('params:' + name).items()})
    ours = 'stages.0.blocks.0.' if name == 'block_s1' else 'stages.1.downsample.'
    block.load_state_dict({k[len(ours):]: v for k, v in state.items()})
    with torch.set_grad_enabled(grad):
        x = qna_tensors()[f'{name}/input']
        if name == 'block_s1':
            out = block.eval()(x)
        else:
            out = block.eval()(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, qna_tensors()[f'{name}/output'], **LAYER)


@pytest.mark.parametrize('name', ['stem_even', 'stem_padded'])
def test_golden_stems(name: str):
    config = qna_cases()[name]['config']
    stem = SamePatchEmbed(3, config['features'], config['patch_size'], config['patch_size'])
    stem.load_state_dict({'proj.weight': qna_part('params:stem')['conv_1x1/kernel'].permute(3, 2, 0, 1)})
    out = stem(qna_tensors()[f'{name}/input'].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, qna_tensors()[f'{name}/output'], **LAYER)


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


# checkpoints by name and shape

@pytest.fixture(scope='module', params=VARIANTS)
def variant(request) -> str:
    return request.param


@cache
def default(variant: str) -> nn.Module:
    """For tests that leave it as it is."""
    return timm.create_model(variant, device='meta')


def flax_shapes(variant: str) -> dict[str, torch.Tensor]:
    return {path: torch.empty(shape, device='meta') for path, shape in qna_state_shapes()[variant]['entries']}


def test_state_shapes(variant: str):
    """The authors' parameter list becomes ours, and the file says which variant it is."""
    theirs, model = flax_shapes(variant), default(variant)
    assert len(theirs) == qna_state_shapes()[variant]['num_tensors']
    converted = checkpoint_filter_fn(theirs, model)
    assert {k: tuple(v.shape) for k, v in converted.items()} == {
        k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert infer_variant(theirs) == infer_variant(converted) == variant
    assert infer_variant({'model': {f'module.{k}': v for k, v in theirs.items()}}) == variant


def test_a_variant_without_a_name_is_given_none():
    theirs = QnAVisionTransformer(**SMALL, num_classes=5).state_dict()
    with pytest.raises(ValueError, match='another variant') as caught:
        checkpoint_filter_fn(theirs, timm.create_model('qna_vit_tiny', device='meta'))
    assert 'looks like' not in str(caught.value)


def test_inferred_variant_of_others():
    assert infer_variant(timm.create_model('qna_vit_nano', device='meta').state_dict()) is None
    assert infer_variant(timm.create_model('vvt_nano', device='meta').state_dict()) is None
    assert infer_variant({}) is None


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


def test_table_resized_on_loading():
    """From 224 to 384 pixels as the authors fine-tune: windows of 14 and 7 become 24 and 12."""
    theirs = {k: torch.randn(v.shape) if 'rpe_bias' in k else v for k, v in flax_shapes('qna_vit_tiny').items()}
    model = timm.create_model('qna_vit_tiny', device='meta', img_size=384)
    loaded = checkpoint_filter_fn(theirs, model)
    path = 'LSAStage_2/MSA_Block_3/MultiHeadSelfAttention_0/RelativePositionalEmbedding_0/rpe_bias'
    expected = resize_relative_position_bias_table(theirs[path], (14, 14), (24, 24))
    assert torch.equal(loaded['stages.2.blocks.2.attn.relative_position_bias_table'], expected)
    assert len(expected) == 47 ** 2


def test_kernels_resized_on_loading():
    """Taps of 3 x 3 windows in a model of 7 x 7 ones, each kernel by itself."""
    theirs = randomize(QnAVisionTransformer(**SMALL, num_classes=5)).state_dict()
    model = QnAVisionTransformer(**SMALL, num_classes=5, kernel_size=7)
    loaded = checkpoint_filter_fn(theirs, model)
    for name in ('rel_pos_bias', 'attn_scale'):
        key = f'stages.0.blocks.0.attn.{name}'
        assert loaded[key].shape == (4, 1, 7, 7)
        for i in range(4):
            expected = nn.functional.interpolate(
                theirs[key][i:i + 1], size=(7, 7), mode='bicubic', antialias=True, align_corners=False)
            torch.testing.assert_close(loaded[key][i:i + 1], expected)
    model.load_state_dict(loaded)
    assert torch.isfinite(model(images(1, 3, 64, 64))).all()


def test_windows_cover_larger_maps():
    """At another size the same weights run: a map no larger than the window is one, a larger one is cut."""
    model = randomize(timm.create_model('qna_vit_nano', num_classes=5))
    attn = model.stages[2].blocks[0].attn
    assert attn.window_size == (8, 8)
    calls = []
    attend = attn.attend
    attn.attend = lambda x, h, w: calls.append((tuple(x.shape[1:3]), h, w)) or attend(x, h, w)
    for size, expected in (((64, 64), [((8, 8), 8, 8)]), ((20, 30), [((3, 4), 3, 4)]), ((128, 64), [((16, 8), 8, 8)])):
        calls.clear()
        model(images(1, 3, *size))
        assert calls == expected, size


# the authors' checkpoints and ours

@pytest.fixture(scope='module')
def small() -> QnAVisionTransformer:
    return golden_model('small_64x64')


@pytest.fixture(scope='module')
def flax() -> dict[str, torch.Tensor]:
    return qna_part('params:small')


@pytest.mark.parametrize('wrap', [
    lambda s: s, lambda s: {'model': s}, lambda s: {'state_dict': {f'module.{k}': v for k, v in s.items()}}])
def test_filter_unwraps(small, flax, wrap):
    own = small.state_dict()
    for state in (flax, own):
        loaded = checkpoint_filter_fn(wrap(state), small)
        assert loaded.keys() == own.keys() and all(torch.equal(loaded[k], v) for k, v in own.items())


def test_native_is_left_alone(small):
    state = small.state_dict()
    filtered = checkpoint_filter_fn(state, small)
    assert list(filtered) == list(state) and all(filtered[k] is state[k] for k in state)


def test_file_of_the_authors_names(tmp_path, flax, small):
    """Their parameters, flattened into safetensors, through `pretrained=True`."""
    config = qna_cases()['small_64x64']['config']
    save_file({k: v.contiguous() for k, v in flax.items()}, tmp_path / 'model.safetensors')
    kwargs = dict(
        img_size=64, embed_dims=(8, 16, 32, 64), depths=(1, 2, 3, 1), window_depths=config['lsa_layers'],
        num_heads=config['qna_heads'], window_heads=config['lsa_heads'])
    overlay = dict(file=str(tmp_path / 'model.safetensors'), num_classes=10)
    model = timm.create_model('qna_vit_tiny', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    x = images(2, 3, 64, 64)
    assert torch.equal(model(x), small(x))
    for in_chans in (1, 6):  # timm: one channel takes the sum of the kernels, n times as many repeat them, rescaled
        model = timm.create_model(
            'qna_vit_tiny', pretrained=True, pretrained_cfg_overlay=overlay, in_chans=in_chans, **kwargs).eval()
        grey = images(1, 1, 64, 64)
        torch.testing.assert_close(
            model(grey.expand(-1, in_chans, -1, -1)), small(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    features = timm.create_model(
        'qna_vit_tiny', pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, **kwargs).eval()
    expected = small.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features(x), expected, strict=True))


def test_head_of_other_classes(small, flax, caplog):
    model = copy.deepcopy(small)
    model.reset_classifier(7)
    with caplog.at_level(logging.WARNING, 'vitlinear'):
        loaded = checkpoint_filter_fn(flax, model)
    assert '10 classes' in caplog.text and '7' in caplog.text
    assert torch.equal(loaded['head.weight'], model.head.weight)
    model.reset_classifier(0)
    assert not [k for k in checkpoint_filter_fn(flax, model) if k.startswith('head.')]


@pytest.mark.parametrize('theirs', [*VARIANTS, 'qna_vit_nano'])
def test_another_variant(theirs: str):
    """The message tells what the file holds."""
    for ours in VARIANTS:
        if ours == theirs or {ours, theirs} == {'qna_vit_tiny', 'qna_vit_tiny_7x7'}:
            continue  # these two differ in the size of their kernels alone, which is adapted
        states = [default(theirs).state_dict()] if theirs == 'qna_vit_nano' else [
            default(theirs).state_dict(), flax_shapes(theirs)]
        for state in states:
            with pytest.raises(ValueError, match='another variant') as e:
                checkpoint_filter_fn(state, default(ours))
            assert theirs == 'qna_vit_nano' or str(e.value).endswith(f'{theirs}.')


@pytest.mark.parametrize('gone', [
    'StemBlock_0/conv_1x1/kernel', 'QnAStage_1/QnA_Block_2/FusedKQnA_0/query',
    'LSAStage_2/MSA_Block_1/LayerNorm_0/scale',
    'LSAStage_2/MSA_Block_1/MultiHeadSelfAttention_0/RelativePositionalEmbedding_0/rpe_bias',
    'QnAStage_0/QnA_Block_2_stride_2/Conv_0/kernel', 'ClassificationHead_0/LayerNorm_0/scale'])
def test_missing_tensors(small, flax, gone: str):
    with pytest.raises(ValueError) as e:
        checkpoint_filter_fn({k: v for k, v in flax.items() if k != gone}, small)
    assert 'incomplete' in str(e.value) or gone.startswith('StemBlock')


@pytest.mark.parametrize('extra', [
    'QnAStage_0/QnA_Block_1/LayerScale_0/scale_param', 'StemBlock_0/BatchNorm_0/scale',
    'ClassificationHead_0/FusedKQnA_0/query', 'QnAStage_0/QnA_Block_1/MlpBlock_0/Dense_0/query', 'opt_state/0'])
def test_options_that_were_not_released(small, flax, extra: str):
    """Rather than leave out a weight that counts."""
    with pytest.raises(ValueError) as e:
        checkpoint_filter_fn({**flax, extra: torch.ones(3)}, small)
    assert extra in str(e.value)


@pytest.mark.parametrize('state', [{}, {'a': torch.ones(3)}, {'patch_embed1.proj.weight': torch.ones(3, 3, 1, 1)}])
def test_no_checkpoint_at_all(small, state):
    with pytest.raises(ValueError, match='holds no QnAVisionTransformer weights'):
        checkpoint_filter_fn(state, small)


def test_headless_checkpoint(small):
    state = {k: v for k, v in small.state_dict().items() if not k.startswith('head.')}
    assert checkpoint_filter_fn(state, small).keys() == state.keys()


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


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize('stage, block, names', [
    (0, 0, ['attn.v', 'attn.proj', 'mlp.fc1', 'mlp.fc2']), (3, 0, ['attn.qkv', 'attn.proj', 'mlp.fc1']),
    (1, None, ['attn.v', 'attn.proj', 'mlp.fc2'])])
def test_inference_respects_what_replaces_a_layer(stage: int, block, names):
    """Adapters, quantised layers and hooks take part in inference; only plain layers are evaluated by their weights."""
    model, x = randomize(timm.create_model('qna_vit_nano', num_classes=5)), images(1, 3, 64, 64)
    owner = model.stages[stage].downsample if block is None else model.stages[stage].blocks[block]
    with torch.no_grad():
        before = model(x)
    for name in [*names, *(['attn.k'] if 'attn.v' in names else []), 'norm1', 'norm2', 'attn', 'mlp']:
        calls = []
        handle = owner.get_submodule(name).register_forward_hook(lambda *args, calls=calls: calls.append(1))
        with torch.no_grad():
            torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
        handle.remove()
        assert calls, name
    for name in names:
        parent, leaf = owner.get_submodule(name.rpartition('.')[0]), name.rpartition('.')[2]
        layer = getattr(parent, leaf)
        doubled = Doubled(layer.in_features, layer.out_features, bias=layer.bias is not None)
        doubled.load_state_dict(layer.state_dict())
        setattr(parent, leaf, doubled)
        expected = model(x).detach()
        with torch.no_grad():
            out = model(x)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f'{name}: {m}')
        assert (out - before).abs().max() > 1e-3, name
        setattr(parent, leaf, layer)


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
