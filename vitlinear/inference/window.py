"""Window attention: the bias of relative positions is kept, and projections go through oneDNN."""
import torch
import torch.nn.functional as F
from torch import nn

from ..layers import WindowAttention
from ..layers._common import merge_heads, split_heads
from ..layers.window import cut_map, from_windows, join_map, relative_position_bias, to_windows
from .cache import cached
from .onednn import call_linear
from .rows import add_to, branch


@branch(WindowAttention, linears=('qkv', 'proj'))
def window(layer: WindowAttention, x: torch.Tensor, norm: nn.Module | None, out: torch.Tensor | None) -> torch.Tensor:
    """See `rows.BRANCHES`."""
    def attend(part: torch.Tensor, h: int, w: int) -> torch.Tensor:
        table = layer.relative_position_bias_table
        bias = cached(layer, [table], (h, w), lambda: relative_position_bias(table, layer.window_size, h, w))
        q, k, v = split_heads(call_linear(to_windows(part, h, w), layer.qkv), 3, layer.num_heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).unsqueeze(0))
        return from_windows(call_linear(merge_heads(y), layer.proj), part, h, w)

    parts, columns, h, w = cut_map(x if norm is None else norm(x), layer.window_size)
    y = join_map([attend(part, min(h, part.shape[1]), min(w, part.shape[2])) for part in parts], columns)
    return add_to(x, y, norm, out)
