"""Castling models in training: `vitlinear train`, timm's own script, distillation, and what is left afterwards."""
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from _runs import PLAIN, REPO, assert_same_state, rows, saved
from safetensors import safe_open
from timm.models import save_for_hf
from timm.task import TokenDistillationTask
from torch import nn

from vitlinear.layers.linear_angular import MaskedSoftmax
from vitlinear.models import CastlingSchedule
from vitlinear.tools import _script, cli, train, validate

TIMM_SCRIPTS = os.environ.get('TIMM_SCRIPTS', '')

# small models, with thresholds below which almost nothing falls at first
LOW = dict(aux_threshold=.001, aux_kappa=0.)
NANO = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), mlp_ratios=1., attn_kwargs=LOW)
LEVIT = dict(embed_dim=(16, 24, 32), num_heads=(1, 2, 2), depth=(1, 1, 1), key_dim=4, attn_kwargs=LOW)
DEIT = dict(img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=3, attn_kwargs=LOW)
TWO_HEADS = {'castling_levit_128s': LEVIT, 'castling_deit_tiny_distilled_patch16_224': DEIT}
SEEN = ['castling_density', 'castling_mass', 'castling_gap']


def words(kwargs: dict[str, Any], **more: Any) -> list[str]:
    return ['--model-kwargs', *(f'{k}={v!r}' for k, v in {**kwargs, **more}.items())]


def common(data: str, **more: Any) -> list[str]:
    return [
        '--model', 'castling_nano', *words(NANO, **more), '--img-size', '32', '--num-classes', '3', '--device', 'cpu',
        '-j', '0', '-b', '4', '--epochs', '2', '--warmup-epochs', '0', '--opt', 'adamw', '--lr', '1e-3',
        '--data-dir', data]


@pytest.fixture
def fit(data, tmp_path):
    """Train into tmp_path/NAME and return that folder; keywords are further arguments of the model."""
    def fit(name: str, *extra: str, expect: int = 0, **kwargs: Any) -> Path:
        argv = [*common(data, **kwargs), '--output', str(tmp_path), '--experiment', name, *extra]
        assert train.main(argv) == expect
        return tmp_path / name
    return fit


def seen(folder: Path) -> list[list[float]]:
    return [[float(row[f'train_{k}']) for k in SEEN] for row in rows(folder)]


def measure(data: str, checkpoint: Path, *extra: str) -> dict[str, float]:
    """`vitlinear validate` with a model that knows nothing of the training."""
    argv = [
        '--model', 'castling_nano', *words({k: v for k, v in NANO.items() if k != 'attn_kwargs'}), '--num-classes', '3',
        '--img-size', '32', '--device', 'cpu', '-j', '0', '-b', '4', '--data-dir', data]
    found, evaluate = {}, _script.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_script, 'evaluate', lambda *args, **kwargs: found.update(evaluate(*args, **kwargs)) or found)
        validate.validate(validate.build_parser().parse([*argv, '--checkpoint', str(checkpoint), *extra]))
    return found


def assert_measured(data: str, folder: Path, epoch: int, *extra: str) -> None:
    found, row = measure(data, folder / f'checkpoint-{epoch}.pth.tar', *extra), rows(folder)[epoch]
    assert found['top1'] == float(row['eval_top1'])
    assert found['loss'] == pytest.approx(float(row['eval_loss']), abs=1e-5)


# vitlinear train


def test_branch_is_there_and_goes(fit, data, monkeypatch):
    calls = []
    forward = MaskedSoftmax.forward
    monkeypatch.setattr(
        MaskedSoftmax, 'forward', lambda self, *args: (calls.append(self.training), forward(self, *args))[1])
    folder = fit('a', '--epochs', '3', '--castling-ramp', '.2', '.6')  # 12 updates: up to 2.4, and from 7.2
    assert calls.count(True) == 8 * 4  # in 4 layers, in the forward passes after 0 to 7 updates
    first, second, third = seen(folder)
    assert first[0] > .3 and first[1] > .3 and first[2] > .01
    assert second == third == [0, 0, 0]
    plain = timm.create_model('castling_nano', num_classes=3, **{**NANO, 'attn_kwargs': None})
    plain.load_state_dict(saved(folder)['state_dict'], strict=True)
    assert {layer.aux.mode for layer in plain.castling_layers().values()} == {'off'}
    for epoch in range(3):  # evaluation has the linear form from the start
        assert_measured(data, folder, epoch)


