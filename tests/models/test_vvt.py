"""VVT against numbers from the authors' code, its parameter and operation counts, and its initialisation."""
import copy
import math

import pytest
import timm
import torch
from torch import nn

from _golden import authors_key, grid, part, to_authors, vvt_facts, vvt_state_shapes, vvt_tensors
from _models import blank, check_initialisation, count_macs, filtered, images, numel, on_meta
from vitlinear import ops
from vitlinear.layers import VicinityAttention
from vitlinear.models.vvt import VicinityVisionTransformer
from vitlinear.ops.primitives.tokens.positions import ROWS_AND_COLUMNS_FROM_POSITIONS

VARIANTS = ['vvt_tiny', 'vvt_small', 'vvt_medium', 'vvt_large']
IMPLEMENTATIONS = sorted(ops.token_sums.implementations)
# the authors' options that no released model uses and that are not offered
ATTENTION_CASES = [c for c, i in vvt_facts()['cases'].items() if i['kind'] == 'attention' and c != 'attn/sr2']
MODEL_INPUTS = ['sq64', 'ns64x96', 'odd75x101', 'min32']


def tolerance(case: str) -> dict:
    return dict(rtol=1e-4, atol=5e-4 if 'saturated' in case else 1e-5)


def assert_gradient(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """To 1e-4 of the largest entry."""
    size = expected.abs().max()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(size), msg=lambda m: f'{name}: {m}')


def tiny_pyramid(**kwargs) -> VicinityVisionTransformer:
    """A model that consists of next to nothing but the block under test."""
    return VicinityVisionTransformer(depths=(1,), num_classes=0, **kwargs)


def load_block(model: nn.Module, params: dict, prefix: str) -> None:
    """Through the checkpoint filter, with the authors' parameters in place of the first block's."""
    state = to_authors(model.state_dict())
    assert {f'block1.0.{prefix}{k}' for k in params} <= set(state)
    state.update({f'block1.0.{prefix}{k}': v for k, v in params.items()})
    model.load_state_dict(filtered(state, model))


def attention_of(case: str) -> VicinityAttention:
    facts = vvt_facts()['cases'][case]
    ctor = facts['ctor']
    locality = '2d' if ctor.get('use_sum', True) else '2d_product'
    model = tiny_pyramid(
        embed_dims=(ctor['embed_dim'],), num_heads=(ctor['num_heads'],), mlp_ratios=(1.,),
        attn_kwargs=dict(
            feature_reduction=ctor['fr_ratio'], fpc_reduction=ctor['se_reduction'], clamp=facts['clip'],
            locality=locality))
    load_block(model, part(case, 'param'), 'attn.')
    return model.stages[0].blocks[0].attn


def gradients_as_ours(grads: dict) -> dict:
    """The authors' attention gradients under our names; a fused parameter's is the concatenation."""
    ours = {}
    for key in ('qkv.weight', 'qkv.bias'):
        ours[key] = torch.cat([grads[key.replace('qkv', f'{p}_proj')] for p in 'qkv'])
    for key, theirs in (('proj', 'out_proj'), ('fpc.fc1', 'se_fc.0'), ('fpc.fc2', 'se_fc.2')):
        ours.update({f'{key}.{n}': grads[f'{theirs}.{n}'] for n in ('weight', 'bias') if f'{theirs}.{n}' in grads})
    assert len(ours) == len(grads) - 4
    return ours


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('case', ATTENTION_CASES)
def test_golden_attention(case: str, implementation: str):
    H, W = grid(case)
    attention, tensors = attention_of(case), vvt_tensors()
    x = tensors[f'{case}/input'].unflatten(1, (H, W)).requires_grad_()
    with ops.use(implementation):
        out = attention(x)
    torch.testing.assert_close(out.flatten(1, 2), tensors[f'{case}/output'], **tolerance(case))

    out.flatten(1, 2).backward(tensors[f'{case}/cotangent'])
    assert_gradient(x.grad.flatten(1, 2), tensors[f'{case}/grad_input'], 'input')
    expected = gradients_as_ours(part(case, 'grad'))
    assert set(expected) == {k for k, _ in attention.named_parameters()}
    for name, p in attention.named_parameters():
        assert_gradient(p.grad, expected[name], name)


@pytest.mark.parametrize('case', ['block/square', 'block/nonsquare'])
def test_golden_block(case: str):
    ctor, (H, W) = vvt_facts()['cases'][case]['ctor'], grid(case)
    model = tiny_pyramid(
        embed_dims=(ctor['dim'],), num_heads=(ctor['num_heads'],), mlp_ratios=(ctor['mlp_ratio'],),
        attn_kwargs=dict(feature_reduction=ctor['fr_ratio'], fpc_reduction=ctor['se_ratio']))
    load_block(model, part(case, 'param'), '')
    block = model.stages[0].blocks[0]
    assert len(part(case, 'param')) == len(to_authors(block.state_dict())) + 4
    out = block(vvt_tensors()[f'{case}/input'].unflatten(1, (H, W)))
    torch.testing.assert_close(out.flatten(1, 2), vvt_tensors()[f'{case}/output'], **tolerance(case))


