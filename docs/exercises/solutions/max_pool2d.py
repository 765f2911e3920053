"""Solution of max_pool2d.

The maximum is the winner, so its slope in the winner is 1, and in the others 0: they could change a little, and nothing
would happen. Two neighbours with the same value do not share: forward chose one, and only that one was used.
"""

import numpy as np

from minunet.base.backend import Array
from minunet.ops.max_pool2d import MaxPool2dCache


def max_pool2d_backward(dy: Array, cache: MaxPool2dCache) -> Array:
    """Each window's gradient goes to the pixel that won it."""
    winner, size, _ = cache
    n, height, width, channels = dy.shape
    dx = np.zeros((n, height * size, width * size, channels), dy.dtype)
    for u in range(size):
        for v in range(size):
            dx[:, u::size, v::size] = np.where(winner == u * size + v, dy, dy.dtype.type(0))
    return dx
