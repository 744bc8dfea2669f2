import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from _runs import COMMON, PLAIN, REPO, TINY, assert_same_state, finish, rows, saved, start, weights
from PIL import Image
from timm.models import load_checkpoint
from timm.utils import load_checkpoint_metadata

from _data import cifar100, fashion_mnist, image_folder
from vitlinear.tools import train, validate
from vitlinear.tools._train_data import posterize
from vitlinear.tools.train import build_parser, main

TIMM_SCRIPTS = os.environ.get('TIMM_SCRIPTS', '')
# everything random at once
NOISY = [
    '--mixup', '0.2', '--cutmix', '1', '--drop-path', '0.2', '--drop', '0.1', '--aa', 'rand-m9-mstd0.5-inc1',
    '--reprob', '0.5', '--model-ema', '--model-ema-warmup', '--grad-accum-steps', '3', '--sched-on-updates',
    '--warmup-epochs', '1', '--epochs', '3', '-j', '2', '--log-interval', '1',
]


# what a run leaves behind


def test_a_run_learns_and_leaves_what_timm_reads(fit, data, capsys):
    folder = fit('a', *PLAIN, '--epochs', '4')
    out = capsys.readouterr().out.splitlines()
    assert {p.name for p in folder.iterdir()} == {
        'args.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar',
        *(f'checkpoint-{i}.pth.tar' for i in range(4))}
    summary = rows(folder)
    assert [list(row) for row in summary] == [['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']] * 4
    best = max(range(4), key=lambda i: float(summary[i]['eval_top1']))
    assert float(summary[best]['eval_top1']) > 80
    assert float(summary[-1]['train_loss']) < float(summary[0]['train_loss'])
    assert out[-1].startswith('best top-1 ') and out[-1].endswith(f'in epoch {best}: {folder / "model_best.pth.tar"}')
    assert sum(line.startswith('epoch ') and 'top-5 100.00 %' in line for line in out) == 4

    model = timm.create_model('test_vit', img_size=32, num_classes=3)
    load_checkpoint(model, str(folder / 'model_best.pth.tar'))
    argv = [*TINY, '--device', 'cpu', '-j', '0', '--data-dir', data, '--checkpoint', str(folder / 'model_best.pth.tar')]
    measured = validate.validate(validate.build_parser().parse(argv))
    assert measured['top1'] == pytest.approx(float(summary[best]['eval_top1']), abs=1e-3)


def test_args_yaml_repeats_the_run(fit, tmp_path, data):
    first = fit('first', *NOISY, '-j', '0')
    config = yaml.safe_load((first / 'args.yaml').read_text())
    assert config['device_modules'] == ['vitlinear'] and config['model_kwargs'] == {'img_size': 32}
    config['experiment'] = 'second'
    (tmp_path / 'again.yaml').write_text(yaml.safe_dump(config))
    assert main(['--config', str(tmp_path / 'again.yaml')]) == 0
    assert_same_state(saved(first), saved(tmp_path / 'second'))


def test_number_of_checkpoints_and_metric(fit):
    folder = fit('a', '--epochs', '4', '--checkpoint-hist', '2', '--eval-metric', 'loss')
    losses = [float(row['eval_loss']) for row in rows(folder)]
    kept = sorted(range(4), key=lambda i: losses[i])[:2]
    assert {p.name for p in folder.glob('checkpoint-*')} == {f'checkpoint-{i}.pth.tar' for i in kept}
    best = load_checkpoint_metadata(str(folder / 'model_best.pth.tar'))
    assert best['metric'] == min(losses)


def test_without_evaluation(fit, capsys):
    folder = fit('a', '--val-split', '')
    assert list(rows(folder)[0]) == ['epoch', 'train_loss', 'lr']
    assert 'best loss' in capsys.readouterr().out


# the formats of data


def test_fashion_mnist_with_a_model_of_ours(tmp_path, capsys):
    argv = ['--model', 'vvt_nano', '--in-chans', '1', '--num-classes', '10', '--img-size', '28', *COMMON, '-b', '8']
    argv += ['--dataset', 'torch/fashion_mnist', '--data-dir', str(fashion_mnist(tmp_path))]
    assert main([*argv, '--output', str(tmp_path), '--experiment', 'a', '--hflip', '0.5']) == 0
    assert 'vvt_nano' in capsys.readouterr().out
    assert len(rows(tmp_path / 'a')) == 1


def test_cifar100(tmp_path, monkeypatch):
    argv = [*TINY, *COMMON, '--num-classes', '100', '-b', '50', '--dataset', 'torch/cifar100']
    argv += ['--data-dir', str(cifar100(tmp_path, monkeypatch)), '--output', str(tmp_path), '--experiment', 'a']
    assert main([*argv, '--aa', 'rand-m9-mstd0.5-inc1', '--mixup', '0.8']) == 0
    assert len(rows(tmp_path / 'a')) == 1


