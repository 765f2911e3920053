"""Where the time of a training step goes, operation by operation: the engine, the plain path and PyTorch on one core.

    python benchmarks/ops.py                                      the first case of benchmarks/train_step.py
    python benchmarks/ops.py --case 32x224 --torch-python PYTHON  another one; PyTorch lives in another environment

One row is a unit, 3x3 convolution, batch norm and ReLU, at its place in the network, a pooling, or a transposed
convolution; forward and backward, without dropout, in milliseconds of processor time (so that a process that is kept
waiting is not charged for it), the median of several runs; for PyTorch, of the layout (channels last, NCHW) that is
faster. The engine's figures are taken inside of whole steps. Its stages are cut a little differently: a unit applies
the batch norm and ReLU of the unit before it, and reads both halves of a concat without making it; so PyTorch's and the
plain path's row has the concat too. GFLOP/s counts the multiplications and additions of a direct convolution, whatever
is done instead, so that Winograd's may exceed what the processor can.

Whether the results agree is asked by benchmarks/train_step.py, of whole gradients, and by the tests.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from train_step import CASES, machine, on_cores

from minunet import ops
from minunet.base.rng import Key
from minunet.engines.cpu.engine import CpuEngine
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet

ROOT = Path(__file__).parents[1]
Times = dict[str, list[float]]  # by operation: seconds forward and backward


class Operation(NamedTuple):
    """A row of the table; ``size`` is that of its output, in pixels a side."""

    kind: str  # "unit", "pool" or "up"
    name: str
    size: int
    c_in: int
    c_out: int
    joins: bool = False  # a unit whose input is a concat
    first: bool = False  # a unit whose input is the image, of which no gradient is wanted

    def flops(self, batch: int) -> float:
        """Of the forward pass; backward has twice as many, the first unit as many."""
        pixels = batch * self.size**2 / (4 if self.kind == "up" else 1)
        return 0.0 if self.kind == "pool" else 18.0 * pixels * self.c_in * self.c_out


def operations(width: int, size: int) -> list[Operation]:
    """Those of a U-Net with five levels, in the order of the forward pass."""
    rows, c_in = [], 3
    for level in range(1, 6):
        name, side, c = "bottleneck" if level == 5 else f"down{level}", size >> (level - 1), width << (level - 1)
        if level > 1:
            rows.append(Operation("pool", f"pool{level - 1}", side, c_in, c_in))
        rows.append(Operation("unit", f"{name}.conv1", side, c_in, c, first=level == 1))
        rows.append(Operation("unit", f"{name}.conv2", side, c, c))
        c_in = c
    for level in range(4, 0, -1):
        side, c = size >> (level - 1), width << (level - 1)
        rows.append(Operation("up", f"up{level}.up", side, 2 * c, c))
        rows.append(Operation("unit", f"up{level}.conv1", side, 2 * c, c, joins=True))
        rows.append(Operation("unit", f"up{level}.conv2", side, c, c))
    return rows


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The median processor time of a call, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return statistics.median(times)


def engine_times(width: int, size: int, batch: int, repeats: int) -> Times:
    """The engine's stages inside of whole steps; what belongs to no operation goes by the name of its stage."""
    net = UNet(widths=tuple(width << level for level in range(5)), dropout=0.0, seed=0)
    generator = np.random.default_rng(1)
    x = generator.standard_normal((batch, size, size, 3), dtype=np.float32)
    target = (x[..., :1] > 1).astype(np.float32)
    spent: dict[tuple[str, int], list[float]] = {}
    with CpuEngine(net, SegmentationLoss(), batch, (size, size), workers=1) as engine:
        program: Any = engine._team.program
        for stage, runnable in program.steps_for(True, batch).stages:
            where = _row(stage.kind, stage.what), int(stage.kind.endswith("backward") or stage.kind == "gradients")
            runnable.run = _timed(runnable.run, spent.setdefault(where, []))
        engine.loss_and_grads(x, target, Key(seed=0))
        for times in spent.values():
            times.clear()
        for _ in range(repeats):
            engine.loss_and_grads(x, target, Key(seed=0))
    found: Times = {}
    for (name, direction), times in spent.items():
        stages = len(times) // repeats  # of one step: a unit may have several
        whole = [sum(times[step * stages : (step + 1) * stages]) for step in range(repeats)]
        found.setdefault(name, [0.0, 0.0])[direction] = statistics.median(whole)
    return found


