#!/usr/bin/env python3
"""8-bit inference on CPUs by two libraries: onnxruntime, as `vitlinear quantize` calls it, and torchao.

    pip install '.[export]' torchao
    .venv/bin/python scripts/compare_int8.py vvt_nano.fashion_mnist --data-dir data --out results/int8.csv
    .venv/bin/python scripts/compare_int8.py vvt_small xvit_pyramid_small --out results/int8.csv

Of a model with a dataset: top-1 on its test images, after onnxruntime has taken ranges from 512 training images. Of
others the time alone, on random images of their own size. Of all: milliseconds for one image, median of passes that
take turns. torchao holds the weights of linear layers in 8 bits and scales activations as they come, its best form
for a CPU; compiled, as it is meant to be, and not where that fails. Adds to the rows of --out.
"""
import argparse
import csv
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, resolve_data_config
from torch import nn
from tqdm import tqdm

import vitlinear  # noqa: F401  registers the models
from vitlinear.tools.bench.command import machine
from vitlinear.tools.quantize import OnnxModel, calibration_batches, export_onnx, quantize_onnx, time_passes
from vitlinear.zoo.records import csv_text, write_text

FIELDS = ('model', 'size', 'runtime', 'top1', 'images', 'ms', 'threads', 'cpu', 'torch', 'note')


def torchao_int8(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    model = deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def top1(run: Callable[[torch.Tensor], torch.Tensor], batches: list[torch.Tensor], targets: torch.Tensor) -> str:
    with torch.inference_mode():
        found = torch.cat([run(batch).argmax(1) for batch in tqdm(batches, leave=False)])
    return f'{100 * (found == targets).double().mean().item():.2f}'


def compare(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained='.' in name).eval().requires_grad_(False)
    config = resolve_data_config({}, model=model)
    shape = config['input_size']
    batches, targets, known = [], None, [torch.rand(8, *shape)]
    if args.data_dir:
        test, train = (create_dataset(args.dataset, args.data_dir, split=split, input_img_mode='L')
                       for split in ('validation', 'train'))
        targets = torch.tensor([test[i][1] for i in range(len(test))])
        batches = calibration_batches(test, config, len(test), 100, 0)
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
        targets = targets[order]  # as calibration_batches takes them
        known = calibration_batches(train, config, 512, 100, 42)
    image, notes = known[0][:1], {}
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / 'float32.onnx', Path(folder) / 'int8.onnx'
        export_onnx(deepcopy(model), shape, before)
        quantize_onnx(before, after, known)
        eager = torchao_int8(model)
        runs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            'torch float32': model, 'onnxruntime float32': OnnxModel(before, args.threads),
            'onnxruntime int8': OnnxModel(after, args.threads), 'torchao int8': eager}
        for key, module in (('torch float32, compiled', model), ('torchao int8, compiled', eager)):
            try:
                torch._dynamo.reset()
                compiled = torch.compile(module, dynamic=False)
                with torch.inference_mode():
                    compiled(image)
                runs[key] = compiled
            except Exception as e:
                notes[key] = f'{type(e).__name__} when compiled'
        ms = time_passes({key: lambda run=run: run(image) for key, run in runs.items()}, args.rounds)
        accuracy = {key: top1(run, batches, targets) for key, run in runs.items()
                    if batches and 'compiled' not in key}
    rows = [dict(runtime=key, top1=accuracy.get(key, ''), ms=f'{ms[key]:.3f}', note='') for key in runs]
    rows += [dict(runtime=key, top1='', ms='', note=note) for key, note in notes.items()]
    common = dict(model=name, size=shape[-1], images=len(targets) if batches else '', threads=args.threads,
                  cpu=machine('cpu'), torch=torch.__version__)
    return [{**common, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', metavar='MODEL')
    parser.add_argument('--dataset', default='torch/fashion_mnist', metavar='NAME')
    parser.add_argument('--data-dir', metavar='DIR', help='folder of the dataset; without it times alone')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), metavar='N')
    parser.add_argument('--rounds', type=int, default=30, metavar='N', help='timed passes of each')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help='.csv file to add to')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models:
        kept: list[dict[str, Any]] = []
        if args.out.is_file():
            with args.out.open(newline='') as f:
                kept = [row for row in csv.DictReader(f) if row['model'] != name]
        rows = compare(name, args)
        for row in rows:
            print(f"{name} {row['runtime']}: {row['top1'] or '-'} %, {row['ms'] or '-'} ms {row['note']}", flush=True)
        write_text(args.out, csv_text(FIELDS, kept + rows))


if __name__ == '__main__':
    main()
