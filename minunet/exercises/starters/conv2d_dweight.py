"""Exercise conv2d_dweight: write the gradient of a convolution with respect to its weights.

Forward, with x_pad for x with its border of zeros and s for the stride:

    y[n, i, j, o] = bias[o] + sum over u, v, c of  x_pad[n, s*i + u, s*j + v, c] * weight[u, v, c, o]

Return dweight, given dy. dy and the cache stay as they are. Loops are welcome: the arrays are small.

    python -m minunet.exercises conv2d_dweight FILE        checks this file
    python -m minunet.exercises conv2d_dweight --hint 1    (then 2, 3)

To read: docs/derivations/conv2d.md, down to "The lines it becomes".
"""

import numpy as np

from minunet.base.backend import Array
from minunet.ops.conv2d import Conv2dCache


def conv2d_dweight(dy: Array, cache: Conv2dCache) -> Array:
    """Return dweight, (KH, KW, C_in, C_out).

    dy            (N, H_out, W_out, C_out), the gradient with respect to y
    cache.x       (N, H, W, C_in), without its border
    cache.pad     ((top, bottom), (left, right)): how many zeros forward has put around x
    cache.stride  s
    cache.weight  (KH, KW, C_in, C_out): here only its shape matters
    """
    raise NotImplementedError
