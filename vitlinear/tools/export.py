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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models import save_for_hf
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn

import vitlinear

from ..models._castling import SCHEDULE_ARGUMENTS
from ..models._timm import read_weights
from ..zoo.hub import sha256
from ..zoo.records import RECORD_NAME, WEIGHTS_NAME, Cfg, Dataset, Record, record_from_dict, write_record
from . import _script
from ._folders import check_target, count_macs, folder_problems, new_folder
from ._script import UsageError, usage_errors
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
_LABELS = {'torch/fashion_mnist': 'FashionMNIST', 'torch/mnist': 'MNIST', 'torch/kmnist': 'KMNIST'}


def labels_of(dataset: str) -> list[str] | None:
    """Names of the classes of those datasets whose names torchvision knows without the data."""
    if dataset.lower() not in _LABELS:
        return None
    from torchvision import datasets
    return [str(name) for name in getattr(datasets, _LABELS[dataset.lower()]).classes]


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
    with usage_errors(f'--facts {path}'):
        facts = yaml.safe_load(path.read_text(encoding='utf-8'))
    if not isinstance(facts, dict):
        raise UsageError(f'--facts {path}: must hold fields of {RECORD_NAME}')
    return facts


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
) -> Record:
    """Write a model as a folder that timm and transformers load, with its record and card, whole or not at all.

    Args:
        model: Model with the weights.
        folder: Folder to write. One that holds a checkpoint already is replaced; its other files are kept.
        tag: Tag of the weights.
        cfg: Input and classes.
        facts: Fields of the record beside those that follow from the model.
        files: Further files for the folder.
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
        problems = folder_problems(new)
        if problems:
            raise UsageError(f'{folder} was not written: {"; ".join(problems)}')
    return record_from_dict(data, folder)


def _slim_config(path: Path, architecture: str) -> dict[str, Any]:
    """Leave out of config.json what is told twice; returns the arguments that remain."""
    config = json.loads(path.read_text(encoding='utf-8'))
    arguments = config.pop('model_args', {})
    default = timm.create_model(architecture, device='meta')
    arguments.pop('num_classes', None)  # transformers passes it on its own, and fails when it meets it twice
    if arguments.get('in_chans') == default.in_chans:  # of another number transformers learns from here alone
        arguments.pop('in_chans')
    if arguments.get('global_pool') == getattr(default, 'global_pool', None):
        arguments.pop('global_pool', None)
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
        config[name] = tuple(config[name]) * (channels if len(config[name]) == 1 else 1)
        if len(config[name]) != channels:
            raise UsageError(
                f'--{name} is needed: {len(config[name])} numbers are known, the model takes {channels} channels')
    return Cfg(
        num_classes=model.num_classes,
        input_size=tuple(config['input_size']),
        pool_size=tuple(-(-n // reduction) for n in config['input_size'][1:]),
        crop_pct=float(config['crop_pct']),
        interpolation=config['interpolation'],
        mean=tuple(float(x) for x in config['mean']),
        std=tuple(float(x) for x in config['std']),
        label_names=tuple(labels) if labels else None,
        crop_mode=config.get('crop_mode') or 'center',
    )


def run_model(args: argparse.Namespace, state_dict: dict[str, torch.Tensor], path: Path) -> nn.Module:
    """The model of a training run, with these weights, as it is after the training."""
    kwargs = {k: v for k, v in args.model_kwargs.items() if k not in SCHEDULE_ARGUMENTS}
    model = _script.create_model(argparse.Namespace(**{**vars(args), 'model_kwargs': kwargs}))
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as e:
        raise UsageError(f'{path} does not fit {args.model}: {str(e).splitlines()[-1].strip()}') from e
    return model


def _metric(run: dict[str, Any], summary: Path, epoch: int) -> list[dict[str, Any]]:
    """The accuracy that the run itself measured for the weights after an epoch, which it saved in `summary`."""
    if not summary.is_file():
        return []
    with summary.open(newline='') as f:
        rows = [row for row in csv.DictReader(f) if row.get('epoch') == str(epoch) and row.get('eval_top1')]
    dataset = DATASETS.get(run['dataset'].lower())
    return [dict(
        name='top-1',
        unit='%',
        value=float(rows[-1]['eval_top1']),
        split=run['val_split'],
        images=dataset and dataset.test_images,
        dtype=f'{run["amp_dtype"]} autocast' if run['amp'] else 'float32',
        seed=run['seed'],
        command=None,
    )] if rows else []


def export_run(
        run: Path,
        folder: Path,
        tag: str | None = None,
        best: bool = False,
        use_ema: bool | None = None,
        labels: Sequence[str] | None = None,
        facts: dict[str, Any] | None = None,
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
    """
    for name in ('args.yaml', 'model_best.pth.tar' if best else 'last.pth.tar'):
        if not (run / name).is_file():
            raise UsageError(f'{run} is no folder of a training run: it has no {name}')
    path = run / ('model_best.pth.tar' if best else 'last.pth.tar')
    with usage_errors(f'{run / "args.yaml"}'):
        settings = yaml.safe_load((run / 'args.yaml').read_text())
        args = argparse.Namespace(**settings)
    with usage_errors(f'{path}'):
        meta = load_checkpoint_metadata(str(path))
        has_ema, epoch = meta.get('state_dict_ema') is not None, int(meta['epoch'])
        del meta
        state_dict = read_weights(path, use_ema=use_ema is not False)
    if use_ema and not has_ema:
        raise UsageError(f'--ema: {path} holds no moving average')
    ema = has_ema and use_ema is not False
    model = run_model(args, state_dict, path)
    architecture = model.pretrained_cfg['architecture']
    check_ours(model)
    tag = split_name(folder, architecture, tag)
    # the run evaluates its moving average where it has one, unless that is kept on the CPU
    evaluated = ema == (has_ema and not settings.get('model_ema_force_cpu'))
    dataset = DATASETS.get(settings['dataset'].lower())
    found = dict(
        dataset=asdict(dataset) if dataset else dict(id=None, name=settings['dataset'] or 'a folder of images'),
        metrics=_metric(settings, run / 'summary.csv', epoch) if evaluated else [],
        training=dict(
            epochs=epoch + 1,
            seeds=[settings['seed']],
            weights=('moving average after ' if ema else 'weights after ') + (
                f'the best epoch, {epoch}, chosen by {settings["eval_metric"]} on the evaluation data' if best
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
    cfg = data_cfg(model, args, labels or labels_of(settings['dataset']))
    return export_model(model, folder, tag, cfg, merged(found, facts or {}), files)


def check_ours(model: nn.Module) -> None:
    if not type(model).__module__.startswith('vitlinear.'):
        raise UsageError(
            f"{model.pretrained_cfg['architecture']} is a model of timm's own: timm.models.save_for_hf exports it")


def add_flags(flag: Any) -> None:
    """The flags that export and convert share."""
    flag('--tag', metavar='TAG', help='tag of the weights (default: from the name of the folder, ARCHITECTURE.TAG)')
    flag('--ema', action=argparse.BooleanOptionalAction, help='take the moving average (default: if there is one)')
    flag('--labels', nargs='+', metavar='NAME', help='names of the classes, in order')
    flag('--facts', type=Path, metavar='FILE', help=f'YAML file with further fields of {RECORD_NAME}')


def report(record: Record) -> None:
    print(
        f'{record.folder}: {record.name}, {record.parameters / 1e6:.2f} M parameters, {record.cfg.num_classes} '
        f'classes, sha256 {record.sha256}')


def _main(argv: Sequence[str] | None) -> None:
    parser = _script.Parser('export', {}, description='Write a training run as a folder for the Hub.')
    parser.add_argument('run', type=Path, metavar='RUN_DIR', help='output folder of vitlinear train')
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='folder to write, named ARCHITECTURE.TAG')
    parser.add_argument('--best', action='store_true', help='take the best epoch, not the last: a biased choice')
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)
    report(export_run(args.run, args.folder, args.tag, args.best, args.ema, args.labels, read_facts(args.facts)))


def main(argv: Sequence[str] | None = None) -> int:
    return _script.run_script('export', lambda: _main(argv))
