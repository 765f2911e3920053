"""The verifier: its figures, every fault and warning, the manifest, and the command as people run it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minunet.base import cli, durable
from minunet.base.errors import UserError
from minunet.data import manifest, phantom, reader, verify
from minunet.data.slices import LGG, SliceSet, Words
from tests.data import test_reader
from tests.data.cases import refusal, tiff_by_hand

ROOT = Path(__file__).resolve().parents[2]
POSIX = pytest.mark.skipif(os.name != "posix", reason="names and files as POSIX has them")


def write_pair(folder, stem, number, *, size=(8, 8), seed=0, mask=None):
    """A random image, and a mask with tumour in about an eighth of it."""
    if mask is None:
        mask = np.random.default_rng([seed, number]).choice(np.array([255] + 7 * [0], np.uint8), size)
        mask[0, 0] = 255
    test_reader.write_pair(folder, stem, number, size=size, seed=seed, mask=mask)


@pytest.fixture
def data(tmp_path):
    """Three patients of three random slices."""
    folder = tmp_path / "data"
    for seed, name in enumerate(("anna", "ben", "carl")):
        for number in (1, 2, 3):
            write_pair(folder / name, name, number, seed=seed)
    return folder


def slice_set(images, masks=None, patients=None, words=LGG):
    """A SliceSet of ``images``; by default each patient has one slice, half of it tumour."""
    images = np.asarray(images, np.uint8)
    if masks is None:
        masks = np.zeros((*images.shape[:3], 1), np.uint8)
        masks[:, ::2] = 1
    patients = tuple(patients or (f"p{i:02d}" for i in range(len(images))))
    numbers = tuple(range(1, len(images) + 1))
    files = tuple(f"{p}/{p}.tif" for p in patients)
    return SliceSet(images, np.asarray(masks, np.uint8), patients, numbers, files, words=words)


def random_images(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def warnings_of(report):
    """What the report warns of, but for too few groups, which each of these small sets has."""
    return [str(remark) for remark in report.warnings if "too few" not in remark.found]


# ------------------------------------------------------------------------------------------ figures


def test_the_figures_are_those_of_the_files(data):
    write_pair(data / "dora", "dora", 1, size=(4, 6), mask=np.zeros((4, 6), np.uint8))
    report = verify.inspect_folder(data)
    masks = {name: reader.read_folder(data, 8, patients=[name]).masks for name in ("anna", "ben", "carl")}
    pixels = sum(int(mask.sum()) for mask in masks.values())
    assert (report.patients, report.slices) == (4, 10)
    assert report.sizes == {"8 x 8": 9, "6 x 4": 1}
    assert report.tumour_slices == 9
    assert report.tumour_share == pixels / (9 * 64 + 24)
    shares = sorted([0.0, *(float(mask.mean()) for mask in masks.values())])
    assert report.tumour_share_by_patient == pytest.approx((shares[0], (shares[1] + shares[2]) / 2, shares[3]))
    assert report.patients_without_tumour == 1
    assert report.faults == ()
    text = str(report).splitlines()
    assert text[0] == "data: 4 groups, 10 images, 9 of 8 x 8, 1 of 6 x 4 pixels"
    assert text[1].startswith("data: foreground on 9 images (90.0%), ")
    assert text[1].endswith(", none in 1 group")
    named = verify.inspect_folder(data, target_name="road")
    assert str(named).splitlines()[1].startswith("data: road on 9 images (90.0%), ")
    data.rename(data.with_name("kaggle_3m"))
    text = str(verify.inspect_folder(data.with_name("kaggle_3m"))).splitlines()
    assert text[0] == "data: 4 patients, 10 slices, 9 of 8 x 8, 1 of 6 x 4 pixels"
    assert text[1].startswith("data: tumour on 9 slices (90.0%), ")
    assert text[1].endswith(", none in 1 patient")


def test_what_has_been_read_gives_the_same_report_as_the_files(data):
    write_pair(data / "anna", "anna", 7)
    shutil.copy(data / "anna" / "anna_1.tif", data / "ben" / "ben_2.tif")
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(data / "carl" / "carl_1.tif")
    (data / "carl" / "carl_3_mask.tif").unlink()
    of_files = verify.inspect_folder(data, allow_missing=True)
    of_slices = verify.inspect(reader.read_folder(data, 8, allow_missing=True))
    assert len(warnings_of(of_files)) == 4
    assert warnings_of(of_files) == warnings_of(of_slices)
    assert dataclasses.replace(of_files, warnings=()) == dataclasses.replace(of_slices, warnings=())


def test_a_report_of_nothing():
    report = verify.summarize([], Words())
    assert str(report) == ""
    assert (report.patients, report.slices, report.patients_without_tumour) == (0, 0, 0)


# ------------------------------------------------------------------------------------------ warnings


def test_one_image_under_two_patients():
    images = random_images(5)
    images[3] = images[0]
    images[4] = images[1]
    patients = ("anna", "anna", "ben", "carl", "carl")
    (warning,) = warnings_of(verify.inspect(slice_set(images, patients=patients)))
    assert warning.startswith("2 images under two patients: anna/anna.tif = carl/carl.tif and 1 more of these two; ")
    # One value apart, or within one patient: nothing to warn of.
    images[3, 5, 5, 1] ^= 1
    images[4] = images[3]
    assert warnings_of(verify.inspect(slice_set(images, patients=patients))) == []


def test_images_of_one_grey_value():
    images = random_images(4)
    images[1], images[2] = 0, 0
    (warning,) = warnings_of(verify.inspect(slice_set(images)))  # and not that the two are equal
    assert warning.startswith("2 images of one grey value all over: p01/p01.tif, p02/p02.tif; ")
    images[1, 7, 7] = (1, 2, 3)
    (warning,) = warnings_of(verify.inspect(slice_set(images)))
    assert warning.startswith("1 image of one grey value all over: p02/p02.tif; ")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ((1, 1, 1), "pre- and post-contrast are copies of FLAIR"),
        ((1, 1, 2), "pre-contrast is a copy of FLAIR"),
        ((0, 1, 1), "post-contrast is a copy of FLAIR"),
        ((0, 1, 0), "post-contrast is a copy of pre-contrast"),
    ],
)
def test_channels_that_are_copies(source, found):
    images = random_images(6)
    patients = ("anna", "anna", "ben", "ben", "carl", "carl")
    images[2:] = images[2:, ..., source]
    images[4, 3, 3] = (1, 2, 3)  # not the whole volume; and a row that is not every eighth
    (warning,) = warnings_of(verify.inspect(slice_set(images, patients=patients)))
    assert warning.startswith(f"{found} in 1 patient: ben; ")


def test_colours_that_are_alike_are_no_copies_of_sequences():
    images = random_images(4)
    images[:] = images[..., :1]
    assert warnings_of(verify.inspect(slice_set(images, words=Words()))) == []
    assert "copies of FLAIR in 4 patients" in warnings_of(verify.inspect(slice_set(images)))[0]


def test_a_flat_folder_says_that_it_has_no_groups(tmp_path):
    for number in range(5):
        write_pair(tmp_path, "slice", number)
    expected = (
        "no group folders: each of the 5 images counts as a group of its own; "
        "neighbouring slices of one stack belong in one part of the split, see --split-file"
    )
    assert warnings_of(verify.inspect_folder(tmp_path)) == [expected]
    assert warnings_of(verify.inspect(reader.read_folder(tmp_path, 8))) == [expected]
    assert warnings_of(verify.inspect(reader.read_folder(tmp_path, 8), grouped=True)) == []
    (tmp_path / "group").mkdir()
    for path in tmp_path.glob("*.tif"):
        path.rename(tmp_path / "group" / path.name)
    assert warnings_of(verify.inspect_folder(tmp_path)) == []


def test_padding_counts_for_nothing(tmp_path):
    mask = np.zeros((4, 8), np.uint8)
    mask[:2] = 255  # a half of the image, a quarter of its square
    for number in (1, 2, 3):
        write_pair(tmp_path / f"g{number}", "a", number, size=(4, 8), mask=mask)
    report = verify.inspect(reader.read_folder(tmp_path, 8))
    assert report.tumour_share == 0.5
    assert report.sizes == {"8 x 4": 3}


def test_no_tumour_and_too_much_of_it():
    images = random_images(2)
    report = verify.inspect(slice_set(images, np.zeros((2, 8, 8, 1))))
    assert warnings_of(report)[0].startswith("no mask shows any tumour; ")
    assert report.patients_without_tumour == 2
    masks = np.ones((2, 8, 8, 1))
    (warning,) = warnings_of(verify.inspect(slice_set(images, masks)))
    assert warning == (
        "more than half of the pixels are tumour on 2 of 2 slices; "
        "check the masks; --invert-masks swaps 0 and 1 in all of them"
    )
    masks[:, 4:] = 0  # a half is much, and possible
    assert warnings_of(verify.inspect(slice_set(images, masks))) == []


def test_inverted_masks_are_named_by_patient_and_by_slice():
    """Of ten patients, all of the second's masks are inverted, and one of the fifth's: the whole set looks sound."""
    patients = [f"p{number:02d}" for number in range(10) for _ in range(4)]
    masks = np.zeros((40, 8, 8, 1))
    masks[:, :2, :3] = 1
    masks[[*range(8, 12), 21]] = 1 - masks[[*range(8, 12), 21]]
    report = verify.inspect(slice_set(random_images(40), masks, patients))
    assert report.tumour_share < 0.5
    assert warnings_of(report) == [
        f"more than half of the pixels are tumour {where}; check that these masks are not inverted"
        for where in ("in 1 patient: p02", "on 1 slice: p05/p05.tif")
    ]


def test_gaps_in_the_numbers(tmp_path):
    for number in (2, 3, 5, 9, 11, 20):  # that the first is 2 is no gap: the top of a head may have been cut off
        write_pair(tmp_path / "anna", "anna", number)
    write_pair(tmp_path / "ben", "ben", 7)
    (warning,) = warnings_of(verify.inspect_folder(tmp_path))
    assert warning.startswith("image numbers are left out in 1 group: anna 4, 6 to 8, 10, ...; ")


def test_too_few_groups(tmp_path):
    for number in range(3):
        write_pair(tmp_path / f"p{number}", "p", 1, seed=number)
    assert verify.inspect_folder(tmp_path).warnings == ()
    shutil.rmtree(tmp_path / "p2")
    (warning,) = verify.inspect_folder(tmp_path).warnings
    assert str(warning) == "too few groups (2) for training, validation and test; add groups, 3 at least"


def test_files_without_a_partner_are_faults_or_left_out(data):
    (data / "anna" / "anna_1_mask.tif").unlink()
    (data / "ben" / "ben_1.tif").unlink()
    report = verify.inspect_folder(data)
    assert [fault.partition("; ")[0] for fault in report.faults] == [
        f"{data / 'anna' / 'anna_1.tif'}: no mask anna_1_mask.tif beside it",
        f"{data / 'ben' / 'ben_1_mask.tif'}: no image ben_1.tif beside it",
    ]
    report = verify.inspect_folder(data, allow_missing=True)
    assert report.faults == ()
    (warning,) = warnings_of(report)
    assert warning.startswith("2 files without a partner left out: ")


def test_a_warning_shows_some_names_and_keeps_all():
    report = verify.inspect(slice_set(np.zeros((30, 4, 4, 3))))
    (remark,) = [remark for remark in report.warnings if "grey" in remark.found]
    assert len(remark.names) == 30
    assert "p07/p07.tif and 22 more; " in str(remark)
    assert "p08" not in str(remark)


# ------------------------------------------------------------------------------------------ faults


def test_all_faults_are_collected(data):
    (data / "anna" / "anna_1.tif").write_bytes(b"broken")
    (data / "anna" / "anna_2_mask.tif").write_bytes(b"")
    Image.fromarray(np.full((8, 8), 3, np.uint8)).save(data / "ben" / "ben_1_mask.tif")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(data / "ben" / "ben_2.tif")
    (data / "carl" / "carl_1_mask.tif").unlink()
    (data / "carl" / "overview.tif").write_bytes(b"")
    report = verify.inspect_folder(data)
    for name in ("anna_1.tif", "anna_2_mask.tif", "ben_1_mask.tif", "ben_2.tif", "carl_1.tif", "overview.tif"):
        assert sum(name in fault.partition(": ")[0] for fault in report.faults) == 1, name
    assert len(report.faults) == 6
    assert (report.patients, report.slices) == (3, 4)  # the figures are of those that could be read
    assert warnings_of(report) == []  # and those that could not are no gaps


def test_twenty_faults_are_shown(tmp_path):
    for number in range(1, 31):
        write_pair(tmp_path / "anna", "anna", number)
        (tmp_path / "anna" / f"anna_{number}.tif").write_bytes(b"broken")
    report = verify.inspect_folder(tmp_path)
    assert len(report.faults) == 30
    lines = [line for line in str(report).splitlines() if line.startswith("fault: ")]
    assert len(lines) == 21
    assert lines[-1] == "fault: and 10 more"


def test_an_empty_folder_is_a_fault(tmp_path):
    (fault,) = verify.inspect_folder(tmp_path).faults
    assert fault.startswith(f"{tmp_path}: no pair of image and mask found in an empty folder; expected NAME")


# ------------------------------------------------------------------------------------------ the manifest


def write(data, path):
    manifest.write_manifest(path, manifest.digests(reader.list_folder(data)))


def faults(data, path):
    return list(verify.inspect_folder(data, manifest=path).faults)


def test_a_manifest_names_what_changed_what_is_missing_and_what_is_new(data, tmp_path):
    path = tmp_path / "m.sha256"
    write(data, path)
    assert faults(data, path) == []
    Image.fromarray(random_images(1)[0]).save(data / "anna" / "anna_1.tif")
    for name in ("ben_3.tif", "ben_3_mask.tif"):
        (data / "ben" / name).unlink()
    write_pair(data / "dora", "dora", 1)
    (data / "README.txt").write_text("no picture: not in the manifest")
    assert faults(data, path) == [
        "anna/anna_1.tif: changed since the manifest was written; restore it",
        "ben/ben_3.tif: in the manifest, but not there; restore it",
        "ben/ben_3_mask.tif: in the manifest, but not there; restore it",
        "dora/dora_1.tif: not in the manifest; remove it, or write a new manifest",
        "dora/dora_1_mask.tif: not in the manifest; remove it, or write a new manifest",
    ]


@given(st.integers(0, 2**32 - 1))
def test_any_flipped_bit_is_found(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("rot")
    write_pair(folder / "data" / "anna", "anna", 1)
    write(folder / "data", folder / "m")
    random = np.random.default_rng(seed)
    victim = folder / "data" / "anna" / ("anna_1.tif", "anna_1_mask.tif")[random.integers(2)]
    content = bytearray(victim.read_bytes())
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    victim.write_bytes(content)
    found = faults(folder / "data", folder / "m")
    assert f"anna/{victim.name}: changed since the manifest was written; restore it" in found
    assert all(victim.name in fault for fault in found)


def test_a_flipped_bit_in_a_pixel_is_found_by_the_manifest_alone(data, tmp_path):
    write(data, tmp_path / "m")
    victim = data / "carl" / "carl_2.tif"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 4
    victim.write_bytes(content)
    assert verify.inspect_folder(data).faults == ()
    assert faults(data, tmp_path / "m") == ["carl/carl_2.tif: changed since the manifest was written; restore it"]


@POSIX
def test_sha256sum_understands_the_manifest(data, tmp_path):
    for name in ("new\nline", "back\\slash", "größe und mehr", "-rf"):
        write_pair(data / name, name, 1)
    if sys.platform == "linux":
        write_pair(data / os.fsdecode(b"ren\xe9"), "x", 1)
    write(data, tmp_path / "m")
    assert faults(data, tmp_path / "m") == []
    assert len(manifest.read_manifest(tmp_path / "m")) == len(list(data.rglob("*.tif")))
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", tmp_path / "m"], cwd=data, check=True, timeout=60)
    # And the other way round: what it writes is a manifest.
    listed = sorted(path.relative_to(data) for path in data.rglob("*.tif"))
    made = subprocess.run(["sha256sum", "--", *listed], cwd=data, stdout=subprocess.PIPE, check=True, timeout=60)
    (tmp_path / "theirs").write_bytes(made.stdout)
    assert manifest.read_manifest(tmp_path / "theirs") == manifest.read_manifest(tmp_path / "m")


@POSIX
def test_a_manifest_and_an_image_that_become_pipes_when_they_are_opened(data, tmp_path, monkeypatch):
    write(data, tmp_path / "m")
    becoming = {tmp_path / "m", data / "anna" / "anna_1.tif"}

    def open_late(path, flags, opener=durable._open_without_waiting):
        if Path(path) in becoming and Path(path).is_file():
            Path(path).unlink()
            os.mkfifo(path)
        return opener(path, flags)

    monkeypatch.setattr(durable, "_open_without_waiting", open_late)
    found = manifest.digests(reader.list_folder(data))
    assert [name for name, digest in found.items() if digest is None] == ["anna/anna_1.tif"]
    with pytest.raises(UserError, match=r"m: cannot be read \(not a regular file\); write one with --write-manifest"):
        manifest.read_manifest(tmp_path / "m")


def test_a_manifest_with_the_line_ends_of_windows(data, tmp_path):
    write(data, tmp_path / "m")
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes().replace(b"\n", b"\r\n"))
    assert faults(data, tmp_path / "m") == []


def test_files_that_cannot_be_read_are_named_and_not_called_missing(data, tmp_path):
    write(data, tmp_path / "m")
    (data / "anna" / "anna_1.tif").unlink()
    (data / "anna" / "anna_1.tif").mkdir()
    assert faults(data, tmp_path / "m") == [
        f"{data / 'anna' / 'anna_1.tif'}: cannot be read (not a regular file); replace or remove it",
        "anna/anna_1.tif: in the manifest, but cannot be read; restore it",
    ]
    message = refusal(write, data, tmp_path / "other")
    assert message == "anna/anna_1.tif: cannot be read, so no manifest is written; replace or remove it"
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"nonsense\n", "line 1 is no line of a manifest"),
        (b"\n" + b"0" * 64 + b"  a/a_1.tif\n" + b"0" * 63 + b"  a/a_2.tif\n", "line 3 is no line"),
        (b"G" * 64 + b"  a/a_1.tif\n", "line 1 is no line"),
        (bytes(range(256)), "line 1 is no line"),
    ],
)
def test_what_is_no_manifest_is_refused(data, tmp_path, content, expected):
    (tmp_path / "m").write_bytes(content)
    message = refusal(verify.inspect_folder, data, manifest=tmp_path / "m")
    assert message.startswith(f"{tmp_path / 'm'}: ")
    assert expected in message


def test_a_manifest_that_is_absent_a_folder_or_huge(data, tmp_path):
    assert "m: cannot be read (no such file" in refusal(verify.inspect_folder, data, manifest=tmp_path / "m")
    assert "data: cannot be read (not a regular file)" in refusal(verify.inspect_folder, data, manifest=data)
    with (tmp_path / "m").open("wb") as file:
        file.truncate(manifest.MAX_BYTES + 1)
    assert "above the ceiling" in refusal(verify.inspect_folder, data, manifest=tmp_path / "m")


def test_a_manifest_leads_to_no_other_file(data, tmp_path):
    """Its names are compared with those of the data, and never opened."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "m").write_text(f"{'0' * 64}  ../secret\n{'0' * 64}  {tmp_path / 'secret'}\n")
    assert [fault for fault in faults(data, tmp_path / "m") if "secret" in fault] == [
        "../secret: in the manifest, but not there; restore it",
        f"{tmp_path / 'secret'}: in the manifest, but not there; restore it",
    ]


