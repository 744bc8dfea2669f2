"""Checkpoints of every kind made into folders for the Hub, and files that are no such thing."""
import argparse
import ast
import json
import pickle
import runpy
import struct
import sys
from pathlib import Path

import msgpack
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from _golden import to_authors
from vitlinear.tools import cli
from vitlinear.tools._folders import folder_problems
from vitlinear.zoo._flax import is_flax, read_flax
from vitlinear.zoo.records import read_record

QNA = Path(__file__).parents[1] / 'golden' / 'qna'
FLAX = QNA / 'golden_checkpoint.msgpack'
# the options of the model in that file, which is none of the published variants
SMALL = [
    'embed_dims=(4,8,16,32)', 'depths=(1,1,2,1)', 'window_depths=(0,0,1,1)', 'num_heads=(1,2,4,8)',
    'window_heads=(2,4,2,4)', 'kernel_size=7', 'img_size=64']


def run(capsys, *words) -> tuple:
    code = cli.main(['convert', *map(str, words)])
    return code, capsys.readouterr()


def convert(capsys, file: Path, folder: Path, *words, model: str = 'vvt_nano') -> torch.nn.Module:
    """Convert, and load what came of it."""
    code, told = run(capsys, file, '--model', model, '--output', folder, *words)
    assert code == 0, told.err
    assert folder_problems(folder) == [] and str(folder) in told.out
    assert sorted(p.name for p in folder.parent.iterdir() if p.name.startswith('.')) == []
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def refuses(capsys, file: Path, folder: Path, *words, model: str = 'vvt_nano') -> str:
    before = sorted(folder.parent.iterdir())
    code, told = run(capsys, file, '--model', model, '--output', folder, *words)
    assert code == 2 and told.err.count('\n') == 1 and told.err.startswith('vitlinear convert: error: '), told
    assert sorted(folder.parent.iterdir()) == before
    return told.err


@pytest.fixture(scope='module')
def source() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('vvt_nano', num_classes=7).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.1)
    return model


def same(model: torch.nn.Module, state_dict: dict) -> bool:
    own = model.state_dict()
    return own.keys() == state_dict.keys() and all(torch.equal(own[k], v) for k, v in state_dict.items())


# the authors' VVT, and state dicts

@pytest.mark.parametrize('kind', ['bare', 'model', 'module.', 'training', 'safetensors', 'ours', 'ours.safetensors'])
def test_state_dicts(source, capsys, tmp_path, kind: str):
    state = source.state_dict()
    authors = {k: v.clone() for k, v in to_authors(state).items()}
    file, folder = tmp_path / f'checkpoint.{kind.rpartition(".")[2] or "pth"}', tmp_path / 'vvt_nano.mine'
    if kind.endswith('safetensors'):
        save_file(state if kind.startswith('ours') else authors, file)
    else:
        training = dict(model=authors, epoch=3, optimizer=dict(state={}), args=argparse.Namespace(lr=1e-3, data='x'))
        torch.save({
            'bare': authors, 'model': dict(model=authors), 'training': training, 'ours': state,
            'module.': dict(model={f'module.{k}': v for k, v in authors.items()})}[kind], file)
    model = convert(capsys, file, folder)
    assert same(model, state) and model.num_classes == 7 and model.pretrained_cfg['tag'] == 'mine'
    config = json.loads((folder / 'config.json').read_text())
    assert config['num_classes'] == 7 and 'model_args' not in config
    record = read_record(folder)
    assert record.cfg.num_classes == 7 and record.training is None and file.name in record.provenance.trained_by
    assert record.parameters == sum(p.numel() for p in model.parameters())


def test_other_channels_and_options(capsys, tmp_path):
    options = dict(num_classes=2, in_chans=1, patch_stride=1)
    made = timm.create_model('vvt_nano', **options)
    torch.save(made.state_dict(), tmp_path / 'a.pth')
    folder, kwargs = tmp_path / 'vvt_nano.grey', ['--model-kwargs', 'patch_stride=1']
    assert '--mean and --std' in refuses(capsys, tmp_path / 'a.pth', folder, *kwargs)
    more = ['--mean', .3, '--std', .2, '--labels', 'yes', 'no', '--input-size', 1, 28, 24, '--crop-pct', .9]
    model = convert(capsys, tmp_path / 'a.pth', folder, *kwargs, *more)
    images = torch.randn(1, 1, 28, 24)
    assert same(model, made.state_dict()) and torch.equal(model(images), made.eval()(images))
    cfg = model.pretrained_cfg
    assert (tuple(cfg['input_size']), tuple(cfg['mean']), cfg['crop_pct']) == ((1, 28, 24), (.3,), .9)
    assert list(cfg['label_names']) == ['yes', 'no']
    assert 'labels' in refuses(capsys, tmp_path / 'a.pth', tmp_path / 'b', *kwargs, *more, '--labels', 'one')


