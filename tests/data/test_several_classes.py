"""Masks of class numbers and masks that overlap, from the file to the report of the verifier."""

import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minunet.base import cli
from minunet.base.errors import UserError
from minunet.data import images, manifest, reader, verify
from minunet.data.slices import IGNORE, Words
from tests.data.cases import refusal

CLASSES = ("background", "road", "car")


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def palette(pixels):
    """A picture with a palette, whose colours say nothing about the numbers."""
    picture = Image.fromarray(pixels).convert("L")
    picture.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())
    return picture


def png(path, bits, row):
    """A grey PNG of one row of packed pixels, which Pillow would not write."""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (8 * len(row) // bits).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


# --- A mask ---------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_that_the_file_stores(tmp_path):
    pixels = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)
    wide = np.where(pixels == 255, 65535, pixels).astype(np.uint16)
    for path in (
        write(tmp_path / "grey.png", pixels),
        write(tmp_path / "grey.tif", pixels),
        write(tmp_path / "grey16.png", wide),
        write(tmp_path / "grey16.tif", wide),
        write(tmp_path / "palette.png", palette(pixels)),
        write(tmp_path / "palette.tif", palette(pixels)),
    ):
        mask = images.read_mask(path, 3)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, pixels, err_msg=path.name)


def test_a_few_bits_a_pixel_are_not_stretched(tmp_path):
    """Pillow shows grey of 2 bits as 0, 85, 170 and 255: class 3 would be ignored, and nobody would know."""
    np.testing.assert_array_equal(
        images.read_mask(png(tmp_path / "2.png", 2, b"\x1b\xe4"), 4), [[0, 1, 2, 3, 3, 2, 1, 0]]
    )
    np.testing.assert_array_equal(images.read_mask(png(tmp_path / "4.png", 4, b"\x01\xfe"), 16), [[0, 1, 15, 14]])
    np.testing.assert_array_equal(images.read_mask(png(tmp_path / "1.png", 1, b"\x0f"), 2), [[0] * 4 + [1] * 4])
    small = palette(np.array([[0, 1, 2, 3]], np.uint8))
    np.testing.assert_array_equal(images.read_mask(write(tmp_path / "p.png", small, bits=2), 4), [[0, 1, 2, 3]])


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 3, 9, 254, 255]], np.uint8), "a mask with the values 3, 9, 254; allowed are 0 to 2 for the 3 "),
        (np.array([[0, 256, 65534]], np.uint16), "a mask with the values 256, 65534; allowed are 0 to 2"),
        (np.arange(20, dtype=np.uint8)[None], "3, 4, 5, 6, 7, 8, 9, 10, ...; allowed"),
        (np.zeros((2, 2, 3), np.uint8), "RGB, expected a mask of one channel (grey or a palette) that holds"),
    ],
)
def test_a_value_that_is_no_class_is_refused(tmp_path, pixels, expected):
    assert expected in refusal(images.read_mask, write(tmp_path / "a.png", pixels), 3)


def test_masks_of_classes_are_told_how_to_be_read(tmp_path):
    """Without --classes."""
    several = write(tmp_path / "several.png", np.array([[0, 1, 2]], np.uint8))
    for path in (several, write(tmp_path / "palette.png", palette(np.zeros((2, 2), np.uint8)))):
        assert "--classes" in refusal(images.read_mask, path)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_a_resized_mask_has_the_class_of_most_of_the_area(height, width, rows, columns, seed):
    mask = np.random.default_rng(seed).choice(np.array([0, 1, 2, IGNORE], np.uint8), (height, width))
    found = images.resize_classes(mask, rows, columns)
    assert found.dtype == np.uint8
    # On the grid of height * rows by width * columns, old and new pixels are both whole blocks: count.
    fine = np.repeat(np.repeat(mask, rows, axis=0), columns, axis=1).reshape(rows, height, columns, width)
    for i, j in np.ndindex(rows, columns):
        assert found[i, j] == np.bincount(fine[i, :, j].ravel()).argmax()


# --- A folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scenes(tmp_path):
    """Three images, with masks of classes in label/ and of 0 and 255 in road/ and car/."""
    for number in range(3):
        random = np.random.default_rng(number)
        write(tmp_path / "image" / f"{number}.png", random.integers(0, 256, (6, 8), dtype=np.uint8))
        classes = random.integers(0, 3, (6, 8), dtype=np.uint8)
        write(tmp_path / "road" / f"{number}.png", np.uint8(255) * (classes > 0))
        write(tmp_path / "car" / f"{number}.tif", (classes == 2).astype(np.uint8))
        classes[0, number] = IGNORE
        write(tmp_path / "label" / f"{number}.png", palette(classes))
    return tmp_path


def read(folder, names, size=8, **options):
    return reader.read_folder(folder, size, folders=names, **options)


def test_a_folder_of_classes(scenes):
    slices = read(scenes, ("image", "label"), classes=CLASSES)
    assert slices.classes == CLASSES
    assert slices.extents.tolist() == [[6, 8]] * 3
    for number in range(3):
        expected = images.read_mask(scenes / "label" / f"{number}.png", 3)
        np.testing.assert_array_equal(slices.masks[number, :6, :, 0], expected)
    assert (slices.masks[:, 6:] == IGNORE).all()  # nobody has drawn the padding


