"""Linear-angular attention in the layouts of other backbones: MViTv2's pooled grids and DeiT's tokens."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ._common import merge_heads
from .linear_angular import LinearAngular


class HeadPoolConv2d(nn.Conv2d):
    """Depthwise convolution of the channels of one head, for all heads of a map."""

    def __init__(self, head_dim: int, kernel_size: int, stride: int, device=None, dtype=None):
        super().__init__(
            head_dim, head_dim, kernel_size, stride=stride, padding=kernel_size // 2, groups=head_dim, bias=False,
            device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads * d, H, W) to (B, heads * d, H', W')."""
        weight = self.weight.repeat(x.shape[1] // self.out_channels, 1, 1, 1)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, x.shape[1])


class CastlingMultiScaleAttention(LinearAngular):
    """MViTv2's pooling attention around the linear-angular core, with queries, keys and values on one grid.

    Paper: MViTv2, arXiv 2112.01526. That keys and values are pooled with the stride of the queries is ours.
    """

    def __init__(
            self,
            dim: int,
            dim_out: int,
            num_heads: int,
            qkv_bias: bool,
            kernel_size: int,
            stride: int,
            norm_layer: type[nn.Module],
            residual_pooling: bool = True,
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            dim: Channels of the tokens.
            dim_out: Channels of the new tokens.
            num_heads: Attention heads.
            qkv_bias: Bias of the query, key and value projections.
            kernel_size: Side of the pooling convolutions.
            stride: Of the pooling convolutions.
            norm_layer: Norm of pooled queries, keys and values.
            residual_pooling: Add the pooled queries to the output.
            kwargs: As for `LinearAngular`.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_heads, **kwargs, **dd)
        self.dim_out = dim_out
        self.head_dim = self.value_dim = dim_out // num_heads
        self.residual_pooling = residual_pooling
        self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim_out, dim_out, **dd)
        for name in 'qkv':
            self.add_module(f'pool_{name}', HeadPoolConv2d(self.head_dim, kernel_size, stride, **dd))
            self.add_module(f'norm_{name}', norm_layer(self.head_dim, **dd))

    def _to_map(self, x: torch.Tensor, feat_size: list[int]) -> torch.Tensor:
        """Tokens (B, N, C) to a map (B, C, H, W)."""
        return x.reshape(x.shape[0], feat_size[0], feat_size[1], self.dim_out).permute(0, 3, 1, 2)

    def _to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """A map (B, C, H, W) to (B, H, W, heads, d)."""
        return x.permute(0, 2, 3, 1).unflatten(3, [self.num_heads, self.head_dim])

    def forward(self, x: torch.Tensor, feat_size: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Tokens (B, H * W, C) and [H, W] to tokens (B, H' * W', C') and [H', W']."""
        q, k, v = self.qkv(x).split(self.dim_out, dim=2)
        q = self.norm_q(self._to_heads(self.pool_q(self._to_map(q, feat_size))))
        k = self.norm_k(self._to_heads(self.pool_k(self._to_map(k, feat_size)))).flatten(1, 2).transpose(1, 2)
        v = self.norm_v(self._to_heads(self.pool_v(self._to_map(v, feat_size)))).flatten(1, 2).transpose(1, 2)
        H, W = q.shape[1], q.shape[2]
        q = q.flatten(1, 2).transpose(1, 2)
        x = self.attend(q, k, v, (H, W))
        if self.residual_pooling:
            x = x + q
        return self.proj(merge_heads(x)), [H, W]


class CastlingTokenAttention(LinearAngular):
    """Linear-angular attention of tokens, class tokens in front, with the signature of timm's attention.

    Paper: arXiv 2211.10526. State dict as that of the authors' module.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            qkv_bias: bool,
            proj_bias: bool = True,
            proj_drop: float = 0.,
            num_prefix_tokens: int = 1,
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            dim: Channels of the tokens.
            num_heads: Attention heads.
            qkv_bias: Bias of the query, key and value projections.
            proj_bias: Bias of the output projection.
            proj_drop: Dropout of the output.
            num_prefix_tokens: Tokens in front of those of the grid.
            kwargs: As for `LinearAngular`.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_heads, **kwargs, **dd)
        self.head_dim = self.value_dim = dim // num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.grid: tuple[int, int] | None = None  # for what needs one; set where the image size is fixed
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """(B, N, C) to (B, N, C). There is no masked form: `attn_mask` must be None, `is_causal` False."""
        if attn_mask is not None or is_causal:
            raise ValueError('Linear-angular attention takes neither attn_mask nor is_causal.')
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.attend(q, k, v, self.grid, self.num_prefix_tokens)
        return self.proj_drop(self.proj(merge_heads(x)))
