"""GKViT, a graph-kernel ViT

Paper: 'Improving Vision Attention with Random Walk Graph Kernel', https://openreview.net/forum?id=LTvSyvRaJO, withdrawn

`FAMILY` says what the abstract documents, what is inferred from it and what is ours.
"""
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..zoo.families import Family
from ..zoo.records import weights_cfg
from ._pyramid import Pyramid
from ._timm import base_cfg, build_model
from ._weights import own_filter_fn as checkpoint_filter_fn

__all__ = ['GraphKernelVisionTransformer']

FAMILY = Family(
    name='gkvit',
    title='GKViT, a graph-kernel ViT',
    paper='Improving Vision Attention with Random Walk Graph Kernel',
    url='https://openreview.net/forum?id=LTvSyvRaJO',
    text=(
        'A SegFormer-like pyramid without reduction of keys and values, whose attention is linear in pixels at '
        'every stage: walks of any number of steps between queries and keys. The paper, an anonymous submission '
        'to ICLR 2023, was withdrawn, and neither its text nor code is public. Its abstract documents the kernel, '
        'the bipartite graph, the inverse of a small matrix, and savings of 15 % of the parameters and 10 to 25 % '
        "of the computation in semantic segmentation. That the backbone is SegFormer's (MiT) without the "
        'convolutions that reduce keys and values is inferred from these savings. Feature map, normalisation, '
        "every formula and every size are ours, as are the names gkvit_*; nothing here reproduces the authors' "
        'models or results.'
    ),
    bibtex='''@misc{randomwalk2022,
  title={Improving Vision Attention with Random Walk Graph Kernel},
  author={Anonymous},
  howpublished={OpenReview, forum LTvSyvRaJO, submission to ICLR 2023, withdrawn},
  year={2022}
}''',
)


class GraphKernelVisionTransformer(Pyramid):
    """GKViT: the shared pyramid around attention by random walks. Ours, after the abstract of the paper."""

    def __init__(
            self,
            embed_dims: Sequence[int] = (64, 128, 320, 512),
            depths: Sequence[int] = (2, 2, 2, 2),
            num_heads: int | Sequence[int] = (2, 4, 10, 16),
            mlp_ratios: float | Sequence[float] = 4.,
            attn_layer: str | Callable[..., nn.Module] = 'random_walk',
            attn_kwargs: dict[str, Any] | None = None,
            **kwargs: Any,
    ):
        """
        Args:
            embed_dims, depths, mlp_ratios: Channels, blocks and expansion of the MLP of each stage.
            num_heads: Attention heads of each stage, of 32 channels by default.
            attn_layer: Mechanism by name, or a module class or factory.
            attn_kwargs: Further arguments of the mechanism, such as `dict(init_beta=0.)` for attention of one step, or
                `dict(mode='walk')` for walks between softmax features.
            kwargs: As for `Pyramid`.
        """
        super().__init__(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, attn_layer=attn_layer,
            attn_kwargs=attn_kwargs, **kwargs)


_create_gkvit = partial(build_model, GraphKernelVisionTransformer, pretrained_filter_fn=checkpoint_filter_fn)

_cfg = partial(base_cfg, paper_name=FAMILY.paper)

default_cfgs = generate_default_cfgs({
    # a tag with weights comes first and the default is starred, or its classes would become those of the bare name
    'gkvit_nano.fashion_mnist': _cfg(**weights_cfg('gkvit_nano.fashion_mnist')),
    'gkvit_nano.untrained*': _cfg(),
    'gkvit_tiny.untrained': _cfg(),
    'gkvit_small.untrained': _cfg(),
    'gkvit_base.untrained': _cfg(),
    'gkvit_large.untrained': _cfg(),
})


@register_model
def gkvit_nano(pretrained: bool = False, **kwargs: Any) -> GraphKernelVisionTransformer:
    """GKViT-Nano, of the channels and depths of SegFormer's MiT-B0."""
    model_args = dict(embed_dims=(32, 64, 160, 256), num_heads=(1, 2, 5, 8))
    return _create_gkvit('gkvit_nano', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def gkvit_tiny(pretrained: bool = False, **kwargs: Any) -> GraphKernelVisionTransformer:
    """GKViT-Tiny, of the channels and depths of SegFormer's MiT-B1."""
    return _create_gkvit('gkvit_tiny', pretrained=pretrained, **kwargs)


@register_model
def gkvit_small(pretrained: bool = False, **kwargs: Any) -> GraphKernelVisionTransformer:
    """GKViT-Small, of the channels and depths of SegFormer's MiT-B2; our recipe has `drop_path_rate=0.1`."""
    return _create_gkvit('gkvit_small', pretrained=pretrained, **dict(dict(depths=(3, 4, 6, 3)), **kwargs))


@register_model
def gkvit_base(pretrained: bool = False, **kwargs: Any) -> GraphKernelVisionTransformer:
    """GKViT-Base, of the channels and depths of SegFormer's MiT-B3; our recipe has `drop_path_rate=0.3`."""
    return _create_gkvit('gkvit_base', pretrained=pretrained, **dict(dict(depths=(3, 4, 18, 3)), **kwargs))


@register_model
def gkvit_large(pretrained: bool = False, **kwargs: Any) -> GraphKernelVisionTransformer:
    """GKViT-Large, of the channels and depths of SegFormer's MiT-B5; our recipe has `drop_path_rate=0.4`."""
    return _create_gkvit('gkvit_large', pretrained=pretrained, **dict(dict(depths=(3, 6, 40, 3)), **kwargs))
