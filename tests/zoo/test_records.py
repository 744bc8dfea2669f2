"""The records of facts: their schema, and that each one is true of its checkpoint."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from vitlinear.tools._flags import config_folder
from vitlinear.tools._folders import count_macs, folder_problems
from vitlinear.zoo import records as module
from vitlinear.zoo.records import (
    RecordError,
    find_record,
    read_record,
    record_from_dict,
    records,
    weights_cfg,
    write_record,
    write_text,
)

NAMES = sorted(records())
ROOT = Path(__file__).resolve().parents[2]


def test_every_folder_has_a_record():
    assert NAMES == sorted(p.name for p in (ROOT / 'model_cards').iterdir() if (p / 'model.safetensors').is_file())
    assert 'vvt_nano.fashion_mnist' in NAMES


@pytest.mark.parametrize('name', NAMES)
def test_record_is_true(name: str):
    record = find_record(name)
    assert record.name == record.folder.name == name
    assert folder_problems(record.folder) == []
    model = timm.create_model(name, pretrained=True)
    assert sum(p.numel() for p in model.parameters()) == record.parameters
    assert model.num_classes == record.cfg.num_classes
    empty = timm.create_model(name, device='meta')
    assert count_macs(empty, record.cfg.input_size) == record.macs
    assert (config_folder() / Path(record.training.config).name).is_file()
    assert (record.folder / record.training.log).is_file()


@pytest.mark.parametrize('name', NAMES)
def test_registry_takes_the_record(name: str):
    record, cfg = find_record(name), timm.get_pretrained_cfg(name)
    assert cfg.file == str(record.weights)
    for field in ('num_classes', 'input_size', 'pool_size', 'crop_pct', 'interpolation', 'mean', 'std', 'label_names'):
        assert getattr(cfg, field) == getattr(record.cfg, field), field
    assert cfg.license == record.license and cfg.tag == record.tag


@pytest.mark.parametrize('name', NAMES)
def test_written_as_read(name: str, tmp_path):
    record = find_record(name)
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record
    assert (tmp_path / 'record.json').read_text() == (record.folder / 'record.json').read_text()


@pytest.fixture
def data() -> dict:
    return json.loads((ROOT / 'model_cards' / 'vvt_nano.fashion_mnist' / 'record.json').read_text())


def put(data: dict, path: str, value) -> None:
    *parents, last = path.split('.')
    for key in parents:
        data = data[int(key) if key.isdigit() else key]
    data[last] = value


@pytest.mark.parametrize('path, value, words', [
    ('name', 'vvt_nano.other', 'architecture and tag'), ('name', 'vvt_nano', "'architecture.tag'"),
    ('architecture', 3, 'a string'), ('tag', ' ', 'not empty'), ('file', '../model.safetensors', 'safetensors file'),
    ('file', 'model.bin', 'safetensors file'), ('sha256', 'A' * 64, '64 hexadecimal'), ('size', 0, 'more than 0'),
    ('size', '12', 'an integer'), ('size', True, 'an integer'), ('parameters', 1.5, 'an integer'),
    ('hub', None, 'an object'), ('hub.repo_id', 'name', "'org/name'"), ('hub.revision', 'main', '40 hexadecimal'),
    ('hub.revision', '0' * 40, 'given where revision is'), ('cfg.num_classes', -1, '0 or more'),
    ('cfg.input_size', [32, 32], 'channels, height and width'), ('cfg.input_size', 32, 'a list'),
    ('cfg.crop_pct', 0, 'at most 1'), ('cfg.crop_pct', '1.0', 'a finite number'), ('cfg.mean', [.1, .2], '1 number'),
    ('cfg.std', [0.], 'more than 0'), ('cfg.std', [float('nan')], 'a finite number'),
    ('cfg.interpolation', 'cubic', 'bicubic'), ('cfg.label_names', ['a', 'b'], '10 names'),
    ('cfg.nmu_classes', 3, "'num_classes' is"), ('dataset.id', 'fashion mnist', "dataset's id"),
    ('metrics.0.value', 930, '100 percent'), ('metrics.1.valeu', 93., "'value' is"), ('metrics', {}, 'a list'),
    ('training.seeds', [42.], 'an integer'), ('training.software', ['torch'], 'an object'),
    ('provenance.trained_by', None, 'a string'), ('sha', '', "'sha256' is"),
])
def test_refuses(data, tmp_path, path: str, value, words: str):
    put(data, path, value)
    (tmp_path / 'record.json').write_text(json.dumps(data))
    with pytest.raises(RecordError) as e:
        read_record(tmp_path)
    last = re.escape(path.split('.')[-1])
    assert words in str(e.value) and str(tmp_path / 'record.json') in str(e.value)
    assert re.search(last, str(e.value)) or path == 'hub.revision'


@pytest.mark.parametrize('field', ['name', 'sha256', 'cfg', 'metrics', 'provenance'])
def test_refuses_without(data, field: str):
    del data[field]
    with pytest.raises(RecordError, match=f'{field} is missing'):
        record_from_dict(data)


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '{"name": }'])
def test_refuses_what_is_no_record(tmp_path, text: str):
    (tmp_path / 'record.json').write_text(text)
    with pytest.raises(RecordError, match='record.json'):
        read_record(tmp_path)


def test_optional_facts(data):
    """What nobody knows may be left out: a converted checkpoint has no training."""
    data.update(dataset=None, metrics=[], macs=None, training=None, license=None, limits=None)
    data['cfg'].update(pool_size=None, label_names=None)
    record = record_from_dict(data)
    assert record.training is None and record_from_dict(record.to_dict()) == record


@pytest.fixture
def zoo(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(module, '_RECORDS', None)
    monkeypatch.setattr(module, '_roots', lambda: [tmp_path / 'absent', tmp_path])
    return tmp_path


def test_a_tag_without_folder_has_no_weights(zoo):
    (zoo / 'vvt_nano.cifar').mkdir()  # begun, not finished
    (zoo / 'vvt_nano.cifar' / 'train.log').write_text('epoch 0')
    assert records() == {} and find_record('vvt_nano.cifar') is None and weights_cfg('vvt_nano.cifar') == {}


@pytest.mark.parametrize('with_file', [True, False])
@pytest.mark.parametrize('hub, hf_hub_id', [
    (dict(repo_id=None, revision=None), None), (dict(repo_id='org/x', revision=None), 'org/x'),
    (dict(repo_id='org/x', revision='a' * 40), f'org/x@{"a" * 40}')])
def test_where_weights_are(zoo, data, with_file: bool, hub: dict, hf_hub_id):
    folder = zoo / 'vvt_nano.fashion_mnist'
    folder.mkdir()
    data['hub'] = hub
    (folder / 'record.json').write_text(json.dumps(data))
    if with_file:
        (folder / 'model.safetensors').write_bytes(b'x')
    cfg = weights_cfg('vvt_nano.fashion_mnist')
    assert cfg.get('hf_hub_id') == hf_hub_id and cfg['num_classes'] == 10
    assert cfg.get('file') == (str(folder / 'model.safetensors') if with_file else None)


def test_a_record_in_the_wrong_folder(zoo, data):
    (zoo / 'vvt_nano.other').mkdir()
    (zoo / 'vvt_nano.other' / 'record.json').write_text(json.dumps(data))
    with pytest.raises(RecordError, match='vvt_nano.other'):
        records()


def test_reading_needs_no_torch():
    path = ROOT / 'vitlinear' / 'zoo' / 'records.py'
    code = f'''
import importlib.util, sys
spec = importlib.util.spec_from_file_location('records', {str(path)!r})
module = sys.modules['records'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert sorted(module.records()) == {NAMES!r}, module.records()
print(sorted(set(sys.modules) & {{'torch', 'timm', 'numpy', 'huggingface_hub', 'yaml'}}))'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ('[]\n', '')


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'README.md'
    write_text(path, 'one')
    with pytest.raises(UnicodeEncodeError):
        write_text(path, 'two' * 100_000 + '\ud800')
    assert path.read_text() == 'one' and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


# weights that were tampered with after installation

def test_damaged_file_of_the_package(monkeypatch, tmp_path):
    record = find_record('vvt_nano.fashion_mnist')
    damaged = bytearray(record.weights.read_bytes())
    damaged[-1] ^= 1
    path = tmp_path / 'model.safetensors'
    path.write_bytes(damaged)
    monkeypatch.setattr(timm.models._registry._model_pretrained_cfgs['vvt_nano.fashion_mnist'], 'file', str(path))
    with pytest.raises(RuntimeError) as e:
        timm.create_model('vvt_nano.fashion_mnist', pretrained=True)
    assert record.sha256 in str(e.value) and str(path) in str(e.value) and path.is_file()


def test_damaged_folder(tmp_path):
    record = find_record('vvt_nano.fashion_mnist')
    for name in ('config.json', 'record.json'):
        (tmp_path / name).write_bytes((record.folder / name).read_bytes())
    damaged = bytearray(record.weights.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / 'model.safetensors').write_bytes(damaged)
    with pytest.raises(RuntimeError, match=record.sha256):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    (tmp_path / 'record.json').unlink()  # a folder that says nothing of its weights loads, as with timm
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert model.pretrained_cfg['source'] == 'local-dir' and torch.isfinite(model.head.weight).all()
