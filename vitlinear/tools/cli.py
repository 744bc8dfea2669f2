"""The console script `vitlinear`."""
import sys
from importlib import import_module

import vitlinear

COMMANDS = {
    'train': ('vitlinear.tools.train', 'train or fine-tune a classifier'),
    'validate': ('vitlinear.tools.validate', 'measure the accuracy of a model or checkpoint'),
    'bench': ('vitlinear.tools.bench.command', 'measure speed and memory of models, and draw plots of them'),
    'quantize': ('vitlinear.tools.quantize', 'write a model as ONNX in 8-bit integers'),
    'convert': ('vitlinear.tools.convert', 'write a checkpoint of any kind as a folder for the Hub'),
    'export': ('vitlinear.tools.export', 'write a training run as a folder for the Hub'),
    'push': ('vitlinear.tools.publish:main_push', 'send such a folder to the Hub'),
    'pull': ('vitlinear.tools.publish:main_pull', 'download such a folder from the Hub and check it'),
    'verify': ('vitlinear.tools.publish:main_verify', 'check the weights of a folder, a repository or a tag'),
    'list': ('vitlinear.tools.info:main_list', 'list the models and the weights there are for them'),
    'info': ('vitlinear.tools.info:main_info', 'say what is known about one model'),
    'card': ('vitlinear.tools.cards', 'write the card of a checkpoint'),
    'run': ('vitlinear.tools.run', "run timm's train.py, benchmark.py, ... with the models of vitlinear"),
}


def usage() -> str:
    lines = [f'  {name:<10} {text}' for name, (_, text) in COMMANDS.items()]
    return '\n'.join([
        'usage: vitlinear COMMAND [ARGS ...]', '', *lines, '',
        '"vitlinear COMMAND --help" lists the arguments of a command, "vitlinear --version" prints the version.',
    ])


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help'):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    command, *rest = argv
    if command == '--version':
        print(f'vitlinear {vitlinear.__version__}')
        return 0
    if command not in COMMANDS:
        print(f'vitlinear: error: unknown command {command}; one of: {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    module, _, function = COMMANDS[command][0].partition(':')
    return getattr(import_module(module), function or 'main')(rest)


if __name__ == '__main__':
    sys.exit(main())
