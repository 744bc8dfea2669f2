"""QnA-ViT

Paper: 'Learned Queries for Efficient Local Attention', https://arxiv.org/abs/2112.11435, CVPR 2022, pages 10841-10852

`FAMILY` says what is the authors' and what is ours.
"""
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, to_ntuple
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..layers import WindowAttention, get_attention_layer
from ..layers._common import init_lecun_
from ..layers.block import Block
from ..layers.mlp import Mlp
from ..layers.qna_block import QnADownsample, QnAStage, SamePatchEmbed
from ..layers.window import resize_relative_position_bias_table
from ..zoo.families import Family
from ..zoo.records import weights_cfg
from ._base import check_img_size
from ._pyramid import HierarchicalModel, check_model_args
from ._timm import base_cfg, build_model, register_notrace_module
from ._weights import fit, last_blocks, not_a_checkpoint_of, unwrap

__all__ = ['QnAVisionTransformer']

FAMILY = Family(
    name='qna_vit',
    title='QnA-ViT',
    paper='Learned Queries for Efficient Local Attention',
    url='https://arxiv.org/abs/2112.11435',
    text=(
        'A pyramid of local attention with learned queries, which downsamples with the same layer at stride 2; '
        'the last two stages begin with, or consist of, softmax attention over windows that cover the whole map '
        "at the published size. Written from a description of the authors' released code, "
        'https://github.com/moabarar/qna, whose Flax checkpoints load as they are. qna_vit_tiny, tiny_7x7, small '
        'and base are the published variants; qna_vit_nano is ours, for small images.'
    ),
    bibtex='''@inproceedings{arar2022learned,
  title={Learned Queries for Efficient Local Attention},
  author={Moab Arar and Ariel Shamir and Amit H. Bermano},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages={10841-10852}, year={2022}
}''',
)

register_notrace_module(SamePatchEmbed)  # its padding follows from the size of the image

_block_layers = dict(
    act_layer=partial(nn.GELU, approximate='tanh'),
    norm_layer=partial(nn.LayerNorm, eps=1e-6),
    mlp_layer=Mlp,
)


