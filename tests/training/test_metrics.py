"""Metrics: by hand, against loops that share no code with them, and by the laws that scores obey."""

import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from minunet.base.rng import AUGMENT, BOOTSTRAP, DROPOUT, INITIALIZE, SAMPLE, Key, generator
from minunet.training.metrics import (
    BOOTSTRAP_KEY,
    Counts,
    PerSlice,
    Pooled,
    Summary,
    accuracy,
    bootstrap_interval,
    count,
    dice,
    evaluate_masks,
    format_report,
    hd95,
    iou,
    largest_component,
    mean_over_slices,
    per_patient_counts,
    pooled_counts,
    precision,
    recall,
    soft_dice,
    soft_iou,
    specificity,
)
from tests import strict_cupy

SCORES = [accuracy, precision, recall, specificity, iou, dice]
SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(1, 6)
DENSITIES = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


@st.composite
def mask_pairs(draw: Any, axes: int = 4, largest: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Two boolean masks of one shape: sparse, dense, empty or full, each for itself."""
    shape = draw(st.tuples(*[st.integers(1, largest)] * axes))
    rng = np.random.default_rng(draw(SEEDS))
    return rng.random(shape) < draw(DENSITIES), rng.random(shape) < draw(DENSITIES)


def count_by_loop(prediction: np.ndarray, target: np.ndarray) -> tuple[int, int, int, int]:
    cells = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for p, t in zip(prediction.ravel().tolist(), target.ravel().tolist(), strict=True):
        cells[bool(p), bool(t)] += 1
    return cells[True, True], cells[True, False], cells[False, True], cells[False, False]


def same(x: Any, y: Any) -> bool:
    """Equal to the last bit, NaN being equal to NaN."""
    return np.array_equal(x, y, equal_nan=True)


# ------------------------------------------------------------------------------------------------- counts


def test_count_by_hand() -> None:
    prediction = np.array([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    target = np.array([[1, 1, 1, 0, 1], [1, 0, 0, 0, 0]])
    counts = count(prediction, target)
    assert (counts.tp, counts.fp, counts.fn, counts.tn) == (3, 1, 2, 4)


@given(mask_pairs())
def test_count_is_the_loops_count_in_every_scope(pair: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, target = pair
    assert tuple(count(prediction, target)) == count_by_loop(prediction, target)
    slices = count(prediction, target, axis=(1, 2, 3))
    assert np.array_equal(np.stack(slices, axis=1), [count_by_loop(p, t) for p, t in zip(*pair, strict=True)])
    columns = count(prediction, target, axis=0)
    assert all(field.shape == target.shape[1:] for field in columns)
    assert np.array_equal(np.sum(columns, axis=0), np.full(target.shape[1:], len(target)))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float32])
def test_count_takes_any_dtype_of_0_and_1_and_counts_in_int64(dtype: Any) -> None:
    mask = np.ones(300, dtype)  # 300 would wrap around in uint8
    for axis in (None, 0):
        counts = count(mask, mask, axis=axis)
        assert all(field.dtype == np.int64 for field in counts)
        assert counts == (300, 0, 0, 0)


def test_count_leaves_its_masks_alone() -> None:
    prediction, target = np.array([1, 0, 1], np.uint8), np.array([True, True, False])
    count(prediction, target)
    assert prediction.tolist() == [1, 0, 1]
    assert target.tolist() == [True, True, False]


def test_count_refuses_masks_that_do_not_fit() -> None:
    # They would broadcast: a column against a row gives a table of 6.
    with pytest.raises(ValueError, match=r"^prediction and target must have the same shape, got \(2, 1\) and \(3,\)$"):
        count(np.zeros((2, 1), bool), np.zeros(3, bool))


@pytest.mark.parametrize(
    ("values", "listed"),
    [
        ([0, 255, 255, 1], "255"),
        ([0.0, 0.25, 0.5, 1.0], "0.25, 0.5"),
        ([0.0, np.nan, 1.0, 1.0], "nan"),
        ([-1, 0, 1, 2], "-1, 2"),
    ],
)
def test_a_mask_that_is_not_binary_is_refused_with_its_values(values: list[float], listed: str) -> None:
    good = np.array([0, 1, 0, 1])
    advice = r" \(threshold probabilities; divide masks stored as 0 and 255 by 255\)$"
    with pytest.raises(ValueError, match=f"^prediction must hold 0 and 1 only, got {listed}{advice}"):
        count(np.array(values), good)
    with pytest.raises(ValueError, match=f"^target must hold 0 and 1 only, got {listed}{advice}"):
        count(good, np.array(values))


def test_at_most_five_wrong_values_are_listed() -> None:
    with pytest.raises(ValueError, match=r"got 2, 3, 4, 5, 6 \("):
        count(np.arange(12), np.zeros(12, bool))


def test_counts_add_up_instead_of_joining() -> None:
    parts = [Counts(1, 2, 3, 4), Counts(10, 20, 30, 40), Counts(100, 200, 300, 400)]
    assert sum(parts, Counts(0, 0, 0, 0)) == (111, 222, 333, 444)
    arrays = Counts(*np.arange(8).reshape(4, 2)) + Counts(*np.full((4, 2), 10))
    assert np.array_equal(arrays, np.arange(8).reshape(4, 2) + 10)


# ------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("score", "expected"),
    [(accuracy, 14 / 26), (precision, 3 / 8), (recall, 3 / 10), (specificity, 11 / 16), (iou, 3 / 15), (dice, 6 / 18)],
)
def test_scores_by_hand(score: Callable, expected: float) -> None:
    assert score(Counts(tp=3, fp=5, fn=7, tn=11)) == expected
    of_an_array = score(Counts(tp=np.array([[3]]), fp=np.array([[5]]), fn=np.array([[7]]), tn=np.array([[11]])))
    assert of_an_array.tolist() == [[expected]]
    assert of_an_array.dtype == np.float64


NAN = math.nan


@pytest.mark.parametrize(
    ("counts", "expected"),  # accuracy, precision, recall, specificity, iou, dice
    [
        (Counts(0, 0, 0, 0), (NAN, NAN, NAN, NAN, 1, 1)),  # no pixel at all
        (Counts(0, 0, 0, 9), (1, NAN, NAN, 1, 1, 1)),  # both masks empty
        (Counts(0, 2, 0, 6), (0.75, 0, NAN, 0.75, 0, 0)),  # no tumour, and some predicted
        (Counts(0, 0, 2, 6), (0.75, NAN, 0, 1, 0, 0)),  # a tumour, and none predicted
        (Counts(9, 0, 0, 0), (1, 1, 1, NAN, 1, 1)),  # tumour everywhere, all found
        (Counts(0, 1, 1, 0), (0, 0, 0, 0, 0, 0)),  # all wrong
    ],
)
def test_what_is_0_by_0_is_stated(counts: Counts, expected: tuple[float, ...]) -> None:
    for score, value in zip(SCORES, expected, strict=True):
        assert same(score(counts), value), score.__name__  # of Python integers
        arrays = Counts(*(np.array([field, field]) for field in counts))
        assert same(score(arrays), [value, value]), score.__name__  # warnings are errors: nothing divides by 0


def test_one_empty_entry_does_not_touch_the_others() -> None:
    counts = Counts(tp=np.array([0, 1]), fp=np.array([0, 1]), fn=np.array([0, 0]), tn=np.array([4, 2]))
    assert same(precision(counts), [NAN, 0.5])
    assert same(dice(counts), [1, 2 / 3])


@given(mask_pairs())
def test_scores_lie_between_0_and_1_or_are_nan(pair: tuple[np.ndarray, np.ndarray]) -> None:
    slices = count(*pair, axis=(1, 2, 3))
    for score in SCORES:
        values = score(slices)
        assert ((values >= 0) & (values <= 1) | np.isnan(values)).all()
    assert np.isfinite(dice(slices)).all()
    assert np.isfinite(iou(slices)).all()


@given(mask_pairs())
def test_dice_and_iou_tell_the_same_story(pair: tuple[np.ndarray, np.ndarray]) -> None:
    slices = count(*pair, axis=(1, 2, 3))
    np.testing.assert_allclose(dice(slices), 2 * iou(slices) / (1 + iou(slices)), rtol=1e-15)


@given(mask_pairs())
def test_dice_is_the_harmonic_mean_of_precision_and_recall(pair: tuple[np.ndarray, np.ndarray]) -> None:
    counts = count(*pair)
    assume(counts.tp > 0)
    assert dice(counts) == pytest.approx(2 / (1 / precision(counts) + 1 / recall(counts)), rel=1e-14)


@given(mask_pairs())
def test_swapping_the_masks_swaps_precision_and_recall(pair: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, target = pair
    counts, swapped = count(prediction, target), count(target, prediction)
    for score in (accuracy, iou, dice):
        assert score(counts) == score(swapped)
    assert same(precision(counts), recall(swapped))


@given(mask_pairs())
def test_swapping_tumour_and_background_swaps_recall_and_specificity(pair: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, target = pair
    counts, complement = count(prediction, target), count(~prediction, ~target)
    assert accuracy(counts) == accuracy(complement)
    assert same(recall(counts), specificity(complement))


@given(mask_pairs(), SEEDS)
def test_the_order_of_pixels_does_not_matter(pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    prediction, target = pair
    order = np.random.default_rng(seed).permutation(target.size)
    assert count(prediction, target) == count(prediction.ravel()[order], target.ravel()[order])


@given(mask_pairs())
def test_a_perfect_prediction_scores_1_and_its_complement_0(pair: tuple[np.ndarray, np.ndarray]) -> None:
    target = pair[1]
    for score in SCORES:
        assert score(count(target, target)) == 1 or np.isnan(score(count(target, target)))
    wrong = count(~target, target)
    assert (accuracy(wrong), iou(wrong), dice(wrong)) == (0, 0, 0)


# ------------------------------------------------------------------------------------------------- scopes


@given(mask_pairs())
def test_pooled_counts_are_the_counts_of_all_pixels(pair: tuple[np.ndarray, np.ndarray]) -> None:
    slices = count(*pair, axis=(1, 2, 3))
    assert pooled_counts(slices) == count(*pair)
    # Pooled scores are means over slices after all, but weighted: Dice by the sizes of both masks, accuracy equally.
    weights = 2 * slices.tp + slices.fp + slices.fn
    assume(weights.sum() > 0)
    assert dice(pooled_counts(slices)) == pytest.approx(np.average(dice(slices), weights=weights), rel=1e-13)
    assert accuracy(pooled_counts(slices)) == pytest.approx(accuracy(slices).mean(), rel=1e-13)


def test_per_patient_counts_by_hand() -> None:
    slices = Counts(*np.array([[1, 2, 4, 8], [10, 20, 40, 80], [3, 5, 7, 9], [0, 1, 0, 1]]))
    names, volumes = per_patient_counts(slices, ["b", "a", "b", "c"])  # first come, first listed: not sorted
    assert names == ("b", "a", "c")
    assert [field.tolist() for field in volumes] == [[5, 2, 8], [50, 20, 80], [10, 5, 9], [0, 1, 1]]
    assert volumes.tp.dtype == np.int64


@given(mask_pairs(largest=6), st.integers(1, 3), SEEDS)
def test_a_patients_counts_are_those_of_its_volume(
    pair: tuple[np.ndarray, np.ndarray], patients: int, seed: int
) -> None:
    prediction, target = pair
    of_slice = np.random.default_rng(seed).integers(patients, size=len(target)).astype(str)
    names, volumes = per_patient_counts(count(prediction, target, axis=(1, 2, 3)), of_slice.tolist())
    for name, *counts in zip(names, *volumes, strict=True):
        assert tuple(counts) == count_by_loop(prediction[of_slice == name], target[of_slice == name])


def test_per_patient_counts_needs_one_name_a_slice() -> None:
    slices = Counts(*np.zeros((4, 3), int))
    with pytest.raises(ValueError, match=r"^patients must name one patient a slice, got 2 names for 3 slices$"):
        per_patient_counts(slices, ["a", "b"])


def test_mean_over_slices_by_hand() -> None:
    # half found; both empty; a false alarm in an empty slice; a tumour missed; one false pixel beside one right one
    slices = Counts(
        tp=np.array([1, 0, 0, 0, 1]),
        fp=np.array([0, 0, 3, 0, 1]),
        fn=np.array([1, 0, 0, 2, 0]),
        tn=np.array([9, 9, 9, 9, 9]),
    )
    assert mean_over_slices(dice, slices, empty_slices="as_one") == pytest.approx((2 / 3 + 1 + 0 + 0 + 2 / 3) / 5)
    assert mean_over_slices(dice, slices, empty_slices="left_out") == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert mean_over_slices(iou, slices, empty_slices="as_one") == pytest.approx((1 / 2 + 1 + 0 + 0 + 1 / 2) / 5)
    assert mean_over_slices(iou, slices, empty_slices="left_out") == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)


def test_without_a_tumour_nothing_is_left_to_average() -> None:
    slices = Counts(*np.array([[0, 0], [0, 1], [0, 0], [4, 3]]))
    assert mean_over_slices(dice, slices, empty_slices="as_one") == 0.5
    assert math.isnan(mean_over_slices(dice, slices, empty_slices="left_out"))


def test_the_rule_for_empty_slices_must_be_named() -> None:
    slices = Counts(*np.ones((4, 2), int))
    with pytest.raises(ValueError, match=r"^empty_slices must be 'as_one' or 'left_out', got 'zero'$"):
        mean_over_slices(dice, slices, empty_slices="zero")
    with pytest.raises(TypeError, match="empty_slices"):
        mean_over_slices(dice, slices)  # type: ignore[call-arg]


# ------------------------------------------------------------------------------------------------- largest component


def components_by_flood(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """The 26-connected components, in the order of their first voxel."""
    left = [tuple(place) for place in np.argwhere(mask).tolist()]
    components = []
    while left:
        component, border = set(), [left[0]]
        while border:
            place = border.pop()
            component.add(place)
            near = [other for other in left if all(abs(a - b) <= 1 for a, b in zip(place, other, strict=True))]
            border += [other for other in near if other not in component and other not in border]
        components.append(component)
        left = [place for place in left if place not in component]
    return components


@given(mask_pairs(axes=3))
def test_largest_component_is_the_floods(pair: tuple[np.ndarray, np.ndarray]) -> None:
    for mask in pair:
        kept = largest_component(mask)
        expected = max(components_by_flood(mask), key=len, default=set())  # max takes the first of equals
        assert kept.dtype == bool
        assert kept.shape == mask.shape
        assert {tuple(place) for place in np.argwhere(kept).tolist()} == expected


def test_largest_component_by_hand() -> None:
    volume = np.zeros((3, 5, 5), np.uint8)
    volume[0, 0, 0] = volume[1, 1, 1] = volume[2, 2, 2] = 1  # joined by corners alone, across slices
    volume[0, 4, 3:5] = 1  # two voxels
    before = volume.copy()
    kept = largest_component(volume)
    assert np.argwhere(kept).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert np.array_equal(volume, before)


def test_the_first_of_two_equal_components_stays() -> None:
    assert largest_component(np.array([[[1, 0, 1]]])).tolist() == [[[True, False, False]]]


def test_an_empty_volume_stays_empty_and_a_new_array() -> None:
    volume = np.zeros((2, 3, 4), bool)
    kept = largest_component(volume)
    assert kept.tolist() == volume.tolist()
    assert not np.shares_memory(kept, volume)


def test_largest_component_refuses_what_is_no_volume() -> None:
    with pytest.raises(ValueError, match=r"^volume_mask must have 3 axes \(slices, H, W\), got shape \(2, 3, 4, 1\)$"):
        largest_component(np.zeros((2, 3, 4, 1), bool))
    with pytest.raises(ValueError, match=r"^volume_mask must hold 0 and 1 only, got 255 "):
        largest_component(np.full((1, 2, 2), 255))


# ------------------------------------------------------------------------------------------------- HD95


def surface_by_loop(mask: np.ndarray) -> list[tuple[int, ...]]:
    padded = np.pad(mask, 1)
    surface = []
    for place in itertools.product(*map(range, mask.shape)):
        neighbours = [
            padded[tuple(p + 1 + (step if axis == a else 0) for a, p in enumerate(place))]
            for axis in range(mask.ndim)
            for step in (-1, 1)
        ]
        if mask[place] and not all(neighbours):
            surface.append(place)
    return surface


def percentile_95(values: list[float]) -> float:
    values = sorted(values)
    place = 0.95 * (len(values) - 1)
    low, high = values[math.floor(place)], values[math.ceil(place)]
    return low + (place - math.floor(place)) * (high - low)


def hd95_by_loop(prediction: np.ndarray, target: np.ndarray, spacing: tuple[float, ...]) -> float:
    def directed(start: list[tuple[int, ...]], end: list[tuple[int, ...]]) -> float:
        return percentile_95(
            [min(math.hypot(*((a - b) * s for a, b, s in zip(p, q, spacing, strict=True))) for q in end) for p in start]
        )

    surfaces = surface_by_loop(prediction), surface_by_loop(target)
    if not all(surfaces):
        return math.inf if any(surfaces) else math.nan
    return max(directed(*surfaces), directed(*reversed(surfaces)))


@pytest.mark.parametrize("axes", [2, 3])
@given(data=st.data())
def test_hd95_is_the_loops(axes: int, data: Any) -> None:
    prediction, target = data.draw(mask_pairs(axes=axes, largest=7 if axes == 2 else 4))
    spacing = data.draw(st.tuples(*[st.sampled_from([0.5, 1.0, 1.25, 5.0])] * axes))
    np.testing.assert_allclose(
        hd95(prediction, target, spacing), hd95_by_loop(prediction, target, spacing), rtol=1e-12, atol=1e-12
    )
    assert same(hd95(prediction, target), hd95(prediction, target, (1.0,) * axes))
    assert same(hd95(prediction, target), hd95(target, prediction))


@given(mask_pairs(axes=3, largest=4), st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 3))
def test_empty_space_around_changes_no_distance(pair: tuple[np.ndarray, np.ndarray], margins: Any) -> None:
    prediction, target = pair
    assert same(hd95(prediction, target), hd95(np.pad(prediction, margins), np.pad(target, margins)))


def one_pixel(shape: tuple[int, ...], *place: int) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[place] = 1
    return mask


def test_hd95_by_hand() -> None:
    assert hd95(one_pixel((6, 6), 0, 1), one_pixel((6, 6), 3, 5)) == 5  # 3, 4, 5
    assert hd95(one_pixel((6, 6), 0, 1), one_pixel((6, 6), 3, 5), spacing=(4, 4)) == 20
    assert hd95(one_pixel((3, 4, 4), 0, 0, 0), one_pixel((3, 4, 4), 2, 0, 0)) == 2  # a slice is a step of 1
    assert hd95(one_pixel((3, 4, 4), 0, 0, 0), one_pixel((3, 4, 4), 2, 0, 0), spacing=(5, 1, 1)) == 10
    result = hd95(one_pixel((2, 2), 0, 0), one_pixel((2, 2), 0, 0))
    assert result == 0
    assert type(result) is float


def test_hd95_takes_the_larger_direction_and_does_not_pool() -> None:
    line, point = np.ones((1, 21), bool), one_pixel((1, 21), 0, 0)
    # From the line: 0, 1, ..., 20, 95th percentile 19. From the point: 0. Pooled, the 22 distances would give 18.95.
    assert hd95(line, point) == pytest.approx(19, rel=1e-14)
    assert hd95(point, line) == pytest.approx(19, rel=1e-14)


def test_hd95_measures_surfaces_and_the_edge_of_the_array_is_one() -> None:
    full = np.ones((5, 5), bool)
    holed = full.copy()
    holed[2, 2] = False
    # Surface of full: the ring of 16. Of holed: the ring and the 4 pixels around the hole, 1 from the ring: of 20, 1 is
    # the 95th percentile. Were the distance taken to the mask and not to its surface, all 25 would be 0.
    assert hd95(full, holed) == 1
    assert hd95(holed, full) == 1


def test_a_few_stray_pixels_are_forgiven() -> None:
    target = np.zeros((40, 40), bool)
    target[5:15, 5:15] = True  # a surface of 36 pixels
    prediction = target.copy()
    prediction[39, 39] = True  # one of 37
    assert hd95(prediction, target) == 0


def test_hd95_of_empty_masks() -> None:
    empty, some = np.zeros((3, 3), bool), one_pixel((3, 3), 1, 1)
    assert math.isnan(hd95(empty, empty))
    assert hd95(empty, some) == math.inf
    assert hd95(some, empty) == math.inf


def test_hd95_refuses_what_it_cannot_measure() -> None:
    mask = one_pixel((3, 3), 1, 1)
    with pytest.raises(ValueError, match=r"^prediction and target must have the same shape, got \(3, 3\) and \(3, 4\)"):
        hd95(mask, np.zeros((3, 4), bool))
    with pytest.raises(ValueError, match=r"^prediction and target must have 2 or 3 axes, got shape \(3, 3, 1, 1\)$"):
        hd95(mask[..., None, None], mask[..., None, None])
    with pytest.raises(ValueError, match=r"^prediction and target must have 2 or 3 axes, got shape \(9,\)$"):
        hd95(mask.ravel(), mask.ravel())
    with pytest.raises(ValueError, match=r"^target must hold 0 and 1 only, got 255 "):
        hd95(mask, mask * 255)


@pytest.mark.parametrize("spacing", [(1,), (1, 1, 1), (0, 1), (1, -1), (1, math.nan), (math.inf, 1)])
def test_hd95_refuses_a_wrong_spacing(spacing: tuple[float, ...]) -> None:
    mask = one_pixel((3, 3), 1, 1)
    with pytest.raises(ValueError, match=r"^spacing must be one finite number above 0 for each of 2 axes, got \("):
        hd95(mask, mask, spacing)


# ------------------------------------------------------------------------------------------------- bootstrap


def patient_scores(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).random(size)


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize(("name", "statistic"), [("mean", statistics.fmean), ("median", statistics.median)])
def test_the_interval_is_the_quantiles_of_resampled_statistics(name: str, statistic: Callable, level: float) -> None:
    values, key = patient_scores(1, 7), Key(seed=3, stream=3)
    drawn = generator(key).integers(7, size=(201, 7))
    results = sorted(statistic([values[i] for i in row]) for row in drawn)
    # 201 results: quantile q is result 200 q, so that both ends are whole places for these levels.
    low, high = round(200 * (1 - level) / 2), round(200 * (1 + level) / 2)
    assert (low, high) == ((5, 195) if level == 0.95 else (50, 150))
    interval = bootstrap_interval(values, name, level, 201, key=key)
    assert interval == pytest.approx((results[low], results[high]), rel=1e-13)
    assert [type(end) for end in interval] == [float, float]


def test_the_defaults_are_the_mean_at_95_percent_of_10000() -> None:
    values, key = patient_scores(2, 9).tolist(), Key(seed=0)
    assert bootstrap_interval(values, key=key) == bootstrap_interval(values, "mean", 0.95, 10_000, key=key)
    assert bootstrap_interval(values, key=key) != bootstrap_interval(values, "mean", 0.95, 10_001, key=key)


def test_the_same_key_gives_the_same_interval_and_another_key_another() -> None:
    values = patient_scores(3, 18)
    assert bootstrap_interval(values, key=Key(seed=5)) == bootstrap_interval(values, key=Key(seed=5))
    assert bootstrap_interval(values, key=Key(seed=5)) != bootstrap_interval(values, key=Key(seed=6))


def test_the_interval_of_float32_values_is_computed_in_float64() -> None:
    values = patient_scores(9, 50).astype(np.float32)
    assert bootstrap_interval(values, key=Key(seed=0)) == bootstrap_interval(values.astype(float), key=Key(seed=0))


def test_the_reports_bootstrap_draws_from_a_stream_that_training_does_not_use() -> None:
    assert Key(seed=0, stream=BOOTSTRAP) == BOOTSTRAP_KEY
    assert BOOTSTRAP_KEY.stream not in (INITIALIZE, SAMPLE, AUGMENT)
    assert BOOTSTRAP_KEY.stream < DROPOUT


def test_the_interval_moves_and_stretches_with_the_values() -> None:
    values, key = patient_scores(4, 18), Key(seed=1)
    low, high = bootstrap_interval(values, key=key)
    assert values.min() < low < values.mean() < high < values.max()
    assert bootstrap_interval(3 * values + 2, key=key) == pytest.approx((3 * low + 2, 3 * high + 2), rel=1e-12)
    assert bootstrap_interval(-values, key=key) == pytest.approx((-high, -low), rel=1e-12)
    narrow = bootstrap_interval(values, level=0.5, key=key)
    assert low < narrow[0] < narrow[1] < high


def test_of_many_values_it_agrees_with_the_normal_theory() -> None:
    values = np.random.default_rng(5).normal(10, 2, size=1000)
    low, high = bootstrap_interval(values, resamples=4000, key=Key(seed=1))
    half = 1.959964 * values.std() / math.sqrt(1000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06 * half)


def test_it_covers_the_true_mean_about_as_often_as_it_says() -> None:
    samples = np.random.default_rng(6).normal(size=(300, 40))
    intervals = [bootstrap_interval(sample, resamples=400, key=Key(seed=i)) for i, sample in enumerate(samples)]
    covered = sum(low <= 0 <= high for low, high in intervals)
    assert 0.90 < covered / 300 < 0.98


def test_equal_values_have_no_spread_and_one_value_has_none_to_show() -> None:
    assert bootstrap_interval([0.5, 0.5, 0.5], key=Key(seed=0)) == (0.5, 0.5)
    assert same(bootstrap_interval([0.5], key=Key(seed=0)), (NAN, NAN))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, r"^values must be one number a patient, shape \(P,\), got shape \(0,\)$"),
        ({"values": [[1.0, 2.0]]}, r"^values must be one number a patient, shape \(P,\), got shape \(1, 2\)$"),
        ({"values": [1.0, NAN]}, r"^values must be finite, got NaN or infinity$"),
        ({"values": [1.0, math.inf]}, r"^values must be finite, got NaN or infinity$"),
        ({"statistic": "mode"}, r"^statistic must be 'mean' or 'median', got 'mode'$"),
        ({"level": 0}, r"^level must be between 0 and 1, got 0$"),
        ({"level": 1}, r"^level must be between 0 and 1, got 1$"),
        ({"level": NAN}, r"^level must be between 0 and 1, got nan$"),
        ({"resamples": 0}, r"^resamples must be at least 1, got 0$"),
    ],
)
def test_bootstrap_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**{"values": [1.0, 2.0], "key": Key(seed=0)} | arguments)


def test_one_resample_is_enough_to_run() -> None:
    low, high = bootstrap_interval([1.0, 2.0], resamples=1, key=Key(seed=0))
    assert low == high
    assert low in (1.0, 1.5, 2.0)


# ------------------------------------------------------------------------------------------------- soft metrics


def test_soft_metrics_by_hand() -> None:
    probabilities, target = np.array([0.5, 0.25, 0.0, 1.0]), np.array([1, 1, 0, 0], np.uint8)
    # sum(t p) = 0.75, sum p = 1.75, sum t = 2
    assert soft_dice(probabilities, target, smooth=2) == (2 * 0.75 + 2) / (3.75 + 2)
    assert soft_iou(probabilities, target, smooth=2) == (0.75 + 2) / (3.75 - 0.75 + 2)
    assert soft_dice(probabilities, target) == (2 * 0.75 + 100) / (3.75 + 100)
    assert soft_iou(probabilities, target) == (0.75 + 100) / (3.75 - 0.75 + 100)
    assert type(soft_dice(probabilities, target)) is type(soft_iou(probabilities, target)) is float


@given(st.tuples(SIDES, SIDES, SIDES, st.just(1)), SEEDS, st.sampled_from([1e-3, 1.0, 100.0]), st.booleans())
def test_soft_metrics_are_the_loops(shape: tuple[int, ...], seed: int, smooth: float, resized: bool) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.random(shape).astype(np.float32)
    target = rng.random(shape) if resized else rng.random(shape) < 0.5  # the reference's resized masks are not binary
    pairs = list(zip(probabilities.ravel().tolist(), target.ravel().tolist(), strict=True))
    overlap = math.fsum(p * t for p, t in pairs)
    total = math.fsum(p + t for p, t in pairs)
    assert soft_dice(probabilities, target, smooth) == pytest.approx(
        (2 * overlap + smooth) / (total + smooth), rel=1e-13
    )
    assert soft_iou(probabilities, target, smooth) == pytest.approx(
        (overlap + smooth) / (total - overlap + smooth), rel=1e-13
    )


@given(mask_pairs())
def test_of_hard_masks_with_little_smoothing_they_are_dice_and_iou(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert soft_dice(*pair, smooth=1e-12) == pytest.approx(dice(count(*pair)), abs=1e-11)
    assert soft_iou(*pair, smooth=1e-12) == pytest.approx(iou(count(*pair)), abs=1e-11)


def test_three_equal_channels_with_smooth_100_are_one_with_a_third_of_it() -> None:
    rng = np.random.default_rng(7)
    probabilities, target = rng.random((2, 5, 5, 1)), (rng.random((2, 5, 5, 1)) < 0.3).astype(np.uint8)
    three = np.repeat(probabilities, 3, axis=3), np.repeat(target, 3, axis=3)
    for metric in (soft_dice, soft_iou):
        assert metric(*three) == pytest.approx(metric(probabilities, target, smooth=100 / 3), rel=1e-14)


def test_sums_do_not_overflow_or_stall_in_the_dtype_of_the_arrays() -> None:
    ones = np.ones(70_000, np.float16)  # the largest float16 is 65504
    assert soft_dice(ones, ones.astype(np.uint8)) == 1
    assert soft_dice(ones, ones) == 1
    target = np.zeros(70_000, np.uint8)
    target[:300] = 1  # 300 is above the largest uint8
    assert soft_iou(ones, target) == 400 / 70_100


@pytest.mark.parametrize("metric", [soft_dice, soft_iou])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": np.zeros((2, 1))}, r"^probabilities and target must have the same shape, got \(2,\) and \(2, 1\)$"),
        (
            {"target": np.array([0, 255])},
            r"^target must lie in \[0, 1\], got values from 0 to 255 \(divide masks stored ",
        ),
        (
            {"probabilities": np.array([-0.5, 0.5])},
            r"^probabilities must lie in \[0, 1\], got values from -0.5 to 0.5 \(",
        ),
        (
            {"probabilities": np.array([0.5, 1.5])},
            r"^probabilities .* 0.5 to 1.5 \(divide .* by 255; apply the sigmoid",
        ),
        ({"probabilities": np.array([NAN, 0.5])}, r"^probabilities must be finite, got 1 NaN or infinite values of 2$"),
        ({"target": np.array([NAN, math.inf])}, r"^target must be finite, got 2 NaN or infinite values of 2$"),
        ({"smooth": 0}, r"^smooth must be a finite number above 0, got 0$"),
        ({"smooth": -1.5}, r"^smooth must be a finite number above 0, got -1.5$"),
        ({"smooth": NAN}, r"^smooth must be a finite number above 0, got nan$"),
        ({"smooth": math.inf}, r"^smooth must be a finite number above 0, got inf$"),
    ],
)
def test_soft_metrics_refuse(metric: Callable, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(**{"probabilities": np.array([0.5, 0.5]), "target": np.array([0, 1]), "smooth": 1.0} | arguments)


# ------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def to_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Puts an array on the strict stand-in for CuPy, which refuses to meet a NumPy array."""
    monkeypatch.setitem(sys.modules, "cupy", strict_cupy.module)
    return strict_cupy.module.asarray


@given(pair=mask_pairs())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_on_the_gpu_the_figures_are_the_same(pair: tuple[np.ndarray, np.ndarray], to_gpu: Callable) -> None:
    prediction, target = pair
    on_gpu = count(to_gpu(prediction), to_gpu(target.astype(np.uint8)), axis=(1, 2, 3))
    on_cpu = count(prediction, target, axis=(1, 2, 3))
    for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
        assert isinstance(gpu, strict_cupy.ndarray)
        assert same(gpu.get(), cpu)
    for score in SCORES:
        assert same(score(on_gpu).get(), score(on_cpu))
        assert same(score(pooled_counts(on_gpu)).get(), score(pooled_counts(on_cpu)))
    for rule in ("as_one", "left_out"):
        assert same(
            mean_over_slices(dice, on_gpu, empty_slices=rule), mean_over_slices(dice, on_cpu, empty_slices=rule)
        )
    names = ["a"] * len(target)
    assert same(per_patient_counts(on_gpu, names)[1], per_patient_counts(on_cpu, names)[1])
    probabilities = np.where(prediction, 0.75, 0.25).astype(np.float32)
    assert soft_dice(to_gpu(probabilities), to_gpu(target)) == soft_dice(probabilities, target)
    assert soft_iou(to_gpu(probabilities), to_gpu(target)) == soft_iou(probabilities, target)


def test_on_the_gpu_volumes_and_reports_come_to_the_host(to_gpu: Callable) -> None:
    probabilities, targets = small_case()
    assert evaluate_masks(to_gpu(probabilities), to_gpu(targets), PATIENTS) == evaluate_masks(*small_case(), PATIENTS)
    volume, truth = probabilities[:2, :, :, 0] > 0.5, targets[:2, :, :, 0]
    assert same(largest_component(to_gpu(volume)), largest_component(volume))
    assert hd95(to_gpu(volume), to_gpu(truth)) == hd95(volume, truth)


def test_on_the_gpu_the_errors_are_the_same(to_gpu: Callable) -> None:
    with pytest.raises(ValueError, match=r"^target must hold 0 and 1 only, got 255 "):
        count(to_gpu(np.zeros(2)), to_gpu(np.array([255, 255])))
    with pytest.raises(ValueError, match=r"^probabilities must be finite, got 1 NaN"):
        soft_dice(to_gpu(np.array([NAN, 0])), to_gpu(np.zeros(2)))
    with pytest.raises(ValueError, match=r"^target must lie in \[0, 1\], got values from 0 to 255 "):
        soft_iou(to_gpu(np.zeros(2)), to_gpu(np.array([0, 255])))


# ------------------------------------------------------------------------------------------------- the report

PATIENTS = ["b", "b", "a", "a", "c"]


def small_case() -> tuple[np.ndarray, np.ndarray]:
    """Five 4 x 4 slices of three patients, small enough to score by hand."""
    probabilities, targets = np.zeros((5, 4, 4, 1)), np.zeros((5, 4, 4, 1), np.uint8)
    targets[0, :2, :2] = 1  # b: four pixels,
    probabilities[0, 0, :2] = 0.75  # two of them found,
    probabilities[0, 3, 3] = 0.75  # and one false pixel, far away
    probabilities[1, 0, 0] = 0.5  # at the threshold is not above it: b's second slice is empty in both
    targets[2, 1, 1] = 1  # a: one pixel,
    probabilities[2, 1, 1:3] = 0.75  # found, with one false pixel beside it,
    probabilities[3, 1, 2] = 0.75  # and one below that
    targets[4, 2, 2:] = 1  # c: missed
    return probabilities, targets


# (tp, fp, fn, tn) of the slices: (2, 1, 2, 11), (0, 0, 0, 16), (1, 1, 0, 14), (0, 1, 0, 15), (0, 0, 2, 14)
HD95_B = 0.9 * math.sqrt(8)  # from the prediction: 0, 0, sqrt(8), 95th percentile at place 1.9
HD95_A = 1 + 0.9 * (math.sqrt(2) - 1)  # 0, 1, sqrt(2)


def interval(values: list[float], statistic: str, key: Key = BOOTSTRAP_KEY) -> list[float]:
    return list(bootstrap_interval(values, statistic, key=key))


def summary_of(values: list[float]) -> dict[str, Any]:
    return {
        "patients": len(values),
        "mean": pytest.approx(sum(values) / len(values), rel=1e-14),
        "mean_interval": pytest.approx(interval(values, "mean"), rel=1e-14),
        "median": pytest.approx(statistics.median(values), rel=1e-14),
        "median_interval": pytest.approx(interval(values, "median"), rel=1e-14),
    }


def test_the_report_by_hand() -> None:
    third = 100 / 3
    assert evaluate_masks(*small_case(), PATIENTS).to_dict() == {
        "slices": 5,
        "tumour_slices": 3,
        "patients": 3,
        "image_size": [4, 4],
        "threshold": 0.5,
        "slice_step": 1.0,
        "interval_level": 0.95,
        "pooled": {
            "dice": 6 / 13,
            "iou": 3 / 10,
            "precision": 3 / 6,
            "recall": 3 / 7,
            "specificity": 70 / 73,
            "accuracy": 73 / 80,
        },
        "per_slice": {
            "mean_dice_empty_as_one": pytest.approx((4 / 7 + 1 + 2 / 3 + 0 + 0) / 5, rel=1e-14),
            "mean_dice_tumour_slices": pytest.approx((4 / 7 + 2 / 3 + 0) / 3, rel=1e-14),
            "mean_iou_empty_as_one": pytest.approx((2 / 5 + 1 + 1 / 2 + 0 + 0) / 5, rel=1e-14),
            "mean_iou_tumour_slices": pytest.approx((2 / 5 + 1 / 2 + 0) / 3, rel=1e-14),
        },
        "per_patient": {
            "names": ["b", "a", "c"],
            "slices": [2, 2, 1],
            "dice": [4 / 7, 1 / 2, 0],
            "dice_largest_component": [2 / 3, 1 / 2, 0],  # b's far pixel goes; a's three are one component
            "iou": [2 / 5, 1 / 3, 0],
            "hd95_px": [pytest.approx(HD95_B, rel=1e-14), pytest.approx(HD95_A, rel=1e-14), None],
            "summary": {
                "dice": summary_of([4 / 7, 1 / 2, 0]),
                "dice_largest_component": summary_of([2 / 3, 1 / 2, 0]),
                "iou": summary_of([2 / 5, 1 / 3, 0]),
                "hd95_px": summary_of([HD95_B, HD95_A]),
            },
        },
        "reference": {  # sum(t p) = 2.25, sum p = 5, sum t = 7
            "soft_dice_pooled": pytest.approx((4.5 + third) / (12 + third), rel=1e-14),
            "soft_iou_pooled": pytest.approx((2.25 + third) / (9.75 + third), rel=1e-14),
            "smooth": third,
            "recall_pooled": 3 / 7,
            "accuracy_pooled": 73 / 80,
        },
    }


def test_the_definitions_of_dice_differ_on_the_same_predictions() -> None:
    scores = evaluate_masks(*small_case(), PATIENTS)
    figures = [
        scores.pooled.dice,
        scores.per_slice.mean_dice_empty_as_one,
        scores.per_slice.mean_dice_tumour_slices,
        scores.per_patient.summary.dice.mean,
        scores.per_patient.summary.dice_largest_component.mean,
        scores.reference.soft_dice_pooled,
    ]
    assert len({round(figure, 6) for figure in figures}) == len(figures)


def test_the_report_is_json_and_repeats() -> None:
    probabilities, targets = small_case()
    before = probabilities.copy(), targets.copy()
    scores = evaluate_masks(probabilities, targets, PATIENTS)
    assert json.loads(json.dumps(scores.to_dict(), allow_nan=False)) == scores.to_dict()
    assert evaluate_masks(probabilities.astype(np.float32), targets.astype(bool), PATIENTS) == scores
    assert np.array_equal(probabilities, before[0])
    assert np.array_equal(targets, before[1])


def test_the_report_holds_numbers_of_python_whatever_it_is_given() -> None:
    scores = evaluate_masks(*small_case(), PATIENTS, np.float32(0.5), slice_step=np.float32(2), reference_smooth=30)

    def types(value: Any) -> set[type]:
        if isinstance(value, dict):
            return set().union(*(types(part) for part in value.values()))
        return set().union(*(types(part) for part in value)) if isinstance(value, list) else {type(value)}

    assert types(scores.to_dict()) <= {int, float, str, type(None)}
    assert [type(scores.threshold), type(scores.slice_step)] == [float, float]
    assert type(scores.reference.smooth) is float


def test_the_threshold_moves_all_but_the_references_own() -> None:
    probabilities, targets = small_case()
    low, usual, high = (evaluate_masks(probabilities, targets, PATIENTS, threshold=t) for t in (0.25, 0.5, 0.75))
    assert low.threshold == 0.25
    assert low.pooled.precision == 3 / 7  # the pixel at 0.5 is now predicted
    assert high.pooled == Pooled(
        dice=0,
        iou=0,
        precision=None,
        recall=0,
        specificity=1,
        accuracy=73 / 80,  # nothing predicted: 7 of 80 pixels wrong, as many as the prediction had wrong
    )
    assert high.per_patient.hd95_px == [None, None, None]
    assert low.reference == usual.reference == high.reference


def test_the_other_arguments_reach_what_they_are_for() -> None:
    probabilities, targets = small_case()
    usual = evaluate_masks(probabilities, targets, PATIENTS)
    apart = evaluate_masks(probabilities, targets, PATIENTS, slice_step=2)
    assert apart.slice_step == 2
    assert apart.per_patient.hd95_px[:2] == pytest.approx([HD95_B, 1 + 0.9 * (math.sqrt(5) - 1)], rel=1e-14)
    smoother = evaluate_masks(probabilities, targets, PATIENTS, reference_smooth=100).reference
    assert smoother == replace(
        usual.reference, soft_dice_pooled=104.5 / 112, soft_iou_pooled=102.25 / 109.75, smooth=100
    )
    # Six patients of one slice, each with other probabilities: enough for the bootstrap's key to show.
    probabilities = (patient_scores(8, 6).reshape(6, 1, 1, 1) + np.linspace(-0.5, 0, 16).reshape(1, 4, 4, 1)).clip(0)
    targets = np.ones((6, 4, 4, 1), np.uint8)
    names = list("abcdef")
    default, other = (
        evaluate_masks(probabilities, targets, names, threshold=0.3, key=key).per_patient
        for key in (BOOTSTRAP_KEY, Key(seed=9))
    )
    assert default == evaluate_masks(probabilities, targets, names, threshold=0.3).per_patient
    for key, figures in ((BOOTSTRAP_KEY, default), (Key(seed=9), other)):
        assert figures.summary.dice.mean_interval == interval(figures.dice, "mean", key)
    assert default.summary.dice.mean_interval != other.summary.dice.mean_interval


def test_patients_may_be_interleaved() -> None:
    probabilities, targets = small_case()
    order = [2, 0, 4, 1, 3]  # a patient's own slices still ascend
    mixed = evaluate_masks(probabilities[order], targets[order], [PATIENTS[i] for i in order]).per_patient
    plain = evaluate_masks(probabilities, targets, PATIENTS).per_patient
    assert mixed.names == ["a", "b", "c"]
    for figure in ("slices", "dice", "iou", "hd95_px", "dice_largest_component"):
        assert dict(zip(mixed.names, getattr(mixed, figure), strict=True)) == dict(
            zip(plain.names, getattr(plain, figure), strict=True)
        )


def test_a_set_without_tumour_and_prediction_has_a_report() -> None:
    scores = evaluate_masks(np.zeros((2, 3, 3, 1), np.float32), np.zeros((2, 3, 3, 1), np.uint8), ["a", "a"])
    none = [None, None]
    assert scores.tumour_slices == 0
    assert scores.pooled == Pooled(dice=1, iou=1, precision=None, recall=None, specificity=1, accuracy=1)
    assert scores.per_slice == PerSlice(1, None, 1, None)
    # One patient: a score, but no interval.
    assert scores.per_patient.summary.dice == Summary(1, mean=1, mean_interval=none, median=1, median_interval=none)
    assert scores.per_patient.summary.hd95_px == Summary(0, None, none, None, none)
    assert scores.reference.soft_dice_pooled == scores.reference.soft_iou_pooled == 1
    assert scores.reference.recall_pooled is None
    json.dumps(scores.to_dict(), allow_nan=False)


@given(mask_pairs(largest=4), SEEDS)
def test_a_report_of_anything_is_json_and_prints(pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    rng = np.random.default_rng(seed)
    prediction, targets = (mask[..., :1] for mask in pair)
    probabilities = np.where(prediction, 0.75, 0.25).astype(np.float32)
    patients = rng.integers(3, size=len(targets)).astype(str).tolist()
    scores = evaluate_masks(probabilities, targets, patients)
    assert json.loads(json.dumps(scores.to_dict(), allow_nan=False)) == scores.to_dict()
    assert scores.pooled.dice == dice(count(prediction, targets))
    text = format_report(scores)
    assert "None" not in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"probabilities": np.zeros((2, 4, 4))},
            r"^probabilities and target must have the same shape, got \(2, 4, 4\) ",
        ),
        (
            {"probabilities": np.zeros((2, 4, 4)), "targets": np.zeros((2, 4, 4))},
            r"^probabilities and targets must have shape \(S, H, W, 1\), none 0, got \(2, 4, 4\)$",
        ),
        (
            {"probabilities": np.zeros((2, 4, 4, 3)), "targets": np.zeros((2, 4, 4, 3))},
            r"^probabilities and targets must have shape \(S, H, W, 1\), none 0, got \(2, 4, 4, 3\)$",
        ),
        (
            {"probabilities": np.zeros((0, 4, 4, 1)), "targets": np.zeros((0, 4, 4, 1)), "patients": []},
            r"^probabilities and targets must have shape \(S, H, W, 1\), none 0, got \(0, 4, 4, 1\)$",
        ),
        ({"patients": ["a"]}, r"^patients must name one patient a slice, got 1 names for 2 slices$"),
        ({"threshold": 0}, r"^threshold must be between 0 and 1, got 0$"),
        ({"threshold": 1}, r"^threshold must be between 0 and 1, got 1$"),
        ({"threshold": NAN}, r"^threshold must be between 0 and 1, got nan$"),
        ({"slice_step": 0}, r"^slice_step must be a finite number above 0, got 0$"),
        ({"slice_step": math.inf}, r"^slice_step must be a finite number above 0, got inf$"),
        ({"reference_smooth": 0}, r"^reference_smooth must be a finite number above 0, got 0$"),
        (
            {"probabilities": np.full((2, 4, 4, 1), NAN)},
            r"^probabilities must be finite, got 32 NaN or infinite values of 32$",
        ),
        (
            {"probabilities": np.full((2, 4, 4, 1), 3.5)},
            r"^probabilities must lie in \[0, 1\], got values from 3.5 to 3.5",
        ),
        ({"targets": np.full((2, 4, 4, 1), 255, np.uint8)}, r"^targets must hold 0 and 1 only, got 255 "),
    ],
)
def test_evaluate_refuses_before_it_works(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minunet.training.metrics.count", lambda *_, **__: pytest.fail("counting began"))
    good: dict[str, Any] = {
        "probabilities": np.zeros((2, 4, 4, 1)),
        "targets": np.zeros((2, 4, 4, 1), np.uint8),
        "patients": ["a", "b"],
    }
    with pytest.raises(ValueError, match=message):
        evaluate_masks(**good | arguments)


def test_the_printed_report() -> None:
    expected = """\
Slices: 5, 3 with tumour. Patients: 3. Pixels: 4 x 4. Tumour is predicted where its probability is above 0.5.

Per patient, in 3-D                         mean  95 % interval     median  95 % interval
  Dice                                     0.357  0.000 to 0.571     0.500  0.000 to 0.571
  Dice, largest component only             0.389  0.000 to 0.667     0.500  0.000 to 0.667
  IoU                                      0.244  0.000 to 0.400     0.333  0.000 to 0.400
  HD95 in pixels (2 of 3 patients)           2.0  1.4 to 2.5           2.0  1.4 to 2.5

The same predictions, other definitions     Dice     IoU
  pooled over all pixels                   0.462   0.300
  mean over slices, empty counted as 1     0.448   0.380
  mean over slices with tumour             0.413   0.300
  reference: soft, pooled, smooth 33.33    0.835   0.826

Pooled over all pixels                    precision     recall  specificity   accuracy
  predictions                                 0.500      0.429       0.9589     0.9125
  reference: threshold 0.5                               0.429                  0.9125"""
    assert format_report(evaluate_masks(*small_case(), PATIENTS)) == expected


def test_the_printed_report_says_what_is_missing() -> None:
    scores = evaluate_masks(np.zeros((2, 3, 5, 1)), np.zeros((2, 3, 5, 1)), ["a", "a"], threshold=0.25)
    expected = """\
Slices: 2, 0 with tumour. Patients: 1. Pixels: 3 x 5. Tumour is predicted where its probability is above 0.25.

Per patient, in 3-D                         mean  95 % interval     median  95 % interval
  Dice                                     1.000  n/a                1.000  n/a
  Dice, largest component only             1.000  n/a                1.000  n/a
  IoU                                      1.000  n/a                1.000  n/a
  HD95 in pixels (0 of 1 patients)           n/a  n/a                  n/a  n/a

The same predictions, other definitions     Dice     IoU
  pooled over all pixels                   1.000   1.000
  mean over slices, empty counted as 1     1.000   1.000
  mean over slices with tumour               n/a     n/a
  reference: soft, pooled, smooth 33.33    1.000   1.000

Pooled over all pixels                    precision     recall  specificity   accuracy
  predictions                                   n/a        n/a       1.0000     1.0000
  reference: threshold 0.5                                 n/a                  1.0000"""
    assert format_report(scores) == expected
