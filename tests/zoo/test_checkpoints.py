"""Loading checkpoints: the authors' files as they are, our own, the bundled ones, and files that are no such thing."""
import argparse
import hashlib
import json
import logging
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from _golden import to_authors
from vitlinear.models.vvt import checkpoint_filter_fn

# vvt_tiny, made small
SMALL = dict(embed_dims=(8, 16, 20, 32), depths=(1, 2, 1, 1), num_heads=(1, 2, 5, 4), mlp_ratios=2.)
IMAGES = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))


def create(file=None, **kwargs) -> torch.nn.Module:
    overlay = {} if file is None else dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    return timm.create_model('vvt_tiny', **{**SMALL, **overlay, **kwargs}).eval()


@pytest.fixture(scope='module')
def source() -> torch.nn.Module:
    """A model with weights that no initialisation gives."""
    torch.manual_seed(0)
    model = create()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.1)
    return model


@pytest.fixture(scope='module')
def authors(source) -> dict:
    return {k: v.detach().clone() for k, v in to_authors(source.state_dict()).items()}


def same_weights(a: torch.nn.Module, b: torch.nn.Module, but: str = 'no such name') -> bool:
    a, b = ({k: v for k, v in m.state_dict().items() if not k.startswith(but)} for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def containers(authors: dict) -> dict:
    module = {f'module.{k}': v for k, v in authors.items()}
    optimizer = dict(state={0: dict(step=torch.tensor(3.), exp_avg=torch.zeros(3))}, param_groups=[dict(lr=1e-3)])
    training = dict(
        model=authors, optimizer=optimizer, lr_scheduler=dict(last_epoch=299), epoch=299, scaler=dict(scale=65536.),
        args=argparse.Namespace(model='vvt_tiny', lr=5e-4, data_path='data', drop=0., output_dir=None))
    return {
        'bare': authors,
        'model': dict(model=authors),
        'model, module.': dict(model=module),
        'module.': module,
        'state_dict, module.': dict(state_dict=module),
        'training': training,
    }


@pytest.mark.parametrize(
    'container', ['bare', 'model', 'model, module.', 'module.', 'state_dict, module.', 'training'])
def test_authors_file(source, authors, tmp_path, container: str):
    path = tmp_path / 'checkpoint.pth'
    torch.save(containers(authors)[container], path)
    model = create(path)
    assert same_weights(model, source)
    assert torch.equal(model(IMAGES), source(IMAGES))
    assert 'state_dict' not in model.pretrained_cfg or not model.pretrained_cfg['state_dict']  # no second copy


@pytest.mark.parametrize('container', ['bare', 'model', 'model, module.', 'module.', 'state_dict, module.'])
def test_filter_unwraps(source, authors, container: str):
    """The filter by itself, as `timm.models.load_checkpoint` calls it."""
    loaded = checkpoint_filter_fn(containers(authors)[container], source)
    assert all(torch.equal(loaded[k], v) for k, v in source.state_dict().items())
    assert loaded.keys() == source.state_dict().keys()


def test_authors_file_through_timm_helpers(source, authors, tmp_path):
    """`--initial-checkpoint` of timm's scripts."""
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(model=authors), path)
    model = create()
    timm.models.load_checkpoint(model, str(path), filter_fn=checkpoint_filter_fn)
    assert same_weights(model, source)


def test_safetensors_file(source, authors, tmp_path):
    for name, state in (('authors', authors), ('ours', source.state_dict())):
        path = tmp_path / f'{name}.safetensors'
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        assert same_weights(create(path), source)


def test_other_number_of_classes_asked_for(source, authors, tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save(authors, path)
    model = create(path, num_classes=7)
    assert model.head.weight.shape == (7, 32) and same_weights(model, source, but='head.')
    assert model.head.weight.std() < .05


@pytest.mark.parametrize('file_classes, classes', [(100, None), (100, 7)])
def test_other_number_of_classes_in_the_file(source, authors, tmp_path, caplog, file_classes: int, classes):
    """Everything but the head is loaded, with a warning that says so."""
    path = tmp_path / 'checkpoint.pth'
    head = {'head.weight': torch.ones(file_classes, 32), 'head.bias': torch.ones(file_classes)}
    torch.save(dict(model={**authors, **head}), path)
    with caplog.at_level(logging.WARNING, 'vitlinear'):
        model = create(path, num_classes=classes)
    assert model.head.weight.shape == (classes or 1000, 32) and same_weights(model, source, but='head.')
    assert model.head.weight.std() < .05
    text = caplog.text
    assert 'head' in text and str(file_classes) in text and str(classes or 1000) in text


def test_matching_head_of_other_classes(source, authors, tmp_path):
    """A fine-tuned file and a model of its class count: the overlay says the count, the head is loaded."""
    path = tmp_path / 'checkpoint.pth'
    head = {'head.weight': torch.rand(7, 32), 'head.bias': torch.rand(7)}
    torch.save(dict(model={**authors, **head}), path)
    model = timm.create_model(
        'vvt_tiny', pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=7), **SMALL)
    assert torch.equal(model.head.weight, head['head.weight']) and torch.equal(model.head.bias, head['head.bias'])


