"""Vicinity attention: linear attention that favours near positions, along each axis of the map.

Paper: 'Vicinity Vision Transformer', arXiv 2206.10552, TPAMI 45(10), 2023.

The weight of key j for query i is

    w_ij = (q_i . k_j) [cos(a_i - a_j) + cos(b_i - b_j)],   a = (pi/2) row / H,   b = (pi/2) column / W,

with q and k rectified, so that every weight is >= 0. Since cos(a_i - a_j) = cos a_i cos a_j + sin a_i sin a_j, the
weight is the dot product of `[u cos a, u sin a, u cos b, u sin b]` for u = q_i and u = k_j, and the sum over keys can
be taken before it meets the queries. The paper speaks of the Manhattan distance; this sum of two cosines is what the
authors' released code computes, and what its weights were trained with.
"""
import math
from functools import lru_cache, partial
from typing import Any, Callable, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ._common import (
    band_rows,
    call_linear,
    check_heads,
    differentiate,
    is_plain,
    merge_heads,
    pointwise,
    split_heads,
    use_bands,
)

LOCALITIES = ('2d', '2d_product', '1d', 'none')
IMPLEMENTATIONS = ('auto', 'separable', 'features')
CLAMP_MIN = 1e-4
CLAMP_MAX = 1e4

# Measured on two cores: positions from which the row and column form wins over the feature form, and input elements of
# a band of rows, or of several images, in inference.
SEPARABLE_FROM = 1024
BAND = 2 ** 20


def _clamp_magnitude_(x: torch.Tensor) -> torch.Tensor:
    sign = x.sign()
    return x.abs_().clamp_(CLAMP_MIN, CLAMP_MAX).mul_(sign)


