"""What several rows say together: exponents, crossovers with softmax attention, shares of the machine's ceilings."""
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .plot import BASELINE, find_crossover, fit_exponent
from .rows import POINT, Row, title

# what is told of a line over the sizes
_TOLD = ('model', 'kwargs', 'mode', 'runtime', 'optimized', 'memory_format', 'dtype', 'batch', 'threads', 'allocator')
_MACHINE = ('threads', 'cpu', 'torch')
_SHARES = (
    'Share of the ceiling: 2 x MACs / time (a training step counts as 3 forward passes) over the product of large '
    'matrices of the same dtype and threads. The rest of the time went into moving memory, into products that are '
    'small or thin, and into operations that are no MACs.')


def _but(row: Row, *fields: str) -> tuple[Any, ...]:
    """What rows that differ in these fields alone have in common."""
    return tuple(row[field] for field in POINT if field not in fields)


def curves(rows: Iterable[Row], kind: str) -> list[list[Row]]:
    """Rows of one kind in groups that differ in size alone, by size; those of one size are left out."""
    found = defaultdict(list)
    for row in rows:
        if row['kind'] == kind and row['status'] == 'ok':
            found[_but(row, 'size')].append(row)
    return [sorted(curve, key=lambda row: row['size']) for curve in found.values() if len(curve) > 1]


def exponents(rows: Iterable[Row]) -> Iterator[str]:
    """Time and memory of models as powers of the pixels."""
    for curve in curves(rows, 'model'):
        text = ', '.join(
            f'{name} {fit_exponent([(row["size"] ** 2, row[field]) for row in curve]):.3f}'
            for name, field in (('time', 'median_ms'), ('peak memory', 'peak_mib')) if all(row[field] for row in curve))
        yield (f'{title(curve[0], _TOLD)}: exponent against pixels from {curve[0]["size"]} to {curve[-1]["size"]} px: '
               f'{text}')


def crossovers(rows: Iterable[Row]) -> Iterator[str]:
    """From how many tokens on each core stays faster than softmax attention."""
    cores = curves(rows, 'core')
    softmax = {_but(curve[0], 'size', 'model'): curve for curve in cores if curve[0]['model'] == BASELINE}
    for curve in cores:
        base = softmax.get(_but(curve[0], 'size', 'model'), curve)
        ours, theirs = ({row['size']: row['median_ms'] for row in c} for c in (curve, base))
        sizes = sorted(set(ours) & set(theirs))
        if base is curve or not sizes:
            continue
        tokens = find_crossover(ours, theirs)
        text = (f'at none of the largest sizes, {sizes[0]} to {sizes[-1]} tokens' if tokens is None
                else f'from about {float(f"{tokens:.2g}"):.0f} tokens on')
        yield f'{title(curve[0], _TOLD)}: faster than {BASELINE} {text}'


def tera(row: Row) -> float:
    """Operations of a row, in TFLOP/s: 2 x MACs / time, a training step being three times the forward pass."""
    return 2e-3 * row['gmacs'] * (3 if row['mode'] == 'train' else 1) / (1e-3 * row['ms_per_image'])


def shares(rows: Sequence[Row], ceilings: Iterable[Row]) -> Iterator[str]:
    """How much of what the machine can multiply at most each model makes use of."""
    def place(row: Row, *fields: str) -> tuple[Any, ...]:
        return tuple(row[field] for field in (*fields, *_MACHINE))

    gemm, machines = {}, set(map(place, rows))
    for row in ceilings:
        if row['kind'] != 'ceiling' or row['status'] != 'ok' or place(row) not in machines:
            continue
        if row['model'] == 'gemm':
            gemm[place(row, 'dtype')] = tera(row)
            yield (f'ceiling, {title(row, ("dtype", "threads"))}: {tera(row):.3g} TFLOP/s in products of '
                   f'{row["size"]} x {row["size"]} matrices')
        else:
            speed = 2 * row['size'] * 2 ** 20 / (1e-3 * row['median_ms']) / 1e9
            yield (f'ceiling, {title(row, ("threads",))}: {speed:.3g} GB/s in copies of {row["size"]} MiB, reads and '
                   f'writes counted')
    found = [row for row in rows if row['kind'] == 'model' and row['status'] == 'ok' and row['gmacs']
             and place(row, 'dtype') in gemm]
    if found:
        yield _SHARES
    for row in found:
        top = gemm[place(row, 'dtype')]
        name = title(row, (*_TOLD[:7], 'size', *_TOLD[7:]))
        yield f'{name}: {tera(row):.3g} TFLOP/s, {100 * tera(row) / top:.0f} % of {top:.3g}'


def report(rows: Sequence[Row], ceilings: Iterable[Row]) -> list[str]:
    """Lines for a reader about points that belong together.

    Args:
        rows: Points.
        ceilings: Rows among which may be the ceilings of the same machine.
    """
    return [*exponents(rows), *crossovers(rows), *shares(rows, ceilings)]
