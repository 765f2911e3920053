"""The pictures of several targets: a colour each, and what was missed and what was wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from minunet.data import phantom
from minunet.data.normalize import Normalization
from minunet.data.slices import IGNORE, Words
from minunet.network.loss import SoftmaxLoss
from minunet.results import overlays, plots, report
from minunet.training.config import TrainingConfig
from tests.results.test_plots import assert_png, figures, visible_texts  # noqa: F401 (a fixture)

NAMES = ("head", "cerebrum", "tumour")


@pytest.fixture(scope="module")
def tissues():
    return phantom.make(patients=3, size=32, tissues=True)


def answers(slices, seed=0):
    """Probabilities that are mostly right."""
    random = np.random.default_rng(seed)
    classes = len(slices.classes)
    probabilities = 0.7 * (slices.masks == np.arange(classes)) + random.dirichlet(
        np.ones(classes), slices.masks.shape[:3]
    )
    return (probabilities / probabilities.sum(axis=-1, keepdims=True)).astype(np.float32)


def texts(figure):
    return " ".join(text.get_text() for text in visible_texts(figure))


def test_each_target_has_its_colour():
    picture, masks = np.zeros((4, 9, 3), np.uint8), np.zeros((4, 9, 9), np.uint8)
    for k in range(9):
        masks[:, k, k] = 1
    shown = overlays.overlay_targets(picture, masks)
    colors = [tuple(shown[0, k]) for k in range(9)]
    assert colors == [tuple(overlays._rgb(color).astype(np.uint8)) for color in overlays.target_colors(9)]
    assert len(set(colors[:8])) == 8
    assert colors[8] == colors[0]
    assert not picture.any()


def test_a_run_s_pictures_of_classes(tissues, tmp_path, figures):  # noqa: F811
    config = TrainingConfig(loss=SoftmaxLoss())
    report.write_samples(tmp_path, tissues, config, Normalization("volume"))
    report.write_test(tmp_path, tissues, answers(tissues), Normalization("volume"))
    assert len(figures) == 3
    for figure, name in zip(figures, ("samples", "per_patient", "predictions"), strict=True):
        assert_png(tmp_path / f"{name}.png", figure)
        said = texts(figure)
        assert all(name in said for name in NAMES)
        assert "background" not in said
    scores = json.loads((tmp_path / "metrics.json").read_text())["test"]["classes"]
    means = [f"{name}, mean {scores[name]['per_patient']['summary']['dice']['mean']:.3f}" for name in NAMES]
    assert all(mean in texts(figures[1]) for mean in means)
    assert "best_flair_threshold" not in json.loads((tmp_path / "metrics.json").read_text())


def test_missed_is_what_the_mask_alone_holds_and_wrong_what_the_prediction_alone_does(tmp_path, figures):  # noqa: F811
    """A road that was taken for a car: missed in the colour of the road, wrong in that of the car."""
    images = np.zeros((1, 8, 8, 1), np.uint8)
    actual, predicted = np.zeros((2, 1, 8, 8, 2), np.uint8)
    actual[0, :, :4, 0] = predicted[0, :, :2, 0] = 1
    predicted[0, :, 2:4, 1] = 1
    plots.plot_target_predictions(tmp_path / "a.png", images, actual, predicted, ["a"], ["road", "car"])
    road, car = map(overlays._rgb, overlays.target_colors(2))
    _, of_actual, of_predicted, missed, wrong = (ax.images[0].get_array() for ax in figures[0].axes)
    assert (of_actual[0, 0] == road).all()
    assert (of_predicted[0, 0] == road).all()
    assert (of_predicted[0, 2] == car).all()
    assert (missed[:, 2:4] == road).all()
    assert (wrong[:, 2:4] == car).all()
    for picture in (missed, wrong):
        assert not picture[:, :2].any()
        assert not picture[:, 4:].any()
    assert "road 0.67" in texts(figures[0])
    assert "car 0.00" in texts(figures[0])


def test_many_targets_with_long_names_stay_readable(tmp_path, figures):  # noqa: F811
    random, names = np.random.default_rng(0), [f"target {k} of a rather long name" for k in range(10)]
    images = random.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    masks, others = random.integers(0, 2, (2, 2, 16, 16, 10), dtype=np.uint8)
    titles = ["somebody\nimage 1", "another\nimage 12"]
    plots.plot_samples(tmp_path / "samples.png", images, masks, images, others, titles, Words(), names)
    plots.plot_target_predictions(tmp_path / "predictions.png", images, masks, others, titles, names, Words())
    dices = {name: random.random(2).tolist() for name in names}
    plots.plot_targets_per_patient(tmp_path / "per_patient.png", ["a", "b"], dices, "Dice per group")
    for figure, name in zip(figures, ("samples", "predictions", "per_patient"), strict=True):
        assert_png(tmp_path / f"{name}.png", figure)


def test_ignored_pixels_are_neither_missed_nor_wrong(tissues, tmp_path, figures):  # noqa: F811
    masks = tissues.masks.copy()
    masks[:, :16] = IGNORE
    report.write_test(tmp_path, replace(tissues, masks=masks), answers(tissues, seed=1), Normalization("volume"))
    for ax in figures[1].axes[3::5] + figures[1].axes[4::5]:
        upper = ax.images[0].get_array()[:16]
        assert (upper == upper[..., :1]).all()  # the image in grey, and no colour


@pytest.mark.parametrize(
    ("names", "dices", "message"),
    [
        (["a"], {"road": [0.5, 0.5]}, "dices"),
        (["a"], {"road": [1.5]}, r"must be in \[0, 1\]"),
        ([], {"road": []}, "dices"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, names, dices, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_targets_per_patient(tmp_path / "a.png", names, dices, "Dice")
    assert not (tmp_path / "a.png").exists()


def test_the_slice_that_is_shown_has_all_of_the_targets(tissues):
    """The largest head alone would show no tumour."""
    for name in tissues.patient_names():
        place = report._largest_tumour(tissues, name)
        assert tissues.marked(place).any(axis=(0, 1)).all()


def test_pictures_are_written_of_masks_that_overlap(tissues, tmp_path, figures):  # noqa: F811
    masks = tissues.marked(np.arange(len(tissues)))
    slices = replace(tissues, masks=masks, classes=(), words=replace(tissues.words, targets=NAMES))
    report.write_test(tmp_path, slices, answers(tissues)[..., 1:], Normalization("volume"))
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.width == 1320
    assert "above 0.5" in report._score(slices, answers(tissues)[..., 1:]).table
