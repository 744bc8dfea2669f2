"""The one rule which implementation of a primitive runs.

A primitive (`primitives/`) has up to four implementations: 'torch', plain operations, which may be differentiated any
number of times and which exporters and TorchScript see, and compilers where there is no other; 'autograd', a backward
pass that keeps less; 'triton', kernels, in compiled graphs as operators; and 'compiled', plain operations as one
operator for compilers. Nothing else in the package asks about devices, modes or gradients to choose between them.

    with ops.use('torch'):                    # the plain operations, whatever the rule says
        model(x)
    ops.explain(ops.token_sums, k, v)         # which implementation runs for these tensors, and why
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _triton

IMPLEMENTATIONS = ('torch', 'autograd', 'triton', 'compiled')

# The types of tensors that are what they seem.
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

# Every primitive by name, for tests and for `explain`.
PRIMITIVES: dict[str, Callable[..., Any]] = {}

_forced: ContextVar[str | None] = ContextVar('vitlinear_implementation', default=None)


def scripts_as(plain: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: TorchScript compiles `plain` in the place of the decorated function."""
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__prepare_scriptable__ = getattr(plain, '__prepare_scriptable__', lambda: plain)
        return function
    return decorate


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Within the context, primitives run this implementation where they have it, and 'torch' elsewhere.

    Args:
        implementation: 'torch', 'autograd' or 'triton'.

    Raises:
        ValueError: The implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown implementation '{implementation}', expected one of {', '.join(IMPLEMENTATIONS)}.")
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


def is_eager() -> bool:
    """Whether operations run as they are called, so that code may choose by sizes; graphs shall hold for every size."""
    return not torch.jit.is_tracing() and not torch.compiler.is_compiling()


def is_specialised() -> bool:
    """Whether the code is for the sizes at hand: eager, or compiled with guards, but neither traced nor exported."""
    return not torch.jit.is_tracing() and not torch.compiler.is_exporting()


def may_read(x: torch.Tensor) -> bool:
    """Whether the values of a tensor may steer the evaluation: reading them waits for no device and breaks no graph."""
    return type(x) in PLAIN_TENSORS and x.device.type == 'cpu' and is_eager() and not is_transformed()


def _always(x: torch.Tensor) -> bool:
    return True


@scripts_as(_always)
def is_plain_tensor(x: torch.Tensor) -> bool:
    """Whether a tensor is what it seems, and none that stands for others, such as a quantised one."""
    return not is_traceable_wrapper_subclass(x)


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def choose(
        implementations: Mapping[str, Callable[..., Any]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
) -> tuple[str, str]:
    """The implementation to run, and the reason.

    Args:
        implementations: Those that exist, by name. One that is for some types of devices alone has their names in its
            attribute `devices`; 'triton' has a function `refuses` of the arguments: a reason, or ''.
        args, kwargs: What the primitive is given.
    """
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    if not tensors:
        return 'torch', 'there is no tensor among the arguments'
    forced = _forced.get()
    kernels = implementations.get('triton')
    if forced == 'triton' and kernels is not None:
        refused = '' if _triton.INTERPRETED else _triton.refusal(tensors[0])
        refused = refused or kernels.refuses(*args, **kwargs)
        return ('torch', f"ops.use('triton'), but {refused}") if refused else ('triton', "ops.use('triton')")
    if forced is not None:
        if forced in implementations:
            return forced, f"ops.use('{forced}')"
        return 'torch', f"ops.use('{forced}'), which this primitive has not"
    if not is_specialised():
        return 'torch', 'a graph is made, which holds plain operations'
    if is_transformed():
        return 'torch', 'torch.func and forward-mode differentiation need plain operations'
    wanted = half = False
    devices = getattr(implementations.get('autograd'), 'devices', None)
    for x in tensors:
        if type(x) not in PLAIN_TENSORS:
            return 'torch', f'{type(x).__name__} is no plain tensor'
        wanted = wanted or x.requires_grad
        half = half or (x.is_cuda and x.element_size() == 2)
    refused = 'there are no kernels' if kernels is None else 'kernels need a CUDA device'
    if kernels is not None and tensors[0].is_cuda:
        refused = _triton.refusal(tensors[0]) or kernels.refuses(*args, **kwargs)
        if not refused:
            return 'triton', 'kernels take these arguments'
    if torch.compiler.is_compiling():
        if 'compiled' in implementations:
            return 'compiled', 'it is one operator for compilers'
        return 'torch', f'the compiler fuses plain operations; {refused}'
    if devices is not None and any(x.device.type not in devices for x in tensors):
        return 'torch', f"'autograd' is for {', '.join(devices)} alone; {refused}"
    if 'autograd' not in implementations:
        return 'torch', refused
    if wanted and torch.is_grad_enabled():
        return 'autograd', f'gradients are wanted; {refused}'
    if half:
        return 'autograd', f'half precision goes into the tensor cores as it is; {refused}'
    return 'torch', f'no gradients are wanted; {refused}'


def primitive(**implementations: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs one of these implementations, by the rule of this file.

    Args:
        implementations: Functions with the same arguments by name of the implementation; 'torch' is needed.
    """
    plain = implementations['torch']

    @scripts_as(plain)
    @wraps(plain)
    def run(*args: Any, **kwargs: Any) -> Any:
        name, _ = choose(implementations, args, kwargs)
        return implementations[name](*args, **kwargs)

    run.implementations = implementations
    PRIMITIVES[plain.__name__] = run
    return run


def explain(function: Callable[..., Any], *tensors: torch.Tensor) -> str:
    """Which implementation of a primitive runs for these tensors, and why, as one line of text."""
    name, reason = choose(function.implementations, tensors, {})
    return f"{function.__name__}: '{name}', since {reason}; there are {', '.join(function.implementations)}"
