"""ReLU, the rectified linear unit: negative values become 0, the others stay.

    y = max(x, 0)

Its slope is 1 where x > 0 and 0 where x < 0. At 0 there is a kink; minunet, as everyone, takes ReLU'(0) = 0.

Derivation: docs/derivations/relu.md. Source: Nair & Hinton 2010, "Rectified linear units improve
restricted Boltzmann machines".
"""

from typing import NamedTuple

from minunet.base.backend import Array, array_module
from minunet.ops.checks import check_array, check_images


class ReluCache(NamedTuple):
    """What :func:`relu_backward` needs."""

    passed: Array  # bool, shape of x: where y = x, and so where the gradient passes
    dtype: object  # what dy must look like


def relu_forward(x: Array) -> tuple[Array, ReluCache]:
    """The positive part of ``x`` (N, H, W, C). A NaN passes through, so that it cannot hide.

    Returns y, of the shape and dtype of x, and the cache. Raises ValueError if x is not a batch of float images.

    >>> import numpy as np
    >>> y, cache = relu_forward(np.array([-1.0, 0.0, 2.0]).reshape(1, 1, 3, 1))
    >>> y.ravel(), cache.passed.ravel()
    (array([0., 0., 2.]), array([False, False,  True]))
    """
    xp = array_module(x)
    check_images("x", x)
    passed = ~(x.real <= 0)  # not x > 0, so that a NaN passes; .real, so that complex x work too (docs/conventions.md)
    return xp.where(passed, x, x.dtype.type(0)), ReluCache(passed, x.dtype)


def relu_backward(dy: Array, cache: ReluCache) -> Array:
    """The gradient of :func:`relu_forward`: dx, which is dy where x passed and 0 elsewhere."""
    passed, dtype = cache
    xp = array_module(dy)
    check_array("dy", dy, passed.shape, dtype)
    return xp.where(passed, dy, dy.dtype.type(0))
