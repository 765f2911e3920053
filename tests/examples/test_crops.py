"""Training on crops and predicting in tiles, through the real command lines."""

import json

import numpy as np
import pytest
from PIL import Image

from minunet.base.archive import load
from minunet.data import phantom
from minunet.data.normalize import apply
from minunet.results.prediction import Predictor
from tests.command_line import run, weights

CROPS = ("--preset", "quick", "--crop", "32", "--epochs", "2", "--batch-size", "60", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on crops of synthetic patients of 96 x 96 pixels."""
    folder = tmp_path_factory.mktemp("crops")
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
    assert run("train_lgg", *CROPS, "--output", "run", cwd=tmp_path, before=interrupt).code == 143
    assert run("train_lgg", "--resume", "run", "--quiet", "--device", "cpu", cwd=tmp_path).code == 0
    assert weights(tmp_path / "run") == weights(trained)


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
