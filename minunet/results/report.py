"""What a run leaves for people: its pictures, its figures and the table at its end."""

from pathlib import Path
from typing import Any

import numpy as np

from minunet.base import rng
from minunet.base.backend import to_numpy
from minunet.base.durable import json_text, write_text
from minunet.data.batches import prepare_batch
from minunet.data.normalize import Normalization
from minunet.data.phantom import best_flair_threshold_dice
from minunet.data.slices import LGG, SliceSet, Words
from minunet.results.plots import plot_curves, plot_per_patient, plot_predictions, plot_samples
from minunet.results.prediction import resize_probabilities
from minunet.training import metrics
from minunet.training.config import TrainingConfig


def write_samples(folder: Path, slices: SliceSet, config: TrainingConfig, normalization: Normalization) -> None:
    """``samples.png``: a training slice of each of four patients, its mask, and the pair augmented as in training."""
    names = slices.patient_names()
    chosen = [_largest_tumour(slices, names[place]) for place in _spread(len(names), 4)]
    batch = prepare_batch(
        slices,
        normalization.statistics(slices),
        np.array(chosen),
        "cpu",
        augmentation=config.augmentation,
        move_masks=config.augment_masks,
        key=rng.Key(config.seed),
    )
    titles = [_title(slices, place) for place in chosen]
    plot_samples(
        folder / "samples.png",
        slices.images[chosen],
        slices.masks[chosen],
        batch.x,
        to_numpy(batch.target),
        titles,
        slices.words,
    )


def write_curves(folder: Path, history: list[dict[str, float]], best_epoch: int | None, words: Words = LGG) -> None:
    """``curves.png``: loss and Dice over the epochs (from 1), training beside validation."""
    plot_curves(folder / "curves.png", history, best_epoch, f"mean over {words.group}s, {words.pooled}")


def write_test(
    folder: Path,
    slices: SliceSet,
    probabilities: np.ndarray,
    normalization: Normalization,
    own: SliceSet | None = None,
    **extra: Any,
) -> str:
    """``metrics.json``, ``predictions.png`` and ``per_patient.png`` of the test slices. Returns the table to print.

    ``probabilities`` is (S, H, W, 1). ``own`` are the same slices at the size of their files, if that is another one:
    masks are delivered at that size, so they are scored there, too. The entries of ``extra`` are added to
    ``metrics.json``.
    """
    words = slices.words
    scores = metrics.evaluate_masks(probabilities, slices.masks, slices.patients, extents=slices.extents)
    found = {**extra, "test": scores.to_dict()}
    lines = [metrics.format_report(scores, words)]
    if own is not None and _sizes(own) != _sizes(slices):
        at_own_size = resized_to(own, slices, probabilities)
        of_own = metrics.evaluate_masks(at_own_size, own.masks, own.patients, extents=own.extents)
        found["test_at_own_size"] = of_own.to_dict()
        pooled, mean = of_own.pooled.dice, of_own.per_patient.summary.dice.mean
        lines.append(f"at the images' own size: Dice pooled {pooled:.3f}, mean per {words.group} {mean:.3f}")
    if words.channels:
        grey, of_grey = best_flair_threshold_dice(slices)
        normalized, of_normalized = best_flair_threshold_dice(slices, normalization)
        found["best_flair_threshold"] = {
            "raw": {"threshold": grey, "mean_dice": of_grey},
            "normalized": {"threshold": normalized, "mean_dice": of_normalized},
        }
        best = max(of_grey, of_normalized)
        lines.append(f"for comparison, the best possible threshold on FLAIR: mean Dice per patient {best:.3f}")
    write_text(folder / "metrics.json", json_text(found))

    patients = scores.per_patient
    title = f"Dice per {words.group} ({words.pooled}: all {words.image}s of a {words.group} counted together)"
    interval = patients.summary.dice.mean_interval
    plot_per_patient(folder / "per_patient.png", patients.names, patients.dice, interval, title)
    ranked = [name for _, name in sorted(zip(patients.dice, patients.names, strict=True))]
    cases = ranked[::-1] if len(ranked) < 6 else ranked[:-4:-1] + ranked[2::-1]  # the three best, the three worst
    chosen = [_largest_tumour(slices, name) for name in cases]
    titles = [_title(slices, place) for place in chosen]
    pictures = slices.images[chosen], slices.masks[chosen], probabilities[chosen]
    plot_predictions(folder / "predictions.png", *pictures, titles, words=words)
    return "\n".join(lines)


def _sizes(slices: SliceSet) -> list[tuple[int, int]]:
    return [(rows.stop, columns.stop) for rows, columns in map(slices.extent, range(len(slices)))]


def resized_to(own: SliceSet, slices: SliceSet, probabilities: np.ndarray) -> np.ndarray:
    """``probabilities`` (S, h, w, K) for ``slices`` at the sizes that the same slices have in ``own``: (S, H, W, K)."""
    found = np.zeros((*own.masks.shape[:3], probabilities.shape[3]), np.float32)
    for n, (height, width) in enumerate(_sizes(own)):
        found[n, :height, :width] = resize_probabilities(probabilities[n][slices.extent(n)], height, width)
    return found


def _largest_tumour(slices: SliceSet, patient: str) -> int:
    """The patient's slice with the largest tumour; the middle one if there is none."""
    places = [place for place, name in enumerate(slices.patients) if name == patient]
    area = slices.masks[places].sum(axis=(1, 2, 3), dtype=np.int64)
    return places[int(area.argmax())] if area.any() else places[len(places) // 2]


def _spread(count: int, wanted: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, wanted)).round()})


def _title(slices: SliceSet, place: int) -> str:
    return f"{slices.patients[place]}\n{slices.words.image} {slices.numbers[place]}"
