"""A team of processes that share memory and run the same program, each on its share of the work.

NumPy computes on one core, but for large matrix products. Threads do not change that for many short calls: Python
lets one thread at a time pass, and it changes hands about as often as NumPy is called. So a team is processes. They
are started once, build the same program, and then run each command together::

    with Team(size, build, arguments, nbytes) as team:    # every rank: program = build(member, **arguments)
        team.run(["step", 1])                             # every rank: program.run(["step", 1])

The process that makes the team is its rank 0 and does a share itself. Large arrays lie in the shared memory
(``member.array``), and only small commands travel, as JSON: a line each through a socket.

What the rest is for: nothing of a team outlives it, however it ends.

- The memory has no name (memfd, or a file deleted at once): when the last process has gone, so has it.
- A worker that dies is seen at the next barrier, for its socket ends: rank 0 then raises TeamError.
- If rank 0 dies, its sockets end too, and every worker leaves. It also looks, twice a second, whether its parent is
  still the one that started it: a process that rank 0 forked may hold the sockets open.
- A worker starts with the signals blocked that end a program. Ctrl-C goes to all processes of the terminal, and it is
  rank 0 that decides what becomes of it, which may be to finish the step with its workers.
- A worker that somebody has stopped (SIGSTOP) may go on one day, and rank 0 waits; after 30 seconds one line says for
  whom. When rank 0 is asked to end, it wakes its workers first.

Workers are new Python processes, so nothing is forked, ``__main__`` is not run again, and scripts need no guard.
"""

import contextlib
import importlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from minunet.base.control_groups import groups
from minunet.base.errors import UserError
from minunet.base.signals import ENDING, WAKE_UP, write_error
from minunet.engines.cpu.member import LATE, LOOK_AROUND, Member, PeerGone, memory_size

MOST = 64  # workers: a barrier looks at every other rank
_GRACE = 10.0  # seconds in which a worker leaves by itself, on a busy machine too
_BLAS_THREADS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

# The C library of most Linuxes gives memory that is freed back to the system, which clears it before it is used again:
# that took longer than to prepare a batch in it. A worker keeps it; but arrays from 4 MiB on, for which NumPy asks
# large pages, come and go.
_KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(4 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}


class Program(Protocol):
    """What a team runs."""

    def run(self, command: Any) -> Any:
        """Do one rank's share of ``command``. All ranks come to the same barriers on the way."""


class TeamError(RuntimeError):
    """A team could not start, a worker died or failed, or the team is closed."""


class WorkerKilled(TeamError, UserError):
    """Someone has killed a worker, or the system for want of memory: for the owner of the machine to put right."""


