"""Plots of what `vitlinear bench` measured: latency and memory against pixels, accuracy against latency, and attention
cores against softmax attention. Every figure holds one condition (mode, dtype, batch, threads, ...) and is named after
it, so that no line compares what was not measured alike.
"""
import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...zoo.records import whole_file
from .. import info
from .._errors import UsageError
from .rows import Row

# What each format says of when and by what it was made, left out so that equal rows make equal files.
FORMATS = {'svg': {'Date': None, 'Creator': None}, 'png': {'Software': None}}
BASELINE = 'softmax'

# One hue a family, by how its names begin, greys for the rest; the hues are Okabe and Ito's, told apart with
# colour-blind eyes too.
_HUES = dict(castling='#009E73', gkvit='#CC79A7', qna_vit='#D55E00', vvt='#0072B2', xvit='#E69F00')
_OTHER_HUE = '#56B4E9'
_GREYS = ('#1a1a1a', '#8a8a8a', '#505050', '#a0a0a0', '#6e6e6e')
_MARKERS = 'osD^vPX<>p*h'
_DASHES = ((0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_FAMILIES = dict(linear_angular='castling', random_walk='gkvit', qna='qna_vit', vicinity='vvt', xnorm='xvit')
_WORDS = dict(
    fp32='float32', bf16='bfloat16', infer='inference', train='training step', kept='freed memory kept', default='',
    compile='torch.compile', channels_last='channels last')
_STYLE = {
    'font.family': 'DejaVu Sans', 'font.size': 9, 'text.color': '#222222', 'axes.labelcolor': '#222222',
    'xtick.color': '#444444', 'ytick.color': '#444444', 'axes.edgecolor': '#666666', 'axes.spines.top': False,
    'axes.spines.right': False, 'axes.grid': True, 'axes.axisbelow': True, 'grid.color': '#e4e4e4',
    'grid.linewidth': .6, 'svg.hashsalt': 'vitlinear', 'svg.fonttype': 'path', 'figure.facecolor': 'white'}
_WIDTH, _TOP, _FOOT, _LINE = 7., .72, .7, .195  # inches: figure, above and below the axes, between lines of text
_LEFT = .115  # of the figure
_AROUND = (  # where a name may stand beside its point
    (7, -1, 'left', 'center'), (0, -7, 'center', 'top'), (0, 7, 'center', 'bottom'), (-7, -1, 'right', 'center'),
    (5, -5, 'left', 'top'), (-5, 5, 'right', 'bottom'))


def _condition(row: Row) -> tuple[str, ...]:
    """What two rows must share to be compared, but for the machine, in words."""
    words = (
        row['mode'], row['dtype'], f'batch {row["batch"]}', f'{row["threads"]} thread{"s" * (row["threads"] > 1)}',
        row['allocator'], row['runtime'].replace('eager', ''), row['memory_format'].replace('contiguous', ''),
        f'optimized {row["optimized"]}' if row['optimized'] else '')
    return tuple(filter(None, words))


def _ms(row: Row) -> tuple[float, ...]:
    """Median and quartiles of the time for an image."""
    return tuple(row[name] / row['batch'] for name in ('median_ms', 'p25_ms', 'p75_ms'))


def fit_exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the least-squares line through (log x, log y), the exponent k of y ~ x ** k."""
    return statistics.linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points]).slope


def find_crossover(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """Size from which on `ours` stays below `theirs`, both times by size, on straight lines between logarithms.

    Returns:
        The least common size if it is below everywhere, None if it is not below at the greatest.
    """
    sizes = sorted(set(ours) & set(theirs))
    gaps = [math.log(ours[s] / theirs[s]) for s in sizes]
    last = max((i for i, gap in enumerate(gaps) if gap >= 0), default=-1)
    if last + 1 == len(sizes):
        return None
    if last < 0:
        return sizes[0]
    return sizes[last] * (sizes[last + 1] / sizes[last]) ** (gaps[last] / (gaps[last] - gaps[last + 1]))


def _family(name: str) -> str:
    """Of a model of ours or of an attention core, '' for others."""
    first = name.split(' ')[0].partition('.')[0]
    if not info.is_ours(first):
        return _FAMILIES.get(first, '')
    return next((family for family in _HUES if first.startswith(family)), first)


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How to draw each model: the hue of its family in as many shades as it has members, or a grey."""
    from matplotlib.colors import to_rgb
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_family(name), []).append(name)
    styles: dict[str, dict[str, Any]] = {}
    for family, members in groups.items():
        for i, name in enumerate(members):
            colour, dashes = _GREYS[i % len(_GREYS)], _DASHES[i % len(_DASHES)]
            if family:
                by = 0. if len(members) == 1 else -.4 + .8 * i / (len(members) - 1)  # from darker to lighter
                hue = to_rgb(_HUES.get(family, _OTHER_HUE))
                colour, dashes = tuple(c * (1 + by) if by < 0 else c + (1 - c) * by for c in hue), '-'
            styles[name] = dict(color=colour, linestyle=dashes, marker=_MARKERS[len(styles) % len(_MARKERS)])
    return styles


def _set_log_axis(axis: Any, low: float, high: float, ticks: Mapping[float, str] | None = None) -> None:
    """A logarithmic axis with a little room at both ends and round numbers on it, the more the shorter it is."""
    room = max((high / low) ** .05, 1.04)
    low, high = low / room, high * room
    spread = high / low
    steps = (1,) if spread > 3e3 else (1, 2, 5) if spread > 12 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    if spread < 1.8:
        steps = tuple(n / 10 for n in range(10, 100, 5 if spread > 1.25 else 2))
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = ticks or {v: f'{v:,g}' for v in (s * 10. ** d for d in decades for s in steps) if low <= v <= high}
    getattr(axis.axes, f'set_{axis.axis_name}scale')('log')
    getattr(axis.axes, f'set_{axis.axis_name}lim')(low, high)
    axis.set_ticks([], minor=True)
    axis.set_ticks(list(ticks), list(ticks.values()))


def _new_figure(height: float, title: str, rows: Sequence[Row]) -> Any:
    """A figure with title, condition and, at its foot, machine and versions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def all_of(key: str) -> str:
        return ' and '.join(sorted({row[key] for row in rows if row[key]}))

    versions = ', '.join(
        f'{name} {all_of(name)}' for name in ('torch', 'timm', 'vitlinear', 'onnxruntime') if all_of(name))
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)  # measures text
    figure.text(.012, 1 - .1 / height, title, weight='bold', size=10.5, va='top')
    condition = ', '.join(filter(None, (_WORDS.get(word, word) for word in _condition(rows[0]))))
    figure.text(.012, 1 - .32 / height, condition, size=8.5, color='#555555', va='top')
    figure.text(.012, .07 / height, '; '.join(filter(None, (all_of('cpu'), versions))), size=6.5, color='#777777')
    return figure


def _box(text: Any) -> Any:
    return text.get_window_extent(text.figure.canvas.get_renderer())


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in descending order, `gap` apart at least, near the wanted ones and between the bounds."""
    placed: list[float] = []
    for i, position in enumerate(wanted):  # as high as wanted, leaving room below for those that follow
        position = min(max(position, low + gap * (len(wanted) - 1 - i)), high - gap * i)
        placed.append(min(position, placed[-1] - gap) if placed else position)
    for i in reversed(range(len(placed) - 1)):  # those pushed below the bound push back
        placed[-1] = max(placed[-1], low)
        placed[i] = max(placed[i], placed[i + 1] + gap)
    return placed


def _draw_lines(
        lines: Mapping[str, Sequence[tuple[float, float, float, float]]],
        notes: Mapping[str, str],
        rows: Sequence[Row],
        title: str,
        labels: tuple[str, str],
        ticks: Mapping[float, str],
        heading: str,
) -> Any:
    """Lines (x, value, low, high) with their names in a column at the right, near to their ends."""
    from matplotlib.lines import Line2D
    height = max(3.7, _TOP + _FOOT + _LINE * (len(lines) + 1))
    figure, styles = _new_figure(height, title, rows), _styles(list(lines))
    texts = {
        label: (figure.text(0, 0, label, size=8.5, va='center_baseline'),
                figure.text(.985, 0, notes[label], size=8.5, va='center_baseline', ha='right', color='#555555'))
        for label in lines}
    head = figure.text(.985, 0, heading, size=7.5, va='center_baseline', ha='right', color='#777777')
    note_width = max(_box(text).width for text in (head, *(note for _, note in texts.values())))
    names = .985 - (note_width + max(_box(name).width for name, _ in texts.values())) / figure.bbox.width - .015
    right = names - .072
    ax = figure.add_axes((_LEFT, _FOOT / height, right - _LEFT, 1 - (_TOP + _FOOT) / height), xlabel=labels[0],
                         ylabel=labels[1])
    xs, values = zip(*((p[0], v) for points in lines.values() for p in points for v in p[1:]))
    _set_log_axis(ax.xaxis, min(xs), max(xs), ticks)
    _set_log_axis(ax.yaxis, min(values), max(values))
    ends = {}
    for label, points in lines.items():
        x, y, low, high = zip(*points)
        ax.fill_between(x, low, high, color=styles[label]['color'], alpha=.15, linewidth=0)
        ax.plot(x, y, **styles[label], linewidth=1.5, markersize=5, markeredgecolor='white', markeredgewidth=.4)
        ends[label] = figure.transFigure.inverted().transform(ax.transData.transform((x[-1], y[-1])))
    order = sorted(lines, key=lambda label: (-ends[label][1], label))
    gap = _LINE / height
    for label, y in zip(order, _spread([ends[n][1] for n in order], gap, _FOOT / height, 1 - _TOP / height - gap / 2)):
        if lines[label][-1][0] == max(xs):
            x, level = ends[label]
            figure.add_artist(Line2D((x + .008, right + .005, names - .04), (level, level, y), linewidth=.5, alpha=.6,
                                     color=styles[label]['color']))
        figure.add_artist(Line2D((names - .037, names - .022, names - .007), (y,) * 3, **styles[label], markevery=[1],
                                 linewidth=1.5, markersize=5))
        texts[label][0].set_position((names, y))
        texts[label][1].set_y(y)
        head.set_y(max(y + 1.1 * gap, head.get_position()[1]))
    return figure, ax, styles


def _grouped(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Rows by label and size, where there are two sizes or more; of two rows for one point the later holds."""
    lines: dict[str, dict[int, Row]] = {}
    for row in rows:
        lines.setdefault(f'{row["model"]} {row["kwargs"]}'.strip(), {})[row['size']] = row
    return {label: dict(sorted(line.items())) for label, line in lines.items() if len(line) > 1}


def _draw_pixels(rows: Sequence[Row], value: Callable[[Row], Any], title: str, label: str) -> Any:
    grouped = _grouped([row for row in rows if value(row)])
    if not grouped:
        return None
    lines = {name: [(size ** 2, *value(row)) for size, row in line.items()] for name, line in grouped.items()}
    notes = {name: f'{fit_exponent([p[:2] for p in points]):.2f}' for name, points in lines.items()}
    ticks: dict[float, str] = {}
    for size in sorted({size for line in grouped.values() for size in line}):
        if not ticks or size ** 2 > 1.5 * max(ticks):  # labels apart
            ticks[size ** 2] = f'{size}\u00b2'
    return _draw_lines(lines, notes, rows, title, ('image (pixels)', label), ticks, 'exponent')[0]


def _draw_cores(rows: Sequence[Row]) -> Any:
    """Attention without its projections; a ring marks from where on it stays faster than softmax attention."""
    shared = {row['kwargs'] for row in rows}
    said = f', {shared.pop()}' if len(shared) == 1 and '' not in shared else ''  # once, in the title
    if said:
        rows = [{**row, 'kwargs': ''} for row in rows]
    grouped = _grouped(rows)
    times = {label: {size: _ms(row)[0] for size, row in line.items()} for label, line in grouped.items()}
    bases = {label.partition(' ')[2]: label for label in grouped if label.partition(' ')[0] == BASELINE}
    pairs = {label: bases.get(label.partition(' ')[2]) for label in grouped if label not in bases.values()}
    if not any(pairs.values()):
        return None
    found = {label: find_crossover(times[label], times[base]) for label, base in pairs.items() if base}
    notes = {label: '' if label not in found else 'nowhere' if found[label] is None else
             f'{float(f"{found[label]:.2g}"):,.0f} tokens' for label in grouped}
    lines = {label: [(size, *_ms(row)) for size, row in line.items()] for label, line in grouped.items()}
    figure, ax, styles = _draw_lines(
        lines, notes, rows, f'Attention cores against softmax attention{said}', ('tokens', 'time per image (ms)'),
        {size: f'{size:,}' for line in times.values() for size in line}, 'faster from')
    for label, tokens in found.items():
        if tokens is not None:
            low = max(s for s in times[label] if s <= tokens)
            high = min(s for s in times[label] if s >= tokens)
            part = math.log(tokens / low) / math.log(high / low) if high > low else 0.
            ax.plot(tokens, times[label][low] * (times[label][high] / times[label][low]) ** part, marker='o',
                    markersize=10, markerfacecolor='none', markeredgecolor=styles[label]['color'], markeredgewidth=1.5)
    return figure


def _accuracy(row: Row) -> info.Accuracy | None:
    """The figure known for a model as measured: our architecture, unchanged, at the size the figure belongs to."""
    if row['kwargs'] or row['mode'] == 'train' or not info.is_ours(row['model'].partition('.')[0]):
        return None
    try:
        model = info.find_model(row['model'])
    except UsageError:  # a tag that this version does not have
        return None
    return model.accuracy if model.input_size[-1] == row['size'] else None


def _draw_accuracy(rows: Sequence[Row]) -> Any:
    """Models as points, joined within a family; filled where we measured the accuracy, hollow where others state it."""
    from matplotlib.lines import Line2D
    points = {row['model']: (_ms(row)[0], _accuracy(row)) for row in rows}
    if len(points) < 2:
        return None
    dataset, height = _accuracy(rows[0]).dataset, 4.2
    figure = _new_figure(height, f'Accuracy on {dataset} against latency', rows)
    ax = figure.add_axes((_LEFT, _FOOT / height, .97 - _LEFT, 1 - (_TOP + _FOOT + .15) / height))
    xs, ys = [ms for ms, _ in points.values()], [accuracy.value for _, accuracy in points.values()]
    reach = (max(xs) / min(xs)) ** .12  # for the names at the right
    _set_log_axis(ax.xaxis, min(xs), max(xs) * reach)
    room = .15 * max(max(ys) - min(ys), .1)
    ax.set(xlabel='time per image (ms)', ylabel=f'top-1 accuracy (%), {dataset}', ylim=(min(ys) - room, max(ys) + room))
    families: dict[str, list[str]] = {}
    for name in sorted(points, key=lambda name: points[name][0]):
        families.setdefault(_family(name), []).append(name)
    styles, taken = _styles([members[0] for members in families.values()]), []
    for members in families.values():
        colour, marker = (styles[members[0]][k] for k in ('color', 'marker'))
        ax.plot([points[n][0] for n in members], [points[n][1].value for n in members], color=colour, alpha=.4)
        for ms, accuracy in (points[name] for name in members):
            ax.plot(ms, accuracy.value, color=colour, marker=marker, markersize=6.5, markeredgewidth=1.5,
                    markerfacecolor=colour if accuracy.source == 'ours' else 'white')
            taken.append(_box(ax.annotate('', (ms, accuracy.value))).padded(7))
    for name, (ms, accuracy) in points.items():
        texts = [ax.annotate(name, (ms, accuracy.value), (dx, dy), textcoords='offset points', size=8.5, ha=ha, va=va)
                 for dx, dy, ha, va in _AROUND]
        boxes = [_box(text) for text in texts]
        kept = next((i for i, box in enumerate(boxes) if not box.count_overlaps(taken)
                     and ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1), 0)
        taken.append(boxes[kept])
        for text in texts[:kept] + texts[kept + 1:]:
            text.remove()
    sources = {accuracy.source == 'ours' for _, accuracy in points.values()}
    told = {True: 'measured by us', False: "the paper's or its authors' figure, not measured here"}
    ax.legend(
        handles=[Line2D([], [], color='#555555', marker='o', linestyle='', markeredgewidth=1.5, markersize=6.5,
                        markerfacecolor='#555555' if own else 'white', label=told[own]) for own in sorted(sources)],
        loc='lower left', bbox_to_anchor=(-.02, .99), ncols=2, frameon=False, fontsize=8.5)
    return figure


_DRAW = dict(
    latency=partial(_draw_pixels, value=_ms, title='Latency against pixels', label='time per image (ms)'),
    memory=partial(
        _draw_pixels, value=lambda row: row['peak_mib'] and (row['peak_mib'],) * 3,
        title='Peak memory against pixels', label='peak memory of the process (MiB)'),
    cores=_draw_cores,
    accuracy=_draw_accuracy,
)


def _save(figure: Any, path: Path) -> None:
    format = path.suffix[1:]
    with whole_file(path, 'wb') as f:
        figure.savefig(f, format=format, dpi=200, metadata=FORMATS[format])


def plot(rows: Sequence[Row], folder: str | os.PathLike) -> list[Path]:
    """Draw all that the rows allow, each as SVG and as PNG.

    * latency_CONDITION and memory_CONDITION: a line for each model measured at two sizes or more, over pixels, with
      the band between its quartiles and its fitted exponent.
    * cores_CONDITION: attention cores and softmax attention over tokens.
    * accuracy_DATASET_CONDITION: models of known accuracy, measured at the size that it belongs to.

    Args:
        rows: Rows of `rows.read_rows`. Of two rows for one point the later holds, and rows that report a failure are
            left out.
        folder: Where to write; made if there is none.

    Returns:
        The files, which are the same for the same rows.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The rows allow no plot.
    """
    try:
        from matplotlib import style
    except ImportError as e:
        raise ImportError("plots need matplotlib: pip install 'vitlinear[bench]'") from e

    known = [row for row in rows if row['status'] == 'ok']
    machines = sorted({row['cpu'] for row in known})
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in known:
        condition = '_'.join(word.replace(' ', '') for word in _condition(row))
        if len(machines) > 1:
            condition += f'_machine{machines.index(row["cpu"]) + 1}'
        names = {'core': ['cores'], 'model': ['latency', 'memory']}.get(row['kind'], [])
        if row['kind'] == 'model' and (accuracy := _accuracy(row)):
            names = [*names, f'accuracy_{accuracy.dataset}']
        for name in names:
            groups.setdefault((name, condition), []).append(row)

    files: list[Path] = []
    with style.context(['default', _STYLE]):
        for (name, condition), group in sorted(groups.items()):
            figure = _DRAW[name.partition('_')[0]](group)
            for format in FORMATS if figure else ():
                Path(folder).mkdir(parents=True, exist_ok=True)
                stem = re.sub(r'[^a-z0-9_.-]+', '-', f'{name}_{condition}'.lower())
                files.append(Path(folder) / f'{stem}.{format}')
                _save(figure, files[-1])
    if not files:
        raise ValueError(
            f'{len(rows)} rows allow no plot: that takes a model at two sizes or more, cores at two numbers of tokens '
            f'or more with {BASELINE!r} among them, or two models whose accuracy on one dataset is known')
    return files
