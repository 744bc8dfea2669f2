"""Softmax attention within windows, with a learned bias for each relative position (Liu et al., 'Swin Transformer',
arXiv 2103.14030, equation 4), without shifted windows.

A map that is no larger than a window is one window: attention over all positions.
"""
from typing import Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops._common import InferenceCache, call_linear, check_heads, init_lecun_, use_bands


def relative_position_bias(table: torch.Tensor, window_size: Tuple[int, int], height: int, width: int) -> torch.Tensor:
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
        window_size: Tuple[int, int],
        new_window_size: Tuple[int, int],
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

    A map is cut into windows of one size, as few as the window size allows. Where they do not divide its sides, the
    last ones are smaller: what padding the map and masking the padding would give, without either.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            window_size: Union[int, Tuple[int, int]] = 7,
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
        self._cache = InferenceCache()
        self.reset_parameters()
        for layer in (self.qkv, self.proj):
            init_lecun_(layer)

    @staticmethod
    def _check_window_size(window_size: Union[int, Tuple[int, int]]) -> Tuple[int, int]:
        h, w = (window_size, window_size) if isinstance(window_size, int) else window_size
        if h < 1 or w < 1:
            raise ValueError(f'window_size={(h, w)} must be positive.')
        return h, w

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """No preference for any relative position, as the authors of QnA-ViT start."""
        nn.init.zeros_(self.relative_position_bias_table)

    def set_window_size(self, window_size: Union[int, Tuple[int, int]]) -> None:
        """Change the largest window and resize the bias table to it, in place."""
        new = self._check_window_size(window_size)
        if new == self.window_size:
            return
        table = self.relative_position_bias_table
        resized = resize_relative_position_bias_table(table.detach(), self.window_size, new)
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.window_size = new

    def train(self, mode: bool = True) -> 'WindowAttention':
        self._cache.clear()
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        H, W = x.shape[1], x.shape[2]
        rows, cols = -(-H // self.window_size[0]), -(-W // self.window_size[1])
        h, w = -(-H // rows), -(-W // cols)
        # the last row or column of windows may be smaller than the others
        bands = []
        for top, bottom in ((0, H // h * h), (H // h * h, H)):
            parts = []
            for left, right in ((0, W // w * w), (W // w * w, W)):
                if top < bottom and left < right:
                    part = x[:, top:bottom, left:right]
                    parts.append(self._attend(part, min(h, bottom - top), min(w, right - left)))
            if len(parts) > 0:
                bands.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))
        return bands[0] if len(bands) == 1 else torch.cat(bands, dim=1)

    def _attend(self, x: torch.Tensor, h: int, w: int) -> torch.Tensor:
        """Attention within the windows (h, w) of a map whose sides they divide."""
        B, H, W, C = x.shape
        windows = H // h * (W // w)
        if windows > 1:
            x = x.reshape(B, H // h, h, W // w, w, C).transpose(2, 3).reshape(-1, h, w, C)
        bias = self._bias(h, w)
        if torch.jit.is_scripting():
            qkv = self.qkv(x)
        else:
            qkv = call_linear(self.qkv, x)
        qkv = qkv.reshape(-1, h * w, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias.to(qkv.dtype).unsqueeze(0))
        x = x.transpose(1, 2).reshape(-1, h, w, C)
        if torch.jit.is_scripting():
            x = self.proj(x)
        else:
            x = call_linear(self.proj, x)
        if windows > 1:
            x = x.reshape(B, H // h, W // w, h, w, C).transpose(2, 3).reshape(B, H, W, C)
        return x

    def _bias(self, h: int, w: int) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if use_bands(self.relative_position_bias_table) and not self.training:
                return self._cache.get([self.relative_position_bias_table], (h, w), self._build_bias)
        return self._build_bias((h, w))

    def _build_bias(self, window: Tuple[int, int]) -> torch.Tensor:
        return relative_position_bias(self.relative_position_bias_table, self.window_size, window[0], window[1])
