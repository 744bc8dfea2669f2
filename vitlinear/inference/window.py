"""Window attention: the bias of relative positions is kept, and projections go through oneDNN."""
import torch
from torch import nn

from ..layers import WindowAttention
from ..ops.primitives.window_softmax import attend, cut_map, join_map, relative_position_bias
from .cache import cached
from .onednn import call_linear
from .rows import add_to, branch


@branch(WindowAttention, linears=('qkv', 'proj'))
def window(layer: WindowAttention, x: torch.Tensor, norm: nn.Module | None, out: torch.Tensor | None) -> torch.Tensor:
    """See `rows.BRANCHES`."""
    def attend_within(part: torch.Tensor, h: int, w: int) -> torch.Tensor:
        table = layer.relative_position_bias_table
        bias = cached(layer, [table], (h, w), lambda: relative_position_bias(table, layer.window_size, h, w))
        return attend(part, bias, h, w)

    parts, columns, h, w = cut_map(call_linear(x if norm is None else norm(x), layer.qkv), layer.window_size)
    y = join_map([attend_within(part, min(h, part.shape[1]), min(w, part.shape[2])) for part in parts], columns)
    return add_to(x, call_linear(y, layer.proj), norm, out)
