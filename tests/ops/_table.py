"""Every op with its reference and inputs: what the tests of this folder run over."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from _linear_angular import attention as linear_angular
from vitlinear import ops
from vitlinear.ops import reference

# Every implementation of any primitive; a new one is tested from the day that it is there.
IMPLEMENTATIONS = sorted({name for primitive in ops.PRIMITIVES.values() for name in primitive.implementations})

# Largest sides of the windows of window attention.
WINDOW = (3, 4)

# Rows and columns of maps: odd, thin, of one position, and large enough for sums through rows and columns.
GRIDS = [(3, 5), (1, 7), (1, 1), (16, 17)]


def is_interpreted(implementation: str, device: str = 'cpu') -> bool:
    """Whether kernels run in Triton's interpreter, a hundred times slower: tests take fewer and smaller inputs."""
    return implementation == 'triton' and device == 'cpu'


def sides(grid: tuple[int, int], implementation: str, device: str = 'cpu') -> tuple[int, int]:
    """A grid of GRIDS, or for the interpreter one of a few tiles in the place of the large one."""
    return (9, 8) if is_interpreted(implementation, device) and grid == GRIDS[-1] else grid


@dataclass
class Op:
    """An op, its reference, and how its inputs are made; both take the same tensors."""
    function: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    inputs: Callable[..., list[torch.Tensor]]


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)), dtype=dtype)


def _heads(H: int, W: int, d: int = 4, e: int = 3, seed: int = 0, batch: int = 2, heads: int = 2) -> list[torch.Tensor]:
    """Queries, keys and values (B, heads, N, d) as views of one projection, as layers have them."""
    qkv = randn(batch, H * W, heads, 2 * d + e, seed=seed).transpose(1, 2)
    return list(qkv.split([d, d, e], dim=3))


def _positive(H: int, W: int, **kwargs: int) -> list[torch.Tensor]:
    q, k, v = (x.unflatten(2, (H, W)) for x in _heads(H, W, **kwargs))
    return [q.abs() + .1, k.abs() + .1, v]


def _with(*shapes: tuple[int, ...]) -> Callable[..., list[torch.Tensor]]:
    def inputs(H: int, W: int, **kwargs: int) -> list[torch.Tensor]:
        return [*_heads(H, W, **kwargs), *(randn(*shape, seed=i + 1).abs() + .1 for i, shape in enumerate(shapes))]
    return inputs


def _qna(H: int, W: int, seed: int = 0, k: int = 3, L: int = 2, d: int = 3, heads: int = 2) -> list[torch.Tensor]:
    return [randn(2, H, W, L, heads, seed=seed), randn(2, H, W, d, heads, seed=seed + 1),
            randn(L * heads, 1, k, k, seed=seed + 2), randn(L * heads, 1, k, k, seed=seed + 3)]


def _qna_large(H: int, W: int, **kwargs: int) -> list[torch.Tensor]:
    score, *rest = _qna(H, W, **kwargs)
    return [score * 100, *rest]


def _depthwise(k: int, kl: int, bias: bool = True) -> Callable[..., list[torch.Tensor]]:
    def inputs(H: int, W: int, seed: int = 0, channels: int = 5) -> list[torch.Tensor]:
        made = [randn(2, H, W, channels, seed=seed), randn(channels, 1, k, kl, seed=seed + 1) / 8]
        return [*made, randn(channels, seed=seed + 2)] if bias else made
    return inputs


