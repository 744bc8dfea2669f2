import csv
import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import timm
import torch
from _bench import point

from vitlinear.inference.optimize import STEPS
from vitlinear.tools import cli, info
from vitlinear.tools.bench import child, command, profile, rows, steps, workers

MODELS = '''
import os, signal, time
from torch import nn

class Do(nn.Module):
    def __init__(self, what, *args):
        super().__init__()
        self.forward = lambda x: what(*args)

def good(num_classes=2):
    return nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

def slow():
    return Do(time.sleep, 600)

def dies():
    return Do(os.kill, os.getpid(), signal.SIGKILL)

def bad():
    raise RuntimeError('no such thing\\nat all')
'''


def order(folder: Path, **changes) -> dict:
    changes.setdefault('kwargs', {})
    return dict(
        row=point(**{**changes, 'kwargs': ''}), kwargs=changes['kwargs'], also=None, warmup=1, device='cpu',
        folder=str(folder))


def bench(*words, threads: str = '1') -> int:
    return cli.main(['bench', *map(str, words), '--threads', threads, '--warmup', '1', '--rounds', '2'])


def refused(capsys, *words) -> str:
    assert cli.main(['bench', *map(str, words)]) == 2
    err = capsys.readouterr().err
    assert err.startswith('vitlinear bench: error: ') and err.count('\n') == 1
    return err


def read(path: Path) -> list[dict]:
    with path.open(newline='') as f:
        return list(csv.DictReader(f))


def fail(*args, **kwargs):
    raise AssertionError('must not be called')


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Steps set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def also(tmp_path) -> str:
    (tmp_path / 'others').mkdir()
    (tmp_path / 'others' / 'zoo.py').write_text(MODELS)
    return f'{tmp_path}/others:zoo'


# points in processes of their own

