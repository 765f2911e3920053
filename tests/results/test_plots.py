"""The pictures: what they show, and that nothing in them is cut off or overlaps."""

import itertools
import os
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from minunet.base.errors import UserError
from minunet.data.slices import LGG, Words
from minunet.results import overlays, plots

RNG_SEED = 7


@pytest.fixture
def slices():
    """Three small slices with a bright square each in the FLAIR channel, the last one empty."""
    rng = np.random.default_rng(RNG_SEED)
    masks = np.zeros((3, 32, 32, 1), np.uint8)
    masks[0, 8:16, 8:16] = 1
    masks[1, 4:20, 12:16] = 1
    images = rng.integers(0, 100, (3, 32, 32, 3), dtype=np.uint8)
    images[..., 1] += 100 * masks[..., 0]
    return images, masks


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved during the test."""
    saved = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (saved.append(figure), save(figure, path))[1])
    return saved


def visible_texts(figure: Figure) -> list[Text]:
    """Every text that is drawn. (An axis keeps labels of ticks beyond its limits, and does not draw them.)"""
    hidden = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]


def assert_readable(figure: Figure) -> None:
    """No text is cut off at the border of the figure, and no two texts cover each other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.draw_without_rendering()
        boxes = [(text.get_text(), text.get_window_extent()) for text in visible_texts(figure)]
    assert boxes
    for text, box in boxes:
        assert -1 <= box.x0 < box.x1 <= figure.bbox.width + 1, f"cut off: {text!r}"
        assert -1 <= box.y0 < box.y1 <= figure.bbox.height + 1, f"cut off: {text!r}"
    for (text, box), (other_text, other) in itertools.combinations(boxes, 2):
        apart = box.x1 <= other.x0 or other.x1 <= box.x0 or box.y1 <= other.y0 + 1 or other.y1 <= box.y0 + 1
        assert apart, f"{text!r} and {other_text!r} overlap"


def assert_png(path, figure: Figure) -> None:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        # Wide enough for the column of a README, and something is on it.
        assert picture.width == 1320
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    assert_readable(figure)


# ---- Arrays to pictures ----------------------------------------------------------------------------------------------


def test_display_image_shows_the_flair_channel_in_grey():
    flair = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = np.stack([flair[::-1], flair, 255 - flair], axis=-1)
    shown = overlays.display_image(image)
    assert shown.dtype == np.uint8
    assert shown.shape == (16, 16, 3)
    assert (shown[..., 0] == shown[..., 1]).all()
    assert (shown[..., 1] == shown[..., 2]).all()
    assert (np.diff(shown[..., 0].ravel().astype(int)) >= 0).all()  # the order of the FLAIR values, of no other channel
    assert shown.min() == 0
    assert shown.max() == 255


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_display_image_shows_colours_as_colours_and_any_other_number_of_channels_by_the_first(kind):
    image = np.random.default_rng(4).integers(0, np.iinfo(kind).max, (2, 9, 9, 4), dtype=kind)
    colours = overlays.display_image(image[..., :3], Words())
    for channel in range(3):  # all three are stretched alike, so that a colour stays what it is
        low, high = np.percentile(image[0, ..., :3], (1, 99.5))
        expected = np.clip((image[0, ..., channel] - low) / (high - low), 0, 1) * 255
        assert np.abs(colours[0, ..., channel] - expected).max() <= 0.51
    for channels in (1, 2, 4):
        for words in (Words(), LGG):
            grey = overlays.display_image(image[..., :channels], words)
            assert (grey == overlays.display_image(image[..., :1], Words())).all()
            assert (grey[..., 0] == grey[..., 2]).all()
    assert not (overlays.display_image(image[..., :3], LGG) == colours).all()


def test_display_image_stretches_each_picture_by_itself_whatever_the_dtype():
    rng = np.random.default_rng(RNG_SEED)
    image = rng.integers(20, 90, (2, 8, 8, 1), dtype=np.uint8)
    normalised = (image.astype(np.float32) - 40) / 7
    normalised[1] *= 3
    assert np.abs(overlays.display_image(image).astype(int) - overlays.display_image(normalised)).max() <= 1
    assert not overlays.display_image(np.full((4, 4, 1), 200, np.uint8)).any()


