"""What several mechanisms need."""
import torch


def check_heads(dim: int, num_heads: int, name: str = 'dim') -> int:
    """Head dimension of `dim` channels in `num_heads` heads.

    Raises:
        ValueError: Either is not positive, or `dim` is not divisible by `num_heads`.
    """
    if dim <= 0 or num_heads <= 0 or dim % num_heads:
        raise ValueError(f'{name}={dim} must be a positive multiple of num_heads={num_heads}.')
    return dim // num_heads


def is_eager() -> bool:
    """Whether the code runs as written, so that it may choose by the size of a map; not for TorchScript."""
    return not torch.jit.is_tracing() and not torch.compiler.is_compiling()


def use_bands(x: torch.Tensor) -> bool:
    """Whether to evaluate a large map in bands of rows that fit the caches, instead of at once.

    That needs a loop over the size of the map, so it is for eager inference on a CPU: neither autograd nor a tracer or
    compiler sees it. Where memory traffic and page faults dominate, it is several times faster.
    """
    return x.device.type == 'cpu' and not torch.is_grad_enabled() and is_eager()


def band_rows(rows: int, row_elements: int, band_elements: int, least: int = 1) -> int:
    """Rows of a band, at least `least`, when `rows` of them are cut evenly into bands of about `band_elements`."""
    bands = max(1, rows * row_elements // band_elements)
    return max(least, -(-rows // bands))


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, H, W, num_heads * d) to (B, num_heads, H, W, d)."""
    B, H, W, C = x.shape
    return x.reshape(B, H, W, num_heads, C // num_heads).permute(0, 3, 1, 2, 4)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, num_heads, H, W, d) to (B, H, W, num_heads * d)."""
    return x.permute(0, 2, 3, 1, 4).flatten(3)
