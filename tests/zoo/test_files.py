"""Files that are damaged, larger than they look, or hold NaN: refused through every door, by name."""
import io
import json
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from _hub import make_folder
from vitlinear.models._timm import read_weights
from vitlinear.models._weights import check_size
from vitlinear.tools import cli
from vitlinear.tools._folders import folder_problems
from vitlinear.zoo import files


@pytest.fixture(scope='module')
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model('vvt_nano', num_classes=3).state_dict()


@pytest.fixture
def path(weights, tmp_path) -> Path:
    torch.save(weights, tmp_path / 'weights.pth')
    return tmp_path / 'weights.pth'


def flipped(path: Path, at: int, bit: int = 0) -> Path:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return path


def in_weights(path: Path) -> int:
    """The place of a byte in the largest tensor of a file."""
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda m: m.file_size)
    return member.header_offset + 200 + member.file_size // 2


def tell(capsys, *words: object, code: int = 2) -> str:
    """What a command says that refuses."""
    capsys.readouterr()
    assert cli.main(list(map(str, words))) == code
    told = capsys.readouterr().err.strip().splitlines()
    assert not any('Traceback' in line for line in told)
    return told[-1]


@pytest.mark.parametrize('seed', range(60))
def test_a_flipped_bit_is_found_or_does_no_harm(weights, path, seed: int):
    rng = random.Random(seed)
    flipped(path, rng.randrange(path.stat().st_size), rng.randrange(8))
    try:
        found = read_weights(path)
    except ValueError as e:
        told, found = str(e), weights
    else:
        told = str(path)
    assert str(path) in told
    assert found.keys() == weights.keys() and all(torch.equal(found[k], v) for k, v in weights.items())


DOORS: dict[str, list[str]] = {
    'validate --checkpoint': ['validate', '--model', 'vvt_nano', '--checkpoint', '{}'],
    'train --initial-checkpoint': ['train', '--model', 'vvt_nano', '--initial-checkpoint', '{}'],
    'train --pretrained-path': ['train', '--model', 'vvt_nano', '--pretrained-path', '{}'],
    'train --resume': ['train', '--model', 'vvt_nano', '--resume', '{}'],
    'train of a model of timm': ['train', '--model', 'test_vit', '--initial-checkpoint', '{}'],
    'convert': ['convert', '{}', '--model', 'vvt_nano', '--output', '{}.folder'],
}


@pytest.mark.parametrize('door', DOORS)
def test_damage_is_told_at_every_door(path, capsys, door: str):
    state = torch.load(path)
    torch.save(dict(epoch=0, arch='vvt_nano', optimizer={}, version=2, state_dict=state), path)
    flipped(path, in_weights(path))
    words = [word.replace('{}', str(path)) for word in DOORS[door]]
    told = tell(capsys, *words, *([] if door == 'convert' else ['--num-classes', '3', '--device', 'cpu']))
    assert str(path) in told and 'is damaged: the checksum of its part' in told
    with pytest.raises(ValueError, match='checksum'):
        timm.create_model('vvt_nano', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_a_format_without_checksums_says_so_once(weights, tmp_path, caplog):
    files._tell_unchecked.cache_clear()
    torch.save(weights, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    for _ in range(2):
        assert read_weights(tmp_path / 'old.pth').keys() == weights.keys()
    assert caplog.text.count('without checksums') == 1


def test_compressed_members_are_not_unfolded(tmp_path):
    """4 MB that would become 4 GiB: refused before a byte of it is read."""
    content = io.BytesIO()
    torch.save({'a': torch.zeros(4)}, content)
    path = tmp_path / 'bomb.pth'
    with zipfile.ZipFile(content) as whole, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, bytes(1 << 26) if name.endswith('/data/0') else whole.read(name))
    start = time.monotonic()
    with pytest.raises(ValueError, match='is compressed'):
        read_weights(path)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize('arguments', [
    dict(depths=[100000, 1, 1, 1]), dict(embed_dims=[2 ** 20, 64, 128, 160]), dict(mlp_ratios=[1e9, 4., 4., 4.])])
def test_arguments_of_a_file_have_bounds(tmp_path, capsys, arguments):
    folder = tmp_path / 'vvt_nano.test'
    make_folder(folder)
    config = json.loads((folder / 'config.json').read_text())
    config['model_args'] = {**config.get('model_args', {}), **arguments}
    (folder / 'config.json').write_text(json.dumps(config))
    start = time.monotonic()
    for load in (
            lambda: timm.create_model(f'local-dir:{folder}', pretrained=True), lambda: check_size(
                'vvt_nano', arguments)):
        with pytest.raises((ValueError, RuntimeError), match='times') as e:
            load()
        assert 'vvt_nano' in str(e.value)
    for words in (['verify', folder], ['card', folder], ['card', '--check', folder]):
        assert 'vvt_nano' in tell(capsys, *words, code=1 if words[0] == 'verify' else 2)
    assert time.monotonic() - start < 20


def test_sizes_within_reason_pass(tmp_path):
    model = timm.create_model('vvt_nano', depths=(1, 1, 8, 1), embed_dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16))
    timm.models.save_for_hf(
        model, str(tmp_path), model_args=dict(
            depths=(1, 1, 8, 1), embed_dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16)), safe_serialization=True)
    assert len(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).stages[2].blocks) == 8


