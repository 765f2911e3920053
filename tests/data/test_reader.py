"""The reader of the Kaggle layout: what it reads, in which order, and that whatever is wrong is named in one line."""

import dataclasses
import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minunet.base.errors import UserError
from minunet.data import images, reader
from minunet.data.slices import LGG, Words
from tests.data.cases import refusal, tiff_by_hand


def write_pair(folder, stem, number, *, size=(8, 8), seed=0, mask=None):
    """One random image and mask in ``folder``; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng([seed, number])
    image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = random.integers(0, 2, size, dtype=np.uint8) * np.uint8(255) if mask is None else mask
    Image.fromarray(image).save(folder / f"{stem}_{number}.tif")
    Image.fromarray(mask).save(folder / f"{stem}_{number}_mask.tif")
    return image, mask


@pytest.fixture
def data(tmp_path):
    """Two patients of three slices, whose numbers do not sort as strings."""
    for seed, name in enumerate(("TCGA_CS_1_19960909", "TCGA_DU_2_20010203")):
        for number in (2, 9, 10):
            write_pair(tmp_path / name, name, number, seed=seed)
    return tmp_path


def first_image(data):
    return data / "TCGA_CS_1_19960909" / "TCGA_CS_1_19960909_2.tif"


def first_mask(data):
    return data / "TCGA_CS_1_19960909" / "TCGA_CS_1_19960909_2_mask.tif"


# ------------------------------------------------------------------------------------------ what is read


def test_slices_are_read_pixel_for_pixel_by_number_and_patient(data):
    slices = reader.read_folder(data, size=8)
    assert slices.patients == ("TCGA_CS_1",) * 3 + ("TCGA_DU_2",) * 3
    assert slices.numbers == (2, 9, 10) * 2
    assert slices.files[0] == str(first_image(data))
    assert slices.skipped == ()
    for i, (file, number) in enumerate(zip(slices.files, slices.numbers, strict=True)):
        random = np.random.default_rng([i // 3, number])
        np.testing.assert_array_equal(slices.images[i], random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        np.testing.assert_array_equal(slices.masks[i, ..., 0], random.integers(0, 2, (8, 8), dtype=np.uint8))
        assert Path(file).exists()


def test_the_folder_may_hold_kaggle_3m(data, tmp_path_factory):
    outer = tmp_path_factory.mktemp("download")
    data.rename(outer / "kaggle_3m")
    (outer / "lgg-mri-segmentation").mkdir()  # the Kaggle archive holds everything a second time under this name
    (outer / "kaggle_3m" / "data.csv").write_text("Patient\n")
    assert len(reader.read_folder(outer, size=8)) == 6
    assert len(reader.read_folder(str(outer / "kaggle_3m"), size=8)) == 6


def test_limit_and_patients(data):
    assert reader.read_folder(data, size=8, limit=4).numbers == (2, 9, 10, 2)
    assert reader.read_folder(data, size=8, limit=100).numbers == (2, 9, 10) * 2
    assert reader.read_folder(data, size=8, patients=["TCGA_DU_2"]).patient_names() == ("TCGA_DU_2",)
    assert "no folder of patient anna, ben" in refusal(
        reader.read_folder, data, 8, patients=["ben", "TCGA_DU_2", "anna"]
    )


def test_names_of_people_with_spaces_letters_dashes_and_newlines(tmp_path):
    names = ("-rf", "anna & ben", "größe", "new\nline", "x" * 240)
    for name in names:
        write_pair(tmp_path / name, name, 1)
    assert reader.read_folder(tmp_path, size=8).patients == tuple(sorted(names))


def test_a_path_too_long_for_the_system(data):
    message = refusal(reader.read_folder, data / ("x" * 300), 8)
    assert message.endswith(f"cannot be listed ({os.strerror(errno.ENAMETOOLONG)}); check its permissions")


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="file names are text there")
def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"ren\xe9")
    write_pair(tmp_path / name, name, 1)
    slices = reader.read_folder(tmp_path, size=8)
    assert slices.patients == (r"ren\udce9",)
    assert Path(slices.files[0]).exists()
    Path(slices.files[0]).write_bytes(b"broken")
    assert r"ren\udce9_1.tif: cannot be read" in refusal(reader.read_folder, tmp_path, 8)


def test_hidden_files_and_other_files_are_passed_over(data):
    (first_image(data).parent / "._TCGA_CS_1_19960909_2.tif").write_bytes(b"resource fork")
    (first_image(data).parent / "notes.txt").write_text("notes")
    (data / ".cache").mkdir()
    (data / "README.md").write_text("read me")
    (data / "empty_patient").mkdir()
    assert len(reader.read_folder(data, size=8)) == 6


@pytest.mark.parametrize("values", [(0, 255), (0, 1), (0,), (1,), (255,)])
def test_binary_masks_of_any_kind(tmp_path, values):
    mask = np.random.default_rng(0).choice(np.array(values, np.uint8), (8, 8))
    write_pair(tmp_path / "anna", "anna", 1, mask=mask)
    np.testing.assert_array_equal(reader.read_folder(tmp_path, size=8).masks[0, ..., 0], mask > 0)


def test_a_one_bit_mask(data):
    expected = np.random.default_rng(1).integers(0, 2, (8, 8)).astype(bool)
    Image.fromarray(expected).save(first_mask(data))
    np.testing.assert_array_equal(reader.read_folder(data, size=8).masks[0, ..., 0], expected)


# ------------------------------------------------------------------------------------------ resizing


def test_both_are_resized_on_reading(tmp_path):
    image, mask = write_pair(tmp_path / "anna", "anna", 1, size=(12, 12))
    slices = reader.read_folder(tmp_path, size=6)
    np.testing.assert_array_equal(slices.images[0], images.resize_image(image, 6, 6))
    np.testing.assert_array_equal(slices.masks[0, ..., 0], images.resize_mask(mask // 255, 6, 6))
    assert slices.extents is None


# ------------------------------------------------------------------------------------------ what is wrong with files


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("RGBA", "RGB with transparency, expected grey or RGB"),
        ("LA", "grey with transparency, expected grey or RGB"),
        ("P", "palette colours, expected grey or RGB"),
        ("CMYK", "mode CMYK, expected grey or RGB"),
        ("1", "1 bit, expected grey or RGB"),
        ("F", "32 bits a channel, expected 8"),
    ],
)
def test_images_of_other_modes_are_refused(data, mode, expected):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).convert(mode).save(first_image(data))
    with pytest.raises(UserError, match=expected) as found:
        reader.read_folder(data, size=8)
    assert str(found.value).startswith(str(first_image(data)))


@pytest.mark.parametrize(("mode", "expected"), [("RGB", "RGB"), ("P", "palette colours"), ("LA", "grey with")])
def test_masks_of_several_channels_are_refused(data, mode, expected):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).convert("L").convert(mode).save(first_mask(data))
    message = refusal(reader.read_folder, data, 8)
    assert message.startswith(f"{first_mask(data)}: {expected}")
    assert "expected a mask of one channel" in message


def test_a_mask_that_is_not_binary_lists_its_values(data):
    Image.fromarray(np.array([[0, 3, 255, 7]] * 4, np.uint8)).save(first_mask(data))
    message = refusal(reader.read_folder, data, 8)
    assert message.startswith(f"{first_mask(data)}: a mask with the values 0, 3, 7, 255; expected 0 and 255")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(first_mask(data))
    assert "the values 0, 1, 2, 3, 4, 5, 6, 7, ...;" in refusal(reader.read_folder, data, 8)


def test_sizes_that_differ_name_both_files(data):
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(first_mask(data))
    message = refusal(reader.read_folder, data, 8)
    assert message.startswith(f"{first_image(data)}: 8 x 8 pixels, but its mask {first_mask(data)} has 9 x 8 pixels")


def test_slices_of_a_patient_that_differ_in_size(data):
    folder = first_image(data).parent
    write_pair(folder, folder.name, 9, size=(10, 10))
    message = refusal(reader.read_folder, data, 8)
    assert "_9.tif: 10 x 10 pixels, but " in message
    assert "of the same patient has 8 x 8 pixels" in message
    # Another patient may have another size: all are resized to one.
    for number in (2, 10):
        write_pair(folder, folder.name, number, size=(10, 10))
    assert reader.read_folder(data, size=8).images.shape == (6, 8, 8, 3)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a readable TIFF picture"),
        (b"this is a text\n", "not a readable TIFF picture"),
        (b"<!DOCTYPE html><html></html>", "not a readable TIFF picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not a readable TIFF picture"),
        (b"II*\0\xff\xff\xff\x7f" + bytes(40), "cannot be read"),
    ],
)
def test_other_content_under_the_name_of_a_tiff(data, content, expected):
    first_image(data).write_bytes(content)
    message = refusal(reader.read_folder, data, 8)
    assert message.startswith(f"{first_image(data)}: cannot be read")
    assert expected in message


def test_a_file_cut_short_anywhere_is_named(data):
    whole = first_image(data).read_bytes()
    for length in range(0, len(whole), 7):
        first_image(data).write_bytes(whole[:length])
        assert refusal(reader.read_folder, data, 8, limit=1).startswith(str(first_image(data)))


def test_several_pictures_in_one_file(data):
    pages = [Image.fromarray(np.zeros((8, 8, 3), np.uint8)) for _ in range(2)]
    pages[0].save(first_image(data), save_all=True, append_images=pages[1:])
    assert "more than one picture in the file" in refusal(reader.read_folder, data, 8)


@pytest.mark.parametrize("size", [(8193, 8192), (10000, 9500), (15000, 15000), (65535, 65535)])
def test_a_header_that_claims_too_many_pixels_is_refused(data, size):
    # Above 89 million pixels Pillow itself warns, above 179 million it raises; the ceiling is below both.
    first_image(data).write_bytes(tiff_by_hand(*size, bits=8))
    message = refusal(reader.read_folder, data, 8)
    assert message.startswith(str(first_image(data)))
    assert "the ceiling of 67108864" in message


def test_a_file_larger_than_any_such_image_is_not_opened(data):
    with first_image(data).open("r+b") as file:
        file.truncate(6 * images.MAX_PIXELS + 1)  # holds no data: takes no room on the disk
    message = refusal(reader.read_folder, data, 8)
    assert message == f"{first_image(data)}: 402653185 bytes, above the ceiling of 402653184; make it smaller"


def test_a_header_larger_than_any_is_refused_before_it_is_read_to_its_end(data, monkeypatch):
    monkeypatch.setattr(images._Reader, "allowance", 100)
    message = refusal(reader.read_folder, data, 8, limit=1)
    assert message.startswith(f"{data}: 2 faults: {first_image(data)}: a header of more than ")
    monkeypatch.setattr(images._Reader, "allowance", 10_000)
    assert len(reader.read_folder(data, size=8)) == 6


def test_damaged_compressed_files_leave_stderr_to_us(data, capfd):
    # libtiff prints to the process's own stderr; what Python and others print there must still get through.
    picture = Image.open(first_image(data))
    for compression in ("tiff_adobe_deflate", "tiff_lzw", "jpeg"):
        picture.save(first_image(data), compression=compression)
        content = bytearray(first_image(data).read_bytes())
        content[8:60] = bytes(52)  # libtiff puts the pixels first, and the directory last
        first_image(data).write_bytes(content)
        assert "decoder error" in refusal(reader.read_folder, data, 8)
    picture.close()
    os.write(2, b"still there\n")
    assert capfd.readouterr().err == "still there\n"


def test_compressed_files_are_read_without_a_stderr(data):
    with Image.open(first_image(data)) as picture:
        picture.load()
    picture.save(first_image(data), compression="tiff_lzw")
    # The first file that is opened then has the number of stderr.
    script = "import sys; from minunet.data import reader; print(len(reader.read_folder(sys.argv[1], 8)))"
    command = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-c", script, str(data)]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout == "6\n"


def test_a_pipe_under_the_name_of_a_tiff_does_not_hang(data):
    first_image(data).unlink()
    os.mkfifo(first_image(data))
    assert refusal(reader.read_folder, data, 8) == (
        f"{first_image(data)}: cannot be read (not a regular file); replace or remove it"
    )


def test_links_that_lead_nowhere_or_in_circles_or_to_a_device(data):
    for target, expected in (
        (data / "absent", "no such file"),
        (first_image(data), "symbolic link"),
        ("/dev/zero", "regular"),
    ):
        first_image(data).unlink()
        first_image(data).symlink_to(target)
        message = refusal(reader.read_folder, data, 8)
        assert message.startswith(str(first_image(data)))
        assert expected in message


def test_a_warning_of_pillow_neither_shows_nor_hides_the_file(data):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        reader.read_folder(data, size=8)
        first_image(data).write_bytes(first_image(data).read_bytes()[:60])
        refusal(reader.read_folder, data, 8)
    assert not seen


# ------------------------------------------------------------------------------------------ what is wrong with a folder


def test_missing_partners_are_listed_or_left_out(data):
    first_mask(data).unlink()
    other = data / "TCGA_DU_2_20010203" / "TCGA_DU_2_20010203_10.tif"
    other.unlink()
    message = refusal(reader.read_folder, data, 8)
    assert message.startswith(f"{data}: 2 faults: ")
    assert f"{first_image(data)}: no mask {first_mask(data).name} beside it" in message
    assert f"{other.with_name(other.stem + '_mask.tif')}: no image {other.name} beside it" in message
    slices = reader.read_folder(data, size=8, allow_missing=True)
    assert slices.numbers == (9, 10, 2, 9)
    assert slices.skipped == (str(first_image(data)), str(other.with_name(other.stem + "_mask.tif")))


@pytest.mark.parametrize("name", ["SOMEBODY_ELSE_2_mask.tif", "TCGA_CS_1_19960909_02_mask.tif", "2_2_mask.tif"])
def test_the_mask_of_another_name_is_not_taken_for_its_number(data, name):
    mask = first_mask(data)
    mask.rename(mask.with_name(name))
    message = refusal(reader.read_folder, data, 8)
    assert message.startswith(f"{data}: 2 faults: {first_image(data)}: no mask {mask.name} beside it; ")
    assert f"{mask.with_name(name)}: no image {name.replace('_mask', '')} beside it; " in message
    assert reader.read_folder(data, size=8, allow_missing=True).numbers == (9, 10, 2, 9, 10)


def test_the_endings_of_an_image_and_its_mask_may_differ(data):
    mask = first_mask(data)
    mask.rename(mask.with_name(f"{mask.stem[: -len('_mask')]}_MASK.TIFF"))
    assert reader.read_folder(data, size=8).numbers == (2, 9, 10) * 2


def test_all_faults_are_counted_and_twenty_shown(tmp_path):
    for number in range(1, 31):
        write_pair(tmp_path / "anna", "anna", number)
        (tmp_path / "anna" / f"anna_{number}.tif").write_bytes(b"broken")
    (tmp_path / "anna" / "anna_7_mask.tif").unlink()
    message = refusal(reader.read_folder, tmp_path, 8)
    assert message.startswith(f"{tmp_path}: 30 faults: ")
    assert message.endswith("; and 10 more")
    assert message.count("anna/anna_") == 20


def test_image_and_mask_broken_are_two_faults(data):
    first_image(data).write_bytes(b"broken")
    first_mask(data).write_bytes(b"broken")
    assert refusal(reader.read_folder, data, 8).startswith(f"{data}: 2 faults: ")


def test_a_folder_that_is_absent_a_file_or_empty(tmp_path):
    assert refusal(reader.read_folder, tmp_path / "absent", 8).startswith(f"{tmp_path / 'absent'}: no such folder")
    (tmp_path / "file").write_text("")
    assert refusal(reader.read_folder, tmp_path / "file", 8).startswith(f"{tmp_path / 'file'}: not a folder")
    (tmp_path / "empty").mkdir()
    message = refusal(reader.read_folder, tmp_path / "empty", 8)
    assert message.startswith(
        f"{tmp_path / 'empty'}: no pair of image and mask found in an empty folder; expected NAME"
    )
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert "cannot be listed" in refusal(reader.read_folder, tmp_path / "circle", 8)


def test_a_patients_folder_that_cannot_be_listed(data, monkeypatch):
    def iterdir(path, real=Path.iterdir):
        if path.name == "TCGA_DU_2_20010203":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    expected = f"{data / 'TCGA_DU_2_20010203'}: cannot be listed (Permission denied); check its permissions"
    assert refusal(reader.read_folder, data, 8) == expected


def test_two_folders_of_one_patient_would_leak(data):
    (data / "TCGA_CS_1_19970101").mkdir()
    message = refusal(reader.read_folder, data, 8)
    assert "TCGA_CS_1_19970101: the same patient as TCGA_CS_1_19960909" in message


def test_where_two_names_have_one_number_the_slices_are_counted(data):
    folder = first_image(data).parent
    write_pair(folder, folder.name + "_0", 9)
    slices = reader.read_folder(data, size=8)
    assert slices.numbers == (1, 2, 3, 4, 2, 9, 10)
    assert [Path(file).stem.removeprefix(folder.name) for file in slices.files[:4]] == ["_0_9", "_2", "_9", "_10"]


def test_one_name_with_two_endings(data):
    path = first_image(data)
    Image.open(path).save(path.with_suffix(".png"))
    message = refusal(reader.read_folder, data, 8)
    assert message.endswith(f"{path}: the same name as {path.stem}.png but for the end; keep one of them")


def test_a_file_name_with_a_newline_stays_in_one_line(tmp_path):
    write_pair(tmp_path / "an\nna", "an\nna", 1)
    (tmp_path / "an\nna" / "an\nna_1.tif").write_bytes(b"broken")
    assert r"an\nna_1.tif" in refusal(reader.read_folder, tmp_path, 8)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"size": 8, "limit": 0}])
def test_arguments_out_of_range(data, arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        reader.read_folder(data, **arguments)


# ------------------------------------------------------------------------------------------ data of one's own


def write_image(path, size=(6, 6), channels=0, deep=False, mode=None, seed=0):
    """A random image at ``path``; returns it as (H, W, C)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = np.uint16 if deep else np.uint8
    shape = (*size, channels) if channels else size
    image = np.random.default_rng([seed, *path.name.encode()]).integers(0, np.iinfo(kind).max, shape, dtype=kind)
    Image.fromarray(image).save(path)
    return image.reshape(*size, -1)


