"""Depthwise convolutions of channels-last maps, in plain operations."""
import torch
import torch.nn.functional as F


def depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Depthwise cross-correlation of stride 1, with zeros around the map so that its size stays.

    Cost: 2 k l H W C operations, bound by memory.

    Args:
        x: Map (B, H, W, C); its memory is read in place as a channels-last tensor.
        weight: (C, 1, k, l), k and l odd.
        bias: (C,), or None.

    Returns:
        (B, H, W, C).
    """
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, [1, 1], padding, [1, 1], weight.shape[0])
    return x.permute(0, 2, 3, 1)


def depthwise_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`gelu(depthwise(x, weight, bias))`, the exact GELU; arguments and cost as for `depthwise`."""
    return F.gelu(depthwise(x, weight, bias))
