"""Folding a batch norm into the convolution or linear layer before it."""
from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

_T = TypeVar('_T', nn.Conv2d, nn.Linear)


def wide_dtype(device: torch.device) -> torch.dtype:
    """What weights are folded in."""
    return torch.float32 if device.type == 'mps' else torch.float64


def fold_batch_norm(layer: _T, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> _T:
    """A convolution or linear layer that does what `layer` and then `norm` do in evaluation mode, folded in float64."""
    weight = layer.weight
    wide = [deepcopy(m).to(wide_dtype(weight.device)).eval() for m in (layer, norm)]
    fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    return fuse(*wide).to(weight.dtype).requires_grad_(weight.requires_grad)
