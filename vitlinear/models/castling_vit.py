"""Castling-ViT

Paper: 'Castling-ViT: Compressing Self-Attention via Switching Towards Linear-Angular Attention at Vision Transformer
Inference', https://arxiv.org/abs/2211.10526, CVPR 2023

Linear-angular attention in the place of softmax attention in LeViT, MViTv2, PVTv2 and DeiT, with an auxiliary softmax
branch for training that is gone at inference. The mechanism is as published; the authors released one attention module,
https://github.com/GATECH-EIC/Castling-ViT, and no backbone, so all configurations are reconstructed: how queries, keys
and values meet on pooled grids, which attentions are replaced, and the widths of LeViT's keys. In the PVTv2 models the
layout (softmax in the last stage) follows later code of the same group. castling_nano is ours, for small images.

@inproceedings{you2023castling,
  title={Castling-{ViT}: Compressing Self-Attention via Switching Towards Linear-Angular Attention at Vision Transformer
    Inference},
  author={Haoran You and Yunyang Xiong and Xiaoliang Dai and Bichen Wu and Peizhao Zhang and Haoqi Fan and Peter Vajda
    and Yingyan Lin},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages={14431--14442}, year={2023}
}
"""
import logging
import re
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn.functional as F
from torch import nn

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_act_layer, to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.levit import ConvNorm, Levit, LevitDistilled, LevitMlp
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg, checkpoint_filter_fn as mvitv2_filter_fn
from timm.models.pvt_v2 import checkpoint_filter_fn as pvt_v2_filter_fn
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn as vit_filter_fn

from ._timm import build_model, register_notrace_module
from ..layers import LinearAngularAttention
from ..ops._common import has_hooks, is_plain, linear, packed_weight, use_bands
from ..layers.linear_angular import LinearAngular
from ..zoo.records import weights_cfg
from ._castling import Castling, check_ramp
from ._pyramid import Pyramid, check_input, fold_batch_norm
from ._weights import fit, not_a_checkpoint_of, unwrap

__all__ = ['CastlingLevit', 'CastlingLevitDistilled', 'CastlingMultiScaleVit', 'CastlingPyramid',
           'CastlingVisionTransformer', 'CastlingVisionTransformerDistilled']

_logger = logging.getLogger(__name__)

QK_WIDTHS = ('value', 'key')

# Positions of a map up to which inference on a CPU takes 1x1 convolutions as linear layers. Measured: half of the time
# at 7 x 7 (bfloat16 and float32), the same at 64 x 64.
LINEAR_UP_TO = 1024