def test_outline_is_the_inner_border():
    mask = np.zeros((6, 7), np.uint8)
    mask[1:5, 2:6] = 1
    expected = mask.copy()
    expected[2:4, 3:5] = 0
    assert (overlays.outline(mask) == expected).all()
    assert not overlays.outline(np.zeros((3, 3))).any()


def test_overlay_colours_the_mask_and_nothing_else():
    rng = np.random.default_rng(RNG_SEED)
    picture = np.repeat(rng.integers(0, 256, (8, 8, 1), dtype=np.uint8), 3, axis=-1)
    before = picture.copy()
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 1
    shown = overlays.overlay(picture, mask, "#FF0080", opacity=0.5)
    assert (picture == before).all()
    assert (shown[mask == 0] == picture[mask == 0]).all()
    assert (shown[overlays.outline(mask)] == (255, 0, 128)).all()
    inside = (picture[3, 3] + np.array([255, 0, 128])) / 2
    assert np.abs(shown[3, 3] - inside).max() <= 0.5


def test_difference_tells_the_three_kinds_of_pixel_apart():
    picture = np.full((1, 4, 3), 100, np.uint8)
    target, predicted = np.array([[1, 0, 1, 0]]), np.array([[1, 1, 0, 0]])
    shown = overlays.difference(picture, target, predicted)[0].astype(int)
    for pixel, color in zip(shown, (overlays.BOTH, overlays.PREDICTED, overlays.ACTUAL), strict=False):
        assert np.abs(pixel - overlays._rgb(color)).max() <= 0.2 * 255
    assert (shown[3] == 55).all()


# ---- The figures -----------------------------------------------------------------------------------------------------


def test_plot_samples(tmp_path, slices, figures):
    images, masks = slices
    titles = [f"TCGA_CS_49{s:02}_19960909, slice {s}" for s in range(3)]
    turned = images[:, ::-1].astype(np.float32) / 40 - 1
    path = plots.plot_samples(tmp_path / "samples.png", images, masks, turned, masks[:, ::-1], titles)
    assert_png(path, figures[0])
    pictures = [ax.images[0].get_array() for ax in figures[0].axes]
    assert len(pictures) == 12
    assert (pictures[0] == overlays.display_image(images[0])).all()
    assert (pictures[1] == overlays.overlay(pictures[0], masks[0, ..., 0], overlays.ACTUAL)).all()
    assert (pictures[3] == pictures[1][::-1]).all()


def test_plot_predictions_names_the_dice_of_each_slice(tmp_path, slices, figures):
    images, masks = slices
    probabilities = np.where(masks == 1, 0.9, 0.2)
    probabilities[0, 8:16, 8:12] = 0.5  # exactly the threshold: not above it
    titles = ["worst: TCGA_CS_4941_19960909, slice 12", "best: b", "empty: c"]
    path = plots.plot_predictions(tmp_path / "predictions.png", images, masks, probabilities, titles)
    assert_png(path, figures[0])
    labels = [ax.get_ylabel() for ax in figures[0].axes[::4]]
    assert labels[0].endswith("Dice of this slice 0.67")  # half of a square of 64: 2 * 32 / (64 + 32)
    assert labels[1] == "best: b\nDice of this slice 1.00"
    assert labels[2] == "empty: c\nboth masks empty: Dice 1"


def test_image_rows_of_another_shape_are_readable(tmp_path, slices, figures):
    images, masks = slices
    plots.plot_predictions(tmp_path / "p.png", images[:1, :16], masks[:1, :16], masks[:1, :16], ["one wide slice"])
    assert_readable(figures[0])


