"""Castling-LeViT: linear-angular attention in the place of softmax attention in LeViT (arXiv 2104.01136).

Paper: Castling-ViT, https://arxiv.org/abs/2211.10526; what all backbones share is in _castling.py.

Documented in the paper: the mechanism, and that it takes the place of LeViT's attention.
From the authors' code, one attention module (https://github.com/GATECH-EIC/Castling-ViT): its arithmetic.
Ours: all configurations, how queries, keys and values meet on pooled grids, and the widths of the keys.
"""
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import get_act_layer
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models.levit import ConvNorm, Levit, LevitDistilled, LevitMlp
from torch import nn

from .. import inference
from ..layers._common import channels_last
from ..layers.levit import LevitAttention, LevitAttentionDownsample, PointwiseNorm
from ..ops._numerics import check_choice
from ._base import check_input
from ._castling import Castling, LayerFactory, castling_cfg, filter_checkpoint
from ._timm import build_model, register_notrace_module

__all__ = ['CastlingLevit', 'CastlingLevitDistilled']

QK_WIDTHS = ('value', 'key')

for _layer in (LevitAttention, LevitAttentionDownsample):
    register_notrace_module(_layer)


class LevitStem(nn.Sequential):
    """LeViT's stem of strided convolutions with batch norm, in channels-last memory."""

    def __init__(
            self,
            in_chans: int,
            widths: Sequence[int],
            strides: Sequence[int],
            act_layer: type[nn.Module],
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.in_chans = in_chans
        for i, (width, stride) in enumerate(zip(widths, strides), start=1):
            conv = ConvNorm(in_chans, width, 3, stride=stride, padding=1, device=device, dtype=dtype)
            self.add_module(f'conv{i}', conv)
            if i < len(widths):
                self.add_module(f'act{i}', act_layer())
            in_chans = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_input(x, self.in_chans)
        x = channels_last(x)
        for module in self:
            x = module(x)
        return x


def _levit_mlp(mlp: LevitMlp, **dd: Any) -> None:
    """Give timm's MLP our layers."""
    for name, bn_weight_init in (('ln1', 1.), ('ln2', 0.)):
        conv = getattr(mlp, name).linear
        setattr(mlp, name, PointwiseNorm(conv.in_channels, conv.out_channels, bn_weight_init, **dd))


class _CastlingLevit(Castling):
    """What both forms of Castling-LeViT add to timm's LeViT."""

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            in_chans: int = 3,
            embed_dim: Sequence[int] = (256, 384, 512),
            stem_widths: Sequence[int] | None = None,
            stem_strides: Sequence[int] = (2, 2, 2, 2),
            act_layer: str = 'hard_swish',
            attn_act_layer: str | None = None,
            qk_width: str = 'value',
            softmax_below: int = 0,
            scale_with_size: bool = False,
            attn_kwargs: dict[str, Any] | None = None,
            castling_steps: int = 0,
            castling_ramp: Sequence[float] = (.1, .7),
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            img_size: Image size of the training, for `softmax_below` and `scale_with_size`; the model takes any size.
            in_chans: Channels of the input images.
            embed_dim: Channels of each stage.
            stem_widths: Channels of the convolutions of the stem, doubling up to `embed_dim[0]` if None.
            stem_strides: Their strides.
            act_layer: Activation by name.
            attn_act_layer: Activation in attention by name, None for the same.
            qk_width: Channels of queries and keys of a head: 'value', as many as of its values, or 'key' as in LeViT,
                whose weights then fit.
            softmax_below, scale_with_size, attn_kwargs: Which layers are linear-angular and how, see `LayerFactory`.
            castling_steps, castling_ramp: Forward passes and ramp of `Castling.schedule_castling`, 0 for no schedule.
            kwargs: As for timm's `Levit`.

        Raises:
            ValueError: A value is out of range.
        """
        dd = {'device': device, 'dtype': dtype}
        check_choice('qk_width', qk_width, QK_WIDTHS)
        n = len(stem_strides)
        if stem_widths is None:
            stem_widths = [embed_dim[0] // 2 ** (n - 1 - i) for i in range(n)]
        if len(stem_widths) != n or stem_widths[-1] != embed_dim[0]:
            raise ValueError(
                f'stem_widths={tuple(stem_widths)} must have one entry per stride of stem_strides='
                f'{tuple(stem_strides)}, the last of them embed_dim[0]={embed_dim[0]}.')
        factory = LayerFactory(img_size, softmax_below, scale_with_size, attn_kwargs)
        act = get_act_layer(act_layer)
        stem_stride = math.prod(stem_strides)
        super().__init__(
            img_size=stem_stride,  # of the attentions that are replaced below, whose tables would grow with it
            in_chans=in_chans, embed_dim=tuple(embed_dim), stem_stride=stem_stride,
            stem_backbone=LevitStem(in_chans, stem_widths, stem_strides, act, **dd),
            act_layer=act_layer, attn_act_layer=attn_act_layer, use_conv=True, **kwargs, **dd)
        act = get_act_layer(attn_act_layer or act_layer)
        reduction = stem_stride
        for i, stage in enumerate(self.stages):
            if i > 0:
                old = stage.downsample.attn_downsample
                stage.downsample.attn_downsample = LevitAttentionDownsample(
                    embed_dim[i - 1], embed_dim[i], old.val_dim if qk_width == 'value' else old.key_dim, old.val_dim,
                    old.num_heads, act, **factory(reduction), **dd)
                _levit_mlp(stage.downsample.mlp, **dd)
                reduction *= 2
            for block in stage.blocks:
                old = block.attn
                _levit_mlp(block.mlp, **dd)
                block.attn = LevitAttention(
                    embed_dim[i], old.val_dim if qk_width == 'value' else old.key_dim, old.val_dim, old.num_heads, act,
                    **factory(reduction), **dd)
        self._schedule_from_arguments(castling_steps, castling_ramp)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to the last map (B, num_features, H', W')."""
        if not torch.jit.is_scripting():
            if inference.applies(self, x):
                return inference.run((self.stem, *self.stages), x)
            if self.grad_checkpointing:
                return checkpoint_seq(self.stages, self.stem(x))
        return self.stages(self.stem(x))


class CastlingLevit(_CastlingLevit, Levit):
    """Castling-LeViT with one head: mechanism as published, configuration reconstructed.

    Paper: arXiv 2211.10526; backbone: LeViT, arXiv 2104.01136.
    """


class CastlingLevitDistilled(_CastlingLevit, LevitDistilled):
    """Castling-LeViT with two heads, for distillation: mechanism as published, configuration reconstructed.

    Paper: arXiv 2211.10526; backbone: LeViT, arXiv 2104.01136.
    """


def _from_host(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of timm's LeViT under our names, without its tables of positions."""
    out = {k: v for k, v in state_dict.items() if 'attention_bias' not in k}
    matrices = (k for k, v in out.items() if k.endswith('.linear.weight') and v.ndim == 2 and k.startswith('stages.'))
    out = {**out, **{k: out[k][:, :, None, None] for k in matrices}}
    key = 'stages.0.blocks.0.attn.qkv.linear.weight'
    if key in out and len(out[key]) < len(model.state_dict()[key]):
        raise ValueError("The checkpoint's queries and keys are narrower than its values, as in LeViT: create the "
                         "model with qk_width='key'.")
    return out


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Take a state dict of ours, or one of timm's LeViT to start training from, see `filter_checkpoint`.

    The latter is of the linear or the convolutional form, and goes into models with `qk_width='key'`.
    """
    return filter_checkpoint(state_dict, model, _from_host, stem='stem.conv1.linear')


def _create_levit(variant: str, pretrained: bool = False, distilled: bool = True, **kwargs: Any) -> _CastlingLevit:
    kwargs.setdefault('out_indices', tuple(range(len(kwargs['embed_dim']))))
    model_cls = CastlingLevitDistilled if distilled else CastlingLevit
    return build_model(model_cls, variant, pretrained, checkpoint_filter_fn, **kwargs)


_cfg = partial(
    castling_cfg, pool_size=(4, 4), first_conv='stem.conv1.linear', classifier=('head.linear', 'head_dist.linear'))

default_cfgs = generate_default_cfgs({
    'castling_levit_128s.in1k': _cfg(),
    'castling_levit_128.in1k': _cfg(),
    'castling_levit_192.in1k': _cfg(),
    'castling_levit_256.in1k': _cfg(),
    'castling_levit_384.in1k': _cfg(),
})


@register_model
def castling_levit_128s(pretrained: bool = False, **kwargs: Any) -> _CastlingLevit:
    """Castling-LeViT-128S: mechanism as published, configuration reconstructed (this size is not in the paper)."""
    model_args = dict(embed_dim=(128, 256, 384), key_dim=16, num_heads=(4, 6, 8), depth=(2, 3, 4))
    return _create_levit('castling_levit_128s', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def castling_levit_128(pretrained: bool = False, **kwargs: Any) -> _CastlingLevit:
    """Castling-LeViT-128: mechanism as published, configuration reconstructed."""
    model_args = dict(embed_dim=(128, 256, 384), key_dim=16, num_heads=(4, 8, 12), depth=(4, 4, 4))
    return _create_levit('castling_levit_128', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def castling_levit_192(pretrained: bool = False, **kwargs: Any) -> _CastlingLevit:
    """Castling-LeViT-192: mechanism as published, configuration reconstructed."""
    model_args = dict(embed_dim=(192, 288, 384), key_dim=32, num_heads=(3, 5, 6), depth=(4, 4, 4))
    return _create_levit('castling_levit_192', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def castling_levit_256(pretrained: bool = False, **kwargs: Any) -> _CastlingLevit:
    """Castling-LeViT-256: mechanism as published, configuration reconstructed."""
    model_args = dict(embed_dim=(256, 384, 512), key_dim=32, num_heads=(4, 6, 8), depth=(4, 4, 4))
    return _create_levit('castling_levit_256', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def castling_levit_384(pretrained: bool = False, **kwargs: Any) -> _CastlingLevit:
    """Castling-LeViT-384: mechanism as published, configuration reconstructed."""
    model_args = dict(embed_dim=(384, 512, 768), key_dim=32, num_heads=(6, 9, 12), depth=(4, 4, 4))
    return _create_levit('castling_levit_384', pretrained=pretrained, **dict(model_args, **kwargs))
