"""Castling-LeViT: 1x1 convolutions of small maps are linear layers."""
import torch
from timm.models.levit import LevitBlock, LevitDownsample, LevitMlp, LevitStage
from torch import nn

from ..layers._common import merge_heads
from ..layers.levit import LevitAttention, LevitAttentionDownsample, PointwiseNorm
from .linear_angular import attend
from .onednn import linear_gelu
from .rows import part, reads

# Positions of a map up to which 1x1 convolutions are taken as linear layers. Measured: half of the time at 7 x 7
# (bfloat16 and float32), the same at 64 x 64.
LINEAR_UP_TO_POSITIONS = 1024

reads(PointwiseNorm, convolutions=('linear',))


def _pointwise(layer: PointwiseNorm, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)` of (B, C, H, W)."""
    conv, norm = layer.linear, layer.bn
    known = type(norm) is nn.Identity or type(norm) is nn.BatchNorm2d
    if x.shape[2] * x.shape[3] > LINEAR_UP_TO_POSITIONS or not known or torch.is_autocast_enabled('cpu'):
        return layer(x)
    x = linear_gelu(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias, packed=getattr(conv, 'packed', None))
    if type(norm) is nn.BatchNorm2d:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        x = torch.addcmul(torch.addcmul(norm.bias, norm.running_mean, scale, value=-1), x, scale)
    return x.permute(0, 3, 1, 2)


def _projected(layer: nn.Module, y: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    y = merge_heads(y).unflatten(1, size).permute(0, 3, 1, 2)
    return _pointwise(layer.proj.ln, layer.proj.act(y))


def _heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, [num_heads, -1]).transpose(1, 2)


def _attention(layer: LevitAttention, x: torch.Tensor) -> torch.Tensor:
    qkv = _heads(_pointwise(layer.qkv, x), layer.num_heads)
    q, k, v = qkv.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=3)
    return _projected(layer, attend(layer, q, k, v, x.shape[2:]), x.shape[2:])


def _attention_downsample(layer: LevitAttentionDownsample, x: torch.Tensor) -> torch.Tensor:
    k, v = _heads(_pointwise(layer.kv, x), layer.num_heads).split([layer.key_dim, layer.value_dim], dim=3)
    q = _pointwise(layer.q.ln, layer.q.down(x))
    y = attend(layer, _heads(q, layer.num_heads), k, v, x.shape[2:], stride=2)
    return _projected(layer, y, q.shape[2:])


def _mlp(layer: LevitMlp, x: torch.Tensor) -> torch.Tensor:
    return _pointwise(layer.ln2, layer.drop(layer.act(_pointwise(layer.ln1, x))))


@part(LevitStage)
def levit_stage(layer: LevitStage, x: torch.Tensor, owned: bool) -> torch.Tensor:
    """(B, C, H, W) to (B, C', H', W')."""
    for child in (layer.downsample, *layer.blocks):
        attention = getattr(child, 'attn', getattr(child, 'attn_downsample', None))
        if type(child) is LevitBlock and type(attention) is LevitAttention:
            x = x + _attention(attention, x)
        elif type(child) is LevitDownsample and type(attention) is LevitAttentionDownsample:
            x = _attention_downsample(attention, x)
        else:
            x = child(x)
            continue
        x = x + _mlp(child.mlp, x)
    return x