@pytest.mark.parametrize('content', ['{', '[]', '{"architecture": 3}', ''])
def test_card_of_a_damaged_config(tmp_path, capsys, content: str):
    folder = tmp_path / 'vvt_nano.test'
    make_folder(folder)
    (folder / 'config.json').write_text(content)
    for words in (['card', folder], ['card', '--check', folder]):
        assert tell(capsys, *words).startswith('vitlinear card: error:')
    assert 'config.json' in tell(capsys, 'verify', folder, code=1)


def damaged_weights(weights, value: float) -> dict[str, torch.Tensor]:
    return {k: v.clone().fill_(value) if k == 'head.bias' else v for k, v in weights.items()}


@pytest.mark.parametrize('value', [float('nan'), float('-inf')])
@pytest.mark.parametrize('write', [torch.save, save_file], ids=['pth', 'safetensors'])
def test_non_finite_weights_are_named(weights, tmp_path, capsys, value: float, write: Callable):
    path, folder = tmp_path / f'a.{write.__name__}', tmp_path / 'vvt_nano.test'
    path = path.with_suffix('.safetensors' if write is save_file else '.pth')
    write(damaged_weights(weights, value), path)
    told = tell(capsys, 'convert', path, '--model', 'vvt_nano', '--output', folder)
    assert 'NaN or Inf in 1 weights, head.bias' in told and not folder.exists()
    assert cli.main(['convert', str(path), '--model', 'vvt_nano', '--output', str(folder), '--allow-non-finite']) == 0
    assert [p for p in folder_problems(folder) if 'head.bias' in p]
    assert 'head.bias' in tell(capsys, 'push', folder, 'org/vvt_nano.test', '--dry-run')
    assert 'head.bias' in tell(capsys, 'verify', folder, code=1)
    assert cli.main(['push', str(folder), 'org/vvt_nano.test', '--dry-run', '--allow-non-finite']) == 0


def test_pretrained_path_keeps_a_classifier_of_equal_size(weights, path, tmp_path):
    from vitlinear.tools._train_args import build_parser
    from vitlinear.tools.train import make_model
    theirs = timm.create_model('test_vit', num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / 'theirs.pth')
    for name, file, state in (('vvt_nano', path, weights), ('test_vit', tmp_path / 'theirs.pth', theirs.state_dict())):
        for classes in (3, 5):
            args = build_parser().parse(
                ['--model', name, '--num-classes', str(classes), '--pretrained-path', str(file)])
            made = make_model(args).state_dict()
            same = {k for k, v in state.items() if v.shape == made[k].shape and torch.equal(made[k], v)}
            assert same == {k for k in state if classes == 3 or not k.startswith('head.')} - {
                k for k in state if classes == 5 and k.startswith('head.')}


@pytest.mark.parametrize('channels', [1, 3])
def test_one_mean_for_all_channels(tmp_path, capsys, channels: int):
    torch.save(timm.create_model('vvt_nano', num_classes=3, in_chans=channels).state_dict(), tmp_path / 'a.pth')
    folder = tmp_path / 'vvt_nano.test'
    words = ['convert', tmp_path / 'a.pth', '--model', 'vvt_nano', '--output', folder, '--mean', '.5', '--std', '.25']
    assert cli.main(list(map(str, words))) == 0
    cfg = timm.create_model(f'local-dir:{folder}', pretrained=True).pretrained_cfg
    assert tuple(cfg['mean']) == (.5,) * channels and tuple(cfg['std']) == (.25,) * channels
    assert cfg['input_size'][0] == channels
