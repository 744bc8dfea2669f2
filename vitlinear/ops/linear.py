"""Plain kernel attention: Katharopoulos et al., 'Transformers are RNNs', arXiv 2006.16236, equations 5 to 7.

The softmax kernel exp(q . k) becomes phi(q) . phi(k) with phi(u) = elu(u) + 1, so the sum over keys can be taken
before it meets the queries: N d^2 operations instead of N^2 d, and no notion of position.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from ._common import check_heads


def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Kernel attention `o_i = phi(q_i) (sum_j phi(k_j) v_j^T) / (phi(q_i) . sum_j phi(k_j) + eps)`.

    Sums run in float32 (float64 for float64 input), with autocast off.

    Args:
        q: Queries (B, heads, N, d).
        k: Keys (B, heads, M, d).
        v: Values (B, heads, M, e).
        eps: Added to the denominator.

    Returns:
        (B, heads, N, e) in the dtype of `v`.
    """
    if not torch.jit.is_scripting() and q.device.type != 'meta':
        with torch.autocast(device_type=q.device.type, enabled=False):
            return _linear_attention(q, k, v, eps)
    return _linear_attention(q, k, v, eps)


def _linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    out_dtype = v.dtype
    if out_dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    q, k = F.elu(q) + 1, F.elu(k) + 1
    denominator = q @ k.sum(dim=-2).unsqueeze(-1) + eps
    return ((q @ (k.transpose(-2, -1) @ v)) / denominator).to(out_dtype)


class LinearAttention(nn.Module):
    """Multi-head plain kernel attention over all positions of a map, linear in H W.

    Paper: arXiv 2006.16236.
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
        x = linear_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))
