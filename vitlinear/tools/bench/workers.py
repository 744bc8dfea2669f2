"""One process for each point, and the turns that they take.

A process of its own makes peak memory that of one model, and leaves nothing behind for the next. Processes whose times
are to be compared are ready at the same time and run one pass each in turns, A B A B, so that whatever disturbs the
machine disturbs all alike. One that has no turn sleeps.
"""
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from .rows import Row, failed, measured

# glibc then keeps freed memory, where it would give large blocks back to the kernel and get them anew, page by page
KEEP_MEMORY = {
    'MALLOC_MMAP_THRESHOLD_': '4294967296', 'MALLOC_TRIM_THRESHOLD_': '8589934592', 'MALLOC_TOP_PAD_': '268435456'}
KILLED = 'killed by SIGKILL'
_ROOM = 1.2  # times the largest peak among its peers must be free before a process is started beside them


def environment(threads: int, keep_memory: bool) -> dict[str, str]:
    """Of a child process: the number of threads, and glibc's allocator as it is by default or keeping memory."""
    env = {k: v for k, v in os.environ.items() if k not in KEEP_MEMORY}
    return {**env, **(KEEP_MEMORY if keep_memory else {}), 'OMP_NUM_THREADS': str(threads)}


def free_mib() -> float | None:
    """Memory that can be had without swapping, None where the system does not say."""
    with suppress(OSError, StopIteration), open('/proc/meminfo') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('MemAvailable:')) / 1024
    return None


class Worker:
    """A point in a process of its own.

    Attributes:
        reason: Why it failed, None as long as it has not.
        ms: Its passes so far, in milliseconds.
        peak_mib: Its peak memory when it was ready.
    """

    def __init__(self, order: dict[str, Any], timeout: float, log: Path) -> None:
        """Of an order for `child.serve`, that may work for so many seconds, neither loading libraries nor waiting being
        work; its libraries talk to the file `log`."""
        self.order, self.row, self.timeout, self.left, self.log = order, order['row'], timeout, timeout, log
        self.reason: str | None = None
        self.ms: list[float] = []
        self.peak_mib = 0.
        self.is_up = False  # loading libraries is no work
        self.connection, theirs = Pipe()
        with log.open('wb') as f:
            self.process = subprocess.Popen(
                [sys.executable, '-m', 'vitlinear.tools.bench.child', str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                env=environment(self.row['threads'], self.row['allocator'] == 'kept'),
            )
        theirs.close()

    def _ask(self, message: Any) -> Any:
        """The answer of the process to a message; None, and a reason, if there is none."""
        try:
            if not self.is_up:
                self.is_up = bool(self.connection.recv())
            start = time.monotonic()
            self.connection.send(message)
            if not self.connection.poll(max(0., self.left)):
                self.reason = f'timeout after {self.timeout:g} s'
                return None
            answer = self.connection.recv()
            self.left -= time.monotonic() - start
        except (EOFError, OSError):
            self.reason = self._cause_of_death()
            return None
        finally:
            if self.reason is not None:
                self.close()  # at once: one that is still busy would disturb the others
        self.reason = answer.get('error')
        return answer

    def _cause_of_death(self) -> str:
        code = self.process.wait()
        if code < 0:
            return f'killed by {signal.Signals(-code).name}'
        said = self.log.read_text(errors='replace').split('\n')
        return next((line.strip()[:200] for line in reversed(said) if line.strip()), f'exit code {code}')

    def prepare(self) -> None:
        """Build what is to be measured and run the untimed passes."""
        answer = self._ask(self.order)
        if self.reason is None:
            self.peak_mib = answer['peak_mib'] or 0.

    def turn(self) -> None:
        """Run a timed pass."""
        answer = self._ask('pass')
        if self.reason is None:
            self.ms.append(answer['ms'])

    def result(self) -> Row:
        facts = self._ask('facts') if self.reason is None else None
        return failed(self.row, self.reason) if self.reason else measured(self.row, self.ms, **facts)

    def close(self) -> None:
        """End the process, whatever it does."""
        if self.connection.closed:
            return
        self.connection.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with whatever it has started
        self.process.kill()
        self.process.wait()


def take_turns(
        workers: Sequence[Worker],
        rounds: int,
        max_seconds: float,
        tick: Callable[[], None] = lambda: None,
) -> None:
    """Passes of all workers in turns, `rounds` of each; none after the one with which it has used `max_seconds`."""
    for _ in range(rounds):
        for worker in workers:
            if worker.reason is None and sum(worker.ms) < 1e3 * max_seconds:
                worker.turn()
            tick()


def measure(
        orders: Iterable[dict[str, Any]],
        start: Callable[[dict[str, Any]], Worker],
        rounds: int,
        max_seconds: float,
        one_at_a_time: bool,
        emit: Callable[[Row], None],
        tick: Callable[[], None],
) -> None:
    """Measure peers side by side, or in groups that fit into memory together.

    Args:
        orders: What to measure.
        start: Makes the worker of an order.
        rounds: Timed passes of each.
        max_seconds: No pass after this many seconds of them.
        one_at_a_time: Do not interleave.
        emit: Takes each row.
        tick: Called once for each that is ready, and for each turn.
    """
    waiting: deque[dict[str, Any]] = deque(orders)
    alone: list[dict[str, Any]] = []
    while waiting:
        workers: list[Worker] = []
        try:
            while waiting and (not workers or (not one_at_a_time and _have_room(workers))):
                workers.append(start(waiting.popleft()))
                workers[-1].prepare()
                tick()
            take_turns(workers, rounds, max_seconds, tick)
            for worker in workers:
                row = worker.result()
                if row['status'] == KILLED and len(workers) > 1:  # for want of memory, as it seems
                    alone.append(worker.order)
                else:
                    emit(row)
        finally:
            for worker in workers:
                worker.close()
    if alone:
        measure(alone, start, rounds, max_seconds, True, emit, lambda: None)


def _have_room(workers: Sequence[Worker]) -> bool:
    free = free_mib()
    return free is None or free > _ROOM * max(worker.peak_mib for worker in workers)