def test_headless(source, capsys, tmp_path):
    state = {k: v for k, v in source.state_dict().items() if not k.startswith('head.')}
    torch.save(state, tmp_path / 'a.pth')
    model = convert(capsys, tmp_path / 'a.pth', tmp_path / 'any', '--tag', 'backbone')
    assert model.pretrained_cfg['tag'] == 'backbone'
    assert same(model, state) and model.num_classes == 0


# training runs

def training_checkpoint(path: Path, **args) -> dict:
    """As vitlinear train and timm's train.py write it."""
    states = {}
    for i, key in enumerate(('state_dict', 'state_dict_ema')):
        torch.manual_seed(i)
        states[key] = timm.create_model('vvt_nano', num_classes=5, in_chans=1).state_dict()
    settings = argparse.Namespace(**{**dict(
        model='vvt_nano', input_size=[1, 32, 32], img_size=None, in_chans=None, mean=[.286], std=[.353], crop_pct=.95,
        interpolation='bilinear', model_kwargs={}, gp=None, lr=1e-3), **args})
    torch.save(dict(epoch=2, arch='vvt_nano', optimizer={}, version=2, args=settings, **states), path)
    return states


@pytest.mark.parametrize('words, key', [
    ([], 'state_dict_ema'), (['--ema'], 'state_dict_ema'), (['--no-ema'], 'state_dict')])
def test_training_run(capsys, tmp_path, words, key: str):
    states = training_checkpoint(tmp_path / 'last.pth.tar')
    model = convert(capsys, tmp_path / 'last.pth.tar', tmp_path / 'vvt_nano.mine', *words)
    assert same(model, states[key])
    cfg = model.pretrained_cfg
    assert (cfg['num_classes'], tuple(cfg['mean'])) == (5, (.286,))
    assert (cfg['crop_pct'], cfg['interpolation']) == (.95, 'bilinear')


def test_training_run_errors(source, capsys, tmp_path):
    training_checkpoint(tmp_path / 'last.pth.tar')
    message = refuses(capsys, tmp_path / 'last.pth.tar', tmp_path / 'x', model='vvt_tiny')
    assert 'a checkpoint of vvt_nano' in message and '--model vvt_nano' in message
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    assert 'no moving average' in refuses(capsys, tmp_path / 'a.pth', tmp_path / 'x', '--ema')


# msgpack of Flax

def test_flax_bit_exact():
    """The parameters in the file are those that the authors' code was run with."""
    golden, prefix = load_file(QNA / 'golden.safetensors'), 'params:small7/'
    expected = {k[len(prefix):]: v for k, v in golden.items() if k.startswith(prefix)}
    found = read_flax(FLAX)
    assert found.keys() == expected.keys() and len(found) > 100
    assert all(v.dtype == expected[k].dtype and torch.equal(v, expected[k]) for k, v in found.items())


needs_qna = pytest.mark.skipif(not timm.is_model('qna_vit_tiny'), reason='the family is not there')


@needs_qna
def test_flax(capsys, tmp_path):
    """To a folder, and from there to the numbers of the authors' code."""
    model = convert(
        capsys, FLAX, tmp_path / 'qna_vit_tiny.golden', '--model-kwargs', *SMALL, model='qna_vit_tiny')
    golden = load_file(QNA / 'golden.safetensors')
    with torch.no_grad():
        output = model(golden['small7_64x64/input'].permute(0, 3, 1, 2))
    torch.testing.assert_close(output, golden['small7_64x64/output'], rtol=1e-4, atol=1e-4)
    assert model.num_classes == 5 and tuple(model.pretrained_cfg['input_size']) == (3, 64, 64)


@needs_qna
def test_flax_through_create_model(tmp_path):
    path = tmp_path / 'checkpoint_300'
    path.write_bytes(FLAX.read_bytes())
    kwargs = {k: ast.literal_eval(v) for k, v in (word.split('=') for word in SMALL)}
    model = timm.create_model(
        'qna_vit_tiny', pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=5), **kwargs)
    expected = read_flax(path)
    assert torch.equal(model.head.fc.bias if hasattr(model.head, 'fc') else model.head.bias,
                       expected['ClassificationHead_0/head_logits/bias'])


@needs_qna
def test_another_variant_of_qna(capsys, tmp_path):
    """Kernels of one size would be resized to another without a word, were it not for the inference of the variant."""
    state = timm.create_model('qna_vit_tiny_7x7', num_classes=2).state_dict()
    torch.save(state, tmp_path / 'a.pth')
    message = refuses(capsys, tmp_path / 'a.pth', tmp_path / 'x', model='qna_vit_tiny')
    assert 'a checkpoint of qna_vit_tiny_7x7' in message and '--model qna_vit_tiny_7x7' in message


