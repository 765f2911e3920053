"""Python processes that the tests start, talk to and wait for."""

import os
import subprocess
import sys

import pytest

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and locks as POSIX has them")


def start(script, *arguments):
    """A Python process that runs ``script``, its input and output in pipes."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], text=True, env=BUFFERED, **pipes)


def wait_for(process, line):
    """Read what ``process`` prints up to ``line``."""
    for found in process.stdout:
        if found == line + "\n":
            return
    raise AssertionError(process.stderr.read())


def finish(process):
    """Close the input; the exit code and what was printed to stderr."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors
