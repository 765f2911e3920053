"""concat, beyond the contract of every op: its order, its exact backward, its errors."""

import numpy as np
import pytest
from hypothesis import given

from minunet.ops import concat_backward, concat_forward
from tests.strategies import concat_cases


def test_by_hand():
    up, skip = np.array([1.0, 2.0]).reshape(1, 1, 1, 2), np.array([3.0]).reshape(1, 1, 1, 1)
    y, cache = concat_forward(up, skip)
    assert y.ravel().tolist() == [1, 2, 3]  # [up, skip]
    dup, dskip = concat_backward(np.array([4.0, 5.0, 6.0]).reshape(1, 1, 1, 3), cache)
    assert dup.ravel().tolist() == [4, 5]
    assert dskip.ravel().tolist() == [6]


@given(case=concat_cases())
def test_backward_is_exactly_the_split(case):
    up, skip = case.inputs["up"], case.inputs["skip"]
    y, cache = concat_forward(up, skip)
    dup, dskip = concat_backward(y, cache)
    assert np.array_equal(dup, up)
    assert np.array_equal(dskip, skip)


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (np.ones((2, 4, 4, 1)), r"^skip must have shape \(1, 4, 4, 1\), got \(2, 4, 4, 1\)"),
        (np.ones((1, 5, 4, 1)), r"^skip must have shape \(1, 4, 4, 1\), got \(1, 5, 4, 1\)"),
        (np.ones((1, 4, 3, 1)), r"^skip must have shape \(1, 4, 4, 1\), got \(1, 4, 3, 1\)"),
        (np.ones((1, 4, 4, 1), "float32"), "^skip must have dtype float64, got float32"),
        (np.ones((4, 4, 1)), r"^skip must have shape \(N, H, W, C\)"),
    ],
)
def test_refuses(skip, message):
    with pytest.raises(ValueError, match=message):
        concat_forward(np.ones((1, 4, 4, 2)), skip)
