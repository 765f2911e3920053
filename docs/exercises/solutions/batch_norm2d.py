"""Solution of batch_norm2d.

What a normalisation undoes has no gradient: a shift of the whole channel (so the mean of dy is taken out), and a
stretch (so the part of dy along x_hat is taken out). In inference nothing is undone, and dx is dy times a constant.
"""

from minunet.base.backend import Array
from minunet.ops.batch_norm2d import BatchNorm2dCache


def batch_norm2d_backward(dy: Array, cache: BatchNorm2dCache) -> tuple[Array, Array, Array]:
    """Three terms in training, one in inference."""
    dgamma = (dy * cache.x_hat).sum(axis=(0, 1, 2))
    dbeta = dy.sum(axis=(0, 1, 2))
    m = dy[..., 0].size
    dx = dy * cache.gamma * cache.inverse_std
    if cache.training:
        dx = (dy - dbeta / m - cache.x_hat * dgamma / m) * cache.gamma * cache.inverse_std
    return dx, dgamma, dbeta
