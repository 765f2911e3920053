"""The settings of a run, and the learning rate that they give."""

from dataclasses import replace

import pytest

from minunet.network.loss import SegmentationLoss, SoftmaxLoss
from minunet.training.config import TrainingConfig


def test_the_learning_rate_follows_its_schedule():
    config = TrainingConfig(epochs=4, warmup_epochs=1, lr=0.5)
    rates = [config.learning_rate(step, steps_per_epoch=10) for step in range(40)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[10] == max(rates) == 0.5
    assert rates[25] == pytest.approx(0.25)
    assert 0 < rates[39] < 0.002
    assert replace(config, schedule="constant").learning_rate(39, 10) == 0.5


def test_the_settings_tell_the_losses_apart_and_those_of_masks_are_as_ever():
    """A resumed run compares them with those in its checkpoint."""
    masks = {"dice_weight": 1.0, "bce_weight": 1.0, "smooth": 1.0, "over": "batch"}
    assert TrainingConfig().settings()["loss"] == masks
    assert TrainingConfig(loss=SegmentationLoss(over="class")).settings()["loss"] == {**masks, "over": "class"}
    assert TrainingConfig(loss=SoftmaxLoss(dice_weight=0.5)).settings()["loss"] == {
        "class": "minunet.network.loss.SoftmaxLoss",
        "dice_weight": 0.5,
        "cross_entropy_weight": 1.0,
        "smooth": 1.0,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("images_per_epoch", -1),
        ("patience", 0),
        ("sampling", "some"),
        ("schedule", "step"),
        ("monitor", "iou"),
        ("batch_norm_momentum", 1.0),
        ("warmup_epochs", 30),
        ("train_only", "head"),
        ("train_only", ()),
    ],
)
def test_a_config_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        TrainingConfig(**{field: value})
