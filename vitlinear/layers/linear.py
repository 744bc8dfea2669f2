"""Plain kernel attention and softmax attention as layers: an op on heads between two projections."""
import torch
from torch import nn

from ..ops import linear_attention, softmax_attention, split_heads
from ._common import check_heads, merge_heads


class _TokenAttention(nn.Module):
    """Multi-head attention over all positions of a map, by the op that `attend` calls."""

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            qkv_bias: bool = True,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            qkv_bias: Bias of the query, key and value projections.

        Raises:
            ValueError: `dim` is not divisible by `num_heads`.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(B, heads, N, d) queries, keys and values to (B, heads, N, d)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        return self.proj(merge_heads(self.attend(q, k, v)).view(x.shape))


class LinearAttention(_TokenAttention):
    """Multi-head plain kernel attention over all positions of a map, linear in H W.

    Paper: arXiv 2006.16236.
    """

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `ops.linear_attention`."""
        return linear_attention(q, k, v)


class SoftmaxAttention(_TokenAttention):
    """Multi-head softmax attention (Vaswani et al., 2017, equation 1), the quadratic baseline of every comparison.

    PyTorch's fused kernel; time grows with (H W)^2.
    """

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`softmax(q k^T / sqrt(d)) v`."""
        return softmax_attention(q, k, v)
