"""max_pool2d, beyond the contract of every op: by hand, ties, NaN, its errors."""

import numpy as np
import pytest
from hypothesis import given

from minunet.ops import max_pool2d_backward, max_pool2d_forward
from tests.strategies import max_pool2d_cases


def pooled(rows, size=2):
    """y of one image of one channel, and where the gradient goes when each window's is 1, 2, 3, ..."""
    y, cache = max_pool2d_forward(np.array(rows, dtype=float)[np.newaxis, :, :, np.newaxis], size)
    dx = max_pool2d_backward(np.arange(1.0, y.size + 1).reshape(y.shape), cache)
    return y[0, :, :, 0].tolist(), dx[0, :, :, 0].tolist()


def test_by_hand():
    y, dx = pooled([[1, 2, 8, 7], [4, 3, 5, 6]])
    assert y == [[4, 8]]
    assert dx == [[0, 0, 2, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("window", "first"),
    [
        ([[5, 5], [5, 5]], (0, 0)),
        ([[0, 5], [5, 5]], (0, 1)),
        ([[0, 0], [5, 5]], (1, 0)),
        ([[5, 0], [0, 5]], (0, 0)),
        ([[0, 5], [5, 0]], (0, 1)),  # rows come before columns
        ([[-0.0, 0.0], [0.0, -1]], (0, 0)),  # equal zeros
        ([[-np.inf, -np.inf], [-np.inf, -np.inf]], (0, 0)),
    ],
)
def test_a_tie_goes_to_the_first(window, first):
    y, dx = pooled(window)
    expected = np.zeros((2, 2))
    expected[first] = 1
    assert y == [[max(max(row) for row in window)]]
    assert dx == expected.tolist()


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_nan_wins_over_every_number(place):
    window = np.array([[1.0, np.inf], [3.0, 2.0]])
    window[place] = np.nan
    y, dx = pooled(window)
    assert np.isnan(y).all()
    assert dx[place[0]][place[1]] == 1
    assert np.sum(dx) == 1


def test_windows_wider_than_a_byte_can_number():
    """17 x 17 pixels have 289 places: more than uint8 holds."""
    x = np.zeros((1, 17, 34, 1))
    x[0, 16, 16] = x[0, 15, 17] = 1.0
    y, cache = max_pool2d_forward(x, 17)
    assert y.ravel().tolist() == [1, 1]
    dx = max_pool2d_backward(np.array([2.0, 3.0]).reshape(y.shape), cache)
    assert (dx[0, 16, 16], dx[0, 15, 17]) == (2.0, 3.0)
    assert np.count_nonzero(dx) == 2


@pytest.mark.parametrize(("size", "dtype"), [(2, "uint8"), (16, "uint8"), (17, "int32")])
def test_the_winner_takes_one_byte_as_long_as_it_can(size, dtype):
    """It is kept from forward to backward for every pixel: four bytes would be as much as the activation itself."""
    _, cache = max_pool2d_forward(np.zeros((1, size, size, 1)), size)
    assert cache.winner.dtype == dtype


@given(case=max_pool2d_cases())
def test_the_whole_gradient_arrives_once(case):
    y, cache = max_pool2d_forward(**case.inputs, **case.options)
    dy = case.rng.integers(-9, 10, y.shape).astype(float)  # whole numbers: their sum is exact in any order
    dx = max_pool2d_backward(dy, cache)
    assert dx.sum() == dy.sum()
    assert np.count_nonzero(dx) == np.count_nonzero(dy)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((1, 4, 4, 1), 0, "^size must be at least 1, got 0"),
        ((1, 5, 4, 1), 2, r"^x must have a height and width that size = 2 divides, got \(1, 5, 4, 1\)"),
        ((1, 4, 5, 1), 2, r"^x must have a height and width that size = 2 divides, got \(1, 4, 5, 1\)"),
    ],
)
def test_refuses(shape, size, message):
    with pytest.raises(ValueError, match=message):
        max_pool2d_forward(np.ones(shape), size)
