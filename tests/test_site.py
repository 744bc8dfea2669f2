"""The page that `vitlinear card --site` writes."""
import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vitlinear import cli, info
from vitlinear.checkpoints import site
from vitlinear.checkpoints.records import records

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
VOID = {'meta', 'br', 'hr', 'img', 'link', 'input'}

# clicks through the page and leaves what it saw in the title
CLICKS = '''<script>
const seen = {wide: document.documentElement.scrollWidth > innerWidth};
const names = () => [...document.querySelectorAll('#zoo tbody th')].map(x => x.textContent);
const button = text => [...document.querySelectorAll('#zoo thead button')].find(b => b.textContent === text);
for (const text of ['Model', 'Top-1 %', 'Parameters (M)']) {
  seen[text] = [];
  for (let i = 0; i < 2; i++) {
    button(text).click();
    seen[text].push([button(text).closest('th').getAttribute('aria-sort'), names()]);
  }
}
seen.sorted = document.querySelectorAll('[aria-sort]').length;
location.hash = document.querySelector('#zoo a').getAttribute('href');
setTimeout(() => {
  seen.open = document.getElementById(decodeURIComponent(location.hash.slice(1))).closest('details').open;
  document.title = JSON.stringify(seen);
}, 100);
</script>'''


class Page(HTMLParser):
    """Elements of a page, which must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [t for t, _ in self.open]))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [t for t, _ in self.open]))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def all(self, tag: str) -> list:
        return [attrs for t, attrs, _ in self.elements if t == tag]


@pytest.fixture(scope='module')
def text() -> str:
    return site.render_site()


def test_every_model_and_card(text):
    page = Page(text)
    rows = [attrs['data-v'] for t, attrs, inside in page.elements if t == 'th' and 'tbody' in inside]
    assert rows == [m.name for m in info.all_models()]
    assert {f'card-{name}' for name in records()} == {a['id'] for a in page.all('details') if 'id' in a}
    ids = [a['id'] for _, a, _ in page.elements if 'id' in a]
    assert len(ids) == len(set(ids))
    local = [a['href'][1:] for a in page.all('a') if a['href'].startswith('#')]
    assert len(local) == len(records()) and set(local) <= set(ids)


def test_needs_nothing_from_outside(text):
    page = Page(text)
    assert not page.all('link') and not page.all('img') and not page.all('iframe')
    assert all('src' not in attrs for _, attrs, _ in page.elements)
    assert not re.search(r'@import|url\(|fetch\(|XMLHttpRequest|import\(', text)
    assert all(a['href'].startswith(('https://', '#')) for a in page.all('a'))


def test_accessible(text):
    page = Page(text)
    assert page.all('html') == [{'lang': 'en'}] and len(page.all('title')) > 1 and len(page.all('h1')) == 1
    heads = [attrs for t, attrs, inside in page.elements if t == 'th' and 'thead' in inside]
    buttons = [attrs for t, attrs, inside in page.elements if t == 'button' and inside[-1] == 'th']
    assert len(heads) == len(buttons) == 10 and all(h['scope'] == 'col' for h in heads)
    levels = [int(t[1]) for t, _, _ in page.elements if re.fullmatch('h[1-6]', t)]
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    assert len(re.findall('<svg [^>]*role="img"><title>[^<]+</title><desc>[^<]+</desc>', text)) == len(
        re.findall('<svg ', text)) - len(re.findall('<svg [^>]*aria-hidden', text))


def test_plots_show_the_numbers(text):
    accuracy = text[text.index('id="accuracy"'):text.index('id="latency"')]
    for model in info.all_models():
        if model.accuracy:
            assert re.search(rf'{re.escape(model.name)}\b[^<]* {info.percent(model.accuracy.value)} %', accuracy)
    latency = text[text.index('id="latency"'):text.index('id="cards"')]
    for stem, rows in site._results().items():
        for row in rows:
            shown = f'{row.model.rpartition(":")[2]}'
            assert shown in latency
            if stem.startswith('latency'):
                assert f' {row.median:g} ms' in latency


def test_without_measurements(monkeypatch):
    monkeypatch.setattr(site, '_results', dict)
    text = site.render_site()
    latency = text[text.index('id="latency"'):text.index('id="cards"')]
    assert '<svg' not in latency and 'vitlinear bench' in latency


def test_everything_is_escaped(monkeypatch):
    bad = '<script>alert("x")</script> & `code <i>` **b<u>**'
    name, record = next(iter(records().items()))
    record = dataclasses.replace(
        record, limits=bad, license=bad, dataset=dataclasses.replace(record.dataset, name=bad, url=f'https://x.y/"{bad}'),
        training=dataclasses.replace(record.training, hardware=bad, command=bad),
        provenance=dataclasses.replace(record.provenance, trained_by=bad, mechanism=bad))
    for module in (site, info):
        monkeypatch.setattr(module, 'find_record', lambda n: record if n == name else None)
        monkeypatch.setattr(module, 'records', lambda: {name: record})
    text = site.render_site()
    page = Page(text)
    assert len(page.all('script')) == 1 and not page.all('i') and not page.all('u')
    assert '&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp;' in text
    assert '<code>code &lt;i&gt;</code>' in text and '<strong>b&lt;u&gt;</strong>' in text


@pytest.mark.parametrize('out, path', [
    ('zoo.html', 'zoo.html'), ('zoo', 'zoo/index.html'), ('deep/er/zoo.html', 'deep/er/zoo.html')])
def test_write(tmp_path, capsys, text, out: str, path: str):
    assert cli.main(['card', '--site', str(tmp_path / out)]) == 0
    assert capsys.readouterr().out == f'{tmp_path / path}\n'
    assert (tmp_path / path).read_text(encoding='utf-8') == text
    assert [p.name for p in tmp_path.rglob('*') if p.is_file()] == [Path(path).name]


def test_failure_leaves_the_old_page(tmp_path, capsys, monkeypatch):
    path = tmp_path / 'index.html'
    path.write_text('old')

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.replace', full)
    assert cli.main(['card', '--site', str(tmp_path)]) == 2
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['index.html']
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(tmp_path) in err and 'No space left' in err


def test_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    out = tmp_path / 'file' / 'zoo'
    assert cli.main(['card', '--site', str(out)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(out) in err


@pytest.mark.skipif(not CHROMIUM, reason='no Chromium')
@pytest.mark.parametrize('width', [390, 1280])
def test_in_a_browser(tmp_path, text, width: int):
    """Sorting by click, the link that opens a card, and no sideways scrolling of the page."""
    (tmp_path / 'page.html').write_text(text.replace('</body>', f'{CLICKS}</body>'), encoding='utf-8')
    # a window has a least width, a frame has none
    (tmp_path / 'frame.html').write_text(
        f'<iframe src="page.html" style="width:{width}px;height:800px"></iframe><script>setInterval(() => '
        f'document.title = document.querySelector("iframe").contentDocument.title, 50)</script>')
    done = subprocess.run(
        [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--allow-file-access-from-files',
         f'--user-data-dir={tmp_path / "profile"}', '--virtual-time-budget=5000', '--dump-dom',
         (tmp_path / 'frame.html').as_uri()], capture_output=True, text=True, timeout=300)
    title = re.search('<title>(.*?)</title>', done.stdout)
    assert title, done.stderr[-2000:]
    seen = json.loads(title[1].replace('&quot;', '"'))

    models = info.all_models()
    names = [m.name for m in models]
    (up, first), (down, last) = seen['Model']
    assert (up, down) == ('ascending', 'descending') and sorted(first) == sorted(names) and last == first[::-1]
    (down, first), (up, last) = seen['Parameters (M)']
    sizes = {m.name: m.parameters for m in models}
    assert (down, up) == ('descending', 'ascending')
    assert [sizes[n] for n in first] == sorted(sizes.values(), reverse=True) and last == first[::-1]
    known = {m.name: m.accuracy.value for m in models if m.accuracy}
    for (order, listed), reverse in zip(seen['Top-1 %'], (True, False)):
        assert order == ('descending' if reverse else 'ascending')
        assert [known[n] for n in listed[:len(known)]] == sorted(known.values(), reverse=reverse)
    assert seen['sorted'] == 1 and seen['open'] is True and seen['wide'] is False
