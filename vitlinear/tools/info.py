"""What there is: `vitlinear list` and `vitlinear info NAME`, and the facts behind them, the cards and README.

Facts about checkpoints stand in their records, facts about architectures in timm's registry, in the family's file and
in `zoo/architectures.json`: the accuracies that others published, and counts of parameters and operations, which
`scripts/readme_tables` takes, since counting them all takes longer than a command should.
"""
import fnmatch
import json
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import timm

from ..models import backbone_of, is_ours
from ..zoo.families import Family
from ..zoo.hub import hub_org
from ..zoo.records import Record, find_record, records
from ._errors import UsageError, command, suggest
from ._flags import Parser
from ._folders import CARD_NAME, count_macs

ARCHITECTURES = Path(__file__).parents[1] / 'zoo' / 'architectures.json'
WIDTH = 80

_OF_CFG = 'num_classes', 'input_size', 'fixed_input_size', 'crop_pct', 'interpolation', 'mean', 'std'


class Accuracy(NamedTuple):
    """A top-1 accuracy and who says so: 'ours' where we measured it, 'paper' or 'authors' where we did not."""
    value: float
    dataset: str
    source: str
    detail: str


class Weights(NamedTuple):
    """Where weights are: `kind` is 'bundled', 'hub' or 'url', `where` a path, a repository@commit or an address."""
    kind: str
    where: str


@dataclass(frozen=True)
class Model:
    """An architecture, or an architecture with a tag.

    Attributes:
        name: 'vvt_tiny' or 'vvt_nano.fashion_mnist'.
        macs: Multiply-accumulates for one image of `input_size`, the attention products counted.
    """
    name: str
    architecture: str
    tag: str | None
    family: str
    parameters: int
    macs: int | None
    num_classes: int
    input_size: tuple[int, ...]
    fixed_input_size: bool
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    accuracy: Accuracy | None
    weights: Weights | None
    license: str | None
    origin: str | None

    def to_dict(self) -> dict[str, Any]:
        return {k: v._asdict() if isinstance(v, (Accuracy, Weights)) else v for k, v in vars(self).items()}


def architectures() -> list[str]:
    """Names of our architectures, as timm lists them."""
    return [name for name in timm.list_models() if is_ours(name)]


def family_of(architecture: str) -> Family:
    return backbone_of(architecture).family


@cache
def architecture_facts() -> dict[str, dict[str, Any]]:
    """Contents of architectures.json."""
    return json.loads(ARCHITECTURES.read_text(encoding='utf-8'))


@cache
def count(name: str) -> tuple[int, int]:
    """Parameters of a model, and multiply-accumulates for one image of its default size, by running it on 'meta'."""
    model = timm.create_model(name, device='meta')
    return sum(p.numel() for p in model.parameters()), count_macs(model, model.pretrained_cfg['input_size'])


def published(architecture: str) -> Accuracy | None:
    """Top-1 accuracy that the paper or its authors state for an architecture."""
    said = architecture_facts().get(architecture, {}).get('published')
    return Accuracy(said['top1'], said['dataset'], said['source'], said['url']) if said else None


def measured(record: Record) -> Accuracy | None:
    """Top-1 accuracy of a checkpoint by its record."""
    top1 = next((m for m in record.metrics if m.name == 'top-1'), None)
    if top1 is None:
        return None
    images = f'{top1.images:,} images' if top1.images else None
    seed = f'seed {top1.seed}' if top1.seed is not None else None
    detail = ', '.join(filter(None, (f'{top1.split} split', images, top1.dtype, seed)))
    return Accuracy(top1.value, record.dataset.name if record.dataset else 'unknown data', 'ours', detail)


def _weights(name: str) -> Weights | None:
    cfg, org = timm.get_pretrained_cfg(name), hub_org()
    if org and find_record(name):
        return Weights('hub', f'{org}/{name}')
    if cfg.file:
        return Weights('bundled', str(cfg.file))
    if cfg.hf_hub_id:
        return Weights('hub', str(cfg.hf_hub_id))
    return Weights('url', str(cfg.url)) if cfg.url else None


