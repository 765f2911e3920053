"""Image files: found, read whole or refused in one line, and resized."""

import os
import re
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minunet.base.errors import UserError
from minunet.data import images
from minunet.data.images import find_volumes
from tests.data.cases import png_of_16_bits, refusal, tiff_of_16_bits


def test_loose_images_of_three_formats(tmp_path):
    image = np.random.default_rng(2).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    for name in ("image.tif", "image.png"):
        Image.fromarray(image).save(tmp_path / name)
        np.testing.assert_array_equal(images.read_image(tmp_path / name), image)
    Image.fromarray(image).save(tmp_path / "image.jpg", quality=95)
    assert images.read_image(str(tmp_path / "image.jpg")).shape == (12, 10, 3)
    (tmp_path / "image.png").rename(tmp_path / "png.tif")
    assert "not a readable TIFF picture" in refusal(images.read_image, tmp_path / "png.tif")
    (tmp_path / "png.tif").rename(tmp_path / "png.of-another-name")
    assert images.read_image(tmp_path / "png.of-another-name").shape == (12, 10, 3)


def test_a_loose_mask(tmp_path):
    mask = np.random.default_rng(3).integers(0, 2, (5, 7), dtype=np.uint8)
    Image.fromarray(mask * np.uint8(255)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(images.read_mask(tmp_path / "mask.png"), mask)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_a_resized_mask_is_the_majority_of_its_area(height, width, size, seed):
    mask = np.random.default_rng(seed).integers(0, 2, (height, width), dtype=np.uint8)
    # On the grid of height * size by width * size, old and new pixels are both whole blocks: count.
    fine = np.repeat(np.repeat(mask, size, axis=0), size, axis=1)
    ones = fine.reshape(size, height, size, width).sum(axis=(1, 3), dtype=np.int64)
    expected = (2 * ones >= height * width).astype(np.uint8)
    np.testing.assert_array_equal(images.resize_mask(mask, size, size), expected)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.tuples(*[st.integers(0, 255)] * 3))
def test_a_resized_constant_image_is_constant(height, width, size, colour):
    image = np.full((height, width, 3), colour, np.uint8)
    np.testing.assert_array_equal(images.resize_image(image, size, size), np.full((size, size, 3), colour, np.uint8))


def test_a_shrunk_image_averages_every_pixel_and_stays_in_place():
    image = np.random.default_rng(4).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    small = images.resize_image(image, 8, 8)
    # White noise of deviation 74: a quarter of its pixels would keep that, the mean over a 4 x 4 block has 18.
    assert small.std() < 25
    gradient = np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[:, None], 32, axis=1)
    shrunk = images.resize_image(np.stack([gradient, gradient.T, gradient], axis=-1), 8, 8).astype(float)
    np.testing.assert_allclose(shrunk[1:-1, :, 0], gradient.reshape(8, 4, 8, 4).mean(axis=(1, 3))[1:-1], atol=1)
    np.testing.assert_array_equal(shrunk[..., 1], shrunk[..., 0].T)


