"""softmax, beyond the contract of every op: exact to the last digits over the whole range, without a warning."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.ops import sigmoid_backward, sigmoid_forward, softmax_backward, softmax_forward
from tests.strategies import softmax_cases


def pixel(values, dtype="float64"):
    """One pixel with a value for each class."""
    return np.array(values, dtype).reshape(1, 1, 1, -1)


def test_by_hand():
    y, cache = softmax_forward(np.log(pixel([1, 2, 5])))
    assert y.ravel() == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=1e-15, abs=0)
    # dy . y = (1 + 0 - 10) / 8 = -9/8; dx = y * (dy + 9/8)
    dx = softmax_backward(pixel([1.0, 0.0, -2.0]), cache)
    assert dx.ravel() == pytest.approx([17 / 64, 18 / 64, -35 / 64], rel=1e-15, abs=0)


@given(x=st.lists(st.floats(-350, 350), min_size=2, max_size=5))
def test_every_probability_has_all_its_digits(x):
    y, _ = softmax_forward(pixel(x))
    largest = max(x)
    e = [Fraction(math.exp(value - largest)) for value in x]  # which rounds once, as the difference does
    for found, own in zip(y.ravel().tolist(), e, strict=True):
        assert abs(Fraction(found) - own / sum(e)) <= Fraction(2e-15) * own / sum(e)


@given(case=softmax_cases())
def test_probabilities_sum_to_1_and_gradients_to_0(case):
    y, cache = softmax_forward(case.inputs["x"])
    assert np.abs(y.sum(axis=-1) - 1).max() <= 1e-15 * y.shape[3]
    assert (y > 0).all()
    dy = case.rng.standard_normal(y.shape)
    assert np.abs(softmax_backward(dy, cache).sum(axis=-1)).max() <= 1e-14


@given(case=softmax_cases(), shift=st.sampled_from([0.5, -3.0, 64.0]))
def test_the_same_number_added_to_all_logits_of_a_pixel_changes_nothing(case, shift):
    x = case.inputs["x"]
    assert np.abs(softmax_forward(x + shift)[0] - softmax_forward(x)[0]).max() <= 1e-13


@given(case=softmax_cases())
def test_of_two_classes_it_is_the_sigmoid_of_the_difference(case):
    x = case.inputs["x"][..., :2]
    y, cache = softmax_forward(x)
    expected, expected_cache = sigmoid_forward(x[..., 1:] - x[..., :1])
    assert y[..., 1:] == pytest.approx(expected, rel=1e-14, abs=0)
    dy = case.rng.standard_normal(expected.shape)
    dx = softmax_backward(np.concatenate([np.zeros_like(dy), dy], axis=-1), cache)
    expected_dx = sigmoid_backward(dy, expected_cache)
    assert dx == pytest.approx(np.concatenate([-expected_dx, expected_dx], axis=-1), rel=1e-13, abs=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("x", "y"), [([1e4, 0, -1e4], [1, 0, 0]), ([-1e4, -1e4, -1e4], [1 / 3] * 3), ([-1e4, -1e4 + 1000, 0], [0, 0, 1])]
)
def test_large_logits_overflow_nowhere(x, y, dtype):
    """Warnings are errors in this suite."""
    found, _ = softmax_forward(pixel(x, dtype))
    assert found.dtype == dtype
    assert found.ravel() == pytest.approx(y, rel=1e-7)


def test_nan_passes_in_its_own_pixel():
    y, _ = softmax_forward(np.array([[0.0, np.nan], [0.0, 0.0]]).reshape(1, 1, 2, 2))
    assert np.isnan(y[0, 0, 0]).all()
    assert y[0, 0, 1].tolist() == [0.5, 0.5]
