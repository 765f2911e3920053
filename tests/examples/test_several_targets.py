"""Several classes and several masks through the commands: trained, tested, predicted, evaluated, resumed."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from minunet.base import cli
from minunet.base.errors import UserError
from minunet.base.signals import StopRequest
from minunet.commands import evaluate, predict, train
from minunet.data import images, phantom
from minunet.data.slices import IGNORE, Words, target_masks
from minunet.network.unet import UNet
from minunet.results import prediction
from minunet.results.overlays import _rgb, target_colors
from minunet.results.prediction import Predictor
from minunet.training.checkpoint import load_net
from tests.command_line import progress, weights

FLAGS = ("--preset", "quick", "--quiet", "--device", "cpu", "--engine", "plain")


def ended(capsys, command, *arguments):
    """Run a command in this process: its exit code, what it printed, and its errors."""
    capsys.readouterr()
    code = cli.run(command.main, list(map(str, arguments)))
    return SimpleNamespace(code=code, **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))


@pytest.fixture(scope="module")
def tissues(tmp_path_factory):
    """The phantom's tissues as files, with a row of pixels to be ignored, and a run that was trained on them."""
    place = tmp_path_factory.mktemp("tissues")
    made = phantom.make(patients=12, size=32, tissues=True)
    made.masks[:, 0] = IGNORE
    phantom.write_kaggle(place / "data", made)
    names = ("--data", place / "data", "--classes", ",".join(phantom.TISSUES))
    length = ("--image-size", "32", "--batch-size", "4", "--images-per-epoch", "120", "--epochs", "6")
    arguments = (*names, *length, "--learning-rate", "0.006", *FLAGS, "--output", place / "run")
    assert cli.run(train.main, list(map(str, arguments))) == 0
    return place


# --- Classes --------------------------------------------------------------------------------------------------------


def test_each_tissue_is_found(tissues):
    """In 180 steps. (Seeds 0, 1 and 2 give at least 0.91, 0.86 and 0.75.)"""
    test = json.loads((tissues / "run" / "metrics.json").read_text())["test"]
    found = {name: scores["pooled"]["dice"] for name, scores in test["classes"].items()}
    assert list(found) == ["head", "cerebrum", "tumour"]
    assert found["head"] > 0.8
    assert found["cerebrum"] > 0.75
    assert found["tumour"] > 0.5
    assert test["mean"]["dice_pooled"] == pytest.approx(np.mean(list(found.values())))


def test_the_run_notes_what_the_data_asked_for(tissues):
    config = json.loads((tissues / "run" / "config.json").read_text())
    assert config["options"]["classes"] == ",".join(phantom.TISSUES)
    assert (config["model"]["out_channels"], config["model"]["output"]) == (4, "softmax")
    assert config["training"]["loss"]["class"].endswith("SoftmaxLoss")
    _, metadata = load_net(tissues / "run" / "best.npz")
    assert metadata["classes"] == list(phantom.TISSUES)
    for name in ("samples", "curves", "per_patient", "predictions"):
        with Image.open(tissues / "run" / f"{name}.png") as picture:
            assert picture.size[0] > 1000


def test_a_run_on_classes_is_resumed(tissues, tmp_path, capsys, monkeypatch):
    data = ("--data", tissues / "data", "--classes", ",".join(phantom.TISSUES))
    start = (*data, *FLAGS, "--image-size", "16", "--images-per-epoch", "16", "--epochs", "1")
    whole = ended(capsys, train, *start, "--output", tmp_path / "whole")
    assert (whole.code, whole.err) == (0, "")
    assert "; a softmax over the classes background, head, cerebrum, tumour; SoftmaxLoss\n" in whole.out
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "requested", property(lambda self: True))
        assert ended(capsys, train, *start, "--output", tmp_path / "run").code == 0
    assert progress(tmp_path / "run")["finished"] is False
    resumed = ended(capsys, train, "--resume", tmp_path / "run", "--quiet", "--device", "cpu", "--engine", "plain")
    assert (resumed.code, resumed.err) == (0, "")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("size", [(32, 32), (50, 40)])
