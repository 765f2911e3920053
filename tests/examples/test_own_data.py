"""Data of one's own through the real command lines: any names, grey or colour, 8 or 16 bits, in its own words."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minunet.training.checkpoint import load_net
from tests.command_line import EXAMPLES, NO_PICTURES, SMALL, Ended, progress, run, tree, weights

#: Words of LGG-MRI, which nothing about a road may hold.
MEDICAL = re.compile(r"tumour|patient|FLAIR|contrast|3-D|\bslices?\b", re.IGNORECASE)


def scene(number, shape=(16, 16)):
    """A road, 200 on a darker ground, and its mask."""
    random = np.random.default_rng(number)
    mask = np.zeros(shape, np.uint8)
    mask[:, 4 + number % 5 : 9 + number % 5] = 1
    return (random.integers(0, 90, shape) + 110 * mask).astype(np.uint8), mask


@pytest.fixture
def scenes(tmp_path):
    """Twelve grey PNGs of 16 bits in image/, and in label/ their masks, inverted; and a split."""
    for number in range(12):
        image, mask = scene(number)
        for name, pixels in (("image", image.astype(np.uint16) * 16), ("label", 255 * (1 - mask))):
            path = tmp_path / "data" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    parts = ["train"] * 6 + ["validation"] * 3 + ["test"] * 3
    lines = [f"{number},{part}" for number, part in enumerate(parts)]
    (tmp_path / "split.csv").write_text("\n".join(["group,part", *lines]) + "\n")
    return tmp_path


READING = ("--folders", "image", "label", "--invert-masks", "--target-name", "road")
TRAINING = (*READING, "--split-file", "split.csv", "--images-per-epoch", "9", *SMALL)


def test_verify_says_which_flags_the_data_need(scenes):
    ended = run_verify(scenes)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith(
        "error: data: no pair of image and mask found among 24 files (24 .png), such as image/0.png "
    )
    assert "--folders IMAGES MASKS" in line
    ended = run_verify(scenes, "--folders", "image", "label")
    assert (ended.code, ended.err) == (0, "")
    assert "more than half of the pixels are foreground on 12 of 12 images; " in ended.out
    assert "--invert-masks" in ended.out
    assert "no group folders: each of the 12 images counts as a group of its own; " in ended.out
    ended = run_verify(scenes, *READING)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0] == "data: 12 groups, 12 images, 16 x 16 pixels"
    assert lines[1].startswith("data: road on 12 images (100.0%), 31.25% of all pixels; by group ")
    assert [line.partition(":")[0] for line in lines[2:]] == ["warning"]  # that there are no groups
    # A file that has changed is named by its whole path: each folder of a group may hold image/0.png.
    assert run_verify(scenes, *READING, "--write-manifest", "manifest").code == 0
    (scenes / "data" / "image" / "3.png").write_bytes((scenes / "data" / "image" / "4.png").read_bytes())
    ended = run_verify(scenes, *READING, "--manifest", "manifest")
    assert ended.err == "error: image/3.png: changed since the manifest was written; restore it\n"


def run_verify(place, *flags):
    command = [sys.executable, "-W", "error", "-m", "minunet.data.verify", "data", *flags]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
    return Ended(done.returncode, done.stdout, done.stderr)


def test_a_run_on_grey_images_of_16_bits_uses_the_words_of_its_data(scenes):
    ended = run("train_lgg", "--data", "data", *TRAINING, "--epochs", "3", "--output", "run", cwd=scenes)
    assert (ended.code, ended.err) == (0, "")
    said = [line for line in ended.out.splitlines() if not line.startswith(("warning: no group", "everything lies"))]
    assert not [line for line in said if MEDICAL.search(line)]
    assert "data: 6 groups (6 images) to train, 3 groups (3 images) to validate, 3 groups (3 images) to test" in said
    assert "Images: 3, 3 with road. Groups: 3. Pixels: 16 x 16. Road is predicted where " in ended.out
    config = json.loads((scenes / "run" / "config.json").read_text())
    assert config["model"]["in_channels"] == 1
    assert config["options"]["folders"] == ["image", "label"]
    assert config["options"]["invert_masks"] is True
    assert config["training"]["images_per_epoch"] == 9
    assert config["patients"]["test"] == ["9", "10", "11"]
    metrics = json.loads((scenes / "run" / "metrics.json").read_text())
    assert metrics["split"] == "file"
    assert "best_flair_threshold" not in metrics
    net, metadata = load_net(scenes / "run" / "best.npz")
    assert net.config["in_channels"] == 1
    assert metadata["kind"] == {"channels": 1, "bits": 16}
    assert metadata["words"]["target"] == "road"


def test_a_folder_is_predicted_image_by_image_if_each_was_a_group_of_its_own(scenes):
    """As they were in training: the mask of an image does not depend on which others lie beside it."""
    assert run("train_lgg", "--data", "data", *TRAINING, "--epochs", "1", "--output", "run", cwd=scenes).code == 0
    images = scenes / "data" / "image"
    for number in (2, 11):  # one dark, one bright: taken together they would be normalised otherwise
        pixels = np.asarray(Image.open(images / f"{number}.png"))
        Image.fromarray(pixels // 4 if number == 2 else pixels * 8).save(images / f"{number}.png")
    ended = run("predict", "run/best.npz", images, "--output", "together", cwd=scenes)
    assert (ended.code, ended.err) == (0, "")
    order = [int(line.split()[-1].removesuffix(".png").rpartition("/")[2]) for line in ended.out.splitlines()[-12:]]
    assert order == list(range(12))  # 2 comes before 10
    for number in range(12):
        assert (
            run("predict", "run/best.npz", images / f"{number}.png", "--output", f"alone {number}", cwd=scenes).code
            == 0
        )
        together, alone = (scenes / name / f"{number}_mask.png" for name in ("together", f"alone {number}"))
        assert (np.asarray(Image.open(together)) == np.asarray(Image.open(alone))).all()


def test_a_run_is_resumed_with_its_flags_and_where_its_files_have_moved(scenes):
    start = ("train_lgg", "--data", "data", *TRAINING, "--epochs", "2")
    assert run(*start, "--output", "unbroken", cwd=scenes).code == 0
    stop = "from minunet.base.signals import StopRequest; StopRequest.requested = property(lambda self: True)"
    assert run(*start, "--output", "stopped", cwd=scenes, before=stop).code == 0
    assert progress(scenes / "stopped")["finished"] is False
    (scenes / "data").rename(scenes / "moved")
    (scenes / "split.csv").rename(scenes / "parts.csv")
    ended = run("train_lgg", "--resume", "stopped", "--data", "moved", cwd=scenes)
    assert ended.code == 2
    assert "split.csv: cannot be read (no such file or directory)" in ended.err
    ended = run("train_lgg", "--resume", "stopped", "--quiet", "--invert-masks", cwd=scenes)
    assert ended.err.startswith("error: --invert-masks: not together with --resume")
    moved = ("--data", "moved", "--split-file", "parts.csv")
    ended = run("train_lgg", "--resume", "stopped", "--quiet", "--device", "cpu", *moved, cwd=scenes)
    assert (ended.code, ended.err) == (0, "")
    assert weights(scenes / "stopped") == weights(scenes / "unbroken")
    options = json.loads((scenes / "stopped" / "config.json").read_text())["options"]
    assert (options["data"], options["split_file"]) == (str(scenes / "moved"), str(scenes / "parts.csv"))


def test_a_run_of_an_earlier_version_is_resumed(tmp_path):
    start = ("train_lgg", *SMALL, "--epochs", "1")
    assert run(*start, "--output", "run", cwd=tmp_path, before=NO_PICTURES).code == 0
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    for name in ("folders", "invert_masks", "target_name", "split_file", "images_per_epoch"):
        del config["options"][name]
    path.write_text(json.dumps(config))
    ended = run("train_lgg", "--resume", "run", "--quiet", "--device", "cpu", cwd=tmp_path, before=NO_PICTURES)
    assert (ended.code, ended.err) == (0, "")
    assert "warning" not in ended.out


def test_colours_of_several_sizes_in_group_folders_named_by_mask(tmp_path):
    """JPEGs with PNG masks, neither square nor of one size, in six groups."""
    for number in range(12):
        image, mask = scene(number, shape=(12 + number % 3, 16))
        folder = tmp_path / "data" / f"street {number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([image, image // 2, image], axis=2)).save(folder / f"view {number}.jpg")
        Image.fromarray(mask).save(folder / f"view {number}_mask.png")
    ended = run("train_lgg", "--data", "data", *SMALL, "--epochs", "1", "--output", "run", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert "data: 6 groups, 12 images, 4 of 16 x 12, 4 of 16 x 13, 4 of 16 x 14 pixels" in ended.out
    assert "with foreground. Groups: " in ended.out
    assert "warning" not in ended.out  # not of copies of sequences
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["in_channels"] == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--folders", "image", "label"), "--folders: says how --data is read, and there is none, give --data"),
        (("--invert-masks",), "--invert-masks: says how --data is read, and there is none, give --data"),
        (("--target-name", "road"), "--target-name: says how --data is read, and there is none, give --data"),
        (("--split-file", "a.csv", "--fold", "1"), "--fold: not together with --split-file, which says who is in "),
        (("--split-file", "a.csv", "--split", "slice"), "--split: not together with --split-file, which says who is "),
        (("--split-file", "a.csv"), "a.csv: cannot be read (no such file or directory), check the path"),
        (("--images-per-epoch", "0"), "--images-per-epoch: must be a whole number of at least 1, got '0', see --help"),
        (("--target-name", "a\nb"), "--target-name: must be 1 to 40 printable letters, got 'a\\nb', see --help"),
        (("--folders", "image"), "--folders: give the names of two or more different folders, got image"),
        (("--folders", "image", "a", "a"), "--folders: give the names of two or more different folders, got image a a"),
        (("--classes", "a,b"), "--classes: says how --data is read, and there is none, give --data"),
        (("--classes", "a"), "--classes: must be 2 or more different names, such as background,road, got 'a', see --h"),
        (("--classes", "a,b", "--invert-masks"), "--classes: not together with --invert-masks, each mask holds the "),
        (("--classes", "a,b", "--folders", "i", "j", "k"), "--classes: not together with several folders of masks, "),
        (("--classes", "a,b", "--target-name", "c"), "--target-name: names what one mask of 0 and 1 marks; with se"),
        (("--folders", "i", "j", "k", "--target-name", "c"), "--target-name: names what one mask of 0 and 1 marks;"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(tmp_path, flags, expected):
    ended = run("train_lgg", *flags, *SMALL, "--output", "run", cwd=tmp_path)
    assert (ended.code, tree(tmp_path)) == (2, {})
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error: {expected}")