def _depthwise_reference(x, weight, bias=None):
    k, kl = weight.shape[2:]
    windows = F.pad(x, [0, 0, kl // 2, kl // 2, k // 2, k // 2]).unfold(1, k, 1).unfold(2, kl, 1)
    out = torch.einsum('bhwcij,cij->bhwc', windows, weight[:, 0])
    return out if bias is None else out + bias


def _window_inputs(H: int, W: int, seed: int = 0, d: int = 3, heads: int = 2) -> list[torch.Tensor]:
    return [randn(2, H, W, 3 * heads * d, seed=seed),
            randn((2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1), heads, seed=seed + 1)]


def _window_reference(qkv, table):
    """Attention among all positions, of which pairs in different windows take no part."""
    B, H, W, C = qkv.shape
    heads = table.shape[1]
    q, k, v = qkv.reshape(B, H * W, 3, heads, -1).permute(2, 0, 3, 1, 4)
    h, w = (-(-size // -(-size // side)) for size, side in zip((H, W), WINDOW, strict=True))
    y, x = torch.arange(H).repeat_interleave(W), torch.arange(W).repeat(H)
    window = y // h * W + x // w
    dy, dx = y[:, None] - y, x[:, None] - x
    same = window[:, None] == window
    index = torch.where(same, (dy + WINDOW[0] - 1) * (2 * WINDOW[1] - 1) + dx + WINDOW[1] - 1, 0)
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -.5 + table[index].permute(2, 0, 1)
    weights = scores.masked_fill(~same, -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(B, H, W, C // 3)


def _vicinity(locality: str) -> Callable[..., torch.Tensor]:
    def dense(q, k, v):
        H, W = q.shape[2:4]
        flat = [x.flatten(2, 3) for x in (q, k, v)]
        return reference.vicinity_attention(*flat, H, W, locality).unflatten(2, (H, W))
    return dense


def _beta(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)) / 8  # below 1


def _walk(q, k, v, beta, temperature):
    return ops.random_walk_attention(q, k, v, _beta(beta), temperature + 1, mode='walk')


def _walk_reference(q, k, v, beta, temperature):
    p_q, p_k = (reference.random_walk_features(x, temperature + 1) for x in (q, k))
    return reference.random_walk_attention(p_q, p_k, v, _beta(beta))


OPS = {
    'linear': Op(ops.linear_attention, reference.linear_attention, _heads),
    **{f'vicinity-{locality}': Op(
        partial(ops.vicinity_attention, locality=locality, clamp=False), _vicinity(locality), _positive)
        for locality in ('2d', '2d_product', '1d', 'none')},
    **{f'xnorm-{axis}': Op(
        partial(ops.xnorm_attention, kv_axis=axis), partial(reference.xnorm_attention, kv_axis=axis), _with((2,), (2,)))
        for axis in ('key', 'value')},
    'spectral': Op(
        lambda q, k, v, beta: ops.random_walk_attention(q, k, v, _beta(beta)),
        lambda q, k, v, beta: reference.spectral_walk_attention(q, k, v, _beta(beta)), _with((2,))),
    'walk': Op(_walk, _walk_reference, _with((2,), (2,))),
    'linear_angular': Op(linear_angular, reference.linear_angular_attention, _with((2, 1, 3, 1))),
    'depthwise': Op(ops.depthwise, _depthwise_reference, _depthwise(3, 3)),
    'depthwise-row': Op(ops.depthwise, _depthwise_reference, _depthwise(1, 9, bias=False)),
    'depthwise-gelu': Op(
        ops.depthwise_gelu, lambda *args: F.gelu(_depthwise_reference(*args)), _depthwise(3, 3)),
    'window_softmax': Op(
        lambda qkv, table: ops.window_softmax(qkv, table, WINDOW), _window_reference, _window_inputs),
    'qna': Op(ops.qna_attention, reference.qna_attention, _qna),
    'qna-stride': Op(partial(ops.qna_attention, stride=2), partial(reference.qna_attention, stride=2), _qna),
    'qna-large': Op(ops.qna_attention, reference.qna_attention, _qna_large),
}

# Each op with each implementation that one of its primitives has.
CASES = [(name, implementation) for name in OPS for implementation in IMPLEMENTATIONS
         if (name == 'window_softmax') == (implementation == 'compiled') or implementation == 'torch']

# Those whose evaluation does not depend on values: what compilers and function transforms see.
SAME_IN_GRAPHS = [name for name in OPS if name != 'qna-large']


def maps_of(inputs: list[torch.Tensor]) -> list[int]:
    """Which inputs are maps of two images; the others are parameters."""
    return [i for i, x in enumerate(inputs) if x.ndim > 3 and x.shape[0] == 2 and x.shape[1] != 1]
