"""Kills trainings and saves at random moments, and says what was lost::

    python -m tests.tools.kill --runs 20 --saves 200 --engine auto

*Runs*: examples/train_lgg.py is killed by SIGKILL somewhere in its training, and resumed. Its last checkpoint has to
be that of the run that nobody killed, to the last bit. *Saves*: a process that does nothing but save one checkpoint
after the other over the same file is killed. The file has to load, and to be one that was saved.

A kill cannot show what a power cut does: the kernel lives on, and writes what it holds. tests/tools/crash_states.py
goes through what a power cut may leave.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from minunet import engines
from minunet.base import cli
from minunet.base.archive import load
from tests.command_line import SMALL, command, run, weights

TRAINING = (*SMALL, "--epochs", "4", "--output", "run")


class Killed(NamedTuple):
    """What came of a run that was killed."""

    epoch: int  # in which the last checkpoint before the kill was written
    same: bool  # whether the resumed run ended with the bits of the unbroken one
    engine: str  # the name of the engine that ran


def unbroken(folder: Path, engine: str) -> tuple[str, float]:
    """The SHA-256 of all that a run ends with that nobody kills, and the seconds of its training."""
    process = start(folder, engine)
    began = time.monotonic()
    finished = folder / "run" / "curves.png"  # the first file after the training
    while process.poll() is None and not finished.exists():
        time.sleep(0.01)
    seconds = time.monotonic() - began
    if process.wait() != 0:
        raise RuntimeError("the run that nobody kills has failed")
    return weights(folder / "run"), seconds


def start(folder: Path, engine: str) -> subprocess.Popen:
    """A training by ``engine``, auto or plain, in ``folder``, which has got as far as its first checkpoint."""
    folder.mkdir()
    process = subprocess.Popen(
        command("train_lgg", *TRAINING, "--engine", engine), cwd=folder, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not (folder / "run" / "last.npz").exists():
        time.sleep(0.002)
    return process


def kill_runs(scratch: Path, count: int, seed: int = 0, engine: str = "auto") -> Iterator[Killed]:
    """Kills ``count`` trainings, each at a moment of its own, and resumes them."""
    expected, seconds = unbroken(scratch / "unbroken", engine)
    moments = random.Random(seed)
    number = 0
    while number < count:
        folder = scratch / f"run{number}"
        process = start(folder, engine)
        time.sleep(moments.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        in_training = process.wait() == -signal.SIGKILL and not (folder / "run" / "curves.png").exists()
        if in_training:
            metadata = load(folder / "run" / "last.npz")[1]
            ended = run("train_lgg", "--resume", "run", "--quiet", cwd=folder, fresh=True)
            same = ended.code == 0 and weights(folder / "run") == expected
            yield Killed(metadata["progress"]["epoch"], same, metadata["engine"])
            number += 1
        else:
            folder.rename(scratch / f"late{time.monotonic_ns()}")  # the kill came after the training: once more


SAVER = """
import sys, time
import numpy as np
from minunet.base.archive import load, save
path, size = sys.argv[1], 300_000
number = load(path)[1]["number"]
print("saving", flush=True)
while True:
    number += 1
    save(path, {"a": np.full(size, number), "b": np.full(3, number)}, {"number": number})
"""


class Saves(NamedTuple):
    """What came of the kills during saves."""

    kills: int
    lost: int  # the file was gone, did not load, or was none that was saved
    in_a_write: int  # kills that left a temporary file: they came while a save was under way
    saved: int  # saves that were completed


def kill_saves(folder: Path, count: int, seed: int = 0) -> Saves:
    """Kills a process ``count`` times that saves over and over."""
    import numpy as np

    from minunet.base.archive import save

    path = folder / "last.npz"
    save(path, {"a": np.zeros(300_000, int), "b": np.zeros(3, int)}, {"number": 0})
    moments = random.Random(seed)
    lost = in_a_write = number = 0
    for _ in range(count):
        process = subprocess.Popen([sys.executable, "-c", SAVER, path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        try:
            arrays, metadata = load(path)
            number, before = metadata["number"], number
            lost += not (number >= before and (arrays["a"] == number).all() and (arrays["b"] == number).all())
        except Exception:
            lost += 1
        in_a_write += len(list(folder.glob(".*.minunet-tmp")))
        for entry in folder.glob(".*.minunet-tmp"):
            entry.unlink()
    return Saves(count, lost, in_a_write, number)


def main(arguments: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=cli.non_negative_int, default=20)
    parser.add_argument("--saves", type=cli.non_negative_int, default=200)
    parser.add_argument("--seed", type=cli.seed, default=0)
    parser.add_argument("--engine", choices=get_args(engines.EngineChoice), default="auto")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "saves").mkdir()
        saves = kill_saves(Path(scratch) / "saves", options.saves, options.seed)
        print(
            f"saves: {saves.kills} kills, {saves.lost} checkpoints lost; {saves.in_a_write} kills came within a save, "
            f"{saves.saved} saves were completed",
            flush=True,
        )
        results = []
        for result in kill_runs(Path(scratch), options.runs, options.seed, options.engine) if options.runs else ():
            results.append(result)
            print(
                f"run {len(results)}: {result.engine}, killed after epoch {result.epoch}, the same bits: {result.same}",
                flush=True,
            )
        same = sum(result.same for result in results)
        print(f"runs: {same} of {len(results)} resumed to the bits of the unbroken run")
    if saves.lost or same < len(results):
        sys.exit(1)


if __name__ == "__main__":
    if os.name != "posix":
        sys.exit("SIGKILL is of POSIX systems alone")
    sys.exit(cli.run(main))
