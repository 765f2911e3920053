"""``minunet COMMAND`` and ``python -m minunet COMMAND``: every command of the package, from any folder."""

import subprocess
import sys

import pytest

import minunet
from minunet import __main__ as commands
from minunet.base import cli

# What a command that only explains itself must not load. Plotting takes half a second, SciPy a third.
SLOW = ("matplotlib", "scipy", "PIL", "tqdm")
LOADED = """
import sys
from minunet.__main__ import run
sys.argv = ["minunet", *sys.argv[1:]]
code = run()
print(*(name for name in {slow} if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


def python(*arguments, cwd):
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_is_answered_at_once(name, tmp_path):
    done = python("-c", LOADED.format(slow=SLOW), name, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "\n")
    assert done.stdout.startswith(f"usage: minunet {name} [-h]")
    assert "python -m" not in done.stdout  # the command is named as it was called
    assert list(tmp_path.iterdir()) == []


def test_the_list_of_commands(tmp_path):
    lists = [python("-m", "minunet", *arguments, cwd=tmp_path) for arguments in ((), ("--help",), ("-h",))]
    assert {(done.returncode, done.stderr) for done in lists} == {(0, "")}
    (text,) = {done.stdout for done in lists}
    assert text.startswith("usage: python -m minunet COMMAND ...\n")
    assert [line.split()[0] for line in text.splitlines()[2:-2]] == list(commands.COMMANDS)


def test_the_installed_command_is_the_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minunet", "summary", "--widths", "2,3", "--size", "8"])
    assert commands.run() == 0
    assert "batch of 1, images of 8 x 8 x 3" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minunet", "--version"])
    assert commands.run() == 0
    assert capsys.readouterr().out == f"minunet {minunet.__version__}\n"


@pytest.mark.parametrize("name", ["trian", "--fold", ""])
def test_an_unknown_command_is_one_line(name, capsys):
    assert cli.run(commands.main, [name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: COMMAND: there is no {name!r}, choose one of train, predict, ")


def test_a_run_says_how_to_go_on_as_it_was_called(tmp_path):
    stopping = "from minunet.base.signals import StopRequest as S; S.requested = property(lambda self: True)"
    options = "'--epochs=1', '--image-size=16', '--quiet', '--device=cpu', '--engine=plain', '--output=run a'"
    code = (
        f"{stopping}; import sys; sys.argv = ['minunet', 'train', {options}]; from minunet.__main__ import run; run()"
    )
    done = python("-c", code, cwd=tmp_path)
    assert "stopped in epoch 1; go on with: minunet train '--resume=run a'\n" in done.stdout, done.stderr
