"""torch.fx with timm's leaf modules, as timm's own suite traces its models: values, sizes and gradients stay."""
import pytest
import torch
from timm.models import create_feature_extractor

from _models import create as create_flat
from _pyramids import BACKBONES, CLOSE, create, images


@pytest.mark.parametrize('name', [*BACKBONES, 'xvit'])
def test_feature_extractor(name: str):
    """Maps and logits without gradients and with them, at sizes that the graph was not traced with."""
    model = create_flat(name) if name == 'xvit' else create(name)
    node = 'blocks.1' if name == 'xvit' else 'stages.1'
    extractor = create_feature_extractor(model, {node: 'map', 'head': 'logits'})
    for shape in ((2, 3, 48, 48), (1, 3, 40, 24)):
        x, found, expected = images(*shape), [], []
        maps = model.forward_intermediates(x, intermediates_only=True, output_fmt='NHWC' if name == 'xvit' else 'NCHW')
        with torch.no_grad():
            torch.testing.assert_close(extractor(x)['logits'], model(x), **CLOSE)
        for results, forward in ((found, lambda x: extractor(x)['logits']), (expected, model)):
            y = x.clone().requires_grad_()
            out = forward(y)
            results += [out, *torch.autograd.grad(out.square().sum(), [y, *model.parameters()])]
        torch.testing.assert_close(extractor(x)['map'], maps[1], **CLOSE)
        for a, b in zip(found, expected, strict=True):
            size = b.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(a / size, b / size, **CLOSE)
