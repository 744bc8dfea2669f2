"""Vicinity attention as a layer: reduced projections, the channel gate (FPC) and the kernel of `ops.vicinity`."""
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops._common import band_rows, call_linear, check_heads, is_plain, merge_heads, pointwise, split_heads, use_bands
from ..ops.vicinity import (
    BAND, CLAMP_MAX, CLAMP_MIN, _check_options, _clamp_magnitude_, _normalise_, _position_features, _sum_keys, _table,
    _weighted, clamp_magnitude, vicinity_attention)


class FeaturePreservingConnection(nn.Module):
    """Channel gate from the mean of the unreduced map (squeeze and excitation without biases)."""

    def __init__(
            self,
            dim: int,
            reduction: int = 1,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = nn.Linear(dim, dim // reduction, bias=False, **dd)
        self.fc2 = nn.Linear(dim // reduction, dim, bias=False, **dd)

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        """Means over the map to gates in (0, 1), any shape that ends in C."""
        return self.fc2(F.relu(self.fc1(mean))).sigmoid()


class VicinityAttention(nn.Module):
    """Vicinity attention block: reduced projections, vicinity kernel, feature preserving connection.

    Paper: arXiv 2206.10552; evaluated as in the authors' released code.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 1,
            feature_reduction: int = 2,
            fpc_reduction: int = 1,
            locality: str = '2d',
            clamp: bool = True,
            eps: float = 1e-4,
            impl: str = 'auto',
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            feature_reduction: Queries, keys and values have `dim / feature_reduction` channels (FRA in the paper).
            fpc_reduction: Hidden reduction of the channel gate (FPC in the paper).
            locality: Positional kernel, see `vicinity_attention`: '2d', '2d_product', '1d' or 'none'.
            clamp: Clamp magnitudes as the released weights were trained, see `vicinity_attention`.
            eps: Added to the denominator.
            impl: Order of evaluation: 'auto', 'separable' or 'features'.

        Raises:
            ValueError: `dim` does not divide as asked, or `locality` or `impl` is unknown.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if feature_reduction < 1 or dim % feature_reduction:
            raise ValueError(f'dim={dim} must be a multiple of feature_reduction={feature_reduction}.')
        if fpc_reduction < 1 or dim // fpc_reduction < 1:
            raise ValueError(f'fpc_reduction={fpc_reduction} must lie between 1 and dim={dim}.')
        _check_options(locality, impl)
        self.reduced_dim = dim // feature_reduction
        check_heads(self.reduced_dim, num_heads, f'dim / feature_reduction = {dim} / {feature_reduction}')
        self.num_heads = num_heads
        self.locality = locality
        self.clamp = clamp
        self.eps = eps
        self.impl = impl

        self.qkv = nn.Linear(dim, 3 * self.reduced_dim, **dd)
        self.proj = nn.Linear(self.reduced_dim, dim, **dd)
        self.fpc = FeaturePreservingConnection(dim, fpc_reduction, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        if not torch.jit.is_scripting():
            if use_bands(x):
                return self.in_bands(x)
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            qkv = self.qkv(x)
        else:
            qkv = call_linear(self.qkv, x)
        qk, v = qkv.split([2 * self.reduced_dim, self.reduced_dim], dim=-1)
        q, k = F.relu(qk).chunk(2, dim=-1)
        q, k, v = split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads)
        out = merge_heads(vicinity_attention(q, k, v, self.locality, self.clamp, self.eps, self.impl))
        if torch.jit.is_scripting():
            out = self.proj(out)
        else:
            out = call_linear(self.proj, out)
        return self._gate(out, 1 + self.fpc(x.mean(dim=(1, 2), keepdim=True)))

    def _gate(self, x: torch.Tensor, gate: torch.Tensor, upper: float = CLAMP_MAX) -> torch.Tensor:
        if not self.clamp:
            return x * gate
        # after the gate only the upper bound can be met: |x| >= 1e-4 or x = 0 before, and the gate exceeds 1
        return (clamp_magnitude(x) * gate).clamp(-upper, upper)

    @torch.jit.unused
    def _positions_last(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of positions (B, N, C), as (B, 3, heads, d, N)."""
        if x.dtype == torch.bfloat16:  # oneDNN has this product
            x, weight = x.transpose(1, 2), self.qkv.weight.expand(len(x), -1, -1)
            x = torch.baddbmm(self.qkv.bias.unsqueeze(1), weight, x)
        else:
            x = pointwise(x, self.qkv).transpose(1, 2).contiguous()
        return x.unflatten(1, [3, self.num_heads, -1])

    @torch.jit.unused
    def in_bands(
            self,
            x: torch.Tensor,
            norm: Optional[nn.Module] = None,
            out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """`forward(x)`, or `x + forward(norm(x))`, for some images or some rows at a time, for inference.

        Bands are taken twice, for keys and values and for queries: only queries and the sums over keys live across
        them. Projections are evaluated with positions last, as the core wants.

        Args:
            x: Map (B, H, W, C).
            norm: Norm in front of the layer, with which the map itself is added to the result.
            out: Where the result may be put, `x` itself with a norm, or None.
        """
        if self.impl != 'auto' or not (is_plain(self.qkv) and is_plain(self.proj)):
            y = self._forward(x if norm is None else norm(x))
            return y if norm is None else torch.add(x, y, out=out)

        B, H, W, C = x.shape
        N = H * W
        images, rows = max(1, BAND // (N * C)), band_rows(H, W * C, BAND)
        bands = [(slice(i, i + rows), slice(i * W, (i + rows) * W)) for i in range(0, H, rows)]  # rows, positions
        for b in range(0, B, images):
            group, size = slice(b, b + images), min(images, B - b)
            kv = mean = queries = None
            for band, where in bands:
                y = x[group, band].flatten(1, 2)
                if norm is not None:
                    y = norm(y)
                wide = torch.promote_types(y.dtype, torch.float32)
                band_mean = y.sum(dim=1, dtype=wide).div_(N)
                y = self._positions_last(y)  # (size, 3, heads, d, positions)
                if queries is None:
                    # bfloat16 has the range that sums over positions need; products of it are summed in float32
                    product = torch.bfloat16 if y.dtype == torch.bfloat16 else wide
                    features = _table(_position_features, y.new_empty(0, dtype=wide), H, W, self.locality).to(product)
                    queries = y[:, 0] if len(bands) == 1 else y.new_empty(size, *y.shape[2:-1], N)
                F.relu_(y[:, :2])
                if len(bands) > 1:
                    queries[..., where] = y[:, 0]
                k, v = y[:, 1].to(product), y[:, 2].to(product)
                with torch.autocast(device_type=x.device.type, enabled=False):
                    band_kv = _sum_keys(k, v, features[..., where]).to(wide)
                kv, mean = (band_kv, band_mean) if kv is None else (kv.add_(band_kv), mean.add_(band_mean))
            if self.clamp:
                _clamp_magnitude_(kv[..., :-1])  # the authors leave the sums of the denominator as they are
            kv = kv.to(product).transpose(-2, -1)
            gate = (1 + self.fpc(mean.to(x.dtype))).view(size, 1, 1, C).to(queries.dtype)
            for band, where in bands:
                q = queries[..., where].to(product)
                with torch.autocast(device_type=x.device.type, enabled=False):
                    y = (kv @ _weighted(q, features[..., where])).to(wide)
                y = _normalise_(y[:, :, :-1], y[:, :, -1:], self.clamp, self.eps).to(queries.dtype)
                y = pointwise(y.permute(0, 3, 1, 2).flatten(2), self.proj).unflatten(1, [-1, W])
                band_gate = gate
                if self.clamp:
                    # the upper bound is met after the gate, which exceeds 1, as well
                    band_gate = y.sign().mul_(gate)
                    y.abs_().clamp_(min=CLAMP_MIN)
                    torch.minimum(y, CLAMP_MAX / gate, out=y)
                if out is None:
                    out = y.new_empty(x.shape, dtype=y.dtype if norm is None else torch.result_type(x, y))
                if norm is None:
                    torch.mul(y, band_gate, out=out[group, band])
                else:
                    torch.addcmul(x[group, band], y, band_gate, out=out[group, band])
        return out