class Team:
    """``size`` processes, this one included, that each hold ``build(member, **arguments)``, a program.

    build      a function of an importable module, which is imported by its name in every worker
    arguments  JSON values (dict, list, str, int, float, bool, None)
    nbytes     of shared memory, zero at first, where ``member.array(offset, shape, dtype)`` is the same on every rank

    While rank 0 runs its share, threadpoolctl, if it is there, keeps its BLAS to one thread, as the workers' are by
    their environment. Without it, the threads of rank 0's BLAS get in the workers' way.

    Commands come from one thread at a time. A team that a fork has copied is closed in the copy.

    Raises TeamError if the processes cannot start or a worker fails in ``build``, what ``build`` raises on rank 0, and
    ValueError for arguments out of range.
    """

    def __init__(self, size: int, build: Callable[..., Program], arguments: dict[str, Any], nbytes: int) -> None:
        if not 1 <= size <= MOST:
            raise ValueError(f"size must be in [1, {MOST}], got {size}")
        if nbytes < 0:
            raise ValueError(f"nbytes must be >= 0, got {nbytes}")
        name = f"{build.__module__}:{build.__qualname__}"
        if size > 1 and (build.__module__ == "__main__" or "<" in name):
            raise ValueError(f"build must be a function that workers can import, got {name}")
        setup = json.dumps({"build": name, "arguments": arguments, "size": size, "nbytes": nbytes})
        self.size = size
        self._workers = _Workers()
        self._end = weakref.finalize(self, self._workers.end)  # at the latest when the interpreter ends
        try:
            try:
                self._member = self._workers.start(size, nbytes)
            except (OSError, ValueError) as error:  # ValueError: descriptors cannot be passed, as on Windows
                raise TeamError(f"a team of {size} processes cannot start: {error}") from error
            self._limited = _one_blas_thread() if size > 1 else contextlib.nullcontext
            with self._together():
                self._workers.tell(setup)
                self.program = build(self._member, **json.loads(setup)["arguments"])
                self._member.barrier()
        except BaseException:
            self._workers.kill()
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether the team has ended: by ``close``, by an error, or because this process is a fork of its own."""
        return not self._end.alive or self._workers.owner != os.getpid()

    def array(self, offset: int, shape: tuple[int, ...], dtype: Any = "float32") -> np.ndarray:
        """``Member.array`` of rank 0."""
        return self._member.array(offset, shape, dtype)

    def run(self, command: Any) -> Any:
        """``program.run(command)`` on every rank; returns rank 0's result when all have done it.

        ``command`` is a JSON value, and comes to every rank as JSON gives it back: a tuple as a list.

        Raises TeamError if the team is closed, a worker has died (naming rank and signal), or its program has raised
        (with its traceback), and whatever rank 0's program raises. The team is closed then.
        """
        if self.closed:
            raise TeamError("the team is closed")
        line = json.dumps(command)
        try:
            with self._together():
                self._workers.tell(line)
                result = self.program.run(json.loads(line))
                self._member.barrier()
        except BaseException:
            self._workers.kill()
            self.close()
            raise
        return result

    def close(self) -> None:
        """End the workers, and wait until they have gone. The arrays live on as long as someone holds them."""
        self._end()

    def __enter__(self) -> "Team":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """The time in which all ranks work: a worker that is lost is a TeamError."""
        try:
            with self._limited():
                yield
        except PeerGone as gone:
            words = self._workers.last_words(gone.rank)
            if words.endswith("killed by SIGKILL"):
                hint = "perhaps because memory ran out, free some and try again"
                raise WorkerKilled(f"{words}, {hint}") from None
            raise TeamError(words) from None


class _Workers:
    """The processes of a team beside rank 0, as rank 0 sees them."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # by rank
        self._links: dict[int, socket.socket] = {}
        self._descriptors: list[int] = []

    def start(self, size: int, nbytes: int) -> Member:
        """Start ranks 1 to size - 1. Returns the member of rank 0. OSError where the system refuses."""
        length = memory_size(nbytes, size)
        if size == 1:
            return Member(0, 1, _private_memory(length), nbytes)
        _open_standard_streams()
        memory = _unnamed_file(length)
        self._descriptors.append(memory)
        doorbells = []
        for _ in range(size):
            doorbells.append(os.pipe())
            self._descriptors += doorbells[-1]
            for end in doorbells[-1]:
                os.set_blocking(end, False)
        for rank in range(1, size):
            self._links[rank], theirs = socket.socketpair()
            ring = [read if other == rank else write for other, (read, write) in enumerate(doorbells)]
            with theirs, _signals_blocked():
                self._processes[rank] = subprocess.Popen(
                    [sys.executable, "-P", "-c", f"from {__name__} import work; work()"]
                    + [str(number) for number in (rank, os.getpid(), theirs.fileno(), memory, *ring)],
                    pass_fds=(theirs.fileno(), memory, *ring),
                    stdin=subprocess.DEVNULL,
                    env=_environment(),
                )
        WAKE_UP.add(self.wake_up)
        ring = [read if rank == 0 else write for rank, (read, write) in enumerate(doorbells)]
        return Member(0, size, _shared_memory(memory, length), nbytes, tuple(ring), self._links, late=self._late)

    def tell(self, line: str) -> None:
        """Send ``line`` to every worker."""
        for rank, link in self._links.items():
            try:
                link.sendall(line.encode() + b"\n")
            except OSError:
                raise PeerGone(rank) from None

    def wake_up(self) -> None:
        """Let workers that somebody has stopped go on."""
        if self.owner == os.getpid():
            for process in self._processes.values():
                process.send_signal(signal.SIGCONT)

    def _late(self, rank: int) -> None:
        process, seconds = self._processes[rank].pid, LOOK_AROUND * LATE
        text = f"waiting for worker {rank} (process {process}) for {seconds:.0f} s; if it is stopped, "
        write_error(f"\n{text}kill -CONT {process} lets it go on\n".encode())

    def last_words(self, rank: int) -> str:
        """How worker ``rank`` ended: its traceback, its signal or its exit code."""
        process, said = self._processes[rank], b""
        who = f"worker {rank} (process {process.pid})"
        self._links[rank].settimeout(_GRACE)
        with contextlib.suppress(OSError):
            while part := self._links[rank].recv(1 << 16):
                said += part
        if said:
            return f"{who} failed:\n{said.decode(errors='replace').rstrip()}"
        try:
            code = process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return f"{who} closed its socket"
        try:
            return f"{who} was killed by {signal.Signals(-code).name}" if code < 0 else f"{who} left with code {code}"
        except ValueError:
            return f"{who} was killed by signal {-code}"

    def kill(self) -> None:
        """End the workers wherever they are. They hold nothing that could be left half done."""
        if self.owner == os.getpid():
            for process in self._processes.values():
                process.kill()

    def end(self) -> None:
        """End the workers, and wait for them. In a fork of the owner: forget them."""
        mine = self.owner == os.getpid()
        WAKE_UP.discard(self.wake_up)
        for link in self._links.values():
            if mine:
                with contextlib.suppress(OSError):  # the other end is gone
                    link.shutdown(socket.SHUT_RDWR)
            link.close()
        self.wake_up()  # else one that is stopped would not see it
        for descriptor in self._descriptors:
            os.close(descriptor)
        for process in self._processes.values():
            if not mine:
                process.returncode = 0  # so that Popen does not warn of a child that is not this process's
                continue
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def work() -> None:
    """The life of a worker. Its arguments: rank, parent, then the descriptors of socket, memory and doorbells."""
    rank, parent, link, memory, *doorbells = map(int, sys.argv[1:])
    with socket.socket(fileno=link) as to_parent, contextlib.suppress(PeerGone):
        lines = _lines(to_parent, parent)
        setup = json.loads(next(lines, "null"))
        if setup is None:  # the parent has given up in the middle of the start
            return
        size, nbytes = setup["size"], setup["nbytes"]
        mapped = _shared_memory(memory, memory_size(nbytes, size))
        member = Member(rank, size, mapped, nbytes, tuple(doorbells), {0: to_parent}, parent)
        try:
            # What overflows in a worker is no warning there: whoever uses the sums of all ranks finds it.
            with np.errstate(all="ignore"):
                module, _, name = setup["build"].partition(":")
                program = getattr(importlib.import_module(module), name)(member, **setup["arguments"])
                member.barrier()
                for line in lines:
                    program.run(json.loads(line))
                    member.barrier()
        except PeerGone:
            raise
        except BaseException:
            with contextlib.suppress(OSError):  # the parent has gone
                to_parent.sendall(traceback.format_exc().encode())
            sys.exit(1)


