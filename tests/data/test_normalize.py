"""Normalisation: the histogram's statistics against NumPy's on the pixels, the inputs against the formula."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.base.backend import to_device, to_numpy
from minunet.data.normalize import Normalization, apply
from minunet.data.slices import SliceSet
from tests.data.test_slices import slice_set

shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
seeds = st.integers(0, 2**32 - 1)


def grey_values(shape, seed):
    """uint8 noise between two levels that the seed chooses: wide, narrow, or constant."""
    random = np.random.default_rng(seed)
    low, high = np.sort(random.integers(0, 256, 2))
    return random.integers(low, high + 1, shape).astype(np.uint8)


@given(shapes, seeds, st.sampled_from([(10.0, 99.0), (0.0, 100.0), (2.5, 60.0)]))
def test_statistics_are_those_of_the_pixels(shape, seed, percentiles):
    images = grey_values(shape, seed)
    found = Normalization("volume", percentiles).volume_statistics(images)
    for channel in range(shape[3]):
        pixels = images[..., channel].astype(np.float64)
        low, high = np.percentile(pixels, percentiles)
        clipped = np.clip(pixels, low, high)
        assert found.low[0, channel] == pytest.approx(low, rel=1e-13)
        assert found.high[0, channel] == pytest.approx(high, rel=1e-13)
        assert found.mean[0, channel] == pytest.approx(clipped.mean(), rel=1e-12)
        expected_std = clipped.std() if low < high else 1.0
        assert found.std[0, channel] == pytest.approx(expected_std, rel=1e-9)


@given(shapes, seeds)
def test_inputs_have_mean_0_and_deviation_1_unless_the_channel_is_constant(shape, seed):
    images = grey_values(shape, seed)
    statistics = Normalization("volume", (0, 100)).volume_statistics(images)
    x = apply(images, statistics, "float64")
    assert x.shape == images.shape
    for channel in range(shape[3]):
        if np.ptp(images[..., channel]) == 0:
            assert not x[..., channel].any()
        else:
            assert abs(x[..., channel].mean()) < 1e-12
            assert x[..., channel].std() == pytest.approx(1, rel=1e-12)


@given(seeds)
def test_a_change_of_gain_and_offset_changes_nothing(seed):
    # What the normalisation is for: the scanner's unknown gain and offset of a volume drop out.
    images = np.random.default_rng(seed).integers(0, 100, (3, 8, 8, 2), dtype=np.uint8)
    normalization = Normalization()
    x = apply(images, normalization.volume_statistics(images), "float64")
    brighter = 2 * images + np.uint8(50)
    again = apply(brighter, normalization.volume_statistics(brighter), "float64")
    np.testing.assert_allclose(again, x, rtol=0, atol=1e-12)


def test_scale_is_division_by_255():
    slices = slice_set()
    normalization = Normalization("scale")
    x = apply(slices.images, normalization.statistics(slices).take(slices.patient_indices()))
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, slices.images.astype(np.float32) / 255)


def test_each_patient_has_statistics_of_its_own():
    slices = slice_set()
    normalization = Normalization()
    statistics = normalization.statistics(slices)
    assert statistics.low.shape == (2, 3)
    x = apply(slices.images, statistics.take(slices.patient_indices()), "float64")
    for rows in (slice(0, 3), slice(3, 5)):
        alone = apply(slices.images[rows], normalization.volume_statistics(slices.images[rows]), "float64")
        np.testing.assert_array_equal(x[rows], alone)


def test_a_constant_channel_gives_zeros():
    images = np.full((2, 4, 4, 3), (0, 255, 77), np.uint8)
    assert not apply(images, Normalization().volume_statistics(images)).any()


def test_the_same_on_another_device(device):
    slices = slice_set()
    statistics = Normalization().statistics(slices).take(slices.patient_indices())
    x = apply(to_device(slices.images, "cuda"), statistics)
    np.testing.assert_allclose(to_numpy(x), apply(slices.images, statistics), rtol=1e-6)


def test_it_survives_json():
    normalization = Normalization("volume", (1.5, 98.0))
    assert Normalization.from_dict(json.loads(json.dumps(normalization.to_dict()))) == normalization


@pytest.mark.parametrize(
    "values",
    [
        {},
        [],
        {"kind": "volume"},
        {"kind": "volume", "percentiles": [10, 99], "more": 1},
        {"kind": "other", "percentiles": [10, 99]},
        {"kind": "volume", "percentiles": [99, 10]},
        {"kind": "volume", "percentiles": [10]},
        {"kind": "volume", "percentiles": ["a", "b"]},
        {"kind": "volume", "percentiles": None},
        {"kind": "volume", "percentiles": [float("nan"), 99]},
    ],
)
def test_from_dict_refuses_what_to_dict_does_not_write(values):
    with pytest.raises(ValueError, match=r"must (have|be)"):
        Normalization.from_dict(values)


@pytest.mark.parametrize(
    "images", [np.zeros((1, 2, 2, 3)), np.zeros((2, 2, 3), np.uint8), np.zeros((0, 2, 2, 3), np.uint8)]
)
def test_statistics_refuse_what_is_no_volume_of_grey_values(images):
    with pytest.raises(ValueError, match="images must be"):
        Normalization().volume_statistics(images)


def test_images_of_one_volume_may_differ_in_size_but_in_nothing_else():
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, shape, dtype=np.uint8) for shape in ((4, 6, 2), (5, 3, 2))]
    found = Normalization("volume", (0, 100)).volume_statistics(images)
    pixels = np.concatenate([image.reshape(-1, 2) for image in images])
    np.testing.assert_allclose(found.mean[0], pixels.mean(axis=0))
    np.testing.assert_allclose(found.std[0], pixels.std(axis=0))
    for other in (images[0].astype(np.uint16), images[0][..., :1]):
        with pytest.raises(ValueError, match="of one dtype and one C"):
            Normalization().volume_statistics([images[0], other])


def test_sixteen_bits():
    images = np.random.default_rng(0).integers(300, 60_000, (2, 5, 4, 2), dtype=np.uint16)
    pixels = images.reshape(-1, 2)
    found = Normalization("volume", (10, 90)).volume_statistics(images)
    low, high = np.percentile(pixels, (10, 90), axis=0)
    np.testing.assert_allclose((found.low[0], found.high[0]), (low, high))
    clipped = np.clip(pixels, low, high)
    np.testing.assert_allclose((found.mean[0], found.std[0]), (clipped.mean(axis=0), clipped.std(axis=0)))
    x = apply(images, found, "float64")
    np.testing.assert_allclose((x.mean(axis=(0, 1, 2)), x.std(axis=(0, 1, 2))), ([0, 0], [1, 1]), atol=1e-12)
    scaled = apply(images, Normalization("scale").volume_statistics(images), "float64")
    np.testing.assert_allclose(scaled, images / 65535)


def test_padding_is_no_part_of_a_volume():
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    masks, extents = np.zeros((2, 6, 6, 1), np.uint8), np.array([[6, 4], [3, 6]])
    whole = SliceSet(images, masks, ("a", "a"), (1, 2), ("", ""), extents=extents)
    expected = Normalization().volume_statistics([images[0, :, :4], images[1, :3]])
    for found, wanted in zip(Normalization().statistics(whole), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_apply_refuses_statistics_of_another_shape_and_images_of_another_dtype():
    slices = slice_set()
    statistics = Normalization().statistics(slices)
    with pytest.raises(ValueError, match=r"statistics must have shape \(5, 3\) or \(1, 3\), got \(2, 3\)"):
        apply(slices.images, statistics)
    with pytest.raises(ValueError, match="images must be uint8, uint16 or float32"):
        apply(slices.images.astype(np.float64), statistics)


@given(shapes, seeds, st.sampled_from([(10.0, 99.0), (0.0, 100.0), (2.5, 60.0)]))
def test_statistics_of_floats_are_those_of_the_pixels(shape, seed, percentiles):
    random = np.random.default_rng(seed)
    images = random.normal(random.normal() * 100, 3, shape).round(random.integers(0, 5)).astype(np.float32)
    found = Normalization("volume", percentiles).volume_statistics(images)
    pixels = images.astype(np.float64).reshape(-1, shape[3])
    low, high = np.percentile(pixels, percentiles, axis=0)
    clipped = np.clip(pixels, low, high)
    np.testing.assert_allclose((found.low[0], found.high[0]), (low, high), rtol=1e-12)
    np.testing.assert_allclose(found.mean[0], clipped.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(found.std[0], np.where(low < high, clipped.std(axis=0), 1.0), rtol=1e-6)


def test_floats_give_the_inputs_that_the_same_integers_give(device):
    slices = slice_set()
    floats = slice_set(images=slices.images.astype(np.float32))
    for name, array in Normalization().statistics(slices)._asdict().items():
        np.testing.assert_allclose(getattr(Normalization().statistics(floats), name), array, rtol=1e-12)
    statistics = Normalization().statistics(slices).take(slices.patient_indices())
    x = apply(to_device(floats.images, "cuda"), statistics)
    np.testing.assert_array_equal(to_numpy(x), to_numpy(apply(to_device(slices.images, "cuda"), statistics)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_none_changes_no_value(dtype):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (5, 4, 6, 3)).astype(dtype)
    if dtype == "float32":
        images[0, 0, 0] = 3e38, -3e38, 1e-38
    slices = slice_set(images=images)
    x = apply(images, Normalization("none").statistics(slices).take(slices.patient_indices()))
    np.testing.assert_array_equal(x, images.astype("float32"))
    assert not np.shares_memory(x, images)
    assert Normalization.from_dict(Normalization("none").to_dict()) == Normalization("none")


def test_floats_have_no_largest_value_to_scale_by():
    with pytest.raises(ValueError, match="for the kind 'scale', got float32; take 'volume' or 'none'"):
        Normalization("scale").statistics(slice_set(images=np.ones((5, 4, 6, 3), np.float32)))
