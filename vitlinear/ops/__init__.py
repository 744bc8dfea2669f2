"""The mathematics: functions from tensors to tensors, one file for each mechanism, over a few primitives.

`reference` has every mechanism once more in its textbook form, O(N^2) and meant for float64. Which implementation of a
primitive runs is decided in one place; `use` overrides it, `explain` tells it.
"""
from ._dispatch import PRIMITIVES, explain, use
from .linear import linear_attention
from .linear_angular import linear_angular_attention
from .primitives.dw_gelu import depthwise, depthwise_gelu
from .primitives.few_keys import masked_softmax
from .primitives.tokens import clamp_magnitude, split_heads, token_apply, token_moments, token_sums
from .primitives.walk_series import walk_series
from .primitives.window_softmax import window_softmax
from .primitives.windows import window_attention
from .qna import qna_attention
from .random_walk import random_walk_attention
from .softmax import softmax_attention
from .vicinity import vicinity_attention
from .xnorm import xnorm_attention

__all__ = [
    'PRIMITIVES',
    'clamp_magnitude',
    'depthwise',
    'depthwise_gelu',
    'explain',
    'linear_angular_attention',
    'linear_attention',
    'masked_softmax',
    'qna_attention',
    'random_walk_attention',
    'softmax_attention',
    'split_heads',
    'token_apply',
    'token_moments',
    'token_sums',
    'use',
    'vicinity_attention',
    'walk_series',
    'window_attention',
    'window_softmax',
    'xnorm_attention',
]
