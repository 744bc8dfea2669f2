"""X-ViT, also UFO-ViT

Paper: 'X-ViT: High Performance Linear Vision Transformer without Softmax', https://arxiv.org/abs/2205.13805, T4V
workshop at CVPR 2022

A reconstruction, not a reproduction. `FAMILY` says what is documented, inherited, from memory and ours.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import ConvNormAct, calculate_drop_path_rates, resample_abs_pos_embed_nhwc
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .. import inference
from ..layers import XNormClassAttention, get_attention_layer
from ..layers._common import channels_last
from ..layers.xnorm_block import ClassBlock, FourierPosition, XNormBlock
from ..ops._numerics import check_choice
from ..zoo.families import Family
from ._base import ImageModel, check_drop_path, check_img_size, check_input, check_positive, init_module
from ._timm import base_cfg, build_model, checkpoint, register_notrace_module, update_model_input_size
from ._weights import fit, unwrap

__all__ = ['XNormVisionTransformer']

FAMILY = Family(
    name='xvit',
    title='X-ViT, also UFO-ViT',
    paper='X-ViT: High Performance Linear Vision Transformer without Softmax',
    url='https://arxiv.org/abs/2205.13805',
    text=(
        'Two l2 norms take the place of the softmax, which makes attention linear in pixels. The models are flat, '
        'of one width at stride 16; they are UFO-ViT (arXiv 2109.14382) under its later name, and no relation of '
        'the video model and of the Flax model that are also called X-ViT.\n\n'
        'The authors have released neither code nor weights, and this is a reconstruction, not a reproduction. '
        'Documented: the operator and its axes, class attention with the same operator, a stem and local layers '
        'of convolutions, pointwise MLPs. Inherited from XCiT, CaiT and DeiT, on which the paper builds: the '
        "order of the layers, layer scale, two class attention blocks, the stem's channels, heads, initial "
        'values. Widths and depths of xvit_tiny, small, medium and base are those of UFO-ViT recalled from '
        'memory, since the tables could not be read; with them, parameters come within 0.5 % of the numbers '
        'recalled, those of tiny within 2.2 %. Whether X-ViT has other variants is not known. Learned scales for '
        'queries and for products of keys and values each, the grid of positions and drop path are ours. No '
        'accuracy of the paper could be checked, so none is given.\n\n'
        'xvit_pyramid_nano, tiny, small and base are ours altogether: XNorm attention in a PVTv2-like pyramid, '
        'for feature maps at four strides.'
    ),
    bibtex='''@article{song2022xvit,
  title={X-ViT: High Performance Linear Vision Transformer without Softmax},
  author={Jeonggeun Song and Heung-Chang Lee},
  journal={arXiv preprint arXiv:2205.13805}, year={2022}
}''',
)

_STEM = 'patch_embed.0.conv'
_norm_layer = partial(nn.LayerNorm, eps=1e-6)

for _layer in (XNormClassAttention, FourierPosition):  # the table of positions follows from the size of the map
    register_notrace_module(_layer)


class XNormVisionTransformer(ImageModel):
    """X-ViT: a convolutional stem, blocks of one width, and class attention as pooling.

    Takes images of any size: each convolution of the stem halves a side, rounding up, and learned positions are resized
    to the map. Class attention leaves the map as it is, so it belongs to the head here: `forward_features` gives the
    map, and with another pooling there is no class attention.

    Paper: arXiv 2205.13805; what is documented and what is not, `FAMILY` says.
    """
    parts = 'blocks'
    one_width = True
    global_pools = ('token', 'avg', '')
    output_fmts = ('NCHW', 'NHWC', 'NLC')
    __constants__ = ('grad_checkpointing',)  # so that TorchScript leaves the branch out

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            patch_size: int = 16,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'token',
            embed_dim: int = 384,
            depth: int = 12,
            class_depth: int = 2,
            num_heads: int = 8,
            attn_dim: int | None = None,
            mlp_ratio: float = 4.,
            qkv_bias: bool = True,
            init_values: float = 1.,
            pos_embed: str = 'learn',
            lpi_convs: int = 2,
            attn_layer: str | Callable[..., nn.Module] = 'xnorm',
            attn_kwargs: dict[str, Any] | None = None,
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            img_size: Side, or height and width, of the images for whose map positions are learned.
            patch_size: Stride of the stem, a power of two from 2: as many convolutions of stride 2.
            in_chans: Channels of the input images.
            num_classes: Classes of the head, 0 for none.
            global_pool: 'token' for class attention, 'avg', or '' to leave the map unpooled.
            embed_dim: Channels.
            depth: Blocks.
            class_depth: Blocks of class attention.
            num_heads: Attention heads.
            attn_dim: Channels of queries, keys and values each, `embed_dim` by default.
            mlp_ratio: Hidden over outer channels of the MLP.
            qkv_bias: Bias of the query, key and value projections.
            init_values: Initial value of layer scale; the paper's ancestors take 1 for 12 blocks, 1e-5 for 24.
            pos_embed: Positions: 'learn', 'fourier' or 'none'.
            lpi_convs: Convolutions of local patch interaction, 2 or 1.
            attn_layer: Mechanism in the blocks, by name, or a module class or factory; class attention is XNorm's.
            attn_kwargs: Further arguments of that mechanism.
            drop_rate: Dropout before the classifier.
            pos_drop_rate: Dropout after the positions.
            proj_drop_rate: Dropout in the MLP and after XNorm attention.
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.

        Raises:
            ValueError: A value is out of range.
        """
        super().__init__(in_chans, num_classes, global_pool, embed_dim)
        dd = {'device': device, 'dtype': dtype}
        check_positive(
            embed_dim=embed_dim, depth=depth, class_depth=class_depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
        check_drop_path(drop_path_rate)
        if int(embed_dim * mlp_ratio) < 1:
            raise ValueError(f'mlp_ratio={mlp_ratio} leaves no hidden channel at embed_dim={embed_dim}.')
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ValueError(f'patch_size={patch_size} must be a power of two from 2.')
        num_convs = patch_size.bit_length() - 1
        if embed_dim % 2 ** (num_convs - 1):
            raise ValueError(
                f'embed_dim={embed_dim} must be a multiple of {2 ** (num_convs - 1)} for patch_size={patch_size}, '
                'whose first convolution has as small a part of the channels.')
        check_choice('pos_embed', pos_embed, ('learn', 'fourier', 'none'))
        if lpi_convs not in (1, 2):
            raise ValueError(f'lpi_convs={lpi_convs} must be 1 or 2.')

        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.img_size = check_img_size(img_size)
        self.grad_checkpointing = False
        self._class_args = dict(
            depth=class_depth, num_heads=num_heads, attn_dim=attn_dim, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
            init_values=init_values, proj_drop=proj_drop_rate)

        dims = [in_chans, *(embed_dim // 2 ** i for i in reversed(range(num_convs)))]
        self.patch_embed = nn.Sequential(*[
            ConvNormAct(dims[i], dims[i + 1], 3, stride=2, act_layer=nn.GELU, apply_act=i < num_convs - 1, **dd)
            for i in range(num_convs)])
        grid = self._grid(self.img_size)
        self.pos_embed = nn.Parameter(torch.empty(1, *grid, embed_dim, **dd)) if pos_embed == 'learn' else None
        self.pos_fourier = FourierPosition(embed_dim, **dd) if pos_embed == 'fourier' else None
        self.pos_drop = nn.Dropout(pos_drop_rate)

        if attn_layer == 'xnorm':
            attn_kwargs = dict(
                dict(attn_dim=attn_dim, qkv_bias=qkv_bias, proj_drop=proj_drop_rate), **(attn_kwargs or {}))
        attn_factory = get_attention_layer(attn_layer)
        self.blocks = nn.Sequential(*[
            XNormBlock(
                embed_dim, attn_factory(embed_dim, num_heads, **(attn_kwargs or {}), **dd), mlp_ratio=mlp_ratio,
                init_values=init_values, lpi_convs=lpi_convs, proj_drop=proj_drop_rate, drop_path=rate, **dd)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)])
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=f'blocks.{i}') for i in range(depth)]

        self._set_class_attention(global_pool == 'token', **dd)
        self.norm = _norm_layer(embed_dim, **dd)
        self._add_head(drop_rate, **dd)
        self.init_weights(needs_reset=False)

    def _set_class_attention(self, enable: bool, device=None, dtype=None) -> None:
        """Make or remove the class token and its blocks."""
        dd = {'device': device, 'dtype': dtype}
        args = dict(self._class_args)
        depth = args.pop('depth') if enable else 0
        self.cls_token = nn.Parameter(torch.empty(1, 1, self.embed_dim, **dd)) if enable else None
        self.cls_blocks = nn.ModuleList([ClassBlock(self.embed_dim, **args, **dd) for _ in range(depth)])

    def _grid(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Sides of the map of an image."""
        return -(-img_size[0] // self.patch_size), -(-img_size[1] // self.patch_size)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Learn positions for images of another size from now on: those there are become the resized ones.

        Not needed to run the model at another size, where they are resized each time.

        Args:
            img_size: Side, or height and width.

        Raises:
            ValueError: `img_size` is not positive.
        """
        self.img_size = check_img_size(img_size)
        if self.pos_embed is not None:
            resized = resample_abs_pos_embed_nhwc(self.pos_embed.detach(), self._grid(self.img_size))
            self.pos_embed = nn.Parameter(resized.clone(), requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.img_size)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all weights, see `ImageModel.init_weights`."""
        super().init_weights(needs_reset)
        for p in (self.pos_embed, self.cls_token):
            if p is not None:
                nn.init.trunc_normal_(p, std=.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters to exempt from weight decay, besides the biases, norms and scales that timm exempts."""
        return {name for name in ('pos_embed', 'cls_token') if getattr(self, name) is not None}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters from input to output, for layer-wise learning rates."""
        return dict(
            stem=r'^patch_embed|^pos_embed|^pos_fourier',
            blocks=r'^blocks\.(\d+)',
            head=[(r'^cls_token', (0,)), (r'^cls_blocks\.(\d+)', None), (r'^norm', (99999,))],
        )

    def _set_global_pool(self, global_pool: str, device=None, dtype=None) -> None:
        """Without 'token', class attention is removed; with 'token' after that, it starts anew."""
        if (global_pool == 'token') != (self.cls_token is not None):
            self._set_class_attention(global_pool == 'token', device=device, dtype=dtype)
            self.cls_blocks.apply(init_module)
            if self.cls_token is not None:
                nn.init.trunc_normal_(self.cls_token, std=.02)
            self.cls_blocks.train(self.training)
        self.global_pool = global_pool

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to a map (B, H', W', C) with positions."""
        check_input(x, self.in_chans)
        x = self.patch_embed(channels_last(x)).permute(0, 2, 3, 1)
        if self.pos_embed is not None:
            x = x + resample_abs_pos_embed_nhwc(self.pos_embed, [x.shape[1], x.shape[2]])
        if self.pos_fourier is not None:
            x = x + self.pos_fourier(x)
        return self.pos_drop(x)

    def _run_part(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(part, x) if self.grad_checkpointing else part(x)

    def _to_map(self, x: torch.Tensor, norm: bool) -> torch.Tensor:
        return (self.norm(x) if norm else x).permute(0, 3, 1, 2)

    def _to_features(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to the last map (B, embed_dim, H', W')."""
        if not torch.jit.is_scripting():
            if inference.applies(self, x):
                return inference.run((self._embed, *self.blocks), x).permute(0, 3, 1, 2)
        x = self._embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x.permute(0, 3, 1, 2)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify a map (B, embed_dim, H', W').

        Args:
            x: Map from `forward_features`.
            pre_logits: Return the pooled features (B, embed_dim) instead of the logits.
        """
        x = x.permute(0, 2, 3, 1)
        if self.cls_token is not None:
            token = self.cls_token.repeat(x.shape[0], 1, 1)
            x = x.flatten(1, 2)
            for block in self.cls_blocks:
                token = block(token, x)
            x = token[:, 0]
        elif self.global_pool == 'avg':
            x = x.mean(dim=(1, 2))
        x = self.head_drop(self.norm(x))
        if not pre_logits:
            x = self.head(x)
        return x if self.global_pool else x.permute(0, 3, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        # not in the base class: torch.fx looks for functions that it does not trace where `forward` is defined
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Take a state dict of ours, from training or from the Hub.

    Learned positions are resized to the model's, bicubic and antialiased. Class attention is left out where the model
    has none. Errors as in `fit`.
    """
    state_dict = unwrap(state_dict)
    if model.cls_token is None:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith(('cls_token', 'cls_blocks.'))}
    positions = state_dict.get('pos_embed')
    if positions is not None and model.pos_embed is not None and positions.shape[-1] == model.pos_embed.shape[-1]:
        resized = resample_abs_pos_embed_nhwc(positions, model.pos_embed.shape[1:3])
        state_dict = {**state_dict, 'pos_embed': resized}
    return fit(state_dict, model, stem=_STEM)


_create_xvit = partial(
    build_model, XNormVisionTransformer, pretrained_filter_fn=checkpoint_filter_fn,
    feature_cfg=dict(out_indices=3, feature_cls='getter'))

_cfg = partial(
    base_cfg, pool_size=(14, 14), first_conv=_STEM, paper_ids='arXiv:2205.13805', paper_name=FAMILY.paper)

default_cfgs = generate_default_cfgs({
    'xvit_tiny.untrained': _cfg(),
    'xvit_small.untrained': _cfg(),
    'xvit_medium.untrained': _cfg(),
    'xvit_base.untrained': _cfg(),
})


@register_model
def xvit_tiny(pretrained: bool = False, **kwargs: Any) -> XNormVisionTransformer:
    """X-ViT-Tiny, in the shape recalled of UFO-ViT-T; our recipe has `drop_path_rate=0.05`."""
    model_args = dict(embed_dim=192, depth=24, num_heads=4, attn_dim=96, init_values=1e-5)
    return _create_xvit('xvit_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def xvit_small(pretrained: bool = False, **kwargs: Any) -> XNormVisionTransformer:
    """X-ViT-Small, in the shape recalled of UFO-ViT-S; our recipe has `drop_path_rate=0.05`."""
    model_args = dict(embed_dim=384, depth=12, num_heads=8, attn_dim=128, init_values=1.)
    return _create_xvit('xvit_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def xvit_medium(pretrained: bool = False, **kwargs: Any) -> XNormVisionTransformer:
    """X-ViT-Medium, in the shape recalled of UFO-ViT-M; our recipe has `drop_path_rate=0.1`."""
    model_args = dict(embed_dim=384, depth=24, num_heads=8, attn_dim=128, init_values=1e-5)
    return _create_xvit('xvit_medium', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def xvit_base(pretrained: bool = False, **kwargs: Any) -> XNormVisionTransformer:
    """X-ViT-Base, in the shape recalled of UFO-ViT-B; our recipe has `drop_path_rate=0.15`."""
    model_args = dict(embed_dim=512, depth=24, num_heads=8, attn_dim=128, init_values=1e-5)
    return _create_xvit('xvit_base', pretrained=pretrained, **dict(model_args, **kwargs))
