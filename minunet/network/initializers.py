"""The first values of the weights: random, and scaled so that a signal keeps its size from layer to layer.

A unit sums fan_in inputs, so its variance is fan_in times that of weight times input. Both rules choose the
weight's variance to undo that factor. ``shape`` is a kernel's (KH, KW, C_in, C_out) in its direction of flow.
"""

import math

import numpy as np


def he_normal(shape: tuple[int, ...], generator: np.random.Generator, dtype: str = "float32") -> np.ndarray:
    """A normal distribution of variance 2 / fan_in, cut off at two standard deviations, as Keras draws it.

    The 2 makes up for ReLU, which removes half of the signal's power. Source: He et al. 2015, "Delving deep
    into rectifiers", equation 10.

    >>> w = he_normal((3, 3, 64, 64), np.random.default_rng(0))
    >>> round(float(w.std() * (3 * 3 * 64 / 2) ** 0.5), 2)
    1.0
    """
    fan_in, _ = _fans(shape)
    std_of_truncated = 0.87962566103423978  # of a standard normal distribution cut off at -2 and 2
    values = generator.standard_normal(shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = generator.standard_normal(np.count_nonzero(outside))
    return (values * (math.sqrt(2 / fan_in) / std_of_truncated)).astype(dtype)


def glorot_uniform(shape: tuple[int, ...], generator: np.random.Generator, dtype: str = "float32") -> np.ndarray:
    """A uniform distribution of variance 2 / (fan_in + fan_out): between what forward and backward ask for.

    Source: Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks",
    equation 16.

    >>> w = glorot_uniform((1, 1, 2, 4), np.random.default_rng(0))
    >>> bool(np.abs(w).max() <= 1.0)  # sqrt(6 / (2 + 4))
    True
    """
    fan_in, fan_out = _fans(shape)
    limit = math.sqrt(6 / (fan_in + fan_out))
    return generator.uniform(-limit, limit, shape).astype(dtype)


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many inputs one output sums, and how many outputs one input reaches."""
    kernel_height, kernel_width, in_channels, out_channels = shape
    taps = kernel_height * kernel_width
    return taps * in_channels, taps * out_channels
