"""Whole models where numbers are delicate: second derivatives, images without a signal, and the count of operators."""
import importlib
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitlinear import ops

NANOS = ['vvt_nano', 'qna_vit_nano', 'castling_nano', 'xvit_pyramid_nano', 'gkvit_nano']
# operators that move no data, and those that eager code asks a CPU alone
VIEWS = {
    '_local_scalar_dense', '_reshape_alias', '_unsafe_view', 'alias', 'aminmax', 'as_strided', 'chunk', 'detach',
    'diagonal', 'empty', 'empty_like', 'expand', 'new_empty',
    'permute', 'select', 'slice', 'split', 'split_with_sizes', 'squeeze', 't', 'transpose', 'unbind', 'unflatten',
    'unfold', 'unsqueeze', 'view'}


def create(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


@pytest.mark.parametrize('name', NANOS)
def test_hessian_vector_product(name: str):
    """Against finite differences of the gradient, with `inputs=`, which goes past once_differentiable."""
    model = create(name, num_classes=5).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    direction = direction / direction.norm()

    def gradient(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.autograd.grad(model(x).square().sum(), x, **kwargs)[0]

    product, = torch.autograd.grad((gradient(x, create_graph=True) * direction).sum(), x)
    step = 1e-5 * direction
    expected = (gradient(x + step) - gradient(x - step)) / 2e-5
    assert (product - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize('name', NANOS)
def test_black_images(name: str):
    """An image without a signal, by itself or beside others, gives finite outputs and gradients."""
    model = create(name, num_classes=5)
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()
    x = torch.randn(2, 3, 32, 32)
    x[1] = 0.
    model.train()(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class CountOperators(TorchDispatchMode):
    """How often each ATen operator runs."""
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch) -> Counter[str]:
    """How often each kernel is launched, without running it."""
    count: Counter[str] = Counter()

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            def launch(*args: Any, **kwargs: Any) -> None:
                count[self.name] += 1
            return launch

    for primitive in ('dw_gelu', 'tokens', 'walk_series', 'windows'):
        kernels = importlib.import_module(f'vitlinear.ops.primitives.{primitive}.kernels')
        for name in (name for name in vars(kernels) if name.endswith('_kernel')):
            monkeypatch.setattr(kernels, name, Kernel(name))
    return count


@pytest.mark.parametrize('name, plain, folded, by_kernels', [
    ('vvt_small', 869, 869, 443), ('gkvit_small', 686, 654, 597), ('xvit_pyramid_small', 554, 512, 410),
    ('castling_levit_256', 504, 426, 355), ('qna_vit_tiny', 401, 281, 263)])
def test_operators_of_a_forward(name: str, plain: int, folded: int, by_kernels: int, launches: Counter[str]):
    """One image at 224 x 224: plain operations, the same after folding, and those beside kernels with the latter.

    A hook turns off the ways for inference on CPUs.
    """
    model = create(name).to(memory_format=torch.channels_last)
    model.register_forward_hook(lambda *args: None)
    x = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def operators(implementation: str) -> dict[str, int]:
        with torch.no_grad(), ops.use(implementation):
            model(x)  # tables are built once
            launches.clear()
            with CountOperators() as count:
                model(x)
        return {name: n for name, n in (count.calls + launches).items() if name not in VIEWS}

    for limit, implementation in ((by_kernels, 'triton'), (plain, 'torch')):
        calls = operators(implementation)
        assert sum(calls.values()) <= limit, calls
    model = reparameterize_model(model)
    assert sum(operators('torch').values()) <= folded
