"""A file is the old one or the new one, whole: what minunet.base.durable promises."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minunet.base import durable
from minunet.base.durable import TEMPORARY_NAME, json_text, open_regular, read_text, write_durably, write_text
from minunet.base.errors import UserError
from tests.base.processes import POSIX


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_order_is_write_fsync_replace_fsync_of_the_folder(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor):
        state = os.fstat(descriptor)
        folder = stat.S_ISDIR(state.st_mode)
        events.append(("fsync folder", state.st_ino) if folder else ("fsync file", state.st_size))
        fsync(descriptor)

    def recording_replace(source, target):
        events.append(("replace", Path(source).parent, bool(TEMPORARY_NAME.fullmatch(Path(source).name)), Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    path = tmp_path / "a.txt"
    write_text(path, "x" * 100)
    # The file has its full length when it is forced to the disk: nothing waits in a buffer.
    assert events == [
        ("fsync file", 100),
        ("replace", tmp_path, True, path),
        ("fsync folder", tmp_path.stat().st_ino),
    ]
    assert tree(tmp_path) == {"a.txt": b"x" * 100}


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_system_call_that_fails_leaves_the_old_file(tmp_path, monkeypatch, call, existing):
    if existing:
        (tmp_path / "a.txt").write_bytes(b"old")
    before = tree(tmp_path)

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match=r"a\.txt: cannot be written \(No space left on device\), free some space"):
        write_text(tmp_path / "a.txt", "new")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_a_write_that_is_broken_off_leaves_the_old_file_and_passes_the_error_on(tmp_path, error):
    (tmp_path / "a.txt").write_bytes(b"old")

    def write(file):
        file.write(b"half of the ne")
        raise error

    with pytest.raises(error):
        write_durably(tmp_path / "a.txt", write)
    assert tree(tmp_path) == {"a.txt": b"old"}


def refuse_fsync(monkeypatch, of_what, number):
    """fsync fails with the error ``number``, of files or of folders (as stat.S_ISREG and stat.S_ISDIR tell them)."""
    fsync = os.fsync

    def refuse(descriptor):
        if of_what(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EBADF])
def test_a_folder_whose_sync_fails_is_said(tmp_path, monkeypatch, number):
    refuse_fsync(monkeypatch, stat.S_ISDIR, number)
    with pytest.raises(UserError, match=rf"{os.strerror(number)}.*a\.txt may be lost in a power cut"):
        write_text(tmp_path / "a.txt", "new")
    assert tree(tmp_path) == {"a.txt": b"new"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_that_syncs_no_folders_is_written_to(tmp_path, monkeypatch, number):
    refuse_fsync(monkeypatch, stat.S_ISDIR, number)
    write_text(tmp_path / "a.txt", "new")
    assert tree(tmp_path) == {"a.txt": b"new"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_that_cannot_be_synced_is_not_put_in_place(tmp_path, monkeypatch, number):
    refuse_fsync(monkeypatch, stat.S_ISREG, number)
    (tmp_path / "a.txt").write_bytes(b"old")
    with pytest.raises(UserError, match=r"a\.txt: cannot be written .*what was there before is unchanged"):
        write_text(tmp_path / "a.txt", "new")
    assert tree(tmp_path) == {"a.txt": b"old"}


def refuse_links(monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


TAKEN = {
    "a file": lambda path: path.write_text("mine"),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a file": lambda path: path.symlink_to(Path(__file__)),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("kind", TAKEN)
def test_without_overwrite_a_name_that_is_taken_meanwhile_stays_what_it_is(tmp_path, monkeypatch, kind, hard_links):
    if not hard_links:
        refuse_links(monkeypatch)
    path = tmp_path / "a.txt"

    def write(file):
        file.write(b"new")
        TAKEN[kind](path)

    own = Path(__file__).read_bytes()
    with pytest.raises(UserError, match=r"a\.txt: cannot be written \(File exists\), choose another name or folder"):
        write_durably(path, write, overwrite=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    assert path.is_symlink() == ("link" in kind)
    assert kind != "a file" or path.read_text() == "mine"
    assert Path(__file__).read_bytes() == own


@pytest.mark.parametrize("hard_links", [True, False])
def test_without_overwrite_a_free_name_is_taken(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        refuse_links(monkeypatch)
    write_durably(tmp_path / "a.txt", lambda file: file.write(b"new"), overwrite=False)
    assert tree(tmp_path) == {"a.txt": b"new"}
    assert (tmp_path / "a.txt").stat().st_nlink == 1


def test_without_hard_links_a_name_that_was_taken_in_vain_is_given_back(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    refuse_links(monkeypatch)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="Input/output error"):
        write_durably(tmp_path / "a.txt", lambda file: file.write(b"new"), overwrite=False)
    assert tree(tmp_path) == {}


def test_a_limit_on_the_file_size_leaves_the_old_file(tmp_path):
    pytest.importorskip("resource")
    (tmp_path / "a.txt").write_bytes(b"old")
    script = """
