"""Are the kernels right on this GPU? Convolutions and a small training step, before the first real one.

    python -m minunet.engines.cuda.trial bf16 wgmma

Prints what is wrong, with exit code 1, or nothing. choice.py runs it in a process of its own, and says why.
"""

import argparse
import sys
from collections.abc import Iterable

import numpy as np

from minunet.base import rng
from minunet.base.backend import Array, to_numpy, use_gpu
from minunet.engines.cuda.engine import CudaEngine
from minunet.engines.cuda.kernels import CupyKernels
from minunet.engines.cuda.programs import PRECISIONS
from minunet.engines.cuda.specification import SpecificationKernels
from minunet.network.layers import Arrays, map_arrays
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.training.step import train_step

#: The largest difference from the specification, over the largest value: rounding, of products and of what is stored.
CONVOLUTION = {"float32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}
#: The length of the difference over the length of the whole, of what a step changes.
STEP = {"float32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}


def what_is_wrong(precision: str, name: str, gpu: int | None = None) -> str | None:
    """What is wrong with the kernels ("wgmma" or "mma.sync") on the GPU of this number (None: the current), or None.

    The specification runs on the CPU: on the GPU its products might be TF32, if the environment says so.
    """
    try:
        if gpu is not None:
            use_gpu(gpu)
        kernels, specification = CupyKernels(precision, hopper=name == "wgmma"), SpecificationKernels(np, precision)
        kernels.device.multiprocessors = 1  # a block then has many tiles, as it has in a network of full size
        for what, distance, bounds in (
            ("convolution", convolution_distance, CONVOLUTION),
            ("training step", step_distance, STEP),
        ):
            found = distance(kernels, specification)
            if not found <= bounds[precision]:
                return f"are wrong on this GPU: a small {what} is {found:.1e} off"
    except Exception as error:  # CuPy raises several types: of the compiler, of the driver, of a kernel
        return f"cannot be compiled, loaded or run ({str(error).partition(chr(10))[0] or type(error).__name__})"
    return None


def convolution_distance(kernels: SpecificationKernels, specification: SpecificationKernels) -> float:
    """The largest difference between two sets of kernels, over the largest value of the second; NaN for NaN."""
    return _largest(
        float(abs(found - expected).max()) / float(abs(expected).max())
        for found, expected in zip(_convolutions(kernels), _convolutions(specification), strict=True)
    )


def _convolutions(kernels: SpecificationKernels) -> list[np.ndarray]:
    """What the convolutions of both kinds make of the same numbers, and their gradients.

    The ``wide`` inputs fill four panels of channels and part of a fifth; 24, 40 and ``wide`` outputs need tiles of each
    width.
    """
    xp, draw, wide = kernels.xp, np.random.default_rng(0), 136 if kernels.precision == "bf16" else 72
    results: list[Array] = []

    def numbers(*shape: int) -> Array:
        return xp.asarray(draw.standard_normal(shape, dtype=np.float32))

    def activation(height: int, width: int, channels: int) -> Array:
        return xp.empty((2, height, width, channels), kernels.dtype)

    def stored(height: int, width: int, channels: int) -> Array:
        array = activation(height, width, channels)
        kernels.store(array, numbers(*array.shape))
        return array

    x = stored(9, 20, wide)
    for channels in (24, 40, wide):
        weight, y, statistics = numbers(3, 3, wide, channels), activation(9, 20, channels), numbers(2, channels)
        kernels.conv3x3(x, weight, y, *statistics)
        results += [kernels.load(y), statistics[1]]
    dy, dx, dweight = stored(9, 20, wide), activation(9, 20, wide), xp.zeros_like(weight)
    kernels.conv3x3_grad_input(dy, weight, dx)
    kernels.conv3x3_grad_weight(x, dy, dweight)
    results += [kernels.load(dx), dweight]

    weight, bias, y = numbers(2, 2, wide, 40), numbers(40), activation(18, 40, 40)
    kernels.conv_transpose(x, weight, bias, y)
    dy, dx, dweight, dbias = stored(18, 40, 40), activation(9, 20, wide), xp.zeros_like(weight), xp.zeros_like(bias)
    kernels.conv_transpose_grad_input(dy, weight, dx)
    kernels.conv_transpose_grad_weight(x, dy, dweight, dbias)
    results += [kernels.load(y), kernels.load(dx), dweight, dbias]
    return [to_numpy(array) for array in results]


def step_distance(kernels: SpecificationKernels, specification: SpecificationKernels) -> float:
    """How far apart two sets of kernels are in what a training step changes, over its length; NaN for NaN."""
    found, expected = _changes(kernels), _changes(specification)
    return _largest(
        float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        for ours, theirs in zip(found, expected, strict=True)
    )


def _changes(kernels: SpecificationKernels) -> tuple[np.ndarray, np.ndarray]:
    """By how much a step of AdamW changes the parameters of a small network, and the running statistics.

    A first step is gradient / (|gradient| + eps). With eps = 1 that follows the gradient; with a small one it would be
    its sign, and rounding decides the sign of the smallest. What comes to a ReLU lies about 4 or -4: near 0 rounding
    would decide what passes.
    """
    xp, draw, size = kernels.xp, np.random.default_rng(1), (12, 20)
    net = map_arrays(UNet(widths=(24, 40, 72), dropout=0.3, seed=1), xp.asarray)
    for name, array in net.parameters().items():
        if name.endswith("beta"):
            array[0::2], array[1::2] = 4, -4
    before = _flat(net.parameters()), _flat(net.buffers())
    x = xp.asarray(draw.standard_normal((2, *size, 3), dtype=np.float32))
    target = xp.asarray((draw.random((2, *size, 1)) < 0.3).astype(np.float32))
    loss = SegmentationLoss()
    with CudaEngine(net, loss, 2, size, kernels) as engine:
        optimizer = engine.optimizer(net.parameters(), 1.0, eps=1.0)
        train_step(net, optimizer, x, target, loss, rng.Key(0), lr=1.0, clip_norm=1.0, engine=engine)
    return _flat(net.parameters()) - before[0], _flat(net.buffers()) - before[1]


def _flat(arrays: Arrays) -> np.ndarray:
    return np.concatenate([to_numpy(array).ravel() for array in arrays.values()])


def _largest(distances: Iterable[float]) -> float:
    return max(distances, key=lambda value: (np.isnan(value), value))


def main() -> int:
    """The exit code: 0, or 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precision", choices=sorted(PRECISIONS))
    parser.add_argument("kernels", choices=("wgmma", "mma.sync"))
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="its number; default 0")
    options = parser.parse_args()
    wrong = what_is_wrong(options.precision, options.kernels, options.gpu)
    if wrong is not None:
        print(wrong)
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main())
