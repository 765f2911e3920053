"""Tiles: together they are the whole, to the last bit where BLAS allows it, and not with a margin any smaller."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.network.unet import UNet
from minunet.training import tiles
from minunet.training.tiles import margin_of, spans
from tests.strategies import seeds


@st.composite
def axes(draw):
    """Arguments of ``spans``: any length, and windows from the smallest that will do."""
    period = draw(st.sampled_from([1, 2, 4, 8]))
    margin = period * draw(st.integers(0, 3))
    side = 2 * margin + period * draw(st.integers(1, 6))
    return draw(st.integers(1, 200)), side, period, margin


@given(axes())
def test_each_pixel_is_kept_once_and_far_from_every_edge_that_is_no_border(axis):
    length, side, period, margin = axis
    found = spans(*axis)
    assert [pixel for span in found for pixel in range(span.keep_start, span.keep_stop)] == list(range(length))
    padded = -(-length // period) * period
    for span in found:
        assert span.start % period == 0
        assert span.stop - span.start == min(side, padded)
        assert 0 <= span.start < span.stop <= padded
        assert span.keep_start < span.keep_stop
        assert span.start == 0 or span.keep_start - span.start >= margin
        assert span.stop == padded or span.stop - span.keep_stop >= margin


def test_windows_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="^side must be at least two margins and a period, 20, got 16"):
        spans(100, 16, 4, 8)


def random_net(seed, **config):
    """A network whose signals reach the output on every path: gammas and betas are positive."""
    net = UNet(**{"dtype": "float64", "seed": seed, "dropout": 0.0, **config})
    draw = np.random.default_rng(seed)
    for name, array in (net.parameters() | net.buffers()).items():
        if not name.endswith("weight"):
            array[...] = draw.uniform(0.5, 2, array.shape)
    return net


def predicted(net, x, side):
    """The prediction for images x (N, H, W, C), tile by tile."""
    _, height, width, _ = x.shape
    padded = net.pad(x)
    found = np.full((*x.shape[:3], net.config["out_channels"]), np.nan, x.dtype)
    for rows, columns in tiles.tiles(net, height, width, side):
        window = net.predict(padded[:, rows.window, columns.window])
        found[:, rows.kept, columns.kept] = window[:, rows.inside, columns.inside]
    return found


@given(
    seed=seeds,
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    up_kernel=st.integers(1, 3),
    head_kernel=st.sampled_from([1, 2, 3, 5]),
    out_channels=st.integers(1, 2),
    excess=st.tuples(st.integers(-9, 40), st.integers(-9, 40)),
    periods=st.integers(1, 3),
)
def test_tiles_are_the_whole(seed, widths, up_kernel, head_kernel, out_channels, excess, periods):
    net = random_net(
        seed, widths=widths, up_kernel=up_kernel, head_kernel=head_kernel, out_channels=out_channels, in_channels=2
    )
    period = 2**net.depth
    side = 2 * margin_of(net) + periods * period
    height, width = (max(1, side + more) for more in excess)
    x = np.random.default_rng(seed).standard_normal((1, height, width, 2))
    found, expected = predicted(net, x, side), net.predict(x)
    assert np.abs(found - expected).max() <= 1e-14


MARGINS = [
    ((4,), 2, 3, 3),
    ((2, 3), 2, 1, 8),
    ((2, 3), 3, 5, 12),
    ((2, 3, 4), 2, 1, 24),
    ((2, 3, 4), 3, 3, 28),
    ((3, 4, 5, 6), 2, 1, 48),
    ((3, 4, 5, 6), 3, 3, 56),
    ((2, 3, 4, 5, 6), 3, 3, 112),
]


@pytest.mark.parametrize(("widths", "up_kernel", "head_kernel", "margin"), MARGINS)
def test_no_smaller_margin_will_do(widths, up_kernel, head_kernel, margin):
    """Rows from the margin on are right, to the last bit; with a period less, the first of them are not."""
    net = random_net(1, widths=widths, up_kernel=up_kernel, head_kernel=head_kernel)
    period = 2**net.depth
    assert margin_of(net) == margin
    x = np.random.default_rng(2).standard_normal((1, 2 * margin + 2 * period, 2 * period, 3))
    whole = net.predict(x)
    assert np.array_equal(net.predict(x[:, period:])[:, margin:], whole[:, period + margin :])
    less = net.predict(x[:, 2 * period :])[:, margin - period :]
    assert not np.array_equal(less, whole[:, period + margin :])
    # And at the bottom.
    stop = margin + period
    assert np.array_equal(net.predict(x[:, :-period])[:, :period], whole[:, :period])
    assert np.array_equal(net.predict(x[:, :stop])[:, :period], whole[:, :period])
