"""`optimize_for_inference`: the same function, whatever the weights, and nothing left of what it folds."""
import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from timm.models.mvitv2 import MultiScaleVitCfg
from torch import nn

import vitlinear
from vitlinear import optimize_for_inference
from vitlinear.inference import onednn as onednn_operators
from vitlinear.inference import row_block_bytes
from vitlinear.inference.onednn import PackedConv2d, PackedLinear
from vitlinear.inference.optimize import STEPS
from vitlinear.layers import QnAAttention
from vitlinear.layers.qna import FoldedQnAAttention

STAGES = dict(embed_dims=(16, 24), depths=(1, 2), num_heads=(2, 3), mlp_ratios=2., patch_size=3, patch_stride=2)
FLAT = dict(img_size=32, patch_size=4, embed_dim=24, depth=2, num_heads=2, init_values=.5)
LEVIT = dict(
    img_size=32, embed_dim=(16, 24), stem_widths=(8, 16), stem_strides=(2, 2), key_dim=4, num_heads=(2, 3),
    depth=(1, 1))
DEIT = dict(img_size=32, patch_size=8, embed_dim=24, num_heads=3, depth=2)
QNA = dict(
    img_size=32, embed_dims=(16, 32), depths=(1, 2), window_depths=(0, 1), num_heads=(2, 4), window_heads=(1, 2),
    mlp_ratios=2.)

# a small model of each family, and of each option that has a part in what is folded
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    'vvt': ('vvt_nano', STAGES),
    'vvt product': ('vvt_nano', dict(STAGES, attn_kwargs=dict(locality='2d_product', clamp=False))),
    'xvit': ('xvit_tiny', FLAT),
    'xvit avg': ('xvit_tiny', dict(FLAT, global_pool='avg', pos_embed='fourier', lpi_convs=1, attn_dim=16)),
    'xvit class': ('xvit_tiny', dict(FLAT, pos_embed='none', qkv_bias=False, attn_layer='random_walk')),
    'xvit vicinity': ('xvit_tiny', dict(FLAT, attn_layer='vicinity')),
    'xvit qna': ('xvit_tiny', dict(FLAT, attn_layer='qna')),
    'xvit_pyramid': ('xvit_pyramid_nano', dict(STAGES, attn_ratio=.5)),
    'xvit_pyramid value': ('xvit_pyramid_nano', dict(STAGES, attn_kwargs=dict(attn_ratio=.5, kv_axis='value'))),
    'castling nano': ('castling_nano', dict(STAGES, patch_size=5)),
    'castling pvt': ('castling_pvt_v2_b0', dict(STAGES, img_size=32, softmax_below=64, attn_kwargs=dict(conv='2d'))),
    'castling levit': ('castling_levit_128s', dict(LEVIT, distilled=False)),
    'castling levit distilled': ('castling_levit_128s', LEVIT),
    'castling levit 2d': ('castling_levit_128s', dict(LEVIT, qk_width='key', attn_kwargs=dict(conv='2d'))),
    'castling mvitv2': ('castling_mvitv2_tiny', dict(
        img_size=32, model_cfg=MultiScaleVitCfg(depths=(1, 1), embed_dim=8, num_heads=1))),
    'castling deit': ('castling_deit_tiny_patch16_224', dict(DEIT, init_values=.5)),
    'castling deit distilled': ('castling_deit_tiny_distilled_patch16_224', DEIT),
    'qna': ('qna_vit_nano', QNA),
    'qna avg': ('qna_vit_nano', dict(QNA, attn_kwargs=dict(attn_scale='avg', qkv_bias=True, proj_bias=True))),
    'qna 5x5': ('qna_vit_nano', dict(QNA, kernel_size=5, attn_kwargs=dict(attn_scale='none'))),
    'gkvit': ('gkvit_nano', STAGES),
    'gkvit walk': ('gkvit_nano', dict(STAGES, attn_kwargs=dict(mode='walk'))),
    'gkvit one step': ('gkvit_nano', dict(STAGES, attn_kwargs=dict(init_beta=0.))),
    'mixed': ('vvt_nano', dict(STAGES, attn_layer=('window', 'linear'))),
    'timm levit': ('levit_128s', dict(img_size=32, embed_dim=(16, 24), key_dim=4, num_heads=(2, 3), depth=(1, 1))),
    'timm vit': ('vit_tiny_patch16_224', dict(img_size=32, patch_size=8, embed_dim=24, depth=2, init_values=.5)),
    'timm resnet': ('resnet10t', {}),
    'timm repvgg': ('test_efficientnet', {}),
}
FIXED = ['castling deit', 'castling deit distilled', 'timm levit', 'timm vit']
OURS = [name for name in MODELS if not name.startswith('timm')]


