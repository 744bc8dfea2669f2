"""MLPs on (B, H, W, C) maps."""
from collections.abc import Callable

import torch
from timm.layers import Mlp
from torch import nn

from ..ops import depthwise, depthwise_gelu

__all__ = ['ConvMlp', 'DepthwiseConv2d', 'Mlp']


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of stride 1 that keeps the size of the map, and perhaps the GELU that follows."""

    def __init__(self, dim: int, kernel_size: int = 3, gelu: bool = False, device=None, dtype=None):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)
        self.gelu = gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C, H, W), fastest in channels-last memory."""
        x = x.permute(0, 2, 3, 1)
        x = depthwise_gelu(x, self.weight, self.bias) if self.gelu else depthwise(x, self.weight, self.bias)
        return x.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, gelu={self.gelu}'


class ConvMlp(nn.Module):
    """MLP with a depthwise 3x3 convolution before its activation, on (B, H, W, C) maps.

    Paper: PVTv2, arXiv 2106.13797. The convolution applies a GELU itself, in one pass on a GPU, and `act` then nothing.
    """

    def __init__(
            self,
            dim: int,
            hidden_dim: int,
            act_layer: Callable[..., nn.Module] = nn.GELU,
            drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.hidden_dim = hidden_dim
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        gelu = act_layer is nn.GELU
        self.dwconv = DepthwiseConv2d(hidden_dim, gelu=gelu, **dd)
        self.act = nn.Identity() if gelu else act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop2(self.fc2(self.drop1(self.act(x))))
