"""Signals that end a program: a wish to stop, which a training loop asks for, or an exception.

They are Ctrl-C, SIGTERM, SIGHUP (the terminal was closed) and SIGUSR1 (a job scheduler's warning that time is up).
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn, TextIO

BY_SIGNAL = 128  # the shell's rule for exit codes: 128 + the number of the signal

#: The signals that end a program. Windows has no SIGHUP and no SIGUSR1.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))

#: What a :class:`StopRequest` calls when a signal comes. The team of an engine wakes its processes there: a step would
#: never end that waits for a process which somebody has stopped.
WAKE_UP: set[Callable[[], None]] = set()

_GRACE = 0.2  # seconds in which a second signal is an echo of the first: `timeout` and some wrappers send each twice


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C outside of a :class:`StopRequest`: it ends a program (``cli.run``) as Ctrl-C does."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.number = number


class StopRequest:
    """The signals of :data:`ENDING` as a wish: the training loop asks for it after each step, saves and leaves.

    A second signal, unless it comes as an echo of the first, leaves at once; the last saved state stays.

    >>> with StopRequest() as stop:
    ...     for step in range(1000):
    ...         if stop.requested:
    ...             break  # after saving the state
    ...         if step == 3:
    ...             signal.raise_signal(signal.SIGINT)
    >>> step, stop.exit_code
    (4, 130)
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._time = 0.0
        self._scope = contextlib.ExitStack()

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, such as 130 after Ctrl-C; 0 if none has come."""
        return 0 if self._signal is None else BY_SIGNAL + self._signal

    def exit_if_requested(self) -> None:
        """Leave the program with :attr:`exit_code`, if a signal has come."""
        if self.requested:
            raise SystemExit(self.exit_code)

    def __enter__(self) -> "StopRequest":
        self._scope.enter_context(handlers(self._handle, *ENDING))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scope.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        _forget_a_closed_terminal()
        for wake_up in list(WAKE_UP):
            wake_up()
        if self._signal is None:
            self._signal, self._time = number, time.monotonic()
            # os.write: the signal may have come in the middle of a print.
            write_error(b"\nstopping after this step, once the state is saved; again to leave at once\n")
        elif time.monotonic() - self._time > _GRACE:
            os._exit(BY_SIGNAL + number)  # not an exception: whatever hangs could catch or delay it


def write_error(text: bytes) -> None:
    """Write to stderr past Python's buffers: what a signal's handler may do, and what does not mix with a print."""
    if sys.stderr is not None:  # closed, its number may belong to another file by now
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), text)


def silence(stream: TextIO) -> None:
    """Let what is printed to ``stream`` from now on go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _forget_a_closed_terminal() -> None:
    """With SIGHUP the terminal may be gone. To print to it would be an error, and the run would end as a failed one."""
    for stream in (sys.stdout, sys.stderr):
        try:
            os.write(stream.fileno(), b"")
        except (AttributeError, ValueError):  # no stream; a notebook's, which is no file
            continue
        except OSError as error:
            if error.errno == errno.EIO:
                silence(stream)


def raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    """The handler that ends a program by an exception."""
    _forget_a_closed_terminal()
    raise Terminated(number)


@contextlib.contextmanager
def handlers(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Let ``handler`` answer the signals ``numbers``, and then those who did before.

    A signal that is ignored stays ignored: ``nohup`` starts a program so. But not Ctrl-C, which shells ignore for what
    they start in the background: whoever sends it to such a run means it.
    """
    if threading.current_thread() is not threading.main_thread():  # Python answers signals in the main thread only
        yield
        return
    taken = [n for n in numbers if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
