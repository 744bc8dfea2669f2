"""Pre-norm blocks, patch embeddings and stages of pyramids.

Their structure is that of PVTv2 (arXiv 2106.13797). Maps are (B, H, W, C) within a stage and leave it as a (B, C, H, W)
view in channels-last memory, so neither norms nor convolutions copy.
"""
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.layers import DropPath
from timm.models import checkpoint
from torch import nn

from ._common import channels_last
from .mlp import ConvMlp


class Block(nn.Module):
    """Pre-norm attention and MLP on a (B, H, W, C) map."""

    def __init__(
            self,
            dim: int,
            attn: nn.Module,
            mlp_ratio: float = 4.,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            act_layer: Callable[..., nn.Module] = nn.GELU,
            norm_layer: Callable[..., nn.Module] = partial(nn.LayerNorm, eps=1e-6),
            mlp_layer: Callable[..., nn.Module] = ConvMlp,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Overlapping patch embedding: strided convolution and norm, (B, C, H, W) to (B, C', H', W').

    A side of n becomes ceil(n / stride) for odd `patch_size`.
    """

    def __init__(
            self,
            in_chans: int,
            embed_dim: int,
            patch_size: int = 3,
            stride: int = 2,
            norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=stride, padding=patch_size // 2, **dd)
        self.norm = norm_layer(embed_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', H', W') in channels-last memory."""
        x = self.proj(channels_last(x))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Downsampling, blocks and perhaps a norm, (B, C, H, W) to (B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        """
        Args:
            downsample: (B, C, H, W) to (B, C', H', W').
            blocks: Each takes and returns (B, H', W', C').
        """
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x


class PyramidStage(Stage):
    """Patch embedding, blocks and norm, (B, C, H, W) to (B, C', H', W')."""

    def __init__(
            self,
            in_dim: int,
            dim: int,
            attn_layers: Sequence[nn.Module],
            downsample: bool = True,
            mlp_ratio: float = 4.,
            proj_drop: float = 0.,
            drop_path: Sequence[float] = (),
            act_layer: type[nn.Module] = nn.GELU,
            norm_layer: Callable[..., nn.Module] = partial(nn.LayerNorm, eps=1e-6),
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        embed = PatchEmbed(in_dim, dim, **dd) if downsample else nn.Identity()
        super().__init__(embed, [
            Block(
                dim, attn, mlp_ratio=mlp_ratio, proj_drop=proj_drop, drop_path=rate, act_layer=act_layer,
                norm_layer=norm_layer, **dd)
            for attn, rate in zip(attn_layers, drop_path, strict=True)])
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        x = self.forward_blocks(self.downsample(x).permute(0, 2, 3, 1))
        return self.norm(x).permute(0, 3, 1, 2)
