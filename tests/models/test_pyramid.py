"""The timm contract that the families share, where timm's own suite does not look."""
import copy
import logging
import pickle

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from _pyramids import BACKBONES, CLOSE, FAMILIES, SIZES, build, create, images


@pytest.fixture(scope='module', params=FAMILIES)
def model(request) -> nn.Module:
    """For tests that leave it as it is."""
    return create(request.param)


def name_of(model: nn.Module) -> str:
    return model.pretrained_cfg['architecture']


# training

@pytest.mark.parametrize('backbone', BACKBONES)
def test_checkpointing_recomputes(backbone: str):
    """Each block runs twice with it, once without; the gradients are the same."""
    model = create(backbone).train()
    calls = [0]
    for stage in model.stages:
        for block in stage.blocks:
            block.norm2.register_forward_hook(lambda *args: calls.__setitem__(0, calls[0] + 1))
    blocks = sum(len(stage.blocks) for stage in model.stages)
    x, grads = images(2, 3, 32, 48), []
    for enable, runs in ((False, 1), (True, 2), (False, 1)):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        calls[0] = 0
        model(x).square().sum().backward()
        assert calls[0] == runs * blocks
        grads.append([p.grad.clone() for p in model.parameters()])
    for other in grads[1:]:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(grads[0], other))


@pytest.mark.parametrize('backbone', FAMILIES)
def test_checkpointing_saves_memory(backbone: str):
    def saved(enable: bool) -> int:
        model = create(backbone).train()
        model.set_grad_checkpointing(enable)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage()) or t, lambda t: t):
            loss = model(images(2, 3, 64, 64)).sum()
        assert loss.requires_grad
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(s.nbytes() for ptr, s in sizes.items() if ptr not in parameters)

    assert saved(True) < saved(False) / (2.5 if backbone == 'qna_vit_nano' else 4)  # downsampling blocks are kept


def test_drop_path_rate_reaches_blocks():
    model = timm.create_model('vvt_nano', drop_path_rate=.2)
    blocks = [block for stage in model.stages for block in stage.blocks]
    for branch in ('drop_path1', 'drop_path2'):
        rates = [getattr(getattr(block, branch), 'drop_prob', 0.) for block in blocks]
        assert rates == pytest.approx([.2 * i / (len(blocks) - 1) for i in range(len(blocks))])

    # at 1 for every block, training is the pyramid without blocks
    model = create(drop_path_rate=.5).train()
    for block in (block for stage in model.stages for block in stage.blocks):
        block.drop_path1 = block.drop_path2 = timm.layers.DropPath(1., scale_by_keep=False)
    dropped = model(images(2, 3, 32, 32))
    for stage in model.stages:
        stage.blocks = nn.ModuleList()
    torch.testing.assert_close(dropped, model(images(2, 3, 32, 32)))


@pytest.mark.parametrize('backbone', FAMILIES)
def test_dropout_reaches_blocks_and_head(backbone: str):
    model = timm.create_model(backbone, drop_rate=.3, proj_drop_rate=.2)
    assert model.head_drop.p == .3
    rates = [m.p for k, m in model.stages.named_modules() if isinstance(m, nn.Dropout) and not k.endswith('.proj_drop')]
    mlps = sum(len(stage.blocks) for stage in model.stages) + (3 if backbone == 'qna_vit_nano' else 0)
    assert set(rates) == {.2} and len(rates) == 2 * mlps
    x = images(2, 3, 32, 32)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_layer_decay(model):
    """The stem learns slowest, then stage by stage and block by block, the head at the full rate."""
    groups = param_groups_layer_decay(model, weight_decay=.05, layer_decay=.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: group['lr_scale'] for group in groups for p in group['params']}
    assert scale.keys() == set(names.values())
    order = ['patch_embed']
    for i, stage in enumerate(model.stages):
        order += [f'stages.{i}.blocks.{j}' for j in range(len(stage.blocks))]
    scales = [{s for n, s in scale.items() if n.startswith(f'{prefix}.')} for prefix in order]
    assert all(len(s) == 1 for s in scales)
    scales = [s.pop() for s in scales]
    assert scales == sorted(scales) and len(set(scales)) == len(scales)
    assert min(scale.values()) == scales[0] and {scale['head.weight'], scale['head.bias']} == {1.}
    for i in range(1, 4):  # a downsampling belongs between its stages, never before what it follows
        above = scale[f'stages.{i}.blocks.0.norm1.weight']
        below = scale[f'stages.{i - 1}.blocks.{len(model.stages[i - 1].blocks) - 1}.norm1.weight']
        between = {s for n, s in scale.items() if n.startswith(f'stages.{i}.downsample.')}
        assert len(between) == 1 and below <= between.pop() <= above
    for i in range(4):
        last = scale[f'stages.{i}.blocks.{len(model.stages[i].blocks) - 1}.norm1.weight']
        for name in (f'stages.{i}.norm.weight', 'norm.weight'):
            assert scale.get(name, 1.) >= last


