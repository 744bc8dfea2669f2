"""What the mechanisms share: float32 islands under autocast, products summed in float32, inverse norms, checks."""
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch

from ._dispatch import is_eager, scripts_as


def no_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the function runs with autocast off; its first argument is a tensor.

    Linear attention under autocast would sum over positions in half precision, whose range or digits that leaves.
    """
    @scripts_as(function)
    @wraps(function)
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        device = x.device.type
        if device == 'meta' or not torch.is_autocast_enabled(device):
            return function(x, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(x, *args, **kwargs)
    return run


def no_autocast_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `no_autocast`, for the backward pass `(ctx, *grads)` of a torch.autograd.Function."""
    @wraps(function)
    def run(ctx: Any, *grads: torch.Tensor | None) -> Any:
        device = next(g.device.type for g in grads if g is not None)
        with torch.autocast(device, enabled=False):
            return function(ctx, *grads)
    return run


def _assume(name: str, value: str, valid: str) -> None:
    """Nothing: TorchScript has the checks behind it."""


@scripts_as(_assume)
def check_choice(name: str, value: str, valid: Sequence[str] | str) -> None:
    """Raise ValueError, with the argument's name, unless `value` is one of `valid`, a sequence or words in a string."""
    valid = valid.split() if isinstance(valid, str) else valid
    if value not in valid:
        raise ValueError(f"Unknown {name} '{value}', expected one of {', '.join(valid)}.")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a type are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def inverse_norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    """`1 / |x|` over an axis, which is kept, in float32 at least.

    It is 0 where `|x| <= eps`: such a vector has no direction, and `x / |x|` is 0 there and has no gradient.
    `F.normalize` has one of `1 / eps`.
    """
    square = at_least_float32(x).square().sum(dim=dim, keepdim=True)  # faster than linalg.vector_norm on short axes
    return torch.threshold(square, eps * eps, math.inf).rsqrt()


@lru_cache
def _has_float32_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.bmm` takes half precision to float32 there: a call is tried once."""
    x = torch.ones(1, 8, 8, device=device, dtype=dtype)
    try:
        return torch.bmm(x, x, out_dtype=torch.float32).dtype == torch.float32
    except (NotImplementedError, RuntimeError, TypeError):
        return False


def _plain_operand(x: torch.Tensor) -> torch.Tensor:
    return at_least_float32(x).flatten(0, 1)


@scripts_as(_plain_operand)
def as_operand(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, d) to (B heads, N, d) as `product` takes it, in one pass over memory or none.

    Half precision stays as it is where its sums can be float32; else it becomes float32. On CPUs it stays bfloat16 in
    inference, where oneDNN accumulates in float32.
    """
    if x.dtype not in (torch.float32, torch.float64) and not _stays_half(x):
        x = x.to(torch.float32, memory_format=torch.contiguous_format)
    return x.flatten(0, 1)


def _stays_half(x: torch.Tensor) -> bool:
    if not is_eager() or (torch.is_grad_enabled() and x.requires_grad):
        return False
    if x.device.type == 'cpu':
        return x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and not x.requires_grad
    return x.is_cuda and _has_float32_products(x.device, x.dtype)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a, b)


@scripts_as(_bmm)
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of (n, N, d) and (n, d, e) from `as_operand`, in float32 at least."""
    if a.dtype != b.dtype:
        a, b = at_least_float32(a), at_least_float32(b)
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a, b).float()


def differentiate(
        plain: Callable[..., Any],
        inputs: Sequence[torch.Tensor | None],
        grads: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of `plain(*inputs)` that can be differentiated again.

    For hand-written backward passes that are asked for a graph (`create_graph=True`): what they keep from the forward
    pass would count as constant in a second derivative.

    Args:
        plain: The function in operations that autograd knows; returns a tensor or several.
        inputs: Its tensors; those that require no gradient, and None, get None.
        grads: Gradient of each result, None for none.
    """
    # a tensor that is passed twice gets the gradient of each of its places
    inputs = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    outputs = plain(*inputs)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y is not None and g is not None]
    outputs, grads = [y for y, _ in pairs], [g for _, g in pairs]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
