"""The two exceptions that are meant for people."""


class UserError(Exception):
    """Something the person at the keyboard can put right: a path, a flag, a file, a missing device.

    The message is one line: which file or flag, what was found, what to do. The command line prints it
    and leaves with exit code 2 (see ``minunet.base.cli``). A wrong argument in code is a ``ValueError`` instead.
    """


class Diverged(Exception):
    """Training has left the numbers: a loss, a gradient or a weight is NaN or infinite.

    The message says where it was found first; the command line prints it and leaves with exit code 3.
    """
