"""Image files that cannot be read: what training goes on without, and what evaluation leaves out."""
import os
import struct
import time
import zlib
from pathlib import Path

import pytest
from _runs import COMMON, TINY, rows

from _data import image_folder
from vitlinear.tools import cli


def oversize(path: Path) -> None:
    """A PNG whose header speaks of 60000 by 60000 pixels."""
    head = b'IHDR' + struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + head + struct.pack('>I', zlib.crc32(head)))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to('/dev/zero')


BAD = {
    'truncated': lambda path: path.write_bytes(path.read_bytes()[:200]), 'empty': lambda path: path.write_bytes(b''),
    'text': lambda path: path.write_text('no image'), 'oversize': oversize, 'fifo': fifo, 'device': device,
    'missing': lambda path: (path.unlink(), path.symlink_to('/no/such/file')),
    'flipped': lambda path: path.write_bytes(path.read_bytes()[:60] + b'\xff' * 20 + path.read_bytes()[80:])}


@pytest.fixture
def root(tmp_path) -> Path:
    return image_folder(tmp_path / 'images', per_class=10)


def train(root: Path, *extra: str) -> int:
    return cli.main([
        'train', *TINY, *COMMON, '--data-dir', str(root), '--output', str(root.parent), '--experiment', 'a', *extra])


def validate(root: Path, *extra: str) -> int:
    return cli.main([
        'validate', *TINY, '--num-classes', '3', '--device', 'cpu', '-j', '0', '-b', '7', '--data-dir', str(root),
        '--checkpoint', str(root.parent / 'a' / 'last.pth.tar'), *extra])


@pytest.mark.parametrize('kind', BAD)
def test_training_skips_and_validation_leaves_out(root, capsys, caplog, kind: str):
    start = time.monotonic()
    bad = [root / split / 'class1' / '2.png' for split in ('train', 'validation')]
    for path in bad:
        BAD[kind](path)
    assert train(root) == 0
    assert len(rows(root.parent / 'a')) == 1 and all(caplog.text.count(f'skipped {path}, not') == 1 for path in bad)
    capsys.readouterr()
    assert validate(root) == 1
    told = capsys.readouterr()
    assert ' 29 images, ' in told.out and '1 of 30 images could not be read' in told.err and str(bad[1]) in told.err
    assert validate(root, '--max-unreadable', '.05') == 0
    assert time.monotonic() - start < 30


@pytest.mark.parametrize('workers', ['0', '2'])
def test_accuracy_is_that_of_the_others(root, capsys, workers: str):
    assert train(root, '--epochs', '2') == 0
    for i in range(3):
        (root / 'validation' / 'class1' / f'{i}.png').write_bytes(b'')
    capsys.readouterr()
    assert validate(root, '--max-unreadable', '.2', '-j', workers) == 0
    left = capsys.readouterr().out.splitlines()[-1].rpartition(',')[0]
    for i in range(3):
        (root / 'validation' / 'class1' / f'{i}.png').unlink()
    assert validate(root) == 0
    assert capsys.readouterr().out.splitlines()[-1].rpartition(',')[0] == left


@pytest.mark.parametrize('workers', ['0', '2'])
@pytest.mark.parametrize('share', [.2, 1.])
def test_too_many_end_the_run_with_a_list(root, capsys, workers: str, share: float):
    files = sorted((root / 'train').rglob('*.png'))
    for path in files[:int(len(files) * share)]:
        path.write_bytes(b'')
    assert train(root, '-j', workers) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith('vitlinear train: error: ') and 'of 30 images could not be read' in line
    assert '.png, ' in line and '--max-unreadable' in line


def test_nothing_to_validate(root, capsys):
    assert train(root) == 0
    for path in (root / 'validation').rglob('*.png'):
        path.write_bytes(b'')
    assert validate(root, '--max-unreadable', '1') == 1
    assert 'none of the 30 images could be read' in capsys.readouterr().err


def test_the_share_is_one(capsys):
    assert cli.main(['train', '--max-unreadable', '2']) == 2
    assert '--max-unreadable: must be between 0 and 1, not 2' in capsys.readouterr().err
