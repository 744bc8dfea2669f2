"""QnA-ViT against numbers from the authors' code, and their checkpoints and ours by name and shape."""
import copy
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import vitlinear  # noqa: F401
from _golden import qna_cases, qna_part, qna_state_shapes, qna_tensors
from _numerics import assert_close
from _qna import SMALL, VARIANTS, default, flax_shapes, golden_model, images, randomize
from vitlinear.layers.qna_block import QnADownsample, SamePatchEmbed
from vitlinear.layers.window import resize_relative_position_bias_table
from vitlinear.models.qna_vit import QnAVisionTransformer, _from_flax, checkpoint_filter_fn, infer_variant

MODELS = [name for name, case in qna_cases().items() if case['kind'] == 'model']
LAYER = dict(rtol=1e-4, atol=2e-5)
MODEL = dict(rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize('variant', VARIANTS)
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
