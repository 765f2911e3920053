"""Concatenation: the upsampled features and the skip's, side by side along the channel axis.

    y = [up, skip]

It is the bridge of the U-Net: what the way up has understood beside what the way down has seen. Nothing is
computed, so backward only splits: each input gets its own channels of dy.

Derivation: docs/derivations/concat.md. Source: Ronneberger, Fischer & Brox 2015, "U-Net: convolutional
networks for biomedical image segmentation", section 2.
"""

from typing import NamedTuple

from minunet.base.backend import Array, array_module
from minunet.ops.checks import check_array, check_images


class ConcatCache(NamedTuple):
    """What :func:`concat_backward` needs."""

    up_channels: int  # where to split dy
    y_shape: tuple[int, ...]  # what dy must look like
    dtype: object


def concat_forward(up: Array, skip: Array) -> tuple[Array, ConcatCache]:
    """Join ``up`` (N, H, W, C_up) and ``skip`` (N, H, W, C_skip), in this order, to y (N, H, W, C_up + C_skip).

    Raises ValueError if the two differ in anything but channels.

    >>> import numpy as np
    >>> y, cache = concat_forward(np.full((1, 1, 1, 2), 1.0), np.full((1, 1, 1, 1), 2.0))
    >>> y.ravel()
    array([1., 1., 2.])
    """
    xp = array_module(up)
    check_images("up", up)
    check_images("skip", skip)
    check_array("skip", skip, (*up.shape[:3], skip.shape[3]), up.dtype)
    y = xp.concatenate([up, skip], axis=3)
    return y, ConcatCache(up.shape[3], y.shape, y.dtype)


def concat_backward(dy: Array, cache: ConcatCache) -> tuple[Array, Array]:
    """The gradients of :func:`concat_forward`: (dup, dskip), copies of their channels of dy."""
    up_channels, y_shape, dtype = cache
    check_array("dy", dy, y_shape, dtype)
    return dy[..., :up_channels].copy(), dy[..., up_channels:].copy()
