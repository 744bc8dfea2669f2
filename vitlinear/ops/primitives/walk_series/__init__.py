"""The series of all numbers of steps of a walk."""
from ..._dispatch import primitive
from . import autograd, torch, triton

walk_series = primitive(torch=torch.walk_series, autograd=autograd.walk_series, triton=triton.walk_series)

__all__ = ['walk_series']