def test_a_prediction_holds_the_numbers_of_the_classes(tissues, tmp_path, capsys, size):
    image = Image.fromarray(phantom.make(patients=1, size=32, seed=5).images[9]).resize(size)
    image.save(tmp_path / "a.png")
    done = ended(capsys, predict, tissues / "run" / "best.npz", tmp_path / "a.png", "--output", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    mask = np.asarray(Image.open(tmp_path / "out" / "a_mask.png"))
    assert mask.shape == size[::-1]
    with Predictor.load(tissues / "run" / "best.npz") as predictor:
        assert predictor.classes == phantom.TISSUES
        files = [tmp_path / "a.png"]
        ((_, _, tiles),) = predictor.volume(files, predictor.prepare(files))
        probabilities = np.zeros((*mask.shape, 4), np.float32)
        for part, p in tiles:
            probabilities[part] = p
    np.testing.assert_array_equal(mask, probabilities.argmax(axis=-1))
    assert set(np.unique(mask)) >= {0, 1, 2}
    assert f"a_mask.png: 0 background {(mask == 0).mean():.1%}, 1 head {(mask == 1).mean():.1%}, " in done.out
    shown = np.asarray(Image.open(tmp_path / "out" / "a_overlay.png"))
    for color in target_colors(2):
        assert (shown == _rgb(color)).all(axis=-1).any()  # its outline
    # The mask is read back as one of classes, so that it may be corrected by hand and trained on.
    np.testing.assert_array_equal(images.read_mask(tmp_path / "out" / "a_mask.png", 4), mask)


def test_classes_are_evaluated_by_the_names_in_the_checkpoint(tissues, tmp_path, capsys):
    checkpoint, data = tissues / "run" / "best.npz", tmp_path / "data"
    name = "PHANTOM_00_0003_20260101"
    shutil.copytree(tissues / "data" / name, data / name)
    plain = ("--device", "cpu", "--engine", "plain")
    done = ended(capsys, evaluate, checkpoint, data, "--output", tmp_path / "scores", *plain)
    assert (done.code, done.err) == (0, "")
    stored = json.loads((tmp_path / "scores" / "metrics.json").read_text())["test"]
    with (tmp_path / "scores" / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["target"] for row in rows[:4]] == ["head", "cerebrum", "tumour", "head"]
    predicted = ended(capsys, predict, checkpoint, data / name, "--output", tmp_path / "out")
    assert predicted.code == 0
    for k, target in enumerate(phantom.TISSUES[1:], start=1):
        marked = found = both = 0
        for row in (row for row in rows if row["target"] == target):
            stem = row["file"].rpartition("/")[2].removesuffix(".tif")
            actual = np.asarray(Image.open(data / name / f"{stem}_mask.tif"))
            mask = np.asarray(Image.open(tmp_path / "out" / f"{stem}_mask.png"))[actual != IGNORE] == k
            truth = actual[actual != IGNORE] == k
            assert (int(row["pixels_marked"]), int(row["pixels_found"])) == (truth.sum(), mask.sum())
            marked, found, both = marked + truth.sum(), found + mask.sum(), both + (truth & mask).sum()
        assert stored["classes"][target]["pooled"]["dice"] == pytest.approx(2 * both / (marked + found))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--classes", "a,b"), "--classes: the network knows background, head, cerebrum, tumour; leave the flag out"),
        (("--invert-masks",), "is a network of classes: invert_masks swaps 0 and 1"),
        (("--folders", "a", "b", "c"), "is a network of classes: classes are the numbers in one mask, got 2 folders"),
    ],
)
def test_an_evaluation_that_makes_no_sense_is_refused(tissues, tmp_path, capsys, flags, message):
    checkpoint, output = tissues / "run" / "best.npz", tmp_path / "scores"
    plain = ("--device", "cpu", "--engine", "plain")
    done = ended(capsys, evaluate, checkpoint, tissues / "data", *flags, "--output", output, *plain)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert message in line
    assert not output.exists()


def test_a_class_that_a_part_of_the_split_lacks_is_named(tissues):
    made = phantom.make(patients=2, size=16, tissues=True)
    assert train.never_marked(made) == []
    assert train.never_marked(made.subset([0])) == ["cerebrum", "tumour"]  # the slice at the neck


# --- Masks that overlap ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Twelve images with a mask of a road and one of a car on it, and a run of one epoch."""
    place = tmp_path_factory.mktemp("scenes")
    for number in range(12):
        random = np.random.default_rng(number)
        masks = {name: np.zeros((16, 16), np.uint8) for name in ("road", "car")}
        masks["road"][:, 4 + number % 5 :] = 255
        masks["car"][4:8, 10:13] = 255
        image = random.integers(0, 60, (16, 16)) + masks["road"] // 3 + masks["car"] // 3
        for name, pixels in {"image": image.astype(np.uint8), **masks}.items():
            (place / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / "data" / name / f"{number}.png")
    reading = ("--data", place / "data", "--folders", "image", "road", "car", "--image-size", "16")
    length = ("--images-per-epoch", "16", "--epochs", "1")
    assert cli.run(train.main, list(map(str, (*reading, *length, *FLAGS, "--output", place / "run")))) == 0
    return place


