"""Losses that the CPU engine has no stages for: those of classes, and your own, worked out by their own code."""

import numpy as np
import pytest

from minunet.network.loss import SegmentationLoss, SoftmaxLoss
from tests.base.processes import POSIX
from tests.engines.cpu.test_engine import DOUBLE, KEY, check_it, engine_for, problem


class Squares:
    """A loss of one's own: half the mean square of what the logits lack."""

    def forward(self, logits, target):
        return ((logits - target) ** 2).mean() / 2, logits - target

    def backward(self, cache):
        return cache / cache.size


class Failing(Squares):
    def forward(self, logits, target):
        raise ZeroDivisionError("planted")


def classes(batch=3, size=(12, 20), dtype="float64", **options):
    """A problem of three classes, with pixels that are to be ignored."""
    options = {"widths": (4, 6, 8), "out_channels": 3, "output": "softmax", **options}
    case = problem(batch, size, seed=5, dtype=dtype, **options)
    draw = np.random.default_rng(5)
    target = np.eye(3)[draw.integers(3, size=(batch, *size))] * (draw.random((batch, *size, 1)) < 0.8)
    return case._replace(target=target.astype(dtype))


@POSIX
@pytest.mark.parametrize("workers", [1, 2, 4])  # 4 share rows, and not images
@pytest.mark.parametrize(
    "loss",
    [SoftmaxLoss(), SoftmaxLoss(0.5, 2.0, smooth=0.1), SegmentationLoss(over="class"), Squares()],
    ids=["softmax", "softmax with weights", "Dice by class", "own"],
)
def test_it_is_the_plain_path(loss, workers):
    check_it(classes(), loss, DOUBLE, workers, more=1)


def test_the_prediction_of_classes_sums_to_1():
    case = classes(dtype="float32")
    with engine_for(case, SoftmaxLoss()) as engine:
        found = engine.predict(case.x)
        assert np.abs(found.sum(axis=-1) - 1).max() < 1e-6
        assert np.abs(found - case.net.predict(case.x)).max() < 1e-4


@POSIX
@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_loss_raises_is_raised(workers):
    case = classes()
    with engine_for(case, Failing(), workers) as engine, pytest.raises(ZeroDivisionError, match="^planted$"):
        engine.loss_and_grads(case.x, case.target, KEY)
