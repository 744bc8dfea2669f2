"""Attention layers: one file for each mechanism, independent of timm and of the backbones.

Every layer takes and returns (B, H, W, C) maps of any H and W and is built as `Attention(dim, num_heads, ...,
device=None, dtype=None)`, so that a pyramid can swap one for another by name.
"""
from collections.abc import Callable

from torch import nn

from ..ops._numerics import check_choice
from .linear import LinearAttention, SoftmaxAttention
from .linear_angular import LinearAngularAttention
from .qna import QnAAttention
from .random_walk import RandomWalkAttention
from .vicinity import VicinityAttention
from .window import WindowAttention
from .xnorm import XNormAttention, XNormClassAttention

ATTENTION_LAYERS = {
    'linear': LinearAttention,
    'linear_angular': LinearAngularAttention,
    'qna': QnAAttention,
    'random_walk': RandomWalkAttention,
    'softmax': SoftmaxAttention,
    'vicinity': VicinityAttention,
    'window': WindowAttention,
    'xnorm': XNormAttention,
}

__all__ = [
    'ATTENTION_LAYERS',
    'LinearAngularAttention',
    'LinearAttention',
    'QnAAttention',
    'RandomWalkAttention',
    'SoftmaxAttention',
    'VicinityAttention',
    'WindowAttention',
    'XNormAttention',
    'XNormClassAttention',
    'get_attention_layer',
]


def get_attention_layer(attn_layer: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Attention module class by name; a class or factory is passed through.

    Raises:
        ValueError: The name is unknown.
    """
    if not isinstance(attn_layer, str):
        return attn_layer
    check_choice('attn_layer', attn_layer, sorted(ATTENTION_LAYERS))
    return ATTENTION_LAYERS[attn_layer]
