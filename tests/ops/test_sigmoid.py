"""sigmoid, beyond the contract of every op: exact to the last digits over the whole range, without a warning."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.ops import sigmoid_backward, sigmoid_forward


def sigmoid_and_slope(x, dtype="float64"):
    y, cache = sigmoid_forward(np.full((1, 1, 1, 1), x, dtype))
    return y.item(), sigmoid_backward(np.full_like(y, 2.0), cache).item() / 2


def exact(x):
    """s(x) and s(-x) from e^-|x| (which math.exp rounds once) in exact fractions."""
    e = Fraction(math.exp(-abs(x)))
    larger, smaller = 1 / (1 + e), e / (1 + e)
    return (larger, smaller) if x >= 0 else (smaller, larger)


@given(x=st.floats(-708, 708))
def test_value_and_slope_have_all_their_digits(x):
    y, slope = sigmoid_and_slope(x)
    s, complement = exact(x)
    assert abs(Fraction(y) - s) <= Fraction(4e-16) * s
    assert abs(Fraction(slope) - s * complement) <= Fraction(8e-16) * s * complement


@given(x=st.floats(-708, 708))
def test_the_cache_holds_s_of_x_and_of_minus_x_bit_for_bit(x):
    """Both are made of e^-|x|, so the two sides of 0 are computed from the same number."""
    y, cache = sigmoid_forward(np.full((1, 1, 1, 1), x))
    mirrored, mirrored_cache = sigmoid_forward(np.full((1, 1, 1, 1), -x))
    assert (cache.y, cache.complement) == (y, mirrored)
    assert (mirrored_cache.y, mirrored_cache.complement) == (mirrored, y)


@pytest.mark.parametrize(
    ("x", "y", "slope"),
    [(0.0, 0.5, 0.25), (1e4, 1.0, 0.0), (-1e4, 0.0, 0.0), (np.inf, 1.0, 0.0), (-np.inf, 0.0, 0.0)],
)
def test_middle_and_ends(x, y, slope):
    """Warnings are errors in this suite, so there is no overflow on the way."""
    assert sigmoid_and_slope(x) == (y, slope)


@pytest.mark.parametrize("x", [-80.0, 80.0])
def test_float32_does_not_overflow(x):
    y, slope = sigmoid_and_slope(x, "float32")
    assert (y > 0.5) == (x > 0)
    assert slope == pytest.approx(math.exp(-80), rel=1e-6, abs=0)


def test_the_slope_does_not_vanish_where_the_value_has_become_1():
    y, slope = sigmoid_and_slope(40.0)
    assert y == 1.0  # so that y * (1 - y) would be 0
    assert slope == pytest.approx(math.exp(-40), rel=1e-15, abs=0)


def test_nan_passes():
    y, slope = sigmoid_and_slope(np.nan)
    assert math.isnan(y)
    assert math.isnan(slope)


@given(x=st.floats(-50, 50))
def test_is_point_symmetric(x):
    y, slope = sigmoid_and_slope(x)
    y_mirrored, slope_mirrored = sigmoid_and_slope(-x)
    assert abs(y + y_mirrored - 1) <= 2.3e-16
    assert slope == slope_mirrored
