"""Soft Dice, beyond the contract that test_contract.py holds it to: by hand, and its properties."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.ops.dice_loss import dice_loss_backward, dice_loss_forward
from tests.strategies import dice_loss_cases, overs, seeds, smooths


def images(values, n=1):
    """The values as ``n`` images of one row and one channel."""
    return np.array(values, dtype=float).reshape(n, 1, -1, 1)


def test_dice_by_hand():
    p, t = images([0.5, 1.0, 0.25]), images([1, 1, 0])
    loss, cache = dice_loss_forward(p, t, smooth=0.25)
    assert loss == 1 - 3.25 / 4.0  # (2 * 1.5 + 0.25) / (1.75 + 2 + 0.25)
    # -dDice/dp = (Dice - 2t) / 4
    assert dice_loss_backward(cache).ravel().tolist() == [(0.8125 - 2) / 4, (0.8125 - 2) / 4, 0.8125 / 4]


def test_dice_over_the_image_is_the_mean_of_the_images():
    p, t = images([0.5, 1.0, 0.25, 0.5], n=2), images([1, 1, 0, 1], n=2)
    losses = [dice_loss_forward(p[n : n + 1], t[n : n + 1])[0] for n in range(2)]
    assert dice_loss_forward(p, t, over="image")[0] == np.mean(losses)
    whole, _ = dice_loss_forward(p, t, over="batch")
    assert whole == dice_loss_forward(p.reshape(1, 1, 4, 1), t.reshape(1, 1, 4, 1))[0]
    assert whole != np.mean(losses)


def test_dice_over_the_class_is_the_mean_of_the_channels():
    p, t = np.array([[0.5, 0.25], [1.0, 0.75]]), np.array([[1.0, 0.0], [1.0, 1.0]])
    p, t = p.reshape(2, 1, 1, 2), t.reshape(2, 1, 1, 2)  # two images of one pixel
    loss, cache = dice_loss_forward(p, t, over="class")
    first, second = (2 * 1.5 + 1) / (1.5 + 2 + 1), (2 * 0.75 + 1) / (1 + 1 + 1)
    assert loss == pytest.approx(1 - (first + second) / 2, rel=1e-15, abs=0)
    # (Dice - 2t) / denominator of the channel, and half of it: there are two channels
    expected = np.array([[first - 2, second], [first - 2, second - 2]]) / [4.5, 3.0] / 2
    assert dice_loss_backward(cache).reshape(2, 2) == pytest.approx(expected, rel=1e-15, abs=0)
    assert loss == np.mean([dice_loss_forward(p[..., [c]], t[..., [c]])[0] for c in range(2)])


def test_a_small_class_beside_a_large_one_has_a_say_over_the_class_alone():
    """The large one is found, the small one is missed."""
    t = np.zeros((1, 1, 100, 2))
    t[:, :, :90, 0], t[:, :, 90:95, 1] = 1, 1
    found = t * [1, 0]
    losses = {over: dice_loss_forward(found, t, smooth=1e-6, over=over)[0] for over in ("batch", "image", "class")}
    assert losses["class"] == pytest.approx(0.5, rel=1e-6)
    assert losses["batch"] == losses["image"] < 0.03


def test_smooth_is_1_and_the_batch_is_one_mask_unless_said():
    p, t = images([0.5, 0.25], n=2), images([1, 0], n=2)
    assert dice_loss_forward(p, t)[0] == 1 - (2 * 0.5 + 1) / (0.75 + 1 + 1)


@given(case=dice_loss_cases())
def test_dice_is_between_0_and_1(case):
    loss, _ = dice_loss_forward(**case.inputs, **case.options)
    assert 0 <= loss <= 1


@given(case=dice_loss_cases())
def test_dice_is_symmetric(case):
    p, options = case.inputs["probabilities"], dict(case.options)
    t = options.pop("target")
    assert dice_loss_forward(p, t, **options)[0] == dice_loss_forward(t, p, **options)[0]


@given(case=dice_loss_cases())
def test_dice_does_not_know_where_a_pixel_is(case):
    p, options = case.inputs["probabilities"], dict(case.options)
    t = options.pop("target")
    order = case.rng.permutation(p.shape[2])
    loss, cache = dice_loss_forward(p, t, **options)
    permuted, permuted_cache = dice_loss_forward(p[:, :, order], t[:, :, order], **options)
    assert abs(permuted - loss) <= 1e-15
    gradient = dice_loss_backward(cache)
    assert np.abs(dice_loss_backward(permuted_cache) - gradient[:, :, order]).max() <= 1e-14 * np.abs(gradient).max()


@given(seed=seeds, smooth=smooths, over=overs, share=st.sampled_from([0.0, 0.3, 1.0]))
def test_a_perfect_mask_has_loss_0_the_empty_one_included(seed, smooth, over, share):
    mask = (np.random.default_rng(seed).random((2, 4, 4, 1)) < share).astype(float)
    loss, cache = dice_loss_forward(mask, mask, smooth, over)
    assert loss == 0
    # And from there a pixel inside can only get worse by falling, one outside only by rising.
    gradient = dice_loss_backward(cache)
    assert (gradient[mask == 1] < 0).all()
    assert (gradient[mask == 0] > 0).all()


@given(smooth=smooths)
def test_a_false_alarm_on_an_empty_mask_costs_more_the_larger_it_is(smooth):
    empty = images([0] * 8)
    losses = [dice_loss_forward(images([1] * n + [0] * (8 - n)), empty, smooth)[0] for n in range(9)]
    assert losses == [1 - smooth / (n + smooth) for n in range(9)]


def test_a_missed_mask_costs_nearly_everything():
    assert dice_loss_forward(images([0] * 99), images([1] * 99), smooth=1.0)[0] == 0.99


def test_sums_of_float32_are_accumulated_in_float64():
    rng = np.random.default_rng(0)
    p, t = rng.random((1, 40, 50, 1)).astype("float32"), rng.random((1, 40, 50, 1)).astype("float32")
    _, cache = dice_loss_forward(p, t)
    denominator = math.fsum(p.ravel().tolist()) + math.fsum(t.ravel().tolist()) + 1
    assert abs(cache.denominator.item() - denominator) <= 1e-14 * denominator
    overlap = math.fsum(np.float64(p * t).ravel().tolist())
    assert abs(cache.dice.item() - (2 * overlap + 1) / denominator) <= 1e-14