@pytest.mark.parametrize(("height", "width", "size"), [(600, 300, 12), (1024, 2, 2), (257, 257, 1)])
def test_a_resized_mask_of_many_rows(height, width, size):
    mask = np.random.default_rng(8).integers(0, 2, (height, width), dtype=np.uint8)
    share = mask.reshape(size, height // size, size, width // size).mean(axis=(1, 3))
    np.testing.assert_array_equal(images.resize_mask(mask, size, size), share >= 0.5)


@pytest.mark.parametrize("ending", ["tif", "png", "jpg"])
def test_a_grey_image_has_one_channel(tmp_path, ending):
    image = np.random.default_rng(5).integers(0, 256, (6, 9), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / f"grey.{ending}", quality=100)
    found = images.read_image(tmp_path / f"grey.{ending}")
    assert (found.shape, found.dtype) == ((6, 9, 1), np.uint8)
    assert np.abs(found[..., 0].astype(int) - image).max() <= (8 if ending == "jpg" else 0)


@pytest.mark.parametrize("largest", [65535, 4095])  # 12 bits in 16 are data like any other
def test_images_of_sixteen_bits_come_as_they_are(tmp_path, largest):
    deep = np.random.default_rng(5).integers(0, largest + 1, (6, 7, 3), dtype=np.uint16)
    for name in ("grey.tif", "grey.png"):
        Image.fromarray(deep[..., 0]).save(tmp_path / name)
        found = images.read_image(tmp_path / name)
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, deep[..., :1])
        message = refusal(images.read_mask, tmp_path / name)
        assert re.search(r"a mask with the values (\d+, ){8}\.\.\.; expected", message)
    # Pillow by itself would reduce these to their upper 8 bits without a word.
    (tmp_path / "rgb.png").write_bytes(png_of_16_bits(deep))
    np.testing.assert_array_equal(images.read_image(tmp_path / "rgb.png"), deep)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiffs_of_sixteen_bits_in_either_byte_order(tmp_path, channels, big_endian, compressed):
    deep = np.random.default_rng(6).integers(0, 2**16, (5, 4, channels), dtype=np.uint16)
    options = {"big_endian": big_endian, "compressed": compressed}
    (tmp_path / "image.tif").write_bytes(tiff_of_16_bits(deep, **options))
    found = images.read_image(tmp_path / "image.tif")
    assert found.dtype == np.uint16
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, deep)
    if channels == 3:
        (tmp_path / "planes.tif").write_bytes(tiff_of_16_bits(deep, planar=True, **options))
        assert "planes.tif: RGB of 16 bits, plane by plane; save" in refusal(images.read_image, tmp_path / "planes.tif")


def test_what_pillow_would_show_as_something_else_is_refused(tmp_path):
    four = np.random.default_rng(6).integers(0, 2**16, (5, 4, 4), dtype=np.uint16)
    (tmp_path / "four.tif").write_bytes(tiff_of_16_bits(four))
    expected = "expected grey or RGB of 8 or 16 bits; convert it"
    assert refusal(images.read_image, tmp_path / "four.tif").endswith(f"four.tif: 4 channels, {expected}")
    Image.fromarray(four[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    assert "float.tif: 32 bits a channel, expected 8 or 16" in refusal(images.read_image, tmp_path / "float.tif")


def test_a_jpeg_is_no_mask(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a_mask.jpg")
    message = refusal(images.read_mask, tmp_path / "a_mask.jpg")
    assert message.endswith("a_mask.jpg: a mask as JPEG, which changes its values; save the mask as PNG or TIFF")
    (tmp_path / "a_mask.jpg").rename(tmp_path / "a_mask.png")
    assert "not a readable PNG picture" in refusal(images.read_mask, tmp_path / "a_mask.png")


def test_an_image_of_another_kind_than_the_networks_is_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "grey.png")
    assert images.read_image(tmp_path / "grey.png", kind=images.Kind(1, 8)).shape == (8, 8, 1)
    message = refusal(images.read_image, tmp_path / "grey.png", kind=images.Kind(3, 16))
    assert message.endswith("grey.png: grey of 8 bits, but the network was trained on RGB of 16 bits; convert it")


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 5]), st.booleans())
def test_an_image_keeps_the_ratio_of_its_sides(height, width, size, channels, deep):
    rows, columns = images.fitted(height, width, size)
    assert max(rows, columns) == size
    assert abs(rows * max(height, width) - height * size) <= max(height, width) * (0.5 if rows > 1 else 1)
    assert abs(columns * max(height, width) - width * size) <= max(height, width) * (0.5 if columns > 1 else 1)
    kind = np.uint16 if deep else np.uint8
    image = np.random.default_rng(height).integers(0, np.iinfo(kind).max, (height, width, channels), dtype=kind)
    resized = images.resize_image(image, rows, columns)
    assert (resized.shape, resized.dtype) == ((rows, columns, channels), kind)
    exact = Image.fromarray(image[..., 0].astype(np.float32)).resize((columns, rows), Image.Resampling.BILINEAR)
    assert np.abs(resized[..., 0] - np.asarray(exact)).max() <= 1.1  # rounded after each of the two directions
    canvas = np.zeros((size, size, channels), image.dtype)
    images.place(canvas, resized)
    np.testing.assert_array_equal(canvas[:rows, :columns], resized)
    assert (canvas[:, columns:] == canvas[:, columns - 1 : columns]).all()
    assert (canvas[rows:] == canvas[rows - 1]).all()


