"""Lab negative: a loss that falls below 0.

One minus Dice lies between 0 and 1, as Dice does. With this one the training loss falls below 0, and the network
learns to predict nothing at all: most slices show no tumour. Run this file and see; then mend it, keeping the names of
the functions.

The definition is  Dice = (2 * sum(p * t) + smooth) / (sum(p) + sum(t) + smooth).

    python FILE                                   shows the symptom
    python -m minunet.exercises negative FILE     says whether you have found the cause
    python -m minunet.exercises negative --hint 1 (then 2, 3)
"""

import numpy as np

from minunet.base.backend import Array


def dice_loss(probabilities: Array, target: Array, smooth: float = 1.0) -> float:
    """One minus the soft Dice of two arrays of one shape."""
    overlap = (probabilities * target).sum()
    total = probabilities.sum() + target.sum()
    dice = 2 * (overlap + smooth) / (total + smooth)
    return float(1 - dice)


def main() -> None:
    """Show the symptom: the loss of five predictions, for a slice with and one without tumour."""
    tumour = np.zeros((16, 16))
    tumour[4:8, 4:8] = 1.0
    empty = np.zeros((16, 16))
    print("predicted            loss, tumour in it   loss, empty slice")
    for name, probabilities in {
        "nothing": empty,
        "0.01 everywhere": empty + 0.01,
        "0.5 everywhere": empty + 0.5,
        "the tumour": tumour,
        "1 everywhere": empty + 1.0,
    }.items():
        print(f"{name:20} {dice_loss(probabilities, tumour):18.3f} {dice_loss(probabilities, empty):19.3f}")


if __name__ == "__main__":
    main()
