"""Every state in which a power cut during a save may leave the disk, and what loads from each::

    python -m tests.tools.crash_states

The system calls of a real save are recorded. A power cut may come after any of them, and then the disk holds what was
forced to it, and any part of the rest:

- what was written to a file before its last fsync is there, and a name that was given before its folder's last fsync;
- of the later writes each is there or not, whatever the order in which they were made, and one may be torn: only its
  beginning, only its end, or zeros in its place;
- of the later changes of names each was made or not, whatever their order. A single one is made entirely or not at all.

A disk that says "forced" and has forgotten, or that damages what it held already, is not among the states.
"""

import contextlib
import functools
import io
import itertools
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from minunet.base import archive
from minunet.base.durable import write_text

SECTOR = 512


class Create(NamedTuple):
    """A new file, under its first name."""

    file: int  # files are numbered in the order in which they were made
    name: str


class Write(NamedTuple):
    file: int
    offset: int
    data: bytes


class Sync(NamedTuple):
    file: int


class Rename(NamedTuple):
    file: int
    old: str
    new: str


class SyncFolder(NamedTuple):
    pass


class Returned(NamedTuple):
    """The save has returned: from here on its caller relies on it."""


Call = Create | Write | Sync | Rename | SyncFolder | Returned
Files = dict[str, bytes]  # by name


