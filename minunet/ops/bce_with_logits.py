"""Binary cross entropy of logits: how sure each pixel was of the right answer.

It has a useful gradient where there is no tumour at all, and that gradient, with respect to the logits, has been
through the sigmoid already.

Derivation: docs/derivations/bce_with_logits.md. Source: Goodfellow, Bengio & Courville 2016, "Deep learning", section
6.2.2.2.
"""

from typing import NamedTuple

from minunet.base.backend import Array, accumulation_dtype, array_module
from minunet.ops.checks import check_images, check_target
from minunet.ops.sigmoid import sigmoid_forward


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
