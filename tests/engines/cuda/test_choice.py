"""Which kernels a GPU gets: what becomes of kernels that are wrong, hang, crash or do not compile.

``cupy`` is here a file that says it is a Hopper GPU. The process that tries the kernels imports it, too, and there it
puts emulated kernels in their place, or behaves badly.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from minunet.engines.cuda import choice, trial
from minunet.engines.cuda.choice import Choice
from minunet.engines.cuda.programs import PRECISIONS
from minunet.engines.cuda.row3 import Row3Kernels
from minunet.engines.cuda.specification import SpecificationKernels
from tests import strict_cupy
from tests.engines.cuda.emulator import COMPILER, EmulatedKernels
from tests.implementations import gpu_capability

ANOTHER_TAP = ("weights.cu", "tap = rest / panels;", "tap = rest / panels * 0;")
THE_SAME_TILE_AGAIN = ("grad_weight_wgmma.cu", "at.next(p)", "void(0)")
WRONG_STEPS = {
    "no dropout": ("norm.cu", "if (pooled_bits) {", "if (false) {"),
    "half a gradient": ("optimizer.cu", "one_less_beta1 * g[i]", "one_less_beta1 * 0.5f * g[i]"),
}

emulated = pytest.mark.skipif(not COMPILER, reason="g++ is not here")


def emulated_kernels(precision, hopper, patches=()):
    """As a trial has them: on CuPy's arrays (the stand-in's), in one block."""
    made = EmulatedKernels(precision, patches=patches, hopper=hopper, xp=strict_cupy.module)
    made.device.multiprocessors = 1
    return made


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", strict_cupy.module)


@emulated
@pytest.mark.usefixtures("standin")
@pytest.mark.parametrize(("precision", "hopper"), [("float32", False), ("tf32", False), ("tf32", True)])  # bf16: below
def test_right_kernels_pass(precision, hopper):
    kernels, specification = emulated_kernels(precision, hopper), SpecificationKernels(np, precision)
    assert trial.convolution_distance(kernels, specification) <= trial.CONVOLUTION[precision]
    assert trial.step_distance(kernels, specification) <= trial.STEP[precision]


@emulated
@pytest.mark.usefixtures("standin")
def test_wrong_convolutions_fail():
    kernels = emulated_kernels("bf16", hopper=True, patches=[THE_SAME_TILE_AGAIN])
    assert trial.convolution_distance(kernels, SpecificationKernels(np, "bf16")) > 10 * trial.CONVOLUTION["bf16"]


@emulated
@pytest.mark.usefixtures("standin")
@pytest.mark.parametrize("patch", WRONG_STEPS.values(), ids=WRONG_STEPS)
def test_a_wrong_step_fails(patch):
    kernels = emulated_kernels("bf16", hopper=False, patches=[patch])
    assert trial.step_distance(kernels, SpecificationKernels(np, "bf16")) > 2 * trial.STEP["bf16"]


def test_a_nan_is_no_small_distance():
    class Wrong(SpecificationKernels):
        def conv3x3_grad_input(self, dy, weight, dx, mask=None):
            dx[...] = np.nan

    assert np.isnan(trial.convolution_distance(Wrong(np), SpecificationKernels(np)))


# --- The choice -----------------------------------------------------------------------------------------------------

#: What stands in for CuPy in the process that tries the kernels. It is imported when trial.py is ready to begin.
STAND_IN = """
import os, sys, time
from types import SimpleNamespace
from tests.engines.cuda.emulator import EmulatedKernels

def kernels(precision, hopper):
{behaviour}

class cuda:
    class Device:
        def __init__(self, number): self.number = number
        def use(self): assert self.number == 3
