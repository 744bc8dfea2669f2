import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitlinear.tools import run

REPO = Path(__file__).parents[2]
TIMM_SCRIPTS = os.environ.get('TIMM_SCRIPTS', '')


def in_process(*argv: str) -> subprocess.CompletedProcess:
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'vitlinear.tools.run', *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_script_sees_models_arguments_and_its_own_folder(tmp_path):
    (tmp_path / 'beside.py').write_text('text = "found"\n')
    script = tmp_path / 'script.py'
    script.write_text(
        'import sys, timm, beside\n'
        'assert __name__ == "__main__"\n'
        'print(timm.is_model("vvt_nano"), beside.text, sys.argv)\n')
    done = in_process(str(script), '--flag', 'value')
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f'True found {[str(script), "--flag", "value"]}'


def test_exit_code_of_the_script_is_kept(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('raise SystemExit(7)\n')
    assert in_process(str(script)).returncode == 7


def test_missing_script_says_where_to_get_timms(capsys):
    assert run.main(['train.py']) == 2
    err = capsys.readouterr().err
    assert 'train.py' in err and 'git clone' in err and len(err.splitlines()) == 1


def test_no_script(capsys):
    assert run.main([]) == 2
    assert run.main(['--help']) == 0
    assert 'SCRIPT' in capsys.readouterr().out


@pytest.mark.skipif(not TIMM_SCRIPTS, reason="TIMM_SCRIPTS names no checkout of timm's repository")
def test_timms_benchmark():
    done = in_process(
        os.path.join(TIMM_SCRIPTS, 'benchmark.py'), '--model', 'vvt_nano', '--device', 'cpu', '-b', '1', '--bench',
        'inference', '--img-size', '32', '--num-bench-iter', '10', '--num-warm-iter', '1', '--precision', 'float32')
    assert done.returncode == 0, done.stderr
    assert 'infer_samples_per_sec' in done.stdout
