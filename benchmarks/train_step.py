"""A whole training step of minunet against PyTorch eager: checked, then timed side by side, then weighed.

    python benchmarks/train_step.py                                     every case; about half an hour on two cores
    python benchmarks/train_step.py --case 16x128 --quick               one case, a few steps: does it run at all
    python benchmarks/train_step.py --torch-python /path/to/python      PyTorch lives in another environment

For each case, and 1 and 2 cores, minunet and PyTorch (channels last, and NCHW) each get a process of their own, with
the same weights, images and masks (benchmarks/peers.py). Then:

1. *Checked.* The gradients of minunet and PyTorch at the first weights are compared, parameter by parameter, with
   minunet's dropout masks in both: the distance of the two as vectors, over the length of PyTorch's. In float32 a ReLU
   whose input lies within rounding of 0 may flip, which moves single values by far more than rounding: so no value is
   compared by itself, and the bound is 3 %. The table has the largest distance of minunet from PyTorch (NCHW), and, to
   measure it by, that of PyTorch's two layouts from each other.
2. *Timed.* In each round every peer takes a step that does not count, to warm up, and then some that do, while the
   others sleep. A round's ratio is PyTorch's median time over minunet's, for PyTorch's layout that is faster over all
   rounds; the table has the median of the rounds' ratios, the smallest and the largest. Above 1 minunet is faster.
3. *Weighed.* In new processes, one after the other, so that they share no library in memory: the largest sum, over the
   peer's processes, of the proportional set size (PSS) that /proc/PID/smaps_rollup gives, looked at all the time during
   three steps. It counts everything: interpreter, libraries, weights, buffers. For PyTorch, of the layout that counts.

Linux only (it reads /proc). ``--json FILE`` keeps all single times.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from minunet.base import cli

ROOT = Path(__file__).parents[1]
#: name, width of the first level, pixels a side, images a batch, training
CASES = {
    "16x128": {"width": 16, "size": 128, "batch": 8, "training": True},
    "32x224": {"width": 32, "size": 224, "batch": 4, "training": True},
    "64x224": {"width": 64, "size": 224, "batch": 2, "training": True},
    "infer-1": {"width": 32, "size": 256, "batch": 1, "training": False},
    "infer-8": {"width": 32, "size": 256, "batch": 8, "training": False},
}
BOUND = 0.03  # of the distance of gradients, see above
LAYOUTS = ("channels-last", "nchw")


class Process:
    """A peer in a process of its own, which ends with the ``with`` block, however that ends."""

    def __init__(self, kind: str, python: str, case: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment.pop(name, None)  # each takes the cores it is given
        self._kind = kind
        with on_cores(case["cores"]):
            self._process = subprocess.Popen(
                [python, str(ROOT / "benchmarks" / "peers.py"), kind, json.dumps(case)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        try:
            self.version: str = self._read()
        except BaseException:
            self.kill()
            raise

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self._kind} ended with code {self._process.wait()}")
        return json.loads(line)

    def pss(self) -> int:
        """The proportional set size of this process and all that it has started, in bytes."""
        return sum(pss(process) for process in tree(self._process.pid))

    def close(self) -> None:
        self._process.communicate()

    def kill(self) -> None:
        """End it at once; what it has started sees that it is gone, and leaves."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """A process that is started meanwhile has the first ``count`` cores: BLAS counts them when it is loaded."""
    cores = os.sched_getaffinity(0)
    if count > len(cores):
        raise SystemExit(f"--cores: {count} asked for, and this process has {len(cores)}")
    os.sched_setaffinity(0, sorted(cores)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def tree(process: int) -> Iterator[int]:
    """A process and its descendants."""
    yield process
    with contextlib.suppress(OSError):  # it has just ended
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from tree(int(child))


def pss(process: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


def check(peers: dict[str, Process]) -> dict[str, float]:
    """The largest distance of minunet's gradients from NCHW's, and of channels last's; SystemExit if too far."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: str(Path(folder) / kind) for kind in peers}
        shapes = {kind: peer.ask(gradients=files[kind]) for kind, peer in peers.items()}
        for kind in ("minunet", "channels-last"):
            if shapes[kind] != shapes["nchw"]:
                raise SystemExit("minunet and PyTorch have different parameters")
            distances = peers["minunet"].ask(compare=[files[kind], files["nchw"]], shapes=shapes[kind])
            worst = max(distances, key=lambda name: distances[name])
            found[kind] = distances[worst]
            if kind == "minunet" and not found[kind] <= BOUND:
                raise SystemExit(f"{worst}: minunet and PyTorch are {found[kind]:.2g} apart, above {BOUND}")
    return found


