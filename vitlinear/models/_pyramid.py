"""The pyramids that families share: a stem, stages and a head; `Pyramid` around one attention mechanism."""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, to_ntuple
from torch import nn

from .. import inference
from ..layers import ATTENTION_LAYERS, get_attention_layer
from ..layers.block import PatchEmbed, PyramidStage
from ..layers.mlp import ConvMlp
from ..layers.qna import FoldedQnAAttention
from ._base import ImageModel, check_drop_path, check_input, check_num_classes, check_positive
from ._timm import register_notrace_module

AttnLayer = str | Callable[..., nn.Module]

for _layer in (*ATTENTION_LAYERS.values(), FoldedQnAAttention, ConvMlp):
    register_notrace_module(_layer)


def check_model_args(
        in_chans: int,
        num_classes: int,
        patch_stride: int,
        drop_path_rate: float,
        mlp_ratios: Sequence[float],
        depths: Sequence[int],
        **per_stage: Sequence[int],
) -> None:
    """Raise ValueError, with the argument's name, where an argument that all pyramids have is out of range.

    Args:
        per_stage: Positive integers, `embed_dims` among them, that need one entry per stage like `depths`.
    """
    per_stage = dict(mlp_ratios=mlp_ratios, **per_stage)
    for name, values in per_stage.items():
        if len(values) != len(depths):
            raise ValueError(f'{name}={tuple(values)} must have one entry per stage, as depths={tuple(depths)}.')
    for name, values in dict(depths=depths, **per_stage).items():
        if len(depths) == 0 or min(values) <= 0:
            raise ValueError(f'{name}={tuple(values)} must be positive.')
    for dim, ratio in zip(per_stage['embed_dims'], mlp_ratios, strict=True):
        if int(dim * ratio) < 1:
            raise ValueError(f'mlp_ratios={tuple(mlp_ratios)} leave no hidden channel at embed_dims={dim}.')
    check_drop_path(drop_path_rate)
    check_positive(in_chans=in_chans, patch_stride=patch_stride)
    check_num_classes(num_classes)


