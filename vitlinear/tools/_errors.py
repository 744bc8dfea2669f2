"""What a user can get wrong and what can stop a command: one line on stderr and an exit code."""
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial


class UsageError(Exception):
    """The user asked for something that cannot be done."""

    exit_code = 2


class RunError(UsageError):
    """A run that started well and cannot go on."""

    exit_code = 1


def run_script(name: str, script: Callable[[], None]) -> int:
    """Call `script` and turn what stops it into one line on stderr and an exit code."""
    speaks = os.environ.get('LOCAL_RANK', '0') == '0'  # all processes meet the same mistake: one line a machine
    try:
        script()
    except UsageError as e:
        if speaks or isinstance(e, RunError):
            rank = f' (rank {os.environ["RANK"]})' if isinstance(e, RunError) and 'RANK' in os.environ else ''
            print(f'vitlinear {name}: error{rank}: {e}', file=sys.stderr, flush=True)
        return e.exit_code
    except KeyboardInterrupt as e:
        if speaks:
            print(f'\nvitlinear {name}: interrupted. {e}'.rstrip(), file=sys.stderr, flush=True)
        return 130
    return 0


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
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UsageError(f'{doing}: {reason}') from e


def suggest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f', did you mean {" or ".join(near)}?' if near else ''
