"""Learned-query attention in row blocks: one product for values, ones and scores, from weights that are folded once."""
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..layers import QnAAttention
from ..layers.qna import FoldedQnAAttention
from ..ops.primitives.windows import shifted_windows, spread_of
from ..ops.primitives.windows.torch import convolved_windows
from .cache import cached
from .onednn import call_linear, linear_gelu
from .rows import block_sizes, branch, lagged, put, without_form

QnA = QnAAttention | FoldedQnAAttention


def _attend(layer: QnA, joint: torch.Tensor, kernel: torch.Tensor, pad_rows: int) -> torch.Tensor:
    """Attention to a block (B, H, W, (d + 1 + L) heads) of values, ones and scores, with rows of zeros around it."""
    dtype = joint.dtype
    if dtype == torch.float16:
        joint = joint.float()  # the sums of small weights are no normal float16
    joint = joint.unflatten(3, [-1, layer.num_heads])
    values, score = joint[:, :, :, :-layer.num_queries], joint[:, :, :, -layer.num_queries:]
    spread = spread_of(score, layer.rel_pos_bias)
    if spread == 'large':
        y = shifted_windows(
            score, values[:, :, :, :-1], layer.rel_pos_bias, layer.attn_scale, layer.stride, layer.scale, pad_rows)
    else:
        y = convolved_windows(values, score, kernel.to(joint.dtype), layer.stride, pad_rows, spread != 'small')
    return y.flatten(3).to(dtype)


def _in_row_blocks(
        layer: QnA,
        x: torch.Tensor,
        norm: nn.Module | None,
        kernel: torch.Tensor,
        project: Callable[[torch.Tensor], torch.Tensor],
        output: Callable[[torch.Tensor], torch.Tensor],
        out: torch.Tensor | None,
) -> torch.Tensor:
    B, H, W, _ = x.shape
    s, p = layer.stride, layer.kernel_size // 2
    Ho, Wo = (H - 1) // s + 1, (W - 1) // s + 1
    # of the products and their window sums
    images, rows = block_sizes(Ho, W * s * kernel.shape[0] * kernel.element_size(), share=1 / 2, at_least=2 * p)

    def blocks() -> Iterator[tuple[tuple[slice, slice], torch.Tensor, int, int]]:
        for b in range(0, B, images):
            for i in range(0, Ho, rows):
                # inside the map a block brings its own context, at its edge one row of windows too many is taken
                last = min(i + rows, Ho)
                inside = i * s >= p and (last - 1) * s + p < H
                skip = 0 if inside else min(i, -(-p // s))
                top = i * s - p if inside else (i - skip) * s
                block = x[b:b + images, top:(last - 1) * s + p + 1]
                where = slice(b, b + images), slice(i, last)
                yield where, block if norm is None else norm(block), skip, 0 if inside else p

    for where, block, skip, pad_rows in lagged(blocks()) if out is x else blocks():
        y = _attend(layer, project(block), kernel, pad_rows)
        y = output(y[:, skip:skip + where[1].stop - where[1].start])
        out = put(out, where, x, y, norm is not None, (B, Ho, Wo, y.shape[3]))
    return out


@branch(QnAAttention, linears=('k', 'v', 'proj'))
def qna(layer: QnAAttention, x: torch.Tensor, norm: nn.Module | None, out: torch.Tensor | None) -> torch.Tensor:
    """See `rows.BRANCHES`."""
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
    sources = [p for p in (layer.query, layer.k.weight, layer.k.bias, layer.v.weight, layer.v.bias, layer.rel_pos_bias,
                           layer.attn_scale, layer.proj.weight) if p is not None]
    with torch.autocast('cpu', enabled=False):
        weight, bias, kernel, proj = cached(layer, sources, dtype, lambda: layer.fold(dtype))
        proj_bias = None if layer.proj.bias is None else layer.proj.bias.to(dtype)
        return _in_row_blocks(
            layer, x, norm, kernel, lambda y: linear_gelu(y.to(dtype), weight, bias),
            lambda y: linear_gelu(y, proj, proj_bias), out)


@branch(FoldedQnAAttention, linears=('joint', 'proj'))
def folded_qna(
        layer: FoldedQnAAttention,
        x: torch.Tensor,
        norm: nn.Module | None,
        out: torch.Tensor | None,
) -> torch.Tensor:
    """See `rows.BRANCHES`."""
    if torch.is_autocast_enabled('cpu'):
        return without_form(layer, x, norm, out)
    return _in_row_blocks(
        layer, x, norm, layer.kernel, lambda y: call_linear(y, layer.joint), lambda y: call_linear(y, layer.proj), out)
