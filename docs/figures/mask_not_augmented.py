"""mask_not_augmented.png: the reference's first flaw. Images are flipped, turned and zoomed, their masks are not.

Two networks that differ in one word, ``augment_masks``, trained by :func:`minunet.training.loop.fit` with the
reference's augmentation. What is seen is that the network of the flaw is asked for masks that are not where the tumours
are: its training loss stays above its own validation loss, whose images nobody has turned, while in the other network
it falls below. In the reference's curves this is the training Dice that ends below the validation Dice.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from docs.figures import style, trained
from docs.figures.style import BLUE, VERMILION
from minunet import UNet
from minunet.base import rng
from minunet.data import phantom
from minunet.data.augment import PRESETS as AUGMENTATIONS
from minunet.data.batches import prepare_batch
from minunet.results.overlays import ACTUAL, display_image, overlay
from minunet.training.config import TrainingConfig
from minunet.training.loop import TrainingData, fit
from minunet.training.step import Engine

LABELS = {True: "image and mask moved by one draw", False: "the mask left where it was"}
COLORS = {True: BLUE, False: VERMILION}


class Runs(NamedTuple):
    """The history of each run, by whether masks were augmented; several seeds each."""

    histories: dict[bool, list[list[dict[str, float]]]]
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # a picture, its mask moved with it, and left behind

    def curve(self, augment_masks: bool, name: str) -> np.ndarray:
        """One row a seed, one column an epoch."""
        return np.array([[row[name] for row in history] for history in self.histories[augment_masks]])


def compute(tiny: bool = False) -> Runs:
    """Both trainings, on the same patients, slices and draws."""
    size, widths, epochs, images, seeds = (32, (2, 4), 2, 8, 1) if tiny else (32, (8, 16, 32), 12, 120, 2)
    slices = phantom.make(patients=4 if tiny else 18, size=size, seed=3)
    is_validation = slices.patient_indices() >= (2 if tiny else 12)
    training, validation = (slices.subset(np.flatnonzero(rows)) for rows in (~is_validation, is_validation))
    data = TrainingData(training, validation, trained.NORMALIZATION)
    histories: dict[bool, list[list[dict[str, float]]]] = {True: [], False: []}
    for augment_masks, found in histories.items():
        for seed in range(seeds):
            config = TrainingConfig(
                epochs=epochs,
                batch_size=8,
                images_per_epoch=images,
                sampling="tumour",
                augmentation=AUGMENTATIONS["reference"],
                augment_masks=augment_masks,
                lr=4e-3,
                warmup_epochs=0.5,
                clip_norm=1.0,
                batch_norm_momentum=0.9,
                seed=seed,
            )
            net = UNet(widths=widths, seed=seed, **trained.MODEL)
            with tempfile.TemporaryDirectory() as folder:
                # The plain path, so that every machine draws the same curves, up to rounding.
                progress = fit(Engine(net, config.loss), data, config, folder, progress_bar=False)
            found.append(progress.history)
    return Runs(histories, _examples())


def _examples() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Three draws for the slice with the largest tumour, drawn sharply."""
    slices = phantom.make(patients=3, size=96, seed=3)
    where = np.array([slices.masks.sum(axis=(1, 2, 3), dtype=np.int64).argmax()])
    statistics = trained.NORMALIZATION.statistics(slices)
    found = []
    for step in (1, 2, 5):
        both = [
            prepare_batch(
                slices,
                statistics,
                where,
                "cpu",
                augmentation=AUGMENTATIONS["reference"],
                move_masks=move_masks,
                key=rng.Key(seed=0, step=step),
            )
            for move_masks in (True, False)
        ]
        found.append((display_image(both[0].x)[0], both[0].target[0, ..., 0], both[1].target[0, ..., 0]))
    return found


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def draw(runs: Runs) -> Figure:
    """Above what the network is shown and asked for, below the curves."""
    figure = style.new_figure(6.2)
    grid = figure.add_gridspec(2, 6, height_ratios=(1, 2.6))
    above = [figure.add_subplot(grid[0, place]) for place in range(6)]
    for place, ax in enumerate(above):
        picture, moved, left = runs.examples[place % 3]
        ax.imshow(overlay(picture, moved if place < 3 else left, ACTUAL, opacity=0.35))
        style.bare(ax)
        if place % 3 == 1:
            ax.set_title(LABELS[place < 3], color=COLORS[place < 3])
    loss_ax, dice_ax = figure.add_subplot(grid[1, :3]), figure.add_subplot(grid[1, 3:])
    for augment_masks, label in LABELS.items():
        color = COLORS[augment_masks]
        for ax, name in ((loss_ax, "loss"), (dice_ax, "dice")):
            parts = (("validation", "-"),) if name == "dice" else (("train", "--"), ("validation", "-"))
            for part, line in parts:
                values = runs.curve(augment_masks, f"{part}_{name}")
                epochs = np.arange(1, values.shape[1] + 1)
                words = f"{'training' if part == 'train' else 'validation'}, {label}"
                ax.plot(epochs, values.mean(axis=0), line, color=color, linewidth=2, label=words)
                ax.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
    loss_ax.set(title="loss", xlabel="epoch", ylim=(0, None))
    dice_ax.set(title="Dice per validation patient, mean", xlabel="epoch", ylim=(0, 1))
    handles, labels = loss_ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw mask_not_augmented.png into ``out``. Returns the last values of the curves."""
    runs = compute(tiny)
    style.save(draw(runs), out / "mask_not_augmented.png")
    lines = []
    for augment_masks, label in LABELS.items():
        last = {name: runs.curve(augment_masks, name)[:, -1] for name in ("train_loss", "validation_loss")}
        dice = runs.curve(augment_masks, "validation_dice")[:, -1]
        lines.append(
            f"{label}: training loss {last['train_loss'].mean():.3f}, "
            f"validation loss {last['validation_loss'].mean():.3f}, validation Dice {dice.mean():.3f} "
            f"(by seed {', '.join(f'{value:.3f}' for value in dice)})"
        )
    return lines
