"""Exercise dice_loss: where the backward pass begins."""

import numpy as np

from minunet.exercises.backward import Backward, Case
from minunet.ops.dice_loss import DiceLossCache, dice_loss_backward, dice_loss_forward


def _case(seed: int, shape: tuple[int, ...], over: str, empty: bool = False) -> Case:
    rng = np.random.default_rng(seed)
    target = (rng.random(shape) > (1.0 if empty else 0.6)).astype("uint8")
    return Case({"probabilities": rng.random(shape)}, {"target": target, "smooth": 0.7, "over": over})


def _slope(cache: DiceLossCache) -> np.ndarray:
    """The slope dDice / dp of each image, or of the batch."""
    return (2 * cache.target - cache.dice) / cache.denominator


_MISTAKES = {
    "dprobabilities": {
        "the sign: the loss is 1 - Dice": lambda c: _slope(c) / c.dice.size,
        "the factor 2 of the numerator is missing: its slope in p is 2t": lambda c: (
            (c.dice - c.target) / (c.denominator * c.dice.size)
        ),
        "the denominator is taken for a constant, and p stands in it too: the term with Dice is missing": lambda c: (
            -2 * c.target / (c.denominator * c.dice.size)
        ),
        "the numerator is taken for a constant, and p stands in it too: the term with t is missing": lambda c: (
            c.dice / (c.denominator * c.dice.size) * np.ones_like(c.target)
        ),
        "divided by the denominator squared: one of the two has gone into Dice": lambda c: (
            -_slope(c) / (c.denominator * c.dice.size)
        ),
        "not divided by the denominator": lambda c: -_slope(c) * c.denominator / c.dice.size,
        "the losses of the images are averaged: divide by their number, dice.size": lambda c: -_slope(c),
        "divided by the number of pixels: Dice is a ratio of sums, no mean": lambda c: (
            -_slope(c) / (c.target.size * c.dice.size)
        ),
        "1 for Dice: the loss went in where Dice belongs, or nothing at all": lambda c: (
            (1 - 2 * c.target) / (c.denominator * c.dice.size)
        ),
        "the loss, 1 - Dice, stands where Dice belongs": lambda c: (
            (1 - c.dice - 2 * c.target) / (c.denominator * c.dice.size)
        ),
        "the gradient of the cross entropy, p - t, or of the squared error: Dice is another function": lambda c: (
            c.dice - c.target
        ),
        "always divided by the number of images: over the batch there is one Dice, and dice.size is 1": lambda c: (
            -_slope(c) / len(c.target)
        ),
    }
}

_HINTS = (
    "Dice is a quotient, and each p stands above and below. The quotient rule: (a/b)' = (a' - (a/b) b') / b.",
    "The numerator, 2 * sum(p t) + smooth, has slope 2t in p; the denominator, sum(p) + sum(t) + smooth, has slope 1.",
    "dDice/dp = (2t - dice) / denominator. The loss is the mean of 1 - dice: minus that, divided by dice.size. And "
    "mind the "
    "dtype: dice and denominator are float64 always, the result has the dtype of the target.",
)

EXERCISE = Backward(
    function="dice_loss_backward",
    forward=dice_loss_forward,
    reference=dice_loss_backward,
    results=("dprobabilities",),
    cases=(
        _case(1, (2, 3, 4, 1), "batch"),
        _case(2, (3, 4, 2, 2), "image"),
        _case(3, (2, 3, 3, 1), "batch", empty=True),
    ),
    mistakes=_MISTAKES,
).exercise("dice_loss", "a quotient, the empty mask included", _HINTS)
