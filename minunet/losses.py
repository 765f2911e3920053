"""The losses: soft Dice of probabilities, binary cross entropy of logits, and their weighted sum.

Dice asks how well two masks overlap, and does not care that tumour is 1 % of the pixels; cross entropy asks
of each pixel how sure it was, and has a useful gradient where there is no tumour at all. Their sum is the
usual choice for small structures.

Derivations: docs/derivations/dice_loss.md and docs/derivations/bce_with_logits.md. Sources: Milletari, Navab
& Ahmadi 2016, "V-Net", section 3 (soft Dice, here smoothed, and with plain sums where V-Net sums squares);
Goodfellow, Bengio & Courville 2016, "Deep learning", section 6.2.2.2 (cross entropy of logits).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from minunet.backend import Array, accumulation_dtype, array_module
from minunet.ops.checks import check_images
from minunet.ops.sigmoid import SigmoidCache, sigmoid_backward, sigmoid_forward


class DiceLossCache(NamedTuple):
    """What :func:`dice_loss_backward` needs."""

    target: Array  # the slope of Dice in each probability is (2t - Dice) / denominator
    dice: Array  # (1, 1, 1, 1) over the batch, (N, 1, 1, 1) over an image
    denominator: Array  # of the same shape: sum p + sum t + smooth


def dice_loss_forward(
    probabilities: Array, target: Array, smooth: float = 1.0, over: str = "batch"
) -> tuple[Array, DiceLossCache]:
    """One minus the soft Dice coefficient of ``probabilities`` p and ``target`` t, both (N, H, W, C).

        Dice = (2 * sum(p * t) + smooth) / (sum(p) + sum(t) + smooth)

    The sums run over all pixels and channels of the batch (``over="batch"``), or of each image, and then the
    losses of the images are averaged (``over="image"``). The two differ: a batch with one large and many
    empty masks is ruled by the large one in the first, and by the empty ones in the second.
    ``target`` is in [0, 1], of any real dtype. Two empty masks have Dice 1, so loss 0.

    Returns the loss, a scalar of the dtype of the probabilities, and the cache. Raises ValueError if shapes
    differ, if the target leaves [0, 1] (a mask left at 0 and 255), if smooth is not positive (0 / 0 on an empty
    mask) or if ``over`` is neither.

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
    if over not in ("batch", "image"):
        raise ValueError(f"over must be 'batch' or 'image', got {over!r}")

    target = target.astype(probabilities.dtype)
    axes = (0, 1, 2, 3) if over == "batch" else (1, 2, 3)
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


class BceWithLogitsCache(NamedTuple):
    """What :func:`bce_with_logits_backward` needs."""

    probabilities: Array  # p - t is the gradient, up to the mean over all values
    target: Array


def bce_with_logits_forward(logits: Array, target: Array) -> tuple[Array, BceWithLogitsCache]:
    """The binary cross entropy of sigmoid(``logits``) and ``target`` t, both (N, H, W, C), averaged over all values.

        -t log s(z) - (1 - t) log s(-z)  =  max(z, 0) - t z + log(1 + exp(-|z|))

    The right-hand side neither overflows nor takes the logarithm of 0. ``target`` is in [0, 1], of any real dtype.

    Returns the loss, a scalar of the dtype of the logits, and the cache. Raises ValueError if shapes differ
    or if the target leaves [0, 1].

    >>> import numpy as np
    >>> loss, cache = bce_with_logits_forward(np.zeros((1, 2, 2, 1)), np.ones((1, 2, 2, 1)))
    >>> round(loss.item(), 6)  # log 2
    0.693147
    """
    xp = array_module(logits)
    check_images("logits", logits)
    check_target(target, logits.shape)
    target = target.astype(logits.dtype)
    positive = logits.real > 0
    minus_abs = xp.where(positive, -logits, logits)
    losses = xp.where(positive, logits, logits.dtype.type(0)) - target * logits + xp.log1p(xp.exp(minus_abs))
    loss = losses.mean(dtype=accumulation_dtype(logits.dtype)).astype(logits.dtype)
    probabilities, _ = sigmoid_forward(logits)
    return loss, BceWithLogitsCache(probabilities, target)


