"""Plots of measurements: what is drawn of which rows, and that it can be read."""
import itertools
import sys
from pathlib import Path

import pytest
from _bench import point

from vitlinear.tools import info
from vitlinear.tools.bench import plot as module
from vitlinear.tools.bench.plot import find_crossover, fit_exponent, plot
from vitlinear.tools.bench.rows import measured, read_rows

pytest.importorskip('matplotlib')
NAME = 'latency_infer_fp32_batch1_2threads_default'


def row(model: str, size: int, ms: float, status: str = 'ok', peak_mib: float = 100., **more) -> dict:
    """One of `vitlinear bench`, as read from its file."""
    return {**measured(point(**{'model': model, 'size': size, 'threads': 2, **more}), [ms], peak_mib=peak_mib),
            'p25_ms': .9 * ms, 'p75_ms': 1.2 * ms, 'median_ms': ms, 'status': status}


def rows_of(exponents: dict, sizes=(224, 512, 1024), **more) -> list:
    return [row(model, size, 1e-3 * size ** (2 * k), peak_mib=100 + size, **more)
            for model, k in exponents.items() for size in sizes]


def core_rows(**more) -> list:
    times = dict(softmax={64: 1., 256: 16., 1024: 256.}, xnorm={64: 4., 256: 16., 1024: 64.}, linear={64: 2.})
    return [row(name, tokens, ms, kind='core', kwargs='dim=128', **more)
            for name, line in times.items() for tokens, ms in line.items()]


@pytest.fixture
def figures(monkeypatch) -> dict:
    """Figures by name, in place of files."""
    drawn = {}
    monkeypatch.setattr(module, '_save', lambda figure, path: drawn.update({path.stem: figure}))
    return drawn


def names(files) -> list:
    return [path.name for path in files]


def texts(figure) -> list:
    return [text.get_text() for text in figure.texts]


def test_exponent():
    assert fit_exponent([(s, 3 * s ** 1.25) for s in (10, 20, 80)]) == pytest.approx(1.25)


@pytest.mark.parametrize('ours, theirs, tokens', [
    ({1: 2., 4: 2.}, {1: 1., 4: 4.}, 2.),  # halfway between 1 and 4 for logarithms
    ({1: 1., 4: 9., 16: 1.}, {1: 2., 4: 3., 16: 3.}, 8.),  # below at first, but not for good
    ({1: 1., 4: 1.}, {1: 2., 4: 2.}, 1), ({1: 1., 4: 9.}, {1: 2., 4: 2.}, None), ({1: 1.}, {2: 2.}, None)])
def test_crossover(ours, theirs, tokens):
    assert find_crossover(ours, theirs) == (tokens if tokens is None else pytest.approx(tokens))


def test_a_figure_for_each_condition(tmp_path):
    rows = rows_of(dict(vvt_tiny=1.), dtype='bf16') + rows_of(dict(vvt_tiny=1.), mode='train', batch=8)
    rows += rows_of(dict(vvt_tiny=1.), runtime='compile', optimized='all', memory_format='channels_last', threads=1)
    assert names(plot(rows, tmp_path / 'new')[::2]) == [
        f'{what}_{condition}.svg' for what in ('latency', 'memory') for condition in (
            'infer_bf16_batch1_2threads_default',
            'infer_fp32_batch1_1thread_default_compile_channels_last_optimizedall',
            'train_fp32_batch8_2threads_default')]
    rows = rows_of(dict(vvt_tiny=1.)) + rows_of(dict(vvt_tiny=1.), cpu='another machine')
    assert len(plot(rows, tmp_path / 'two')) == 8


def test_same_rows_same_files(tmp_path):
    rows = rows_of(dict(vvt_tiny=1., resnet18=1.2)) + core_rows()
    first, second = (plot(rows, tmp_path / name) for name in 'ab')
    assert names(first) == names(second) and {path.suffix for path in first} == {'.svg', '.png'}
    for a, b in zip(first, second):
        assert a.read_bytes() == b.read_bytes()
        assert '<dc:date>' not in a.read_text(errors='ignore')
    assert sorted(tmp_path.joinpath('a').iterdir()) == sorted(first)  # and no temporary file


def test_lines_and_their_exponents(figures, tmp_path):
    rows = rows_of(dict(vvt_tiny=2., vvt_small=1., resnet18=1.5)) + rows_of(dict(vvt_tiny=1.)) + [
        row('vvt_large', 224, 9.), row('vvt_medium', 224, 5.), row('vvt_medium', 512, 7., status='out of memory')]
    plot(rows, tmp_path)
    said, ax = texts(figures[NAME]), figures[NAME].axes[0]
    assert said.count('1.00') == 2 and said.count('1.50') == 1
    assert 'inference, float32, batch 1, 2 threads' in said
    assert 'a cpu; torch 1, timm 2, vitlinear 3' in said
    assert not {'vvt_large', 'vvt_medium'} & set(said)  # of one size each
    assert ax.get_xscale() == ax.get_yscale() == 'log' and ax.get_ylabel().endswith('(ms)')
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ['224\u00b2', '512\u00b2', '1024\u00b2']
    assert {len(line.get_xdata()) for line in ax.lines} == {3}
    low, high = ax.collections[0].get_paths()[0].get_extents().intervaly  # the band between the quartiles
    assert low == pytest.approx(.9e-3 * 224 ** 2) and high == pytest.approx(1.2e-3 * 1024 ** 2)


