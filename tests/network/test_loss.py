"""The sum of both losses, and what all three of them ask of their arguments."""

import numpy as np
import pytest
from hypothesis import given

from minunet.network.loss import SegmentationLoss, segmentation_loss_backward, segmentation_loss_forward
from minunet.ops import sigmoid_forward
from minunet.ops.bce_with_logits import bce_with_logits_backward, bce_with_logits_forward
from minunet.ops.dice_loss import dice_loss_backward, dice_loss_forward
from tests.strategies import segmentation_loss_cases


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
