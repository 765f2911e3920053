"""The guarded archive: named arrays and metadata in one file that is whole or absent. Checkpoints are such files.

It is a NumPy ``.npz`` archive, a ZIP file without compression, so that ``numpy.load`` opens it too::

    metadata.json        format, version, a SHA-256 for each array, the caller's metadata
    NAME.npy             an array; names may have dots and slashes

*Writing* is durable (see :mod:`minunet.base.durable`): a kill or a full disk leaves the file before it.

*Reading* trusts nothing. No pickle is ever opened, so that an archive from a stranger cannot run code. The names,
sizes, dtypes and shapes of all arrays are known and can be compared with what is wanted before the first of them is
read; nothing is compressed and nothing may be larger than the file, so that a small file cannot fill the memory. Then
the SHA-256 of each array has to be the recorded one. (That finds damage, not forgery: who writes a file also writes its
sums.) Every fault is one line, a ``UserError``.
"""

import hashlib
import io
import json
import math
import os
import re
import reprlib
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from minunet.base.backend import Array, to_numpy
from minunet.base.durable import json_text, open_regular, write_durably
from minunet.base.errors import UserError

FORMAT, VERSION = "minunet-checkpoint", 2  # 1: the history of a run was in its metadata

#: Longest metadata, in bytes. Parsed JSON takes up to 30 times its text, so this bounds what a hostile file costs.
#: What grows with a run belongs into arrays, therefore.
MAX_METADATA = 2**20

_METADATA = "metadata.json"
_MAX_DIRECTORY = 2**20  # the ZIP's table of contents: about 100 bytes an array
_MAX_HEADER = 1024  # of one .npy member
_CHUNK = 2**20
_NAME = re.compile(r"[A-Za-z0-9_-]+([./][A-Za-z0-9_-]+)*")
_DTYPES = frozenset(["<f2", "<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8"])

# What numpy.save writes before the data of an array. NumPy's own reader takes the header for a Python literal and
# evaluates it; this one knows the single form that NumPy writes.
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<|][fiu][1248])', 'fortran_order': False, 'shape': \(((?:\d{1,15}, )*(?:\d{1,15},?)?)\), \} *\n"
)

# What zipfile, json and int raise over damaged bytes (RecursionError is a RuntimeError, a bad UTF-8 a ValueError).
_DAMAGE = (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, OverflowError, struct.error)
DAMAGED = "use another checkpoint of the run, or train again"


class Spec(NamedTuple):
    """Shape and dtype of an array that need not be there yet."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


# ---------------------------------------------------------------------------------------------------------------------
# Arrays and metadata
# ---------------------------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, Any]) -> None:
    """Write ``arrays`` (real numbers, of any shape, on any device) and ``metadata`` (JSON values) to ``path``.

    The same arrays and metadata give the same bytes, whenever and wherever they are saved.

    Raises ValueError, before anything is written, for a name outside ``[A-Za-z0-9_-]`` with single dots and slashes
    between, a dtype other than 8 to 64-bit integers and 16 to 64-bit floats, a value that is not finite, and
    metadata that JSON cannot hold or that is longer than ``MAX_METADATA``. Raises UserError if the system refuses
    the write; the file that was there before is then unchanged.
    """
    hosts = {name: _host_array(name, array) for name, array in arrays.items()}
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": {name: _sha256(array) for name, array in hosts.items()},
        "metadata": dict(metadata),
    }
    text = json_text(contents, exact=True, indent=None).encode()
    if len(text) > MAX_METADATA:
        raise ValueError(f"metadata must be at most {MAX_METADATA} bytes of JSON, got {len(text)}")

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_zip_info(_METADATA, len(text)), text)
            for name, array in hosts.items():
                with archive.open(_zip_info(f"{name}.npy", array.nbytes + _MAX_HEADER), "w") as member:
                    np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)

    write_durably(path, write)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the metadata of the archive at ``path``. Reading takes at most as much memory as the file is long.

    Raises UserError if the file is missing, is no checkpoint, is damaged or comes from a newer format.
    """
    with Reader(path) as reader:
        return {name: reader.read(name) for name in reader.specs}, reader.metadata