def golden_model() -> VicinityVisionTransformer:
    ctor = vvt_facts()['cases']['model']['ctor']
    model = VicinityVisionTransformer(
        **{k: ctor[k] for k in ('embed_dims', 'depths', 'num_heads', 'mlp_ratios', 'num_classes')})
    model.load_state_dict(filtered(part('model', 'param'), model))
    return model


@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('name', MODEL_INPUTS)
def test_golden_model(name: str, mode: str):
    """Logits, pooled features, every stage and every patch embedding, without stochastic depth in both modes."""
    model = golden_model().train(mode == 'train')
    case, tensors = f'model/{name}', vvt_tensors()
    embedded = []
    for module in (model.patch_embed, *[stage.downsample for stage in list(model.stages)[1:]]):
        module.register_forward_hook(lambda m, args, out: embedded.append(out))
    x = tensors[f'{case}/input']
    with torch.set_grad_enabled(mode == 'train'):
        last, maps = model.forward_intermediates(x)
        logits = model(x)
        pooled = model.forward_head(last, pre_logits=True)
    for i in range(4):
        torch.testing.assert_close(maps[i], tensors[f'{case}/stage{i + 1}'], **tolerance(case))
        torch.testing.assert_close(embedded[i], tensors[f'{case}/patch_embed{i + 1}'], **tolerance(case))
    torch.testing.assert_close(last, tensors[f'{case}/stage4'], **tolerance(case))
    torch.testing.assert_close(pooled, tensors[f'{case}/pooled'], **tolerance(case))
    torch.testing.assert_close(logits, tensors[f'{case}/logits'], **tolerance(case))


@pytest.mark.parametrize('checkpointing', [False, True])
def test_golden_model_gradients(checkpointing: bool):
    model, tensors = golden_model(), vvt_tensors()
    model.set_grad_checkpointing(checkpointing)
    x = tensors['model/sq64/input'].clone().requires_grad_()
    model(x).backward(tensors['model/sq64/cotangent'])
    assert_gradient(x.grad, tensors['model/sq64/grad_input'], 'input')
    expected = filtered(part('model/sq64', 'grad'), model)
    assert set(expected) == {k for k, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert_gradient(p.grad, expected[name], name)


# checkpoints by name and shape

@pytest.fixture(scope='module', params=VARIANTS)
def variant(request) -> str:
    return request.param


def create(variant: str, **kwargs) -> nn.Module:
    return timm.create_model(variant, device='meta', **kwargs)


def test_state_shapes(variant: str):
    """The authors' parameter list becomes ours, and ours theirs, in names, shapes and order of layers."""
    theirs = {k: torch.empty(shape, device='meta') for k, shape in vvt_state_shapes()[variant]['state_dict']}
    model = on_meta(variant)
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in filtered(theirs, model).items()} == ours
    back = {k: tuple(v.shape) for k, v in to_authors(model.state_dict()).items()}
    assert back == {k: tuple(v.shape) for k, v in theirs.items()}
    assert authors_key('stages.2.blocks.7.norm1.bias') in back or variant == 'vvt_tiny'


@pytest.mark.parametrize(('name', 'total', 'backbone', 'classes_100', 'tensors'), [
    ('vvt_tiny', 12_882_440, 12_369_440, 12_420_740, 186),
    ('vvt_small', 25_492_264, 24_979_264, 25_030_564, 386),
    ('vvt_medium', 47_907_304, 47_394_304, 47_445_604, 746),
    ('vvt_large', 61_848_520, 61_335_520, 61_386_820, 986),
])
def test_parameters(name: str, total: int, backbone: int, classes_100: int, tensors: int):
    model = copy.deepcopy(on_meta(name))
    assert not list(model.buffers())
    assert len(to_authors(model.state_dict())) == tensors
    for classes, expected in ((1000, total), (0, backbone), (100, classes_100)):
        model.reset_classifier(classes)
        assert numel(model) == expected


# operations

def closed_form(model: nn.Module, H: int, W: int, by_axes_from: float = math.inf) -> dict:
    """Multiply-accumulates from shapes, the attention's denominators apart.

    The authors count 8 N d r for the attention of a block; sums of keys without values are additions of two tables
    here, and denominators a column beside the values.
    """
    total = denominators = 0
    for i, stage in enumerate(model.stages):
        conv = (stage.downsample if i else model.patch_embed).proj
        H, W = (math.ceil(n / conv.stride[0]) for n in (H, W))
        N, C = H * W, conv.out_channels
        total += N * conv.kernel_size[0] ** 2 * conv.in_channels * C
        for block in stage.blocks:
            r, M = block.attn.reduced_dim, block.mlp.fc1.out_features
            d = r // block.attn.num_heads
            fpc = block.attn.fpc.fc1.out_features
            if N < by_axes_from:
                core, core_denominators = 8 * N * d * r, 4 * N * r + 4 * N * r
            else:
                core = 4 * N * d * r + 4 * (H + W) * d * r
                core_denominators = 2 * N * r + 2 * (H + W) * r + 2 * (H + W) * r
            total += 4 * N * C * r + core + 2 * fpc * C + 2 * N * C * M + 9 * N * M
            denominators += core_denominators
    head = model.get_classifier()
    total += head.in_features * head.out_features if isinstance(head, nn.Linear) else 0
    return dict(total=total, denominators=denominators)


