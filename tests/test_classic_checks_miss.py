"""Two mistakes that the classic check lets through, and that the complex step finds.

The classic check compares with central differences at a relative tolerance of 1e-3 (torch.autograd.gradcheck's
default). Both mistakes below forget a constant that is small beside what it is added to, so the gradient is wrong by a
few millionths: no training run would show it, and neither does the classic check.
"""

import numpy as np
import pytest

from minunet.gradcheck import TOLERANCE, check_op
from minunet.ops import batch_norm2d_backward, batch_norm2d_forward
from minunet.ops.dice_loss import dice_loss_backward, dice_loss_forward

CLASSIC_TOLERANCE = 1e-3


def batch_norm2d_backward_without_eps(dy, cache):
    """Divides by sqrt(var) where forward divides by sqrt(var + eps)."""
    return batch_norm2d_backward(dy, cache._replace(inverse_std=1 / np.sqrt(cache.batch_var)))


def dice_loss_backward_without_smooth(cache):
    """The quotient rule for 2 sum(pt) / (sum p + sum t), as if smooth = 1 had not been added to both."""
    overlap = (cache.dice * cache.denominator - 1) / 2
    denominator = cache.denominator - 1
    return dice_loss_backward(cache._replace(dice=2 * overlap / denominator, denominator=denominator))


def batch_norm():
    """Variance 1 in each channel, eps 1e-5."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 4, 3))
    x = (x - x.mean(axis=(0, 1, 2))) / x.std(axis=(0, 1, 2))
    inputs = {"x": x, "gamma": rng.standard_normal(3), "beta": rng.standard_normal(3)}
    running = {"running_mean": np.zeros(3), "running_var": np.ones(3)}
    return batch_norm2d_forward, inputs, {**running, "training": True, "eps": 1e-5}


def dice():
    """100,000 pixels, smooth 1."""
    rng = np.random.default_rng(0)
    target = (rng.random((1, 250, 400, 1)) < 0.3).astype(float)
    return dice_loss_forward, {"probabilities": rng.random(target.shape)}, {"target": target, "smooth": 1.0}


bugs = pytest.mark.parametrize(
    ("case", "right", "wrong"),
    [
        pytest.param(batch_norm, batch_norm2d_backward, batch_norm2d_backward_without_eps, id="batch norm without eps"),
        pytest.param(dice, dice_loss_backward, dice_loss_backward_without_smooth, id="dice without smooth"),
    ],
)


@bugs
def test_central_differences_let_the_wrong_backward_pass(case, right, wrong):
    forward, inputs, options = case()
    for backward in (right, wrong):
        report = check_op(forward, backward, inputs, method="central", **options)
        assert report.ok(CLASSIC_TOLERANCE), str(report)


@bugs
def test_the_complex_step_finds_it(case, right, wrong):
    forward, inputs, options = case()
    assert check_op(forward, right, inputs, **options).ok(TOLERANCE)
    report = check_op(forward, wrong, inputs, **options)
    assert not report.ok(TOLERANCE)
    # A few millionths: far too small for the classic check, and a million rounding errors for this one.
    assert 1e5 * TOLERANCE < report.error < CLASSIC_TOLERANCE / 10


@bugs
def test_a_single_number_tells_it_too(case, right, wrong):
    """Element by element, as torch.autograd.gradcheck goes, and not only along a direction."""
    forward, inputs, options = case()
    sampling = {"exhaustive": 0, "samples": 20, "directions": 0, "together": 0}
    assert check_op(forward, wrong, inputs, method="central", sampling=sampling, **options).ok(CLASSIC_TOLERANCE)
    assert not check_op(forward, wrong, inputs, sampling=sampling, **options).ok(TOLERANCE)
