"""Scores of several targets: each as if it were the only one, and their mean."""

import json
from dataclasses import replace

import numpy as np
import pytest

from minunet.data.slices import IGNORE, SliceSet, Words
from minunet.training import metrics

CLASSES = ("background", "road", "car")
PATIENTS = ("a", "a", "b", "b", "b")


def slice_set(masks, classes=(), **options):
    masks = np.asarray(masks, np.uint8)
    images = np.zeros((*masks.shape[:3], 1), np.uint8)
    count = len(masks)
    return SliceSet(images, masks, PATIENTS[:count], tuple(range(count)), ("",) * count, classes=classes, **options)


def case(seed=0, channels=3, size=(6, 5)):
    """Probabilities of the classes, and masks with pixels to be ignored."""
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.ones(channels), (5, *size)).astype(np.float32)
    masks = random.choice(np.array([0, 1, 2, IGNORE], np.uint8), (5, *size, 1))
    return probabilities, slice_set(masks, CLASSES)


def by_hand(probabilities, masks, k):
    """TP, FP and FN of a class, pixel by pixel, and how many pixels count."""
    tp = fp = fn = counted = 0
    for place in np.ndindex(masks.shape[:3]):
        if masks[place][0] == IGNORE:
            continue
        found = max(range(probabilities.shape[3]), key=lambda c: probabilities[place][c]) == k
        actual = masks[place][0] == k
        tp, fp, fn, counted = (
            tp + (found and actual),
            fp + (found and not actual),
            fn + (actual and not found),
            counted + 1,
        )
    return tp, fp, fn, counted


def test_each_class_is_scored_against_the_rest_and_ignored_pixels_count_nowhere():
    probabilities, slices = case()
    scores = metrics.evaluate_slices(probabilities, slices)
    assert list(scores) == ["road", "car"]
    for k, found in enumerate(scores.values(), start=1):
        tp, fp, fn, counted = by_hand(probabilities, slices.masks, k)
        assert found.pooled.dice == pytest.approx(2 * tp / (2 * tp + fp + fn), rel=1e-12)
        assert found.pooled.iou == pytest.approx(tp / (tp + fp + fn), rel=1e-12)
        assert found.pooled.accuracy == pytest.approx((counted - fp - fn) / counted, rel=1e-12)
        assert found.pooled.specificity == pytest.approx(1 - fp / (counted - tp - fn), rel=1e-12)
        for place, rows in enumerate((slice(0, 2), slice(2, 5))):
            tp, fp, fn, _ = by_hand(probabilities[rows], slices.masks[rows], k)
            assert found.per_patient.dice[place] == pytest.approx(2 * tp / (2 * tp + fp + fn), rel=1e-12)


def test_what_is_predicted_where_a_pixel_is_ignored_changes_nothing():
    probabilities, slices = case()
    other = probabilities.copy()
    other[slices.masks[..., 0] == IGNORE] = np.eye(3, dtype=np.float32)[2]
    assert metrics.evaluate_slices(other, slices) == metrics.evaluate_slices(probabilities, slices)


def test_two_classes_are_scored_as_one_mask_is():
    """With 0.5 as the threshold, whose soft metrics are then of the mask."""
    probabilities, slices = case(channels=2)
    masks = (slices.masks == 1).astype(np.uint8)
    (found,) = metrics.evaluate_slices(probabilities, slice_set(masks, ("background", "road"))).values()
    expected = metrics.evaluate_masks(probabilities[..., 1:], masks, PATIENTS)
    assert replace(found, reference=expected.reference) == expected


def test_masks_that_overlap_are_scored_channel_by_channel():
    random = np.random.default_rng(1)
    probabilities = random.random((5, 6, 5, 2), dtype=np.float32)
    masks = random.integers(0, 2, (5, 6, 5, 2), dtype=np.uint8)
    extents = np.array([[6, 5], [4, 5], [6, 5], [6, 3], [6, 5]])
    for index, (height, width) in enumerate(extents):
        for array in (probabilities, masks):
            array[index, height:] = 0
            array[index, :, width:] = 0
    slices = slice_set(masks, words=Words(targets=("road", "car")), extents=extents)
    scores = metrics.evaluate_slices(probabilities, slices)
    for k, name in enumerate(("road", "car")):
        alone = metrics.evaluate_masks(probabilities[..., [k]], masks[..., [k]], PATIENTS, extents=extents)
        assert scores[name] == alone


def test_the_mean_counts_each_target_alike():
    scores = metrics.evaluate_slices(*case())
    mean, each = metrics.mean_scores(scores), list(scores.values())
    assert mean.dice_pooled == pytest.approx(sum(s.pooled.dice for s in each) / 2)
    assert mean.iou_pooled == pytest.approx(sum(s.pooled.iou for s in each) / 2)
    assert mean.names == ["a", "b"]
    expected = [sum(s.per_patient.dice[p] for s in each) / 2 for p in range(2)]
    assert mean.dice == pytest.approx(expected)
    assert mean.summary.mean == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize("exclusive", [True, False])
def test_what_is_stored_and_printed(exclusive):
    probabilities, slices = case()
    if not exclusive:
        slices = slice_set(slices.marked(np.arange(5)), words=Words(targets=("road", "car")))
        probabilities = probabilities[..., 1:]
    scores = metrics.evaluate_slices(probabilities, slices)
    stored = json.loads(json.dumps(metrics.scores_to_dict(scores, exclusive)))
    assert list(stored) == ["mean", "classes"]
    assert list(stored["classes"]) == ["road", "car"]
    for field in ("threshold", "reference"):  # no threshold has made a mask of classes
        assert (field in stored["classes"]["car"]) is not exclusive
    assert stored["classes"]["car"]["pooled"]["dice"] == scores["car"].pooled.dice
    lines = metrics.format_targets(scores, exclusive, Words()).splitlines()
    assert lines[0].startswith("Images: 5. Groups: 2. Pixels: 6 x 5. ")
    assert ("most probable class" in lines[0]) is exclusive
    assert lines[2].split("  ")[0] == "Dice per group, pooled"
    car = scores["car"].per_patient.summary.dice
    cells = [
        f"{car.mean:.3f}",
        f"{car.median:.3f}",
        f"{scores['car'].pooled.dice:.3f}",
        f"{scores['car'].pooled.iou:.3f}",
    ]
    low, high = car.mean_interval
    words = lines[4].split()
    assert words[:5] == ["car", cells[0], f"{low:.3f}", "to", f"{high:.3f}"]
    assert [words[5], *words[-2:]] == cells[1:]
    assert lines[5].split()[0] == "mean"
    assert len(lines) == 6
    assert max(map(len, lines[2:])) <= 120
