"""Sums over the windows of a map with learned queries: a score is one number in all windows that hold it."""
from ..._dispatch import primitive
from . import autograd, torch
from .torch import shifted_windows, spread_of, window_kernel

window_sums = primitive(torch=torch.window_sums, autograd=autograd.window_sums)

__all__ = ['shifted_windows', 'spread_of', 'window_kernel', 'window_sums']
