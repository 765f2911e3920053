"""relu, beyond the contract of every op: the kink, signed zero, NaN and infinity."""

import numpy as np
import pytest

from minunet.ops import relu_backward, relu_forward

TINY = np.nextafter(0.0, 1.0)  # the smallest float64 above 0


@pytest.mark.parametrize(
    ("x", "y", "slope"),
    [
        (2.0, 2.0, 1.0),
        (-2.0, 0.0, 0.0),
        (0.0, 0.0, 0.0),  # the kink: ReLU'(0) = 0
        (-0.0, 0.0, 0.0),
        (TINY, TINY, 1.0),
        (-TINY, 0.0, 0.0),
        (np.inf, np.inf, 1.0),
        (-np.inf, 0.0, 0.0),
        (np.nan, np.nan, 1.0),  # a NaN must not hide
    ],
)
def test_by_hand(x, y, slope):
    result, cache = relu_forward(np.full((1, 1, 1, 1), x))
    assert np.array_equal(result.item(), y, equal_nan=True)
    assert not np.signbit(result.item())
    assert relu_backward(np.full((1, 1, 1, 1), 3.0), cache).item() == 3.0 * slope


def test_a_blocked_nan_or_infinity_of_dy_is_gone():
    """0 * NaN would be NaN: the gradient is chosen, not multiplied."""
    _, cache = relu_forward(np.array([-1.0, 0.0, 1.0]).reshape(1, 1, 3, 1))
    assert relu_backward(np.array([np.nan, np.inf, 5.0]).reshape(1, 1, 3, 1), cache).ravel().tolist() == [0, 0, 5]
