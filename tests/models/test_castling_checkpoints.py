"""Weights of backbones with softmax attention as a start for Castling models, from their files and by `convert`."""
import logging
import re
from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn

from _models import filtered, images, on_meta, randomize
from vitlinear.tools import cli
from vitlinear.zoo.records import read_record

LEVIT = dict(img_size=64, embed_dim=(16, 24), key_dim=4, num_heads=(2, 3), depth=(1, 2))
MVIT = dict(img_size=32, num_classes=5)
MVIT_CFG = MultiScaleVitCfg(depths=(1, 1), embed_dim=8, num_heads=1, stride_kv=((1, 1), (2, 2)))
PVT = dict(embed_dims=(8, 16, 16, 16), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2), mlp_ratios=(2, 2, 2, 2))
DEIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=3)
# a host, and our model for its weights
HOSTS: dict[str, tuple[Callable, str, dict]] = {
    'levit': (lambda: timm.create_model('levit_128s', num_classes=5, **LEVIT), 'castling_levit_128s', dict(
        LEVIT, qk_width='key')),
    'levit_conv': (lambda: timm.create_model('levit_conv_128s', num_classes=5, **LEVIT), 'castling_levit_128s', dict(
        LEVIT, qk_width='key')),
    'mvitv2': (lambda: MultiScaleVit(MVIT_CFG, **MVIT), 'castling_mvitv2_tiny', dict(img_size=32, model_cfg=MVIT_CFG)),
    'pvt_v2': (lambda: timm.create_model('pvt_v2_b0', num_classes=5, sr_ratios=(1, 1, 1, 1), **PVT),
               'castling_pvt_v2_b0', dict(PVT, img_size=64)),
    'pvt_v2_reduced': (lambda: timm.create_model('pvt_v2_b0', num_classes=5, sr_ratios=(8, 4, 2, 1), **PVT),
                       'castling_pvt_v2_b0', dict(PVT, img_size=64)),
    'deit': (lambda: timm.create_model('deit_tiny_patch16_224', num_classes=5, **DEIT),
             'castling_deit_tiny_patch16_224', DEIT),
    'deit_distilled': (lambda: timm.create_model('deit_tiny_distilled_patch16_224', num_classes=5, **DEIT),
                       'castling_deit_tiny_distilled_patch16_224', DEIT),
}


@cache
def host(name: str) -> nn.Module:
    """For tests that leave it as it is; without positions in its attention, which ours has not."""
    model = randomize(HOSTS[name][0]())
    with torch.no_grad():
        for key, p in model.named_parameters():
            if 'attention_bias' in key or 'rel_pos' in key:
                p.zero_()
    return model


def ours(name: str, **kwargs) -> nn.Module:
    _, model, options = HOSTS[name]
    return timm.create_model(model, **{'num_classes': 5, **options, **kwargs}).eval()


def batch(name: str) -> torch.Tensor:
    return images(2, 3, 64, 64) if name.startswith(('lev', 'pvt')) else images(2, 3, 32, 32)


@pytest.mark.parametrize('name', HOSTS)
def test_host_weights(name: str, caplog):
    """All weights that our model has a place for are the host's, and the convolutions of the values the model's."""
    model, theirs = ours(name), host(name).state_dict()
    with caplog.at_level(logging.WARNING, 'vitlinear'):
        loaded = filtered(theirs, model)
    assert 'softmax attention' in caplog.text
    own = model.state_dict()
    model.load_state_dict(loaded, strict=True)
    for key, value in loaded.items():
        if '.dconv.' in key:
            assert torch.equal(value, own[key])
        elif '.attn.qkv.' in key and name.startswith('pvt'):
            assert torch.equal(value, torch.cat([theirs[key.replace('.qkv.', f'.{part}.')] for part in ('q', 'kv')]))
        else:
            assert torch.equal(value.flatten(), theirs[key].flatten()), key
    gone = {k for k in theirs if k not in loaded and not re.search(r'\.attn\.(q|kv)\.', k)}
    assert all(re.search(r'attention_bias|rel_pos|\.attn\.(sr|norm)\.', k) for k in gone), gone
    assert model(batch(name)).shape == (2, 5)
    # a head for other classes is the model's own
    loaded, own = filtered(theirs, other := ours(name, num_classes=3)), other.state_dict()
    heads = [k for k, v in own.items() if k.startswith('head') and v.ndim and len(v) == 3]
    assert heads and all(torch.equal(loaded[k], own[k]) for k in heads)


