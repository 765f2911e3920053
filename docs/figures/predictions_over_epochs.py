"""predictions_over_epochs.png: what the network believes before training and after 1, 2, 4 and 8 epochs.

Slices of test patients, with the probability of each pixel in colour. What is seen is that the untrained network
calls nearly everything tumour, that after one epoch it knows where a tumour is, and that its outline and the
certainty that all the rest is none take the remaining epochs.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from docs.figures import style, trained
from minunet.data.slices import SliceSet
from minunet.results.overlays import ACTUAL, display_image, outline
from minunet.training import metrics
from minunet.training.evaluation import predict_slices


def compute(tiny: bool = False) -> tuple[SliceSet, dict[int, np.ndarray]]:
    """The test patients, and the probabilities (S, H, W, 1) of all their slices after each of some epochs."""
    run = trained.network(tiny)
    epochs = [epoch for epoch in (0, 1, 2, 4, 8) if epoch in run.after_epoch]
    return run.test, {e: predict_slices(run.after_epoch[e], run.test, trained.NORMALIZATION) for e in epochs}


def dice_per_patient(slices: SliceSet, probabilities: np.ndarray) -> float:
    """The mean over patients of their 3-D Dice."""
    counts = metrics.count(probabilities > 0.5, slices.masks, axis=(1, 2, 3))
    _, volumes = metrics.per_patient_counts(counts, slices.patients)
    return float(metrics.dice(volumes).mean())


def choose(slices: SliceSet) -> list[int]:
    """Four slices: the largest tumour of three patients, spread over the sizes, and a slice without tumour."""
    area = slices.masks.sum(axis=(1, 2, 3), dtype=np.int64)
    patient = slices.patient_indices()
    largest = [max(np.flatnonzero(patient == p), key=lambda s: area[s]) for p in range(patient.max() + 1)]
    by_area = sorted(largest, key=lambda s: -area[s])
    chosen = [by_area[0], by_area[len(by_area) // 2], by_area[-2]]
    # Between two slices of the middle of the head there is brain, and no tumour.
    empty = [s for s in np.flatnonzero(area == 0) if 0.35 < slices.numbers[s] / max(slices.numbers) < 0.6]
    return [int(s) for s in [*chosen, (empty or np.flatnonzero(area == 0))[0]]]


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def draw(slices: SliceSet, probabilities: dict[int, np.ndarray]) -> Figure:
    """One row a slice, one column an epoch, and the slice itself before them."""
    chosen = choose(slices)
    columns = 1 + len(probabilities)
    figure = style.new_figure(5.3)
    axes = figure.subplots(len(chosen), columns)
    pictures = display_image(slices.images[chosen])
    for row, (s, grey) in enumerate(zip(chosen, pictures, strict=True)):
        border = outline(slices.masks[s, ..., 0])
        axes[row, 0].imshow(grey)
        for ax, (epoch, p) in zip(axes[row, 1:], probabilities.items(), strict=True):
            shown = ax.imshow(p[s, ..., 0], cmap="cividis", vmin=0, vmax=1)
            if row == 0:
                ax.set_title(f"epoch {epoch}\nDice {dice_per_patient(slices, p):.2f}")
        for ax in axes[row]:
            style.bare(ax)
            if border.any():
                ax.contour(slices.masks[s, ..., 0], levels=[0.5], colors=[ACTUAL], linewidths=1.3)
        axes[row, 0].set_ylabel("tumour" if border.any() else "no tumour")
    axes[0, 0].set_title("FLAIR and\nactual outline")
    figure.colorbar(shown, ax=axes, label="probability of tumour", shrink=0.6, aspect=30)
    return figure


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw predictions_over_epochs.png into ``out``. Returns the Dice after each epoch."""
    slices, probabilities = compute(tiny)
    style.save(draw(slices, probabilities), out / "predictions_over_epochs.png", style.COARSE_DPI)
    count = len(slices.patient_names())
    lines = []
    for epoch, p in probabilities.items():
        called = 100 * (p > 0.5).mean()
        lines.append(
            f"after epoch {epoch}: mean Dice of {count} test patients {dice_per_patient(slices, p):.3f}; "
            f"{called:.1f} % of the pixels called tumour ({100 * slices.masks.mean():.1f} % are)"
        )
    return lines
