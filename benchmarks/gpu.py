"""minunet on a GPU: is it right, how fast is it, and how fast could it be. One command for a fresh machine.

    python benchmarks/gpu.py                            all parts that need no data, within ten minutes on an H100
    python benchmarks/gpu.py --part step --batch 32     one part; others keep their last result
    python benchmarks/gpu.py --part reference --data kaggle_3m --preset best --epochs 30
    python benchmarks/gpu.py --dry-run                  tiny sizes and no GPU: does the command itself work

It needs CuPy, pytest for the tests, and PyTorch for the comparison; it downloads nothing. Each part runs in a process
of its own with a time limit, so that one that fails or hangs costs only itself, and leaves DIR/PART.json; at the end
DIR/report.md and DIR/report.json are written from all of these that are there.

correctness  the tests that have a GPU's part; then the engine in each precision against float64 on the CPU, and the
             same seed twice, which has to give the same bits
sizes        each convolution at its full size against PyTorch's float32, and the network's gradients against the CPU
             engine's
ceilings     what the machine can do: a copy in its memory, large matrix products
layers       each distinct layer of the network, forward and backward, against PyTorch's
step         whole training steps against PyTorch eager in both layouts, and compiled; peak memory
profile      where the time of a step goes, kind of kernel by kind of kernel, beside its floor
reference    a training by examples/train_lgg.py: seconds an epoch, the share of the steps in it, the Dice

A ratio is PyTorch's time over minunet's: above 1 minunet is faster. Both take turns, round by round; the median of the
rounds' ratios is given, with the smallest and the largest.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script, also where minunet is not installed
    sys.path.insert(0, str(ROOT))

from benchmarks import gpu_report  # noqa: E402
from minunet.base import cli  # noqa: E402
from minunet.base.durable import json_text, write_text  # noqa: E402
from minunet.base.errors import UserError  # noqa: E402

#: The parts in their order, with their time limits in seconds: ten minutes together.
PARTS = {
    "correctness": 150,
    "sizes": 60,
    "ceilings": 20,
    "layers": 90,
    "step": 230,
    "profile": 30,
    "reference": 540,
}


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    folder = Path(options.output)
    if options.child:
        from benchmarks import gpu_parts

        gpu_parts.run(options.part[0], options, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for part in options.part:
        started = time.perf_counter()
        result = run_part(part, arguments, folder, options.limit or PARTS[part])
        result["seconds"] = round(time.perf_counter() - started, 1)
        write_text(folder / f"{part}.json", json_text(result))
        print(f"{part}: {result.get('error', 'done')} ({result['seconds']} s)", flush=True)
    results = {part: json.loads(path.read_text()) for part in PARTS if (path := folder / f"{part}.json").exists()}
    text = gpu_report.markdown(results)
    write_text(folder / "report.md", text)
    write_text(folder / "report.json", json_text(results))
    print(text)


def run_part(part: str, arguments: list[str], folder: Path, limit: int) -> dict[str, Any]:
    """What a part found, from a process of its own; with an entry "error", if it did not come to its end.

    The process writes after each measurement, so that what it had found before it failed or ran out of time is kept.
    """
    path = folder / f"{part}.part"
    path.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).resolve()), *without_parts(arguments), "--part", part, "--child"]
    error = None
    try:
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=limit)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            error = lines[-1].removeprefix("error: ")
    except subprocess.TimeoutExpired:
        error = f"stopped after {limit} s"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    result["date"] = date.today().isoformat()
    return result if error is None else {**result, "error": error}


def without_parts(arguments: list[str]) -> list[str]:
    """The command line without its ``--part NAME``."""
    kept = []
    skip = False
    for argument in arguments:
        if skip or argument.startswith("--part="):
            skip = False
        elif argument == "--part":
            skip = True
        else:
            kept.append(argument)
    return kept


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", action="append", choices=tuple(PARTS), help="which; may be given several times")
    add("--output", default="gpu-report", metavar="DIR", help="where the results go (gpu-report)")
    add("--batch", type=cli.positive_int, action="append", help="of the steps; may be given several times (16, 32)")
    add("--size", type=cli.image_size, default=224, help="pixels a side (224)")
    add("--width", type=cli.positive_int, default=64, help="channels of the first level; four more double it (64)")
    add("--precision", action="append", choices=("float32", "tf32", "bf16"), help="which (tf32, bf16)")
    add("--rounds", type=cli.positive_int, default=7, help="how often everybody has a turn (7)")
    add("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    add("--data", metavar="DIR", help="for the part reference: kaggle_3m; without it, synthetic patients")
    add("--preset", default="reference", choices=("reference", "best"), help="for the part reference")
    add("--epochs", type=cli.positive_int, default=2, help="for the part reference (2)")
    add("--limit", type=cli.positive_int, help="seconds for a part")
    add("--dry-run", action="store_true", help="tiny sizes on the CPU; CuPy is a stand-in")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.part = options.part or [part for part in PARTS if part != "reference"]
    options.batch = options.batch or [16, 32]
    options.precision = options.precision or ["tf32", "bf16"]
    if options.dry_run:
        options.batch, options.size, options.width, options.rounds = [2], 16, 2, 2
        options.precision = ["float32"]
    if {"float32", "tf32"} <= {*options.precision}:
        raise UserError("--precision: float32 and tf32 exclude each other, since CuPy decides once, give one of them")
    if options.size % 16:
        raise UserError(f"--size: {options.size} is not a multiple of 16, choose one that is")
    return options


if __name__ == "__main__":
    sys.exit(cli.run(main))
