import re

import pytest

from vitlinear.tools import cli


def test_version(capsys):
    assert cli.main(['--version']) == 0
    assert re.fullmatch(r'vitlinear \d+\.\d+\.\d+\S*\n', capsys.readouterr().out)


def test_help_names_every_command(capsys):
    assert cli.main(['--help']) == 0
    out = capsys.readouterr().out
    for name, (_, text) in cli.COMMANDS.items():
        assert f'  {name} ' in out and text in out


def test_no_command_and_unknown_command_fail(capsys):
    assert cli.main([]) == 2
    assert cli.main(['trian']) == 2
    assert 'unknown command trian' in capsys.readouterr().err


@pytest.mark.parametrize('command', ['train', 'validate'])
def test_commands_print_help(command, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([command, '--help'])
    assert e.value.code == 0
    assert f'usage: vitlinear {command}' in capsys.readouterr().out


def test_exit_code_of_the_command_is_passed_on(capsys):
    assert cli.main(['train', '--foo']) == 2
    assert cli.main(['run', 'no_such_script.py']) == 2
    assert 'no script no_such_script.py' in capsys.readouterr().err
