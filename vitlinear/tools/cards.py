"""Model cards: the README.md of a checkpoint's folder, written from its record.

    vitlinear card FOLDER ...            write the card of each folder
    vitlinear card --check FOLDER ...    say which are out of date, and fail if one is

The card states what the record knows and leaves out the rest: an accuracy that nobody measured is never filled in.
"""
import html
import re
import textwrap
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData

from ..models import is_ours
from ..zoo.families import Family
from ..zoo.records import RECORD_NAME, Record, find_record, read_record, write_text
from ._errors import RunError, UsageError, command, printable, suggest, usage_errors
from ._flags import Parser
from ._folders import CARD_NAME
from .info import architectures, family_of, measured, numbers, percent, published, short, size_of

WIDTH = 120

_CLASSIFICATION = '''\
import timm
import torch
import vitlinear  # registers the model with timm
from PIL import Image

model = timm.create_model({name!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))

image = Image.new({mode!r}, ({width}, {height}))  # your image{kind}
with torch.no_grad():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=-1)[0]
{labels}for i in probabilities.topk({top}).indices.tolist():
    print(f'{{probabilities[i]:.3f}}', {label})
'''

_FEATURES = '''\
import timm
import torch
import vitlinear

model = timm.create_model({name!r}, pretrained=True, features_only=True).eval()
for feature in model(torch.randn(1, {size})):
    print(feature.shape)
{shapes}
'''

_EMBEDDINGS = '''\
import timm
import torch
import vitlinear

model = timm.create_model({name!r}, pretrained=True, num_classes=0).eval()
images = torch.randn(1, {size})
print(model(images).shape)  # {pooled}

features = model.forward_features(images)
print(features.shape)  # {unpooled}
print(model.forward_head(features, pre_logits=True).shape)  # {pooled}
'''

_TRAINING = '''\
vitlinear train --model {name} --pretrained --num-classes 5 --data-dir photos \\
    --input-size {size} --opt adamw --lr 2e-4 --epochs 10 --warmup-epochs 1 --device cpu
'''


def _fill(text: str, indent: str = '') -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=' ' * len(indent), initial_indent=indent, break_long_words=False,
        break_on_hyphens=False)


def _command(text: str) -> str:
    """A shell command over several lines where it is long, broken before its flags."""
    lines = ['']
    for part in re.split(r' (?=-)', text):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH - 3:
            lines.append(f'    {part}')
        else:
            lines[-1] = f'{lines[-1]} {part}'.lstrip() if len(lines) == 1 else f'{lines[-1]} {part}'
    return ' \\\n'.join(lines)


def _code(language: str, text: str) -> str:
    fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{fence}{language}\n{text.strip()}\n{fence}'


def _escaped(value: Any) -> Any:
    """A record, or what is in it, whose free texts hold no HTML, no control characters and no links but of the web.

    Commands stay as they are: they stand in blocks of code.
    """
    if isinstance(value, str):
        value = html.escape(printable(' '.join(value.split())), quote=False)
        return re.sub(r'\]\((?!https?://)', r']\\(', value)
    if is_dataclass(value):
        free = [f.name for f in fields(value) if f.name not in ('command', 'cfg')]
        return replace(value, **{name: _escaped(getattr(value, name)) for name in free})
    if isinstance(value, tuple):
        return tuple(map(_escaped, value))
    return {k: _escaped(v) for k, v in value.items()} if isinstance(value, dict) else value


def model_name(record: Record, repo_id: str | None = None) -> str:
    """The name by which timm.create_model finds the weights.

    Args:
        record: Record of the checkpoint.
        repo_id: Repository that the folder is being sent to.

    Returns:
        The tag where the installed package knows the weights, the repository where they are on the Hub, and the folder
        itself otherwise.
    """
    known = find_record(record.name)
    repo_id = repo_id or record.hub.repo_id
    if known is not None and known.sha256 == record.sha256 and (known.weights or known.hub.repo_id):
        return record.name
    if repo_id:
        return f'hf-hub:{repo_id}'
    return f'local-dir:{record.folder.resolve().name if record.folder else record.name}'


def _front_matter(record: Record) -> str:
    top1, dataset = measured(record), record.dataset
    results = None
    if top1 and dataset and dataset.id:
        split = next(m.split for m in record.metrics if m.name == 'top-1')
        results = [EvalResult(
            task_type='image-classification', dataset_type=dataset.id, dataset_name=dataset.name, dataset_split=split,
            metric_type='accuracy', metric_name='top-1', metric_value=top1.value)]
    data = ModelCardData(
        tags=['image-classification', 'timm', 'vitlinear'],
        library_name='timm',
        license=record.license,
        datasets=[dataset.id] if dataset and dataset.id else None,
        metrics=['accuracy'] if top1 else None,
        model_name=record.name if results else None,
        eval_results=results,
    )
    return f'---\n{data.to_yaml()}\n---'


