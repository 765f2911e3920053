"""A command in a fork of the fork server is the command that people run: what it says, how it ends, what it leaves."""

import signal
import sys
from pathlib import Path

import pytest

from tests.command_line import SMALL, run, tree, write_patients

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere no command runs in a fork")

NOWHERE = ("train_lgg", "--data", "nowhere")  # ends with code 2, soon


def test_a_training_in_a_fork_is_that_in_a_process_of_its_own(tmp_path):
    """To the last bit of its checkpoints, tables and pictures."""
    for place in ("forked", "fresh"):
        (tmp_path / place).mkdir()
        write_patients(tmp_path / place / "data", patients=6)
        arguments = ("--data", "data", *SMALL, "--epochs", "1", "--cores", "1", "--output", "run")
        ended = run("train_lgg", *arguments, cwd=tmp_path / place, fresh=place == "fresh")
        assert (ended.code, ended.err) == (0, "")
        (tmp_path / f"{place}.txt").write_text(ended.out)
    assert (tmp_path / "forked.txt").read_text() == (tmp_path / "fresh.txt").read_text()
    forked, fresh = tree(tmp_path / "forked"), tree(tmp_path / "fresh")
    assert list(forked) == list(fresh)
    assert [name for name in fresh if forked[name] != fresh[name]] == [str(Path("run", "config.json"))]  # it has a path


STATE = """
import os, resource, signal, sys, tempfile
print(sorted(os.listdir("/proc/self/fd")), sorted(os.listdir("/proc/self/task")) == [str(os.getpid())])
print([(number.name, signal.getsignal(number)) for number in signal.Signals])
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), os.getpgid(0), os.umask(0), os.nice(0))
print([resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)])
print(sys.flags, sys.warnoptions, tempfile.tempdir, os.getcwd())
for stream in (sys.stdin, sys.stdout, sys.stderr):
    print(stream.encoding, stream.errors, stream.newlines, stream.line_buffering, stream.isatty())
"""


@pytest.mark.parametrize(
    ("before", "code"),
    [
        (STATE, 2),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("import atexit, os; os.close(0); os.close(2); atexit.register(print, 'at the end')", 2),
    ],
)
def test_a_fork_begins_and_ends_as_a_process_does(tmp_path, before, code):
    env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    fresh = run(*NOWHERE, cwd=tmp_path, before=before, env=env)
    assert fresh.code == code
    assert run(*NOWHERE, cwd=tmp_path, before=before) == fresh


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("import warnings; warnings.warn('planted')", "UserWarning: planted\n"),
        ("file = open('/dev/null'); del file", "ResourceWarning: unclosed file "),
        ("1 / 0", "ZeroDivisionError: division by zero\n"),
    ],
)
def test_what_goes_wrong_in_a_fork_is_said(tmp_path, before, said):
    assert said in run(*NOWHERE, cwd=tmp_path, before=before).err


def test_a_fork_that_hangs_is_ended(tmp_path):
    ended = run(*NOWHERE, cwd=tmp_path, before="import time; time.sleep(600)", timeout=1)
    assert ended.code == -signal.SIGALRM


def test_what_a_fork_changes_is_gone_with_it(tmp_path, monkeypatch):
    change = "import os, sys, warnings; os.environ['X'] = os.getcwd(); sys.modules['json'] = None; sys.path.clear()"
    run(*NOWHERE, cwd=tmp_path, before=change)
    monkeypatch.setenv("Y", "1")
    look = "import json, os, tempfile; print(*map(os.environ.get, 'XY'), os.getcwd(), tempfile.gettempdir())"
    ended = run(*NOWHERE, cwd="/", before=look, env={"TMPDIR": str(tmp_path)})
    assert ended.out.splitlines()[0] == f"None 1 / {tmp_path}"


def test_what_an_import_may_read_of_the_environment_asks_for_a_process_of_its_own(tmp_path):
    look = "import sys; sys.exit(10 + sys.flags.optimize)"
    assert run(*NOWHERE, cwd=tmp_path, before=look, env={"PYTHONOPTIMIZE": "1"}).code == 11
