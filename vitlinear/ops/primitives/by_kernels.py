"""What makes a primitive of kernels: an autograd Function for eager code, operators of torch.library for compilers."""
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from .._numerics import differentiate, no_autocast_backward


def _unaliased(launch: Callable[..., Any]) -> Callable[..., Any]:
    """As `launch`, with copies of results that share memory with arguments or each other, as operators must."""
    @wraps(launch)
    def run(*args: Any, **kwargs: Any) -> Any:
        seen = {x.untyped_storage().data_ptr() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
        results = launch(*args, **kwargs)
        kept = []
        for x in (results,) if isinstance(results, torch.Tensor) else results:
            kept.append(x.clone() if x.untyped_storage().data_ptr() in seen else x)
            seen.add(x.untyped_storage().data_ptr())
        return kept[0] if isinstance(results, torch.Tensor) else tuple(kept)
    return run


def _on_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """As `launch`, on the device of its first argument: Triton takes the current one."""
    @wraps(launch)
    def run(x: torch.Tensor, *args: Any) -> Any:
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return launch(x, *args)
        with torch.cuda.device(x.device):
            return launch(x, *args)
    return run


def by_kernels(
        name: str,
        plain: Callable[..., Any],
        launch: Callable[..., Any],
        launch_backward: Callable[..., Any],
        fake: Callable[..., Any],
        fake_backward: Callable[..., Any],
        num_tensors: int,
        refuses: Callable[..., str],
) -> Callable[..., Any]:
    """A primitive whose passes are kernels: launched by an autograd Function in eager code, an operator in graphs.

    The function that it returns takes all arguments in their order, the tensors first, and returns what `launch` does.

    Args:
        name: Of the operator, and before '_backward' of that of its gradient.
        plain: In plain operations: what a backward pass that is asked for a graph differentiates.
        launch: The forward pass.
        launch_backward: Gradients of the tensors, from the tensors, the gradients of all results and the other
            arguments; an empty one for a tensor that is None.
        fake: Results of `launch` without values, for compilers.
        fake_backward: Those of `launch_backward`.
        num_tensors: How many arguments are tensors, or None.
        refuses: From arguments, the reason why the kernels cannot take them, '' if they can.
    """
    launch, launch_backward = _on_device(launch), _on_device(launch_backward)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:num_tensors])
        ctx.options = inputs[num_tensors:]

    def gradients(run: Callable[..., Any]) -> Callable[..., Any]:
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
            tensors = ctx.saved_tensors
            found = run(*tensors, *grads, *ctx.options)
            found = (found,) if isinstance(found, torch.Tensor) else found
            return *(None if x is None else g for x, g in zip(tensors, found, strict=True)), *[None] * len(ctx.options)
        return backward

    operator = torch.library.custom_op(f'vitlinear::{name}', _unaliased(launch), mutates_args=())
    operator.register_fake(fake)
    operator_backward = torch.library.custom_op(
        f'vitlinear::{name}_backward', _unaliased(launch_backward), mutates_args=())
    operator_backward.register_fake(fake_backward)
    operator.register_autograd(gradients(operator_backward), setup_context=setup_context)
    launched_gradients = gradients(launch_backward)

    class Launched(torch.autograd.Function):

        @staticmethod
        def forward(ctx, *args):
            setup_context(ctx, args, None)
            return launch(*args)

        @staticmethod
        @no_autocast_backward
        def backward(ctx, *grads):
            if torch.is_grad_enabled():
                def form(*tensors):
                    return plain(*tensors, *ctx.options)
                return *differentiate(form, ctx.saved_tensors, grads), *[None] * len(ctx.options)
            return launched_gradients(ctx, *grads)

    @wraps(launch)
    def run(*args: Any) -> Any:
        return operator(*args) if torch.compiler.is_compiling() else Launched.apply(*args)

    run.refuses = refuses
    return run
