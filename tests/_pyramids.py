"""Small pyramids of every family and mechanism, for tests."""
import timm
import torch
from torch import nn

from vitlinear.layers import ATTENTION_LAYERS

MECHANISMS = sorted(ATTENTION_LAYERS)
# one of each family, and the shared pyramid with each of the mechanisms
FAMILIES = ['vvt_nano', 'qna_vit_nano', 'xvit_pyramid_nano', 'castling_nano', 'gkvit_nano']
BACKBONES = [*(f'vvt_nano/{name}' for name in MECHANISMS), *FAMILIES[1:]]
# which is for larger images, at the sizes of the others
SIZES = {
    'gkvit_nano': dict(embed_dims=(32, 64, 128, 160), num_heads=(1, 2, 4, 5), patch_size=3, patch_stride=2),
}
# where a compiler takes its time: still a block and a downsampling of each kind
TWO_STAGES = {
    'vvt_nano': dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(3., 2.)),
    'qna_vit_nano': dict(
        embed_dims=(16, 32), depths=(1, 2), window_depths=(0, 1), num_heads=(2, 4), window_heads=(1, 2),
        mlp_ratios=(3., 2.)),
    'xvit_pyramid_nano': dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(3., 2.)),
    'castling_nano': dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(3., 2.)),
    'gkvit_nano': dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(3., 2.)),
}
CLOSE = dict(rtol=1e-4, atol=1e-5)


def family(backbone: str) -> str:
    return backbone.partition('/')[0]


def build(backbone: str, **kwargs) -> nn.Module:
    """A small model by name, with another mechanism after a slash."""
    name, _, attn_layer = backbone.partition('/')
    if attn_layer not in ('', 'vicinity'):
        kwargs = dict(dict(attn_layer=attn_layer, attn_kwargs={}), **kwargs)
    return timm.create_model(name, **{'num_classes': 10, **SIZES.get(name, {}), **kwargs})


def create(backbone: str = 'vvt_nano', seed: int = 0, **kwargs) -> nn.Module:
    """With weights large enough to make every part count."""
    torch.manual_seed(seed)
    model = build(backbone, **kwargs)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            nn.init.normal_(p, mean=1. if 'norm' in name and name.endswith('weight') else 0., std=.1)
        else:
            nn.init.normal_(p, std=p[0].numel() ** -.5)
    return model.eval()


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
