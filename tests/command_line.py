"""The command lines as people run them: a process of its own, real files, and what it says and leaves behind."""

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from minunet.base.archive import load, sha256_of_arrays
from minunet.data import phantom
from tests import fork_server

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
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

#: For ``before``: the pictures are not drawn, which takes longer than a small training does; their files are written.
NO_PICTURES = """
from minunet.base.durable import write_durably
from minunet.results import plots
plots._save = lambda figure, path: write_durably(path, lambda file: file.write(b"a picture"))
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


def run(script, *arguments, cwd, before="", env=None, fresh=False, timeout=600):
    """Run the command to its end: in a fork of a process that has imported what it needs (tests/fork_server.py).

    That is on one core. In a process of its own, on all cores, it runs with ``fresh=True``, which is for tests of the
    start and of engines of several processes; with an ``env`` that an import may read; and beside Linux.
    """
    if fresh or not set(env or ()) <= {"TMPDIR"} or not sys.platform.startswith("linux"):
        done = subprocess.run(
            command(script, *arguments, before=before),
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
        )
        return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())
    request = {
        "argv": [str(EXAMPLES / f"{script}.py"), *map(str, arguments)],
        "cwd": str(cwd),
        "before": before,
        "env": {**os.environ, **(env or {}), **fork_server.ENVIRONMENT},
        "timeout": timeout,
    }
    server = _fork_server(os.getpid())
    (out, its_out), (err, its_err) = os.pipe(), os.pipe()
    with Path(os.devnull).open() as its_in:
        socket.send_fds(server, [json.dumps(request).encode()], [its_in.fileno(), its_out, its_err])
    os.close(its_out)
    os.close(its_err)
    with os.fdopen(out, "rb") as out, os.fdopen(err, "rb") as err, ThreadPoolExecutor(2) as readers:
        said = readers.map(lambda pipe: pipe.read().decode(), (out, err))
        return Ended(int(server.recv(16)), *said)


@functools.cache
def _fork_server(_process):
    """The socket of this process's fork server, which is started when the first command asks for it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    python = [sys.executable, "-W", "error", "-m", "tests.fork_server"]
    environment = {**os.environ, **fork_server.ENVIRONMENT}
    # No stream of it can seek, as those of its forks cannot; and what goes wrong in it arrives here.
    server = subprocess.Popen(python, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    theirs.close()

    def end():
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


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
