"""Softmax cross entropy of logits: how sure each pixel was of its class, where each pixel has exactly one.

Its gradient with respect to the logits has been through the softmax already. A pixel of which nobody knows the class
has a target of zeros, and counts for nothing.

Derivation: docs/derivations/softmax_cross_entropy.md. Source: Goodfellow, Bengio & Courville 2016, "Deep learning",
section 6.2.2.3.
"""

from typing import NamedTuple

from minunet.base.backend import Array, accumulation_dtype, array_module
from minunet.ops.checks import check_class_target, check_images
from minunet.ops.softmax import softmax_forward


class SoftmaxCrossEntropyCache(NamedTuple):
    """What :func:`softmax_cross_entropy_backward` needs."""

    probabilities: Array  # p - t is the gradient where a pixel counts, up to the mean over these pixels
    target: Array
    counted: Array  # (N, H, W, 1): 1 where the pixel counts, else 0
    count: Array  # how many pixels count, and at least 1


def softmax_cross_entropy_forward(logits: Array, target: Array) -> tuple[Array, SoftmaxCrossEntropyCache]:
    """The cross entropy of softmax(``logits``) and ``target`` t, (N, H, W, K) both: a mean over the pixels that count.

        -sum_k t_k log p_k  =  sum_k t_k * (log(sum_l exp(z_l)) - z_k)

    With the largest logit taken away from all, the right-hand side neither overflows nor takes the logarithm of 0.
    ``target``, of any real dtype, is one-hot, or the probabilities of the classes; zeros in all classes of a pixel
    say that it does not count. If none counts, the loss is 0.

    Returns the loss, a scalar of the dtype of the logits, and the cache. Raises ValueError if shapes differ, or
    unless the target of each pixel lies in [0, 1] and sums to 1, or to 0.

    >>> import numpy as np
    >>> z, t = np.log([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]]), np.array([[0, 1, 0], [0, 0, 0]])
    >>> loss, cache = softmax_cross_entropy_forward(z.reshape(1, 1, 2, 3), t.reshape(1, 1, 2, 3))
    >>> round(loss.item(), 6)  # log 4: the second pixel does not count
    1.386294
    """
    xp = array_module(logits)
    check_images("logits", logits)
    check_class_target(target, logits.shape)
    target = target.astype(logits.dtype)
    counted = target.sum(axis=-1, keepdims=True)
    count = xp.maximum(counted.real.sum(dtype="float64"), 1)

    largest = logits.real.argmax(axis=-1)[..., None]
    shifted = logits - xp.take_along_axis(logits, largest, axis=-1)
    # The largest, now 0, is the 1 in log(1 + ...): so a small loss, too, has all its digits.
    is_largest = xp.arange(logits.shape[3]) == largest
    others = xp.where(is_largest, logits.dtype.type(0), xp.exp(shifted)).sum(axis=-1, keepdims=True)
    losses = target * (xp.log1p(others) - shifted)
    loss = (losses.sum(dtype=accumulation_dtype(logits.dtype)) / count).astype(logits.dtype)
    probabilities, _ = softmax_forward(logits)
    return loss, SoftmaxCrossEntropyCache(probabilities, target, counted, count)


def softmax_cross_entropy_backward(cache: SoftmaxCrossEntropyCache) -> Array:
    """The gradient of :func:`softmax_cross_entropy_forward` with respect to the logits.

    (p - t) / number of pixels that count; 0 where a pixel does not.
    """
    probabilities, target, counted, count = cache
    return (counted * probabilities - target) / count.astype(target.dtype)
