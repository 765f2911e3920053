"""conv2d by hand, its special cases, its padding. What it shares with its sibling: test_convolutions.py."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.gradcheck import check_op
from minunet.ops import conv2d_backward, conv2d_forward
from minunet.ops.conv2d import output_size
from tests.strategies import conv2d_cases, seeds


def image(rows):
    return np.array(rows, dtype=float)[np.newaxis, :, :, np.newaxis]


def kernel(rows):
    return np.array(rows, dtype=float)[:, :, np.newaxis, np.newaxis]


def test_by_hand():
    x, weight = image([[1, 2, 3], [4, 5, 6]]), kernel([[10, 1]])
    y, cache = conv2d_forward(x, weight, np.array([100.0]), padding=0)
    # 100 + 10 * left + 1 * right: a kernel that were flipped would give 121, ...
    assert y[0, :, :, 0].tolist() == [[112, 123], [145, 156]]

    dx, dweight, dbias = conv2d_backward(image([[1, 0], [0, 2]]), cache)
    assert dx[0, :, :, 0].tolist() == [[10, 1, 0], [0, 20, 2]]
    assert dweight[:, :, 0, 0].tolist() == [[1 * 1 + 5 * 2, 2 * 1 + 6 * 2]]
    assert dbias.tolist() == [3]


def test_channels_by_hand():
    x, weight = np.array([2.0, 3.0]).reshape(1, 1, 1, 2), np.array([[1.0, 10, 100], [7, 70, 700]]).reshape(1, 1, 2, 3)
    y, cache = conv2d_forward(x, weight, None)
    assert y.ravel().tolist() == [2 + 21, 20 + 210, 200 + 2100]
    dx, dweight, dbias = conv2d_backward(np.array([1.0, 2, 3]).reshape(1, 1, 1, 3), cache)
    assert dx.ravel().tolist() == [321, 7 * 321]
    assert dweight[0, 0].tolist() == [[2, 4, 6], [3, 6, 9]]
    assert dbias is None


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "output", "before_and_after"),
    [
        (5, 3, 1, 5, (1, 1)),
        (5, 2, 1, 5, (0, 1)),  # the odd one comes after
        (5, 4, 1, 5, (1, 2)),
        (4, 3, 2, 2, (0, 1)),
        (5, 3, 2, 3, (1, 1)),
        (5, 1, 2, 3, (0, 0)),
        (2, 1, 3, 1, (0, 0)),  # stride beyond kernel and image: nothing is missing
        (7, 2, 3, 3, (0, 1)),
    ],
)
def test_same_padding_is_that_of_keras(size, kernel_size, stride, output, before_and_after):
    assert output_size(size, kernel_size, stride, "same") == (output, before_and_after)
    x = np.arange(1.0, size + 1).reshape(1, size, 1, 1)
    y, _ = conv2d_forward(x, np.ones((kernel_size, 1, 1, 1)), None, stride)
    padded = np.pad(x.ravel(), before_and_after)
    assert y.ravel().tolist() == [padded[i * stride : i * stride + kernel_size].sum() for i in range(output)]


def test_the_two_axes_are_padded_apart():
    y, cache = conv2d_forward(np.ones((1, 2, 5, 1)), np.ones((4, 1, 1, 1)), None, padding="same")
    assert y[0, :, :, 0].tolist() == [[2] * 5, [2] * 5]
    assert cache.pad == ((1, 2), (0, 0))


@pytest.mark.parametrize("kernel_size", [(4, 1), (1, 4), (3, 5)])
def test_the_padding_of_each_axis_is_cut_from_its_gradient(kernel_size):
    """Top and left differ, so a gradient whose axes are exchanged is shifted."""
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((1, 4, 5, 2)), "weight": rng.standard_normal((*kernel_size, 2, 1)), "bias": None}
    report = check_op(conv2d_forward, conv2d_backward, inputs)
    assert report.ok(), str(report)


@given(seed=seeds, height=st.integers(1, 6), width=st.integers(1, 6), half=st.integers(0, 2))
def test_a_delta_kernel_is_the_identity(seed, height, width, half):
    x = np.random.default_rng(seed).standard_normal((2, height, width, 3))
    weight = np.zeros((2 * half + 1, 2 * half + 1, 3, 3))
    weight[half, half] = np.eye(3)
    y, cache = conv2d_forward(x, weight, None)
    assert np.array_equal(y, x)
    assert np.array_equal(conv2d_backward(x, cache)[0], x)


@given(seed=seeds, stride=st.integers(1, 3))
def test_1x1_is_a_matrix_product(seed, stride):
    rng = np.random.default_rng(seed)
    x, weight, bias = rng.standard_normal((2, 5, 4, 3)), rng.standard_normal((1, 1, 3, 2)), rng.standard_normal(2)
    y, _ = conv2d_forward(x, weight, bias, stride)
    expected = x[:, ::stride, ::stride] @ weight[0, 0] + bias
    assert np.abs(y - expected).max() <= 1e-13 * np.abs(expected).max()


@given(seed=seeds, down=st.integers(0, 2), right=st.integers(0, 2))
def test_shifting_the_input_shifts_the_interior(seed, down, right):
    rng = np.random.default_rng(seed)
    x, weight = np.zeros((1, 9, 9, 2)), rng.standard_normal((3, 3, 2, 2))
    x[:, 2:6, 2:6] = rng.standard_normal((1, 4, 4, 2))
    y, _ = conv2d_forward(x, weight, None)
    shifted, _ = conv2d_forward(np.roll(x, (down, right), axis=(1, 2)), weight, None)
    assert np.array_equal(shifted, np.roll(y, (down, right), axis=(1, 2)))


@given(case=conv2d_cases())
def test_number_padding_is_a_border_of_zeros(case):
    x, weight = case.inputs["x"], case.inputs["weight"]
    border = ((0, 0), (2, 2), (2, 2), (0, 0))
    y, _ = conv2d_forward(x, weight, None, padding=2)
    without, _ = conv2d_forward(np.pad(x, border), weight, None, padding=0)
    assert np.array_equal(y, without)


def test_nan_reaches_only_the_windows_that_see_it():
    x = np.ones((1, 5, 5, 1))
    x[0, 2, 3] = np.nan
    y, _ = conv2d_forward(x, np.ones((3, 3, 1, 1)), None)
    expected = np.zeros((5, 5), dtype=bool)
    expected[1:4, 2:5] = True
    assert np.array_equal(np.isnan(y[0, :, :, 0]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": np.ones((5, 1, 2, 1)), "padding": 0},
            "^x of 4 x 6 pixels with padding 0 is smaller than the kernel",
        ),
        (
            {"weight": np.ones((1, 9, 2, 1)), "padding": 1},
            "^x of 4 x 6 pixels with padding 1 is smaller than the kernel",
        ),
    ],
)
def test_refuses_an_image_smaller_than_the_kernel(change, message):
    arguments = {"x": np.ones((1, 4, 6, 2)), "weight": np.ones((3, 3, 2, 1)), "bias": np.ones(1)}
    with pytest.raises(ValueError, match=message):
        conv2d_forward(**{**arguments, **change})