def test_the_branch_matters_while_it_is_on(fit):
    without, with_it = fit('without', *PLAIN), fit('with', *PLAIN, '--castling-ramp', '0', '1')
    assert not set(SEEN) & {key.removeprefix('train_') for key in rows(without)[0]}
    assert rows(without)[0]['train_loss'] != rows(with_it)[0]['train_loss']


def test_moving_average_is_evaluated_in_the_linear_form(fit, data):
    folder = fit('a', '--castling-ramp', '.9', '1', '--model-ema', '--model-ema-decay', '.5')
    assert seen(folder)[0][0] > .3
    for epoch in range(2):
        assert_measured(data, folder, epoch, '--use-ema')


NOISY = [
    '--epochs', '3', '--castling-ramp', '0', '.7', '--mixup', '.2', '--drop-path', '.2', '--reprob', '.5',
    '--model-ema', '--model-ema-warmup', '--grad-accum-steps', '3', '--sched-on-updates']


def test_resumed_run_ends_like_the_uninterrupted_one(fit, capsys):
    whole, part = fit('whole', *NOISY), fit('part', *NOISY)
    for name in ('checkpoint-1', 'checkpoint-2', 'model_best'):  # as if it had ended after epoch 0
        (part / f'{name}.pth.tar').unlink()
    os.replace(part / 'checkpoint-0.pth.tar', part / 'last.pth.tar')
    capsys.readouterr()
    fit('part', *NOISY, '--resume', str(part / 'last.pth.tar'))
    shown = capsys.readouterr()
    assert 'epochs 1 to 2' in shown.out and 'not an exact continuation' not in shown.err
    assert_same_state(saved(whole), saved(part))
    assert (whole / 'summary.csv').read_text() == (part / 'summary.csv').read_text()
    density = [row[0] for row in seen(whole)]
    assert 0 < density[0] < .7 and density[1] == density[2] == 0  # the ramp was under way


def test_ramp_counts_updates(fit, monkeypatch):
    """Not forward passes: 4 batches, 3 to an update."""
    steps, made = [], []
    step, init = CastlingSchedule.step, CastlingSchedule.__init__
    monkeypatch.setattr(CastlingSchedule, 'step', lambda self, n=None: (step(self, n), steps.append(self.steps))[0])
    monkeypatch.setattr(CastlingSchedule, '__init__', lambda self, *args: (init(self, *args), made.append(self))[0])
    fit('a', '--grad-accum-steps', '3', '--castling-ramp', '0', '1')
    assert steps[-5:] == [0, 1, 2, 3, 4] and [schedule.total_steps for schedule in made] == [4]
    assert {layer.aux.mode for layer in made[0].model.castling_layers().values()} == {'off'}