def bce_with_logits_backward(cache: BceWithLogitsCache) -> Array:
    """The gradient of :func:`bce_with_logits_forward` with respect to the logits: (s(z) - t) / number of values."""
    return (cache.probabilities - cache.target) / cache.target.size


class SegmentationLossCache(NamedTuple):
    """What :func:`segmentation_loss_backward` needs."""

    sigmoid: SigmoidCache  # carries the gradient of Dice from probabilities to logits
    dice: DiceLossCache
    bce: BceWithLogitsCache
    dice_weight: float
    bce_weight: float


def segmentation_loss_forward(
    logits: Array,
    target: Array,
    dice_weight: float = 1.0,
    bce_weight: float = 1.0,
    smooth: float = 1.0,
    over: str = "batch",
) -> tuple[Array, SegmentationLossCache]:
    """``dice_weight`` * Dice loss of sigmoid(``logits``) + ``bce_weight`` * cross entropy of ``logits``.

    ``logits`` and ``target`` are (N, H, W, C); ``smooth`` and ``over`` are those of :func:`dice_loss_forward`.
    Returns the loss, a scalar of the dtype of the logits, and the cache.
    Raises ValueError as the two losses do, and if a weight is negative.
    """
    for name, weight in (("dice_weight", dice_weight), ("bce_weight", bce_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {weight}")
    check_images("logits", logits)
    check_target(target, logits.shape)
    probabilities, sigmoid_cache = sigmoid_forward(logits)
    dice_loss, dice_cache = dice_loss_forward(probabilities, target, smooth, over)
    bce_loss, bce_cache = bce_with_logits_forward(logits, target)
    loss = dice_weight * dice_loss + bce_weight * bce_loss
    return loss, SegmentationLossCache(sigmoid_cache, dice_cache, bce_cache, dice_weight, bce_weight)


def segmentation_loss_backward(cache: SegmentationLossCache) -> Array:
    """The gradient of :func:`segmentation_loss_forward` with respect to the logits.

    The gradient of Dice goes through the sigmoid once; that of the cross entropy of logits has been through it.
    """
    dprobabilities = cache.dice_weight * dice_loss_backward(cache.dice)
    return sigmoid_backward(dprobabilities, cache.sigmoid) + cache.bce_weight * bce_with_logits_backward(cache.bce)


@dataclass(frozen=True)
class SegmentationLoss:
    """The loss of a training run: :func:`segmentation_loss_forward` with its options chosen.

    >>> SegmentationLoss(bce_weight=0.0)
    SegmentationLoss(dice_weight=1.0, bce_weight=0.0, smooth=1.0, over='batch')
    """

    dice_weight: float = 1.0
    bce_weight: float = 1.0
    smooth: float = 1.0
    over: str = "batch"

    def forward(self, logits: Array, target: Array) -> tuple[Array, SegmentationLossCache]:
        """:func:`segmentation_loss_forward` with these options."""
        return segmentation_loss_forward(logits, target, self.dice_weight, self.bce_weight, self.smooth, self.over)

    def backward(self, cache: SegmentationLossCache) -> Array:
        """:func:`segmentation_loss_backward`."""
        return segmentation_loss_backward(cache)


def check_target(target: Array, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``target`` is a mask of ``shape``, that of the prediction."""
    if target.shape != shape:
        raise ValueError(f"target must have the shape of the prediction, {shape}, got {target.shape}")
    low, high = target.real.min().item(), target.real.max().item()
    if not (low >= 0 and high <= 1):
        found = f"got values from {low} to {high}; divide a mask of 0 and 255 by 255"
        raise ValueError(f"target must lie in [0, 1], {found}")
