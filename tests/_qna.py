"""What the tests of QnA-ViT share: its variants, layers and small models, and the model of a golden case."""
from functools import cache

import timm
import torch
from torch import nn

import vitlinear  # noqa: F401
from _golden import qna_cases, qna_part, qna_state_shapes
from vitlinear.layers import QnAAttention, WindowAttention
from vitlinear.models.qna_vit import QnAVisionTransformer, checkpoint_filter_fn

VARIANTS = ['qna_vit_tiny', 'qna_vit_tiny_7x7', 'qna_vit_small', 'qna_vit_base']
# qna_vit_tiny, made small
SMALL = dict(
    embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), window_depths=(0, 0, 1, 1), num_heads=(2, 4, 6, 8),
    window_heads=(1, 1, 2, 4))


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that no initialisation gives, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean = 1. if 'norm' in name and name.endswith('weight') else 0.
            p.copy_(mean + torch.randn(p.shape, generator=g) * (.2 if p.ndim == 1 else p[0].numel() ** -.5))
    return model.eval()


@cache
def golden_model(name: str) -> QnAVisionTransformer:
    """For tests that leave it as it is."""
    case = qna_cases()[name]
    config = case['config']
    windows, qna = config['lsa_layers'], config['qna_layers']
    model = QnAVisionTransformer(
        img_size=64,  # whose maps the authors' windows cover in the last two stages
        num_classes=case['num_classes'],
        embed_dims=[config['base_dim'] * 2 ** i for i in range(4)],
        depths=[a + b for a, b in zip(windows, qna)],
        window_depths=windows,
        num_heads=config['qna_heads'],
        window_heads=config['lsa_heads'],
        kernel_size=config['qna_receptive_field'],
        num_queries=config['qna_num_queries'],
    )
    for i, stage in enumerate(model.stages):
        for block in stage.blocks:
            if isinstance(block.attn, WindowAttention):
                assert block.attn.window_size == (config['lsa_window'][i],) * 2
    model.load_state_dict(checkpoint_filter_fn(qna_part('params:' + case['param_set']), model))
    return model.eval()


@cache
def default(variant: str) -> nn.Module:
    """For tests that leave it as it is."""
    return timm.create_model(variant, device='meta')


def flax_shapes(variant: str) -> dict[str, torch.Tensor]:
    return {path: torch.empty(shape, device='meta') for path, shape in qna_state_shapes()[variant]['entries']}


def create_layer(*args, seed: int = 0, std: float = 1., **kwargs) -> QnAAttention:
    """A module in eval mode that is silent nowhere."""
    torch.manual_seed(seed)
    module = QnAAttention(*args, **kwargs)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=std * {'query': 1., 'rel_pos_bias': .6, 'attn_scale': .5}.get(name, p[0].numel() ** -.5))
        module.k.weight.mul_(3.)
    return module.eval()


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
