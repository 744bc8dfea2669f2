"""Castling-DeiT: linear-angular attention in the place of softmax attention in DeiT (arXiv 2012.12877).

Paper: Castling-ViT, https://arxiv.org/abs/2211.10526; what all backbones share is in _castling.py.

Documented in the paper: the mechanism, and that it takes the place of DeiT's attention.
From the authors' code, one attention module (https://github.com/GATECH-EIC/Castling-ViT): its arithmetic and its names.
Ours: the configurations; the paper is not known to have the size of castling_deit_small.
"""
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import nn

from ..layers.castling import CastlingTokenAttention
from ._castling import Castling, LayerFactory, castling_cfg, filter_checkpoint
from ._timm import build_model, register_notrace_module
from ._weights import unwrap

__all__ = ['CastlingVisionTransformer', 'CastlingVisionTransformerDistilled']

register_notrace_module(CastlingTokenAttention)


class _CastlingVisionTransformer(Castling):
    """What both forms of Castling-DeiT add to timm's vision transformer."""

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            softmax_below: int = 0,
            scale_with_size: bool = False,
            attn_kwargs: dict[str, Any] | None = None,
            castling_steps: int = 0,
            castling_ramp: Sequence[float] = (.1, .7),
            weight_init: str = '',
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            img_size: Image size.
            softmax_below, scale_with_size, attn_kwargs: Which layers are linear-angular and how, see `LayerFactory`.
            castling_steps, castling_ramp: Forward passes and ramp of `Castling.schedule_castling`, 0 for no schedule.
            weight_init: As for timm's `VisionTransformer`.
            kwargs: As for timm's `VisionTransformer`, but for other kinds of attention and norms of queries and keys.

        Raises:
            ValueError: A value is out of range, or '2d' convolutions meet tokens that are on no fixed grid.
        """
        dd = {'device': device, 'dtype': dtype}
        for name in ('attn_layer', 'block_fn', 'qk_norm', 'scale_attn_norm'):
            if kwargs.pop(name, None):
                raise ValueError(f'{name} does not go with linear-angular attention.')
        super().__init__(img_size=img_size, weight_init='skip', **kwargs, **dd)
        factory = LayerFactory(
            self.patch_embed.grid_size, softmax_below, scale_with_size,
            dict(dict(attn_drop=kwargs.get('attn_drop_rate', 0.)), **(attn_kwargs or {})))
        for block in self.blocks:
            old = block.attn
            block.attn = CastlingTokenAttention(
                self.embed_dim, old.num_heads, old.qkv.bias is not None, old.proj.bias is not None, old.proj_drop.p,
                self.num_prefix_tokens, **factory(1, self.num_prefix_tokens), **dd)
        self._set_grid()
        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)
        self._schedule_from_arguments(castling_steps, castling_ramp)

    def _set_grid(self) -> None:
        fixed = not self.dynamic_img_size and isinstance(self.patch_drop, nn.Identity)
        for block in self.blocks:
            conv = block.attn.dconv
            if not fixed and conv is not None and conv.kernel_size[1] != 1:
                raise ValueError("conv='2d' needs a fixed grid: no dynamic_img_size and patch_drop_rate=0.")
            block.attn.grid = tuple(self.patch_embed.grid_size) if fixed else None

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Fit patch and position embeddings to another image or patch size; arguments as for timm's."""
        super().set_input_size(*args, **kwargs)
        self._set_grid()


class CastlingVisionTransformer(_CastlingVisionTransformer, VisionTransformer):
    """Castling-DeiT with one head: mechanism as published, configuration reconstructed.

    Paper: arXiv 2211.10526; backbone: DeiT, arXiv 2012.12877.
    """


class CastlingVisionTransformerDistilled(_CastlingVisionTransformer, VisionTransformerDistilled):
    """Castling-DeiT with two heads, for distillation: mechanism as published, configuration reconstructed.

    Paper: arXiv 2211.10526; backbone: DeiT, arXiv 2012.12877.
    """


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Take a state dict of ours, or one of DeiT, timm's or original, see `filter_checkpoint`.

    Positions of another image size are resized.
    """
    try:
        state_dict = vit_filter_fn(unwrap(state_dict), model)
    except RuntimeError as e:
        raise ValueError(f'The checkpoint is of another variant: {e}') from e
    return filter_checkpoint(state_dict, model, lambda state_dict, model: state_dict)


def _create_deit(
        variant: str,
        pretrained: bool = False,
        distilled: bool = False,
        **kwargs: Any,
) -> _CastlingVisionTransformer:
    kwargs = dict(dict(patch_size=16, depth=12), **kwargs)
    kwargs.setdefault('out_indices', min(3, kwargs['depth']))
    model_cls = CastlingVisionTransformerDistilled if distilled else CastlingVisionTransformer
    return build_model(
        model_cls, variant, pretrained, checkpoint_filter_fn, feature_cfg=dict(feature_cls='getter'), **kwargs)


_cfg = partial(castling_cfg, fixed_input_size=True)

default_cfgs = generate_default_cfgs({
    'castling_deit_tiny_patch16_224.in1k': _cfg(),
    'castling_deit_small_patch16_224.in1k': _cfg(),
    'castling_deit_base_patch16_224.in1k': _cfg(),
    'castling_deit_tiny_distilled_patch16_224.in1k': _cfg(classifier=('head', 'head_dist')),
    'castling_deit_small_distilled_patch16_224.in1k': _cfg(classifier=('head', 'head_dist')),
    'castling_deit_base_distilled_patch16_224.in1k': _cfg(classifier=('head', 'head_dist')),
})


@register_model
def castling_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> _CastlingVisionTransformer:
    """Castling-DeiT-T: mechanism as published, configuration reconstructed."""
    model_args = dict(embed_dim=192, num_heads=3)
    return _create_deit('castling_deit_tiny_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def castling_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> _CastlingVisionTransformer:
    """Castling-DeiT-S: mechanism as published, configuration reconstructed (no such size is known)."""
    model_args = dict(embed_dim=384, num_heads=6)
    return _create_deit('castling_deit_small_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def castling_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> _CastlingVisionTransformer:
    """Castling-DeiT-B: mechanism as published, configuration reconstructed."""
    model_args = dict(embed_dim=768, num_heads=12)
    return _create_deit('castling_deit_base_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def castling_deit_tiny_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> _CastlingVisionTransformer:
    """Castling-DeiT-T with two heads: mechanism as published, configuration reconstructed."""
    model_args = dict(embed_dim=192, num_heads=3, distilled=True)
    return _create_deit('castling_deit_tiny_distilled_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def castling_deit_small_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> _CastlingVisionTransformer:
    """Castling-DeiT-S with two heads: mechanism as published, configuration reconstructed (no such size is known)."""
    model_args = dict(embed_dim=384, num_heads=6, distilled=True)
    return _create_deit('castling_deit_small_distilled_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def castling_deit_base_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> _CastlingVisionTransformer:
    """Castling-DeiT-B with two heads: mechanism as published, configuration reconstructed."""
    model_args = dict(embed_dim=768, num_heads=12, distilled=True)
    return _create_deit('castling_deit_base_distilled_patch16_224', pretrained, **dict(model_args, **kwargs))
