"""Runs the own tests of a module on a damaged copy of the project.

The command that uses this imports NumPy, SciPy, pytest and Hypothesis once, then forks for each trial: a fork takes
milliseconds, and the imports seconds. The project itself is imported only after the fork, from the copy.
"""

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[3]


def own_tests(module: str, where: str = "") -> list[str]:
    """The arguments with which pytest runs the tests that ``module`` (a path from the root) answers to.

    ``where`` is the function that is damaged: of the command ``python -m minunet.gradcheck``, its own tests will do.

    >>> own_tests("minunet/ops/relu.py")
    ['tests/ops/test_relu.py', 'tests/ops/test_contract.py', 'minunet/ops/relu.py', '-k', 'relu']
    """
    path = PurePosixPath(module)
    name, own = path.stem, f"tests/{path.parent.relative_to('minunet') / f'test_{path.stem}.py'}"
    contract = "tests/ops/test_contract.py"
    if name == "checks":
        # What an op, or the loss, asks of its arguments is tested where that is.
        tests = [
            own,
            *(f"tests/ops/test_{op}.py" for op in ("conv2d", "conv_transpose2d", "convolutions", "dice_loss")),
            "tests/network/test_loss.py",
        ]
        return [*tests, contract, "-k", "checks or conv or dice or loss"]
    losses = "dice_loss", "bce_with_logits", "softmax_cross_entropy"
    if name in (*losses, "loss"):
        tests = [*(f"tests/ops/test_{loss}.py" for loss in losses), "tests/network/test_loss.py"]
        return [*tests, contract, module, "-k", "loss or bce or softmax"]
    if name in ("conv2d", "conv_transpose2d"):
        return [own, "tests/ops/test_convolutions.py", contract, module, "-k", name]
    if path.parent.name == "ops":
        return [own, contract, module, "-k", name]
    if name == "gradcheck" and where.partition(".")[0] in ("everything", "main"):
        return [own, "-k", "command"]
    if name == "initializers":
        return ["tests/network/test_layers.py", module]
    if name in ("layers", "blocks"):
        return ["tests/network/test_layers.py", "tests/network/test_unet.py", module]
    return [own, module]


class Outcome(NamedTuple):
    """What became of a trial."""

    status: str  # killed: a test failed; survived: all passed; timeout; invalid: no import; error: no test ran
    test: str  # the first that failed; of an error, what was said last
    tests_run: int
    seconds: float


class Results:
    """Outcomes by key, in a file with one line of JSON each. The last line about a key holds."""

    def __init__(self, path: Path) -> None:
        self.path, self.outcomes = path, {}  # type: Path, dict[str, Outcome]
        if path.exists():
            for line in path.read_text().splitlines():
                key, *outcome = json.loads(line)
                self.outcomes[key] = Outcome(*outcome)

    def add(self, key: str, outcome: Outcome) -> None:
        self.outcomes[key] = outcome
        with self.path.open("a") as file:
            file.write(json.dumps([key, *outcome]) + "\n")


class Trial(NamedTuple):
    """The tests to run on the project when ``files`` (path from the root -> content) replace its own."""

    key: str
    files: dict[str, str]
    tests: list[str]
    seconds: float  # after which it counts as hanging


def run_trials(trials: Iterable[Trial], folder: Path, done: Callable[[Trial, Outcome], None], jobs: int = 1) -> None:
    """Run ``trials``, ``jobs`` at a time, each in a copy of the project under ``folder``, and tell ``done``.

    The working tree is never touched.
    """
    assert "minunet" not in sys.modules, "the copy must be imported, not the working tree"
    gc.freeze()  # what is imported by now need not be looked through for garbage in each child
    copies = tempfile.TemporaryDirectory(dir=folder)
    slots = [_Slot(Path(copies.name) / str(n)) for n in range(jobs)]
    waiting: Iterator[Trial] = iter(trials)
    try:
        free, exhausted = list(slots), False
        while True:
            while free and not exhausted:
                trial = next(waiting, None)
                if trial is None:
                    exhausted = True
                else:
                    free.pop().start(trial)
            busy = [slot for slot in slots if slot.trial is not None]
            if not busy:
                return
            for slot in busy:
                trial, outcome = slot.trial, slot.poll()
                if outcome is not None and trial is not None:
                    free.append(slot)
                    done(trial, outcome)
            time.sleep(0.01)
    finally:
        for slot in slots:
            slot.kill()
        copies.cleanup()