import resource, sys
from minunet.base.durable import write_text
from minunet.base.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(sys.argv[1], "x" * 10_000)
except UserError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.txt"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "a.txt: cannot be written (File too large), raise the limit on file sizes (ulimit -f)" in result.stdout
    assert tree(tmp_path) == {"a.txt": b"old"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing/a.txt", "create its folder first"), ("x" * 300, "choose a shorter name"), (".", "choose another")],
)
def test_a_path_that_cannot_be_written_is_a_user_error(tmp_path, name, reason):
    with pytest.raises(UserError, match=reason) as caught:
        write_text(tmp_path / name, "new")
    assert "\n" not in str(caught.value)
    assert ("what was there before is unchanged" in str(caught.value)) == (name != "missing/a.txt")
    assert tree(tmp_path) == {}


def test_the_mode_of_a_new_file_follows_the_umask(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "durable", "")
    assert (tmp_path / "durable").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_regular_file_is_opened_under_its_name(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    for path in (tmp_path / "a", str(tmp_path / "link")):
        with open_regular(path) as file:
            assert (file.read(2), file.readall(), file.name) == (b"ab", b"c", path)


@POSIX
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_nothing_else_is_opened(tmp_path, monkeypatch, kind):
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}
    make[kind](tmp_path / "a")
    monkeypatch.setattr(os, "open", lambda *arguments: pytest.fail("opened"))
    with pytest.raises(ValueError, match="not a regular file"):
        open_regular(tmp_path / "a")
    with pytest.raises(ValueError, match="not a regular file"):
        read_text(tmp_path / "a")


@POSIX
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_nor_what_takes_the_place_of_a_file_between_look_and_opening(tmp_path, monkeypatch, kind):
    """Opening the pipe as usual would wait for ever."""
    path, opener = tmp_path / "a", durable._open_without_waiting
    path.write_text("a file")
    descriptors = []

    def open_late(_, flags):
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
        descriptors.append(opener(path, flags))
        return descriptors[-1]

    monkeypatch.setattr(durable, "_open_without_waiting", open_late)
    with pytest.raises(ValueError, match="not a regular file"):
        open_regular(path)
    with pytest.raises(OSError, match="Bad file descriptor"):  # it is closed again
        os.fstat(descriptors[0])


def test_read_text_has_a_limit(tmp_path):
    (tmp_path / "a").write_text("größe", encoding="utf-8")
    assert read_text(tmp_path / "a", largest=7) == "größe"
    with pytest.raises(ValueError, match="7 bytes long"):
        read_text(tmp_path / "a", largest=6)


def test_json_of_plain_values_reads_back_equal():
    value = {"a": [1, 2.5, True, None, "é\udcff"], "b": {"c": []}, "d": -0.0, "e": 0.1 + 0.2}
    assert json.loads(json_text(value)) == value
    assert np.signbit(json.loads(json_text(value))["d"])


def test_json_of_numpy_numbers_tuples_and_paths():
    value = {"i": np.int64(3), "f": np.float32(0.5), "b": np.bool_(True), "t": (1, 2), "p": Path("a/b")}
    assert json.loads(json_text(value)) == {"i": 3, "f": 0.5, "b": True, "t": [1, 2], "p": "a/b"}


def test_json_without_a_word_for_nan():
    value = [float("nan"), float("inf"), np.float32("-inf"), 1.0]
    assert json.loads(json_text(value)) == [None, None, None, 1.0]
    exact = json.loads(json_text(value, exact=True))
    assert np.isnan(exact[0])
    assert exact[1:] == [float("inf"), float("-inf"), 1.0]


@pytest.mark.parametrize("value", [{1: "a"}, [{2}], {"a": np.zeros(2)}, b"bytes", 1j])
def test_json_of_anything_else_is_refused(value):
    with pytest.raises(ValueError, match="in JSON must be a"):
        json_text(value)
