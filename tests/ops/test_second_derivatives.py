"""Second derivatives: backward passes written by hand may keep what a second derivative depends on."""
from functools import partial

import pytest
import timm
import torch

import vitlinear  # noqa: F401
from vitlinear.ops import (
    linear_angular_attention,
    linear_attention,
    qna_attention,
    random_walk_attention,
    vicinity_attention,
    xnorm_attention,
)

NANOS = ['vvt_nano', 'qna_vit_nano', 'castling_nano', 'xvit_pyramid_nano', 'gkvit_nano']


def rand(*size):
    return torch.rand(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(size))) + 0.1


def tokens(op, *more):
    return op, tuple(rand(1, 2, n, d) for n, d in ((6, 3), (7, 3), (7, 2))) + more


OPS = {
    'linear': tokens(linear_attention),
    'linear_angular': (
        lambda q, v, w: linear_angular_attention(q, q, v, w), (rand(1, 2, 6, 3), rand(1, 2, 6, 2), rand(2, 1, 3, 1))),
    'xnorm': tokens(xnorm_attention, rand(2), rand(2)),
    'walk': tokens(lambda q, k, v, beta, t: random_walk_attention(q, k, v, beta * 0.5, t), rand(2), rand(2)),
    'spectral': tokens(
        lambda q, k, v, beta: random_walk_attention(q, k, v, beta * 0.5, mode='spectral', features='signed'), rand(2)),
    **{f'vicinity-{impl}-{clamp}': (
        partial(vicinity_attention, impl=impl, clamp=clamp), tuple(rand(1, 2, 2, 3, n) for n in (3, 3, 2)))
        for impl in ('features', 'separable') for clamp in (True, False)},
    **{f'qna-{impl}': (
        partial(qna_attention, impl=impl), (rand(1, 3, 3, 2, 2), rand(1, 3, 3, 2, 2), rand(4, 1, 3, 3),
                                            rand(4, 1, 3, 3))) for impl in ('conv', 'shift')},
}


@pytest.mark.parametrize('name', OPS)
def test_ops(name):
    op, inputs = OPS[name]
    inputs = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize('name', NANOS)
def test_hessian_vector_product_of_a_model(name):
    """Against finite differences of the gradient, with `inputs=`, which goes past once_differentiable."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    direction = direction / direction.norm()

    def gradient(x, **kwargs):
        return torch.autograd.grad(model(x).square().sum(), x, **kwargs)[0]

    product, = torch.autograd.grad((gradient(x, create_graph=True) * direction).sum(), x)
    step = 1e-5 * direction
    expected = (gradient(x + step) - gradient(x - step)) / 2e-5
    assert (product - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize('name', NANOS)
def test_black_images(name):
    """An image without a signal, by itself or beside others, gives finite outputs and gradients."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()
    x = torch.randn(2, 3, 32, 32)
    x[1] = 0.
    model.train()(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
