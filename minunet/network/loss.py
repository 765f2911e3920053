"""The losses of the network: the weighted sum of soft Dice and cross entropy, from logits.

Dice asks how well two masks overlap, cross entropy asks of each pixel how sure it was. Their sum is the usual choice
for small structures. :class:`SegmentationLoss` is for masks, each with a sigmoid of its own: one, or several that may
overlap. :class:`SoftmaxLoss` is for pixels that belong to one of several classes.
Derivations: docs/derivations/bce_with_logits.md, docs/derivations/softmax_cross_entropy.md.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from minunet.base.backend import Array, array_module
from minunet.ops.bce_with_logits import BceWithLogitsCache, bce_with_logits_backward, bce_with_logits_forward
from minunet.ops.checks import check_class_target, check_images, check_target
from minunet.ops.dice_loss import DiceLossCache, Over, dice_loss_backward, dice_loss_forward
from minunet.ops.sigmoid import SigmoidCache, sigmoid_backward, sigmoid_forward
from minunet.ops.softmax import SoftmaxCache, softmax_backward, softmax_forward
from minunet.ops.softmax_cross_entropy import (
    SoftmaxCrossEntropyCache,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)


class Loss(Protocol):
    """What training asks of a loss: :class:`SegmentationLoss`, :class:`SoftmaxLoss`, or one's own."""

    def forward(self, logits: Array, target: Array) -> tuple[Array, Any]:
        """The loss of a batch, a scalar of the dtype of the logits, and a cache; both arguments are (N, H, W, K)."""

    def backward(self, cache: Any) -> Array:
        """The gradient with respect to the logits."""


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
    _check_weights(dice_weight=dice_weight, bce_weight=bce_weight)
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


class SoftmaxLossCache(NamedTuple):
    """What :func:`softmax_loss_backward` needs."""

    softmax: SoftmaxCache  # carries the gradient of Dice from probabilities to logits
    dice: DiceLossCache
    cross_entropy: SoftmaxCrossEntropyCache
    counted: Array  # (N, H, W, 1): 1 where a pixel counts, else 0
    dice_weight: float
    cross_entropy_weight: float


def softmax_loss_forward(
    logits: Array,
    target: Array,
    dice_weight: float = 1.0,
    cross_entropy_weight: float = 1.0,
    smooth: float = 1.0,
) -> tuple[Array, SoftmaxLossCache]:
    """``dice_weight`` * Dice loss of softmax(``logits``) + ``cross_entropy_weight`` * softmax cross entropy.

    ``logits`` and ``target`` are (N, H, W, K); class 0 is the background. Dice is taken of each other class over the
    batch, and averaged over these classes. A pixel whose target is 0 in every class counts in neither of the two.
    Returns the loss, a scalar of the dtype of the logits, and the cache.
    Raises ValueError as the two losses do, if there is no class beside the background, and if a weight is negative.
    """
    _check_weights(dice_weight=dice_weight, cross_entropy_weight=cross_entropy_weight)
    check_images("logits", logits)
    if logits.shape[3] < 2:
        raise ValueError("logits must be of at least 2 classes, the background and another one, got 1")
    check_class_target(target, logits.shape)
    counted = target.sum(axis=-1, keepdims=True).astype(logits.dtype)
    probabilities, softmax_cache = softmax_forward(logits)
    dice_loss, dice_cache = dice_loss_forward((probabilities * counted)[..., 1:], target[..., 1:], smooth, "class")
    cross_entropy, cross_entropy_cache = softmax_cross_entropy_forward(logits, target)
    loss = dice_weight * dice_loss + cross_entropy_weight * cross_entropy
    caches = softmax_cache, dice_cache, cross_entropy_cache
    return loss, SoftmaxLossCache(*caches, counted, dice_weight, cross_entropy_weight)


def softmax_loss_backward(cache: SoftmaxLossCache) -> Array:
    """The gradient of :func:`softmax_loss_forward` with respect to the logits.

    The gradient of Dice, 0 for the background, goes through the softmax once; that of the cross entropy has been
    through it.
    """
    probabilities, counted = cache.softmax.y, cache.counted
    dprobabilities = array_module(probabilities).zeros_like(probabilities)
    dprobabilities[..., 1:] = cache.dice_weight * dice_loss_backward(cache.dice) * counted
    dcross_entropy = softmax_cross_entropy_backward(cache.cross_entropy)
    return softmax_backward(dprobabilities, cache.softmax) + cache.cross_entropy_weight * dcross_entropy


@dataclass(frozen=True)
class SoftmaxLoss:
    """The loss of a training run with exclusive classes: :func:`softmax_loss_forward` with its options chosen.

    >>> SoftmaxLoss(dice_weight=0.5)
    SoftmaxLoss(dice_weight=0.5, cross_entropy_weight=1.0, smooth=1.0)
    """

    dice_weight: float = 1.0
    cross_entropy_weight: float = 1.0
    smooth: float = 1.0

    def forward(self, logits: Array, target: Array) -> tuple[Array, SoftmaxLossCache]:
        """:func:`softmax_loss_forward` with these options."""
        return softmax_loss_forward(logits, target, self.dice_weight, self.cross_entropy_weight, self.smooth)

    def backward(self, cache: SoftmaxLossCache) -> Array:
        """:func:`softmax_loss_backward`."""
        return softmax_loss_backward(cache)


def _check_weights(**weights: float) -> None:
    """Raise ValueError unless the weights of a sum of losses are numbers >= 0."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {weight}")