def find_model(name: str) -> Model:
    """Everything known about an architecture, 'vvt_tiny', or one with a tag, 'vvt_nano.fashion_mnist'.

    Raises:
        UsageError: There is no such model here.
    """
    architecture, _, tag = name.partition('.')
    if not is_ours(architecture):
        if timm.is_model(architecture):
            raise UsageError(f"{name} is one of timm's own models; this lists those of vitlinear")
        raise UsageError(f'unknown model {name}{suggest(architecture, architectures())}')
    if tag and name not in (tagged := timm.list_models(f'{architecture}.*', include_tags=True)):
        raise UsageError(f'unknown tag {tag}; {architecture} has {", ".join(tagged)}')

    cfg = timm.get_pretrained_cfg(name)
    record = find_record(name)
    notes, is_default = architecture_facts().get(architecture, {}), cfg == timm.get_pretrained_cfg(architecture)
    accuracy = published(architecture) if is_default else None
    if record:
        accuracy = measured(record)
        parameters, macs = record.parameters, record.macs
    elif 'macs' in notes and is_default:
        parameters, macs = notes['parameters'], notes['macs']
    else:
        parameters, macs = count(name)
    return Model(
        name=name,
        architecture=architecture,
        tag=tag or None,
        family=family_of(architecture).name,
        parameters=parameters,
        macs=macs,
        **{field: getattr(cfg, field) for field in _OF_CFG},
        accuracy=accuracy,
        weights=_weights(name),
        license=record.license if record else cfg.license,
        origin=cfg.origin_url,
    )


def all_models() -> list[Model]:
    """Every architecture, followed by its tags that have weights or a record; by family, the small before the large."""
    known = records()
    groups = []
    for architecture in architectures():
        tagged = timm.list_models(f'{architecture}.*', include_tags=True)
        kept = [name for name in tagged if name in known or _weights(name)]
        groups.append([find_model(name) for name in (architecture, *kept)])
    groups.sort(key=lambda group: (group[0].family, group[0].parameters))
    return [model for group in groups for model in group]


def short(number: float | None) -> str:
    """A count in three digits or so: 1.18 M, 5.51 G."""
    if number is None:
        return '-'
    for factor, unit in ((1e9, ' G'), (1e6, ' M'), (1e3, ' k')):
        if number >= factor * .9995:
            return f'{number / factor:#.3g}'.rstrip('.') + unit
    return f'{number:g}'


def percent(value: float) -> str:
    """A percentage with one decimal, or two where it has them."""
    return f'{value:.1f}' if round(value, 1) == value else f'{value:.2f}'


def size_of(shape: Sequence[int]) -> str:
    return ' x '.join(str(n) for n in shape)