def run(case: dict[str, Any], torch_python: str, rounds: int, steps: int) -> dict[str, Any]:
    """Check, time and weigh one case."""
    pythons = {"minunet": sys.executable, **dict.fromkeys(LAYOUTS, torch_python)}
    with contextlib.ExitStack() as scope:
        peers = {kind: scope.enter_context(Process(kind, python, case)) for kind, python in pythons.items()}
        distances = check(peers)
        for peer in peers.values():
            peer.ask(steps=2)
        times: dict[str, list[list[float]]] = {kind: [] for kind in peers}
        for _ in range(rounds):
            for kind, peer in peers.items():
                peer.ask(steps=1)
                times[kind].append(peer.ask(steps=steps))
        versions = {kind: peer.version for kind, peer in peers.items()}
        for peer in peers.values():
            peer.close()
    medians = {kind: [statistics.median(seconds) for seconds in parts] for kind, parts in times.items()}
    best = min(LAYOUTS, key=lambda kind: statistics.median(medians[kind]))
    ratios = [theirs / ours for ours, theirs in zip(medians["minunet"], medians[best], strict=True)]
    return {
        "case": case,
        "versions": versions,
        "distances": distances,
        "layout": best,
        "seconds": times,
        "milliseconds": {kind: 1e3 * statistics.median(values) for kind, values in medians.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "bytes": {kind: weigh(kind, pythons[kind], case) for kind in ("minunet", best)},
    }


def weigh(kind: str, python: str, case: dict[str, Any]) -> int:
    """The largest PSS of a new peer during three steps, in bytes."""
    with Process(kind, python, case) as peer:
        seen, done = [peer.pss()], threading.Event()

        def watch() -> None:
            while not done.is_set():
                seen.append(peer.pss())
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            peer.ask(steps=3)
        finally:
            done.set()
            watcher.join()
        peer.close()
    return max(seen)


def row(result: dict[str, Any]) -> str:
    case, spent, weight = result["case"], result["milliseconds"], result["bytes"]
    ours, theirs = weight["minunet"], weight[result["layout"]]
    cells = [
        case["name"] + (f", dropout {case['dropout']:g}" if case["dropout"] else ""),
        str(case["cores"]),
        f"{spent['minunet']:.0f}",
        f"{spent['channels-last']:.0f}",
        f"{spent['nchw']:.0f}",
        f"{result['ratio']:.2f} ({min(result['ratios']):.2f} to {max(result['ratios']):.2f})",
        f"{ours / 1e6:.0f}",
        f"{theirs / 1e6:.0f}",
        f"{ours / theirs:.2f}",
        f"{result['distances']['minunet']:.1e} ({result['distances']['channels-last']:.1e})",
    ]
    return "| " + " | ".join(cells) + " |"


COLUMNS = "case|cores|minunet ms|channels last ms|NCHW ms|ratio (of rounds)|minunet MB|PyTorch MB|memory|gradients"
HEAD = f"| {COLUMNS.replace('|', ' | ')} |\n|{'---|' * (COLUMNS.count('|') + 1)}"


def machine() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return (
        f"{date.today().isoformat()}, {name}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="one case; may be repeated (default: all)")
    parser.add_argument("--cores", action="append", type=int, help="1 or 2; may be repeated (default: both)")
    parser.add_argument("--dropout", action="append", type=float, help="may be repeated (default: 0 and 0.3)")
    parser.add_argument("--engine", choices=("auto", "plain"), default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round")
    parser.add_argument("--quick", action="store_true", help="two rounds of one step")
    parser.add_argument("--torch-python", default=sys.executable, help="the interpreter that has PyTorch")
    parser.add_argument("--json", type=Path, help="write every time there")
    options = parser.parse_args(arguments)
    rounds, steps = (2, 1) if options.quick else (options.rounds, options.steps)
    results: list[dict[str, Any]] = []
    for name in options.case or CASES:
        for cores in options.cores or (1, 2):
            for dropout in options.dropout or (0.0, 0.3):
                if dropout and not CASES[name]["training"]:
                    continue
                case = {"name": name, **CASES[name], "dropout": dropout, "cores": cores, "engine": options.engine}
                result = run(case, options.torch_python, rounds, steps)
                if not results:
                    print(f"{machine()}; {'; '.join(dict.fromkeys(result['versions'].values()))}\n\n{HEAD}")
                results.append(result)
                print(row(result), flush=True)
                if options.json:
                    options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
