"""Speed, memory and operations of models side by side on this machine: `vitlinear bench MODEL ...`.

    vitlinear bench vvt_small convnext_tiny --sizes 224 1024 --dtypes fp32 bf16 --out latency.csv
    vitlinear bench vvt_small --optimize each
    vitlinear bench 'vvt_*' --mode train --batches 16 --dtypes bf16 --threads 2
    vitlinear bench --cores --tokens 49 784 16384 --mode infer train --out cores.csv
    vitlinear bench --layers qna unfold window --sizes 56 112 --kernels 3 7 11
    vitlinear bench --roofline --dtypes fp32 bf16 --out latency.csv
    vitlinear bench vvt_small convnext_tiny --sizes 1024 --dtypes bf16 --profile profile.csv
    vitlinear bench --plot latency.csv cores.csv --out plots

Each point has a process of its own. Those that differ in the model or its optimisation take turns, A B A B, as far as
they fit into memory together; times are medians of their passes. Nothing else should be running. peak_mib is the peak
memory of the whole process for models, and what a pass adds to it for cores and layers; on a GPU it is that of tensors,
and times are between events of the device. gmacs is of a forward pass for one image, attention products counted. What
--out holds already, from this machine and these versions, is not measured again.
"""
import argparse
import fnmatch
import math
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count, groupby, product
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import ParseKwargs
from tqdm import tqdm

import vitlinear

from ...inference.optimize import STEPS
from .. import _errors, _script
from .._errors import RunError, UsageError, run_script, suggest
from .._flags import Parser, positive_int
from . import plot, profile
from .report import report
from .rows import POINT, Row, Table, describe, load, read_rows
from .steps import ALL, CORES, DTYPES, HEAD_DIM, LAYERS
from .workers import Worker, measure

RUNTIMES = ('eager', 'compile', 'cudagraph', 'onnxruntime')
EACH = 'each'  # of --optimize
TOKENS = (49, 196, 784, 3136, 16384, 65536)
GEMM, COPY_MIB = 2048, 256  # sides of the matrices, and a size far beyond the caches


def seconds(text: str) -> float:
    with suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f'must be a number of seconds above 0, not {text!r}')