# options


@pytest.mark.parametrize('extra', [
    ['--amp', '--amp-dtype', 'bfloat16'],
    ['--channels-last', '--clip-grad', '1', '--layer-decay', '0.7', '--head-init-bias', '-2'],
    ['--torchcompile', 'eager', '--model-ema'],
    ['--no-prefetcher', '--mixup', '0.5', '--mixup-off-epoch', '1', '--epochs', '2'],
    ['--bce-loss', '--opt', 'lookahead_adamw', '--clip-grad', '0.1', '--clip-mode', 'agc'],
    ['--model-ema', '--model-ema-force-cpu', '--grad-checkpointing', '--head-init-scale', '2'],
], ids=lambda extra: extra[0].lstrip('-'))
def test_options_train(fit, extra):
    folder = fit('a', *extra)
    assert all(v.isfinite().all() for v in weights(folder).values())


def test_gradient_accumulation_equals_one_large_batch(fit):
    large = fit('large', *PLAIN, '-b', '18', '--opt', 'sgd')
    small = fit('small', *PLAIN, '-b', '6', '--grad-accum-steps', '4', '--opt', 'sgd')  # one group, left over: 3 of 4
    for (k, a), b in zip(weights(large).items(), weights(small).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=k)


def test_learning_rate_from_batch():
    for opt, expected in (('sgd', 0.1 * 512 / 256), ('adamw', 0.1 * 2 ** 0.5)):
        args = build_parser().parse(['--opt', opt, '-b', '64', '--grad-accum-steps', '4'])
        args.world_size = 2
        train.set_lr(args)
        assert args.lr == pytest.approx(expected)


@pytest.mark.parametrize('policy', ['rand-m10-inc1', 'rand-m9-mstd2-inc1', 'v0', 'original', 'augmix-m10-w2', '3a'])
def test_every_augmentation_policy_runs(data, policy):
    args = build_parser().parse([*TINY, *COMMON, '--data-dir', data, '--aa', policy, '--val-split', ''])
    args.distributed, args.world_size = False, 1
    torch.manual_seed(0)
    config = {'input_size': (3, 32, 32), 'mean': (.5,) * 3, 'std': (.5,) * 3, 'interpolation': 'bicubic'}
    loader = train.make_loaders(args, config, torch.device('cpu'))[0]
    for _ in range(20):
        for input, _ in loader:
            assert input.shape == (4, 3, 32, 32)


def test_posterize_to_no_bits_is_black():
    image = Image.new('RGB', (2, 2), (200, 100, 7))
    assert posterize(image, 0).getpixel((0, 0)) == (0, 0, 0)
    assert posterize(image, 1).getpixel((0, 0)) == (128, 0, 0)
    assert posterize(image, 8) is image
    assert posterize(image.convert('L'), 0).getpixel((1, 1)) == 0



# interruption


def test_resume_at_an_epoch_boundary_is_exact(fit, capsys):
    whole = fit('whole', *NOISY)
    part = fit('part', *NOISY)
    for name in ('checkpoint-1', 'checkpoint-2', 'model_best'):  # as if the run had ended after epoch 0
        (part / f'{name}.pth.tar').unlink()
    os.replace(part / 'checkpoint-0.pth.tar', part / 'last.pth.tar')
    capsys.readouterr()
    fit('part', *NOISY, '--resume', str(part / 'last.pth.tar'))
    shown = capsys.readouterr()
    assert 'epochs 1 to 2' in shown.out and 'not an exact continuation' not in shown.err
    assert_same_state(saved(whole), saved(part))
    assert (whole / 'summary.csv').read_text() == (part / 'summary.csv').read_text()
    best = [load_checkpoint_metadata(str(f / 'model_best.pth.tar')) for f in (whole, part)]
    assert best[0]['epoch'] == best[1]['epoch'] and best[0]['metric'] == best[1]['metric']


def test_resume_after_a_kill_in_mid_epoch_is_exact(fit, data, tmp_path):
    whole = fit('whole', *NOISY)
    argv = [*TINY, *COMMON, '--data-dir', data, '--output', str(tmp_path), '--experiment', 'cut', *NOISY]
    process = start(*argv)
    for line in process.stdout:
        if line.startswith('epoch 1 [1/2]'):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(rows(tmp_path / 'cut')) < 3
    fit('cut', *NOISY, '--resume', str(tmp_path / 'cut' / 'last.pth.tar'))
    assert_same_state(saved(whole), saved(tmp_path / 'cut'))
    assert (whole / 'summary.csv').read_text() == (tmp_path / 'cut' / 'summary.csv').read_text()