def _row(kind: str, what: Any) -> str:
    if kind.startswith("pool"):
        return f"pool{what}"
    if kind.startswith("up"):
        return f"up{what}.up"
    return what.conv if what is not None else kind.removesuffix("_backward")


def _timed(run: Callable[[], Any], times: list[float]) -> Callable[[], None]:
    def timed() -> None:
        started = time.process_time()
        run()
        times.append(time.process_time() - started)

    return timed


def plain_times(rows: list[Operation], batch: int, repeats: int) -> Times:
    """minunet.ops, as the layers call them."""
    generator = np.random.default_rng(1)

    def random(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    found = {}
    for row in rows:
        side = row.size * 2 if row.kind == "pool" else row.size // 2 if row.kind == "up" else row.size
        x, weight, channel = random(batch, side, side, row.c_in), random(3, 3, row.c_in, row.c_out), random(row.c_out)

        forward: Callable[[], tuple[np.ndarray, Any]]
        cache: Any
        backward: Callable[..., Any]
        if row.kind == "pool":
            forward, backward = partial(ops.max_pool2d_forward, x), ops.max_pool2d_backward
        elif row.kind == "up":
            forward, backward = partial(ops.conv_transpose2d_forward, x, weight, channel), ops.conv_transpose2d_backward
        else:
            forward, backward = partial(_unit_forward, row, x, weight, channel), _unit_backward
        y, cache = forward()
        dy = random(*y.shape)
        found[row.name] = [seconds(forward, repeats), seconds(partial(backward, dy, cache), repeats)]
    return found


def _unit_forward(row: Operation, x: np.ndarray, weight: np.ndarray, channel: np.ndarray) -> tuple[np.ndarray, Any]:
    join: Any = None
    if row.joins:
        x, join = ops.concat_forward(*np.split(x, 2, axis=3))
    y, conv = ops.conv2d_forward(x, weight, channel)
    y, norm = ops.batch_norm2d_forward(y, channel, channel, channel, channel * channel, training=True)
    y, relu = ops.relu_forward(y)
    return y, (join, conv, norm, relu)


def _unit_backward(dy: np.ndarray, caches: Any) -> Any:
    join, conv, norm, relu = caches
    dy, *_ = ops.batch_norm2d_backward(ops.relu_backward(dy, relu), norm)
    dx, *_ = ops.conv2d_backward(dy, conv)
    return dx if join is None else ops.concat_backward(dx, join)


def torch_times(rows: list[Operation], batch: int, repeats: int) -> Times:
    """PyTorch's modules and autograd, in each layout; the faster one by row and direction."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    from torch import nn

    torch.set_num_threads(1)
    found: Times = {}
    for layout in (torch.channels_last, torch.contiguous_format):
        for row in rows:
            side = row.size * 2 if row.kind == "pool" else row.size // 2 if row.kind == "up" else row.size
            module: Any
            if row.kind == "pool":
                module = nn.MaxPool2d(2)
            elif row.kind == "up":
                module = nn.ConvTranspose2d(row.c_in, row.c_out, 3, 2, padding=1, output_padding=1)
            else:
                conv = nn.Conv2d(row.c_in, row.c_out, 3, padding=1)
                module = nn.Sequential(conv, nn.BatchNorm2d(row.c_out), nn.ReLU(inplace=True))
            module.to(memory_format=layout)
            parts = [torch.randn(batch, row.c_in // (1 + row.joins), side, side) for _ in range(1 + row.joins)]
            parts = [part.to(memory_format=layout).requires_grad_(not row.first) for part in parts]
            wanted = [*module.parameters(), *(part for part in parts if part.requires_grad)]

            def forward(module: Any = module, parts: list[Any] = parts) -> Any:
                return module(torch.cat(parts, 1) if len(parts) > 1 else parts[0])

            y = forward()
            backward = partial(torch.autograd.grad, y, wanted, torch.randn_like(y), retain_graph=True)
            pair = [seconds(forward, repeats), seconds(backward, repeats)]
            found[row.name] = [min(times) for times in zip(pair, found.get(row.name, pair), strict=True)]
    return found


def table(rows: list[Operation], times: dict[str, Times], batch: int) -> str:
    """Rows in the order of the network, then what else the engine does, then the sum of the operations."""
    kinds = list(PARTS)
    directions = ("forward", "backward")
    head = [f"{kind} {direction}" for direction in directions for kind in kinds]
    lines = [["operation", "shape", *head, "PyTorch / engine", "engine GFLOP/s"]]
    for row in rows:
        spent = [[times[kind][row.name][direction] for kind in kinds] for direction in range(2)]
        engine, peer = (sum(times[kind][row.name]) for kind in ("engine", "PyTorch"))
        rate = (2 if row.first else 3) * row.flops(batch) / engine / 1e9
        shape = f"{row.size} x {row.size}, {row.c_in} to {row.c_out}"
        cells = [f"{1e3 * value:.2f}" for part in spent for value in part]
        lines.append([row.name, shape, *cells, f"{peer / engine:.2f}", f"{rate:.0f}" if rate else ""])
    names = {row.name for row in rows}
    for name in (name for name in times["engine"] if name not in names):
        own = [f"{1e3 * value:.2f}" for value in times["engine"][name]]
        lines.append([name, "", *(cell for value in own for cell in (value, "", "")), "", ""])
    totals = [[sum(times[kind][name][d] for name in names) for kind in kinds] for d in range(2)]
    engine, peer = (sum(sum(times[kind][name]) for name in names) for kind in ("engine", "PyTorch"))
    rate = sum((2 if row.first else 3) * row.flops(batch) for row in rows) / engine / 1e9
    cells = [f"{1e3 * value:.1f}" for part in totals for value in part]
    lines.append(["all operations", "", *cells, f"{peer / engine:.2f}", f"{rate:.0f}"])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PARTS: dict[str, Callable[[dict[str, Any], int], Times]] = {
    "engine": lambda case, repeats: engine_times(case["width"], case["size"], case["batch"], repeats),
    "plain": lambda case, repeats: plain_times(
        operations(case["width"], case["size"]), case["batch"], max(1, repeats // 3)
    ),
    "PyTorch": lambda case, repeats: torch_times(operations(case["width"], case["size"]), case["batch"], repeats),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = [name for name, case in CASES.items() if case["training"]]
    parser.add_argument("--case", choices=trained, default=trained[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--torch-python", default=sys.executable, help="the interpreter that has PyTorch")
    parser.add_argument("--json", type=Path, help="write the seconds there")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    case = CASES[options.case]
    rows, batch = operations(case["width"], case["size"]), case["batch"]
    if options.only:
        print(json.dumps(PARTS[options.only](case, options.repeats)))
        return
    # Each in a process of its own, whose libraries find one core when they are loaded.
    times: dict[str, Times] = {}
    for part in PARTS:
        python = options.torch_python if part == "PyTorch" else sys.executable
        command = [python, __file__, "--only", part, "--case", options.case, "--repeats", str(options.repeats)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with on_cores(1):
            answer = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
        times[part] = json.loads(answer.stdout)
    print(f"{machine()}; one core, batch {batch}, milliseconds of processor time\n\n{table(rows, times, batch)}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "case": case, "seconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
