"""Depthwise convolutions of channels-last maps, alone and with the GELU that follows."""
from ..._dispatch import primitive
from . import autograd, torch, triton

depthwise = primitive(torch=torch.depthwise, autograd=autograd.depthwise, triton=triton.depthwise)
depthwise_gelu = primitive(
    torch=torch.depthwise_gelu, autograd=autograd.depthwise_gelu, triton=triton.depthwise_gelu)

__all__ = ['depthwise', 'depthwise_gelu']
