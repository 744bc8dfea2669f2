"""Run any script with vitlinear's models registered: `python -m vitlinear run SCRIPT ARGS...`.

    python -m vitlinear run validate.py --model vvt_small --checkpoint vvt_small.pth.tar --data-dir imagenet
    torchrun --nproc-per-node 8 -m vitlinear run train.py --config configs/vvt_small_in1k.yaml --data-dir imagenet

timm's scripts are not part of its wheel; they come with a clone of its repository.
"""
import os
import runpy
import sys

_USAGE = 'usage: python -m vitlinear run SCRIPT [ARGS ...]\n\nRun SCRIPT with the models of vitlinear known to timm.'


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help'):
        print(_USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    script = argv[0]
    if not os.path.isfile(script):
        print(
            f"vitlinear run: error: no script {script}. timm's scripts are not part of its package, get them with: "
            f"git clone https://github.com/huggingface/pytorch-image-models",
            file=sys.stderr,
        )
        return 2
    import vitlinear  # noqa: F401  registers the models
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main())
