"""Exercise batch_norm2d: write batch_norm2d_backward.

Forward, for each channel alone, in training with the mean and the (biased) variance of its N*H*W values:

    x_hat = (x - mean) * inverse_std        inverse_std = 1 / sqrt(var + eps)        y = gamma * x_hat + beta

In inference, mean and var are running averages: constants. Return (dx, dgamma, dbeta), given dy. dy and the cache stay
as they are.

    python -m minunet.exercises batch_norm2d FILE        checks this file
    python -m minunet.exercises batch_norm2d --hint 1    (then 2, 3)

To read: docs/derivations/batch_norm2d.md, down to "The lines it becomes". It is the longest of these derivations.
"""

import numpy as np

from minunet.base.backend import Array
from minunet.ops.batch_norm2d import BatchNorm2dCache


def batch_norm2d_backward(dy: Array, cache: BatchNorm2dCache) -> tuple[Array, Array, Array]:
    """Return dx (N, H, W, C), dgamma (C,) and dbeta (C,).

    dy                 (N, H, W, C), the gradient with respect to y
    cache.x_hat        (N, H, W, C)
    cache.gamma        (C,)
    cache.inverse_std  (C,)
    cache.training     whether mean and variance were those of the batch
    """
    raise NotImplementedError
