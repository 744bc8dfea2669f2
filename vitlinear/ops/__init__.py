"""The mathematics: functions from tensors to tensors, one file for each mechanism."""
from .linear import linear_attention
from .linear_angular import linear_angular_attention, masked_softmax_attention
from .qna import qna_attention
from .random_walk import random_walk_attention
from .vicinity import clamp_magnitude, vicinity_attention
from .xnorm import xnorm_attention

__all__ = [
    'clamp_magnitude',
    'linear_angular_attention',
    'linear_attention',
    'masked_softmax_attention',
    'qna_attention',
    'random_walk_attention',
    'vicinity_attention',
    'xnorm_attention',
]
