"""From a set of slices to batches: the order of an epoch, the preparation, the thread that works ahead."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.base.rng import Key
from minunet.data.augment import PRESETS, augment
from minunet.data.batches import cropped, epoch_order, prefetch, prepare_batch
from minunet.data.normalize import Normalization, apply
from minunet.data.slices import IGNORE, SliceSet


def make_slices(areas_by_patient, size=8, seed=0):
    """Random slices; each patient is a list of tumour areas, one a slice."""
    generator = np.random.default_rng(seed)
    owners = [f"p{p}" for p, areas in enumerate(areas_by_patient) for _ in areas]
    areas = [area for areas in areas_by_patient for area in areas]
    masks = np.zeros((len(areas), size * size), np.uint8)
    for mask, area in zip(masks, areas, strict=True):
        mask[:area] = 1
    return SliceSet(
        images=generator.integers(0, 256, (len(areas), size, size, 3), dtype=np.uint8),
        masks=masks.reshape(-1, size, size, 1),
        patients=tuple(owners),
        numbers=tuple(range(1, len(areas) + 1)),
        files=tuple(f"{owner}_{n}.tif" for n, owner in enumerate(owners, start=1)),
    )


SLICES = make_slices([[0, 10, 30], [0, 0], [5] * 10])


@given(count=st.integers(1, 40), epoch=st.integers(0, 5))
def test_shuffle_takes_each_slice_once_before_any_again(count, epoch):
    order = epoch_order(SLICES, "shuffle", count, Key(3, epoch=epoch))
    assert len(order) == count
    for start in range(0, count, len(SLICES)):
        one_pass = order[start : start + len(SLICES)]
        assert len(set(one_pass)) == len(one_pass)


def test_an_epoch_has_its_own_order_and_always_the_same():
    orders = [tuple(epoch_order(SLICES, "shuffle", None, Key(0, epoch=epoch))) for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == list(range(15))
    assert orders[0] == orders[2] != orders[1]


def test_tumour_sampling_has_the_stated_probabilities():
    draws = 200_000
    order = epoch_order(SLICES, "tumour", draws, Key(0))
    found = np.bincount(order, minlength=15) / draws
    # Patient 0: areas 0, 10, 30 and a floor of half their mean 13.33; patient 1 has no tumour; patient 2 is even.
    floor = 0.5 * 40 / 3
    first = np.array([floor, 10 + floor, 30 + floor]) / (40 + 3 * floor)
    expected = np.concatenate([first, [0.5, 0.5], [0.1] * 10]) / 3
    assert (np.abs(found - expected) < 5 * np.sqrt(expected / draws)).all()


def test_no_other_sampling_is_taken_for_one():
    with pytest.raises(AssertionError, match="random"):  # TrainingConfig refuses it in words
        epoch_order(SLICES, "random", None, Key(0))


@pytest.mark.parametrize("kind", ["volume", "scale"])
def test_a_batch_is_normalised_by_its_patients(kind):
    statistics = Normalization(kind).statistics(SLICES)
    indices = np.array([12, 0, 4])
    batch = prepare_batch(SLICES, statistics, indices, "cpu")
    for n, (index, patient) in enumerate(zip(indices, [2, 0, 1], strict=True)):
        image = SLICES.images[index : index + 1]
        np.testing.assert_array_equal(batch.x[n : n + 1], apply(image, statistics.take(np.array([patient]))))
    np.testing.assert_array_equal(batch.target, SLICES.masks[indices])
    assert batch.x.dtype == batch.target.dtype == np.float32
    assert batch.files == tuple(SLICES.files[i] for i in indices)


def test_a_batch_is_augmented_by_the_key_of_its_step():
    statistics = Normalization("volume").statistics(SLICES)
    indices, key = np.array([1, 2]), Key(0, epoch=1, step=2)
    plain = prepare_batch(SLICES, statistics, indices, "cpu")
    batch = prepare_batch(SLICES, statistics, indices, "cpu", augmentation=PRESETS["mild"], key=key)
    x, target = augment(plain.x, plain.target, PRESETS["mild"], key)
    np.testing.assert_array_equal(batch.x, x)
    np.testing.assert_array_equal(batch.target, target)
    with pytest.raises(ValueError, match="key"):
        prepare_batch(SLICES, statistics, indices, "cpu", augmentation=PRESETS["mild"])


# --- Crops ----------------------------------------------------------------------------------------------------------


def numbered(sizes, height, width):
    """Slices of these sizes in arrays of height x width, each pixel with its own number; the padding is 255."""
    images, masks = (
        np.full((len(sizes), height, width, 1), 255, np.uint8),
        np.zeros((len(sizes), height, width, 1), "u1"),
    )
    for n, (rows, columns) in enumerate(sizes):
        images[n, :rows, :columns, 0] = np.arange(rows * columns).reshape(rows, columns)
        masks[n, :rows, :columns] = images[n, :rows, :columns] % 2
    names = tuple(map(str, range(len(sizes))))
    return SliceSet(images, masks, names, tuple(range(len(sizes))), names, extents=np.array(sizes))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    crop=st.integers(1, 10),
    step=st.integers(0, 99),
)
def test_a_crop_is_a_square_of_the_image_and_of_its_mask(sizes, crop, step):
    slices, indices = numbered(sizes, 9, 9), np.arange(len(sizes))[::-1]
    images, masks = cropped(slices, indices, crop, Key(3, step=step))
    assert images.shape == masks.shape == (len(sizes), crop, crop, 1)
    for image, mask, index in zip(images[..., 0].astype(int), masks[..., 0], indices, strict=True):
        height, width = sizes[index]
        rows, columns = min(crop, height), min(crop, width)
        inside = image[:rows, :columns]
        top, left = divmod(inside[0, 0], width)
        assert top + rows <= height
        assert left + columns <= width
        assert np.array_equal(inside, np.arange(height * width).reshape(height, width)[top:, left:][:rows, :columns])
        assert np.array_equal(mask[:rows, :columns], inside % 2)
        assert not mask[rows:].any()
        assert not mask[:, columns:].any()
        assert np.array_equal(image, np.pad(inside, ((0, crop - rows), (0, crop - columns)), mode="edge"))


def test_crops_are_drawn_evenly_and_by_the_key_of_the_step():
    slices = numbered([(4, 3)], 4, 3)

    def corner(step, image=0):
        return int(cropped(slices, np.array([0]), 2, Key(0, step=step, image=image))[0][0, 0, 0, 0])

    corners = [corner(step) for step in range(3000)]
    assert [corner(step) for step in range(50)] == corners[:50]
    assert [corner(step, image=1) for step in range(50)] != corners[:50]
    found = np.bincount(corners, minlength=12)
    assert np.flatnonzero(found).tolist() == [0, 1, 3, 4, 6, 7]
    assert (np.abs(found[found > 0] - 500) < 5 * np.sqrt(500)).all()


def test_a_batch_of_crops_is_normalised_by_the_whole_and_augmented_as_a_crop():
    slices, key = make_slices([[10] * 3, [20] * 2], size=16), Key(0, epoch=1, step=2)
    statistics, indices = Normalization().statistics(slices), np.array([4, 0, 2])
    batch = prepare_batch(slices, statistics, indices, "cpu", crop=8, augmentation=PRESETS["strong"], key=key)
    images, masks = cropped(slices, indices, 8, key)
    x = apply(images, statistics.take(slices.patient_indices()[indices]))
    x, target = augment(x, masks.astype("float32"), PRESETS["strong"], key)
    np.testing.assert_array_equal(batch.x, x)
    np.testing.assert_array_equal(batch.target, target)
    with pytest.raises(ValueError, match="^key must be given with a crop"):
        prepare_batch(slices, statistics, indices, "cpu", crop=8)


# --- The thread that works ahead ------------------------------------------------------------------------------------


@given(count=st.integers(0, 10), ahead=st.integers(0, 4))
def test_prefetch_keeps_the_order(count, ahead):
    assert list(prefetch(lambda n: n + 1, range(count), ahead)) == list(range(1, count + 1))


def test_prefetch_works_in_another_thread_ahead_of_the_consumer():
    started = []
    results = prefetch(lambda n: (started.append(n), threading.current_thread())[1], range(10), ahead=2)
    assert next(results) is not threading.main_thread()
    results.close()
    assert started == sorted(started)
    assert len(started) <= 4  # the one that was asked for, two ahead, one being submitted


def test_prefetch_with_nothing_ahead_works_in_the_consumers_thread_when_it_is_asked():
    started = []
    results = prefetch(lambda n: (started.append(n), threading.current_thread())[1], range(3), ahead=0)
    assert [next(results), next(results)] == [threading.current_thread()] * 2
    assert started == [0, 1]


def test_prefetch_raises_where_the_result_would_have_been():
    results = prefetch(lambda n: 1 // (2 - n), range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


# --- Several targets ------------------------------------------------------------------------------------------------


def class_slices(classes=("background", "a", "b"), size=8, count=3):
    """Random slices with masks of classes, and pixels to be ignored."""
    generator = np.random.default_rng(1)
    values = np.array([*range(len(classes)), IGNORE], np.uint8)
    numbers = tuple(range(count))
    return SliceSet(
        images=generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
        masks=generator.choice(values, (count, size, size, 1)),
        patients=("p",) * count,
        numbers=numbers,
        files=("",) * count,
        classes=classes,
    )


def one_hot(masks, classes):
    """The target, pixel by pixel."""
    target = np.zeros((*masks.shape[:3], classes), np.float32)
    for place in np.ndindex(masks.shape[:3]):
        if masks[place][0] != IGNORE:
            target[place][masks[place][0]] = 1
    return target


def test_the_target_of_classes_is_one_hot_and_zero_where_ignored():
    slices = class_slices()
    batch = prepare_batch(slices, Normalization("volume").statistics(slices), np.array([2, 0]), "cpu")
    np.testing.assert_array_equal(batch.target, one_hot(slices.masks[[2, 0]], 3))
    assert batch.target.dtype == np.float32


@pytest.mark.parametrize("crop", [None, 6, 12])
def test_classes_are_moved_as_a_mask_of_each_would_be(crop):
    """By nearest neighbour: no new class comes out of two others, and what was ignored stays so."""
    slices = class_slices()
    statistics = Normalization("volume").statistics(slices)
    options = {"crop": crop, "augmentation": PRESETS["reference"], "key": Key(4)}
    batch = prepare_batch(slices, statistics, np.array([0, 1, 2]), "cpu", **options)
    outside = np.zeros(batch.target.shape[:3], bool)
    for k in range(3):
        alone = replace(slices, masks=(slices.masks == k).astype(np.uint8), classes=())
        moved = prepare_batch(alone, statistics, np.array([0, 1, 2]), "cpu", **options)
        np.testing.assert_array_equal(moved.x, batch.x)
        np.testing.assert_array_equal(moved.target[..., 0], batch.target[..., k])
        outside |= batch.target[..., k] > 0
    if crop == 12:  # nobody has drawn anything beyond the image
        assert (~outside).mean() > 0.5


def test_a_crop_pads_masks_of_classes_with_pixels_to_be_ignored():
    slices = class_slices(size=4)
    _, masks = cropped(slices, np.array([1]), 6, Key(0))
    np.testing.assert_array_equal(masks[0, :4, :4], slices.masks[1])
    masks[0, :4, :4] = IGNORE
    assert (masks == IGNORE).all()


def test_overlapping_masks_are_a_target_of_as_many_channels():
    masks = np.random.default_rng(0).integers(0, 2, (15, 8, 8, 2), dtype=np.uint8)
    slices = replace(SLICES, masks=masks)
    statistics = Normalization("volume").statistics(slices)
    options = {"crop": 6, "augmentation": PRESETS["reference"], "key": Key(4)}
    batch = prepare_batch(slices, statistics, np.array([3, 4]), "cpu", **options)
    for k in range(2):
        alone = prepare_batch(
            replace(slices, masks=masks[..., k : k + 1]), statistics, np.array([3, 4]), "cpu", **options
        )
        np.testing.assert_array_equal(alone.target[..., 0], batch.target[..., k])


def test_tumour_sampling_counts_each_target_alike():
    """Of 30 and of 3 pixels: a slice with a third of the one is as likely as one with a third of the other."""
    shape = (6, 8, 8, 2)
    masks = np.zeros(shape, np.uint8)
    for place in range(3):
        masks[place, :2, :5, 0] = 1
        masks[3 + place, 7, 7, 1] = 1
    slices = replace(SLICES.subset(range(6)), masks=masks, patients=("p",) * 6, numbers=tuple(range(6)))
    assert slices.areas().tolist() == [[10, 0]] * 3 + [[0, 1]] * 3
    draws = 60_000
    found = np.bincount(epoch_order(slices, "tumour", draws, Key(0)), minlength=6) / draws
    assert (np.abs(found - 1 / 6) < 5 * np.sqrt(5 / 36 / draws)).all()


def test_tumour_sampling_of_a_class_is_that_of_a_mask():
    binary = make_slices([[0, 10, 30], [0, 0], [5] * 10])
    ignored = binary.masks.copy()
    ignored[1, -1, -1] = IGNORE
    classes = replace(binary, masks=ignored, classes=("background", "a"))
    np.testing.assert_array_equal(
        epoch_order(classes, "tumour", 100, Key(0)), epoch_order(binary, "tumour", 100, Key(0))
    )