def build(name: str, **kwargs: Any) -> nn.Module:
    variant, small = MODELS[name]
    return timm.create_model(variant, **{'num_classes': 5, **small, **kwargs})


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights under which no norm, scale, table or statistic is what a fold could overlook."""
    g = torch.Generator().manual_seed(seed)

    def near_one(p: torch.Tensor) -> torch.Tensor:
        return (.5 + torch.rand(p.shape, generator=g)).to(p.dtype)

    with torch.no_grad():
        for m in model.modules():
            is_norm = isinstance(m, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d))
            for name, p in m.named_parameters(recurse=False):
                if p.ndim == 1 and ((is_norm and name == 'weight') or 'gamma' in name):
                    p.copy_(near_one(p))
                elif p.ndim == 1:
                    p.copy_(torch.randn(p.shape, generator=g) * .3)
                else:
                    p.copy_(torch.randn(p.shape, generator=g) * p[0].numel() ** -.5)
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) * .5)
                m.running_var.copy_(near_one(m.running_var))
    return model.eval()


def create(name: str, **kwargs: Any) -> nn.Module:
    return randomize(build(name, **kwargs))


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batches(name: str) -> list[torch.Tensor]:
    shapes = [(2, 3, 32, 32), (1, 3, 32, 32)] if name in FIXED else [(2, 3, 32, 32), (1, 3, 48, 37), (1, 3, 32, 32)]
    return [images(*shape) for shape in shapes]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the norm."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Logits, features and maps."""
    out = [model(x), model.forward_features(x)]
    if hasattr(model, 'forward_intermediates'):
        out += model.forward_intermediates(x, intermediates_only=True)
    return [t for item in out for t in (item if isinstance(item, (tuple, list)) else [item])]


@pytest.fixture
def onednn(monkeypatch):
    """Packed weights also in products as small as these."""
    monkeypatch.setattr(onednn_operators, 'MIN_MULTIPLICATIONS', 0)


# the same function

@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('name', MODELS)
def test_float64(name: str, grad: bool):
    """With and without autograd, which take different ways through a model."""
    model = create(name).double()
    optimized = optimize_for_inference(model)
    assert optimized is not model and not any(p.requires_grad for p in optimized.parameters())
    with torch.set_grad_enabled(grad):
        for x in batches(name):
            actual, expected = outputs(optimized, x), outputs(model, x)
            assert len(actual) == len(expected) >= 2
            assert max(map(error, actual, expected)) <= 1e-10


@pytest.mark.parametrize('name', MODELS)
def test_float32(name: str, onednn):
    """No further from the truth than the model itself, of which there are many roundings."""
    model = create(name)
    truth, optimized = copy.deepcopy(model).double(), optimize_for_inference(model)
    with torch.no_grad():
        for x in batches(name):
            expected = outputs(truth, x)
            for a, b, c in zip(outputs(optimized, x.float()), outputs(model, x.float()), expected):
                assert error(a, c) <= max(2e-6, 3. * error(b, c))


@pytest.mark.parametrize('name', MODELS)
def test_bfloat16(name: str):
    """On the whole no further from the truth than the model itself; each weight that is folded rounds once more."""
    model = create(name).to(torch.bfloat16)
    truth, optimized = copy.deepcopy(model).double(), optimize_for_inference(model)
    ours, before = [], []
    with torch.no_grad():
        for x in batches(name):
            x = x.to(torch.bfloat16)
            expected = outputs(truth, x.double())
            ours += map(error, outputs(optimized, x), expected)
            before += map(error, outputs(model, x), expected)
    assert sum(ours) <= 1.4 * sum(before)
    # not output by output: at a clamp of magnitudes one rounding may decide a sign, in either of them
    assert max(ours) <= 2. * max(before) + 5e-3


