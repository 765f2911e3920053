"""Cross entropy of logits, beyond the contract that test_contract.py holds it to: by hand, and its properties."""

import math

import numpy as np
import pytest
from hypothesis import given

from minunet.ops import sigmoid_forward
from minunet.ops.bce_with_logits import bce_with_logits_backward, bce_with_logits_forward
from tests.strategies import bce_with_logits_cases


def images(values, n=1):
    """The values as ``n`` images of one row and one channel."""
    return np.array(values, dtype=float).reshape(n, 1, -1, 1)


def test_bce_by_hand():
    loss, cache = bce_with_logits_forward(images([0.0, math.log(3)]), images([1, 0]))
    assert loss == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-15, abs=0)  # s(log 3) = 3/4
    assert bce_with_logits_backward(cache).ravel() == pytest.approx([-0.25, 0.375], rel=1e-15, abs=0)


@given(case=bce_with_logits_cases())
def test_bce_is_the_entropy_of_the_two_outcomes(case):
    z, t = case.inputs["logits"], case.options["target"]
    p, _ = sigmoid_forward(z)
    expected = np.mean(-t * np.log(p) - (1 - t) * np.log1p(-p))
    assert abs(bce_with_logits_forward(z, t)[0] - expected) <= 1e-12 * expected


@given(case=bce_with_logits_cases())
def test_bce_does_not_care_which_side_is_called_1(case):
    z, t = case.inputs["logits"], case.options["target"]
    loss, cache = bce_with_logits_forward(z, t)
    mirrored, mirrored_cache = bce_with_logits_forward(-z, 1 - t)
    assert abs(mirrored - loss) <= 1e-14 * max(loss, 1)
    difference = bce_with_logits_backward(cache) + bce_with_logits_backward(mirrored_cache)
    assert np.abs(difference).max() <= 1e-15


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("z", "t", "loss"), [(1e4, 1, 0), (1e4, 0, 1e4), (-1e4, 0, 0), (-1e4, 1, 1e4)])
def test_bce_of_large_logits_is_finite_and_warns_of_nothing(z, t, loss, dtype):
    result, cache = bce_with_logits_forward(images([z]).astype(dtype), images([t]))
    assert result == loss
    assert result.dtype == dtype
    assert bce_with_logits_backward(cache).item() == (z > 0) - t


@pytest.mark.parametrize("z", [0.1, 0.7, 3.0, 5.0])
def test_the_mean_of_equal_losses_of_float32_is_that_loss(z):
    """It is accumulated in float64: a float32 sum of 99,999 equal numbers is not 99,999 times the number."""
    one, _ = bce_with_logits_forward(images([z]).astype("float32"), images([0]))
    many, _ = bce_with_logits_forward(images([z] * 99_999).astype("float32"), images([0] * 99_999))
    assert many == one
