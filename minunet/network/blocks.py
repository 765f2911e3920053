"""The rooms of the U: two convolutions in a row, the step down and the step up.

Each backward is its forward read from the last line to the first. What a line put into the cache, the
mirrored line takes out, under the same name: ``cache.conv1`` is what ``self.conv1`` wants to remember.
"""

from typing import Any, NamedTuple

import numpy as np

from minunet import ops
from minunet.base import rng
from minunet.base.backend import Array
from minunet.network.layers import Arrays, BatchNorm2d, Conv2d, ConvTranspose2d, Dropout, Layer, prefixed
from minunet.ops.batch_norm2d import BatchNorm2dCache
from minunet.ops.concat import ConcatCache
from minunet.ops.conv2d import Conv2dCache
from minunet.ops.conv_transpose2d import ConvTranspose2dCache
from minunet.ops.dropout import DropoutCache
from minunet.ops.max_pool2d import MaxPool2dCache
from minunet.ops.relu import ReluCache


class DoubleConvCache(NamedTuple):
    """What :meth:`DoubleConv.backward` needs: the cache of each line of forward."""

    conv1: Conv2dCache
    norm1: BatchNorm2dCache
    relu1: ReluCache
    conv2: Conv2dCache
    norm2: BatchNorm2dCache
    relu2: ReluCache


class DoubleConv(Layer):
    """Convolution 3x3, batch norm, ReLU, twice: (N, H, W, C_in) to (N, H, W, C_out)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        conv_bias: bool,
        batch_norm_eps: float = 1e-3,
        generator: np.random.Generator,
        dtype: str,
    ) -> None:
        convolution: dict[str, Any] = {"bias": conv_bias, "generator": generator, "dtype": dtype}
        norm: dict[str, Any] = {"eps": batch_norm_eps, "dtype": dtype}
        self.conv1 = Conv2d(in_channels, out_channels, **convolution)
        self.norm1 = BatchNorm2d(out_channels, **norm)
        self.conv2 = Conv2d(out_channels, out_channels, **convolution)
        self.norm2 = BatchNorm2d(out_channels, **norm)

    def forward(self, x: Array, *, training: bool) -> tuple[Array, DoubleConvCache]:
        x, cache_conv1 = self.conv1.forward(x)
        x, cache_norm1 = self.norm1.forward(x, training=training)
        x, cache_relu1 = ops.relu_forward(x)
        x, cache_conv2 = self.conv2.forward(x)
        x, cache_norm2 = self.norm2.forward(x, training=training)
        x, cache_relu2 = ops.relu_forward(x)
        return x, DoubleConvCache(cache_conv1, cache_norm1, cache_relu1, cache_conv2, cache_norm2, cache_relu2)

    def backward(self, dy: Array, cache: DoubleConvCache) -> tuple[Array, Arrays]:
        dx = ops.relu_backward(dy, cache.relu2)
        dx, grads_norm2 = self.norm2.backward(dx, cache.norm2)
        dx, grads_conv2 = self.conv2.backward(dx, cache.conv2)
        dx = ops.relu_backward(dx, cache.relu1)
        dx, grads_norm1 = self.norm1.backward(dx, cache.norm1)
        dx, grads_conv1 = self.conv1.backward(dx, cache.conv1)
        grads = {"conv1": grads_conv1, "norm1": grads_norm1, "conv2": grads_conv2, "norm2": grads_norm2}
        return dx, prefixed(grads)


class DownCache(NamedTuple):
    """What :meth:`Down.backward` needs: the cache of each line of forward."""

    convs: DoubleConvCache
    pool: MaxPool2dCache
    dropout: DropoutCache


class Down(Layer):
    """One step down the left side: the features of this level, which are its skip, and the same at half the size.

    Its arrays have the names of its double convolution, whose ``options`` it takes: ``down1.conv1.weight``.
    """

    def __init__(self, in_channels: int, out_channels: int, *, dropout: Dropout, **options: Any) -> None:
        self.convs = DoubleConv(in_channels, out_channels, **options)
        self.dropout = dropout

    def forward(self, x: Array, *, training: bool, key: rng.Key | None) -> tuple[Array, Array, DownCache]:
        """(N, H, W, C_in) to x (N, H/2, W/2, C_out), skip (N, H, W, C_out), and the cache."""
        skip, cache_convs = self.convs.forward(x, training=training)
        x, cache_pool = ops.max_pool2d_forward(skip)
        x, cache_dropout = self.dropout.forward(x, key=key)
        return x, skip, DownCache(cache_convs, cache_pool, cache_dropout)

    def backward(self, dy: Array, dskip: Array, cache: DownCache) -> tuple[Array, Arrays]:
        dx, _ = self.dropout.backward(dy, cache.dropout)
        # The skip was used twice, by the pool and by the other side of the U: its gradient is the sum of both.
        dskip = dskip + ops.max_pool2d_backward(dx, cache.pool)
        return self.convs.backward(dskip, cache.convs)

    def children(self) -> dict[str, Layer]:
        return self.convs.children()

    def child_caches(self, cache: DownCache) -> dict[str, Any]:
        return self.convs.child_caches(cache.convs)


class UpCache(NamedTuple):
    """What :meth:`Up.backward` needs: the cache of each line of forward."""

    up: ConvTranspose2dCache
    concat: ConcatCache
    dropout: DropoutCache
    convs: DoubleConvCache


class Up(Layer):
    """One step up the right side: twice the size, joined with the skip of the same level, then convolved.

    Its arrays are ``up1.up.weight`` and those of its double convolution, ``up1.conv1.weight``, whose ``options`` it
    takes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        up_kernel: int,
        dropout: Dropout,
        generator: np.random.Generator,
        dtype: str,
        **options: Any,
    ) -> None:
        self.up = ConvTranspose2d(in_channels, out_channels, up_kernel, generator=generator, dtype=dtype)
        self.dropout = dropout
        # Twice the channels: half of them come up, half of them come from the skip.
        self.convs = DoubleConv(2 * out_channels, out_channels, generator=generator, dtype=dtype, **options)

    def forward(self, x: Array, skip: Array, *, training: bool, key: rng.Key | None) -> tuple[Array, UpCache]:
        """From x (N, H/2, W/2, C_in) and skip (N, H, W, C_out) to (N, H, W, C_out), and the cache."""
        x, cache_up = self.up.forward(x)
        x, cache_concat = ops.concat_forward(x, skip)
        x, cache_dropout = self.dropout.forward(x, key=key)
        x, cache_convs = self.convs.forward(x, training=training)
        return x, UpCache(cache_up, cache_concat, cache_dropout, cache_convs)

    def backward(self, dy: Array, cache: UpCache) -> tuple[Array, Array, Arrays]:
        """Returns dx, dskip and the gradients of the block's arrays."""
        dx, grads_convs = self.convs.backward(dy, cache.convs)
        dx, _ = self.dropout.backward(dx, cache.dropout)
        dx, dskip = ops.concat_backward(dx, cache.concat)
        dx, grads_up = self.up.backward(dx, cache.up)
        return dx, dskip, prefixed({"up": grads_up}) | grads_convs

    def children(self) -> dict[str, Layer]:
        return {"up": self.up} | self.convs.children()

    def child_caches(self, cache: UpCache) -> dict[str, Any]:
        return {"up": cache.up} | self.convs.child_caches(cache.convs)
