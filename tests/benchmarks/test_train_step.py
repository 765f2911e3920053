"""The benchmark of the whole step, ended in the middle: its peers end with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minunet.base.signals import ENDING

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark is of Linux alone")

#: Peers that answer with their process and then never again; "torch" is this Python too.
PEERS = """
import json, os, sys, time
if len(sys.argv) > 1:
    print(json.dumps(str(os.getpid())), flush=True)
    time.sleep(10**6)
"""
BENCHMARK = """
import sys, os
sys.path.insert(0, os.path.join(sys.argv[1], "benchmarks"))
import train_step
from pathlib import Path
from minunet.base import cli
def check(peers):
    print(*(peer.version for peer in peers.values()), flush=True)
    peers["minunet"].ask(steps=1)
train_step.check, train_step.ROOT = check, Path(sys.argv[2])
sys.exit(cli.run(train_step.main, ["--case", "16x128", "--cores", "1"]))
"""


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_a_benchmark_that_is_ended_leaves_no_peers(tmp_path, number):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "peers.py").write_text(PEERS)
    process = subprocess.Popen(
        [sys.executable, "-c", BENCHMARK, ROOT, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peers = [int(word) for word in process.stdout.readline().split()]
    assert len(peers) == 3
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 128 + number, err
    assert err == f"error: stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}\n"
    assert not any(Path(f"/proc/{peer}").exists() for peer in peers)