@pytest.mark.parametrize("epochs", [1, 3, 100])
def test_plot_curves(tmp_path, figures, epochs):
    history = [
        {
            "epoch": epoch,
            "learning_rate": 1e-3 / epoch,
            "train_loss": 2 / epoch,
            "validation_loss": 2.2 / epoch,
            "train_dice": 1 - 0.9 / epoch,
            "validation_dice": 0.8 - 0.7 / epoch - 0.01 * (epoch > 60),
        }
        for epoch in range(1, epochs + 1)
    ]
    path = plots.plot_curves(tmp_path / "curves.png", history, dice="pooled, smooth 100")
    assert_png(path, figures[0])
    loss_ax, dice_ax, rate_ax = figures[0].axes
    best = min(epochs, 60)
    assert dice_ax.get_title() == f"Dice: best epoch {best}, validation {0.8 - 0.7 / best:.3f}"
    assert dice_ax.get_ylabel() == "Dice (pooled, smooth 100)"
    assert [text.get_text() for text in dice_ax.get_legend().get_texts()] == ["training", "validation"]
    assert list(loss_ax.lines[1].get_ydata()) == [row["validation_loss"] for row in history]
    assert loss_ax.get_ylim()[1] > 2.2
    assert rate_ax.get_ylim()[1] > 1e-3
    plots.plot_curves(path, history, best_epoch=1)
    assert figures[1].axes[1].get_title() == "Dice: best epoch 1, validation 0.100"


def test_plot_curves_leaves_out_what_was_not_measured(tmp_path, figures):
    history = [
        {"epoch": 1, "train_loss": -0.1, "validation_loss": None, "train_dice": 0.1, "validation_dice": None},
        {"epoch": 2, "train_loss": -0.2, "validation_loss": -0.15, "train_dice": 0.2, "validation_dice": 0.15},
        {"epoch": 3, "train_loss": -0.3, "validation_loss": float("nan"), "train_dice": 0.3, "validation_dice": None},
    ]  # minus Dice, as the reference has it, validated in the second epoch alone
    plots.plot_curves(tmp_path / "curves.png", history)
    loss_ax, dice_ax = figures[0].axes
    assert list(dice_ax.lines[1].get_xdata()) == [2]
    assert dice_ax.get_title() == "Dice: best epoch 2, validation 0.150"
    assert loss_ax.get_ylim()[0] < -0.3
    assert loss_ax.get_ylim()[1] == 0
    plots.plot_curves(tmp_path / "curves.png", history[::2])
    assert figures[1].axes[1].get_title() == "Dice"


def test_plot_per_patient_sorts(tmp_path, figures):
    names, dice = ["TCGA_CS_4941_19960909", "a$b$", "患者"], [0.5, 0.9, 0.1]
    path = plots.plot_per_patient(tmp_path / "per_patient.png", names, dice, interval=(0.2, 0.8))
    assert_png(path, figures[0])
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == [names[2], names[0], names[1]]
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["mean 0.500 (95 % interval 0.200 to 0.800)", "median 0.500"]


@pytest.mark.parametrize("interval", [None, (None, None), (float("nan"), float("nan"))])
def test_plot_per_patient_of_one_patient_has_no_interval(tmp_path, figures, interval):
    plots.plot_per_patient(tmp_path / "p.png", ["a"], [0.25], interval)
    assert_readable(figures[0])
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["mean 0.250", "median 0.250"]


def test_plot_per_patient_of_many_patients_is_readable(tmp_path, figures):
    dice = np.random.default_rng(RNG_SEED).beta(6, 1.2, 44)
    plots.plot_per_patient(tmp_path / "p.png", [f"TCGA_CS_{4900 + i}_19960909" for i in range(44)], dice)
    assert_readable(figures[0])


def test_plot_feature_maps_shows_the_channels_that_vary_most(tmp_path, slices, figures):
    rng = np.random.default_rng(RNG_SEED)
    scale = np.array([1, 5, 2, 4, 3])
    maps = {"down1.conv2": rng.normal(size=(16, 16, 5)) * scale, "head": rng.normal(size=(32, 32, 1))}
    path = plots.plot_feature_maps(tmp_path / "maps.png", maps, image=slices[0][0], count=4)
    assert_png(path, figures[0])
    first_row = figures[0].axes[4:8]
    assert [ax.texts[0].get_text() for ax in first_row] == ["1", "3", "4", "2"]
    assert (first_row[0].images[0].get_array() == maps["down1.conv2"][..., 1]).all()
    assert first_row[0].get_ylabel() == "down1.conv2\n16 x 16 x 5"


