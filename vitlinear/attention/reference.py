"""Every mechanism once more, in its textbook form: what the fast ones are tested against.

All form their weights in full, N x N or by window, and are meant for float64 and small maps. Unless they say otherwise
they take (B, heads, N, d) tensors.
"""
import math
from typing import Optional

import torch


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`softmax(q k^T / sqrt(d)) v`."""
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Kernel attention with phi(u) = elu(u) + 1, arXiv 2006.16236."""
    weights = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).transpose(-2, -1)
    return weights @ v / (weights.sum(dim=-1, keepdim=True) + eps)


def vicinity_kernel(H: int, W: int, locality: str = '2d', dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(H W, H W) positional part of the vicinity weights, row-major positions."""
    def difference(n):
        angle = torch.arange(n, dtype=dtype) * (math.pi / 2 / n)
        return (angle[:, None] - angle[None, :]).cos()

    if locality == 'none':
        return torch.ones(H * W, H * W, dtype=dtype)
    if locality == '1d':
        return difference(H * W)
    rows = difference(H).repeat_interleave(W, 0).repeat_interleave(W, 1)
    columns = difference(W).repeat(H, H)
    return rows * columns if locality == '2d_product' else rows + columns


def vicinity_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        H: int,
        W: int,
        locality: str = '2d',
        eps: float = 1e-4,
) -> torch.Tensor:
    """Vicinity attention without the clamps, arXiv 2206.10552."""
    weights = (q @ k.transpose(-2, -1)) * vicinity_kernel(H, W, locality, q.dtype).to(q.device)
    return weights @ v / (weights.sum(dim=-1, keepdim=True) + eps)


def qna_attention(
        score: torch.Tensor,
        v: torch.Tensor,
        rel_pos_bias: torch.Tensor,
        attn_scale: Optional[torch.Tensor] = None,
        stride: int = 1,
) -> torch.Tensor:
    """Learned-query attention over unfolded windows, arXiv 2112.11435; arguments as for `qna.qna_attention`."""
    B, H, W, L, heads = score.shape
    d, k = v.shape[3], rel_pos_bias.shape[-1]

    def unfold(x):  # (B, H, W, C) to (B, C, k * k, outputs)
        x = torch.nn.functional.unfold(x.permute(0, 3, 1, 2), k, padding=k // 2, stride=stride)
        return x.unflatten(1, (-1, k * k))

    inside = unfold(torch.ones_like(v[:1, :, :, 0, :1]))[0, 0]  # (k * k, outputs)
    scores = unfold(score.flatten(3)).unflatten(1, (L, heads)) + rel_pos_bias.reshape(L, heads, k * k, 1)
    weights = scores.masked_fill(inside == 0, -math.inf).softmax(dim=3)
    if attn_scale is not None:
        weights = weights * attn_scale.reshape(L, heads, k * k, 1)
    out = torch.einsum('blato,bdato->boda', weights, unfold(v.flatten(3)).unflatten(1, (d, heads)))
    return out.unflatten(1, (-1, (W - 1) // stride + 1))
