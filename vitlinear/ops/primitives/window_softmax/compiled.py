"""Window attention as one operator of a compiler's graph.

How a map is cut would otherwise be part of the graph: with sizes that may change, conditions on quotients of quotients
of them took PyTorch 2.14 minutes and more to solve; and on CUDA devices PyTorch 2.11 cannot compile the gradient of
attention whose bias is made in the graph.
"""
from collections.abc import Sequence

import torch

from ..._numerics import as_operand, at_least_float32, product
from ..by_kernels import by_kernels
from . import torch as plain


def launch(qkv: torch.Tensor, table: torch.Tensor, window_size: Sequence[int]) -> torch.Tensor:
    """As `torch.window_softmax`."""
    return plain.window_softmax(qkv, table, (window_size[0], window_size[1])).contiguous()


def _attend_backward(qkv, bias, grad, h, w):
    """Gradients of a part of the map and of the bias; weights are computed once more."""
    (_, H, W, _), heads = qkv.shape, len(bias)
    q, k, v = [as_operand(x) for x in plain.to_windows(qkv, 3, heads, h, w)]
    g = as_operand(plain.to_windows(grad.to(qkv.dtype), 1, heads, h, w)[0])
    scale = q.shape[2] ** -.5
    weights = (product(q, k.transpose(1, 2)).unflatten(0, [-1, heads]) * scale + bias).softmax(dim=-1).flatten(0, 1)
    inner = weights * product(g, v.transpose(1, 2))
    inner -= weights * inner.sum(dim=-1, keepdim=True)
    weights, scores = weights.to(q.dtype), (inner * scale).to(q.dtype)
    grads = product(scores, k), product(scores.transpose(1, 2), q), product(weights.transpose(1, 2), g)
    grads = torch.stack(grads).to(qkv.dtype).unflatten(1, [-1, heads])
    return plain.from_windows(grads, H, W, h, w), inner.unflatten(0, [-1, heads]).sum(dim=0)


def launch_backward(
        qkv: torch.Tensor,
        table: torch.Tensor,
        grad: torch.Tensor,
        window_size: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of both."""
    size = window_size[0], window_size[1]
    parts, columns, h, w = plain.cut_map(qkv, size)
    grad_table, out = torch.zeros_like(table, dtype=torch.promote_types(table.dtype, torch.float32)), []
    for part, g in zip(parts, plain.cut_map(grad, size)[0], strict=True):
        height, width = min(h, part.shape[1]), min(w, part.shape[2])
        bias = at_least_float32(plain.relative_position_bias(table, size, height, width))
        grad_part, grad_bias = _attend_backward(part, bias, g, height, width)
        index = plain.build_index(size, height, width, table).flatten()
        grad_table.index_add_(0, index, grad_bias.flatten(1).t().to(grad_table.dtype))
        out.append(grad_part)
    return plain.join_map(out, columns).contiguous(), grad_table.to(table.dtype)


def _fake(qkv, table, window_size):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


def _fake_backward(qkv, table, grad, window_size):
    return qkv.new_empty(qkv.shape), table.new_empty(table.shape)


_window_softmax = by_kernels(
    'window_softmax', plain.window_softmax, launch, launch_backward, _fake, _fake_backward, 2, lambda *args: '')


def window_softmax(qkv, table, window_size):
    """As `torch.window_softmax`."""
    return _window_softmax(qkv, table, list(window_size))
