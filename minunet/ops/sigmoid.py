"""The sigmoid, or logistic function: any number (a logit) becomes a probability.

    s(x) = 1 / (1 + exp(-x))          s'(x) = s(x) * s(-x)

Written like this, exp(-x) overflows for x < -709, and 1 - s(x) loses all its digits for large x. Both are
avoided by working with e = exp(-|x|), which is at most 1: of s(x) and s(-x), the larger one is 1 / (1 + e)
and the smaller one e / (1 + e).

Derivation: docs/derivations/sigmoid.md.
"""

from typing import NamedTuple

from minunet.base.backend import Array, array_module
from minunet.ops.checks import check_array, check_images


class SigmoidCache(NamedTuple):
    """What :func:`sigmoid_backward` needs."""

    y: Array  # s(x)
    complement: Array  # s(-x) = 1 - s(x), but with all its digits: together they are the slope


def sigmoid_forward(x: Array) -> tuple[Array, SigmoidCache]:
    """The sigmoid of ``x`` (N, H, W, C).

    Returns y, of the shape and dtype of x, and the cache. Raises ValueError if x is not a batch of float images.

    >>> import numpy as np
    >>> y, cache = sigmoid_forward(np.array([-800.0, 0.0, 800.0]).reshape(1, 1, 3, 1))
    >>> y.ravel()
    array([0. , 0.5, 1. ])
    """
    xp = array_module(x)
    check_images("x", x)
    positive = x.real > 0
    e = xp.exp(xp.where(positive, -x, x))  # exp(-|x|), without abs, which has no complex derivative
    larger, smaller = 1 / (1 + e), e / (1 + e)
    y, complement = xp.where(positive, larger, smaller), xp.where(positive, smaller, larger)
    return y.copy(), SigmoidCache(y, complement)


def sigmoid_backward(dy: Array, cache: SigmoidCache) -> Array:
    """The gradient of :func:`sigmoid_forward`: dx = dy * s(x) * s(-x)."""
    check_array("dy", dy, cache.y.shape, cache.y.dtype)
    return dy * cache.y * cache.complement
