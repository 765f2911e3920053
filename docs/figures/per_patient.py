"""per_patient.png: how good the masks are for each patient, and how many Dices the same predictions have.

Everything is :func:`minunet.training.metrics.evaluate_masks`. What is seen is that a mean hides patients who are far
from it, that with so few patients the mean is known to some hundredths only, and that the name "Dice" alone does not
say a figure.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.figures import style, trained
from docs.figures.style import BLUE, GREY, ORANGE, VERMILION
from minunet.training import metrics
from minunet.training.evaluation import predict_slices


def compute(tiny: bool = False) -> tuple[metrics.Scores, float]:
    """The scores on the test patients, and the mean probability of the pixels that are no tumour."""
    run = trained.network(tiny)
    net, slices = run.after_epoch[max(run.after_epoch)], run.test
    probabilities = predict_slices(net, slices, trained.NORMALIZATION)
    scores = metrics.evaluate_masks(probabilities, slices.masks, slices.patients)
    return scores, float(probabilities[slices.masks == 0].mean())


def five_dices(scores: metrics.Scores) -> dict[str, float]:
    """The same predictions under five definitions."""
    return {
        "per patient, 3-D, mean": scores.per_patient.summary.dice.mean,
        "pooled over all pixels": scores.pooled.dice,
        "per slice, empty slices left out": scores.per_slice.mean_dice_tumour_slices,
        "per slice, empty slices count 1 or 0": scores.per_slice.mean_dice_empty_as_one,
        "the reference's: soft, pooled, smoothed": scores.reference.soft_dice_pooled,
    }


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def draw(scores: metrics.Scores) -> Figure:
    """Above one dot a patient, below one dot a definition."""
    patients = len(scores.per_patient.names)
    figure = style.new_figure(3.2 + 0.21 * patients)
    above, below = figure.subplots(2, 1, height_ratios=(patients + 1, 6), sharex=True)
    _patients(above, scores)
    five = five_dices(scores)
    rows = np.arange(len(five))[::-1]
    below.hlines(rows, 0, list(five.values()), color="#C8C8C8", linewidth=1)
    below.plot(list(five.values()), rows, "D", color=VERMILION, markersize=6)
    for row, value in zip(rows, five.values(), strict=True):
        below.annotate(f"{value:.3f}", (value, row), (8, 0), textcoords="offset points", va="center", fontsize=9)
    below.set_yticks(rows, list(five))
    below.set(
        ylim=(-0.6, len(five) - 0.4), xlim=(0, 1.06), xlabel="Dice", title="The same predictions, five definitions"
    )
    below.grid(False, axis="y")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _patients(ax: Axes, scores: metrics.Scores) -> None:
    values = np.array(scores.per_patient.dice)
    order = np.argsort(values, kind="stable")
    rows = np.arange(len(values))
    summary = scores.per_patient.summary.dice
    ax.hlines(rows, 0, values[order], color="#C8C8C8", linewidth=1)
    ax.plot(values[order], rows, "o", color=BLUE, markersize=6)
    low, high = summary.mean_interval
    if low is not None:
        ax.axvspan(
            low,
            high,
            color=ORANGE,
            alpha=0.3,
            linewidth=0,
            zorder=0,
            label=f"95 % interval of the mean, {low:.3f} to {high:.3f}",
        )
    ax.axvline(summary.mean, color=ORANGE, linewidth=2, zorder=1, label=f"mean {summary.mean:.3f}")
    ax.axvline(summary.median, color=GREY, linestyle="--", zorder=1, label=f"median {summary.median:.3f}")
    names = scores.per_patient.names
    ax.set_yticks(rows, [names[place] for place in order])
    ax.tick_params(axis="x", labelbottom=False)
    ax.set(ylim=(-0.7, len(values) - 0.3), title="One dot a patient: Dice of all slices together")
    ax.grid(False, axis="y")


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw per_patient.png into ``out``. Returns the report as text."""
    scores, background = compute(tiny)
    style.save(draw(scores), out / "per_patient.png")
    names, values = scores.per_patient.names, scores.per_patient.dice
    worst, best = int(np.argmin(values)), int(np.argmax(values))
    lines = [f"{name}: {value:.3f}" for name, value in five_dices(scores).items()]
    low, high = scores.per_patient.summary.dice.mean_interval
    lines.append(f"95 % interval of the mean over {len(values)} patients: {low:.3f} to {high:.3f}")
    lines.append(f"the worst patient {names[worst]} {values[worst]:.3f}, the best {names[best]} {values[best]:.3f}")
    lines.append(f"mean probability of the pixels that are no tumour: {background:.3f}, which only the soft Dice sees")
    return [*lines, "", *metrics.format_report(scores).splitlines()]
