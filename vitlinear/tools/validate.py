"""Measure a model on a validation set: `vitlinear validate --model NAME --data-dir DIR`.

    vitlinear validate --model vvt_nano --checkpoint runs/a/model_best.pth.tar --use-ema \\
        --dataset torch/fashion_mnist --data-dir data --in-chans 1 --num-classes 10 --device cpu

Flags and defaults are those of timm's validate.py, of which this is a subset. Input size, crop and normalisation come
with the model unless they are given. The last line of the output is the result.
"""
import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vitlinear  # noqa: F401  registers the models

from . import _datasets, _errors, _flags, _script
from ._errors import RunError, usage_errors
from ._flags import RUN_SETTINGS, positive_int
from ._script import Progress

# Destinations of the flags of timm's validate.py that are left out, with timm's defaults.
UNSUPPORTED = {
    'num_samples': None, 'dataset_trust_remote_code': False, 'use_train_size': False, 'crop_border_pixels': None,
    'num_gpu': 1, 'test_pool': False, 'model_dtype': None, 'tf_preprocessing': False, 'fuser': '', 'fast_norm': False,
    'reparam': False, 'torchcompile_mode': None, 'torchscript': False, 'aot_autograd': False, 'real_labels': '',
    'valid_labels': '', 'retry': False, 'metrics_avg': None, 'naflex_loader': False, 'naflex_max_seq_len': 576,
}


def build_parser() -> _flags.Parser:
    parser = _flags.Parser('validate', UNSUPPORTED, description='Measure a model on a validation set.')
    flag = parser.add_argument_group('data').add_argument
    _flags.add_data_flags(flag)
    parser.set_defaults(max_unreadable=0.)
    flag('--split', default='validation', metavar='NAME', help='split to measure on')

    flag = parser.add_argument_group('model').add_argument
    flag('-m', '--model', default='dpn92', metavar='NAME', help='arch, arch.tag, hf-hub:org/name or local-dir:path')
    flag('--pretrained', action='store_true', help='use the published weights (so without --checkpoint)')
    flag('--checkpoint', default='', metavar='FILE', help='use the weights in this file')
    flag('--use-ema', action='store_true', help='use the moving average of the weights in it, if there is one')
    _flags.add_input_flags(flag)
    flag('--crop-mode', metavar='MODE', help='squash, border or center')
    flag('-b', '--batch-size', type=positive_int, default=256, metavar='N', help='images per step')

    flag = parser.add_argument_group('device').add_argument
    _flags.add_device_flags(flag)

    flag = parser.add_argument_group('run').add_argument
    _flags.add_loader_flags(flag)
    flag('--seed', type=_flags.natural_int, default=42, metavar='N', help='seed')
    flag('--log-freq', type=positive_int, default=10, metavar='N', help='batches between two lines of progress')
    flag('--results-file', default='', metavar='FILE', help='write the result to this file too')
    flag('--results-format', default='csv', choices=('csv', 'json'), help='format of that file')
    return parser


def take_run_settings(args: argparse.Namespace) -> None:
    """Complete `args` with the args.yaml beside the checkpoint, if that is of a run of the same model."""
    path = Path(args.checkpoint).parent / 'args.yaml'
    if not args.checkpoint or not path.is_file():
        return
    run = _flags.read_yaml(path, 'settings')
    if str(run.get('model')).partition('.')[0] != args.model.partition('.')[0]:
        return
    names = [k for k in ('num_classes', *RUN_SETTINGS) if run.get(k) and not getattr(args, k)]
    found = build_parser().checked({k: run[k] for k in names}, path)
    if found:
        vars(args).update(found)
        told = ', '.join(f'{k} {v}' for k, v in found.items())
        print(f'from {path}: {told}', file=sys.stderr, flush=True)


def write_results(results: dict[str, Any], path: str, format: str) -> None:
    with usage_errors(f'--results-file {path}'), open(path, 'w', newline='') as f:
        if format == 'json':
            json.dump(results, f, indent=4)
        else:
            writer = csv.DictWriter(f, fieldnames=list(results))
            writer.writeheader()
            writer.writerow(results)


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate one model.

    Returns:
        The columns that timm's validate.py writes.
    """
    take_run_settings(args)
    _script.check_device(args.device)
    device = torch.device(args.device)
    autocast = _script.autocast_for(args, device)
    model = _script.create_evaluated_model(args, args.pretrained)
    params = sum(p.numel() for p in model.parameters())
    data_config = _script.data_config_for(model, args, use_test_size=True)
    dataset = _datasets.open_dataset(args, args.split, data_config['input_size'][0], whole_folder=True)
    _datasets.check_classes(dataset, args.split, args.num_classes or model.num_classes)
    loader = _datasets.evaluation_loader(dataset, data_config, args, device)
    _script.put_on_device(model, args, data_config['input_size'], device, autocast)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile)
    start = time.monotonic()
    progress = Progress(args.model, len(loader), args.log_freq)
    metrics = _script.evaluate(model, loader, args, device, autocast, progress)
    top1, top5 = metrics['top1'], metrics['top5']
    images = len(dataset) - _datasets.left_out(dataset)
    if not images:
        raise RunError(f'none of the {len(dataset)} images could be read')
    results = dict(
        model=args.model,
        top1=round(top1, 4),
        top1_err=round(100 - top1, 4),
        top5=round(top5, 4),
        top5_err=round(100 - top5, 4),
        param_count=round(params / 1e6, 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
    )
    if args.results_file:
        write_results(results, args.results_file, args.results_format)
    print(
        f'top-1 {top1:.2f} % (err {100 - top1:.2f} %), top-5 {top5:.2f} %, {images} images, '
        f'{images / (time.monotonic() - start):.0f} images/s', flush=True)
    _datasets.check_readable(dataset)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    return _errors.run_script('validate', lambda: validate(build_parser().parse(argv)))


if __name__ == '__main__':
    sys.exit(main())