class QnAVisionTransformer(HierarchicalModel):
    """QnA-ViT: windowed softmax attention, then local attention with learned queries, in each stage.

    Takes images of any size. Windows of softmax attention cover the whole map at `img_size`; a larger map is cut into
    windows no larger than that. `set_input_size` makes them cover the map of another size.

    Paper: arXiv 2112.11435.
    """

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dims: Sequence[int] = (64, 128, 256, 512),
            depths: Sequence[int] = (2, 3, 6, 2),
            window_depths: Sequence[int] = (0, 0, 4, 2),
            num_heads: int | Sequence[int] = (8, 16, 32, 64),
            window_heads: int | Sequence[int] = (2, 4, 8, 16),
            kernel_size: int | Sequence[int] = 3,
            num_queries: int = 2,
            attn_scale_std: float = 0.02,
            mlp_ratios: float | Sequence[float] = 4.,
            patch_size: int | None = None,
            patch_stride: int = 4,
            attn_layer: str | Callable[..., nn.Module] = 'qna',
            attn_kwargs: dict[str, Any] | None = None,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            img_size: Side, or height and width, of the images whose maps the windows cover.
            in_chans: Channels of the input images.
            num_classes: Classes of the head, 0 for none.
            global_pool: 'avg', or '' to leave the last map unpooled.
            embed_dims: Channels of each stage.
            depths: Blocks of each stage, besides the downsampling ones.
            window_depths: How many of them, the first ones, have softmax attention over windows.
            num_heads: Heads of the learned-query layers of each stage, its downsampling included.
            window_heads: Heads of the windowed softmax attention of each stage.
            kernel_size: Window side of the learned-query layers of each stage; the layer that downsamples a map has
                that of the stage before it.
            num_queries: Learned queries of each head.
            attn_scale_std: Standard deviation of the tap scales of a new learned-query layer.
            mlp_ratios: Hidden over outer channels of the MLP of each stage, its downsampling included.
            patch_size: Kernel of the stem convolution, `patch_stride` by default.
            patch_stride: Stride of the stem convolution; below 4 keeps a useful grid on small images.
            attn_layer: Mechanism in the learned-query blocks of stride 1, by name, or a module class or factory.
            attn_kwargs: Further arguments of that mechanism.
            drop_rate: Dropout before the classifier.
            proj_drop_rate: Dropout in the MLP.
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.

        Raises:
            ValueError: A value is out of range, or the per-stage sequences differ in length.
        """
        dd = {'device': device, 'dtype': dtype}
        stages_ntuple = to_ntuple(len(depths))
        num_heads, window_heads = stages_ntuple(num_heads), stages_ntuple(window_heads)
        kernel_size, mlp_ratios = stages_ntuple(kernel_size), stages_ntuple(mlp_ratios)
        check_model_args(
            in_chans, num_classes, patch_stride, drop_path_rate, mlp_ratios, depths,
            embed_dims=embed_dims, num_heads=num_heads, window_heads=window_heads, kernel_size=kernel_size)
        if len(window_depths) != len(depths) or any(not 0 <= w <= n for w, n in zip(window_depths, depths)):
            raise ValueError(
                f'window_depths={tuple(window_depths)} must have one entry per stage, from 0 to that of '
                f'depths={tuple(depths)}.')
        patch_size = patch_stride if patch_size is None else patch_size
        if patch_size < patch_stride:
            raise ValueError(f'patch_size={patch_size} must be at least patch_stride={patch_stride}.')
        if attn_layer == 'qna':
            attn_kwargs = dict(dict(num_queries=num_queries, attn_scale_std=attn_scale_std), **(attn_kwargs or {}))
        attn_factory = get_attention_layer(attn_layer)

        # in execution order, where the layer that downsamples is the last of a stage
        rates = calculate_drop_path_rates(
            drop_path_rate, [n + int(i < len(depths) - 1) for i, n in enumerate(depths)], stagewise=True)
        grids = self._grids(img_size, patch_stride, len(depths))
        stages = []
        for i, dim in enumerate(embed_dims):
            downsample = nn.Identity()
            if i > 0:
                downsample = QnADownsample(
                    embed_dims[i - 1], dim, num_heads[i], kernel_size=kernel_size[i - 1], num_queries=num_queries,
                    attn_scale_std=attn_scale_std, mlp_ratio=mlp_ratios[i], proj_drop=proj_drop_rate,
                    drop_path=rates[i - 1][-1], **_block_layers, **dd)
            blocks = []
            for j in range(depths[i]):
                if j < window_depths[i]:
                    attn = WindowAttention(dim, window_heads[i], window_size=grids[i], **dd)
                else:
                    kwargs = dict(attn_kwargs or {})
                    if attn_layer == 'qna':
                        kwargs.setdefault('kernel_size', kernel_size[i])
                    attn = attn_factory(dim, num_heads[i], **kwargs, **dd)
                blocks.append(Block(
                    dim, attn, mlp_ratio=mlp_ratios[i], proj_drop=proj_drop_rate, drop_path=rates[i][j],
                    **_block_layers, **dd))
            stages.append(QnAStage(downsample, blocks))

        super().__init__(
            SamePatchEmbed(in_chans, embed_dims[0], patch_size, patch_stride, **dd), stages, embed_dims,
            patch_stride=patch_stride, norm=_block_layers['norm_layer'](embed_dims[-1], **dd), in_chans=in_chans,
            num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate, **dd)

    @staticmethod
    def _grids(img_size: int | tuple[int, int], patch_stride: int, num_stages: int) -> list[tuple[int, int]]:
        """Sides of the map of each stage."""
        H, W = check_img_size(img_size)
        strides = [patch_stride * 2 ** i for i in range(num_stages)]
        return [(-(-H // stride), -(-W // stride)) for stride in strides]

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Let the windows of softmax attention cover the maps of images of another size.

        Their tables of relative positions are resized, bicubic and antialiased, as for the authors' fine-tuning at 384
        pixels. Not needed to run the model at another size: see the class.

        Args:
            img_size: Side, or height and width.

        Raises:
            ValueError: `img_size` is not positive.
        """
        grids = self._grids(img_size, self.feature_info[0]['reduction'], len(self.stages))
        for stage, grid in zip(self.stages, grids):
            for block in stage.blocks:
                if isinstance(block.attn, WindowAttention):
                    block.attn.set_window_size(grid)

    def _init_weights(self, m: nn.Module, needs_reset: bool = True) -> None:
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            init_lecun_(m)
        else:
            super()._init_weights(m, needs_reset)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Relative biases and tap scales, as in the authors' training."""
        exempt = ('rel_pos_bias', 'attn_scale', 'relative_position_bias_table')
        return {name for name, _ in self.named_parameters() if name.rpartition('.')[2] in exempt}


