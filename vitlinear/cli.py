"""The console script `vitlinear`."""
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import List, Optional

COMMANDS = {
    'train': ('vitlinear.train', 'train or fine-tune a classifier'),
    'validate': ('vitlinear.validate', 'measure the accuracy of a model or checkpoint'),
    'run': ('vitlinear.run', "run timm's train.py, benchmark.py, ... with the models of vitlinear"),
}


def usage() -> str:
    lines = [f'  {name:<10} {text}' for name, (_, text) in COMMANDS.items()]
    return '\n'.join([
        'usage: vitlinear COMMAND [ARGS ...]', '', *lines, '',
        '"vitlinear COMMAND --help" lists the arguments of a command, "vitlinear --version" prints the version.',
    ])


def package_version() -> str:
    try:
        return version('vitlinear')
    except PackageNotFoundError:  # a checkout that is not installed
        from vitlinear import __version__
        return __version__


def main(argv: Optional[List[str]] = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help'):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    command, *rest = argv
    if command == '--version':
        print(f'vitlinear {package_version()}')
        return 0
    if command not in COMMANDS:
        print(f'vitlinear: error: unknown command {command}; one of: {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    return import_module(COMMANDS[command][0]).main(rest)


if __name__ == '__main__':
    sys.exit(main())
