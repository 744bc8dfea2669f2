"""Softmax attention within the windows of a map with a bias for each relative position, in plain operations."""
from functools import lru_cache

import torch

from ..._dispatch import PLAIN_TENSORS, is_eager, scripts_as
from ...softmax import softmax_attention


def build_index(window_size: tuple[int, int], height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Rows of a table of relative positions for pairs of positions (height * width, height * width), by query."""
    rows = torch.arange(height, device=like.device)
    columns = torch.arange(width, device=like.device)
    rows = (rows.unsqueeze(1) - rows + (window_size[0] - 1)) * (2 * window_size[1] - 1)
    columns = columns.unsqueeze(1) - columns + (window_size[1] - 1)
    index = rows.unsqueeze(1).unsqueeze(3) + columns.unsqueeze(0).unsqueeze(2)
    return index.reshape(height * width, height * width)


@lru_cache(maxsize=64)
def _kept_index(window_size: tuple[int, int], height: int, width: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return build_index(window_size, height, width, torch.empty(0, device=device))


@scripts_as(build_index)
def _index(window_size: tuple[int, int], height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """As `build_index`; eager code keeps those of the last sizes."""
    if is_eager() and type(like) in PLAIN_TENSORS and like.device.type != 'meta':
        return _kept_index(tuple(window_size), int(height), int(width), like.device)
    return build_index(window_size, height, width, like)


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
    return table.t()[:, _index(window_size, height, width, table)].contiguous()


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


def to_windows(x: torch.Tensor, parts: int, num_heads: int, h: int, w: int) -> torch.Tensor:
    """(B, H, W, parts * heads * d) to (parts, B', heads, h * w, d) of the windows (h, w) that divide the map."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // h, h, W // w, w, parts, num_heads, C // (parts * num_heads))
    return x.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(parts, -1, num_heads, h * w, C // (parts * num_heads))


def from_windows(x: torch.Tensor, H: int, W: int, h: int, w: int) -> torch.Tensor:
    """(parts, B', heads, h * w, d) to the map (B, H, W, parts * heads * d)."""
    parts, _, num_heads, _, d = x.shape
    x = x.reshape(parts, -1, H // h, W // w, num_heads, h, w, d).permute(1, 2, 5, 3, 6, 0, 4, 7)
    return x.reshape(-1, H, W, parts * num_heads * d)


def attend(qkv: torch.Tensor, bias: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Attention within the windows (h, w) of a map whose sides they divide."""
    q, k, v = to_windows(qkv, 3, bias.shape[0], h, w).unbind(0)
    y = softmax_attention(q, k, v, bias.to(q.dtype).unsqueeze(0))
    return from_windows(y.unsqueeze(0), qkv.shape[1], qkv.shape[2], h, w)


def window_softmax(qkv: torch.Tensor, table: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """Multi-head softmax attention within windows of a map, as few as the window size allows.

    Where they do not divide its sides, the last ones are smaller: what padding the map and masking the padding would
    give, without either. Cost: 4 H W h w C operations.

    Args:
        qkv: Queries, keys and values (B, H, W, 3 * heads * d).
        table: Bias of relative positions, see `relative_position_bias`.
        window_size: Largest sides (h, w) of a window.

    Returns:
        (B, H, W, heads * d).
    """
    parts, columns, h, w = cut_map(qkv, window_size)
    out: list[torch.Tensor] = []
    for part in parts:
        height, width = min(h, part.shape[1]), min(w, part.shape[2])
        out.append(attend(part, relative_position_bias(table, window_size, height, width), height, width))
    return join_map(out, columns)