@pytest.mark.parametrize('name', ['qna', 'castling levit', 'gkvit', 'xvit'])
def test_autocast(name: str):
    model = create(name)
    optimized, x = optimize_for_inference(model), images(2, 3, 32, 32).float()
    with torch.no_grad():
        expected = model(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert error(optimized(x), expected) <= 1.5 * error(model(x), expected) + 1e-3


@pytest.mark.parametrize('name', ['xvit', 'castling levit', 'qna'])
@pytest.mark.parametrize('step', [s for s in STEPS if s != 'castling'])
def test_each_step(name: str, step: str, onednn):
    model, x = create(name), images(2, 3, 32, 32).float()
    optimized = optimize_for_inference(model, steps=[step])
    assert [s for s, _ in optimized.optimized] == [step]
    with torch.no_grad():
        assert error(optimized(x), model(x)) <= 1e-5
    if step == 'layer_scale' and name == 'xvit':
        assert optimized.optimized == (('layer_scale', 2 * 3 + 2 * 2),)


@pytest.mark.parametrize('name', ['vvt', 'castling levit', 'xvit_pyramid', 'qna', 'gkvit'])
def test_features_only(name: str):
    model = randomize(build(name, features_only=True, out_indices=(0, 1))).double()
    optimized, x = optimize_for_inference(model), images(1, 3, 40, 32)
    with torch.no_grad():
        for actual, expected in zip(optimized(x), model(x)):
            assert error(actual, expected) <= 1e-10


def test_large_maps(onednn, monkeypatch):
    """Bands of rows, at sizes where each mechanism takes them, and more of them in the MLP."""
    for name in ('vvt', 'qna', 'gkvit', 'xvit_pyramid', 'castling levit'):
        model, x = create(name), images(1, 3, 150, 140).float()
        optimized = optimize_for_inference(model)
        with torch.no_grad(), row_block_bytes(2 ** 15):
            assert error(optimized(x), model(x)) <= 1e-5, name
            half, x = copy.deepcopy(model).to(torch.bfloat16), x.to(torch.bfloat16)
            expected = copy.deepcopy(half).double()(x.double())
            assert error(optimize_for_inference(half)(x), expected) <= 2. * error(half(x), expected), name


# nothing left

def test_what_is_folded():
    """No batch norm, scale, temperature or query remains where there is a place for it."""
    kinds = {name: {type(m) for m in optimize_for_inference(create(name)).modules()} for name in OURS}
    names = {
        name: set(optimize_for_inference(create(name)).state_dict()) for name in ('xvit_pyramid', 'gkvit walk', 'qna')}
    for name in ('castling levit', 'castling levit distilled', 'xvit avg'):
        assert not kinds[name] & {nn.BatchNorm1d, nn.BatchNorm2d}, name
    for name in ('xvit', 'xvit class', 'xvit qna', 'castling deit'):
        assert timm.layers.LayerScale not in kinds[name], name
    for name in ('xvit vicinity', 'xvit avg'):  # a gate, and an activation, come last
        assert timm.layers.LayerScale in kinds[name], name
    assert QnAAttention not in kinds['qna'] and FoldedQnAAttention in kinds['qna']
    assert not any('gamma' in k for k in names['xvit_pyramid'])
    assert not any('theta' in k or 'log_temperature' in k for k in names['gkvit walk'])
    assert not any('query' in k for k in names['qna'])
    for name in OURS:
        assert not kinds[name] & {nn.Linear, nn.Conv2d} or 'castling' in name or name == 'xvit vicinity', name
        assert PackedLinear in kinds[name] and PackedConv2d in kinds[name], name


def test_report_and_twice():
    model, x = create('castling levit').double(), images(1, 3, 32, 32)
    once = optimize_for_inference(model)
    assert [name for name, _ in once.optimized] == list(STEPS)
    counts = dict(once.optimized)
    assert counts['fuse'] > 10 and counts['castling'] == counts['layer_scale'] == 0
    twice = optimize_for_inference(once)
    assert twice.optimized == once.optimized
    with torch.no_grad():
        torch.testing.assert_close(twice(x), once(x), rtol=0., atol=0.)
    rest = optimize_for_inference(optimize_for_inference(model.float(), steps='fuse'), steps=('pack',))
    assert [name for name, _ in rest.optimized] == ['fuse', 'pack'] and dict(rest.optimized)['fuse'] == counts['fuse']
    with torch.no_grad():
        assert error(rest(x.float()), once(x)) <= 1e-5


def test_fold_after_packing(onednn):
    """Packed weights follow when their layer is folded later."""
    model, x = create('xvit'), images(1, 3, 32, 32).float()
    packed = optimize_for_inference(model, steps=['pack'])
    with torch.no_grad():
        expected = packed(x)
        folded = optimize_for_inference(packed, steps=['layer_scale', 'fuse'], inplace=True)
        assert folded is packed
        assert error(folded(x), expected) <= 1e-5 and dict(folded.optimized)['layer_scale'] == 10


# the model itself, and the way back

def test_model_is_left_alone():
    model = build('castling levit').train()
    state = copy.deepcopy(model.state_dict())
    optimize_for_inference(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert optimize_for_inference(model, inplace=True) is model and not model.training


@pytest.mark.parametrize('name', ['vvt', 'castling levit'])
def test_no_training_no_checkpoints(name: str):
    model = create(name, drop_rate=.5)
    optimized, x = optimize_for_inference(model), images(2, 3, 32, 32).float()
    assert not any(m.training for m in optimized.modules())
    assert not any(p.requires_grad for p in optimized.parameters())
    with pytest.raises(RuntimeError, match='load the checkpoint and call optimize_for_inference'):
        optimized.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match='load the checkpoint and call optimize_for_inference'):
        nn.Sequential(optimized).load_state_dict({f'0.{k}': v for k, v in model.state_dict().items()})
    fresh = build(name)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(optimize_for_inference(fresh)(x), optimized(x))


def test_layers_in_training_mode():
    """Dropouts have nothing left to do."""
    model = create('xvit', drop_rate=.5, proj_drop_rate=.5, drop_path_rate=.5, pos_drop_rate=.5)
    optimized, x = optimize_for_inference(model), images(2, 3, 32, 32).float()
    with torch.no_grad():
        for m in optimized.modules():
            if not isinstance(m, nn.BatchNorm2d):
                m.training = True
        assert error(optimized(x), model(x)) <= 1e-5


@pytest.mark.parametrize('name', ['qna', 'gkvit', 'castling levit'])
def test_copies_and_conversions(name: str, onednn):
    """Packed weights are neither copied nor stored, and follow their layer to another type."""
    model, x = create(name), images(1, 3, 32, 32).float()
    optimized = optimize_for_inference(model)
    with torch.no_grad():
        expected = optimized(x)
        assert torch.equal(copy.deepcopy(optimized)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(optimized))(x), expected)
        half = copy.deepcopy(optimized).to(torch.bfloat16)
        assert error(half(x.to(torch.bfloat16)), expected) <= .05
        assert error(half.float()(x), expected) <= .05  # with what is left of the weights
        stored = io.BytesIO()
        torch.save(optimized.state_dict(), stored)
        assert len(stored.getvalue()) < 4.5 * sum(v.numel() for v in optimized.state_dict().values()) + 2e5


