"""What the operators of a pass take, one after the other."""
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from ...zoo.records import csv_text
from .rows import CONDITION, Row, load, save, title

FIELDS_OF_POINT = (*CONDITION, 'cpu', 'torch')
FIELDS = (*FIELDS_OF_POINT, 'operator', 'calls', 'ms', 'share')
LEAST = .01  # of the time of a pass; operators that take less are told together
OTHERS = 'other operators'
OUTSIDE = 'outside operators'  # Python, and what the profiler itself takes
_TOLD = 8


def _name(key: str, shapes: Sequence[Any]) -> str:
    name = key.partition('::')[2] or key
    is_depthwise = 'convolution' in name and any(len(shape) == 4 and shape[1] == 1 for shape in shapes[1:2])
    return f'{name}, depthwise' if is_depthwise else name


def operators(step: Callable[[], Any]) -> list[Row]:
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
    calls: dict[str, int] = defaultdict(int)
    ms: dict[str, float] = defaultdict(float)
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


def add(path: Path, row: Row, found: Sequence[Row]) -> None:
    """Put the operators of a point into a file, in the place of those that it has of this point.

    Raises:
        UsageError: The file holds something else, or cannot be written.
    """
    point = {field: '' if row[field] is None else str(row[field]) for field in FIELDS_OF_POINT}
    known = load(path, FIELDS, 'profiles') if path.exists() else []
    kept = [{field: r[field] for field in FIELDS} for r in known if any(r[k] != v for k, v in point.items())]
    save(path, csv_text(FIELDS, [*kept, *({**point, **operator} for operator in found)]))
