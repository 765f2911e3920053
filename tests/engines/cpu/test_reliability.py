"""The CPU engine in long runs and violent ends: no growth, nothing left behind, one line that says what happened."""

import contextlib
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minunet.base.signals import ENDING
from minunet.data import phantom
from minunet.data.augment import PRESETS
from minunet.data.normalize import Normalization
from minunet.engines.cpu.engine import CpuEngine
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from tests.command_line import NO_PICTURES, SMALL, command, progress, run
from tests.engines.cpu.cases import KEY, problem

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc of Linux")

ONE_WORKER = "import minunet.engines.cpu.engine as e; e.usable_size = lambda workers=None: (2, '')"


def children(process):
    """The processes that ``process`` has started and that are no zombies."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found += [int(word) for word in (task / "children").read_text().split()]
    return [child for child in found if alive(child)]


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def memory_of(processes):
    """Bytes that the processes have together: what two share is counted once (PSS).

    Without the pages of files, such as libraries: a process's part of those grows when another that uses them ends.
    """
    lines = [line for process in processes for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()]
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def descriptors(process):
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


@pytest.mark.parametrize("workers", [1, 2])
def test_500_steps_take_no_more_memory_and_no_more_files_than_50(workers):
    """An array of a step that stayed would be 32 KiB, 450 times: 14 MiB."""
    case = problem(4, (16, 16), widths=(8, 12), dtype="float32")
    with CpuEngine(case.net, SegmentationLoss(), 4, (16, 16), workers=workers) as engine:
        processes = [os.getpid(), *(process.pid for process in engine._team._workers._processes.values())]
        assert len(processes) == workers
        met = []
        for step in range(500):
            engine.loss_and_grads(case.x, case.target, KEY._replace(step=step))
            if step % 50 == 0:
                engine.predict(case.x)
            if step + 1 in (50, 500):
                met.append((memory_of(processes), [descriptors(process) for process in processes]))
    (memory_50, files_50), (memory_500, files_500) = met
    assert 2**20 < memory_500 <= memory_50 + 5 * 2**20
    assert files_500 == files_50


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how other C libraries keep memory is not ours to say")
def test_a_worker_prepares_batches_in_memory_that_it_has():
    """Memory that came anew for each image would be some 300 pages, 80 times."""
    slices = phantom.make(patients=1, size=128, seed=1)
    statistics = Normalization().statistics(slices)
    options = {"augmentation": PRESETS["mild"], "key": KEY}
    with CpuEngine(UNet(widths=(2, 3)), SegmentationLoss(), 8, (128, 128), workers=2) as engine:
        (worker,) = engine._team._workers._processes.values()
        met = []
        for step in range(30):
            engine.prepare_batch(slices, statistics, np.arange(8), **options)
            if step + 1 in (10, 30):
                minor_faults = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[7]
                met.append(int(minor_faults))
    assert met[1] - met[0] < 1000


def training(folder, before=""):
    """A training of two processes that has written its first checkpoint, and its worker."""
    process = subprocess.Popen(
        command("train_lgg", *SMALL, "--epochs", "200", "--output", "run", before=ONE_WORKER + before),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert wait_until(lambda: process.poll() is not None or (folder / "run" / "last.npz").exists(), 600)
    assert process.poll() is None, process.stderr.read()
    (worker,) = children(process.pid)
    return process, worker


def test_a_worker_that_is_killed_ends_the_training_with_one_line(tmp_path):
    process, worker = training(tmp_path)
    os.kill(worker, signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2
    (line,) = err.strip().splitlines()
    assert line.startswith(f"error: worker 1 (process {worker}) was killed by SIGKILL, ")
    assert "engine: cpu, 2 processes" in out
    assert not alive(worker)
    assert (tmp_path / "run" / "last.npz").exists()


def test_workers_leave_when_the_training_is_killed(tmp_path):
    process, worker = training(tmp_path)
    process.kill()
    process.communicate(timeout=600)
    assert wait_until(lambda: not alive(worker), 60)


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_one_signal_ends_a_training_that_waits_for_a_stopped_worker(tmp_path, number):
    process, worker = training(tmp_path, "; import minunet.engines.cpu.member as m; m.LATE = 2")
    os.kill(worker, signal.SIGSTOP)
    expected = f"waiting for worker 1 (process {worker}) for 30 s; if it is stopped, "
    while not (line := process.stderr.readline()).startswith(expected):
        # On a busy machine a worker that nobody has stopped may be late, too: the self-check's, say.
        assert line == "\n" or line.startswith("waiting for worker 1 "), line
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    said = [line for line in err.splitlines() if line and not line.startswith("waiting for worker 1 ")]
    assert said == ["stopping after this step, once the state is saved; again to leave at once"]
    assert "go on with: python" in out
    assert not alive(worker)
    saved = progress(tmp_path / "run")
    assert (saved["epoch"], saved["step"]) > (0, 0)  # the step that waited was finished and saved


NO_MEMFD = "; import os\ndef refuse(name): raise OSError({number}, 'refused')\nos.memfd_create = refuse"
NO_STDIN = "; import os; os.close(0)"


@pytest.mark.parametrize("before", [NO_MEMFD.format(number=1), NO_MEMFD.format(number=38), NO_STDIN])
def test_no_memfd_and_no_stdin_cost_no_process(tmp_path, before):
    ended = run("train_lgg", *SMALL, "--epochs", "1", cwd=tmp_path, before=NO_PICTURES + ONE_WORKER + before)
    assert (ended.code, ended.err) == (0, "")
    assert "engine: cpu, 2 processes\n" in ended.out


@pytest.mark.parametrize(
    ("arguments", "variable", "processes"),
    [
        ((), "", "3 processes"),
        ((), "2", "2 processes"),
        (("--cores", "1"), "2", "1 process"),
        (("--cores", "9"), "1", "3 processes"),
    ],
)
def test_fewer_processes_can_be_asked_for(tmp_path, arguments, variable, processes):
    before = f"""
import os, sys
import minunet.engines.cpu.team as t
from minunet.training import loop
os.environ["OMP_NUM_THREADS"] = "{variable}"
t._physical_cores = t._quota = lambda: 3
loop.fit = lambda engine, *others, **options: sys.exit(0)  # the engine has started, and its team has shown its results
"""
    ended = run("train_lgg", *SMALL, "--epochs", "1", *arguments, cwd=tmp_path, before=before)
    assert (ended.code, ended.err) == (0, "")
    assert f"engine: cpu, {processes}\n" in ended.out


def test_a_prediction_with_fewer_cores(tmp_path):
    assert run("train_lgg", *SMALL, "--epochs", "1", cwd=tmp_path, before=NO_PICTURES).code == 0
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    code = (
        "import minunet.engines.cpu.team as t; t._physical_cores = t._quota = lambda: 3; import atexit\n"
        "sizes = []; usable = t.usable_size\n"
        "import minunet.engines.cpu.engine as e\n"
        "e.usable_size = lambda workers=None: sizes.append(usable(workers)[0]) or usable(workers)\n"
        "atexit.register(lambda: print('sizes', set(sizes)))"
    )
    arguments = ("runs/quick/best.npz", "a.png", "--output", "out", "--device", "cpu", "--cores", "1")
    ended = run("predict", *arguments, cwd=tmp_path, before=code)
    assert (ended.code, ended.err) == (0, "")
    assert "sizes {1}" in ended.out
