"""What the operators of a pass take, one after the other."""
import csv
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

from torch.profiler import ProfilerActivity, profile

from .._script import UsageError
from ...zoo.records import csv_text, write_text
from .rows import FIELDS, Row, title

FIELDS_OF_POINT = (*FIELDS[:FIELDS.index('params_m')], 'cpu', 'torch')
FIELDS_OF_OPERATOR = ('operator', 'calls', 'ms', 'share')
LEAST = .01  # of the time of a pass; operators that take less are told together
OTHERS = 'other operators'
OUTSIDE = 'outside operators'  # Python, and what the profiler itself takes
_TOLD = 8


def _name(key: str, shapes: Sequence[Any]) -> str:
    name = key.partition('::')[2] or key
    is_depthwise = 'convolution' in name and any(len(shape) == 4 and shape[1] == 1 for shape in shapes[1:2])
    return f'{name}, depthwise' if is_depthwise else name


def operators(step: Callable[[], Any]) -> List[Row]:
    """Calls of each operator in a pass, and the milliseconds that it took itself, the longest first.

    Depthwise convolutions, those whose weight has one input channel, are told from others. Operators that take less
    than `LEAST` of the pass are one.
    """
    with profile(activities=[ProfilerActivity.CPU]):  # what the profiler does once only
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        start = time.perf_counter()
        step()
        total = 1e3 * (time.perf_counter() - start)
    calls: Dict[str, int] = defaultdict(int)
    ms: Dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        name = _name(event.key, event.input_shapes)
        calls[name] += event.count
        ms[name] += event.self_cpu_time_total / 1e3
    ms[OUTSIDE] = max(0., total - sum(ms.values()))
    for name in [name for name in ms if ms[name] < LEAST * total and name != OUTSIDE]:
        calls[OTHERS] += calls.pop(name, 0)
        ms[OTHERS] += ms.pop(name)
    return [
        dict(operator=name, calls=calls.get(name), ms=float(f'{ms[name]:.4g}'), share=float(f'{ms[name] / total:.3f}'))
        for name in sorted(ms, key=lambda name: -ms[name])]


def describe(row: Row, found: Sequence[Row]) -> str:
    """A line for a reader."""
    text = ', '.join(f'{o["operator"]} {100 * o["share"]:.0f} %' for o in found[:_TOLD])
    return f'{title(row)}: {text}'


class Profiles:
    """The file of all profiles, which keeps those of other points."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UsageError: It is there and holds something else.
        """
        self.path = path
        self.rows: List[Row] = []
        if path.exists():
            try:
                with path.open(newline='', encoding='utf-8') as f:
                    reader = csv.DictReader(f)
                    self.rows = list(reader)
                    if tuple(reader.fieldnames or ()) != (*FIELDS_OF_POINT, *FIELDS_OF_OPERATOR):
                        raise ValueError('its columns are others')
            except (OSError, ValueError) as e:
                raise UsageError(f'--profile {path} is no file of profiles: {getattr(e, "strerror", None) or e}') from e

    def add(self, row: Row, found: Sequence[Row]) -> None:
        """Put the operators of a point into the file, in the place of those that it has of this point.

        Raises:
            UsageError: It cannot be written.
        """
        point = {field: '' if row[field] is None else str(row[field]) for field in FIELDS_OF_POINT}
        kept = [r for r in self.rows if any(r[field] != value for field, value in point.items())]
        self.rows = kept + [{**point, **operator} for operator in found]
        try:
            write_text(self.path, csv_text((*FIELDS_OF_POINT, *FIELDS_OF_OPERATOR), self.rows))
        except OSError as e:
            raise UsageError(f'--profile {self.path} cannot be written: {e.strerror or e}') from e
