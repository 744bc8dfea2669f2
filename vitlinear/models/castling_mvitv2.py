"""Castling-MViTv2: linear-angular attention in the place of softmax attention in MViTv2 (arXiv 2112.01526).

Paper: Castling-ViT, https://arxiv.org/abs/2211.10526; what all backbones share is in _castling.py.

Documented in the paper: the mechanism, and that it takes the place of MViTv2's attention.
From the authors' code, one attention module (https://github.com/GATECH-EIC/Castling-ViT): its arithmetic.
Ours: all configurations, that relative positions go, and that keys and values are pooled with the queries' stride.
"""
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.mvitv2 import checkpoint_filter_fn as mvitv2_filter_fn
from torch import nn

from ..layers.castling import CastlingMultiScaleAttention
from ._base import check_input
from ._castling import Castling, LayerFactory, castling_cfg, filter_checkpoint
from ._timm import build_model, register_notrace_module
from ._weights import not_a_checkpoint_of

__all__ = ['CastlingMultiScaleVit']

register_notrace_module(CastlingMultiScaleAttention)


class CastlingMultiScaleVit(Castling, MultiScaleVit):
    """Castling-MViTv2 for images of any size: mechanism as published, configuration reconstructed.

    MViTv2's relative positions are left out: they belong to a softmax that inference does not have.

    Paper: arXiv 2211.10526; backbone: MViTv2, arXiv 2112.01526.
    """

    def __init__(
            self,
            cfg: MultiScaleVitCfg,
            img_size: int | tuple[int, int] = 224,
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
            cfg: As for timm's `MultiScaleVit`, without class token and absolute positions.
            img_size: Image size of the training, for `softmax_below` and `scale_with_size`; the model takes any size.
            softmax_below, scale_with_size, attn_kwargs: Which layers are linear-angular and how, see `LayerFactory`.
            castling_steps, castling_ramp: Forward passes and ramp of `Castling.schedule_castling`, 0 for no schedule.
            kwargs: As for timm's `MultiScaleVit`.

        Raises:
            ValueError: A value is out of range, or `cfg` has a class token, absolute positions or another pooling.
        """
        if cfg.use_cls_token or cfg.use_abs_pos or cfg.pool_first or cfg.mode != 'conv':
            raise ValueError(f'{cfg} must have pooling by convolutions, no class token and no absolute positions.')
        dd = {'device': device, 'dtype': dtype}
        factory = LayerFactory(img_size, softmax_below, scale_with_size, attn_kwargs)
        super().__init__(replace(cfg, rel_pos_type=''), img_size=img_size, **kwargs, **dd)
        reduction = cfg.patch_stride[0]
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage.blocks):
                old = block.attn
                stride = cfg.stride_q[i][0] if j == 0 else 1
                reduction *= stride
                block.attn = CastlingMultiScaleAttention(
                    old.qkv.in_features, old.dim_out, old.num_heads, cfg.qkv_bias, cfg.kernel_qkv[0], stride,
                    partial(nn.LayerNorm, eps=cfg.norm_eps), cfg.residual_pooling, **factory(reduction), **dd)
        self.apply(self._init_weights)
        self._schedule_from_arguments(castling_steps, castling_ramp)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all weights, which timm's MViTv2 does in its constructor alone.

        Args:
            needs_reset: Also call `reset_parameters()` of modules that initialise themselves when constructed, as is
                needed after `to_empty()`.
        """
        for m in self.modules():
            if needs_reset and hasattr(m, 'reset_parameters'):
                m.reset_parameters()
        self.apply(self._init_weights)
        self._restart_schedule()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to tokens (B, H' * W', num_features)."""
        check_input(x, self.in_chans)
        x, feat_size = self.patch_embed(x)
        for stage in self.stages:
            x, feat_size = stage(x, feat_size)
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        # not left to timm's: torch.fx looks for functions that it does not trace where `forward` is defined
        return self.forward_head(self.forward_features(x))


def _from_host(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of MViTv2 under our names, without its tables of positions."""
    try:
        return mvitv2_filter_fn({k: v for k, v in state_dict.items() if '.rel_pos_' not in k}, model)
    except KeyError as e:  # a block that the model has not
        raise not_a_checkpoint_of(state_dict, model) from e


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Take a state dict of ours, or one of MViTv2, timm's or original, see `filter_checkpoint`."""
    return filter_checkpoint(state_dict, model, _from_host)


def _create_mvitv2(variant: str, pretrained: bool = False, **kwargs: Any) -> CastlingMultiScaleVit:
    kwargs.setdefault('out_indices', len(kwargs['model_cfg'].depths))
    return build_model(
        CastlingMultiScaleVit, variant, pretrained, checkpoint_filter_fn, feature_cfg=dict(feature_cls='getter'),
        **kwargs)


_cfg = partial(castling_cfg, classifier='head.fc')

default_cfgs = generate_default_cfgs({
    'castling_mvitv2_tiny.in1k': _cfg(),
    'castling_mvitv2_small.in1k': _cfg(),
    'castling_mvitv2_base.in1k': _cfg(),
})


@register_model
def castling_mvitv2_tiny(pretrained: bool = False, **kwargs: Any) -> CastlingMultiScaleVit:
    """Castling-MViTv2-T: mechanism as published, configuration reconstructed."""
    model_args = dict(model_cfg=MultiScaleVitCfg(depths=(1, 2, 5, 2)))
    return _create_mvitv2('castling_mvitv2_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def castling_mvitv2_small(pretrained: bool = False, **kwargs: Any) -> CastlingMultiScaleVit:
    """Castling-MViTv2-S: mechanism as published, configuration reconstructed."""
    model_args = dict(model_cfg=MultiScaleVitCfg(depths=(1, 2, 11, 2)))
    return _create_mvitv2('castling_mvitv2_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def castling_mvitv2_base(pretrained: bool = False, **kwargs: Any) -> CastlingMultiScaleVit:
    """Castling-MViTv2-B: mechanism as published, configuration reconstructed."""
    model_args = dict(model_cfg=MultiScaleVitCfg(depths=(2, 3, 16, 3)))
    return _create_mvitv2('castling_mvitv2_base', pretrained=pretrained, **dict(model_args, **kwargs))