def test_batches_are_told_by_image(figures, tmp_path):
    plot([row('vvt_tiny', 224, 40., batch=4), row('vvt_tiny', 448, 160., batch=4)], tmp_path)
    assert list(figures[NAME.replace('batch1', 'batch4')].axes[0].lines[0].get_ydata()) == [10., 40.]


@pytest.mark.parametrize('count', [2, 12, 30])
def test_names_do_not_overlap(figures, tmp_path, count: int):
    models = [*info.architectures()][:count - 1] + ['swin_tiny_patch4_window7_224']
    plot(rows_of({name: 1 + 1e-4 * i for i, name in enumerate(models)}), tmp_path)
    for figure in figures.values():
        boxes = [module._box(text) for text in figure.texts]
        for a, b in itertools.combinations(boxes, 2):
            assert min(a.x1, b.x1) - max(a.x0, b.x0) < .5 or min(a.y1, b.y1) - max(a.y0, b.y0) < .5
        ax = figure.axes[0].bbox
        assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1
                   for box in boxes)
        assert ax.width > 2.3 * figure.dpi and not any(ax.overlaps(box) for box in boxes)


def test_families_have_hues_and_peers_are_grey():
    styles = module._styles(['vvt_tiny', 'vvt_small', 'qna_vit_tiny', 'resnet18', 'vvt:vvt_small', 'xvit_tiny a=1'])
    assert len({(str(s['color']), s['marker']) for s in styles.values()}) == 6

    def hue(name: str):
        from matplotlib.colors import rgb_to_hsv, to_rgb
        return rgb_to_hsv(to_rgb(styles[name]['color']))[:2]

    assert hue('vvt_tiny')[0] == pytest.approx(hue('vvt_small')[0], abs=.01)
    assert abs(hue('vvt_tiny')[0] - hue('qna_vit_tiny')[0]) > .1 and hue('xvit_tiny a=1')[1] > .3
    assert hue('resnet18')[1] == hue('vvt:vvt_small')[1] == 0
    assert module._styles(['xnorm'])['xnorm']['color'] == module._styles(['xvit_tiny'])['xvit_tiny']['color']


def test_cores(figures, tmp_path):
    assert names(plot(core_rows(), tmp_path)[:1]) == ['cores_infer_fp32_batch1_2threads_default.svg']
    figure, = figures.values()
    said, ax = texts(figure), figure.axes[0]
    assert '260 tokens' in said and 'linear' not in said and said[0].endswith('dim=128')
    ring, = (line for line in ax.lines if line.get_markerfacecolor() == 'none')
    assert (ring.get_xdata(), ring.get_ydata()) == (pytest.approx([256]), pytest.approx([16.]))


def test_accuracy_says_whose(figures, tmp_path):
    ours = [row('vvt_nano.fashion_mnist', 32, 2.), row('qna_vit_nano.fashion_mnist', 28, 3.)]
    theirs = [row('vvt_tiny', 224, 40.), row('vvt_small', 224, 80.), row('vvt_small', 512, 300.)]
    unknown = [row('resnet18', 224, 9.), row('gkvit_tiny', 224, 9.), row('vvt_large', 224, 9., kwargs='a=1')]
    plot(ours + theirs + unknown, tmp_path)
    for name, hollow, told in (('fashion-mnist', False, 'measured by us'), ('imagenet-1k', True, 'not measured here')):
        ax = figures[f'accuracy_{name}_infer_fp32_batch1_2threads_default'].axes[0]
        points = [line for line in ax.lines if line.get_marker() != 'None']
        assert len(points) == 2 and all((p.get_markerfacecolor() == 'white') == hollow for p in points)
        legend, = (text.get_text() for text in ax.get_legend().get_texts())
        assert told in legend
    vvt = info.find_model('vvt_tiny').accuracy.value
    assert any(list(line.get_xydata()[0]) == [40., vvt] for line in ax.lines)


@pytest.mark.parametrize('rows', [
    [], [row('vvt_tiny', 224, 9.)], rows_of(dict(vvt_tiny=1.), status='failed'),
    [r for r in core_rows() if r['model'] != 'softmax'], rows_of(dict(gemm=1.), kind='ceiling')])
def test_rows_that_allow_nothing(tmp_path, rows):
    with pytest.raises(ValueError, match=f'^{len(rows)} rows allow no plot'):
        plot(rows, tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_matplotlib_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=r"pip install 'vitlinear\[bench\]'"):
        plot(rows_of(dict(vvt_tiny=1.)), tmp_path)


def test_disk_full(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    path = plot(rows_of(dict(vvt_tiny=1.)), tmp_path)[0]
    before = path.read_bytes()

    def full(self, file, **kwargs):
        file.write(b'<svg')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Figure, 'savefig', full)
    with pytest.raises(OSError, match='No space left'):
        plot(rows_of(dict(vvt_tiny=2.)), tmp_path)
    assert path.read_bytes() == before and not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


@pytest.mark.parametrize('name, kinds', [
    ('latency_zoo', {'latency'}), ('scaling_zoo', {'latency', 'memory'}), ('cores', {'cores'})])
def test_published_results(figures, tmp_path, name: str, kinds: set[str]):
    path = Path(module.__file__).resolve().parents[3] / 'results' / f'{name}.csv'
    if not path.is_file():
        pytest.skip('not a checkout')
    plot(read_rows(path), tmp_path)
    assert {stem.partition('_')[0] for stem in figures} >= kinds