def sha256_of_arrays(arrays: Mapping[str, Array]) -> str:
    """One SHA-256 over names, dtypes, shapes and values, in whatever order: equal sums mean equal to the last bit.

    >>> weights = {"a": np.arange(3), "b": np.zeros((2, 2))}
    >>> sha256_of_arrays(weights) == sha256_of_arrays(dict(reversed(weights.items())))
    True
    >>> sha256_of_arrays(weights) == sha256_of_arrays(weights | {"b": np.full((2, 2), -0.0)})
    False
    """
    lines = (f"{_sha256(_little_endian(to_numpy(arrays[name])))} {name}\n" for name in sorted(arrays))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _little_endian(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _host_array(name: str, array: Array) -> np.ndarray:
    """``array`` as it is saved: in host memory, little-endian, C order. Raises ValueError as :func:`save` says."""
    _check_name(name)
    host = _little_endian(to_numpy(array))
    if host.dtype.str not in _DTYPES:
        raise ValueError(f"array {name!r} must hold integers of 8 to 64 or floats of 16 to 64 bits, got {host.dtype}")
    if bad := not_finite(host):
        raise ValueError(f"array {name!r} must be finite, got {bad} values that are NaN or infinite")
    return host


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > 200:
        raise ValueError(
            f"an array name must be letters, digits, '_', '-', with single '.' or '/' between, got {name!r}"
        )


def not_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def _zip_info(name: str, about_size: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)  # dated 1980-01-01, so that equal checkpoints are equal files
    info.file_size = about_size  # tells zipfile whether the member needs ZIP64; it counts the bytes itself
    info.external_attr = 0o644 << 16  # readable, should somebody unzip it
    return info


# ---------------------------------------------------------------------------------------------------------------------
# The guarded reader
# ---------------------------------------------------------------------------------------------------------------------


class Reader:
    """An open checkpoint of which everything has been checked except the arrays' values.

    ``metadata`` is the caller's metadata, ``specs`` maps each name to its ``Spec``; ``read(name)`` reads an array.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = _open_file(self.path)
        try:
            with _damage_named(self.path):
                _check_outline(self.path, self._file)
                self._archive = zipfile.ZipFile(self._file)
                members = self._members()
                self._digests, self.metadata = self._contents(members)
                if set(members) != {_METADATA} | {f"{name}.npy" for name in self._digests}:
                    raise ValueError("its arrays are not those that its metadata lists")
                self.specs = {name: self._spec(name) for name in self._digests}
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _members(self) -> dict[str, zipfile.ZipInfo]:
        members = {info.filename: info for info in self._archive.infolist()}
        if len(members) != len(self._archive.infolist()):
            raise ValueError("two of its members have one name")
        for info in members.values():
            # Stored members that sum up to less than the file: no bomb can hide in what follows.
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits:
                raise _not_a_checkpoint(self.path, f"member {info.filename!r} is compressed or encrypted")
        if sum(info.file_size for info in members.values()) > os.fstat(self._file.fileno()).st_size:
            raise ValueError("its members overlap")
        return members

    def _contents(self, members: dict[str, zipfile.ZipInfo]) -> tuple[dict[str, str], dict[str, Any]]:
        """The recorded SHA-256 sums and the caller's metadata."""
        if _METADATA not in members:
            raise _not_a_checkpoint(self.path, f"a ZIP file without {_METADATA}")
        if members[_METADATA].file_size > MAX_METADATA:
            raise ValueError(f"its metadata takes more than {MAX_METADATA} bytes")
        contents = json.loads(self._archive.read(_METADATA))
        if not isinstance(contents, dict) or contents.get("format") != FORMAT:
            raise _not_a_checkpoint(self.path, f"its {_METADATA} does not say {FORMAT!r}")
        version = contents.get("version")
        if not isinstance(version, int) or version < 1:
            raise ValueError("its version is no positive number")
        if version > VERSION:
            raise UserError(
                f"{self.path}: written by a newer minunet (format {reprlib.repr(version)}, "
                f"this one reads up to {VERSION}), update minunet to read it"
            )
        digests, metadata = contents.get("sha256"), contents.get("metadata")
        if not isinstance(digests, dict) or not isinstance(metadata, dict):
            raise ValueError("its metadata lacks a part")
        for name in digests:
            _check_name(name)
        return digests, metadata

    def _spec(self, name: str) -> Spec:
        """Shape and dtype from the header of the array's ``.npy`` member; the member has exactly that size."""
        info = self._archive.getinfo(f"{name}.npy")
        with self._archive.open(info) as member:
            header = _read_npy_header(member)
        match = _NPY_HEADER.fullmatch(header)
        if match is None or match[1].decode() not in _DTYPES:
            raise ValueError(f"array {name!r} has no header that a checkpoint may have")
        shape = tuple(int(side) for side in match[2].split(b",") if side.strip())
        spec = Spec(shape, np.dtype(match[1].decode()))
        if len(_NPY_MAGIC) + 2 + len(header) + math.prod(shape) * spec.dtype.itemsize != info.file_size:
            raise ValueError(f"array {name!r} is not as long as its header says")
        return spec

    def read(self, name: str) -> np.ndarray:
        """The array ``name``, its SHA-256 verified and its values finite."""
        with _damage_named(self.path):
            array = np.empty(self.specs[name].shape, self.specs[name].dtype)
            raw = array.reshape(-1).view(np.uint8)
            with self._archive.open(f"{name}.npy") as member:
                _read_npy_header(member)
                start = 0
                while chunk := member.read(_CHUNK):  # to the end, where zipfile checks the CRC
                    raw[start : start + len(chunk)] = np.frombuffer(chunk, np.uint8)
                    start += len(chunk)
            if start != raw.size or _sha256(array) != self._digests[name]:
                raise ValueError(f"array {name!r} does not have the recorded SHA-256")
            if not_finite(array):
                raise ValueError(f"array {name!r} holds NaN or infinite values")
            return array


def _read_npy_header(member: Any) -> bytes:
    start = member.read(len(_NPY_MAGIC) + 2)
    length = int.from_bytes(start[len(_NPY_MAGIC) :], "little")
    if not start.startswith(_NPY_MAGIC) or length > _MAX_HEADER:
        raise ValueError("a member is no .npy array")
    return member.read(length)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what reading damaged bytes raises into a UserError that names the file."""
    try:
        yield
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: damaged checkpoint ({reason:.500}), {DAMAGED}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), {DAMAGED}") from error


def _not_a_checkpoint(path: Path, found: str) -> UserError:
    return UserError(f"{path}: not a minunet checkpoint ({found}), give a .npz that minunet's training wrote")


def _open_file(path: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise UserError(f"{path}: a folder, give the checkpoint file in it")
        return io.BufferedReader(open_regular(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, give the path of a checkpoint") from error
    except (OSError, ValueError) as error:  # ValueError: no regular file, or a NUL in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"{path}: cannot be opened ({reason}), give a checkpoint that you may read") from error


def _check_outline(path: Path, file: BinaryIO) -> None:
    """Refuse what is no ZIP file of ours by its first and last bytes, before zipfile reads its table of contents.

    A ZIP file ends with a record of 22 bytes that says how long the table before it is. (With more than 4 GiB or
    65,535 members, a "ZIP64" record of 56 bytes and its locator of 20 come before that one and say it again.)
    Python's zipfile would read a table of any length, one object for each entry; hence the limit.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(4)
    if not start:
        raise UserError(f"{path}: an empty file, {DAMAGED}")
    if start[:1] == b"\x80":
        raise _not_a_checkpoint(path, "a pickle, which could run code when it is opened")
    if start != b"PK\x03\x04":
        raise _not_a_checkpoint(path, "no .npz file")
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")
    if tail[76:80] != b"PK\x05\x06" or tail[96:98] != b"\0\0":
        raise ValueError("its end is missing: truncated while it was copied?")
    lengths = [int.from_bytes(tail[88:92], "little")]
    if tail[56:60] == b"PK\x06\x07":
        if int.from_bytes(tail[64:72], "little") != size - 98:  # where the locator says that the record is
            raise ValueError("its table of contents is not where it belongs")
        lengths.append(int.from_bytes(tail[40:48], "little"))
    if max(lengths) > _MAX_DIRECTORY:
        raise ValueError(f"its table of contents takes more than {_MAX_DIRECTORY} bytes")
