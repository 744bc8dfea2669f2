"""Comparisons that the tests of several mechanisms make."""
from collections.abc import Callable

import torch

from vitlinear.inference import row_block_bytes
from vitlinear.inference.rows import BRANCHES

TIGHT = dict(rtol=1e-9, atol=1e-11)


def value_and_grads(fn: Callable, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    args = [x.detach().clone().requires_grad_() for x in args]
    out = fn(*args)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, args, cotangent)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, **tolerance: float) -> None:
    """With the absolute tolerance relative to the largest entry."""
    size = expected.detach().abs().max().clamp(min=1e-300)
    torch.testing.assert_close(actual / size, expected / size, **(tolerance or TIGHT))


def saved_bytes(fn: Callable, *args: torch.Tensor) -> int:
    """Bytes that the backward pass keeps, each storage once, the arguments themselves included."""
    storages = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = fn(*args)
    size = sum(s.nbytes() for s in storages.values())
    assert out.requires_grad
    return size


def in_row_blocks(module: torch.nn.Module, x: torch.Tensor, size: int = 1) -> torch.Tensor:
    """A layer of (B, H, W, C) maps in its row-block form, in blocks of few rows."""
    with torch.no_grad(), row_block_bytes(size):
        return BRANCHES[type(module)](module, x, None, None)
