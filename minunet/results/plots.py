"""The pictures of a run: samples, curves, predictions, Dice by patient, feature maps, gradient norms.

Every function writes one PNG, or with a UserError none, and returns its path. The figures are matplotlib
``Figure`` objects that no window or global state knows of, so that they can be drawn on a machine without a
display, in any thread, in any order. Importing this module imports matplotlib, which takes half a second: a command
does so when it has read its command line.
"""

import contextlib
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from minunet.base.backend import Array, to_numpy
from minunet.base.durable import write_durably
from minunet.data.slices import LGG, Words
from minunet.results.overlays import (
    ACTUAL,
    BLUE,
    BOTH,
    GREEN,
    ORANGE,
    PREDICTED,
    PURPLE,
    TRAINING,
    VALIDATION,
    VERMILION,
    difference,
    display_image,
    overlay,
    overlay_targets,
    target_colors,
)
from minunet.training import metrics


@contextlib.contextmanager
def _any_backend() -> Iterator[None]:
    """Let matplotlib be imported whatever MPLBACKEND says.

    A notebook sets it for the programs that are run from it, too, where its backend may not be installed, and the
    import would fail. The pictures here are files and need none. A notebook that gets matplotlib from here keeps it.
    """
    imported, backend = "matplotlib" in sys.modules, os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None and not imported:
        with contextlib.suppress(ValueError):  # it is not installed
            matplotlib.rcParams["backend"] = backend


with _any_backend():
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

_NAMES_BESIDE = 6  # so many targets have room beside a row of pictures
_WIDTH = 8.8  # inches; at 150 dots an inch a little wider than the column of a README, so sharp on any screen
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "text.parse_math": False,  # a "$" in the name of a patient is a "$"
}


# ---- Pictures of slices ----------------------------------------------------------------------------------------------


def plot_samples(
    path: str | PathLike,
    images: Array,
    masks: Array,
    augmented_images: Array,
    augmented_masks: Array,
    titles: Sequence[str],
    words: Words = LGG,
    targets: Sequence[str] = (),
) -> Path:
    """One row a slice: the image, its mask over it, and the same two after augmentation.

    ``images`` and ``augmented_images`` are (S, H, W, C), ``masks`` and ``augmented_masks`` (S, H, W, T), one of 0 and 1
    for each of T ``targets`` (without names there is one), ``titles`` S strings, ``words`` those of the data set. An
    augmented mask that does not lie on its tumour is what this picture is made to show.

    Raises ValueError if the numbers of images, masks and titles differ, or there is none.
    """
    _check_lengths(
        len(titles), images=images, masks=masks, augmented_images=augmented_images, augmented_masks=augmented_masks
    )
    plain, turned = display_image(images, words), display_image(augmented_images, words)
    rows = [
        [plain[s], overlay_targets(plain[s], masks[s]), turned[s], overlay_targets(turned[s], augmented_masks[s])]
        for s in range(len(titles))
    ]
    headings = ("image", "with its mask", "augmented", "with its mask")
    names = targets or [f"{words.target}, as the mask marks it"]
    return _plot_image_rows(path, rows, headings, titles, _legend(names))


def _legend(targets: Sequence[str]) -> dict[str, str]:
    """The colour of each target."""
    return dict(zip(targets, target_colors(len(targets)), strict=True))


