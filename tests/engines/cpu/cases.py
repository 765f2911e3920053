"""Networks and batches for the tests of the CPU engine, and the plain path's results to compare with."""

from typing import Any, NamedTuple

import numpy as np

from minunet.base import rng
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.training.step import loss_and_grads

KEY = rng.Key(seed=5, epoch=1, step=2)


class Problem(NamedTuple):
    """A network with unusual arrays, and a batch for it."""

    net: UNet
    x: np.ndarray  # (N, H, W, C)
    target: np.ndarray  # (N, H, W, K), 0 or 1


def problem(
    batch: int, size: tuple[int, int], *, widths: tuple[int, ...], seed: int = 0, hard: bool = True, **options: Any
) -> Problem:
    """A problem drawn from ``seed``. With ``hard``, gamma has every sign, zeros and values too small to matter."""
    net = UNet(widths=widths, seed=seed % 2**32, **options)
    draw = np.random.default_rng(seed)
    for name, array in (net.parameters() | net.buffers()).items():
        kind = name.rpartition(".")[2]
        if kind in ("bias", "beta"):
            array += (0.3 * draw.standard_normal(array.shape)).astype(array.dtype)
        if kind == "running_mean":
            array[...] = draw.standard_normal(array.shape)
        if kind == "running_var":
            array[...] = draw.uniform(0.2, 2, array.shape)
        if kind == "gamma":
            array[...] = draw.uniform(0.4, 1.5, array.shape) * draw.choice([-1, 1], array.shape)
            if hard:
                # So small that gamma * x_hat is lost beside any beta; if not, rounding chooses the pool's winners.
                array[...] = np.where(draw.random(array.shape) < 0.2, draw.choice([0, 1e-30], array.shape), array)
                array[0] = draw.uniform(0.4, 1.5)  # one channel of each norm is sure to let something through
        if kind == "beta" and hard:
            array[...] = np.where(draw.random(array.shape) < 0.2, 0, array)
            array[0] = 0.5
    shape = (batch, *size)
    x = draw.standard_normal((*shape, net.config["in_channels"]))
    target = draw.random((*shape, net.config["out_channels"])) < 0.3
    dtype = net.config["dtype"]
    return Problem(net, x.astype(dtype), target.astype(dtype))


def worst_differences(found: Any, expected: Any) -> dict[str, float]:
    """How far (loss, grads, batch_stats) is from what it should be: by array, relative to its largest value.

    The gradient of a bias in front of a batch norm is exactly 0. The engine has to say so; the plain path has what
    rounding leaves, which is measured against the gradient of the weight beside it.
    """
    (loss, grads, stats), (expected_loss, expected_grads, expected_stats) = found, expected
    assert list(grads) == list(expected_grads)
    assert list(stats) == list(expected_stats)
    worst = {"loss": abs(loss - expected_loss) / abs(expected_loss)}
    for name, array in (expected_grads | expected_stats).items():
        got = (grads | stats)[name]
        assert (got.shape, got.dtype) == (array.shape, array.dtype), name
        if ".conv" in name and name.endswith(".bias"):
            assert not got.any(), name
            beside = abs(expected_grads[name.replace(".bias", ".weight")]).max()
            worst[name] = abs(array).max() / max(beside, np.finfo(array.dtype).tiny)
        else:
            worst[name] = relative(got, array)
    return worst


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value; infinite if that is 0 and something differs."""
    difference, largest = float(abs(found - expected).max()), float(abs(expected).max())
    return difference / largest if largest else (np.inf if difference else 0.0)


def plain(case: Problem, loss: SegmentationLoss, key: rng.Key = KEY) -> Any:
    """The plain path's loss, gradients and batch statistics."""
    return loss_and_grads(case.net, case.x, case.target, loss, key)
