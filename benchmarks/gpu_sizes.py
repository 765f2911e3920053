"""The part "sizes" of benchmarks/gpu.py: each convolution at its full size, and the whole network, are they right?

The tests run small shapes, and a mistake may show at large ones only. The inputs of a convolution have so few bits that
every precision holds them exactly, and its truth is PyTorch's float32, without TF32: what differs is the rounding of
sums, and of what is stored. The truth of the network's gradients is the CPU engine's step.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu_machine import Machine, failing
from minunet import engines
from minunet.base.backend import Array, to_numpy
from minunet.base.rng import Key
from minunet.engines.cuda import choice
from minunet.engines.cuda.specification import SpecificationKernels, Weight
from minunet.network.layers import map_arrays
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet

#: The largest distance from the truth, over its length: of a convolution's results, and of all gradients as one vector.
#: A ReLU whose input lies within rounding of 0 may flip, which is why the second is not rounding alone.
CONVOLUTION = {"float32": 1e-5, "tf32": 4e-4, "bf16": 4e-3}
NETWORK = {"float32": 2e-3, "tf32": 3e-2, "bf16": 2.5e-1}


def sizes(machine: Machine, options: argparse.Namespace, note: Callable[[str, Any], None]) -> None:
    n = options.batch[0]
    note("batch", n)
    for precision in options.precision:
        note(f"{precision}, the network's gradients", failing(partial(network, machine, options, precision)))
        machine.free()
    if machine.torch is None:
        note("the convolutions", machine.no_torch)
        return
    for precision in options.precision:
        for transposed, shapes in ((False, conv_shapes), (True, up_shapes)):
            for name, size, in_channels, out_channels in shapes(options.width, options.size):
                label = f"{precision}, {name}, {size} x {size}, {in_channels} to {out_channels}"
                shape = (n, size, in_channels, out_channels)
                note(label, failing(partial(one_convolution, machine, precision, transposed, *shape)))
                machine.free()


def conv_shapes(width: int, size: int) -> Iterator[tuple[str, int, int, int]]:
    """Each distinct 3x3 convolution of the U-Net that has a batch norm: name, pixels a side, channels in and out."""
    widths = [width << level for level in range(5)]
    for level, channels in enumerate(widths):
        block = "bottleneck" if level == 4 else f"down{level + 1}"
        yield f"{block}.conv1", size >> level, 3 if level == 0 else widths[level - 1], channels
        yield f"{block}.conv2", size >> level, channels, channels
    for level, channels in enumerate(widths[:-1]):
        yield f"up{level + 1}.conv1", size >> level, 2 * channels, channels


def up_shapes(width: int, size: int) -> Iterator[tuple[str, int, int, int]]:
    """Each transposed convolution: name, pixels a side of its input, channels in and out."""
    for level in range(4):
        yield f"up{level + 1}.up", size >> (level + 1), width << (level + 1), width << level


def network(machine: Machine, options: argparse.Namespace, precision: str) -> dict[str, Any]:
    n, size = options.batch[0], options.size
    draw = np.random.default_rng(0)
    x = draw.standard_normal((n, size, size, 3), dtype=np.float32)
    target = (draw.random((n, size, size, 1)) < 0.1).astype(np.float32)
    host = UNet(widths=tuple(options.width << level for level in range(5)), dropout=0.3, seed=1)
    loss, key = SegmentationLoss(), Key(0)
    with engines.build(host, loss, n, (size, size), "cpu") as engine:
        _, grads, _ = engine.loss_and_grads(x, target, key)
        truth = np.concatenate([grads[name].ravel() for name in sorted(grads)])
    net = map_arrays(host, machine.put)
    with engines.build(net, loss, n, (size, size), "cuda", precision=precision) as engine:
        _, grads, _ = engine.loss_and_grads(machine.put(x), machine.put(target), key)
        found = np.concatenate([to_numpy(grads[name]).ravel() for name in sorted(grads)])
    distance = float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
    return {"distances": {"gradients": distance}, "passed": distance <= NETWORK[precision]}


def one_convolution(
    machine: Machine, precision: str, transposed: bool, n: int, size: int, in_channels: int, out_channels: int
) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    side = 2 * size if transposed else size
    x = few_bits(draw, n, size, size, in_channels)
    dy = few_bits(draw, n, side, side, out_channels)
    weight = few_bits(draw, 3, 3, in_channels, out_channels)
    kernels = choice.make(machine.xp, precision, choice.choose(precision))
    found = ours(machine, kernels, transposed, x, dy, weight)
    expected = theirs(machine, transposed, x, dy, weight)
    distances = {name: _distance(machine, found[name], expected[name]) for name in found}
    return {"distances": distances, "passed": max(distances.values()) <= CONVOLUTION[precision]}


def few_bits(draw: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal numbers that bf16 holds exactly."""
    values = draw.standard_normal(shape, dtype=np.float32)
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def ours(
    machine: Machine,
    kernels: SpecificationKernels,
    transposed: bool,
    x: np.ndarray,
    dy: np.ndarray,
    weight: np.ndarray,
) -> dict[str, Array]:
    xp = machine.xp

    def activation(array: np.ndarray) -> Array:
        stored = xp.empty(array.shape, dtype=kernels.dtype)
        kernels.store(stored, machine.put(array))
        return stored

    images, gradient, w = activation(x), activation(dy), machine.put(weight)
    y, dx, dw = xp.empty_like(gradient), xp.empty_like(images), xp.empty_like(w)
    first, second = (xp.empty(weight.shape[3], dtype="float32") for _ in range(2))
    kernels.prepare_weights([Weight(w, transposed)])
    if transposed:
        kernels.conv_transpose(images, w, xp.zeros(weight.shape[3], dtype="float32"), y)
        kernels.conv_transpose_grad_input(gradient, w, dx)
        kernels.conv_transpose_grad_weight(images, gradient, dw, first)
        others = {"dbias": first}
    else:
        kernels.conv3x3(images, w, y, first, second)
        kernels.conv3x3_grad_input(gradient, w, dx)
        kernels.conv3x3_grad_weight(images, gradient, dw)
        others = {"variance": second}
    return {"forward": kernels.load(y), "grad-input": kernels.load(dx), "grad-weight": dw, **others}