def test_no_classes(source, authors, tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(model=authors), path)
    model = create(path, num_classes=0)
    assert torch.equal(model(IMAGES), source.forward_head(source.forward_features(IMAGES), pre_logits=True))


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 2)])
def test_features_only(source, authors, tmp_path, out_indices):
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(model=authors), path)
    model = create(path, features_only=True, out_indices=out_indices)
    expected = source.forward_intermediates(IMAGES, indices=list(out_indices), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model(IMAGES), expected, strict=True))


@pytest.mark.parametrize('in_chans', [1, 6])
def test_other_number_of_channels(source, authors, tmp_path, in_chans: int):
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(model=authors), path)
    model = create(path, in_chans=in_chans)
    assert same_weights(model, source, but='patch_embed.proj.weight')
    # timm: one channel takes the sum of the kernels; n times as many repeat them, rescaled
    grey = torch.randn(2, 1, 40, 40)
    torch.testing.assert_close(model(grey.expand(-1, in_chans, -1, -1)), source(grey.expand(-1, 3, -1, -1)))


# our own checkpoints

@pytest.mark.parametrize('num_classes', [1000, 0])
def test_native_is_left_alone(num_classes: int):
    model = create(num_classes=num_classes)
    state = model.state_dict()
    filtered = checkpoint_filter_fn(state, model)
    assert list(filtered) == list(state) and all(filtered[k] is state[k] for k in state)


def test_headless_native_into_a_classifier():
    """timm's suite asks that a state dict without head passes unchanged."""
    state = create(num_classes=0).state_dict()
    filtered = checkpoint_filter_fn(state, create())
    assert list(filtered) == list(state) and all(filtered[k] is state[k] for k in state)


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=3), dict(num_classes=0), dict(in_chans=1)])
def test_native_file(source, tmp_path, kwargs):
    path = tmp_path / 'checkpoint.pth.tar'
    torch.save(dict(state_dict=source.state_dict(), epoch=3, arch='vvt_tiny'), path)
    model = create(path, **kwargs)
    assert same_weights(model, source, but=('head.', 'patch_embed.proj.weight'))
    assert same_weights(model, source) == (not kwargs)