@pytest.mark.parametrize('coarse', [False, True])
def test_group_matcher_covers_everything(model, coarse: bool):
    from timm.models import group_parameters
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())
    assert len(groups) == (6 if coarse else len(groups))
    assert groups[max(groups)] == ['head.weight', 'head.bias'] or coarse


def test_weight_decay(model):
    names = {name for name, _ in model.named_parameters()}
    assert set(model.no_weight_decay()) <= names
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=.05)
    by_id = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group['params']:
            exempt = p.ndim <= 1 or by_id[id(p)] in model.no_weight_decay()
            assert (group['weight_decay'] == 0) == exempt, by_id[id(p)]


@pytest.mark.parametrize('backbone', BACKBONES)
def test_learns(backbone: str):
    torch.manual_seed(0)
    model = build(backbone, num_classes=4).train()
    x, y = images(4, 3, 32, 32), torch.arange(4)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .5 * losses[0], losses


# features

@pytest.mark.parametrize('indices, kept', [(1, 4), ([0], 1), ([1], 2), ([0, 2], 3), ([3], 4), ([-3], 2)])
@pytest.mark.parametrize('prune_head', [True, False])
@pytest.mark.parametrize('backbone', FAMILIES)
def test_prune(backbone: str, indices, kept: int, prune_head: bool):
    model = create(backbone).train()
    x = images(2, 3, 40, 56)
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    count = sum(p.numel() for p in model.parameters())
    taken = model.prune_intermediate_layers(indices, prune_head=prune_head)
    assert len(model.stages) == kept and max(taken) == kept - 1
    assert model.num_features == model.head_hidden_size == model.feature_info[kept - 1]['num_chs']
    gone = prune_head or kept < 4
    assert isinstance(model.get_classifier(), nn.Identity) == gone
    assert model.num_classes == (0 if gone else 10) and model.global_pool == ('' if gone else 'avg')
    assert (sum(p.numel() for p in model.parameters()) < count) == gone

    maps = model.forward_intermediates(x, indices=taken, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    out = model(x)
    assert out.shape == ((2, 10) if not gone else maps[-1].shape)
    assert isinstance(model.norm, nn.Identity) == (backbone != 'qna_vit_nano' or kept < 4)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (2, 3)


def test_intermediates(model):
    x = images(2, 3, 40, 56)
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, model.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert torch.equal(last, model.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 20, 28), (2, 64, 10, 14), (2, 128, 5, 7), (2, 160, 3, 4)]
    _, channels_last = model.forward_intermediates(x, output_fmt='NHWC')
    assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(maps, channels_last))
    for indices, expected in ((2, [2, 3]), ([0, 2], [0, 2]), ([-1], [3]), (None, [0, 1, 2, 3])):
        _, some = model.forward_intermediates(x, indices=indices)
        assert all(torch.equal(a, maps[i]) for a, i in zip(some, expected, strict=True))
    _, normed = model.forward_intermediates(x, norm=True)
    assert all(torch.equal(a, b) for a, b in zip([*maps[:-1], last], normed, strict=True))
    assert torch.equal(last, maps[-1]) == isinstance(model.norm, nn.Identity)
    assert torch.equal(model(x), model.forward_head(last))


