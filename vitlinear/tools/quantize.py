"""Write a model as ONNX in 8-bit integers: `vitlinear quantize --model NAME --data-dir DIR --output FILE.onnx`.

    vitlinear quantize --model vvt_nano.fashion_mnist --dataset torch/fashion_mnist --data-dir data --output vvt.onnx

The arithmetic is onnxruntime's static quantisation: unsigned activations with ranges from images of the training
split, signed weights with a scale for each output channel. What stays in floating point follows from the graph, see
`nodes_to_quantize`. Accuracy and speed before and after are printed and written to FILE.json.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform
from torch import nn

import vitlinear

from . import _datasets, _errors, _flags, _script
from ._errors import UsageError, usage_errors
from ._flags import positive_int
from ._script import Progress

INPUT = 'images'
PRODUCTS = ('Conv', 'Gemm', 'MatMul')


def build_parser() -> _flags.Parser:
    parser = _flags.Parser('quantize', {}, description='Write a model as ONNX in 8-bit integers.')
    flag = parser.add_argument_group('data').add_argument
    _flags.add_data_flags(flag)
    flag('--split', default='validation', metavar='NAME', help='split to measure on')
    flag('--calibration-split', default='train', metavar='NAME', help='split that the ranges come from')
    flag('--calibration-images', type=positive_int, default=512, metavar='N', help='images of it, at random')

    flag = parser.add_argument_group('model').add_argument
    flag('-m', '--model', required=True, metavar='NAME', help='arch, arch.tag, hf-hub:org/name or local-dir:path')
    flag('--checkpoint', default='', metavar='FILE', help='use the weights in this file, not the published ones')
    flag('--use-ema', action='store_true', help='use the moving average of the weights in it, if there is one')
    _flags.add_input_flags(flag)
    flag('--crop-mode', metavar='MODE', help='squash, border or center')
    flag('--output', required=True, type=Path, metavar='FILE', help='the model to write; ends in .onnx')
    flag('--reduce-range', action='store_true', help='weights of 7 bits, for x86 processors without VNNI')

    flag = parser.add_argument_group('run').add_argument
    _flags.add_loader_flags(flag)
    flag('-b', '--batch-size', type=positive_int, default=100, metavar='N', help='images per step')
    flag('--threads', type=positive_int, default=torch.get_num_threads(), metavar='N', help='threads')
    flag('--rounds', type=positive_int, default=20, metavar='N', help='timed passes of one image')
    flag('--seed', type=_flags.natural_int, default=42, metavar='N', help='seed')
    flag('--log-freq', type=positive_int, default=10, metavar='N', help='batches between two lines of progress')
    parser.set_defaults(device='cpu', amp=False)
    return parser


class OnnxModel(nn.Module):
    """A file for onnxruntime, called like a module on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(None, {INPUT: x.numpy()})[0])