sys.modules["__main__"].CupyKernels = kernels
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A function that makes ``cupy`` a GPU of this capability, whose kernels behave so in the process of a trial."""

    def install(behaviour="raise AssertionError", capability="90", mode=0):
        module = ModuleType("cupy")
        attributes = {"ComputeMode": mode, "MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 232448}
        device = SimpleNamespace(compute_capability=capability, id=3, attributes=attributes)
        module.cuda = SimpleNamespace(Device=lambda: device)
        monkeypatch.setitem(sys.modules, "cupy", module)
        code = STAND_IN.format(behaviour=textwrap.indent(textwrap.dedent(behaviour), "    "))
        (tmp_path / "cupy.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


@emulated
def test_right_kernels_are_chosen(gpu):
    gpu("return EmulatedKernels(precision, hopper=hopper)")
    assert choice.choose("bf16") == Choice("wgmma")


@emulated
def test_where_those_of_hopper_are_wrong_the_others_are_taken(gpu):
    gpu(f"return EmulatedKernels(precision, patches=[{ANOTHER_TAP}] * hopper, hopper=hopper)")
    name, reason = choice.choose("bf16")
    assert name == "mma.sync"
    found = re.fullmatch(r"the wgmma kernels are wrong on this GPU: a small convolution is (\S+) off", reason)
    assert float(found[1]) > 10 * trial.CONVOLUTION["bf16"]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("time.sleep(10**6)", "did not come to an end within 1 s of work"),
        ("while True: pass", "did not come to an end within 1 s of work"),
        ("os.abort()", "ended their process (exit code -6)"),
        ("sys.exit('no GPU')", "ended their process (exit code 1, no GPU)"),
        (
            "raise RuntimeError('an illegal address\\nand more')",
            "cannot be compiled, loaded or run (an illegal address)",
        ),
        ("raise RuntimeError", "cannot be compiled, loaded or run (RuntimeError)"),
    ],
    ids=["sleep for ever", "work for ever", "crash", "exit", "error", "error without a message"],
)
def test_kernels_that_do_not_run(gpu, monkeypatch, behaviour, reason):
    if "an end" in reason:
        monkeypatch.setattr(choice, "SECONDS", 1)
    gpu(behaviour)
    assert choice.choose("tf32") == Choice("row3", f"the wgmma kernels {reason}; the mma.sync kernels {reason}")
    assert choice.choose("float32") == Choice("row3", f"the mma.sync kernels {reason}")


@pytest.mark.parametrize(
    ("work", "ends"), [((0.0, False), True), ((0.0, True), False), (None, False)], ids=["no core", "sleep", "work"]
)
def test_a_trial_that_waits_for_a_core_has_all_the_time(monkeypatch, tmp_path, work, ends):
    """It ends after 200 looks; to have no core counts for nothing, and the limit is 10 looks of work or of sleep."""
    monkeypatch.setattr(choice, "LOOK", 0.01)
    monkeypatch.setattr(choice, "SECONDS", 0.1)
    looks = []

    def work_of(process):
        looks.append(process)
        if len(looks) == 200:
            (tmp_path / "end").touch()
        return (0.01 * len(looks), False) if work is None else work

    monkeypatch.setattr(choice, "_work_of", work_of)
    code = "import os, time\nwhile not os.path.exists('end'): time.sleep(0.01)\nprint('done')"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, text=True, **pipes) as process:
        said = choice._said(process)
        process.kill()
    assert said == (("done\n", "") if ends else None)
    assert (len(looks) >= 200) == ends


def test_the_work_of_a_process():
    if not Path("/proc/self/stat").exists():
        pytest.skip("there is no /proc to look in")
    had, sleeps = choice._work_of(os.getpid())
    assert not sleeps
    assert had == pytest.approx(sum(os.times()[:2]), abs=1)
    assert choice._work_of(2**30) == (0.0, True)


def test_an_older_gpu_is_told(gpu):
    gpu(capability="75")
    assert choice.choose("tf32") == Choice("row3", "the kernels need compute capability 8.0, this GPU has 7.5")


def test_a_trial_that_cannot_begin_is_told(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert choice.choose("float32").reason.startswith("the mma.sync kernels could not be tried (")


def test_a_gpu_of_one_process_is_tried_in_this_one(gpu, monkeypatch):
    gpu(mode=3)
    monkeypatch.setattr(choice, "what_is_wrong", lambda precision, name: None if name == "mma.sync" else "are wrong")
    assert choice.choose("tf32") == Choice("mma.sync", "the wgmma kernels are wrong")


def test_without_cupy_large_products_are_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert choice.choose("tf32").reason.startswith("there is no CuPy (")


@pytest.mark.parametrize(("precision", "switch"), [("tf32", "1"), ("float32", "0")])
def test_large_products_are_tf32_where_that_is_asked_for(monkeypatch, precision, switch):
    monkeypatch.setenv("CUPY_TF32", "as it was")
    made = choice.make(np, precision, Choice("row3"))
    assert (type(made), made.precision) == (Row3Kernels, precision)
    assert os.environ["CUPY_TF32"] == switch


@pytest.mark.parametrize("found", ["wgmma", "mma.sync"])
def test_the_chosen_kernels_are_made(monkeypatch, found):
    monkeypatch.setattr(choice, "CupyKernels", lambda precision, hopper: (precision, hopper))
    assert choice.make(np, "bf16", Choice(found)) == ("bf16", found == "wgmma")


@pytest.mark.parametrize("name", ["ComputeMode", "MultiProcessorCount", "MaxSharedMemoryPerBlockOptin"])
def test_cupy_knows_what_a_gpu_is_asked(name):
    """``Device.attributes`` has them under these names. It needs a GPU; its list of names does not."""
    assert hasattr(pytest.importorskip("cupy").cuda.runtime, f"cudaDevAttr{name}")


@pytest.mark.skipif(gpu_capability() < 80, reason="no GPU that runs the kernels is here")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gpu_here_gets_its_best(precision):
    best = "wgmma" if gpu_capability() == 90 and precision != "float32" else "mma.sync"
    assert choice.choose(precision) == Choice(best)