@pytest.mark.parametrize(('name', 'size', 'expected'), [
    ('vvt_tiny', 224, 2_984_570_880), ('vvt_tiny', 384, 8_766_894_080),
    ('vvt_small', 224, 5_586_166_784), ('vvt_small', 384, 16_408_469_504),
    ('vvt_medium', 224, 9_387_674_624), ('vvt_medium', 384, 27_573_100_544),
    ('vvt_large', 224, 10_783_148_032), ('vvt_large', 384, 31_669_358_592),
])
def test_operations(name: str, size: int, expected: int):
    """To the unit the authors' count, of which 3.0, 5.6, 9.4 and 10.8 G at 224 px are published."""
    assert closed_form(create(name), size, size)['total'] == expected


@pytest.mark.parametrize(('H', 'W'), [(224, 224), (128, 160), (75, 101)])
def test_operations_as_run(H: int, W: int):
    """Large maps take half of the operations, through rows and columns."""
    for name, options in (('vvt_tiny', {}), ('vvt_nano', dict(fpc_reduction=4))):
        model = create(name, attn_kwargs=options)
        form = closed_form(model, H, W, ROWS_AND_COLUMNS_FROM_POSITIONS)
        assert count_macs(model, H, W) == sum(form.values())


def test_operations_are_linear():
    """In images, and in pixels but for what each image, row and column takes once."""
    model = create('vvt_nano')
    assert count_macs(model, 40, 24, batch=3) == 3 * count_macs(model, 40, 24)
    model = create('vvt_tiny', num_classes=0)
    counts = [count_macs(model, n, n) for n in (256, 512, 1024)]
    assert 3.9 < counts[1] / counts[0] <= 4
    assert 3.95 < counts[2] / counts[1] <= 4


# stochastic depth, norms, initialisation

def drop_rates(model: nn.Module, branch: int) -> list:
    return [
        getattr(getattr(b, f'drop_path{branch}'), 'drop_prob', 0.) for stage in model.stages for b in stage.blocks]


@pytest.mark.parametrize(('name', 'rate'), [('vvt_tiny', .1), ('vvt_small', .3)])
def test_drop_path_schedule(name: str, rate: float):
    expected = vvt_facts()['drop_path_schedule_example'][name]
    model = create(name, drop_path_rate=rate)
    for branch in (1, 2):
        assert drop_rates(model, branch) == pytest.approx(expected, abs=1e-7)
    assert set(drop_rates(create(name), 1)) == {0.}


def test_norm_eps(variant: str):
    """1e-5 in the patch embeddings, 1e-6 everywhere else."""
    eps = {name: m.eps for name, m in on_meta(variant).named_modules() if isinstance(m, nn.LayerNorm)}
    for name, value in eps.items():
        assert value == (1e-5 if 'patch_embed' in name or 'downsample' in name else 1e-6), name
    assert sum(v == 1e-5 for v in eps.values()) == 4


@pytest.mark.parametrize('late', [False, True])
def test_initialisation(late: bool):
    torch.manual_seed(0)
    for name, kwargs in (('vvt_nano', {}), ('vvt_tiny', dict(depths=(1, 1, 1, 1)))):
        model = timm.create_model(name, device='meta' if late else 'cpu', **kwargs)
        if late:
            model = blank(model)
            model.init_weights(needs_reset=True)
        check_initialisation(model)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(.0206, rel=.05)
    assert model.stages[0].blocks[0].mlp.dwconv.weight.std().item() == pytest.approx(.471, rel=.05)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_initialisation_in_half_precision(dtype: torch.dtype):
    """Quantiles taken in half precision would throw some weights to the bounds of the truncation, 100 sigma away."""
    torch.manual_seed(0)
    model = timm.create_model('vvt_nano', dtype=dtype)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach().float()
            assert weight.abs().max() < .2, name
            assert weight.std().item() == pytest.approx(.02, rel=.1), name


# vvt_nano, ours

def test_nano():
    model = timm.create_model('vvt_nano')
    assert 1_000_000 < numel(model) < 2_000_000
    _, maps = model.forward_intermediates(images(1, 3, 32, 32))
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert [f['reduction'] for f in model.feature_info] == [2, 4, 8, 16]


def test_documented_defaults(variant: str):
    cfg = on_meta(variant).pretrained_cfg
    assert cfg['num_classes'] == 1000 and cfg['input_size'] == (3, 224, 224) and cfg['crop_pct'] == .875
    assert cfg['mean'] == (0.485, 0.456, 0.406) and cfg['std'] == (0.229, 0.224, 0.225)
    assert cfg['interpolation'] == 'bicubic' and cfg['license'] == 'apache-2.0' and not cfg['fixed_input_size']
