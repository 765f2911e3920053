"""How good is a predicted mask? Counts first, then ratios of counts, then the scope in which they are taken.

A pixel is a true positive (tumour, and predicted so), a false positive, a false negative or a true negative.
:func:`count` counts the four, and these scores are ratios of them::

    accuracy    = (tp + tn) / (tp + fp + fn + tn)     how many pixels are right
    precision   = tp / (tp + fp)                      how much of what was predicted is tumour
    recall      = tp / (tp + fn)                      how much of the tumour was found (sensitivity)
    specificity = tn / (tn + fp)                      how much of the rest was left alone
    iou         = tp / (tp + fp + fn)                 overlap over union (Jaccard 1912)
    dice        = 2 tp / (2 tp + fp + fn)             overlap over mean size (Dice 1945); equals F1

**0 / 0.** Dice and IoU of two empty masks are 1: "no tumour" was the right answer, and the soft Dice, whose
``smooth`` keeps it away from 0 / 0, says the same. The other four are NaN where their denominator is 0: with
nothing predicted there is no precision to speak of, neither perfect nor zero, and a mean has to leave it out openly.

**Scope.** The same predictions have many Dice scores, tens of points apart, so each name here says which it is:

- *pooled*: the counts of all pixels of all slices are added, then one score is taken. Large tumours dominate.
- *per slice*: one score a slice, then the mean. Two thirds of the slices of LGG-MRI show no tumour, and what is done
  with these decides the figure: counted as 1 where the prediction is empty too (and 0 otherwise), or left out.
- *per patient*: the counts of a patient's slices are added, as for one 3-D volume, one score is taken a patient, then
  the mean and the median. The honest one: patients are what a new hospital brings, and what a bootstrap can redraw.

:func:`evaluate_masks` puts all of them side by side (:class:`Scores`), with the soft pooled metrics of the Keras
reference. Of several targets each is scored for itself, as if it were the only one (:func:`evaluate_slices`), and their
mean is taken (:class:`MeanScores`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from minunet.base.backend import Array, array_module, to_numpy
from minunet.base.choices import check_choice
from minunet.base.rng import BOOTSTRAP, Key, generator
from minunet.data.slices import IGNORE, LGG, SliceSet, Words, target_masks

#: The default key of the bootstrap.
BOOTSTRAP_KEY = Key(seed=0, stream=BOOTSTRAP)

EmptySlices = Literal["as_one", "left_out"]
Statistic = Literal["mean", "median"]

# ------------------------------------------------------------------------------------------------- counts


class Counts(NamedTuple):
    """How many pixels fell into each cell of the confusion table: integers, or integer arrays of one shape.

    Counts of two sets of pixels add up to the counts of both sets together (for a plain tuple, + would join).

    >>> Counts(tp=1, fp=2, fn=3, tn=4) + Counts(tp=10, fp=20, fn=30, tn=40)
    Counts(tp=11, fp=22, fn=33, tn=44)
    """

    tp: Any  # tumour, predicted as tumour
    fp: Any  # no tumour, predicted as tumour
    fn: Any  # tumour, missed
    tn: Any  # no tumour, and none predicted

    def __add__(self, other: "Counts") -> "Counts":  # type: ignore[override]
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)


def count(prediction: Array, target: Array, axis: int | tuple[int, ...] | None = None) -> Counts:
    """Counts the pixels of two masks along ``axis`` (None: all of them), as int64.

    prediction, target: masks of one shape, boolean, or numbers that are all 0 or 1; NumPy or CuPy.

    Slices (S, H, W, 1) with ``axis=(1, 2, 3)`` give counts of shape (S,), one for each slice.

    >>> count(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0])) == (1, 1, 1, 1)
    True

    Raises ValueError if the shapes differ or a value is neither 0 nor 1.
    """
    prediction, target = _binary_pair(prediction, target)

    def number_of(pixels: Array) -> Array:
        return pixels.sum(axis=axis, dtype=np.int64)

    return Counts(
        tp=number_of(prediction & target),
        fp=number_of(prediction & ~target),
        fn=number_of(~prediction & target),
        tn=number_of(~prediction & ~target),
    )


def _binary_pair(prediction: Array, target: Array) -> tuple[Array, Array]:
    """Both masks as booleans, or a ValueError."""
    _check_same_shape("prediction", prediction, target)
    return _as_binary("prediction", prediction), _as_binary("target", target)


def _check_same_shape(name: str, x: Array, target: Array) -> None:
    if x.shape != target.shape:
        raise ValueError(f"{name} and target must have the same shape, got {x.shape} and {target.shape}")


def _as_binary(name: str, mask: Array) -> Array:
    """``mask`` as booleans, or a ValueError that lists values which are neither 0 nor 1."""
    if mask.dtype == bool:
        return mask
    strange = (mask != 0) & (mask != 1)
    if strange.any():
        values = np.unique(to_numpy(mask[strange]))[:5].tolist()
        raise ValueError(
            f"{name} must hold 0 and 1 only, got {', '.join(f'{value:g}' for value in values)}"
            " (threshold probabilities; divide masks stored as 0 and 255 by 255)"
        )
    return mask != 0


# ------------------------------------------------------------------------------------------------- scores


def accuracy(counts: Counts) -> Array:
    """The share of pixels that are right, (tp + tn) / all; NaN of no pixels.

    Of LGG-MRI, 99 % of the pixels are not tumour: predicting nothing at all has accuracy 0.99.

    >>> float(accuracy(Counts(tp=1, fp=2, fn=3, tn=94)))
    0.95
    """
    return _ratio(counts.tp + counts.tn, counts.tp + counts.fp + counts.fn + counts.tn, empty=math.nan)


def precision(counts: Counts) -> Array:
    """The share of the prediction that is tumour, tp / (tp + fp); NaN where nothing was predicted.

    >>> float(precision(Counts(tp=3, fp=1, fn=5, tn=0)))
    0.75
    """
    return _ratio(counts.tp, counts.tp + counts.fp, empty=math.nan)


def recall(counts: Counts) -> Array:
    """The share of the tumour that was found, tp / (tp + fn); NaN where there is no tumour.

    >>> float(recall(Counts(tp=3, fp=5, fn=1, tn=0)))
    0.75
    """
    return _ratio(counts.tp, counts.tp + counts.fn, empty=math.nan)


def specificity(counts: Counts) -> Array:
    """The share of the tumour-free pixels that were left alone, tn / (tn + fp); NaN where there are none.

    >>> float(specificity(Counts(tp=0, fp=1, fn=5, tn=3)))
    0.75
    """
    return _ratio(counts.tn, counts.tn + counts.fp, empty=math.nan)


def iou(counts: Counts) -> Array:
    """Intersection over union, the Jaccard index, tp / (tp + fp + fn); 1 where both masks are empty.

    >>> float(iou(Counts(tp=2, fp=1, fn=1, tn=0)))
    0.5
    """
    return _ratio(counts.tp, counts.tp + counts.fp + counts.fn, empty=1.0)


def dice(counts: Counts) -> Array:
    """Overlap over mean size, 2 tp / (2 tp + fp + fn) = 2 iou / (1 + iou); 1 where both masks are empty.

    >>> float(dice(Counts(tp=2, fp=1, fn=3, tn=0)))
    0.5
    """
    return _ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn, empty=1.0)


def _ratio(numerator: Array, denominator: Array, empty: float) -> Array:
    """The quotient in float64, and ``empty`` where the denominator is 0."""
    xp = np if isinstance(denominator, int) else array_module(denominator)
    nothing = denominator == 0
    divisor = xp.where(nothing, 1, denominator)  # so that no 0 / 0 is ever computed
    return xp.where(nothing, empty, numerator / divisor)[()]


# ------------------------------------------------------------------------------------------------- scopes


def pooled_counts(counts: Counts) -> Counts:
    """The counts of all entries together: from one entry a slice to one for all pixels.

    >>> pooled_counts(Counts(*np.array([[1, 2], [3, 4], [5, 6], [7, 8]]))) == (3, 7, 11, 15)
    True
    """
    return Counts(*(field.sum() for field in counts))


def per_patient_counts(counts: Counts, patients: Sequence[str]) -> tuple[tuple[str, ...], Counts]:
    """The counts of each patient's slices together, as of one 3-D volume, and the patients' names.

    counts: of slices, arrays of shape (S,), or (S, K) of K classes; patients: S names, one a slice. Returns P names in
    the order in which they first appear, and counts of shape (P,) or (P, K), NumPy.

    >>> slices = Counts(*np.array([[1, 2, 4], [0, 0, 0], [0, 0, 0], [9, 8, 6]]))
    >>> names, volumes = per_patient_counts(slices, ["a", "b", "a"])
    >>> names, volumes.tp.tolist()
    (('a', 'b'), [5, 2])

    Raises ValueError if the number of names is not the number of slices.
    """
    _check_patients(patients, slices=len(counts.tp))
    rows = _rows_by_patient(patients)
    fields = [to_numpy(field) for field in counts]
    return tuple(rows), Counts(*(np.array([field[r].sum(axis=0) for r in rows.values()]) for field in fields))


def _check_patients(patients: Sequence[str], slices: int) -> None:
    if len(patients) != slices:
        raise ValueError(f"patients must name one patient a slice, got {len(patients)} names for {slices} slices")


def _rows_by_patient(patients: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(patients):
        rows.setdefault(name, []).append(row)
    return rows


def mean_over_slices(score: Callable[[Counts], Array], counts: Counts, *, empty_slices: EmptySlices) -> float:
    """The mean of ``score`` (:func:`dice` or :func:`iou`) over slices, each taken for itself.

    counts: of slices, arrays of shape (S,). A slice is empty if its *target* shows no tumour.

    ``empty_slices="as_one"``: an empty slice scores 1 if the prediction is empty too and 0 if it is not.
    ``empty_slices="left_out"``: the mean over the slices with tumour; NaN if there are none. False positives in
    empty slices then go unseen: read it beside the other.

    >>> slices = Counts(tp=np.array([1, 0]), fp=np.array([2, 0]), fn=np.array([0, 0]), tn=np.array([1, 4]))
    >>> mean_over_slices(dice, slices, empty_slices="as_one")
    0.75
    >>> mean_over_slices(dice, slices, empty_slices="left_out")
    0.5

    Raises ValueError for any other ``empty_slices``.
    """
    check_choice("empty_slices", empty_slices, EmptySlices)
    scores = score(counts)
    if empty_slices == "left_out":
        scores = scores[counts.tp + counts.fn > 0]
    return float(scores.mean()) if scores.size else math.nan


# ------------------------------------------------------------------------------------------------- 3-D volumes


def largest_component(volume_mask: Array) -> np.ndarray:
    """The largest connected component of a 3-D mask, everything else cleared.

    volume_mask: (slices, H, W), boolean or 0 and 1. Returns a new boolean NumPy array. Voxels are connected if they
    share a face, an edge or a corner (26 neighbours). Of components of one size the first in memory order stays;
    an empty mask stays empty. Most LGG patients have one tumour, so this clears false islands; where the largest
    island is itself false, it wipes out the true one. So report with and without it.

    >>> largest_component(np.array([[[1, 0, 1, 1]]])).astype(int)
    array([[[0, 0, 1, 1]]])

    Raises ValueError if the mask has not three axes or a value is neither 0 nor 1.
    """
    from scipy import ndimage

    if volume_mask.ndim != 3:
        raise ValueError(f"volume_mask must have 3 axes (slices, H, W), got shape {volume_mask.shape}")
    mask = to_numpy(_as_binary("volume_mask", volume_mask))
    labels, components = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if components == 0:
        return np.zeros_like(mask)
    voxels = np.bincount(labels.ravel())[1:]  # label 0 is the background
    return labels == 1 + voxels.argmax()


def hd95(prediction: Array, target: Array, spacing: Sequence[float] | None = None) -> float:
    """The 95 % Hausdorff distance of two masks: how far apart their surfaces lie, a few stray pixels forgiven.

    prediction, target: 2-D or 3-D masks of one shape, boolean or 0 and 1. The *surface* of a mask is its pixels that
    have a neighbour across an edge (4 of them in 2-D; across a face, 6, in 3-D) outside the mask or outside the
    array. From each surface pixel of one mask, take the Euclidean distance to the nearest surface pixel of the other;
    take the 95th percentile (linearly interpolated) of these; take the larger of the two directions. This is the
    definition of MONAI. MedPy pools the distances of both directions before the percentile, which gives another figure.

    spacing: the length of one step along each axis; None is 1 for each, so that the distance is in pixels, and
    one slice counts as one pixel. (5, 1, 1) is for slices five pixels apart.

    NaN if both masks are empty: there is no surface to measure. Infinite if just one is.

    >>> hd95(np.array([[1, 0, 0, 0]]), np.array([[0, 0, 0, 1]]))
    3.0

    Raises ValueError if the shapes differ, the masks are neither 2-D nor 3-D, a value is neither 0 nor 1, or the
    spacing is not one finite number above 0 for each axis.

    Sources: Huttenlocher, Klanderman, Rucklidge 1993, "Comparing images using the Hausdorff distance" (ranked
    instead of largest distances); Taha, Hanbury 2015, "Metrics for evaluating 3D medical image segmentation".
    """
    from scipy import ndimage

    prediction, target = (to_numpy(mask) for mask in _binary_pair(prediction, target))
    if target.ndim not in (2, 3):
        raise ValueError(f"prediction and target must have 2 or 3 axes, got shape {target.shape}")
    steps = (1.0,) * target.ndim if spacing is None else tuple(spacing)
    if len(steps) != target.ndim or not all(0 < step < math.inf for step in steps):
        raise ValueError(f"spacing must be one finite number above 0 for each of {target.ndim} axes, got {spacing}")
    if not prediction.any() or not target.any():
        return math.inf if prediction.any() or target.any() else math.nan

    # Outside the box that holds both masks nothing is measured, and a tumour is small: crop to it, then transform.
    box = tuple(slice(places.min(), places.max() + 1) for places in np.nonzero(prediction | target))
    prediction_surface, target_surface = _surface(prediction[box]), _surface(target[box])
    # distance_transform_edt gives each True pixel its distance to the nearest False one: here, to the surface.
    to_target = ndimage.distance_transform_edt(~target_surface, sampling=steps)[prediction_surface]
    to_prediction = ndimage.distance_transform_edt(~prediction_surface, sampling=steps)[target_surface]
    return float(max(np.percentile(to_target, 95), np.percentile(to_prediction, 95)))


def _surface(mask: np.ndarray) -> np.ndarray:
    """The pixels of ``mask`` that an erosion by one pixel takes away (beyond the array's edge lies background)."""
    from scipy import ndimage

    return mask & ~ndimage.binary_erosion(mask)


# ------------------------------------------------------------------------------------------------- uncertainty


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    statistic: Statistic = "mean",
    level: float = 0.95,
    resamples: int = 10_000,
    *,
    key: Key,
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean or median of ``values``, one value a patient: (low, high).

    Had other patients come, the mean would be another one. To see how much, draw as many patients anew from those at
    hand, with replacement, take the statistic, and do so ``resamples`` times; the interval holds the middle ``level``
    of the results. The draws are a function of ``key`` (minunet.base.rng): the same key gives the same interval.

    values: finite numbers, shape (P,). One value alone has no spread: (NaN, NaN). Needs 16 * resamples * P bytes.

    >>> low, high = bootstrap_interval([0.7, 0.8, 0.8, 0.9], key=Key(seed=0))
    >>> 0.7 < low < 0.8 < high < 0.9
    True

    Raises ValueError if ``values`` is empty, not 1-D or not finite, ``statistic`` is neither "mean" nor "median",
    ``level`` is not between 0 and 1, or ``resamples`` is below 1.

    Source: Efron, Tibshirani 1993, "An introduction to the bootstrap", chapter 13.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"values must be one number a patient, shape (P,), got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite, got NaN or infinity")
    check_choice("statistic", statistic, Statistic)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if values.size == 1:
        return math.nan, math.nan
    drawn = generator(key).integers(values.size, size=(resamples, values.size))
    results = np.mean(values[drawn], axis=1) if statistic == "mean" else np.median(values[drawn], axis=1)
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------- the reference's own


