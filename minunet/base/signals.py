"""Ctrl-C and SIGTERM: a wish to stop, which a training loop asks for, or an exception that ends a program."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn

BY_SIGNAL = 128  # the shell's rule for exit codes: 128 + the number of the signal

_GRACE = 0.2  # seconds in which a second signal is an echo of the first: `timeout` and some wrappers send each twice


class Terminated(KeyboardInterrupt):
    """SIGTERM outside of a :class:`StopRequest`: it ends a program (``cli.run``) as Ctrl-C does."""


class StopRequest:
    """Ctrl-C and SIGTERM as a wish: the training loop asks for it after each step, saves its state and leaves.

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
        """130 after Ctrl-C, 143 after SIGTERM, else 0."""
        return 0 if self._signal is None else BY_SIGNAL + self._signal

    def exit_if_requested(self) -> None:
        """Leave the program with :attr:`exit_code`, if a signal has come."""
        if self.requested:
            raise SystemExit(self.exit_code)

    def __enter__(self) -> "StopRequest":
        self._scope.enter_context(handlers(self._handle, signal.SIGINT, signal.SIGTERM))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scope.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._time = number, time.monotonic()
            # os.write: the signal may have come in the middle of a print.
            _write_error(b"\nstopping after this step, once the state is saved; again to leave at once\n")
        elif time.monotonic() - self._time > _GRACE:
            os._exit(BY_SIGNAL + number)  # not an exception: whatever hangs could catch or delay it


def _write_error(text: bytes) -> None:
    if sys.stderr is not None:  # closed, its number may belong to another file by now
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), text)


def raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    """The handler that ends a program by an exception."""
    raise Terminated


@contextlib.contextmanager
def handlers(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Let ``handler`` answer the signals ``numbers``, and then those who did before."""
    if threading.current_thread() is not threading.main_thread():  # Python answers signals in the main thread only
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