def test_reset_classifier():
    optimized = optimize_for_inference(create('vvt'))
    optimized.reset_classifier(7)
    assert optimized(images(1, 3, 32, 32).float()).shape == (1, 7)


# exporters

@pytest.mark.parametrize('name', ['vvt', 'xvit', 'xvit avg', 'xvit_pyramid', 'castling levit', 'castling deit', 'qna',
                                  'gkvit'])
def test_torchscript(name: str):
    optimized, x = optimize_for_inference(create(name)), images(2, 3, 32, 32).float()
    scripted = torch.jit.script(optimized)
    with torch.no_grad():
        assert error(scripted(x), optimized(x)) <= 1e-5


@pytest.mark.parametrize('name', ['xvit', 'castling levit', 'qna', 'gkvit'])
def test_export(name: str):
    optimized, x = optimize_for_inference(create(name)), images(1, 3, 32, 32).float()
    with torch.no_grad():
        exported = torch.export.export(optimized, (x,)).module()
        assert error(exported(x), optimized(x)) <= 1e-5


def test_compile():
    """Without a code generator: what is traced is what counts."""
    torch._dynamo.reset()  # another size seen before would make this one symbolic
    optimized, x = optimize_for_inference(create('qna')), images(1, 3, 32, 32).float()
    with torch.no_grad():
        assert error(torch.compile(optimized, backend='eager', fullgraph=True)(x), optimized(x)) <= 1e-5


