"""Model cards: up to date with their records, and every snippet of every card run as it stands."""
import dataclasses
import hashlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from _data import image_folder
from vitlinear.tools import cards, cli, train, validate
from vitlinear.zoo.records import read_record, write_record

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / 'model_cards').glob('*/record.json'))
NANO = ROOT / 'model_cards' / 'vvt_nano.fashion_mnist'


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    monkeypatch.setattr('socket.socket.connect', lambda *args: pytest.fail('opened a connection'))


def read_card(folder: Path) -> str:
    """The card, with weights on the Hub taken from the folder instead, for want of a network."""
    return re.sub(r'hf-hub:[\w./-]+', f'local-dir:{folder.name}', (folder / 'README.md').read_text())


def snippets(card: str, language: str, section: str = '') -> list[str]:
    part = card.partition(f'\n{section}\n')[2] if section else card
    return re.findall(rf'^```{language}\n(.*?)^```$', re.split(r'^##+ ', part, flags=re.M)[0] if section else part,
                      flags=re.M | re.S)


def commands(card: str, section: str) -> list[list[str]]:
    lines = '\n'.join(snippets(card, 'sh', section)).replace('\\\n', ' ').splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def run_python(code: str, capsys) -> list[str]:
    capsys.readouterr()
    exec(compile(code, 'snippet', 'exec'), {'__name__': 'snippet'})
    return capsys.readouterr().out.splitlines()


def check_python_snippets(folder: Path, monkeypatch, capsys) -> None:
    record, card = read_record(folder), read_card(folder)
    monkeypatch.chdir(folder.parent)
    code = snippets(card, 'python')
    assert len(code) == 3 and all('import vitlinear' in c for c in code)
    classification, *rest = code
    out = run_python(classification, capsys)
    assert len(out) == min(5, record.cfg.num_classes)
    shares = [float(line.split()[0]) for line in out]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.003
    if record.cfg.label_names:
        assert {line.split(maxsplit=1)[1] for line in out} <= set(record.cfg.label_names)
    for snippet in rest:
        promised = re.findall(r'# (torch\.Size\(\[[\d, ]+\]\))', snippet)
        assert promised and run_python(snippet, capsys) == promised


def test_there_are_cards():
    assert NANO in FOLDERS


def test_python_snippets(folder, monkeypatch, capsys):
    check_python_snippets(folder, monkeypatch, capsys)


