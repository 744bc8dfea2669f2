#!/usr/bin/env python3
"""Controlled studies on Fashion-MNIST: the same training with one thing changed, with several seeds.

    .venv/bin/python scripts/fashion_mnist data
    .venv/bin/python scripts/study.py castling --data-dir data
    .venv/bin/python scripts/study.py walk --data-dir data --settings walk beta0 --seeds 42 43 --epochs 4 -- -b 128

Each setting is trained once with each seed by `vitlinear train`, by a recipe of configs/ but for what the setting
changes, the number of epochs and what follows `--`. A setting draws no random numbers of its own: with one seed all
of one architecture start from the same weights, and all see the same images in the same order.

castling: does the auxiliary branch help castling_nano? The recipe is castling_nano_fashion_mnist.yaml.

    castling    with the branch, as the recipe ramps it
    plain       without

walk: do walks of several steps help gkvit_nano, and under which construction? The recipe is
gkvit_nano_fashion_mnist.yaml.

    walk        walks between softmax features of temperature 4, beta learned from 0.107
    walk045     the same, beta learned from 0.45
    beta0       the same, beta = 0: one step
    t1, t8      temperature 1 or 8, beta learned from 0.107
    spectral    the default: signed weights, beta learned from 0.107
    spectral_beta0
    shallow     one block in each stage, beta learned from 0.45: do more steps stand in for more layers?
    shallow_beta0

A run appends a row to --out: top-1 of the last epoch (of the moving average, percent, in the precision of the
training), its training loss, the seconds it took, and what belongs to the study. Of walks that is the mean of the
learned betas in each stage. Of castling, measured in float32 on the test images: top-1 while the branch is computed
with its last thresholds, top-1 after `switch_to_inference`, and the largest difference of a logit between these. A row
that is there is not run again, and a run that was interrupted is continued. At the end: mean and standard deviation
over the seeds of each setting.
"""
import argparse
import csv
import hashlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import resolve_data_config
from timm.utils import load_checkpoint_metadata

from vitlinear.layers.random_walk import MAX_BETA
from vitlinear.tools import _datasets, _script
from vitlinear.zoo.records import csv_text, write_text

ROOT = Path(__file__).resolve().parent.parent
STAGES = 4
FIELDS = ['setting', 'seed', 'epochs', 'options', 'top1', 'train_loss', 'seconds']


def learned_betas(folder: Path, data_dir: str) -> dict[str, str]:
    """Mean of beta in each stage, empty where it is not learned."""
    state = load_checkpoint_metadata(str(folder / 'last.pth.tar'))['state_dict']
    betas = {}
    for i in range(STAGES):
        thetas = [v for k, v in state.items() if k.startswith(f'stages.{i}.') and k.endswith('.attn.theta')]
        mean = sum(v.sigmoid().sum().item() for v in thetas) / max(1, sum(v.numel() for v in thetas))
        betas[f'beta_{i + 1}'] = f'{MAX_BETA * mean:.4f}' if thetas else ''
    return betas


def switch(folder: Path, data_dir: str) -> dict[str, str]:
    """Accuracy before and after the switch to inference."""
    args = argparse.Namespace(**{'max_unreadable': 0., **yaml.safe_load((folder / 'args.yaml').read_text())})
    args.data_dir, args.batch_size, args.workers, args.no_prefetcher = data_dir, 500, 0, True
    # the end of the ramp, which is not in the state dict: thresholds of 1
    args.model_kwargs = dict(attn_kwargs=dict(aux_mode='always', aux_threshold=1.))
    model = _script.create_model(args).eval()
    _script.load_weights(model, str(folder / 'last.pth.tar'))
    config = resolve_data_config(vars(args), model=model)
    dataset = _datasets.open_dataset(args, 'validation', config['input_size'][0])
    loader = _datasets.evaluation_loader(dataset, config, args, torch.device('cpu'))
    images, targets = (torch.cat(parts) for parts in zip(*loader))

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([model(x) for x in images.split(500)])

    before = logits()
    model.switch_to_inference()
    after = logits()
    branch, switched = (100 * (out.argmax(1) == targets).double().mean().item() for out in (before, after))
    return dict(
        branch_top1=f'{branch:.2f}', switched_top1=f'{switched:.2f}',
        logit_difference=f'{(before - after).abs().max().item():.3g}')


@dataclass(frozen=True)
class Study:
    """A recipe, keys that each setting changes in it (None takes a key out), and what is measured after a run."""
    recipe: str
    settings: dict[str, dict[str, Any]]
    fields: Sequence[str]
    measure: Callable[[Path, str], dict[str, str]]


def attention(mode: str, depth: int | None = None, **kwargs: Any) -> dict[str, Any]:
    depths = {} if depth is None else dict(depths=[depth] * STAGES)
    return dict(model_kwargs=dict(attn_kwargs=dict(mode=mode, **kwargs), **depths))


