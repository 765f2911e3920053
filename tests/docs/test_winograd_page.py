"""What docs/engines/winograd.md and its picture rest on: the general filters, the engine's own calls, the bound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from docs.figures.winograd_error import EPSILON, POINTS, decisions, direct, filtered, from_points, transforms
from minunet import UNet
from minunet.engines.cpu import tiles, winograd
from minunet.engines.cpu.buffers import Scratch
from minunet.network.layers import map_arrays
from minunet.ops import conv2d_forward


def problem(seed, outputs, channels, filters, dtype="float64"):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, outputs + 2, outputs + 2, channels)).astype(dtype)
    return x, rng.standard_normal((3, 3, channels, filters)).astype(dtype)


@pytest.mark.parametrize("outputs", POINTS)
def test_fewest_products(outputs):
    inputs, filters, out = transforms(outputs)
    assert inputs.shape == (outputs + 2, outputs + 2)
    assert filters.shape == (outputs + 2, 3)
    assert out.shape == (outputs, outputs + 2)


def test_the_points_of_f_4_3_give_the_matrices_of_the_engine():
    for derived, own in zip(from_points(POINTS[4]), transforms(4), strict=True):
        np.testing.assert_allclose(derived, own, rtol=1e-15)
    np.testing.assert_array_equal(transforms(4).inputs, winograd.INPUT_TRANSFORM)


@given(st.integers(0, 2**32), st.sampled_from(sorted(POINTS)), st.integers(1, 4), st.integers(1, 3))
def test_all_ways_are_the_convolution(seed, outputs, channels, filters):
    x, w = problem(seed, outputs, channels, filters)
    y, _ = conv2d_forward(x, w, None, padding=0)
    scale = np.abs(y).max()
    np.testing.assert_allclose(direct(x, w), y, rtol=0, atol=1e-14 * scale)
    for directions in (1, 2):
        np.testing.assert_allclose(filtered(x, w, directions), y, rtol=0, atol=1e-12 * scale)


@given(st.integers(0, 2**32), st.sampled_from(sorted(POINTS)), st.integers(1, 8), st.sampled_from([1, 2]))
def test_the_error_stays_within_the_bound(seed, outputs, channels, directions):
    x, w = problem(seed, outputs, channels, 2, "float32")
    error = np.abs(filtered(x, w, directions) - direct(x.astype("float64"), w.astype("float64")))
    b, g, a = (np.abs(matrix) for matrix in transforms(outputs))
    growth = ((a @ (g.sum(axis=1) * b.sum(axis=1))).max() / 3) ** directions
    # So many roundings at most one after the other: in the sums of the transforms, of the products, and of G itself.
    roundings = directions * (2 * (outputs + 2) + 3) + 3 * channels + 3
    largest = 9 * channels * np.abs(x).max() * np.abs(w).max()
    assert error.max() <= roundings * EPSILON * growth * largest


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3))
def test_the_picture_goes_the_engines_way(seed, channels, filters):
    """One tile of the engine, with the zeros that it has left and right, is the same tile in the picture's code."""
    rng = np.random.default_rng(seed)
    matrices = winograd.matrices("float64")
    calls = tiles.Tiles(matrices, 1, 1, 4)
    scratch = Scratch()
    calls.take_room(scratch, channels, filters)
    scratch.allocate()
    scratch.reset()
    calls.take_room(scratch, channels, filters)
    calls.clear_room()
    band, w = rng.standard_normal((1, 6, 4, channels)), rng.standard_normal((3, 3, channels, filters))
    planes, sums = np.zeros(calls.planes_shape(channels)), np.zeros(calls.planes_shape(filters))
    out = np.zeros((1, 1, 4, 4 * filters))
    calls.input_transform(band, planes)()
    calls.products(planes, (matrices.filters_2d @ w.reshape(9, -1)).reshape(36, channels, filters), sums)()
    calls.output_transform(sums)(out)
    x = np.pad(band, ((0, 0), (0, 0), (1, 1), (0, 0)))
    scale = np.abs(out).max()
    np.testing.assert_allclose(filtered(x, w, 2), out.reshape(1, 4, 4, filters), rtol=0, atol=1e-12 * scale)


def test_a_decision_that_falls_otherwise_is_counted():
    net = UNet(widths=(2, 3), dropout=0.0)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3), "float32")
    chosen = decisions(net, x)
    assert chosen.size == 2 * (8 * 8 * 2 * 4 + 4 * 4 * 3 * 2) + 2 * 4 * 4 * 2  # ReLUs at both levels, and the pool
    np.testing.assert_array_equal(decisions(map_arrays(net, lambda a: a.copy()), x), chosen)
    assert (decisions(net, -x) != chosen).any()
