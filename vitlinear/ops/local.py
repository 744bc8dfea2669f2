"""What linear-angular attention does among tokens that are near: a convolution of the values, and coarser grids."""
import torch
import torch.nn.functional as F

from ._numerics import no_autocast
from .primitives.dw_gelu import depthwise


def subsample(x: torch.Tensor, grid: tuple[int, int], stride: int, num_prefix_tokens: int = 0) -> torch.Tensor:
    """Every `stride`-th row and column of the grid among the tokens, (B, heads, N, d) to (B, heads, N', d)."""
    prefix, x = x[:, :, :num_prefix_tokens], x[:, :, num_prefix_tokens:]
    x = x.unflatten(2, grid)[:, :, ::stride, ::stride].flatten(2, 3)
    return torch.cat([prefix, x], dim=2) if num_prefix_tokens else x


@no_autocast
def local_attention(
        v: torch.Tensor,
        weight: torch.Tensor,
        grid: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """The convolution D of the values, one kernel per head for all its channels, zeros outside.

    Args:
        v: Values (B, heads, N, d), fastest where heads and channels are last in memory.
        weight: (heads, 1, k, 1), along the tokens in their order; or (heads, 1, k, k), on the grid, where prefix tokens
            have no part. (heads * d, 1, ...) with the kernel of a head for each of its channels is taken as well.
        grid: Rows and columns of the tokens, for the second form.
        num_prefix_tokens: Tokens in front of those of the grid.

    Returns:
        (B, heads, N, d).
    """
    B, heads, N, d = v.shape
    if weight.shape[0] != heads * d:
        weight = weight.repeat_interleave(d, dim=0)
    x = v.transpose(1, 2).reshape(B, N, heads * d)
    along = weight.shape[3] == 1
    if along:
        x = depthwise(x.unsqueeze(1), weight.transpose(2, 3))
    else:
        assert grid is not None, 'Two-dimensional kernels need the grid of the tokens.'
        x = depthwise(x[:, num_prefix_tokens:].unflatten(1, grid), weight)
    x = x.flatten(1, 2).unflatten(2, [heads, d]).transpose(1, 2)
    return x if along or not num_prefix_tokens else F.pad(x, [0, 0, num_prefix_tokens, 0])
