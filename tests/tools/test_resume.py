"""What `--resume` takes and refuses, what a kill leaves, and what stops a command from outside: told in one line."""
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from _runs import COMMON, REPO, TINY, assert_same_state, rows, saved, start

from vitlinear.tools import _errors, cli
from vitlinear.tools._errors import outside_problem, printable, run_script
from vitlinear.tools._resume import trim_summary

FULL = Path('/dev/full')


def one_line(told: str) -> str:
    lines = [line for line in told.strip().splitlines() if line.startswith('vitlinear ')]
    assert len(lines) == 1 and 'Traceback' not in told and 'Exception ignored' not in told, told
    return lines[0]


# what a checkpoint may hold

@pytest.fixture(scope='module')
def run(data, tmp_path_factory) -> Path:
    """A run of one epoch with a moving average."""
    folder = tmp_path_factory.mktemp('run')
    argv = [*TINY, *COMMON, '--data-dir', data, '--output', str(folder), '--experiment', 'a', '--model-ema']
    assert cli.main(['train', *argv]) == 0
    return folder / 'a'


def resumed(run: Path, tmp_path: Path, data: str, changed: dict[str, Any], *extra: str) -> int:
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    checkpoint.update(changed)
    for key in [k for k, v in changed.items() if v is KeyError]:
        del checkpoint[key]
    torch.save(checkpoint, tmp_path / 'changed.pth.tar')
    return cli.main([
        'train', *TINY, *COMMON, '--data-dir', data, '--output', str(tmp_path), '--experiment', 'b', '--model-ema',
        '--epochs', '2', '--resume', str(tmp_path / 'changed.pth.tar'), *extra])


VALUES = [None, 'text', -1, float('nan'), 10 ** 12, True, [], [(1, 2)], {}, {'a': 'b'}, torch.zeros(2), KeyError]
ENTRIES = ['epoch', 'arch', 'optimizer', 'version', 'args', 'state_dict', 'state_dict_ema', 'saver', 'metric']


@pytest.mark.parametrize('entry', ENTRIES)
def test_no_entry_ends_in_a_traceback(run, data, tmp_path, capsys, entry: str):
    for i, value in enumerate(VALUES):
        (tmp_path / str(i)).mkdir()
        capsys.readouterr()
        code = resumed(run, tmp_path / str(i), data, {entry: value})
        told = capsys.readouterr().err
        assert code in (0, 2), (value, told)
        if code:
            assert 'changed.pth.tar' in one_line(told) or 'epochs' in told, (value, told)
            assert not (tmp_path / str(i) / 'b').exists() or 'first update' in told, (value, told)


@pytest.mark.parametrize(('changed', 'words'), [
    (dict(epoch=-1), ['epoch -1', 'not negative']),
    (dict(epoch=10 ** 6), ['the run has 2 epochs', 'number 1000001', '--epochs']),
    (dict(epoch=float('nan')), ['epoch nan']),
    (dict(arch=3), ['arch 3', 'the name of a model']),
    (dict(args=['a']), ["args ['a']", 'a Namespace']),
    (dict(args=Namespace(lr=3.)), None),
    (dict(state_dict_ema=KeyError), ['holds no moving average', '--initial-checkpoint']),
    (dict(state_dict_ema={'a': torch.zeros(3)}), ['its moving average']),
    (dict(state_dict={'a': torch.zeros(3)}), ['changed.pth.tar']),
    (dict(optimizer={'state': {}, 'param_groups': []}), ['changed.pth.tar']),
    (dict(saver='x'), ['the history of the run has the form']),
])
def test_what_is_wrong_is_named(run, data, tmp_path, capsys, changed, words):
    code = resumed(run, tmp_path, data, changed)
    told = capsys.readouterr().err
    assert code == (2 if words else 0), told
    for word in words or ():
        assert word in one_line(told)


def test_average_of_another_model(run, data, tmp_path, capsys):
    other = {k: v[:1] for k, v in saved(run)['state_dict_ema'].items() if v.ndim}
    assert resumed(run, tmp_path, data, dict(state_dict_ema=other)) == 2
    assert 'its moving average' in one_line(capsys.readouterr().err)


# what a kill leaves

