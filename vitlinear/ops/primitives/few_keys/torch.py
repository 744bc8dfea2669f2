"""Softmax attention to few keys, of whose weights those above a threshold count, in plain operations."""
import torch
import torch.nn.functional as F

from ..._numerics import at_least_float32


def pool_keys(
        x: torch.Tensor,
        grid: tuple[int, int] | None,
        max_keys: int | None,
        num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """Means over square cells of the grid, the smallest that leave `max_keys` cells at most; prefix tokens stay.

    Args:
        x: Keys or values (B, heads, N, d).
        grid: Rows and columns, None for tokens that are not on a grid and stay as they are.
        max_keys: Cells to keep, None for no pooling.
        num_prefix_tokens: Tokens in front of those of the grid.
    """
    if grid is None or max_keys is None:
        return x
    H, W = grid
    side = 1
    while -(-H // side) * -(-W // side) > max_keys:
        side += 1
    if side == 1:
        return x
    prefix, x = x[:, :, :num_prefix_tokens], x[:, :, num_prefix_tokens:]
    B, heads, _, d = x.shape
    x = x.reshape(B * heads, H, W, d).permute(0, 3, 1, 2)
    x = F.avg_pool2d(x, side, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)
    return torch.cat([prefix, x.reshape(B, heads, -1, d)], dim=2)


def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        threshold: torch.Tensor,
        dropout_p: float,
) -> torch.Tensor:
    """`masked_softmax` of all queries at once."""
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -.5).softmax(dim=-1)
    weights = torch.where(weights > threshold, weights, 0.)
    return F.dropout(weights, dropout_p) @ v


def masked_softmax(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        threshold: torch.Tensor,
        dropout_p: float = 0.,
        chunk: int | None = None,
) -> torch.Tensor:
    """`A v` with the softmax weights above a threshold; the others count as 0 and the rows are not rescaled.

    Cost: 2 N M (d + e) operations a head, in float32 (float64 for float64 input).

    Args:
        q: Queries (B, heads, N, d).
        k: Keys (B, heads, M, d).
        v: Values (B, heads, M, e).
        threshold: Scalar tensor. The gradient passes through the weights above it alone, never to the threshold.
        dropout_p: Share of the weights to drop.
        chunk: Queries to take at a time, so that no more than `chunk * M` weights per head are held; None for all.

    Returns:
        (B, heads, N, e) in the dtype of v.
    """
    dtype = v.dtype
    q, k, v = at_least_float32(q), at_least_float32(k), at_least_float32(v)
    threshold = threshold.to(q.dtype)
    if chunk is None:
        return attend(q, k, v, threshold, dropout_p).to(dtype)
    return torch.cat([attend(part, k, v, threshold, dropout_p) for part in q.split(chunk, dim=2)], dim=2).to(dtype)