@pytest.mark.parametrize('name', [name for name in HOSTS if name != 'pvt_v2_reduced'])
def test_host_with_its_softmax(name: str, caplog):
    """With softmax kept in all layers, the host's weights make the host's outputs: each is in its place."""
    model = ours(name, softmax_below=10 ** 6)
    with caplog.at_level(logging.WARNING, 'vitlinear'):
        model.load_state_dict(filtered(host(name).state_dict(), model), strict=True)
    assert 'softmax attention' not in caplog.text
    torch.testing.assert_close(model(batch(name)), host(name)(batch(name)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(('theirs', 'name', 'kwargs'), [
    ('levit_128s', 'castling_levit_128s', dict(qk_width='key')),
    ('levit_conv_128s', 'castling_levit_128s', dict(qk_width='key')),
    ('levit_384', 'castling_levit_384', dict(qk_width='key')),
    ('mvitv2_tiny', 'castling_mvitv2_tiny', {}),
    ('pvt_v2_b0', 'castling_pvt_v2_b0', {}),
    ('deit_tiny_patch16_224', 'castling_deit_tiny_patch16_224', {}),
    ('deit_tiny_distilled_patch16_224', 'castling_deit_tiny_distilled_patch16_224', {})])
def test_published_hosts_fit(theirs: str, name: str, kwargs):
    """By name and shape."""
    model = timm.create_model(name, device='meta', **kwargs)
    loaded = filtered(on_meta(theirs).state_dict(), model)
    assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize(('name', 'theirs', 'words'), [
    ('castling_levit_128s', 'levit_128s', "qk_width='key'"),
    ('castling_levit_128s', 'levit_conv_128s', "qk_width='key'"),
    *((name, wrong, 'checkpoint') for name in (
        'castling_levit_128s', 'castling_mvitv2_tiny', 'castling_pvt_v2_b0', 'castling_deit_tiny_patch16_224')
      for wrong in ('vvt_nano', 'mvitv2_base', 'deit_base_patch16_224', 'levit_384', 'pvt_v2_b1')),
    ('castling_deit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224', 'another variant'),
    ('castling_deit_tiny_distilled_patch16_224', 'deit_tiny_patch16_224', 'another variant'),
    ('castling_levit_128', 'castling_levit_128s', 'another variant'),
    ('castling_mvitv2_tiny', 'castling_mvitv2_base', 'another variant'),
    ('castling_pvt_v2_b0', 'castling_pvt_v2_b1', 'another variant'),
    ('castling_deit_tiny_patch16_224', 'castling_deit_small_patch16_224', 'another variant'),
    ('castling_levit_128s', 'castling_nano', 'holds no')])
def test_others_are_refused(name: str, theirs: str, words: str):
    with pytest.raises(ValueError, match=words):
        filtered(on_meta(theirs).state_dict(), on_meta(name))


@pytest.mark.parametrize('name', HOSTS)
def test_incomplete_hosts(name: str):
    theirs = host(name).state_dict()
    missing = next(k for k in theirs if 'mlp' in k)
    with pytest.raises(ValueError, match=r'incomplete|no .* weights'):
        filtered({k: v for k, v in theirs.items() if k != missing}, ours(name))


@pytest.mark.parametrize('own', [True, False])
@pytest.mark.parametrize('name', ['deit', 'deit_distilled'])
def test_positions_are_resized(name: str, own: bool):
    """To another image size as timm does."""
    theirs = (randomize(ours(name)) if own else host(name)).state_dict()
    model = ours(name, img_size=(48, 32))
    loaded = filtered(theirs, model)
    prefix = model.num_prefix_tokens
    expected = timm.layers.resample_abs_pos_embed(theirs['pos_embed'], (6, 4), num_prefix_tokens=prefix)
    assert torch.equal(loaded['pos_embed'], expected) and expected.shape == (1, 24 + prefix, 24)
    model.load_state_dict(loaded, strict=True)


# conversion

def convert(name: str, folder, arch: str, options: dict, tag: str = 'host') -> int:
    torch.save(host(name).state_dict(), folder.parent / 'host.pth')
    words = [f'{k}={v!r}'.replace(' ', '') for k, v in options.items()]
    return cli.main(['convert', str(folder.parent / 'host.pth'), '--model', arch, '--output', str(folder), '--tag', tag,
                     '--model-kwargs', *words])


@pytest.mark.parametrize('name', ['levit', 'pvt_v2_reduced', 'deit_distilled'])
def test_convert_host_weights(name: str, capsys, tmp_path):
    """`vitlinear convert` of a backbone with softmax attention, to a folder and back, the same file each time."""
    _, arch, options = HOSTS[name]
    assert convert(name, tmp_path / 'a', arch, options) == 0, capsys.readouterr().err
    model = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    expected = filtered(host(name).state_dict(), model)  # with the convolutions of this model
    state = model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in state.items())
    assert torch.isfinite(model(batch(name))).all() and 'start for training' in read_record(tmp_path / 'a').limits
    assert convert(name, tmp_path / 'b', arch, options) == 0
    a, b = ((tmp_path / folder / 'model.safetensors').read_bytes() for folder in 'ab')
    assert a == b


@pytest.mark.parametrize(('name', 'options', 'words'), [
    ('deit', dict(DEIT, img_size=48), 'resized'), ('levit', LEVIT, "qk_width='key'")])
def test_convert_refuses(name: str, options: dict, words: str, capsys, tmp_path):
    """Positions of another image size, which would be resized, and keys of another width."""
    assert convert(name, tmp_path / 'a', HOSTS[name][1], options) == 2
    assert words in capsys.readouterr().err and not (tmp_path / 'a').exists()
