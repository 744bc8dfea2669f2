"""MLPs in row blocks: hidden channels of some rows at a time, and one more row on either side for a convolution."""
from collections.abc import Callable, Iterator

import torch
from timm.layers import Mlp
from torch import nn

from ..layers.mlp import ConvMlp
from .onednn import call_depthwise, call_linear
from .rows import block_sizes, branch, lagged, put


def _in_row_blocks(
        x: torch.Tensor,
        norm: nn.Module | None,
        evaluate: Callable[[torch.Tensor, int, int], torch.Tensor],
        hidden_dim: int,
        context: int,
        out: torch.Tensor | None,
) -> torch.Tensor:
    """A branch in row blocks.

    Args:
        x: Map (B, H, W, C).
        norm: Norm in front of the branch, with which the map itself is added to the result.
        evaluate: Takes a block of rows and how many of its first and last ones are context, which it leaves out.
        hidden_dim: Channels within the branch.
        context: Rows that the branch needs on either side of a block.
        out: Where to put the result; may be `x` if there is a norm.
    """
    B, H, W, _ = x.shape
    images, rows = block_sizes(H, W * hidden_dim * x.element_size(), at_least=8)
    if images >= B and rows >= H:
        y = evaluate(x if norm is None else norm(x), 0, 0)
        if norm is None:
            return y
        return x.add_(y) if out is x and torch.result_type(x, y) == x.dtype else x + y

    def blocks() -> Iterator[tuple[tuple[slice, slice], torch.Tensor, int, int]]:
        for b in range(0, B, images):
            for i in range(0, H, rows):
                above, below = min(i, context), max(0, min(context, H - i - rows))
                block = x[b:b + images, i - above:i + rows + below]
                yield (slice(b, b + images), slice(i, i + rows)), block if norm is None else norm(block), above, below

    for where, block, above, below in lagged(blocks()) if out is x else blocks():
        out = put(out, where, x, evaluate(block, above, below), norm is not None)
    return out


@branch(Mlp, linears=('fc1', 'fc2'))
def mlp(layer: Mlp, x: torch.Tensor, norm: nn.Module | None, out: torch.Tensor | None) -> torch.Tensor:
    """timm's MLP."""
    def evaluate(block: torch.Tensor, above: int, below: int) -> torch.Tensor:
        block = layer.norm(layer.drop1(call_linear(block, layer.fc1, layer.act)))
        return layer.drop2(call_linear(block, layer.fc2))
    return _in_row_blocks(x, norm, evaluate, layer.fc1.out_features, 0, out)


@branch(ConvMlp, linears=('fc1', 'fc2'), convolutions=('dwconv',))
def conv_mlp(layer: ConvMlp, x: torch.Tensor, norm: nn.Module | None, out: torch.Tensor | None) -> torch.Tensor:
    """The MLP with a depthwise convolution."""
    def evaluate(block: torch.Tensor, above: int, below: int) -> torch.Tensor:
        block = call_linear(block, layer.fc1)
        inside = above and below  # then the context takes the place of the zeros
        hidden = call_depthwise(block, layer.dwconv, layer.act, 0 if inside else 1)
        if not inside:
            hidden = hidden[:, above:hidden.shape[1] - below]
        return layer.drop2(call_linear(layer.drop1(hidden), layer.fc2))
    return _in_row_blocks(x, norm, evaluate, layer.hidden_dim, 1, out)
