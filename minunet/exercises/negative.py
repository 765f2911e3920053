"""Lab negative: smooth stands inside of the factor 2."""

from collections.abc import Callable

import numpy as np

from minunet.exercises.exercise import Exercise, likely_cause, require_equal, require_number
from minunet.exercises.learner import Learner
from minunet.ops.dice_loss import dice_loss_forward

Dice = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

#: A cause in words, and the Dice with this mistake, of overlap, total = sum(p) + sum(t), and smooth.
_DICES: dict[str, Dice] = {
    "still 2 * (overlap + smooth): smooth counts twice above and once below, and an empty mask has Dice 2": (
        lambda overlap, total, smooth: 2 * (overlap + smooth) / (total + smooth)
    ),
    "smooth is missing above: two empty masks have Dice 0, the worst there is, although they are equal": (
        lambda overlap, total, smooth: 2 * overlap / (total + smooth)
    ),
    "smooth is missing below": lambda overlap, total, smooth: (2 * overlap + smooth) / total,
    "smooth stands behind the fraction, where 0 / 0 has happened already": (
        lambda overlap, total, smooth: 2 * overlap / total + smooth
    ),
    "smooth is missing: 0 / 0 of two empty masks": lambda overlap, total, smooth: 2 * overlap / total,
    "smooth counts twice, above and below: bounded, but not the definition, (2 * overlap + smooth)": (
        lambda overlap, total, smooth: 2 * (overlap + smooth) / (total + 2 * smooth)
    ),
    "the factor 2 is missing": lambda overlap, total, smooth: (overlap + smooth) / (total + smooth),
    "cut off at 1: the loss is not negative any more, but Dice is as wrong as before, and its slope there is 0": (
        lambda overlap, total, smooth: np.minimum(2 * (overlap + smooth) / (total + smooth), 1.0)
    ),
    "this is Dice itself: the loss is one minus Dice": (
        lambda overlap, total, smooth: 1 - (2 * overlap + smooth) / (total + smooth)
    ),
}


def check(learner: Learner) -> list[str]:
    """Raise NotYet unless dice_loss is the one that its definition says, the empty mask included."""
    rng = np.random.default_rng(0)
    mask = (rng.random((6, 5)) < 0.3).astype("float64")
    empty = np.zeros((6, 5))
    cases = {
        "two empty masks": (empty, empty, 1.0),
        "two empty masks, smooth 0.1": (empty, empty, 0.1),
        "a perfect prediction": (mask, mask, 1.0),
        "random probabilities": (rng.random((6, 5)), mask, 1.0),
        "random probabilities, smooth 5": (rng.random((6, 5)), mask, 5.0),
        "random probabilities on an empty mask": (rng.random((6, 5)), empty, 1.0),
    }
    found, expected = [], []
    for case, (p, t, smooth) in cases.items():
        found.append(require_number(f"dice_loss of {case}", learner.call("dice_loss", p, t, smooth)))
        expected.append(dice_loss_forward(p[None, :, :, None], t[None, :, :, None], smooth)[0])

    # All cases at once tell mistakes apart that one of them does not.
    overlaps = np.array([(p * t).sum() for p, t, _ in cases.values()])
    totals = np.array([p.sum() + t.sum() for p, t, _ in cases.values()])
    smooths = np.array([smooth for _, _, smooth in cases.values()])
    with np.errstate(all="ignore"):
        mistakes = {cause: 1 - dice(overlaps, totals, smooths) for cause, dice in _DICES.items()}
    cause = likely_cause(np.array(found), np.array(expected), mistakes, {})
    for case, loss, right in zip(cases, found, expected, strict=True):
        require_equal(f"dice_loss of {case}", loss, right, tolerance=1e-12, cause=cause)
    return [
        "that was the cause: with an empty mask and no prediction, Dice was 2 * smooth / smooth = 2, and the loss -1,",
        "so that predicting nothing was rewarded on every empty slice; now the loss of equal masks is 0",
    ]


EXERCISE = Exercise(
    name="negative",
    title="a loss that falls below 0",
    functions=("dice_loss",),
    hints=(
        "Which pair of prediction and mask has the smallest loss? Compute Dice for it by hand.",
        "Put p = 0 and t = 0 into the definition, then into the line of the file.",
        "2 * (overlap + smooth) is 2 * overlap + 2 * smooth. The definition adds smooth once above and once below.",
    ),
    check=check,
)