def _from_flax(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and layouts of the authors' Flax code to ours."""
    windows = last_blocks(state_dict, r'LSAStage_(\d+)/MSA_Block_(\d+)/')
    names = {
        'StemBlock_0/conv_1x1': 'patch_embed.proj',
        'LayerNorm_0': 'norm1',
        'LayerNorm_1': 'norm2',
        'MlpBlock_0/Dense_0': 'mlp.fc1',
        'MlpBlock_0/Dense_1': 'mlp.fc2',
        'Conv_0': 'skip',
        'FusedKQnA_0/query': 'attn.query',
        'FusedKQnA_0/Wk': 'attn.k.weight',
        'FusedKQnA_0/to_v': 'attn.v',
        'FusedKQnA_0/to_out': 'attn.proj',
        'FusedKQnA_0/rpe_bias': 'attn.rel_pos_bias',
        'FusedKQnA_0/attn_scale_weights': 'attn.attn_scale',
        'MultiHeadSelfAttention_0/to_qkv': 'attn.qkv',
        'MultiHeadSelfAttention_0/to_out': 'attn.proj',
        'MultiHeadSelfAttention_0/RelativePositionalEmbedding_0/rpe_bias': 'attn.relative_position_bias_table',
        'ClassificationHead_0/LayerNorm_0': 'norm',
        'ClassificationHead_0/head_logits': 'head',
    }
    leaves = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}
    out = {}
    for path, v in state_dict.items():
        prefix, rest = '', path
        m = re.match(r'(LSA|QnA)Stage_(\d+)/(?:MSA|QnA)_Block_(\d+)(_stride_2)?/(.*)', path)
        if m:
            stage, block = int(m[2]), int(m[3]) - 1 + (windows.get(int(m[2]), 0) if m[1] == 'QnA' else 0)
            prefix = f'stages.{stage + 1}.downsample.' if m[4] else f'stages.{stage}.blocks.{block}.'
            rest = m[5]
        module, _, leaf = rest.rpartition('/')
        if rest in names:
            key = names[rest]
        elif module in names and leaf in leaves:
            key = f'{names[module]}.{leaves[leaf]}'
        else:
            raise ValueError(f"The checkpoint's '{path}' has no place in a QnA-ViT with the authors' released options.")

        if key.endswith(('rel_pos_bias', 'attn_scale')):
            v = v.reshape(-1, v.shape[-1]).t()
            k = math.isqrt(v.shape[1])
            v = v.reshape(-1, 1, k, k)
        elif key == 'attn.qkv.weight':
            # columns are [q | k | v] within each head; heads follow from the table of their relative positions
            table = path.replace('to_qkv/kernel', 'RelativePositionalEmbedding_0/rpe_bias')
            if table not in state_dict:
                raise ValueError(f'The checkpoint is incomplete: {table} is among the weights it lacks.')
            heads = state_dict[table].shape[1]
            v = v.reshape(v.shape[0], heads, 3, -1).permute(2, 1, 3, 0).reshape(-1, v.shape[0])
        elif v.ndim == 4:
            v = v.permute(3, 2, 0, 1)
        elif v.ndim == 2 and key.endswith('weight'):
            v = v.t()
        out[prefix + key] = v.contiguous()
    return out