class HierarchicalModel(ImageModel):
    """A stem, stages, a norm, average pooling and a classifier.

    Stage i of a (B, in_chans, H, W) batch is a (B, C_i, H_i, W_i) map with H_0 = ceil(H / patch_stride) and
    H_i = ceil(H_{i-1} / 2), likewise for W, for any H and W from 1.
    """

    def __init__(
            self,
            patch_embed: nn.Module,
            stages: Sequence[nn.Module],
            embed_dims: Sequence[int],
            patch_stride: int = 4,
            norm: nn.Module | None = None,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            patch_embed: Images (B, in_chans, H, W) to a map (B, embed_dims[0], H_0, W_0).
            stages: Each takes the (B, C, H, W) map of the one before; they have `downsample`, `blocks` and a flag
                `grad_checkpointing`.
            embed_dims: Channels of each stage.
            patch_stride: Stride of the stem.
            norm: Norm of the last map as (B, H, W, C), None where stages end in their own.
            in_chans, num_classes, global_pool: As for `ImageModel`.
            drop_rate: Dropout before the classifier.
        """
        super().__init__(in_chans, num_classes, global_pool, embed_dims[-1])
        self.patch_embed = patch_embed
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity() if norm is None else norm
        self.feature_info = [
            dict(num_chs=dim, reduction=patch_stride * 2 ** i, module=f'stages.{i}')
            for i, dim in enumerate(embed_dims)]
        self._add_head(drop_rate, device=device, dtype=dtype)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters from input to output, for layer-wise learning rates."""
        last = (99999,)
        if coarse:
            blocks = [(r'^stages\.(\d+)', None), (r'^norm', last)]
        else:
            blocks = [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^stages\.(\d+)\.norm', last),
                (r'^norm', last),
            ]
        return dict(stem=r'^patch_embed', blocks=blocks)

    def _to_map(self, x: torch.Tensor, norm: bool) -> torch.Tensor:
        return self._to_features(x) if norm else x

    def _to_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to the last map (B, num_features, H', W')."""
        check_input(x, self.in_chans)
        if not torch.jit.is_scripting():
            if inference.applies(self, x):
                return self._to_features(inference.run((self.patch_embed, *self.stages), x))
        return self._to_features(self.stages(self.patch_embed(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify a map (B, num_features, H', W').

        Args:
            x: Map from `forward_features`.
            pre_logits: Return the pooled features (B, num_features) instead of the logits.
        """
        if self.global_pool:
            x = x.mean(dim=(2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        # not in the base class: torch.fx looks for functions that it does not trace where `forward` is defined
        return self.forward_head(self.forward_features(x))


class Pyramid(HierarchicalModel):
    """Hierarchical backbone around one attention mechanism."""

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dims: Sequence[int] = (64, 128, 256, 512),
            depths: Sequence[int] = (2, 2, 2, 2),
            num_heads: int | Sequence[int] = (1, 2, 4, 8),
            mlp_ratios: float | Sequence[float] = 4.,
            patch_size: int = 7,
            patch_stride: int = 4,
            attn_layer: AttnLayer | Sequence[AttnLayer] = 'softmax',
            attn_kwargs: dict[str, Any] | None = None,
            act_layer: type[nn.Module] = nn.GELU,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chans: Channels of the input images.
            num_classes: Classes of the head, 0 for none.
            global_pool: 'avg', or '' to leave the last map unpooled.
            embed_dims: Channels of each stage.
            depths: Blocks of each stage.
            num_heads: Attention heads of each stage.
            mlp_ratios: Hidden over outer channels of the MLP of each stage.
            patch_size: Kernel of the stem convolution, odd.
            patch_stride: Stride of the stem convolution; below 4 keeps a useful grid on small images.
            attn_layer: Mechanism by name (see `vitlinear.layers.ATTENTION_LAYERS`), or a module class or factory;
                one for all stages or one for each.
            attn_kwargs: Further arguments of the mechanism.
            act_layer: Activation of the MLP.
            drop_rate: Dropout before the classifier.
            proj_drop_rate: Dropout in the MLP.
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.

        Raises:
            ValueError: A value is out of range, or the per-stage sequences differ in length.
        """
        dd = {'device': device, 'dtype': dtype}
        num_heads = to_ntuple(len(depths))(num_heads)
        mlp_ratios = to_ntuple(len(depths))(mlp_ratios)
        check_model_args(
            in_chans, num_classes, patch_stride, drop_path_rate, mlp_ratios, depths,
            embed_dims=embed_dims, num_heads=num_heads)
        if patch_size < patch_stride or patch_size % 2 == 0:
            raise ValueError(f'patch_size={patch_size} must be odd and at least patch_stride={patch_stride}.')
        attn_layer = to_ntuple(len(depths))(attn_layer)
        if len(attn_layer) != len(depths):
            raise ValueError(f'attn_layer={attn_layer} must have one entry per stage, as depths={tuple(depths)}.')
        attn_layer = [get_attention_layer(layer) for layer in attn_layer]
        drop_path = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            attn_layers = [attn_layer[i](dim, num_heads[i], **(attn_kwargs or {}), **dd) for _ in range(depths[i])]
            stages.append(PyramidStage(
                embed_dims[max(i - 1, 0)], dim, attn_layers, downsample=i > 0, mlp_ratio=mlp_ratios[i],
                proj_drop=proj_drop_rate, drop_path=drop_path[i], act_layer=act_layer, **dd))
        super().__init__(
            PatchEmbed(in_chans, embed_dims[0], patch_size, patch_stride, **dd), stages, embed_dims,
            patch_stride=patch_stride, in_chans=in_chans, num_classes=num_classes, global_pool=global_pool,
            drop_rate=drop_rate, **dd)