def _lines(link: socket.socket, parent: int) -> Iterator[str]:
    """The lines that come through ``link``, until its end or that of the process ``parent``."""
    link.settimeout(LOOK_AROUND)
    received = b""
    while os.getppid() == parent:
        try:
            part = link.recv(1 << 16)
        except TimeoutError:
            continue
        except ConnectionError:
            return
        if not part:
            return
        *lines, received = (received + part).split(b"\n")
        yield from (line.decode() for line in lines)


def _environment() -> dict[str, str]:
    """The environment for a worker: this process's, where it imports from, and one thread for BLAS."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, **dict.fromkeys(_BLAS_THREADS, "1"), **_KEPT_MEMORY}


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process that is started meanwhile is born with the ending signals blocked; one that comes here waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _one_blas_thread() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A function that makes a context in which this process's BLAS has one thread, if threadpoolctl can do that."""
    try:
        from threadpoolctl import ThreadpoolController

        controller = ThreadpoolController()
    except (ImportError, OSError):  # OSError: without /proc it may not find the libraries
        return contextlib.nullcontext
    return lambda: controller.limit(limits=1, user_api="blas")


def _open_standard_streams() -> None:
    """Open /dev/null where stdin, stdout or stderr is closed: else the memory would get its number.

    A worker has streams of its own under these numbers, and would find one of them in the memory's place.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _unnamed_file(length: int) -> int:
    """The descriptor of a new file of ``length`` zero bytes that has no name."""
    try:
        descriptor = os.memfd_create("minunet")
    except (AttributeError, OSError):  # not Linux; a sandbox or an old kernel, which refuses it
        with tempfile.TemporaryFile() as file:  # deleted as soon as it is open
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, length)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _shared_memory(descriptor: int, length: int) -> mmap.mmap:
    return _in_large_pages(mmap.mmap(descriptor, length))


def _private_memory(length: int) -> mmap.mmap:
    try:
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
        return _in_large_pages(mmap.mmap(-1, length, **flags))
    except OSError as error:
        raise MemoryError(f"no {length} bytes of memory: {error}") from None


def _in_large_pages(memory: mmap.mmap) -> mmap.mmap:
    """Ask for pages of 2 MiB: fewer places for the processor to look up.

    Linux gives them to private memory. To shared memory it does only where the system's setting for it,
    transparent_hugepage/shmem_enabled, says so, which by default it does not.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def usable_size(workers: int | None = None) -> tuple[int, str]:
    """How many processes a team should have, and why it is one, if it has to be: "" or a phrase.

    ``workers`` is taken as it is where teams can be. Without it: the physical cores that this process may use, by its
    affinity and by the quota of its control group, but no more than OMP_NUM_THREADS says, if that is set.

    Raises ValueError if ``workers`` is not in [1, 64].
    """
    if workers is not None and not 1 <= workers <= MOST:
        raise ValueError(f"workers must be in [1, {MOST}], got {workers}")
    if os.name != "posix":
        return 1, "processes share memory on Linux and macOS only"
    if not sys.executable or getattr(sys, "frozen", False):
        return 1, "this program has no Python of its own to start workers with"
    return workers or min(_physical_cores(), _quota(), _asked_for(), MOST), ""


def _physical_cores() -> int:
    """Cores, of which two hardware threads make one: the second adds little to matrix products."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, whose cores have one thread each
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _asked_for() -> int:
    """OMP_NUM_THREADS, by which people and batch systems say how many cores a program should take; MOST without it."""
    count = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": 4, and 2 in each of them
    return int(count) if count.isdecimal() and int(count) > 0 else MOST


def _quota() -> int:
    """The whole cores that control groups grant this process, at least 1; MOST without a limit."""
    return max(1, int(min(map(_quota_of, groups("cpu")), default=MOST)))


def _quota_of(folder: Path) -> float:
    """The cores of one control group: quota over period, both microseconds; MOST without a limit."""
    try:
        if (folder / "cpu.max").exists():  # version 2
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else MOST
    except (OSError, ValueError):  # no such file; "max"
        return MOST
