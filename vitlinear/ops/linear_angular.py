"""Linear-angular attention: You et al., 'Castling-ViT: Compressing Self-Attention via Switching Towards Linear-Angular
Attention at Vision Transformer Inference', CVPR 2023, arXiv 2211.10526.

The angular kernel of two vectors with c = cos(q, k) splits into a part that is linear in c and a small remainder:

    1 - arccos(c) / pi = 1/2 + c / pi + R(c),    |R| <= 1/2 - 1/pi

The linear part needs no weight of a single pair. Learned modules stand in for R: a depthwise convolution D of the
values, and while training softmax attention A whose weights count above a threshold alone. With |x| the length of a
vector of d channels of a head, q^ = q / |q| and k^ = k / |k|,

    y = unit(v / 2 + q^ (k^T v) / pi [+ A v]) + D v        A = a [a > threshold],  a = softmax(q k^T / sqrt(d))

A has no parameters, so that training checkpoints fit the form without it, and at a threshold of 1 it is exactly zero.
Written from a description of the authors' released module, https://github.com/GATECH-EIC/Castling-ViT: the identity
v / 2 in place of the kernel's constant part is theirs, as is the norm in place of a division by sums of weights.

Ours: the guard of the norms, pooled keys and chunks of queries in A, thresholds relative to the number of keys, their
ramp, queries on a coarser grid than keys, '2d' convolutions and `kv_scale`.
"""
import math
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ._common import call_linear, check_heads, inverse_norm

CONVS = ('1d', '2d')
AUX_MODES = ('off', 'train', 'always')


def subsample(x: torch.Tensor, grid: Tuple[int, int], stride: int, num_prefix_tokens: int = 0) -> torch.Tensor:
    """Every `stride`-th row and column of the grid among the tokens, (B, heads, N, d) to (B, heads, N', d)."""
    prefix, x = x[:, :, :num_prefix_tokens], x[:, :, num_prefix_tokens:]
    B, heads, _, d = x.shape
    x = x.reshape(B, heads, grid[0], grid[1], d)[:, :, ::stride, ::stride].reshape(B, heads, -1, d)
    return torch.cat([prefix, x], dim=2) if num_prefix_tokens else x


def pool_keys(
        x: torch.Tensor,
        grid: Optional[Tuple[int, int]],
        max_keys: Optional[int],
        num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """Means over square cells of the grid, the smallest that leave `max_keys` cells at most; prefix tokens stay.

    Args:
        x: Keys or values (B, heads, N, d).
        grid: Rows and columns, None for tokens that are not on a grid and stay as they are.
        max_keys: Cells to keep, None for no pooling.
        num_prefix_tokens: Tokens in front of those of the grid.
    """
    if grid is None or max_keys is None:
        return x
    H, W = grid
    side = 1
    while -(-H // side) * -(-W // side) > max_keys:
        side += 1
    if side == 1:
        return x
    prefix, x = x[:, :, :num_prefix_tokens], x[:, :, num_prefix_tokens:]
    B, heads, _, d = x.shape
    x = x.reshape(B * heads, H, W, d).permute(0, 3, 1, 2)
    x = F.avg_pool2d(x, side, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)
    return torch.cat([prefix, x.reshape(B, heads, -1, d)], dim=2)


def _masked_softmax(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        threshold: torch.Tensor,
        dropout_p: float = 0.,
) -> torch.Tensor:
    attn = (q @ k.transpose(-2, -1) * q.shape[-1] ** -.5).softmax(dim=-1)
    attn = torch.where(attn > threshold, attn, 0.)
    return F.dropout(attn, dropout_p) @ v


def masked_softmax_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        threshold: torch.Tensor,
        dropout_p: float = 0.,
        chunk: Optional[int] = None,
) -> torch.Tensor:
    """`A v` with the softmax weights above a threshold; the others count as 0 and the rows are not rescaled.

    It runs in float32 (float64 for float64 input) with autocast off.

    Args:
        q: Queries (B, heads, N, d).
        k: Keys (B, heads, M, d).
        v: Values (B, heads, M, e).
        threshold: Scalar tensor. The gradient passes through the weights above it alone, never to the threshold.
        dropout_p: Share of the weights to drop.
        chunk: Queries to take at a time, whose weights are computed again in the backward pass, so that no more than
            `chunk * M` of them per head are ever kept; None for all.

    Returns:
        (B, heads, N, e) in the dtype of `v`.
    """
    out_dtype = v.dtype
    if out_dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    threshold = threshold.to(q.dtype)
    if not torch.jit.is_scripting() and q.device.type != 'meta':
        with torch.autocast(device_type=q.device.type, enabled=False):
            return _in_chunks(q, k, v, threshold, dropout_p, chunk).to(out_dtype)
    return _masked_softmax(q, k, v, threshold, dropout_p).to(out_dtype)


@torch.jit.unused
def _in_chunks(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        threshold: torch.Tensor,
        dropout_p: float,
        chunk: Optional[int],
) -> torch.Tensor:
    N = q.shape[2]
    if chunk is None or N <= chunk:
        return _masked_softmax(q, k, v, threshold, dropout_p)
    parts = []
    for i in range(0, N, chunk):
        args = (q[:, :, i:i + chunk], k, v, threshold, dropout_p)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_masked_softmax, *args, use_reentrant=False))
        else:
            parts.append(_masked_softmax(*args))
    return torch.cat(parts, dim=2)


