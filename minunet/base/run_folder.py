"""The folder of a run: empty at its start, locked against other runs, found again by a resume."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from minunet.base.durable import TEMPORARY_NAME, held
from minunet.base.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None  # type: ignore[assignment]

_LOCK = ".lock"


@contextlib.contextmanager
def run_folder(path: str | os.PathLike[str], *, resume: bool = False) -> Iterator[Path]:
    """The folder of a run, locked against other runs until the ``with`` block or the process ends.

    A new run needs a folder that is empty or not there yet: a finished run is never overwritten. ``resume`` needs
    one that is there. Nothing is deleted but the temporary files that a kill during a save has left. Enter it when
    the other flags and the data have been checked: up to then, nothing is written. Within the block the folder is
    ``held``: if it is moved, nothing is written into what takes its place.

    The lock is advisory (``flock`` on the file ``.lock``, which stays). Where there is none, on Windows and on some
    network file systems, two runs in one folder are not noticed.

    Raises UserError if the folder is in use, not empty, missing, a file, or cannot be written, or ``.lock`` is a link.
    """
    folder = Path(path)
    if resume and not folder.is_dir():
        raise UserError(f"{folder}: no such run folder, give the folder of the run to resume")
    with contextlib.ExitStack() as scope:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not resume:
                _check_empty(folder)
            scope.enter_context(held(folder))
            scope.callback(os.close, _lock(folder))
            if not resume:
                _check_empty(folder)  # again: another run may have come and gone while this one waited for the lock
            for entry in folder.iterdir():
                if TEMPORARY_NAME.fullmatch(entry.name):
                    entry.unlink()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{folder}: cannot be a run folder ({reason}), choose another one") from error
        yield folder


def _check_empty(folder: Path) -> None:
    names = (entry.name for entry in folder.iterdir())
    found = sorted(name for name in names if name != _LOCK and not TEMPORARY_NAME.fullmatch(name))
    if found:
        raise UserError(f"{folder}: is not empty ({found[0]}, ...), choose another folder or resume the run in it")


def _lock(folder: Path) -> int:
    """An open descriptor of the folder's lock file, locked; closing it, as the end of a process does, unlocks."""
    path = folder / _LOCK
    # Written in place, unlike all other files: so never through a link, which may lead to any file of the user's.
    no_link = UserError(f"{path}: is a link or no ordinary file, remove it or choose another folder")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if path.is_symlink():
            raise no_link from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise no_link
        if not _locked(descriptor):
            owner = os.pread(descriptor, 20, 0).decode(errors="replace")
            raise UserError(f"{folder}: in use by another run (process {owner}), wait for it or choose another folder")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _locked(descriptor: int) -> bool:
    """Lock the file, or say that another process has locked it. Where there are no locks, nobody has."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True


def next_free_folder(parent: str | os.PathLike[str], name: str) -> Path:
    """Makes ``parent/name``, or with -2, -3, ... the first of those that is not there yet: the default for a new run.

    It is made at once, so that of two runs that start together each has its own.

    Raises UserError if it cannot be made.
    """
    number = 1
    while True:
        folder = Path(parent) / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"{folder}: cannot be a run folder ({error.strerror}), choose another one") from error