@pytest.mark.parametrize("values", [(0, 65535), (0, 255), (0, 1), (65535,)])
def test_masks_of_sixteen_bits(tmp_path, values):
    mask = np.random.default_rng(6).choice(np.array(values, np.uint16), (8, 8))
    for name in ("mask.tif", "mask.png"):
        Image.fromarray(mask).save(tmp_path / name)
        np.testing.assert_array_equal(images.read_mask(tmp_path / name), mask > 0)


@pytest.mark.parametrize("values", [(0, 1, 255), (1, 2), (0, 254), (0, 2), (0, 255, 65535), (0, 65534), (4095, 0)])
def test_masks_of_three_values_or_of_others(tmp_path, values):
    mask = np.array(values, np.uint16 if max(values) > 255 else np.uint8).reshape(1, -1)
    Image.fromarray(mask).save(tmp_path / "mask.tif")
    listed = ", ".join(str(value) for value in sorted(values))
    assert f"a mask with the values {listed};" in refusal(images.read_mask, tmp_path / "mask.tif")


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
@pytest.mark.parametrize(("kind", "tumour"), [(bool, 1), (np.uint8, 1), (np.uint8, 255), (np.uint16, 65535)])
def test_a_tiff_that_shows_0_as_white_holds_the_mask_that_it_stores(tmp_path, kind, tumour, compression):
    """As tifffile writes boolean arrays, and ImageJ masks with its inverting table. Pillow swaps black and white."""
    path = tmp_path / "mask.tif"
    mask = np.random.default_rng(9).random((4, 8)) < 0.3
    stored = (mask * tumour).astype(kind)
    swapped = stored if kind is np.uint16 else ~stored
    Image.fromarray(swapped).save(path, tiffinfo={262: 0}, compression=compression)
    if compression is None:
        assert (np.packbits(mask, axis=1) if kind is bool else stored).tobytes() in path.read_bytes()
    np.testing.assert_array_equal(images.read_mask(path), mask)


#: What the orientation tag of EXIF and TIFF asks for.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def save_turned(path, array, orientation):
    """Save an array with the tag ``orientation``, in the format of the path's ending."""
    exif = Image.Exif()
    exif[274] = orientation
    tags = {"tiffinfo": {274: orientation}} if path.suffix == ".tif" else {"exif": exif, "quality": 100}
    Image.fromarray(array).save(path, **tags)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("ending", ["tif", "png", "jpg"])
def test_an_image_is_turned_as_its_tag_says(tmp_path, ending, orientation):
    path = tmp_path / f"image.{ending}"
    image = np.arange(0, 240, 10, dtype=np.uint8).repeat(3).reshape(4, 6, 3)
    save_turned(path, image, orientation)
    found, expected = images.read_image(path).astype(int), TURNS[orientation](image)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (5 if ending == "jpg" else 0)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("ending", ["tif", "png"])
@pytest.mark.parametrize("kind", [bool, np.uint8, np.uint16])
def test_a_mask_is_turned_as_its_tag_says(tmp_path, kind, ending, orientation):
    path = tmp_path / f"mask.{ending}"
    mask = np.random.default_rng(11).random((20, 32)) < 0.5
    save_turned(path, mask if kind is bool else (mask * np.iinfo(kind).max).astype(kind), orientation)
    np.testing.assert_array_equal(images.read_mask(path), TURNS[orientation](mask))


@given(st.integers(0, 2**32 - 1))
def test_a_damaged_tiff_is_read_or_refused_in_one_line(tmp_path_factory, seed):
    path = tmp_path_factory.getbasetemp() / "damaged.tif"
    random = np.random.default_rng(seed)
    Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    for place in random.integers(0, len(content), 4):
        content[place] = random.integers(256)
    path.write_bytes(content)
    try:
        images.read_image(path)
    except UserError as error:
        message = str(error)
    else:
        return
    assert message.startswith(str(path))
    assert "\n" not in message