# ------------------------------------------------------------------------------------------ the calls of a save


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """The system calls by which minunet.base.durable writes files, in a list that grows while they are made."""
    calls: list[Call] = []
    numbers: dict[int, int] = {}  # of the files, by inode
    fsync, replace, open_path = os.fsync, os.replace, Path.open

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            offset, count = self.tell(), super().write(data)
            calls.append(Write(numbers[os.fstat(self.fileno()).st_ino], offset, bytes(data[:count])))
            return count

        def truncate(self, size: int | None = None) -> int:
            raise NotImplementedError  # no save does so; the states would have to know

    def record_open(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode != "xb":
            return open_path(path, mode, *arguments, **options)
        file = File(path, "xb")
        number = sum(isinstance(call, Create) for call in calls)
        numbers[os.fstat(file.fileno()).st_ino] = number
        calls.append(Create(number, path.name))
        return io.BufferedWriter(file)

    def record_fsync(descriptor: int) -> None:
        fsync(descriptor)
        state = os.fstat(descriptor)
        calls.append(SyncFolder() if stat.S_ISDIR(state.st_mode) else Sync(numbers[state.st_ino]))

    def record_replace(old: Path, new: Path) -> None:
        calls.append(Rename(numbers[Path(old).stat().st_ino], Path(old).name, Path(new).name))
        replace(old, new)

    with (
        mock.patch.object(Path, "open", record_open),
        mock.patch.object(os, "fsync", record_fsync),
        mock.patch.object(os, "replace", record_replace),
    ):
        yield calls


# ------------------------------------------------------------------------------------------ the states


class State(NamedTuple):
    """What the disk may hold after a power cut."""

    files: Files
    returned: bool  # whether the cut came after the save had returned


def states(before: Mapping[str, bytes], calls: Sequence[Call]) -> Iterator[State]:
    """All states after a power cut behind any of the ``calls``, some of them more than once.

    ``before`` is what the folder held, and the disk too.
    """
    for count in range(len(calls) + 1):
        done = calls[:count]
        returned = any(isinstance(call, Returned) for call in done)
        for names in possible_names(before, done):
            for contents in itertools.product(*(possible_contents(done, found) for found in names.values())):
                yield State(dict(zip(names, contents, strict=True)), returned)


def possible_names(before: Mapping[str, bytes], done: Sequence[Call]) -> Iterator[dict[str, int | bytes]]:
    """What may stand under each name: a file of the calls, by its number, or the bytes of one from before."""
    forced = 1 + max((place for place, call in enumerate(done) if isinstance(call, SyncFolder)), default=-1)
    changes = [call for call in done[:forced] if isinstance(call, Create | Rename)]
    pending = [call for call in done[forced:] if isinstance(call, Create | Rename)]
    for some in subsets(pending):
        names: dict[str, int | bytes] = dict(before)
        for change in [*changes, *some]:
            if isinstance(change, Rename):
                names.pop(change.old, None)
                names[change.new] = change.file
            else:
                names[change.name] = change.file
        yield names


def possible_contents(done: Sequence[Call], file: int | bytes) -> set[bytes]:
    """What may stand in a file."""
    if isinstance(file, bytes):
        return {file}
    mine = [call for call in done if isinstance(call, Write | Sync) and call.file == file]
    forced = 1 + max((place for place, call in enumerate(mine) if isinstance(call, Sync)), default=-1)
    written, pending = ([call for call in part if isinstance(call, Write)] for part in (mine[:forced], mine[forced:]))
    return _contents(tuple(written), tuple(pending))


@functools.cache
def _contents(written: tuple[Write, ...], pending: tuple[Write, ...]) -> set[bytes]:
    found = set()
    for some in subsets(pending):
        found.add(content([*written, *some]))
        for place, write in enumerate(some):
            for torn in torn_writes(write):
                found.add(content([*written, *some[:place], torn, *some[place + 1 :]]))
    return found


def torn_writes(write: Write) -> Iterator[Write]:
    """What may be there in place of the whole of it."""
    size = len(write.data)
    middle, last_sector = size // 2, (size - 1) // SECTOR * SECTOR
    for kept in {1, middle, last_sector, size - 1}:
        yield write._replace(data=write.data[:kept])
        yield write._replace(data=write.data[:kept] + bytes(size - kept))
        yield write._replace(data=write.data[kept:], offset=write.offset + kept)
    yield write._replace(data=bytes(size))


def content(writes: Sequence[Write]) -> bytes:
    """The bytes of a file after the ``writes``; what lies between them is zeros."""
    found = bytearray()
    for write in writes:
        end = write.offset + len(write.data)
        found.extend(bytes(max(0, end - len(found))))
        found[write.offset : end] = write.data
    return bytes(found)


def merged(calls: Sequence[Call]) -> list[Call]:
    """The calls with all writes of a file in one, its last: for saves of so many that all choices are too many."""
    found = []
    for place, call in enumerate(calls):
        if not isinstance(call, Write):
            found.append(call)
            continue
        mine = [(at, other) for at, other in enumerate(calls) if isinstance(other, Write) and other.file == call.file]
        if place == mine[-1][0]:
            found.append(Write(call.file, 0, content([write for _, write in mine])))
    return found


def subsets(items: Sequence[Any]) -> Iterator[list[Any]]:
    """All choices among the ``items``, in their order."""
    for chosen in itertools.product((False, True), repeat=len(items)):
        yield list(itertools.compress(items, chosen))


# ------------------------------------------------------------------------------------------ what loads from them


class Save(NamedTuple):
    """A kind of save: of the first or the second of two values, and how the file is loaded again."""

    save: Callable[[Path, int], None]
    load: Callable[[Path], int]


def save_checkpoint(path: Path, number: int) -> None:
    archive.save(path, {"a": np.full(400, number), "b": np.full(3, number)}, {"number": number})


def load_checkpoint(path: Path) -> int:
    arrays, metadata = archive.load(path)
    if arrays.keys() != {"a", "b"} or any((array != metadata["number"]).any() for array in arrays.values()):
        raise ValueError("another checkpoint than those that were saved")
    return int(metadata["number"])


def save_table(path: Path, number: int) -> None:
    write_text(path, f"{number}\n" * 3000)


def load_table(path: Path) -> int:
    numbers = path.read_text().splitlines()
    if len(numbers) != 3000 or len(set(numbers)) != 1:
        raise ValueError("another table than those that were saved")
    return int(numbers[0])


SAVES = {"last.npz": Save(save_checkpoint, load_checkpoint), "history.csv": Save(save_table, load_table)}


class Counts(NamedTuple):
    """How many distinct states there are, and what loads from them."""

    old: int = 0
    new: int = 0
    lost: int = 0  # neither loads, or the save had returned and the old one loads

    def __str__(self) -> str:
        return f"{sum(self)} states: {self.old} load as the old file, {self.new} as the new one, {self.lost} are lost"


def calls_of_a_save(folder: Path, name: str, existing: bool) -> tuple[Files, list[Call]]:
    """The files before a save of ``name`` in the empty ``folder``, and its calls; ``existing``: it replaces a file."""
    if existing:
        SAVES[name].save(folder / name, 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with recorded() as calls:
        SAVES[name].save(folder / name, 2)
    return before, [*calls, Returned()]


def count(folder: Path, name: str, before: Files, calls: Sequence[Call]) -> Counts:
    """What loads from the states of a save of ``name``, tried in ``folder``. At a first save, no file is "old"."""

    @functools.cache
    def loaded(data: bytes | None) -> str:
        if data is None:
            return "lost" if before else "old"
        path = folder / f"loaded-{name}"
        path.write_bytes(data)
        try:
            return {1: "old", 2: "new"}[SAVES[name].load(path)]
        except Exception:
            return "lost"

    counts, seen = Counts(), set()
    for state in states(before, calls):
        key = frozenset(state.files.items()), state.returned
        if key not in seen:
            seen.add(key)
            found = loaded(state.files.get(name))
            found = "lost" if state.returned and found != "new" else found
            counts = counts._replace(**{found: getattr(counts, found) + 1})
    return counts


#: Defects of a save, as changes of its calls.
PLANTED: dict[str, Callable[[list[Call]], list[Call]]] = {
    "no fsync of the file": lambda calls: [call for call in calls if not isinstance(call, Sync)],
    "no fsync of the folder": lambda calls: [call for call in calls if not isinstance(call, SyncFolder)],
    "the file gets its name before its fsync": lambda calls: sorted(calls, key=lambda call: isinstance(call, Sync)),
    "the fsync comes before the last write": lambda calls: _before_last_write(calls),
}


def _before_last_write(calls: list[Call]) -> list[Call]:
    place = max(place for place, call in enumerate(calls) if isinstance(call, Write))
    sync = next(call for call in calls if isinstance(call, Sync))
    others = [call for call in calls if call is not sync]
    return [*others[:place], sync, *others[place:]]


def main() -> None:
    lost = 0
    for name, existing in itertools.product(SAVES, (True, False)):
        with tempfile.TemporaryDirectory() as scratch:
            before, calls = calls_of_a_save(Path(scratch), name, existing)
            counts = count(Path(scratch), name, before, calls)
            kind = "replaced" if existing else "written first"
            print(f"{name}, {kind}: {len(calls) - 1} system calls, {counts}")
            lost += counts.lost
            for defect, plant in PLANTED.items():
                print(f"    with a planted defect, {defect}: {count(Path(scratch), name, before, plant(calls))}")
    if lost:
        sys.exit(1)


if __name__ == "__main__":
    main()