def plot_predictions(
    path: str | PathLike,
    images: Array,
    targets: Array,
    probabilities: Array,
    titles: Sequence[str],
    threshold: float = 0.5,
    words: Words = LGG,
) -> Path:
    """One row a slice: image, actual mask, predicted mask, and where the two differ.

    ``images`` (S, H, W, C), ``targets`` and ``probabilities`` (S, H, W, 1), ``titles`` S strings. A pixel is
    predicted to be foreground where its probability exceeds ``threshold``. Beside each title stands the Dice of that
    slice alone, 2 TP / (2 TP + FP + FN), by convention 1 where both masks are empty.

    Raises ValueError if the numbers of images, masks and titles differ, or there is none.
    """
    _check_lengths(len(titles), images=images, targets=targets, probabilities=probabilities)
    pictures = display_image(images, words)
    actual = to_numpy(targets)[..., 0] > 0
    predicted = to_numpy(probabilities)[..., 0] > threshold
    rows, labels = [], []
    for picture, a, p, title in zip(pictures, actual, predicted, titles, strict=True):
        rows.append([picture, overlay(picture, a, ACTUAL), overlay(picture, p, PREDICTED), difference(picture, a, p)])
        size = a.sum() + p.sum()
        dice = f"Dice of this {words.image} {2 * (a & p).sum() / size:.2f}" if size else "both masks empty: Dice 1"
        labels.append(f"{title}\n{dice}")
    headings = ("image", "actual", "predicted", "difference")
    legend = {
        "actual; false negative": ACTUAL,
        "predicted; false positive": PREDICTED,
        "both: true positive": BOTH,
    }
    return _plot_image_rows(path, rows, headings, labels, legend)


