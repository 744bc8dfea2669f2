"""Attention over the windows of a map with learned queries: a score is one number in all windows that hold it."""
from ..._dispatch import primitive
from . import autograd, torch, triton
from .torch import shifted_windows, spread_of, window_kernel

window_attention = primitive(
    torch=torch.window_attention, autograd=autograd.window_attention, triton=triton.window_attention)

__all__ = ['shifted_windows', 'spread_of', 'window_attention', 'window_kernel']
