"""What is timed: one pass of a model, an attention core, a layer, or of what the machine can do at most.

Everything here takes the order of a point, see `child.serve`.
"""
import importlib
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from ... import ops
from ...inference.onednn import linear_gelu
from ...inference.optimize import optimize_for_inference
from ...layers import QnAAttention, WindowAttention
from ...ops import reference
from ...ops.local import local_attention
from ...ops.primitives.windows import shifted_windows
from ...ops.qna import unit_query
from ..export import count_macs

Order = dict[str, Any]
Step = Callable[[], Any]

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
HEAD_DIM = 64  # of the cores
KERNEL_SIZE, NUM_QUERIES = 3, 2  # of learned queries as a core
ALL = 'all'  # steps of optimize_for_inference


# models

def build_model(order: Order) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model and the shape of its images."""
    size, kwargs = order['row']['size'], dict(order['kwargs'])
    if order['also']:
        path, module, function = order['also'].split(':')
        sys.path.insert(0, path)
        return getattr(importlib.import_module(module), function)(**kwargs), (kwargs.get('in_chans', 3), size, size)
    name = order['row']['model']
    cfg = timm.get_pretrained_cfg(name)
    if cfg.fixed_input_size:
        kwargs.setdefault('img_size', size)
    return timm.create_model(name, **kwargs), (kwargs.get('in_chans', cfg.input_size[0]), size, size)


# attention cores, without their projections

class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of a map of so many positions, as near to a square as they allow."""
    rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    return rows, tokens // rows


# each: (heads, dtype) to a function of queries, keys and values (B, heads, tokens, HEAD_DIM)

