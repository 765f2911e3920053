"""The small network that several pictures look into, and the training loop of all that train.

The loop is that of :func:`minunet.training.loop.fit`, less its checkpoints and its evaluation: these pictures want the
network after every epoch, or after a number of steps.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from minunet import AdamW, SegmentationLoss, UNet
from minunet.base.rng import Key
from minunet.data import phantom
from minunet.data.augment import PRESETS as AUGMENTATIONS
from minunet.data.augment import Augmentation
from minunet.data.batches import epoch_order, prepare_batch
from minunet.data.normalize import Normalization
from minunet.data.slices import SliceSet
from minunet.network.layers import map_arrays
from minunet.training.optim import norms_and_biases, warmup_cosine
from minunet.training.step import train_step

NORMALIZATION = Normalization("volume")
BATCH = 8
#: The network of the preset "quick", smaller.
MODEL: dict[str, Any] = {"dropout": 0.0, "up_kernel": 2, "head_kernel": 1, "conv_bias": False}


def train(
    net: UNet,
    slices: SliceSet,
    *,
    epochs: int,
    steps_per_epoch: int,
    augmentation: Augmentation | None,
    seed: int = 0,
) -> Iterator[int]:
    """Train ``net`` in place on ``slices``, and yield the number of each epoch when it is done, from 1."""
    parameters = net.parameters()
    optimizer = AdamW(parameters, weight_decay=0.01, no_decay=norms_and_biases(parameters))
    loss, statistics = SegmentationLoss(), NORMALIZATION.statistics(slices)
    total = epochs * steps_per_epoch
    for epoch in range(epochs):
        order = epoch_order(slices, "tumour", BATCH * steps_per_epoch, Key(seed, epoch=epoch))
        for step, indices in enumerate(np.split(order, steps_per_epoch)):
            key = Key(seed, epoch=epoch, step=step)
            batch = prepare_batch(slices, statistics, indices, "cpu", augmentation=augmentation, key=key)
            lr = warmup_cosine(optimizer.steps, total, peak=4e-3, warmup_steps=min(10, total - 1))
            train_step(net, optimizer, batch.x, batch.target, loss, key, lr=lr, clip_norm=1.0, batch_norm_momentum=0.9)
        yield epoch + 1


class Trained(NamedTuple):
    """A training, and the data it was made with."""

    train: SliceSet
    test: SliceSet  # of other patients
    after_epoch: dict[int, UNet]  # 0 is the network before training


@cache
def network(tiny: bool = False) -> Trained:
    """The network of predictions_over_epochs, feature_maps, per_patient and receptive_field: trained once a command."""
    patients, size, widths = (4, 32, (2, 4)) if tiny else (32, 64, (8, 16, 32, 64))
    epochs, steps = (2, 1) if tiny else (8, 16)
    slices = phantom.make(patients=patients, size=size, seed=0)
    is_test = slices.patient_indices() >= (patients // 2 if tiny else 20)
    training, test = slices.subset(np.flatnonzero(~is_test)), slices.subset(np.flatnonzero(is_test))
    net = UNet(widths=widths, **MODEL)
    after_epoch = {0: copy_of(net)}
    for epoch in train(net, training, epochs=epochs, steps_per_epoch=steps, augmentation=AUGMENTATIONS["mild"]):
        after_epoch[epoch] = copy_of(net)
    return Trained(training, test, after_epoch)


def largest_tumours(slices: SliceSet, count: int) -> np.ndarray:
    """The ``count`` slices with most tumour, ascending."""
    area = slices.masks.sum(axis=(1, 2, 3), dtype=np.int64)
    return np.sort(np.argsort(-area, kind="stable")[:count])


def copy_of(net: UNet) -> UNet:
    """A network of its own arrays with the values of ``net``."""
    twin: UNet = map_arrays(net, lambda array: array.copy())
    return twin
