"""The two exceptions that are meant for people."""

from collections.abc import Sequence


class UserError(Exception):
    """Something the person at the keyboard can put right: a path, a flag, a file, a missing device.

    The message is one line: which file or flag, what was found, what to do. The command line prints it
    and leaves with exit code 2 (see ``minunet.base.cli``). A wrong argument in code is a ``ValueError`` instead.
    ``faults`` are several things of one kind, which the command line lists below the message, each in a line.

    >>> print(UserError("data: 2 faults", ["a.tif: empty", "b.tif: empty"]))
    data: 2 faults: a.tif: empty; b.tif: empty
    """

    faults: Sequence[str] = ()

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.faults = faults

    def __str__(self) -> str:
        return super().__str__() + (": " + "; ".join(self.faults) if self.faults else "")


class Diverged(Exception):
    """Training has left the numbers: a loss, a gradient or a weight is NaN or infinite.

    The message says where it was found first; the command line prints it and leaves with exit code 3.
    """
