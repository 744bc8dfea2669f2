"""Reading the msgpack files of Flax, without Flax: plain data is decoded, and nothing in the file is run."""
import math
import os
from typing import Any

import torch

__all__ = ['is_flax', 'read_flax']

# The codes of Flax's msgpack extensions, each with the payload (shape, name of the dtype, bytes).
_NDARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = '__msgpack_chunked_array__'
_DTYPES = {
    'float16': torch.float16, 'bfloat16': torch.bfloat16, 'float32': torch.float32, 'float64': torch.float64,
    'int8': torch.int8, 'int16': torch.int16, 'int32': torch.int32, 'int64': torch.int64, 'uint8': torch.uint8,
    'bool': torch.bool,
}
_MAX_DEPTH = 32
_MAX_DIMS = 16


class _Array:
    """An array as it stands in the file; most of those in a training state, the optimizer's, are never decoded."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def tensor(self, where: str) -> torch.Tensor:
        import msgpack
        try:
            shape, name, data = msgpack.unpackb(self.payload, raw=False, ext_hook=_no_extension)
        except Exception as e:
            raise ValueError(f'{where} is no array of Flax') from e
        if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(
                type(n) is int and 0 <= n < 2 ** 40 for n in shape):
            raise ValueError(f'{where} has the shape {shape!r}')
        if not isinstance(name, str) or name not in _DTYPES:
            raise ValueError(f"{where} is of type {name!r}; known are {', '.join(_DTYPES)}")
        dtype = _DTYPES[name]
        size = math.prod(shape) * dtype.itemsize
        if not isinstance(data, bytes) or len(data) != size:
            length = f'{len(data)} bytes' if isinstance(data, bytes) else f'a {type(data).__name__}'
            raise ValueError(f'{where} holds {length}; {name} of shape {tuple(shape)} takes {size}')
        if not size:
            return torch.empty(shape, dtype=dtype)
        # a copy: tensors want memory that may be written to
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


class _Unsupported:
    def __init__(self, code: int) -> None:
        self.code = code


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f'extension {code} inside an array')


def _extension(code: int, data: bytes) -> _Array | _Unsupported:
    return _Array(data) if code in (_NDARRAY, _SCALAR) else _Unsupported(code)


def _items(value: Any) -> list[Any]:
    """The items of a sequence, which Flax writes as a map of '0', '1', ..."""
    if isinstance(value, dict):
        if set(value) != {str(i) for i in range(len(value))}:
            raise ValueError('gaps in the numbering')
        return [value[str(i)] for i in range(len(value))]
    if not isinstance(value, list):
        raise ValueError(f'a {type(value).__name__}')
    return value


def _joined(value: dict[str, Any], where: str) -> torch.Tensor:
    """An array of more than 1 GiB, which Flax writes in pieces."""
    try:
        shape, chunks = _items(value.get('shape')), _items(value.get('chunks'))
        parts = [chunk.tensor(f'{where}, piece {i}').reshape(-1) for i, chunk in enumerate(chunks)]
        if not all(type(n) is int and 0 <= n < 2 ** 40 for n in shape):
            raise ValueError(f'shape {shape!r}')
        joined = torch.cat(parts)
    except (AttributeError, TypeError, RuntimeError, ValueError) as e:
        raise ValueError(f'{where} is a damaged array in pieces ({e})') from e
    if joined.numel() != math.prod(shape):
        raise ValueError(
            f'{where} holds {joined.numel()} numbers in pieces; its shape {tuple(shape)} takes {math.prod(shape)}')
    return joined.reshape(shape)


def _flatten(tree: dict[str, Any], prefix: str, out: dict[str, torch.Tensor], depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f'{prefix} is nested more than {_MAX_DEPTH} deep')
    for key, value in tree.items():
        if not isinstance(key, str) or not key or '/' in key:
            raise ValueError(f'{key!r} in {prefix or "the file"} is no name of a parameter')
        where = f'{prefix}{key}'
        if isinstance(value, _Array):
            out[where] = value.tensor(where)
        elif isinstance(value, dict) and _CHUNKED in value:
            out[where] = _joined(value, where)
        elif isinstance(value, dict):
            _flatten(value, f'{where}/', out, depth + 1)
        elif isinstance(value, _Unsupported):
            kind = 'a complex number' if value.code == _COMPLEX else f'the unknown msgpack extension {value.code}'
            raise ValueError(f'{where} is {kind}')
        else:
            raise ValueError(f'{where} is {value!r:.40}, which is no array')


def is_flax(path: str | os.PathLike) -> bool:
    """Whether a file begins as a msgpack map with a name for its first key, which no other checkpoint does."""
    with open(path, 'rb') as f:
        head = f.read(64)
    if not head:
        return False
    first = head[0]
    at = {0xde: 3, 0xdf: 5}.get(first, 1)  # map16, map32; else a map of up to 15 entries
    if not (0x81 <= first <= 0x8f or first in (0xde, 0xdf)) or len(head) <= at + 1:
        return False
    mark = head[at]
    if 0xa1 <= mark <= 0xbf:
        length, start = mark - 0xa0, at + 1
    elif mark == 0xd9:
        length, start = head[at + 1], at + 2
    else:
        return False
    key = head[start:start + length]
    return bool(key) and all(0x20 <= c < 0x7f for c in key)


def read_flax(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read the parameters in a file of `flax.serialization` or `flax.training.checkpoints`.

    Args:
        path: A training state, of which `params` is taken, or a tree of parameters.

    Returns:
        The parameters, their path in the tree joined by '/': {'QnAStage_0/QnA_Block_1/LayerNorm_0/scale': ...}.
        Running statistics, where the state holds any, follow as 'batch_stats/...'.

    Raises:
        ValueError: The file is damaged, or holds what is no array of numbers.
    """
    import msgpack
    with open(path, 'rb') as f:
        data = f.read()
    try:
        # strings of the whole file's length at most, so that a length that lies cannot make us allocate
        state = msgpack.unpackb(data, raw=False, strict_map_key=False, ext_hook=_extension)
    except Exception as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"'{path}' is no readable msgpack file: truncated or damaged ({reason}).") from e
    del data
    tree = state
    while isinstance(tree, dict) and isinstance(tree.get('params'), dict):
        tree = tree['params']
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"'{path}' holds no parameters.")
    out: dict[str, torch.Tensor] = {}
    try:
        _flatten(tree, '', out)
        if state is not tree and state.get('batch_stats'):
            _flatten(state['batch_stats'], 'batch_stats/', out)
    except ValueError as e:
        raise ValueError(f"'{path}' cannot be read: {e}.") from e
    except AttributeError as e:
        raise ValueError(f"'{path}' cannot be read: batch_stats is no map.") from e
    return out
