"""The sums of two losses, and what all losses ask of their arguments."""

import numpy as np
import pytest
from hypothesis import given

from minunet.network.loss import (
    SegmentationLoss,
    SoftmaxLoss,
    segmentation_loss_backward,
    segmentation_loss_forward,
    softmax_loss_backward,
    softmax_loss_forward,
)
from minunet.ops import (
    sigmoid_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
    softmax_forward,
)
from minunet.ops.bce_with_logits import bce_with_logits_backward, bce_with_logits_forward
from minunet.ops.dice_loss import dice_loss_backward, dice_loss_forward
from tests.strategies import class_target, segmentation_loss_cases, softmax_loss_cases


def images(values, n=1):
    """The values as ``n`` images of one row and one channel."""
    return np.array(values, dtype=float).reshape(n, 1, -1, 1)


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


# --- Of classes -----------------------------------------------------------------------------------------------------


def row(pixels):
    """One image of one row: a pixel for each list, with a value for each class."""
    return np.array(pixels, float)[None, None]


def test_softmax_loss_by_hand():
    """Three pixels of three classes: the second class is right in the first pixel, the third does not count."""
    z, t = np.log(row([[1, 2, 1], [2, 1, 1], [1, 1, 6]])), row([[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    loss, cache = softmax_loss_forward(z, t)
    first = (2 * 1 / 2 + 1) / (1 / 2 + 1 / 4 + 1 + 1)  # of class 1: p is 1/2 and 1/4
    second = 1 / (1 / 4 + 1 / 4 + 1)  # of class 2, which is nowhere
    assert loss == pytest.approx(1 - (first + second) / 2 + np.log(2), rel=1e-15, abs=0)
    # Of Dice in p, half for each of two classes: (Dice - 2t) / denominator; then through the softmax.
    dp = np.array([[0, (first - 2) / 2.75, second / 1.5], [0, first / 2.75, second / 1.5]]) / 2
    p = np.array([[1, 2, 1], [2, 1, 1]]) / 4
    dz = p * (dp - (dp * p).sum(axis=1, keepdims=True)) + (p - t[0, 0, :2]) / 2
    assert softmax_loss_backward(cache)[0, 0, :2] == pytest.approx(dz, rel=1e-14, abs=0)
    assert not softmax_loss_backward(cache)[0, 0, 2].any()


@given(case=softmax_loss_cases())
def test_softmax_loss_is_the_weighted_sum(case):
    z, options = case.inputs["logits"], dict(case.options)
    t, dice_weight, weight = (options.pop(name) for name in ("target", "dice_weight", "cross_entropy_weight"))
    p = softmax_forward(z)[0] * t.sum(axis=-1, keepdims=True)
    dice = np.mean([dice_loss_forward(p[..., [k]], t[..., [k]], **options)[0] for k in range(1, z.shape[3])])
    loss, cache = softmax_loss_forward(**case.inputs, **case.options)
    expected = dice_weight * dice + weight * softmax_cross_entropy_forward(z, t)[0]
    assert loss == pytest.approx(expected, rel=1e-14, abs=1e-15)
    chosen = SoftmaxLoss(dice_weight, weight, **options)
    same, same_cache = chosen.forward(z, t)
    assert same == loss
    assert np.array_equal(chosen.backward(same_cache), softmax_loss_backward(cache))


def test_softmax_loss_weighs_both_alike_unless_said():
    z, t = row([[1.0, -2.0], [0.5, 0.0]]), row([[1, 0], [0, 1]])
    dice = dice_loss_forward(softmax_forward(z)[0][..., 1:], t[..., 1:])[0]
    expected = dice + softmax_cross_entropy_forward(z, t)[0]
    assert softmax_loss_forward(z, t)[0] == SoftmaxLoss().forward(z, t)[0] == expected


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_whatever_is_predicted_where_a_pixel_is_ignored_changes_nothing(dice_weight):
    draw = np.random.default_rng(0)
    shape = 2, 4, 4, 3
    z, t = draw.standard_normal(shape), class_target(draw, shape, 0.4, soft=False)
    counted = t.sum(axis=-1, keepdims=True)
    other = np.where(counted, z, 30 * draw.standard_normal(shape))
    (loss, cache), (same, same_cache) = (softmax_loss_forward(logits, t, dice_weight) for logits in (z, other))
    assert same == loss
    gradient = softmax_loss_backward(cache)
    assert np.array_equal(gradient, softmax_loss_backward(same_cache))
    assert np.array_equal(gradient.any(axis=-1, keepdims=True), counted == 1)


def test_the_background_has_no_dice_of_its_own():
    """A network that finds the background alone does not get half the Dice for it."""
    t = np.zeros((1, 10, 10, 2))
    t[..., 0], t[0, 4, 4] = 1, [0, 1]
    all_background = 20.0 * (np.arange(2) == 0) * np.ones_like(t)
    assert softmax_loss_forward(all_background, t, cross_entropy_weight=0, smooth=1e-3)[0] > 0.99


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (softmax_cross_entropy_forward, softmax_cross_entropy_backward),
        (softmax_loss_forward, softmax_loss_backward),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "bool", "float64", "int64"])
def test_a_target_of_classes_of_any_dtype_means_the_same(forward, backward, dtype):
    z, t = row([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]]).astype("float32"), row([[1, 0], [0, 1], [0, 0]])
    loss, cache = forward(z, t.astype(dtype))
    expected, expected_cache = forward(z, t.astype("float32"))
    assert loss == expected
    assert loss.dtype == np.float32
    gradient = backward(cache)
    assert gradient.dtype == np.float32
    assert np.array_equal(gradient, backward(expected_cache))


