"""Solution of conv2d_dx.

Forward has read pixel (s*i + u, s*j + v) for y[i, j], times weight[u, v]. So back to this pixel goes dy[i, j] times the
transpose of weight[u, v], added to what other windows have sent there. The border was no input: it is cut off.
"""

import numpy as np

from minunet.base.backend import Array
from minunet.ops.conv2d import Conv2dCache


def conv2d_dx(dy: Array, cache: Conv2dCache) -> Array:
    """Every output pixel hands its gradient back to the pixels it has seen."""
    _, height, width, _ = dy.shape
    s, weight = cache.stride, cache.weight
    (top, bottom), (left, right) = cache.pad
    n, rows, columns, channels = cache.x.shape
    dx_pad = np.zeros((n, rows + top + bottom, columns + left + right, channels), dy.dtype)
    for u in range(weight.shape[0]):
        for v in range(weight.shape[1]):
            dx_pad[:, u : u + s * height : s, v : v + s * width : s] += dy @ weight[u, v].T
    return dx_pad[:, top : top + rows, left : left + columns]
