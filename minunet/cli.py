"""What the command lines share: flags and their checks, errors for people, signals, exit codes, the run folder.

An example has this shape::

    def main(arguments: list[str]) -> None:
        parser = cli.Parser(description="Train a U-Net.")
        parser.add_argument("--epochs", type=cli.positive_int, default=10)
        cli.add_device_argument(parser)
        options = parser.parse_args(arguments)
        device = cli.announce_device(options.device)
        with cli.run_folder(options.output) as folder, cli.StopRequest() as stop:
            for ...:                    # each step of the training
                if stop.requested:
                    ...                 # save the state, then leave the loop
        stop.exit_if_requested()

    if __name__ == "__main__":
        sys.exit(cli.run(main))

and leaves with one of these exit codes:

====  ==========================================================================================
0     done
1     a bug: the traceback is printed
2     something that the user or the machine's owner can put right: one line, ``error: ...``
3     training diverged (NaN or infinity): one line
130   Ctrl-C, after the state was saved
141   whoever read the output has closed it (``| head``): nothing is printed
143   SIGTERM, after the state was saved
====  ==========================================================================================

``--debug`` prints the traceback for codes 2 and 3 too.
"""

import argparse
import contextlib
import itertools
import math
import os
import reprlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from minunet.backend import resolve_device
from minunet.durable import TEMPORARY_NAME
from minunet.errors import Diverged, UserError

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None  # type: ignore[assignment]

DONE, BUG, USER_ERROR, DIVERGED = 0, 1, 2, 3
_BY_SIGNAL = 128  # the shell's rule: 128 + the number of the signal
_SIGPIPE = 13  # a name that the signal module lacks on Windows

_LOCK = ".lock"
_GRACE = 0.2  # seconds in which a second signal is an echo of the first: `timeout` and some wrappers send each twice


# ---------------------------------------------------------------------------------------------------------------------
# From exceptions to exit codes
# ---------------------------------------------------------------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """SIGTERM while :func:`run` is at work, outside of a :class:`StopRequest`: it ends a program as Ctrl-C does."""


def run(main: Callable[[list[str]], Any], arguments: Sequence[str] | None = None) -> int:
    """Call ``main(arguments)``, by default those of the command line, and return the exit code of the table above.

    What ``main`` returns is ignored. However it ends, open files are closed and temporary ones removed.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name that the terminal cannot show is escaped, not an error
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            with _handlers(_raise_terminated, signal.SIGTERM):
                main(arguments)
        finally:
            _flush_output()  # here, where a closed pipe is still caught
        return DONE
    except SystemExit as error:  # --help, StopRequest.exit_if_requested
        if not isinstance(error.code, int):
            raise
        return error.code
    except Terminated:
        return _say("stopped by SIGTERM", _BY_SIGNAL + signal.SIGTERM, debug)
    except KeyboardInterrupt:
        return _say("stopped by Ctrl-C", _BY_SIGNAL + signal.SIGINT, debug)
    except BrokenPipeError:
        return _BY_SIGNAL + _SIGPIPE
    except UserError as error:
        return _say(str(error), USER_ERROR, debug)
    except Diverged as error:
        return _say(str(error), DIVERGED, debug)
    except MemoryError as error:  # CuPy's is one too
        detail = f" ({error})" if str(error) else ""
        return _say(f"out of memory{detail}, use a smaller batch, image size or network", USER_ERROR, debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{where}{error.strerror or error}, put that right and try again", USER_ERROR, debug)
    except Exception:
        return _say("a bug in minunet, please report it with the lines above", BUG, traceback_too=True)


def _say(message: str, exit_code: int, traceback_too: bool) -> int:
    with contextlib.suppress(OSError):  # stderr may be closed as well
        if traceback_too:
            traceback.print_exc()
        print(f"error: {one_line(message)}", file=sys.stderr)
    return exit_code


def one_line(text: str) -> str:
    r"""``text`` with its line breaks and other control characters escaped: a file name may hold any of them.

    >>> print(one_line("a\nb.tif: empty"))
    a\nb.tif: empty
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _flush_output() -> None:
    """Print what stdout still holds back; if that fails, drop it, since Python would try again at exit and complain."""
    try:
        print(end="", flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


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
        return DONE if self._signal is None else _BY_SIGNAL + self._signal

    def exit_if_requested(self) -> None:
        """Leave the program with :attr:`exit_code`, if a signal has come."""
        if self.requested:
            raise SystemExit(self.exit_code)

    def __enter__(self) -> "StopRequest":
        self._scope.enter_context(_handlers(self._handle, signal.SIGINT, signal.SIGTERM))
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
            os._exit(_BY_SIGNAL + number)  # not an exception: whatever hangs could catch or delay it


def _write_error(text: bytes) -> None:
    if sys.stderr is not None:  # closed, its number may belong to another file by now
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), text)


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