def test_resume_with_other_arguments_says_so(fit, capsys):
    folder = fit('a')
    fit('a', '--epochs', '2', '--drop', '0.5', '--resume', str(folder / 'last.pth.tar'))
    assert 'not an exact continuation, arguments differ: drop 0.0 -> 0.5, epochs 1 -> 2' in capsys.readouterr().err


def test_resume_of_a_finished_run_keeps_its_best(fit, capsys):
    folder = fit('a')
    best = capsys.readouterr().out.splitlines()[-1]
    before = (folder / 'summary.csv').read_text()
    fit('a', '--resume', str(folder / 'last.pth.tar'))
    assert capsys.readouterr().out.splitlines()[-1] == best
    assert (folder / 'summary.csv').read_text() == before


def test_best_is_found_again_when_killed_between_two_files(fit):
    folder = fit('a', '--epochs', '2')
    for path in (*folder.glob('checkpoint-*'), folder / 'model_best.pth.tar'):
        path.unlink()
    state = torch.load(folder / 'last.pth.tar', weights_only=False)
    state['saver'] = {'checkpoint_files': [], 'best_epoch': None, 'best_metric': None, 'pending': (1, state['metric'])}
    torch.save(state, folder / 'last.pth.tar')
    fit('a', '--epochs', '2', '--resume', str(folder / 'last.pth.tar'))
    assert load_checkpoint_metadata(str(folder / 'model_best.pth.tar'))['metric'] == state['metric']
    assert (folder / 'checkpoint-1.pth.tar').exists()


def test_half_written_checkpoint_replaces_nothing(fit, monkeypatch, capsys):
    folder = fit('a')
    before = (folder / 'last.pth.tar').read_bytes()

    def save(state: Any, path: str) -> None:
        Path(path).write_bytes(b'half')
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(torch, 'save', save)
        fit('a', '--epochs', '2', '--resume', str(folder / 'last.pth.tar'), expect=130)
    assert (folder / 'last.pth.tar').read_bytes() == before
    assert f'--resume {folder / "last.pth.tar"}' in capsys.readouterr().err


@pytest.mark.parametrize('changed', [
    dict(checkpoint_files=[('checkpoint-0.pth.tar', 99.), ('{outside}', -5.)]),
    dict(checkpoint_files=[('../secret.pth.tar', 1000.)], best_metric=1000.),
    dict(checkpoint_files=[('checkpoint-0.pth.tar/../../secret.pth.tar', 1000.)]),
    dict(checkpoint_files=[('last.pth.tar', 1.)]),
    dict(checkpoint_files=[('checkpoint-0.pth.tar\n', 1.)]),
    dict(checkpoint_files='checkpoint-0.pth.tar'),
    dict(checkpoint_files=[('checkpoint-0.pth.tar', 'good')]),
    dict(pending=('/../../secret', 5.)),
    dict(pending=(-1, 5.)),
    dict(pending=(0, float('nan'))),
    dict(best_epoch='0'),
    dict(best_metric='good'),
    dict(pending=None),
])
def test_history_names_no_other_files(fit, tmp_path, capsys, changed: dict[str, Any]):
    """The saver deletes, links and overwrites what the history in a checkpoint names: its own run's files alone."""
    folder, secret = fit('a', '--checkpoint-hist', '2'), tmp_path / 'secret.pth.tar'
    secret.write_bytes(b'secret')
    if changed.get('checkpoint_files', '')[-1:] == [('{outside}', -5.)]:
        changed = {**changed, 'checkpoint_files': [('checkpoint-0.pth.tar', 99.), (str(secret), -5.)]}
    last = folder / 'last.pth.tar'
    checkpoint = torch.load(last, weights_only=False)
    checkpoint['saver'].update(changed)
    torch.save(checkpoint, last)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    capsys.readouterr()
    fit('a', '--checkpoint-hist', '2', '--epochs', '4', '--resume', str(last), expect=2)
    error = capsys.readouterr().err
    assert 'the history of the run has' in error and 'which must be' in error and 'Traceback' not in error
    assert secret.read_bytes() == b'secret' and {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_non_finite_loss_stops_the_run(fit, monkeypatch, capsys):
    folder = fit('a')
    before = (folder / 'last.pth.tar').read_bytes()
    monkeypatch.setattr(train, 'make_loss', lambda args, mixing: lambda output, target: output.sum() * float('nan'))
    fit('a', '--epochs', '2', '--resume', str(folder / 'last.pth.tar'), expect=1)
    error = capsys.readouterr().err.splitlines()[-1]
    assert 'loss is nan in epoch 1, update 0, at learning rate 0.0005' in error and 'last.pth.tar' in error
    assert (folder / 'last.pth.tar').read_bytes() == before


@pytest.mark.parametrize('lr, answer', [('3e38', 'weights are not finite'), ('1e37', 'evaluation loss is nan')])
def test_weights_ruined_by_the_last_update_are_not_saved(fit, capsys, lr, answer):
    folder = fit('a', *PLAIN, '-b', '18', '--opt', 'sgd', '--lr', lr, '--weight-decay', '10', expect=1)
    assert f'{answer} after epoch 0' in capsys.readouterr().err
    assert not (folder / 'last.pth.tar').exists()


# several processes


def test_two_processes_train_and_evaluate_like_one(fit, data, tmp_path):
    common = [*PLAIN, '--opt', 'sgd', '--lr', '0.1', '--epochs', '2']
    one = fit('one', *common, '-b', '18')
    argv = [*TINY, *COMMON, '--data-dir', data, '--output', str(tmp_path), *common]
    finish(start(*argv, '-b', '9', '--experiment', 'two', '-vb', '4', processes=2))
    finish(start(*argv, '-b', '3', '--grad-accum-steps', '3', '--experiment', 'steps', processes=2))
    for name in ('two', 'steps'):
        for (k, a), b in zip(weights(one).items(), weights(tmp_path / name).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=k)
        for row, expected in zip(rows(tmp_path / name), rows(one), strict=True):
            assert [float(v) for v in row.values()] == pytest.approx([float(v) for v in expected.values()], rel=1e-4)


def test_evaluation_by_two_processes_counts_each_image_once(tmp_path):
    root = image_folder(tmp_path / 'images', splits=('train',), per_class=4)
    image_folder(root, splits=('validation',), per_class=3)  # 9 images in two processes: one is seen twice
    argv = [*TINY, *COMMON, *PLAIN, '-b', '6', '--data-dir', str(root), '--output', str(tmp_path)]
    finish(start(*argv, '--experiment', 'two', processes=2))
    args = validate.build_parser().parse([
        *TINY, '--device', 'cpu', '-j', '0', '-b', '4', '--data-dir', str(root),
        '--checkpoint', str(tmp_path / 'two' / 'last.pth.tar')])
    assert validate.validate(args)['top1'] == pytest.approx(float(rows(tmp_path / 'two')[0]['eval_top1']), abs=1e-3)


def test_failure_of_one_process_ends_the_others(tmp_path, data):
    script = tmp_path / 'start.py'
    script.write_text(
        f'import os, sys; sys.path.insert(0, {str(REPO)!r})\n'
        'from vitlinear.tools import train\n'
        'if os.environ["RANK"] == "1":\n'
        '    train.make_loss = lambda args, mixing: lambda output, target: output.sum() * float("nan")\n'
        'sys.exit(train.main())\n')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2', f'--master-port={port}', str(script),
         *TINY, *COMMON, '--data-dir', data, '--output', str(tmp_path), '--experiment', 'a'],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert 'error (rank 1): loss is nan in epoch 0, update 0' in done.stderr


