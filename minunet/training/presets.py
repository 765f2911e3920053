"""Named recipes: which network, which images, which training. ``examples/train_lgg.py --preset NAME`` runs one.

==========  =======================================================================================
quick       the embedded default: a small network on synthetic patients, minutes on a laptop
small       base width 16 at 128 x 128: real slices on a laptop, within an hour or so
reference   the Keras system that minunet re-implements, choice by choice
best        the honest recipe at full size, for a GPU
==========  =======================================================================================
"""

from dataclasses import dataclass
from typing import Any, Literal

from minunet.data.augment import PRESETS as AUGMENTATIONS
from minunet.data.normalize import Normalization
from minunet.network.loss import SegmentationLoss
from minunet.training.config import TrainingConfig


@dataclass(frozen=True)
class Preset:
    """A recipe. ``model`` holds the arguments of ``UNet``."""

    image_size: int  # pixels: every slice is resized to a square of this side
    normalization: Normalization
    model: dict[str, Any]
    training: TrainingConfig
    keep: Literal["best", "last"] = "best"  # the epoch whose weights are tested
    flip_average: bool = False  # predict every slice and its mirror image, and average
    limit: int | None = None  # read so many slices only, in folder order
    slow_without_gpu: bool = False  # days rather than hours on a CPU


_QUICK = Preset(
    image_size=96,
    normalization=Normalization("volume"),
    model={"widths": (12, 24, 48, 96), "dropout": 0.0, "up_kernel": 2, "head_kernel": 1, "conv_bias": False},
    training=TrainingConfig(
        epochs=10,
        batch_size=8,
        sampling="tumour",
        augmentation=AUGMENTATIONS["mild"],
        lr=4e-3,
        warmup_epochs=0.5,
        weight_decay=0.01,
        decay_norms_and_biases=False,
        clip_norm=1.0,
        batch_norm_momentum=0.9,
        ema_decay=0.99,
    ),
)

_SMALL = Preset(
    image_size=128,
    normalization=Normalization("volume"),
    model={"widths": (16, 32, 64, 128, 256), "dropout": 0.0, "up_kernel": 2, "head_kernel": 1, "conv_bias": False},
    training=TrainingConfig(
        epochs=16,
        batch_size=8,
        images_per_epoch=1280,
        sampling="tumour",
        augmentation=AUGMENTATIONS["mild"],
        lr=2e-3,
        warmup_epochs=2,
        weight_decay=0.01,
        decay_norms_and_biases=False,
        clip_norm=1.0,
        batch_norm_momentum=0.9,
        ema_decay=0.998,
    ),
    flip_average=True,
)

_REFERENCE = Preset(
    image_size=224,
    normalization=Normalization("scale"),
    model={"widths": (64, 128, 256, 512, 1024), "dropout": 0.3, "up_kernel": 3, "head_kernel": 3, "conv_bias": True},
    training=TrainingConfig(
        epochs=100,
        batch_size=32,
        sampling="shuffle",
        augmentation=AUGMENTATIONS["reference"],
        # The reference smooths by 100 over three equal mask channels: with one, that is 100 / 3.
        loss=SegmentationLoss(dice_weight=1.0, bce_weight=0.0, smooth=100 / 3),
        lr=1e-4,
        schedule="constant",
        weight_decay=0.004,
        monitor="loss",
        patience=10,
    ),
    keep="last",
    limit=1600,
    slow_without_gpu=True,
)

_BEST = Preset(
    image_size=256,
    normalization=Normalization("volume"),
    model={"widths": (32, 64, 128, 256, 512), "dropout": 0.0, "up_kernel": 2, "head_kernel": 1, "conv_bias": False},
    training=TrainingConfig(
        epochs=100,
        batch_size=16,
        sampling="tumour",
        augmentation=AUGMENTATIONS["strong"],
        lr=1e-3,
        warmup_epochs=5,
        weight_decay=0.01,
        decay_norms_and_biases=False,
        clip_norm=1.0,
        ema_decay=0.999,
    ),
    flip_average=True,
    slow_without_gpu=True,
)

PRESETS = {"quick": _QUICK, "small": _SMALL, "reference": _REFERENCE, "best": _BEST}