def test_a_manifest_is_never_overwritten(data, tmp_path):
    write(data, tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    write_pair(data / "dora", "dora", 1)
    assert "m: is there already" in refusal(write, data, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before


# ------------------------------------------------------------------------------------------ the command


def command(capsys, *arguments):
    """Exit code, output and error lines of the command, run in this process."""
    code = cli.run(verify.main, [str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return code, output.out, output.err.splitlines()


def test_a_sound_folder(data, capsys):
    code, output, errors = command(capsys, data)
    assert (code, errors) == (0, [])
    assert output.startswith("data: 3 groups, 9 images, 8 x 8 pixels\n")


def test_a_folder_that_is_absent_a_file_or_empty(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, expected in (("absent", "no such folder"), ("file", "not a folder"), ("empty", "no pair of image")):
        code, _, (line,) = command(capsys, tmp_path / name)
        assert code == 2
        assert line.startswith(f"error: {tmp_path / name}: {expected}")


def test_json_has_every_name(data, capsys):
    for number in range(1, 41):
        write_pair(data / "dora", "dora", number)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data / "dora" / f"dora_{number}.tif")
        (data / "anna" / f"anna_{number + 3}.tif").write_bytes(b"broken")
    code, output, errors = command(capsys, data, "--json")
    report = json.loads(output)
    assert code == 2
    assert len(errors) == 1
    assert len(report["faults"]) == 40
    assert report["slices"] == 49
    (names,) = [warning["names"] for warning in report["warnings"] if "grey" in warning["found"]]
    assert len(names) == 40


def test_one_fault_and_several(data, capsys):
    (data / "anna" / "anna_1.tif").write_bytes(b"broken")
    code, output, errors = command(capsys, data)
    first = f"{data / 'anna' / 'anna_1.tif'}: cannot be read (not a readable TIFF picture); replace or remove it"
    assert (code, errors) == (2, [f"error: {first}"])
    assert f"fault: {first}\n" in output
    (data / "ben" / "ben_1.tif").write_bytes(b"broken")
    code, output, errors = command(capsys, data)
    assert (code, errors) == (2, [f"error: {data}: 2 faults, listed above; the first: {first}"])
    assert output.count("fault: ") == 2


def test_the_manifest_by_flags(data, tmp_path, capsys):
    assert command(capsys, data, "--write-manifest", tmp_path / "m")[0] == 0
    assert len((tmp_path / "m").read_text().splitlines()) == 18
    assert command(capsys, data, "--manifest", tmp_path / "m")[0] == 0
    code, output, errors = command(capsys, data, "--write-manifest", tmp_path / "m")
    assert (code, output) == (2, "")  # before anything is read
    assert "is there already" in errors[0]
    code, _, errors = command(capsys, data, "--manifest", tmp_path / "m", "--write-manifest", tmp_path / "n")
    assert code == 2
    assert "--write-manifest: not allowed with argument --manifest" in errors[0]
    (data / "anna" / "anna_1_mask.tif").unlink()
    code, output, errors = command(capsys, data, "--manifest", tmp_path / "m", "--allow-missing")
    assert (code, len(errors)) == (2, 1)
    assert "anna/anna_1_mask.tif: in the manifest, but not there" in errors[0]


def test_no_manifest_is_written_of_a_faulty_set(data, tmp_path, capsys):
    (data / "anna" / "anna_1.tif").write_bytes(b"broken")
    assert command(capsys, data, "--write-manifest", tmp_path / "m")[0] == 2
    assert command(capsys, data, "--write-manifest", tmp_path / "no" / "m")[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    (data / "anna" / "anna_1.tif").unlink()
    assert command(capsys, data, "--allow-missing", "--write-manifest", tmp_path / "m")[0] == 0
    assert "anna/anna_1_mask.tif" in (tmp_path / "m").read_text()


# ------------------------------------------------------------------------------------------ as people run it


def floats(path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(path)


def another_mode(mode):
    return lambda path: Image.fromarray(np.zeros((8, 8, 3), np.uint8)).convert(mode).save(path)


def two_pages(path):
    page = Image.new("RGB", (8, 8))
    page.save(path, save_all=True, append_images=[page])


def linked(target):
    def replace(path):
        path.unlink()
        path.symlink_to(target)

    return replace


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-20])


def as_png(path):
    Image.new("RGB", (8, 8)).save(path, "PNG")


#: What is done to the first image of a sound set, by the number of the case in docs/reliability.md, and what is said.
DAMAGE = {
    "3 no mask": (lambda path: path.with_name("anna_1_mask.tif").unlink(), "no mask anna_1_mask.tif beside it"),
    "4 cut short": (cut_short, "truncated"),
    "4 empty": (lambda path: path.write_bytes(b""), "not a readable TIFF"),
    "4 text": (lambda path: path.write_text("<!DOCTYPE html>"), "not a readable TIFF"),
    "4 PNG": (as_png, "not a readable TIFF"),
    "6 sizes differ": (lambda path: Image.new("RGB", (8, 9)).save(path), "its mask"),
    "7 mask": (lambda path: Image.new("L", (8, 8), 7).save(path.with_name("anna_1_mask.tif")), "the values 7"),
    "8 16 bits": (lambda path: Image.fromarray(np.zeros((8, 8), np.uint16)).save(path), "grey of 16 bits, but "),
    "8 32 bits": (another_mode("I"), "32 bits a channel"),
    "9 RGBA": (another_mode("RGBA"), "transparency"),
    "9 palette": (another_mode("P"), "palette"),
    "9 CMYK": (another_mode("CMYK"), "CMYK"),
    "10 two pages": (two_pages, "more than one picture"),
    "11 NaN": (floats, "32 bits a channel"),
    "18 bomb": (lambda path: path.write_bytes(tiff_by_hand(15000, 15000, bits=8)), "the ceiling"),
    "18 header": (lambda path: path.write_bytes(tiff_by_hand(32000, 32000, bits=8)), "the ceiling"),
    "20 a loop of links": (lambda path: linked(path)(path), "symbolic link"),
    "20 a link to nothing": (linked("absent"), "no such file"),
    "20 a device": (linked("/dev/zero"), "not a regular file"),
    "20 a pipe": (as_pipe, "not a regular file"),
}


@POSIX
@pytest.mark.parametrize("start", [["-m", "minunet.data.verify"], [ROOT / "examples" / "train_lgg.py", "--data"]])
def test_the_real_commands_name_every_damage_and_write_nothing(tmp_path, start):
    for case, (damage, _) in DAMAGE.items():
        write_pair(tmp_path / "data" / case, "anna", 1)
        damage(tmp_path / "data" / case / "anna_1.tif")
    for number in (1, 2):
        write_pair(tmp_path / "data" / "sound", "anna", number)
    result = run(*start, "data", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: data: {len(DAMAGE)} faults")
    assert len(DAMAGE) <= reader.FAULTS_SHOWN
    for case, (_, expected) in DAMAGE.items():
        named = rf"data/{case}/anna_1(_mask)?\.tif: [^;]*{re.escape(expected)}"
        assert re.search(named, result.stdout + result.stderr), case
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def run(*arguments, cwd, **options):
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, **options)


@POSIX
def test_odd_data_under_odd_names_trains_and_is_warned_of(tmp_path):
    """Cases 12, 13, 16, 17 and 19 in one run: constant images, no tumour, 1 x 1 pixel and 5 x 3, names of all kinds."""
    folder = tmp_path / "-we ird\nörtchen" / ("x" * 200) / ("y" * 200)
    names = ["-rf *", "new\nline", "größe", "$dollar$", "患者", *(f"p{number}" for number in range(9))]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"ren\xe9"))
    for seed, name in enumerate(names):
        size = [(1, 1), (3, 5), (20, 20)][seed % 3]
        for number in (1, 2):
            write_pair(folder / name, "a", number, size=size, seed=seed, mask=np.zeros(size, np.uint8))
            if seed % 2:
                Image.new("RGB", size[::-1], (seed, seed, seed)).save(folder / name / f"a_{number}.tif")
    arguments = ["--preset", "quick", "--image-size", "8", "--epochs", "1", "--batch-size", "6", "--device", "cpu"]
    relative = f"--data={folder.relative_to(tmp_path)}"
    result = run(ROOT / "examples" / "train_lgg.py", *arguments, "--quiet", "--output", "run", relative, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "warning: no mask shows any foreground; " in result.stdout
    assert "of one grey value all over: " in result.stdout
    history = (tmp_path / "run" / "history.csv").read_text()
    assert "nan" not in history
    assert "inf" not in history


def test_turned_and_inverted_files_through_the_real_commands(tmp_path):
    """A mask with the orientation in its tag beside an image that has been turned; one patient's masks inverted."""
    folder = tmp_path / "data"
    for seed, name in enumerate("abcdefghij"):
        for number in (1, 2, 3):
            write_pair(folder / name, name, number, size=(20, 32), seed=seed)
            path = folder / name / f"{name}_{number}_mask.tif"
            mask = np.asarray(Image.open(path))
            if name == "b":
                Image.fromarray(mask.T).save(path, tiffinfo={274: 5})
            if name == "c":  # as tifffile writes a boolean array: no inversion at all
                Image.fromarray(~(mask > 0)).save(path, tiffinfo={262: 0})
            if name == "d" or (name, number) == ("e", 2):
                Image.fromarray(~mask).save(path)
    found = "more than half of the pixels are foreground"
    result = run("-m", "minunet.data.verify", folder, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.partition(";")[0] for line in result.stdout.splitlines() if found in line]
    assert lines == [
        f"warning: {found} in 1 group: d",
        f"warning: {found} on 1 image: {folder / 'e' / 'e_2.tif'}",
    ]
    arguments = ["--preset", "quick", "--image-size", "8", "--epochs", "1", "--device", "cpu", "--quiet"]
    result = run(ROOT / "examples" / "train_lgg.py", *arguments, "--output", "run", "--data", folder, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.partition(";")[0] for line in result.stdout.splitlines() if found in line] == lines


def test_a_folder_of_the_phantom_through_the_real_command(tmp_path):
    phantom.write_kaggle(tmp_path / "kaggle_3m", phantom.make(patients=3, size=16))
    result = run("-m", "minunet.data.verify", tmp_path, "--write-manifest", "m", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("data: 3 patients, ")
    victim = next((tmp_path / "kaggle_3m").rglob("*_1.tif"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    result = run("-m", "minunet.data.verify", tmp_path, "--manifest", "m", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {victim.parent.name}/{victim.name}: changed since the manifest was written; restore it\n"
    )


# ------------------------------------------------------------------------------------------ the real data


@pytest.mark.skipif("MINUNET_LGG" not in os.environ, reason="MINUNET_LGG does not name a kaggle_3m folder")
def test_lgg_mri():
    slices = reader.read_folder(
        os.environ["MINUNET_LGG"], 256, patients=["TCGA_DU_7013", "TCGA_DU_8165", "TCGA_CS_4941"]
    )
    warnings = [str(remark).partition(";")[0] for remark in verify.inspect(slices).warnings]
    assert warnings == [
        "pre- and post-contrast are copies of FLAIR in 1 patient: TCGA_DU_7013",
        "post-contrast is a copy of FLAIR in 1 patient: TCGA_DU_8165",
    ]
