"""Softmax attention within windows, with a learned bias for each relative position (Liu et al., 'Swin Transformer',
arXiv 2103.14030, equation 4), without shifted windows.

A map that is no larger than a window is one window: attention over all positions.
"""
import torch
import torch.nn.functional as F
from torch import nn

from ..ops import window_softmax
from ._common import check_heads, init_lecun_


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


class WindowAttention(nn.Module):
    """Multi-head softmax attention within windows of a map, with relative position bias.

    See `ops.window_softmax`.
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
        return self.proj(window_softmax(self.qkv(x), self.relative_position_bias_table, self.window_size))
