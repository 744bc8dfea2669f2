"""Row blocks: forms of layers that evaluate some images or some rows of a map at a time, and the size of a block."""
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn

_T = TypeVar('_T')

# Bytes that the largest map within a row block takes: about the size of the caches of two cores. Forms derive theirs
# from it, by the number of maps of that size that they hold. Measured: 768 channels of a 256 x 256 map take 43 ms in
# blocks and 175 ms at once (bfloat16), the difference being memory traffic.
ROW_BLOCK_BYTES = 2 ** 22

_bytes: ContextVar[int] = ContextVar('vitlinear_row_block_bytes', default=ROW_BLOCK_BYTES)


@contextmanager
def row_block_bytes(size: int) -> Iterator[None]:
    """Within the context, row blocks are of this size, to tune it or to test many small blocks.

    Args:
        size: Bytes that the largest map within a row block takes.

    Raises:
        ValueError: The size is not positive.
    """
    if size < 1:
        raise ValueError(f'size={size} must be positive.')
    token = _bytes.set(size)
    try:
        yield
    finally:
        _bytes.reset(token)


def block_sizes(
        num_rows: int,
        row_bytes: int,
        share: float = 1.,
        at_least: int = 1,
) -> tuple[int, int]:
    """Images, and rows of one image, that a row block holds: at least one image, or rows cut evenly.

    Args:
        num_rows: Rows of an image.
        row_bytes: Bytes of a row of the largest map.
        share: Of the size in force, for a form that holds `1 / share` such maps.
        at_least: Rows that a block has at least.
    """
    size = max(1, int(_bytes.get() * share))
    num_blocks = -(-num_rows * row_bytes // size)
    return max(1, size // max(1, num_rows * row_bytes)), max(at_least, -(-num_rows // num_blocks))


def lagged(items: Iterable[_T]) -> Iterator[_T]:
    """Yield items one step late, so that the consumer may overwrite the input of the item before."""
    before = None
    for item in items:
        if before is not None:
            yield before
        before = item
    if before is not None:
        yield before


Form = Callable[..., torch.Tensor]

# Children whose weights the forms read, by type of layer: linear layers and convolutions that have to be plain.
CHILDREN: dict[type[nn.Module], tuple[tuple[str, ...], tuple[str, ...]]] = {}

# Of branches, attention layers and MLPs: `form(layer, x, norm, out)` is `layer(x)` or, with a norm,
# `x + layer(norm(x))` of a map (B, H, W, C); `out` is where the result may be put, `x` itself with a norm, or None.
BRANCHES: dict[type[nn.Module], Form] = {}

# Of whole parts of a model: `form(layer, x, owned)` is `layer(x)`; if `owned`, nobody else sees x, which the form
# may write over.
PARTS: dict[type[nn.Module], Form] = {}


def reads(layer_type: type[nn.Module], linears: tuple[str, ...] = (), convolutions: tuple[str, ...] = ()) -> None:
    """Note the children of a type of layer whose weights a form reads."""
    CHILDREN[layer_type] = linears, convolutions


def branch(layer_type: type[nn.Module], **children: tuple[str, ...]) -> Callable[[Form], Form]:
    """Decorator: the function is the form of this type of branch; `linears` and `convolutions` as for `reads`."""
    def register(function: Form) -> Form:
        BRANCHES[layer_type] = function
        reads(layer_type, **children)
        return function
    return register


def part(layer_type: type[nn.Module], **children: tuple[str, ...]) -> Callable[[Form], Form]:
    """Decorator: the function is the form of this type of part; `linears` and `convolutions` as for `reads`."""
    def register(function: Form) -> Form:
        PARTS[layer_type] = function
        reads(layer_type, **children)
        return function
    return register


def call(layer: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`layer(x)` of a map (B, H, W, C), in row blocks where the type has a form."""
    return BRANCHES.get(type(layer), without_form)(layer, x, None, None)


def call_part(layer: Callable[..., torch.Tensor], x: torch.Tensor, owned: bool) -> tuple[torch.Tensor, bool]:
    """`layer(x)`, through its form where its type has one, and whether nobody else sees the result.

    Args:
        layer: A part of a model, or a function.
        x: Its input.
        owned: Whether nobody else sees x.
    """
    form = PARTS.get(type(layer))
    y = layer(x) if form is None else form(layer, x, owned)
    return y, owned or y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def add_to(x: torch.Tensor, y: torch.Tensor, norm: nn.Module | None, out: torch.Tensor | None) -> torch.Tensor:
    """The result y of a branch, or its sum with the map x where a norm stands in front of it, in x if that is `out`."""
    if norm is None:
        return y
    return x.add_(y) if out is x and torch.result_type(x, y) == x.dtype else x + y


def without_form(layer: nn.Module, x: torch.Tensor, norm: nn.Module | None, out: torch.Tensor | None) -> torch.Tensor:
    """A branch whose type has no form, called as it is; see BRANCHES."""
    return add_to(x, layer(x if norm is None else norm(x)), norm, out)


def put(
        out: torch.Tensor | None,
        where: Any,
        x: torch.Tensor,
        y: torch.Tensor,
        add: bool,
        shape: Iterable[int] | None = None,
) -> torch.Tensor:
    """Write a block y of a result, or of its sum with the map x, where it belongs.

    Args:
        out: The result, None to make it.
        where: Index of the block.
        x: The whole map (B, H, W, C).
        y: The block.
        add: Whether the map itself is added.
        shape: Of the result, that of x by default.
    """
    if out is None:
        out = y.new_empty(tuple(x.shape if shape is None else shape), dtype=torch.result_type(x, y) if add else y.dtype)
    if add:
        torch.add(x[where], y, out=out[where])
    else:
        out[where] = y
    return out