def check_fine_tuning(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The command as it stands, except for one epoch and no processes beside this one."""
    (argv,) = commands(read_card(folder), '### Fine-tuning')
    assert argv[:2] == ['vitlinear', 'train'] and argv[argv.index('--data-dir') + 1] == 'photos'
    for flag, value in (('--epochs', '1'), ('--warmup-epochs', '0')):
        argv[argv.index(flag) + 1] = value
    if 'local-dir:' in argv[3]:
        shutil.copytree(folder, tmp_path / folder.name)
    image_folder(tmp_path / 'photos', classes=5, per_class=2, size=40)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*argv[1:], '-b', '4', '-j', '0', '--experiment', 'tuned']) == 0
    assert list(tmp_path.rglob('tuned/last.pth.tar'))


def test_fine_tuning_snippet(folder, tmp_path, monkeypatch):
    check_fine_tuning(folder, tmp_path, monkeypatch)


def test_training_and_evaluation_commands(folder, monkeypatch):
    """Commands that take an hour or a data set are not run: their flags, values and config are checked."""
    monkeypatch.chdir(ROOT)
    card = read_card(folder)
    for argv in commands(card, '## Evaluation'):
        assert argv[:2] == ['vitlinear', 'validate']
        args = validate.build_parser().parse(argv[2:])
        assert args.pretrained and (args.model == folder.name or args.model.endswith(f':{folder.name}'))
    for argv in commands(card, '## Training'):
        assert train.build_parser().parse(argv[argv.index('train') + 1:]).model == folder.name.partition('.')[0]


def test_no_other_snippets(folder):
    card = (folder / 'README.md').read_text()
    languages = re.findall(r'^```(\w*)$', card, flags=re.M)
    assert [x for x in languages if x not in ('', 'python', 'sh', 'bibtex')] == []
    sections = ('### Fine-tuning', '## Training', '## Evaluation')
    assert languages.count('sh') == sum(len(snippets(card, 'sh', section)) for section in sections)


def test_up_to_date(folder, capsys):
    assert cli.main(['card', '--check', str(folder)]) == 0
    assert capsys.readouterr() == ('', '')


def test_weights_are_those_of_the_record(folder):
    record = read_record(folder)
    if record.weights is None:
        assert record.hub.repo_id and record.hub.revision
        return
    content = record.weights.read_bytes()
    assert len(content) == record.size and hashlib.sha256(content).hexdigest() == record.sha256
    card = (folder / 'README.md').read_text()
    assert record.sha256 in card and f'{record.size:,} bytes' in card


def test_front_matter(folder):
    record, data = read_record(folder), ModelCard.load(folder / 'README.md').data
    assert data.tags == ['image-classification', 'timm', 'vitlinear'] and data.library_name == 'timm'
    assert data.license == record.license and data.datasets == [record.dataset.id] and data.metrics == ['accuracy']
    (result,) = data.eval_results
    top1 = next(m for m in record.metrics if m.name == 'top-1')
    assert (result.metric_value, result.dataset_split) == (top1.value, top1.split)
    assert (result.dataset_type, result.dataset_name) == (record.dataset.id, record.dataset.name)
    assert data.model_name == record.name


# what a record does not know

def incomplete(tmp_path: Path, **changes) -> Path:
    """A folder as a conversion leaves it, outside the package."""
    folder = tmp_path / 'vvt_nano.converted'
    shutil.copytree(NANO, folder)
    changes = dict(dict(
        name='vvt_nano.converted', tag='converted', metrics=(), training=None, dataset=None, license=None, limits=None,
        macs=None), **changes)
    write_record(dataclasses.replace(read_record(NANO), **changes), folder)
    for name in ('args.yaml', 'summary.csv', 'train.log', 'README.md'):
        (folder / name).unlink()
    return folder


def test_incomplete_record(tmp_path, monkeypatch, capsys):
    folder = incomplete(tmp_path)
    assert cards.write_card(folder) == folder / 'README.md'
    card = (folder / 'README.md').read_text()
    data = ModelCard.load(folder / 'README.md').data
    assert data.license is None and data.datasets is None and data.metrics is None and data.eval_results is None
    assert '**Accuracy:** not measured\n' in card and 'not recorded' in card and '**Licence:** unknown' in card
    for word in ('93.5', 'Fashion', 'None', 'train.log', 'args.yaml', 'summary.csv', 'MACs', 'Limits', 'Evaluation'):
        assert word not in card, word
    assert "create_model('local-dir:vvt_nano.converted', pretrained=True" in card
    check_python_snippets(folder, monkeypatch, capsys)


def test_fine_tuning_from_a_folder(tmp_path, monkeypatch):
    folder = incomplete(tmp_path)
    cards.write_card(folder)
    (tmp_path / 'elsewhere').mkdir()
    check_fine_tuning(folder, tmp_path / 'elsewhere', monkeypatch)


def test_no_label_names_and_no_classifier(tmp_path, monkeypatch, capsys):
    cfg = read_record(NANO).cfg
    folder = incomplete(tmp_path, cfg=dataclasses.replace(cfg, label_names=None))
    cards.write_card(folder)
    check_python_snippets(folder, monkeypatch, capsys)
    headless = dataclasses.replace(read_record(folder), cfg=dataclasses.replace(cfg, num_classes=0, label_names=None))
    assert '### Image classification' not in cards.render_card(headless)


@pytest.mark.parametrize('classes, says', [(1000, True), (100, False)])
def test_published_accuracy_is_never_the_files(tmp_path, classes: int, says: bool):
    """What a paper states for the architecture is said to be that, and only of classifiers of its data set."""
    record = read_record(NANO)
    cfg = dataclasses.replace(
        record.cfg, num_classes=classes, input_size=(3, 224, 224), pool_size=(7, 7), mean=(.5,) * 3, std=(.5,) * 3,
        label_names=None)
    card = cards.render_card(dataclasses.replace(
        record, name='vvt_tiny.authors', architecture='vvt_tiny', tag='authors', cfg=cfg, metrics=(), folder=None))
    line = ' '.join(card[card.index('**Accuracy:**'):card.index('- **Mechanism')].split())
    assert line.startswith('**Accuracy:** not measured') and 'metrics' not in card.split('---')[1]
    assert ('by the paper: 79.2 %' in line and 'not known' in line) == says
    assert ('79.2' in card) == says


# where the weights come from

def test_hub_and_bundled(tmp_path):
    record = read_record(NANO)
    own = cards.render_card(record, 'some-lab/zoo')
    assert "create_model('vvt_nano.fashion_mnist', pretrained=True)" in own
    assert "timm.create_model('hf-hub:some-lab/zoo', pretrained=True)" in own
    other = read_record(incomplete(tmp_path))
    card = cards.render_card(other, 'some-lab/zoo')
    assert card.count("'hf-hub:some-lab/zoo', pretrained=True") == 3 and '--model hf-hub:some-lab/zoo' in card
    assert 'local-dir:' not in card
    hub = dataclasses.replace(other.hub, repo_id='some-lab/zoo')
    assert cards.render_card(dataclasses.replace(other, hub=hub)) == card


def test_other_weights_under_a_bundled_name(tmp_path):
    """A name alone does not make them the weights that the package carries."""
    folder = tmp_path / NANO.name
    shutil.copytree(NANO, folder)
    record = dataclasses.replace(read_record(folder), sha256='0' * 64)
    assert cards.model_name(record) == f'local-dir:{NANO.name}'
    assert cards.model_name(read_record(folder)) == NANO.name


# the command

def test_check_and_write(tmp_path, capsys):
    folder = incomplete(tmp_path)
    path = folder / 'README.md'
    assert cli.main(['card', '--check', str(folder)]) == 1
    assert not path.exists() and str(path) in capsys.readouterr().err
    assert cli.main(['card', str(folder), str(NANO)]) == 0
    assert capsys.readouterr().out == f'{path}\n'  # what is up to date is left alone
    assert cli.main(['card', '--check', str(folder)]) == 0
    path.write_text(path.read_text() + 'by hand\n')
    assert cli.main(['card', '--check', str(folder)]) == 1
    assert path.read_text().endswith('by hand\n')
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors', 'record.json']


@pytest.mark.parametrize('record, words', [
    (None, ['record.json']), ('{"name": 3}', ['record.json']), ('no json', ['record.json', 'JSON']),
])
def test_no_record(tmp_path, capsys, record, words):
    folder = tmp_path / 'folder'
    folder.mkdir()
    if record:
        (folder / 'record.json').write_text(record)
    assert cli.main(['card', str(folder)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(folder) in err and all(word in err for word in words)
    assert not (folder / 'README.md').exists()


def test_unknown_architecture(tmp_path, capsys):
    folder = incomplete(tmp_path)
    path = folder / 'record.json'
    path.write_text(path.read_text().replace('vvt_nano', 'vvt_nono'))
    assert cli.main(['card', str(folder)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and 'unknown architecture vvt_nono' in err and 'vvt_nano' in err


@pytest.mark.parametrize('argv', [[], ['--check']])
def test_neither_or_both(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['card', *argv]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list(tmp_path.iterdir())
