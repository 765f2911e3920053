"""The loss of the network: the weighted sum of soft Dice and cross entropy, from logits.

Dice asks how well two masks overlap, cross entropy asks of each pixel how sure it was. Their sum is the usual choice
for small structures. Derivation: docs/derivations/bce_with_logits.md.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from minunet.base.backend import Array
from minunet.ops.bce_with_logits import BceWithLogitsCache, bce_with_logits_backward, bce_with_logits_forward
from minunet.ops.checks import check_images, check_target
from minunet.ops.dice_loss import DiceLossCache, Over, dice_loss_backward, dice_loss_forward
from minunet.ops.sigmoid import SigmoidCache, sigmoid_backward, sigmoid_forward


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
    over: Over = "batch",
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
    over: Over = "batch"

    def forward(self, logits: Array, target: Array) -> tuple[Array, SegmentationLossCache]:
        """:func:`segmentation_loss_forward` with these options."""
        return segmentation_loss_forward(logits, target, self.dice_weight, self.bce_weight, self.smooth, self.over)

    def backward(self, cache: SegmentationLossCache) -> Array:
        """:func:`segmentation_loss_backward`."""
        return segmentation_loss_backward(cache)
