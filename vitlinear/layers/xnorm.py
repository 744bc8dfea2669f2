"""XNorm attention as a layer, over all positions of a map and of a class token."""
from typing import Optional, Tuple

import torch
import torch.nn as nn

from ..ops._common import band_rows, check_heads, inverse_norm, is_plain, linear, pointwise, use_bands
from ..ops.xnorm import BAND, EPS, FOLD_FROM, _check_kv_axis, _normalise_sum, xnorm_attention


def _attn_dim(dim: int, num_heads: int, attn_dim: Optional[int], attn_ratio: float) -> Tuple[int, int]:
    """Channels of queries, keys and values, and of one head."""
    if attn_dim is not None:
        return attn_dim, check_heads(attn_dim, num_heads, 'attn_dim')
    attn_dim = int(dim * attn_ratio)
    name = 'dim' if attn_ratio == 1. else f'dim * attn_ratio = {dim} * {attn_ratio}'
    return attn_dim, check_heads(attn_dim, num_heads, name)


@torch.no_grad()
def _fold_scales(attn: nn.Module) -> None:
    if attn.gamma_q is not None and attn.gamma_kv is not None and is_plain(attn.proj):
        weight = attn.proj.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = (attn.gamma_q.to(wide) * attn.gamma_kv.to(wide)).repeat_interleave(attn.head_dim)
        attn.proj.weight = nn.Parameter((weight * scale).to(weight.dtype), weight.requires_grad)
        attn.gamma_q = attn.gamma_kv = None


class XNormAttention(nn.Module):
    """Multi-head XNorm attention over all positions of a map, linear in H W.

    Paper: arXiv 2205.13805. Permuting the positions permutes the output: where a position lies has to be told by other
    parts of a network.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            attn_dim: Optional[int] = None,
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
        _check_kv_axis(kv_axis)
        self.num_heads = num_heads
        self.attn_dim, self.head_dim = _attn_dim(dim, num_heads, attn_dim, attn_ratio)
        self.kv_axis = kv_axis
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **dd)
        self.gamma_q = nn.Parameter(torch.empty(num_heads, **dd))
        self.gamma_kv = nn.Parameter(torch.empty(num_heads, **dd))
        self.proj = nn.Linear(self.attn_dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop > 0. else nn.Identity()
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Set both scales of each head to 1."""
        nn.init.ones_(self.gamma_q)
        nn.init.ones_(self.gamma_kv)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Multiply both scales of each head into the output projection. The state dict is another then."""
        _fold_scales(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        if not torch.jit.is_scripting():
            if use_bands(x):
                return self.in_bands(x)
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, _ = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = xnorm_attention(q, k, v, self.gamma_q, self.gamma_kv, self.kv_axis)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, H, W, self.attn_dim)))

    @torch.jit.unused
    def in_bands(
            self,
            x: torch.Tensor,
            norm: Optional[nn.Module] = None,
            out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """`forward(x)`, or `x + forward(norm(x))`, for some images or some rows at a time, for inference.

        Args:
            x: Map (B, H, W, C).
            norm: Norm in front of the layer, with which the map itself is added to the result.
            out: Where the result may be put, `x` itself with a norm, or None.
        """
        if not is_plain(self.qkv) or not is_plain(self.proj) or torch.is_autocast_enabled('cpu'):
            return self._forward(x) if norm is None else x + self._forward(norm(x))
        B, H, W, C = x.shape
        width = max(C, 3 * self.attn_dim)
        wide = torch.promote_types(x.dtype, torch.float32)
        if H * W < FOLD_FROM:
            images = max(1, BAND // (H * W * width))
            for b in range(0, B, images):
                band = x[b:b + images]
                q, k, v = self._project(band if norm is None else norm(band)).unflatten(0, (-1, H * W)).permute(
                    2, 0, 3, 1, 4).to(wide)
                kv = self._normalised(k.transpose(-2, -1) @ v, H * W)
                y = (q * inverse_norm(q, -1, EPS)) @ kv
                y = y.transpose(1, 2).flatten(2).to(x.dtype)
                y = pointwise(y, self.proj).unflatten(1, (H, W))
                out = self._write(out, x, band, y, norm is not None, slice(b, b + images), slice(None))
            return out

        # XN(K^T V) times the output projection is one matrix for each image: only the normalised queries outlive a band
        rows = band_rows(H, W * width, BAND)
        queries = x.new_empty(H, W, self.attn_dim)
        weight = self.proj.weight.to(wide).unflatten(1, (self.num_heads, -1)).permute(1, 2, 0)  # (heads, e, C)
        for b in range(B):
            kv = x.new_zeros(self.num_heads, self.head_dim, self.head_dim, dtype=wide)
            for i in range(0, H, rows):
                band = x[b, i:i + rows]
                # each (positions, heads, d)
                q, k, v = self._project(band if norm is None else norm(band)).to(wide).unbind(1)
                kv.baddbmm_(k.permute(1, 2, 0), v.transpose(0, 1))
                torch.mul(q, inverse_norm(q, -1, EPS), out=queries[i:i + rows].view_as(q))
            folded = (self._normalised(kv, H * W) @ weight).flatten(0, 1).t().to(x.dtype).contiguous()
            for i in range(0, H, rows):
                y = linear(queries[i:i + rows], folded, self.proj.bias)
                out = self._write(out, x, x[b, i:i + rows], y, norm is not None, b, slice(i, i + rows))
        return out

    @torch.jit.unused
    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values (positions, 3, heads, d)."""
        qkv = pointwise(x.flatten(0, -2), self.qkv)
        return qkv.unflatten(1, (3, self.num_heads, self.head_dim))

    @torch.jit.unused
    def _normalised(self, kv: torch.Tensor, num_keys: int) -> torch.Tensor:
        return _normalise_sum(kv, num_keys, self.gamma_q, self.gamma_kv, self.kv_axis, EPS)

    @torch.jit.unused
    def _write(self, out: Optional[torch.Tensor], x, band, y, add: bool, images, rows) -> torch.Tensor:
        """Put a band of the result, or of its sum with the map, where it belongs."""
        y = self.proj_drop(y)
        if out is None:
            out = y.new_empty(x.shape, dtype=torch.result_type(x, y) if add else y.dtype)
        if add:
            torch.add(band, y, out=out[images, rows])
        else:
            out[images, rows] = y
        return out


