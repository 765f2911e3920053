"""Exercise dice_loss: write dice_loss_backward.

Forward, with probabilities p and the target t, both (N, H, W, C):

    Dice = (2 * sum(p * t) + smooth) / (sum(p) + sum(t) + smooth)        loss = mean of (1 - Dice)

The sums run over the whole batch, then there is one Dice; or over each image, then there are N, and the loss is the
mean of the N losses. Return dprobabilities. A loss is where the backward pass begins, so there is no dy.

    python -m minunet.exercises dice_loss FILE        checks this file
    python -m minunet.exercises dice_loss --hint 1    (then 2, 3)

To read: docs/derivations/dice_loss.md, down to "The lines it becomes".
"""

import numpy as np

from minunet.base.backend import Array
from minunet.ops.dice_loss import DiceLossCache


def dice_loss_backward(cache: DiceLossCache) -> Array:
    """Return dprobabilities, (N, H, W, C), of the dtype of the target.

    cache.target       (N, H, W, C), 0 or 1, in the dtype of the probabilities
    cache.dice         float64, (1, 1, 1, 1) over the batch, (N, 1, 1, 1) over each image
    cache.denominator  float64, of the same shape: sum(p) + sum(t) + smooth
    """
    raise NotImplementedError
