"""Linear-angular attention as a layer, and the auxiliary branch of its training."""
from typing import Any

import torch
from torch import nn

from ..ops import linear_angular_attention, masked_softmax, softmax_attention, split_heads
from ..ops._numerics import check_choice
from ..ops.local import local_attention
from ..ops.primitives.few_keys import pool_keys
from ._common import check_heads, merge_heads

CONVS = ('1d', '2d')
AUX_MODES = ('off', 'train', 'always')


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
            max_keys: int | None = 196,
            chunk: int | None = 512,
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
        check_choice('aux mode', mode, AUX_MODES)
        self.mode = mode
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

    init_non_persistent_buffers = reset_parameters  # timm's name for it

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
            grid: tuple[int, int] | None = None,
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
        out = masked_softmax(q, k, v, self.threshold_for(k.shape[2]), drop, self.chunk)
        return out * self.weight.to(out.dtype)

    @torch.jit.unused
    def stats(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            grid: tuple[int, int] | None = None,
            num_prefix_tokens: int = 0,
    ) -> dict[str, float]:
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


class ValueConv2d(nn.Conv2d):
    """The convolution D of linear-angular attention, one kernel for the values of a head.

    A kernel of one column runs along the tokens: nn.Conv2d of (B, heads, N, d) values. A square one is for their grid.
    """

    def forward(
            self,
            v: torch.Tensor,
            grid: tuple[int, int] | None = None,
            num_prefix_tokens: int = 0,
    ) -> torch.Tensor:
        """Values (B, heads, N, d) to as many, see `local_attention`."""
        if self.groups != self.in_channels or self.groups != self.out_channels:  # made by an adapter of this one
            return self._conv_forward(v, self.weight, self.bias)
        return local_attention(v, self.weight.to(v.dtype), grid, num_prefix_tokens)


def _value_conv(num_heads: int, kernel_size: tuple[int, int], **dd: Any) -> ValueConv2d:
    padding = (kernel_size[0] // 2, kernel_size[1] // 2)
    return ValueConv2d(num_heads, num_heads, kernel_size, padding=padding, groups=num_heads, bias=False, **dd)


class LinearAngular(nn.Module):
    """What linear-angular attention needs besides its projections: the convolution and the auxiliary branch.

    Layers with other projections, of other backbones, derive from it, set `value_dim` and call `attend`.
    """
    value_dim: int  # channels of the values of each head

    def __init__(
            self,
            num_heads: int,
            res_kernel_size: int = 9,
            conv: str = '1d',
            ref_keys: int | None = None,
            aux_mode: str = 'off',
            aux_threshold: float = .02,
            aux_kappa: float = 0.,
            aux_max_keys: int | None = 196,
            aux_chunk: int | None = 512,
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
            ref_keys: Number of keys for which the layer is as published. With others, the sum over keys counts as if
                there were as many; None for never.
            aux_mode, aux_threshold, aux_kappa, aux_max_keys, aux_chunk: The auxiliary branch, see `MaskedSoftmax`.
            attn_drop: Dropout of the auxiliary weights.
            softmax: Softmax attention in the place of all this, cheaper for fewer keys than channels of a head.

        Raises:
            ValueError: A value is out of range.
        """
        super().__init__()
        if res_kernel_size < 1 or res_kernel_size % 2 == 0:
            raise ValueError(f'res_kernel_size={res_kernel_size} must be odd and positive.')
        check_choice('conv', conv, CONVS)
        if ref_keys is not None and ref_keys < 1:
            raise ValueError(f'ref_keys={ref_keys} must be a positive number of keys, or None.')
        self.num_heads = num_heads
        self.ref_keys = ref_keys
        self.drop = float(attn_drop)
        self.dconv = self.aux = None
        if not softmax:
            self.dconv = _value_conv(
                num_heads, (res_kernel_size, res_kernel_size if conv == '2d' else 1), device=device, dtype=dtype)
            self.aux = MaskedSoftmax(
                aux_mode, aux_threshold, aux_kappa, aux_max_keys, aux_chunk, attn_drop, device=device)

    def attend(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            grid: tuple[int, int] | None = None,
            num_prefix_tokens: int = 0,
            stride: int = 1,
    ) -> torch.Tensor:
        """`linear_angular_attention` with the layer's convolution and auxiliary branch, or softmax attention."""
        if self.aux is None or self.dconv is None:
            return softmax_attention(q, k, v, dropout_p=self.drop if self.training else 0.)
        aux: torch.Tensor | None = None
        if self.aux.is_on():
            aux = self.aux(q, k, v, grid, num_prefix_tokens)
        kv_scale = 1.
        if self.ref_keys is not None:
            kv_scale = self.ref_keys / k.shape[2]
        local = self.dconv(v, grid, num_prefix_tokens)
        return linear_angular_attention(q, k, v, local, grid, num_prefix_tokens, stride, kv_scale, aux)

    def reparameterize(self) -> None:
        """Repeat the kernel of each head for its channels, once instead of in each call. Its state dict is another."""
        channels = self.value_channels()
        if self.dconv is not None and self.dconv.out_channels != channels:
            conv = _value_conv(channels, self.dconv.kernel_size, device='meta')
            weight = self.dconv.weight.detach().repeat_interleave(channels // self.num_heads, dim=0)
            conv.weight = nn.Parameter(weight, requires_grad=self.dconv.weight.requires_grad)
            self.dconv = conv.train(self.training)

    def value_channels(self) -> int:
        """Channels of the values, of all heads."""
        return self.num_heads * self.value_dim


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
        self.head_dim = self.value_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        y = self.attend(q, k, v, (x.shape[1], x.shape[2]))
        return self.proj_drop(self.proj(merge_heads(y).view(x.shape)))