def test_what_a_kill_leaves_is_mended(fit, data, tmp_path):
    """The numbered copy of an epoch that was not the best, half copies, an empty args.yaml and half a row."""
    more = ['--epochs', '3', '--checkpoint-hist', '2', '--model-ema']
    whole, cut = fit('whole', *more), fit('cut', *more)
    state = saved(cut)['saver']
    epoch = state['pending'][0]
    assert epoch == 2
    (cut / f'checkpoint-{epoch}.pth.tar').unlink(missing_ok=True)
    for name in ('tmp.pth.tar', 'checkpoint-2.pth.tar.new', 'model_best.pth.tar.new'):
        (cut / name).write_bytes(b'half')
    (cut / 'args.yaml').write_text('')
    summary = (cut / 'summary.csv').read_text()
    (cut / 'summary.csv').write_text(summary + '3,0.1')
    fit('cut', *more, '--resume', str(cut / 'last.pth.tar'))
    assert {p.name for p in cut.iterdir()} == {p.name for p in whole.iterdir()}
    assert (cut / 'args.yaml').stat().st_size > 0 and (cut / 'summary.csv').read_text() == summary
    for path in whole.glob('*.pth.tar'):
        assert_same_state(saved(whole, path.name[:-8]), saved(cut, path.name[:-8]))


def test_an_older_checkpoint_keeps_its_own_weights(fit):
    extra = ['--epochs', '3', '--model-ema']
    folder = fit('a', *extra)
    before = saved(folder, 'checkpoint-1')
    fit('a', *extra, '--resume', str(folder / 'checkpoint-1.pth.tar'))
    assert_same_state(before, saved(folder, 'checkpoint-1'))


@pytest.mark.parametrize(('text', 'left'), [
    ('epoch,loss\n0,1\n1,2\n', 'epoch,loss\n0,1\n'),
    ('epoch,loss\n0,1\n1', 'epoch,loss\n0,1\n'),
    ('epoch,loss\n0,1\n0x,1\nepoch,loss\n,\n', 'epoch,loss\n0,1\n'),
    ('epoch,loss\n1,2\n', ''),
    ('', ''),
])
def test_trim_summary(tmp_path, text: str, left: str):
    (tmp_path / 'summary.csv').write_text(text)
    trim_summary(str(tmp_path / 'summary.csv'), 1)
    assert (tmp_path / 'summary.csv').read_text() == left


@pytest.mark.parametrize('content', [b'\xff\xfe\x00', None])
def test_no_summary(fit, capsys, content: bytes | None):
    folder = fit('a')
    (folder / 'summary.csv').unlink()
    if content is None:
        (folder / 'summary.csv').mkdir()
    else:
        (folder / 'summary.csv').write_bytes(content)
    fit('a', '--epochs', '2', '--resume', str(folder / 'last.pth.tar'), expect=2)
    assert 'summary.csv is no table of a run' in one_line(capsys.readouterr().err)


@pytest.mark.slow
def test_killed_at_any_moment(fit, data, tmp_path):
    """Seven runs, each killed three times at moments of chance, end as the run that nobody killed."""
    extra = ['--epochs', '4', '--checkpoint-hist', '2', '--model-ema', '--log-interval', '1', '-b', '3']
    whole = fit('whole', *extra)
    rng = random.Random(0)
    for trial in range(7):
        folder = tmp_path / f'cut{trial}'
        argv = [*TINY, *COMMON, '--data-dir', data, '--output', str(tmp_path), '--experiment', folder.name, *extra]
        for _ in range(3):
            last = folder / 'last.pth.tar'
            process = start(*argv, *(['--resume', str(last)] if last.exists() else []))
            lines = 0
            stop, delay = rng.randint(1, 26), rng.random() * .05
            for line in process.stdout:
                lines += line.startswith('epoch ')
                if lines >= stop:
                    time.sleep(delay)
                    os.killpg(process.pid, signal.SIGKILL)
                    break
            process.communicate()
        last = folder / 'last.pth.tar'
        fit(folder.name, *extra, *(['--resume', str(last)] if last.exists() else []))
        assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
        assert (folder / 'summary.csv').read_text() == (whole / 'summary.csv').read_text()
        for path in whole.glob('*.pth.tar'):
            assert_same_state(saved(whole, path.name[:-8]), saved(folder, path.name[:-8]))


# what stops a command from outside

@pytest.mark.parametrize('number', sorted(_errors._BY_NUMBER))
def test_errors_of_the_system_say_what_to_do(number: int, capsys):
    def script() -> None:
        raise OSError(number, os.strerror(number), '/some/where')

    assert run_script('train', script) == 1
    line = one_line(capsys.readouterr().err)
    assert line == f'vitlinear train: error: /some/where: {_errors._BY_NUMBER[number]}'


