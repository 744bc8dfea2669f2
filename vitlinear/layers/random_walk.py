"""Attention by random walks as a layer."""
import math
from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..ops._common import band_rows, call_linear, check_heads, is_eager, is_plain, linear, use_bands
from ..ops.random_walk import (
    BAND, BANDS_FROM, DOUBLINGS, FEATURES, KEPT, MAX_BETA, MAX_TEMPERATURE, MIN_DEGREE, MIN_TEMPERATURE,
    _at_least_float32, _check_options, _enough_doublings, _features, _signed_series, _walks, random_walk_attention)


class RandomWalkAttention(nn.Module):
    """Multi-head attention by random walks over all positions of a map, linear in H W.

    Ours, after the abstract of https://openreview.net/forum?id=LTvSyvRaJO: see the top of this file. Inference on a CPU
    takes large maps in bands of rows.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            mode: str = 'spectral',
            features: Optional[str] = None,
            init_temperature: float = 4.,
            init_beta: float = 0.107,
            shared_anchors: bool = False,
            qkv_bias: bool = True,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            mode: 'spectral' or 'walk', see `random_walk_attention`.
            features: 'signed' of 'spectral', 'softmax' (by default) or 'elu' of a walk.
            init_temperature: Where the temperature of softmax features starts, learned for each head within 0.5 to 16.
            init_beta: Where beta starts, learned for each head between 0 and 0.9; at 0 it stays there, and attention is
                one step.
            shared_anchors: Whether queries and keys are one projection, so that a step between two positions has the
                same edge in both directions.
            qkv_bias: Bias of the query, key and value projections.

        Raises:
            ValueError: `dim` is not divisible by `num_heads`, or another argument is unknown or out of range.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if features is None:
            features = FEATURES.get(mode, ('',))[0]
        _check_options(mode, features, DOUBLINGS)
        if not MIN_TEMPERATURE <= init_temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f'init_temperature={init_temperature} must lie between {MIN_TEMPERATURE} and {MAX_TEMPERATURE}.')
        if not 0 <= init_beta < MAX_BETA:
            raise ValueError(f'init_beta={init_beta} must be 0, or lie between 0 and {MAX_BETA}.')
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.mode = mode
        self.features = features
        self.init_temperature = init_temperature
        self.init_beta = init_beta
        self.shared_anchors = shared_anchors
        self.qkv = nn.Linear(dim, (2 if shared_anchors else 3) * dim, bias=qkv_bias, **dd)
        self.log_temperature = nn.Parameter(torch.empty(num_heads, **dd)) if features == 'softmax' else None
        self.theta = nn.Parameter(torch.empty(num_heads, **dd)) if init_beta > 0 else None
        self.register_buffer('fixed_beta', None)
        self.register_buffer('fixed_temperature', None)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Initialise temperatures and betas."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self.init_temperature))
        if self.theta is not None:
            nn.init.constant_(self.theta, math.log(self.init_beta / (MAX_BETA - self.init_beta)))

    def beta(self, max_beta: float = MAX_BETA) -> Optional[torch.Tensor]:
        """Probability (num_heads,) to return, in float32 at least, None where it is 0 for good."""
        theta = self.theta
        if theta is None:
            return self.fixed_beta
        return _at_least_float32(theta).sigmoid() * max_beta

    def temperature(
            self,
            least: float = math.log(MIN_TEMPERATURE),
            most: float = math.log(MAX_TEMPERATURE),
    ) -> Optional[torch.Tensor]:
        """Temperature (num_heads,) of softmax features, in float32 at least, None for others."""
        log_temperature = self.log_temperature
        if log_temperature is None:
            return self.fixed_temperature
        return _at_least_float32(log_temperature).clamp(least, most).exp()

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Put the probabilities and temperatures in the place of what they are computed from, for inference.

        The state dict is another then.
        """
        beta, temperature = self.beta(), self.temperature()
        self.fixed_beta = None if beta is None else beta.detach()
        self.fixed_temperature = None if temperature is None else temperature.detach()
        self.theta = self.log_temperature = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        if not torch.jit.is_scripting():
            if use_bands(x):
                return self.in_bands(x)
        return self._forward(x)

    def _forward(self, x: torch.Tensor, doublings: int = DOUBLINGS) -> torch.Tensor:
        B, H, W, C = x.shape
        if torch.jit.is_scripting():
            qkv = self.qkv(x)
        else:
            qkv = call_linear(self.qkv, x)
        qkv = qkv.reshape(B, H * W, -1, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = qkv[0], qkv[-2], qkv[-1]
        beta = self.beta()
        if not torch.jit.is_scripting():
            # where reading betas waits for nothing; on small maps the whole series takes longer than the sums
            if self.training and x.device.type == 'cpu' and is_eager():
                if beta is not None and beta.dtype == torch.float32:
                    doublings = _enough_doublings(beta)
        x = random_walk_attention(q, k, v, beta, self.temperature(), self.mode, self.features, doublings)
        x = x.transpose(1, 2).reshape(B, H, W, C)
        if torch.jit.is_scripting():
            return self.proj(x)
        else:
            return call_linear(self.proj, x)

    @torch.jit.unused
    def in_bands(
            self,
            x: torch.Tensor,
            norm: Optional[nn.Module] = None,
            out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """`forward(x)`, or `x + forward(norm(x))`, for inference: large maps by image and in bands of rows.

        Args:
            x: Map (B, H, W, C).
            norm: Norm in front of the layer, with which the map itself is added to the result.
            out: Where the result may be put, `x` itself with a norm, or None.
        """
        if not (is_plain(self.qkv) and is_plain(self.proj)) or x.shape[1] * x.shape[2] < BANDS_FROM:
            return self._forward(x) if norm is None else x + self._forward(norm(x))
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
        if out is None or not out.is_contiguous():
            out = x.new_empty(x.shape, dtype=dtype if norm is None else torch.promote_types(x.dtype, dtype))
        for image, image_out in zip(x, out):
            self._image_in_bands(image, norm, dtype, image_out)
        return out

    @torch.jit.unused
    def _image_in_bands(
            self,
            x: torch.Tensor,
            norm: Optional[nn.Module],
            dtype: torch.dtype,
            out: torch.Tensor,
    ) -> None:
        """(H, W, C) into (H, W, C): passes over bands for the sums over tokens, and one for outputs."""
        H, W, C = x.shape
        heads, r = self.num_heads, self.head_dim
        rows = band_rows(H, 3 * W * C, BAND)
        bands = [x[i:i + rows].reshape(-1, C) for i in range(0, H, rows)]
        with torch.autocast('cpu', enabled=False):
            queries = x.new_empty(H * W, C, dtype=dtype)  # one block: many small ones would stay with the allocator
            band_queries = queries.split(rows * W)
            sums = self._walk_sums if self.mode == 'walk' else self._signed_sums
            y = sums(bands, norm, band_queries, H * W)
            # what is left sums over features, not over positions, so that half precision will do; one product for both
            proj = self.proj.weight.to(y.dtype).unflatten(1, (heads, r)).permute(1, 2, 0)
            proj = (y @ proj).flatten(0, 1).t().to(dtype).contiguous()
            bias = None if self.proj.bias is None else self.proj.bias.to(dtype)
            for band, q, band_out in zip(bands, band_queries, out.flatten(0, 1).split(rows * W)):
                z = linear(q, proj, bias)
                if norm is None:
                    band_out.copy_(z)
                else:
                    torch.add(band, z, out=band_out)

    @torch.jit.unused
    def _walk_sums(
            self,
            bands: Sequence[torch.Tensor],
            norm: Optional[nn.Module],
            queries: Sequence[torch.Tensor],
            N: int,
    ) -> torch.Tensor:
        """What queries meet (heads, r, e): features and means, then the sums. Puts queries (n, C) into `queries`."""
        C, heads, r, dtype = self.qkv.in_features, self.num_heads, self.head_dim, queries[0].dtype
        weight, bias = self.qkv.weight.to(dtype), self.qkv.bias
        qk_bias, v_bias = (None, None) if bias is None else (bias[:-C].to(dtype), bias[-C:].to(dtype))
        beta, temperature = self.beta(), self.temperature()
        temperature = None if temperature is None else temperature.unsqueeze(1)

        def project(band: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
            band = (band if norm is None else norm(band)).to(dtype)
            p = linear(band, weight[:-C], qk_bias).view(len(band), -1, heads, r)
            p = _features(_at_least_float32(p), temperature).expand(-1, 2, -1, -1)
            return p, linear(band, weight[-C:], v_bias)

        parts, mean = [], 0
        for band in bands:
            part = project(band)
            mean = mean + part[0].sum(dim=0) / N
            parts.append(part if 2 * N * C <= KEPT else None)

        other = mean.flip(0).clamp_min_(1e-30)  # each kind of node is weighed by the mean of the other
        grams = mean.new_zeros(2 * heads, r, r)
        y = mean.new_zeros(heads, r, r)
        for i, part in enumerate(parts):
            p, v = project(bands[i]) if part is None else part
            v = _at_least_float32(v).view(-1, heads, r)
            y.baddbmm_(p[:, 1].permute(1, 2, 0), v.transpose(0, 1))
            kinds = 1 if beta is None else 2
            edges = p[:, :kinds] * other[:kinds]
            inverse = edges.sum(dim=-1, keepdim=True).clamp_min_(MIN_DEGREE).reciprocal_()
            if beta is not None:
                weighted = p * inverse
                grams.baddbmm_(p.flatten(1, 2).permute(1, 2, 0), weighted.flatten(1, 2).transpose(0, 1))
            # a distribution over anchors, which take means of values below: both within the range of float16
            torch.mul(edges[:, 0], inverse[:, 0], out=queries[i].view(-1, heads, r))
            parts[i] = None
        y /= N
        if beta is not None:
            beta = beta.reshape(-1, 1, 1)
            h_q, h_k = (grams / N).chunk(2)
            y = _walks(((beta * h_k) @ h_q).unsqueeze(0), y.unsqueeze(0), beta, DOUBLINGS).squeeze(0)
        return y / other[0].unsqueeze(-1)

    @torch.jit.unused
    def _signed_sums(
            self,
            bands: Sequence[torch.Tensor],
            norm: Optional[nn.Module],
            queries: Sequence[torch.Tensor],
            N: int,
    ) -> torch.Tensor:
        """The same of 'spectral', whose weights need no means: one pass."""
        heads, r, dtype = self.num_heads, self.head_dim, queries[0].dtype
        weight, bias = self.qkv.weight.to(dtype), self.qkv.bias
        bias = None if bias is None else bias.to(dtype)
        grams, y = 0, 0
        for band, band_queries in zip(bands, queries):
            qkv = linear((band if norm is None else norm(band)).to(dtype), weight, bias).view(len(band), -1, heads, r)
            band_queries.view(-1, heads, r).copy_(qkv[:, 0])
            qkv = _at_least_float32(qkv).permute(1, 2, 0, 3)
            q, k, v = qkv[0], qkv[-2], qkv[-1]
            grams = grams + torch.cat([q.transpose(1, 2) @ q, k.transpose(1, 2) @ k])
            y = y + k.transpose(1, 2) @ v
        g_q, g_k = (grams / N).chunk(2)
        return _signed_series(g_q, g_k, y, self.beta(), N * N, DOUBLINGS)
