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
from typing import Any, Literal, NamedTuple

from minunet import ops
from minunet.base import rng
from minunet.base.backend import Array, array_module
from minunet.base.choices import check_choice
from minunet.network.blocks import DoubleConv, DoubleConvCache, Down, DownCache, Up, UpCache
from minunet.network.initializers import glorot_uniform
from minunet.network.layers import Arrays, Conv2d, Dropout, Layer, prefixed
from minunet.ops.conv2d import Conv2dCache

Dtype = Literal["float32", "float64"]
#: What makes the logits probabilities: a sigmoid for each channel, or a softmax over all channels.
Output = Literal["sigmoid", "softmax"]


class Part(NamedTuple):
    """A part of the U: what all that walk through it need to know of it."""

    name: str  # the start of its arrays' names
    kind: Literal["down", "bottleneck", "up", "head"]
    level: int  # 1 is the full resolution; each further level has half the height and width
    in_channels: int  # of an up, those from below
    out_channels: int

    @property
    def channels(self) -> tuple[int, int]:
        """In and out."""
        return self.in_channels, self.out_channels


def topology(in_channels: int, out_channels: int, widths: Sequence[int]) -> list[Part]:
    """The parts of a U-Net of these channels, in the order in which forward meets them.

    >>> [part.name for part in topology(3, 1, (8, 16, 32))]
    ['down1', 'down2', 'bottleneck', 'up2', 'up1', 'head']
    """
    depth, channels = len(widths) - 1, [in_channels, *widths]
    levels = range(1, depth + 1)
    downs = [Part(f"down{level}", "down", level, channels[level - 1], channels[level]) for level in levels]
    bottleneck = Part("bottleneck", "bottleneck", depth + 1, channels[depth], channels[depth + 1])
    ups = [Part(f"up{level}", "up", level, channels[level + 1], channels[level]) for level in reversed(levels)]
    return [*downs, bottleneck, *ups, Part("head", "head", 1, channels[1], out_channels)]


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
    ``batch_norm_eps`` is the eps of every batch norm; ``dtype`` is "float32" or "float64".
    ``output`` says what the output channels are: with "sigmoid" independent masks, which may overlap; with "softmax"
    the classes of which each pixel has one, of which the first is the background. The same ``seed`` gives the same
    weights.

    Raises ValueError for a width, a kernel or a channel number below 1, a dropout outside [0, 1), an eps outside
    (0, 1], another output or fewer than two classes, or another dtype: float16 has too few digits for the sums of a
    backward pass.

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
        dtype: Dtype = "float32",
        batch_norm_eps: float = 1e-3,
        output: Output = "sigmoid",
    ) -> None:
        self._config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "widths": tuple(widths),
            "dropout": dropout,
            "up_kernel": up_kernel,
            "head_kernel": head_kernel,
            "conv_bias": conv_bias,
            "batch_norm_eps": batch_norm_eps,
            "output": output,
            "seed": seed,
        }
        _check_config(self._config, dtype)
        generator = rng.generator(rng.Key(seed, stream=rng.INITIALIZE))
        options: dict[str, Any] = {
            "conv_bias": conv_bias,
            "batch_norm_eps": batch_norm_eps,
            "generator": generator,
            "dtype": dtype,
        }
        self.topology = topology(in_channels, out_channels, widths)
        depth = len(widths) - 1
        channels = {part.name: part.channels for part in self.topology}

        self.downs, self.ups = [], []
        for level in range(1, depth + 1):
            dropout_down = Dropout(dropout, level - 1)
            self.downs.append(Down(*channels[f"down{level}"], dropout=dropout_down, **options))
        self.bottleneck = DoubleConv(*channels["bottleneck"], **options)
        for level in range(1, depth + 1):  # here, too, from the top: the order in which the weights are drawn
            dropout_up = Dropout(dropout, depth + level - 1)
            self.ups.append(Up(*channels[f"up{level}"], up_kernel=up_kernel, dropout=dropout_up, **options))
        head_options: dict[str, Any] = {"initializer": glorot_uniform, "generator": generator, "dtype": dtype}
        self.head = Conv2d(*channels["head"], head_kernel, **head_options)

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
        self.check_input(x, training, key)
        key = key if training else None
        cache_downs, cache_ups = [], []
        skips = []
        for down in self.downs:
            x, skip, cache_down = down.forward(x, training=training, key=key)
            skips.append(skip)
            cache_downs.append(cache_down)
        x, cache_bottleneck = self.bottleneck.forward(x, training=training)
        for up, skip in zip(reversed(self.ups), reversed(skips), strict=True):
            x, cache_up = up.forward(x, skip, training=training, key=key)
            cache_ups.append(cache_up)
        logits, cache_head = self.head.forward(x)
        return logits, UNetCache(cache_downs, cache_bottleneck, cache_ups[::-1], cache_head)

    def backward(self, dlogits: Array, cache: UNetCache) -> tuple[Array, Arrays]:
        """The gradient with respect to the images, and that of each parameter, by its name."""
        grads_downs, grads_ups, dskips = [], [], []
        dx, grads_head = self.head.backward(dlogits, cache.head)
        for up, cache_up in zip(self.ups, cache.ups, strict=True):
            dx, dskip, grads_up = up.backward(dx, cache_up)
            dskips.append(dskip)
            grads_ups.append(grads_up)
        dx, grads_bottleneck = self.bottleneck.backward(dx, cache.bottleneck)
        for down, dskip, cache_down in zip(reversed(self.downs), reversed(dskips), reversed(cache.downs), strict=True):
            dx, grads_down = down.backward(dx, dskip, cache_down)
            grads_downs.append(grads_down)
        return dx, prefixed(self._by_name(grads_downs[::-1], grads_bottleneck, grads_ups, grads_head))

    def predict(self, x: Array) -> Array:
        """The probabilities (N, H, W, out_channels) for images ``x`` of any size.

        The images are padded at the bottom and right by repeating the edge to a multiple of 2**depth, and the
        result is cropped back. Raises ValueError if x has not this network's channels or dtype.
        """
        self._check_channels(x)
        logits, _ = self.forward(self.pad(x), training=False)
        return self.probabilities(logits[:, : x.shape[1], : x.shape[2]])

    def probabilities(self, logits: Array) -> Array:
        """The probabilities that ``logits`` (N, H, W, out_channels) stand for: by the network's ``output``."""
        activation = ops.softmax_forward if self._config["output"] == "softmax" else ops.sigmoid_forward
        return activation(logits)[0]

    def pad(self, x: Array) -> Array:
        """Images ``x``, padded at the bottom and right by repeating the edge to a multiple of 2**depth."""
        _, height, width, _ = x.shape
        multiple = 2**self.depth
        padding = ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0))
        return array_module(x).pad(x, padding, mode="edge")

    def parts(self) -> list[tuple[Part, Layer]]:
        """The parts of the U with their layers, in the order in which forward meets them."""
        layers = self._by_name(self.downs, self.bottleneck, self.ups, self.head)
        return [(part, layers[part.name]) for part in self.topology]

    def children(self) -> dict[str, Layer]:
        return {part.name: layer for part, layer in self.parts()}

    def child_caches(self, cache: UNetCache) -> dict[str, Any]:
        return self._by_name(*cache)

    def _by_name(self, downs: Sequence[Any], bottleneck: Any, ups: Sequence[Any], head: Any) -> dict[str, Any]:
        """What belongs to each part, by its name; the sequences begin with level 1."""
        names = (part.name for part in self.topology)
        return dict(zip(names, [*downs, bottleneck, *reversed(ups), head], strict=True))

    def _check_channels(self, x: Array) -> None:
        weight = self.head.weight
        if x.ndim != 4 or x.shape[3] != self._config["in_channels"] or 0 in x.shape:
            raise ValueError(f"x must have shape (N, H, W, {self._config['in_channels']}), got {x.shape}")
        if x.dtype != weight.dtype:
            raise ValueError(f"x must have the network's dtype {weight.dtype}, got {x.dtype}")

    def check_input(self, x: Array, training: bool, key: rng.Key | None) -> None:
        """Raise ValueError as :meth:`forward` does."""
        self._check_channels(x)
        multiple = 2**self.depth
        if x.shape[1] % multiple or x.shape[2] % multiple:
            raise ValueError(
                f"x must have a height and width that 2**depth = {multiple} divides, got {x.shape}; "
                "pad or resize the images, or call predict"
            )
        if training and key is None and self._config["dropout"] > 0:
            raise ValueError("key must be given in training: it names the dropout masks of this step")


def _check_config(config: dict[str, Any], dtype: str) -> None:
    widths = config["widths"]
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be one or more numbers of channels >= 1, got {widths}")
    for name in ("in_channels", "out_channels", "up_kernel", "head_kernel"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    if not 0 <= config["dropout"] < 1:
        raise ValueError(f"dropout must be in [0, 1), got {config['dropout']}")
    if not 0 < config["batch_norm_eps"] <= 1:  # which is far more than any variance needs
        raise ValueError(f"batch_norm_eps must be in (0, 1], got {config['batch_norm_eps']}")
    check_choice("dtype", str(dtype), Dtype)
    check_choice("output", config["output"], Output)
    if config["output"] == "softmax" and config["out_channels"] < 2:
        raise ValueError("out_channels must be at least 2 for a softmax, the background and a class, got 1")
