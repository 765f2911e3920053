"""What Windows, macOS and some file systems lack, taken away on Linux: the main job still ends with the right figures.

The workflow runs the tests on those systems too. Here each lack is there by itself, and all of them together.
"""

import json
import sys

import pytest

from tests.command_line import NO_PICTURES, SMALL, run, weights, write_patients

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes away what Linux has")

LACKS = {
    "memfd": """
import os
del os.memfd_create""",
    "passing descriptors": """
import subprocess
class Popen(subprocess.Popen):
    def __init__(self, *arguments, pass_fds=(), **options):
        if pass_fds:
            raise ValueError("pass_fds not supported on Windows.")
        super().__init__(*arguments, **options)
subprocess.Popen = Popen""",
    "flock": """
import sys
sys.modules["fcntl"] = None""",
    "fsync of folders": """
import errno, os, stat
def fsync(descriptor, fsync=os.fsync):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    fsync(descriptor)
os.fsync = fsync""",
    "signals": """
import signal
del signal.SIGHUP, signal.SIGUSR1""",
    "proc": """
import sys
def no_proc(event, arguments):
    if event == "open" and str(arguments[0]).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])
sys.addaudithook(no_proc)""",
    "affinity": """
import os
del os.sched_getaffinity""",
    "resource": """
import sys
sys.modules["resource"] = None""",
}


def train(folder, before, processes):
    """A short training, on any machine by that many processes; what it says, and its folder."""
    write_patients(folder / "data")
    before += f"\nimport minunet.engines.cpu.team as team; team._physical_cores = team._quota = lambda: {processes}"
    arguments = ("--data", "data", *SMALL, "--epochs", "1", "--output", "run")
    ended = run("train_lgg", *arguments, cwd=folder, before=before, fresh=True)
    assert (ended.code, ended.err) == (0, "")
    return ended.out, folder / "run"


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The folder of a training that lacks nothing, by the number of its processes."""
    return {count: train(tmp_path_factory.mktemp("usual"), NO_PICTURES, count)[1] for count in (1, 2)}


@pytest.mark.parametrize("lack", [*LACKS, "all"])
def test_a_training_ends_with_the_same_bits(tmp_path, usual, lack):
    alone = lack in ("passing descriptors", "all")
    before = "\n".join(LACKS.values()) if lack == "all" else LACKS[lack] + NO_PICTURES
    out, folder = train(tmp_path, before, 2)
    assert ("engine: cpu, 1 process (a team of 2 processes cannot start: " in out) == alone
    assert ("engine: cpu, 2 processes\n" in out) == (not alone)
    expected = usual[1 if alone else 2]
    assert weights(folder) == weights(expected)
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}
    for name in ("history.csv", "metrics.json"):
        assert (folder / name).read_text() == (expected / name).read_text()


@pytest.mark.slow
def test_the_main_job_without_all_of_them(tmp_path):
    """As the README has it: no flag. The figure is that of its table."""
    one_thread = {"OMP_NUM_THREADS": "1"}  # two of BLAS wait for each other most of the time, if the machine is busy
    ended = run("train_lgg", cwd=tmp_path, before="\n".join(LACKS.values()), env=one_thread, timeout=3600)
    assert ended.code == 0, ended.err
    metrics = json.loads((tmp_path / "runs" / "quick" / "metrics.json").read_text())
    assert metrics["test"]["per_patient"]["summary"]["dice"]["mean"] == pytest.approx(0.922, abs=0.02)
