"""Checkpoints: everything a run needs to go on, in one file that is whole or absent.

A checkpoint is a NumPy ``.npz`` archive, a ZIP file without compression, so that ``numpy.load`` opens it too::

    metadata.json                            format, version, a SHA-256 for each array, the caller's metadata
    parameters/down1.conv1.weight.npy        the network
    buffers/down1.norm1.running_mean.npy     its running statistics
    adamw/first_moment/down1.conv1.weight.npy, adamw/second_moment/down1.conv1.weight.npy
    ema/down1.conv1.weight.npy               the averaged network, if the run keeps one

*Writing* is durable (see :mod:`minunet.durable`): a kill or a full disk leaves the checkpoint before it.

*Reading* trusts nothing. No pickle is ever opened, so that a checkpoint from a stranger cannot run code.
The names, sizes, dtypes and shapes of all arrays are checked, against the network they are meant for,
before the first of them is read; nothing is compressed and nothing may be larger than the file, so that
a small file cannot fill the memory. Then the SHA-256 of each array has to be the recorded one. (That
finds damage, not forgery: who writes a file also writes its sums.) Every fault is one line, a ``UserError``.
"""

import hashlib
import json
import math
import os
import platform
import re
import reprlib
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from minunet import __version__
from minunet.backend import Array, array_module, to_numpy
from minunet.bridge import from_torch_names as from_torch_names  # the way to PyTorch and back starts here too
from minunet.bridge import to_torch_names as to_torch_names
from minunet.durable import json_text, write_durably
from minunet.errors import Diverged, UserError
from minunet.layers import Arrays
from minunet.optim import AdamW, WeightEMA
from minunet.unet import UNet

FORMAT, VERSION = "minunet-checkpoint", 1

#: Longest metadata, in bytes. Parsed JSON takes up to 30 times its text, so this bounds what a hostile file costs.
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
_DAMAGED = "use another checkpoint of the run, or train again"
_OTHER_NETWORK = "use the settings that it was trained with (config.json in its folder has them)"


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


