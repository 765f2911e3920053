"""How long the main job takes, how much memory, and how good it gets: examples/train_lgg.py, measured from outside.

    python benchmarks/main_job.py                                          the embedded default
    python benchmarks/main_job.py --data kaggle_3m --preset small          any other arguments of the example

Prints the example's own output, then one Markdown table: wall time, processor time, peak memory (the largest
resident set of the process), mean and median Dice per patient on the test patients with the 95 % bootstrap
interval of each, and the best Dice that any threshold on FLAIR reaches. Unix only (it reads the child's rusage).
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from minunet.base.environment import environment

SCRIPT = Path(__file__).parents[1] / "examples" / "train_lgg.py"


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        started = time.perf_counter()
        code = subprocess.call([sys.executable, str(SCRIPT), *arguments, "--output", str(folder)])
        wall = time.perf_counter() - started
        if code != 0:
            return code
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(table(json.loads((folder / "metrics.json").read_text()), arguments, wall, used))
    return 0


def table(scores: dict, arguments: list[str], wall: float, used: resource.struct_rusage) -> str:
    machine = environment()
    dice = scores["test"]["per_patient"]["summary"]["dice"]
    baseline = max(entry["mean_dice"] for entry in scores["best_flair_threshold"].values())
    peak = used.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    rows = {
        "date": date.today().isoformat(),
        "machine": f"{machine['cpu']}, {os.cpu_count()} cores",
        "versions": f"Python {machine['python']}, NumPy {machine['numpy']}, {machine['blas']}",
        "command": "train_lgg.py " + " ".join(arguments),
        "wall time": f"{wall:.0f} s",
        "processor time": f"{used.ru_utime + used.ru_stime:.0f} s",
        "peak memory": f"{peak:.2f} GiB",
        "test patients": str(scores["test"]["patients"]),
        "mean Dice per patient, 3-D": _with_interval(dice["mean"], dice["mean_interval"]),
        "median Dice per patient, 3-D": _with_interval(dice["median"], dice["median_interval"]),
        "best threshold on FLAIR, mean Dice": f"{baseline:.3f}",
    }
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _with_interval(value: float, interval: list[float]) -> str:
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
