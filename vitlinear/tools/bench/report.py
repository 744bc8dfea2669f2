"""What several rows say together: exponents, crossovers with softmax attention, shares of the machine's ceilings."""
from collections import defaultdict
from typing import Iterable, List, Sequence

from .plot import BASELINE, find_crossover, fit_exponent
from .rows import POINT, Row, title

# what the points of a line over the sizes share, and what of it is told
_CURVE = tuple(field for field in POINT if field != 'size')
_TOLD = ('model', 'kwargs', 'mode', 'runtime', 'optimized', 'memory_format', 'dtype', 'batch', 'threads', 'allocator')
_MACHINE = ('dtype', 'threads', 'cpu', 'torch')


def curves(rows: Iterable[Row], kind: str) -> List[List[Row]]:
    """Rows of one kind in groups that differ in size alone, by size; those of one size are left out."""
    found = defaultdict(list)
    for row in rows:
        if row['kind'] == kind and row['status'] == 'ok':
            found[tuple(row[field] for field in _CURVE)].append(row)
    return [sorted(curve, key=lambda row: row['size']) for curve in found.values() if len(curve) > 1]


def exponents(rows: Iterable[Row]) -> List[str]:
    """Time and memory of models as powers of the pixels."""
    lines = []
    for curve in curves(rows, 'model'):
        text = ', '.join(
            f'{name} {fit_exponent([(row["size"] ** 2, row[field]) for row in curve]):.3f}'
            for name, field in (('time', 'median_ms'), ('peak memory', 'peak_mib')) if all(row[field] for row in curve))
        lines.append(f'{title(curve[0], _TOLD)}: exponent against pixels from {curve[0]["size"]} to '
                     f'{curve[-1]["size"]} px: {text}')
    return lines


def crossovers(rows: Iterable[Row]) -> List[str]:
    """From how many tokens on each core stays faster than softmax attention."""
    cores = curves(rows, 'core')
    condition = [field for field in _CURVE if field != 'model']
    softmax = {tuple(c[0][f] for f in condition): c for c in cores if c[0]['model'] == BASELINE}
    lines = []
    for curve in cores:
        base = softmax.get(tuple(curve[0][f] for f in condition))
        if base is None or base is curve:
            continue
        ours, theirs = ({row['size']: row['median_ms'] for row in c} for c in (curve, base))
        sizes = sorted(set(ours) & set(theirs))
        tokens = find_crossover(ours, theirs)
        if sizes:
            text = f'faster than {BASELINE} at none of the largest sizes, {sizes[0]} to {sizes[-1]} tokens'
            if tokens is not None:
                text = f'faster than {BASELINE} from about {float(f"{tokens:.2g}"):.0f} tokens on'
            lines.append(f'{title(curve[0], _TOLD)}: {text}')
    return lines


def tera(row: Row) -> float:
    """Operations of a row, in TFLOP/s: 2 x MACs / time, a training step being three times the forward pass."""
    return 2e-3 * row['gmacs'] * (3 if row['mode'] == 'train' else 1) / (1e-3 * row['ms_per_image'])


def shares(rows: Sequence[Row], ceilings: Iterable[Row]) -> List[str]:
    """How much of what the machine can multiply at most each model makes use of."""
    lines, gemm = [], {}
    machines = {tuple(row[f] for f in _MACHINE[1:]) for row in rows}
    for row in ceilings:
        if row['kind'] == 'ceiling' and row['status'] == 'ok' and tuple(row[f] for f in _MACHINE[1:]) in machines:
            if row['model'] == 'gemm':
                gemm[tuple(row[f] for f in _MACHINE)] = tera(row)
                lines.append(f'ceiling, {title(row, ("dtype", "threads"))}: {tera(row):.3g} TFLOP/s in products of '
                             f'{row["size"]} x {row["size"]} matrices')
            else:  # read and written
                speed = 2 * row['size'] * 2 ** 20 / (1e-3 * row['median_ms']) / 1e9
                lines.append(f'ceiling, {title(row, ("threads",))}: {speed:.3g} GB/s in copies of {row["size"]} MiB, '
                             f'reads and writes counted')
    found = [row for row in rows if row['kind'] == 'model' and row['status'] == 'ok' and row['gmacs']
             and tuple(row[f] for f in _MACHINE) in gemm]
    lines += found and [
        'Share of the ceiling: 2 x MACs / time (a training step counts as 3 forward passes) over the product of large '
        'matrices of the same dtype and threads. The rest of the time went into moving memory, into products that are '
        'small or thin, and into operations that are no MACs.']
    for row in found:
        top = gemm[tuple(row[f] for f in _MACHINE)]
        name = title(row, (*_TOLD[:7], 'size', *_TOLD[7:]))
        lines.append(f'{name}: {tera(row):.3g} TFLOP/s, {100 * tera(row) / top:.0f} % of {top:.3g}')
    return lines


def report(rows: Sequence[Row], ceilings: Iterable[Row]) -> List[str]:
    """Lines for a reader about points that belong together.

    Args:
        rows: Points.
        ceilings: Rows among which may be the ceilings of the same machine.
    """
    return [*exponents(rows), *crossovers(rows), *shares(rows, ceilings)]