@pytest.mark.parametrize('stop_early, runs', [(True, 2), (False, 4)])
@pytest.mark.parametrize('backbone', FAMILIES)
def test_stop_early(backbone: str, stop_early: bool, runs: int):
    model, calls = create(backbone), []
    for stage in model.stages:
        stage.register_forward_hook(lambda *args: calls.append(1))
    x = images(1, 3, 32, 32)
    last, maps = model.forward_intermediates(x, indices=[0, 1], stop_early=stop_early)
    assert len(calls) == runs and len(maps) == 2
    assert torch.equal(last, maps[-1]) == stop_early


@pytest.mark.parametrize('name, kwargs, reductions', [
    ('vvt_tiny', {}, [4, 8, 16, 32]),
    ('vvt_tiny', dict(patch_stride=2), [2, 4, 8, 16]),
    ('vvt_tiny', dict(patch_stride=1, patch_size=3), [1, 2, 4, 8]),
    ('vvt_nano', {}, [2, 4, 8, 16]),
    ('vvt_nano', dict(patch_size=7, patch_stride=4), [4, 8, 16, 32]),
    ('qna_vit_tiny', {}, [4, 8, 16, 32]),
    ('qna_vit_tiny', dict(patch_stride=1, patch_size=3), [1, 2, 4, 8]),
    ('qna_vit_nano', {}, [2, 4, 8, 16]),
    ('qna_vit_nano', dict(patch_stride=4), [4, 8, 16, 32]),
    ('xvit_pyramid_tiny', {}, [4, 8, 16, 32]),
    ('xvit_pyramid_nano', {}, [2, 4, 8, 16]),
    ('castling_pvt_v2_b0', {}, [4, 8, 16, 32]),
    ('castling_nano', {}, [2, 4, 8, 16]),
    ('gkvit_nano', {}, [4, 8, 16, 32]),
    ('gkvit_nano', dict(patch_stride=2), [2, 4, 8, 16]),
])
def test_features_only(name: str, kwargs, reductions):
    model = timm.create_model(name, features_only=True, device='meta', **kwargs)
    assert model.feature_info.reduction() == reductions
    maps = model(torch.empty(2, 3, 64, 96, device='meta'))
    for m, r, channels in zip(maps, reductions, model.feature_info.channels(), strict=True):
        assert m.shape == (2, channels, 64 // r, 96 // r)
    some = timm.create_model(name, features_only=True, out_indices=(1, 3), device='meta', **kwargs)
    assert some.feature_info.reduction() == reductions[1::2]


@pytest.mark.parametrize('feature_cls', ['list', 'getter'])
def test_features_are_the_maps(model, feature_cls: str):
    """With the norm that ends a stage, of QnA-ViT as they leave it, before they are downsampled."""
    features = build(name_of(model), features_only=True, feature_cls=feature_cls).eval()
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(('head.', 'norm.'))}
    if feature_cls == 'list':
        weights = {k.replace('stages.', 'stages_', 1): v for k, v in weights.items()}
    else:
        weights = {f'model.{k}': v for k, v in weights.items()}
    features.load_state_dict(weights)
    x = images(2, 3, 33, 47)
    expected = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features(x), expected, strict=True))


# inputs

@pytest.mark.parametrize('backbone', BACKBONES)
def test_batch_of_one(backbone: str):
    """In both modes: nothing depends on what else is in the batch."""
    model = create(backbone)
    x = images(4, 3, 40, 24)
    x[3] *= 10
    for train in (False, True):
        model.train(train)
        together = model(x)
        for i in range(4):
            torch.testing.assert_close(model(x[i:i + 1]), together[i:i + 1], **CLOSE)


