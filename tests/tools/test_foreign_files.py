"""What files of others may hold: YAML that unfolds, pickles under any name, HTML for the card."""
import gzip
import io
import json
import os
import pickle
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from _hub import PUBLISHED, make_folder
from vitlinear.tools import cli
from vitlinear.tools._folders import danger, folder_problems
from vitlinear.tools.cards import render_card

BOMBS = {
    'aliases': 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
        f'{chr(98 + i)}: &{chr(98 + i)} [{", ".join(["*" + chr(97 + i)] * 9)}]\n' for i in range(12)) + 'lr: *m\n',
    'itself': 'lr: &a [*a]\n',
    'merge': 'a: &a {k: v}\n' + ''.join(
        f'{chr(98 + i)}: &{chr(98 + i)} {{x: *{chr(97 + i)}, y: *{chr(97 + i)}, z: *{chr(97 + i)}}}\n'
        for i in range(20)) + 'lr: *u\n',
    'nesting': 'lr: ' + '[' * 100_000, 'tags': 'lr: !!python/object/apply:os.system ["true"]', 'binary': '\x00\xff',
    'long': 'lr: 1 #' + 'x' * 2 ** 21, 'list': '- a', 'number': '3'}


@pytest.mark.parametrize('bomb', BOMBS)
@pytest.mark.parametrize('door', ['--config', '--facts', 'args.yaml'])
def test_yaml_that_unfolds(tmp_path, capsys, bomb: str, door: str):
    path, start = tmp_path / 'args.yaml', time.monotonic()
    path.write_text(BOMBS[bomb], encoding='latin-1')
    (tmp_path / 'last.pth.tar').write_bytes(b'')
    words = {
        '--config': ['train', '--config', path], '--facts': ['export', tmp_path, tmp_path / 'f', '--facts', path],
        'args.yaml': ['export', tmp_path, tmp_path / 'f']}[door]
    assert cli.main(list(map(str, words))) == 2
    told = capsys.readouterr().err
    assert told.count('\n') == 1 and str(path) in told and len(told) < 1000
    assert time.monotonic() - start < 5


def test_aliases_of_a_config_count(tmp_path, capsys):
    (tmp_path / 'a.yaml').write_text('mean: &a [0.5, 0.5, 0.5]\nstd: *a\nmodel: no_such_model\n')
    assert cli.main(['train', '--config', str(tmp_path / 'a.yaml'), '--device', 'cpu']) == 2
    assert 'unknown model no_such_model' in capsys.readouterr().err


class Runs:
    def __reduce__(self):
        return os.system, ('true',)


def packed(kind: str, content: bytes) -> bytes:
    out = io.BytesIO()
    if kind == 'zip':
        with zipfile.ZipFile(out, 'w') as f:
            f.writestr('a', content)
    elif kind == 'tar':
        with tarfile.open(fileobj=out, mode='w') as f:
            f.addfile(tarfile.TarInfo('a'), io.BytesIO())
    return {
        'zip': out.getvalue(), 'tar': out.getvalue(), 'gz': gzip.compress(content), 'plain': content,
        'behind junk': b'some words\n' * 3 + content, 'zip behind junk': b'x' * 100 + packed('zip', content)
        if kind == 'zip behind junk' else b'', 'msgpack': msgpack.packb({'a': content})}[kind]


@pytest.mark.parametrize('name', ['weights.dat', 'vocab.txt', 'README', 'model.PKL', 'data.json'])
@pytest.mark.parametrize('kind', ['plain', 'zip', 'tar', 'gz', 'behind junk', 'zip behind junk', 'msgpack'])
def test_pickles_are_recognised_by_content(tmp_path, name: str, kind: str):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / name
        path.write_bytes(packed(kind, pickle.dumps({'a': Runs()}, protocol=protocol)))
        assert danger(path), protocol


@pytest.mark.parametrize('name', ['hubconf.py', 'run.sh', 'a.so', 'notebook.ipynb', 'a.bin', 'a.npz'])
def test_code_and_pickles_are_recognised_by_name(tmp_path, name: str):
    make_folder(tmp_path / 'vvt_nano.test')
    (tmp_path / 'vvt_nano.test' / name).write_text('')
    assert [p for p in folder_problems(tmp_path / 'vvt_nano.test') if p.startswith(name)]


def test_plain_files_are_none():
    """All text of this project, and its pictures."""
    root = Path(__file__).parents[2]
    files = [p for folder in ('docs', 'model_cards', 'results', 'configs') for p in (root / folder).rglob('*')]
    files = [p for p in files if p.is_file()]
    assert len(files) > 50 and [p for p in files if danger(p)] == []


def test_large_binary_files_take_seconds(tmp_path):
    """40 MB in which a pickle could begin at 25,000 places."""
    (tmp_path / 'a.dat').write_bytes((b'\x80\x04' + bytes(1598)) * 25_000)
    start = time.monotonic()
    assert danger(tmp_path / 'a.dat') is None
    assert time.monotonic() - start < 10


HTML = '<script>alert(1)</script> <img src=x onerror=y> [a](javascript:b) [c](https://d.e) \x1b[2J &amp; ```'


def test_html_of_a_record_is_text_in_the_card():
    told = PUBLISHED.provenance
    record = replace(
        PUBLISHED, limits=HTML, license='mit<b>', provenance=replace(told, **dict.fromkeys(vars(told), HTML)),
        training=replace(PUBLISHED.training, hardware=HTML, wall_time=HTML, weights=HTML, command=f'train {HTML}'),
        metrics=tuple(replace(m, split=HTML, command=HTML) for m in PUBLISHED.metrics),
        dataset=replace(PUBLISHED.dataset, name=HTML, license=HTML))
    card = render_card(record).split('---\n', 2)[2]
    prose, fence = [], ''
    for line in card.splitlines():
        mark = line[:len(line) - len(line.lstrip('`'))]
        if len(mark) >= 3 and (not fence or line == fence):
            fence = '' if fence else mark
        elif not fence:
            prose.append(line)
    text = ' '.join(prose)
    assert not fence and '<script' not in text and '<img' not in text and '\x1b' not in text
    assert '](javascript:' not in text and '[c](https://d.e)' in text and '&lt;script&gt;' in text
    assert json.dumps(card)
