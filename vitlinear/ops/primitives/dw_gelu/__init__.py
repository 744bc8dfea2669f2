"""Depthwise convolutions of channels-last maps; their fusion with the GELU that follows is for kernels to come."""
from ..._dispatch import primitive
from . import autograd, torch

depthwise = primitive(torch=torch.depthwise, autograd=autograd.depthwise)

__all__ = ['depthwise']
