"""What is timed: one pass of a model, an attention core, a layer, or of what the machine can do at most.

Everything here takes the order of a point, see `child.serve`.
"""
import importlib
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Callable, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from torch import nn

import vitlinear  # noqa: F401  registers the models
from vitlinear import ops as attention
from vitlinear.layers import QnAAttention, WindowAttention
from vitlinear.ops import reference
from vitlinear.ops._common import linear
from vitlinear.tools.export import count_macs

Order = Dict[str, Any]
Step = Callable[[], Any]

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
HEAD_DIM = 64  # of the cores
KERNEL_SIZE, NUM_QUERIES = 3, 2  # of learned queries as a core
ALL = 'all'  # steps of optimize_for_inference


# models

def build_model(order: Order) -> Tuple[nn.Module, Tuple[int, int, int]]:
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


def grid(tokens: int) -> Tuple[int, int]:
    """Rows and columns of a map of so many positions, as near to a square as they allow."""
    rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    return rows, tokens // rows


def _on_tokens(core: Callable[..., torch.Tensor]) -> Callable[..., Tuple[nn.Module, Tuple[int, ...]]]:
    """Queries, keys and values (N, 3, heads, d), of a token side by side in memory as a projection leaves them."""
    def make(tokens: int, heads: int, dtype: torch.dtype) -> Tuple[nn.Module, Tuple[int, ...]]:
        weights = core(heads, dtype)
        return Function(lambda x: weights(*x.permute(2, 0, 3, 1, 4).unbind(0))), (tokens, 3, heads, HEAD_DIM)
    return make


def _vicinity(tokens: int, heads: int, dtype: torch.dtype) -> Tuple[nn.Module, Tuple[int, ...]]:
    return (Function(lambda x: attention.vicinity_attention(*x.permute(3, 0, 4, 1, 2, 5).unbind(0))),
            (*grid(tokens), 3, heads, HEAD_DIM))


def _qna(tokens: int, heads: int, dtype: torch.dtype) -> Tuple[nn.Module, Tuple[int, ...]]:
    bias, scale = torch.zeros(2, NUM_QUERIES * heads, 1, KERNEL_SIZE, KERNEL_SIZE, dtype=dtype).unbind(0)
    return (Function(lambda x: attention.qna_attention(x[:, :, :, HEAD_DIM:], x[:, :, :, :HEAD_DIM], bias, scale + 1)),
            (*grid(tokens), HEAD_DIM + NUM_QUERIES, heads))


def _linear_angular(heads: int, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    weight = torch.ones(heads, 1, 9, 1, dtype=dtype)
    return lambda q, k, v: attention.linear_angular_attention(q, k, v, weight)


def _random_walk(heads: int, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    beta = torch.full((heads,), .5)
    return lambda q, k, v: attention.random_walk_attention(q, k, v, beta, mode='spectral', features='signed')


CORES = {
    'softmax': _on_tokens(lambda heads, dtype: F.scaled_dot_product_attention),
    'linear': _on_tokens(lambda heads, dtype: attention.linear_attention),
    'linear_angular': _on_tokens(_linear_angular),
    'xnorm': _on_tokens(lambda heads, dtype: attention.xnorm_attention),
    'random_walk': _on_tokens(_random_walk),
    'vicinity': _vicinity,
    'qna': _qna,
}


# layers that look at k x k windows of a (B, H, W, dim) map, projections included

class Unfold(QnAAttention):
    """Learned queries with the windows unfolded, as local attention is commonly written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, _, proj = self.fold(x.dtype)
        joint = F.linear(x, weight, bias).unflatten(3, (-1, self.num_heads))
        v, score = joint[:, :, :, :self.head_dim], joint[:, :, :, -self.num_queries:]
        x = reference.qna_attention(score, v, self.rel_pos_bias, self.attn_scale, self.stride)
        return F.linear(x.flatten(3), proj)


class Depthwise(nn.Module):
    """Depthwise convolution between two projections."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.v, self.proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.conv(self.v(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Products(nn.Module):
    """The matrix products of learned queries alone."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.v, self.proj = nn.Linear(dim, dim + dim // 4, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.v(x)[..., :self.proj.in_features])


LAYERS = {
    'qna': lambda dim, kernel: QnAAttention(dim, dim // 8, kernel_size=kernel),
    'shift': lambda dim, kernel: QnAAttention(dim, dim // 8, kernel_size=kernel, impl='shift'),
    'unfold': lambda dim, kernel: Unfold(dim, dim // 8, kernel_size=kernel),
    'window': lambda dim, kernel: WindowAttention(dim, dim // 32, window_size=kernel),
    'dwconv': Depthwise,
    'products': lambda dim, kernel: Products(dim),
}


def build(order: Order, device: torch.device, dtype: torch.dtype) -> Tuple[nn.Module, Tuple[int, ...]]:
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
            return CORES[row['model']](row['size'], dim // HEAD_DIM, dtype)
        return LAYERS[row['model']](dim, row['kernel']), (row['size'], row['size'], dim)


# a pass

def make_step(order: Order) -> Step:
    """The function that runs one pass."""
    torch.manual_seed(0)
    row = order['row']
    torch.set_num_threads(row['threads'])
    if row['kind'] == 'ceiling':
        step = _ceiling(order)
    elif row['runtime'] == 'onnxruntime':
        step = _onnxruntime_step(order)
    else:
        step = _torch_step(order)
    if torch.device(order['device']).type != 'cuda':
        return step

    def synchronised() -> None:
        step()
        torch.cuda.synchronize()
    return synchronised


def _optimize(model: nn.Module, order: Order, sample: torch.Tensor) -> nn.Module:
    done = order['row']['optimized']
    if not done:
        return model
    from vitlinear.optimize import optimize_for_inference
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
    ways: List[Step] = [lambda: torch.mm(a, b, out=out), lambda: torch.mm(a, b.t(), out=out)]
    if device.type == 'cpu':
        ways.append(lambda: linear(a, b))  # oneDNN's, where torch.mm calls another library
    seconds = []
    with torch.inference_mode():
        for way in ways:
            way()
            start = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - start)
    return ways[seconds.index(min(seconds))]


# facts

def gpu_peak(order: Order) -> Optional[float]:
    """Peak memory of tensors on a GPU in MiB, None for a CPU."""
    return torch.cuda.max_memory_allocated() / 2 ** 20 if torch.device(order['device']).type == 'cuda' else None


def count(order: Order) -> Dict[str, Optional[float]]:
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