IMAGEJ = "ImageJ=1.11a\nimages={}\nchannels=3\nhyperstack=true\n"
TRUNCATED = '{"shape": [3, 20, 32, 3], "truncated": true}'


def save_planes(path, planes, tags, *, mode="RGB"):
    """A TIFF of one header, as ImageJ and tifffile write it, with the data of ``planes`` planes behind it."""
    picture = Image.new(mode, (32, 20), 255 if mode == "L" else (7, 8, 9))
    picture.save(path, "TIFF", tiffinfo=tags)
    with path.open("ab") as file:
        file.write(picture.tobytes() * (planes - 1))


@pytest.mark.parametrize(
    "tags",
    [{270: IMAGEJ.format(3)}, {270: IMAGEJ.format(3).replace("\n", "\r\n")}, {270: TRUNCATED}, {32997: 3}],
    ids=["ImageJ", "ImageJ on Windows", "tifffile, truncated", "ImageDepth"],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_planes_behind_one_header_are_more_than_one_picture(tmp_path, tags, mode):
    save_planes(tmp_path / "stack.tif", 3, tags, mode=mode)
    with Image.open(tmp_path / "stack.tif") as picture:
        assert picture.n_frames == 1  # Pillow sees the first alone
    message = refusal(images.read_image if mode == "RGB" else images.read_mask, tmp_path / "stack.tif")
    assert message == f"{tmp_path / 'stack.tif'}: more than one picture in the file; save them one by one"


@pytest.mark.parametrize(
    "tags",
    [
        {270: IMAGEJ.format(1)},
        {270: IMAGEJ.format(3)},  # cut out of a stack
        {270: TRUNCATED},
        {270: "ImageJ=1.11a\nunit=mm\n"},
        {270: "ImageJ=1.11a\nimages=" + "9" * 5000},
        {270: "images=3"},
        {32997: 1},
    ],
)
def test_one_plane_is_one_picture_whatever_its_description(tmp_path, tags):
    save_planes(tmp_path / "one.tif", 1, tags)
    assert np.array_equal(images.read_image(tmp_path / "one.tif"), np.full((20, 32, 3), (7, 8, 9)))


def test_the_pixels_may_be_more_than_the_header(tmp_path):
    image = np.random.default_rng(7).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "large.tif")
    assert (tmp_path / "large.tif").stat().st_size > images.MAX_HEADER_BYTES
    np.testing.assert_array_equal(images.read_image(tmp_path / "large.tif"), image)


def test_stderr_is_silent_while_any_thread_needs_it_and_no_longer(capfd):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with images._STDERR_SILENCED:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with images._STDERR_SILENCED:
        thread.start()
        inside.wait()
    os.write(2, b"swallowed\n")  # the other thread is still inside
    leave.set()
    thread.join()
    os.write(2, b"shown\n")
    assert capfd.readouterr().err == "shown\n"


def test_a_volume_is_a_folder(tmp_path):
    for name in ("p/2.tif", "p/10.TIF", "p/10_mask.tif", "p/notes.txt", "q/1.png", "q/deeper/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    volumes = find_volumes([tmp_path / "p", tmp_path / "q" / "1.png", tmp_path / "p" / "2.tif"])
    assert [[str(file.relative_to(tmp_path)) for file in files] for files in volumes] == [
        ["p/2.tif", "p/10.TIF"],
        ["q/1.png"],
    ]


def test_what_is_no_image_is_passed_over_in_a_folder(tmp_path):
    """Masks, what predict.py wrote before, also of several classes, and the hidden files of a Mac."""
    found = ["X_3.tif", "mask_1.png", "overlay.png", "X_masked.png"]
    others = ["X_3_mask.tif", "X_3_MASK.PNG", "X_3_overlay.png", "X_3_mask2.png", "X_3_overlay2.png", "._X_3.tif"]
    for name in [*found, *others, ".hidden.png"]:
        (tmp_path / name).touch()
    (files,) = find_volumes([tmp_path])
    assert {file.name for file in files} == set(found)
    assert "masks and overlays left out" in refusal(find_volumes, [tmp_path / "X_3_overlay.png"])
