"""Training on crops and predicting in tiles, through the real command lines."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from minunet.base.archive import load
from minunet.data import phantom
from minunet.data.normalize import apply
from minunet.results.prediction import Predictor
from tests.command_line import NO_PICTURES, run, weights, write_patients

CROPS = ("--data", "data", "--preset", "quick", "--crop", "32", "--epochs", "2", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on crops of six synthetic patients of 96 x 96 pixels, with the data beside it."""
    folder = tmp_path_factory.mktemp("crops")
    write_patients(folder / "data", patients=6, size=96)
    assert run("train_lgg", *CROPS, "--output", "run", cwd=folder).code == 0
    return folder / "run"


def test_it_learns_from_squares_and_is_judged_on_whole_images(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["test"]["image_size"] == [96, 96]
    config = json.loads((trained / "config.json").read_text())
    assert (config["training"]["crop"], config["options"]["crop"]) == (32, 32)
    assert config["preprocessing"]["image_size"] is None
    _, metadata = load(trained / "best.npz")
    assert metadata["preprocessing"]["image_size"] is None


def test_resumed_it_is_the_unbroken_run(trained, tmp_path):
    interrupt = (
        "import os, signal\nfrom minunet.training import loop\nfinish = loop._Run.finish_epoch\n"
        "def finish_and_stop(self):\n    finish(self)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "loop._Run.finish_epoch = finish_and_stop\n"
    )
    (tmp_path / "data").symlink_to(trained.parent / "data")
    before = NO_PICTURES + interrupt
    assert run("train_lgg", *CROPS, "--output", "run", cwd=tmp_path, before=before).code == 143
    resume = ("train_lgg", "--resume", "run", "--quiet", "--device", "cpu")
    assert run(*resume, cwd=tmp_path, before=NO_PICTURES).code == 0
    assert weights(tmp_path / "run") == weights(trained)


def test_a_crop_that_no_image_is_large_enough_for_is_refused(trained, tmp_path):
    ended = run("train_lgg", *CROPS, "--crop", "128", "--output", "large", cwd=trained.parent)
    message = "--crop: 128 is larger than every image (96 x 96 pixels at most), choose a smaller one"
    assert (ended.code, ended.err) == (2, f"error: {message}\n")


def test_an_image_of_any_size_is_predicted_as_it_is(trained, tmp_path, monkeypatch):
    """What predict.py writes is the network's answer to the whole image at its own size."""
    image = phantom.make(patients=1, size=96, seed=3).images[9]
    image = np.concatenate([image, image[:, ::-1]], axis=1)[:90, :173]
    Image.fromarray(image).save(tmp_path / "a.png")
    ended = run("predict", trained / "best.npz", "a.png", "--output", "out", "--engine", "plain", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    mask = np.asarray(Image.open(tmp_path / "out" / "a_mask.png"))
    assert mask.shape == (90, 173)
    with Predictor.load(trained / "best.npz") as predictor:
        statistics = predictor.normalization.volume_statistics([image])
        x = apply(image[None], statistics)
        whole = predictor.net.predict(x)[0, ..., 0]
    assert np.array_equal(mask > 0, whole > 0.5)


def test_the_ceiling_of_pixels_can_be_raised(trained, tmp_path):
    Image.fromarray(phantom.make(patients=1, size=96, seed=3).images[9]).save(tmp_path / "a.png")
    low = run("predict", trained / "best.npz", "a.png", "--output", "low", "--max-pixels", "9000", cwd=tmp_path)
    assert (low.code, low.err) == (2, "error: a.png: 96 x 96 pixels, above the ceiling of 9000; make it smaller\n")
    assert not (tmp_path / "low").exists()
    high = run("predict", trained / "best.npz", "a.png", "--output", "high", "--max-pixels", "9216", cwd=tmp_path)
    assert (high.code, high.err) == (0, "")


def test_a_checkpoint_is_scored_on_a_folder_of_pngs(trained, tmp_path):
    """Each image at its own size: the scores are those of the masks that predict.py writes."""
    made = phantom.make(patients=1, size=96, seed=3)
    for place, (image, mask) in enumerate(zip(made.images[8:11], made.masks[8:11, ..., 0], strict=True)):
        crop = slice(0, 90 - place), slice(place, 96)
        for name, pixels in (("image", image[crop]), ("label", 255 - 255 * mask[crop])):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{place}.png")
    flags = ("--folders", "image", "label", "--invert-masks", "--target-name", "blob", "--output", "scores")
    ended = run("evaluate", trained / "best.npz", "data", *flags, cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    with (tmp_path / "scores" / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == ["0", "1", "2"]
    for place, row in enumerate(rows):
        ended = run("predict", trained / "best.npz", row["file"], "--output", f"out{place}", cwd=tmp_path)
        assert ended.code == 0, ended
        found = np.asarray(Image.open(tmp_path / f"out{place}" / f"{place}_mask.png")) > 0
        marked = np.asarray(Image.open(tmp_path / "data" / "label" / f"{place}.png")) == 0
        assert int(row["pixels_found"]) == found.sum()
        assert int(row["pixels_marked"]) == marked.sum()
        assert float(row["dice"]) == pytest.approx(2 * (found & marked).sum() / (found.sum() + marked.sum()), abs=1e-4)
    again = run("evaluate", trained / "best.npz", "data", *flags, cwd=tmp_path)
    assert again.code == 2
    assert again.err.startswith("error: scores: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--crop", "33"), "error: --crop: 33 is not a multiple of 8, choose one that is\n"),
        (("--crop", "32", "--image-size", "64"), "error: --image-size: not together with --crop, which takes images"),
        (("--crop", "0"), "error: --crop: must be a whole number from 8 to 4096, got '0'"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, arguments, message):
    ended = run("train_lgg", "--preset", "quick", *arguments, cwd=tmp_path)
    assert ended.code == 2
    assert ended.err.startswith(message)
