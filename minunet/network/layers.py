"""The layers that own arrays: a layer keeps its parameters and calls the ops that do the work.

``y, cache = layer.forward(x, ...)`` and ``dx, grads = layer.backward(dy, cache)``, where ``grads`` has the
names of ``layer.parameters()``. A layer remembers nothing between the two: all that backward needs is in
the cache. What has no arrays of its own (ReLU, max-pool, concat) is called as an op; only dropout is a layer
without any, for its number among the network's streams of random numbers.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minunet import ops
from minunet.base import rng
from minunet.base.backend import Array
from minunet.network.initializers import glorot_uniform, he_normal
from minunet.ops.batch_norm2d import BatchNorm2dCache
from minunet.ops.conv2d import Conv2dCache
from minunet.ops.conv_transpose2d import ConvTranspose2dCache
from minunet.ops.dropout import DropoutCache

Arrays = dict[str, Array]


class Layer:
    """What layers, blocks and networks have in common: named arrays."""

    def parameters(self) -> Arrays:
        """The arrays that the optimiser changes, by name. Not copies: to change one is to change the layer."""
        return {}

    def buffers(self) -> Arrays:
        """The arrays that belong to the layer's state but are not learned by gradient, by name. Not copies."""
        return {}


def map_arrays(layer: Any, function: Callable[[Array], Array]) -> Any:
    """A copy of a layer, block or network in which every array has gone through ``function``.

    So a network is cast, moved to a device, or copied, without knowing what is in it.

    >>> layer = Conv2d(3, 8)
    >>> map_arrays(layer, lambda a: a.astype("float64")).weight.dtype, layer.weight.dtype
    (dtype('float64'), dtype('float32'))
    """
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Layer):
            setattr(twin, name, map_arrays(value, function))
        elif isinstance(value, list):
            setattr(twin, name, [map_arrays(part, function) for part in value])
        elif hasattr(value, "dtype") and hasattr(value, "shape"):
            setattr(twin, name, function(value))
    return twin


def prefixed(arrays: Mapping[str, Mapping[str, Array]]) -> Arrays:
    """One flat dict of several: the arrays of each part, under its dotted name.

    >>> prefixed({"conv1": {"weight": 1, "bias": 2}, "norm1": {"gamma": 3}})
    {'conv1.weight': 1, 'conv1.bias': 2, 'norm1.gamma': 3}
    """
    return {f"{part}.{name}": array for part, named in arrays.items() for name, array in named.items()}


class Conv2d(Layer):
    """A convolution with its weight (K, K, C_in, C_out) and, unless ``bias`` is False, its bias (C_out,)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | str = "same",
        bias: bool = True,
        initializer: Callable[..., np.ndarray] = he_normal,
        generator: np.random.Generator | None = None,
        dtype: str = "float32",
    ) -> None:
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.weight: Array = initializer(shape, generator or _default_generator(), dtype)
        self.bias: Array | None = np.zeros(out_channels, dtype) if bias else None
        self.stride, self.padding = stride, padding

    def parameters(self) -> Arrays:
        return _without_none({"weight": self.weight, "bias": self.bias})

    def forward(self, x: Array) -> tuple[Array, Conv2dCache]:
        return ops.conv2d_forward(x, self.weight, self.bias, self.stride, self.padding)

    def backward(self, dy: Array, cache: Conv2dCache) -> tuple[Array, Arrays]:
        dx, dweight, dbias = ops.conv2d_backward(dy, cache)
        return dx, _without_none({"weight": dweight, "bias": dbias})


class ConvTranspose2d(Layer):
    """A transposed convolution with its weight (K, K, C_in, C_out) and, unless ``bias`` is False, its bias (C_out,)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 2,
        padding: int | str = "same",
        bias: bool = True,
        initializer: Callable[..., np.ndarray] = glorot_uniform,
        generator: np.random.Generator | None = None,
        dtype: str = "float32",
    ) -> None:
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.weight: Array = initializer(shape, generator or _default_generator(), dtype)
        self.bias: Array | None = np.zeros(out_channels, dtype) if bias else None
        self.stride, self.padding = stride, padding

    def parameters(self) -> Arrays:
        return _without_none({"weight": self.weight, "bias": self.bias})

    def forward(self, x: Array) -> tuple[Array, ConvTranspose2dCache]:
        return ops.conv_transpose2d_forward(x, self.weight, self.bias, self.stride, self.padding)

    def backward(self, dy: Array, cache: ConvTranspose2dCache) -> tuple[Array, Arrays]:
        dx, dweight, dbias = ops.conv_transpose2d_backward(dy, cache)
        return dx, _without_none({"weight": dweight, "bias": dbias})


class BatchNorm2d(Layer):
    """Batch normalisation with its scale gamma, shift beta, and running mean and variance, all (C,).

    The running statistics start at mean 0 and variance 1. Forward does not change them: the training step
    averages the batch's own, which are in the cache, into them.
    """

    def __init__(self, channels: int, *, eps: float = 1e-3, dtype: str = "float32") -> None:
        self.gamma: Array = np.ones(channels, dtype)
        self.beta: Array = np.zeros(channels, dtype)
        self.running_mean: Array = np.zeros(channels, dtype)
        self.running_var: Array = np.ones(channels, dtype)
        self.eps = eps

    def parameters(self) -> Arrays:
        return {"gamma": self.gamma, "beta": self.beta}

    def buffers(self) -> Arrays:
        return {"running_mean": self.running_mean, "running_var": self.running_var}

    def forward(self, x: Array, *, training: bool) -> tuple[Array, BatchNorm2dCache]:
        return ops.batch_norm2d_forward(
            x, self.gamma, self.beta, self.running_mean, self.running_var, training=training, eps=self.eps
        )

    def backward(self, dy: Array, cache: BatchNorm2dCache) -> tuple[Array, Arrays]:
        dx, dgamma, dbeta = ops.batch_norm2d_backward(dy, cache)
        return dx, {"gamma": dgamma, "beta": dbeta}

    def batch_stats(self, cache: BatchNorm2dCache) -> Arrays:
        """The batch's own statistics, under the names of the buffers that average them."""
        return {"running_mean": cache.batch_mean, "running_var": cache.batch_var}


class Dropout(Layer):
    """Dropout at ``rate``. It owns no array, only the number of its stream of random numbers in the network."""

    def __init__(self, rate: float, index: int = 0) -> None:
        self.rate, self.index = rate, index

    def forward(self, x: Array, *, key: rng.Key | None) -> tuple[Array, DropoutCache]:
        layer_key = None if key is None else key._replace(stream=rng.DROPOUT + self.index)
        return ops.dropout_forward(x, self.rate, key=layer_key)

    def backward(self, dy: Array, cache: DropoutCache) -> tuple[Array, Arrays]:
        return ops.dropout_backward(dy, cache), {}


def _without_none(arrays: Mapping[str, Array | None]) -> Arrays:
    return {name: array for name, array in arrays.items() if array is not None}


def _default_generator() -> np.random.Generator:
    return rng.generator(rng.Key(seed=0, stream=rng.INITIALIZE))