@needs_qna
def test_nothing_is_resized(capsys, tmp_path):
    message = refuses(
        capsys, FLAX, tmp_path / 'x', '--model-kwargs', *SMALL[:-1], 'img_size=128', model='qna_vit_tiny')
    assert 'resized' in message and '--model-kwargs' in message


def array(shape, dtype: str, data: bytes, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb([list(shape), dtype, data]))


def flax_file(path: Path, **params) -> Path:
    path.write_bytes(msgpack.packb(dict(step=1, params=dict(layer=params), opt_state={}, batch_stats=None)))
    return path


@pytest.mark.parametrize('dtype', [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize('shape', [(), (3,), (2, 1, 3), (0, 4)])
def test_flax_arrays(tmp_path, dtype, shape):
    x = (torch.rand(shape) * 4).to(dtype)
    data = bytes(x.reshape(-1).view(torch.uint8).tolist()) if x.numel() else b''
    name = str(dtype).removeprefix('torch.')
    found = read_flax(flax_file(tmp_path / 'f', x=array(shape, name, data, code=1 if shape else 3)))
    assert list(found) == ['layer/x'] and found['layer/x'].dtype == dtype and torch.equal(found['layer/x'], x)


def test_flax_arrays_in_pieces(tmp_path):
    x = torch.arange(12.)
    pieces = [array((5,), 'float32', x[:5].numpy().tobytes()), array((7,), 'float32', x[5:].numpy().tobytes())]
    chunked = {
        '__msgpack_chunked_array__': True, 'shape': {'0': 3, '1': 4},
        'chunks': {str(i): piece for i, piece in enumerate(pieces)}}
    assert torch.equal(read_flax(flax_file(tmp_path / 'f', x=chunked))['layer/x'], x.reshape(3, 4))
    for change in (dict(shape={'0': 3, '1': 5}), dict(chunks={'1': pieces[0]}), dict(chunks={}), dict(shape=None)):
        with pytest.raises(ValueError, match='layer/x'):
            read_flax(flax_file(tmp_path / 'f', x={**chunked, **change}))


def test_flax_trees(tmp_path):
    x = array((1,), 'float32', struct.pack('f', 2.))
    for tree in (dict(a=dict(x=x)), dict(params=dict(a=dict(x=x))), dict(params=dict(params=dict(a=dict(x=x))))):
        (tmp_path / 'f').write_bytes(msgpack.packb(tree))
        assert {k: v.tolist() for k, v in read_flax(tmp_path / 'f').items()} == {'a/x': [2.]}
    (tmp_path / 'f').write_bytes(msgpack.packb(dict(params=dict(x=x), batch_stats=dict(mean=x))))
    assert list(read_flax(tmp_path / 'f')) == ['x', 'batch_stats/mean']


@pytest.mark.parametrize('value, words', [
    (array((3,), 'float32', b'\0' * 8), ['8 bytes', 'takes 12']),
    (array((2 ** 39, 2 ** 39), 'float32', b'\0' * 8), ['8 bytes']),
    (array((-1,), 'float32', b''), ['shape']), (array((1.5,), 'float32', b''), ['shape']),
    (array([1] * 99, 'float32', b'\0' * 4), ['shape']), (array((2 ** 63,), 'float32', b''), ['shape']),
    (array((1,), 'object', b'\0' * 8), ["'object'", 'float32']), (array((1,), 'float32', 'text'), ['str']),
    (msgpack.ExtType(1, b''), ['no array']), (msgpack.ExtType(1, b'\xc1'), ['no array']),
    (msgpack.ExtType(1, msgpack.packb([[1], 'float32'])), ['no array']),
    (msgpack.ExtType(1, msgpack.packb([[1], 'float32', array((), 'float32', b'')])), ['no array']),
    (array((), 'complex64', b'\0' * 8, code=2), ['complex']), (msgpack.ExtType(77, b'x'), ['extension 77']),
    ('text', ["'text'"]), (3, ['3']), ([1, 2], ['[1, 2]']), ({'a/b': {}}, ["'a/b'"]), ({3: {}}, ['3'])])
def test_flax_refuses(tmp_path, value, words):
    with pytest.raises(ValueError) as e:
        read_flax(flax_file(tmp_path / 'f', x=value))
    assert all(word in str(e.value) for word in [*words, str(tmp_path / 'f')]), e.value


@pytest.mark.parametrize('content', [
    b'\x81\xa6params\xdd\xff\xff\xff\xff', b'\x81\xa6params\xdb\xff\xff\xff\xff',
    b'\x81\xa6params' + b'\x81\xa1a' * 5000,
    b'\x81\xa6params' + b'\x91' * 100_000, b'\x82\xa6params\x80\xa4step\x01', b'\x81\xa4step\x01',
    FLAX.read_bytes()[:-99], FLAX.read_bytes() + b'x'])
def test_damaged_flax_files(capsys, tmp_path, content: bytes):
    (tmp_path / 'f').write_bytes(content)
    assert is_flax(tmp_path / 'f')
    message = refuses(capsys, tmp_path / 'f', tmp_path / 'x')
    assert str(tmp_path / 'f') in message


def test_deep_trees(tmp_path):
    tree = array((1,), 'float32', b'\0' * 4)
    for _ in range(100):
        tree = dict(a=tree)
    (tmp_path / 'f').write_bytes(msgpack.packb(dict(params=tree)))
    with pytest.raises(ValueError, match='nested'):
        read_flax(tmp_path / 'f')


def test_what_is_flax(source, tmp_path):
    torch.save({'a': torch.zeros(1)}, tmp_path / 'zip')
    torch.save({'a': torch.zeros(1)}, tmp_path / 'legacy', _use_new_zipfile_serialization=False)
    for header in (0x81, 0x86, 0xa486, 0xde):  # lengths whose bytes look like the beginning of a map
        text = json.dumps({'a': dict(dtype='U8', shape=[0], data_offsets=[0, 0])}).ljust(header).encode()
        (tmp_path / f'{header}').write_bytes(struct.pack('<Q', header) + text)
    for protocol in range(6):
        (tmp_path / f'pickle {protocol}').write_bytes(pickle.dumps({'abc': 1}, protocol))
    (tmp_path / 'empty').write_bytes(b'')
    assert [p.name for p in tmp_path.iterdir() if is_flax(p)] == []
    assert is_flax(FLAX)


# what cannot be converted

class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize('legacy', [False, True])
def test_code_is_not_run(source, capsys, tmp_path, legacy: bool):
    content = dict(model=to_authors(source.state_dict()), args=Payload(tmp_path / 'evidence'))
    torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=not legacy)
    assert str(tmp_path / 'a.pth') in refuses(capsys, tmp_path / 'a.pth', tmp_path / 'x')
    assert not (tmp_path / 'evidence').exists()


def test_another_variant(capsys, tmp_path):
    with torch.device('meta'):
        shapes = timm.create_model('vvt_tiny', device='meta').state_dict()
    state = {k: torch.zeros(()).expand(v.shape).clone() for k, v in shapes.items()}
    torch.save(to_authors(state), tmp_path / 'a.pth')
    for model in ('vvt_nano', 'vvt_small', 'vvt_nano.fashion_mnist'):
        message = refuses(capsys, tmp_path / 'a.pth', tmp_path / 'x', model=model)
        assert 'a checkpoint of vvt_tiny' in message and '--model vvt_tiny' in message


def test_other_mistakes(source, capsys, tmp_path):
    state = source.state_dict()
    torch.save(state, tmp_path / 'a.pth')
    assert 'vvt_nano' in refuses(capsys, tmp_path / 'a.pth', tmp_path / 'x', model='vvt_nan')
    assert 'no model of vitlinear' in refuses(capsys, tmp_path / 'a.pth', tmp_path / 'x', model='resnet18')
    assert 'is no file' in refuses(capsys, tmp_path / 'b.pth', tmp_path / 'x')
    assert 'is no file' in refuses(capsys, tmp_path, tmp_path / 'x')
    assert '--tag' in refuses(capsys, tmp_path / 'a.pth', tmp_path / 'x', '--tag', 'a/b')
    assert 'patch_strid' in refuses(capsys, tmp_path / 'a.pth', tmp_path / 'x', '--model-kwargs', 'patch_strid=1')
    (tmp_path / 'text.pth').write_text('hello')
    assert 'no readable checkpoint' in refuses(capsys, tmp_path / 'text.pth', tmp_path / 'x')
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'r.pth')
    assert 'no weights of vvt_nano' in refuses(capsys, tmp_path / 'r.pth', tmp_path / 'x')
    torch.save({k: v for k, v in state.items() if k != 'stages.1.norm.weight'}, tmp_path / 'i.pth')
    assert 'stages.1.norm.weight' in refuses(capsys, tmp_path / 'i.pth', tmp_path / 'x')
    torch.save({**state, 'more': torch.zeros(3)}, tmp_path / 'm.pth')
    assert 'more' in refuses(capsys, tmp_path / 'm.pth', tmp_path / 'x')


def test_python_m(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['vitlinear', 'convert', '--help'])
    with pytest.raises(SystemExit) as e:
        runpy.run_module('vitlinear', run_name='__main__')
    assert e.value.code == 0 and 'vitlinear convert' in capsys.readouterr().out