def _shapes(record: Record) -> dict:
    """Shapes that the snippets print, from a run of the model on 'meta'."""
    has_config = record.folder and (record.folder / 'config.json').is_file()
    name = f'local-dir:{record.folder}' if has_config else record.architecture
    images = torch.empty(1, *record.cfg.input_size, device='meta')
    kwargs = dict(in_chans=record.cfg.input_size[0], device='meta')
    with torch.no_grad():
        with usage_errors(f'{name} makes no model'):
            features = timm.create_model(name, features_only=True, **kwargs).eval()(images)
            model = timm.create_model(name, num_classes=0, **kwargs).eval()
        unpooled = model.forward_features(images)
        pooled = model.forward_head(unpooled, pre_logits=True)
    return dict(
        shapes='\n'.join(f'# {f.shape}' for f in features), unpooled=str(unpooled.shape), pooled=str(pooled.shape))


def _summary(record: Record, family: Family) -> str:
    title = family.title.partition(',')[0]
    article = 'An' if title[0] in 'AEIOUX' else 'A'
    data = f' on {record.dataset.name}' if record.dataset else ''
    return (
        f'{article} {title} image classification model with {short(record.parameters).replace(" ", "")} '
        f'parameters and linear attention. Trained{data} by {record.provenance.trained_by}.')


def _details(record: Record, family: Family) -> list[str]:
    cfg, dataset, top1 = record.cfg, record.dataset, measured(record)
    origin, said = timm.get_pretrained_cfg(record.architecture).origin_url, published(record.architecture)
    accuracy = 'not measured'
    if top1:
        accuracy = f'**{percent(top1.value)} % top-1** on {top1.dataset} ({top1.detail})'
    elif said and cfg.num_classes == 1000:
        who = dict(paper='the paper', authors='its authors').get(said.source, said.source)
        accuracy += (
            f'. Published for the architecture, by {who}: {percent(said.value)} % top-1 on {said.dataset} '
            f'({said.detail}); whether these weights reach it is not known')
    data = []
    if dataset:
        counts = ((dataset.train_images, 'training images'), (dataset.test_images, 'test images'))
        data = [dataset.name, *[f'{n:,} {what}' for n, what in counts if n], dataset.url]
        data += [f'licence {dataset.license}'] if dataset.license else []
    lines = (
        '**Model type:** image classification and feature backbone, linear attention',
        f'**Parameters:** {record.parameters:,}',
        record.macs and f'**MACs:** {short(record.macs)} at {size_of(cfg.input_size)}, attention products counted',
        f'**Images:** {size_of(cfg.input_size)} (channels, height, width), {cfg.interpolation} interpolation, crop '
        f'{cfg.crop_pct:g}, mean {numbers(cfg.mean)}, std {numbers(cfg.std)}; {cfg.num_classes} classes',
        f'**Accuracy:** {accuracy}',
        f'**Mechanism:** {record.provenance.mechanism}',
        f'**Configuration:** {record.provenance.configuration}',
        family.paper and f'**Paper:** {", ".join(filter(None, (family.paper, family.url)))}',
        origin and f"**Authors' code:** {origin}",
        data and f'**Data:** {", ".join(filter(None, data))}',
        not record.license and '**Licence:** unknown; ask whoever made these weights before you use them',
    )
    return [_fill(line, '- ') for line in lines if line]


def _training(record: Record) -> list[str]:
    facts = record.training
    if facts is None:
        return ['How these weights were trained is not recorded here.']
    files = [
        f'`{name}` {what}' for name, what in (
            ('args.yaml', 'holds all settings'), ('summary.csv', 'the loss and accuracy of each epoch'))
        if record.folder and (record.folder / name).is_file()]
    files += [f'`{facts.log}` the output'] if facts.log else []
    runs = 'One run, seed' if len(facts.seeds) == 1 else f'{len(facts.seeds)} runs, seeds'
    told = (
        ('{} epochs', facts.epochs),
        (f'{runs} {{}}', ', '.join(map(str, facts.seeds))),
        ('Weights: {}', facts.weights),
        ('Hardware: {}', facts.hardware),
        ('Software: {}', ', '.join(f'{name} {version}' for name, version in facts.software.items())),
        ('Wall time: {}', facts.wall_time),
        ('Recipe: `{}`', facts.config),
        ('{}', ', '.join(files)),
    )
    blocks = ['\n'.join(_fill(text.format(value), '- ') for text, value in told if value)]
    if facts.command:
        blocks.append(_code('sh', _command(facts.command)))
    return blocks


def _evaluation(record: Record) -> list[str]:
    blocks = []
    for metric in record.metrics:
        split = f'{metric.split} split' if metric.unit == '%' else metric.split
        words = [f'{metric.name}: {metric.value:g} {metric.unit}', split, metric.dtype]
        words += [f'{metric.images:,} images'] if metric.images else []
        words += [f'seed {metric.seed}'] if metric.seed is not None else []
        blocks.append(_fill(', '.join(filter(None, words)), '- '))
    commands = dict.fromkeys(_command(m.command) for m in record.metrics if m.command)
    return ['\n'.join(blocks), *([_code('sh', '\n'.join(commands))] if commands else [])]


