"""Exercise max_pool2d: write max_pool2d_backward.

Forward: y[n, i, j, c] is the largest of the size * size numbers x[n, size*i + u, size*j + v, c]. The windows do not
overlap. Forward has noted who won, as one number for each window: u * size + v. If several are equal, it is the first.

Return dx, given dy. dy and the cache stay as they are.

    python -m minunet.exercises max_pool2d FILE        checks this file
    python -m minunet.exercises max_pool2d --hint 1    (then 2, 3)

To read: docs/derivations/max_pool2d.md, down to "The lines it becomes".
"""

import numpy as np

from minunet.base.backend import Array
from minunet.ops.max_pool2d import MaxPool2dCache


def max_pool2d_backward(dy: Array, cache: MaxPool2dCache) -> Array:
    """Return dx, (N, H, W, C).

    dy            (N, H / size, W / size, C), the gradient with respect to y
    cache.winner  integers of the shape of dy: u * size + v of the pixel that won
    cache.size    the window's side
    """
    raise NotImplementedError
