#!/usr/bin/env python3
"""Do walks of several steps help gkvit_nano? A controlled study on Fashion-MNIST.

    .venv/bin/python scripts/fashion_mnist data
    .venv/bin/python scripts/walk_study.py --data-dir data
    .venv/bin/python scripts/walk_study.py --data-dir data --settings walk beta0 --seeds 42 43 --epochs 4 -- -b 128

Each setting is trained once with each seed by `vitlinear train`, by the recipe of gkvit_nano_fashion_mnist.yaml but
for the number of epochs and what follows `--`. Settings differ in the arguments of the attention alone, which draw no
random numbers: with one seed all start from the same projections, and see the same images in the same order.

    setting     what an attention layer does
    walk        the default: softmax features of temperature 4, beta learned from 0.107
    walk045     the same, beta learned from 0.45
    beta0       the same, beta = 0: one step
    t1, t8      temperature 1 or 8, beta learned from 0.107
    t1_beta0, t8_beta0
    elu         features elu + 1, beta learned from 0.107
    elu_beta0
    spectral    signed weights, beta learned from 0.107
    spectral_beta0

A run appends a row to --out: top-1 of the last epoch (of the moving average, percent), its training loss, the mean of
the learned betas in each stage, the seconds it took. A row that is there is not run again, and a run that was
interrupted is continued. At the end: mean and standard deviation over the seeds of each setting.
"""
import argparse
import csv
import hashlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
CONFIG = 'gkvit_nano_fashion_mnist'
STAGES = 4
FIELDS = ['setting', 'seed', 'epochs', 'options', 'top1', 'train_loss', *(f'beta_{i + 1}' for i in range(STAGES)),
          'seconds']
SETTINGS = {
    'walk': dict(),
    'walk045': dict(init_beta=.45),
    'beta0': dict(init_beta=0.),
    't1': dict(init_temperature=1.),
    't1_beta0': dict(init_temperature=1., init_beta=0.),
    't8': dict(init_temperature=8.),
    't8_beta0': dict(init_temperature=8., init_beta=0.),
    'elu': dict(features='elu'),
    'elu_beta0': dict(features='elu', init_beta=0.),
    'spectral': dict(mode='spectral'),
    'spectral_beta0': dict(mode='spectral', init_beta=0.),
}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True, help='folder of Fashion-MNIST')
    parser.add_argument('--settings', nargs='+', default=list(SETTINGS), choices=list(SETTINGS), metavar='NAME')
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44], metavar='N')
    parser.add_argument('--epochs', type=int, default=8, metavar='N')
    parser.add_argument('--processes', type=int, default=1, metavar='N', help='of each run, started by torchrun')
    parser.add_argument('--output', type=Path, default=ROOT / 'output' / 'walk_study', metavar='DIR', help='of runs')
    parser.add_argument('--out', type=Path, default=ROOT / 'results' / 'walk_study.csv', metavar='FILE')
    parser.add_argument('options', nargs='*', metavar='OPTION', help='of `vitlinear train`, after --')
    return parser.parse_args(argv)


def read_rows(path: Path) -> List[Dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def write_rows(path: Path, rows: Sequence[Dict[str, str]]) -> None:
    """All rows at once, so that the file is whole whenever this is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    with open(part, 'w', newline='') as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def key_of(row: Dict[str, str]) -> tuple:
    return row['setting'], row['seed'], row['epochs'], row['options']


def launch(argv: Sequence[str], processes: int) -> None:
    torchrun = ['-m', 'torch.distributed.run', f'--nproc-per-node={processes}'] if processes > 1 else []
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
    subprocess.run([sys.executable, *torchrun, '-m', 'vitlinear.train', *argv], env=env, check=True)


def learned_betas(checkpoint: Path) -> List[str]:
    """Mean of beta in each stage, empty where it is not learned."""
    from timm.utils import load_checkpoint_metadata

    from vitlinear.attention.random_walk import MAX_BETA
    state = load_checkpoint_metadata(str(checkpoint))['state_dict']
    betas = []
    for i in range(STAGES):
        thetas = [v for k, v in state.items() if k.startswith(f'stages.{i}.') and k.endswith('.attn.theta')]
        mean = sum(v.sigmoid().sum().item() for v in thetas) / max(1, sum(v.numel() for v in thetas))
        betas.append(f'{MAX_BETA * mean:.4f}' if thetas else '')
    return betas


def train(row: Dict[str, str], args: argparse.Namespace) -> Dict[str, str]:
    """One run, or what is left of it, and its row."""
    name = f"{row['setting']}_{row['epochs']}epochs_seed{row['seed']}"
    if row['options']:
        name += '_' + hashlib.sha256(row['options'].encode()).hexdigest()[:8]
    folder = args.output / name
    last, clock = folder / 'last.pth.tar', folder / 'seconds.txt'
    if len(read_rows(folder / 'summary.csv')) < args.epochs:
        argv = [
            '--config', str(ROOT / 'configs' / f'{CONFIG}.yaml'), '--data-dir', args.data_dir, '--output',
            str(args.output), '--experiment', name, '--epochs', row['epochs'], '--seed', row['seed'],
            '--model-kwargs', f"attn_kwargs={SETTINGS[row['setting']]}".replace(' ', ''), *args.options]
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
        **{f'beta_{i + 1}': beta for i, beta in enumerate(learned_betas(last))},
        'seconds': f'{float(clock.read_text()):.0f}',
    }


def summarise(rows: Sequence[Dict[str, str]]) -> str:
    lines = [f"{'setting':16}{'seeds':>6}{'top-1 %':>16}{'train loss':>18}   beta by stage"]
    for setting in SETTINGS:
        own = [row for row in rows if row['setting'] == setting]
        if not own:
            continue

        def spread(field: str, digits: int, own: Sequence[Dict[str, str]] = own) -> str:
            values = [float(row[field]) for row in own]
            deviation = f'{statistics.stdev(values):.{digits}f}' if len(values) > 1 else '-'
            return f'{statistics.mean(values):.{digits}f} +- {deviation}'

        betas = [[float(row[f'beta_{i + 1}']) for row in own if row[f'beta_{i + 1}']] for i in range(STAGES)]
        lines.append(
            f"{setting:16}{len(own):>6}{spread('top1', 2):>16}{spread('train_loss', 4):>18}   "
            + (' '.join(f'{statistics.mean(b):.3f}' for b in betas) if all(betas) else '0'))
    return '\n'.join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    options = ' '.join([*([f'processes={args.processes}'] if args.processes > 1 else []), *args.options])
    wanted = [
        dict(setting=setting, seed=str(seed), epochs=str(args.epochs), options=options)
        for seed in args.seeds for setting in args.settings]  # a seed of all settings first: each is of use by itself
    for row in wanted:
        if key_of(row) in map(key_of, read_rows(args.out)):
            continue
        print(f"{row['setting']}, seed {row['seed']}", flush=True)
        try:
            row = train(row, args)
        except subprocess.CalledProcessError as e:
            print(f"{row['setting']}, seed {row['seed']}: training failed, see above", file=sys.stderr)
            return e.returncode
        write_rows(args.out, [*read_rows(args.out), row])
    keys = set(map(key_of, wanted))
    print(summarise([row for row in read_rows(args.out) if key_of(row) in keys]))
    return 0


if __name__ == '__main__':
    sys.exit(main())