@pytest.mark.parametrize('name', ['qna', 'vvt'])
def test_feature_extractor(name: str):
    """torch.fx."""
    optimized, x = optimize_for_inference(create(name)), images(1, 3, 32, 32).float()
    with torch.no_grad():
        extracted = create_feature_extractor(optimized, {'stages': 'map'})(x)['map']
        expected = optimized.stages(optimized.patch_embed(x))
        assert error(extracted, expected) <= 1e-5


# tables that any model remembers


@pytest.mark.parametrize('name, change', [
    ('xvit', lambda model: model.pos_embed),
    ('xvit avg', lambda model: model.pos_fourier.proj.weight),
])
def test_tables_of_positions(name: str, change: Callable[[nn.Module], torch.Tensor]):
    """Remembered for a size of the map, until the weights change."""
    model, x = create(name).double(), images(1, 3, 48, 37)
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)
        assert error(copy.deepcopy(model)(x), first) == 0.
        change(model).mul_(2.)
        assert error(model(x), first) > 1e-3
        assert torch.equal(model(x), copy.deepcopy(model)(x))


# auxiliary branches

def test_castling_branch():
    low = dict(aux_mode='train', aux_threshold=.001, aux_kappa=0.)
    model, x = create('castling levit', attn_kwargs=low), images(2, 3, 32, 32).float()
    with pytest.raises(ValueError, match='sample=None, but 3 layers'):
        optimize_for_inference(model)
    with pytest.raises(ValueError, match='an output changes by'):
        optimize_for_inference(model, sample=x)
    assert model.castling_layers()['stages.0.blocks.0.attn'].aux.mode == 'train' and not hasattr(model, 'optimized')
    model.set_castling(ramp=1.)
    optimized = optimize_for_inference(model, sample=x)
    assert dict(optimized.optimized)['castling'] == 3
    assert {layer.aux.mode for layer in optimized.castling_layers().values()} == {'off'}
    with torch.no_grad():
        assert error(optimized(x), model(x)) <= 1e-5


def test_castling_schedule():
    model, x = create('castling nano', castling_steps=2), images(2, 3, 32, 32).float()
    optimized = optimize_for_inference(model, sample=x, tol=1e3)
    assert 'castling_step' not in optimized.state_dict() and 'castling_step' in model.state_dict()


def test_castling_branch_of_other_models():
    kwargs = dict(attn_layer='linear_angular', attn_kwargs=dict(aux_mode='train'))
    model, x = create('vvt', **kwargs), images(1, 3, 32, 32).float()
    optimized = optimize_for_inference(model, sample=x)
    with torch.no_grad():
        assert error(optimized(x), model(x)) <= 1e-5
    kwargs['attn_kwargs'] = dict(aux_mode='always')
    with pytest.raises(ValueError, match="aux_mode='always'"):
        optimize_for_inference(create('vvt', **kwargs), sample=x)


# what it does not take

def _compiled() -> nn.Module:
    return torch.compile(build('vvt'), backend='eager')


def _quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')
@pytest.mark.parametrize('make, message', [
    (lambda: 'vvt_nano', 'must be a torch.nn.Module, not str'),
    (lambda: torch.jit.script(nn.Linear(2, 2)), 'TorchScript'),
    (_compiled, 'torch.compile'),
    (_quantized, 'quantise'),
])
def test_refused(make: Callable[[], Any], message: str):
    with pytest.raises(TypeError, match=message):
        optimize_for_inference(make())


def test_unknown_step():
    with pytest.raises(ValueError, match="Unknown step 'prune', expected some of castling, fuse, layer_scale"):
        optimize_for_inference(build('vvt'), steps=('fuse', 'prune'))


def test_hooks_are_kept():
    """A layer that someone listens to is left as it is."""
    model, x, seen = create('xvit'), images(1, 3, 32, 32).float(), []
    model.blocks[0].ls1.register_forward_hook(lambda m, args, out: seen.append(out))
    optimized = optimize_for_inference(model)
    with torch.no_grad():
        assert error(optimized(x), model(x)) <= 1e-5
    assert len(seen) == 2 and dict(optimized.optimized)['layer_scale'] == 9


def test_import_is_lazy():
    code = ('import sys, vitlinear; name = "vitlinear.inference.optimize"; assert name not in sys.modules; '
            'assert callable(vitlinear.optimize_for_inference) and name in sys.modules')
    subprocess.run([sys.executable, '-c', code], check=True, timeout=300)
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        vitlinear.optimise  # noqa: B018
