"""The process of one point. Started by `workers.Worker`, which it talks to through a pipe."""
import ctypes
import gc
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import steps
from .profile import operators

MIN_TURN = .05  # seconds; short passes are repeated within a turn
SETTLE = .01  # seconds; threads that have run out of work spin for a while, which is not to be in another's turn


def _resident(field: str) -> float:
    """Resident memory of this process in MiB, now (VmRSS) or at its peak (VmHWM)."""
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field)) / 1024


def peak() -> float:
    """Peak resident memory of this process in MiB."""
    if os.path.exists('/proc/self/status'):
        return _resident('VmHWM')  # ru_maxrss starts from that of the process that started this one
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == 'darwin' else 10)


def added(step: Callable[[], None]) -> float | None:
    """Peak memory of a pass beyond what the process holds before it, in MiB; None where the system does not say."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')  # the peak so far is forgotten
        before = _resident('VmRSS')
    except (AttributeError, OSError):
        return None
    step()
    return max(0., _resident('VmHWM') - before)


def serve(connection: Connection) -> None:
    """Prepare what the first message asks for, then run a timed pass for each 'pass', until 'facts' ends it.

    The first message is a dict of `row`, the point; `warmup`, the number of untimed passes, 1 at least; `device`;
    `kwargs`, arguments of the model; `also`, 'PATH:MODULE:NAME' of a function that makes the model, None for timm's;
    `folder`, for temporary files; `profile`, whether the last answer has the operators of a further pass.
    """
    connection.send('the libraries are loaded')
    order = connection.recv()
    kind, device = order['row']['kind'], order['device']
    step = steps.make_step(order)
    for _ in range(order['warmup']):
        seconds = steps.seconds_of(step, 1, device)
    repeats = max(1, math.ceil(MIN_TURN / max(seconds, 1e-6))) if seconds < MIN_TURN / 2 else 1
    of_pass = None
    if kind in ('core', 'layer'):
        of_pass = steps.gpu_peak(order) or added(step)
    connection.send(dict(peak_mib=steps.gpu_peak(order) or peak()))
    while connection.recv() == 'pass':
        ms = 1e3 * steps.seconds_of(step, repeats, device)
        time.sleep(SETTLE)
        connection.send(dict(ms=ms))
    facts = dict(steps.count(order), peak_mib=(steps.gpu_peak(order) or peak()) if kind == 'model' else of_pass)
    if order.get('profile'):
        facts['operators'] = operators(step)
    connection.send(facts)


def reason(e: BaseException) -> str:
    """An exception in a line."""
    text = ' '.join(next((line for line in str(e).splitlines() if line.strip()), '').split())
    return f'{type(e).__name__}: {text}'[:200].rstrip(': ')


def main() -> None:
    os.setpgrp()  # to be ended with whatever it starts, and by its parent alone: Ctrl-C goes there
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # Linux's PR_SET_PDEATHSIG: at the latest when the parent ends
    connection: Any = Connection(int(sys.argv[1]))
    with suppress(EOFError, BrokenPipeError):  # whoever wanted to know has gone
        try:
            serve(connection)
        except EOFError:
            raise
        except Exception as e:
            connection.send(dict(error=reason(e)))
            connection.recv()


if __name__ == '__main__':
    main()