# The bounds as each dtype holds them: 1e-4 is no half precision number.
_BOUNDS = {
    dtype: tuple(torch.tensor([CLAMP_MIN, CLAMP_MAX], dtype=dtype).tolist())
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def _clamp_magnitude_backward(grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Gradient from the output alone: an entry that was not clamped lies strictly inside the bounds."""
    return torch.ops.aten.hardtanh_backward(grad, output.abs(), *_BOUNDS[output.dtype])


class _ClampMagnitude(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        x = _clamp_magnitude_(x.clone())
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return _clamp_magnitude_backward(grad, *ctx.saved_tensors)


def _scriptable_clamp(x: torch.Tensor, lower: float = CLAMP_MIN, upper: float = CLAMP_MAX) -> torch.Tensor:
    return x.abs().clamp(lower, upper) * x.sign()


def clamp_magnitude(x: torch.Tensor) -> torch.Tensor:
    """`sign(x) * clamp(|x|, 1e-4, 1e4)` (authors' code): zero stays zero, the gradient is 0 from the bounds on.

    Args:
        x: Any shape.

    Returns:
        Tensor like `x`. Training keeps the output only, not the intermediates of the formula.
    """
    if torch.jit.is_scripting():
        return _scriptable_clamp(x)
    return _ClampMagnitude.apply(x)


def _angle_table(size: int, like: torch.Tensor) -> torch.Tensor:
    """(2, size) cosines and sines of (pi/2) n / size, in the dtype of `like`."""
    angles = torch.arange(size, device=like.device, dtype=like.dtype) * (math.pi / 2 / size)
    return torch.stack([angles.cos(), angles.sin()])


def _position_features(H: int, W: int, locality: str, like: torch.Tensor) -> torch.Tensor:
    """(F, 1, H W) factors whose products, summed over F, give the positional part of the kernel."""
    if locality == 'none':
        return torch.ones(1, 1, H * W, device=like.device, dtype=like.dtype)
    if locality == '1d':
        return _angle_table(H * W, like).unsqueeze(1)
    rows = _angle_table(H, like).unsqueeze(-1).expand(2, H, W)
    columns = _angle_table(W, like).unsqueeze(-2).expand(2, H, W)
    if locality == '2d_product':
        return (rows.unsqueeze(1) * columns.unsqueeze(0)).reshape(4, 1, H * W)
    return torch.cat([rows, columns]).reshape(4, 1, H * W)


@lru_cache(maxsize=16)
def _known_table(build: Callable[..., torch.Tensor], dtype: torch.dtype, *size: Any) -> torch.Tensor:
    with torch.inference_mode(False):
        return build(*size, torch.empty(0, dtype=dtype, device='cpu'))


def _table(build: Callable[..., torch.Tensor], like: torch.Tensor, *size: Any) -> torch.Tensor:
    """`build(*size, like)`, which inference on a CPU remembers."""
    if use_bands(like) and type(like) is torch.Tensor:
        return _known_table(build, like.dtype, *size)
    return build(*size, like)


def _normalise(
        numerator: torch.Tensor,
        denominator: torch.Tensor,
        clamp: bool,
        eps: float,
        upper: float = CLAMP_MAX,
) -> torch.Tensor:
    if not clamp:
        return numerator / (denominator + eps)
    # the authors clamp the reciprocal; as the denominator is >= 0, capping it is the same
    return clamp_magnitude(clamp_magnitude(numerator) / (denominator + eps).clamp(max=upper))


def _normalise_(numerator: torch.Tensor, denominator: torch.Tensor, clamp: bool, eps: float) -> torch.Tensor:
    """`_normalise` in place, without gradients."""
    if not clamp:
        return numerator.div_(denominator + eps)
    sign, divisor = numerator.sign(), (denominator + eps).clamp_(max=CLAMP_MAX)
    return numerator.abs_().clamp_(CLAMP_MIN, CLAMP_MAX).div_(divisor).clamp_(CLAMP_MIN, CLAMP_MAX).mul_(sign)


def _weighted(x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(B, heads, d, N) and (F, 1, N) to (B, heads, F d, N), a copy of x for each positional factor."""
    return (x.unsqueeze(2) * features).flatten(2, 3)


def _regroup(x: torch.Tensor, num: int) -> torch.Tensor:
    """(B, heads, F d, e) to (B, heads, F e, d)."""
    return x.unflatten(2, [num, -1]).transpose(-2, -1).flatten(2, 3)


def _append_ones(v: torch.Tensor) -> torch.Tensor:
    """One more channel, of ones, so that the same products give numerators and denominators."""
    return F.pad(v, [0, 0, 0, 1], value=1.)


def _sum_keys(k: torch.Tensor, v: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Sums over keys (B, heads, F d, e + 1), the last column without values."""
    return _weighted(k, features) @ _append_ones(v).transpose(-2, -1)


def _clamp_sums(kv: torch.Tensor) -> torch.Tensor:
    """Clamp the sums with values; the authors leave those of the denominator as they are."""
    return torch.cat([clamp_magnitude(kv[..., :-1]), kv[..., -1:]], dim=-1)


def _by_features(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        features: torch.Tensor,
        clamp: bool,
        eps: float,
) -> torch.Tensor:
    """(B, heads, d, N) queries, keys and values and (F, 1, N) factors: one product over the F d kernel features.

    For TorchScript, which cannot compile `_ByFeatures`, and for second derivatives.
    """
    kv = _sum_keys(k, v, features)
    if clamp:
        kv = _clamp_sums(kv)
    out = kv.transpose(-2, -1) @ _weighted(q, features)
    return _normalise(out[:, :, :-1], out[:, :, -1:], clamp, eps)


class _ByFeatures(torch.autograd.Function):
    """One product over the F d kernel features, with a backward pass that keeps no copies for each factor.

    Shapes as for `_by_features`; kept are q, k, v, numerators and outputs. With G = [grad_numerator, grad_denominator]
    weighted by each factor, grad_q = M G and grad_M = q G^T, so neither the features of q nor their gradients are
    formed; likewise for k with the weighted values.
    """

    @staticmethod
    def forward(ctx, q, k, v, features, clamp: bool, eps: float):
        e = v.shape[2]
        kv = _sum_keys(k, v, features)
        if clamp:
            kv = _clamp_sums(kv)
        out = kv.transpose(-2, -1) @ _weighted(q, features)  # (B, heads, e + 1, N)
        numerator, denominator = out[:, :, :e], out[:, :, e:] + eps
        if clamp:
            numerator = _clamp_magnitude_(numerator)
            out = _clamp_magnitude_(numerator / denominator.clamp(max=CLAMP_MAX))
        else:
            out = numerator / denominator
        ctx.clamp, ctx.eps = clamp, eps
        ctx.save_for_backward(q, k, v, features, kv, numerator if clamp else None, denominator, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, features, kv, numerator, denominator, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = partial(_by_features, features=features, clamp=ctx.clamp, eps=ctx.eps)
            return (*differentiate(plain, (q, k, v), grad), None, None, None)
        e, num = v.shape[2], features.shape[0]
        divisor = denominator.clamp(max=CLAMP_MAX) if ctx.clamp else denominator
        if ctx.clamp:
            grad = _clamp_magnitude_backward(grad, out)
        grad = grad / divisor
        grad_denominator = -(grad * out).sum(dim=2, keepdim=True)
        if ctx.clamp:
            grad = _clamp_magnitude_backward(grad, numerator)
            grad_denominator = grad_denominator * (denominator < CLAMP_MAX)
        grad = _weighted(torch.cat([grad, grad_denominator], dim=2), features)  # (B, heads, F (e + 1), N)
        grad_kv = _regroup(grad @ q.transpose(-2, -1), num)  # (B, heads, F d, e + 1)
        grad_q = _regroup(kv, num).transpose(-2, -1) @ grad
        if ctx.clamp:
            grad_kv = torch.cat([_clamp_magnitude_backward(grad_kv[..., :e], kv[..., :e]), grad_kv[..., e:]], dim=-1)
        grad_k = _regroup(grad_kv, num).transpose(-2, -1) @ _weighted(_append_ones(v), features)
        grad_v = grad_kv[..., :e].transpose(-2, -1) @ _weighted(k, features)
        return grad_q, grad_k, grad_v, None, None, None


def _by_axes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, clamp: bool, eps: float) -> torch.Tensor:
    """The '2d' kernel through one matrix per row and one per column, half the operations and no feature copies.

    The row angle is constant along a row, so sums over keys factor through row marginals, and likewise for columns.
    """
    B, heads, H, W, d = q.shape
    e = v.shape[-1]
    rows, columns = _table(_angle_table, q, H), _table(_angle_table, q, W)

    row_kv = rows @ (k.transpose(-2, -1) @ v).reshape(B, heads, H, d * e)  # (B, heads, 2, d e)
    k_t, v_t = k.transpose(2, 3), v.transpose(2, 3)
    column_kv = columns @ (k_t.transpose(-2, -1) @ v_t).reshape(B, heads, W, d * e)
    if clamp:
        row_kv, column_kv = clamp_magnitude(row_kv), clamp_magnitude(column_kv)
    row_k = rows @ k.sum(dim=3)  # (B, heads, 2, d)
    column_k = columns @ k.sum(dim=2)

    q_t = q.transpose(2, 3)
    numerator = q @ (rows.t() @ row_kv).reshape(B, heads, H, d, e)
    numerator = numerator + (q_t @ (columns.t() @ column_kv).reshape(B, heads, W, d, e)).transpose(2, 3)
    denominator = q @ (rows.t() @ row_k).unsqueeze(-1)
    denominator = denominator + (q_t @ (columns.t() @ column_k).unsqueeze(-1)).transpose(2, 3)
    return _normalise(numerator, denominator, clamp, eps)


def _vicinity_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        locality: str,
        clamp: bool,
        eps: float,
        impl: str,
) -> torch.Tensor:
    dtype = v.dtype
    if dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    B, heads, H, W, _ = q.shape
    if not torch.jit.is_scripting():
        # graphs that are traced or exported shall hold for every size; compiled ones are made for theirs
        by_size = not torch.jit.is_tracing() and not torch.compiler.is_exporting()
        if impl == 'separable' or (impl == 'auto' and locality == '2d' and by_size and H * W >= SEPARABLE_FROM):
            return _by_axes(q, k, v, clamp, eps).to(dtype)
    if torch.jit.is_scripting():
        features = _position_features(H, W, locality, q)
    else:
        features = _table(_position_features, q, H, W, locality)
    # positions last: the factors vary along the innermost axis then, and the elementwise passes stay vectorised
    q, k, v = [x.flatten(2, 3).transpose(-2, -1).contiguous() for x in (q, k, v)]
    if torch.jit.is_scripting():
        out = _by_features(q, k, v, features, clamp, eps)
    else:
        out = _ByFeatures.apply(q, k, v, features, clamp, eps)
    return out.transpose(-2, -1).unflatten(2, [H, W]).to(dtype)


def _check_options(locality: str, impl: str) -> None:
    if locality not in LOCALITIES:
        raise ValueError(f"Unknown locality '{locality}', expected one of {', '.join(LOCALITIES)}.")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown impl '{impl}', expected one of {', '.join(IMPLEMENTATIONS)}.")
    if impl == 'separable' and locality != '2d':
        raise ValueError(f"impl='separable' evaluates locality '2d' only, not '{locality}'.")


def vicinity_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        locality: str = '2d',
        clamp: bool = True,
        eps: float = 1e-4,
        impl: str = 'auto',
) -> torch.Tensor:
    """Vicinity attention over all positions of a map, linear in H W.

    Sums and angle tables are float32 (float64 for float64 input), with autocast off.

    Args:
        q: Queries (B, heads, H, W, d), all >= 0.
        k: Keys (B, heads, H, W, d), all >= 0.
        v: Values (B, heads, H, W, e).
        locality: '2d', the published kernel; '2d_product' takes the product of the two cosines; '1d' one cosine over
            row-major positions n / (H W); 'none' plain linear attention.
        clamp: Push magnitudes of sums, numerators, reciprocals and outputs into [1e-4, 1e4], as the released weights
            were trained. The sums grow with H W, so large maps meet the cap; without it this is the paper's formula.
        eps: Added to the denominator.
        impl: Order of evaluation, same result up to rounding: 'separable' ('2d' only), 'features', or 'auto' by size.

    Returns:
        (B, heads, H, W, e) in the dtype of `v`.

    Raises:
        ValueError: `locality` or `impl` is unknown, or the two do not go together.
    """
    if not torch.jit.is_scripting():
        _check_options(locality, impl)
    if not torch.jit.is_scripting() and q.device.type != 'meta':
        with torch.autocast(device_type=q.device.type, enabled=False):
            return _vicinity_attention(q, k, v, locality, clamp, eps, impl)
    return _vicinity_attention(q, k, v, locality, clamp, eps, impl)


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
