"""The phantom: the same from the same seed, the statistics it promises, and readable back from the Kaggle layout."""

import numpy as np
import pytest
from PIL import Image

from minunet.base.errors import UserError
from minunet.data import phantom, reader
from minunet.data.normalize import Normalization
from minunet.data.slices import SliceSet
from tests.command_line import tree


@pytest.fixture(scope="module")
def default():
    """The data of ``python examples/train_lgg.py``, at half its size: the anatomy is the same."""
    return phantom.make(patients=24, size=48, seed=0)


def test_a_patient_depends_on_its_seed_and_number_only():
    images, masks = phantom.make_patient(seed=3, patient=1, size=32)
    again, masks_again = phantom.make_patient(seed=3, patient=1, size=32)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(masks, masks_again)
    within = phantom.make(patients=2, size=32, seed=3)
    np.testing.assert_array_equal(within.images[within.patient_indices() == 1], images)
    for seed, patient in ((4, 1), (3, 2)):
        other, _ = phantom.make_patient(seed, patient, size=32)
        assert other.shape != images.shape or np.any(other != images)


def test_the_format():
    images, masks = phantom.make_patient(seed=0, patient=0, size=40)
    assert images.shape[1:] == (40, 40, 3)
    assert 15 <= len(images) <= 25
    assert masks.shape == (*images.shape[:3], 1)
    assert images.dtype == masks.dtype == np.uint8
    slices = phantom.make(patients=3, size=16, seed=12)
    assert slices.patient_names() == ("PHANTOM_12_0001", "PHANTOM_12_0002", "PHANTOM_12_0003")
    assert slices.numbers[0] == 1


def test_another_size_shows_the_same_head():
    small, small_mask = phantom.make_patient(seed=0, patient=5, size=32)
    large, large_mask = phantom.make_patient(seed=0, patient=5, size=96)
    assert len(small) == len(large)
    shrunk = large.reshape(len(large), 32, 3, 32, 3, 3).mean(axis=(2, 4))
    for channel in range(3):
        assert np.corrcoef(shrunk[..., channel].ravel(), small[..., channel].ravel())[0, 1] > 0.95
    assert large_mask.mean() == pytest.approx(small_mask.mean(), rel=0.1)


def test_the_statistics_of_the_default_set(default):
    assert 400 <= len(default) <= 550
    assert 0.008 <= default.masks.mean() <= 0.03
    with_tumour = default.masks.any(axis=(1, 2, 3))
    assert 0.3 <= with_tumour.mean() <= 0.55
    patient = default.patient_indices()
    for p in range(24):
        where = np.flatnonzero(with_tumour[patient == p])
        assert len(where) >= 3  # every patient has a tumour, and it is continuous over the slices
        assert np.array_equal(where, np.arange(where[0], where[-1] + 1))


def test_intensity_ranges_differ_from_patient_to_patient(default):
    flair, patient = default.images[..., 1], default.patient_indices()
    bright = [np.percentile(flair[patient == p], 99) for p in range(24)]
    assert max(bright) > 1.5 * min(bright)


def test_some_tumours_are_hard(default):
    """Tumour against the rest of the brain's grey values in FLAIR: far brighter in some, not brighter in others."""
    flair, tumour, patient = default.images[..., 1], default.masks[..., 0] == 1, default.patient_indices()
    contrast = []
    for p in range(24):
        grey, inside = flair[patient == p].astype(float), tumour[patient == p]
        head = (grey > 20) & ~inside
        contrast.append((grey[inside].mean() - grey[head].mean()) / grey[head].std())
    assert np.mean(np.array(contrast) < 0.5) >= 0.15
    assert np.mean(np.array(contrast) > 1.0) >= 0.3


def test_no_threshold_on_flair_solves_it(default):
    for normalization in (None, Normalization()):
        _, dice = phantom.best_flair_threshold_dice(default, normalization)
        assert 0.05 < dice <= 0.6


def test_the_best_threshold_is_the_best_of_all():
    slices = phantom.make(patients=3, size=24, seed=1)
    flair, tumour, patient = slices.images[..., 1], slices.masks[..., 0] == 1, slices.patient_indices()

    def mean_dice(threshold):
        scores = []
        for p in range(3):
            called, truth = flair[patient == p] >= threshold, tumour[patient == p]
            scores.append(2 * np.sum(called & truth) / (called.sum() + truth.sum()))
        return np.mean(scores)

    threshold, dice = phantom.best_flair_threshold_dice(slices)
    assert dice == pytest.approx(mean_dice(threshold), rel=1e-12)
    assert dice == pytest.approx(max(mean_dice(t) for t in range(256)), rel=1e-12)


def test_a_threshold_that_separates_reaches_1():
    """Tumour brighter than all else in each patient, on a scale of its own: normalised, one threshold is perfect."""
    random = np.random.default_rng(0)
    masks = (random.random((4, 8, 8, 1)) < 0.3).astype(np.uint8)
    images = np.repeat(masks, 3, axis=3) * np.array([50, 50, 200, 200], np.uint8).reshape(4, 1, 1, 1)
    images[2:] += 51  # the second patient's background is brighter than the first one's tumour
    slices = SliceSet(images, masks, ("a", "a", "b", "b"), (1, 2, 1, 2), tuple("abcd"))
    assert phantom.best_flair_threshold_dice(slices)[1] < 1
    assert phantom.best_flair_threshold_dice(slices, Normalization("volume", (0, 100)))[1] == 1