def run_undamaged(tests: list[str], folder: Path) -> Outcome:
    """Run ``tests`` on a copy as it is. Unless they pass, and any ran, no trial of them can mean anything."""
    outcomes: list[Outcome] = []
    run_trials([Trial("", {}, tests, 600)], folder, lambda _, outcome: outcomes.append(outcome))
    return outcomes[0]


class _Slot:
    """A copy of the project, and at most one child process that tests it."""

    def __init__(self, copy: Path) -> None:
        self.copy, self.trial = copy, None  # type: Path, Trial | None
        self.mtime = 1_000_000_000
        skip = shutil.ignore_patterns("__pycache__", ".*", "*.npz", "runs")
        for part in ("minunet", "tests", "examples", "docs"):
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, copy / part, ignore=skip)
        for part in ("pyproject.toml", "README.md"):
            shutil.copy2(ROOT / part, copy / part)

    def start(self, trial: Trial) -> None:
        self.trial, self.begin = trial, time.monotonic()
        self.kept = {path: ((self.copy / path).read_bytes(), (self.copy / path).stat()) for path in trial.files}
        for path, content in trial.files.items():
            # A time of change that no other version had: Python would run the other one's bytecode.
            self.mtime += 10
            (self.copy / path).write_text(content)
            os.utime(self.copy / path, (self.mtime, self.mtime))
        result = self.copy / "result.json"
        result.unlink(missing_ok=True)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            _child(self.copy, trial, result)
        with contextlib.suppress(OSError):  # the child may have done it already
            os.setpgid(self.pid, self.pid)

    def poll(self) -> Outcome | None:
        assert self.trial is not None
        seconds = time.monotonic() - self.begin
        ended, how = os.waitpid(self.pid, os.WNOHANG)
        if not ended:
            if seconds <= self.trial.seconds:
                return None
            self.kill()
            return Outcome("timeout", "", 0, round(seconds, 2))
        self._restore()
        try:
            found = json.loads((self.copy / "result.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            # A session that a signal ends (a crash, no memory) is a failing one; anything else is a fault of this file.
            status = "killed" if os.WIFSIGNALED(how) else "error"
            return Outcome(status, self._last_line(), 0, round(seconds, 2))
        if found["failed"]:
            status = "killed"
        elif found["broken"] and not found["ran"]:
            status = "invalid"
        else:
            status = "survived" if found["exit"] == 0 and found["ran"] else "error"
        test = self._last_line() if status == "error" else found["failed"] or found["broken"]
        return Outcome(status, test, found["ran"], round(seconds, 2))

    def kill(self) -> None:
        if self.trial is not None:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._restore()

    def _last_line(self) -> str:
        lines = (self.copy / "log.txt").read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")

    def _restore(self) -> None:
        for path, (content, stat) in self.kept.items():
            (self.copy / path).write_bytes(content)
            os.utime(self.copy / path, (stat.st_atime, stat.st_mtime))
        self.trial = None


class _Recorder:
    """A pytest plugin that remembers how many tests ran and the first one that failed."""

    def __init__(self) -> None:
        self.ran, self.failed, self.broken = 0, "", ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call"
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.broken:
            self.broken = report.nodeid


def _child(copy: Path, trial: Trial, result: Path) -> None:
    """In the forked process: run pytest in the copy, write what came of it, and leave without coming back."""
    import resource  # not on Windows, where there is no fork either

    try:
        resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
        log = os.open(copy / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.chdir(copy)
        os.environ.update(PYTHONPATH=str(copy), HYPOTHESIS_PROFILE="mutation")
        sys.path[:] = [str(copy)] + [place for place in sys.path if Path(place or ROOT).resolve() != ROOT]
        for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
            del sys.modules[name]
        recorder = _Recorder()
        options = ["-x", "-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider", "-c", "pyproject.toml"]
        ignore = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # Hypothesis was imported before the fork
        code = 0
        try:
            for path in trial.files:
                importlib.import_module(path.removesuffix(".py").replace("/", "."))
        except (Exception, SystemExit):
            traceback.print_exc()
            recorder.broken = "import"
        else:
            code = pytest.main([*options, f"--rootdir={copy}", *ignore, *trial.tests], plugins=[recorder])
        imported = sys.modules.get("minunet")
        if imported is not None:
            assert Path(str(imported.__file__)).is_relative_to(copy), imported.__file__
        found = {"exit": int(code), "ran": recorder.ran, "failed": recorder.failed, "broken": recorder.broken}
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(result)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(0)
