"""Softmax attention, for the layers that stand beside linear ones."""
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._dispatch import is_transformed


def softmax_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None = None,
        dropout_p: float = 0.,
) -> torch.Tensor:
    """`softmax(q k^T / sqrt(d) + bias) v` by PyTorch's fused attention.

    Under torch.func and forward-mode differentiation, whose rules the fused kernels lack, in plain operations. Cost:
    2 N M (d + e) operations a head.

    Args:
        q: Queries (B, heads, N, d).
        k: Keys (B, heads, M, d).
        v: Values (B, heads, M, e).
        bias: Added to the scores, of a shape that expands to (B, heads, N, M).
        dropout_p: Share of the weights to drop.

    Returns:
        (B, heads, N, e).
    """
    if not torch.jit.is_scripting():
        if is_transformed():
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p)