def soft_dice(probabilities: Array, target: Array, smooth: float = 100.0) -> float:
    """The Keras reference's Dice, of probabilities, pooled over all pixels:

        (2 sum(t p) + smooth) / (sum t + sum p + smooth)

    No threshold is applied. With smooth > 0 two empty masks give 1, and few pixels of tumour give a figure that
    leans towards 1: it is no honest Dice of small tumours. The reference's masks and predictions had three equal
    channels, so that its sums were three times these: to get its figure from one channel, use ``smooth=100 / 3``.

    probabilities, target: one shape, values in [0, 1], NumPy or CuPy; summed in float64.

    >>> soft_dice(np.array([0.5, 0.5]), np.array([1, 0]), smooth=1)
    0.6666666666666666

    Raises ValueError if the shapes differ, a probability is not finite, a value is outside [0, 1] (a mask left at
    0 and 255 would give a Dice far above 1) or smooth is not a finite number above 0.
    """
    overlap, predicted, actual = _soft_sums(probabilities, target, smooth)
    return (2 * overlap + smooth) / (actual + predicted + smooth)


def soft_iou(probabilities: Array, target: Array, smooth: float = 100.0) -> float:
    """The Keras reference's IoU, of probabilities, pooled over all pixels:

        (sum(t p) + smooth) / (sum t + sum p - sum(t p) + smooth)

    Arguments, the factor of three in ``smooth``, and errors as in :func:`soft_dice`. Both sums carry the whole of
    ``smooth``, so that Dice = 2 IoU / (1 + IoU) no longer holds between the two.

    >>> soft_iou(np.array([0.5, 0.5]), np.array([1, 0]), smooth=1)
    0.6
    """
    overlap, predicted, actual = _soft_sums(probabilities, target, smooth)
    return (overlap + smooth) / (actual + predicted - overlap + smooth)


