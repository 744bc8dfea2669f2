"""scripts/study.py: the runs it starts, continues and leaves out, its rows and its summary."""
import csv
import gzip
import importlib.util
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from torch import nn

import vitlinear  # noqa: F401
from vitlinear.tools.train import build_parser

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(embed_dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4))
DATA = 'data'


def small(name: str, num_classes: int = 10, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes, in_chans=1, **{**SMALL, **kwargs})


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The script with runs that are invented, and the commands they would have been started with."""
    spec = importlib.util.spec_from_file_location('study', ROOT / 'scripts' / 'study.py')
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__('sys').modules, 'study', module)  # for its dataclass
    spec.loader.exec_module(module)
    module.commands = []
    module.fails = 0

    def launch(argv, processes):
        args = build_parser().parse([a for a in argv if a != '--'])
        module.commands.append(args)
        if module.fails and len(module.commands) == module.fails:
            raise subprocess.CalledProcessError(3, 'train')
        folder = Path(args.output) / args.experiment
        folder.mkdir(parents=True, exist_ok=True)
        model = small(args.model, **args.model_kwargs)
        for m in model.modules():
            if isinstance(getattr(m, 'theta', None), nn.Parameter):
                nn.init.constant_(m.theta, 0.)
        torch.save({'state_dict': model.state_dict(), 'arch': args.model}, folder / 'last.pth.tar')
        (folder / 'args.yaml').write_text(yaml.safe_dump(dict(vars(args), model_kwargs=dict(args.model_kwargs))))
        with open(folder / 'summary.csv', 'w', newline='') as f:
            writer = csv.writer(f)
            writer.writerow(['epoch', 'train_loss', 'eval_top1'])
            writer.writerows([e, 2 - e / 10, 10 * args.seed + e] for e in range(args.epochs))

    monkeypatch.setattr(module, 'launch', launch)

    def run(name: str, *words: str, data_dir: str = DATA) -> int:
        return module.main([
            name, '--data-dir', data_dir, '--output', str(tmp_path / 'runs'), '--out', str(tmp_path / 'study.csv'),
            *words])

    module.run, module.rows = run, lambda: module.read_rows(tmp_path / 'study.csv')
    return module


def test_walk_settings(study):
    """Each makes a model, no two the same, and all of one architecture begin with the same projections."""
    settings = study.STUDIES['walk'].settings
    assert settings['walk'] == dict(model_kwargs=dict(attn_kwargs=dict(mode='walk')))
    models, weights = set(), {}
    for changes in settings.values():
        model = small('gkvit_nano', **changes['model_kwargs'])
        layer = model.stages[1].blocks[-1].attn
        architecture = tuple(len(stage.blocks) for stage in model.stages)
        models.add((architecture, layer.mode, layer.init_beta, layer.init_temperature))
        weights.setdefault(architecture, []).append(layer.qkv.weight)
    assert len(models) == len(settings) and sorted(map(len, weights.values())) == [2, 7]
    for own in weights.values():
        assert all(torch.equal(w, own[0]) for w in own)


def test_walk(study, capsys):
    words = ['walk', '--settings', 'walk', 'beta0', '--seeds', '1', '2', '--epochs', '3', '--', '-b', '8']
    assert study.run(*words) == 0
    assert [(row['setting'], row['seed']) for row in study.rows()] == [
        ('walk', '1'), ('beta0', '1'), ('walk', '2'), ('beta0', '2')]
    row = study.rows()[0]
    assert (row['top1'], row['train_loss'], row['epochs'], row['options']) == ('12.00', '1.8000', '3', '-b 8')
    assert row['beta_1'] == row['beta_4'] == '0.4500' and study.rows()[1]['beta_1'] == '' and float(row['seconds']) >= 0
    assert [(a.model, a.seed, a.epochs, a.batch_size, a.model_kwargs) for a in study.commands[:2]] == [
        ('gkvit_nano', 1, 3, 8, {'attn_kwargs': {'mode': 'walk'}}),
        ('gkvit_nano', 1, 3, 8, {'attn_kwargs': {'mode': 'walk', 'init_beta': 0.}})]
    walk, beta0 = capsys.readouterr().out.splitlines()[-2:]
    betas = 4 * ['0.4500', '+-', '0.0000']
    assert walk.split() == ['walk', '2', '17.00', '+-', '7.07', '1.8000', '+-', '0.0000', *betas]
    assert beta0.split()[-4:] == ['-'] * 4

    assert study.run(*words) == 0 and len(study.commands) == 4  # nothing is run twice
    assert study.run('walk', '--settings', 'walk', '--seeds', '3', '--epochs', '3', '--', '-b', '8') == 0
    assert len(study.commands) == 5 and len(study.rows()) == 5


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, 'wb') as f:
        f.write(struct.pack('>HBB', 0, 8, array.ndim) + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes())
    with gzip.open(path) as f, open(path.with_suffix(''), 'wb') as g:
        shutil.copyfileobj(f, g)


def test_castling(study, tmp_path, monkeypatch):
    """The branch is in the recipe, is taken out of the other setting, and adds nothing at the end of its ramp."""
    monkeypatch.setitem(SMALL, 'mlp_ratios', (2., 2., 2., 2.))
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, **kwargs: create(name, **{**SMALL, **kwargs}))
    rng = np.random.default_rng(0)
    for part, count in (('train', 4), ('t10k', 40)):
        raw = tmp_path / 'data' / 'FashionMNIST' / 'raw'
        write_idx(raw / f'{part}-images-idx3-ubyte.gz', rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(raw / f'{part}-labels-idx1-ubyte.gz', rng.integers(0, 10, count, dtype=np.uint8))
    assert study.run('castling', '--seeds', '1', data_dir=str(tmp_path / 'data')) == 0
    ramped, plain = study.commands
    assert ramped.castling_ramp == [.1, .7] and plain.castling_ramp is None
    assert {k for k, v in vars(ramped).items() if v != vars(plain)[k]} == {'castling_ramp', 'config', 'experiment'}
    assert [row['epochs'] for row in study.rows()] == 2 * [str(ramped.epochs)]
    for row in study.rows():
        assert row['logit_difference'] == '0' and row['branch_top1'] == row['switched_top1']

    weights = {k: torch.randn_like(v) for k, v in small('castling_nano').state_dict().items()}
    folder = tmp_path / 'runs' / ramped.experiment
    torch.save({'state_dict': weights, 'arch': 'castling_nano'}, folder / 'last.pth.tar')
    before = timm.create_model('castling_nano', num_classes=10, in_chans=1).eval()
    before.load_state_dict(weights)
    images = torch.from_numpy(np.frombuffer(  # the accuracy is that of these weights on these images
        (raw / 't10k-images-idx3-ubyte').read_bytes()[16:], np.uint8).reshape(-1, 1, 28, 28).copy())
    labels = torch.from_numpy(np.frombuffer((raw / 't10k-labels-idx1-ubyte').read_bytes()[8:], np.uint8).copy())
    with torch.inference_mode():
        right = (before((images / 255. - .286) / .353).argmax(1) == labels).double().mean().item()
    measured = study.switch(folder, str(tmp_path / 'data'))
    assert measured == dict(
        branch_top1=f'{100 * right:.2f}', switched_top1=f'{100 * right:.2f}', logit_difference='0')


def test_stops_where_training_fails(study, capsys):
    study.fails = 2
    words = ['walk', '--settings', 'walk', 't8', '--seeds', '1', '--epochs', '2']
    assert study.run(*words) == 3
    assert [row['setting'] for row in study.rows()] == ['walk']
    assert 't8, seed 1: training failed' in capsys.readouterr().err
    study.fails = 0
    assert study.run(*words) == 0
    assert [row['setting'] for row in study.rows()] == ['walk', 't8']
    assert study.commands[-1].model_kwargs == {'attn_kwargs': {'mode': 'walk', 'init_temperature': 8.}}


def test_unknown_setting(study, capsys):
    with pytest.raises(SystemExit) as e:
        study.run('castling', '--settings', 'walk')
    assert e.value.code == 2 and 'unknown walk, choose from castling, plain' in capsys.readouterr().err
