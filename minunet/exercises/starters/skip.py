"""Exercise skip: write the backward pass of one level of the U.

Forward is below. The features go two ways: down, where they are pooled and come up again, and straight across.

    features ----------- skip -----------> concat -> y
        pool -> transposed convolution -> up

Write level_backward. The ops' own backwards are there for the pool and the transposed convolution; split the concat by
hand. dy and the cache stay as they are: dy[..., :3] is a view of dy, not a copy.

    python -m minunet.exercises skip FILE        checks this file
    python -m minunet.exercises skip --hint 1    (then 2, 3)

To read: docs/derivations/concat.md, down to "The lines it becomes"; docs/derivations/unet_backward.md, "See the fork".
"""

from typing import NamedTuple

import numpy as np

from minunet.base.backend import Array
from minunet.ops import (
    concat_forward,
    conv_transpose2d_backward,
    conv_transpose2d_forward,
    max_pool2d_backward,
    max_pool2d_forward,
)
from minunet.ops.concat import ConcatCache
from minunet.ops.conv_transpose2d import ConvTranspose2dCache
from minunet.ops.max_pool2d import MaxPool2dCache


class LevelCache(NamedTuple):
    """The cache of each line of level_forward."""

    pool: MaxPool2dCache
    up: ConvTranspose2dCache
    concat: ConcatCache  # concat.up_channels: how many channels of y are up's


def level_forward(features: Array, weight: Array) -> tuple[Array, LevelCache]:
    """From features (N, H, W, C) and weight (2, 2, C, C_up) to y (N, H, W, C_up + C), the features last."""
    pooled, pool = max_pool2d_forward(features)
    up, up_cache = conv_transpose2d_forward(pooled, weight, None)
    y, concat = concat_forward(up, features)
    return y, LevelCache(pool, up_cache, concat)


def level_backward(dy: Array, cache: LevelCache) -> tuple[Array, Array]:
    """Return dfeatures (N, H, W, C) and dweight (2, 2, C, C_up).

    conv_transpose2d_backward(dup, cache.up) returns (dpooled, dweight, None), as there is no bias.
    max_pool2d_backward(dpooled, cache.pool) returns the gradient of what was pooled.
    """
    raise NotImplementedError