def _soft_sums(probabilities: Array, target: Array, smooth: float) -> tuple[float, float, float]:
    """sum(t p), sum p, sum t, accumulated in float64."""
    _check_same_shape("probabilities", probabilities, target)
    _check_probabilities("probabilities", probabilities)
    _check_probabilities("target", target)
    _check_positive("smooth", smooth)
    overlap = (probabilities.astype(np.float64) * target).sum()
    return float(overlap), float(probabilities.sum(dtype=np.float64)), float(target.sum(dtype=np.float64))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def _check_probabilities(name: str, x: Array) -> None:
    finite = array_module(x).isfinite(x)
    if not finite.all():
        raise ValueError(f"{name} must be finite, got {int((~finite).sum())} NaN or infinite values of {x.size}")
    if ((x < 0) | (x > 1)).any():
        raise ValueError(
            f"{name} must lie in [0, 1], got values from {float(x.min()):g} to {float(x.max()):g}"
            " (divide masks stored as 0 and 255 by 255; apply the sigmoid to logits)"
        )


# ------------------------------------------------------------------------------------------------- the report

#: [low, high], the ends of a 95 % interval over patients; [None, None] of fewer than two patients.
Interval = list[float | None]


@dataclass(frozen=True)
class Pooled:
    """The scores of all pixels of all slices together; None for a 0 / 0 that has no answer."""

    dice: float | None  # overlap over mean size, 1 of two empty masks
    iou: float | None  # overlap over union, 1 of two empty masks
    precision: float | None  # the share of the prediction that is tumour
    recall: float | None  # the share of the tumour that was found
    specificity: float | None  # the share of the rest that was left alone
    accuracy: float | None  # the share of the pixels that are right


