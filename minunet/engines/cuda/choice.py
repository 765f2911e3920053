"""Which kernels this GPU gets: the fastest that load, come to an end, and are right on it.

The kernels use instructions that the tests without a GPU only imitate, and GPUs come that nobody has tried them on. A
wrong gradient does not stop a training, it spoils it; a kernel that waits for ever cannot be stopped from Python; and
one that reads where it must not takes the GPU away from its whole process. So before the first step trial.py tries
them, in a process of its own. If the kernels for Hopper (wgmma) fail, those for every GPU since Ampere (mma.sync) are
tried, and if they fail too, large matrix products remain (row3.py).
"""

import importlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from minunet.engines.cuda.kernels import CupyKernels
from minunet.engines.cuda.row3 import Row3Kernels
from minunet.engines.cuda.specification import SpecificationKernels

#: How long a trial may take. Most of it is the compiler, the first time: some ten seconds.
SECONDS = 60

EXCLUSIVE_PROCESS = 3  # the compute mode of a GPU that takes one process at a time, by CUDA's numbers


class Choice(NamedTuple):
    """What to launch, and why nothing faster."""

    kernels: str  # "wgmma", "mma.sync" or "row3"
    reason: str | None = None


def choose(precision: str) -> Choice:
    """The kernels for a precision on the current GPU. Tried once a process."""
    try:
        return _tried(importlib.import_module("cupy"), precision)
    except ImportError as error:
        return Choice("row3", f"there is no CuPy ({error})")


def make(xp: ModuleType, precision: str) -> SpecificationKernels:
    """The kernels that :func:`choose` finds."""
    found = choose(precision).kernels
    if found != "row3":
        return CupyKernels(precision, hopper=found == "wgmma")
    # CuPy's own switch for float32 products on tensor cores. It looks at it once, before its first product.
    os.environ["CUPY_TF32"] = "1" if precision == "tf32" else "0"
    return Row3Kernels(xp, precision)


@cache
def _tried(cupy: ModuleType, precision: str) -> Choice:
    try:
        device = cupy.cuda.Device()
        capability, number = int(device.compute_capability), int(device.id)
        exclusive = device.attributes["ComputeMode"] == EXCLUSIVE_PROCESS
    except Exception as error:  # CuPy raises several types: no driver, no device
        return Choice("row3", f"the GPU does not say what it is ({str(error).partition(chr(10))[0]})")
    if capability < 80:
        return Choice("row3", f"the kernels need compute capability 8.0, this GPU has {capability / 10:.1f}")
    reasons: list[str] = []
    for name in ("wgmma", "mma.sync") if capability == 90 and precision != "float32" else ("mma.sync",):
        why = _in_this_process(precision, name) if exclusive else _in_a_process(precision, name, number)
        if why is None:
            return Choice(name, "; ".join(reasons) or None)
        reasons.append(f"the {name} kernels {why}")
    return Choice("row3", "; ".join(reasons))


def _in_a_process(precision: str, name: str, number: int) -> str | None:
    """What is wrong with the kernels, or None, from a process that may hang or lose its GPU."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "minunet.engines.cuda.trial", precision, name, "--gpu", str(number)]
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"did not come to an end within {SECONDS} s"
    except OSError as error:
        return f"could not be tried ({error})"
    if done.returncode == 0:
        return None
    if done.stdout:
        return done.stdout.strip()
    last = done.stderr.strip().rpartition("\n")[2]
    return f"ended their process (exit code {done.returncode}{', ' + last if last else ''})"


def _in_this_process(precision: str, name: str) -> str | None:
    """The same where a GPU takes one process at a time, and this one has it."""
    trial = importlib.import_module("minunet.engines.cuda.trial")  # which needs the engine, and the engine this file
    wrong: str | None = trial.what_is_wrong(precision, name)
    return wrong
