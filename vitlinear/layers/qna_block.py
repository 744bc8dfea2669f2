"""What QnA-ViT has around its attention: stem, downsampling blocks, stages."""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from ._common import channels_last
from .block import Stage
from .mlp import Mlp
from .qna import QnAAttention


class SamePatchEmbed(nn.Module):
    """Strided convolution without bias or norm, (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride)).

    Padded as TensorFlow's SAME, the odd row or column at the end.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, stride: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.patch_size = patch_size
        self.stride = stride
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=stride, bias=False, **dd)

    def _padding(self, size: int) -> tuple[int, int]:
        total = max(0, ((size + self.stride - 1) // self.stride - 1) * self.stride + self.patch_size - size)
        return total // 2, total - total // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top, bottom = self._padding(x.shape[2])
        left, right = self._padding(x.shape[3])
        if top + bottom + left + right > 0:
            x = F.pad(x, [left, right, top, bottom])
        return self.proj(channels_last(x))


class QnADownsample(nn.Module):
    """Learned-query block of stride 2, (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2)).

    The authors drop its MLP branch at random in training, and never its attention.
    """

    def __init__(
            self,
            dim: int,
            out_dim: int,
            num_heads: int,
            kernel_size: int = 3,
            num_queries: int = 2,
            attn_scale_std: float = 0.02,
            mlp_ratio: float = 4.,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            act_layer: Callable[..., nn.Module] = nn.GELU,
            norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
            mlp_layer: Callable[..., nn.Module] = Mlp,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.skip = nn.Conv2d(dim, out_dim, 1, stride=2, bias=False, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.attn = QnAAttention(
            dim, num_heads, kernel_size=kernel_size, stride=2, num_queries=num_queries, attn_dim=out_dim,
            attn_scale_std=attn_scale_std, **dd)
        self.norm2 = norm_layer(out_dim, **dd)
        self.mlp = mlp_layer(out_dim, int(out_dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', H', W') in channels-last memory."""
        y = self.skip(x).permute(0, 2, 3, 1) + self.attn(self.norm1(x.permute(0, 2, 3, 1)))
        return (y + self.drop_path2(self.mlp(self.norm2(y)))).permute(0, 3, 1, 2)


class QnAStage(Stage):
    """Downsampling and blocks, (B, C, H, W) to (B, C', H', W')."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        return self.forward_blocks(self.downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