@dataclass(frozen=True)
class PerSlice:
    """One score a slice, then the mean, as :func:`mean_over_slices` takes it."""

    mean_dice_empty_as_one: float  # empty slices score 1, with false positives 0
    mean_dice_tumour_slices: float | None  # only slices whose target shows tumour; None if none does
    mean_iou_empty_as_one: float  # as with Dice
    mean_iou_tumour_slices: float | None  # as with Dice


@dataclass(frozen=True)
class Summary:
    """One score over the patients that have it."""

    patients: int  # how many have it: HD95 needs two masks that are not empty
    mean: float | None  # None of no patients
    mean_interval: Interval  # between which values the mean of other patients would lie
    median: float | None  # None of no patients
    median_interval: Interval  # and their median


@dataclass(frozen=True)
class Summaries:
    """The lists of :class:`PerPatient`, each in two figures."""

    dice: Summary
    dice_largest_component: Summary
    iou: Summary
    hd95_px: Summary


@dataclass(frozen=True)
class PerPatient:
    """One score a patient, in 3-D. The lists have one entry a patient."""

    names: list[str]  # in the order in which the patients first appear
    slices: list[int]  # how many slices each patient has
    dice: list[float]  # of the thresholded volumes as they are
    dice_largest_component: list[float]  # after largest_component(prediction)
    iou: list[float]  # of the volumes as they are
    hd95_px: list[float | None]  # of the volumes as they are; None where a mask is empty
    summary: Summaries  # mean and median over the patients