def _plot_image_rows(
    path: str | PathLike,
    rows: Sequence[Sequence[np.ndarray]],
    headings: Sequence[str],
    labels: Sequence[str],
    legend: Mapping[str, str],
) -> Path:
    """A grid of pictures: ``headings`` over the columns, ``labels`` beside the rows, a legend below."""
    side = (_WIDTH - 0.5) / len(headings)  # 0.5 inch for the labels
    height, width = rows[0][0].shape[:2]
    with matplotlib.rc_context(_STYLE):
        columns = _columns(list(legend))
        below = 0.6 + 0.2 * (-(-len(legend) // columns) - 1)  # inches for the legend
        figure = Figure(figsize=(_WIDTH, len(rows) * side * height / width + below), layout=_tight(h_pad=0.03))
        axes = figure.subplots(len(rows), len(headings), squeeze=False)
        for r, (row, label) in enumerate(zip(rows, labels, strict=True)):
            for ax, picture, heading in zip(axes[r], row, headings, strict=True):
                ax.imshow(picture)
                _hide_axes(ax)
                if r == 0:
                    ax.set_title(heading)
            lines = [line for part in label.split("\n") for line in textwrap.wrap(part, 30)]
            axes[r, 0].set_ylabel("\n".join(lines), fontsize=8)
        handles = [Patch(facecolor=color, edgecolor=_edge(color), label=label) for label, color in legend.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
        return _save(figure, path)


def _columns(labels: Sequence[str]) -> int:
    """In how many columns a legend goes below a figure: about 110 letters, with the marks, have room in a line."""
    return max(1, min(len(labels), 4, 110 // (max(map(len, labels)) + 7)))


def _edge(color: str) -> str:
    """The colour of the line around a mark: white would be lost on white paper."""
    return "#555555" if color == "#FFFFFF" else color


def plot_target_predictions(
    path: str | PathLike,
    images: Array,
    actual: Array,
    predicted: Array,
    titles: Sequence[str],
    targets: Sequence[str],
    words: Words = LGG,
) -> Path:
    """Of several targets, one row a slice: image, actual masks, predicted masks, what was missed and what was wrong.

    ``images`` (S, H, W, C), ``actual`` and ``predicted`` (S, H, W, T) of 0 and 1, one mask for each of the T
    ``targets``. Missed is what only the actual mask of a target holds, wrong what only the predicted one does, each in
    the colour of that target: where one class was taken for another, both pictures show it. Beside each title stands
    the Dice of each target in that slice.

    Raises ValueError if the numbers of images, masks and titles differ, or there is none.
    """
    _check_lengths(len(titles), images=images, actual=actual, predicted=predicted)
    pictures, actual, predicted = display_image(images, words), to_numpy(actual) > 0, to_numpy(predicted) > 0
    rows, labels = [], []
    for picture, a, p, title in zip(pictures, actual, predicted, titles, strict=True):
        dimmed = (0.55 * picture).astype(np.uint8)
        missed, wrong = (overlay_targets(dimmed, only, opacity=0.8) for only in (a & ~p, p & ~a))
        rows.append([picture, overlay_targets(picture, a), overlay_targets(picture, p), missed, wrong])
        dices = metrics.dice(metrics.count(p, a, axis=(0, 1)))
        found = [f"{name[:20]} {value:.2f}" for name, value in zip(targets, dices, strict=True)]
        found = found[:_NAMES_BESIDE] + ["..."] * (len(found) > _NAMES_BESIDE)
        labels.append("\n".join([title, f"Dice of this {words.image}:", *found]))
    headings = ("image", "actual masks", "predicted masks", "missed", "wrong")
    return _plot_image_rows(path, rows, headings, labels, _legend(targets))


def _tight(h_pad: float) -> ConstrainedLayoutEngine:
    """Pictures side by side with hardly a gap (inches)."""
    return ConstrainedLayoutEngine(w_pad=0.02, h_pad=h_pad, wspace=0, hspace=0)


def _hide_axes(ax: Axes) -> None:
    """No ticks, grid or frame; the label stays (``set_axis_off`` would take it along)."""
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


# ---- Pictures of numbers ---------------------------------------------------------------------------------------------


def plot_curves(
    path: str | PathLike,
    history: Sequence[Mapping[str, float | None]],
    best_epoch: int | None = None,
    dice: str = "mean over patients, 3-D",
) -> Path:
    """Loss, Dice and learning rate over the epochs, training beside validation, the best epoch marked.

    ``history`` has one row an epoch, as ``training.Progress.history``, with "epoch", "train_loss",
    "validation_loss", "train_dice", "validation_dice" and, if it is to be drawn, "learning_rate"; a value is None or
    NaN where it was not measured. ``dice`` says which Dice it is. The best epoch is ``best_epoch``, or if that is
    None the first with the highest validation Dice.

    Raises ValueError if there is no row, a row lacks one of these, or no row is that of ``best_epoch``.
    """
    if not history:
        raise ValueError("history must have at least one row, got none")
    required = ("epoch", "train_loss", "validation_loss", "train_dice", "validation_dice")
    with_rate = "learning_rate" in history[0]
    columns = {}
    for name in (*required, *(("learning_rate",) if with_rate else ())):
        if any(name not in row for row in history):
            raise ValueError(f"each row of history must have {', '.join(required)}; {name} is missing")
        columns[name] = np.array([np.nan if row[name] is None else row[name] for row in history], float)
    epochs, scores = columns["epoch"], columns["validation_dice"]
    if best_epoch is not None and best_epoch not in epochs:
        raise ValueError(f"best_epoch must be the epoch of a row, got {best_epoch}")
    best = None
    if best_epoch is not None:
        best = int(np.flatnonzero(epochs == best_epoch)[0])
    elif np.isfinite(scores).any():
        best = int(np.nanargmax(scores))

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 4.7 if with_rate else 3.4), layout="constrained")
        grid = figure.add_gridspec(2 if with_rate else 1, 2, height_ratios=(3.6, 1) if with_rate else None)
        loss_ax, dice_ax = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
        marker = "o" if len(epochs) <= 40 else ""  # a dot an epoch while there is room for it: one epoch is one dot
        for ax, name in ((loss_ax, "loss"), (dice_ax, "dice")):
            for part, color, label in (("train", TRAINING, "training"), ("validation", VALIDATION, "validation")):
                values = columns[f"{part}_{name}"]
                known = np.isfinite(values)
                ax.plot(epochs[known], values[known], color=color, label=label, marker=marker, markersize=3.5)
            # Below the axes: it never hides a curve.
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
        loss_ax.set(title="Loss", ylabel="loss", ylim=_from_zero(columns["train_loss"], columns["validation_loss"]))
        dice_ax.set(title="Dice", ylabel=f"Dice ({dice})", ylim=(0, 1.02))
        if best is not None:
            for ax in (loss_ax, dice_ax):
                ax.axvline(epochs[best], color="#555555", linestyle=":", zorder=1)
            dice_ax.plot(epochs[best], scores[best], marker="*", markersize=13, color=VALIDATION, markeredgecolor="k")
            dice_ax.set_title(f"Dice: best epoch {epochs[best]:g}, validation {scores[best]:.3f}")
        axes = [loss_ax, dice_ax]
        if with_rate:
            rate_ax = figure.add_subplot(grid[1, :])
            rate_ax.plot(epochs, columns["learning_rate"], color="#555555", marker=marker, markersize=3.5)
            rate_ax.set(ylabel="learning rate", ylim=_from_zero(columns["learning_rate"]))
            rate_ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=False)
            axes.append(rate_ax)
        for ax in axes:
            ax.set(xlabel="epoch", xlim=(epochs.min() - 0.5, epochs.max() + 0.5))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return _save(figure, path)


def _from_zero(*columns: np.ndarray) -> tuple[float, float]:
    """Limits of an axis that hold 0 and every finite value, with a margin."""
    values = np.concatenate([column[np.isfinite(column)] for column in columns])
    low, high = min(values, default=0.0), max(values, default=1.0)
    low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.07 * (high - low or 1.0)
    return low - margin * (low < 0), high + margin * (high > 0 or low == high)


def plot_per_patient(
    path: str | PathLike,
    names: Sequence[str],
    dice: Sequence[float],
    interval: Sequence[float | None] | None = None,
    title: str = "Dice per patient (3-D: all slices of a patient counted together)",
) -> Path:
    """One dot a patient, sorted by Dice, with the mean, its ``interval`` and the median.

    ``names`` and ``dice`` have one entry a patient; ``interval`` is the (low, high) of the mean: the 95 % bootstrap
    interval over patients of ``minunet.training.metrics``, None or NaN where there is none. ``title`` says which
    Dice it is.

    Raises ValueError if the numbers of names and values differ, there is none, or a value is not in [0, 1].
    """
    values = np.array(dice, float)
    _check_lengths(len(names), dice=values)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"dice must be in [0, 1], got {[float(v) for v in values if not 0 <= v <= 1]}")
    order = np.argsort(values, kind="stable")  # ascending: the best patient ends up on top
    rows = np.arange(len(values))
    mean, median = values.mean(), np.median(values)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.5 + 0.19 * len(values)), layout="constrained")
        ax = figure.add_subplot()
        ax.hlines(rows, 0, values[order], color="#C8C8C8", linewidth=1)
        ax.plot(values[order], rows, "o", color=BLUE, markersize=5)
        for row, value in zip(rows, values[order], strict=True):
            # To the right of its dot, over the lines of mean and median that may pass there.
            ax.annotate(
                f"{value:.2f}",
                (value, row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )
        label = f"mean {mean:.3f}"
        low, high = (np.nan if end is None else float(end) for end in interval or (None, None))
        if low <= high:
            ax.axvspan(low, high, color=ORANGE, alpha=0.25, linewidth=0, zorder=0)
            label += f" (95 % interval {low:.3f} to {high:.3f})"
        ax.axvline(mean, color=VERMILION, label=label, zorder=1)
        ax.axvline(median, color="k", linestyle="--", label=f"median {median:.3f}", zorder=1)
        ax.set(xlim=(0, 1.05), ylim=(-0.7, len(values) - 0.3), xticks=np.linspace(0, 1, 11), xlabel="Dice")
        ax.set_yticks(rows, [names[i] for i in order], fontsize=8)
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
        figure.suptitle(title, fontsize=10, fontweight="bold")
        figure.legend(loc="outside lower center", ncols=2)
        return _save(figure, path)


def plot_targets_per_patient(
    path: str | PathLike, names: Sequence[str], dices: Mapping[str, Sequence[float]], title: str
) -> Path:
    """One row a patient, sorted by the mean over the targets, with one dot a target, and the mean of each target.

    ``names`` are those of the patients; ``dices`` maps the name of each target to its Dice, one value a patient.
    ``title`` says which Dice it is.

    Raises ValueError if the numbers of names and values differ, there is none, or a value is not in [0, 1].
    """
    values = np.array(list(dices.values()), float)
    for name, of_target in dices.items():
        _check_lengths(len(names), **{f"dices[{name!r}]": np.array(of_target)})
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"dices must be in [0, 1], got values from {values.min()} to {values.max()}")
    order = np.argsort(values.mean(axis=0), kind="stable")  # ascending: the best patient ends up on top
    rows = np.arange(len(names))
    with matplotlib.rc_context(_STYLE):
        legend = _legend([f"{name}, mean {np.mean(of_target):.3f}" for name, of_target in dices.items()])
        columns = _columns(list(legend))
        below = 1.5 + 0.2 * (-(-len(legend) // columns) - 1)
        figure = Figure(figsize=(_WIDTH, below + (0.16 + 0.07 * len(dices)) * len(names)), layout="constrained")
        ax = figure.add_subplot()
        ax.hlines(rows, 0, 1, color="#E5E5E5", linewidth=1)
        shifts = np.linspace(0.3, -0.3, len(dices)) if len(dices) > 1 else [0]  # so that no dot hides another
        for (label, color), of_target, shift in zip(legend.items(), values, shifts, strict=True):
            dots = of_target[order], rows + shift
            ax.plot(*dots, "o", color=color, label=label, markersize=5, markeredgecolor="#555555")
        ax.set(xlim=(0, 1.03), ylim=(-0.7, len(rows) - 0.3), xticks=np.linspace(0, 1, 11), xlabel="Dice")
        ax.set_yticks(rows, [names[i] for i in order], fontsize=8)
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
        figure.suptitle(title, fontsize=10, fontweight="bold")
        figure.legend(loc="outside lower center", ncols=columns)
        return _save(figure, path)


# ---- Pictures of what goes on inside the network ---------------------------------------------------------------------


def plot_feature_maps(
    path: str | PathLike, maps: Mapping[str, Array], image: Array | None = None, count: int = 8
) -> Path:
    """One row a layer: the ``count`` channels of its output that vary most over the image, strongest first.

    ``maps`` maps the dotted name of a layer to its output for one image, (H, W, C); ``image`` (H, W, C), if given,
    is shown above. Each map is stretched from its own smallest (dark) to its own largest value (bright): the picture
    compares patterns, not sizes.

    Raises ValueError if there is no layer or a map has not three axes.
    """
    if not maps:
        raise ValueError("maps must hold at least one layer, got none")
    for name, values in maps.items():
        if values.ndim != 3:
            raise ValueError(f"maps[{name!r}] must be (H, W, C), got shape {tuple(values.shape)}")
    first = 0 if image is None else 1
    side = (_WIDTH - 1.5) / count  # 1.5 inches for the names
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, (len(maps) + first) * side + 0.3), layout=_tight(h_pad=0.02))
        axes = figure.subplots(len(maps) + first, count, squeeze=False)
        for ax in axes.flat:
            _hide_axes(ax)
        if image is not None:
            axes[0, 0].imshow(display_image(image))
            _name_row(axes[0, 0], "input", image.shape)
        for row, (name, values) in zip(axes[first:], maps.items(), strict=True):
            values = to_numpy(values).astype(np.float64)
            strongest = np.argsort(-values.std(axis=(0, 1)), kind="stable")[:count]
            for ax, channel in zip(row, strongest, strict=False):
                ax.imshow(values[..., channel], cmap="viridis")
                ax.text(
                    0.03, 0.97, str(channel), transform=ax.transAxes, va="top", fontsize=6, color="white", bbox=_BEHIND
                )
            _name_row(row[0], name, values.shape)
        figure.suptitle(
            "Feature maps: the channels that vary most (number at the top left)", fontsize=10, fontweight="bold"
        )
        return _save(figure, path)