class _LayerFactory:
    """Arguments of the linear-angular layers of a model, layer by layer."""

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]],
            softmax_below: int,
            kv_scale: bool,
            attn_kwargs: Optional[Dict[str, Any]],
    ):
        """
        Args:
            img_size: Image size of the training.
            softmax_below: Keep softmax attention in layers with at most this number of keys at `img_size`.
            kv_scale: Have layers of other image sizes weigh their parts as at `img_size`, see `LinearAngular`.
            attn_kwargs: Further arguments of `LinearAngular`.

        Raises:
            ValueError: A value is out of range.
        """
        if softmax_below < 0:
            raise ValueError(f'softmax_below={softmax_below} must not be negative.')
        self.img_size = to_2tuple(img_size)
        if min(self.img_size) < 1:
            raise ValueError(f'img_size={img_size} must be positive.')
        self.softmax_below = softmax_below
        self.kv_scale = kv_scale
        self.attn_kwargs = dict(dict(aux_kappa=2.), **(attn_kwargs or {}))

    def __call__(self, reduction: int, prefix_tokens: int = 0) -> Dict[str, Any]:
        """Arguments of a layer whose keys are on the grid of this reduction."""
        H, W = (-(-side // reduction) for side in self.img_size)
        tokens = H * W + prefix_tokens
        return dict(
            self.attn_kwargs, softmax=tokens <= self.softmax_below, kv_scale=tokens if self.kv_scale else None)


def _start_schedule(model: Castling, steps: int, ramp: Sequence[float]) -> None:
    check_ramp(ramp)
    if steps < 0:
        raise ValueError(f'castling_steps={steps} must not be negative.')
    if steps:
        model.schedule_castling(steps, ramp)


class LevitStem(nn.Sequential):
    """LeViT's stem of strided convolutions with batch norm, in channels-last memory."""

    def __init__(
            self,
            in_chans: int,
            widths: Sequence[int],
            strides: Sequence[int],
            act_layer: Type[nn.Module],
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
        x = x.contiguous(memory_format=torch.channels_last)
        for module in self:
            x = module(x)
        return x


class PointwiseNorm(ConvNorm):
    """LeViT's 1x1 convolution with batch norm."""

    def __init__(self, dim: int, dim_out: int, bn_weight_init: float = 1., device=None, dtype=None):
        """
        Args:
            dim: Channels of the map.
            dim_out: Channels of the new map.
            bn_weight_init: Initial scale of the batch norm.
        """
        super().__init__(dim, dim_out, bn_weight_init=bn_weight_init, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        if not torch.jit.is_scripting():
            if use_bands(x) and x.shape[2] * x.shape[3] <= LINEAR_UP_TO and self._is_plain():
                return self._as_linear(x)
        return self.bn(self.linear(x))

    @torch.jit.unused
    def _is_plain(self) -> bool:
        norm = type(self.bn) is nn.Identity or (type(self.bn) is nn.BatchNorm2d and not self.bn.training)
        return (norm and not has_hooks(self.bn) and is_plain(self.linear, nn.Conv2d)
                and not torch.is_autocast_enabled('cpu'))

    @torch.jit.unused
    def _as_linear(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.linear
        x = linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias, packed=packed_weight(conv))
        if isinstance(self.bn, nn.BatchNorm2d):
            scale = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
            x = torch.addcmul(torch.addcmul(self.bn.bias, self.bn.running_mean, scale, value=-1), x, scale)
        return x.permute(0, 3, 1, 2)

    def fuse(self) -> 'PointwiseNorm':
        """Fold the norm into the convolution."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.linear = fold_batch_norm(self.linear, self.bn)
            self.bn = nn.Identity()
        return self


def _levit_proj(dim: int, dim_out: int, act_layer: Type[nn.Module], bn_weight_init: float, **dd: Any) -> nn.Sequential:
    return nn.Sequential(OrderedDict([
        ('act', act_layer()),
        ('ln', PointwiseNorm(dim, dim_out, bn_weight_init, **dd)),
    ]))


def _levit_mlp(mlp: LevitMlp, **dd: Any) -> None:
    """Give timm's MLP our layers."""
    for name, bn_weight_init in (('ln1', 1.), ('ln2', 0.)):
        conv = getattr(mlp, name).linear
        setattr(mlp, name, PointwiseNorm(conv.in_channels, conv.out_channels, bn_weight_init, **dd))


@register_notrace_module
class LevitAttention(LinearAngular):
    """LeViT's attention around the linear-angular core, on (B, C, H, W) maps."""

    def __init__(
            self,
            dim: int,
            key_dim: int,
            value_dim: int,
            num_heads: int,
            act_layer: Type[nn.Module],
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            dim: Channels of the map.
            key_dim: Channels of queries and keys of each head.
            value_dim: Channels of values of each head.
            num_heads: Attention heads.
            act_layer: Activation before the output projection.
            kwargs: As for `LinearAngular`.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_heads, **kwargs, **dd)
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.qkv = PointwiseNorm(dim, (2 * key_dim + value_dim) * num_heads, **dd)
        self.proj = _levit_proj(value_dim * num_heads, dim, act_layer, 0., **dd)

    def value_channels(self) -> int:
        """Channels of the values, of all heads."""
        return self.num_heads * self.value_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        B, _, H, W = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1).reshape(B, H * W, self.num_heads, -1).transpose(1, 2)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=3)
        x = self.attend(q, k, v, (H, W))
        return self.proj(x.transpose(1, 2).reshape(B, H, W, -1).permute(0, 3, 1, 2))


@register_notrace_module
class LevitAttentionDownsample(LinearAngular):
    """LeViT's attention from every other row and column to all, on (B, C, H, W) maps.

    The identity and the convolution of the values are read at the positions of the queries (ours: the authors' module
    has queries and keys on one grid).
    """

    def __init__(
            self,
            dim: int,
            dim_out: int,
            key_dim: int,
            value_dim: int,
            num_heads: int,
            act_layer: Type[nn.Module],
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            dim: Channels of the map.
            dim_out: Channels of the new map.
            key_dim: Channels of queries and keys of each head.
            value_dim: Channels of values of each head.
            num_heads: Attention heads.
            act_layer: Activation before the output projection.
            kwargs: As for `LinearAngular`.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_heads, **kwargs, **dd)
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.kv = PointwiseNorm(dim, (key_dim + value_dim) * num_heads, **dd)
        self.q = nn.Sequential(OrderedDict([
            ('down', nn.AvgPool2d(1, stride=2)),
            ('ln', PointwiseNorm(dim, key_dim * num_heads, **dd)),
        ]))
        self.proj = _levit_proj(value_dim * num_heads, dim_out, act_layer, 1., **dd)

    def value_channels(self) -> int:
        """Channels of the values, of all heads."""
        return self.num_heads * self.value_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        B, _, H, W = x.shape
        kv = self.kv(x).permute(0, 2, 3, 1).reshape(B, H * W, self.num_heads, -1).transpose(1, 2)
        k, v = kv.split([self.key_dim, self.value_dim], dim=3)
        q = self.q(x).permute(0, 2, 3, 1)
        H_out, W_out = q.shape[1], q.shape[2]
        q = q.reshape(B, H_out * W_out, self.num_heads, self.key_dim).transpose(1, 2)
        x = self.attend(q, k, v, (H, W), stride=2)
        return self.proj(x.transpose(1, 2).reshape(B, H_out, W_out, -1).permute(0, 3, 1, 2))


class _CastlingLevit(Castling):
    """What both forms of Castling-LeViT add to timm's LeViT."""

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            in_chans: int = 3,
            embed_dim: Sequence[int] = (256, 384, 512),
            stem_widths: Optional[Sequence[int]] = None,
            stem_strides: Sequence[int] = (2, 2, 2, 2),
            act_layer: str = 'hard_swish',
            attn_act_layer: Optional[str] = None,
            qk_width: str = 'value',
            softmax_below: int = 0,
            kv_scale: bool = False,
            attn_kwargs: Optional[Dict[str, Any]] = None,
            castling_steps: int = 0,
            castling_ramp: Sequence[float] = (.1, .7),
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            img_size: Image size of the training, for `softmax_below` and `kv_scale`; the model takes any size.
            in_chans: Channels of the input images.
            embed_dim: Channels of each stage.
            stem_widths: Channels of the convolutions of the stem, doubling up to `embed_dim[0]` if None.
            stem_strides: Their strides.
            act_layer: Activation by name.
            attn_act_layer: Activation in attention by name, None for the same.
            qk_width: Channels of queries and keys of a head: 'value', as many as of its values, or 'key' as in LeViT,
                whose weights then fit.
            softmax_below: Keep softmax attention, which is cheaper there, in layers with at most this number of keys.
            kv_scale: Have layers of other image sizes weigh their parts as at `img_size`.
            attn_kwargs: Further arguments of the layers, such as `dict(conv='2d', aux_mode='train')`.
            castling_steps: Forward passes of the training after which the auxiliary branch is to be gone; turns it on,
                see `Castling.schedule_castling`. 0 for no schedule.
            castling_ramp: Shares of these passes between which the thresholds rise.
            kwargs: As for timm's `Levit`.

        Raises:
            ValueError: A value is out of range.
        """
        dd = {'device': device, 'dtype': dtype}
        if qk_width not in QK_WIDTHS:
            raise ValueError(f"Unknown qk_width '{qk_width}', expected one of {', '.join(QK_WIDTHS)}.")
        n = len(stem_strides)
        if stem_widths is None:
            stem_widths = [embed_dim[0] // 2 ** (n - 1 - i) for i in range(n)]
        if len(stem_widths) != n or stem_widths[-1] != embed_dim[0]:
            raise ValueError(
                f'stem_widths={tuple(stem_widths)} must have one entry per stride of stem_strides='
                f'{tuple(stem_strides)}, the last of them embed_dim[0]={embed_dim[0]}.')
        factory = _LayerFactory(img_size, softmax_below, kv_scale, attn_kwargs)
        act = get_act_layer(act_layer)
        stem_stride = 1
        for stride in stem_strides:
            stem_stride *= stride
        super().__init__(
            img_size=stem_stride,  # of the attentions that are replaced below, whose tables would grow with it
            in_chans=in_chans,
            embed_dim=tuple(embed_dim),
            stem_backbone=LevitStem(in_chans, stem_widths, stem_strides, act, **dd),
            stem_stride=stem_stride,
            act_layer=act_layer,
            attn_act_layer=attn_act_layer,
            use_conv=True,
            **kwargs,
            **dd)
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
        _start_schedule(self, castling_steps, castling_ramp)


class CastlingLevit(_CastlingLevit, Levit):
    """Castling-LeViT with one head: mechanism as published, configuration reconstructed.

    Paper: arXiv 2211.10526; backbone: LeViT, arXiv 2104.01136.
    """


class CastlingLevitDistilled(_CastlingLevit, LevitDistilled):
    """Castling-LeViT with two heads, for distillation: mechanism as published, configuration reconstructed.

    Paper: arXiv 2211.10526; backbone: LeViT, arXiv 2104.01136.
    """


@register_notrace_module
class CastlingMultiScaleAttention(LinearAngular):
    """MViTv2's pooling attention around the linear-angular core, with queries, keys and values on one grid.

    Paper: MViTv2, arXiv 2112.01526. That keys and values are pooled with the stride of the queries is ours.
    """

    def __init__(
            self,
            dim: int,
            dim_out: int,
            num_heads: int,
            qkv_bias: bool,
            kernel_size: int,
            stride: int,
            norm_layer: Type[nn.Module],
            residual_pooling: bool = True,
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            dim: Channels of the tokens.
            dim_out: Channels of the new tokens.
            num_heads: Attention heads.
            qkv_bias: Bias of the query, key and value projections.
            kernel_size: Side of the pooling convolutions.
            stride: Of the pooling convolutions.
            norm_layer: Norm of pooled queries, keys and values.
            residual_pooling: Add the pooled queries to the output.
            kwargs: As for `LinearAngular`.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_heads, **kwargs, **dd)
        self.dim_out = dim_out
        self.head_dim = dim_out // num_heads
        self.stride = stride
        self.residual_pooling = residual_pooling
        self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim_out, dim_out, **dd)
        conv = partial(
            nn.Conv2d, self.head_dim, self.head_dim, kernel_size, stride=stride, padding=kernel_size // 2,
            groups=self.head_dim, bias=False, **dd)
        self.pool_q, self.norm_q = conv(), norm_layer(self.head_dim, **dd)
        self.pool_k, self.norm_k = conv(), norm_layer(self.head_dim, **dd)
        self.pool_v, self.norm_v = conv(), norm_layer(self.head_dim, **dd)

    def value_channels(self) -> int:
        """Channels of the values, of all heads."""
        return self.dim_out

    def _pool(self, x: torch.Tensor, weight: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        """Tokens (B, N, C) to a pooled map (B, H', W', C) with the convolution that all heads share."""
        pad = weight.shape[2] // 2
        x = x.reshape(x.shape[0], feat_size[0], feat_size[1], self.dim_out).permute(0, 3, 1, 2)
        x = F.conv2d(
            x, weight.repeat(self.num_heads, 1, 1, 1), None, [self.stride, self.stride], [pad, pad], [1, 1],
            self.dim_out)
        return x.permute(0, 2, 3, 1)

    def forward(self, x: torch.Tensor, feat_size: List[int]) -> Tuple[torch.Tensor, List[int]]:
        """Tokens (B, H * W, C) and [H, W] to tokens (B, H' * W', C') and [H', W']."""
        B = x.shape[0]
        q, k, v = self.qkv(x).split(self.dim_out, dim=2)
        q = self._pool(q, self.pool_q.weight, feat_size)
        k = self._pool(k, self.pool_k.weight, feat_size)
        v = self._pool(v, self.pool_v.weight, feat_size)
        H, W = q.shape[1], q.shape[2]
        q = self.norm_q(q.reshape(B, H * W, self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.norm_k(k.reshape(B, H * W, self.num_heads, self.head_dim)).transpose(1, 2)
        v = self.norm_v(v.reshape(B, H * W, self.num_heads, self.head_dim)).transpose(1, 2)
        x = self.attend(q, k, v, (H, W))
        if self.residual_pooling:
            x = x + q
        return self.proj(x.transpose(1, 2).reshape(B, H * W, self.dim_out)), [H, W]


class CastlingMultiScaleVit(Castling, MultiScaleVit):
    """Castling-MViTv2 for images of any size: mechanism as published, configuration reconstructed.

    MViTv2's relative positions are left out: they belong to a softmax that inference does not have.

    Paper: arXiv 2211.10526; backbone: MViTv2, arXiv 2112.01526.
    """

    def __init__(
            self,
            cfg: MultiScaleVitCfg,
            img_size: Union[int, Tuple[int, int]] = 224,
            softmax_below: int = 0,
            kv_scale: bool = False,
            attn_kwargs: Optional[Dict[str, Any]] = None,
            castling_steps: int = 0,
            castling_ramp: Sequence[float] = (.1, .7),
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            cfg: As for timm's `MultiScaleVit`, without class token and absolute positions.
            img_size: Image size of the training, for `softmax_below` and `kv_scale`; the model takes any size.
            softmax_below: Keep softmax attention, which is cheaper there, in layers with at most this number of keys.
            kv_scale: Have layers of other image sizes weigh their parts as at `img_size`.
            attn_kwargs: Further arguments of the layers, such as `dict(conv='2d', aux_mode='train')`.
            castling_steps: Forward passes of the training after which the auxiliary branch is to be gone; turns it on,
                see `Castling.schedule_castling`. 0 for no schedule.
            castling_ramp: Shares of these passes between which the thresholds rise.
            kwargs: As for timm's `MultiScaleVit`.

        Raises:
            ValueError: A value is out of range, or `cfg` has a class token, absolute positions or another pooling.
        """
        if cfg.use_cls_token or cfg.use_abs_pos or cfg.pool_first or cfg.mode != 'conv':
            raise ValueError(f'{cfg} must have pooling by convolutions, no class token and no absolute positions.')
        dd = {'device': device, 'dtype': dtype}
        factory = _LayerFactory(img_size, softmax_below, kv_scale, attn_kwargs)
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
        _start_schedule(self, castling_steps, castling_ramp)

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
        self._reset_schedule()

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


class CastlingPyramid(Castling, Pyramid):
    """Castling-PVTv2 for images of any size, without spatial reduction. Reconstructed: not in the paper.

    Backbone: PVTv2, arXiv 2106.13797; that the last stage keeps softmax attention follows later code of the group.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            embed_dims: Sequence[int] = (64, 128, 320, 512),
            num_heads: Union[int, Sequence[int]] = (1, 2, 5, 8),
            mlp_ratios: Union[float, Sequence[float]] = (8., 8., 4., 4.),
            patch_stride: int = 4,
            softmax_below: int = 49,
            kv_scale: bool = False,
            attn_kwargs: Optional[Dict[str, Any]] = None,
            castling_steps: int = 0,
            castling_ramp: Sequence[float] = (.1, .7),
            **kwargs: Any,
    ):
        """
        Args:
            img_size: Image size of the training, for `softmax_below` and `kv_scale`; the model takes any size.
            embed_dims: Channels of each stage.
            num_heads: Attention heads of each stage.
            mlp_ratios: Hidden over outer channels of the MLP of each stage.
            patch_stride: Stride of the stem.
            softmax_below: Keep softmax attention, which is cheaper there, in layers with at most this number of keys.
            kv_scale: Have layers of other image sizes weigh their parts as at `img_size`.
            attn_kwargs: Further arguments of the layers, such as `dict(conv='2d', aux_mode='train')`.
            castling_steps: Forward passes of the training after which the auxiliary branch is to be gone; turns it on,
                see `Castling.schedule_castling`. 0 for no schedule.
            castling_ramp: Shares of these passes between which the thresholds rise.
            kwargs: As for `Pyramid`.

        Raises:
            ValueError: A value is out of range.
        """
        factory = _LayerFactory(img_size, softmax_below, kv_scale, dict(dict(qkv_bias=True), **(attn_kwargs or {})))
        super().__init__(
            embed_dims=embed_dims,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            patch_stride=patch_stride,
            attn_layer=[
                partial(LinearAngularAttention, **factory(patch_stride * 2 ** i)) for i in range(len(embed_dims))],
            **kwargs)
        _start_schedule(self, castling_steps, castling_ramp)


@register_notrace_module
class CastlingTokenAttention(LinearAngular):
    """Linear-angular attention of tokens, class tokens in front, with the signature of timm's attention.

    Paper: arXiv 2211.10526. State dict as that of the authors' module.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            qkv_bias: bool,
            proj_bias: bool = True,
            proj_drop: float = 0.,
            num_prefix_tokens: int = 1,
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            dim: Channels of the tokens.
            num_heads: Attention heads.
            qkv_bias: Bias of the query, key and value projections.
            proj_bias: Bias of the output projection.
            proj_drop: Dropout of the output.
            num_prefix_tokens: Tokens in front of those of the grid.
            kwargs: As for `LinearAngular`.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_heads, **kwargs, **dd)
        self.head_dim = dim // num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.grid: Optional[Tuple[int, int]] = None  # for what needs one; set where the image size is fixed
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def value_channels(self) -> int:
        """Channels of the values, of all heads."""
        return self.num_heads * self.head_dim

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """(B, N, C) to (B, N, C). There is no masked form: `attn_mask` must be None, `is_causal` False."""
        if attn_mask is not None or is_causal:
            raise ValueError('Linear-angular attention takes neither attn_mask nor is_causal.')
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.attend(q, k, v, self.grid, self.num_prefix_tokens)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class _CastlingVisionTransformer(Castling):
    """What both forms of Castling-DeiT add to timm's vision transformer."""

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            softmax_below: int = 0,
            kv_scale: bool = False,
            attn_kwargs: Optional[Dict[str, Any]] = None,
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
            softmax_below: Keep softmax attention, which is cheaper there, in layers with at most this number of keys.
            kv_scale: Have layers of other image sizes weigh their parts as at `img_size`.
            attn_kwargs: Further arguments of the layers, such as `dict(conv='2d', aux_mode='train')`.
            castling_steps: Forward passes of the training after which the auxiliary branch is to be gone; turns it on,
                see `Castling.schedule_castling`. 0 for no schedule.
            castling_ramp: Shares of these passes between which the thresholds rise.
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
        factory = _LayerFactory(
            self.patch_embed.grid_size, softmax_below, kv_scale,
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
        _start_schedule(self, castling_steps, castling_ramp)

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


def _from_host(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Weights of the backbone with softmax attention under our names, without its tables of positions."""
    if isinstance(model, Levit):
        out = {k: v for k, v in state_dict.items() if 'attention_bias' not in k}
        linear = (k for k, v in out.items() if k.endswith('.linear.weight') and v.ndim == 2 and k.startswith('stages.'))
        return {**out, **{k: out[k][:, :, None, None] for k in linear}}
    if isinstance(model, MultiScaleVit):
        try:
            return mvitv2_filter_fn({k: v for k, v in state_dict.items() if '.rel_pos_' not in k}, model)
        except KeyError as e:  # a block that the model has not
            raise not_a_checkpoint_of(state_dict, model) from e
    if isinstance(model, VisionTransformer):
        return state_dict  # timm's filter has been over it
    out = {k: v for k, v in pvt_v2_filter_fn(state_dict, model).items() if not re.search(r'\.attn\.(sr|norm)\.', k)}
    for k in [k for k in out if '.attn.q.' in k]:
        out[k.replace('.q.', '.qkv.')] = torch.cat([out.pop(k), out.pop(k.replace('.q.', '.kv.'))])
    return out


def is_of_host(state_dict: Dict[str, Any], model: nn.Module) -> bool:
    """Whether `checkpoint_filter_fn` takes weights for those of the backbone with softmax attention."""
    return any('.dconv.' in k for k in model.state_dict()) and not any('.dconv.' in k for k in unwrap(state_dict))


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Take a state dict of ours unchanged, or one of the same backbone with softmax attention to start training from.

    The latter are timm's LeViT (linear or convolutional form; into models with `qk_width='key'`), MViTv2, PVTv2 and
    DeiT, and the original files that timm takes for MViTv2, PVTv2 and DeiT. They have no convolutions of the values:
    the model keeps its own. What only softmax attention uses is left out. A classifier for another number of classes
    than the model's is replaced by the model's own, with a warning.

    Args:
        state_dict: Weights or a container of them.
        model: The model to load them into.

    Raises:
        ValueError: The weights belong to another architecture or another variant, or some are missing.
    """
    stem = 'stem.conv1.linear' if isinstance(model, Levit) else 'patch_embed.proj'
    # a schedule counts the steps of its own training, see `Castling.schedule_castling`
    state_dict = {k: v for k, v in unwrap(state_dict).items() if k != 'castling_step'}
    ours = model.state_dict()
    step = {k: v for k, v in ours.items() if k == 'castling_step'}
    if isinstance(model, VisionTransformer):
        try:
            state_dict = vit_filter_fn(state_dict, model)  # positions of another image size, among others
        except RuntimeError as e:
            raise ValueError(f'The checkpoint is of another variant: {e}') from e
    own = {k: v for k, v in ours.items() if '.dconv.' in k}
    if not any('.dconv.' in k for k in state_dict):
        state_dict = _from_host(state_dict, model)
        if own and f'{stem}.weight' in state_dict:
            _logger.warning('The checkpoint is of a model with softmax attention: its weights are a start for '
                            'training, outputs before that have no meaning.')
        key = 'stages.0.blocks.0.attn.qkv.linear.weight'
        if isinstance(model, Levit) and key in state_dict and len(state_dict[key]) < len(ours[key]):
            raise ValueError("The checkpoint's queries and keys are narrower than its values, as in LeViT: create the "
                             "model with qk_width='key'.")
        state_dict = {**own, **state_dict}
    return fit({**state_dict, **step}, model, stem=stem)


def _create_levit(variant: str, pretrained: bool = False, distilled: bool = True, **kwargs: Any) -> _CastlingLevit:
    out_indices = kwargs.pop('out_indices', tuple(range(len(kwargs['embed_dim']))))
    return build_model(
        CastlingLevitDistilled if distilled else CastlingLevit,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, flatten_sequential=True),
        **kwargs,
    )


def _create_mvitv2(variant: str, pretrained: bool = False, **kwargs: Any) -> CastlingMultiScaleVit:
    out_indices = kwargs.pop('out_indices', len(kwargs['model_cfg'].depths))
    return build_model(
        CastlingMultiScaleVit,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


def _create_pvt_v2(variant: str, pretrained: bool = False, **kwargs: Any) -> CastlingPyramid:
    out_indices = kwargs.pop('out_indices', tuple(range(len(kwargs['embed_dims']))))
    return build_model(
        CastlingPyramid,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, flatten_sequential=True),
        **kwargs,
    )


def _create_deit(
        variant: str,
        pretrained: bool = False,
        distilled: bool = False,
        **kwargs: Any,
) -> _CastlingVisionTransformer:
    kwargs = dict(dict(patch_size=16, depth=12), **kwargs)
    out_indices = kwargs.pop('out_indices', min(3, kwargs['depth']))
    return build_model(
        CastlingVisionTransformerDistilled if distilled else CastlingVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
        'crop_pct': 0.9,
        'interpolation': 'bicubic',
        'fixed_input_size': False,
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        'origin_url': 'https://github.com/GATECH-EIC/Castling-ViT',
        'paper_ids': 'arXiv:2211.10526',
        'paper_name': 'Castling-ViT',
        **kwargs,
    }


_levit_cfg = partial(
    _cfg, pool_size=(4, 4), first_conv='stem.conv1.linear', classifier=('head.linear', 'head_dist.linear'))
_mvitv2_cfg = partial(_cfg, classifier='head.fc')
_pvt_v2_cfg = partial(_cfg, pool_size=(7, 7))
_deit_cfg = partial(_cfg, fixed_input_size=True)

default_cfgs = generate_default_cfgs({
    # a tag with weights comes first and the default is starred, or its classes would become those of the bare name
    'castling_nano.fashion_mnist': _pvt_v2_cfg(origin_url=None, **weights_cfg('castling_nano.fashion_mnist')),
    'castling_nano.untrained*': _pvt_v2_cfg(
        input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0, origin_url=None),
    'castling_levit_128s.in1k': _levit_cfg(),
    'castling_levit_128.in1k': _levit_cfg(),
    'castling_levit_192.in1k': _levit_cfg(),
    'castling_levit_256.in1k': _levit_cfg(),
    'castling_levit_384.in1k': _levit_cfg(),
    'castling_mvitv2_tiny.in1k': _mvitv2_cfg(),
    'castling_mvitv2_small.in1k': _mvitv2_cfg(),
    'castling_mvitv2_base.in1k': _mvitv2_cfg(),
    'castling_pvt_v2_b0.in1k': _pvt_v2_cfg(),
    'castling_pvt_v2_b1.in1k': _pvt_v2_cfg(),
    'castling_pvt_v2_b2.in1k': _pvt_v2_cfg(),
    'castling_deit_tiny_patch16_224.in1k': _deit_cfg(),
    'castling_deit_small_patch16_224.in1k': _deit_cfg(),
    'castling_deit_base_patch16_224.in1k': _deit_cfg(),
    'castling_deit_tiny_distilled_patch16_224.in1k': _deit_cfg(classifier=('head', 'head_dist')),
    'castling_deit_small_distilled_patch16_224.in1k': _deit_cfg(classifier=('head', 'head_dist')),
    'castling_deit_base_distilled_patch16_224.in1k': _deit_cfg(classifier=('head', 'head_dist')),
})


@register_model
def castling_nano(pretrained: bool = False, **kwargs: Any) -> CastlingPyramid:
    """Castling-Nano (ours): the PVTv2 form for images of 28 to 64 pixels, linear-angular in all stages."""
    model_args = dict(
        img_size=32, embed_dims=(32, 64, 128, 160), depths=(1, 4, 3, 1), num_heads=(1, 2, 4, 5),
        mlp_ratios=(4., 4., 3., 2.), patch_size=3, patch_stride=2, softmax_below=0)
    return _create_pvt_v2('castling_nano', pretrained=pretrained, **dict(model_args, **kwargs))


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