def test_each_folder_of_masks_is_a_target(scenes):
    slices = read(scenes, ("image", "car", "road"))
    assert slices.target_names() == ("car", "road")
    assert slices.masks.shape == (3, 8, 8, 2)
    for number in range(3):
        for k, path in enumerate((scenes / "car" / f"{number}.tif", scenes / "road" / f"{number}.png")):
            np.testing.assert_array_equal(slices.masks[number, :6, :, k], images.read_mask(path))
    assert not slices.masks[:, 6:].any()
    inverted = read(scenes, ("image", "car", "road"), invert_masks=True)
    np.testing.assert_array_equal(inverted.masks[:, :6], 1 - slices.masks[:, :6])


def test_a_mask_that_one_folder_lacks_is_a_fault(scenes):
    (scenes / "car" / "1.tif").unlink()
    message = " ".join(refusal_of_many(read, scenes, ("image", "car", "road")))
    for path in ("image/1.png", "road/1.png"):
        assert f"{path}: no partner 1 in one or more of 3 folders image, car and road; add it" in message
    slices = read(scenes, ("image", "car", "road"), allow_missing=True)
    assert slices.numbers == (0, 2)
    assert len(slices.skipped) == 2


def refusal_of_many(function, *arguments, **options):
    with pytest.raises(UserError) as found:
        function(*arguments, **options)
    return [str(found.value), *found.value.faults]


def test_every_fault_is_named_by_its_file(scenes):
    write(scenes / "label" / "0.png", np.full((6, 8), 7, np.uint8))
    write(scenes / "label" / "2.png", np.zeros((6, 9), np.uint8))
    faults = " ".join(refusal_of_many(read, scenes, ("image", "label"), classes=CLASSES))
    assert "label/0.png: a mask with the values 7; allowed are 0 to 2" in faults
    assert "image/2.png: 8 x 6 pixels, but its mask " in faults
    write(scenes / "road" / "1.png", np.zeros((5, 8), np.uint8))
    write(scenes / "car" / "1.tif", np.zeros((7, 8), np.uint8))
    faults = " ".join(refusal_of_many(read, scenes, ("image", "car", "road")))
    assert "car/1.tif has 8 x 7 pixels" in faults
    assert "road/1.png has 8 x 5 pixels" in faults


def test_what_goes_against_classes_is_refused(scenes):
    for read_or_inspect in (
        lambda **options: read(scenes, **options),
        lambda **o: verify.inspect_folder(scenes, **o_of(o)),
    ):
        with pytest.raises(ValueError, match="invert_masks"):
            read_or_inspect(names=("image", "label"), classes=CLASSES, invert_masks=True)
        with pytest.raises(ValueError, match="2 folders of masks"):
            read_or_inspect(names=("image", "car", "road"), classes=CLASSES)


def o_of(options):
    return {"folders": options.pop("names"), **options}


def test_a_manifest_lists_every_mask(scenes):
    listing = reader.list_folder(scenes, folders=("image", "car", "road"))
    found = manifest.digests(listing)
    assert set(found) == {f"{name}/{n}.{end}" for n in range(3) for name, end in SUFFIXES}


SUFFIXES = (("image", "png"), ("car", "tif"), ("road", "png"))


def test_long_names_of_folders_fit_into_a_checkpoint(scenes):
    (scenes / "car").rename(scenes / ("x" * 60))
    slices = read(scenes, ("image", "x" * 60, "road"))
    words = slices.words
    assert Words.read({**vars(words), "targets": list(words.targets)}) == words
    (scenes / "road").rename(scenes / ("y" + "x" * 60))
    message = refusal(read, scenes, ("image", "x" * 60, "y" + "x" * 60))
    assert "names of masks that do not differ, rename the folders" in message


# --- The report -----------------------------------------------------------------------------------------------------


def test_the_report_of_classes(scenes):
    report = verify.inspect_folder(scenes, folders=("image", "label"), classes=(*CLASSES, "bus"))
    slices = read(scenes, ("image", "label"), size=None, classes=(*CLASSES, "bus"))
    for k, name in enumerate(CLASSES):
        assert report.labels[name].share == pytest.approx((slices.masks == k).mean())
        assert report.labels[name].images == 3
    assert report.labels["bus"] == verify.Label(0.0, 0)
    assert report.ignored_share == pytest.approx(3 / 144)
    lines = str(report).splitlines()
    assert lines[1] == f"data: background on 3 images (100.0%), {report.labels['background'].share:.2%} of all pixels"
    assert lines[5] == "data: to be ignored, 2.08% of all pixels"
    warning = (
        "warning: seen on no image: bus; what is never shown cannot be learnt, check the masks (pixels of the value"
    )
    assert lines[6].startswith(warning)
    assert "more than half" not in str(report)  # the road may be large
    of_arrays = verify.inspect(slices)
    assert (of_arrays.labels, of_arrays.ignored_share) == (report.labels, report.ignored_share)
    json.dumps(report.__dict__, default=vars)


def test_the_report_of_overlapping_masks(scenes):
    folders = ("image", "car", "road")
    slices = read(scenes, folders, size=None)
    for report in (verify.inspect_folder(scenes, folders=folders), verify.inspect(slices)):
        for k, name in enumerate(("car", "road")):
            assert report.labels[name].share == pytest.approx(slices.masks[..., k].mean())
        assert report.tumour_share == pytest.approx(slices.masks.any(axis=3).mean())
        assert "data: car on 3 images" in str(report)


@pytest.mark.parametrize("text", ["a", "a,a", "a,,b", ",".join(map(str, range(256))), "a," + 41 * "b", "a,\n"])
def test_names_of_classes_on_the_command_line(text):
    parser = cli.Parser()
    parser.add_argument("--classes", type=cli.names)
    with pytest.raises(UserError, match="--classes: must be"):
        parser.parse_args(["--classes", text])
    assert parser.parse_args(["--classes", "sky,a road"]).classes == "sky,a road"
