"""What each process of a team has: its rank, the memory that all see, and a barrier to meet the others at.

The idea of a team (minunet.engines.cpu.team) is single program, multiple data: all processes run the same lines, each
on its share of the batch, and meet at a barrier wherever one needs what another has written. A training step has some
hundred barriers, so that they must cost microseconds. Hence the barrier has two halves:

- It *spins*. Each rank has a counter in shared memory: how many barriers it has come to. Who comes last only adds
  one to its own counter; who waits reads the others' until they have caught up, and between two looks offers its core
  to whoever else may run. No wake-up is needed, which alone would cost more than the rest.
- It *sleeps*. Who has waited longer than its patience says so in shared memory, and waits at its doorbell, a pipe,
  until the last to come rings. The patience doubles where waiting paid and halves where it did not.

Two processes on the two cores of an AMD EPYC (Zen 4), busy with other work too, meet in 6 microseconds (2026-11-22,
``python benchmarks/barrier.py``).
"""

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from mmap import mmap
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes: a line of the cache, and an AVX-512 register
PAGE = 4096  # bytes
_WORDS = ALIGNMENT // 8  # of 8 bytes, so that each rank's words have a cache line of their own
_ARRIVED, _ASLEEP = 0, 1  # the words of a rank: barriers come to; 1 while it waits at its doorbell
_PATIENCE = (100e-6, 2e-3)  # seconds of spinning, at least and at most
LOOK_AROUND = 0.5  # seconds after which a sleeper looks whether the others live, if no one says that they died
# Looks after which it says for whom it waits: 30 seconds. Not seconds, which also pass while all processes are stopped.
LATE = 60


class PeerGone(Exception):
    """The process ``rank`` has gone, or has sent a last message, in the middle of a command."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} has gone")
        self.rank = rank


class Member:
    """One of the ``size`` processes of a team, numbered by its ``rank``.

    memory     ``memory_size(nbytes, size)`` bytes, mapped by all
    doorbells  the pipes: the end to read from at the place of this rank, the ends to write to at the others'
    links      by rank, the sockets on which another process's end shows: every worker's in rank 0, rank 0's in a worker
    parent     the process of rank 0
    late       called with the rank of a process that lets this one wait very long
    """

    def __init__(
        self,
        rank: int,
        size: int,
        memory: mmap,
        nbytes: int,
        doorbells: tuple[int, ...] = (),
        links: dict[int, socket.socket] | None = None,
        parent: int = 0,
        late: Callable[[int], None] = lambda rank: None,
    ) -> None:
        self.rank, self.size = rank, size
        self._memory, self._nbytes = memory, nbytes
        self._doorbells, self._links, self._parent = doorbells, links or {}, parent
        self._late = late
        self._words = memoryview(memory)[_control_offset(nbytes) :].cast("q")
        self._others = [other for other in range(size) if other != rank]
        self._round = 0
        self._patience = _PATIENCE[1]
        self._held = threading.Lock()
        self._held.acquire()
        if size > 1:
            self._poll = select.poll()
            for descriptor in (doorbells[rank], *(link.fileno() for link in self._links.values())):
                self._poll.register(descriptor, select.POLLIN)

    def array(self, offset: int, shape: tuple[int, ...], dtype: Any = "float32") -> np.ndarray:
        """The array whose first byte lies ``offset`` bytes into the shared memory. It is zero at first.

        Raises ValueError if ``offset`` is not a multiple of 64, or the array does not fit.
        """
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if offset % ALIGNMENT or not 0 <= offset <= self._nbytes - nbytes:
            raise ValueError(
                f"offset must be a multiple of {ALIGNMENT} in [0, {self._nbytes - nbytes}] for an array of {nbytes} "
                f"bytes in {self._nbytes}, got {offset}"
            )
        return np.ndarray(shape, dtype, buffer=self._memory, offset=offset)

    def barrier(self) -> None:
        """Return when all ranks have come here. What any of them wrote before, all of them see after.

        Raises PeerGone if one of them will not come.
        """
        if self.size == 1:
            return
        words, reached = self._words, self._round + 1
        self._round = reached
        self._fence()
        words[_WORDS * self.rank + _ARRIVED] = reached
        self._fence()
        for other in self._others:
            if words[_WORDS * other + _ASLEEP]:
                self._ring(other)
        for other in self._others:
            if words[_WORDS * other + _ARRIVED] < reached:
                self._wait(other)
        self._fence()

    def _wait(self, other: int) -> None:
        """Spin, then sleep, until ``other`` has come to this barrier."""
        words, place, reached = self._words, _WORDS * other + _ARRIVED, self._round
        least, most = _PATIENCE
        until = time.perf_counter() + self._patience
        while time.perf_counter() < until:
            if words[place] >= reached:
                self._patience = min(2 * self._patience, most)
                return
            os.sched_yield()
        self._patience = max(self._patience / 2, least)
        mine = _WORDS * self.rank + _ASLEEP
        words[mine] = 1
        looks = 0
        try:
            while True:
                self._fence()
                if words[place] >= reached:
                    return
                if not self._rung(reached):
                    looks += 1
                    if looks == LATE:
                        self._late(other)
        finally:
            words[mine] = 0

    def _rung(self, reached: int) -> bool:
        """Whether there is a ring within ``LOOK_AROUND`` seconds; PeerGone if someone who has not come has gone."""
        heard = {descriptor for descriptor, _ in self._poll.poll(1000 * LOOK_AROUND)}
        if self._doorbells[self.rank] in heard:
            os.read(self._doorbells[self.rank], PAGE)
        for rank, link in self._links.items():
            # Of one who has come, a message or the end belongs to what follows the barrier.
            if link.fileno() in heard and self._words[_WORDS * rank + _ARRIVED] < reached:
                raise PeerGone(rank)
        self.check_parent()
        return bool(heard)

    def check_parent(self) -> None:
        """Raise PeerGone in a worker whose parent has died.

        The end of its socket says the same at once, unless some process that the parent forked still has it open.
        """
        if self.rank and os.getppid() != self._parent:
            raise PeerGone(0)

    def _ring(self, other: int) -> None:
        # The pipe is full: it has been rung already. Or the other has gone: whoever waits for it next will find out.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._doorbells[other], b"!")

    def _fence(self) -> None:
        """Order memory: reads and writes from before are done before any from after.

        A processor may delay its writes and hurry its reads. What Python has against that is a lock: giving one back
        and taking it again is a full fence.
        """
        self._held.release()
        self._held.acquire()


def memory_size(nbytes: int, size: int) -> int:
    """How many bytes a team of ``size`` maps for ``nbytes`` bytes of arrays: behind them come a few words a rank."""
    return _control_offset(nbytes) + ALIGNMENT * size


def _control_offset(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
