"""conv_transpose2d by hand, the adjoint of conv2d, its crop. What it shares with its sibling: test_convolutions.py."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.ops import conv2d_backward, conv2d_forward, conv_transpose2d_backward, conv_transpose2d_forward
from tests.strategies import conv_transpose2d_cases, seeds


def column(values):
    return np.array(values, dtype=float).reshape(1, -1, 1, 1)


def test_by_hand():
    # 3 taps at stride 2: each input pixel paints 3 output pixels, and neighbours overlap in one.
    y, cache = conv_transpose2d_forward(
        column([1, 2]), column([100, 10, 1]).reshape(3, 1, 1, 1), np.array([0.5]), padding=0
    )
    assert y.ravel().tolist() == [100.5, 10.5, 1 + 200.5, 20.5, 2.5]
    dx, dweight, dbias = conv_transpose2d_backward(column([1, 2, 3, 4, 5]), cache)
    assert dx.ravel().tolist() == [100 + 20 + 3, 300 + 40 + 5]
    assert dweight.ravel().tolist() == [1 * 1 + 2 * 3, 1 * 2 + 2 * 4, 1 * 3 + 2 * 5]
    assert dbias.tolist() == [15]


def test_same_drops_the_last_row_and_column_of_3x3_at_stride_2():
    x = np.array([[1.0, 2], [3, 4]]).reshape(1, 2, 2, 1)
    weight = np.arange(1.0, 10).reshape(3, 3, 1, 1)
    full, _ = conv_transpose2d_forward(x, weight, None, padding=0)
    same, _ = conv_transpose2d_forward(x, weight, None, padding="same")
    assert full.shape == (1, 5, 5, 1)
    assert np.array_equal(same, full[:, :4, :4])


@pytest.mark.parametrize(
    ("kernel", "stride", "top", "rows"),
    [(2, 2, 0, 6), (3, 2, 0, 6), (4, 2, 1, 6), (5, 2, 1, 6), (3, 1, 1, 3), (4, 1, 1, 3), (1, 2, 0, 6), (2, 3, 0, 9)],
)
def test_same_keeps_stride_times_the_rows(kernel, stride, top, rows):
    x, weight = column([1, 10, 100]), np.arange(1.0, kernel + 1).reshape(kernel, 1, 1, 1)
    full = np.zeros(max(stride * 2 + kernel, rows))  # a kernel smaller than the stride leaves zeros at the end
    for i, value in enumerate(x.ravel()):
        full[stride * i : stride * i + kernel] += value * weight.ravel()
    y, _ = conv_transpose2d_forward(x, weight[:, :1], None, stride)
    assert y[:, :, 0].ravel().tolist() == full[top : top + rows].tolist()


@given(case=conv_transpose2d_cases())
def test_a_number_crops_that_many_pixels_on_each_side(case):
    x, weight, stride = case.inputs["x"], case.inputs["weight"], case.options["stride"]
    padding = case.options["padding"] if case.options["padding"] != "same" else 0
    full, _ = conv_transpose2d_forward(x, weight, None, stride, padding=0)
    y, _ = conv_transpose2d_forward(x, weight, None, stride, padding)
    rows, columns = full.shape[1] - padding, full.shape[2] - padding
    assert np.array_equal(y, full[:, padding:rows, padding:columns])


@given(
    seed=seeds, stride=st.integers(1, 3), kernel=st.integers(1, 4), out=st.tuples(st.integers(1, 3), st.integers(1, 3))
)
def test_is_the_adjoint_of_the_strided_convolution(seed, stride, kernel, out):
    """With the same weights, C_in and C_out exchanged: forward of the one is dx of the other, and the reverse."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((2, *(stride * (rows - 1) + kernel for rows in out), 3))
    weight = rng.standard_normal((kernel, kernel, 3, 2))
    y, cache = conv2d_forward(image, weight, None, stride, padding=0)
    upstream = rng.standard_normal(y.shape)
    dx, dweight, _ = conv2d_backward(upstream, cache)
    exchanged = weight.swapaxes(2, 3)
    painted, transposed_cache = conv_transpose2d_forward(upstream, exchanged, None, stride, padding=0)
    assert np.abs(painted - dx).max() <= 1e-14 * np.abs(dx).max()
    back, back_weight, _ = conv_transpose2d_backward(image, transposed_cache)
    assert np.abs(back - y).max() <= 1e-13 * np.abs(y).max()
    assert np.abs(back_weight - dweight.swapaxes(2, 3)).max() <= 1e-13 * np.abs(dweight).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding": 5}, "^padding 5 crops away all of the 9 x 13 pixels"),
        ({"x": np.ones((1, 9, 1, 2)), "padding": 2}, "^padding 2 crops away all of the 19 x 3 pixels"),
        ({"x": np.ones((1, 9, 1, 2)), "weight": np.ones((4, 4, 2, 1)), "padding": 2}, "^padding 2 .* 20 x 4 pixels"),
        ({"x": np.ones((1, 1, 9, 2)), "weight": np.ones((4, 4, 2, 1)), "padding": 2}, "^padding 2 .* 4 x 20 pixels"),
    ],
)
def test_refuses_a_crop_of_everything(change, message):
    arguments = {"x": np.ones((1, 4, 6, 2)), "weight": np.ones((3, 3, 2, 1)), "bias": np.ones(1)}
    with pytest.raises(ValueError, match=message):
        conv_transpose2d_forward(**{**arguments, **change})