def render_card(record: Record, repo_id: str | None = None) -> str:
    """The card of a checkpoint, in Markdown with the Hub's front matter.

    Args:
        record: Record of the checkpoint; what else its folder holds, such as a log, is mentioned.
        repo_id: Repository that the folder is being sent to, where that is not the record's.
    """
    family, cfg, name = family_of(record.architecture), record.cfg, model_name(record, repo_id)
    text = _escaped(record)
    size = ', '.join(str(n) for n in cfg.input_size)
    hub = repo_id or record.hub.repo_id
    if ':' not in name:
        where = 'The package knows these weights by name; `import vitlinear` makes them known to timm.'
        if hub:
            where += f' From the Hub they load as `timm.create_model({"hf-hub:" + hub!r}, pretrained=True)`, too.'
    else:
        where = '`import vitlinear` makes the architecture known to timm.'
        if name.startswith('local-dir:'):
            where += f' The folder `{name.partition(":")[2]}` is looked for where Python was started.'
    labels = cfg.label_names is not None
    blocks = [
        _front_matter(record),
        f'# Model card for {record.name}',
        _fill(_summary(text, family)),
        '## Model details',
        '\n'.join(_details(text, family)),
        *[_fill(paragraph) for paragraph in family.text.split('\n\n') if paragraph],
        '## Use',
        _fill(f'Install the package with `pip install vitlinear`, or `pip install .` in a checkout of it. {where}'),
    ]
    if cfg.input_size[0] in (1, 3) and cfg.num_classes:
        blocks += ['### Image classification', _code('python', _CLASSIFICATION.format(
            name=name,
            mode='L' if cfg.input_size[0] == 1 else 'RGB',
            width=cfg.input_size[2],
            height=cfg.input_size[1],
            kind=', in shades of grey' if cfg.input_size[0] == 1 else '',
            labels="labels = model.pretrained_cfg['label_names']\n" if labels else '',
            label='labels[i]' if labels else 'i',
            top=min(5, cfg.num_classes),
        ))]
    shapes = _shapes(record)
    blocks += [
        '### Feature maps',
        _code('python', _FEATURES.format(name=name, size=size, **shapes)),
        '### Embeddings',
        _code('python', _EMBEDDINGS.format(name=name, size=size, **shapes)),
        '### Fine-tuning',
        _fill('On images in `photos/train/CLASS/*` and `photos/validation/CLASS/*`, here of five classes. With a GPU, '
              'leave out `--device cpu`.'),
        _code('sh', _TRAINING.format(name=name, size=' '.join(str(n) for n in cfg.input_size))),
        '## Training',
        *_training(text),
    ]
    if record.metrics:
        blocks += ['## Evaluation', *_evaluation(text)]
    blocks += ['## File', f'- `{record.file}`, {record.size:,} bytes\n- sha256 `{record.sha256}`']
    if text.limits:
        blocks += ['## Limits', _fill(text.limits)]
    if family.bibtex:
        blocks += ['## Citation', _code('bibtex', family.bibtex)]
    return '\n\n'.join(block for block in blocks if block) + '\n'


def write_card(folder: str | Path, record: Record | None = None, repo_id: str | None = None) -> Path:
    """Write the card of a checkpoint's folder, whole or not at all.

    Args:
        folder: Folder of the checkpoint.
        record: Its record, read from the folder if not given.
        repo_id: As for `render_card`.

    Returns:
        Path of the card.
    """
    path = Path(folder) / CARD_NAME
    write_text(path, render_card(record or read_record(folder), repo_id))
    return path


def _read(folder: Path) -> Record:
    if not (folder / RECORD_NAME).is_file():
        raise UsageError(f'{folder} is no folder of a checkpoint: it has no {RECORD_NAME}')
    with usage_errors(str(folder)):
        record = read_record(folder)
    if not is_ours(record.architecture):
        raise UsageError(
            f'{folder / RECORD_NAME}: unknown architecture {record.architecture}'
            f'{suggest(record.architecture, architectures())}')
    return record


@command('card')
def main(argv: Sequence[str] | None) -> None:
    parser = Parser('card', {}, description='Write cards of checkpoints from their records.')
    parser.add_argument('folders', nargs='+', type=Path, metavar='FOLDER', help='folder that holds record.json')
    parser.add_argument('--check', action='store_true', help='write nothing, fail if a card is out of date')
    args = parser.parse_args(argv)
    records = [_read(folder) for folder in args.folders]  # all of them before the first is written
    stale = []
    for folder, record in zip(args.folders, records):
        path = folder / CARD_NAME
        text = render_card(record)
        if path.is_file() and path.read_text(encoding='utf-8') == text:
            continue
        if args.check:
            stale.append(str(path))
        else:
            try:
                write_text(path, text)
            except OSError as e:
                raise UsageError(f'{path}: {e.strerror or e}') from e
            print(path)
    if stale:
        raise RunError(f'out of date: {", ".join(stale)}; "vitlinear card FOLDER" writes them anew')
