"""What a run leaves for people: its pictures, its figures and the table at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minunet.base import rng
from minunet.base.backend import to_numpy
from minunet.base.durable import json_text, write_text
from minunet.data.batches import prepare_batch
from minunet.data.normalize import Normalization
from minunet.data.phantom import best_flair_threshold_dice
from minunet.data.slices import IGNORE, LGG, SliceSet, Words
from minunet.results.plots import (
    plot_curves,
    plot_per_patient,
    plot_predictions,
    plot_samples,
    plot_target_predictions,
    plot_targets_per_patient,
)
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
    target = to_numpy(batch.target)
    plot_samples(
        folder / "samples.png",
        slices.images[chosen],
        slices.marked(np.array(chosen)),
        batch.x,
        target[..., 1:] if slices.classes else target,  # without the background
        titles,
        slices.words,
        () if slices.is_binary else slices.target_names(),
    )


def write_curves(
    folder: Path,
    history: list[dict[str, float]],
    best_epoch: int | None,
    words: Words = LGG,
    targets: Sequence[str] = (),
) -> None:
    """``curves.png``: loss and Dice over the epochs (from 1), training beside validation.

    Of several ``targets`` the Dice is the mean over them, too.
    """
    over = f"{words.group}s" + (f" and {len(targets)} targets" if len(targets) > 1 else "")
    plot_curves(folder / "curves.png", history, best_epoch, f"mean over {over}, {words.pooled}")


def write_test(
    folder: Path,
    slices: SliceSet,
    probabilities: np.ndarray,
    normalization: Normalization,
    own: SliceSet | None = None,
    **extra: Any,
) -> str:
    """``metrics.json``, ``predictions.png`` and ``per_patient.png`` of the test slices. Returns the table to print.

    ``probabilities`` is (S, H, W, K), as the network gives them. ``own`` are the same slices at the size of their
    files, if that is another one: masks are delivered at that size, so they are scored there, too. The entries of
    ``extra`` are added to ``metrics.json``.
    """
    words = slices.words
    scores = _score(slices, probabilities)
    found = {**extra, "test": scores.stored}
    lines = [scores.table]
    if own is not None and _sizes(own) != _sizes(slices):
        of_own = _score(own, resized_to(own, slices, probabilities))
        found["test_at_own_size"] = of_own.stored
        pooled, mean = of_own.pooled, of_own.summary.mean
        what = "Dice" if slices.is_binary else "mean over the targets, Dice"
        lines.append(f"at the images' own size: {what} pooled {pooled:.3f}, mean per {words.group} {mean:.3f}")
    if words.channels and slices.is_binary:
        grey, of_grey = best_flair_threshold_dice(slices)
        normalized, of_normalized = best_flair_threshold_dice(slices, normalization)
        found["best_flair_threshold"] = {
            "raw": {"threshold": grey, "mean_dice": of_grey},
            "normalized": {"threshold": normalized, "mean_dice": of_normalized},
        }
        best = max(of_grey, of_normalized)
        lines.append(f"for comparison, the best possible threshold on FLAIR: mean Dice per patient {best:.3f}")
    write_text(folder / "metrics.json", json_text(found))

    title = f"Dice per {words.group} ({words.pooled}: all {words.image}s of a {words.group} counted together)"
    if slices.is_binary:
        interval = scores.summary.mean_interval
        plot_per_patient(folder / "per_patient.png", scores.names, scores.dice, interval, title)
    else:
        plot_targets_per_patient(folder / "per_patient.png", scores.names, scores.by_target, title)
    ranked = [name for _, name in sorted(zip(scores.dice, scores.names, strict=True))]
    cases = ranked[::-1] if len(ranked) < 6 else ranked[:-4:-1] + ranked[2::-1]  # the three best, the three worst
    chosen = np.array([_largest_tumour(slices, name) for name in cases])
    titles = [_title(slices, place) for place in chosen]
    path, images, actual = folder / "predictions.png", slices.images[chosen], slices.marked(chosen)
    if slices.is_binary:
        plot_predictions(path, images, actual, probabilities[chosen], titles, words=words)
    else:
        predicted = metrics.predicted_masks(probabilities[chosen], len(slices.classes))
        if slices.classes:
            predicted[slices.masks[chosen, ..., 0] == IGNORE] = 0  # nobody can say whether it is right
        plot_target_predictions(path, images, actual, predicted, titles, slices.target_names(), words)
    return "\n".join(lines)


class _Scored(NamedTuple):
    """What is told of the scores of predictions; of several targets their mean, where nothing else is said."""

    stored: dict[str, Any]  # as metrics.json has them
    table: str
    pooled: float | None  # the Dice of all pixels together
    names: list[str]  # of the groups
    dice: list[float]  # of each group
    summary: metrics.Summary  # of these
    by_target: dict[str, list[float]]  # the Dice of each group, by the name of the target


def _score(slices: SliceSet, probabilities: np.ndarray) -> _Scored:
    scores = metrics.evaluate_slices(probabilities, slices)
    by_target = {name: target.per_patient.dice for name, target in scores.items()}
    if slices.is_binary:
        (one,) = scores.values()
        groups, table = one.per_patient, metrics.format_report(one, slices.words)
        return _Scored(one.to_dict(), table, one.pooled.dice, groups.names, groups.dice, groups.summary.dice, by_target)
    mean, exclusive = metrics.mean_scores(scores), bool(slices.classes)
    stored, table = metrics.scores_to_dict(scores, exclusive), metrics.format_targets(scores, exclusive, slices.words)
    return _Scored(stored, table, mean.dice_pooled, mean.names, mean.dice, mean.summary, by_target)


def _sizes(slices: SliceSet) -> list[tuple[int, int]]:
    return [(rows.stop, columns.stop) for rows, columns in map(slices.extent, range(len(slices)))]


def resized_to(own: SliceSet, slices: SliceSet, probabilities: np.ndarray) -> np.ndarray:
    """``probabilities`` (S, h, w, K) for ``slices`` at the sizes that the same slices have in ``own``: (S, H, W, K)."""
    found = np.zeros((*own.masks.shape[:3], probabilities.shape[3]), np.float32)
    for n, (height, width) in enumerate(_sizes(own)):
        found[n, :height, :width] = resize_probabilities(probabilities[n][slices.extent(n)], height, width)
    return found


def _largest_tumour(slices: SliceSet, patient: str) -> int:
    """The patient's slice with the largest tumour; the middle one if there is none.

    Of several targets, each of which may be larger elsewhere, it is the slice with the largest shares of all of them.
    """
    places = [place for place, name in enumerate(slices.patients) if name == patient]
    areas = slices.marked(np.array(places)).sum(axis=(1, 2), dtype=np.int64)  # (slices, targets)
    area = (areas / np.maximum(areas.sum(axis=0), 1)).sum(axis=1)
    return places[int(area.argmax())] if area.any() else places[len(places) // 2]


def _spread(count: int, wanted: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, wanted)).round()})


def _title(slices: SliceSet, place: int) -> str:
    return f"{slices.patients[place]}\n{slices.words.image} {slices.numbers[place]}"
