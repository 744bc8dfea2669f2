"""Blocks and stages: what one layer returned, the next one may overwrite."""
import torch
from torch import nn

from ..layers.block import Block, PatchEmbed, PyramidStage, Stage
from ..layers.qna_block import QnADownsample, QnAStage
from ..layers.xnorm_block import XNormBlock
from .rows import BRANCHES, call, call_part, part, without_form


@part(PatchEmbed, convolutions=('proj',))
def patch_embed(layer: PatchEmbed, x: torch.Tensor, owned: bool) -> torch.Tensor:
    """(B, C, H, W) to (B, C', H', W').

    For maps smaller than the weight, bringing that into channels-last memory takes longer than to do without: 320
    channels of a 14 x 14 map to 512 take 1.5 ms and 0.6.
    """
    small = x.numel() < layer.proj.weight.numel()
    x = layer.proj(x.contiguous(memory_format=torch.contiguous_format if small else torch.channels_last))
    return layer.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@part(Block)
def block(layer: Block, x: torch.Tensor, owned: bool) -> torch.Tensor:
    """(B, H, W, C) to (B, H, W, C); stochastic depth does nothing in evaluation mode."""
    for norm, child in ((layer.norm1, layer.attn), (layer.norm2, layer.mlp)):
        form = BRANCHES.get(type(child), without_form)
        # the result of other norms may share the memory of x
        x, owned = form(child, x, norm, x if owned and isinstance(norm, nn.LayerNorm) else None), True
    return x


@part(XNormBlock)
def xnorm_block(layer: XNormBlock, x: torch.Tensor, owned: bool) -> torch.Tensor:
    """(B, H, W, C) to (B, H, W, C)."""
    x = x + layer.ls1(call(layer.attn, layer.norm1(x)))
    x = x + layer.ls3(layer.lpi(layer.norm3(x)))
    return x + layer.ls2(call(layer.mlp, layer.norm2(x)))


@part(QnADownsample, convolutions=('skip',))
def qna_downsample(layer: QnADownsample, x: torch.Tensor, owned: bool) -> torch.Tensor:
    """(B, C, H, W) to (B, C', H', W')."""
    x = layer.skip(x).permute(0, 2, 3, 1) + call(layer.attn, layer.norm1(x.permute(0, 2, 3, 1)))
    form = BRANCHES.get(type(layer.mlp), without_form)
    return form(layer.mlp, x, layer.norm2, x).permute(0, 3, 1, 2)


def _blocks(layer: Stage, x: torch.Tensor, owned: bool) -> torch.Tensor:
    """Downsampling and blocks, (B, C, H, W) to (B, H', W', C')."""
    x, owned = call_part(layer.downsample, x, owned)
    x = x.permute(0, 2, 3, 1)
    for child in layer.blocks:
        if type(child) is Block:
            x, owned = block(child, x, owned), True
        else:
            x, owned = call_part(child, x, owned)
    return x


@part(PyramidStage)
def pyramid_stage(layer: PyramidStage, x: torch.Tensor, owned: bool) -> torch.Tensor:
    """(B, C, H, W) to (B, C', H', W')."""
    return layer.norm(_blocks(layer, x, owned)).permute(0, 3, 1, 2)


@part(QnAStage)
def qna_stage(layer: QnAStage, x: torch.Tensor, owned: bool) -> torch.Tensor:
    """(B, C, H, W) to (B, C', H', W')."""
    return _blocks(layer, x, owned).permute(0, 3, 1, 2)