@pytest.fixture(scope='module')
def nano(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('nano') / 'nano.csv'
    assert bench('vvt_nano', '--dtypes', 'bf16', '--mode', 'infer', 'train', '--out', path) == 0
    return path


def test_rows(nano):
    """Text as it stands in the file, of inference in bfloat16 and of a training step, at the model's own size."""
    found = read(nano)
    assert [row['mode'] for row in found] == ['infer', 'train'] and tuple(found[0]) == rows.FIELDS
    parameters, macs = info.count('vvt_nano')
    said = dict(
        kind='model', model='vvt_nano', runtime='eager', optimized='', dtype='bf16', size='32', batch='1', threads='1',
        memory_format='contiguous', allocator='default', kernel='', rounds='2', status='ok', torch=torch.__version__,
        timm=timm.__version__, onnxruntime='')
    for row in found:
        assert {k: row[k] for k in said} == said and row['cpu'] and row['vitlinear']
        assert float(row['params_m']) == pytest.approx(parameters / 1e6, rel=1e-4)
        assert float(row['gmacs']) == pytest.approx(macs / 1e9, rel=1e-4)
        assert 0 < float(row['p25_ms']) <= float(row['median_ms']) <= float(row['p75_ms'])
        assert float(row['images_per_s']) == pytest.approx(1e3 / float(row['ms_per_image']), rel=1e-3)
        assert 100 < float(row['peak_mib']) < 4000
    assert float(found[1]['median_ms']) > float(found[0]['median_ms'])
    assert not [p for p in nano.parent.iterdir() if p != nano]


def test_resumes(nano, capsys, monkeypatch):
    """What is known is not measured again, unless it failed or belongs to other versions."""
    before = nano.read_bytes()
    words = ('vvt_nano', '--dtypes', 'bf16', '--mode', 'infer', 'train', '--out', nano)
    with monkeypatch.context() as m:
        m.setattr(command, 'Worker', fail)
        assert bench(*words) == 0
    assert nano.read_bytes() == before and '2 of 2 points' in capsys.readouterr().err

    asked = []
    monkeypatch.setattr(command, 'measure', lambda peers, *args: asked.extend(o['row']['mode'] for o in peers))
    assert bench(*words, '--again') == 0
    table = rows.Table(nano)
    table.add({**next(iter(table.rows.values())), 'status': 'timeout after 1 s'})
    assert bench(*words) == 0
    monkeypatch.setattr(timm, '__version__', '9')
    assert bench(*words) == 0
    assert asked == ['infer', 'train', 'infer', 'infer', 'train']
    nano.write_bytes(before)


def test_profile(tmp_path, capsys):
    """Operators of a pass with their times, which are those of the whole pass; other points stay in the file."""
    path = tmp_path / 'profile.csv'
    assert bench('vvt_nano', '--sizes', 32, 64, '--profile', path) == 0
    assert 'vvt_nano infer fp32 size 64 batch 1 threads 1: ' in capsys.readouterr().out
    found = read(path)
    assert tuple(found[0]) == profile.FIELDS
    model = timm.create_model('vvt_nano')
    for size in ('32', '64'):
        mine = {row['operator']: row for row in found if row['size'] == size}
        shares = {name: float(row['share']) for name, row in mine.items()}
        assert profile.OUTSIDE in mine and any('depthwise' in name for name in mine)
        assert sum(shares.values()) == pytest.approx(1, abs=.02)
        ms = [float(row['ms']) for row in mine.values()]
        assert ms == sorted(ms, reverse=True) and ms[-1] > 0
        assert all(share >= profile.LEAST for name, share in shares.items()
                   if name not in (profile.OTHERS, profile.OUTSIDE))
        depthwise = sum(isinstance(m, torch.nn.Conv2d) and m.groups > 1 for m in model.modules())
        assert sum(int(row['calls']) for name, row in mine.items() if 'depthwise' in name) == depthwise
    row = dict(point(model='vvt_nano', size=64), **{k: found[0][k] for k in ('cpu', 'torch')})
    profile.add(path, row, [dict(operator='mm', calls=1, ms=1., share=1.)])
    assert read(path)[:-1] == [r for r in found if r['size'] == '32'] and read(path)[-1]['operator'] == 'mm'
    path.write_text('a,b\n1,2\n')
    assert str(path) in refused(capsys, 'vvt_nano', '--profile', path) and path.read_text() == 'a,b\n1,2\n'
    assert '.csv' in refused(capsys, 'vvt_nano', '--profile', tmp_path / 'profile.json')


def test_failures(also, tmp_path, capsys):
    """They are rows of their own, and the others go on."""
    out = tmp_path / 'out.json'
    words = [f'{also}:{name}' for name in ('bad', 'good', 'dies', 'slow')]
    assert bench('--also', *words, '--sizes', 8, '--batches', 3, '--timeout', 5, '--out', out) == 1
    found = {row['model']: row for row in json.loads(out.read_text())}
    assert {name: row['status'] for name, row in found.items()} == {
        'zoo:bad': 'RuntimeError: no such thing', 'zoo:good': 'ok', 'zoo:dies': 'killed by SIGKILL',
        'zoo:slow': 'timeout after 5 s'}
    assert found['zoo:bad']['median_ms'] is None and found['zoo:dies']['rounds'] is None
    good = found['zoo:good']
    assert tuple(good) == rows.FIELDS and (good['kernel'], good['onnxruntime']) == (None, None)
    assert good['ms_per_image'] == pytest.approx(good['median_ms'] / 3, rel=1e-3)
    assert good['gmacs'] * 1e9 == pytest.approx(4 * 4 * 3 * 4 * 4 + 4 * 2) and good['params_m'] * 1e6 == 62
    told = capsys.readouterr()
    assert '3 of 4 points failed' in told.err and 'zoo:good' in told.out
    assert len(rows.read_rows(out)) == 4


def test_interrupt(also, tmp_path, monkeypatch):
    """The file stays whole and no process is left."""
    started = []

    class Interrupted(workers.Worker):
        def turn(self):
            started.append(self.process)
            raise KeyboardInterrupt

    out = tmp_path / 'out.csv'
    monkeypatch.setattr(command, 'Worker', Interrupted)
    assert bench('--also', f'{also}:good', '--sizes', 8, '--out', out) == 130
    assert rows.read_rows(out) == [] and len(started) == 1 and started[0].poll() is not None


def test_waiting_takes_no_time(also, tmp_path):
    """Of the processor: threads that wait for work do not spin until the next turn."""
    given = dict(order(tmp_path, model='zoo:good', size=64, batch=16, threads=2), also=f'{also}:good')
    worker = workers.Worker(given, 600., tmp_path / 'log')

    def used() -> float:
        fields = Path(f'/proc/{worker.process.pid}/stat').read_text().rpartition(')')[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

    with closing(worker):
        worker.prepare()
        worker.turn()
        assert worker.reason is None
        before = used()
        time.sleep(1.)
        assert used() - before < .5


def test_other_kinds(tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out.csv'
    monkeypatch.setattr(command, 'GEMM', 64)
    monkeypatch.setattr(command, 'COPY_MIB', 1)
    assert bench('--cores', 'vicinity', '--tokens', 12, '--dim', 64, '--layers', 'qna', '--sizes', 8, '--roofline',
                 '--keep-memory', '--out', out) == 0
    found = {row['kind'] + row['model']: row for row in rows.read_rows(out)}
    assert list(found) == ['ceilinggemm', 'ceilingcopy', 'corevicinity', 'layerqna']
    assert all(row['status'] == 'ok' and row['allocator'] == 'kept' for row in found.values())
    assert found['ceilinggemm']['gmacs'] == pytest.approx(64 ** 3 / 1e9, rel=1e-4)
    for row, size, kernel in ((found['corevicinity'], 12, None), (found['layerqna'], 8, 3)):
        assert (row['size'], row['kwargs'], row['kernel']) == (size, 'dim=64', kernel)
        assert row['gmacs'] > 0 and 0 <= row['peak_mib'] < 100
    assert 'GB/s in copies of 1 MiB' in capsys.readouterr().out


def test_onnxruntime(tmp_path):
    """It runs the function of our model."""
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        runtime = pytest.importorskip(name)
    out = tmp_path / 'out.csv'
    assert bench('vvt_nano', '--runtimes', 'onnxruntime', '--out', out) == 0
    row, = rows.read_rows(out)
    assert row['runtime'] == 'onnxruntime' and re.match(r'\d+\.\d+', row['onnxruntime']) and row['median_ms'] > 0

    given, path = order(tmp_path, kind='layer', model='qna', size=5, kernel=3, kwargs=dict(dim=32)), tmp_path / 'a.onnx'
    torch.manual_seed(0)
    steps.export_onnx(given, str(path))
    torch.manual_seed(0)
    layer, shape = steps.build(given, torch.device('cpu'), torch.float32)
    x = torch.rand(1, *shape)
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), layer.eval()(x).detach(), rtol=1e-3, atol=1e-4)


# turns

class Fake:
    """A worker of which every pass takes so many milliseconds; one that dies does so beside others."""

    def __init__(self, name: str, told: list, ms: float = 1., dies: bool = False):
        self.order = self.row = name
        self.told, self.each, self.dies = told, ms, dies
        self.reason, self.ms, self.peak_mib = None, [], 100.

    def prepare(self):
        self.told.append(f'prepare {self.row}')

    def turn(self):
        self.told.append(self.row)
        self.ms.append(self.each)
        self.reason = workers.KILLED if self.dies else None

    def result(self):
        return dict(model=self.row, status=self.reason or 'ok', ms=self.ms)

    def close(self):
        self.told.append(f'close {self.row}')


@pytest.mark.parametrize('fakes, rounds, seconds, order', [
    (dict(a={}, b={}, c=dict(dies=True)), 3, 1e9, 'abcabab'),
    (dict(a=dict(ms=400.), b=dict(ms=2000.)), 5, 1., 'abaa')])
def test_turns(fakes, rounds, seconds, order):
    told = []
    workers.take_turns([Fake(name, told, **kwargs) for name, kwargs in fakes.items()], rounds, seconds)
    assert ''.join(told) == order


def measure(free: float | None, make, one_at_a_time: bool, monkeypatch) -> list[tuple[str, str]]:
    emitted = []
    monkeypatch.setattr(workers, 'free_mib', lambda: free)
    workers.measure('ABC', make, 2, 1e9, one_at_a_time, emitted.append, int)
    return [(row['model'], row['status']) for row in emitted]


@pytest.mark.parametrize('one_at_a_time, free, groups', [
    (False, None, ['ABC']), (False, 1000., ['ABC']), (True, 1000., ['A', 'B', 'C']), (False, 119., ['A', 'B', 'C'])])
def test_groups(one_at_a_time, free, groups, monkeypatch):
    """As many at a time as there is memory for, or one."""
    told, expected = [], []
    found = measure(free, lambda name: Fake(name, told), one_at_a_time, monkeypatch)
    for group in groups:
        expected += [f'prepare {name}' for name in group] + [*group] * 2 + [f'close {name}' for name in group]
    assert told == expected and found == [(name, 'ok') for name in 'ABC']


def test_killed_beside_others_is_tried_alone(monkeypatch):
    told = []
    found = measure(
        None, lambda name: Fake(name, told, dies=name == 'A' and 'close A' not in told), False, monkeypatch)
    assert found == [('B', 'ok'), ('C', 'ok'), ('A', 'ok')]


def test_environment(monkeypatch):
    """The allocator is what the row says, whatever the caller's environment has."""
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '1')
    assert not set(workers.environment(3, False)) & set(workers.KEEP_MEMORY)
    kept = workers.environment(3, True)
    assert {k: kept[k] for k in workers.KEEP_MEMORY} == workers.KEEP_MEMORY and kept['OMP_NUM_THREADS'] == '3'


