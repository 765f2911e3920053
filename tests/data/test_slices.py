"""SliceSet: what it refuses, and what a subset is."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.data import slices as slices_module
from minunet.data.slices import IGNORE, LGG, SliceSet, Words


def slice_set(**changes):
    """Five slices of two patients, with values that differ everywhere."""
    random = np.random.default_rng(0)
    fields = {
        "images": random.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8),
        "masks": random.integers(0, 2, (5, 4, 6, 1), dtype=np.uint8),
        "patients": ("anna", "anna", "anna", "ben", "ben"),
        "numbers": (2, 9, 10, 1, 2),
        "files": ("a2", "a9", "a10", "b1", "b2"),
        "skipped": ("c",),
    }
    return SliceSet(**(fields | changes))


def test_names_and_indices_of_patients():
    slices = slice_set()
    assert len(slices) == 5
    assert slices.patient_names() == ("anna", "ben")
    assert slices.patient_indices().tolist() == [0, 0, 0, 1, 1]
    assert slices.patient_indices() is slices.patient_indices()
    assert not slices.patient_indices().flags.writeable


def test_subset_takes_every_field_and_shares_no_memory():
    slices = slice_set()
    part = slices.subset([1, 2, 4])
    np.testing.assert_array_equal(part.images, slices.images[[1, 2, 4]])
    np.testing.assert_array_equal(part.masks, slices.masks[[1, 2, 4]])
    assert part.patients == ("anna", "anna", "ben")
    assert part.numbers == (9, 10, 2)
    assert part.files == ("a9", "a10", "b2")
    assert part.skipped == ("c",)
    assert not np.shares_memory(part.images, slices.images)


@pytest.mark.parametrize(
    "parts",
    [
        ([0, 1, 2, 3, 4],),
        ([3, 4], [0, 1, 2]),
        ([1, 3], [0, 4], [2]),
        ([4], [], [0, 1, 2, 3]),
        ([2], [1], [0], [4], [3]),
    ],
    ids=repr,
)
def test_a_split_has_the_subsets_in_the_memory_of_the_whole(parts):
    slices, expected = slice_set(), [slice_set().subset(part) for part in parts]
    found = slices.split([np.array(part, int) for part in parts])
    for part, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(part.images, other.images)
        np.testing.assert_array_equal(part.masks, other.masks)
        for field in ("patients", "numbers", "files", "skipped"):
            assert getattr(part, field) == getattr(other, field)
        assert part.images.flags.c_contiguous
        assert part.images.base is slices.images
        assert part.masks.base is slices.masks


@pytest.mark.parametrize(
    "parts", [([0, 1, 2],), ([0, 1, 2], [2, 3, 4]), ([1, 0], [2, 3, 4]), ([0, 1, 2, 3, 5],), ([-1, 0, 1, 2, 3],)]
)
def test_a_split_that_is_none_is_refused_and_changes_nothing(parts):
    slices = slice_set()
    with pytest.raises(ValueError, match="parts must hold the index of each slice once"):
        slices.split([np.array(part) for part in parts])
    np.testing.assert_array_equal(slices.images, slice_set().images)
    np.testing.assert_array_equal(slices.masks, slice_set().masks)


@given(st.integers(0, 40).flatmap(lambda count: st.permutations(range(count))))
def test_rows_are_put_in_order_in_place(order):
    values = np.random.default_rng(len(order)).normal(size=(len(order), 2))
    expected = values[np.array(order, int)]
    slices_module._reorder(values, np.array(order, int))
    np.testing.assert_array_equal(values, expected)


def test_unlabelled_images_are_one_volume_without_tumour():
    images = slice_set().images
    volume = SliceSet.unlabelled(images)
    assert volume.images is images
    assert volume.masks.shape == (5, 4, 6, 1)
    assert not volume.masks.any()
    assert len(volume.patient_names()) == 1
    with pytest.raises(ValueError, match="images must be uint8"):
        SliceSet.unlabelled(images[0])


def test_an_empty_subset_is_a_slice_set():
    part = slice_set().subset([])
    assert len(part) == 0
    assert part.patient_names() == ()


@pytest.mark.parametrize("indices", [[1, 0], [1, 1], [-1, 0], [0, 5], [[0, 1]]])
def test_subset_refuses_indices_that_do_not_ascend_within_range(indices):
    with pytest.raises(ValueError, match="indices must be"):
        slice_set().subset(indices)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels_of_8_or_16_bits(dtype, channels):
    images = np.zeros((5, 4, 6, channels), dtype)
    assert slice_set(images=images).subset([0, 2]).images.shape == (2, 4, 6, channels)


def test_the_extents_go_where_their_images_go():
    extents = np.array([[4, 6], [1, 2], [2, 3], [3, 4], [4, 5]])
    slices = slice_set(extents=extents)
    assert slices.extent(1) == (slice(0, 1), slice(0, 2))
    assert slice_set().extent(1) == (slice(0, 4), slice(0, 6))
    assert slices.subset([1, 3]).extents.tolist() == [[1, 2], [3, 4]]
    parts = slices.split([np.array([1, 4]), np.array([0, 2, 3])])
    assert [part.extents.tolist() for part in parts] == [[[1, 2], [4, 5]], [[4, 6], [2, 3], [3, 4]]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((5, 4, 6, 3), np.float64)}, "images must be uint8, uint16 or float32"),
        ({"images": np.full((5, 4, 6, 3), np.nan, np.float32)}, "images must be finite, got NaN or .* values in 'a2'"),
        ({"images": np.zeros((5, 4, 6, 0), np.uint8)}, "images must be uint8"),
        ({"extents": np.ones((4, 2), int)}, r"extents must be \(S, 2\)"),
        ({"extents": np.zeros((5, 2), int)}, r"extents must be \(S, 2\)"),
        ({"extents": np.full((5, 2), 5)}, r"extents must be \(S, 2\), each within \[1, H\]"),
        ({"images": np.zeros((4, 6, 3), np.uint8)}, "images must be uint8"),
        ({"masks": np.zeros((5, 4, 6, 1), bool)}, "masks must be uint8"),
        ({"masks": np.zeros((5, 6, 4, 1), np.uint8)}, "masks must be uint8"),
        ({"masks": np.full((5, 4, 6, 1), 255, np.uint8)}, "masks must hold 0 and 1 only, got 255"),
        ({"patients": ("anna",) * 4}, "patients must have one entry a slice, 5, got 4"),
        ({"numbers": (1, 2)}, "numbers must have one entry a slice"),
        ({"files": ()}, "files must have one entry a slice"),
        ({"numbers": (2, 10, 9, 1, 2)}, "numbers must ascend within a patient, got 9 after 10 in 'anna'"),
        ({"numbers": (2, 9, 9, 1, 2)}, "numbers must ascend"),
        (
            {"patients": ("anna", "anna", "ben", "anna", "ben")},
            "patients must be contiguous, got 'anna' again at slice 3",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        slice_set(**changes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_by_its_image(value):
    images = np.ones((5, 4, 6, 3), np.float32)
    assert slice_set(images=images).subset([3]).images.dtype == np.float32
    images[3, 1, 2, 0] = value
    with pytest.raises(ValueError, match="images must be finite, got NaN or infinite values in 'b1'"):
        slice_set(images=images)
    with pytest.raises(ValueError, match="images must be finite, got NaN or infinite values in 'image 3'"):
        SliceSet.from_arrays(images.astype("float64"), images[..., 0] > 2)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64", "float16", "int16", "int64", "bool"])
@pytest.mark.parametrize("channels", [None, 1, 5])
def test_slices_from_arrays_of_any_real_dtype_and_number_of_channels(dtype, channels):
    shape = (3, 4, 6) if channels is None else (3, 4, 6, channels)
    images = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    for masks in (images > 50, (images > 50).astype("int64"), (images > 50).astype("uint8")):
        mask = masks if channels is None else masks[..., 0]
        slices = SliceSet.from_arrays(images, mask)
        kept = dtype in ("uint8", "uint16", "float32")
        assert slices.images.dtype == (dtype if kept else "float32")
        np.testing.assert_array_equal(slices.images.reshape(shape), images.astype("float32"))
        assert np.shares_memory(slices.images, images) == kept
        assert slices.masks.dtype == np.uint8
        np.testing.assert_array_equal(slices.masks[..., 0], mask)
        np.testing.assert_array_equal(SliceSet.from_arrays(images, mask[..., None]).masks, slices.masks)
    assert slices.patient_names() == ("0", "1", "2")
    assert slices.files == ("image 0", "image 1", "image 2")


def test_groups_of_arrays_are_volumes():
    images = np.zeros((4, 4, 4), np.uint8)
    slices = SliceSet.from_arrays(images, images, ["ben", "ben", "anna", "anna"])
    assert slices.patients == ("ben", "ben", "anna", "anna")
    assert SliceSet.from_arrays(images, images, np.array([7, 7, 7, 1])).patient_names() == ("7", "1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((3, 4, 4), complex)}, "images must be real numbers, got complex128"),
        ({"images": np.array(["a"])}, "images must be real numbers"),
        ({"images": np.full((3, 4, 4), 1e300)}, "images must be finite, got NaN or infinite values in 'image 0'"),
        ({"images": np.zeros((4, 4))}, r"channels last; got masks \(3, 4, 4, 1\) and images \(4, 4\)"),
        (
            {"images": np.zeros((3, 4, 4, 0))},
            r"images must be uint8, uint16 or float32 \(S, H, W, C\), got float32 \(3",
        ),
        ({"masks": np.zeros((3, 4, 4))}, "masks must be bool or integers 0 and 1, got float64"),
        ({"masks": np.full((3, 4, 4), 255)}, "masks must hold 0 and 1 only, got 255 to 255; give masks > 0"),
        ({"masks": np.full((3, 4, 4), 256)}, "masks must hold 0 and 1 only"),
        ({"masks": np.full((3, 4, 4), -255)}, "masks must hold 0 and 1 only"),
        ({"masks": np.zeros((3, 4, 5), bool)}, r"got masks \(3, 4, 5, 1\) and images \(3, 4, 4, 1\)"),
        ({"images": np.zeros((3, 2, 4, 4))}, r"channels last; got masks \(3, 4, 4, 1\) and images \(3, 2, 4, 4\)"),
        ({"groups": ["a", "b"]}, "patients must have one entry a slice, 3, got 2"),
        ({"groups": ["a", "b", "a"]}, "patients must be contiguous, got 'a' again"),
    ],
)
def test_arrays_that_are_no_images_and_masks_are_refused(changes, message):
    fields = {"images": np.zeros((3, 4, 4)), "masks": np.zeros((3, 4, 4), bool), **changes}
    with pytest.raises(ValueError, match=message):
        SliceSet.from_arrays(**fields)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "int16"])
def test_arrays_of_several_targets(dtype):
    images = np.zeros((3, 4, 4), np.uint8)
    classes = np.random.default_rng(0).choice(np.array([0, 1, 2, IGNORE], dtype), (3, 4, 4))
    slices = SliceSet.from_arrays(images, classes, classes=["sky", "road", "car"])
    np.testing.assert_array_equal(slices.masks[..., 0], classes)
    assert slices.classes == ("sky", "road", "car")
    masks = np.random.default_rng(0).integers(0, 2, (3, 4, 4, 2)).astype(dtype)
    slices = SliceSet.from_arrays(images, masks, targets=["road", "car"])
    np.testing.assert_array_equal(slices.masks, masks)
    assert slices.target_names() == ("road", "car")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "or 255 to ignore, got -1 to 0"),
        (256, "or 255 to ignore, got 0 to 256"),
        (2, "0 to 1, or 255 for a pixel to be ignored, got 2"),
        (0.5, "masks must be bool or integers, got float64; give the numbers of the classes"),
    ],
)
def test_arrays_that_hold_no_classes_are_refused(value, message):
    masks = np.zeros((3, 4, 4), int).astype(type(value))
    masks[1, 1, 1] = value
    with pytest.raises(ValueError, match=message):
        SliceSet.from_arrays(np.zeros((3, 4, 4)), masks, classes=("sky", "road"))


def test_a_checkpoint_keeps_the_words_of_its_data():
    words = Words(target="road")
    assert Words.read(json.loads(json.dumps(asdict(words)))) == words
    assert Words.read(json.loads(json.dumps(asdict(LGG)))) == LGG
    assert Words.read(None) == LGG  # a checkpoint of an earlier version


@pytest.mark.parametrize("change", [{"target": "a\nb"}, {"group": 3}, {"image": "x" * 41}, {"channels": [1]}, {"a": 1}])
def test_words_that_nobody_has_stored_are_refused(change):
    with pytest.raises(ValueError, match="words must"):
        Words.read({**asdict(Words()), **change})
    for stored in ([], "tumour", {}, {**asdict(Words()), "channels": None}):
        with pytest.raises(ValueError, match="words must"):
            Words.read(stored)


def test_a_part_keeps_the_words():
    slices = slice_set(words=LGG)
    assert slices.subset([0]).words == LGG
    assert slice_set().words == Words()


# --- Several targets ------------------------------------------------------------------------------------------------

CLASSES = ("background", "road", "car")


def class_set(**changes):
    """Three slices with masks of the three classes, and pixels to be ignored."""
    masks = np.random.default_rng(1).choice(np.array([0, 1, 2, IGNORE], np.uint8), (5, 4, 6, 1))
    return slice_set(**{"masks": masks, "classes": CLASSES, **changes})


def test_classes_go_with_every_part():
    slices = class_set()
    assert slices.target_names() == ("road", "car")
    assert slices.subset([0, 3]).classes == CLASSES
    assert [part.classes for part in slices.split([np.array([0, 3]), np.array([1, 2, 4])])] == [CLASSES, CLASSES]
    assert class_set().subset([]).classes == CLASSES  # no mask to look at


def test_each_target_has_its_mask():
    slices = class_set()
    marked = slices.marked(np.array([0, 4]))
    assert marked.shape == (2, 4, 6, 2)
    for place, index in enumerate((0, 4)):
        for k in (1, 2):
            np.testing.assert_array_equal(marked[place, ..., k - 1], slices.masks[index, ..., 0] == k)
    assert slices.areas().tolist() == [[int((mask == k).sum()) for k in (1, 2)] for mask in slices.masks]
    binary = slice_set()
    np.testing.assert_array_equal(binary.marked(1), binary.masks[1])
    assert binary.areas().tolist() == [[int(mask.sum())] for mask in binary.masks]


def test_masks_of_several_channels_may_overlap():
    masks = np.ones((5, 4, 6, 2), np.uint8)
    assert slice_set(masks=masks).target_names() == ("foreground 1", "foreground 2")
    slices = slice_set(masks=masks, words=Words(targets=("road", "car")))
    assert not slices.is_binary
    assert slice_set().is_binary
    assert not class_set().is_binary
    assert slices.target_names() == ("road", "car")
    assert slices.subset([1]).masks.shape == (1, 4, 6, 2)
    assert slices.areas().tolist() == [[24, 24]] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("background", "road")}, r"0 to 1, or 255 for a pixel to be ignored, got 2$"),
        ({"classes": ("background",)}, "from 2 to 255 different names, got .*background"),
        ({"classes": ("background", "road", "road")}, "different names"),
        ({"classes": tuple(map(str, range(256)))}, "from 2 to 255"),
        ({"classes": ()}, r"masks must hold 0 and 1 only, got 255; masks of classes need their names"),
        ({"masks": np.zeros((5, 4, 6, 2), np.uint8)}, r"masks must be uint8 \(5, 4, 6, 1\) here"),
        ({"masks": np.zeros((5, 4, 6), np.uint8)}, r"masks must be uint8 \(5, 4, 6, 1\) here"),
        ({"masks": np.zeros((5, 4, 6, 1), np.int64)}, "masks must be uint8"),
        (
            {"classes": (), "words": Words(targets=("a", "b")), "masks": np.zeros((5, 4, 6, 3), np.uint8)},
            r"masks must be uint8 \(5, 4, 6, 2\) here",
        ),
    ],
)
def test_what_class_masks_must_be(changes, message):
    with pytest.raises(ValueError, match=message):
        class_set(**changes)


def test_the_words_of_several_targets_are_read_back_and_checked():
    words = Words(targets=("road", "car"))
    assert Words.read(json.loads(json.dumps(asdict(words)))) == words
    older = {name: value for name, value in asdict(words).items() if name != "targets"}
    assert Words.read(older) == Words()
    for targets, message in (
        (["road", "road"], "differ"),
        (["a\n"], "printable"),
        (["x" * 41], "40 letters"),
        ([1], "printable"),
        ([[]], "printable"),
        (5, "words must hold"),
    ):
        with pytest.raises(ValueError, match=message):
            Words.read({**asdict(words), "targets": targets})
