"""Vicinity Vision Transformer (VVT)

Paper: 'Vicinity Vision Transformer', https://arxiv.org/abs/2206.10552, TPAMI 45(10):12635-12649, 2023

`FAMILY` says what is the authors' and what is ours.
"""
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..zoo.families import Family
from ..zoo.records import weights_cfg
from ._pyramid import Pyramid
from ._timm import base_cfg, build_model
from ._weights import fit, unwrap

__all__ = ['VicinityVisionTransformer']

FAMILY = Family(
    name='vvt',
    title='Vicinity Vision Transformer (VVT)',
    paper='Vicinity Vision Transformer',
    url='https://arxiv.org/abs/2206.10552',
    text=(
        'A PVTv2-like pyramid whose attention is linear in pixels at every stage and favours near positions. '
        "Written from a description of the authors' released code, "
        'https://github.com/OpenNLPLab/Vicinity-Vision-Transformer, whose checkpoints load as they are. vvt_tiny, '
        'small, medium and large are the published variants; vvt_nano is ours, for small images.'
    ),
    bibtex='''@article{sun2023vicinity,
  title={Vicinity Vision Transformer},
  author={Weixuan Sun and Zhen Qin and Hui Deng and Jianyuan Wang and Yi Zhang and Kaihao Zhang and Nick Barnes and
    Stan Birchfield and Lingpeng Kong and Yiran Zhong},
  journal={IEEE Transactions on Pattern Analysis and Machine Intelligence},
  volume={45}, number={10}, pages={12635-12649}, year={2023}
}''',
)


class VicinityVisionTransformer(Pyramid):
    """VVT, arXiv 2206.10552: the shared pyramid around vicinity attention."""

    def __init__(
            self,
            embed_dims: Sequence[int] = (96, 160, 320, 512),
            depths: Sequence[int] = (2, 2, 2, 2),
            num_heads: int | Sequence[int] = (1, 2, 5, 8),
            mlp_ratios: float | Sequence[float] = (8., 8., 4., 4.),
            attn_layer: str | Callable[..., nn.Module] = 'vicinity',
            attn_kwargs: dict[str, Any] | None = None,
            fpc_reduction: int = 1,
            **kwargs: Any,
    ):
        """
        Args:
            embed_dims, depths, num_heads, mlp_ratios: Channels, blocks, heads and expansion of the MLP of each stage.
            attn_layer: Mechanism by name, or a module class or factory.
            attn_kwargs: Further arguments of the mechanism, such as `dict(locality='1d')`.
            fpc_reduction: Hidden reduction of the channel gate of vicinity attention, without effect on others.
            kwargs: As for `Pyramid`.
        """
        if attn_layer == 'vicinity':
            attn_kwargs = dict(dict(fpc_reduction=fpc_reduction), **(attn_kwargs or {}))
        super().__init__(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, attn_layer=attn_layer,
            attn_kwargs=attn_kwargs, **kwargs)


def _remap(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Key names of the authors' code to ours; queries, keys and values become one projection."""
    out = {}
    for k, v in state_dict.items():
        k = re.sub(r'^patch_embed1\.', 'patch_embed.', k)
        k = re.sub(r'^patch_embed(\d+)\.', lambda m: f'stages.{int(m[1]) - 1}.downsample.', k)
        k = re.sub(r'^block(\d+)\.', lambda m: f'stages.{int(m[1]) - 1}.blocks.', k)
        k = re.sub(r'^norm(\d+)\.', lambda m: f'stages.{int(m[1]) - 1}.norm.', k)
        k = k.replace('.attn.out_proj.', '.attn.proj.')
        k = k.replace('.attn.se_fc.0.', '.attn.fpc.fc1.').replace('.attn.se_fc.2.', '.attn.fpc.fc2.')
        k = k.replace('.mlp.dwconv.dwconv.', '.mlp.dwconv.')
        out[k] = v
    for k in [k for k in out if '.attn.q_proj.' in k]:
        parts = [k.replace('q_proj', f'{p}_proj') for p in 'qkv']
        if all(p in out for p in parts):
            out[k.replace('q_proj', 'qkv')] = torch.cat([out.pop(p) for p in parts])
    return out


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Take a state dict of the authors' code, or one of ours unchanged, or a container of one; errors as in `fit`."""
    state_dict = unwrap(state_dict)
    if 'patch_embed1.proj.weight' in state_dict:
        state_dict = _remap(state_dict)
    return fit(state_dict, model)


_create_vvt = partial(build_model, VicinityVisionTransformer, pretrained_filter_fn=checkpoint_filter_fn)

_cfg = partial(
    base_cfg, origin_url='https://github.com/OpenNLPLab/Vicinity-Vision-Transformer', paper_ids='arXiv:2206.10552',
    paper_name=FAMILY.paper)

default_cfgs = generate_default_cfgs({
    # a tag with weights comes first and the default is starred, or its classes would become those of the bare name
    'vvt_nano.fashion_mnist': _cfg(origin_url=None, **weights_cfg('vvt_nano.fashion_mnist')),
    'vvt_nano.untrained*': _cfg(input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0, origin_url=None),
    'vvt_tiny.in1k': _cfg(),
    'vvt_small.in1k': _cfg(),
    'vvt_medium.in1k': _cfg(),
    'vvt_large.in1k': _cfg(),
})


@register_model
def vvt_nano(pretrained: bool = False, **kwargs: Any) -> VicinityVisionTransformer:
    """VVT-Nano (ours), for images of 32 to 64 pixels."""
    model_args = dict(
        embed_dims=(32, 64, 128, 160), depths=(1, 3, 4, 1), num_heads=(1, 2, 4, 5), mlp_ratios=(4., 4., 3., 2.),
        patch_size=3, patch_stride=2, fpc_reduction=4)
    return _create_vvt('vvt_nano', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vvt_tiny(pretrained: bool = False, **kwargs: Any) -> VicinityVisionTransformer:
    """VVT-Tiny; the authors train it with `drop_path_rate=0.1`."""
    return _create_vvt('vvt_tiny', pretrained=pretrained, **dict(dict(depths=(2, 2, 2, 2)), **kwargs))


@register_model
def vvt_small(pretrained: bool = False, **kwargs: Any) -> VicinityVisionTransformer:
    """VVT-Small; the authors train it with `drop_path_rate=0.3`."""
    return _create_vvt('vvt_small', pretrained=pretrained, **dict(dict(depths=(3, 3, 9, 3)), **kwargs))


@register_model
def vvt_medium(pretrained: bool = False, **kwargs: Any) -> VicinityVisionTransformer:
    """VVT-Medium; the authors train it with `drop_path_rate=0.3`."""
    return _create_vvt('vvt_medium', pretrained=pretrained, **dict(dict(depths=(3, 3, 27, 3)), **kwargs))


@register_model
def vvt_large(pretrained: bool = False, **kwargs: Any) -> VicinityVisionTransformer:
    """VVT-Large; the authors train it with `drop_path_rate=0.3`."""
    model_args = dict(depths=(4, 4, 36, 4), mlp_ratios=4.)
    return _create_vvt('vvt_large', pretrained=pretrained, **dict(model_args, **kwargs))
