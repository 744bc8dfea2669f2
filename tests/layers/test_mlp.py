"""MLPs on (B, H, W, C) maps."""
import pytest
import torch

from vitlinear.layers.mlp import ConvMlp


@pytest.mark.parametrize('size', [(1, 1), (1, 5), (2, 1), (2, 2), (7, 2), (3, 3)])
def test_mlp_on_maps_smaller_than_its_kernel(size: tuple[int, int]):
    """Training puts zeros around them, which no value or gradient sees."""
    torch.manual_seed(0)
    mlp, x = ConvMlp(6, 24).double(), torch.randn(2, *size, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for training in (True, False):
        out = mlp.train(training)(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *mlp.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
