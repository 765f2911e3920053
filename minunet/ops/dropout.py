"""Dropout: in training, each activation is set to 0 with probability ``rate``, and the others are scaled up.

    y = x / (1 - rate)  where kept,  0 where dropped

The scale keeps the expected value, so that nothing has to change in inference, where y = x. No unit can
rely on another one to be there.

The mask is a function of a key (see minunet.base.rng), so that a resumed run, or another engine, drops the same.

Derivation: docs/derivations/dropout.md. Source: Srivastava et al. 2014, "Dropout: a simple way to prevent
neural networks from overfitting", section 10 for the scale.
"""

from typing import NamedTuple

import numpy as np

from minunet.base import rng
from minunet.base.backend import Array, array_module
from minunet.ops.checks import check_array, check_images


class DropoutCache(NamedTuple):
    """What :func:`dropout_backward` needs."""

    kept: Array | None  # bool, shape of x: where the gradient passes; None where everything does
    scale: float  # 1 / (1 - rate): the slope of what was kept
    shape: tuple[int, ...]  # what dy must look like
    dtype: object


def dropout_forward(x: Array, rate: float, *, key: rng.Key | None) -> tuple[Array, DropoutCache]:
    """Drop each value of ``x`` (N, H, W, C) with probability ``rate``, by the random numbers that ``key`` names.

    ``key=None`` means inference: y = x. Image n of the batch draws from ``key.image + n``, 16 bits a value, so
    the probability is rate rounded to a multiple of 2**-16.

    Returns y, of the shape and dtype of x, and the cache. Raises ValueError unless 0 <= rate < 1.

    >>> import numpy as np
    >>> y, cache = dropout_forward(np.ones((1, 1, 6, 1)), 0.5, key=rng.Key(seed=0))
    >>> y.ravel()
    array([2., 0., 2., 0., 2., 2.])
    """
    xp = array_module(x)
    check_images("x", x)
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
    if key is None or rate == 0:
        return x.copy(), DropoutCache(None, 1.0, x.shape, x.dtype)

    keys = (key._replace(image=key.image + n) for n in range(len(x)))
    draws = np.stack([rng.random_uint16(image_key, x[0].size) for image_key in keys])
    kept = xp.asarray(draws >= round(rate * 2**16)).reshape(x.shape)
    scale = 1 / (1 - rate)
    return xp.where(kept, x * scale, x.dtype.type(0)), DropoutCache(kept, scale, x.shape, x.dtype)


def dropout_backward(dy: Array, cache: DropoutCache) -> Array:
    """The gradient of :func:`dropout_forward`: dx, which is dy * scale where x was kept and 0 elsewhere."""
    kept, scale, shape, dtype = cache
    check_array("dy", dy, shape, dtype)
    if kept is None:
        return dy.copy()
    return array_module(dy).where(kept, dy * scale, dy.dtype.type(0))
