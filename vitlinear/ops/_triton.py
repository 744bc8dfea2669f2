"""What all kernels share on the host's side: where they run, and why not elsewhere. Importing it does not load Triton.

Kernels are compiled once for each type, padded head size and form of a computation, never for a size of an image, and
their tiles follow from these alone: nothing is tried out at run time. Triton keeps what it compiled on disk.
"""
import importlib.util
import math
import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

# Older versions of Triton are not tested with these kernels.
OLDEST_TRITON = (3, 4)

# The types that kernels take on devices; sums and small matrices are float32.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Whether Triton interprets kernels, slowly and on CPUs, for tests: it reads this variable when it is loaded.
INTERPRETED = os.environ.get('TRITON_INTERPRET', '0') == '1' and importlib.util.find_spec('triton') is not None


def _missing() -> str:
    """Why there are no kernels in this process, '' if there are."""
    if os.environ.get('VITLINEAR_TRITON', '1') == '0':
        return 'VITLINEAR_TRITON=0'
    if importlib.util.find_spec('triton') is None:
        return 'Triton is not installed'
    try:
        found = version('triton')
    except PackageNotFoundError:  # builds for other devices have other names
        found = importlib.import_module('triton').__version__
    if tuple(int(part) for part in found.split('.')[:2]) < OLDEST_TRITON:
        return f'Triton {found} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}'
    return ''


@torch.compiler.assume_constant_result
def device_refusal(index: int) -> str:
    """Why kernels do not run on a CUDA device, '' if they do."""
    return _device_refusal(index)


@lru_cache
def _device_refusal(index: int) -> str:
    if _missing():
        return _missing()
    if torch.version.hip is not None:
        return 'kernels are not tested on AMD devices'
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f'kernels need compute capability 8.0, and the device has {major}.{minor}'
    return ''


def refusal(x: torch.Tensor) -> str:
    """Why kernels do not take a tensor, '' if they do."""
    if x.device.type != 'cuda':
        return f'kernels do not run on {x.device.type}'
    if x.dtype not in KERNEL_DTYPES:
        return f'kernels do not take {x.dtype}'
    return device_refusal(x.get_device())


@torch.compiler.assume_constant_result
def shared_memory(index: int) -> int:
    """Bytes of shared memory that a program may have on a CUDA device; for the interpreter, as many as it likes."""
    return 1 << 20 if index < 0 else torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def too_wide(x: torch.Tensor, what: str, channels: int, most: int, small: int, large_shared_memory: int) -> str:
    """Why matrices of so many channels do not fit into a program, '' if they do: above `small` cards must have more."""
    if channels > most:
        return f'{what} have {channels} channels, and kernels take {most}'
    if channels > small and shared_memory(x.get_device()) < large_shared_memory:
        return f'{what} of {channels} channels need {large_shared_memory} bytes of shared memory'
    return ''


def too_large(x: torch.Tensor) -> str:
    """Why 32-bit offsets within an image (B, ...) do not do, '' if they do."""
    entries = math.prod(x.shape[1:])
    return '' if entries < 2 ** 31 else f'an image has {entries} entries, and kernels take {2 ** 31 - 1}'


def power_of_2(n: int) -> int:
    """The smallest one that is no less than n."""
    return 1 << (n - 1).bit_length()


def next_size(n: int) -> int:
    """Smallest side of a factor of a product of tiles that holds n: a power of 2, at least 16."""
    return max(16, power_of_2(n))


def dot_precision(x: torch.Tensor) -> str:
    """How products of float32 tiles are taken: in TF32 where PyTorch's setting for matrix products allows it.

    Else in three products of TF32, whose digits are those of float32 but for two or three bits.
    """
    if x.dtype == torch.float16:
        return 'tf32'  # float16 has the digits of TF32 and not its range
    return 'tf32' if torch.backends.cuda.matmul.allow_tf32 else 'tf32x3'