def build_parser() -> Parser:
    parser = Parser('bench', {}, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument_group('what').add_argument
    flag('models', nargs='*', metavar='MODEL', help="models of timm, ours among them, or patterns such as 'vvt_*'")
    flag('--also', nargs='+', default=[], metavar='PATH:MODULE:NAME',
         help='the function NAME, which makes a model, of the module MODULE in the folder PATH')
    flag('--cores', nargs='*', metavar='NAME',
         help=f'attention without its projections, all if not named: {", ".join(CORES)}')
    flag('--layers', nargs='+', default=[], metavar='NAME',
         help=f'layers that look at windows of a map, projections included: {", ".join(LAYERS)}')
    flag('--roofline', action='store_true', help='what the machine can multiply and copy at most')
    flag('--plot', nargs='+', metavar='FILE', help='draw what these files hold into the folder --out; no measurement')

    flag = parser.add_argument_group('points').add_argument
    flag('--sizes', nargs='+', type=positive_int, metavar='N',
         help="sides of the images (default: each model's own) or of the maps of layers (default: 56)")
    flag('--tokens', nargs='+', type=positive_int, default=TOKENS, metavar='N', help='tokens of the cores')
    flag('--dim', type=positive_int, default=128, metavar='N',
         help='channels of cores, in heads of 64, and layers, in heads of 8')
    flag('--kernels', nargs='+', type=positive_int, default=[3], metavar='N', help='sides of the windows of layers')
    flag('--batches', nargs='+', type=positive_int, default=[1], metavar='N', help='images in a pass')
    flag('--dtypes', nargs='+', default=['fp32'], choices=tuple(DTYPES), help='of inference; autocast in training')
    flag('--threads', nargs='+', type=positive_int, default=[os.cpu_count() or 1], metavar='N',
         help='threads of a pass')
    flag('--mode', nargs='+', default=['infer'], choices=('infer', 'train'),
         help='inference, and forward and backward passes as in training')
    flag('--runtimes', nargs='+', default=['eager'], choices=RUNTIMES,
         help='onnxruntime is for inference of models; cudagraph replays a pass on a GPU, its kernels without the host')
    flag('--channels-last', action='store_true', help='channels-last memory format')
    flag('--optimize', nargs='*', metavar='STEP',
         help='models after optimize_for_inference with these of its steps, all if not named; '
              f"'{EACH}': as they are, and with one step more at a time; the steps: {', '.join(STEPS)}")
    flag('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='arguments of all models')
    flag('--keep-memory', action='store_true', help='let the allocator of glibc keep what is freed')
    flag('--device', default='cpu', help='cpu, cuda, cuda:1, ...')

    flag = parser.add_argument_group('run').add_argument
    flag('--rounds', type=positive_int, default=11, metavar='N', help='timed passes of each point')
    flag('--warmup', type=positive_int, default=2, metavar='N', help='untimed passes before them')
    flag('--max-seconds', type=seconds, default=math.inf, metavar='S',
         help='no further timed pass of a point after so many seconds of them')
    flag('--timeout', type=seconds, default=3600., metavar='S', help='give a point up after so many seconds of work')
    flag('--one-at-a-time', action='store_true', help='do not interleave: only one process in memory')
    flag('--out', type=Path, metavar='FILE', help='.csv or .json file to add to')
    flag('--profile', type=Path, metavar='FILE',
         help='.csv file for what the operators of a further pass take, of each point that is measured')
    flag('--again', action='store_true', help='measure also what the file holds already')
    return parser


def machine(device: str) -> str:
    """The processor, and those of its abilities that decide about speed."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    info: dict[str, str] = {}
    with suppress(OSError), open('/proc/cpuinfo') as f:
        pairs = (line.split(':', 1) for line in f.read().split('\n\n')[0].splitlines() if ':' in line)
        info = {k.strip(): v.strip() for k, v in pairs}
    if 'model name' not in info:
        return platform.processor() or platform.machine()
    flags = [f for f in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if f in info.get('flags', '').split()]
    flags = flags[1:] if 'avx512f' in flags else flags
    return f"{info['model name']} family {info.get('cpu family')} model {info.get('model')} {' '.join(flags)}".strip()


def find_models(names: Sequence[str]) -> list[str]:
    """Names of models of timm, patterns replaced by what they match."""
    known, found = timm.list_models(), []
    for name in names:
        if any(c in name for c in '*?['):
            matches = fnmatch.filter(known, name)
            if not matches:
                raise UsageError(f'no model matches {name}{suggest(name.strip("*"), known)}')
            found += matches
        elif not timm.is_model(name.partition('.')[0]):
            raise UsageError(f'unknown model {name}{suggest(name, known)}')
        else:
            with _errors.usage_errors(f'model {name}'):
                timm.get_pretrained_cfg(name, allow_unregistered=False)
            found.append(name)
    return list(dict.fromkeys(found))


def check(args: argparse.Namespace) -> None:
    """Say what is wrong with the arguments before anything is measured."""
    optimize = args.optimize or []
    for flag, names, choices in (
            ('--cores', args.cores or [], CORES), ('--layers', args.layers, LAYERS),
            ('--optimize', optimize, (*STEPS, EACH))):
        for name in names:
            if name not in choices:
                raise UsageError(f'{flag} {name}: not one of {", ".join(choices)}')
    needs_onnx = 'onnxruntime' in args.runtimes
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if needs_onnx and find_spec(name) is None]
    for is_wrong, text in (
            (not (args.models or args.also or args.cores is not None or args.layers or args.roofline),
             'nothing to measure: give models, --also, --cores, --layers or --roofline; see --help'),
            (args.cores is not None and args.dim % HEAD_DIM, f'--dim {args.dim}: cores need a multiple of {HEAD_DIM}'),
            (args.layers and args.dim % 32, f'--dim {args.dim}: layers need a multiple of 32'),
            (args.layers and any(kernel % 2 == 0 for kernel in args.kernels),
             f'--kernels {" ".join(map(str, args.kernels))}: windows of layers have odd sides'),
            *((spec.count(':') != 2 or not os.path.isdir(spec.partition(':')[0]),
               f'--also {spec}: must be PATH:MODULE:NAME, PATH a folder') for spec in args.also),
            (args.also and not args.sizes, '--also needs --sizes'),
            (EACH in optimize and len(optimize) > 1, f"--optimize {' '.join(optimize)}: '{EACH}' goes with no other"),
            (args.optimize is not None and args.mode != ['infer'],
             '--optimize: an optimised model cannot be trained, give --mode infer'),
            (missing, f'--runtimes onnxruntime: {", ".join(missing)} not found, pip install vitlinear[export]'),
            (needs_onnx and ('infer' not in args.mode or args.device != 'cpu'),
             '--runtimes onnxruntime: for --mode infer and --device cpu only'),
            ('cudagraph' in args.runtimes and not args.device.startswith('cuda'),
             f'--runtimes cudagraph: not on --device {args.device}'),
            (args.out and (args.out.suffix not in ('.csv', '.json') or args.out.is_dir()),
             f'--out {args.out}: must be a file that ends in .csv or .json'),
            (args.profile and (args.profile.suffix != '.csv' or args.profile.is_dir()),
             f'--profile {args.profile}: must be a file that ends in .csv')):
        if is_wrong:
            raise UsageError(text)
    _script.check_device(args.device)
    if args.profile and args.profile.exists():
        load(args.profile, profile.FIELDS, 'profiles')


def optimizations(given: Sequence[str] | None) -> list[str]:
    """What --optimize asks for, each as a row tells it: names of steps, `ALL`, or nothing."""
    if given == [EACH]:
        return ['', *('+'.join(STEPS[:n]) for n in range(1, len(STEPS))), ALL]
    return [''] if given is None else ['+'.join(given) or ALL]


def plan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All points in the order of measurement, peers in a row, as orders of `child.serve`."""
    place = dict(
        cpu=machine(args.device), torch=torch.__version__, timm=timm.__version__, vitlinear=vitlinear.__version__)
    models: list[tuple[str, str | None]] = [(name, None) for name in find_models(args.models)]
    models += [(spec.split(':', 1)[1], spec) for spec in args.also]
    orders: list[dict[str, Any]] = []

    def add(kind: str, model: str, kwargs: dict[str, Any], also: str | None = None, **point: Any) -> None:
        onnx = point.get('runtime') == 'onnxruntime'
        last = kind == 'model' and args.channels_last and not onnx
        row = dict(
            kind=kind, model=model, kwargs=' '.join(f'{k}={v}' for k, v in kwargs.items()),
            **{'mode': '', 'runtime': 'eager', 'optimized': '', 'kernel': None, 'batch': 1, **point},
            memory_format='channels_last' if last else 'contiguous',
            allocator='kept' if args.keep_memory else 'default', **place,
            onnxruntime=version('onnxruntime') if onnx else '')
        orders.append(dict(
            row=row, kwargs=kwargs, also=also, warmup=args.warmup, device=args.device, profile=bool(args.profile)))

    own_size = {name: timm.get_pretrained_cfg(name).input_size[-1] for name, also in models if not also}
    for threads in args.threads:
        if args.roofline:
            for dtype in args.dtypes:
                add('ceiling', 'gemm', {}, dtype=dtype, size=GEMM, threads=threads)
            add('ceiling', 'copy', {}, dtype='fp32', size=COPY_MIB, threads=threads)
        for size, batch, dtype, mode, runtime in product(
                args.sizes or sorted(set(own_size.values())), args.batches, args.dtypes, args.mode, args.runtimes):
            for (name, also), optimized in product(models, optimizations(args.optimize)):
                if (mode, runtime) != ('train', 'onnxruntime') and (args.sizes or own_size[name] == size):
                    add('model', name, args.model_kwargs, also, mode=mode, dtype=dtype, size=size, batch=batch,
                        threads=threads, runtime=runtime, optimized=optimized)
        runtimes = [runtime for runtime in args.runtimes if runtime != 'onnxruntime']
        for mode, batch, dtype, runtime in product(args.mode, args.batches, args.dtypes, runtimes):
            point = dict(mode=mode, batch=batch, dtype=dtype, threads=threads, runtime=runtime)
            for size, name in product(args.tokens, [] if args.cores is None else args.cores or CORES):
                add('core', name, dict(dim=args.dim), size=size, **point)
            for size, kernel, name in product(args.sizes or [56], args.kernels, args.layers):
                add('layer', name, dict(dim=args.dim), size=size, kernel=kernel, **point)
    return orders


def run(args: argparse.Namespace) -> None:
    """Measure what is not known yet, and print it all."""
    check(args)
    orders, table = plan(args), Table(args.out)
    known = {id(o) for o in orders if not args.again and (table.get(o['row']) or {}).get('status') == 'ok'}
    left = [o for o in orders if id(o) not in known]
    if known:
        print(f'{len(known)} of {len(orders)} points are in {args.out} already', file=sys.stderr, flush=True)
    bar = tqdm(
        total=len(left) * (args.rounds + 1), unit='pass', dynamic_ncols=True, disable=not sys.stderr.isatty())
    failures = 0

    def emit(row: Row) -> None:
        nonlocal failures
        failures += row['status'] != 'ok'
        operators = row.pop('operators', None)
        table.add(row)
        with bar.external_write_mode(file=sys.stdout):
            print(describe(row), flush=True)
            if operators:
                profile.add(args.profile, row, operators)
                print(profile.describe(row, operators), flush=True)

    def condition(order: dict[str, Any]) -> tuple[Any, ...]:
        own = ('model', 'size', 'dtype') if order['row']['kind'] == 'ceiling' else ()
        return tuple(order['row'][f] for f in POINT if f not in ('model', 'kwargs', 'optimized') or f in own)

    with bar, tempfile.TemporaryDirectory(prefix='vitlinear-bench-') as folder:
        numbers = count()

        def start(order: dict[str, Any]) -> Worker:
            bar.set_description(f'{order["row"]["model"]} {order["row"]["dtype"]} {order["row"]["size"]}')
            return Worker(dict(order, folder=folder), args.timeout, Path(folder) / f'{next(numbers)}.log')

        for _, peers in groupby(left, key=condition):
            measure(peers, start, args.rounds, args.max_seconds, args.one_at_a_time, emit, bar.update)
    rows = [row for order in orders if (row := table.get(order['row']))]
    for line in report(rows, table.rows.values()):
        print(line, flush=True)
    if failures:
        raise RunError(f'{failures} of {len(left)} points failed')


def draw(args: argparse.Namespace) -> None:
    """The plots of some files."""
    if not args.out or args.out.is_file() or args.out.suffix in ('.csv', '.json'):
        raise UsageError('--plot: give a folder for the plots with --out')
    rows = [row for name in args.plot for row in read_rows(Path(name))]
    try:
        files = plot.plot(rows, args.out)
    except (ImportError, ValueError, OSError) as e:
        raise UsageError(f'--plot: {e}') from e
    for path in files:
        print(path)


def bench(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    (draw if args.plot else run)(args)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script('bench', lambda: bench(argv))
