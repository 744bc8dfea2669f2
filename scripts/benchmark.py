#!/usr/bin/env python3
"""Speed and memory of models side by side, on this machine.

    .venv/bin/python scripts/benchmark.py latency vvt_small convnext_tiny --sizes 224 1024 --dtypes fp32 bf16
    .venv/bin/python scripts/benchmark.py scaling vvt_small --sizes 512 1024 2048 4096 --dtypes bf16
    .venv/bin/python scripts/benchmark.py layers qna unfold window dwconv --sizes 56 112 --kernels 3 7 11 --batches 4
    .venv/bin/python scripts/benchmark.py cores softmax linear_angular xnorm --sizes 49 196 784 3136 --dim 256

`latency` runs the models alternately in one process (A B A B ...) and reports the median and quartiles of each, so
that a noisy machine disturbs all alike. `scaling` runs one image of each size in a process of its own, and reports the
peak resident memory of that process and the exponents of time and memory against pixels. Nothing else should be
running. `layers` compares layers that look at k x k windows of a map, projections included: learned-query attention
('qna', see `make_layer` for the others), at --dim channels; peak_mib is what a pass adds to the memory of the process.
`cores` compares attention without its projections on (batch, dim / 64, size, 64) queries, keys and values, size being
the number of tokens, and tells from where on each is faster than the first, 'softmax' being PyTorch's fused kernel.
--keep-memory makes glibc's allocator keep freed memory instead of returning it to the kernel; --also PATH:MODULE:NAME
adds the model function NAME of a module in the folder PATH that timm does not know.
"""
import argparse
import ast
import csv
import gc
import importlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

KEEP_MEMORY = {
    'MALLOC_MMAP_THRESHOLD_': '4294967296', 'MALLOC_TRIM_THRESHOLD_': '8589934592', 'MALLOC_TOP_PAD_': '268435456'}
FIELDS = ['model', 'size', 'kernel', 'batch', 'dtype', 'mode', 'threads', 'allocator', 'median_ms', 'p25_ms', 'p75_ms',
          'rounds', 'ms_per_image', 'peak_mib', 'cpu', 'torch', 'timm', 'vitlinear']


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=sorted(COMMANDS), help=argparse.SUPPRESS)
    parser.add_argument('models', nargs='+')
    parser.add_argument('--sizes', type=int, nargs='+', default=[224])
    parser.add_argument('--batches', type=int, nargs='+', default=[1])
    parser.add_argument('--dtypes', nargs='+', default=['fp32'], choices=('fp32', 'bf16'))
    parser.add_argument('--kernels', type=int, nargs='+', default=[3], help='window sides, for `layers`')
    parser.add_argument('--dim', type=int, default=64, help='channels, for `layers` in heads of 8, for `cores` of 64')
    parser.add_argument('--train', action='store_true', help='time a training step (forward and backward) instead')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--rounds', type=int, default=11, help='timed passes of each model, after two untimed ones')
    parser.add_argument('--keep-memory', action='store_true')
    parser.add_argument('--model-kwargs', nargs='+', default=[], metavar='K=V', help='arguments of all models')
    parser.add_argument('--also', nargs='+', default=[], metavar='PATH:MODULE:NAME')
    parser.add_argument('--out', help='CSV file to append to')
    return parser.parse_args()


def facts(args: argparse.Namespace) -> dict:
    import timm
    import torch
    import vitlinear
    cpu = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            info = dict(line.split(':', 1) for line in f.read().split('\n\n')[0].splitlines() if ':' in line)
        info = {k.strip(): v.strip() for k, v in info.items()}
        flags = [f for f in ('avx512f', 'avx512_bf16', 'amx_bf16') if f in info.get('flags', '').split()]
        cpu = f"{info.get('model name')} family {info.get('cpu family')} model {info.get('model')} {' '.join(flags)}"
    return dict(
        threads=args.threads, allocator='kept' if args.keep_memory else 'default', cpu=cpu,
        mode='train' if args.train else 'infer', torch=torch.__version__, timm=timm.__version__,
        vitlinear=vitlinear.__version__)