@dataclass(frozen=True)
class Reference:
    """As the Keras reference defines them, to be compared with its figures only."""

    soft_dice_pooled: float  # no threshold, smoothed
    soft_iou_pooled: float  # no threshold, smoothed
    smooth: float  # of these two, for one channel
    recall_pooled: float | None  # thresholded at 0.5, whatever the threshold is
    accuracy_pooled: float | None  # thresholded at 0.5 as well


@dataclass(frozen=True)
class Scores:
    """Predictions, scored in every scope. What cannot be computed (0 / 0, an infinite HD95) is None."""

    slices: int  # how many
    tumour_slices: int  # how many have a target that shows tumour
    patients: int  # how many
    image_size: list[int]  # [H, W]: the pixels that all counts and HD95 refer to
    threshold: float  # tumour is predicted where the probability is above it
    slice_step: float  # the distance of two slices in pixels, for HD95
    interval_level: float  # 0.95: the share of redrawn sets of patients whose figure lies in an interval
    pooled: Pooled  # all pixels together
    per_slice: PerSlice  # one score a slice
    per_patient: PerPatient  # one score a patient
    reference: Reference  # the Keras reference's own

    def to_dict(self) -> dict[str, Any]:
        """The same in dicts and lists, as metrics.json has it."""
        return asdict(self)