@pytest.mark.parametrize('backbone', BACKBONES)
@pytest.mark.parametrize('size', [(32, 32), (64, 48), (33, 47), (1, 1), (1, 9), (7, 2), (31, 17), (48, 32)])
def test_any_size(backbone: str, size):
    model = create(backbone)
    (H, W), x = size, images(2, 3, *size)
    out = model.train()(x)
    assert out.shape == (2, 10) and torch.isfinite(out).all()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    for m in model.forward_intermediates(x, intermediates_only=True):
        H, W = -(-H // 2), -(-W // 2)
        assert m.shape[2:] == (H, W)


def test_no_size_is_remembered(model):
    """The same output before and after other sizes went through."""
    x = images(2, 3, 40, 32)
    before = model(x)
    for size in ((32, 40), (64, 64), (20, 16)):
        model(images(1, 3, *size))
    assert torch.equal(model(x), before)


def test_memory_formats(model):
    x = images(2, 3, 40, 48)
    expected = model(x)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, **CLOSE)
    torch.testing.assert_close(model(images(2, 40, 48, 3).permute(0, 3, 1, 2)).shape, expected.shape)
    strided = torch.zeros(2, 3, 80, 96)
    strided[..., ::2, ::2] = x
    torch.testing.assert_close(model(strided[..., ::2, ::2]), expected, **CLOSE)
    torch.testing.assert_close(copy.deepcopy(model).to(memory_format=torch.channels_last)(x), expected, **CLOSE)
    for batch in (1, 2):
        for m in model.forward_intermediates(x[:batch], intermediates_only=True):
            assert m.is_contiguous(memory_format=torch.channels_last)
            assert m.stride() == m.contiguous(memory_format=torch.channels_last).stride()  # at batch 1 too


