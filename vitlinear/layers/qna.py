"""Learned-query local attention as a layer, its folded form for inference, and upsampling with it."""
from typing import Callable, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops._common import (
    InferenceCache, band_rows, check_heads, init_lecun_, is_plain, linear, one_ahead, pointwise, use_bands)
from ..ops.qna import (
    BAND, _at_least_float32, _attend, _attend_to, _check_impl, _check_kernel_size, _unit_query, _window_kernel,
    qna_attention)


def _init_query(query: torch.Tensor, head_dim: int) -> None:
    nn.init.trunc_normal_(query, std=1., a=-2., b=2.)
    with torch.no_grad():
        query.mul_(head_dim ** -0.5)


class QnAAttention(nn.Module):
    """Learned-query local attention: queries shared by all positions, softmax over k x k windows.

    Linear in H W, and its memory does not depend on k. Paper: arXiv 2112.11435.

    The queries are folded into the key projection, and that is one matrix product with the value projection. Inference
    on a CPU keeps the folded weights, compares the weights they came from each time, and takes large maps in bands of
    rows. Layers that are not plain linear ones (adapters, hooks) are called as they are.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            kernel_size: int = 3,
            stride: int = 1,
            num_queries: int = 2,
            attn_dim: Optional[int] = None,
            out_dim: Optional[int] = None,
            qkv_bias: bool = False,
            proj_bias: bool = False,
            normalize_query: bool = True,
            attn_scale: str = 'learned',
            attn_scale_std: float = 0.02,
            impl: str = 'auto',
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            kernel_size: Side k of the windows, odd.
            stride: Of the windows: the output has ceil(H / stride) rows.
            num_queries: Learned queries L of each head, whose results are added.
            attn_dim: Channels of keys and values, `dim` by default.
            out_dim: Channels of the output, `attn_dim` by default.
            qkv_bias: Bias of the key and value projections.
            proj_bias: Bias of the output projection.
            normalize_query: Give the queries unit length.
            attn_scale: Scale of the taps after the softmax: 'learned', 'none' (1) or 'avg' (1 / L).
            attn_scale_std: Standard deviation of a new learned scale. The authors' value makes a new layer nearly
                silent; with 1 it starts like a convolution of random kernels.
            impl: Evaluation, see `qna_attention`.

        Raises:
            ValueError: `attn_dim` is not divisible by `num_heads`, or another argument is out of range.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        attn_dim = dim if attn_dim is None else attn_dim
        out_dim = attn_dim if out_dim is None else out_dim
        for name, value in (('dim', dim), ('stride', stride), ('num_queries', num_queries), ('out_dim', out_dim)):
            if value < 1:
                raise ValueError(f'{name}={value} must be positive.')
        _check_kernel_size(kernel_size)
        _check_impl(impl)
        if attn_scale not in ('learned', 'none', 'avg'):
            raise ValueError(f"Unknown attn_scale '{attn_scale}', expected one of learned, none, avg.")
        self.num_heads = num_heads
        self.head_dim = check_heads(attn_dim, num_heads, 'dim' if attn_dim == dim else 'attn_dim')
        self.kernel_size = kernel_size
        self.stride = stride
        self.num_queries = num_queries
        self.normalize_query = normalize_query
        self.attn_scale_std = attn_scale_std
        self.scale = 1. / num_queries if attn_scale == 'avg' else 1.
        self.impl = impl
        self.query = nn.Parameter(torch.empty(num_queries, attn_dim, **dd))
        self.k = nn.Linear(dim, attn_dim, bias=qkv_bias, **dd)
        self.v = nn.Linear(dim, attn_dim, bias=qkv_bias, **dd)
        taps = (num_queries * num_heads, 1, kernel_size, kernel_size)
        self.rel_pos_bias = nn.Parameter(torch.empty(taps, **dd))
        self.attn_scale = nn.Parameter(torch.empty(taps, **dd)) if attn_scale == 'learned' else None
        self.proj = nn.Linear(attn_dim, out_dim, bias=proj_bias, **dd)
        self._cache = InferenceCache()
        self.reset_parameters()
        for layer in (self.k, self.v, self.proj):
            init_lecun_(layer)

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Initialise queries, biases and scales as the authors do, the scales with the layer's standard deviation."""
        _init_query(self.query, self.head_dim)
        nn.init.zeros_(self.rel_pos_bias)
        if self.attn_scale is not None:
            nn.init.normal_(self.attn_scale, std=self.attn_scale_std)

    def train(self, mode: bool = True) -> 'QnAAttention':
        self._cache.clear()
        return super().train(mode)

    def fold(self, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weights of one projection to values, ones and scores, its bias, the window kernel, and the output's."""
        heads, d = self.num_heads, self.head_dim
        query = _unit_query(self.query, self.num_heads, self.normalize_query).transpose(0, 1)  # (heads, L, d)
        k = self.k.weight.to(query.dtype).reshape(heads, d, -1)
        v = self.v.weight.to(query.dtype).reshape(heads, d, -1)
        ones = query.new_zeros(heads, 1, k.shape[2])
        weight = torch.cat([v, ones, query @ k], dim=1).transpose(0, 1).reshape(-1, k.shape[2])

        ones = query.new_ones(heads, 1)
        v_bias = query.new_zeros(heads, d)
        score_bias = query.new_zeros(heads, self.num_queries)
        if self.v.bias is not None and self.k.bias is not None:
            v_bias = self.v.bias.to(query.dtype).reshape(heads, d)
            score_bias = (query @ self.k.bias.to(query.dtype).reshape(heads, d, 1)).squeeze(2)
        bias = torch.cat([v_bias, ones, score_bias], dim=1).t().reshape(-1)

        kernel = _window_kernel(self.rel_pos_bias, self.attn_scale, self.num_queries, d, self.scale)
        proj = self.proj.weight.reshape(-1, heads, d).transpose(1, 2).flatten(1)
        if dtype != torch.float16:
            kernel = kernel.to(dtype)  # a float16 one would lose the taps that matter where others lie outside the map
        return weight.to(dtype), bias.to(dtype), kernel, proj.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) to (B, ceil(H / stride), ceil(W / stride), out_dim)."""
        dtype = x.dtype
        if not torch.jit.is_scripting():
            if not self._is_plain():
                return self._by_layers(x)
            if use_bands(x):
                return self.in_bands(x)
            if x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
                with torch.autocast(device_type=x.device.type, enabled=False):
                    return self._forward(x.to(dtype), dtype)
        return self._forward(x, dtype)

    def _forward(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight, bias, kernel, proj = self.fold(dtype)
        x = _attend(
            F.linear(x, weight, bias), kernel, self.rel_pos_bias, self.attn_scale, self.num_queries, self.num_heads,
            self.stride, self.impl, self.scale)
        proj_bias = self.proj.bias
        return F.linear(x.flatten(3), proj, None if proj_bias is None else proj_bias.to(dtype))

    @torch.jit.unused
    def _is_plain(self) -> bool:
        return is_plain(self.k) and is_plain(self.v) and is_plain(self.proj)

    @torch.jit.unused
    def _by_layers(self, x: torch.Tensor) -> torch.Tensor:
        """Through the layers as they are, whatever they have become."""
        heads, d = self.num_heads, self.head_dim
        k, v = self.k(x).unflatten(3, (heads, d)), self.v(x).unflatten(3, (heads, d)).transpose(3, 4)
        with torch.autocast(device_type=x.device.type, enabled=False):
            query = _unit_query(self.query, heads, self.normalize_query)
            score = torch.einsum('bhwad,lad->bhwla', _at_least_float32(k), query)
        x = _attend_to(score, v, self.rel_pos_bias, self.attn_scale, self.stride, self.impl, self.scale)
        return self.proj(x.transpose(3, 4).flatten(3))

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
        if not self._is_plain():
            return self._by_layers(x) if norm is None else x + self._by_layers(norm(x))
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
        sources: List[torch.Tensor] = [
            p for p in (self.query, self.k.weight, self.k.bias, self.v.weight, self.v.bias, self.rel_pos_bias,
                        self.attn_scale, self.proj.weight) if p is not None]
        if self.training:
            weight, bias, kernel, proj = self.fold(dtype)
        else:
            weight, bias, kernel, proj = self._cache.get(sources, dtype, self.fold)
        proj_bias = None if self.proj.bias is None else self.proj.bias.to(dtype)

        with torch.autocast('cpu', enabled=False):
            return _in_bands(
                self, x, norm, kernel, lambda y: linear(y.to(dtype), weight, bias),
                lambda y: linear(y, proj, proj_bias), out)

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The layer with its queries folded into the projection for good, for inference: `FoldedQnAAttention`.

        Layers that are not plain linear ones (adapters, hooks) cannot be folded: the layer itself is returned then.
        """
        return FoldedQnAAttention(self) if self._is_plain() else self