def test_plot_gradient_flow_marks_zero_and_not_finite(tmp_path, figures):
    grads = {
        "down1.conv1.weight": np.array([3.0, 4.0]),
        "down1.conv1.bias": np.zeros(2),
        "down1.norm1.gamma": np.array([2e-5]),
        "head.weight": np.array([1.0, np.nan]),
        "head.bias": np.array([-0.5]),
    }
    path = plots.plot_gradient_flow(tmp_path / "flow.png", grads)
    assert_png(path, figures[0])
    ax = figures[0].axes[0]
    points = [(float(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in ax.lines if len(line.get_xdata()) == 1]
    assert (5.0, 0) in points
    assert (0.5, 2) in points
    low, high = ax.get_xlim()
    assert all(low < x < high for x, _ in points)
    assert len(points) == len(grads) + 1  # + the line between weights
    assert [label.get_text() for label in ax.get_yticklabels()] == ["down1.conv1", "down1.norm1", "head"]
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["weight", "bias", "gamma", "exactly 0", "not finite"]


# ---- Wrong arguments, and no trace left behind -----------------------------------------------------------------------


def test_wrong_arguments_are_named(tmp_path, slices):
    images, masks = slices
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match=r"^images must have as many entries .* got 3 and 2$"):
        plots.plot_samples(path, images, masks, images, masks, ["a", "b"])
    with pytest.raises(ValueError, match=r"^images must have"):
        plots.plot_predictions(path, images[:0], masks[:0], masks[:0], [])
    row = {"epoch": 1, "train_loss": 1.0, "validation_loss": 1.0, "train_dice": 0.5}
    with pytest.raises(ValueError, match="validation_dice is missing"):
        plots.plot_curves(path, [row])
    with pytest.raises(ValueError, match=r"^best_epoch must be the epoch of a row, got 2$"):
        plots.plot_curves(path, [{**row, "validation_dice": 0.5}], best_epoch=2)
    with pytest.raises(ValueError, match=r"^history must have at least one row"):
        plots.plot_curves(path, [])
    for bad in (1.1, float("nan")):
        with pytest.raises(ValueError, match=r"^dice must be in \[0, 1\], got \["):
            plots.plot_per_patient(path, ["a", "b"], [0.5, bad])
    with pytest.raises(ValueError, match=r"maps\['head'\] must be \(H, W, C\), got shape \(1, 2, 2, 1\)"):
        plots.plot_feature_maps(path, {"head": np.zeros((1, 2, 2, 1))})
    with pytest.raises(ValueError, match=r"^maps must hold"):
        plots.plot_feature_maps(path, {})
    with pytest.raises(ValueError, match=r"^grads must hold"):
        plots.plot_gradient_flow(path, {})
    assert not path.exists()


def test_same_picture_twice_and_no_global_state(tmp_path, slices):
    images, masks = slices
    style = dict(matplotlib.rcParams)
    files = [plots.plot_samples(tmp_path / f"{i}.png", images, masks, images, masks, list("abc")) for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert dict(matplotlib.rcParams) == style


def test_a_folder_that_is_not_there_is_one_line_and_no_file(tmp_path):
    with pytest.raises(UserError, match=r"no_folder.*cannot be written"):
        plots.plot_per_patient(tmp_path / "no_folder" / "p.png", ["a"], [0.5])
    assert list(tmp_path.iterdir()) == []


def test_neither_a_window_nor_pyplot_is_needed():
    code = "import sys, minunet.results.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("first", "wanted", "backend"),
    [("", "svg", "svg"), ("import matplotlib; matplotlib.use('pdf')", "svg", "pdf"), ("", "gone", "agg")],
)
def test_the_backend_of_a_notebook_stays(first, wanted, backend):
    code = f"""
{first}
from minunet.results import plots
import matplotlib, os
assert os.environ["MPLBACKEND"] == {wanted!r}
print(matplotlib.get_backend().lower())
"""
    environment = {**os.environ, "MPLBACKEND": wanted}
    environment.pop("DISPLAY", None)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{backend}\n", "")
