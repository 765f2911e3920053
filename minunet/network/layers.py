"""The layers that own arrays: a layer keeps its parameters and calls the ops that do the work.

``y, cache = layer.forward(x, ...)`` and ``dx, grads = layer.backward(dy, cache)``, where ``grads`` has the
names of ``layer.parameters()``. A layer remembers nothing between the two: all that backward needs is in
the cache. What has no arrays of its own (ReLU, max-pool, concat) is called as an op; only dropout is a layer
without any, for its number among the network's streams of random numbers.

A layer of one's own that is made of others has nothing to say about their arrays: they are found by
:meth:`Layer.children`.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
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
    """What layers, blocks and networks have in common: named arrays, their own and those of the layers in them.

    A layer with arrays of its own overrides :meth:`parameters` (``{"scale": self.scale} | super().parameters()``) and
    :meth:`buffers`. Its :meth:`forward` puts the cache of a child under the child's name in its own cache.
    """

    def children(self) -> "dict[str, Layer]":
        """The layers that this one is made of, by name: its attributes that are layers, in the order they were set.

        Those in a list, a tuple or a dict are called by the attribute and their place in it: ``blocks.0``.
        """
        return dict(_layers_in(vars(self)))

    def child_caches(self, cache: Any) -> dict[str, Any]:
        """What :meth:`children` have put into the ``cache`` of this layer, by their names."""
        return {name: _at(cache, name) for name in self.children()}

    def leaves(self) -> "dict[str, Layer]":
        """The layers in this one that are not made of others, by dotted name, in the order of :meth:`children`."""
        found: dict[str, Layer] = {}
        for name, child in self.children().items():
            inner = child.leaves()
            found |= {f"{name}.{rest}": leaf for rest, leaf in inner.items()} if inner else {name: child}
        return found

    def parameters(self) -> Arrays:
        """The arrays that the optimiser changes, by name. Not copies: to change one is to change the layer."""
        return prefixed({name: child.parameters() for name, child in self.children().items()})

    def buffers(self) -> Arrays:
        """The arrays that belong to the layer's state but are not learned by gradient, by name. Not copies."""
        return prefixed({name: child.buffers() for name, child in self.children().items()})

    def batch_stats(self, cache: Any) -> Arrays:
        """The statistics of the batch that a training forward saw, under the names of the buffers."""
        children = self.children()
        return prefixed({name: children[name].batch_stats(part) for name, part in self.child_caches(cache).items()})


def map_arrays(layer: Any, function: Callable[[Array], Array]) -> Any:
    """A copy of a layer, block or network in which every array has gone through ``function``.

    So a network is cast, moved to a device, or copied, without knowing what is in it. Raises TypeError for an array
    that is neither among the parameters nor among the buffers: it would stay where it is.

    >>> layer = Conv2d(3, 8)
    >>> map_arrays(layer, lambda a: a.astype("float64")).weight.dtype, layer.weight.dtype
    (dtype('float64'), dtype('float32'))
    """
    named = list((layer.parameters() | layer.buffers()).values())
    _check_named(layer, {id(array) for array in named})
    # deepcopy takes what it finds here instead of a copy.
    return copy.deepcopy(layer, {id(array): function(array) for array in named})


def prefixed(arrays: Mapping[str, Mapping[str, Array]]) -> Arrays:
    """One flat dict of several: the arrays of each part, under its dotted name.

    >>> prefixed({"conv1": {"weight": 1, "bias": 2}, "norm1": {"gamma": 3}})
    {'conv1.weight': 1, 'conv1.bias': 2, 'norm1.gamma': 3}
    """
    return {f"{part}.{name}": array for part, named in arrays.items() for name, array in named.items()}


class _Convolution(Layer):
    """What both convolutions own: a weight (K, K, C_in, C_out) and, unless ``bias`` is False, a bias (C_out,)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        padding: int | str = "same",
        bias: bool = True,
        initializer: Callable[..., np.ndarray],
        generator: np.random.Generator | None = None,
        dtype: str = "float32",
    ) -> None:
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        generator = generator or rng.generator(rng.Key(seed=0, stream=rng.INITIALIZE))
        self.weight: Array = initializer(shape, generator, dtype)
        self.bias: Array | None = np.zeros(out_channels, dtype) if bias else None
        self.stride, self.padding = stride, padding

    def parameters(self) -> Arrays:
        return _without_none({"weight": self.weight, "bias": self.bias})


class Conv2d(_Convolution):
    """A convolution. Options: ``stride``, ``padding``, ``bias``, ``initializer``, ``generator``, ``dtype``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **{"stride": 1, "initializer": he_normal, **options})

    def forward(self, x: Array) -> tuple[Array, Conv2dCache]:
        return ops.conv2d_forward(x, self.weight, self.bias, self.stride, self.padding)

    def backward(self, dy: Array, cache: Conv2dCache) -> tuple[Array, Arrays]:
        dx, dweight, dbias = ops.conv2d_backward(dy, cache)
        return dx, _without_none({"weight": dweight, "bias": dbias})


