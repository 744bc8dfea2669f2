"""What importing the package does, each time in a fresh interpreter."""
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch

import vitlinear

ROOT = Path(vitlinear.__file__).resolve().parents[1]

REPORT = '''
import json, socket, sys, warnings

def refuse(*args, **kwargs):
    raise AssertionError('opened a connection')

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
import torch
import timm
from timm.models import _registry
names, modules = set(timm.list_models()), set(timm.list_modules())
entries, cfgs = dict(_registry._model_entrypoints), dict(_registry._model_pretrained_cfgs)
state = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(), torch.get_num_threads())
rng = torch.random.get_rng_state()
warnings.simplefilter('error')
before = set(sys.modules)
import vitlinear
imported = sorted(set(sys.modules) - before)
print(json.dumps(dict(
    imported=imported,
    new=sorted(set(timm.list_models()) - names),
    lost=sorted(names - set(timm.list_models())),
    overwritten=sorted(
        [k for k in entries if _registry._model_entrypoints.get(k) is not entries[k]]
        + [k for k in cfgs if _registry._model_pretrained_cfgs.get(k) is not cfgs[k]]),
    clashes=sorted(modules & {m.split('.')[-1] for m in sys.modules if m.startswith('vitlinear.models.')}),
    new_modules=sorted(set(timm.list_modules()) - modules),
    same_state=state == (
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(), torch.get_num_threads())
        and torch.equal(rng, torch.random.get_rng_state()),
    optional=sorted(set(sys.modules) & {'matplotlib', 'onnx', 'onnxruntime', 'tensorboard', 'vitlinear.tools.train'}),
)))
'''


def python(code: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=300,
        env={**os.environ, 'PYTHONPATH': path})


def run_report() -> dict:
    done = python(REPORT)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), 'stderr': done.stderr, 'lines': len(done.stdout.splitlines())}


@pytest.fixture(scope='module')
def report() -> dict:
    return run_report()


def test_silent(report):
    assert report['stderr'] == '' and report['lines'] == 1


def test_registers(report):
    assert {'vvt_nano', 'vvt_tiny', 'vvt_small', 'vvt_medium', 'vvt_large'} <= set(report['new'])
    assert 'vvt' in report['new_modules']


def test_overwrites_nothing(report):
    assert report['overwritten'] == [] and report['lost'] == [] and report['clashes'] == []


def test_leaves_global_state(report):
    assert report['same_state']
    assert report['optional'] == []


def test_cost(report):
    """Beyond timm, modules of ours alone, and none that a later call can load."""
    assert 40 < len(report['imported']) < 100
    assert [m for m in report['imported'] if m.partition('.')[0] != 'vitlinear'] == []
    assert not any(m.startswith(('vitlinear.tools', 'vitlinear.inference.optimize')) for m in report['imported'])


def test_module_names_are_not_timms():
    ours = {p.stem for p in (Path(vitlinear.__file__).parent / 'models').glob('*.py')} - {'__init__'}
    theirs = {Path(p).stem for p in (Path(timm.__file__).parent / 'models').glob('*.py')} - {'__init__'}
    assert ours and not ours & theirs


def test_version():
    assert vitlinear.__version__.count('.') == 2
    try:
        installed = metadata.version('vitlinear')
    except metadata.PackageNotFoundError:
        installed = vitlinear.__version__
    assert installed == vitlinear.__version__


def test_unpickles_in_a_fresh_process(tmp_path):
    """A pickled model brings its package along."""
    path = str(tmp_path / 'model.pt')
    torch.save(timm.create_model('vvt_nano', num_classes=3), path)
    done = python(
        f'import torch; m = torch.load({path!r}, weights_only=False); print(m(torch.zeros(1, 3, 32, 32)).shape)')
    assert done.returncode == 0, done.stderr
    assert '[1, 3]' in done.stdout
