"""Batch normalisation: each channel is given mean 0 and variance 1 over the batch, then a learned scale and shift.

    x_hat = (x - mean) / sqrt(var + eps)          y = gamma * x_hat + beta

In training, mean and (biased) variance are those of the batch, over images and pixels. They depend on
every x of the channel, so the gradient of each x has three terms. In inference they are the running averages, which are
constants, and batch norm is a plain scale and shift.

Derivation: docs/derivations/batch_norm2d.md. Source: Ioffe & Szegedy 2015, "Batch normalization:
accelerating deep network training by reducing internal covariate shift", algorithm 1; eps is Keras'.
"""

import math
from typing import NamedTuple

from minunet.base.backend import Array, accumulation_dtype, array_module
from minunet.ops.checks import check_array, check_images


class BatchNorm2dCache(NamedTuple):
    """What :func:`batch_norm2d_backward` needs, and, last, what the running averages need."""

    x_hat: Array  # dgamma = sum(dy * x_hat), and dx subtracts x_hat * dgamma / m
    gamma: Array  # the slope of y in x_hat
    inverse_std: Array  # the slope of x_hat in x, with mean and variance held fixed
    training: bool  # whether mean and variance depend on x
    batch_mean: Array | None  # (C,): for the running average; None in inference
    batch_var: Array | None  # (C,), biased: divided by the number of values, not by one less


def batch_norm2d_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    *,
    training: bool,
    eps: float = 1e-3,
) -> tuple[Array, BatchNorm2dCache]:
    """Normalise ``x`` (N, H, W, C) channel by channel; the other four arrays are (C,).

    With ``training`` the batch's own mean and variance are used and returned in the cache; the running
    ones are not touched (the training step averages them). Without, the running ones are used.

    Returns y, of the shape and dtype of x, and the cache.
    Raises ValueError if shapes or dtypes do not fit, if eps is not positive, or if in training a channel has
    a single value: its variance would be 0 and y would be beta, whatever x is.

    >>> import numpy as np
    >>> x = np.array([1.0, 3.0]).reshape(1, 1, 2, 1)
    >>> one, zero = np.ones(1), np.zeros(1)
    >>> y, cache = batch_norm2d_forward(x, one, zero, zero, one, training=True, eps=1e-9)
    >>> y.ravel().round(6), cache.batch_mean, cache.batch_var
    (array([-1.,  1.]), array([2.]), array([1.]))
    """
    xp = array_module(x)
    check_images("x", x)
    for name, value in (("gamma", gamma), ("beta", beta), ("running_mean", running_mean), ("running_var", running_var)):
        check_array(name, value, (x.shape[3],), x.dtype)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if training and x[..., 0].size == 1:
        raise ValueError(f"x must have more than one value a channel in training, got {x.shape}; use a larger batch")

    if training:
        sum_dtype = accumulation_dtype(x.dtype)
        mean = x.mean(axis=(0, 1, 2), dtype=sum_dtype).astype(x.dtype)
        centred = x - mean
        var = (centred * centred).mean(axis=(0, 1, 2), dtype=sum_dtype).astype(x.dtype)
    else:
        centred, var = x - running_mean, running_var
    inverse_std = 1 / xp.sqrt(var + eps)
    x_hat = centred * inverse_std
    y = gamma * x_hat + beta
    batch_mean, batch_var = (mean, var) if training else (None, None)
    return y, BatchNorm2dCache(x_hat, gamma, inverse_std, training, batch_mean, batch_var)


def batch_norm2d_backward(dy: Array, cache: BatchNorm2dCache) -> tuple[Array, Array, Array]:
    """The gradients of :func:`batch_norm2d_forward`: (dx, dgamma, dbeta).

    In training, changing one x also moves the mean (which takes the mean of dy out of dx) and the variance
    (which takes out the part of dy that is parallel to x_hat). With m values a channel:

        dx = gamma / sqrt(var + eps) * (dy - dbeta / m - x_hat * dgamma / m)
    """
    x_hat, gamma, inverse_std, training, _, _ = cache
    check_array("dy", dy, x_hat.shape, x_hat.dtype)

    sum_dtype = accumulation_dtype(dy.dtype)
    dgamma = (dy * x_hat).sum(axis=(0, 1, 2), dtype=sum_dtype).astype(dy.dtype)
    dbeta = dy.sum(axis=(0, 1, 2), dtype=sum_dtype).astype(dy.dtype)
    if not training:
        return dy * (gamma * inverse_std), dgamma, dbeta
    m = dy[..., 0].size
    dx = (dy - dbeta / m - x_hat * (dgamma / m)) * (gamma * inverse_std)
    return dx, dgamma, dbeta
