"""Runs of `vitlinear train` on small data, and what they leave behind."""
import csv
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.utils import load_checkpoint_metadata

REPO = Path(__file__).parents[2]
TINY = ['--model', 'test_vit', '--model-kwargs', 'img_size=32', '--img-size', '32', '--num-classes', '3']
COMMON = [
    '--device', 'cpu', '-j', '0', '-b', '4', '--epochs', '1', '--warmup-epochs', '0', '--opt', 'adamw', '--lr', '1e-3']
PLAIN = ['--no-aug', '--smoothing', '0']


def start(*argv: str, processes: int = 1) -> subprocess.Popen:
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    launch = []
    if processes > 1:
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        launch = ['-m', 'torch.distributed.run', f'--nproc-per-node={processes}', f'--master-port={port}']
    return subprocess.Popen(
        [sys.executable, *launch, '-m', 'vitlinear.tools.train', *argv],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        # a shell's background jobs ignore interrupts, and their children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def finish(process: subprocess.Popen) -> str:
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    return out


def flat(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        yield path, value
    else:
        for key, item in items:
            yield from flat(item, f'{path}.{key}')


def saved(folder: Path, name: str = 'last') -> dict[str, Any]:
    """A checkpoint of a run."""
    return load_checkpoint_metadata(str(folder / f'{name}.pth.tar'))


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in ('epoch', 'metric', 'state_dict', 'state_dict_ema', 'optimizer'):
        left, right = dict(flat(a[key])), dict(flat(b[key]))
        assert left.keys() == right.keys() and len(left)
        for k in left:
            same = torch.equal(left[k], right[k]) if torch.is_tensor(left[k]) else left[k] == right[k]
            assert same, (key, k)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return saved(folder)['state_dict']


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / 'summary.csv', newline='') as f:
        return list(csv.DictReader(f))
