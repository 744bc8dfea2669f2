"""Files of measurements, and what several rows say together."""
import os

import pytest
from _bench import point

from vitlinear.tools._errors import UsageError
from vitlinear.tools.bench import report, rows


def test_files_keep_types(tmp_path):
    row = rows.measured(point(size=224, kernel=3, batch=2), [3., 1., 2.], params_m=1.23456789, gmacs=None, peak_mib=5.)
    assert (row['median_ms'], row['p25_ms'], row['p75_ms'], row['rounds']) == (2., 1.5, 2.5, 3)
    assert (row['ms_per_image'], row['images_per_s'], row['params_m']) == (1., 1000., 1.2346)
    for name in ('a.csv', 'a.json'):
        table = rows.Table(tmp_path / name)
        table.add(row)
        table.add(rows.failed(point(size=512), 'a, "reason"'))
        table.add(rows.failed(point(size=512), 'another'))
        again = rows.read_rows(tmp_path / name)
        assert again == list(table.rows.values()) and [r['status'] for r in again] == ['ok', 'another']
        assert rows.Table(tmp_path / name).get(row) == row
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.csv', 'a.json']


def test_a_file_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    table = rows.Table(tmp_path / 'a.csv')
    before = table.path.read_bytes()
    monkeypatch.setattr(os, 'replace', lambda *args: open('/dev/full', 'wb', buffering=0).write(b'a'))
    with pytest.raises(UsageError, match=r'a.csv cannot be written: No space left'):
        table.add(rows.failed(point(), 'reason'))
    assert table.path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['a.csv']


def timed(ms: float, **changes) -> dict:
    return rows.measured(point(**changes), [ms], gmacs=1., params_m=1., peak_mib=5. * changes.get('size', 1) ** 2)


def test_exponents():
    curve = [timed(s ** 3., size=s) for s in (512, 128, 256)]
    line, = report.exponents([*curve, timed(1., model='b'), rows.failed(point(size=64), 'reason')])
    assert line.startswith('a infer fp32 batch 1 threads 1: ') and 'from 128 to 512 px' in line
    assert line.endswith('time 1.500, peak memory 1.000')


def test_crossovers():
    times = dict(
        softmax=[.01, .16, 2.56], cheap=[.005, .01, .02], dear=[1., 2., 4.], linear=[.08, .32, 1.28],
        other=[1., 2., 4.])
    found = [
        timed(ms, kind='core', model=name, size=n, threads=2 if name == 'other' else 1)
        for name, ours in times.items() for n, ms in zip((16, 64, 256), ours)]
    told = 'infer fp32 batch 1 threads 1: faster than softmax'
    assert list(report.crossovers(found)) == [
        f'cheap {told} from about 16 tokens on', f'dear {told} at none of the largest sizes, 16 to 256 tokens',
        f'linear {told} from about 130 tokens on']  # half-way between 64 and 256


def test_shares():
    gemm = timed(1., kind='ceiling', model='gemm', mode='', size=1000)
    other, model = {**gemm, 'threads': 2}, timed(10.)
    lines = list(report.shares([model, {**model, 'mode': 'train'}, {**model, 'dtype': 'bf16'}], [gemm, other]))
    assert lines[0] == 'ceiling, fp32 threads 1: 2 TFLOP/s in products of 1000 x 1000 matrices' and len(lines) == 4
    assert lines[1].startswith('Share of the ceiling: 2 x MACs / time')
    assert [line.partition(': ')[2] for line in lines[2:]] == ['0.2 TFLOP/s, 10 % of 2', '0.6 TFLOP/s, 30 % of 2']
    assert list(report.shares([model], [other])) == []
