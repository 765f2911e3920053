"""Which kernels this GPU gets: the fastest that load, come to an end, and are right on it; and the engine with them.

The kernels use instructions that the tests without a GPU only imitate, and GPUs come that nobody has tried them on. A
wrong gradient does not stop a training, it spoils it; a kernel that waits for ever cannot be stopped from Python; and
one that reads where it must not takes the GPU away from its whole process. So before the first step trial.py tries
them, in a process of its own. If the kernels for Hopper (wgmma) fail, those for every GPU since Ampere (mma.sync) are
tried, and if they fail too, large matrix products remain (row3.py).
"""

import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from minunet.base.backend import Gpu, array_module, current_gpu, gpu_array_module
from minunet.engines.cuda.engine import CudaEngine, step_bytes, takes
from minunet.engines.cuda.kernels import CupyKernels
from minunet.engines.cuda.row3 import Row3Kernels
from minunet.engines.cuda.specification import SpecificationKernels
from minunet.engines.cuda.trial import what_is_wrong
from minunet.engines.memory import StepBytes
from minunet.network.loss import Loss, SegmentationLoss
from minunet.network.unet import UNet

#: How long a trial may work or wait for the GPU. Most of it is the compiler, the first time: some ten seconds.
SECONDS = 60
LOOK = 1.0  # seconds between two looks at what it does


class Choice(NamedTuple):
    """What to launch, and why nothing faster."""

    kernels: str  # "wgmma", "mma.sync" or "row3"
    reason: str | None = None


def unsupported(net: UNet, loss: Loss, max_batch: int, image_size: tuple[int, int], precision: str) -> str | None:
    """Why the engine cannot take this network, or not in this precision on this GPU; or None."""
    reason = takes(net, loss)
    if reason is None and precision == "bf16" and (chosen := choose(precision)).kernels == "row3":
        return f"bf16 needs the engine's own kernels: {chosen.reason}"
    return reason


def build(net: UNet, loss: Loss, max_batch: int, image_size: tuple[int, int], precision: str) -> CudaEngine:
    """The engine with the kernels that :func:`choose` finds."""
    assert isinstance(loss, SegmentationLoss)  # unsupported lets no other pass
    chosen = choose(precision)
    kernels = make(array_module(net.head.weight), precision, chosen)
    return CudaEngine(net, loss, max_batch, image_size, kernels, chosen.reason)


def step_bytes_here(precision: str) -> StepBytes:
    """:func:`minunet.engines.cuda.engine.step_bytes` for the kernels that an engine would have here."""
    return partial(step_bytes, precision=precision, row3=choose(precision).kernels == "row3")


def choose(precision: str) -> Choice:
    """The kernels for a precision on the current GPU. Tried once a process."""
    try:
        return _tried(gpu_array_module(), precision)
    except ImportError as error:
        return Choice("row3", f"there is no CuPy ({error})")


def make(xp: ModuleType, precision: str, chosen: Choice) -> SpecificationKernels:
    """The chosen kernels."""
    if chosen.kernels != "row3":
        return CupyKernels(precision, hopper=chosen.kernels == "wgmma")
    # CuPy's own switch for float32 products on tensor cores. It looks at it once, before its first product.
    os.environ["CUPY_TF32"] = "1" if precision == "tf32" else "0"
    return Row3Kernels(xp, precision)


@cache
def _tried(xp: ModuleType, precision: str) -> Choice:
    """``xp`` is there for the cache: another CuPy is another GPU."""
    try:
        gpu = current_gpu()
    except Exception as error:  # CuPy raises several types: no driver, no device
        return Choice("row3", f"the GPU does not say what it is ({str(error).partition(chr(10))[0]})")
    if gpu.capability < 80:
        return Choice("row3", f"the kernels need compute capability 8.0, this GPU has {gpu.capability / 10:.1f}")
    reasons: list[str] = []
    for name in ("wgmma", "mma.sync") if gpu.capability == 90 and precision != "float32" else ("mma.sync",):
        # Where a GPU takes one process at a time, this one has it.
        why = what_is_wrong(precision, name) if gpu.exclusive else _in_a_process(precision, name, gpu)
        if why is None:
            return Choice(name, "; ".join(reasons) or None)
        reasons.append(f"the {name} kernels {why}")
    return Choice("row3", "; ".join(reasons))


def _in_a_process(precision: str, name: str, gpu: Gpu) -> str | None:
    """What is wrong with the kernels, or None, from a process that may hang or lose its GPU."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "minunet.engines.cuda.trial", precision, name, "--gpu", str(gpu.number)]
    try:
        with subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                said = _said(process)
            finally:
                process.kill()
    except OSError as error:
        return f"could not be tried ({error})"
    if said is None:
        return f"did not come to an end within {SECONDS} s of work"
    out, err = said
    if process.returncode == 0:
        return None
    if out:
        return out.strip()
    last = err.strip().rpartition("\n")[2]
    return f"ended their process (exit code {process.returncode}{', ' + last if last else ''})"


def _said(process: subprocess.Popen[str]) -> tuple[str, str] | None:
    """What a process has written to stdout and stderr when it ends; None if it has worked for ``SECONDS`` and goes on.

    On a busy machine it waits for a core most of the time, and that does not count: what counts is the time for which
    it has had a core, and the time in which it wants none, as when it waits for a kernel that does not end.
    """
    worked = before = 0.0
    while worked < SECONDS:
        try:
            return process.communicate(timeout=LOOK)
        except subprocess.TimeoutExpired:
            had, sleeps = _work_of(process.pid)
            worked += max(had - before, LOOK if sleeps else 0.0)
            before = had
    return None


def _work_of(process: int) -> tuple[float, bool]:
    """For how many seconds a process has had a core, and whether it sleeps: it does where the system says nothing."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # not Linux
        return 0.0, True
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] == "S"
