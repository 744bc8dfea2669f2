"""The series of all numbers of steps of a walk."""
from ..._dispatch import primitive
from . import autograd, torch

walk_series = primitive(torch=torch.walk_series, autograd=autograd.walk_series)

__all__ = ['walk_series']
