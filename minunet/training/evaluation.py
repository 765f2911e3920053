"""What a network does on a set of slices: its probabilities, and the loss and Dice that the curves show."""

import math
from typing import NamedTuple

import numpy as np

from minunet.base import rng
from minunet.base.backend import to_numpy
from minunet.data.batches import Batch, in_chunks, prefetch
from minunet.data.normalize import Normalization, VolumeStatistics
from minunet.data.slices import SliceSet
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.training import metrics
from minunet.training.step import Engine


class Evaluation(NamedTuple):
    """What a network does on a set of slices, as the curves show it."""

    loss: float  # of the batches, averaged over their slices
    dice: float  # the mean over patients of the 3-D Dice, thresholded at 0.5


def predict_slices(
    net: UNet,
    slices: SliceSet,
    normalization: Normalization,
    *,
    batch_size: int = 16,
    flip_average: bool = False,
    engine: Engine | None = None,
) -> np.ndarray:
    """The probabilities for all slices, float32 (S, H, W, K), each patient normalised as one volume.

    ``flip_average`` predicts every slice and its mirror image, and averages the two. ``engine`` is one that was built
    for a network like ``net``, or None for the plain path.
    """
    engine = engine or Engine(net, SegmentationLoss())
    statistics = normalization.statistics(slices)

    def probabilities(batch: Batch) -> np.ndarray:
        p = engine.predict(batch.x, net)
        if flip_average:
            p = (p + engine.predict(batch.x[:, :, ::-1], net)[:, :, ::-1]) / 2
        return to_numpy(p)

    batches = prefetch(
        lambda indices: engine.prepare_batch(slices, statistics, indices),
        in_chunks(np.arange(len(slices)), batch_size),
        engine.ahead,
    )
    with engine.lock:
        return np.concatenate([probabilities(batch) for batch in batches])


def evaluate(
    net: UNet,
    slices: SliceSet,
    statistics: VolumeStatistics,
    loss: SegmentationLoss,
    *,
    places: np.ndarray | None = None,
    batch_size: int = 16,
    engine: Engine | None = None,
) -> Evaluation:
    """Loss and per-patient Dice of ``net``, inferring, on ``slices``, whose patients have the ``statistics``.

    ``places`` are the indices of the slices to look at, None for all. ``engine`` is one that was built for a network
    like ``net``, or None for the plain path.
    The slices are visited in a random order, always the same one: neighbours are alike, and the Dice loss of a batch
    with no tumour at all is not what training sees.
    """
    engine = engine or Engine(net, loss)
    losses, counts = [], []
    places = np.arange(len(slices)) if places is None else places
    order = places[rng.generator(rng.Key(seed=0, stream=rng.SAMPLE)).permutation(len(places))]
    batches = prefetch(
        lambda indices: engine.prepare_batch(slices, statistics, indices),
        in_chunks(order, batch_size),
        engine.ahead,
    )
    with engine.lock:
        for batch in batches:
            logits = engine.logits(batch.x, net)
            value, _ = loss.forward(logits, batch.target)
            losses.append(value.item() * len(batch.x))
            predicted = logits > 0  # a probability above 0.5
            found = metrics.count(predicted, batch.target > 0, axis=(1, 2, 3))
            counts.append([to_numpy(c) for c in found])
    per_slice = metrics.Counts(*(np.concatenate(parts) for parts in zip(*counts, strict=True)))
    _, per_patient = metrics.per_patient_counts(per_slice, [slices.patients[place] for place in order])
    return Evaluation(math.fsum(losses) / len(places), float(np.mean(metrics.dice(per_patient))))