def write_mask(path, size=(6, 6), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.random.default_rng([seed, *path.name.encode()]).integers(0, 2, size, dtype=np.uint8)
    Image.fromarray(mask * np.uint8(255)).save(path)
    return mask


def names_of(slices):
    return [Path(file).name for file in slices.files]


@pytest.mark.parametrize(("channels", "deep"), [(0, False), (0, True), (3, False)])
def test_images_come_with_the_channels_and_bits_of_their_files(tmp_path, channels, deep):
    image = write_image(tmp_path / "a" / "x.png", channels=channels, deep=deep)
    mask = write_mask(tmp_path / "a" / "x_mask.png")
    slices = reader.read_folder(tmp_path, 6)
    assert slices.images.dtype == image.dtype
    np.testing.assert_array_equal(slices.images[0], image)
    np.testing.assert_array_equal(slices.masks[0, ..., 0], mask)
    inverted = reader.read_folder(tmp_path, 6, invert_masks=True)
    np.testing.assert_array_equal(inverted.masks, 1 - slices.masks)


def test_images_of_one_set_are_of_one_kind(tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.png")
        write_mask(tmp_path / f"{name}_mask.png")
    write_image(tmp_path / "a.png", channels=3)  # the first is the one that differs from most
    for size in (6, None):
        message = refusal(reader.read_folder, tmp_path, size)
        other = f"{tmp_path / 'b.png'} has grey of 8 bits"
        assert message == f"{tmp_path / 'a.png'}: RGB of 8 bits, but {other}; make them alike"
    write_image(tmp_path / "a.png", deep=True)
    assert "a.png: grey of 16 bits, but " in refusal(reader.read_folder, tmp_path, 6)


def test_a_flat_folder_of_any_names(tmp_path):
    for name in ("img10.png", "img2.jpg", "img1.tif", "img1b.PNG"):
        write_image(tmp_path / name)
        write_mask(tmp_path / f"{Path(name).stem}_mask.png")
    slices = reader.read_folder(tmp_path, 6)
    assert names_of(slices) == ["img1.tif", "img1b.PNG", "img2.jpg", "img10.png"]
    assert slices.patients == ("img1", "img1b", "img2", "img10")  # each a group of its own
    assert slices.numbers == (1, 2, 3, 4)
    assert slices.words == Words()
    (tmp_path / "img1b.PNG").unlink()
    (tmp_path / "img1b_mask.png").unlink()
    assert reader.read_folder(tmp_path, 6).numbers == (1, 2, 10)
    assert reader.read_folder(tmp_path, 6, patients=["img10"]).patients == ("img10",)
    assert "no folder of patient anna" in refusal(reader.read_folder, tmp_path, 6, patients=["anna"])


@pytest.mark.parametrize("root", ["", "anna", "ben"])
def test_two_folders_given_by_name(tmp_path, root):
    for number in (0, 2, 10):
        write_image(tmp_path / root / "image" / f"{number}.png")
        write_mask(tmp_path / root / "the labels" / f"{number}.tif")
    write_image(tmp_path / root / "others" / "3.png")
    slices = reader.read_folder(tmp_path, 6, folders=("image", "the labels"))
    assert names_of(slices) == ["0.png", "2.png", "10.png"]
    assert slices.numbers == (0, 2, 10)
    assert slices.patients == ((root,) * 3 if root else ("0", "2", "10"))
    (tmp_path / root / "the labels" / "2.tif").unlink()
    (tmp_path / root / "image" / "10.png").unlink()
    message = refusal(reader.read_folder, tmp_path, 6, folders=("image", "the labels"))
    assert "image/2.png: no mask 2 in the labels; add it" in message
    assert "the labels/10.tif: no image 10 in image; add it" in message


def test_where_nothing_pairs_it_is_said_what_lies_there(tmp_path):
    for number in range(3):
        write_image(tmp_path / "image" / f"{number}.png")
        write_mask(tmp_path / "label" / f"{number}.png")
    (tmp_path / "README").touch()
    found = "no pair of image and mask found among 7 files (6 .png, 1 without ending), such as image/0.png and "
    message = refusal(reader.read_folder, tmp_path, 6)
    assert message.startswith(f"{tmp_path}: {found}label/2.png; expected NAME.png and NAME_mask.png ")
    assert "--folders IMAGES MASKS" in message
    message = refusal(reader.read_folder, tmp_path, 6, folders=("image", "masks"), allow_missing=True)
    assert message == f"{tmp_path}: {found}label/2.png; expected equal names in two folders image and masks (--folders)"


@pytest.mark.skipif(os.name != "posix", reason="links as POSIX has them")
def test_a_group_that_would_vanish_is_a_fault(data):
    """Its pictures lie one folder deeper; it is a link that leads nowhere. A folder of notes is nobody's group."""
    deeper = data / "deeper_20010203" / "slices"
    deeper.mkdir(parents=True)
    (data / "notes").mkdir()
    (data / "notes" / "read.me").touch()
    Image.new("RGB", (4, 4)).save(deeper / "a_1.tif")
    (data / "gone_20010203").symlink_to("nowhere")
    found = reader.list_folder(data).faults
    assert found == [
        f"{data / 'gone_20010203'}: a link that leads nowhere, mend or remove it",
        f"{data / 'deeper_20010203'}: holds pictures, but no image and mask where they are expected; put that right or "
        "move it",
    ]


def test_an_image_beside_the_folders_of_groups_is_not_passed_over(tmp_path):
    for name in ("anna/a", "loose"):
        write_image(tmp_path / f"{name}.png")
        write_mask(tmp_path / f"{name}_mask.png")
    message = refusal(reader.read_folder, tmp_path, 6)
    assert message == (
        f"{tmp_path / 'loose.png'}: an image with its mask beside the folders of groups; "
        "move it into the folder of its group"
    )


@pytest.mark.parametrize(
    ("folder", "words"),
    [("kaggle_3m/anna", LGG), ("TCGA_CS_1_19960909", LGG), ("PHANTOM_00_0001_20260101", LGG), ("anna", Words())],
)
def test_a_data_set_has_its_own_words(tmp_path, folder, words):
    write_pair(tmp_path / folder, "a", 1)
    assert reader.read_folder(tmp_path, 8).words == words
    assert reader.read_folder(tmp_path, 8, target_name="road").words == dataclasses.replace(words, target="road")


def test_images_of_several_sizes_keep_their_ratio(tmp_path):
    sizes = {"a": (6, 12), "b": (12, 12), "c": (9, 3)}
    for name, size in sizes.items():
        write_image(tmp_path / "g" / f"{name}.png", size, channels=3)
        write_mask(tmp_path / "g" / f"{name}_mask.png", size)
    slices = reader.read_folder(tmp_path, 12)
    assert slices.extents.tolist() == [[6, 12], [12, 12], [12, 4]]
    for i, (name, size) in enumerate(sizes.items()):
        rows, columns = slices.extents[i]
        image, mask = (
            images.read_image(tmp_path / "g" / f"{name}.png"),
            images.read_mask(tmp_path / "g" / f"{name}_mask.png"),
        )
        assert image.shape[:2] == size
        np.testing.assert_array_equal(slices.images[i, :rows, :columns], images.resize_image(image, rows, columns))
        np.testing.assert_array_equal(slices.masks[i, :rows, :columns, 0], images.resize_mask(mask, rows, columns))
        assert (slices.images[i, rows:] == slices.images[i, rows - 1]).all()
        assert (slices.images[i, :, columns:] == slices.images[i, :, columns - 1 : columns]).all()
        assert not slices.masks[i, rows:].any()
        assert not slices.masks[i, :, columns:].any()


def test_images_at_their_own_size(tmp_path):
    sizes = {"a": (6, 12), "b": (11, 5)}
    for name, size in sizes.items():
        write_image(tmp_path / f"{name}.png", size, deep=True)
        write_mask(tmp_path / f"{name}_mask.png", size)
    slices = reader.read_folder(tmp_path, None)
    assert slices.images.shape == (2, 11, 12, 1)
    assert slices.images.dtype == np.uint16
    assert slices.extents.tolist() == [[6, 12], [11, 5]]
    for i, name in enumerate(sizes):
        own = slices.extent(i)
        np.testing.assert_array_equal(slices.images[i][own], images.read_image(tmp_path / f"{name}.png"))
        np.testing.assert_array_equal(slices.masks[i][own][..., 0], images.read_mask(tmp_path / f"{name}_mask.png"))
    (tmp_path / "b.png").write_bytes(b"broken")
    assert "b.png: cannot be read" in refusal(reader.read_folder, tmp_path, None)


# ------------------------------------------------------------------------------------------ the real data


@pytest.mark.skipif("MINUNET_LGG" not in os.environ, reason="MINUNET_LGG does not name a kaggle_3m folder")
def test_lgg_mri():
    folder = os.environ["MINUNET_LGG"]
    names = ["TCGA_CS_4941", "TCGA_DU_5849"]
    slices = reader.read_folder(folder, size=256, patients=names)
    assert slices.patient_names() == tuple(names)
    assert slices.numbers == tuple(range(1, 24)) + tuple(range(1, len(slices) - 22))
    assert 0.001 < slices.masks.mean() < 0.05
    assert slices.images.shape[1:] == (256, 256, 3)
    with Image.open(slices.files[-1]) as image:
        np.testing.assert_array_equal(slices.images[-1], np.asarray(image))
