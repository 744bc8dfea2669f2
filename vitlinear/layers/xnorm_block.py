"""The layers of X-ViT around its attention: blocks, class attention blocks, local convolutions, Fourier positions."""
import math
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import nn

from ._fold import fold_batch_norm
from .xnorm import XNormClassAttention

_norm_layer = partial(nn.LayerNorm, eps=1e-6)


class LocalPatchInteraction(nn.Module):
    """Depthwise convolutions among neighbours, (B, H, W, C) to (B, H, W, C).

    Two convolutions with GELU and batch norm between them, in the order of XCiT (arXiv 2106.09681). With one, norm and
    GELU follow it, which comes closer to the recalled parameter counts but contradicts the text.
    """

    def __init__(self, dim: int, num_convs: int = 2, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=num_convs == 2, **dd)
        self.act = nn.GELU()
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if num_convs == 2 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x.permute(0, 3, 1, 2))
        if self.conv2 is not None:
            x = self.conv2(self.norm(self.act(x)))
        else:
            x = self.act(self.norm(x))
        return x.permute(0, 2, 3, 1)

    def fuse(self) -> 'LocalPatchInteraction':
        """Fold the norm into the convolution before it; between two convolutions, GELU stands before the norm."""
        if self.conv2 is None and type(self.norm) is nn.BatchNorm2d and type(self.conv1) is nn.Conv2d:
            self.conv1 = fold_batch_norm(self.conv1, self.norm)
            self.norm = nn.Identity()
        return self


class XNormBlock(nn.Module):
    """Attention, local patch interaction and MLP on a (B, H, W, C) map, each pre-norm with layer scale."""

    def __init__(
            self,
            dim: int,
            attn: nn.Module,
            mlp_ratio: float = 4.,
            init_values: float = 1.,
            lpi_convs: int = 2,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = _norm_layer(dim, **dd)
        self.attn = attn
        self.ls1 = LayerScale(dim, init_values, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm3 = _norm_layer(dim, **dd)
        self.lpi = LocalPatchInteraction(dim, lpi_convs, **dd)
        self.ls3 = LayerScale(dim, init_values, **dd)
        self.drop_path3 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = _norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path3(self.ls3(self.lpi(self.norm3(x))))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class ClassBlock(nn.Module):
    """Class attention and MLP of the class token, CaiT's block (arXiv 2103.17239) with XNorm."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float = 4.,
            init_values: float = 1.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
            **attn_kwargs: Any,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = _norm_layer(dim, **dd)
        self.attn = XNormClassAttention(dim, num_heads, proj_drop=proj_drop, **attn_kwargs, **dd)
        self.ls1 = LayerScale(dim, init_values, **dd)
        self.norm2 = _norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd)

    def forward(self, token: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Class token (B, 1, C) and positions (B, N, C) to the class token."""
        token = token + self.ls1(self.attn(self.norm1(torch.cat([token, x], dim=1))))
        return token + self.ls2(self.mlp(self.norm2(token)))


class FourierPosition(nn.Module):
    """Sines and cosines of the row and the column, projected to the channels, for maps of any size.

    Rows and columns count from 1, in parts of 2 pi over the whole side, as in DETR (arXiv 2005.12872) and XCiT.
    """

    def __init__(self, dim: int, num_freqs: int = 16, temperature: float = 10000., device=None, dtype=None):
        super().__init__()
        self.num_freqs = num_freqs
        self.temperature = temperature
        self.proj = nn.Linear(4 * num_freqs, dim, device=device, dtype=dtype)

    def _features(self, size: int, like: torch.Tensor) -> torch.Tensor:
        """(size, 2 num_freqs), in float32."""
        position = torch.arange(1, size + 1, device=like.device, dtype=torch.float32) * (2. * math.pi / size)
        exponent = torch.arange(self.num_freqs, device=like.device, dtype=torch.float32) / self.num_freqs
        angle = position.unsqueeze(1) * self.temperature ** -exponent
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to the positions (1, H, W, C) to add to it."""
        H, W = x.shape[1], x.shape[2]
        rows = self._features(H, x).unsqueeze(1).expand(-1, W, -1)
        columns = self._features(W, x).unsqueeze(0).expand(H, -1, -1)
        return self.proj(torch.cat([rows, columns], dim=2).to(self.proj.weight.dtype)).unsqueeze(0)