class ConvTranspose2d(_Convolution):
    """A transposed convolution, of stride 2 unless the options say otherwise; they are those of :class:`Conv2d`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, **options: Any) -> None:
        options = {"stride": 2, "initializer": glorot_uniform, **options}
        super().__init__(in_channels, out_channels, kernel_size, **options)

    def forward(self, x: Array) -> tuple[Array, ConvTranspose2dCache]:
        return ops.conv_transpose2d_forward(x, self.weight, self.bias, self.stride, self.padding)

    def backward(self, dy: Array, cache: ConvTranspose2dCache) -> tuple[Array, Arrays]:
        dx, dweight, dbias = ops.conv_transpose2d_backward(dy, cache)
        return dx, _without_none({"weight": dweight, "bias": dbias})


class BatchNorm2d(Layer):
    """Batch normalisation with its scale gamma, shift beta, and running mean and variance, all (C,).

    The running statistics start at mean 0 and variance 1. Forward does not change them: the training step
    averages the batch's own, which are in the cache, into them.

    While :attr:`frozen`, it normalises by the running statistics in training, too, as in inference: it is then a fixed
    scale and shift of each channel, and so is its backward pass. It has no batch statistics for anyone to average.
    """

    def __init__(self, channels: int, *, eps: float = 1e-3, dtype: str = "float32") -> None:
        self.gamma: Array = np.ones(channels, dtype)
        self.beta: Array = np.zeros(channels, dtype)
        self.running_mean: Array = np.zeros(channels, dtype)
        self.running_var: Array = np.ones(channels, dtype)
        self.eps = eps
        self.frozen = False

    def parameters(self) -> Arrays:
        return {"gamma": self.gamma, "beta": self.beta}

    def buffers(self) -> Arrays:
        return {"running_mean": self.running_mean, "running_var": self.running_var}

    def forward(self, x: Array, *, training: bool) -> tuple[Array, BatchNorm2dCache]:
        by_batch = training and not self.frozen
        return ops.batch_norm2d_forward(
            x, self.gamma, self.beta, self.running_mean, self.running_var, training=by_batch, eps=self.eps
        )

    def backward(self, dy: Array, cache: BatchNorm2dCache) -> tuple[Array, Arrays]:
        dx, dgamma, dbeta = ops.batch_norm2d_backward(dy, cache)
        return dx, {"gamma": dgamma, "beta": dbeta}

    def batch_stats(self, cache: BatchNorm2dCache) -> Arrays:
        """The batch's own statistics, under the names of the buffers that average them; none while frozen."""
        if self.frozen:
            return {}
        return {"running_mean": cache.batch_mean, "running_var": cache.batch_var}


def _norms(layer: Layer) -> dict[str, BatchNorm2d]:
    return {name: leaf for name, leaf in layer.leaves().items() if isinstance(leaf, BatchNorm2d)}


def frozen_norms(layer: Layer) -> list[str]:
    """The names of the batch norms in ``layer`` that are frozen."""
    return [name for name, norm in _norms(layer).items() if norm.frozen]


@contextmanager
def norms_frozen(layer: Layer, trained: Collection[str]) -> Iterator[None]:
    """While it lasts, each batch norm in ``layer`` is frozen of which no parameter is among the names ``trained``.

    Otherwise it would not stay the function it was: batches of other images would change what it does to a channel.
    """
    before = {name: norm.frozen for name, norm in _norms(layer).items()}
    try:
        for name, norm in _norms(layer).items():
            norm.frozen |= not any(f"{name}.{own}" in trained for own in norm.parameters())
        yield
    finally:
        for name, norm in _norms(layer).items():  # an engine may have put others in their place
            norm.frozen = before[name]


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


def _layers_in(values: Mapping[Any, Any]) -> Iterator[tuple[str, Layer]]:
    """The layers among ``values``, and in lists, tuples and dicts among them, by dotted name."""
    for name, value in values.items():
        if isinstance(value, Layer):
            yield str(name), value
        elif isinstance(value, list | tuple | dict):
            items = value if isinstance(value, dict) else dict(enumerate(value))
            yield from ((f"{name}.{place}", layer) for place, layer in _layers_in(items))


def _at(cache: Any, name: str) -> Any:
    """The part of a cache at a dotted name: a field, or a place in a list, a tuple or a dict."""
    for step in name.split("."):
        cache = getattr(cache, step) if hasattr(cache, step) else cache[int(step) if step.isdigit() else step]
    return cache


def _check_named(layer: Layer, named: set[int]) -> None:
    """Raise TypeError for an array in ``layer``, or in a layer in it, whose id is not in ``named``."""
    for name, value in vars(layer).items():
        if hasattr(value, "dtype") and hasattr(value, "shape") and id(value) not in named:
            raise TypeError(f"{type(layer).__name__}.{name} is an array that neither parameters() nor buffers() has")
    for _, child in _layers_in(vars(layer)):
        _check_named(child, named)