def export_onnx(model: nn.Module, input_size: Sequence[int], path: Path) -> None:
    """Write a model for any number of images of one size.

    Args:
        model: In evaluation mode; nothing of it will need a gradient afterwards.
        input_size: Channels, height and width.
        path: File to write.
    """
    model.requires_grad_(False)
    images = torch.zeros(2, *input_size)
    with torch.no_grad():
        model(images)  # tables that depend on the size of the image are made and kept here, to be constants there
        program = torch.onnx.export(
            model, (images,), dynamo=True, input_names=[INPUT], output_names=['logits'], verbose=False,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    program.save(str(path))


def nodes_to_quantize(graph: Any) -> list[str]:
    """Names of the nodes of an ONNX graph that are evaluated in integers.

    These are products with constant matrices and convolutions over all channels: where the arithmetic is. Float stay

    * grouped convolutions, that is depthwise ones. Among them are learned-query attention's sums over windows, whose
      quotients cannot bear one step for the whole tensor: with them, qna_vit_nano.fashion_mnist falls to 40.0 % of the
      first 1000 test images, without them it has 94.2, in float32 94.4;
    * products of two activations, attention's sums over tokens and their normalisers. Their range grows with the image;
      vvt_nano.fashion_mnist bears them (94.6 %, in float32 and without them 94.2);
    * norms, activations, softmax and all else, for which onnxruntime would go back to float anyhow.

    Args:
        graph: An onnx.GraphProto with named nodes.
    """
    constant = {tensor.name for tensor in graph.initializer}

    def grouped(node: Any) -> bool:
        return any(a.name == 'group' and a.i > 1 for a in node.attribute)

    return [node.name for node in graph.node
            if node.op_type in PRODUCTS and sum(name in constant for name in node.input[:2]) == 1
            and not grouped(node)]


def quantize_onnx(source: Path, path: Path, images: Sequence[torch.Tensor], reduce_range: bool = False) -> Counter:
    """Quantise an ONNX file by onnxruntime.

    Args:
        source: File in float32.
        path: File to write.
        images: Batches of images (B, C, H, W) that the ranges of activations are taken from.
        reduce_range: Weights of 7 bits, for processors whose 8-bit products saturate (x86 without VNNI).

    Returns:
        Number of quantised nodes by operation.

    Raises:
        ValueError: There is nothing to quantise.
    """
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        batches = iter(images)

        def get_next(self) -> Mapping[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    folded = path.with_name(f'{path.stem}.folded.onnx')
    quantization.quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
    graph = onnx.load(folded).graph
    names = nodes_to_quantize(graph)
    if not names:
        raise ValueError('no product with a constant matrix and no convolution over all channels to quantise')
    quantization.quantize_static(
        str(folded), str(path), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=list(PRODUCTS), nodes_to_quantize=names, reduce_range=reduce_range)
    return Counter(node.op_type for node in graph.node if node.name in set(names))


def time_passes(models: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turns, after two passes that do not count."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(rounds + 2):
            for name, model in models.items():
                start = time.perf_counter()
                model()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(ms[2:]) for name, ms in times.items()}


def calibration_batches(
        dataset: torch.utils.data.Dataset,
        config: Mapping[str, Any],
        images: int,
        batch_size: int,
        seed: int,
) -> list[torch.Tensor]:
    """Images of a dataset, taken at random and prepared as for evaluation."""
    dataset.transform = create_transform(**config, is_training=False)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:images].tolist()
    return [torch.stack([dataset[i][0] for i in order[at:at + batch_size]])
            for at in range(0, len(order), batch_size)]


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    """Quantise one model.

    Returns:
        What is written to the file beside it.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise UsageError(f"quantize needs {e.name or 'onnx and onnxruntime'}: pip install 'vitlinear[export]'") from e
    if args.channels_last or args.torchcompile:
        raise UsageError(f'--{"channels-last" if args.channels_last else "torchcompile"} has no meaning for ONNX')
    if args.output.suffix != '.onnx':
        raise UsageError(f'--output {args.output} must end in .onnx')
    if not args.output.parent.is_dir():
        raise UsageError(f'--output {args.output}: there is no folder {args.output.parent}')
    torch.set_num_threads(args.threads)
    model = _script.create_evaluated_model(args).eval()
    device, autocast = torch.device('cpu'), _script.autocast_for(args, torch.device('cpu'))
    config = _script.data_config_for(model, args, use_test_size=True)
    channels = config['input_size'][0]
    dataset = _datasets.open_dataset(args, args.split, channels)
    _datasets.check_classes(dataset, args.split, args.num_classes or model.num_classes)
    known = _datasets.open_dataset(args, args.calibration_split, channels)
    _script.put_on_device(model, args, config['input_size'], device, autocast)
    loader = _datasets.evaluation_loader(dataset, config, args, device)
    batches = calibration_batches(known, config, args.calibration_images, args.batch_size, args.seed)

    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=f'.{args.output.name}.') as folder:
        before, after = Path(folder) / 'float32.onnx', Path(folder) / 'int8.onnx'
        print(f'exporting {args.model}', file=sys.stderr, flush=True)
        with usage_errors(f'export of {args.model} to ONNX'):
            export_onnx(model, config['input_size'], before)
        print('calibrating', file=sys.stderr, flush=True)
        with usage_errors(f'quantisation of {args.model}'):
            quantized = quantize_onnx(before, after, batches, args.reduce_range)
        runs = {'float32': OnnxModel(before, args.threads), 'int8': OnnxModel(after, args.threads)}
        accuracy = {
            name: _script.evaluate(
                run, loader, args, device, autocast, Progress(f'{args.model} {name}', len(loader), args.log_freq))
            for name, run in runs.items()}
        _datasets.check_readable(dataset)
        image, half = batches[0][:1], deepcopy(model).to(torch.bfloat16)
        ms = time_passes({
            'torch float32': lambda: model(image), 'torch bfloat16': lambda: half(image.to(torch.bfloat16)),
            **{f'onnxruntime {name}': lambda run=run: run(image) for name, run in runs.items()}}, args.rounds)
        results = dict(
            model=args.model,
            checkpoint=args.checkpoint,
            dataset=args.dataset or args.data_dir,
            split=args.split,
            images=len(dataset) - _datasets.left_out(dataset),
            calibration_split=args.calibration_split,
            calibration_images=sum(len(batch) for batch in batches),
            seed=args.seed,
            input_size=list(config['input_size']),
            quantized=dict(sorted(quantized.items())),
            accuracy={name: {k: round(v, 4) for k, v in metrics.items()} for name, metrics in accuracy.items()},
            ms_per_image={name: round(value, 3) for name, value in ms.items()},
            bytes={'float32': before.stat().st_size, 'int8': after.stat().st_size},
            threads=args.threads,
            versions={module.__name__: module.__version__ for module in (torch, timm, vitlinear, onnxruntime)},
        )
        text = Path(folder) / 'results.json'
        text.write_text(json.dumps(results, indent=4) + '\n')
        with usage_errors(f'--output {args.output}'):
            os.replace(text, args.output.with_suffix('.json'))
            os.replace(after, args.output)
    report(results)
    return results


def report(results: Mapping[str, Any]) -> None:
    for name, value in results['ms_per_image'].items():
        print(f'{name:<20} {value:8.2f} ms for one image, {results["threads"]} threads')
    size, accuracy = results['bytes'], results['accuracy']
    top1 = ', '.join(f'{name} {metrics["top1"]:.2f} %' for name, metrics in accuracy.items())
    print(f'{size["float32"] / 1e6:.2f} MB in float32, {size["int8"] / 1e6:.2f} MB in int8')
    print(f'top-1 of {results["images"]} images: {top1}', flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    return _errors.run_script('quantize', lambda: quantize(build_parser().parse(argv)))


if __name__ == '__main__':
    sys.exit(main())
