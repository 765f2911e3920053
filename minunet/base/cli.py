"""What the command lines share: flags and their checks, errors for people, exit codes.

A command has this shape::

    def main(arguments: list[str]) -> None:
        parser = cli.Parser(description="Train a U-Net.")
        parser.add_argument("--epochs", type=cli.positive_int, default=10)
        cli.add_device_argument(parser)
        options = parser.parse_args(arguments)
        device = cli.announce_device(options.device)
        with run_folder(options.output) as folder, StopRequest() as stop:  # base/run_folder.py, base/signals.py
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
2     something that the user or the machine's owner can put right: one line, ``error: ...``, and below it, if a
      data set has several faults, a line for each
3     training diverged (NaN or infinity): one line
129   SIGHUP (the terminal was closed), after the state was saved
130   Ctrl-C, after the state was saved
138   SIGUSR1 (a job scheduler's warning), after the state was saved; 158 on macOS, where it has another number
141   whoever read the output has closed it (``| head``): nothing is printed
143   SIGTERM, after the state was saved
====  ==========================================================================================

``--debug`` prints the traceback for codes 2 and 3 too.
"""

import argparse
import contextlib
import math
import reprlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args

from minunet.base.backend import Device, DeviceChoice, resolve_device
from minunet.base.errors import Diverged, UserError
from minunet.base.signals import BY_SIGNAL, ENDING, Terminated, handlers, raise_terminated, silence

DONE, BUG, USER_ERROR, DIVERGED = 0, 1, 2, 3
_SIGPIPE = 13  # a name that the signal module lacks on Windows


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
            with handlers(raise_terminated, *(number for number in ENDING if number != signal.SIGINT)):
                main(arguments)
        finally:
            _flush_output()  # here, where a closed pipe is still caught
        return DONE
    except SystemExit as error:  # --help, StopRequest.exit_if_requested
        if not isinstance(error.code, int):
            raise
        return error.code
    except Terminated as error:
        return _say(f"stopped by {signal.Signals(error.number).name}", BY_SIGNAL + error.number, debug)
    except KeyboardInterrupt:
        return _say("stopped by Ctrl-C", BY_SIGNAL + signal.SIGINT, debug)
    except BrokenPipeError:
        return BY_SIGNAL + _SIGPIPE
    except UserError as error:
        return _say(error.args[0], USER_ERROR, debug, error.faults)
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


def _say(message: str, exit_code: int, traceback_too: bool, below: Sequence[str] = ()) -> int:
    with contextlib.suppress(OSError):  # stderr may be closed as well
        if traceback_too:
            traceback.print_exc()
        print(f"error: {one_line(message)}", *map(one_line, below), sep="\n  ", file=sys.stderr)
    return exit_code


#: Of a longer message only so many characters at either end are printed: a file may have any text in it.
LONGEST_END = 2000


def one_line(text: str) -> str:
    r"""``text`` with its line breaks and other control characters escaped: a file name may hold any of them.

    >>> print(one_line("a\nb.tif: empty"))
    a\nb.tif: empty
    """
    if len(text) > 2 * LONGEST_END:
        text = f"{text[:LONGEST_END]} ... {text[-LONGEST_END:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _flush_output() -> None:
    """Print what stdout still holds back; if that fails, drop it, since Python would try again at exit and complain."""
    try:
        print(end="", flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            silence(sys.stdout)
        raise


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
    minunet.base.errors.UserError: --epochs: must be a whole number of at least 1, got '0', see --help
    """

    def __init__(self, **options: Any) -> None:
        keeps_lines = argparse.RawDescriptionHelpFormatter  # of the description: it shows commands
        super().__init__(**{"allow_abbrev": False, "formatter_class": keeps_lines, **options})
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """As argparse's, but no value may be empty: an unset variable would name the folder one is in."""
        found = super().parse_args(*arguments, **options)
        for name, value in vars(found).items():
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"--{name.replace('_', '-')}: must not be empty")
        return found

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


def name(text: str) -> str:
    """An argument type: a name of a few letters, for messages and pictures."""
    if not (text.strip() and text.isprintable() and len(text) <= 40):
        raise argparse.ArgumentTypeError(f"must be 1 to 40 printable letters, got {reprlib.repr(text)}")
    return text


def names(text: str) -> str:
    """An argument type: from 2 to 255 different names with commas between them, as they were given.

    >>> names("background,road").split(",")
    ['background', 'road']
    """
    parts = [name(part) for part in text.split(",")]
    if not 2 <= len(parts) <= 255 or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(
            f"must be 2 or more different names, such as background,road, got {text!r:.80}"
        )
    return text


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
        "--device", choices=get_args(DeviceChoice), default="auto", help="auto (default): a GPU if there is one"
    )


def announce_device(name: DeviceChoice) -> Device:
    """The device that ``--device name`` means; one line says why, if "auto" finds no GPU.

    Raises UserError if "cuda" is asked for and is not there.
    """
    device, reason = resolve_device(name)
    if reason is not None:
        print(f"device: cpu ({one_line(reason)})")
    return device
