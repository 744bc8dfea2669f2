"""Castling-PVTv2: linear-angular attention in the place of softmax attention in PVTv2 (arXiv 2106.13797).

Paper: Castling-ViT, https://arxiv.org/abs/2211.10526; what all backbones share is in _castling.py.

Documented in the paper: the mechanism. No PVTv2 is in it.
From the authors' code, one attention module (https://github.com/GATECH-EIC/Castling-ViT): its arithmetic and its names;
from later code of the same group: softmax in the last stage.
Ours: the configurations, and castling_nano altogether, for small images.
"""
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.pvt_v2 import checkpoint_filter_fn as pvt_v2_filter_fn
from torch import nn

from ..layers import LinearAngularAttention
from ..zoo.records import weights_cfg
from ._castling import Castling, LayerFactory, castling_cfg, filter_checkpoint
from ._pyramid import Pyramid
from ._timm import build_model

__all__ = ['CastlingPyramid']


class CastlingPyramid(Castling, Pyramid):
    """Castling-PVTv2 for images of any size, without spatial reduction. Reconstructed: not in the paper.

    Backbone: PVTv2, arXiv 2106.13797; that the last stage keeps softmax attention follows later code of the group.
    """

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            embed_dims: Sequence[int] = (64, 128, 320, 512),
            num_heads: int | Sequence[int] = (1, 2, 5, 8),
            mlp_ratios: float | Sequence[float] = (8., 8., 4., 4.),
            patch_stride: int = 4,
            softmax_below: int = 49,
            scale_with_size: bool = False,
            attn_kwargs: dict[str, Any] | None = None,
            castling_steps: int = 0,
            castling_ramp: Sequence[float] = (.1, .7),
            **kwargs: Any,
    ):
        """
        Args:
            img_size: Image size of the training, for `softmax_below` and `scale_with_size`; the model takes any size.
            embed_dims, num_heads, mlp_ratios: Channels, heads and expansion of the MLP of each stage.
            patch_stride: Stride of the stem.
            softmax_below, scale_with_size, attn_kwargs: Which layers are linear-angular and how, see `LayerFactory`.
            castling_steps, castling_ramp: Forward passes and ramp of `Castling.schedule_castling`, 0 for no schedule.
            kwargs: As for `Pyramid`.

        Raises:
            ValueError: A value is out of range.
        """
        attn_kwargs = {'qkv_bias': True, **(attn_kwargs or {})}
        factory = LayerFactory(img_size, softmax_below, scale_with_size, attn_kwargs)
        attn_layer = [
            partial(LinearAngularAttention, **factory(patch_stride * 2 ** i)) for i in range(len(embed_dims))]
        super().__init__(
            embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, patch_stride=patch_stride,
            attn_layer=attn_layer, **kwargs)
        self._schedule_from_arguments(castling_steps, castling_ramp)


def _from_host(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of PVTv2 under our names, without its spatial reductions."""
    out = {k: v for k, v in pvt_v2_filter_fn(state_dict, model).items() if not re.search(r'\.attn\.(sr|norm)\.', k)}
    for k in [k for k in out if '.attn.q.' in k]:
        out[k.replace('.q.', '.qkv.')] = torch.cat([out.pop(k), out.pop(k.replace('.q.', '.kv.'))])
    return out


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Take a state dict of ours, or one of PVTv2, timm's or original, see `filter_checkpoint`."""
    return filter_checkpoint(state_dict, model, _from_host)


def _create_pvt_v2(variant: str, pretrained: bool = False, **kwargs: Any) -> CastlingPyramid:
    kwargs.setdefault('out_indices', tuple(range(len(kwargs['embed_dims']))))
    return build_model(CastlingPyramid, variant, pretrained, checkpoint_filter_fn, **kwargs)


_cfg = partial(castling_cfg, pool_size=(7, 7))

default_cfgs = generate_default_cfgs({
    # a tag with weights comes first and the default is starred, or its classes would become those of the bare name
    'castling_nano.fashion_mnist': _cfg(origin_url=None, **weights_cfg('castling_nano.fashion_mnist')),
    'castling_nano.untrained*': _cfg(input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0, origin_url=None),
    'castling_pvt_v2_b0.in1k': _cfg(),
    'castling_pvt_v2_b1.in1k': _cfg(),
    'castling_pvt_v2_b2.in1k': _cfg(),
})


@register_model
def castling_nano(pretrained: bool = False, **kwargs: Any) -> CastlingPyramid:
    """Castling-Nano (ours): the PVTv2 form for images of 28 to 64 pixels, linear-angular in all stages."""
    model_args = dict(
        img_size=32, embed_dims=(32, 64, 128, 160), depths=(1, 4, 3, 1), num_heads=(1, 2, 4, 5),
        mlp_ratios=(4., 4., 3., 2.), patch_size=3, patch_stride=2, softmax_below=0)
    return _create_pvt_v2('castling_nano', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def castling_pvt_v2_b0(pretrained: bool = False, **kwargs: Any) -> CastlingPyramid:
    """Castling-PVTv2-B0: reconstructed, not in the paper."""
    model_args = dict(depths=(2, 2, 2, 2), embed_dims=(32, 64, 160, 256))
    return _create_pvt_v2('castling_pvt_v2_b0', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def castling_pvt_v2_b1(pretrained: bool = False, **kwargs: Any) -> CastlingPyramid:
    """Castling-PVTv2-B1: reconstructed, not in the paper."""
    model_args = dict(depths=(2, 2, 2, 2), embed_dims=(64, 128, 320, 512))
    return _create_pvt_v2('castling_pvt_v2_b1', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def castling_pvt_v2_b2(pretrained: bool = False, **kwargs: Any) -> CastlingPyramid:
    """Castling-PVTv2-B2: reconstructed, not in the paper."""
    model_args = dict(depths=(3, 4, 6, 3), embed_dims=(64, 128, 320, 512))
    return _create_pvt_v2('castling_pvt_v2_b2', pretrained=pretrained, **dict(model_args, **kwargs))
