"""Folding a batch norm into the convolution before it."""
from copy import deepcopy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def wide_dtype(device: torch.device) -> torch.dtype:
    """What weights are folded in."""
    return torch.float32 if device.type == 'mps' else torch.float64


def fold_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution that does what `conv` and then `norm` do in evaluation mode, folded in float64."""
    weight = conv.weight
    wide = [deepcopy(m).to(wide_dtype(weight.device)).eval() for m in (conv, norm)]
    return fuse_conv_bn_eval(*wide).to(weight.dtype).requires_grad_(weight.requires_grad)