@pytest.mark.parametrize(('error', 'words'), [
    (MemoryError(), 'out of memory'),
    (torch.OutOfMemoryError('CUDA out of memory.'), 'out of memory'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 'out of memory'),
    (RuntimeError('DataLoader worker (pid 3) is killed by signal: Killed.'), 'fewer --workers'),
    (RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0'), 'no space is left'),
    (RuntimeError('received 0 items of ancdata'), 'ulimit -n'),
    (RuntimeError('a fault of ours'), None),
    (ValueError('No space left on device'), None),
])
def test_errors_of_libraries_say_what_to_do(error: Exception, words: str | None):
    problem = outside_problem(error)
    assert problem is None if words is None else words in problem


def test_a_full_disk_keeps_the_last_checkpoint(fit, monkeypatch, capsys):
    folder = fit('a')
    before = (folder / 'last.pth.tar').read_bytes()

    def save(state: Any, path: str) -> None:
        Path(path).write_bytes(b'half')
        raise RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 4 vs 0')

    with monkeypatch.context() as m:
        m.setattr(torch, 'save', save)
        fit('a', '--epochs', '2', '--resume', str(folder / 'last.pth.tar'), expect=1)
    line = one_line(capsys.readouterr().err)
    assert 'no space is left' in line and f'the last checkpoint is {folder / "last.pth.tar"}' in line
    assert (folder / 'last.pth.tar').read_bytes() == before and not (folder / 'tmp.pth.tar').exists()


@pytest.mark.skipif(not FULL.exists(), reason='/dev/full is of Linux')
@pytest.mark.parametrize('redirection', ['>/dev/full', '| true', '2>&-', '>&- 2>&-'])
def test_outputs_that_take_nothing(redirection: str):
    words = f'{sys.executable} -m vitlinear list {redirection if "|" not in redirection else ""}'
    if '|' in redirection:
        words = f'{{ sleep 1; {words}; echo code $? >&2; }} {redirection}'
    else:
        words = f'{words}; echo code $? >&2'
    done = subprocess.run(
        ['bash', '-c', words], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(REPO)}, timeout=120)
    assert 'Traceback' not in done.stderr and 'Exception ignored' not in done.stderr
    if redirection == '>/dev/full':
        assert one_line(done.stderr).endswith('no space is left: free some, or choose a folder elsewhere')
        assert 'code 1' in done.stderr
    elif redirection == '2>&-':
        assert done.stdout.count('vvt_nano') > 0


def stop(argv: list[str], *signals: int, group: bool = True) -> tuple[int, str]:
    """Start a run with a worker, send signals in its second epoch, and read what it says."""
    process = start(*argv, '-j', '1', '--log-interval', '1')
    lines, sent = [], False
    for line in process.stdout:
        lines.append(line)
        if line.startswith('epoch 1 [1/') and not sent:
            sent = True
            for number in signals:
                (os.killpg if group else os.kill)(process.pid, number)
                time.sleep(.05)
    return process.wait(), ''.join(lines)


@pytest.mark.parametrize(('signals', 'group', 'code'), [
    ([signal.SIGINT], True, 130),
    ([signal.SIGINT, signal.SIGINT], True, 130),
    ([signal.SIGINT], False, 130),
    ([signal.SIGTERM], False, 143),
    ([signal.SIGTERM, signal.SIGINT], True, 143),
])
def test_signals_say_how_to_go_on(data, tmp_path, signals, group: bool, code: int):
    argv = [*TINY, *COMMON, '--data-dir', data, '--output', str(tmp_path), '--experiment', 'a', '--epochs', '99']
    found, told = stop(argv, *signals, group=group)
    assert found == code
    assert f'--experiment a --resume {tmp_path / "a" / "last.pth.tar"}' in one_line(told)
    assert saved(tmp_path / 'a')['epoch'] == 0 and len(rows(tmp_path / 'a')) == 1


def test_a_dead_worker_is_told(data, tmp_path):
    argv = [*TINY, *COMMON, '--data-dir', data, '--output', str(tmp_path), '--experiment', 'a', '--epochs', '99']
    process = start(*argv, '-j', '1', '--log-interval', '1')
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith('epoch 1 [1/'):
            children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
    assert process.wait() == 1
    line = one_line(''.join(lines))
    assert 'fewer --workers' in line and 'the last checkpoint is' in line


def test_too_many_open_files_is_told(data, tmp_path):
    argv = [*TINY, *COMMON, '--data-dir', data, '--output', str(tmp_path), '--experiment', 'a']
    done = subprocess.run(
        [sys.executable, '-m', 'vitlinear', 'train', *argv, '-j', '2'], capture_output=True, text=True, timeout=120,
        env={**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16)))
    assert done.returncode == 1  # queues between processes have words of their own
    assert any(line.startswith('vitlinear train: error') and 'ulimit -n' in line for line in done.stderr.splitlines())


def test_control_characters_are_written_out(capsys):
    assert printable('a\x1b[31m\rb\x00ö 画\n') == 'a\\x1b[31m\\rb\\x00ö 画\n'

    def script() -> None:
        raise OSError(errno.ENOENT, '', '\x1b[2J')

    assert run_script('x', script) == 1 and '\x1b' not in capsys.readouterr().err
