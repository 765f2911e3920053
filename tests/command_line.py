"""The command lines as people run them: a process of its own, real files, and what it says and leaves behind."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from minunet.base.archive import load, sha256_of_arrays
from minunet.data import phantom

EXAMPLES = Path(__file__).parents[1] / "examples"
#: A training of 16 x 16 pixels, which takes seconds.
SMALL = ("--preset", "quick", "--image-size", "16", "--quiet", "--device", "cpu")

#: For ``before``: the file of this name becomes a pipe in the moment in which it is opened.
BECOMES_A_PIPE = """
import os
from minunet.base import durable
def open_late(path, flags, opener=durable._open_without_waiting):
    if os.path.basename(path) == {!r} and os.path.isfile(path):
        os.unlink(path)
        os.mkfifo(path)
    return opener(path, flags)
durable._open_without_waiting = open_late
"""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def command(script, *arguments, before=""):
    """The command ``python examples/SCRIPT.py ARGUMENTS``; ``before`` is Python that the process runs first.

    That is how a test makes a weight NaN in mid-run, or fills the disk. All else is as on a command line, and a
    warning of Python or NumPy is an error.
    """
    path = str(EXAMPLES / f"{script}.py")
    python = [sys.executable, "-W", "error"]
    if not before:
        return [*python, path, *map(str, arguments)]
    code = f"{before}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    return [*python, "-c", code, path, *map(str, arguments)]


def run(script, *arguments, cwd, before="", env=None, timeout=600):
    """Run the command to its end."""
    done = subprocess.run(
        command(script, *arguments, before=before),
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout,
    )
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


def tree(folder):
    """Every file below ``folder`` with its bytes, and every folder, link, pipe with its kind.

    The lock of a run folder has the number of the process that tried last, and counts without it.
    """
    found = {}
    for place, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.relpath(Path(place, name), folder)] = "folder"
        for name in files:
            path = Path(place, name)
            regular = path.is_file() and not path.is_symlink()
            content = path.read_bytes() if regular else path.lstat().st_mode
            found[os.path.relpath(path, folder)] = b"" if name == ".lock" else content
    return found


def write_patients(folder, patients=12, size=16, every=3):
    """Synthetic patients as TIFFs in the layout of the download, every third slice of each."""
    slices = phantom.make(patients=patients, size=size, seed=3)
    phantom.write_kaggle(folder, slices.subset([i for i, n in enumerate(slices.numbers) if n % every == 0]))
    return folder


def weights(folder, name="last.npz"):
    """One SHA-256 of all that a checkpoint holds."""
    return sha256_of_arrays(load(Path(folder) / name)[0])


def progress(folder, name="last.npz"):
    """How far the run of a checkpoint had come."""
    return load(Path(folder) / name)[1]["progress"]
