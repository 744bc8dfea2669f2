"""The table of measurements: its columns, its rows and its files."""
import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...zoo.records import csv_text, write_text
from .._errors import UsageError

Row = dict[str, Any]

PLACE = ('cpu', 'torch', 'timm', 'vitlinear', 'onnxruntime')
_TYPES = dict(
    **dict.fromkeys(('kind', 'model', 'kwargs', 'mode', 'runtime', 'optimized', 'memory_format', 'dtype'), str),
    **dict.fromkeys(('size', 'kernel', 'batch', 'threads'), int), allocator=str,
    **dict.fromkeys(('params_m', 'gmacs', 'median_ms', 'ms_per_image', 'p25_ms', 'p75_ms'), float),
    rounds=int, images_per_s=float, peak_mib=float, status=str, **dict.fromkeys(PLACE, str))
FIELDS = tuple(_TYPES)
CONDITION = FIELDS[:FIELDS.index('params_m')]  # what is measured
POINT = (*CONDITION, *PLACE)  # and where


def key(row: Row) -> tuple[Any, ...]:
    """What two rows of the same point have in common."""
    return tuple(row[field] for field in POINT)


def load(path: Path, columns: Iterable[str], what: str = 'measurements') -> list[dict[str, str]]:
    """Rows of a CSV file, or a JSON one by its suffix, as they are; '' for what is not known.

    Raises:
        UsageError: It cannot be read, or lacks one of the columns.
    """
    try:
        text = path.read_text(encoding='utf-8')
        if path.suffix == '.json':
            rows = [{k: '' if v is None else str(v) for k, v in row.items()} for row in json.loads(text)]
        else:
            rows = list(csv.DictReader(io.StringIO(text, newline='')))
        missing = [column for row in rows for column in columns if column not in row]
        if missing:
            raise ValueError(f'it has no column {missing[0]}')
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise UsageError(f'{path} is no file of {what}: {getattr(e, "strerror", None) or e}') from e
    return rows


def save(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as e:
        raise UsageError(f'{path} cannot be written: {e.strerror or e}') from e


def read_rows(path: Path) -> list[Row]:
    """Rows of a file that this version wrote, with their types, None for what is not known.

    Raises:
        UsageError: It cannot be read, or its columns are others.
    """
    def value(text: str, kind: type) -> Any:
        return text if kind is str else kind(text) if text else None

    try:
        return [{field: value(row[field], kind) for field, kind in _TYPES.items()} for row in load(path, FIELDS)]
    except ValueError as e:
        raise UsageError(f'{path} is no file of measurements: {e}') from e


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write a CSV file, or a JSON one by its suffix; raises UsageError."""
    if path.suffix == '.json':
        text = json.dumps([{k: None if v == '' else v for k, v in row.items()} for row in rows], indent=1) + '\n'
    else:
        text = csv_text(
            FIELDS, ({k: f'{v:g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows))
    save(path, text)


class Table:
    """Rows, one for each point, and the file that has all of them at any time."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: dict[tuple[Any, ...], Row] = {}
        if path and path.exists():
            self.rows = {key(row): row for row in read_rows(path)}
        if path:
            write_rows(list(self.rows.values()), path)  # rather now than after the first hour

    def get(self, row: Row) -> Row | None:
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


def title(row: Row, fields: Sequence[str] = CONDITION) -> str:
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
