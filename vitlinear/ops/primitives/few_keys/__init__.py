"""Softmax attention to few keys: the auxiliary branch of linear-angular attention."""
from ..._dispatch import primitive
from ..._numerics import no_autocast
from . import autograd, torch
from .torch import pool_keys

masked_softmax = no_autocast(primitive(torch=torch.masked_softmax, autograd=autograd.masked_softmax))

__all__ = ['masked_softmax', 'pool_keys']