@contextlib.contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
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


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser with ``--debug``, without abbreviations of flags, that raises UserError for a wrong one.

    >>> parser = Parser(description="Train.")
    >>> _ = parser.add_argument("--epochs", type=positive_int, default=10)
    >>> parser.parse_args([]).epochs
    10
    >>> parser.parse_args(["--epochs", "0"])
    Traceback (most recent call last):
        ...
    minunet.errors.UserError: --epochs: must be a whole number of at least 1, got '0', see --help
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """What argparse calls with what is wrong."""
        raise UserError(f"{message.removeprefix('argument ')}, see --help")


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argument type: whole numbers from ``low`` to ``high`` (2**31 - 1 if None)."""
    largest = 2**31 - 1 if high is None else high
    rule = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= largest:
            raise argparse.ArgumentTypeError(f"must be {rule}, got {reprlib.repr(text)}")
        return value

    return parse


def number(rule: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """An argument type: finite numbers for which ``holds``, which ``rule`` puts into words."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"must be a number {rule}, got {reprlib.repr(text)}")
        return value

    return parse


positive_int = integer(1)
non_negative_int = integer(0)
seed = integer(0, 2**63 - 1)
image_size = integer(8, 4096)  # sides in pixels; what the network's depth divides, the training checks
positive_float = number("greater than 0", lambda x: x > 0)
non_negative_float = number("of at least 0", lambda x: x >= 0)
fraction = number("of at least 0 and less than 1", lambda x: 0 <= x < 1)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--device auto|cpu|cuda`` to ``parser``."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (default): a GPU if there is one"
    )


def announce_device(name: str) -> str:
    """The device, "cpu" or "cuda", that ``--device name`` means; one line says why, if "auto" finds no GPU.

    Raises UserError if "cuda" is asked for and is not there.
    """
    device, reason = resolve_device(name)
    if reason is not None:
        print(f"device: cpu ({one_line(reason)})")
    return device


# ---------------------------------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_folder(path: str | os.PathLike[str], *, resume: bool = False) -> Iterator[Path]:
    """The folder of a run, locked against other runs until the ``with`` block or the process ends.

    A new run needs a folder that is empty or not there yet: a finished run is never overwritten. ``resume`` needs
    one that is there. Nothing is deleted but the temporary files that a kill during a save has left. Enter it when
    the other flags and the data have been checked: up to then, nothing is written.

    The lock is advisory (``flock`` on the file ``.lock``, which stays). Where there is none, on Windows and on some
    network file systems, two runs in one folder are not noticed.

    Raises UserError if the folder is in use, not empty, missing, a file, or cannot be written.
    """
    folder = Path(path)
    if resume and not folder.is_dir():
        raise UserError(f"{folder}: no such run folder, give the folder of the run to resume")
    with contextlib.ExitStack() as scope:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not resume:
                _check_empty(folder)
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
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
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
    """``parent/name``, or with -2, -3, ... the first of those that is not there yet: the default for a new run."""
    names = itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2)))
    return next(folder for folder in (Path(parent) / name for name in names) if not os.path.lexists(folder))
