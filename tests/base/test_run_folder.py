"""The folder of a run: new or resumed, locked, and never overwritten."""

import errno
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minunet.base import run_folder as folders
from minunet.base.durable import write_text
from minunet.base.errors import UserError
from minunet.base.run_folder import next_free_folder, run_folder
from tests.base.processes import POSIX, finish, start, wait_for


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_is_made_with_those_above_it(tmp_path):
    with run_folder(tmp_path / "a" / "b é\n") as folder:
        assert folder == tmp_path / "a" / "b é\n"
        assert folder.is_dir()
    with run_folder(folder):  # a run that has written nothing leaves it free
        pass


def test_a_folder_with_something_in_it_is_refused_unless_it_is_resumed(tmp_path):
    write_text(tmp_path / "last.npz", "x")
    with pytest.raises(UserError, match=r"is not empty \(last\.npz, \.\.\.\), choose another folder or resume"):
        run_folder(tmp_path).__enter__()
    assert names(tmp_path) == ["last.npz"]
    with run_folder(tmp_path, resume=True) as folder:
        assert (folder / "last.npz").read_text() == "x"


def test_what_a_kill_has_left_is_removed_and_nothing_else(tmp_path):
    stale = tmp_path / ".0123456789abcdef.minunet-tmp"
    others = [".0123456789abcdef.tmp", "0123456789abcdef.minunet-tmp", ".0123456789abcdeg.minunet-tmp", "last.npz"]
    for path in [stale, *(tmp_path / name for name in others)]:
        path.touch()
    with run_folder(tmp_path, resume=True):
        assert names(tmp_path) == sorted([*others, ".lock"])


def test_a_temporary_file_alone_does_not_make_a_folder_full(tmp_path):
    (tmp_path / ".0123456789abcdef.minunet-tmp").touch()
    with run_folder(tmp_path):
        assert names(tmp_path) == [".lock"]


def test_only_what_is_there_can_be_resumed(tmp_path):
    with pytest.raises(UserError, match="no such run folder, give the folder of the run to resume"):
        run_folder(tmp_path / "none", resume=True).__enter__()
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["file", "file/below", "dangling/below", "x" * 300])
def test_what_cannot_be_a_folder_is_a_user_error(tmp_path, place):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot be a run folder \(.*\), choose another one"):
        run_folder(tmp_path / place).__enter__()
    assert names(tmp_path) == ["dangling", "file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # as root, whom no mode of a folder stops, a real one would not fail
    with pytest.raises(UserError, match=r"cannot be a run folder \(Permission denied\)"):
        run_folder(tmp_path).__enter__()


HOLDER = """
import sys, time
from minunet.base.run_folder import run_folder
with run_folder(sys.argv[1]):
    print("ready", flush=True)
    time.sleep(60)
"""


@POSIX
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(tmp_path):
    process = start(HOLDER, tmp_path)
    wait_for(process, "ready")
    try:
        for resume in (True, False):
            with pytest.raises(UserError, match=rf"in use by another run \(process {process.pid}\), wait for it"):
                run_folder(tmp_path, resume=resume).__enter__()
    finally:
        process.kill()  # SIGKILL: the lock goes with the process, whatever ends it
    assert finish(process)[0] == -signal.SIGKILL
    with run_folder(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


@POSIX
def test_a_run_that_wrote_while_this_one_took_the_lock_is_noticed(tmp_path, monkeypatch):
    lock = folders._lock

    def lock_late(folder):
        write_text(folder / "last.npz", "x")
        return lock(folder)

    monkeypatch.setattr(folders, "_lock", lock_late)
    with pytest.raises(UserError, match="is not empty"):
        run_folder(tmp_path).__enter__()
    monkeypatch.undo()
    with run_folder(tmp_path, resume=True):  # the refused one has given its lock back
        pass


def test_the_lock_names_its_process_alone(tmp_path):
    (tmp_path / ".lock").write_text("9" * 20)  # of a run that has ended
    with run_folder(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


@POSIX
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_lock_that_is_a_link(tmp_path, link, resume):
    precious, folder = tmp_path / "thesis.txt", tmp_path / "run"
    precious.write_text("three years of work")
    folder.mkdir()
    link(precious, folder / ".lock")
    with pytest.raises(UserError, match=r"\.lock: is a link or no ordinary file, remove it"):
        run_folder(folder, resume=resume).__enter__()
    assert precious.read_text() == "three years of work"


@POSIX
def test_a_lock_that_leads_nowhere_makes_no_file_there(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").symlink_to(tmp_path / "new")
    with pytest.raises(UserError, match="is a link or no ordinary file"):
        run_folder(folder).__enter__()
    assert names(tmp_path) == ["run"]


@POSIX
@pytest.mark.parametrize("make", ["mkfifo", "mkdir"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, make):
    getattr(os, make)(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock: is a link|cannot be a run folder \(Is a directory\)"):
        run_folder(tmp_path).__enter__()


def test_the_lock_is_given_back_when_the_run_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), run_folder(tmp_path):
        raise ZeroDivisionError
    with run_folder(tmp_path):
        pass


def test_where_there_are_no_locks_runs_go_unlocked(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "fcntl", None)
    with run_folder(tmp_path) as first, run_folder(tmp_path) as second:
        assert first == second == tmp_path


@POSIX
def test_a_file_system_without_locks_lets_runs_go_unlocked(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", refuse)
    with run_folder(tmp_path) as first, run_folder(tmp_path) as second:
        assert first == second == tmp_path


def test_the_next_free_folder(tmp_path):
    assert next_free_folder(tmp_path, "quick") == tmp_path / "quick"
    assert next_free_folder(tmp_path, "quick") == tmp_path / "quick-2"
    (tmp_path / "quick-3").symlink_to("nowhere")
    (tmp_path / "quick-5").touch()
    assert next_free_folder(str(tmp_path), "quick") == Path(tmp_path / "quick-4")
    assert (tmp_path / "quick-4").is_dir()
    with pytest.raises(UserError, match=r"quick-5.*cannot be a run folder \(Not a directory\), choose another one"):
        next_free_folder(tmp_path / "quick-5", "quick")


def test_runs_that_start_together_have_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: next_free_folder(tmp_path / "runs", "quick"), range(40)))
    assert {folder.name for folder in found} == {"quick", *(f"quick-{number}" for number in range(2, 41))}