def numbers(values: Sequence[float]) -> str:
    """One number, or several in parentheses."""
    text = ', '.join(f'{x:g}' for x in values)
    return text if len(values) == 1 else f'({text})'


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads has read enough, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _table(models: Sequence[Model]) -> str:
    header = ('model', 'params', 'MACs', 'input', 'top-1 %', 'weights')
    lines = []
    for _, group in groupby(models, key=lambda m: m.family):
        rows = [header]
        for m in group:
            accuracy = f'{percent(m.accuracy.value)} {m.accuracy.source}' if m.accuracy else '-'
            rows.append((
                m.name, short(m.parameters), short(m.macs), 'x'.join(map(str, m.input_size)), accuracy,
                m.weights.kind if m.weights else '-'))
        family = family_of(m.architecture)
        lines += ['', ' '.join(filter(None, (f'{family.name}: {family.title}', family.url)))]
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            cells = [c.rjust(w) if i in (1, 2) else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
            lines.append('  '.join(cells).rstrip())
    return '\n'.join(lines[1:])


_LEGEND = (
    'MACs count the attention products. top-1: "ours" was measured by us, "paper" and "authors" mark what they state, '
    'not measured here. "vitlinear info NAME" says more.')


@command('list')
def main_list(argv: Sequence[str] | None) -> None:
    parser = Parser('list', {}, description='List the models and the weights there are for them.')
    parser.add_argument('pattern', nargs='?', metavar='PATTERN', help="part of the name, or a pattern such as '*_tiny'")
    parser.add_argument('--family', metavar='NAME', help='only the models of one family, such as vvt')
    parser.add_argument('--pretrained', action='store_true', help='only what has weights')
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args(argv)

    models = all_models()
    families = sorted({m.family for m in models})
    if args.family and args.family not in families:
        raise UsageError(f'--family {args.family}: the families are {", ".join(families)}')
    if args.pattern:
        pattern = args.pattern if re.search(r'[*?\[]', args.pattern) else f'*{args.pattern}*'
        found = [m for m in models if fnmatch.fnmatchcase(m.name, pattern)]
        if not found:
            raise UsageError(f'no model matches {args.pattern}{suggest(args.pattern, [m.name for m in models])}')
        models = found
    models = [m for m in models if args.family in (None, m.family) and (m.weights or not args.pretrained)]
    if args.json:
        _say(json.dumps([m.to_dict() for m in models], indent=2))
    elif models:
        _say(f'{_table(models)}\n\n{textwrap.fill(_LEGEND, WIDTH)}')
    else:
        _say('No such model has weights.' if args.pretrained else 'No such model.')


def _facts(model: Model) -> list[tuple[str, str]]:
    family, record = family_of(model.architecture), find_record(model.name)
    accuracy, weights = model.accuracy, model.weights
    facts = [
        ('family', f'{family.name}, {family.title}'),
        ('paper', ', '.join(filter(None, (family.paper, family.url)))),
        ('parameters', f'{model.parameters:,}'),
        ('MACs', f'{short(model.macs)} for one image, attention products counted'),
        ('input', size_of(model.input_size) + (', fixed' if model.fixed_input_size else ', or any other size')),
        ('', f'crop {model.crop_pct:g}, {model.interpolation}, mean {numbers(model.mean)}, std {numbers(model.std)}'),
        ('classes', str(model.num_classes)),
    ]
    if accuracy:
        who = dict(ours='measured by us', paper="the paper's, not ours", authors="its authors', not ours")
        facts.append((
            'top-1', f'{percent(accuracy.value)} % on {accuracy.dataset}, '
                     f'{who.get(accuracy.source, accuracy.source)} ({accuracy.detail})'))
    else:
        facts.append(('top-1', 'no figure known'))
    if weights:
        facts.append(('weights', f'{weights.kind}, {weights.where}'))
        facts.append(('', f"timm.create_model('{model.name}', pretrained=True)"))
    else:
        others = timm.list_pretrained(f'{model.architecture}.*')
        facts.append(('weights', f'none; there are {", ".join(others)}' if others else 'none'))
    if record:
        facts += [
            ('sha256', record.sha256),
            ('size', f'{record.size:,} bytes'),
            ('Hub', '@'.join(filter(None, (record.hub.repo_id, record.hub.revision)))),
            ('trained by', record.provenance.trained_by),
            ('mechanism', record.provenance.mechanism),
            ('configuration', record.provenance.configuration),
        ]
        if record.folder and (record.folder / CARD_NAME).is_file():
            facts.append(('card', str(record.folder / CARD_NAME)))
    facts += [('licence', model.license or 'unknown'), ('origin', model.origin or '')]
    return [(label, text) for label, text in facts if text]


@command('info')
def main_info(argv: Sequence[str] | None) -> None:
    parser = Parser('info', {}, description='Say what is known about one model.')
    parser.add_argument('name', metavar='NAME', help='architecture, or architecture.tag')
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args(argv)

    model = find_model(args.name)
    family, record = family_of(model.architecture), find_record(model.name)
    if args.json:
        _say(json.dumps(
            dict(model.to_dict(), family=asdict(family), record=record.to_dict() if record else None), indent=2))
        return
    lines = [model.name, '']
    for label, text in _facts(model):
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f'{label:<15}', subsequent_indent=' ' * 15, break_long_words=False,
            break_on_hyphens=False)
    for paragraph in family.text.split('\n\n'):
        lines += ['', *textwrap.wrap(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)]
    if family.bibtex:
        lines.append('')
        for line in re.sub(r'\n {3,}', ' ', family.bibtex).splitlines():
            lines += textwrap.wrap(line, WIDTH, subsequent_indent='    ', break_long_words=False) or ['']
    _say('\n'.join(lines))
