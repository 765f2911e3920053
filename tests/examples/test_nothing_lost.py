"""A run outlives what happens to its files: through the real command line, a process for each training."""

import errno
import os

import pytest

from tests.command_line import SMALL, progress, run, weights, write_patients

pytestmark = pytest.mark.skipif(os.name != "posix", reason="folders and signals as POSIX has them")

ARGUMENTS = ("--data", "kaggle_3m", *SMALL, "--epochs", "2", "--output", "run")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of the data and of a training to which nothing happens."""
    folder = tmp_path_factory.mktemp("unbroken")
    write_patients(folder / "kaggle_3m")
    ended = run("train_lgg", *ARGUMENTS, cwd=folder)
    assert (ended.code, ended.err) == (0, "")
    return folder


@pytest.fixture
def place(unbroken, tmp_path):
    """A folder with the same data and no run."""
    (tmp_path / "kaggle_3m").symlink_to(unbroken / "kaggle_3m")
    return tmp_path


def assert_same_run(folder, unbroken):
    assert progress(folder)["finished"]
    for name in ("last.npz", "best.npz"):
        assert weights(folder, name) == weights(unbroken / "run", name)
    assert (folder / "history.csv").read_bytes() == (unbroken / "run" / "history.csv").read_bytes()


# ------------------------------------------------------------------------------------------ folders without fsync


REFUSE_FOLDERS = """
import os, stat
def fsync(descriptor, fsync=os.fsync):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError({0}, os.strerror({0}))
    fsync(descriptor)
os.fsync = fsync
"""


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_run_on_a_file_system_that_syncs_no_folders(place, unbroken, number):
    ended = run("train_lgg", *ARGUMENTS, cwd=place, before=REFUSE_FOLDERS.format(number))
    assert (ended.code, ended.err) == (0, "")
    assert_same_run(place / "run", unbroken)


def test_a_failing_disk_is_not_passed_over(place):
    ended = run("train_lgg", *ARGUMENTS, cwd=place, before=REFUSE_FOLDERS.format(errno.EIO))
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("error: run: cannot be written (Input/output error), ")
    assert "may be lost in a power cut" in line
