"""A finished training run as a folder for the Hub: `vitlinear export RUN_DIR FOLDER`.

    vitlinear export output/vvt_nano_fashion_mnist model_cards/vvt_nano.fashion_mnist --facts facts.yaml

Takes the last checkpoint, its moving average where there is one: choosing by test accuracy would bias it, so the best
is taken only with --best. The folder is what `timm.create_model('local-dir:FOLDER', pretrained=True)` and transformers
load: model.safetensors, config.json, record.json and the card README.md, with the run's args.yaml, summary.csv and
train.log. FOLDER is named ARCHITECTURE.TAG, or --tag is given. --facts is a YAML file of what only its author knows,
in the form of record.json: hardware, wall time, metrics, limits.
"""
import argparse
import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn
from torchvision import datasets

import vitlinear

from ..models import is_ours
from ..models._castling import SCHEDULE_ARGUMENTS
from ..models._timm import read_weights
from ..zoo.hub import sha256
from ..zoo.records import RECORD_NAME, WEIGHTS_NAME, Cfg, Dataset, Record, record_from_dict, write_record
from . import _errors, _flags, _script
from ._errors import UsageError, usage_errors
from ._folders import check_target, count_macs, folder_problems, new_folder
from .cards import write_card

__all__ = ['export_model', 'export_run']

_RUN_FILES = ('args.yaml', 'summary.csv', 'train.log')

DATASETS = {
    'torch/fashion_mnist': Dataset(
        'zalando-datasets/fashion_mnist', 'Fashion-MNIST', 'https://github.com/zalandoresearch/fashion-mnist', 'mit',
        60000, 10000),
    'torch/cifar10': Dataset(
        'uoft-cs/cifar10', 'CIFAR-10', 'https://www.cs.toronto.edu/~kriz/cifar.html', None, 50000, 10000),
    'torch/cifar100': Dataset(
        'uoft-cs/cifar100', 'CIFAR-100', 'https://www.cs.toronto.edu/~kriz/cifar.html', None, 50000, 10000),
}
# of those datasets whose classes torchvision can name without the data
_LABELS = {
    'torch/fashion_mnist': datasets.FashionMNIST.classes, 'torch/mnist': datasets.MNIST.classes,
    'torch/kmnist': datasets.KMNIST.classes}


def split_name(folder: Path, architecture: str, tag: str | None, default: str | None = None) -> str:
    """The tag of a checkpoint: the one given, else that in the name of its folder."""
    of, _, named = folder.resolve().name.partition('.')
    tag = tag or (named if of == architecture else '') or default
    if not tag:
        raise UsageError(f'{folder} is not named {architecture}.TAG: name it so, or give --tag')
    if not tag.replace('_', '').isalnum() or not tag.isascii():
        raise UsageError(f'--tag {tag}: letters, digits and underscores make a tag')
    return tag


