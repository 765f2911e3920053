"""Files that are either the old one or the new one, whole, whatever happens while they are written.

A file that is overwritten in place is neither for a moment, and a kill or a full disk at that moment
loses both. So the new content goes into a temporary file in the same folder, is forced to the disk, and
takes the old one's name in one step, which a POSIX file system does entirely or not at all::

    write  ->  fsync(file)  ->  replace(temporary, path)  ->  fsync(folder)

Without the first fsync a power cut can leave the new name on an empty file; without the second, the old
name may come back. Checkpoints and every file of a run folder are written this way. Some file systems, of network
shares and of folders that a virtual machine shares with its host, cannot force a folder to the disk: on those,
a power cut just after a write may bring the old file back, and it is still whole.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minunet.base.errors import UserError

#: What a kill during a write leaves behind; ``minunet.base.run_folder.run_folder`` removes it.
TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{16}\.minunet-tmp")

_ADVICE = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder you may write to",
    errno.EEXIST: "choose another name or folder",
    errno.ENOENT: "create its folder first",
    errno.EISDIR: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
}

#: What fsync answers for a folder where the file system has no such thing. All else, such as EIO, is a failure.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)

#: The folders that are :func:`held`, and which ones they are (device and number).
_HELD: dict[Path, os.stat_result] = {}


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within the ``with`` block :func:`write_durably` writes into ``folder`` only while it is the same folder.

    If it is moved away, another folder or a link to one may take its name, and what lies there is somebody else's.

    Raises OSError if it cannot be opened.
    """
    if folder in _HELD:
        yield
        return
    with contextlib.ExitStack() as scope:
        if os.name == "nt":  # Windows cannot open a folder, and moves none in which a file is open
            _HELD[folder] = folder.stat()
        else:  # open, so that its number is not given to another folder when it is deleted
            descriptor = os.open(folder, os.O_RDONLY)
            scope.callback(os.close, descriptor)
            _HELD[folder] = os.fstat(descriptor)
        scope.callback(_HELD.pop, folder)
        yield


def is_same(folder: Path) -> bool:
    """Whether the ``folder`` that is :func:`held` is still there, and no other in its place."""
    try:
        return os.path.samestat(folder.stat(), _HELD[folder])
    except OSError:
        return False


def write_durably(path: str | os.PathLike[str], write: Callable[[BinaryIO], None], *, overwrite: bool = True) -> None:
    """Let ``write(file)`` write a binary file, and put it at ``path`` only when all of it is on the disk.

    Without ``overwrite`` it is put there only if nothing has that name, not even a link that leads nowhere.

    If anything goes wrong before that, Ctrl-C included, what was at ``path`` stays as it was and the
    temporary file is removed.

    Raises UserError if the system refuses (disk full, no permission, name taken, ...), or the folder is :func:`held`
    and is not the same any more; what ``write`` raises passes through.
    """
    path = Path(path)
    if path.parent in _HELD and not is_same(path.parent):
        raise UserError(
            f"{path.parent}: was deleted or moved while the run was at work, {path.name} was not written; "
            "resume the run where it lies now, or start a new one"
        )
    temporary = path.parent / f".{secrets.token_hex(8)}.minunet-tmp"
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            _rename_to_free_name(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            unchanged = "; what was there before is unchanged" if path.parent.is_dir() else ""
            raise UserError(f"{_cannot_write(path, error)}{unchanged}") from error
        raise
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{_cannot_write(path.parent, error)}; {path.name} may be lost in a power cut") from error


def _rename_to_free_name(temporary: Path, path: Path) -> None:
    """Raises FileExistsError if ``path`` has been taken, be it in this moment."""
    try:
        os.link(temporary, path)  # in one step, unlike a look and a replace
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system (FAT, some shares): take the name with an empty file
        path.open("xb").close()
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink()
            raise
    else:
        temporary.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and journals its names itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return f"{path}: cannot be written ({reason}), {_ADVICE.get(error.errno or 0, 'choose another folder')}"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``text`` as a UTF-8 file at ``path``, by :func:`write_durably`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """``data`` as a file at ``path``, by :func:`write_durably`."""

    def write(file: BinaryIO) -> None:
        file.write(data)

    write_durably(path, write)


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """The regular file at ``path``, open for reading and without a buffer.

    Nothing else is opened: a pipe would wait for a writer, a device may never end. And as one of those may take the
    place of a file that was looked at, it is opened without waiting and looked at once more.

    Raises ValueError for what is no regular file, and OSError where it cannot be opened.
    """
    _check_regular(Path(path).stat())
    file = io.FileIO(path, "rb", opener=_open_without_waiting)
    try:
        _check_regular(os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such flag, and no pipes among its files


def read_text(path: str | os.PathLike[str], largest: int = 2**24) -> str:
    """The UTF-8 text of the regular file ``path``, which has at most ``largest`` bytes.

    Raises ValueError for a larger file, for what is no regular one and for what is no UTF-8, and OSError where it
    cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(f"{size} bytes long")
        return file.readall().decode("utf-8")


def json_text(value: Any, *, exact: bool = False, indent: int | None = 2) -> str:
    r"""``value`` as JSON: dicts with string keys, lists, tuples, paths, and numbers of Python or NumPy.

    JSON has no word for NaN and infinity. They become ``null``, which every reader understands, or, with
    ``exact``, the ``NaN`` and ``Infinity`` that Python's own reader turns back into the same number.

    >>> json_text({"dice": np.float32(0.5), "hd95": float("nan")})
    '{\n  "dice": 0.5,\n  "hd95": null\n}'

    Raises ValueError for a key that is no string and for a value of any other kind.
    """
    return json.dumps(_plain(value, exact), indent=indent)


def _plain(value: Any, exact: bool) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"a key in JSON must be a string, got {key!r}")
        return {key: _plain(item, exact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, exact) for item in value]
    if isinstance(value, float):
        return value if exact or math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ValueError(f"a value in JSON must be a dict, list, string, number, bool or None, got {type(value).__name__}")