def load(
    path: str | os.PathLike[str], *, expected: Mapping[str, tuple[tuple[int, ...], Any]] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the metadata of the checkpoint at ``path``.

    ``expected`` maps each name to (shape, dtype). With it, a file that holds anything else is refused before an
    array is read. Without it, reading takes at most as much memory as the file is long.

    Raises UserError if the file is missing, is no checkpoint, is damaged, comes from a newer format, or is not
    what was expected.
    """
    with _Reader(path) as reader:
        if expected is not None:
            wanted = {name: Spec(tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in expected.items()}
            _check_same_arrays(reader.path, reader.specs, wanted)
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
    if bad := _not_finite(host):
        raise ValueError(f"array {name!r} must be finite, got {bad} values that are NaN or infinite")
    return host


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > 200:
        raise ValueError(
            f"an array name must be letters, digits, '_', '-', with single '.' or '/' between, got {name!r}"
        )


def _not_finite(array: np.ndarray) -> int:
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def _zip_info(name: str, about_size: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)  # dated 1980-01-01, so that equal checkpoints are equal files
    info.file_size = about_size  # tells zipfile whether the member needs ZIP64; it counts the bytes itself
    info.external_attr = 0o644 << 16  # readable, should somebody unzip it
    return info


# ---------------------------------------------------------------------------------------------------------------------
# The guarded reader
# ---------------------------------------------------------------------------------------------------------------------


class _Reader:
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

    def __enter__(self) -> "_Reader":
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
            if _not_finite(array):
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
        raise UserError(f"{path}: damaged checkpoint ({reason}), {_DAMAGED}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), {_DAMAGED}") from error


def _not_a_checkpoint(path: Path, found: str) -> UserError:
    return UserError(f"{path}: not a minunet checkpoint ({found}), give a .npz that minunet's training wrote")


def _open_file(path: Path) -> BinaryIO:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{path}: a folder, give the checkpoint file in it")
        if not stat.S_ISREG(mode):  # opening a FIFO would wait for a writer, perhaps for ever
            raise UserError(f"{path}: not a regular file, give a checkpoint file")
        return path.open("rb")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, give the path of a checkpoint") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
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
        raise UserError(f"{path}: an empty file, {_DAMAGED}")
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


def _check_same_arrays(path: Path, stored: Mapping[str, Spec], expected: Mapping[str, Spec]) -> None:
    """Raise UserError, naming the first difference, unless the file has exactly the ``expected`` arrays."""
    found = [
        f"{name} is {stored[name]} in the file and {spec} here" if name in stored else f"{name} is not in the file"
        for name, spec in expected.items()
        if stored.get(name) != spec
    ]
    found += [f"{name} is only in the file" for name in stored if name not in expected]
    if found:
        more = f"; and {len(found) - 1} more arrays differ" if len(found) > 1 else ""
        raise UserError(f"{path}: holds another network or state ({found[0]}{more}), {_OTHER_NETWORK}")


# ---------------------------------------------------------------------------------------------------------------------
# The state of a training run
# ---------------------------------------------------------------------------------------------------------------------


def save_training(
    path: str | os.PathLike[str],
    *,
    net: UNet,
    optimizer: AdamW,
    ema: WeightEMA | None = None,
    metadata: Mapping[str, Any],
) -> None:
    """Write all that :func:`load_training` needs to go on: network, optimiser and, if there is one, averaged weights.

    To ``metadata`` it adds the entries "model" (``net.config``), "optimizer" (its steps), "ema" (its updates, or
    None) and "environment".

    Raises Diverged, and keeps the file that was there, if a value is NaN or infinite; else what :func:`save` raises,
    and ValueError if ``metadata`` has one of those entries.
    """
    ours = {
        "model": net.config,
        "optimizer": {"steps": optimizer.steps},
        "ema": None if ema is None else {"updates": ema.updates},
        "environment": environment(),
    }
    if taken := sorted(ours.keys() & metadata.keys()):
        raise ValueError(f"metadata must not have the entries {taken}, which save_training writes itself")
    arrays = {name: to_numpy(array) for name, array in _training_arrays(net, optimizer, ema).items()}
    for name, array in arrays.items():
        if bad := _not_finite(array):
            raise Diverged(f"{name}: {bad} of {array.size} values are NaN or infinite; {path} is not overwritten")
    save(path, arrays, {**metadata, **ours})


def load_training(
    path: str | os.PathLike[str], net: UNet, optimizer: AdamW, ema: WeightEMA | None = None
) -> dict[str, Any]:
    """Put the state that :func:`save_training` wrote into ``net``, ``optimizer`` and ``ema``, and return the metadata.

    Training then goes on bit for bit, given the same machine, versions and number of threads:
    ``differences(metadata["environment"], environment())`` says what is not the same. With an error, nothing has
    been changed.

    Raises UserError as :func:`load` does, also if the file belongs to another network.
    """
    live = _training_arrays(net, optimizer, ema)
    with _Reader(path) as reader:
        if changed := differences(reader.metadata.get("model"), net.config):
            raise UserError(f"{path}: holds another network ({'; '.join(changed)}), {_OTHER_NETWORK}")
        _check_same_arrays(reader.path, reader.specs, _specs(live))
        steps = _count(reader, "optimizer", "steps")
        updates = 0 if ema is None else _count(reader, "ema", "updates")
        saved = {name: reader.read(name) for name in live}
    for name, array in live.items():
        _copy_into(array, saved[name])
    optimizer.steps = steps
    if ema is not None:
        ema.updates = updates
    return reader.metadata


def load_net(path: str | os.PathLike[str], weights: str = "auto") -> tuple[UNet, dict[str, Any]]:
    """The network of a checkpoint, built as its metadata says, with its weights, on the CPU; and the metadata.

    ``weights`` is "ema" (averaged), "raw" (those of the last step) or "auto": "ema" if the file has them, else "raw".

    Raises UserError as :func:`load` does and if there are no averaged weights, ValueError for another ``weights``.
    """
    if weights not in ("auto", "ema", "raw"):
        raise ValueError(f"weights must be 'auto', 'ema' or 'raw', got {weights!r}")
    with _Reader(path) as reader:
        has_ema = any(name.startswith("ema/") for name in reader.specs)
        if weights == "ema" and not has_ema:
            raise UserError(f"{path}: holds no averaged weights (EMA), ask for the raw ones")
        groups = ("ema/",) if has_ema and weights != "raw" else ("parameters/", "buffers/")
        stored = {name: spec for name, spec in reader.specs.items() if name.startswith(groups)}
        net = _build_net(reader, sum(math.prod(spec.shape) for spec in stored.values()))
        live = _prefixed(groups[0], net.parameters()) | _prefixed(groups[-1], net.buffers())
        _check_same_arrays(reader.path, stored, _specs(live))
        for name, array in live.items():
            _copy_into(array, reader.read(name))
    return net, reader.metadata


def _training_arrays(net: UNet, optimizer: AdamW, ema: WeightEMA | None) -> Arrays:
    """The live arrays of a run, under the names that they have in a checkpoint."""
    return (
        _prefixed("parameters/", net.parameters())
        | _prefixed("buffers/", net.buffers())
        | _prefixed("adamw/first_moment/", optimizer.first_moment)
        | _prefixed("adamw/second_moment/", optimizer.second_moment)
        | _prefixed("ema/", {} if ema is None else ema.average)
    )


def _prefixed(prefix: str, arrays: Mapping[str, Array]) -> Arrays:
    return {prefix + name: array for name, array in arrays.items()}


def _specs(arrays: Mapping[str, Array]) -> dict[str, Spec]:
    return {name: Spec(array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}


def _copy_into(target: Array, source: np.ndarray) -> None:
    target[...] = array_module(target).asarray(source)


def _count(reader: _Reader, part: str, entry: str) -> int:
    """A number of steps or updates, from the metadata."""
    entries = reader.metadata.get(part)
    value = entries.get(entry) if isinstance(entries, dict) else None
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise UserError(f"{reader.path}: damaged checkpoint (its metadata lacks the {part}'s {entry}), {_DAMAGED}")
    return value


def _build_net(reader: _Reader, stored_values: int) -> UNet:
    """``UNet(**metadata["model"])``, refused before it is built if it would be larger than what the file holds."""
    config = reader.metadata.get("model")
    try:
        if not isinstance(config, dict) or config["dtype"] not in ("float16", "float32", "float64"):
            raise ValueError("no settings of a network")
        if _kernel_values(config) > stored_values:
            raise ValueError("the settings are those of a larger network than the arrays")
        return UNet(**config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{reader.path}: damaged checkpoint (model: {error}), {_DAMAGED}") from error


def _kernel_values(config: Mapping[str, Any]) -> int:
    """How many numbers the kernels of ``UNet(**config)`` hold. Raises ValueError unless all sizes are positive ints."""
    channels_in, channels_out, widths = config["in_channels"], config["out_channels"], config["widths"]
    up, head = config["up_kernel"], config["head_kernel"]
    if not all(type(size) is int and size > 0 for size in (channels_in, channels_out, up, head, *widths)) or not widths:
        raise ValueError("sizes must be positive whole numbers")
    levels = list(zip([channels_in, *widths], widths, strict=False))  # (channels of the level above, of this one)
    down = sum(9 * width * (above + width) for above, width in levels)
    upward = sum(above * (up**2 * width + 9 * 3 * above) for above, width in levels[1:])
    return down + upward + head**2 * widths[0] * channels_out


# ---------------------------------------------------------------------------------------------------------------------
# What a run depends on
# ---------------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What the bits of a result may depend on: versions, processor, the number of threads that was asked for.

    >>> sorted(environment())
    ['blas', 'cores', 'cpu', 'minunet', 'numpy', 'platform', 'python', 'threads']
    """
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    return {
        "minunet": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": {name: os.environ[name] for name in variables if name in os.environ},
    }


def _cpu_name() -> str:
    """The processor's model: BLAS picks its kernels, and so the order of its sums, by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def differences(saved: Any, current: Mapping[str, Any]) -> list[str]:
    """What differs between a dict from a checkpoint's metadata and its ``current`` counterpart, one phrase an entry.

    >>> differences({"numpy": "2.0.0", "widths": [8, 16]}, {"numpy": "2.1.0", "widths": (8, 16)})
    ["numpy was '2.0.0', is '2.1.0'"]
    """
    saved = saved if isinstance(saved, dict) else {}
    now = json.loads(json_text(dict(current), exact=True))  # tuples become lists, as they did in the file
    names = [*now, *(name for name in saved if name not in now)]
    return [
        f"{reprlib.repr(name).strip(chr(39))} was {reprlib.repr(saved.get(name))}, is {reprlib.repr(now.get(name))}"
        for name in names
        if saved.get(name) != now.get(name)
    ]
