"""Soft Dice: how far two masks are from overlapping.

It does not care that tumour is 1 % of the pixels: what is empty in both masks does not count.

Derivation: docs/derivations/dice_loss.md. Source: Milletari, Navab & Ahmadi 2016, "V-Net", section 3, here smoothed,
and with plain sums where V-Net sums squares.
"""

import math
from typing import Literal, NamedTuple

from minunet.base.backend import Array, accumulation_dtype
from minunet.base.choices import check_choice
from minunet.ops.checks import check_images, check_target

Over = Literal["batch", "image", "class"]


class DiceLossCache(NamedTuple):
    """What :func:`dice_loss_backward` needs."""

    target: Array  # the slope of Dice in each probability is (2t - Dice) / denominator
    dice: Array  # (1, 1, 1, 1) over the batch, (N, 1, 1, 1) over an image, (1, 1, 1, C) over a class
    denominator: Array  # of the same shape: sum p + sum t + smooth


def dice_loss_forward(
    probabilities: Array, target: Array, smooth: float = 1.0, over: Over = "batch"
) -> tuple[Array, DiceLossCache]:
    """One minus the soft Dice coefficient of ``probabilities`` p and ``target`` t, both (N, H, W, C).

        Dice = (2 * sum(p * t) + smooth) / (sum(p) + sum(t) + smooth)

    The sums run over all pixels and channels of the batch (``over="batch"``); or over those of each image, and then
    the losses of the images are averaged (``over="image"``); or over the pixels of each channel of the batch, and then
    the losses of the channels are averaged (``over="class"``). They differ: a batch with one large and many empty
    masks is ruled by the large one in the first, and by the empty ones in the second; and a small class beside a
    large one has a say in the third alone.
    ``target`` is in [0, 1], of any real dtype. Two empty masks have Dice 1, so loss 0.

    Returns the loss, a scalar of the dtype of the probabilities, and the cache. Raises ValueError if shapes
    differ, if the target leaves [0, 1] (a mask left at 0 and 255), if smooth is not positive (0 / 0 on an empty
    mask) or if ``over`` is none of the three.

    >>> import numpy as np
    >>> p, t = np.array([1.0, 0.5, 0.0]), np.array([1, 1, 0])
    >>> loss, cache = dice_loss_forward(p.reshape(1, 1, 3, 1), t.reshape(1, 1, 3, 1), smooth=0.5)
    >>> loss.item()  # 1 - (2 * 1.5 + 0.5) / (1.5 + 2 + 0.5)
    0.125
    """
    check_images("probabilities", probabilities)
    check_target(target, probabilities.shape)
    if not 0 < smooth < math.inf:
        raise ValueError(f"smooth must be positive and finite, got {smooth}")
    check_choice("over", over, Over)

    target = target.astype(probabilities.dtype)
    axes = {"batch": (0, 1, 2, 3), "image": (1, 2, 3), "class": (0, 1, 2)}[over]
    sum_dtype = accumulation_dtype(probabilities.dtype)
    overlap = (probabilities * target).sum(axis=axes, keepdims=True, dtype=sum_dtype)
    p_sum = probabilities.sum(axis=axes, keepdims=True, dtype=sum_dtype)
    t_sum = target.sum(axis=axes, keepdims=True, dtype=sum_dtype)
    denominator = p_sum + t_sum + smooth
    dice = (2 * overlap + smooth) / denominator
    loss = (1 - dice).mean().astype(probabilities.dtype)
    return loss, DiceLossCache(target, dice, denominator)


def dice_loss_backward(cache: DiceLossCache) -> Array:
    """The gradient of :func:`dice_loss_forward` with respect to the probabilities.

    By the quotient rule dDice/dp = (2t - Dice) / denominator, for each pixel.
    """
    target, dice, denominator = cache
    dtype = target.dtype
    return (dice.astype(dtype) - 2 * target) / (denominator * dice.size).astype(dtype)