def theirs(machine: Machine, transposed: bool, x: np.ndarray, dy: np.ndarray, weight: np.ndarray) -> dict[str, Array]:
    torch = machine.torch
    images, gradient = machine.tensor(x), machine.tensor(dy)
    axes = (2, 3, 0, 1) if transposed else (3, 2, 0, 1)
    kernel = torch.from_numpy(np.ascontiguousarray(weight.transpose(axes))).to(machine.torch_device)
    images.requires_grad_(), kernel.requires_grad_()
    side = dy.shape[1]
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
    with flags:
        if transposed:
            y = torch.nn.functional.conv_transpose2d(images, kernel, stride=2)[:, :, :side, :side]
            others = {"dbias": gradient.sum(dim=(0, 2, 3))}
        else:
            y = torch.nn.functional.conv2d(images, kernel, padding=1)
            others = {"variance": y.var(dim=(0, 2, 3), correction=0)}
        dx, dw = torch.autograd.grad(y, (images, kernel), gradient)
    back = tuple(axes.index(i) for i in range(4))
    found = {"forward": y.permute(0, 2, 3, 1), "grad-input": dx.permute(0, 2, 3, 1), "grad-weight": dw.permute(back)}
    return {name: machine.from_torch(tensor) for name, tensor in (found | others).items()}


def _distance(machine: Machine, found: Array, expected: Array) -> float:
    """The length of the difference over that of what was expected."""
    difference = found - expected
    lengths = [float((array * array).sum(dtype="float64")) for array in (difference, expected)]
    return float(np.sqrt(lengths[0] / lengths[1]))
