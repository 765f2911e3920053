"""What a training step costs a GPU at least, counted: arithmetic, memory traffic, and the time of the larger one.

    python benchmarks/gpu_model.py                                   the reference network on an H100's ceilings
    python benchmarks/gpu_model.py --copy 4.3 --tf32 400 --bf16 790  other ceilings, such as benchmarks/gpu.py measures

The CUDA engine runs once on kernels that compute nothing and write down their arguments. A kernel moves each of its
arrays once (the backward of batch norm reads its inputs twice), a convolution computes 2 * 9 * C_in * C_out for each
pixel, and takes the longer of the two times. AdamW reads four arrays and writes three. No real kernel reaches this
floor; it says where the time has to go and what is worth a try.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from minunet.base import cli  # noqa: E402
from minunet.base.backend import Array  # noqa: E402
from minunet.base.rng import Key  # noqa: E402
from minunet.engines.cuda.engine import CudaEngine  # noqa: E402
from minunet.engines.cuda.specification import SpecificationKernels  # noqa: E402
from minunet.network.loss import SegmentationLoss  # noqa: E402
from minunet.network.unet import UNet  # noqa: E402

CONVOLUTIONS = {"conv3x3", "conv3x3_grad_input", "conv3x3_grad_weight"}
TRANSPOSED = {"conv_transpose", "conv_transpose_grad_input", "conv_transpose_grad_weight"}
TWICE = {"norm_relu_backward", "norm_relu_pool_backward"}  # one pass for the sums, one to apply them


class Counting(SpecificationKernels):
    """Kernels that note (method, FLOP, bytes) and compute nothing."""

    def __init__(self, precision: str) -> None:
        super().__init__(np, precision)
        self.calls: list[tuple[str, float, float]] = []

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name.startswith("_") or name not in vars(SpecificationKernels) or not callable(method):
            return method

        def note(*arguments: Any, **_: Any) -> None:
            arrays = [single for single in singles(arguments) if isinstance(single, np.ndarray)]
            self.calls.append((name, flop(name, arrays), moved(name, arrays)))

        return note


def singles(arguments: Iterable[Any]) -> Iterator[Any]:
    """The arguments of a call, and in the place of a group (a Norm, a Mask) what is in it."""
    for argument in arguments:
        yield from argument if isinstance(argument, tuple) else (argument,)


def moved(name: str, arrays: list[Array]) -> float:
    """Bytes that a call has to move."""
    return float(sum(array.nbytes for array in arrays)) * (2 if name in TWICE else 1)


def floor(name: str, arrays: list[Array], rate: float, copy: float) -> float:
    """Seconds that a call takes at least, with so many TFLOP/s and TB/s."""
    return max(flop(name, arrays) / rate, moved(name, arrays) / copy) / 1e12


def flop(name: str, arrays: list[Array]) -> float:
    """Of a convolution's call: 2 for each product of a pixel with a weight."""
    if name not in CONVOLUTIONS | TRANSPOSED:
        return 0.0
    kernel = arrays[2 if name.endswith("grad_weight") else 1]  # (x, weight, y) or (x, dy, dweight)
    pixels = min(math.prod(image.shape[:3]) for image in arrays if image.ndim == 4 and image is not kernel)
    return 2.0 * pixels * kernel.size


def count(net: UNet, size: int, batch: int, precision: str) -> list[tuple[str, float, float]]:
    """The calls of a training step. The arrays are never written to, so that they take no memory."""
    kernels = Counting(precision)
    x = np.zeros((batch, size, size, 3), np.float32)
    garbage = np.errstate(all="ignore")  # what the kernels did not compute
    with garbage, CudaEngine(net, SegmentationLoss(), batch, (size, size), kernels) as engine:
        engine.loss_and_grads(x, x[..., :1], Key(0))
    weights = sum(array.nbytes for array in net.parameters().values())
    return [*kernels.calls, ("adamw", 0.0, 7.0 * weights)]


def main(arguments: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copy", type=cli.positive_float, default=3.0, help="TB/s of a copy (3.0)")
    parser.add_argument("--tf32", type=cli.positive_float, default=400.0, help="TFLOP/s (400)")
    parser.add_argument("--bf16", type=cli.positive_float, default=800.0, help="TFLOP/s (800)")
    parser.add_argument("--width", type=cli.positive_int, default=64, help="channels of the first level (64)")
    parser.add_argument("--batch", type=cli.positive_int, default=16, help="images a step (16)")
    parser.add_argument("--size", type=cli.image_size, default=224, help="pixels a side (224)")
    options = parser.parse_args(arguments)
    net = UNet(widths=tuple(options.width << level for level in range(5)), dropout=0.3)
    print("| an image | GFLOP | ms, products alone | GB, convolutions | GB, the rest | ms | images/s at most |")
    print("|---|---|---|---|---|---|---|")
    for precision, rate in (("tf32", options.tf32), ("bf16", options.bf16)):
        calls = count(net, options.size, options.batch, precision)
        is_conv = CONVOLUTIONS | TRANSPOSED
        each = 1 / options.batch
        gflop = each * sum(work for _, work, _ in calls) / 1e9
        conv, rest = (
            each * sum(moved for name, _, moved in calls if (name in is_conv) == kind) / 1e9 for kind in (True, False)
        )
        floor = each * sum(work for _, work, _ in calls) / rate / 1e12
        seconds = each * sum(max(work / rate / 1e12, moved / options.copy / 1e12) for _, work, moved in calls)
        print(
            f"| {precision} | {gflop:.0f} | {1e3 * floor:.2f} | {conv:.2f} | {rest:.2f} | "
            f"{1e3 * seconds:.2f} | {1 / seconds:.0f} |"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