class XNormClassAttention(nn.Module):
    """XNorm attention of a class token to itself and all positions.

    That this layer has XNorm in place of softmax is documented for UFO-ViT, arXiv 2109.14382; that the class token
    alone is updated is inherited from CaiT, arXiv 2103.17239.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            attn_dim: Optional[int] = None,
            attn_ratio: float = 1.,
            qkv_bias: bool = True,
            kv_axis: str = 'key',
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        """As for `XNormAttention`."""
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        _check_kv_axis(kv_axis)
        self.num_heads = num_heads
        self.attn_dim, self.head_dim = _attn_dim(dim, num_heads, attn_dim, attn_ratio)
        self.kv_axis = kv_axis
        self.q = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * self.attn_dim, bias=qkv_bias, **dd)
        self.gamma_q = nn.Parameter(torch.empty(num_heads, **dd))
        self.gamma_kv = nn.Parameter(torch.empty(num_heads, **dd))
        self.proj = nn.Linear(self.attn_dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop > 0. else nn.Identity()
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Set both scales of each head to 1."""
        nn.init.ones_(self.gamma_q)
        nn.init.ones_(self.gamma_kv)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Multiply both scales of each head into the output projection. The state dict is another then."""
        _fold_scales(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class token and positions (B, 1 + N, C) to the class token's (B, 1, C)."""
        B, N, _ = x.shape
        q = self.q(x[:, :1]).reshape(B, 1, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).reshape(B, N, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = xnorm_attention(q, k, v, self.gamma_q, self.gamma_kv, self.kv_axis)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, 1, self.attn_dim)))
