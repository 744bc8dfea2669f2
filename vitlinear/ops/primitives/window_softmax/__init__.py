"""Softmax attention within windows of a map."""
from ..._dispatch import primitive
from . import compiled, torch
from .torch import attend, cut_map, join_map, relative_position_bias

window_softmax = primitive(torch=torch.window_softmax, compiled=compiled.window_softmax)

__all__ = ['attend', 'cut_map', 'join_map', 'relative_position_bias', 'window_softmax']
