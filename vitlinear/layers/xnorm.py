"""XNorm attention as a layer, over all positions of a map and of a class token."""
import torch
from torch import nn

from ..ops import split_heads, xnorm_attention
from ..ops._numerics import check_choice
from ..ops.xnorm import KV_AXES
from ._common import check_heads, merge_heads


class _XNorm(nn.Module):
    """Heads, scales and output projection of both layers."""

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            attn_dim: int | None = None,
            attn_ratio: float = 1.,
            qkv_bias: bool = True,
            kv_axis: str = 'key',
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            attn_dim: Channels of queries, keys and values each ('embed' in the paper's tables, where it is below
                `dim`), `dim * attn_ratio` by default.
            attn_ratio: These over `dim`, where `attn_dim` is not given.
            qkv_bias: Bias of the query, key and value projections.
            kv_axis: Axis of the norm of the products of keys and values, see `xnorm_attention`.
            proj_drop: Dropout after the output projection.

        Raises:
            ValueError: The channels are not divisible by `num_heads`, or `kv_axis` is unknown.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_choice('kv_axis', kv_axis, KV_AXES)
        name = 'attn_dim'
        if attn_dim is None:
            attn_dim = int(dim * attn_ratio)
            name = 'dim' if attn_ratio == 1. else f'dim * attn_ratio = {dim} * {attn_ratio}'
        self.num_heads = num_heads
        self.attn_dim, self.head_dim = attn_dim, check_heads(attn_dim, num_heads, name)
        self.kv_axis = kv_axis
        self._make_projections(dim, qkv_bias, **dd)
        self.gamma_q = nn.Parameter(torch.empty(num_heads, **dd))
        self.gamma_kv = nn.Parameter(torch.empty(num_heads, **dd))
        self.proj = nn.Linear(self.attn_dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop > 0. else nn.Identity()
        self.reset_parameters()

    def _make_projections(self, dim: int, bias: bool, device=None, dtype=None) -> None:
        raise NotImplementedError

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Set both scales of each head to 1."""
        nn.init.ones_(self.gamma_q)
        nn.init.ones_(self.gamma_kv)

    @torch.jit.ignore
    @torch.no_grad()
    def reparameterize(self) -> None:
        """Multiply both scales of each head into the output projection. The state dict is another then."""
        if self.gamma_q is not None and self.gamma_kv is not None and type(self.proj) is nn.Linear:
            weight = self.proj.weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            scale = (self.gamma_q.to(dtype) * self.gamma_kv.to(dtype)).repeat_interleave(self.head_dim)
            self.proj.weight = nn.Parameter((weight * scale).to(weight.dtype), weight.requires_grad)
            self.gamma_q = self.gamma_kv = None


class XNormAttention(_XNorm):
    """Multi-head XNorm attention over all positions of a map, linear in H W.

    Paper: arXiv 2205.13805. Permuting the positions permutes the output: where a position lies has to be told by other
    parts of a network.
    """

    def _make_projections(self, dim: int, bias: bool, device=None, dtype=None) -> None:
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        y = merge_heads(xnorm_attention(q, k, v, self.gamma_q, self.gamma_kv, self.kv_axis))
        return self.proj_drop(self.proj(y.unflatten(1, x.shape[1:3])))


class XNormClassAttention(_XNorm):
    """XNorm attention of a class token to itself and all positions.

    That this layer has XNorm in place of softmax is documented for UFO-ViT, arXiv 2109.14382; that the class token
    alone is updated is inherited from CaiT, arXiv 2103.17239.
    """

    def _make_projections(self, dim: int, bias: bool, device=None, dtype=None) -> None:
        self.q = nn.Linear(dim, self.attn_dim, bias=bias, device=device, dtype=dtype)
        self.kv = nn.Linear(dim, 2 * self.attn_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class token and positions (B, 1 + N, C) to the class token's (B, 1, C)."""
        q = split_heads(self.q(x[:, :1]), 1, self.num_heads)[0]
        k, v = split_heads(self.kv(x), 2, self.num_heads)
        y = merge_heads(xnorm_attention(q, k, v, self.gamma_q, self.gamma_kv, self.kv_axis))
        return self.proj_drop(self.proj(y))
