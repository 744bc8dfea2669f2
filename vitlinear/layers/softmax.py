"""Softmax attention (Vaswani et al., 2017, equation 1), the quadratic baseline of every comparison."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops._common import check_heads


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention over all positions of a map, through PyTorch's fused kernel.

    Time grows with (H W)^2.
    """

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).reshape(B, H * W, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))