def evaluate_masks(
    probabilities: Array,
    targets: Array,
    patients: Sequence[str],
    threshold: float = 0.5,
    *,
    slice_step: float = 1.0,
    reference_smooth: float = 100 / 3,
    extents: Array | None = None,
    ignored: Array | None = None,
    key: Key = BOOTSTRAP_KEY,
) -> Scores:
    """Scores predictions in every scope.

    probabilities: (S, H, W, 1), floating, in [0, 1]. targets: (S, H, W, 1), 0 and 1. patients: S names; the slices of
    one patient, in the order in which they stand, are its volume, so they must ascend, and a slice that is not there
    (a split by slice) closes up. A pixel is predicted as tumour where its probability is *above* ``threshold``.
    reference_smooth: of the soft metrics, for one channel (:func:`soft_dice` says why 100 / 3). extents: (S, 2), the
    height and width of each image, at the top left, if the rest is padding, where both arrays are 0. ignored: (S,), how
    many other pixels of each image are to be left out of all counts; there, too, both arrays are 0. key: of the
    bootstrap.

    Raises ValueError if shapes, values or arguments break the rules above, before anything is computed.
    """
    probabilities, targets = to_numpy(probabilities), to_numpy(targets)
    _check_same_shape("probabilities", probabilities, targets)
    if targets.ndim != 4 or targets.shape[3] != 1 or targets.size == 0:
        raise ValueError(f"probabilities and targets must have shape (S, H, W, 1), none 0, got {targets.shape}")
    _check_patients(patients, slices=len(targets))
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
    _check_positive("slice_step", slice_step)
    _check_positive("reference_smooth", reference_smooth)
    _check_probabilities("probabilities", probabilities)
    actual = _as_binary("targets", targets)
    predicted = probabilities > threshold
    slices = count(predicted, actual, axis=(1, 2, 3))
    uncounted = np.zeros(len(targets), int) if extents is None else targets[0].size - np.prod(extents, axis=1)
    uncounted = uncounted if ignored is None else uncounted + ignored
    slices = slices._replace(tn=slices.tn - uncounted)
    return Scores(
        slices=len(targets),
        tumour_slices=int((slices.tp + slices.fn > 0).sum()),
        patients=len(set(patients)),
        image_size=list(targets.shape[1:3]),
        threshold=float(threshold),
        slice_step=float(slice_step),
        interval_level=0.95,
        pooled=_pooled(pooled_counts(slices)),
        per_slice=_per_slice(slices),
        per_patient=_per_patient(predicted[..., 0], actual[..., 0], slices, patients, slice_step, key),
        reference=_reference(probabilities, actual, int(uncounted.sum()), reference_smooth),
    )


def _pooled(counts: Counts) -> Pooled:
    return Pooled(*(_number(score(counts)) for score in (dice, iou, precision, recall, specificity, accuracy)))


def _per_slice(slices: Counts) -> PerSlice:
    return PerSlice(
        mean_dice_empty_as_one=mean_over_slices(dice, slices, empty_slices="as_one"),
        mean_dice_tumour_slices=_number(mean_over_slices(dice, slices, empty_slices="left_out")),
        mean_iou_empty_as_one=mean_over_slices(iou, slices, empty_slices="as_one"),
        mean_iou_tumour_slices=_number(mean_over_slices(iou, slices, empty_slices="left_out")),
    )


def _per_patient(
    predicted: np.ndarray, actual: np.ndarray, slices: Counts, patients: Sequence[str], slice_step: float, key: Key
) -> PerPatient:
    """``predicted`` and ``actual`` are (S, H, W); ``slices`` are their counts."""
    names, volumes = per_patient_counts(slices, patients)
    rows = list(_rows_by_patient(patients).values())
    dices, ious = dice(volumes), iou(volumes)
    largest = np.array([dice(count(largest_component(predicted[r]), actual[r])) for r in rows])
    distances = np.array([hd95(predicted[r], actual[r], spacing=(slice_step, 1, 1)) for r in rows])
    return PerPatient(
        names=list(names),
        slices=[len(r) for r in rows],
        dice=dices.tolist(),
        dice_largest_component=largest.tolist(),
        iou=ious.tolist(),
        hd95_px=[_number(distance) for distance in distances],
        summary=Summaries(*(_summary(values, key) for values in (dices, largest, ious, distances))),
    )