def _linear_angular(heads: int, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    weight = torch.ones(heads, 1, 9, 1, dtype=dtype)
    return lambda q, k, v: ops.linear_angular_attention(q, k, v, local_attention(v, weight))


def _random_walk(heads: int, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    beta = torch.full((heads,), .5)
    return lambda q, k, v: ops.random_walk_attention(q, k, v, beta)


_ON_TOKENS = {
    'softmax': lambda heads, dtype: ops.softmax_attention,
    'linear': lambda heads, dtype: ops.linear_attention,
    'linear_angular': _linear_angular,
    'xnorm': lambda heads, dtype: ops.xnorm_attention,
    'random_walk': _random_walk,
}
CORES = (*_ON_TOKENS, 'vicinity', 'qna')


def build_core(name: str, tokens: int, heads: int, dtype: torch.dtype) -> tuple[nn.Module, tuple[int, ...]]:
    """An attention core, and the shape of its input: what a projection leaves of a token, side by side in memory."""
    if name == 'vicinity':
        shape = (*grid(tokens), 3, heads, HEAD_DIM)
        return Function(lambda x: ops.vicinity_attention(*x.permute(3, 0, 4, 1, 2, 5).unbind(0))), shape
    if name == 'qna':
        bias, scale = torch.zeros(2, NUM_QUERIES * heads, 1, KERNEL_SIZE, KERNEL_SIZE, dtype=dtype).unbind(0)
        shape = (*grid(tokens), HEAD_DIM + NUM_QUERIES, heads)
        return Function(lambda x: ops.qna_attention(
            x[:, :, :, HEAD_DIM:], x[:, :, :, :HEAD_DIM], bias, scale + 1)), shape
    core = _ON_TOKENS[name](heads, dtype)
    return Function(lambda x: core(*x.permute(2, 0, 3, 1, 4).unbind(0))), (tokens, 3, heads, HEAD_DIM)


# layers that look at k x k windows of a (B, H, W, dim) map, projections included

class Windows(QnAAttention):
    """Learned queries whose windows another function sums."""

    def __init__(self, function: Callable[..., torch.Tensor], dim: int, kernel: int) -> None:
        super().__init__(dim, dim // 8, kernel_size=kernel)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.v(x).unflatten(3, (self.num_heads, self.head_dim)).transpose(3, 4)
        score = self.k(x, unit_query(self.query, self.num_heads, self.normalize_query))
        y = self.function(score, v, self.rel_pos_bias, self.attn_scale, self.stride)
        return self.proj(y.transpose(3, 4).flatten(3))


def _between(dim: int, hidden: int, *layers: nn.Module) -> nn.Module:
    """Layers between two projections."""
    return nn.Sequential(nn.Linear(dim, hidden, bias=False), *layers, nn.Linear(dim, dim, bias=False))


LAYERS = {
    'qna': lambda dim, kernel: QnAAttention(dim, dim // 8, kernel_size=kernel),
    'shift': lambda dim, kernel: Windows(shifted_windows, dim, kernel),  # tap by tap
    'unfold': lambda dim, kernel: Windows(reference.qna_attention, dim, kernel),  # as it is commonly written
    'window': lambda dim, kernel: WindowAttention(dim, dim // 32, window_size=kernel),
    'dwconv': lambda dim, kernel: _between(
        dim, dim, Function(lambda x: x.permute(0, 3, 1, 2)),
        nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False),
        Function(lambda x: x.permute(0, 2, 3, 1))),
    # the matrix products of learned queries alone
    'products': lambda dim, kernel: _between(dim, dim + dim // 4, Function(lambda x: x[..., :dim])),
}


def build(order: Order, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, tuple[int, ...]]:
    """What is to be timed as a module, and the shape of its input without the batch.

    Args:
        order: The point.
        device: Where.
        dtype: Of the constants that a core takes beside its input.
    """
    row = order['row']
    with torch.device(device):
        if row['kind'] == 'model':
            return build_model(order)
        dim = order['kwargs']['dim']
        if row['kind'] == 'core':
            return build_core(row['model'], row['size'], dim // HEAD_DIM, dtype)
        return LAYERS[row['model']](dim, row['kernel']), (row['size'], row['size'], dim)


# a pass

def make_step(order: Order) -> Step:
    """The function that runs one pass, which on a GPU is queued."""
    torch.manual_seed(0)
    row = order['row']
    torch.set_num_threads(row['threads'])
    if row['kind'] == 'ceiling':
        step = _ceiling(order)
    elif row['runtime'] == 'onnxruntime':
        step = _onnxruntime_step(order)
    else:
        step = _torch_step(order)
    return _replayed(step) if row['runtime'] == 'cudagraph' else step


def _replayed(step: Step) -> Step:
    """A pass as a CUDA graph: its kernels without the host's part."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # whatever is compiled, chosen or kept at first
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds_of(step: Step, repeats: int, device: str) -> float:
    """Mean time of a pass: between events of a GPU, on the clock elsewhere."""
    if torch.device(device).type == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - begin) / repeats


def _optimize(model: nn.Module, order: Order, sample: torch.Tensor) -> nn.Module:
    done = order['row']['optimized']
    if not done:
        return model
    return optimize_for_inference(model, None if done == ALL else done.split('+'), sample=sample, inplace=True)


def _torch_step(order: Order) -> Step:
    row, device = order['row'], torch.device(order['device'])
    dtype, train, is_model = DTYPES[row['dtype']], row['mode'] == 'train', row['kind'] == 'model'
    # weights and input: a training step leaves them to autocast, but cores have no weights
    held = torch.float32 if train and row['kind'] != 'core' else dtype
    module, shape = build(order, device, held)
    module = module.train(train).to(held)
    x = torch.rand(row['batch'], *shape, device=device).to(held)  # vicinity attention takes no negative queries
    if row['memory_format'] == 'channels_last':
        module, x = module.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    module = _optimize(module, order, x)
    if row['runtime'] == 'compile':
        module = torch.compile(module)

    if not train:
        def infer() -> None:
            with torch.inference_mode():
                module(x)
        return infer

    x.requires_grad_(not is_model)
    target = torch.zeros(row['batch'], dtype=torch.long, device=device)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=held != dtype):
            out = module(x)
            return F.cross_entropy(out.float(), target) if is_model else out

    grad = None if is_model else torch.rand_like(forward().detach())

    def train_step() -> None:
        module.zero_grad()
        x.grad = None
        forward().backward(grad)
    return train_step


def export_onnx(order: Order, path: str) -> None:
    """Write a model for onnxruntime, for images of one size in batches of one size."""
    row = order['row']
    dtype = DTYPES[row['dtype']]
    model, shape = build(order, torch.device('cpu'), dtype)
    model = model.eval().to(dtype).requires_grad_(False)
    x = torch.rand(row['batch'], *shape).to(dtype)
    model = _optimize(model, order, x)
    with torch.no_grad():
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)


def _onnxruntime_step(order: Order) -> Step:
    import numpy
    import onnxruntime
    row, path = order['row'], os.path.join(order['folder'], f'{os.getpid()}.onnx')
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:  # whose memory is not to count
        pool.submit(export_onnx, order, path).result()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = row['threads'], 1
    options.add_session_config_entry('session.force_spinning_stop', '1')  # the next process has its turn then
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    feed = session.get_inputs()[0]
    x = {feed.name: numpy.random.default_rng(0).random(feed.shape).astype(
        {'tensor(float)': numpy.float32, 'tensor(float16)': numpy.float16}[feed.type])}
    return lambda: session.run(None, x)


def _ceiling(order: Order) -> Step:
    row, device = order['row'], torch.device(order['device'])
    if row['model'] == 'copy':
        source = torch.ones(row['size'] * 2 ** 18, device=device)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)
    a, b = torch.rand(2, row['size'], row['size'], device=device).to(DTYPES[row['dtype']]).unbind(0)
    out = torch.empty_like(a)
    ways: list[Step] = [lambda: torch.mm(a, b, out=out), lambda: torch.mm(a, b.t(), out=out)]
    if device.type == 'cpu':
        ways.append(lambda: linear_gelu(a, b))  # oneDNN's, where torch.mm calls another library
    seconds = []
    with torch.inference_mode():
        for way in ways:
            way()
            seconds.append(seconds_of(way, 1, order['device']))
    return ways[seconds.index(min(seconds))]


# facts

def gpu_peak(order: Order) -> float | None:
    """Peak memory of tensors on a GPU in MiB, None for a CPU."""
    return torch.cuda.max_memory_allocated() / 2 ** 20 if torch.device(order['device']).type == 'cuda' else None


def count(order: Order) -> dict[str, float | None]:
    """Millions of parameters, and billions of multiply-accumulates of a forward pass for one image.

    Attention products are counted; those of the model as it is by default, optimised or not. None for what cannot be
    run on the device 'meta'.
    """
    row = order['row']
    if row['kind'] == 'ceiling':
        return dict(gmacs=row['size'] ** 3 / 1e9 if row['model'] == 'gemm' else None)
    try:
        module, shape = build(order, torch.device('meta'), torch.float32)
        macs = count_macs(module.requires_grad_(False), shape)
    except Exception:  # no reason to lose the measurement
        return dict(params_m=None, gmacs=None)
    return dict(params_m=sum(p.numel() for p in module.parameters()) / 1e6, gmacs=macs / 1e9)