# steps

@pytest.mark.parametrize('mode', ['infer', 'train'])
@pytest.mark.parametrize('kind, name', [('core', name) for name in steps.CORES] + [('layer', n) for n in steps.LAYERS])
def test_cores_and_layers_run(kind: str, name: str, mode: str, tmp_path):
    given = order(tmp_path, kind=kind, model=name, mode=mode, dtype='bf16', batch=2, size=6,
                  kernel=3 if kind == 'layer' else None, kwargs=dict(dim=64))
    steps.make_step(given)()
    assert steps.count(given)['gmacs'] > 0


@pytest.mark.parametrize('name', ['shift', 'unfold'])
def test_learned_queries_are_evaluated_alike(name: str):
    layers = [steps.LAYERS[key](32, 3).eval() for key in ('qna', name)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.rand(2, 5, 6, 32)
    torch.testing.assert_close(layers[1](x), layers[0](x), rtol=1e-3, atol=1e-5)


def test_core_is_attention():
    """Of queries, keys and values as a projection leaves them."""
    core, shape = steps.build_core('softmax', 6, 2, torch.float32)
    x = torch.rand(3, *shape)
    q, k, v = (x[:, :, i].transpose(1, 2) for i in range(3))
    expected = (q @ k.transpose(2, 3) / 8).softmax(-1) @ v
    torch.testing.assert_close(core(x), expected)
    assert steps.grid(49) == (7, 7) and steps.grid(12) == (3, 4) and steps.grid(7) == (1, 7)


def test_count_by_hand(tmp_path):
    """Attention products are counted, of fused attention too, at the size that is measured."""
    n, d, heads = 4 + 1, 192, 3
    given = order(tmp_path, model='vit_tiny_patch16_224', size=32)
    block = n * (3 * d * d + d * d + 8 * d * d) + 2 * heads * n * n * (d // heads)
    macs = 4 * 3 * 16 * 16 * d + 12 * block + d * 1000
    assert steps.count(given)['gmacs'] * 1e9 == pytest.approx(macs, rel=1e-9)

    n, heads = 64, 2
    # of linear attention: k^T v, q (k^T v) and the denominators
    for name, macs in (('softmax', 2 * heads * n * n * 64), ('linear', heads * (2 * n * 64 * 64 + n * 64))):
        core = steps.count(order(tmp_path, kind='core', model=name, size=n, kwargs=dict(dim=128)))
        assert core['gmacs'] * 1e9 == pytest.approx(macs)


def test_train_step_has_gradients(tmp_path, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    monkeypatch.setattr(steps, 'build_model', lambda order: (model, (3, 2, 2)))
    steps.make_step(order(tmp_path, mode='train', dtype='bf16'))()
    assert model[1].weight.dtype == torch.float32 and model[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize('optimized, done', [('all', STEPS), ('fuse+pack', ('fuse', 'pack'))])
def test_optimized_and_compiled(tmp_path, monkeypatch, optimized, done):
    given = []
    monkeypatch.setattr(torch, 'compile', lambda model: given.append(model) or model)
    steps.make_step(order(
        tmp_path, model='castling_nano', optimized=optimized, runtime='compile', memory_format='channels_last'))()
    model, = given
    assert tuple(name for name, _ in model.optimized) == done and not model.training


def test_each_step():
    """A model as it is and with one step more at a time, beside its peers."""
    args = command.build_parser().parse_args(
        ['vvt_nano', 'qna_vit_nano', '--dtypes', 'fp32', 'bf16', '--optimize', 'each'])
    done = ['', *('+'.join(STEPS[:n]) for n in range(1, len(STEPS))), 'all']
    assert [tuple(o['row'][k] for k in ('dtype', 'model', 'optimized')) for o in command.plan(args)] == [
        *itertools.product(('fp32', 'bf16'), ('vvt_nano', 'qna_vit_nano'), done)]


def test_added_memory():
    kept = []

    def step():
        kept.append(torch.ones(16 * 2 ** 18))

    assert 14 < child.added(step) < 40


# the command

@pytest.mark.parametrize('words, told', [
    ([], 'nothing to measure'),
    (['vvt_smal'], 'unknown model vvt_smal, did you mean vvt_small'),
    (['vvt_nano.nothing'], 'vvt_nano.nothing'),
    (['xyz_*'], 'no model matches xyz_*'),
    (['vvt_nano', '--sizes', '0'], '--sizes: must be 1 or more, not 0'),
    (['vvt_nano', '--dtypes', 'int3'], "'int3'"),
    (['vvt_nano', '--timeout', '-1'], "--timeout: must be a number of seconds above 0, not '-1'"),
    (['vvt_nano', '--mode', 'train', '--optimize'], '--optimize: an optimised model cannot be trained'),
    (['vvt_nano', '--optimize', 'fuze'], '--optimize fuze: not one of castling, fuse, '),
    (['vvt_nano', '--optimize', 'each', 'fuse'], "--optimize each fuse: 'each' goes with no other"),
    (['vvt_nano', '--mode', 'train', '--runtimes', 'onnxruntime'], '--runtimes onnxruntime: for --mode infer'),
    (['vvt_nano', '--runtimes', 'onnxruntime'], 'onnxscript not found, pip install vitlinear[export]'),
    (['vvt_nano', '--device', 'cuda:99'], 'cuda:99'),
    (['vvt_nano', '--out', 'a.txt'], '--out a.txt: must be a file that ends in .csv or .json'),
    (['--also', 'nowhere:a:b', '--sizes', '8'], '--also nowhere:a:b: must be PATH:MODULE:NAME'),
    (['--cores', 'soft'], '--cores soft: not one of softmax, '),
    (['--cores', 'softmax', '--dim', '96'], '--dim 96: cores need a multiple of 64'),
    (['--layers', 'qna', '--kernels', '4'], '--kernels 4: windows of layers have odd sides'),
    (['--plot', 'a.csv'], '--plot: give a folder for the plots with --out'),
])
def test_mistakes(words, told, capsys, monkeypatch, tmp_path):
    if 'onnxruntime' in words and 'not found' not in told:
        pytest.importorskip('onnxruntime')
    monkeypatch.setattr(command, 'Worker', fail)
    monkeypatch.chdir(tmp_path)
    if 'not found' in told:
        monkeypatch.setattr(command, 'find_spec', lambda name: None if name == 'onnxscript' else True)
    assert told in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others(capsys, tmp_path):
    """They are refused, not overwritten."""
    for name, text in (('a.csv', 'model,size,median_ms\na,1,2\n'), ('b.csv', 'x\n1\n'), ('c.json', '{')):
        (tmp_path / name).write_text(text)
        assert name in refused(capsys, 'vvt_nano', '--out', tmp_path / name)
        assert (tmp_path / name).read_text() == text


def test_plan(capsys, monkeypatch):
    """Peers side by side: what differs in the model alone."""
    monkeypatch.setattr(command, 'version', lambda name: '1.0')  # an extra, which need not be there
    names = command.find_models(['vvt_*', 'vvt_nano', 'resnet18'])
    assert names == [*timm.list_models('vvt_*'), 'resnet18'] and 'vvt_nano' in names
    args = command.build_parser().parse_args([
        'vvt_nano', 'castling_nano', '--sizes', '32', '64', '--mode', 'infer', 'train', '--runtimes', 'eager',
        'onnxruntime', '--channels-last', '--threads', '1', '2', '--model-kwargs', 'num_classes=3'])
    found = [o['row'] for o in command.plan(args)]
    assert len(found) == 2 * 2 * 2 * 3 and all(row['kwargs'] == 'num_classes=3' for row in found)
    assert [row['model'] for row in found] == ['vvt_nano', 'castling_nano'] * 12
    assert all({**a, 'model': ''} == {**b, 'model': ''} for a, b in zip(found[::2], found[1::2]))
    assert {(r['mode'], r['runtime'], r['memory_format'], bool(r['onnxruntime'])) for r in found} == {
        ('infer', 'eager', 'channels_last', False), ('train', 'eager', 'channels_last', False),
        ('infer', 'onnxruntime', 'contiguous', True)}
    assert len({rows.key(row) for row in found}) == len(found)


def test_plot_is_passed_on(tmp_path, monkeypatch, capsys):
    rows.write_rows([rows.measured(point(), [1.])], tmp_path / 'a.json')
    given = []
    monkeypatch.setattr(command.plot, 'plot', lambda found, folder: given.append((found, folder)) or [folder / 'b.svg'])
    assert cli.main(['bench', '--plot', str(tmp_path / 'a.json'), '--out', str(tmp_path / 'plots')]) == 0
    (row,), folder = given[0]
    assert (row['model'], row['median_ms'], row['kernel'], folder) == ('a', 1., None, tmp_path / 'plots')
    assert capsys.readouterr().out == f'{tmp_path}/plots/b.svg\n'
