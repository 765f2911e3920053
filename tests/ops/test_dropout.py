"""dropout, beyond the contract of every op: what is kept, how often, by which random numbers, its errors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.base.rng import Key, random_uint16
from minunet.ops import dropout_backward, dropout_forward
from tests.strategies import keys

rates = st.sampled_from([0.1, 0.3, 0.5, 0.9])


def test_by_hand():
    key = Key(seed=5, epoch=1, step=2, stream=16, image=3)
    draws = random_uint16(key, 6)
    x = np.arange(1.0, 7.0).reshape(1, 1, 2, 3)
    y, cache = dropout_forward(x, 0.75, key=key)
    expected = [4 * value if draw >= 49152 else 0.0 for value, draw in zip(x.ravel(), draws, strict=True)]
    assert y.ravel().tolist() == expected
    dy = np.array([1.0, -2.0, 3.0, 5.0, 0.5, -7.0])
    dx = dropout_backward(dy.reshape(x.shape), cache)
    assert dx.ravel().tolist() == [4 * slope * (value > 0) for slope, value in zip(dy, expected, strict=True)]


@given(key=keys())
def test_a_draw_equal_to_the_threshold_is_kept(key):
    """So that the share dropped is round(rate * 65536) / 65536 exactly."""
    draws = random_uint16(key, 6)
    rate = float(draws[2]) / 65536
    _, cache = dropout_forward(np.ones((1, 1, 2, 3)), rate, key=key)
    assert cache.kept.ravel().tolist() == (draws >= draws[2]).tolist()
    # A rate a little above it is rounded down to it.
    _, cache = dropout_forward(np.ones((1, 1, 2, 3)), (draws[2] + 0.3) / 65536 % 1, key=key)
    assert cache.kept.ravel().tolist() == (draws >= draws[2]).tolist()


@given(key=keys(), rate=rates)
def test_what_is_kept_is_scaled_exactly_and_the_rest_is_zero(key, rate):
    y, cache = dropout_forward(np.full((2, 8, 8, 4), 3.0), rate, key=key)
    assert set(np.unique(y)) <= {0.0, 3.0 * (1 / (1 - rate))}
    assert np.array_equal(y > 0, cache.kept)


@given(key=keys(), rate=rates)
def test_share_kept_and_mean(key, rate):
    x = np.ones((2, 40, 50, 2))
    y, cache = dropout_forward(x, rate, key=key)
    sigma = math.sqrt(rate * (1 - rate) / x.size)
    # 6 sigma: one run in 500 million leaves it by chance, and a rate that is off by 0.05 is caught.
    assert abs(cache.kept.mean() - (1 - rate)) <= 6 * sigma + 2**-16
    assert abs(y.mean() - 1) <= (6 * sigma + 2**-16) / (1 - rate)


@given(key=keys(), rate=rates)
def test_image_n_of_a_batch_is_the_first_of_a_key_n_images_later(key, rate):
    x = np.random.default_rng(0).standard_normal((3, 4, 4, 2))
    y, _ = dropout_forward(x, rate, key=key)
    for n in range(3):
        alone, _ = dropout_forward(x[n : n + 1], rate, key=key._replace(image=key.image + n))
        assert np.array_equal(alone, y[n : n + 1])


@given(key=keys())
def test_every_field_of_the_key_counts(key):
    x = np.ones((1, 16, 16, 4))

    def kept(key):
        return dropout_forward(x, 0.5, key=key)[1].kept

    assert np.array_equal(kept(key), kept(key))
    for field, value in key._asdict().items():
        assert not np.array_equal(kept(key), kept(key._replace(**{field: value + 1}))), field


@pytest.mark.parametrize(("rate", "key"), [(0.3, None), (0.0, Key(seed=0))])
def test_without_a_key_or_a_rate_it_is_the_identity(rate, key):
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 2))
    y, cache = dropout_forward(x, rate, key=key)
    assert np.array_equal(y, x)
    assert np.array_equal(dropout_backward(x, cache), x)


def test_a_dropped_nan_is_gone_and_a_kept_one_stays():
    x = np.full((1, 8, 8, 1), np.nan)
    y, cache = dropout_forward(x, 0.5, key=Key(seed=0))
    assert np.array_equal(np.isnan(y), cache.kept)
    assert np.array_equal(np.isnan(dropout_backward(x, cache)), cache.kept)
    assert not cache.kept.all()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, np.nan])
@pytest.mark.parametrize("key", [None, Key(seed=0)])
def test_refuses_a_rate_outside_0_to_1(rate, key):
    with pytest.raises(ValueError, match=rf"^rate must be in \[0, 1\), got {rate}"):
        dropout_forward(np.ones((1, 2, 2, 1)), rate, key=key)