# timm's own script


@pytest.mark.skipif(not TIMM_SCRIPTS, reason="TIMM_SCRIPTS names no checkout of timm's repository")
@pytest.mark.parametrize('name', ['train', 'validate'])
def test_flags_are_those_of_timms_script(name):
    spec = importlib.util.spec_from_file_location(f'timm_{name}', os.path.join(TIMM_SCRIPTS, f'{name}.py'))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    theirs = {a.dest: a for a in script.parser._actions}
    program = {'train': train, 'validate': validate}[name]
    own = {'config', 'castling_ramp', 'max_unreadable'}
    ours = {a.dest: a for a in program.build_parser()._actions if a.dest not in own}
    for dest, action in ours.items():
        assert (action.default, action.nargs, action.const, set(action.option_strings)) == (
            theirs[dest].default, theirs[dest].nargs, theirs[dest].const, set(theirs[dest].option_strings)), dest
    for dest in theirs.keys() - ours.keys():
        assert program.UNSUPPORTED[dest] == theirs[dest].default, dest


@pytest.mark.skipif(not TIMM_SCRIPTS, reason="TIMM_SCRIPTS names no checkout of timm's repository")
def test_timms_train_script_gets_the_same_weights(fit, data, tmp_path):
    # one batch an epoch, so that the order of the images does not matter
    extra = [*PLAIN, '-b', '18', '--epochs', '2', '--clip-grad', '1', '--model-ema', '--opt', 'momentum']
    ours = fit('ours', *extra)
    argv = [*TINY, *COMMON, '--data-dir', data, '--output', str(tmp_path), '--experiment', 'theirs', *extra]
    done = subprocess.run(
        [sys.executable, '-m', 'vitlinear.tools.run', os.path.join(TIMM_SCRIPTS, 'train.py'), *argv],
        env={**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for (k, a), b in zip(weights(ours).items(), weights(tmp_path / 'theirs').values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=k)
    assert [float(row['lr']) for row in rows(ours)] == [float(row['lr']) for row in rows(tmp_path / 'theirs')]
