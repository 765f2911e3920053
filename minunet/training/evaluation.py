"""What a network does on a set of slices: its probabilities, and the loss and Dice that the curves show."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from minunet.base import rng
from minunet.base.backend import Array, array_module, to_device, to_numpy
from minunet.base.errors import UserError
from minunet.data.batches import as_target, in_chunks, padded, prefetch
from minunet.data.normalize import Normalization, VolumeStatistics, apply
from minunet.data.slices import SliceSet
from minunet.network.loss import Loss, SegmentationLoss
from minunet.network.unet import UNet
from minunet.training import metrics
from minunet.training.step import Engine
from minunet.training.tiles import tiles


class Evaluation(NamedTuple):
    """What a network does on a set of slices, as the curves show it."""

    loss: float  # of the batches, averaged over their slices
    dice: float  # the mean over patients (and classes) of the 3-D Dice of the masks, thresholded at 0.5


def predict_slices(
    net: UNet,
    slices: SliceSet,
    normalization: Normalization | VolumeStatistics,
    *,
    batch_size: int = 16,
    flip_average: bool = False,
    engine: Engine | None = None,
    side: int | None = None,
) -> np.ndarray:
    """The probabilities for all slices, float32 (S, H, W, K), each patient normalised as one volume.

    If ``slices`` are a part of their volumes, ``normalization`` are the statistics of the whole: one row a patient.
    ``flip_average`` predicts every slice and its mirror image, and averages the two. ``engine`` is one that was built
    for a network like ``net``, or None for the plain path. With ``side`` each image is predicted by itself, without
    its padding, in tiles of about so many pixels; the padding then has probability 0.
    """
    engine = engine or Engine(net, SegmentationLoss())
    statistics = normalization.statistics(slices) if isinstance(normalization, Normalization) else normalization
    if side is not None:
        found = np.zeros((*slices.masks.shape[:3], net.config["out_channels"]), np.float32)
        for place, patient in enumerate(slices.patient_indices()):
            rows, columns = slices.extent(place)
            image, of_patient = slices.images[place, rows, columns], statistics.take(np.array([patient]))
            for tile, p in predict_tiles(net, image, of_patient, side, flip_average=flip_average, engine=engine):
                found[place][tile] = p
        return found

    batches = prefetch(
        lambda indices: engine.prepare_batch(slices, statistics, indices),
        in_chunks(np.arange(len(slices)), batch_size),
        engine.ahead,
    )
    with engine.lock:
        found = np.concatenate([_probabilities(net, batch.x, flip_average, engine) for batch in batches])
    _clear_padding(slices, np.arange(len(slices)), found)
    return found


@np.errstate(all="ignore")  # a value that is not finite is found in the result
def _probabilities(net: UNet, x: Array, flip_average: bool, engine: Engine) -> np.ndarray:
    p = engine.predict(x, net)
    if flip_average:
        p = (p + engine.predict(x[:, :, ::-1], net)[:, :, ::-1]) / 2
    found = to_numpy(p)
    if not np.isfinite(found).all():
        raise UserError(
            "the network answers with values that are not numbers: its weights overflow, use another checkpoint"
        )
    return found


def predict_tiles(
    net: UNet,
    image: np.ndarray,
    statistics: VolumeStatistics,
    side: int,
    *,
    flip_average: bool = False,
    engine: Engine | None = None,
) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """The probabilities for one image (H, W, C) of any size, tile by tile: where it is, and float32 (h, w, K).

    Together the tiles are the prediction for the whole image (see :mod:`minunet.training.tiles`), of which no more
    than a window of ``side`` x ``side`` pixels, or the least that will do, is in the network at a time. ``statistics``
    are those of the image's volume; ``flip_average`` and ``engine`` as in :func:`predict_slices`.
    """
    engine = engine or Engine(net, SegmentationLoss())
    compute = partial(_probabilities, net, flip_average=flip_average, engine=engine)
    yield from _over_tiles(compute, net, image, statistics, side, engine)


def _over_tiles(
    compute: Callable[[Array], np.ndarray],
    net: UNet,
    image: np.ndarray,
    statistics: VolumeStatistics,
    side: int,
    engine: Engine,
) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """What ``compute`` makes of each window of an image, cut to the part that is kept, and where that belongs."""
    height, width, _ = image.shape
    for rows, columns in tiles(net, height, width, side):
        window = padded(image[rows.window, columns.window], rows.stop - rows.start, columns.stop - columns.start)
        with engine.lock:
            found = compute(apply(to_device(window[None], engine.device), statistics))
        yield (rows.kept, columns.kept), found[0, rows.inside, columns.inside]


def evaluate(
    net: UNet,
    slices: SliceSet,
    statistics: VolumeStatistics,
    loss: Loss,
    *,
    places: np.ndarray | None = None,
    batch_size: int = 16,
    engine: Engine | None = None,
    side: int | None = None,
) -> Evaluation:
    """Loss and per-patient Dice of ``net``, inferring, on ``slices``, whose patients have the ``statistics``.

    ``places`` are the indices of the slices to look at, None for all. ``engine`` is one that was built for a network
    like ``net``, or None for the plain path.
    With ``side`` each image is judged by itself, as in :func:`predict_slices`.
    The slices are visited in a random order, always the same one: neighbours are alike, and the Dice loss of a batch
    with no tumour at all is not what training sees.
    """
    engine = engine or Engine(net, loss)
    places = np.arange(len(slices)) if places is None else places
    order = places[rng.generator(rng.Key(seed=0, stream=rng.SAMPLE)).permutation(len(places))]
    if side is None:
        judged = _in_batches(net, slices, statistics, order, batch_size, engine)
    else:
        judged = _image_by_image(net, slices, statistics, order, side, engine)
    losses, counts = [], []
    for indices, logits, target in judged:
        value, _ = loss.forward(logits, target)
        losses.append(value.item() * len(indices))
        predicted, actual = _masks(net, logits, target)
        _clear_padding(slices, indices, predicted)
        found = metrics.count(predicted, actual, axis=(1, 2))
        counts.append([to_numpy(c) for c in found])
    per_slice = metrics.Counts(*(np.concatenate(parts) for parts in zip(*counts, strict=True)))
    _, per_patient = metrics.per_patient_counts(per_slice, [slices.patients[place] for place in order])
    return Evaluation(math.fsum(losses) / len(places), float(np.mean(metrics.dice(per_patient))))


def _masks(net: UNet, logits: Array, target: Array) -> tuple[Array, Array]:
    """The masks that ``logits`` mean and those of ``target``, both bool (N, H, W, K).

    Independent masks are where the probability is above 0.5. Of classes they are those of the most probable one,
    without the background, and empty in both where the target is to be ignored.
    """
    if net.config["output"] == "sigmoid":
        return logits > 0, target > 0
    xp = array_module(logits)
    most_probable = logits.argmax(axis=-1)[..., None] == xp.arange(logits.shape[3])
    counted = target.any(axis=-1, keepdims=True)
    return (most_probable & counted)[..., 1:], (target > 0)[..., 1:]


Judged = Iterator[tuple[np.ndarray, Array, Array]]  # indices of slices, their logits and target


def _in_batches(
    net: UNet,
    slices: SliceSet,
    statistics: VolumeStatistics,
    order: np.ndarray,
    batch_size: int,
    engine: Engine,
) -> Judged:
    chunks = in_chunks(order, batch_size)
    batches = prefetch(lambda indices: engine.prepare_batch(slices, statistics, indices), chunks, engine.ahead)
    with engine.lock:
        for indices, batch in zip(chunks, batches, strict=True):
            yield indices, engine.logits(batch.x, net), batch.target


def _image_by_image(
    net: UNet, slices: SliceSet, statistics: VolumeStatistics, order: np.ndarray, side: int, engine: Engine
) -> Judged:
    """Each image at its own size, without padding, in tiles."""
    patients = slices.patient_indices()
    for place in order:
        rows, columns = slices.extent(place)
        image, mask = slices.images[place, rows, columns], slices.masks[place, rows, columns]
        target = as_target(mask.astype("float32"), len(slices.classes))
        logits = np.empty((*image.shape[:2], net.config["out_channels"]), np.float32)
        of_patient = statistics.take(patients[[place]])
        for tile, z in _over_tiles(lambda x: to_numpy(engine.logits(x, net)), net, image, of_patient, side, engine):
            logits[tile] = z
        yield np.array([place]), logits[None], target[None]


def _clear_padding(slices: SliceSet, indices: np.ndarray, found: Array) -> None:
    """Set what was found (N, H, W, K) in the padding of the slices at ``indices`` to 0, in place."""
    if slices.extents is not None:
        for n, index in enumerate(indices):
            rows, columns = slices.extent(index)
            found[n, rows.stop :] = 0
            found[n, :, columns.stop :] = 0
