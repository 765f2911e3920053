"""The U-Net: down the left side, through the bottleneck, up the right side, and across by the skips.

    x -> down1 ---------------- skip ----------------> up1 -> head -> logits
           down2 ------------- skip ------------> up2
             ...                             ...
               downD ------- skip ------> upD
                      bottleneck

``UNet.forward`` reads like this figure, and ``UNet.backward`` is its mirror image, line for line. Level 1 is
the full resolution; ``up1`` meets the skip of ``down1``.

The whole backward pass: docs/derivations/unet_backward.md. Source: Ronneberger, Fischer & Brox 2015,
"U-Net: convolutional networks for biomedical image segmentation", figure 1 (here with padding "same",
batch norm and dropout, as the reference system has them).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from minunet import ops
from minunet.base import rng
from minunet.base.backend import Array, array_module
from minunet.network.blocks import DoubleConv, DoubleConvCache, Down, DownCache, Up, UpCache
from minunet.network.initializers import glorot_uniform
from minunet.network.layers import Arrays, Conv2d, Dropout, Layer, prefixed
from minunet.ops.conv2d import Conv2dCache


class UNetCache(NamedTuple):
    """What :meth:`UNet.backward` needs: the cache of each part; the lists begin with level 1."""

    downs: list[DownCache]
    bottleneck: DoubleConvCache
    ups: list[UpCache]
    head: Conv2dCache


class UNet(Layer):
    """A U-Net of any depth, from images (N, H, W, in_channels) to logits (N, H, W, out_channels).

    ``widths`` are the channels of each level from the top, the last one those of the bottleneck: the depth,
    the number of times that the size is halved, is one less than their number. ``up_kernel`` (2 or 3) is the
    side of the transposed convolutions, ``head_kernel`` that of the last convolution. ``conv_bias=False``
    leaves out the bias of every convolution that a batch norm follows: the batch norm would only subtract it again.
    Several output channels are independent masks, each with its own sigmoid. The same ``seed`` gives the same
    weights.

    Raises ValueError for a width, a kernel or a channel number below 1, or a dropout outside [0, 1).

    >>> import numpy as np
    >>> net = UNet(widths=(8, 16, 32))
    >>> logits, cache = net.forward(np.zeros((1, 32, 48, 3), "float32"), training=False)
    >>> logits.shape
    (1, 32, 48, 1)
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        dropout: float = 0.3,
        up_kernel: int = 3,
        head_kernel: int = 3,
        conv_bias: bool = True,
        seed: int = 0,
        dtype: str = "float32",
    ) -> None:
        self._config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "widths": tuple(widths),
            "dropout": dropout,
            "up_kernel": up_kernel,
            "head_kernel": head_kernel,
            "conv_bias": conv_bias,
            "seed": seed,
        }
        _check_config(self._config)
        generator = rng.generator(rng.Key(seed, stream=rng.INITIALIZE))
        options: dict[str, Any] = {"conv_bias": conv_bias, "generator": generator, "dtype": dtype}
        depth = len(widths) - 1

        self.downs = []
        channels = in_channels
        for level in range(depth):
            self.downs.append(Down(channels, widths[level], dropout=Dropout(dropout, level), **options))
            channels = widths[level]
        self.bottleneck = DoubleConv(channels, widths[depth], **options)
        self.ups = []
        for level in range(depth):
            up_dropout = Dropout(dropout, depth + level)
            self.ups.append(Up(widths[level + 1], widths[level], up_kernel=up_kernel, dropout=up_dropout, **options))
        self.head = Conv2d(
            widths[0], out_channels, head_kernel, initializer=glorot_uniform, generator=generator, dtype=dtype
        )

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments that build such a network: what a checkpoint keeps."""
        return {**self._config, "dtype": str(self.head.weight.dtype)}

    @property
    def depth(self) -> int:
        """How many times the size is halved on the way down."""
        return len(self.downs)

    def forward(self, x: Array, *, training: bool, key: rng.Key | None = None) -> tuple[Array, UNetCache]:
        """The logits of images ``x`` (N, H, W, in_channels), and the cache for :meth:`backward`.

        In ``training`` batch norm uses the batch's statistics, and dropout, if there is any, the random
        numbers that ``key`` names. Raises ValueError if 2**depth does not divide H and W (:meth:`predict`
        takes any size), or if a key is missing.
        """
        self._check_input(x, training, key)
        key = key if training else None
        downs, ups = [], []
        skips = []
        for down in self.downs:
            x, skip, down_cache = down.forward(x, training=training, key=key)
            skips.append(skip)
            downs.append(down_cache)
        x, bottleneck = self.bottleneck.forward(x, training=training)
        for up, skip in zip(reversed(self.ups), reversed(skips), strict=True):
            x, up_cache = up.forward(x, skip, training=training, key=key)
            ups.append(up_cache)
        logits, head = self.head.forward(x)
        return logits, UNetCache(downs, bottleneck, ups[::-1], head)

    def backward(self, dlogits: Array, cache: UNetCache) -> tuple[Array, Arrays]:
        """The gradient with respect to the images, and that of each parameter, by its name."""
        downs, ups, dskips = [], [], []
        dx, head = self.head.backward(dlogits, cache.head)
        for up, up_cache in zip(self.ups, cache.ups, strict=True):
            dx, dskip, grads = up.backward(dx, up_cache)
            dskips.append(dskip)
            ups.append(grads)
        dx, bottleneck = self.bottleneck.backward(dx, cache.bottleneck)
        for down, dskip, down_cache in zip(reversed(self.downs), reversed(dskips), reversed(cache.downs), strict=True):
            dx, grads = down.backward(dx, dskip, down_cache)
            downs.append(grads)
        return dx, _named(downs[::-1], bottleneck, ups, head)

    def predict(self, x: Array) -> Array:
        """The probabilities (N, H, W, out_channels) for images ``x`` of any size.

        The images are padded at the bottom and right by repeating the edge to a multiple of 2**depth, and the
        result is cropped back. Raises ValueError if x has not this network's channels or dtype.
        """
        xp = array_module(x)
        self._check_channels(x)
        _, height, width, _ = x.shape
        multiple = 2**self.depth
        padding = ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0))
        logits, _ = self.forward(xp.pad(x, padding, mode="edge"), training=False)
        probabilities, _ = ops.sigmoid_forward(logits[:, :height, :width])
        return probabilities

    def parameters(self) -> Arrays:
        """All learned arrays, by dotted name, such as ``down1.conv1.weight``. Not copies."""
        return _named(
            [down.parameters() for down in self.downs],
            self.bottleneck.parameters(),
            [up.parameters() for up in self.ups],
            self.head.parameters(),
        )

    def buffers(self) -> Arrays:
        """The running statistics, by dotted name, such as ``down1.norm1.running_mean``. Not copies."""
        downs, ups = [down.buffers() for down in self.downs], [up.buffers() for up in self.ups]
        return _named(downs, self.bottleneck.buffers(), ups, {})

    def batch_stats(self, cache: UNetCache) -> Arrays:
        """The statistics of the batch that a training :meth:`forward` saw, under the names of the buffers."""
        return _named(
            [down.batch_stats(c) for down, c in zip(self.downs, cache.downs, strict=True)],
            self.bottleneck.batch_stats(cache.bottleneck),
            [up.batch_stats(c) for up, c in zip(self.ups, cache.ups, strict=True)],
            {},
        )

    def _check_channels(self, x: Array) -> None:
        weight = self.head.weight
        if x.ndim != 4 or x.shape[3] != self._config["in_channels"] or 0 in x.shape:
            raise ValueError(f"x must have shape (N, H, W, {self._config['in_channels']}), got {x.shape}")
        if x.dtype != weight.dtype:
            raise ValueError(f"x must have the network's dtype {weight.dtype}, got {x.dtype}")

    def _check_input(self, x: Array, training: bool, key: rng.Key | None) -> None:
        self._check_channels(x)
        multiple = 2**self.depth
        if x.shape[1] % multiple or x.shape[2] % multiple:
            raise ValueError(
                f"x must have a height and width that 2**depth = {multiple} divides, got {x.shape}; "
                "pad or resize the images, or call predict"
            )
        if training and key is None and self._config["dropout"] > 0:
            raise ValueError("key must be given in training: it names the dropout masks of this step")


def _named(downs: list[Arrays], bottleneck: Arrays, ups: list[Arrays], head: Arrays) -> Arrays:
    """One flat dict from the arrays of the parts, in the order in which forward meets them."""
    parts = {f"down{level}": arrays for level, arrays in enumerate(downs, start=1)}
    parts["bottleneck"] = bottleneck
    parts.update({f"up{level}": ups[level - 1] for level in range(len(ups), 0, -1)})
    parts["head"] = head
    return prefixed(parts)


def _check_config(config: dict[str, Any]) -> None:
    widths = config["widths"]
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be one or more numbers of channels >= 1, got {widths}")
    for name in ("in_channels", "out_channels", "up_kernel", "head_kernel"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    if not 0 <= config["dropout"] < 1:
        raise ValueError(f"dropout must be in [0, 1), got {config['dropout']}")
