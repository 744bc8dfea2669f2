"""`vitlinear list` and `vitlinear info`, and the facts behind them."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from timm.models import model_entrypoint

import vitlinear
from vitlinear.tools import cli, info
from vitlinear.zoo import hub
from vitlinear.zoo.records import records

ROOT = Path(vitlinear.__file__).resolve().parents[1]
ARCHITECTURES = [n for n in timm.list_models() if model_entrypoint(n).__module__.startswith('vitlinear.models.')]

LATER = '''
import sys, types
from vitlinear import models
from vitlinear.zoo.families import Family
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
module = types.ModuleType('vitlinear.models.later')
family = Family('later', 'Later & Co', 'A <later> paper', 'https://example.org/later', 'What it is: <b>a family</b>.',
                '@article{later, title={Later}}')
models.BACKBONES['later'] = models.Backbone(family, lambda state_dict, model: state_dict)
cfg = dict(num_classes=7, input_size=(3, 32, 32), pool_size=None, mean=(.5,) * 3, std=(.5,) * 3,
           interpolation='bicubic', crop_pct=.9, first_conv='patch_embed.proj', classifier='head')
module.default_cfgs = generate_default_cfgs({'later_tiny.in1k': cfg})
def later_tiny(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs):
    kwargs.pop('cache_dir', None)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=7, **kwargs)
    model.pretrained_cfg = module.default_cfgs['later_tiny'].default.to_dict()
    return model
later_tiny.__module__ = module.__name__
sys.modules[module.__name__] = module
register_model(later_tiny)
from vitlinear.tools import cli
sys.exit(cli.main(['list', '--family', 'later', '--json']))
'''


def run(argv, capsys, expect: int = 0) -> str:
    assert cli.main(argv) == expect
    out, err = capsys.readouterr()
    assert bool(err) == bool(expect)
    if expect:
        assert err.startswith(f'vitlinear {argv[0]}: error: ') and len(err.splitlines()) == 1
    return out + err


def names(argv, capsys) -> list:
    return [model['name'] for model in json.loads(run(['list', '--json', *argv], capsys))]


# facts

@pytest.mark.parametrize('name', ARCHITECTURES)
def test_noted_counts(name: str):
    """architectures.json is what counting gives; scripts/readme_tables writes it anew."""
    parameters, macs = info.count(name)
    noted = info.architecture_facts()[name]
    assert (noted['parameters'], noted['macs']) == (parameters, macs)
    model = info.find_model(name)
    assert (model.parameters, model.macs) == (parameters, macs)


def test_noted_names():
    assert sorted(info.architecture_facts()) == sorted(ARCHITECTURES)


@pytest.mark.parametrize('name', records())
def test_recorded_counts(name: str):
    record = records()[name]
    assert (record.parameters, record.macs) == info.count(name)


def test_a_tag_with_other_classes_is_counted_on_its_own():
    assert info.find_model('vvt_tiny.in1k').parameters == info.find_model('vvt_tiny').parameters
    nano, fashion = info.find_model('vvt_nano'), info.find_model('vvt_nano.fashion_mnist')
    assert nano.parameters - fashion.parameters == 990 * 161 + 2 * 9 * 32


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_families(name: str):
    family = info.family_of(name)
    assert family.title and family.paper and family.url.startswith('https://') and family.text
    assert family.bibtex.startswith('@') and family.bibtex.count('{') == family.bibtex.count('}')
    assert 'Paper:' not in family.text and '@' not in family.text


def test_accuracy_sources():
    assert info.find_model('vvt_small').accuracy[:3] == (82.6, 'ImageNet-1K', 'paper')
    ours = info.find_model('vvt_nano.fashion_mnist').accuracy
    assert ours[:3] == (94.78, 'Fashion-MNIST', 'ours') and '10,000 images' in ours.detail
    assert info.find_model('vvt_nano').accuracy is None


def test_weights_of_another_organisation(monkeypatch):
    assert info.find_model('vvt_nano.fashion_mnist').weights.kind == 'bundled'
    monkeypatch.setenv(hub.ORG_VARIABLE, 'my-lab')
    assert info.find_model('vvt_nano.fashion_mnist').weights == ('hub', 'my-lab/vvt_nano.fashion_mnist')
    assert info.find_model('vvt_tiny').weights is None


@pytest.mark.parametrize('number, text', [
    (None, '-'), (0, '0'), (999, '999'), (12_000, '12.0 k'), (999_600, '1.00 M'), (1_180_522, '1.18 M'),
    (25_981_952, '26.0 M'), (118_000_000, '118 M'), (10_684_401_664, '10.7 G')])
def test_short(number, text: str):
    assert info.short(number) == text


@pytest.mark.parametrize('number, text', [(82., '82.0'), (79.2, '79.2'), (93.58, '93.58'), (93.589, '93.59')])
def test_percent(number: float, text: str):
    assert info.percent(number) == text


# list

def test_list(capsys):
    out = run(['list'], capsys)
    lines = out.splitlines()
    # timm's names for DeiT are long
    assert max(len(line) for line in lines if not line.startswith(('castling_', 'model'))) <= 80
    listed = {line.split()[0] for line in lines if line}
    assert {*ARCHITECTURES, *records(), 'model'} <= listed
    assert next(line for line in lines if line.startswith('vvt_nano.fashion_mnist')).split() == [
        'vvt_nano.fashion_mnist', '1.18', 'M', '25.4', 'M', '1x32x32', '94.78', 'ours', 'bundled']


def test_list_small_before_large(capsys):
    assert names(['--family', 'vvt'], capsys) == [
        'vvt_nano', 'vvt_nano.fashion_mnist', 'vvt_tiny', 'vvt_small', 'vvt_medium', 'vvt_large']


@pytest.mark.parametrize('pattern, expected', [
    ('vvt_s', ['vvt_small']), ('vvt_*m*', ['vvt_nano.fashion_mnist', 'vvt_small', 'vvt_medium']),
    ('vvt_tin?', ['vvt_tiny']), ('vvt_[ml]*', ['vvt_medium', 'vvt_large'])])
def test_list_pattern(pattern: str, expected: list, capsys):
    assert names([pattern], capsys) == expected


def test_list_pretrained(capsys):
    listed = names(['--pretrained'], capsys)
    assert set(records()) <= set(listed) and set(listed) <= set(timm.list_pretrained()) | set(ARCHITECTURES)
    assert 'vvt_nano' not in listed
    assert 'No such model has weights' in run(['list', '--pretrained', 'vvt_large'], capsys)
    assert names(['--pretrained', 'vvt_large'], capsys) == []


def test_list_errors(capsys):
    assert 'vvt_small' in run(['list', 'vvt_smal1'], capsys, expect=2)
    assert 'the families are ' in run(['list', '--family', 'resnet'], capsys, expect=2)
    assert '--foo' in run(['list', '--foo'], capsys, expect=2)


def test_reader_that_stops_reading():
    done = subprocess.run(
        f'{sys.executable} -m vitlinear list --json | head -c 9', shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == '[\n  {\n   ' and done.stderr == ''


# info

@pytest.mark.parametrize('name', [*ARCHITECTURES, *records(), 'vvt_tiny.in1k'])
def test_info(name: str, capsys):
    out = run(['info', name], capsys)
    model = info.find_model(name)
    # a path or a hash is never broken, however long the folder of the package: it is alone in its line, label aside
    assert all(len(line) <= 80 or len(line[15:].split()) == 1 for line in out.splitlines())
    family = info.family_of(model.architecture)
    for text in (name, f'{model.parameters:,}', info.short(model.macs), family.url, family.bibtex.splitlines()[0]):
        assert text in out, text
    assert 'None' not in out

    facts = json.loads(run(['info', name, '--json'], capsys))
    assert facts['parameters'] == model.parameters and facts['family']['bibtex'] == family.bibtex
    assert (facts['record'] is None) == (name not in records())
    if name in records():
        assert facts['record'] == json.loads((records()[name].folder / 'record.json').read_text())
        assert facts['record']['sha256'] in out and facts['weights']['kind'] in ('bundled', 'hub')


def test_info_says_whose_figures(capsys):
    assert "79.2 % on ImageNet-1K, the paper's, not ours" in run(['info', 'vvt_tiny'], capsys)
    assert '94.78 % on Fashion-MNIST, measured by us' in run(['info', 'vvt_nano.fashion_mnist'], capsys)
    assert 'none; there are vvt_nano.fashion_mnist' in run(['info', 'vvt_nano'], capsys)


@pytest.mark.parametrize('argv, words', [
    (['vvt_smal'], ['unknown model vvt_smal', 'vvt_small']),
    (['resnet50'], ["timm's own"]),
    (['vvt_nano.cifar'], ['unknown tag cifar', 'vvt_nano.fashion_mnist']),
    (['zzz'], ['unknown model zzz']),
    ([], ['NAME']),
    (['vvt_tiny', 'vvt_small'], ['vvt_small']),
])
def test_info_errors(argv, words, capsys):
    message = run(['info', *argv], capsys, expect=2)
    assert all(word in message for word in words), message


# families that come later

def test_later_family():
    """One that nothing here names, whose counts nobody noted, is listed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    done = subprocess.run([sys.executable, '-c', LATER], capture_output=True, text=True, timeout=600,
                          env={**os.environ, 'PYTHONPATH': path})
    assert done.returncode == 0, done.stderr
    (model,) = json.loads(done.stdout.rpartition(']')[0] + ']')
    assert model['name'] == 'later_tiny' and model['num_classes'] == 7 and model['weights'] is None
    assert 10_000 < model['parameters'] < model['macs'] < 1_000_000
