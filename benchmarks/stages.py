"""Where the CPU engine's step goes: the time of each of its stages, against the least that its products could take.

    python benchmarks/stages.py                              base 16, 128 x 128, batch 8
    python benchmarks/stages.py --width 32 --size 224 --batch 4 --each

One process, so that no stage waits for another process. The floor of a stage is the multiplications of its
transformed products alone (Winograd's count, not the plain convolution's) at the rate that this core reaches in small
products, which is measured first. What a stage takes above that is transforms, batch norm, ReLU, memory, and Python.
"""

import argparse
import collections
import statistics
import time
from typing import Any

import numpy as np

from minunet.base import rng
from minunet.engines.cpu.engine import CpuEngine
from minunet.engines.cpu.plan import Pool, Unit, Up
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet

STEPS = 6


def peak_gflops() -> float:
    """Billions of floating-point operations a second in products that fit the cache."""
    a, b, c = (np.ones(shape, np.float32) for shape in ((64, 128, 48), (64, 48, 16), (64, 128, 16)))
    times = []
    for _ in range(200):
        start = time.perf_counter()
        np.matmul(a, b, out=c)
        times.append(time.perf_counter() - start)
    return 2 * 64 * 128 * 48 * 16 / statistics.median(times) / 1e9


def products(kind: str, what: Any, engine: CpuEngine, batch: int) -> float:
    """Floating-point operations of the stage's matrix products, without the transforms."""
    if isinstance(what, Unit):
        pixels = batch * what.height * what.width
        # F(4, 3) in one direction: 6 / 4 * 3 taps a pixel; in both: 36 / 16.
        a_pixel = (4.5 if what.method == "rows" else 2.25) * 2 * what.c_in * what.c_out
        passes = {"conv": 1, "conv_channels": 1, "conv_backward": 2, "conv_channels_backward": 2}.get(kind, 0)
        if kind.endswith("backward") and what.source is None:
            passes -= 1
        return passes * pixels * a_pixel
    if isinstance(what, Up) and kind in ("up", "up_backward"):
        below, taps = what.below, engine.net.config["up_kernel"] ** 2
        once = batch * below.height * below.width * 2 * taps * below.c_out * what.channels
        return once * (2 if kind == "up_backward" else 1)
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="channels of the first level")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--each", action="store_true", help="every stage, not only every kind")
    flags = parser.parse_args()
    net = UNet(widths=[flags.width * 2**level for level in range(5)], dropout=flags.dropout)
    random = np.random.default_rng(0)
    x = random.normal(size=(flags.batch, flags.size, flags.size, 3)).astype(np.float32)
    target = (random.random((flags.batch, flags.size, flags.size, 1)) > 0.9).astype(np.float32)
    times: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    floors: dict[tuple[str, str], float] = {}
    with CpuEngine(net, SegmentationLoss(), flags.batch, (flags.size, flags.size), workers=1) as engine:
        rate = peak_gflops()
        for stage, made in engine._program.steps[True, True].stages:
            label = (
                stage.kind,
                stage.what.skip.conv if isinstance(stage.what, Pool) else stage.what.conv if stage.what else "",
            )
            floors[label] = products(stage.kind, stage.what, engine, flags.batch) / rate / 1e9

            def timed(run: Any = made.run, label: tuple[str, str] = label) -> None:
                start = time.perf_counter()
                run()
                times[label].append(time.perf_counter() - start)

            made.run = timed  # type: ignore[method-assign]
        for step in range(STEPS):
            engine.loss_and_grads(x, target, rng.Key(0, step=step))
    medians = {label: statistics.median(values[1:]) for label, values in times.items()}
    by_kind: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for (kind, _), seconds in medians.items():
        by_kind[kind][0] += seconds
    for (kind, _), seconds in floors.items():
        by_kind[kind][1] += seconds
    total, floor = sum(medians.values()), sum(floors.values())
    print(
        f"base {flags.width}, {flags.size} x {flags.size}, batch {flags.batch}; {rate:.0f} GFLOP/s in small products\n"
    )
    print("| stage | ms | floor of its products | share |\n|---|---|---|---|")
    for kind, (seconds, least) in sorted(by_kind.items(), key=lambda item: -item[1][0]):
        print(f"| {kind} | {1e3 * seconds:.1f} | {1e3 * least:.1f} | {seconds / total:.0%} |")
        if flags.each:
            for (other, name), each in medians.items():
                if other == kind:
                    print(f"| &nbsp; {name} | {1e3 * each:.2f} | {1e3 * floors[other, name]:.2f} | |")
    print(f"| all | {1e3 * total:.1f} | {1e3 * floor:.1f} | |")


if __name__ == "__main__":
    main()
