"""Small models of the families, and what their tests measure of a model."""
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import timm
import torch
from timm.models.mvitv2 import MultiScaleVitCfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vitlinear  # noqa: F401

CLOSE = dict(rtol=1e-4, atol=1e-5)
_PYRAMID = dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratios=2.)
_LEVIT = dict(
    img_size=32, embed_dim=(16, 24), stem_widths=(8, 16), stem_strides=(2, 2), key_dim=4, num_heads=(2, 3),
    depth=(1, 1))
_DEIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=2)
_FLAT = dict(img_size=48, embed_dim=16, depth=3, num_heads=2, attn_dim=8, init_values=1.)
# one small model of each form, at an image size where no grid of a Castling model is larger than 16 x 16
CASTLING: dict[str, tuple[str, dict[str, Any]]] = {
    'nano': ('castling_nano', _PYRAMID),
    'levit': ('castling_levit_128s', dict(_LEVIT, distilled=False)),
    'levit_distilled': ('castling_levit_128s', _LEVIT),
    'mvitv2': ('castling_mvitv2_tiny', dict(
        img_size=32, model_cfg=MultiScaleVitCfg(depths=(1, 1), embed_dim=8, num_heads=1))),
    'pvt_v2': ('castling_pvt_v2_b0', dict(_PYRAMID, img_size=32)),
    'deit': ('castling_deit_tiny_patch16_224', _DEIT),
    'deit_distilled': ('castling_deit_tiny_distilled_patch16_224', _DEIT),
}
FORMS = {
    **CASTLING,
    'xvit': ('xvit_tiny', _FLAT),
    'xvit_fourier': ('xvit_tiny', dict(_FLAT, pos_embed='fourier', global_pool='avg', lpi_convs=1)),
    'xvit_none': ('xvit_tiny', dict(_FLAT, pos_embed='none')),
}


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """With a ValueError whose message has all these words."""
    with pytest.raises(ValueError, match=r'.') as e:
        yield
    assert all(word in str(e.value) for word in words), e.value


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(form: str, **kwargs: Any) -> nn.Module:
    name, small = FORMS[form]
    return timm.create_model(name, **{'num_classes': 5, **small, **kwargs})


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make every part count and batch norms that are not the identity, in evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    scales = {id(m.weight) for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d))}
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if id(p) in scales or 'gamma' in name or 'running_var' in name:
                p.copy_(.7 + .6 * torch.rand(p.shape, generator=g))
            elif name in ('pos_embed', 'cls_token'):
                p.copy_(torch.randn(p.shape, generator=g))
            elif isinstance(p, nn.Parameter) or 'running_mean' in name:
                p.copy_(torch.randn(p.shape, generator=g) * (.2 if p.ndim == 1 else p[0].numel() ** -.5))
    return model.eval()


def create(form: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    return randomize(build(form, **kwargs), seed)


@cache
def on_meta(name: str) -> nn.Module:
    """An architecture without values, for tests that leave it as it is."""
    return timm.create_model(name, device='meta')


def filtered(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Through the checkpoint filter of the model's family."""
    return sys.modules[type(model).__module__].checkpoint_filter_fn(state_dict, model)


def numel(model: nn.Module, *but: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not any(b in name for b in but))


def count_macs(model: nn.Module, H: int, W: int, batch: int = 1) -> int:
    """Multiply-accumulates of a model on 'meta'."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(batch, 3, H, W, device='meta'))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def check_initialisation(model: nn.Module, init_values: float = 1.) -> None:
    """Mean and standard deviation of every weight within 5 standard errors of what PVTv2 has, and buffers as new."""
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        owner, _, kind = name.rpartition('.')
        assert torch.isfinite(p).all(), name
        if kind == 'bias':
            assert p.eq(0).all(), name
        elif kind == 'gamma':
            assert p.eq(init_values).all(), name
        elif p.ndim == 1 or kind in ('gamma_q', 'gamma_kv'):
            assert p.eq(1).all(), name
        else:
            std, module = .02, modules[owner]
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                std = math.sqrt(2 / fan_out)
            assert abs(p.mean().item()) < 5 * std / p.numel() ** .5, name
            assert abs(p.std().item() - std) < 5 * std / (2 * p.numel()) ** .5, name
    for name, b in model.named_buffers():
        assert b.eq(1 if name.endswith('running_var') else 0).all(), name


def blank(model: nn.Module) -> nn.Module:
    """A model on 'meta' with nonsense in all its tensors."""
    model = model.to_empty(device='cpu')
    for t in [*model.parameters(), *model.buffers()]:
        t.data.fill_(math.nan if t.is_floating_point() else 99)
    return model