@pytest.mark.slow
def test_two_processes_have_the_same_ramp(fit, data, tmp_path):
    extra = [*PLAIN, '--opt', 'sgd', '--lr', '.1', '--castling-ramp', '0', '.6', '--epochs', '3']
    one = fit('one', *extra, '-b', '18')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2', f'--master-port={port}', '-m',
         'vitlinear.tools.train', *common(data), *extra, '-b', '9', '--output', str(tmp_path), '--experiment', 'two'],
        env={**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    states = [saved(folder)['state_dict'] for folder in (one, tmp_path / 'two')]
    for (k, a), b in zip(states[0].items(), states[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=k)
    assert [row[0] > 0 for row in seen(tmp_path / 'two')] == [True, False, False]


@pytest.mark.slow
def test_compiled_training_has_the_same_ramp(fit):
    extra = ['--castling-ramp', '.5', '.6', *PLAIN, '-b', '9']
    kwargs = dict(embed_dims=(8, 8), depths=(1, 1), num_heads=(1, 1))
    eager = fit('eager', *extra, **kwargs)
    compiled = fit('compiled', *extra, '--torchcompile', 'aot_eager', **kwargs)
    for (k, a), b in zip(saved(eager)['state_dict'].items(), saved(compiled)['state_dict'].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=k)
    first, second = seen(compiled)
    assert first[0] > second[0] == 0


@pytest.mark.parametrize(('ramp', 'kwargs', 'answer'), [
    (['.7', '.1'], {}, '--castling-ramp 0.7 0.1: ramp=(0.7, 0.1) must be two rising shares'),
    (['-.1', '.5'], {}, '--castling-ramp -0.1 0.5: '),
    (['.1', '1.5'], {}, '--castling-ramp 0.1 1.5: '),
    (['nan', '1'], {}, '--castling-ramp nan 1.0: '),
    (['.1', 'x'], {}, "invalid float value: 'x'"),
    (['.1', '.7'], dict(softmax_below=999), 'no layers with an auxiliary branch'),
    (['.1', '.7'], dict(castling_steps=8), 'castling_steps'),
])
def test_mistakes_get_one_line(fit, capsys, tmp_path, ramp, kwargs, answer):
    fit('a', '--castling-ramp', *ramp, expect=2, **kwargs)
    err = capsys.readouterr().err
    assert answer in err and len(err.splitlines()) == 1 and err.startswith('vitlinear train: error: ')
    assert not (tmp_path / 'a').exists()


# a model that counts by itself, and what is published of it


@pytest.fixture(scope='module')
def counted(data, tmp_path_factory) -> Path:
    """A run of 8 forward passes, of which the branch takes part in the first 4."""
    root = tmp_path_factory.mktemp('runs')
    argv = common(data, castling_steps=8, castling_ramp=(.125, .5))
    assert train.main([*argv, '--model-ema', '--output', str(root), '--experiment', 'a']) == 0
    return root / 'a'


def test_count_is_kept_and_resumed(counted, data, tmp_path):
    assert [saved(counted, name)['state_dict']['castling_step'].item() for name in ('checkpoint-0', 'last')] == [4, 8]
    assert saved(counted)['state_dict_ema']['castling_step'] == 8
    part = tmp_path / 'a'
    part.mkdir()
    for name in ('args.yaml', 'summary.csv'):
        shutil.copy(counted / name, part)
    shutil.copy(counted / 'checkpoint-0.pth.tar', part / 'last.pth.tar')
    argv = common(data, castling_steps=8, castling_ramp=(.125, .5))
    assert train.main([*argv, '--model-ema', '--output', str(tmp_path), '--experiment', 'a',
                       '--resume', str(part / 'last.pth.tar')]) == 0
    assert_same_state(saved(counted), saved(part))


def test_loaded_models_know_how_far_the_ramp_is(counted):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = timm.create_model('castling_nano', num_classes=3, castling_steps=8, castling_ramp=(.125, .5), **NANO)
    model.load_state_dict(saved(counted)['state_dict'])
    assert all(stats['density'] == stats['gap'] == 0 for stats in model.castling_stats(images).values())
    half = timm.create_model('castling_nano', num_classes=3, castling_steps=16, castling_ramp=(.125, 1), **NANO)
    half.load_state_dict(saved(counted)['state_dict'])
    assert any(stats['density'] > 0 for stats in half.castling_stats(images).values())
    with pytest.raises(ValueError, match='Without the auxiliary branch an output changes'):
        half.switch_to_inference(images)
    expected = model.eval()(images)
    assert torch.equal(model.switch_to_inference(images)(images), expected)
    assert 'castling_step' not in model.state_dict()


@pytest.mark.parametrize('how', ['export', 'convert'])
def test_published_folder_has_no_trace_of_the_schedule(counted, capsys, tmp_path, how: str):
    folder = tmp_path / 'castling_nano.mine'
    argv = {'export': ['export', str(counted), str(folder)],
            'convert': ['convert', str(counted / 'last.pth.tar'), '--model', 'castling_nano', '--output', str(folder)]}
    code = cli.main(argv[how])
    assert code == 0, capsys.readouterr().err
    with safe_open(folder / 'model.safetensors', 'pt') as f:
        keys = set(f.keys())
    arguments = json.loads((folder / 'config.json').read_text())['model_args']
    assert 'castling_step' not in keys and not {'castling_steps', 'castling_ramp'} & arguments.keys()
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert {layer.aux.mode for layer in model.castling_layers().values()} == {'off'}
    state = saved(counted)['state_dict_ema']
    assert keys == state.keys() - {'castling_step'} == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# distillation


@pytest.mark.parametrize('by_itself', [True, False])
@pytest.mark.parametrize('name', TWO_HEADS)
def test_distillation(name, by_itself: bool):
    """Both heads learn, and the branch fades by either schedule."""
    torch.manual_seed(0)
    images, targets = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2] * 2)
    teacher = timm.create_model('test_resnet', num_classes=3)
    kwargs = dict(castling_steps=12, castling_ramp=(.2, .8)) if by_itself else {}
    student = timm.create_model(name, num_classes=3, **kwargs, **TWO_HEADS[name])
    task = TokenDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), distill_type='hard', task_loss_weight=.5, verbose=False)
    schedule = None if by_itself else CastlingSchedule(student, 12, (.2, .8))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    assert all(stats['density'] > .3 for stats in student.castling_stats(images).values())
    losses, ramps = [], []
    task.train()
    for _ in range(12):
        out = task(images, targets)
        optimizer.zero_grad()
        out['loss'].backward()
        for head in student.get_classifier():
            assert all(p.grad.abs().max() > 0 for p in head.parameters())
        assert all(p.grad is None for p in teacher.parameters())
        ramps.append(next(iter(student.castling_layers().values())).aux.ramp.item())
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(out['loss'].item())
    assert sum(losses[-3:]) < .8 * sum(losses[:3])
    assert ramps == pytest.approx([min(max((i - 2.4) / 7.2, 0), 1) for i in range(12)], abs=1e-6)
    expected = student.eval()(images)
    assert torch.is_tensor(expected) and torch.equal(student.switch_to_inference(images)(images), expected)