def test_each_mask_has_its_sigmoid_and_its_scores(scenes):
    config = json.loads((scenes / "run" / "config.json").read_text())
    assert (config["model"]["out_channels"], config["model"]["output"]) == (2, "sigmoid")
    assert config["training"]["loss"]["over"] == "class"
    assert config["options"]["folders"] == ["image", "road", "car"]
    test = json.loads((scenes / "run" / "metrics.json").read_text())["test"]
    assert list(test["classes"]) == ["road", "car"]
    assert test["classes"]["road"]["threshold"] == 0.5


def test_overlapping_masks_are_predicted_one_by_one(scenes, tmp_path, capsys):
    image = scenes / "data" / "image" / "3.png"
    done = ended(capsys, predict, scenes / "run" / "best.npz", image, "--output", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert "3_mask1.png: road, " in done.out
    assert "3_mask2.png: car, " in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"3_{kind}{n}.png" for kind in ("mask", "overlay") for n in (1, 2)
    }


def test_masks_are_evaluated_in_the_order_of_the_training(scenes, tmp_path, capsys):
    arguments = (
        scenes / "run" / "best.npz",
        scenes / "data",
        "--output",
        tmp_path / "scores",
        "--device",
        "cpu",
        "--engine",
        "plain",
    )
    swapped = ended(capsys, evaluate, *arguments, "--folders", "image", "car", "road")
    assert swapped.code == 2
    expected = "masks of car, road, but the network was trained on road, car; give --folders in that order"
    assert expected in swapped.err
    one = ended(capsys, evaluate, *arguments, "--folders", "image", "road")
    assert one.code == 2
    assert "masks of 1 targets, but the network finds 2; name the folder of each by --folders" in one.err
    done = ended(capsys, evaluate, *arguments, "--folders", "image", "road", "car")
    assert (done.code, done.err) == (0, "")
    assert "per_image.csv" in done.out


# --- The parts ------------------------------------------------------------------------------------------------------


def test_the_largest_so_far_is_the_largest_of_all():
    """In whatever parts the probabilities come; of equals the first class wins, as argmax has it."""
    whole = np.random.default_rng(0).integers(0, 4, (6, 5, 3)).astype(np.float32)
    by_class = [((slice(None), slice(None), slice(k, k + 1)), whole[..., k : k + 1]) for k in range(3)]
    by_place = [((slice(r, r + 3), slice(0, 5)), whole[r : r + 3]) for r in (0, 3)]
    for tiles in (by_class, by_place):
        masks = predict.marked(tiles, (6, 5), 1, 0.5, exclusive=True)
        np.testing.assert_array_equal(masks[..., 0], whole.argmax(axis=-1))
        independent = predict.marked(tiles, (6, 5), 3, 1.5, exclusive=False)
        np.testing.assert_array_equal(independent, whole > 1.5)
    np.testing.assert_array_equal(
        target_masks(predict.marked(by_class, (6, 5), 1, 0.5, exclusive=True), 3)[..., 1], whole.argmax(axis=-1) == 2
    )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"classes": ["a", "b"]}, "2 classes do not fit a network with 3 channels of this kind"),
        ({"classes": ["a", "b", "b"]}, "names must differ"),
        ({"classes": ["a", "b", "c\n"]}, "words must be printable"),
        ({"classes": ["a", "b", 7]}, "words must be printable"),
        ({"classes": 3}, "names must be a list"),
        ({"classes": {"a": 1}}, "names must be a list"),
    ],
)
def test_names_in_a_checkpoint_are_checked(metadata, message):
    with pytest.raises(UserError, match=f"best.npz: {message}"):
        prediction._names("best.npz", metadata, UNet(widths=(2, 3), out_channels=3, output="softmax"))


def test_a_network_of_classes_without_names_numbers_them():
    net = UNet(widths=(2, 3), out_channels=3, output="softmax")
    assert prediction._names("best.npz", {}, net)[1] == ("background", "class 1", "class 2")
    masks = UNet(widths=(2, 3), out_channels=2)
    assert prediction._names("best.npz", {}, masks)[1] == ()
    for metadata in ({"classes": ["a", "b"]}, {"words": {**vars(Words()), "targets": ["a", "b", "c"]}}):
        with pytest.raises(UserError, match="do not fit a network"):
            prediction._names("best.npz", metadata, masks)
