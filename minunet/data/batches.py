"""From a set of slices to the batches of an epoch: which slices, in which order, prepared while the last step runs."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from minunet.base import rng
from minunet.base.backend import Array, Device, array_module, to_device
from minunet.data.augment import PLAIN, Augmentation, PixelPasses, augment
from minunet.data.normalize import VolumeStatistics, apply
from minunet.data.slices import IGNORE, SliceSet

Item = TypeVar("Item")
Result = TypeVar("Result")

Sampling = Literal["shuffle", "tumour"]


class Batch(NamedTuple):
    """What a training step takes."""

    x: Array  # float32 (N, H, W, C), normalised, on the device
    target: Array  # float32 (N, H, W, K), 0 or 1, on the device: see as_target
    files: tuple[str, ...]  # where the N slices came from


def epoch_order(slices: SliceSet, sampling: Sampling, count: int | None, key: rng.Key) -> np.ndarray:
    """The slices of one epoch: ``count`` indices (by default as many as there are slices), drawn by ``key``.

    ``sampling="shuffle"`` takes each slice once, in random order, before it takes any again. "tumour" draws a
    patient, each as likely as any other, and then one of its slices with a probability proportional to its
    tumour area plus a floor, half of the patient's mean area: about every fifth draw is then an empty slice, so
    that the network also learns what is no tumour. So patients with many slices or large tumours do not rule.
    Of several targets the areas are added, in units in which all are equally frequent: a large one does not hide a
    small one.
    """
    generator = rng.generator(key._replace(stream=rng.SAMPLE))
    count = len(slices) if count is None else count
    if sampling == "shuffle":
        passes = -(-count // len(slices))
        return np.concatenate([generator.permutation(len(slices)) for _ in range(passes)])[:count]
    assert sampling == "tumour", sampling
    patient = slices.patient_indices()
    patients = len(slices.patient_names())
    areas = slices.areas()
    totals = areas.sum(axis=0)
    area = (areas * (totals.mean() / np.maximum(totals, 1))).sum(axis=1)  # of one target: its area as it is
    slices_of = np.bincount(patient)
    area_of = np.bincount(patient, weights=area)
    floor = np.maximum(0.5 * area_of / slices_of, 1.0)  # a patient without tumour: each slice alike
    weight = area + floor[patient]
    probability = weight / (np.bincount(patient, weights=weight)[patient] * patients)
    return generator.choice(len(slices), size=count, p=probability)


def in_chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """``indices`` in parts of ``size``, the last one shorter if it has to be.

    >>> in_chunks(np.arange(5), 2)
    [array([0, 1]), array([2, 3]), array([4])]
    """
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def prepare_batch(
    slices: SliceSet,
    statistics: VolumeStatistics,
    indices: np.ndarray,
    device: Device,
    *,
    crop: int | None = None,
    augmentation: Augmentation | None = None,
    move_masks: bool = True,
    key: rng.Key | None = None,
    passes: PixelPasses = PLAIN,
) -> Batch:
    """The slices at ``indices``, on ``device``, normalised by the ``statistics`` of their patients, augmented if asked.

    ``statistics`` has one row a patient of ``slices``. With ``crop`` the batch has a square of each slice, see
    :func:`cropped`. A crop and an augmentation need the key of the step; ``passes`` are those of the engine that the
    batch is for.

    Masks of classes are moved as the numbers that they hold, each pixel by its nearest neighbour, and become a target
    afterwards: no augmentation makes a class out of two others.
    """
    if (augmentation is not None or crop is not None) and key is None:
        raise ValueError("key must be given with a crop or an augmentation: it names the draw")
    patients = slices.patient_indices()
    # A GPU takes the batch at once. On a CPU it goes image by image: what is made on the way then fits into the cache,
    # and into memory that has just been given back, instead of megabytes that the system has to clear each time.
    together = 1 if device == "cpu" else len(indices)
    parts = []
    for start in range(0, len(indices), together):
        part = indices[start : start + together]
        part_key = None if key is None else key._replace(image=key.image + start)
        images, masks = cropped(slices, part, crop, part_key)
        x = apply(to_device(images, device), statistics.take(patients[part]))
        target = to_device(masks, device).astype("float32")
        if augmentation is not None and part_key is not None:
            x, target = augment(x, target, augmentation, part_key, move_masks=move_masks, passes=passes)
        parts.append((x, target))
    if len(parts) > 1:
        x, target = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Batch(x, as_target(target, len(slices.classes)), tuple(slices.files[i] for i in indices))


def as_target(masks: Array, classes: int) -> Array:
    """What the loss takes for ``masks`` (N, H, W, 1) of the numbers of so many classes: one-hot, (N, H, W, classes).

    A pixel to be ignored is 0 in every class, and so counts for nothing. Masks of no classes, (N, H, W, K) of 0 and 1,
    are a target already.

    >>> as_target(np.array([[[[2], [0], [IGNORE]]]], "float32"), 3)
    array([[[[0., 0., 1.],
             [1., 0., 0.],
             [0., 0., 0.]]]], dtype=float32)
    """
    if not classes:
        return masks
    return (masks == array_module(masks).arange(classes)).astype(masks.dtype)


def cropped(
    slices: SliceSet, indices: np.ndarray, crop: int | None, key: rng.Key | None
) -> tuple[np.ndarray, np.ndarray]:
    """Images and masks of the slices at ``indices``; with ``crop`` a square of so many pixels of each.

    ``key`` draws where: every place in the image is as likely as any other. An image that is smaller is padded at the
    bottom and right, by repeating the edge; its mask by 0, or, if it holds classes, by IGNORE.
    """
    if crop is None or key is None:
        return slices.images[indices], slices.masks[indices]
    images = np.empty((len(indices), crop, crop, slices.images.shape[3]), slices.images.dtype)
    masks = np.full((len(indices), crop, crop, slices.masks.shape[3]), IGNORE if slices.classes else 0, np.uint8)
    for n, index in enumerate(indices.tolist()):
        whole = slices.extent(index)
        draw = rng.generator(key._replace(stream=rng.CROP, image=key.image + n))
        starts = [int(draw.integers(0, max(axis.stop - crop, 0), endpoint=True)) for axis in whole]
        rows, columns = (slice(at, min(at + crop, axis.stop)) for at, axis in zip(starts, whole, strict=True))
        images[n] = padded(slices.images[index, rows, columns], crop, crop)
        masks[n, : rows.stop - rows.start, : columns.stop - columns.start] = slices.masks[index, rows, columns]
    return images, masks


def padded(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """``image`` (H, W, C) at that height and width, its last row and column repeated where it ends before."""
    missing = ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0))
    return np.pad(image, missing, mode="edge") if any(map(any, missing)) else image


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 2
) -> Generator[Result, None, None]:
    """``function(item)`` for each item, in order, worked out by a thread up to ``ahead`` items early.

    An exception of the function is raised where its result would have been. With ``ahead=0`` there is no thread.

    >>> list(prefetch(lambda n: n * n, range(4)))
    [0, 1, 4, 9]
    """
    if ahead == 0:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
