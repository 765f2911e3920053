"""batch_norm2d, beyond the contract of every op: by hand, its statistics, its invariances, its errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.ops import batch_norm2d_backward, batch_norm2d_forward
from tests.strategies import batch_norm2d_cases


def arguments(c=1, **change):
    parameters = {"gamma": np.ones(c), "beta": np.zeros(c), "running_mean": np.zeros(c), "running_var": np.ones(c)}
    return {**parameters, **change}


def test_training_by_hand():
    x = np.array([1.0, 3.0, 5.0, 7.0]).reshape(2, 1, 2, 1)  # mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    y, cache = batch_norm2d_forward(x, **arguments(gamma=np.array([6.0]), beta=np.array([0.5])), training=True, eps=4.0)
    assert y.ravel().tolist() == [-3 * 2 + 0.5, -1 * 2 + 0.5, 1 * 2 + 0.5, 3 * 2 + 0.5]  # sqrt(5 + 4) = 3, 6 / 3 = 2
    assert (cache.batch_mean.tolist(), cache.batch_var.tolist()) == ([4.0], [5.0])

    dx, dgamma, dbeta = batch_norm2d_backward(np.array([1.0, 0, 0, 0]).reshape(x.shape), cache)
    assert dgamma.tolist() == [-1.0]
    assert dbeta.tolist() == [1.0]
    # gamma / 3 * (dy - mean(dy) - x_hat * mean(dy * x_hat)), with x_hat = (-1, -1/3, 1/3, 1)
    expected = 2 * (np.array([1, 0, 0, 0]) - 1 / 4 - np.array([-1, -1 / 3, 1 / 3, 1]) * (-1 / 4))
    assert np.abs(dx.ravel() - expected).max() <= 1e-15 * np.abs(expected).max()


def test_inference_by_hand():
    x = np.array([1.0, 3.0]).reshape(1, 1, 2, 1)
    running = {"running_mean": np.array([1.0]), "running_var": np.array([12.0])}
    y, cache = batch_norm2d_forward(x, **arguments(gamma=np.array([8.0]), **running), training=False, eps=4.0)
    assert y.ravel().tolist() == [0.0, 4.0]  # 8 * (x - 1) / sqrt(12 + 4)
    assert cache.batch_mean is None
    assert cache.batch_var is None
    dx, dgamma, dbeta = batch_norm2d_backward(np.array([1.0, 2.0]).reshape(x.shape), cache)
    assert dx.ravel().tolist() == [2.0, 4.0]
    assert dgamma.tolist() == [1.0]
    assert dbeta.tolist() == [3.0]


def test_eps_is_that_of_keras():
    x = np.zeros((1, 1, 2, 1))
    _, cache = batch_norm2d_forward(x, **arguments(), training=True)
    assert cache.inverse_std.item() == 1 / np.sqrt(1e-3)


@given(case=batch_norm2d_cases(training=True))
def test_batch_statistics_are_those_of_each_channel(case):
    x = case.inputs["x"]
    _, cache = batch_norm2d_forward(**case.inputs, **case.options)
    # The variance is biased: divided by the number of values. NumPy's default is too.
    assert np.abs(cache.batch_mean - x.mean(axis=(0, 1, 2))).max() <= 1e-15 * np.abs(x).max()
    assert np.abs(cache.batch_var - x.var(axis=(0, 1, 2))).max() <= 1e-15 * np.abs(x).max() ** 2


@given(case=batch_norm2d_cases(training=True))
def test_the_gradient_of_x_sums_to_zero(case):
    """A shift of all x changes nothing, so the slope along it is zero, in each channel."""
    y, cache = batch_norm2d_forward(**case.inputs, **case.options)
    dx, _, _ = batch_norm2d_backward(case.rng.standard_normal(y.shape), cache)
    scale = np.abs(case.inputs["gamma"] * cache.inverse_std).max()
    assert np.abs(dx.sum(axis=(0, 1, 2))).max() <= 1e-13 * scale


@given(
    case=batch_norm2d_cases(training=True),
    factor=st.sampled_from([0.5, 3.0, 100.0]),
    shift=st.sampled_from([-2.0, 50.0]),
)
def test_scale_and_shift_of_x_do_not_matter(case, factor, shift):
    """Up to eps, which is scaled along here to make it exact."""
    options = {**case.options, "eps": case.options["eps"] * factor**2}
    y, _ = batch_norm2d_forward(**case.inputs, **case.options)
    moved = {**case.inputs, "x": factor * case.inputs["x"] + shift}
    y_moved, _ = batch_norm2d_forward(**moved, **options)
    assert np.abs(y_moved - y).max() <= 1e-11 * np.abs(y).max()


@given(case=batch_norm2d_cases(training=True))
def test_the_running_statistics_have_no_part_in_training(case):
    y, _ = batch_norm2d_forward(**case.inputs, **case.options)
    nan = {name: np.full_like(case.options[name], np.nan) for name in ("running_mean", "running_var")}
    assert np.array_equal(batch_norm2d_forward(**case.inputs, **{**case.options, **nan})[0], y)


@given(case=batch_norm2d_cases(training=False))
def test_inference_is_affine_and_treats_each_pixel_alone(case):
    inputs, options = case.inputs, case.options
    y, cache = batch_norm2d_forward(**inputs, **options)
    slope = inputs["gamma"] / np.sqrt(options["running_var"] + options["eps"])
    expected = inputs["x"] * slope + (inputs["beta"] - options["running_mean"] * slope)
    assert np.abs(y - expected).max() <= 1e-13 * max(np.abs(expected).max(), np.abs(slope).max())
    pixel, _ = batch_norm2d_forward(**{**inputs, "x": inputs["x"][:1, :1, :1]}, **options)
    assert np.array_equal(pixel, y[:1, :1, :1])
    dy = case.rng.standard_normal(y.shape)
    dx = batch_norm2d_backward(dy, cache)[0]
    assert np.abs(dx - dy * slope).max() <= 1e-14 * np.abs(dx).max()


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_sums_of_float32_are_accumulated_in_float64(mean):
    """100,000 values a channel: a running float32 sum would lose more than one digit of the mean."""
    x = (mean + np.random.default_rng(0).standard_normal((1, 250, 400, 2))).astype("float32")
    parameters = {name: value.astype("float32") for name, value in arguments(c=2).items()}
    _, cache = batch_norm2d_forward(x, **parameters, training=True)
    exact = x.astype("float64")
    exact_mean, exact_var = exact.mean(axis=(0, 1, 2)), exact.var(axis=(0, 1, 2))
    assert np.abs(cache.batch_mean - exact_mean).max() <= 6e-8 * np.abs(exact_mean).max()  # one rounding of float32
    assert np.abs(cache.batch_var - exact_var).max() <= 1e-6 * exact_var.max()


def test_gradients_of_float32_are_accumulated_in_float64():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 250, 400, 2)).astype("float32")
    dy = (1 + rng.standard_normal(x.shape)).astype("float32")
    parameters = {name: value.astype("float32") for name, value in arguments(c=2).items()}
    _, cache = batch_norm2d_forward(x, **parameters, training=False)
    _, dgamma, dbeta = batch_norm2d_backward(dy, cache)
    for found, terms in ((dgamma, dy * cache.x_hat), (dbeta, dy)):
        exact = terms.astype("float64").sum(axis=(0, 1, 2))
        assert np.array_equal(found, exact.astype("float32"))


def test_nan_stays_in_its_channel():
    x = np.random.default_rng(0).standard_normal((1, 3, 3, 2))
    x[0, 1, 1, 0] = np.nan
    y, _ = batch_norm2d_forward(x, **arguments(c=2), training=True)
    assert np.isnan(y[..., 0]).all()
    assert np.isfinite(y[..., 1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": np.ones(3)}, r"^gamma must have shape \(2,\), got \(3,\)"),
        ({"beta": np.ones(3)}, r"^beta must have shape \(2,\), got \(3,\)"),
        ({"running_mean": np.ones(3)}, r"^running_mean must have shape \(2,\), got \(3,\)"),
        ({"running_var": np.ones(3)}, r"^running_var must have shape \(2,\), got \(3,\)"),
        ({"gamma": np.ones(2, "float32")}, "^gamma must have dtype float64, got float32"),
        ({"eps": 0.0}, "^eps must be positive.*got 0.0"),
        ({"eps": -1e-3}, "^eps must be positive.*got -0.001"),
        ({"eps": np.nan}, "^eps must be positive.*got nan"),
        ({"eps": np.inf}, "^eps must be positive.*got inf"),
        (
            {"x": np.ones((1, 1, 1, 2))},
            r"^x must have more than one value a channel in training, got \(1, 1, 1, 2\)",
        ),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        batch_norm2d_forward(**{"x": np.ones((1, 3, 3, 2)), **arguments(c=2), "training": True, **change})


def test_a_single_value_a_channel_is_fine_in_inference():
    y, _ = batch_norm2d_forward(np.full((1, 1, 1, 1), 2.0), **arguments(), training=False, eps=3.0)
    assert y.item() == 1.0
