"""Solution of conv2d_dweight.

weight[u, v, c, o] stands once in y[n, i, j, o], for every n, i, j, times the pixel that it has met there. So its
gradient is the sum over n, i, j of that pixel times dy: for each tap a matrix product, (C_in, pixels) times (pixels,
C_out).
"""

import numpy as np

from minunet.base.backend import Array
from minunet.ops.conv2d import Conv2dCache


def conv2d_dweight(dy: Array, cache: Conv2dCache) -> Array:
    """Each tap collects dy, weighted by the pixels that it has met."""
    _, height, width, _ = dy.shape
    s = cache.stride
    x_pad = np.pad(cache.x, ((0, 0), *cache.pad, (0, 0)))
    dweight = np.zeros_like(cache.weight)
    for u in range(dweight.shape[0]):
        for v in range(dweight.shape[1]):
            met = x_pad[:, u : u + s * height : s, v : v + s * width : s]
            dweight[u, v] = np.einsum("nijc,nijo->co", met, dy)
    return dweight
