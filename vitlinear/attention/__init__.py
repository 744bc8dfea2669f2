"""The attention mechanisms: one file each, independent of timm and of the backbones.

Every module takes and returns (B, H, W, C) maps of any H and W and is built as `Attention(dim, num_heads, ...,
device=None, dtype=None)`, so that a pyramid can swap one for another by name.
"""
from typing import Callable, Union

from torch import nn

from .linear import LinearAttention, linear_attention
from .qna import QnAAttention, QnAUpsample, qna_attention
from .softmax import SoftmaxAttention
from .vicinity import VicinityAttention, clamp_magnitude, vicinity_attention
from .window import WindowAttention

ATTENTION_LAYERS = {
    'linear': LinearAttention,
    'qna': QnAAttention,
    'softmax': SoftmaxAttention,
    'vicinity': VicinityAttention,
    'window': WindowAttention,
}

__all__ = [
    'ATTENTION_LAYERS',
    'LinearAttention',
    'QnAAttention',
    'QnAUpsample',
    'SoftmaxAttention',
    'VicinityAttention',
    'WindowAttention',
    'clamp_magnitude',
    'get_attention_layer',
    'linear_attention',
    'qna_attention',
    'vicinity_attention',
]


def get_attention_layer(attn_layer: Union[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    """Attention module class by name; a class or factory is passed through.

    Raises:
        ValueError: The name is unknown.
    """
    if not isinstance(attn_layer, str):
        return attn_layer
    if attn_layer not in ATTENTION_LAYERS:
        raise ValueError(f"Unknown attn_layer '{attn_layer}', expected one of {', '.join(sorted(ATTENTION_LAYERS))}.")
    return ATTENTION_LAYERS[attn_layer]