@pytest.mark.parametrize('backbone', BACKBONES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(backbone: str, dtype: torch.dtype):
    model, x = create(backbone), images(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast('cpu', dtype=dtype):
        mixed = model(x)
    half = model.to(dtype)(x.to(dtype))
    size = expected.abs().max()
    for out in (mixed, half):
        assert out.dtype == dtype and torch.isfinite(out).all()
        assert (out.float() - expected).abs().max() < (.1 if dtype == torch.bfloat16 else .02) * size


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('backbone', FAMILIES)
def test_dtype_change_after_forward(backbone: str, dtype: torch.dtype):
    """No table of the first dtype stays behind."""
    model, x = create(backbone), images(2, 3, 40, 32)
    expected = model(x)
    out = model.to(dtype)(x.to(dtype))
    fresh = create(backbone).to(dtype)(x.to(dtype))
    assert out.dtype == dtype and torch.equal(out, fresh)
    torch.testing.assert_close(model.float()(x), expected, rtol=.05, atol=.1)


@pytest.mark.parametrize('kwargs', [dict(dtype=torch.bfloat16), dict(dtype=torch.float64), dict(device='meta')])
@pytest.mark.parametrize('backbone', FAMILIES)
def test_created_on_device_and_dtype(backbone: str, kwargs):
    model = timm.create_model(backbone, **kwargs)
    assert {p.dtype for p in model.parameters()} == {kwargs.get('dtype', torch.float32)}
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {kwargs.get('device', 'cpu')}


# classifier

@pytest.mark.parametrize('backbone, std', [
    ('vvt_nano', .02), ('qna_vit_nano', 160 ** -.5), ('xvit_pyramid_nano', .02), ('castling_nano', .02),
    ('gkvit_nano', .02)])
def test_reset_classifier(backbone: str, std: float):
    model = create(backbone, num_classes=7, global_pool='').to(torch.bfloat16)
    x = images(2, 3, 32, 32).bfloat16()
    model.reset_classifier(0)
    assert model.global_pool == '' and model.num_classes == 0 and model(x).shape == (2, 160, 2, 2)
    model.reset_classifier(0, 'avg')
    assert model.global_pool == 'avg' and model(x).shape == (2, 160)
    model.reset_classifier(5)
    assert model.global_pool == 'avg' and model.num_classes == 5
    assert model.head.weight.dtype == torch.bfloat16 and model(x).shape == (2, 5)
    model.float().reset_classifier(50)
    assert model.head.weight.std().item() == pytest.approx(std, rel=.05) and not model.head.bias.any()


@pytest.mark.parametrize('train', [True, False])
def test_reset_classifier_keeps_mode(train: bool):
    model = create().train(train)
    modes = {name: m.training for name, m in model.named_modules()}
    for classes in (0, 4, 0, 3):
        model.reset_classifier(classes)
        assert {name: m.training for name, m in model.named_modules()} == modes


def test_reset_classifier_keeps_frozen():
    """A frozen backbone stays frozen, the new head can learn."""
    model = create()
    model.requires_grad_(False)
    model.reset_classifier(3)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable <= {'head.weight', 'head.bias'}


def test_reset_classifier_on_meta():
    model = timm.create_model('vvt_nano', device='meta')
    model.reset_classifier(0)
    model.reset_classifier(6)
    assert model.head.weight.device.type == 'meta'


def test_no_classes(model):
    """At creation as by a reset; pooled features, or none with an empty global_pool."""
    reset = copy.deepcopy(model)
    reset.reset_classifier(0)
    created = build(name_of(model), num_classes=0).eval()
    assert list(created.state_dict()) == list(reset.state_dict())
    created.load_state_dict(reset.state_dict())
    x = images(2, 3, 32, 48)
    assert torch.equal(created(x), reset(x)) and created(x).shape == (2, 160)
    assert torch.equal(created(x), model.forward_head(model.forward_features(x), pre_logits=True))
    assert type(created.get_classifier()) is type(reset.get_classifier()) is nn.Identity
    assert created.num_classes == reset.num_classes == 0 and created.global_pool == reset.global_pool == 'avg'


# init_weights

@pytest.mark.parametrize('backbone', BACKBONES)
def test_init_weights_after_to_empty(backbone: str):
    torch.manual_seed(0)
    expected = build(backbone)
    model = build(backbone, device='meta').to_empty(device='cpu')
    for p in model.parameters():
        p.data.fill_(float('nan'))
    model.init_weights(needs_reset=True)
    for (name, a), b in zip(model.named_parameters(), expected.parameters()):
        assert torch.isfinite(a).all(), name
        if a.numel() > 1 and b.std() > 0:
            assert a.std().item() == pytest.approx(b.std().item(), rel=10 / a.numel() ** .5), name
        else:
            assert torch.equal(a, b), name
    assert torch.isfinite(model.eval()(images(1, 3, 32, 32))).all()


@pytest.mark.parametrize('copier', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(model, copier):
    other = copier(model)
    x = images(2, 3, 32, 32)
    assert torch.equal(other(x), model(x))
    assert all(a is not b for a, b in zip(other.parameters(), model.parameters()))


def test_functional_call_and_vmap_free_state(model):
    """Nothing hidden: the parameters are the whole state."""
    x = images(1, 3, 32, 32)
    other = create(name_of(model), seed=5)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    out = torch.func.functional_call(other, dict(model.named_parameters()), (x,))
    assert torch.equal(out, model(x))


def test_data_config(model):
    model = timm.create_model(name_of(model))
    config = resolve_data_config({}, model=model)
    assert config['input_size'] == ((3, 224, 224) if name_of(model) in SIZES else (3, 32, 32))
    shape = model.forward_features(torch.zeros(1, *config['input_size'])).shape
    assert shape[2:] == model.pretrained_cfg['pool_size']


@pytest.mark.parametrize('backbone', FAMILIES)
def test_creation_is_quiet(caplog, capsys, backbone: str):
    with caplog.at_level(logging.WARNING):
        timm.create_model(backbone)
    assert not caplog.records and capsys.readouterr() == ('', '')