def read_facts(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    return _flags.read_yaml(path, '--facts')


def merged(base: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """`base` with what `facts` says in its place, object by object."""
    out = dict(base)
    for k, v in facts.items():
        out[k] = merged(out[k], v) if isinstance(v, dict) and isinstance(out.get(k), dict) else v
    return out


def export_model(
        model: nn.Module,
        folder: Path,
        tag: str,
        cfg: Cfg,
        facts: dict[str, Any],
        files: Sequence[Path] = (),
        finite: bool = True,
) -> Record:
    """Write a model as a folder that timm and transformers load, with its record and card, whole or not at all.

    Args:
        model: Model with the weights.
        folder: Folder to write. One that holds a checkpoint already is replaced; its other files are kept.
        tag: Tag of the weights.
        cfg: Input and classes.
        facts: Fields of the record beside those that follow from the model.
        files: Further files for the folder.
        finite: Refuse NaN and Inf among the weights.
    """
    check_target(folder)
    architecture = model.pretrained_cfg['architecture']
    if cfg.num_classes != model.num_classes:
        raise UsageError(f'num_classes is {cfg.num_classes}, and the model has {model.num_classes} classes')
    model.pretrained_cfg.update(asdict(cfg), tag=tag, architecture=architecture)
    labels = model.pretrained_cfg.pop('label_names', None)
    with new_folder(folder) as new:
        if folder.is_dir():
            shutil.copytree(folder, new, dirs_exist_ok=True)
        save_for_hf(
            model, new, model_config=dict(label_names=list(labels)) if labels else None, safe_serialization=True)
        arguments = _slim_config(new / 'config.json', architecture)
        for path in files:
            shutil.copy(path, new)
        empty = timm.create_model(architecture, num_classes=cfg.num_classes, device='meta', **arguments)
        data = merged(dict(
            name=f'{architecture}.{tag}',
            architecture=architecture,
            tag=tag,
            file=WEIGHTS_NAME,
            sha256=sha256(new / WEIGHTS_NAME),
            size=(new / WEIGHTS_NAME).stat().st_size,
            hub=dict(repo_id=None, revision=None),
            cfg=asdict(cfg),
            dataset=None,
            metrics=[],
            parameters=sum(p.numel() for p in model.parameters()),
            macs=count_macs(empty, cfg.input_size),
            training=None,
            license=model.pretrained_cfg.get('license'),
        ), facts)
        with usage_errors(f'{RECORD_NAME} of {folder}'):
            record = record_from_dict(data, new)
            write_record(record, new)
        write_card(new)
        problems = folder_problems(new, finite=finite)
        if problems:
            raise UsageError(f'{folder} was not written: {"; ".join(problems)}')
    return replace(record, folder=folder)


def _slim_config(path: Path, architecture: str) -> dict[str, Any]:
    """Leave out of config.json what is told twice; returns the arguments that remain."""
    config = json.loads(path.read_text(encoding='utf-8'))
    arguments = config.pop('model_args', {})
    default = timm.create_model(architecture, device='meta')
    arguments.pop('num_classes', None)  # transformers passes it on its own, and fails when it meets it twice
    for name in ('in_chans', 'global_pool'):  # where they differ, transformers learns them from here alone
        if name in arguments and arguments[name] == getattr(default, name, None):
            del arguments[name]
    if arguments:
        config['model_args'] = arguments
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    return arguments


def data_cfg(model: nn.Module, args: argparse.Namespace, labels: Sequence[str] | None) -> Cfg:
    """Input and classes of a model that was trained with these arguments."""
    config = _script.data_config_for(model, args)
    channels = config['input_size'][0]
    reduction = model.feature_info[-1]['reduction']
    if labels and len(labels) != model.num_classes:
        raise UsageError(f'--labels: {len(labels)} names for {model.num_classes} classes')
    for name in ('mean', 'std'):
        config[name] = tuple(map(float, config[name]))
        if len(config[name]) != channels:
            raise UsageError(
                f'--{name} is needed: {len(config[name])} numbers are known, the model takes {channels} channels')
    config.update(
        num_classes=model.num_classes,
        input_size=tuple(config['input_size']),
        pool_size=tuple(-(-n // reduction) for n in config['input_size'][1:]),
        crop_pct=float(config['crop_pct']),
        label_names=tuple(labels) if labels else None,
    )
    return Cfg(**config)


def _accuracy(run: argparse.Namespace, summary: Path, epoch: int, images: int | None) -> list[dict[str, Any]]:
    """The accuracy that the run itself measured for the weights after an epoch, which it saved in `summary`."""
    if not summary.is_file():
        return []
    with summary.open(newline='') as f:
        rows = [row for row in csv.DictReader(f) if row.get('epoch') == str(epoch) and row.get('eval_top1')]
    return [dict(
        name='top-1',
        unit='%',
        value=float(row['eval_top1']),
        split=run.val_split,
        images=images,
        dtype=f'{run.amp_dtype} autocast' if run.amp else 'float32',
        seed=run.seed,
    ) for row in rows[-1:]]


def export_run(
        run: Path,
        folder: Path,
        tag: str | None = None,
        best: bool = False,
        use_ema: bool | None = None,
        labels: Sequence[str] | None = None,
        facts: dict[str, Any] | None = None,
        finite: bool = True,
) -> Record:
    """Write the checkpoint of a run of `vitlinear train` as a folder for the Hub.

    Args:
        run: Output folder of the run.
        folder: Folder to write.
        tag: Tag of the weights, if the folder's name does not say.
        best: Take the best epoch in place of the last.
        use_ema: Take the moving average, or not; if it is there where not said.
        labels: Names of the classes; torchvision's where it knows them.
        facts: Fields of the record.
        finite: Refuse NaN and Inf among the weights.
    """
    settings, path = run / 'args.yaml', run / ('model_best.pth.tar' if best else 'last.pth.tar')
    for file in (settings, path):
        if not file.is_file():
            raise UsageError(f'{run} is no folder of a training run: it has no {file.name}')
    args = argparse.Namespace(**_flags.read_yaml(settings, 'settings'))
    with usage_errors(str(path)):
        meta = load_checkpoint_metadata(str(path))
        has_ema, epoch = meta.get('state_dict_ema') is not None, int(meta['epoch'])
        del meta
        state_dict = read_weights(path, use_ema=use_ema is not False)
    if use_ema and not has_ema:
        raise UsageError(f'--ema: {path} holds no moving average')
    ema = has_ema and use_ema is not False
    for name in SCHEDULE_ARGUMENTS:  # the model as it is after the training
        args.model_kwargs.pop(name, None)
    model = _script.create_model(args)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as e:
        raise UsageError(f'{path} does not fit {args.model}: {str(e).splitlines()[-1].strip()}') from e
    architecture = model.pretrained_cfg['architecture']
    if not is_ours(architecture):
        raise UsageError(f"{architecture} is a model of timm's own: timm.models.save_for_hf exports it")
    tag = split_name(folder, architecture, tag)
    # the run evaluates its moving average where it has one, unless that is kept on the CPU
    evaluated = ema == (has_ema and not getattr(args, 'model_ema_force_cpu', False))
    dataset = DATASETS.get(args.dataset.lower())
    found = dict(
        dataset=asdict(dataset) if dataset else dict(id=None, name=args.dataset or 'a folder of images'),
        metrics=_accuracy(args, run / 'summary.csv', epoch, dataset and dataset.test_images) if evaluated else [],
        training=dict(
            epochs=epoch + 1,
            seeds=[args.seed],
            weights=('moving average after ' if ema else 'weights after ') + (
                f'the best epoch, {epoch}, chosen by {args.eval_metric} on the evaluation data' if best
                else 'the last epoch'),
            log='train.log' if (run / 'train.log').is_file() or (folder / 'train.log').is_file() else None,
        ),
        provenance=dict(
            trained_by='its publisher',
            mechanism=f'as implemented in vitlinear {vitlinear.__version__}',
            configuration='that in args.yaml',
        ),
    )
    files = [run / name for name in _RUN_FILES if (run / name).is_file()]
    cfg = data_cfg(model, args, labels or _LABELS.get(args.dataset.lower()))
    return export_model(model, folder, tag, cfg, merged(found, facts or {}), files, finite)


def add_flags(flag: Any) -> None:
    """The flags that export and convert share."""
    flag('--tag', metavar='TAG', help='tag of the weights (default: from the name of the folder, ARCHITECTURE.TAG)')
    flag('--ema', action=argparse.BooleanOptionalAction, help='take the moving average (default: if there is one)')
    flag('--labels', nargs='+', metavar='NAME', help='names of the classes, in order')
    flag('--allow-non-finite', action='store_true', help='take weights with NaN or Inf too')
    flag('--facts', type=Path, metavar='FILE', help=f'YAML file with further fields of {RECORD_NAME}')


def report(record: Record) -> None:
    print(
        f'{record.folder}: {record.name}, {record.parameters / 1e6:.2f} M parameters, {record.cfg.num_classes} '
        f'classes, sha256 {record.sha256}')


@_errors.command('export')
def main(argv: Sequence[str] | None) -> None:
    parser = _flags.Parser('export', {}, description='Write a training run as a folder for the Hub.')
    parser.add_argument('run', type=Path, metavar='RUN_DIR', help='output folder of vitlinear train')
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='folder to write, named ARCHITECTURE.TAG')
    parser.add_argument('--best', action='store_true', help='take the best epoch, not the last: a biased choice')
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)
    report(export_run(
        args.run, args.folder, args.tag, args.best, args.ema, args.labels, read_facts(args.facts),
        not args.allow_non_finite))
