"""slice_leak.png: what the score of a split by slice promises, and what new patients get. The reference's second flaw.

Each network is trained once and scored twice: on the slices that :func:`minunet.data.splits.split_by_slice` kept from
it, whose neighbours it has seen, and on patients of whom it has seen nothing. The difference is the leak. It depends
on how many patients there are to learn from, so that is what is varied; everything else, the number of steps
included, stays.

The score is the Dice over all pixels together (:func:`minunet.training.metrics.pooled_counts`), the scope of the
reference. A Dice per patient would not do here: a split by slice leaves a patient three to five slices, and no volume.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from docs.figures import style, trained
from docs.figures.style import BLUE, GREY, VERMILION
from minunet import UNet
from minunet.data import phantom
from minunet.data.slices import SliceSet
from minunet.data.splits import split_by_slice
from minunet.training import metrics
from minunet.training.evaluation import predict_slices

KNOWN = 28  # patients from whom those to learn from are drawn
NEW = 12  # patients that no network has seen


class Scores(NamedTuple):
    """Pooled Dice of one network."""

    patients: int  # that it has learned from
    seed: int
    trained_on: float  # on its training slices
    held_out: float  # on other slices of the same patients: the score of the split by slice
    new: float  # on new patients


def compute(tiny: bool = False) -> list[Scores]:
    """One row a network: for each number of patients some seeds, each with other patients, split and weights."""
    size, widths, steps = (32, (2, 4), 2) if tiny else (32, (8, 16, 32), 120)
    numbers, seeds = ((2, 3), 1) if tiny else ((2, 4, 8, 16), 3)
    everybody = phantom.make(patients=KNOWN + NEW, size=size, seed=7)
    patient = everybody.patient_indices()
    new = everybody.subset(np.flatnonzero(patient >= KNOWN))
    rows = []
    for number in numbers:
        for seed in range(seeds):
            chosen = np.random.default_rng(seed).choice(KNOWN, number, replace=False)
            pool = everybody.subset(np.flatnonzero(np.isin(patient, chosen)))
            split = split_by_slice(len(pool), seed)
            # Nothing is chosen here, so validation slices are trained on too: 80 % of all.
            training = pool.subset(np.sort(np.concatenate([split.train, split.validation])))
            net = UNet(widths=widths, seed=seed, **trained.MODEL)
            for _ in trained.train(net, training, epochs=1, steps_per_epoch=steps, augmentation=None, seed=seed):
                pass
            scores = [pooled_dice(net, slices) for slices in (training, pool.subset(split.test), new)]
            rows.append(Scores(number, seed, *scores))
    return rows


def pooled_dice(net: UNet, slices: SliceSet) -> float:
    """Dice over all pixels of all ``slices`` together."""
    predicted = predict_slices(net, slices, trained.NORMALIZATION) > 0.5
    return float(metrics.dice(metrics.count(predicted, slices.masks)))


def mean(rows: list[Scores], patients: int, score: str) -> float:
    """Over the seeds."""
    return float(np.mean([getattr(row, score) for row in rows if row.patients == patients]))


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def draw(rows: list[Scores]) -> Figure:
    """Both scores over the number of patients: a dot a network, a line through the means, the leak between them."""
    figure = style.new_figure(4.4)
    ax = figure.subplots()
    numbers = sorted({row.patients for row in rows})
    places = np.arange(len(numbers))
    curves = {}
    for score, color, marker, label in (
        ("held_out", VERMILION, "o", "split by slice: other slices of the same patients"),
        ("new", BLUE, "s", f"what it is worth: {NEW} new patients"),
    ):
        curves[score] = [mean(rows, number, score) for number in numbers]
        ax.plot(places, curves[score], color=color, linewidth=2, label=label, marker=marker)
        x = [numbers.index(row.patients) + 0.06 * (row.seed - 1) for row in rows]
        ax.plot(x, [getattr(row, score) for row in rows], marker, color=color, alpha=0.45, markersize=4.5)
    ax.fill_between(places, curves["new"], curves["held_out"], color=GREY, alpha=0.12, linewidth=0)
    for place, high, low in zip(places, curves["held_out"], curves["new"], strict=True):
        ax.annotate(
            f"leak {high - low:+.2f}".replace("-", "−"),
            (place, (high + low) / 2),
            (10, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    ax.set(
        xlabel="patients trained on",
        ylabel="Dice, pooled over all pixels",
        xticks=places,
        xlim=(-0.25, len(places) - 0.4),
    )
    ax.set_xticks(places, [str(number) for number in numbers])
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw slice_leak.png into ``out``. Returns the scores of each network, and the means."""
    rows = compute(tiny)
    style.save(draw(rows), out / "slice_leak.png")
    lines = ["patients seed   trained on  held-out slices  new patients   leak"]
    for row in rows:
        lines.append(
            f"{row.patients:8} {row.seed:4} {row.trained_on:12.3f} {row.held_out:16.3f} {row.new:13.3f} "
            f"{row.held_out - row.new:+6.3f}"
        )
    for number in sorted({row.patients for row in rows}):
        held_out, new = mean(rows, number, "held_out"), mean(rows, number, "new")
        lines.append(
            f"mean of {number} patients: by slice {held_out:.3f}, new patients {new:.3f}, leak {held_out - new:+.3f}"
        )
    return lines