class MaskedSoftmax(nn.Module):
    """The auxiliary branch of linear-angular attention. It has no parameters and no entry in the state dict.

    Its threshold is `max(threshold, kappa / M) ** (1 - ramp)` for M keys: a ramp from 0 to 1 takes it to 1, where no
    weight survives. Without kappa the mask of M < 1 / threshold keys could never be empty, since the largest of M
    weights is at least 1 / M.

    Paper: arXiv 2211.10526, figure of the authors' project page; kappa and ramp are ours.
    """

    def __init__(
            self,
            mode: str = 'off',
            threshold: float = .02,
            kappa: float = 0.,
            max_keys: Optional[int] = 196,
            chunk: Optional[int] = 512,
            drop: float = 0.,
            device=None,
    ):
        """
        Args:
            mode: 'off', 'train' (on in training mode alone) or 'always'.
            threshold: Weights up to this size do not count.
            kappa: Raises the threshold to kappa over the number of keys.
            max_keys: Average keys and values over cells of the grid until there are no more than these, None for never.
            chunk: Queries whose weights are kept at a time, None for all.
            drop: Dropout of the weights.

        Raises:
            ValueError: A value is out of range.
        """
        super().__init__()
        if not 0. <= threshold <= 1.:
            raise ValueError(f'threshold={threshold} must lie in [0, 1].')
        if kappa < 0.:
            raise ValueError(f'kappa={kappa} must not be negative.')
        for name, value in (('max_keys', max_keys), ('chunk', chunk)):
            if value is not None and value < 1:
                raise ValueError(f'{name}={value} must be positive, or None.')
        self.mode = check_aux_mode(mode)
        self.initial_threshold = threshold
        self.kappa = float(kappa)
        self.max_keys = max_keys
        self.chunk = chunk
        self.drop = float(drop)
        # tensors, since a compiler would take numbers for constants; not persistent, or published files would not load
        for name in ('threshold', 'ramp', 'weight'):
            self.register_buffer(name, torch.empty((), device=device, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Threshold as constructed, no ramp, weight 1."""
        self.threshold.fill_(self.initial_threshold)
        self.ramp.fill_(0.)
        self.weight.fill_(1.)

    def init_non_persistent_buffers(self) -> None:
        """As `reset_parameters`; timm's name for it."""
        self.reset_parameters()

    def is_on(self) -> bool:
        """Whether the branch takes part in the layer's output."""
        return self.mode == 'always' or (self.mode == 'train' and self.training)

    def threshold_for(self, num_keys: int) -> torch.Tensor:
        """The threshold in force, a scalar."""
        return self.threshold.clamp(min=self.kappa / num_keys) ** (1. - self.ramp)

    def forward(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            grid: Optional[Tuple[int, int]] = None,
            num_prefix_tokens: int = 0,
    ) -> torch.Tensor:
        """`weight * A v`, (B, heads, N, e).

        Args:
            q: Queries (B, heads, N, d).
            k: Keys (B, heads, M, d).
            v: Values (B, heads, M, e).
            grid: Rows and columns that the keys are on, in row-major order.
            num_prefix_tokens: Keys in front of those of the grid.
        """
        k = pool_keys(k, grid, self.max_keys, num_prefix_tokens)
        v = pool_keys(v, grid, self.max_keys, num_prefix_tokens)
        drop = self.drop if self.training else 0.
        out = masked_softmax_attention(q, k, v, self.threshold_for(k.shape[2]), drop, self.chunk)
        return out * self.weight.to(out.dtype)

    @torch.jit.unused
    def stats(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            grid: Optional[Tuple[int, int]] = None,
            num_prefix_tokens: int = 0,
    ) -> Dict[str, float]:
        """What is left of the weights with these arguments of `forward`, see `castling_stats` of the models."""
        k = pool_keys(k, grid, self.max_keys, num_prefix_tokens).float()
        threshold = self.threshold_for(k.shape[2]).float()
        entries = rows = mass = 0.
        for part in q.float().split(self.chunk or q.shape[2], dim=2):
            attn = (part @ k.transpose(-2, -1) * part.shape[-1] ** -.5).softmax(dim=-1)
            mask = attn > threshold
            entries += mask.sum().item()
            rows += mask.any(dim=-1).sum().item()
            mass += torch.where(mask, attn, 0.).sum().item()
        total = q.shape[0] * q.shape[1] * q.shape[2]
        return dict(tokens=q.shape[2], keys=k.shape[2], density=entries / (total * k.shape[2]),
                    rows_with_entry=rows / total, mass=mass / total)

    def extra_repr(self) -> str:
        return f'mode={self.mode}, kappa={self.kappa}, max_keys={self.max_keys}, chunk={self.chunk}'


def check_aux_mode(mode: str) -> str:
    if mode not in AUX_MODES:
        raise ValueError(f"Unknown aux mode '{mode}', expected one of {', '.join(AUX_MODES)}.")
    return mode


def local_attention(
        v: torch.Tensor,
        weight: torch.Tensor,
        grid: Optional[Tuple[int, int]] = None,
        num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """The convolution D of the values, one kernel per head for all its channels, zeros outside.

    Args:
        v: Values (B, heads, N, d), fastest where heads and channels are last in memory.
        weight: (heads, 1, k, 1), along the tokens in their order; or (heads, 1, k, k), on the grid, where prefix tokens
            have no part. (heads * d, 1, ...) with the kernel of a head for each of its channels is taken as well.
        grid: Rows and columns of the tokens, for the second form.
        num_prefix_tokens: Tokens in front of those of the grid.

    Returns:
        (B, heads, N, d).
    """
    B, heads, N, d = v.shape
    C, k = heads * d, weight.shape[2]
    if weight.shape[0] != C:
        weight = weight.repeat_interleave(d, dim=0)
    x = v.transpose(1, 2).reshape(B, N, C)
    if weight.shape[3] == 1:
        x = F.conv2d(x.unsqueeze(1).permute(0, 3, 1, 2), weight.transpose(2, 3), None, [1, 1], [0, k // 2], [1, 1], C)
    else:
        assert grid is not None, 'Two-dimensional kernels need the grid of the tokens.'
        x = x[:, num_prefix_tokens:].reshape(B, grid[0], grid[1], C).permute(0, 3, 1, 2)
        x = F.conv2d(x, weight, None, [1, 1], [k // 2, k // 2], [1, 1], C)
    x = x.permute(0, 2, 3, 1).reshape(B, -1, heads, d).transpose(1, 2)
    if weight.shape[3] != 1 and num_prefix_tokens:
        x = F.pad(x, [0, 0, num_prefix_tokens, 0])
    return x


def linear_angular_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weight: torch.Tensor,
        grid: Optional[Tuple[int, int]] = None,
        num_prefix_tokens: int = 0,
        stride: int = 1,
        kv_scale: float = 1.,
        aux: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """`unit(v / 2 + kv_scale q^ (k^T v) / pi + aux) + D v` at the position of each query.

    It runs in float32 (float64 for float64 input) with autocast off; in bfloat16 without autograd the products take
    and return bfloat16, which has the range that their sums need.

    Args:
        q: Queries (B, heads, N, d).
        k: Keys (B, heads, M, d).
        v: Values (B, heads, M, e).
        weight: Kernels of D, see `local_attention`.
        grid: Rows and columns of keys and values; for `stride` other than 1 and two-dimensional kernels.
        num_prefix_tokens: Tokens in front of those of the grid, among queries and keys.
        stride: Of the queries' grid in that of the keys.
        kv_scale: N_ref / M keeps the parts of the sum in the ratio that they have for N_ref keys; 1 is as published.
        aux: What the auxiliary branch adds, (B, heads, N, e).

    Returns:
        (B, heads, N, e) in the dtype of `v`.
    """
    if not torch.jit.is_scripting() and q.device.type != 'meta':
        with torch.autocast(device_type=q.device.type, enabled=False):
            return _linear_angular_attention(q, k, v, weight, grid, num_prefix_tokens, stride, kv_scale, aux)
    return _linear_angular_attention(q, k, v, weight, grid, num_prefix_tokens, stride, kv_scale, aux)


def _linear_angular_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weight: torch.Tensor,
        grid: Optional[Tuple[int, int]],
        num_prefix_tokens: int,
        stride: int,
        kv_scale: float,
        aux: Optional[torch.Tensor],
        scale: float = 2. / math.pi,
) -> torch.Tensor:
    out_dtype = v.dtype
    if out_dtype != torch.float64 and (out_dtype != torch.bfloat16 or torch.is_grad_enabled()):
        q, k, v = q.float(), k.float(), v.float()
    local = local_attention(v, weight.to(v.dtype), grid, num_prefix_tokens)
    kv = (k * inverse_norm(k).to(k.dtype)).transpose(-2, -1) @ v
    if stride != 1:
        assert grid is not None, 'A stride needs the grid of the keys.'
        v, local = [subsample(x, grid, stride, num_prefix_tokens) for x in (v, local)]
    # twice the sum, which the norm takes out again: the identity then needs no pass of its own
    y = torch.addcmul(v, q @ kv, inverse_norm(q).to(q.dtype), value=scale * kv_scale)
    if aux is not None:
        y = torch.add(y, aux.to(y.dtype), alpha=2.)
    return torch.addcmul(local, y, inverse_norm(y).to(y.dtype)).to(out_dtype)


class LinearAngular(nn.Module):
    """What linear-angular attention needs besides its projections: the convolution and the auxiliary branch.

    Layers with other projections, of other backbones, derive from it and call `attend`.
    """

    def __init__(
            self,
            num_heads: int,
            res_kernel_size: int = 9,
            conv: str = '1d',
            kv_scale: Optional[int] = None,
            aux_mode: str = 'off',
            aux_threshold: float = .02,
            aux_kappa: float = 0.,
            aux_max_keys: Optional[int] = 196,
            aux_chunk: Optional[int] = 512,
            attn_drop: float = 0.,
            softmax: bool = False,
            device=None,
            dtype=None,
    ):
        """
        Args:
            num_heads: Attention heads.
            res_kernel_size: Taps of the convolution of the values, odd: its length or, for '2d', its side.
            conv: '1d', along the tokens in row-major order, prefix tokens included, as published; or '2d', on the grid.
            kv_scale: Number of keys for which the layer is as published. With others, the sum over keys counts as if
                there were as many; None for never.
            aux_mode: 'off', 'train' or 'always', see `MaskedSoftmax`.
            aux_threshold: Weights up to this size do not count.
            aux_kappa: Raises the threshold to kappa over the number of keys.
            aux_max_keys: Keys to average the grid's down to in the auxiliary branch, None for never.
            aux_chunk: Queries whose auxiliary weights are kept at a time, None for all.
            attn_drop: Dropout of the auxiliary weights.
            softmax: Softmax attention in the place of all this, cheaper for fewer keys than channels of a head.

        Raises:
            ValueError: A value is out of range.
        """
        super().__init__()
        if res_kernel_size < 1 or res_kernel_size % 2 == 0:
            raise ValueError(f'res_kernel_size={res_kernel_size} must be odd and positive.')
        if conv not in CONVS:
            raise ValueError(f"Unknown conv '{conv}', expected one of {', '.join(CONVS)}.")
        if kv_scale is not None and kv_scale < 1:
            raise ValueError(f'kv_scale={kv_scale} must be a positive number of keys, or None.')
        self.num_heads = num_heads
        self.kv_scale = kv_scale
        self.drop = float(attn_drop)
        self.dconv = self.aux = None
        if not softmax:
            self.dconv = nn.Conv2d(
                num_heads, num_heads, (res_kernel_size, res_kernel_size if conv == '2d' else 1),
                groups=num_heads, bias=False, device=device, dtype=dtype)
            self.aux = MaskedSoftmax(
                aux_mode, aux_threshold, aux_kappa, aux_max_keys, aux_chunk, attn_drop, device=device)

    def attend(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            grid: Optional[Tuple[int, int]] = None,
            num_prefix_tokens: int = 0,
            stride: int = 1,
    ) -> torch.Tensor:
        """`linear_angular_attention` with the layer's convolution and auxiliary branch, or softmax attention."""
        if self.aux is None or self.dconv is None:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop if self.training else 0.)
        aux: Optional[torch.Tensor] = None
        if self.aux.is_on():
            aux = self.aux(q, k, v, grid, num_prefix_tokens)
        kv_scale = 1.
        if self.kv_scale is not None:
            kv_scale = self.kv_scale / k.shape[2]
        return linear_angular_attention(
            q, k, v, self.dconv.weight, grid, num_prefix_tokens, stride, kv_scale, aux)

    def reparameterize(self) -> None:
        """Repeat the kernel of each head for its channels, once instead of in each call. Its state dict is another."""
        channels = self.value_channels()
        if self.dconv is not None and self.dconv.out_channels != channels:
            conv = nn.Conv2d(
                channels, channels, self.dconv.kernel_size, groups=channels, bias=False, device='meta')
            weight = self.dconv.weight.detach().repeat_interleave(channels // self.num_heads, dim=0)
            conv.weight = nn.Parameter(weight, requires_grad=self.dconv.weight.requires_grad)
            self.dconv = conv.train(self.training)

    def value_channels(self) -> int:
        """Channels of the values, of all heads."""
        raise NotImplementedError


class LinearAngularAttention(LinearAngular):
    """Linear-angular attention over all positions of a map, linear in H W.

    Paper: arXiv 2211.10526. State dict as that of the authors' module.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            qkv_bias: bool = False,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            qkv_bias: Bias of the query, key and value projections.
            proj_drop: Dropout of the output.
            kwargs: As for `LinearAngular`.

        Raises:
            ValueError: `dim` is not divisible by `num_heads`, or a value is out of range.
        """
        dd = {'device': device, 'dtype': dtype}
        head_dim = check_heads(dim, num_heads)
        super().__init__(num_heads, **kwargs, **dd)
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def value_channels(self) -> int:
        """Channels of the values, of all heads."""
        return self.num_heads * self.head_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        B, H, W, C = x.shape
        if torch.jit.is_scripting():
            qkv = self.qkv(x)
        else:
            qkv = call_linear(self.qkv, x)
        q, k, v = qkv.reshape(B, H * W, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.attend(q, k, v, (H, W)).transpose(1, 2).reshape(B, H, W, C)
        if torch.jit.is_scripting():
            x = self.proj(x)
        else:
            x = call_linear(self.proj, x)
        return self.proj_drop(x)
