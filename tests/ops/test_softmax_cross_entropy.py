"""Softmax cross entropy, beyond the contract that test_contract.py holds it to: by hand, and its properties."""

import math

import numpy as np
import pytest
from hypothesis import given

from minunet.ops import (
    bce_with_logits_backward,
    bce_with_logits_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
    softmax_forward,
)
from tests.strategies import softmax_cross_entropy_cases


def row(pixels, dtype="float64"):
    """One image of one row: a pixel for each list, with a value for each class."""
    return np.array(pixels, dtype)[None, None]


def test_by_hand():
    """Three pixels with probabilities (1, 2, 5) / 8, 1/3 each, and whatever: the last one does not count."""
    z = np.log(row([[1, 2, 5], [1, 1, 1], [3, 1, 4]]))
    loss, cache = softmax_cross_entropy_forward(z, row([[0, 1, 0], [1, 0, 0], [0, 0, 0]]))
    assert loss == pytest.approx((math.log(4) + math.log(3)) / 2, rel=1e-15, abs=0)
    expected = [[1 / 16, -3 / 8, 5 / 16], [-1 / 3, 1 / 6, 1 / 6], [0, 0, 0]]
    assert softmax_cross_entropy_backward(cache)[0, 0] == pytest.approx(np.array(expected), rel=1e-15, abs=0)


@given(case=softmax_cross_entropy_cases())
def test_it_is_minus_the_log_of_the_probability_of_the_class(case):
    z, t = case.inputs["logits"], case.options["target"]
    p, _ = softmax_forward(z)
    count = max(t.sum(), 1)
    loss, cache = softmax_cross_entropy_forward(z, t)
    assert loss == pytest.approx(-np.sum(t * np.log(p)) / count, rel=1e-13, abs=0)
    # What one class of a pixel gains, the others lose.
    assert np.abs(softmax_cross_entropy_backward(cache).sum(axis=-1)).max() <= 1e-15


@given(case=softmax_cross_entropy_cases())
def test_of_two_classes_it_is_the_binary_cross_entropy_of_the_difference(case):
    z = case.inputs["logits"][..., :2]
    t = case.options["target"][..., :2].argmax(axis=-1, keepdims=True)
    loss, cache = softmax_cross_entropy_forward(z, np.concatenate([1 - t, t], axis=-1))
    expected, expected_cache = bce_with_logits_forward(z[..., 1:] - z[..., :1], t)
    assert loss == pytest.approx(expected, rel=1e-13, abs=0)
    assert softmax_cross_entropy_backward(cache)[..., 1:] == pytest.approx(
        bce_with_logits_backward(expected_cache), rel=1e-13, abs=0
    )


@given(case=softmax_cross_entropy_cases())
def test_a_pixel_that_does_not_count_is_as_good_as_none(case):
    """Whatever its logits are: the loss and the gradients of the others are those without it, bit for bit."""
    z, t = case.inputs["logits"], case.options["target"]
    z, t = z[:1, :1], t[:1, :1]
    wide_z = np.concatenate([z, 50 * np.ones_like(z)], axis=2)
    wide_t = np.concatenate([t, np.zeros_like(t)], axis=2)
    loss, cache = softmax_cross_entropy_forward(z, t)
    wide, wide_cache = softmax_cross_entropy_forward(wide_z, wide_t)
    assert wide == pytest.approx(loss, rel=1e-15, abs=0)
    gradient = softmax_cross_entropy_backward(wide_cache)
    assert np.array_equal(gradient[:, :, : z.shape[2]], softmax_cross_entropy_backward(cache))
    assert not gradient[:, :, z.shape[2] :].any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_where_no_pixel_counts_loss_and_gradient_are_0(dtype):
    loss, cache = softmax_cross_entropy_forward(row([[1, 2], [3, -4]], dtype), row([[0, 0], [0, 0]]))
    assert loss == 0
    assert loss.dtype == dtype
    gradient = softmax_cross_entropy_backward(cache)
    assert gradient.dtype == dtype
    assert not gradient.any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("of_truth", "loss"), [(0, 0.0), (1, 1e4), (2, 2e4)])
def test_large_logits_are_finite_and_warn_of_nothing(of_truth, loss, dtype):
    z, t = row([[1e4, 0, -1e4]], dtype), np.eye(3)[of_truth].reshape(1, 1, 1, 3)
    result, cache = softmax_cross_entropy_forward(z, t)
    assert result == loss
    assert np.array_equal(softmax_cross_entropy_backward(cache), row([[1, 0, 0]]) - t)


def test_a_small_loss_has_all_its_digits():
    """log(1 + 2 e^-40), where 1 + 2 e^-40 is 1 to all digits."""
    loss, _ = softmax_cross_entropy_forward(row([[40.0, 0.0, 0.0]]), row([[1, 0, 0]]))
    assert loss == pytest.approx(2 * math.exp(-40), rel=1e-15, abs=0)


@pytest.mark.parametrize("z", [0.1, 0.7, 3.0, 5.0])
def test_the_mean_of_equal_losses_of_float32_is_that_loss(z):
    """It is accumulated in float64: a float32 sum of 99,999 equal numbers is not 99,999 times the number."""
    one, _ = softmax_cross_entropy_forward(row([[z, 0, 0]], "float32"), row([[0, 1, 0]]))
    many, _ = softmax_cross_entropy_forward(row([[z, 0, 0]] * 99_999, "float32"), row([[0, 1, 0]] * 99_999))
    assert many == one


def test_nan_passes():
    loss, cache = softmax_cross_entropy_forward(row([[0, np.nan], [0, 1]]), row([[1, 0], [1, 0]]))
    assert np.isnan(loss)
    gradient = softmax_cross_entropy_backward(cache)[0, 0]
    assert np.isnan(gradient[0]).all()
    assert np.isfinite(gradient[1]).all()
