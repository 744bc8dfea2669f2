"""A page of all models and checkpoints: one HTML file that needs no server, no network and no framework.

`vitlinear card --site OUT` writes it. The table comes from `vitlinear.info`, the cards from the records, the latencies
from the CSV files in `results/`, which a checkout has and an installed package does not.
"""
import csv
import math
import os
import re
from html import escape
from pathlib import Path
from string import Template
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import vitlinear
from vitlinear.checkpoints.cards import render_card
from vitlinear.checkpoints.records import find_record, records, write_text
from vitlinear.info import Family, Model, all_models, family_of, percent, short, size_of

TEMPLATE = Path(__file__).with_name('site.html')

_DTYPES = {'fp32': 'float32', 'bf16': 'bfloat16', 'fp16': 'float16'}
_COLOURS = 6  # in the template
_CHAR = 6.6  # generous width of a character of a label


class Row(NamedTuple):
    """One row of a file in `results/`; milliseconds a pass."""
    model: str
    size: int
    batch: int
    dtype: str
    kept: bool
    low: float
    median: float
    high: float
    peak: Optional[float]


def _ways(row: Dict[str, str]) -> List[str]:
    """How a model was run, where not as it is."""
    ways = [('optimised', row.get('optimized') == '1'), ('channels-last', row.get('memory_format') == 'channels_last')]
    ways += [(name, row.get('runtime') == name) for name in ('compile', 'onnxruntime')]
    return [name for name, applies in ways if applies]


def _results() -> Dict[str, List[Row]]:
    """Measurements of inference by file, none where the package stands alone."""
    package = Path(vitlinear.__file__).resolve().parent
    found: Dict[str, List[Row]] = {}
    for path in sorted((package.parent / 'results').glob('*.csv')):
        with path.open(newline='', encoding='utf-8') as f:
            rows = [row for row in csv.DictReader(f) if row.get('mode') == 'infer' and row.get('median_ms')]
        if rows:
            found[path.stem] = [Row(
                ' '.join([row['model'], *_ways(row)]), int(row['size']), int(row['batch']),
                _DTYPES.get(row['dtype'], row['dtype']), row['allocator'] == 'kept', float(row['p25_ms']),
                float(row['median_ms']), float(row['p75_ms']), float(row['peak_mib']) if row.get('peak_mib') else None,
            ) for row in rows]
    return found


# drawing

def _marker(shape: int, x: float, y: float, colour: int, filled: bool, title: str = '') -> str:
    r = 5.
    points = (
        None,
        ((-.9, -.9), (.9, -.9), (.9, .9), (-.9, .9)),
        ((0, -1.2), (1.1, .8), (-1.1, .8)),
        ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        ((0, 1.2), (1.1, -.8), (-1.1, -.8)),
        ((-1.2, -.5), (1.2, -.5), (1.2, .5), (-1.2, .5)),
    )[shape % 6]
    look = f'fill="var(--{f"c{colour}" if filled else "back"})" stroke="var(--c{colour})" stroke-width="2"'
    inside = f'<title>{escape(title)}</title>' if title else ''
    if points is None:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {look}>{inside}</circle>'
    outline = ' '.join(f'{x + r * a:.1f},{y + r * b:.1f}' for a, b in points)
    return f'<polygon points="{outline}" {look}>{inside}</polygon>'


def _text(x: float, y: float, text: str, anchor: str = 'start', style: str = '') -> str:
    extra = f' class="{style}"' if style else ''
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str], title: str, values: Sequence[str]) -> str:
    said = f'<title>{escape(title)}</title><desc>{escape("; ".join(values))}</desc>'
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{said}{"".join(parts)}</svg>'


def _figure(caption: str, svg: str) -> str:
    return f'<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>'


