"""The series of a walk by a kernel, and the same for its gradient: one more series, of the transposed step."""
import torch

from ..._triton import dot_precision, next_size, too_wide
from ..by_kernels import by_kernels
from . import torch as plain

MAX_CHANNELS = 64  # of a matrix: a program holds two of them
SMALL_CHANNELS = 32  # up to which 48 KiB of shared memory are enough, and what more need
LARGE_SHARED_MEMORY = 64 * 1024
WARPS = 4


def _refuses(step, start, *args, **kwargs):
    channels = max(*step.shape[2:], start.shape[3])
    return too_wide(step, 'matrices', channels, MAX_CHANNELS, SMALL_CHANNELS, LARGE_SHARED_MEMORY)


def launch(step: torch.Tensor, start: torch.Tensor, num_doublings: int) -> torch.Tensor:
    """As `torch.walk_series`."""
    from . import kernels  # loads Triton
    (B, heads, R, E), out = start.shape, torch.empty_like(start, memory_format=torch.contiguous_format)
    if out.numel():
        kernels.series_kernel[B * heads,](
            step, start, out, heads, R, E, num_doublings, *step.stride(), *start.stride(),
            PRECISION=dot_precision(step), BR=next_size(R), BE=next_size(E), num_warps=WARPS)
    return out


def launch_backward(
        step: torch.Tensor,
        start: torch.Tensor,
        grad: torch.Tensor,
        num_doublings: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of both matrices; that of the inverse, which the series is but for the terms that it leaves out."""
    grad_start = launch(step.transpose(2, 3), grad, num_doublings)
    return grad_start @ launch(step, start, num_doublings).transpose(2, 3), grad_start


def _fake(step, start, num_doublings):
    return start.new_empty(start.shape)


def _fake_backward(step, start, grad, num_doublings):
    return step.new_empty(step.shape), start.new_empty(start.shape)


_walk_series = by_kernels(
    'walk_series', plain.walk_series, launch, launch_backward, _fake, _fake_backward, 2, _refuses)


def walk_series(step, start, num_doublings=7):
    """As `torch.walk_series`; keeps its arguments, and computes the result once more for the gradient."""
    return _walk_series(step, start, num_doublings)


walk_series.refuses = _refuses
