"""Where the engine's arrays lie: aligned scratch memory of one process, and lifetimes packed into one arena.

Nothing is allocated during a step. Each stage takes its scratch from the same few hundred kilobytes, which therefore
stay in the core's second-level cache; the arrays that pass from stage to stage lie in the memory that all processes
share, and those whose lifetimes do not meet share their place.
"""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple, TypeVar

import numpy as np

Key = TypeVar("Key")

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to a whole number of cache lines."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Scratch:
    """Memory that every stage of one process carves anew: what a stage leaves there, the next overwrites.

    The first time a stage is built, :attr:`measuring` is on and :meth:`take` only counts; then :meth:`allocate` makes
    the memory that the greediest stage needs, and the stages are built again, on it.
    """

    def __init__(self) -> None:
        self.measuring = True
        self.needed = 0
        self._memory = np.zeros(0, np.uint8)
        self._used = 0

    def reset(self) -> None:
        """Begin a new stage."""
        self._used = 0

    def allocate(self) -> None:
        """Make the memory, its first byte on a cache line."""
        memory = np.zeros(self.needed + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        self._memory = memory[start : start + self.needed]
        self.measuring = False

    def take(self, shape: tuple[int, ...], dtype: str | np.dtype) -> np.ndarray:
        """An array of this stage, uninitialised. While measuring it has its shape but no memory: only make views."""
        start = self._used
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        self._used = start + aligned(nbytes)
        self.needed = max(self.needed, self._used)
        if self.measuring:
            strides = np.cumprod((np.dtype(dtype).itemsize, *shape[:0:-1]))[::-1]
            return np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, tuple(strides))
        return self._memory[start : start + nbytes].view(dtype).reshape(shape)


class Lifetime(NamedTuple):
    """How large a buffer is, and the first and the last stage that need it."""

    nbytes: int
    first: int
    last: int


def pack(lifetimes: Mapping[Key, Lifetime]) -> tuple[dict[Key, int], int]:
    """Offsets for buffers so that none shares memory with one that lives beside it.

    The largest are placed first, each at the lowest offset that is free throughout its life. Returns the offsets
    and the bytes needed in all.

    >>> pack({"a": Lifetime(100, 0, 1), "b": Lifetime(64, 1, 2), "c": Lifetime(100, 2, 3)})
    ({'a': 0, 'c': 0, 'b': 128}, 192)
    """
    offsets: dict[Key, int] = {}
    total = 0
    for name, (nbytes, first, last) in sorted(lifetimes.items(), key=lambda item: (-item[1].nbytes, item[1].first)):
        taken = sorted(
            (offset, offset + aligned(lifetimes[other].nbytes))
            for other, offset in offsets.items()
            if lifetimes[other].first <= last and first <= lifetimes[other].last
        )
        offset = 0
        for start, end in taken:
            if offset + nbytes <= start:
                break
            offset = max(offset, end)
        offsets[name] = offset
        total = max(total, offset + aligned(nbytes))
    return offsets, total