@pytest.mark.parametrize("forward", [softmax_cross_entropy_forward, softmax_loss_forward])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (row([[1, 1], [1, 0]]), r"^target must sum to 1 over the classes .* got sums from 1.0 to 2.0; masks that over"),
        (row([[0.5, 0], [1, 0]]), r"^target must sum to 1 over the classes of a pixel, or to 0 where it is ignored, "),
        (row([[255, 0], [0, 0]]), r"^target must lie in \[0, 1\], got values from 0.0 to 255.0"),
        (row([[np.nan, 0], [0, 0]]), r"^target must lie in \[0, 1\]"),
        (row([[1], [0]]), r"^target must have the shape of the prediction, \(1, 1, 2, 2\), got \(1, 1, 2, 1\)"),
    ],
)
def test_refuses_a_target_of_classes(forward, target, message):
    with pytest.raises(ValueError, match=message):
        forward(row([[0.5, 0.5], [0.5, 0.5]]), target)


def test_refuses_a_single_class():
    with pytest.raises(ValueError, match=r"^logits must be of at least 2 classes, the background and another one"):
        softmax_loss_forward(row([[0.5]]), row([[1]]))


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


@pytest.mark.parametrize("forward", [dice_loss_forward, segmentation_loss_forward, softmax_loss_forward])
@pytest.mark.parametrize("smooth", [0, -1.0, np.nan, np.inf])
def test_refuses_a_smooth_that_is_not_positive(forward, smooth):
    """smooth = 0 would divide 0 by 0 on an empty mask."""
    with pytest.raises(ValueError, match=rf"^smooth must be .*got {smooth}"):
        forward(row([[0.5, 0.5]]), row([[0, 1]]), smooth=smooth)


@pytest.mark.parametrize("forward", [dice_loss_forward, segmentation_loss_forward])
def test_refuses_another_scope(forward):
    with pytest.raises(ValueError, match=r"^over must be 'batch', 'image' or 'class', got 'pixel'"):
        forward(images([0.5]), images([0]), over="pixel")


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (segmentation_loss_forward, "dice_weight"),
        (segmentation_loss_forward, "bce_weight"),
        (softmax_loss_forward, "dice_weight"),
        (softmax_loss_forward, "cross_entropy_weight"),
    ],
)
@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_refuses_a_weight(forward, name, weight):
    with pytest.raises(ValueError, match=rf"^{name} must be .*got {weight}"):
        forward(row([[0.5, 0.5]]), row([[0, 1]]), **{name: weight})