STUDIES = {
    'castling': Study(
        recipe='castling_nano_fashion_mnist',
        settings=dict(castling={}, plain=dict(castling_ramp=None)),
        fields=('branch_top1', 'switched_top1', 'logit_difference'),
        measure=switch,
    ),
    'walk': Study(
        recipe='gkvit_nano_fashion_mnist',
        settings=dict(
            walk=attention('walk'),
            walk045=attention('walk', init_beta=.45),
            beta0=attention('walk', init_beta=0.),
            t1=attention('walk', init_temperature=1.),
            t8=attention('walk', init_temperature=8.),
            spectral=attention('spectral'),
            spectral_beta0=attention('spectral', init_beta=0.),
            shallow=attention('walk', depth=1, init_beta=.45),
            shallow_beta0=attention('walk', depth=1, init_beta=0.),
        ),
        fields=tuple(f'beta_{i + 1}' for i in range(STAGES)),
        measure=learned_betas,
    ),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s [-h] STUDY --data-dir DIR [options] [-- options of `vitlinear train`]')
    parser.add_argument('study', choices=list(STUDIES), metavar='STUDY', help=' or '.join(STUDIES))
    parser.add_argument('--data-dir', required=True, help='folder of Fashion-MNIST')
    parser.add_argument('--settings', nargs='+', metavar='NAME', help='all of the study')
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44], metavar='N')
    parser.add_argument('--epochs', type=int, metavar='N', help="the recipe's")
    parser.add_argument('--processes', type=int, default=1, metavar='N', help='of each run, started by torchrun')
    parser.add_argument('--output', type=Path, metavar='DIR', help='of runs: output/STUDY_study')
    parser.add_argument('--out', type=Path, metavar='FILE', help='results/STUDY_study.csv')
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index('--') if '--' in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.options = argv[split + 1:]
    settings = STUDIES[args.study].settings
    for name in args.settings or ():
        if name not in settings:
            parser.error(f'--settings: unknown {name}, choose from {", ".join(settings)}')
    args.settings = args.settings or list(settings)
    args.output = args.output or ROOT / 'output' / f'{args.study}_study'
    args.out = args.out or ROOT / 'results' / f'{args.study}_study.csv'
    return args


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def write(path: Path, text: str) -> None:
    """All at once, so that the file is whole whenever this is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def key_of(row: dict[str, str]) -> tuple:
    return row['setting'], row['seed'], row['epochs'], row['options']


def launch(argv: Sequence[str], processes: int) -> None:
    torchrun = ['-m', 'torch.distributed.run', f'--nproc-per-node={processes}'] if processes > 1 else []
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
    subprocess.run([sys.executable, *torchrun, '-m', 'vitlinear.tools.train', *argv], env=env, check=True)


def train(row: dict[str, str], recipe: dict[str, Any], args: argparse.Namespace) -> dict[str, str]:
    """One run, or what is left of it, and its row."""
    study = STUDIES[args.study]
    name = f"{row['setting']}_{row['epochs']}epochs_seed{row['seed']}"
    if row['options']:
        name += '_' + hashlib.sha256(row['options'].encode()).hexdigest()[:8]
    folder = args.output / name
    last, clock = folder / 'last.pth.tar', folder / 'seconds.txt'
    if len(read_rows(folder / 'summary.csv')) < int(row['epochs']):
        config = {k: v for k, v in {**recipe, **study.settings[row['setting']]}.items() if v is not None}
        write(args.output / f'{name}.yaml', yaml.safe_dump(config, sort_keys=False))
        argv = [
            '--config', str(args.output / f'{name}.yaml'), '--data-dir', args.data_dir, '--output', str(args.output),
            '--experiment', name, '--epochs', row['epochs'], '--seed', row['seed'], *args.options]
        before = float(clock.read_text()) if last.is_file() and clock.is_file() else 0.
        start = time.monotonic()
        try:
            launch(argv + (['--resume', str(last)] if last.is_file() else []), args.processes)
        finally:
            if folder.is_dir():
                clock.write_text(f'{before + time.monotonic() - start:.1f}')
    final = read_rows(folder / 'summary.csv')[-1]
    return {
        **row,
        'top1': f"{float(final['eval_top1']):.2f}",
        'train_loss': f"{float(final['train_loss']):.4f}",
        'seconds': f'{float(clock.read_text()):.0f}',
        **study.measure(folder, args.data_dir),
    }


def spread(rows: Sequence[dict[str, str]], field: str) -> str:
    """Mean and standard deviation, with a digit more than the values have."""
    texts = [row[field] for row in rows if row[field]]
    if not texts:
        return '-'
    digits = max(len(text.partition('.')[2]) for text in texts)
    values = [float(text) for text in texts]
    deviation = f' +- {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{deviation}'


def summarise(rows: Sequence[dict[str, str]], study: Study) -> str:
    fields = ['top1', 'train_loss', *study.fields]
    table = [['setting', 'seeds', *fields]]
    for setting in study.settings:
        own = [row for row in rows if row['setting'] == setting]
        if own:
            table.append([setting, str(len(own)), *(spread(own, field) for field in fields)])
    widths = [max(map(len, column)) for column in zip(*table)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    study = STUDIES[args.study]
    recipe = yaml.safe_load((ROOT / 'configs' / f'{study.recipe}.yaml').read_text())
    epochs = args.epochs or recipe['epochs']
    options = ' '.join([*([f'processes={args.processes}'] if args.processes > 1 else []), *args.options])
    wanted = [
        dict(setting=setting, seed=str(seed), epochs=str(epochs), options=options)
        for seed in args.seeds for setting in args.settings]  # a seed of all settings first: each is of use by itself
    for row in wanted:
        if key_of(row) in map(key_of, read_rows(args.out)):
            continue
        print(f"{row['setting']}, seed {row['seed']}", flush=True)
        try:
            row = train(row, recipe, args)
        except subprocess.CalledProcessError as e:
            print(f"{row['setting']}, seed {row['seed']}: training failed, see above", file=sys.stderr)
            return e.returncode
        write(args.out, csv_text([*FIELDS, *study.fields], [*read_rows(args.out), row]))
    keys = set(map(key_of, wanted))
    print(summarise([row for row in read_rows(args.out) if key_of(row) in keys], study))
    return 0


if __name__ == '__main__':
    sys.exit(main())