def infer_variant(state_dict: dict[str, torch.Tensor]) -> str | None:
    """Name of the published variant that a state dict belongs to, the authors' or ours, None if it is another."""
    state_dict = unwrap(state_dict)
    if any(k.startswith('StemBlock_0/') for k in state_dict):
        state_dict = _from_flax(state_dict)
    stem = state_dict.get('patch_embed.proj.weight')
    first = state_dict.get('stages.0.blocks.0.attn.rel_pos_bias')
    if stem is None or first is None:
        return None
    depths = tuple(1 + last for last in last_blocks(state_dict).values())
    return {
        (64, 3, (2, 3, 6, 2)): 'qna_vit_tiny',
        (64, 7, (2, 3, 6, 2)): 'qna_vit_tiny_7x7',
        (64, 3, (2, 3, 18, 2)): 'qna_vit_small',
        (96, 3, (2, 3, 18, 2)): 'qna_vit_base',
    }.get((stem.shape[0], first.shape[-1], depths))


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Take the parameters of the authors' Flax code, paths joined by '/', or a state dict of ours.

    Tables of relative positions are resized to the model's windows, those of the taps to its kernel size, bicubic and
    antialiased as in the authors' fine-tuning. Errors as in `fit`, with the variant that the weights look like.
    """
    state_dict = unwrap(state_dict)
    if 'StemBlock_0/conv_1x1/kernel' in state_dict:
        state_dict = _from_flax(state_dict)
    elif 'patch_embed.proj.weight' not in state_dict:
        raise not_a_checkpoint_of(state_dict, model)
    variant = infer_variant(state_dict)

    own = model.state_dict()
    out = dict(state_dict)
    for k, v in state_dict.items():
        if k not in own or own[k].shape == v.shape:
            continue
        if k.endswith('relative_position_bias_table') and v.ndim == 2 and v.shape[1] == own[k].shape[1]:
            window = model.get_submodule(k.rpartition('.')[0]).window_size
            side = (math.isqrt(len(v)) + 1) // 2
            if (2 * side - 1) ** 2 == len(v):
                out[k] = resize_relative_position_bias_table(v, (side, side), window)
        elif k.endswith(('rel_pos_bias', 'attn_scale')) and v.ndim == 4 and v.shape[:2] == own[k].shape[:2]:
            size = own[k].shape[2:]
            out[k] = F.interpolate(v.float(), size=size, mode='bicubic', antialias=True).to(v.dtype)
    try:
        return fit(out, model)
    except ValueError as e:
        if variant is None:
            raise
        raise ValueError(f'{e} It looks like one of {variant}.') from None


_create_qna_vit = partial(build_model, QnAVisionTransformer, pretrained_filter_fn=checkpoint_filter_fn)

_cfg = partial(
    base_cfg, license='mit', origin_url='https://github.com/moabarar/qna', paper_ids='arXiv:2112.11435',
    paper_name=FAMILY.paper)

default_cfgs = generate_default_cfgs({
    # a tag with weights comes first and the default is starred, or its classes would become those of the bare name
    'qna_vit_nano.fashion_mnist': _cfg(origin_url=None, **weights_cfg('qna_vit_nano.fashion_mnist')),
    'qna_vit_nano.untrained*': _cfg(
        input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0, license='apache-2.0', origin_url=None),
    'qna_vit_tiny.in1k': _cfg(),
    'qna_vit_tiny_7x7.in1k': _cfg(),
    'qna_vit_small.in1k': _cfg(),
    'qna_vit_base.in1k': _cfg(),
})


@register_model
def qna_vit_nano(pretrained: bool = False, **kwargs: Any) -> QnAVisionTransformer:
    """QnA-ViT-Nano (ours), for images of 32 to 64 pixels."""
    model_args = dict(
        img_size=64, embed_dims=(32, 64, 128, 160), depths=(2, 3, 3, 1), window_depths=(0, 0, 1, 1),
        num_heads=(16, 32, 32, 40), window_heads=(1, 2, 4, 5), attn_scale_std=1., mlp_ratios=(4., 4., 3., 2.),
        patch_size=4, patch_stride=2)
    return _create_qna_vit('qna_vit_nano', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def qna_vit_tiny(pretrained: bool = False, **kwargs: Any) -> QnAVisionTransformer:
    """QnA-ViT-Tiny; the authors train it with `drop_path_rate=0.05`."""
    return _create_qna_vit('qna_vit_tiny', pretrained=pretrained, **kwargs)


@register_model
def qna_vit_tiny_7x7(pretrained: bool = False, **kwargs: Any) -> QnAVisionTransformer:
    """QnA-ViT-Tiny with 7x7 windows; the authors train it with `drop_path_rate=0.05`."""
    return _create_qna_vit('qna_vit_tiny_7x7', pretrained=pretrained, **dict(dict(kernel_size=7), **kwargs))


@register_model
def qna_vit_small(pretrained: bool = False, **kwargs: Any) -> QnAVisionTransformer:
    """QnA-ViT-Small; the authors train it with `drop_path_rate=0.2`."""
    model_args = dict(depths=(2, 3, 18, 2), window_depths=(0, 0, 12, 2))
    return _create_qna_vit('qna_vit_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def qna_vit_base(pretrained: bool = False, **kwargs: Any) -> QnAVisionTransformer:
    """QnA-ViT-Base; the authors train it with `drop_path_rate=0.5`."""
    model_args = dict(
        embed_dims=(96, 192, 384, 768), depths=(2, 3, 18, 2), window_depths=(0, 0, 12, 2), num_heads=(6, 12, 24, 48),
        window_heads=(3, 6, 12, 24))
    return _create_qna_vit('qna_vit_base', pretrained=pretrained, **dict(model_args, **kwargs))