def label(name: str, args: argparse.Namespace) -> str:
    return f"{':'.join(name.split(':')[-2:])}{' ' * bool(args.model_kwargs)}{' '.join(args.model_kwargs)}"


def make_step(name: str, size: int, batch: int, dtype: str, args: argparse.Namespace):
    """A function that runs one pass of a model."""
    import timm
    import torch
    import vitlinear  # noqa: F401
    if name.count(':') == 2:
        _, module, function = name.split(':')
        model = getattr(importlib.import_module(module), function)()
    else:
        fixed = timm.get_pretrained_cfg_value(name, 'fixed_input_size')
        kwargs = {k: ast.literal_eval(v) for k, _, v in (item.partition('=') for item in args.model_kwargs)}
        model = timm.create_model(name, **(dict(img_size=size) if fixed else {}), **kwargs)
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype]
    x = torch.randn(batch, 3, size, size)

    if args.train:
        model.train()
        target = torch.randint(0, 1000, (batch,))

        def step():
            with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
                loss = torch.nn.functional.cross_entropy(model(x).float(), target)
            model.zero_grad()
            loss.backward()
    else:
        model.eval().to(dtype)
        x = x.to(dtype)

        def step():
            with torch.inference_mode():
                model(x)
    return step


def make_layer(name: str, dim: int, kernel: int):
    """A layer that looks at kernel x kernel windows of a (B, H, W, dim) map."""
    import torch
    from torch import nn
    from vitlinear.attention import QnAAttention, WindowAttention, reference

    class Unfold(QnAAttention):
        """The same layer with its windows unfolded, as local attention is commonly written."""

        def forward(self, x):
            weight, bias, _, proj = self.fold(x.dtype)
            joint = nn.functional.linear(x, weight, bias).unflatten(3, (-1, self.num_heads))
            v, score = joint[:, :, :, :self.head_dim], joint[:, :, :, -self.num_queries:]
            x = reference.qna_attention(score, v, self.rel_pos_bias, self.attn_scale, self.stride)
            return nn.functional.linear(x.flatten(3), proj)

    class Depthwise(nn.Module):
        """Depthwise convolution between two projections."""

        def __init__(self):
            super().__init__()
            self.v, self.proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
            self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)

        def forward(self, x):
            return self.proj(self.conv(self.v(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    class Products(nn.Module):
        """The matrix products of 'qna' alone."""

        def __init__(self):
            super().__init__()
            self.v, self.proj = nn.Linear(dim, dim + dim // 4, bias=False), nn.Linear(dim, dim, bias=False)

        def forward(self, x):
            return self.proj(self.v(x)[..., :dim])

    torch.manual_seed(0)
    return {
        'qna': lambda: QnAAttention(dim, dim // 8, kernel_size=kernel),
        'shift': lambda: QnAAttention(dim, dim // 8, kernel_size=kernel, impl='shift'),
        'unfold': lambda: Unfold(dim, dim // 8, kernel_size=kernel),
        'window': lambda: WindowAttention(dim, dim // 32, window_size=kernel),
        'dwconv': Depthwise,
        'products': Products,
    }[name]()


def make_layer_step(name: str, size: int, kernel: int, batch: int, dtype: str, args: argparse.Namespace):
    """A function that runs one pass of a layer."""
    import torch
    layer = make_layer(name, args.dim, kernel)
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype]
    x = torch.randn(batch, size, size, args.dim)
    if args.train:
        layer.train()
        x.requires_grad_()

        def step():
            with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
                loss = layer(x).float().square().mean()
            layer.zero_grad()
            loss.backward()
    else:
        layer.eval().to(dtype)
        x = x.to(dtype)

        def step():
            with torch.inference_mode():
                layer(x)
    return step


def layer(args: argparse.Namespace) -> None:
    """One layer in this process: the memory that passes add to it."""
    step = make_layer_step(
        args.models[0], args.sizes[0], args.kernels[0], args.batches[0], args.dtypes[0], args)
    step()
    gc.collect()
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')  # the peak so far is forgotten
    before = resident('VmRSS')
    step()
    print((resident('VmHWM') - before) / 1024)


def resident(field: str) -> int:
    """Resident memory of this process in KiB, now (VmRSS) or at its peak (VmHWM)."""
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field))


def layers(args: argparse.Namespace) -> None:
    common = facts(args)
    for size in args.sizes:
        for kernel in args.kernels:
            for batch in args.batches:
                for dtype in args.dtypes:
                    steps = {n: make_layer_step(n, size, kernel, batch, dtype, args) for n in args.models}
                    times = interleave(steps, args.rounds)
                    for name, ms in times.items():
                        command = [sys.executable, __file__, 'layer', name, '--sizes', str(size), '--kernels',
                                   str(kernel), '--batches', str(batch), '--dtypes', dtype, '--dim', str(args.dim),
                                   '--threads', str(args.threads)] + ['--train'] * args.train
                        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                        low, median, high = quartiles(ms)
                        emit(dict(
                            common, model=f'{name} ({args.dim} channels)', size=size, kernel=kernel, batch=batch,
                            dtype=dtype, median_ms=median, p25_ms=low, p75_ms=high, rounds=len(ms),
                            ms_per_image=median / batch, peak_mib=float(run.stdout.splitlines()[-1])), args.out)


def make_core_step(name: str, tokens: int, batch: int, dtype: str, args: argparse.Namespace):
    """A function that runs one pass of attention without its projections."""
    import torch
    from vitlinear import attention
    heads = args.dim // 64
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype]
    weight = torch.randn(heads, 1, 9, 1).to(dtype)
    beta, temperature = torch.full((heads,), .5), torch.full((heads,), 4.)
    core = {
        'softmax': torch.nn.functional.scaled_dot_product_attention,
        'linear': attention.linear_attention,
        'linear_angular': lambda q, k, v: attention.linear_angular_attention(q, k, v, weight),
        'xnorm': attention.xnorm_attention,
        'random_walk': lambda q, k, v: attention.random_walk_attention(q, k, v, beta, temperature),
    }[name]
    # queries, keys and values of a token side by side in memory, as a projection leaves them
    qkv = torch.randn(batch, tokens, 3, heads, 64).to(dtype).permute(2, 0, 3, 1, 4)
    if args.train:
        qkv.requires_grad_()

        def step():
            qkv.grad = None
            core(*qkv.unbind(0)).sum().backward()
    else:
        def step():
            with torch.inference_mode():
                core(*qkv.unbind(0))
    return step


def crossover(ours: list, theirs: list) -> str:
    """From where on the times (tokens, ms) of the first stay below those of the second."""
    above = [i for i, (a, b) in enumerate(zip(ours, theirs)) if a[1] >= b[1]]
    if not above:
        return f'at all of these from {ours[0][0]} tokens on'
    i = above[-1]
    if i + 1 == len(ours):
        return 'at none of the largest of these'
    low, high = (math.log(ours[j][1] / theirs[j][1]) for j in (i, i + 1))
    tokens = ours[i][0] * (ours[i + 1][0] / ours[i][0]) ** (low / (low - high))
    return f'from about {float(f"{tokens:.2g}"):.0f} tokens on (between {ours[i][0]} and {ours[i + 1][0]})'


def cores(args: argparse.Namespace) -> None:
    common = facts(args)
    for batch in args.batches:
        for dtype in args.dtypes:
            measured = {name: [] for name in args.models}
            for size in args.sizes:
                steps = {name: make_core_step(name, size, batch, dtype, args) for name in args.models}
                for name, ms in interleave(steps, args.rounds).items():
                    low, median, high = quartiles(ms)
                    measured[name].append((size, median))
                    emit(dict(
                        common, model=f'{name} ({args.dim} channels)', size=size, batch=batch, dtype=dtype,
                        median_ms=median, p25_ms=low, p75_ms=high, rounds=len(ms), ms_per_image=median / batch,
                    ), args.out)
            for name in args.models[1:]:
                print(f'{name}, batch {batch}, {dtype}: faster than {args.models[0]} '
                      f'{crossover(measured[name], measured[args.models[0]])}', flush=True)


def interleave(steps: dict, rounds: int) -> dict:
    """Milliseconds of each step's passes, taken in turns, after two untimed ones."""
    times = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def quartiles(ms: list) -> list:
    return statistics.quantiles(ms, n=4) if len(ms) > 1 else ms * 3


def emit(row: dict, out: str) -> None:
    row = {k: f'{v:.2f}' if isinstance(v, float) else v for k, v in row.items()}
    print('  '.join(f'{k}={row[k]}' for k in FIELDS[:6] + FIELDS[8:11] + ['peak_mib'] if k in row), flush=True)
    if out:
        new = not os.path.exists(out)
        with open(out, 'a', newline='') as f:
            writer = csv.DictWriter(f, FIELDS, restval='')
            if new:
                writer.writeheader()
            writer.writerow(row)


def latency(args: argparse.Namespace) -> None:
    common = facts(args)
    for size in args.sizes:
        for batch in args.batches:
            for dtype in args.dtypes:
                steps = {name: make_step(name, size, batch, dtype, args) for name in args.models + args.also}
                for name, ms in interleave(steps, args.rounds).items():
                    low, median, high = quartiles(ms)
                    emit(dict(
                        common, model=label(name, args), size=size, batch=batch, dtype=dtype,
                        median_ms=median, p25_ms=low, p75_ms=high, rounds=len(ms), ms_per_image=median / batch,
                    ), args.out)


def point(args: argparse.Namespace) -> None:
    """One size in this process: the times, and the peak resident memory of the whole process."""
    step = make_step(args.models[0], args.sizes[0], args.batches[0], args.dtypes[0], args)
    ms = []
    for _ in range(args.rounds + 1):
        start = time.perf_counter()
        step()
        ms.append(1e3 * (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(dict(ms=ms[1:] or ms, peak_mib=peak)))


def scaling(args: argparse.Namespace) -> None:
    common = facts(args)
    for name in args.models:
        for dtype in args.dtypes:
            measured = []
            for size in args.sizes:
                rounds = max(1, args.rounds * 512 ** 2 // size ** 2)
                command = [sys.executable, __file__, 'point', name, '--sizes', str(size), '--dtypes', dtype, '--rounds',
                           str(rounds), '--threads', str(args.threads)] + ['--train'] * args.train
                command += ['--model-kwargs', *args.model_kwargs] * bool(args.model_kwargs)
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if run.returncode:
                    print(f'{name} {dtype} {size}: failed with exit code {run.returncode}', flush=True)
                    continue
                result = json.loads(run.stdout.splitlines()[-1])
                median = statistics.median(result['ms'])
                measured.append((size, median, result['peak_mib']))
                emit(dict(common, model=label(name, args), size=size, batch=1, dtype=dtype, median_ms=median,
                          p25_ms=min(result['ms']), p75_ms=max(result['ms']), rounds=len(result['ms']),
                          ms_per_image=median, peak_mib=result['peak_mib']), args.out)
            if len(measured) > 1:
                print(f'{name} {dtype}: exponent against pixels from {measured[0][0]} to {measured[-1][0]} px: '
                      f'time {exponent(measured, 1):.3f}, peak memory {exponent(measured, 2):.3f}', flush=True)


def exponent(measured, column: int) -> float:
    """Slope of the least-squares line through (log pixels, log value)."""
    xs, ys = [2 * math.log(m[0]) for m in measured], [math.log(m[column]) for m in measured]
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


COMMANDS = dict(latency=latency, scaling=scaling, layers=layers, cores=cores, point=point, layer=layer)


def main() -> None:
    args = parse_args()
    if args.keep_memory and any(os.environ.get(k) != v for k, v in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], dict(os.environ, **KEEP_MEMORY))
    import torch
    torch.set_num_threads(args.threads)
    for name in args.also:  # before vitlinear, whose models replace those they register under the same name
        path, module, _ = name.split(':')
        sys.path.insert(0, path)
        importlib.import_module(module)
    COMMANDS[args.what](args)


if __name__ == '__main__':
    main()