def test_checkpoint_path_of_create_model(source, tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save(source.state_dict(), path)
    assert same_weights(create(checkpoint_path=str(path)), source)


# files that cannot be loaded

def refuses(path, error=ValueError, **kwargs) -> str:
    with pytest.raises(error) as e:
        create(path, **kwargs)
    return str(e.value)


def test_missing_file(tmp_path):
    path = tmp_path / 'nowhere.pth'
    assert str(path) in refuses(path, FileNotFoundError)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('fraction', [.5, .01, 0.])
def test_truncated_file(authors, tmp_path, suffix: str, fraction: float):
    path = tmp_path / f'checkpoint.{suffix}'
    torch.save(authors, path) if suffix == 'pth' else save_file(authors, path)
    content = path.read_bytes()
    path.write_bytes(content[:int(fraction * len(content))])
    message = refuses(path)
    assert str(path) in message and 'truncated' in message


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('content', [b'', b'hello, world\n', b'<!DOCTYPE html><html>not found</html>', b'\x80\x02'])
def test_not_a_checkpoint(tmp_path, suffix: str, content: bytes):
    path = tmp_path / f'checkpoint.{suffix}'
    path.write_bytes(content)
    message = refuses(path)
    assert str(path) in message and 'no readable checkpoint' in message


@pytest.mark.parametrize('content', [{}, [1, 2], 3, dict(epoch=3), dict(model={}), 'text', torch.zeros(3), None])
def test_no_state_dict(tmp_path, content):
    path = tmp_path / 'checkpoint.pth'
    torch.save(content, path)
    assert str(path) in refuses(path)


class Payload:
    """Runs code when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize('writer', ['torch', 'torch legacy', 'pickle'])
def test_code_in_a_file_does_not_run(authors, tmp_path, writer: str):
    evidence, path = tmp_path / 'evidence', tmp_path / 'checkpoint.pth'
    content = dict(model=authors, args=Payload(evidence))
    if writer == 'pickle':
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == 'torch')
    message = refuses(path)
    assert not evidence.exists()
    assert str(path) in message and ('pickled Python objects' in message or 'no readable checkpoint' in message)
    if writer == 'torch':
        assert 'never run' in message and 'weights_only=False' in message


def test_another_model(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save(timm.create_model('test_resnet').state_dict(), path)
    message = refuses(path)
    assert 'VicinityVisionTransformer' in message and 'conv1' in message
    assert 'VicinityVisionTransformer' in refuses(path, num_classes=3)


@pytest.mark.parametrize('names', ['authors', 'ours'])
@pytest.mark.parametrize('change, words', [
    (dict(depths=(1, 3, 1, 1)), ['another variant', '[1, 3, 1, 1]', '[1, 2, 1, 1]']),
    (dict(depths=(1, 1, 1, 1)), ['another variant', '[1, 1, 1, 1]']),
    (dict(embed_dims=(8, 16, 20, 40)), ['another variant', '40', '32']),
    (dict(mlp_ratios=3.), ['another variant', 'mlp', '24', '16']),
    (dict(attn_kwargs=dict(fpc_reduction=4)), ['another variant', 'fpc']),
    (dict(depths=(1, 2, 1), embed_dims=(8, 16, 20), num_heads=(1, 2, 5)), ['another variant', '[1, 2, 1]']),
])
@pytest.mark.parametrize('num_classes', [None, 3])
def test_another_variant(tmp_path, names: str, change, words, num_classes):
    path = tmp_path / 'checkpoint.pth'
    state = create(**change).state_dict()
    torch.save(to_authors(state) if names == 'authors' else state, path)
    message = refuses(path, num_classes=num_classes)
    assert all(word in message for word in words), message


@pytest.mark.parametrize('num_classes', [None, 3])
@pytest.mark.parametrize('missing', [
    'block2.1.attn.k_proj.weight', 'block2.1.attn.q_proj.weight', 'block2.1.attn.v_proj.bias',
    'block3.0.mlp.fc1.weight', 'norm4.weight', 'patch_embed2.proj.bias'])
def test_incomplete(authors, tmp_path, missing: str, num_classes):
    """Also where another number of classes makes timm load without strictness."""
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(model={k: v for k, v in authors.items() if k != missing}), path)
    message = refuses(path, (ValueError, RuntimeError), num_classes=num_classes)
    assert any(name in message for name in ('_proj.', 'qkv.', 'mlp.fc1.', 'norm.', 'downsample.proj.')), message


def test_surplus(authors, tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save({**authors, 'block1.0.attn.sr.weight': torch.zeros(3)}, path)
    assert 'attn.sr.weight' in refuses(path, (ValueError, RuntimeError))


# tags and bare names

@pytest.mark.parametrize('name', ['vvt_tiny', 'vvt_small', 'vvt_medium', 'vvt_large', 'vvt_nano.untrained'])
def test_no_weights(name: str):
    with pytest.raises(ValueError) as e:
        timm.create_model(name, pretrained=True)
    message = str(e.value)
    arch = name.partition('.')[0]
    assert f"'{arch}." in message
    assert f'vitlinear train --model {arch}' in message and 'pretrained_cfg_overlay=dict(file=' in message
    for other in timm.list_pretrained(f'{arch}.*'):
        assert f"'{other}'" in message


@pytest.mark.parametrize('name', ['vvt_nano', 'vvt_tiny', 'vvt_small', 'vvt_medium', 'vvt_large'])
def test_bare_names(name: str):
    model = timm.create_model(name, device='meta')
    assert model.num_classes == 1000 and model.in_chans == 3
    assert model.get_classifier().out_features == 1000
    assert model.patch_embed.proj.in_channels == 3
    assert model.pretrained_cfg['num_classes'] == 1000 and model.pretrained_cfg['input_size'][0] == 3


@pytest.fixture
def fashion_mnist(monkeypatch) -> Path:
    monkeypatch.setattr('socket.socket.connect', lambda *args: pytest.fail('opened a connection'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    return Path(__file__).parents[2] / 'model_cards' / 'vvt_nano.fashion_mnist'


def test_card_names_its_weights(fashion_mnist):
    weights = (fashion_mnist / 'model.safetensors').read_bytes()
    assert len(weights) < 5e6
    assert hashlib.sha256(weights).hexdigest() in (fashion_mnist / 'README.md').read_text()


def test_bundled_weights(fashion_mnist):
    model = timm.create_model('vvt_nano.fashion_mnist', pretrained=True).eval()
    assert model.num_classes == 10 and model.in_chans == 1
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert 'vvt_nano.fashion_mnist' in timm.list_pretrained()

    config = json.loads((fashion_mnist / 'config.json').read_text())
    assert config['architecture'] == 'vvt_nano' and config['num_classes'] == 10
    local = timm.create_model(f'local-dir:{fashion_mnist}', pretrained=True).eval()
    assert same_weights(local, model)
    for key in ('mean', 'std', 'input_size', 'crop_pct', 'interpolation', 'num_classes'):
        actual, expected = local.pretrained_cfg[key], model.pretrained_cfg[key]
        assert (tuple(actual) if isinstance(actual, list) else actual) == expected, key


def test_bundled_weights_adapt(fashion_mnist):
    model = timm.create_model('vvt_nano.fashion_mnist', pretrained=True, num_classes=3, in_chans=3).eval()
    source = timm.create_model('vvt_nano.fashion_mnist', pretrained=True).eval()
    assert same_weights(model, source, but=('head.', 'patch_embed.proj.weight'))
    assert model(torch.randn(2, 3, 40, 40)).shape == (2, 3)