_BEHIND = {"facecolor": "black", "edgecolor": "none", "alpha": 0.6, "pad": 1}  # keeps a number readable on any map


def _name_row(ax: Axes, name: str, shape: Sequence[int]) -> None:
    text = f"{name}\n{' x '.join(map(str, shape))}"
    ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)


def plot_gradient_flow(path: str | PathLike, grads: Mapping[str, Array]) -> Path:
    """The Euclidean norm of each parameter's gradient, one line a layer, in the order of the forward pass.

    ``grads`` maps dotted parameter names ("down1.conv1.weight") to arrays: what ``UNet.backward`` returns. The scale
    is logarithmic. A gradient that is exactly zero stands at the left edge as an open marker, one with a NaN or an
    infinity at the right edge as a cross. (The bias of a convolution before a batch norm has gradient 0, up to
    rounding: far to the left of all others.)

    Raises ValueError if there is no gradient.
    """
    if not grads:
        raise ValueError("grads must hold at least one gradient, got none")
    layers: dict[str, dict[str, float]] = {}
    for name, grad in grads.items():
        layer, _, parameter = name.rpartition(".")
        layers.setdefault(layer, {})[parameter] = float(np.linalg.norm(to_numpy(grad).astype(np.float64)))
    norms = [norm for row in layers.values() for norm in row.values()]
    visible = [norm for norm in norms if np.isfinite(norm) and norm > 0] or [1.0]
    low, high = min(visible) / 5, max(visible) * 5

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.4 + 0.17 * len(layers)), layout="constrained")
        ax = figure.add_subplot()
        parameters = list(dict.fromkeys(parameter for row in layers.values() for parameter in row))
        styles = {"weight": ("o", BLUE), "bias": ("s", ORANGE), "gamma": ("^", GREEN), "beta": ("v", PURPLE)}
        flow = [(row["weight"], y) for y, row in enumerate(layers.values()) if 0 < row.get("weight", 0) < np.inf]
        if flow:
            ax.plot(
                *zip(*flow, strict=True), color=BLUE, alpha=0.35, linewidth=1
            )  # leads the eye from weight to weight
        for parameter in parameters:
            marker, color = styles.get(parameter, ("D", "#555555"))
            for y, row in enumerate(layers.values()):
                norm = row.get(parameter)
                if norm is None:
                    continue
                if not np.isfinite(norm):
                    ax.plot(high, y, "X", color="k", markersize=7)
                elif norm == 0:
                    ax.plot(low, y, marker, color=color, markersize=5, markerfacecolor="white")
                else:
                    ax.plot(norm, y, marker, color=color, markersize=5)
        handles = [
            Line2D(
                [],
                [],
                linestyle="",
                marker=styles.get(p, ("D", ""))[0],
                color=styles.get(p, ("", "#555555"))[1],
                label=p,
            )
            for p in parameters
        ]
        if 0 in norms:
            handles.append(
                Line2D([], [], linestyle="", marker="o", color="k", markerfacecolor="white", label="exactly 0")
            )
        if not np.isfinite(norms).all():
            handles.append(Line2D([], [], linestyle="", marker="X", color="k", label="not finite"))
        ax.set(
            xscale="log",
            xlim=(low / 2, high * 2),
            ylim=(len(layers) - 0.4, -0.6),
            xlabel="Euclidean norm of the gradient",
        )
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the default needs mathtext
        ax.set_yticks(range(len(layers)), list(layers), fontsize=8)
        ax.tick_params(axis="y", length=0)
        figure.suptitle("Gradient norm by layer (top: first layer of the forward pass)", fontsize=10, fontweight="bold")
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        return _save(figure, path)


def _check_lengths(count: int, **arrays: Array) -> None:
    for name, array in arrays.items():
        if len(array) != count or count == 0:
            raise ValueError(
                f"{name} must have as many entries as there are rows, at least 1; got {len(array)} and {count}"
            )


def _save(figure: Figure, path: str | PathLike) -> Path:
    """Write ``figure`` to ``path`` as a PNG of 150 dots an inch, without the date and version matplotlib would add."""
    with warnings.catch_warnings():
        # Names of patients may hold letters that the font lacks. A box in their place is enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        write_durably(path, lambda file: figure.savefig(file, dpi=150, format="png", metadata={"Software": None}))
    return Path(path)
