"""Softmax attention to few keys: the auxiliary branch of linear-angular attention."""
from ..._dispatch import primitive
from . import autograd, torch
from .torch import pool_keys

masked_softmax = primitive(torch=torch.masked_softmax, autograd=autograd.masked_softmax)

__all__ = ['masked_softmax', 'pool_keys']