class Axes:
    """Two axes with ticks, and labels that keep clear of each other."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x_name: str, y_name: str, log_y: bool,
                 x_ticks: Sequence[Tuple[float, str]] = ()) -> None:
        self.width, self.height, self.left, self.bottom, self.top = 400., 290., 44., 44., 24.
        self.log_y = log_y
        low, high = (math.log(min(xs)), math.log(max(xs)))
        margin = max(.08 * (high - low), .15)
        self.x_range = low - margin, high + margin
        values = [math.log(y) for y in ys] if log_y else list(ys)
        margin = max(.1 * (max(values) - min(values)), .15 if log_y else .5)
        self.y_range = min(values) - margin, max(values) + margin
        self.taken: List[Tuple[float, float, float, float]] = []
        right, floor = self.width - 8, self.height - self.bottom
        self.parts = [_text(0, 14, y_name, style='tick'), _text(right, self.height - 8, x_name, 'end', 'tick')]
        for value, label in x_ticks or _ticks(*[math.exp(v) for v in self.x_range], True):
            x = self.x(value)
            self.parts += [
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top}" y2="{floor}"/>',
                _text(x, floor + 16, label, 'middle', 'tick')]
        bounds = [math.exp(v) if log_y else v for v in self.y_range]
        for value, label in _ticks(*bounds, log_y):
            y = self.y(value)
            self.parts += [
                f'<line class="grid" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
                _text(self.left - 6, y + 4, label, 'end', 'tick')]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (math.log(value) - low) / (high - low) * (self.width - 8 - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = ((math.log(value) if self.log_y else value) - low) / (high - low)
        return self.height - self.bottom - share * (self.height - self.bottom - self.top)

    def occupy(self, x: float, y: float, r: float = 6.) -> None:
        self.taken.append((x - r, y - r, x + r, y + r))

    def join(self, points: Sequence[Tuple[float, float]], colour: str, style: str = '') -> None:
        """Draw a line through points, and keep labels off it."""
        outline = ' '.join(f'{x:.1f},{y:.1f}' for x, y in points)
        self.parts.append(f'<polyline class="join {style}" stroke="{colour}" points="{outline}"/>')
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            n = math.ceil(math.hypot(x1 - x0, y1 - y0) / 8)
            for i in range(1, n):
                self.occupy(x0 + (x1 - x0) * i / n, y0 + (y1 - y0) * i / n, 1.)

    def label(self, x: float, y: float, text: str) -> None:
        """Write beside a point, on the first side where nothing is."""
        w = len(text) * _CHAR
        places = [(x + 9, y + 4), (x - 9 - w, y + 4)]
        places += [(x + dx, y + dy) for dy in (-10, 18, -24, 32) for dx in (-w / 2, 4, -w - 4)]

        def box(place: Tuple[float, float]) -> Tuple[float, float, float, float]:
            return place[0], place[1] - 10, place[0] + w, place[1] + 3

        def cost(place: Tuple[float, float]) -> float:
            a, b, c, d = box(place)
            outside = a < self.left or c > self.width or b < self.top or d > self.height - self.bottom
            return 100 * outside + sum(a < r and c > p and b < s and d > q for p, q, r, s in self.taken)

        best = min(places, key=cost)
        self.taken.append(box(best))
        self.parts.append(_text(best[0], best[1], text))

    def svg(self, title: str, values: Sequence[str]) -> str:
        return _svg(self.width, self.height, self.parts, title, values)


def _ticks(low: float, high: float, log: bool) -> List[Tuple[float, str]]:
    if log:
        steps = (1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 5, 7)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        if high / low > 300:
            steps = (1,)
        return [(s * 10. ** p, f'{s * 10. ** p:g}') for p in powers for s in steps if low <= s * 10. ** p <= high]
    step = next(s for s in (.1, .2, .5, 1, 2, 5, 10, 20) if (high - low) / s <= 7 or s == 20)
    first = math.ceil(low / step)
    return [(i * step, f'{i * step:g}') for i in range(first, math.floor(high / step) + 1)]


def _bars(rows: Sequence[Row], colours: Dict[str, int]) -> str:
    """A bar for each model, with the quartiles, our own coloured."""
    width, step, most = 360., 34., max(row.high for row in rows)
    scale = (width - 62) / most
    parts, values = [], []
    for i, row in enumerate(rows):
        y, foreign = i * step, ':' in row.model
        name = f'{row.model.rpartition(":")[2]}, original code' if foreign else row.model
        model = row.model.partition(' ')[0]
        fill = f'c{colours[model]}' if model in colours else 'bar'
        end = max(row.high, row.median) * scale
        parts += [
            _text(0, y + 12, name),
            f'<rect x="0" y="{y + 16:g}" width="{max(row.median * scale, 1):.1f}" height="12" fill="var(--{fill})"/>',
            f'<line class="range" x1="{row.low * scale:.1f}" x2="{row.high * scale:.1f}" '
            f'y1="{y + 22:g}" y2="{y + 22:g}"/>',
            _text(end + 6, y + 26, f'{row.median:,.3g}' if row.median < 1000 else f'{row.median:,.0f}'),
        ]
        values.append(f'{name} {row.median:g} ms')
    return _svg(width, len(rows) * step, parts, 'milliseconds a pass, shorter is faster', values)


# sections

def _table(models: Sequence[Model]) -> str:
    columns = (
        'Model', 'Top-1 %', 'Data', 'Source', 'Parameters (M)', 'MACs (G)', 'Input', 'Weights', 'Licence', 'Family')
    numeric = {1, 4, 5}
    head = ''.join(
        f'<th scope="col"{" class=n" if i in numeric else ""}><button type="button">{name}</button></th>'
        for i, name in enumerate(columns))
    rows = []
    for m in models:
        record = find_record(m.name)
        name = escape(m.name)
        if record:
            name = f'<a href="#card-{name}">{name}</a>'
        weights = dict(bundled='in the package', hub='Hub', url='download').get(m.weights.kind, '') if m.weights else ''
        repo_id = record.hub.repo_id if record else None
        if repo_id:
            weights += f', <a href="https://huggingface.co/{escape(repo_id)}">{escape(repo_id)}</a>'
        top1 = m.accuracy
        cells = [
            (m.name, name),
            (top1.value if top1 else '', percent(top1.value) if top1 else '–'),
            (top1.dataset if top1 else '', escape(top1.dataset) if top1 else '–'),
            (top1.source if top1 else '', escape(top1.source) if top1 else '–'),
            (m.parameters, f'{m.parameters / 1e6:#.3g}'.rstrip('.')),
            (m.macs or '', f'{m.macs / 1e9:#.3g}'.rstrip('.') if m.macs else '–'),
            (f'{math.prod(m.input_size):09d}', escape(size_of(m.input_size))),
            (weights and m.weights.kind, weights or '–'),
            (m.license or '', escape(m.license or 'unknown')),
            (m.family, escape(m.family)),
        ]
        inner = ''
        for i, (value, text) in enumerate(cells):
            tag, scope = ('th', ' scope="row"') if i == 0 else ('td', ' class="n"' if i in numeric else '')
            inner += f'<{tag}{scope} data-v="{escape(str(value))}">{text}</{tag}>'
        rows.append(f'<tr>{inner}</tr>')
    return f'<thead><tr>{head}</tr></thead>\n<tbody>\n' + '\n'.join(rows) + '\n</tbody>'


def _prefix(names: Sequence[str]) -> str:
    return os.path.commonprefix(list(names)).rpartition('_')[0] + '_' if len(names) > 1 else ''


def _accuracy(models: Sequence[Model], titles: Dict[str, str], colours: Dict[str, int]) -> str:
    """Top-1 against operations, a chart for each data set that has two models to compare."""
    with_figures = [m for m in models if m.accuracy and m.macs]
    families = list(titles)
    charts, rest, shown = [], [], set()
    for dataset in sorted({m.accuracy.dataset for m in with_figures}):
        here = [m for m in with_figures if m.accuracy.dataset == dataset]
        if len(here) == 1:
            top1 = here[0].accuracy
            rest.append(f'{here[0].name} reaches {percent(top1.value)} % on {dataset} ({top1.source}).')
            continue
        axes = Axes(
            [m.macs / 1e9 for m in here], [m.accuracy.value for m in here], 'MACs (G), logarithmic', 'top-1 %', False)
        at = {m.name: (axes.x(m.macs / 1e9), axes.y(m.accuracy.value)) for m in here}
        for family in families:
            line = sorted(at[m.name] for m in here if m.family == family and m.accuracy.source != 'ours')
            if len(line) > 1:
                axes.join(line, f'var(--c{families.index(family) % _COLOURS})', 'faint')
        for m in here:
            axes.occupy(*at[m.name])
            shown.add(m.family)
        for m in here:
            prefix = _prefix([n.architecture for n in models if n.family == m.family])
            axes.parts.append(_marker(
                families.index(m.family), *at[m.name], colours[m.architecture], m.accuracy.source == 'ours',
                f'{m.name}: {percent(m.accuracy.value)} % ({m.accuracy.source}), {short(m.macs)} MACs'))
            axes.label(*at[m.name], m.name.removeprefix(prefix))
        charts.append(_figure(dataset, axes.svg(f'top-1 accuracy on {dataset} against operations', [
            f'{m.name} {percent(m.accuracy.value)} % ({m.accuracy.source}) at {short(m.macs)} MACs' for m in here])))
    if not charts and not rest:
        return '<p class="note">No accuracies are known.</p>'
    legend = ''.join(
        f'<li><svg viewBox="0 0 16 16" aria-hidden="true">{_marker(i, 8, 8, i % _COLOURS, False)}</svg> '
        f'{escape(titles[family])}</li>' for i, family in enumerate(families) if family in shown)
    parts = []
    if charts:
        parts += [
            '<p class="note">Hollow marks are what papers or authors state, filled ones are ours. Up and to the left '
            'is better.</p>',
            f'<div class="charts">{"".join(charts)}</div>',
            f'<ul class="legend">{legend}</ul>',
        ]
    parts += [f'<p>{escape(sentence)}</p>' for sentence in rest]
    return '\n'.join(parts)


def _lines(rows: Sequence[Row], what: str, unit: str, colours: Dict[str, int]) -> str:
    """Time or memory against the side of the image, both logarithmic."""
    series: Dict[Tuple[str, str], List[Tuple[int, float]]] = {}
    for row in rows:
        value = row.median / 1e3 if what == 'time' else row.peak / 1024 if row.peak else None
        if value:
            series.setdefault((row.model, row.dtype), []).append((row.size, value))
    if not series:
        return ''
    sizes = sorted({row.size for row in rows})
    values = [value for points in series.values() for _, value in points]
    name = dict(time='time', memory='peak memory')[what]
    axes = Axes(sizes, values, 'side of the image (pixels)', f'{name} ({unit})', True, [(s, str(s)) for s in sizes])
    said = []
    for (model, dtype), points in series.items():
        points.sort()
        at = [(axes.x(x), axes.y(y)) for x, y in points]
        colour = f'var(--c{colours[model]})' if model in colours else 'var(--bar)'
        axes.join(at, colour, '' if dtype == 'float32' else 'dashed')
        for (x, y), (size, value) in zip(at, points):
            axes.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>'
                              f'{escape(f"{model}, {dtype}, {size} px: {value:.3g} {unit}")}</title></circle>')
            axes.occupy(x, y)
            said.append(f'{model} {dtype} {size} px {value:.3g} {unit}')
    for (model, dtype), points in series.items():
        size, value = points[-1]
        axes.label(axes.x(size), axes.y(value), f'{model}, {dtype}' if len({m for m, _ in series}) > 1 else dtype)
    models = ', '.join(dict.fromkeys(m for m, _ in series))
    return _figure(f'{models}: {name} of one image', axes.svg(f'{name} against image size', said))


def _latency(results: Dict[str, List[Row]], colours: Dict[str, int]) -> str:
    if not results:
        return (
            '<p class="note">The measurements are in the folder results/ of the source, which an installed package '
            'does not carry; <code>vitlinear bench</code> takes them on your machine.</p>')
    parts = [
        '<p class="note">Medians of alternating passes on the machine of results/README.md, in milliseconds a pass; '
        'the thin line spans the quartiles. Shorter is faster. Compare the bars of one chart with each other.</p>']
    for stem, rows in results.items():
        kind, _, subject = stem.partition('_')
        if kind == 'scaling':
            charts = ''.join((_lines(rows, 'time', 's', colours), _lines(rows, 'memory', 'GiB', colours)))
        else:
            panels: Dict[Tuple[int, int, str, bool], List[Row]] = {}
            for row in rows:
                panels.setdefault((row.size, row.batch, row.dtype, row.kept), []).append(row)
            charts = ''.join(
                _figure(
                    f'{size} px, batch {batch}, {dtype}{", memory kept" if kept else ""}',
                    _bars(sorted(panel, key=lambda row: row.median), colours))
                for (size, batch, dtype, kept), panel in panels.items())
        heading = dict(latency='Latency', scaling='Growth with the image').get(kind, kind)
        parts.append(f'<h3>{escape(f"{heading}: {subject}")}</h3>\n<div class="charts">{charts}</div>')
    return '\n'.join(parts)


def _inline(text: str) -> str:
    """Code, bold and addresses of a line of a card, everything else escaped."""
    out = []
    for i, part in enumerate(text.split('`')):
        part = escape(part)
        if i % 2:
            out.append(f'<code>{part}</code>')
        else:
            part = re.sub(r'\*\*(.+?)\*\*', r'<strong>\1</strong>', part)
            out.append(re.sub(r'https?://[\w./?=%#~+:-]*[\w/]', lambda m: f'<a href="{m[0]}">{m[0]}</a>', part))
    return ''.join(out)


def _card(text: str) -> str:
    """HTML of a card, for the Markdown that `render_card` writes."""
    text = re.sub(r'\A---\n.*?\n---\n', '', text, flags=re.DOTALL)
    out = []
    for i, part in enumerate(re.split(r'^```(?:\w+)?$', text, flags=re.MULTILINE)):
        if i % 2:
            out.append(f'<pre tabindex="0"><code>{escape(part.strip())}</code></pre>')
            continue
        for block in filter(None, (b.strip() for b in part.split('\n\n'))):
            heading = re.fullmatch(r'(#+) (.*)', block)
            if heading and len(heading[1]) > 1:  # the title is the summary already
                out.append(f'<h{len(heading[1]) + 1}>{_inline(heading[2])}</h{len(heading[1]) + 1}>')
            elif block.startswith('- '):
                items = (' '.join(item.split()) for item in re.split(r'^- ', block, flags=re.MULTILINE)[1:])
                out.append('<ul>' + ''.join(f'<li>{_inline(item)}</li>' for item in items) + '</ul>')
            elif not heading:
                out.append(f'<p>{_inline(" ".join(block.split()))}</p>')
    return '\n'.join(out)


def _family(family: Family) -> str:
    link = f'<p>Paper: <a href="{escape(family.url)}">{escape(family.paper)}</a></p>' if family.url else ''
    text = ''.join(f'<p>{_inline(paragraph)}</p>' for paragraph in family.text.split('\n\n') if paragraph)
    cite = f'<details><summary>BibTeX</summary><pre tabindex="0"><code>{escape(family.bibtex)}</code></pre></details>'
    return f'<h3>{escape(family.title)}</h3>\n{link}{text}{cite if family.bibtex else ""}'


def render_site() -> str:
    """The page."""
    models = all_models()
    families = {m.family: family_of(m.architecture) for m in models}
    colours = {m.architecture: list(families).index(m.family) % _COLOURS for m in models}
    known = records()
    cards = '\n'.join(
        f'<details id="card-{escape(name)}"><summary>{escape(name)}</summary>\n<div class="card">\n'
        f'{_card(render_card(record))}\n</div></details>' for name, record in known.items())
    count = len({m.architecture for m in models})
    summary = (
        f'{count} architectures in {len(families)} famil{"y" if len(families) == 1 else "ies"}, {len(known)} '
        f'checkpoint{"" if len(known) == 1 else "s"}.')
    return Template(TEMPLATE.read_text(encoding='utf-8')).substitute(
        summary=summary,
        table=_table(models),
        accuracy=_accuracy(models, {name: family.title for name, family in families.items()}, colours),
        latency=_latency(_results(), colours),
        cards=cards or '<p class="note">There are no checkpoints yet.</p>',
        families='\n'.join(_family(family) for family in families.values()),
        version=escape(vitlinear.__version__),
    )


def write_site(out: Path) -> Path:
    """Write the page, whole or not at all.

    Args:
        out: The file, or the folder that index.html goes into, made if it is not there.

    Returns:
        Path of the page.
    """
    path = out if out.suffix in ('.html', '.htm') and not out.is_dir() else out / 'index.html'
    text = render_site()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path