def test_a_set_without_tumour_is_perfect_when_nothing_is_called():
    slices = SliceSet(np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 1), np.uint8), ("a",), (1,), ("a",))
    threshold, dice = phantom.best_flair_threshold_dice(slices)
    assert (threshold > 0, dice) == (True, 1.0)


def test_written_in_the_kaggle_layout_the_same_reader_reads_it_back(tmp_path):
    slices = phantom.make(patients=2, size=32, seed=5)
    phantom.write_kaggle(tmp_path, slices)
    path = tmp_path / "PHANTOM_05_0001_20260101" / "PHANTOM_05_0001_20260101_10"
    with Image.open(f"{path}.tif") as image, Image.open(f"{path}_mask.tif") as mask:
        assert (image.format, image.mode, image.info["compression"]) == ("TIFF", "RGB", "raw")
        assert (mask.format, mask.mode, mask.info["compression"]) == ("TIFF", "L", "raw")
    back = reader.read_folder(tmp_path, size=32)
    np.testing.assert_array_equal(back.images, slices.images)
    np.testing.assert_array_equal(back.masks, slices.masks)
    assert (back.patients, back.numbers) == (slices.patients, slices.numbers)


def named(*patients):
    count = len(patients)
    images, masks = np.zeros((count, 8, 8, 3), np.uint8), np.zeros((count, 8, 8, 1), np.uint8)
    return SliceSet(images, masks, patients, (1,) * count, patients)


@pytest.mark.parametrize("name", ["../../escape", "{}/absolute", "a/b", "a\\b", "C:", "nul\0", ""])
def test_a_patients_name_leads_nowhere_else(tmp_path, name):
    name = name.format(tmp_path)
    with pytest.raises(ValueError, match=r"a patient's name must be that of a folder, without .*, got ") as caught:
        phantom.write_kaggle(tmp_path / "deep" / "data", named("anna", name))
    assert repr(name) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["..", "größe mit leer", "-x", ".hidden"])
def test_odd_names_stay_in_the_folder(tmp_path, name):
    phantom.write_kaggle(tmp_path, named(name))
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}_20260101"]
    assert len(list(tmp_path.rglob("*.tif"))) == 2


@pytest.mark.parametrize("there", ["the same patient", "a file", "a link to a folder", "a link that leads nowhere"])
def test_what_is_there_already_is_refused_before_anything_is_written(tmp_path, there):
    data, place = tmp_path / "data", tmp_path / "data" / "ben_20260101"
    data.mkdir()
    (tmp_path / "elsewhere").mkdir()
    if there == "the same patient":
        phantom.write_kaggle(data, named("ben"))
    elif there == "a file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / ("elsewhere" if "folder" in there else "nowhere"))
    before = tree(tmp_path)
    with pytest.raises(UserError) as caught:
        phantom.write_kaggle(data, named("anna", "ben"))
    assert str(caught.value) == f"{place}: is there already, choose another folder"
    assert tree(tmp_path) == before


def test_a_link_that_appears_while_slices_are_written_is_not_followed(tmp_path, monkeypatch):
    precious = tmp_path / "thesis.txt"
    precious.write_text("three years of work")
    fromarray = Image.fromarray

    def link_first(pixels):
        link = tmp_path / "data" / "anna_20260101" / "anna_20260101_1_mask.tif"
        if not link.is_symlink():
            link.symlink_to(precious)
        return fromarray(pixels)

    monkeypatch.setattr(Image, "fromarray", link_first)
    with pytest.raises(UserError, match=r"_1_mask\.tif: cannot be written \(File exists\), choose another"):
        phantom.write_kaggle(tmp_path / "data", named("anna"))
    assert precious.read_text() == "three years of work"


@pytest.mark.parametrize("folder", ["file/data", "dangling", "x" * 300])
def test_a_folder_that_the_system_refuses_is_one_line(tmp_path, folder):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match=r": cannot be written \(.*\), choose another folder$") as caught:
        phantom.write_kaggle(tmp_path / folder, named("anna"))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="patients must be at least 1, got 0"):
        phantom.make(patients=0)
    with pytest.raises(ValueError, match="size must be at least 16, got 15"):
        phantom.make_patient(seed=0, patient=0, size=15)


def test_the_tissues_lie_in_the_same_images():
    tumours, tissues = (phantom.make(patients=2, size=32, tissues=asked) for asked in (False, True))
    np.testing.assert_array_equal(tissues.images, tumours.images)
    np.testing.assert_array_equal(tissues.masks == 3, tumours.masks == 1)
    assert tissues.classes == phantom.TISSUES
    shares = np.bincount(tissues.masks.ravel(), minlength=4) / tissues.masks.size
    assert (shares > [0.3, 0.1, 0.1, 0.005]).all()
    grey = tissues.images.mean(axis=-1)
    around, head, cerebrum, _ = (grey[tissues.masks[..., 0] == number].mean() for number in range(4))
    assert around < 0.3 * min(head, cerebrum)  # nothing but noise lies around the head


def test_tissues_are_read_back_from_files(tmp_path):
    tissues = phantom.make(patients=1, size=16, tissues=True)
    phantom.write_kaggle(tmp_path, tissues)
    read = reader.read_folder(tmp_path, 16, classes=phantom.TISSUES)
    np.testing.assert_array_equal(read.masks, tissues.masks)
    assert read.classes == tissues.classes