# timm's own script


def timms_train(*argv: str) -> None:
    done = subprocess.run(
        [sys.executable, '-m', 'vitlinear.tools.run', os.path.join(TIMM_SCRIPTS, 'train.py'), *argv],
        env={**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not TIMM_SCRIPTS, reason="TIMM_SCRIPTS names no checkout of timm's repository")
def test_timms_train_script_resumes_the_count(data, tmp_path):
    # one batch an epoch, so that the order of the images does not matter
    argv = [*common(data, castling_steps=3, castling_ramp=(0, .5)), *PLAIN, '-b', '18', '--epochs', '3', '--model-ema']
    argv += ['--output', str(tmp_path)]
    timms_train(*argv, '--experiment', 'whole')
    whole = tmp_path / 'whole'
    assert [saved(whole, name)['state_dict']['castling_step'].item() for name in ('checkpoint-0', 'last')] == [1, 3]
    timms_train(*argv, '--experiment', 'resumed', '--resume', str(whole / 'checkpoint-0.pth.tar'))
    resumed = saved(tmp_path / 'resumed')
    for (k, a), b in zip(saved(whole)['state_dict'].items(), resumed['state_dict'].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=k)
    assert resumed['state_dict']['castling_step'] == 3 and resumed['state_dict_ema']['castling_step'] == 3
    plain = timm.create_model('castling_nano', num_classes=3, **{**NANO, 'attn_kwargs': None})
    for key in ('state_dict', 'state_dict_ema'):
        plain.load_state_dict(resumed[key], strict=True)
    assert 'castling_step' not in plain.state_dict()


@pytest.mark.skipif(not TIMM_SCRIPTS, reason="TIMM_SCRIPTS names no checkout of timm's repository")
@pytest.mark.parametrize(('config', 'name'), [
    ('castling_levit_256_in1k_distill', 'castling_levit_128s'),
    ('castling_deit_tiny_distilled_patch16_224_in1k', 'castling_deit_tiny_distilled_patch16_224')])
def test_timms_train_script_distills(config, name, data, tmp_path):
    """The recipe, with a small model and a small teacher."""
    save_for_hf(timm.create_model('test_resnet', num_classes=3), tmp_path / 'teacher', safe_serialization=True)
    timms_train(
        '--config', str(REPO / 'configs' / f'{config}.yaml'), '--model', name,
        *words(TWO_HEADS[name], castling_steps=8), '--kd-model-name', f'local-dir:{tmp_path / "teacher"}',
        '--img-size', '32', '--num-classes', '3', '--device', 'cpu', '--amp-dtype', 'bfloat16', '-j', '0', '-b', '4',
        '--aug-repeats', '0', '--epochs', '2', '--warmup-epochs', '0', '--data-dir', data, '--output', str(tmp_path),
        '--experiment', 'a')
    state = saved(tmp_path / 'a')['state_dict']
    assert state['castling_step'] == 8 and all(v.isfinite().all() for v in state.values())
    plain = timm.create_model(name, num_classes=3, **TWO_HEADS[name])
    plain.load_state_dict(state, strict=True)
    start = saved(tmp_path / 'a', 'checkpoint-0')['state_dict']
    weights = [k for k in state if k.startswith(('head.', 'head_dist.')) and k.endswith('.weight')]
    assert len(weights) >= 2 and all(not torch.equal(start[k], state[k]) for k in weights)
