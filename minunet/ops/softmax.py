"""The softmax: the logits of the classes of a pixel become probabilities that sum to 1.

    p_k = exp(x_k) / sum_l exp(x_l)          dp_k/dx_l = p_k * ([k = l] - p_l)

The same number taken from all logits of a pixel changes nothing, so the largest is taken away first: then no exp
overflows, and one of the terms of the sum is 1.

Derivation: docs/derivations/softmax_cross_entropy.md. Source: Bridle 1990, "Probabilistic interpretation of
feedforward classification network outputs".
"""

from typing import NamedTuple

from minunet.base.backend import Array, array_module
from minunet.ops.checks import check_array, check_images


class SoftmaxCache(NamedTuple):
    """What :func:`softmax_backward` needs."""

    y: Array  # the slope of each probability in each logit is made of the probabilities alone


def softmax_forward(x: Array) -> tuple[Array, SoftmaxCache]:
    """The softmax of ``x`` (N, H, W, K) over its classes, the last axis.

    Returns y, of the shape and dtype of x, and the cache. Raises ValueError if x is not a batch of float images.

    >>> import numpy as np
    >>> y, cache = softmax_forward(np.log([1.0, 2.0, 5.0]).reshape(1, 1, 1, 3))
    >>> y.ravel().round(6)
    array([0.125, 0.25 , 0.625])
    """
    xp = array_module(x)
    check_images("x", x)
    e = xp.exp(x - x.real.max(axis=-1, keepdims=True))
    y = e / e.sum(axis=-1, keepdims=True)
    return y.copy(), SoftmaxCache(y)


def softmax_backward(dy: Array, cache: SoftmaxCache) -> Array:
    """The gradient of :func:`softmax_forward`: dx = y * (dy - sum(dy * y)), the sum over the classes of the pixel."""
    (y,) = cache
    check_array("dy", dy, y.shape, y.dtype)
    return y * (dy - (dy * y).sum(axis=-1, keepdims=True))
