"""What the mechanisms share: float32 islands under autocast, products summed in float32, inverse norms, checks."""
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


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def inverse_norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    """`1 / |x|` over an axis, which is kept, in float32 at least.

    It is 0 where `|x| <= eps`: such a vector has no direction, and `x / |x|` is 0 there and has no gradient.
    `F.normalize` has one of `1 / eps`.
    """
    square = at_least_float32(x).square().sum(dim=dim, keepdim=True)  # faster than linalg.vector_norm on short axes
    return square.clamp(min=eps * eps).rsqrt() * (square > eps * eps)


@lru_cache
def _has_float32_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.bmm` takes half precision to float32 there: a call is tried once."""
    x = torch.ones(1, 8, 8, device=device, dtype=dtype)
    try:
        return torch.bmm(x, x, out_dtype=torch.float32).dtype == torch.float32
    except (NotImplementedError, RuntimeError, TypeError):
        return False


@scripts_as(at_least_float32)
def as_operand(x: torch.Tensor) -> torch.Tensor:
    """A tensor as `product` takes it: half precision as it is where its sums can be float32, else in float32."""
    if x.dtype in (torch.float32, torch.float64) or (
            x.is_cuda and is_eager() and not (torch.is_grad_enabled() and x.requires_grad)
            and _has_float32_products(x.device, x.dtype)):
        return x
    return x.float()


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


@scripts_as(_matmul)
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of (..., n, m) and (..., m, p) from `as_operand`, with the same leading axes, summed in float32 at least.

    Half precision, which only CUDA devices in eager mode without autograd keep, goes into the tensor cores as it is.
    """
    if a.dtype != b.dtype:
        a, b = at_least_float32(a), at_least_float32(b)
    if a.dtype in (torch.float32, torch.float64):
        return _matmul(a, b)
    out = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return out.unflatten(0, a.shape[:-2])


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