@torch.jit.unused
def _in_bands(
        layer: nn.Module,
        x: torch.Tensor,
        norm: Optional[nn.Module],
        kernel: torch.Tensor,
        project: Callable[[torch.Tensor], torch.Tensor],
        output: Callable[[torch.Tensor], torch.Tensor],
        out: Optional[torch.Tensor],
) -> torch.Tensor:
    """Attention of `layer` to a map (B, H, W, C), or that of the normed map and the map itself, in bands of rows."""
    B, H, W, _ = x.shape
    s, p = layer.stride, layer.kernel_size // 2
    Ho, Wo = (H - 1) // s + 1, (W - 1) // s + 1
    row = W * s * kernel.shape[0] * kernel.element_size()
    images = max(1, BAND // (Ho * row))
    rows = band_rows(Ho, row, BAND, least=2 * p)

    def bands() -> Iterator[Tuple[Tuple[slice, slice], torch.Tensor, int, int]]:
        for b in range(0, B, images):
            for i in range(0, Ho, rows):
                # inside the map a band brings its own context, at its edge one row of windows too many is taken
                last = min(i + rows, Ho)
                inside = i * s >= p and (last - 1) * s + p < H
                skip = 0 if inside else min(i, -(-p // s))
                top = i * s - p if inside else (i - skip) * s
                band = x[b:b + images, top:(last - 1) * s + p + 1]
                where = slice(b, b + images), slice(i, last)
                yield where, band if norm is None else norm(band), skip, 0 if inside else p

    for where, band, skip, pad_rows in one_ahead(bands()) if out is x else bands():
        y = _attend(
            project(band), kernel, layer.rel_pos_bias, layer.attn_scale, layer.num_queries, layer.num_heads, s,
            layer.impl, layer.scale, pad_rows=pad_rows)
        i = where[1]
        y = output(y[:, skip:skip + i.stop - i.start].flatten(3))
        if norm is None:
            out = y.new_empty(B, Ho, Wo, y.shape[3]) if out is None else out
            out[where] = y
        else:
            out = x.new_empty(x.shape, dtype=torch.result_type(x, y)) if out is None else out
            torch.add(x[where], y, out=out[where])
    return out


class FoldedQnAAttention(nn.Module):
    """What `QnAAttention.fuse` makes of a layer: the same function, one projection to values, ones and scores.

    Its weights are those of the folded form, so that nothing is computed from them or compared in a call. The form of
    `QnAAttention` cannot be had back from them.
    """

    def __init__(self, attn: QnAAttention):
        super().__init__()
        self.num_heads = attn.num_heads
        self.kernel_size = attn.kernel_size
        self.stride = attn.stride
        self.num_queries = attn.num_queries
        self.scale = attn.scale
        self.impl = attn.impl
        weight, bias, kernel, proj = attn.fold(attn.proj.weight.dtype)
        self.joint = _linear(weight, bias)
        self.proj = _linear(proj, attn.proj.bias)
        self.register_buffer('kernel', kernel)
        self.register_buffer('rel_pos_bias', attn.rel_pos_bias.detach())
        self.register_buffer('attn_scale', None if attn.attn_scale is None else attn.attn_scale.detach())
        self.train(attn.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) to (B, ceil(H / stride), ceil(W / stride), out_dim)."""
        if not torch.jit.is_scripting():
            if use_bands(x):
                return self.in_bands(x)
            if x.device.type != 'meta':
                return self._forward(x)
        return self.proj(self._attend(self.joint(x)))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        return _attend(
            x, self.kernel, self.rel_pos_bias, self.attn_scale, self.num_queries, self.num_heads, self.stride,
            self.impl, self.scale).flatten(3)

    @torch.jit.unused
    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.joint(x)
        with torch.autocast(device_type=x.device.type, enabled=False):
            x = self._attend(x)
        return self.proj(x)

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
        if torch.is_autocast_enabled('cpu'):
            return self._forward(x) if norm is None else x + self._forward(norm(x))
        return _in_bands(
            self, x, norm, self.kernel, lambda y: pointwise(y, self.joint), lambda y: pointwise(y, self.proj), out)


def _linear(weight: torch.Tensor, bias: Optional[torch.Tensor]) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device='meta')
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer

class QnAUpsample(nn.Module):
    """Upsampling by learned-query local attention, (B, H, W, dim) to (B, r H, r W, out_dim). Ours.

    The paper (arXiv 2112.11435) says that the layer can upsample, the authors' code does not show how. Here each of
    the r x r positions that a position becomes has queries and relative biases of its own and attends to the k x k
    window around it; keys, values and the output projection are shared.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            scale_factor: int = 2,
            kernel_size: int = 3,
            out_dim: Optional[int] = None,
            qkv_bias: bool = False,
            proj_bias: bool = False,
            impl: str = 'auto',
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            scale_factor: Rows and columns r that each row and column becomes.
            kernel_size: Side k of the windows, odd.
            out_dim: Channels of the output, `dim` by default.
            qkv_bias: Bias of the key and value projections.
            proj_bias: Bias of the output projection.
            impl: Evaluation, see `qna_attention`.

        Raises:
            ValueError: `dim` is not divisible by `num_heads`, or another argument is out of range.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        out_dim = dim if out_dim is None else out_dim
        for name, value in (('scale_factor', scale_factor), ('out_dim', out_dim)):
            if value < 1:
                raise ValueError(f'{name}={value} must be positive.')
        _check_kernel_size(kernel_size)
        _check_impl(impl)
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.scale_factor = scale_factor
        self.impl = impl
        self.query = nn.Parameter(torch.empty(scale_factor ** 2, dim, **dd))
        self.k = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.rel_pos_bias = nn.Parameter(
            torch.empty(scale_factor ** 2 * num_heads, 1, kernel_size, kernel_size, **dd))
        self.proj = nn.Linear(dim, out_dim, bias=proj_bias, **dd)
        self.reset_parameters()
        for layer in (self.k, self.v, self.proj):
            init_lecun_(layer)

    def reset_parameters(self) -> None:
        """Initialise queries and biases as in `QnAAttention`."""
        _init_query(self.query, self.head_dim)
        nn.init.zeros_(self.rel_pos_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) to (B, r H, r W, out_dim)."""
        B, H, W, _ = x.shape
        r, heads, d = self.scale_factor, self.num_heads, self.head_dim
        k, v = self.k(x).unflatten(3, (heads, d)), self.v(x).unflatten(3, (heads, d)).transpose(3, 4)
        with torch.autocast(device_type=x.device.type, enabled=False):
            score = torch.einsum('bhwad,uad->bhwua', _at_least_float32(k), _unit_query(self.query, heads))
            # nothing is added over the queries, so each is a group of heads of its own over the same values
            x = qna_attention(
                score.flatten(3).unsqueeze(3), v.repeat(1, 1, 1, 1, r * r), self.rel_pos_bias, impl=self.impl)
        x = self.proj(x.unflatten(4, (r, r, heads)).permute(0, 1, 4, 2, 5, 6, 3).flatten(5))
        return x.reshape(B, r * H, r * W, -1)
