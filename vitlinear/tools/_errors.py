"""What a user can get wrong and what can stop a command: one line on stderr and an exit code."""
import difflib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType, TracebackType

from ..zoo.hub import first_line

_NO_SPACE = 'no space is left: free some, or choose a folder elsewhere'
_NO_FILES = 'too many files are open: raise `ulimit -n`, or take fewer --workers'
_NO_MEMORY = 'out of memory: a smaller --batch-size or --img-size, or fewer --workers, take less'
_WORKER_DIED = 'a process that loads data died, as they do when memory runs out: take fewer --workers'
_BY_NUMBER = {
    errno.ENOSPC: _NO_SPACE, errno.EDQUOT: _NO_SPACE, errno.EMFILE: _NO_FILES, errno.ENFILE: _NO_FILES,
    errno.ENOMEM: _NO_MEMORY,
    errno.EPIPE: 'nobody reads the output any more',
    errno.EROFS: 'it cannot be written: give another folder, or the right to write there',
    errno.EACCES: 'permission is denied: give another folder, or the right to use it',
    errno.EPERM: 'permission is denied: give another folder, or the right to use it',
    errno.ENOENT: 'it does not exist, or not any more',
    errno.ENOTDIR: 'a part of its path is no folder',
    errno.EISDIR: 'it is a folder',
    errno.EIO: 'the device that holds it fails',
    errno.ECONNRESET: _WORKER_DIED,
}
# what libraries say about the same things, without a number
_BY_WORDS = {
    'No space left on device': _NO_SPACE,
    'Too many open files': _NO_FILES, 'ancdata': _NO_FILES,
    "can't allocate memory": _NO_MEMORY, 'not enough memory': _NO_MEMORY, 'out of memory': _NO_MEMORY,
    'Cannot allocate memory': _NO_MEMORY, 'unable to mmap': _NO_MEMORY,
    'DataLoader worker': _WORKER_DIED,
    'Parent directory': 'the output folder does not exist any more',
    'PytorchStreamWriter': f'a checkpoint cannot be written, as when {_NO_SPACE}',
    'unexpected pos': f'a checkpoint cannot be written, as when {_NO_SPACE}',
}


class UsageError(Exception):
    """The user asked for something that cannot be done."""

    exit_code = 2


class RunError(UsageError):
    """A run that started well and cannot go on."""

    exit_code = 1


class Terminated(KeyboardInterrupt):
    """SIGTERM, told and cleaned up after as an interrupt is."""


def outside_problem(e: BaseException) -> str | None:
    """What went wrong outside of the program and what to do about it, None if an exception speaks of nothing such."""
    if isinstance(e, MemoryError):
        return _NO_MEMORY
    if isinstance(e, OSError) and e.errno in _BY_NUMBER:
        return f"{e.filename + ': ' if isinstance(e.filename, str) else ''}{_BY_NUMBER[e.errno]}"
    if isinstance(e, (OSError, RuntimeError)) or type(e).__name__ == 'SafetensorError':
        advice = next((advice for words, advice in _BY_WORDS.items() if words in str(e)), None)
        return advice and f'{advice} ({first_line(e):.200})'
    return None


def ignore_workers() -> None:
    """From here on the death of a worker is no error, which torch's handler would raise wherever the program is."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextmanager
def _signals() -> Iterator[None]:
    """The first SIGINT or SIGTERM raises in this process, those after it do nothing while it cleans up.

    Forked workers that hand something to a process that has ended say nothing of it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    owner, hook = os.getpid(), sys.excepthook

    def told(kind: type[BaseException], e: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() == owner or not issubclass(kind, (ConnectionError, EOFError)):
            hook(kind, e, trace)

    def stop(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        ignore_workers()
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    # what is ignored stays so: shells start background jobs that way
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, stop)
    sys.excepthook = told
    try:
        yield
    finally:
        sys.excepthook = hook
        for number, handler in before.items():
            if signal.getsignal(number) is stop:  # else one came, and the process is about to end
                signal.signal(number, handler)


def run_script(name: str, script: Callable[[], None]) -> int:
    """Call `script` and turn what stops it into one line on stderr and an exit code."""
    for stream in ('stdout', 'stderr'):
        if getattr(sys, stream) is None:  # closed by the shell
            setattr(sys, stream, open(os.devnull, 'w'))
    speaks = os.environ.get('LOCAL_RANK', '0') == '0'  # all processes meet the same mistake: one line a machine
    with _signals():
        try:
            script()
            sys.stdout.flush()
        except UsageError as e:
            if speaks or isinstance(e, RunError):
                rank = f' (rank {os.environ["RANK"]})' if isinstance(e, RunError) and 'RANK' in os.environ else ''
                _tell(f'vitlinear {name}: error{rank}: {e}')
            return e.exit_code
        except KeyboardInterrupt as e:
            if speaks:
                _tell(f'\nvitlinear {name}: interrupted. {e}'.rstrip())
            return 128 + (signal.SIGTERM if isinstance(e, Terminated) else signal.SIGINT)
        except Exception as e:
            problem = outside_problem(e)
            if problem is None:
                raise
            _tell(f'vitlinear {name}: error: {problem}')
            return RunError.exit_code
    return 0


def _tell(line: str) -> None:
    """A line on stderr; what stdout cannot take is dropped, so that Python does not complain of it in its turn."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(printable(line), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text with the control characters, which files may hold and terminals obey, written out; lines stay."""
    return ''.join(c if c.isprintable() or c == '\n' else c.encode('unicode_escape').decode() for c in text)


def command(name: str) -> Callable[[Callable], Callable[..., int]]:
    """Decorator that makes a command's `main` of a function of the words of the command line, see `run_script`."""
    return lambda run: lambda argv=None: run_script(name, partial(run, argv))


@contextmanager
def usage_errors(doing: str):
    """Report whatever the libraries below object to as a `UsageError` that says what was being done."""
    try:
        yield
    except UsageError:
        raise
    except Exception as e:
        raise UsageError(f'{doing}: {first_line(e)}') from e


def suggest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f', did you mean {" or ".join(near)}?' if near else ''