def _summary(values: np.ndarray, key: Key) -> Summary:
    """Over the patients whose value is finite."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return Summary(0, None, [None, None], None, [None, None])
    mean_interval, median_interval = (
        [_number(end) for end in bootstrap_interval(values, statistic, key=key)] for statistic in get_args(Statistic)
    )
    return Summary(len(values), float(np.mean(values)), mean_interval, float(np.median(values)), median_interval)


def _reference(probabilities: np.ndarray, actual: np.ndarray, uncounted: int, smooth: float) -> Reference:
    at_half = count(probabilities > 0.5, actual)
    at_half = at_half._replace(tn=at_half.tn - uncounted)
    return Reference(
        soft_dice_pooled=soft_dice(probabilities, actual, smooth),
        soft_iou_pooled=soft_iou(probabilities, actual, smooth),
        smooth=float(smooth),
        recall_pooled=_number(recall(at_half)),
        accuracy_pooled=_number(accuracy(at_half)),
    )


def _number(value: Any) -> float | None:
    """``value`` for JSON, which has neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------- several targets


def predicted_masks(probabilities: Array, classes: int, threshold: float = 0.5) -> np.ndarray:
    """What ``probabilities`` (..., K) find of each target: uint8 (..., T) of 0 and 1.

    Of ``classes``, each pixel has the most probable one, of equals the first, and the background is no target. With
    0 classes each channel is a target, found where its probability is above ``threshold``.

    >>> predicted_masks(np.array([[0.2, 0.5, 0.3], [0.4, 0.3, 0.3]]), classes=3)
    array([[1, 0],
           [0, 0]], dtype=uint8)
    """
    probabilities = to_numpy(probabilities)
    if not classes:
        return (probabilities > threshold).astype(np.uint8)
    return target_masks(probabilities.argmax(axis=-1)[..., None], classes)


def evaluate_slices(probabilities: np.ndarray, slices: SliceSet) -> dict[str, Scores]:
    """The scores of each target of ``slices``, by its name, as :func:`evaluate_masks` takes them.

    probabilities: (S, H, W, K), K as the network has them: one of each class, with the background, or of each mask.
    Of classes, :func:`predicted_masks` are scored, and pixels to be ignored are left out of all counts. No threshold
    has made these masks, so that the soft metrics among the scores say nothing: see :func:`scores_to_dict`.
    """
    names, actual = slices.target_names(), slices.marked(np.arange(len(slices)))
    found, ignored, extents = probabilities, None, slices.extents
    if slices.classes:
        unknown = slices.masks == IGNORE  # the padding, too
        found = predicted_masks(probabilities, len(slices.classes)) * ~unknown
        ignored, extents = unknown.sum(axis=(1, 2, 3)), None
    return {
        name: evaluate_masks(
            found[..., k : k + 1].astype(np.float32, copy=False),
            actual[..., k : k + 1],
            slices.patients,
            extents=extents,
            ignored=ignored,
        )
        for k, name in enumerate(names)
    }


@dataclass(frozen=True)
class MeanScores:
    """Means over the targets, each of which counts alike, however small it is.

    Dice of two empty masks is 1, so that a target that a patient does not have, and that was not found, counts 1.
    """

    dice_pooled: float
    iou_pooled: float
    names: list[str]  # of the patients
    dice: list[float]  # of each patient
    summary: Summary  # of these


def mean_scores(scores: Mapping[str, Scores], key: Key = BOOTSTRAP_KEY) -> MeanScores:
    """The means of what :func:`evaluate_slices` has found."""
    each = list(scores.values())
    dices = np.mean([target.per_patient.dice for target in each], axis=0)
    return MeanScores(
        dice_pooled=float(np.mean([target.pooled.dice for target in each])),
        iou_pooled=float(np.mean([target.pooled.iou for target in each])),
        names=each[0].per_patient.names,
        dice=dices.tolist(),
        summary=_summary(dices, key),
    )


def scores_to_dict(scores: Mapping[str, Scores], exclusive: bool) -> dict[str, Any]:
    """The scores of several targets as metrics.json has them.

    Those of ``exclusive`` classes are without what needs a threshold: "threshold", and "reference", its soft metrics.
    """
    of_a_threshold = ("threshold", "reference") if exclusive else ()
    classes = {
        name: {field: value for field, value in target.to_dict().items() if field not in of_a_threshold}
        for name, target in scores.items()
    }
    return {"mean": asdict(mean_scores(scores)), "classes": classes}


