"""The losses, beyond the contract that tests/ops/test_contract.py holds them to: by hand, their properties, errors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.losses import (
    SegmentationLoss,
    bce_with_logits_backward,
    bce_with_logits_forward,
    dice_loss_backward,
    dice_loss_forward,
    segmentation_loss_backward,
    segmentation_loss_forward,
)
from minunet.ops import sigmoid_forward
from tests.strategies import bce_with_logits_cases, dice_loss_cases, overs, seeds, segmentation_loss_cases, smooths


def images(values, n=1):
    """The values as ``n`` images of one row and one channel."""
    return np.array(values, dtype=float).reshape(n, 1, -1, 1)


# --- Dice -----------------------------------------------------------------------------------------------------------


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


# --- Binary cross entropy -------------------------------------------------------------------------------------------


def test_bce_by_hand():
    loss, cache = bce_with_logits_forward(images([0.0, math.log(3)]), images([1, 0]))
    assert loss == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-15, abs=0)  # s(log 3) = 3/4
    assert bce_with_logits_backward(cache).ravel() == pytest.approx([-0.25, 0.375], rel=1e-15, abs=0)


@given(case=bce_with_logits_cases())
def test_bce_is_the_entropy_of_the_two_outcomes(case):
    z, t = case.inputs["logits"], case.options["target"]
    p, _ = sigmoid_forward(z)
    expected = np.mean(-t * np.log(p) - (1 - t) * np.log1p(-p))
    assert abs(bce_with_logits_forward(z, t)[0] - expected) <= 1e-12 * expected


@given(case=bce_with_logits_cases())
def test_bce_does_not_care_which_side_is_called_1(case):
    z, t = case.inputs["logits"], case.options["target"]
    loss, cache = bce_with_logits_forward(z, t)
    mirrored, mirrored_cache = bce_with_logits_forward(-z, 1 - t)
    assert abs(mirrored - loss) <= 1e-14 * max(loss, 1)
    difference = bce_with_logits_backward(cache) + bce_with_logits_backward(mirrored_cache)
    assert np.abs(difference).max() <= 1e-15


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("z", "t", "loss"), [(1e4, 1, 0), (1e4, 0, 1e4), (-1e4, 0, 0), (-1e4, 1, 1e4)])
def test_bce_of_large_logits_is_finite_and_warns_of_nothing(z, t, loss, dtype):
    result, cache = bce_with_logits_forward(images([z]).astype(dtype), images([t]))
    assert result == loss
    assert result.dtype == dtype
    assert bce_with_logits_backward(cache).item() == (z > 0) - t


@pytest.mark.parametrize("z", [0.1, 0.7, 3.0, 5.0])
def test_the_mean_of_equal_losses_of_float32_is_that_loss(z):
    """It is accumulated in float64: a float32 sum of 99,999 equal numbers is not 99,999 times the number."""
    one, _ = bce_with_logits_forward(images([z]).astype("float32"), images([0]))
    many, _ = bce_with_logits_forward(images([z] * 99_999).astype("float32"), images([0] * 99_999))
    assert many == one


# --- Their sum ------------------------------------------------------------------------------------------------------


@given(case=segmentation_loss_cases())
def test_segmentation_loss_is_the_weighted_sum(case):
    z, options = case.inputs["logits"], dict(case.options)
    t, dice_weight, bce_weight = (options.pop(name) for name in ("target", "dice_weight", "bce_weight"))
    p, _ = sigmoid_forward(z)
    expected = dice_weight * dice_loss_forward(p, t, **options)[0] + bce_weight * bce_with_logits_forward(z, t)[0]
    loss, cache = segmentation_loss_forward(**case.inputs, **case.options)
    assert loss == expected
    chosen = SegmentationLoss(dice_weight, bce_weight, **options)
    same, same_cache = chosen.forward(z, t)
    assert same == loss
    assert np.array_equal(chosen.backward(same_cache), segmentation_loss_backward(cache))


def test_segmentation_loss_weighs_both_alike_unless_said():
    z, t = images([1.0, -2.0]), images([1, 0])
    expected = dice_loss_forward(sigmoid_forward(z)[0], t)[0] + bce_with_logits_forward(z, t)[0]
    assert segmentation_loss_forward(z, t)[0] == SegmentationLoss().forward(z, t)[0] == expected


# --- What all of them take and refuse -------------------------------------------------------------------------------

FORWARDS = {
    "probabilities": dice_loss_forward,
    "logits of bce": bce_with_logits_forward,
    "logits of both": segmentation_loss_forward,
}
forwards = pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)


@forwards
@pytest.mark.parametrize("dtype", ["uint8", "bool", "float32", "int64"])
def test_a_target_of_any_dtype_means_the_same(forward, dtype):
    x, t = images([0.2, 0.7, 0.4]), np.array([1, 0, 1]).reshape(1, 1, 3, 1)
    loss, _ = forward(x, t.astype(dtype))
    assert loss == forward(x, t.astype(float))[0]
    assert loss.dtype == np.float64


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (dice_loss_forward, dice_loss_backward),
        (bce_with_logits_forward, bce_with_logits_backward),
        (segmentation_loss_forward, segmentation_loss_backward),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "bool", "float64"])
def test_a_target_of_any_dtype_gives_the_same_gradient(forward, backward, dtype):
    x, t = images([0.2, 0.7, 0.4]).astype("float32"), images([1, 0, 1])
    _, expected_cache = forward(x, t.astype("float32"))
    _, cache = forward(x, t.astype(dtype))
    gradient = backward(cache)
    assert gradient.dtype == np.float32
    assert np.array_equal(gradient, backward(expected_cache))


@forwards
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            images([0, 255]),
            r"^target must lie in \[0, 1\], got values from 0.0 to 255.0; divide a mask of 0 and 255 by 255",
        ),
        (images([0, 1.01]), r"^target must lie in \[0, 1\], got values from 0.0 to 1.01"),
        (images([-0.1, 1]), r"^target must lie in \[0, 1\], got values from -0.1 to 1.0"),
        (images([0, np.nan]), r"^target must lie in \[0, 1\]"),
        (images([0, 1, 1]), r"^target must have the shape of the prediction, \(1, 1, 2, 1\), got \(1, 1, 3, 1\)"),
        (np.zeros((1, 2, 1)), r"^target must have the shape of the prediction, \(1, 1, 2, 1\), got \(1, 2, 1\)"),
        (np.zeros((1, 1, 2, 3)), r"^target must have the shape of the prediction"),
    ],
)
def test_refuses_a_target(forward, target, message):
    with pytest.raises(ValueError, match=message):
        forward(images([0.5, 0.5]), target)


@pytest.mark.parametrize("forward", [dice_loss_forward, segmentation_loss_forward])
@pytest.mark.parametrize("smooth", [0, -1.0, np.nan, np.inf])
def test_refuses_a_smooth_that_is_not_positive(forward, smooth):
    """smooth = 0 would divide 0 by 0 on an empty mask."""
    with pytest.raises(ValueError, match=rf"^smooth must be .*got {smooth}"):
        forward(images([0.5]), images([0]), smooth=smooth)


@pytest.mark.parametrize("forward", [dice_loss_forward, segmentation_loss_forward])
def test_refuses_another_scope(forward):
    with pytest.raises(ValueError, match=r"^over must be 'batch' or 'image', got 'pixel'"):
        forward(images([0.5]), images([0]), over="pixel")


@pytest.mark.parametrize("name", ["dice_weight", "bce_weight"])
@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_refuses_a_weight(name, weight):
    with pytest.raises(ValueError, match=rf"^{name} must be .*got {weight}"):
        segmentation_loss_forward(images([0.5]), images([0]), **{name: weight})
