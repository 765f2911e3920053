"""Max pooling: the largest value of each window of pixels, channel by channel.

    y[n, i, j, c] = max over u, v of  x[n, size*i + u, size*j + v, c]

It makes the image smaller, so that the next convolutions see more of the scene. The windows do not
overlap, so each input pixel takes part in one maximum: backward hands the gradient to the winner.

Derivation: docs/derivations/max_pool2d.md.
"""

from typing import NamedTuple

from minunet.base.backend import Array, array_module
from minunet.ops.checks import check_array, check_images


class MaxPool2dCache(NamedTuple):
    """What :func:`max_pool2d_backward` needs."""

    winner: Array  # uint8 or int32, shape of y: which pixel of the window, u * size + v, gets the gradient
    size: int  # the window's side
    dtype: object  # what dy must look like


def max_pool2d_forward(x: Array, size: int = 2) -> tuple[Array, MaxPool2dCache]:
    """Max-pool ``x`` (N, H, W, C) over windows of ``size`` x ``size`` pixels.

    The first of equal values wins, in the order of rows then columns. A NaN wins over every number, so
    that it cannot hide.

    Returns y (N, H / size, W / size, C), of the dtype of x, and the cache.
    Raises ValueError if ``size`` does not divide H and W: no pixel is dropped silently.

    >>> import numpy as np
    >>> y, cache = max_pool2d_forward(np.array([[1.0, 5.0], [3.0, 5.0]]).reshape(1, 2, 2, 1))
    >>> y.item(), cache.winner.item()
    (5.0, 1)
    """
    xp = array_module(x)
    check_images("x", x)
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if x.shape[1] % size or x.shape[2] % size:
        raise ValueError(f"x must have a height and width that size = {size} divides, got {x.shape}")

    y = x[:, ::size, ::size].copy()
    winner = xp.zeros(y.shape, dtype="uint8" if size <= 16 else "int32")
    for u in range(size):
        for v in range(size):
            candidate = x[:, u::size, v::size]
            wins = (candidate.real > y.real) | xp.isnan(candidate.real)
            y = xp.where(wins, candidate, y)
            winner[wins] = u * size + v
    return y, MaxPool2dCache(winner, size, x.dtype)


def max_pool2d_backward(dy: Array, cache: MaxPool2dCache) -> Array:
    """The gradient of :func:`max_pool2d_forward`: dx, which is dy at each window's winner and 0 elsewhere."""
    winner, size, dtype = cache
    xp = array_module(dy)
    check_array("dy", dy, winner.shape, dtype)

    n, height, width, channels = winner.shape
    dx = xp.zeros((n, height * size, width * size, channels), dtype=dy.dtype)
    for u in range(size):
        for v in range(size):
            dx[:, u::size, v::size] = xp.where(winner == u * size + v, dy, dy.dtype.type(0))
    return dx
