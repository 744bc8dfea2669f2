"""The table of measurements: its columns, its rows and its files."""
import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .._script import UsageError
from ...zoo.records import csv_text, write_text

Row = Dict[str, Any]

PLACE = ('cpu', 'torch', 'timm', 'vitlinear', 'onnxruntime')
FIELDS = (
    'kind', 'model', 'kwargs', 'mode', 'runtime', 'optimized', 'memory_format', 'dtype', 'size', 'kernel', 'batch',
    'threads', 'allocator', 'params_m', 'gmacs', 'median_ms', 'ms_per_image', 'p25_ms', 'p75_ms', 'rounds',
    'images_per_s', 'peak_mib', 'status', *PLACE)
POINT = (*FIELDS[:FIELDS.index('params_m')], *PLACE)  # what is measured, and where
_INTEGERS = ('size', 'kernel', 'batch', 'threads', 'rounds')
_DECIMALS = ('params_m', 'gmacs', 'median_ms', 'ms_per_image', 'p25_ms', 'p75_ms', 'images_per_s', 'peak_mib')


def key(row: Row) -> Tuple[Any, ...]:
    """What two rows of the same point have in common."""
    return tuple(row[field] for field in POINT)


def read_text(path: Path) -> List[Dict[str, str]]:
    """Rows of a CSV file, or a JSON one by its suffix, as they are; '' for what is not known.

    Raises:
        UsageError: It cannot be read as a table of measurements.
    """
    try:
        text = path.read_text(encoding='utf-8')
        if path.suffix == '.json':
            rows = [{k: '' if v is None else str(v) for k, v in row.items()} for row in json.loads(text)]
        else:
            rows = list(csv.DictReader(io.StringIO(text, newline='')))
        if not all({'model', 'size', 'median_ms'} <= set(row) for row in rows):
            raise ValueError('it has no columns model, size and median_ms')
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise UsageError(f'{path} is no file of measurements: {getattr(e, "strerror", None) or e}') from e
    return rows


def read_rows(path: Path) -> List[Row]:
    """Rows of a file that this version wrote, with their types, None for what is not known.

    Raises:
        UsageError: It cannot be read, or its columns are others.
    """
    def value(field: str, text: str) -> Any:
        if field in _INTEGERS or field in _DECIMALS:
            return (int if field in _INTEGERS else float)(text) if text else None
        return text

    try:
        return [{field: value(field, row[field]) for field in FIELDS} for row in read_text(path)]
    except (KeyError, ValueError) as e:
        raise UsageError(
            f'{path} has not the columns or values of this version ({e}): give another file. The columns are '
            f'{", ".join(FIELDS)}') from e


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write a CSV file, or a JSON one by its suffix, whole or not at all.

    Raises:
        UsageError: It cannot be written.
    """
    if path.suffix == '.json':
        text = json.dumps([{k: None if v == '' else v for k, v in row.items()} for row in rows], indent=1) + '\n'
    else:
        text = csv_text(
            FIELDS, ({k: f'{v:g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows))
    try:
        write_text(path, text)
    except OSError as e:
        raise UsageError(f'{path} cannot be written: {e.strerror or e}') from e


class Table:
    """Rows, one for each point, and the file that has all of them at any time."""

    def __init__(self, path: Optional[Path] = None) -> None:
        self.path = path
        self.rows: Dict[Tuple[Any, ...], Row] = {}
        if path and path.exists():
            self.rows = {key(row): row for row in read_rows(path)}
        if path:
            write_rows(list(self.rows.values()), path)  # rather now than after the first hour

    def get(self, row: Row) -> Optional[Row]:
        """What is known of a point, with these versions and on this machine."""
        return self.rows.get(key(row))

    def add(self, row: Row) -> None:
        self.rows[key(row)] = row
        if self.path:
            write_rows(list(self.rows.values()), self.path)


def measured(row: Row, ms: Sequence[float], **facts: Any) -> Row:
    """The row of a point whose passes took so many milliseconds; numbers in five digits."""
    low, median, high = statistics.quantiles(ms, n=4, method='inclusive') if len(ms) > 1 else [ms[0]] * 3
    facts.update(
        median_ms=median, p25_ms=low, p75_ms=high, ms_per_image=median / row['batch'],
        images_per_s=1e3 * row['batch'] / median)
    short = {k: float(f'{v:.5g}') if isinstance(v, float) else v for k, v in facts.items()}
    return {**dict.fromkeys(FIELDS), **row, **short, 'rounds': len(ms), 'status': 'ok'}


def failed(row: Row, reason: str) -> Row:
    """The row of a point that could not be measured."""
    return {**dict.fromkeys(FIELDS), **row, 'status': reason}


def title(row: Row, fields: Sequence[str] = FIELDS[:FIELDS.index('params_m')]) -> str:
    """What a row is of, without what goes without saying."""
    silent = dict(kind='model', runtime='eager', memory_format='contiguous', allocator='default')
    named = ('optimized', 'size', 'kernel', 'batch', 'threads')
    words = [
        f'{field} {row[field]}' if field in named else str(row[field])
        for field in fields if row[field] not in ('', None, silent.get(field))]
    return ' '.join(words)


def describe(row: Row) -> str:
    """A line for a reader."""
    if row['status'] != 'ok':
        return f'{title(row)}: {row["status"]}'
    text = f'{title(row)}: {row["median_ms"]:g} ms ({row["p25_ms"]:g} to {row["p75_ms"]:g})'
    for field, unit in (
            ('images_per_s', 'images/s'), ('peak_mib', 'MiB'), ('gmacs', 'GMACs'), ('params_m', 'M parameters')):
        if row[field] is not None:
            text += f', {row[field]:g} {unit}'
    return text
