"""LeViT's layers (arXiv 2104.01136) on (B, C, H, W) maps, its attention around the linear-angular core."""
from collections import OrderedDict
from typing import Any

import torch
from timm.models.levit import ConvNorm
from torch import nn

from ._fold import fold_batch_norm
from .linear_angular import LinearAngular


class PointwiseNorm(ConvNorm):
    """LeViT's 1x1 convolution with batch norm, whose scale starts at `bn_weight_init`."""

    def __init__(self, dim: int, dim_out: int, bn_weight_init: float = 1., device=None, dtype=None):
        super().__init__(dim, dim_out, bn_weight_init=bn_weight_init, device=device, dtype=dtype)

    def fuse(self) -> 'PointwiseNorm':
        """Fold the norm into the convolution."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.linear = fold_batch_norm(self.linear, self.bn)
            self.bn = nn.Identity()
        return self


def _levit_proj(dim: int, dim_out: int, act_layer: type[nn.Module], bn_weight_init: float, **dd: Any) -> nn.Sequential:
    return nn.Sequential(OrderedDict([
        ('act', act_layer()),
        ('ln', PointwiseNorm(dim, dim_out, bn_weight_init, **dd)),
    ]))


class LevitAttention(LinearAngular):
    """LeViT's attention around the linear-angular core, on (B, C, H, W) maps."""

    def __init__(
            self,
            dim: int,
            key_dim: int,
            value_dim: int,
            num_heads: int,
            act_layer: type[nn.Module],
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            dim: Channels of the map.
            key_dim: Channels of queries and keys of each head.
            value_dim: Channels of values of each head.
            num_heads: Attention heads.
            act_layer: Activation before the output projection.
            kwargs: As for `LinearAngular`.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_heads, **kwargs, **dd)
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.qkv = PointwiseNorm(dim, (2 * key_dim + value_dim) * num_heads, **dd)
        self.proj = _levit_proj(value_dim * num_heads, dim, act_layer, 0., **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        B, _, H, W = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1).reshape(B, H * W, self.num_heads, -1).transpose(1, 2)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=3)
        x = self.attend(q, k, v, (H, W))
        return self.proj(x.transpose(1, 2).reshape(B, H, W, -1).permute(0, 3, 1, 2))


class LevitAttentionDownsample(LinearAngular):
    """LeViT's attention from every other row and column to all, on (B, C, H, W) maps.

    The identity and the convolution of the values are read at the positions of the queries (ours: the authors' module
    has queries and keys on one grid).
    """

    def __init__(
            self,
            dim: int,
            dim_out: int,
            key_dim: int,
            value_dim: int,
            num_heads: int,
            act_layer: type[nn.Module],
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            dim_out: Channels of the new map.
            dim, key_dim, value_dim, num_heads, act_layer, kwargs: As for `LevitAttention`.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_heads, **kwargs, **dd)
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.kv = PointwiseNorm(dim, (key_dim + value_dim) * num_heads, **dd)
        self.q = nn.Sequential(OrderedDict([
            ('down', nn.AvgPool2d(1, stride=2)),
            ('ln', PointwiseNorm(dim, key_dim * num_heads, **dd)),
        ]))
        self.proj = _levit_proj(value_dim * num_heads, dim_out, act_layer, 1., **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        B, _, H, W = x.shape
        kv = self.kv(x).permute(0, 2, 3, 1).reshape(B, H * W, self.num_heads, -1).transpose(1, 2)
        k, v = kv.split([self.key_dim, self.value_dim], dim=3)
        q = self.q(x).permute(0, 2, 3, 1)
        H_out, W_out = q.shape[1], q.shape[2]
        q = q.reshape(B, H_out * W_out, self.num_heads, self.key_dim).transpose(1, 2)
        x = self.attend(q, k, v, (H, W), stride=2)
        return self.proj(x.transpose(1, 2).reshape(B, H_out, W_out, -1).permute(0, 3, 1, 2))
