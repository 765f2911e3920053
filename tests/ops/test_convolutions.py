"""What conv2d and conv_transpose2d have in common: sums in float64, no wider dtype, their own memory, their errors."""

import numpy as np
import pytest

from minunet import ops

both = pytest.mark.parametrize(
    ("forward", "backward"),
    [
        pytest.param(ops.conv2d_forward, ops.conv2d_backward, id="conv2d"),
        pytest.param(ops.conv_transpose2d_forward, ops.conv_transpose2d_backward, id="conv_transpose2d"),
    ],
)


@both
def test_gradients_of_float32_are_accumulated_in_float64(forward, backward):
    """100,000 rows of one pixel: each adds one product to dweight."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((1, 100_000, 1, c)).astype("float32") for c in (3, 2))
    weight, bias = rng.standard_normal((1, 1, 3, 2)).astype("float32"), np.zeros(2, "float32")
    _, cache = forward(x, weight, bias, stride=1)
    _, dweight, dbias = backward(dy, cache)
    products = x[0].swapaxes(1, 2) * dy[0]
    for found, terms in ((dweight[0, 0], products), (dbias, dy[0, :, 0])):
        assert np.array_equal(found, terms.astype("float64").sum(axis=0).astype("float32"))


@both
def test_float32_is_not_widened_on_the_way(forward, backward):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((1, 20, 20, c)).astype("float32") for c in (3, 5))
    weight = rng.standard_normal((1, 1, 3, 5)).astype("float32")
    y, cache = forward(x, weight, None, stride=1)
    dx, _, _ = backward(dy, cache)
    assert np.array_equal(y, x @ weight[0, 0])
    assert np.array_equal(dx, dy @ np.ascontiguousarray(weight[0, 0].T))


@both
def test_results_do_not_keep_the_padded_image_alive(forward, backward):
    y, cache = forward(np.ones((1, 5, 5, 1)), np.ones((3, 3, 1, 1)), None)
    dx, _, _ = backward(np.full_like(y, 2.0), cache)
    assert y.flags.owndata
    assert dx.flags.owndata


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones((3, 3, 2))}, r"^weight must have shape \(KH, KW, C_in, C_out\).*got \(3, 3, 2\)"),
        ({"weight": np.ones((3, 0, 2, 1))}, r"^weight must have shape .*got \(3, 0, 2, 1\)"),
        ({"weight": np.ones((3, 3, 3, 1))}, r"^weight must have C_in = 2"),
        ({"weight": np.ones((3, 3, 2, 1), "float32")}, "^weight must have dtype float64, got float32"),
        ({"bias": np.ones(2)}, r"^bias must have shape \(1,\), got \(2,\)"),
        ({"bias": np.ones(1, "float32")}, "^bias must have dtype float64, got float32"),
        ({"stride": 0}, "^stride must be at least 1, got 0"),
        ({"padding": -1}, "^padding must be .*got -1"),
        ({"padding": "valid"}, "^padding must be .*got 'valid'"),
    ],
)
def test_refuses(forward, backward, change, message):
    arguments = {"x": np.ones((1, 4, 6, 2)), "weight": np.ones((3, 3, 2, 1)), "bias": np.ones(1)}
    backward(np.ones_like(forward(**arguments)[0]) * 2.0, forward(**arguments)[1])  # nothing else is wrong with them
    with pytest.raises(ValueError, match=message):
        forward(**{**arguments, **change})