def format_targets(scores: Mapping[str, Scores], exclusive: bool, words: Words = LGG) -> str:
    """The scores of several targets as a table to print: a line for each, and one for their mean."""
    first = next(iter(scores.values()))
    height, width = first.image_size
    rule = f"Each is predicted where its probability is above {first.threshold:g}; they may overlap."
    if exclusive:
        rule = "Each pixel has its most probable class; pixels to be ignored are left out."
    per_group, interval = f"Dice per {words.group}, {words.pooled}", f"{'95 % interval':<16}"
    lines = [
        f"{words.image.capitalize()}s: {first.slices}. {words.group.capitalize()}s: {first.patients}."
        f" Pixels: {height} x {width}. {rule}",
        "",
        f"{per_group:<40}{'mean':>8}  {interval}{'median':>8}  {interval}{'Dice pooled':>13}{'IoU pooled':>12}",
    ]
    mean = mean_scores(scores)
    rows = [(name, s.per_patient.summary.dice, s.pooled.dice, s.pooled.iou) for name, s in scores.items()]
    rows.append(("mean", mean.summary, mean.dice_pooled, mean.iou_pooled))
    lines += [f"  {name[:38]:<38}{_figures(s)}{_cell(dice, 13)}{_cell(iou, 12)}" for name, s, dice, iou in rows]
    return "\n".join(lines)


def _figures(values: Summary, digits: int = 3) -> str:
    """Mean and median, each with its interval, as cells of a table."""
    row = ""
    for figure, (low, high) in ((values.mean, values.mean_interval), (values.median, values.median_interval)):
        interval = "n/a" if low is None else f"{low:.{digits}f} to {high:.{digits}f}"
        row += f"{_cell(figure, 8, digits)}  {interval:<16}"
    return row


# ------------------------------------------------------------------------------------------------- the table


def format_report(scores: Scores, words: Words = LGG) -> str:
    """The scores as a table to print, in the ``words`` of the data set. What is None in them prints as n/a."""
    summary, pooled, by_slice, reference = scores.per_patient.summary, scores.pooled, scores.per_slice, scores.reference
    height, width = scores.image_size
    measured = f"HD95 in pixels ({summary.hd95_px.patients} of {scores.patients} {words.group}s)"
    per_group = f"Per {words.group}, {words.pooled}"
    smoothed = f"reference: soft, pooled, smooth {reference.smooth:.4g}"

    def summary_row(label: str, values: Summary, digits: int = 3) -> str:
        return f"  {label:<38}{_figures(values, digits)}".rstrip()

    def dice_row(label: str, dice_value: float | None, iou_value: float | None) -> str:
        return f"  {label:<38}{_cell(dice_value, 8)}{_cell(iou_value, 8)}"

    return "\n".join(
        [
            f"{words.image.capitalize()}s: {scores.slices}, {scores.tumour_slices} with {words.target}."
            f" {words.group.capitalize()}s: {scores.patients}. Pixels: {height} x {width}."
            f" {words.target[:1].upper()}{words.target[1:]} is predicted where its probability is above"
            f" {scores.threshold:g}.",
            "",
            f"{per_group:<40}{'mean':>8}  {'95 % interval':<16}{'median':>8}  95 % interval",
            summary_row("Dice", summary.dice),
            summary_row("Dice, largest component only", summary.dice_largest_component),
            summary_row("IoU", summary.iou),
            summary_row(measured, summary.hd95_px, digits=1),
            "",
            f"{'The same predictions, other definitions':<40}{'Dice':>8}{'IoU':>8}",
            dice_row("pooled over all pixels", pooled.dice, pooled.iou),
            dice_row(
                f"mean over {words.image}s, empty counted as 1",
                by_slice.mean_dice_empty_as_one,
                by_slice.mean_iou_empty_as_one,
            ),
            dice_row(
                f"mean over {words.image}s with {words.target}",
                by_slice.mean_dice_tumour_slices,
                by_slice.mean_iou_tumour_slices,
            ),
            dice_row(smoothed, reference.soft_dice_pooled, reference.soft_iou_pooled),
            "",
            f"{'Pooled over all pixels':<40}{'precision':>11}{'recall':>11}{'specificity':>13}{'accuracy':>11}",
            f"  {'predictions':<38}{_cell(pooled.precision, 11)}{_cell(pooled.recall, 11)}"
            f"{_cell(pooled.specificity, 13, 4)}{_cell(pooled.accuracy, 11, 4)}",
            f"  {'reference: threshold 0.5':<49}{_cell(reference.recall_pooled, 11)}"
            f"{_cell(reference.accuracy_pooled, 24, 4)}",
        ]
    )


def _cell(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'n/a' if value is None else f'{value:.{digits}f}':>{width}}"
