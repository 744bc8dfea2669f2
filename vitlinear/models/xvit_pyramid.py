"""X-ViT-Pyramid

Paper: 'X-ViT: High Performance Linear Vision Transformer without Softmax', https://arxiv.org/abs/2205.13805, T4V
workshop at CVPR 2022

XNorm attention in a pyramid in the manner of PVTv2 (arXiv 2106.13797), for feature maps at four strides.

Documented in the paper: the operator and its axes.
Ours: the models xvit_pyramid_nano, tiny, small and base altogether; the paper's own are flat, see xvit.py.
"""
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..zoo.records import weights_cfg
from ._pyramid import Pyramid
from ._timm import base_cfg, build_model
from ._weights import own_filter_fn as checkpoint_filter_fn
from .xvit import FAMILY

__all__ = ['XNormPyramid']


class XNormPyramid(Pyramid):
    """The shared pyramid around XNorm attention. Ours: X-ViT has one width and stride throughout.

    Positions reach the attention through the convolutions of the patch embeddings and MLPs, as in PVTv2. There is no
    batch norm.
    """

    def __init__(
            self,
            embed_dims: Sequence[int] = (64, 128, 256, 512),
            depths: Sequence[int] = (3, 3, 12, 3),
            num_heads: int | Sequence[int] = (1, 2, 4, 8),
            mlp_ratios: float | Sequence[float] = 4.,
            attn_layer: str | Callable[..., nn.Module] = 'xnorm',
            attn_kwargs: dict[str, Any] | None = None,
            attn_ratio: float = .5,
            **kwargs: Any,
    ):
        """
        Args:
            embed_dims, depths, num_heads, mlp_ratios: Channels, blocks, heads and expansion of the MLP of each stage.
            attn_layer: Mechanism by name, or a module class or factory.
            attn_kwargs: Further arguments of the mechanism.
            attn_ratio: Channels of queries, keys and values each over those of the map, without effect on other
                mechanisms than XNorm attention.
            kwargs: As for `Pyramid`.
        """
        if attn_layer == 'xnorm':
            attn_kwargs = dict(dict(attn_ratio=attn_ratio), **(attn_kwargs or {}))
        super().__init__(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, attn_layer=attn_layer,
            attn_kwargs=attn_kwargs, **kwargs)


_create_xvit_pyramid = partial(build_model, XNormPyramid, pretrained_filter_fn=checkpoint_filter_fn)

_cfg = partial(base_cfg, paper_ids='arXiv:2205.13805', paper_name=FAMILY.paper)

default_cfgs = generate_default_cfgs({
    # a tag with weights comes first and the default is starred, or its classes would become those of the bare name
    'xvit_pyramid_nano.fashion_mnist': _cfg(**weights_cfg('xvit_pyramid_nano.fashion_mnist')),
    'xvit_pyramid_nano.untrained*': _cfg(input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0),
    'xvit_pyramid_tiny.untrained': _cfg(),
    'xvit_pyramid_small.untrained': _cfg(),
    'xvit_pyramid_base.untrained': _cfg(),
})


@register_model
def xvit_pyramid_nano(pretrained: bool = False, **kwargs: Any) -> XNormPyramid:
    """X-ViT-Pyramid-Nano (ours), for images of 28 to 64 pixels."""
    model_args = dict(
        embed_dims=(32, 64, 128, 160), depths=(1, 3, 4, 1), num_heads=(1, 2, 4, 5), mlp_ratios=(4., 4., 3., 2.),
        attn_ratio=.75, patch_size=3, patch_stride=2)
    return _create_xvit_pyramid('xvit_pyramid_nano', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def xvit_pyramid_tiny(pretrained: bool = False, **kwargs: Any) -> XNormPyramid:
    """X-ViT-Pyramid-Tiny (ours)."""
    model_args = dict(embed_dims=(48, 96, 192, 384), depths=(2, 2, 8, 2))
    return _create_xvit_pyramid('xvit_pyramid_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def xvit_pyramid_small(pretrained: bool = False, **kwargs: Any) -> XNormPyramid:
    """X-ViT-Pyramid-Small (ours)."""
    return _create_xvit_pyramid('xvit_pyramid_small', pretrained=pretrained, **kwargs)


@register_model
def xvit_pyramid_base(pretrained: bool = False, **kwargs: Any) -> XNormPyramid:
    """X-ViT-Pyramid-Base (ours)."""
    model_args = dict(embed_dims=(64, 128, 320, 512), depths=(3, 4, 24, 3), num_heads=(1, 2, 5, 8))
    return _create_xvit_pyramid('xvit_pyramid_base', pretrained=pretrained, **dict(model_args, **kwargs))
