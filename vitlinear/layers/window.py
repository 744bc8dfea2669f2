"""Softmax attention within windows, with a learned bias for each relative position (Liu et al., 'Swin Transformer',
arXiv 2103.14030, equation 4), without shifted windows.

A map that is no larger than a window is one window: attention over all positions.
"""
import torch
import torch.nn.functional as F
from torch import nn

from ._common import check_heads, init_lecun_, merge_heads, split_heads


def relative_position_bias(table: torch.Tensor, window_size: tuple[int, int], height: int, width: int) -> torch.Tensor:
    """Bias of each pair of positions in a window that is no larger than the one the table is made for.

    Args:
        table: (2 h - 1) (2 w - 1) relative positions by heads, for windows (h, w) = `window_size`.
        window_size: Sides of the table's windows.
        height: Rows of the window, at most h.
        width: Columns of the window, at most w.

    Returns:
        (heads, height * width, height * width), rows for queries, columns for keys.
    """
    h, w = window_size
    table = table.reshape(2 * h - 1, 2 * w - 1, -1)[h - height:h + height - 1, w - width:w + width - 1]
    # entry [y, x] then holds relative positions y - (height - 1) + i for i from 0, that is the keys in reverse order
    windows = table.unfold(0, height, 1).unfold(1, width, 1).flip(3, 4)
    return windows.permute(2, 0, 1, 3, 4).reshape(-1, height * width, height * width)


def resize_relative_position_bias_table(
        table: torch.Tensor,
        window_size: tuple[int, int],
        new_window_size: tuple[int, int],
) -> torch.Tensor:
    """Resize a table of relative positions, bicubic and antialiased as in the authors' fine-tuning of QnA-ViT.

    Args:
        table: ((2 h - 1) (2 w - 1), heads).
        window_size: (h, w) of the table.
        new_window_size: (h, w) of the result.
    """
    if tuple(window_size) == tuple(new_window_size):
        return table
    old = [2 * side - 1 for side in window_size]
    new = [2 * side - 1 for side in new_window_size]
    maps = table.float().t().reshape(1, -1, old[0], old[1])
    maps = F.interpolate(maps, size=new, mode='bicubic', antialias=True, align_corners=False)
    return maps.flatten(2)[0].t().contiguous().to(table.dtype)


def cut_map(x: torch.Tensor, window_size: tuple[int, int]) -> tuple[list[torch.Tensor], int, int, int]:
    """Cut a map into the fewest windows of one size, and parts of smaller ones below and to the right of them.

    Args:
        x: (B, H, W, C).
        window_size: Largest sides of a window.

    Returns:
        One, two or four parts of the map, row by row; parts of a row; height and width of the windows.
    """
    H, W = x.shape[1], x.shape[2]
    rows, cols = -(-H // window_size[0]), -(-W // window_size[1])
    h, w = -(-H // rows), -(-W // cols)
    parts: list[torch.Tensor] = []
    for top, bottom in ((0, H // h * h), (H // h * h, H)):
        for left, right in ((0, W // w * w), (W // w * w, W)):
            if top < bottom and left < right:
                parts.append(x[:, top:bottom, left:right])
    return parts, 2 if W % w else 1, h, w


def join_map(parts: list[torch.Tensor], columns: int) -> torch.Tensor:
    """The map that these parts were cut from."""
    rows = [torch.cat(parts[i:i + columns], dim=2) if columns > 1 else parts[i] for i in range(0, len(parts), columns)]
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]


def to_windows(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """(B, H, W, C) to the windows (B', h, w, C) that divide it."""
    B, H, W, C = x.shape
    return x.reshape(B, H // h, h, W // w, w, C).transpose(2, 3).reshape(-1, h, w, C)


def from_windows(windows: torch.Tensor, like: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Windows (B', h * w, C) to the map (B, H, W, C) of the size of `like`."""
    B, H, W, _ = like.shape
    return windows.reshape(B, H // h, W // w, h, w, -1).transpose(2, 3).reshape(B, H, W, -1)


class WindowAttention(nn.Module):
    """Multi-head softmax attention within windows of a map, with relative position bias.

    A map is cut into windows of one size, as few as the window size allows. Where they do not divide its sides, the
    last ones are smaller: what padding the map and masking the padding would give, without either.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            window_size: int | tuple[int, int] = 7,
            qkv_bias: bool = False,
            proj_bias: bool = False,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            window_size: Largest side of the windows, or largest height and width.
            qkv_bias: Bias of the query, key and value projections.
            proj_bias: Bias of the output projection.

        Raises:
            ValueError: `dim` is not divisible by `num_heads`, or a window side is not positive.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.window_size = self._check_window_size(window_size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        h, w = self.window_size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * h - 1) * (2 * w - 1), num_heads, **dd))
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.reset_parameters()
        for layer in (self.qkv, self.proj):
            init_lecun_(layer)

    @staticmethod
    def _check_window_size(window_size: int | tuple[int, int]) -> tuple[int, int]:
        h, w = (window_size, window_size) if isinstance(window_size, int) else window_size
        if h < 1 or w < 1:
            raise ValueError(f'window_size={(h, w)} must be positive.')
        return h, w

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """No preference for any relative position, as the authors of QnA-ViT start."""
        nn.init.zeros_(self.relative_position_bias_table)

    def set_window_size(self, window_size: int | tuple[int, int]) -> None:
        """Change the largest window and resize the bias table to it, in place."""
        new = self._check_window_size(window_size)
        if new == self.window_size:
            return
        table = self.relative_position_bias_table
        resized = resize_relative_position_bias_table(table.detach(), self.window_size, new)
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.window_size = new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        parts, columns, h, w = cut_map(x, self.window_size)
        return join_map([self.attend(part, min(h, part.shape[1]), min(w, part.shape[2])) for part in parts], columns)

    def attend(self, x: torch.Tensor, h: int, w: int) -> torch.Tensor:
        """Attention within the windows (h, w) of a map whose sides they divide."""
        bias = relative_position_bias(self.relative_position_bias_table, self.window_size, h, w)
        q, k, v = split_heads(self.qkv(to_windows(x, h, w)), 3, self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).unsqueeze(0))
        return from_windows(self.proj(merge_heads(y)), x, h, w)
