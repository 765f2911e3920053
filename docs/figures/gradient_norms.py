"""gradient_norms.png: how large the gradient of each layer's weight is, with and without batch norm and skips.

Four networks of minunet's layers, before any training, on the same slices: as they are; without the batch norms;
without the skips; without both. And the same four with all weights of the convolutions halved. What is seen is that
with batch norm the size of the weights hardly matters, while without it a factor a layer adds up over the depth, and
that the skips give the upper levels a short way to the loss.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from docs.figures import style
from docs.figures.style import BLUE, ORANGE, SKY, VERMILION
from docs.figures.trained import NORMALIZATION, largest_tumours
from minunet import SegmentationLoss, UNet
from minunet.base import rng
from minunet.base.backend import Array
from minunet.data import phantom
from minunet.data.batches import prepare_batch
from minunet.network.blocks import DoubleConv, Up
from minunet.network.layers import Arrays, ConvTranspose2d, Layer, map_arrays, prefixed
from minunet.training.step import loss_and_grads

VARIANTS = {
    "batch norm and skips": (True, True, BLUE, "o"),
    "batch norm, no skips": (True, False, SKY, "s"),
    "skips, no batch norm": (False, True, VERMILION, "^"),
    "neither": (False, False, ORANGE, "v"),
}


class Identity(Layer):
    """In place of a batch norm: nothing happens."""

    def forward(self, x: Array, *, training: bool) -> tuple[Array, None]:
        return x, None

    def backward(self, dy: Array, cache: None) -> tuple[Array, Arrays]:
        return dy, {}

    def batch_stats(self, cache: None) -> Arrays:
        return {}


class UpWithoutSkip(Up):
    """A step up that does not look at the skip: its first convolution has half as many input channels."""

    def __init__(self, in_channels: int, out_channels: int, *, generator: np.random.Generator) -> None:
        self.up = ConvTranspose2d(in_channels, out_channels, 2, generator=generator)
        self.convs = DoubleConv(out_channels, out_channels, conv_bias=True, generator=generator, dtype="float32")

    def forward(self, x: Array, skip: Array, *, training: bool, key: rng.Key | None) -> tuple[Array, Any]:
        x, up = self.up.forward(x)
        x, convs = self.convs.forward(x, training=training)
        return x, (up, skip, convs)

    def backward(self, dy: Array, cache: Any) -> tuple[Array, Array, Arrays]:
        up_cache, skip, convs_cache = cache
        dx, convs = self.convs.backward(dy, convs_cache)
        dx, up = self.up.backward(dx, up_cache)
        return dx, np.zeros_like(skip), {**prefixed({"up": up}), **convs}  # a skip that nobody used has gradient 0

    def batch_stats(self, cache: Any) -> Arrays:
        return self.convs.batch_stats(cache[2])


def build_net(widths: tuple[int, ...], norm: bool, skips: bool, scale: float = 1.0, seed: int = 0) -> UNet:
    """A U-Net, from which the batch norms and the skips are taken if so asked, with convolutions ``scale`` as large."""
    net = UNet(widths=widths, dropout=0.0, up_kernel=2, seed=seed)
    if not skips:
        generator = np.random.default_rng(seed)
        net.ups = [UpWithoutSkip(below, here, generator=generator) for here, below in pairwise(widths)]
    if not norm:
        for block in (*(down.convs for down in net.downs), net.bottleneck, *(up.convs for up in net.ups)):
            for name in ("norm1", "norm2"):
                setattr(block, name, Identity())
    scaled: UNet = map_arrays(net, lambda array: array * array.dtype.type(scale) if array.ndim == 4 else array)
    return scaled


def compute(tiny: bool = False) -> dict[tuple[float, str], dict[str, float]]:
    """For each (scale, variant) the norm of each weight's gradient: the geometric mean over some seeds."""
    size, widths, seeds = (16, (2, 4, 8), 1) if tiny else (32, (8, 16, 32, 64), 4)
    slices = phantom.make(patients=2, size=size, seed=1)
    batch = prepare_batch(slices, NORMALIZATION.statistics(slices), largest_tumours(slices, 8), "cpu")
    norms: dict[tuple[float, str], dict[str, float]] = {}
    for scale in (1.0, 0.5):
        for variant, (norm, skips, _, _) in VARIANTS.items():
            logs: dict[str, list[float]] = {}
            for seed in range(seeds):
                net = build_net(widths, norm, skips, scale, seed)
                _, grads, _ = loss_and_grads(net, batch.x, batch.target, SegmentationLoss(), rng.Key(seed))
                for name, grad in grads.items():
                    if name.endswith("weight"):
                        logs.setdefault(name.removesuffix(".weight"), []).append(np.log(np.linalg.norm(grad)))
            norms[scale, variant] = {name: float(np.exp(np.mean(values))) for name, values in logs.items()}
    return norms


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def draw(norms: dict[tuple[float, str], dict[str, float]]) -> Figure:
    """One panel for each scale, one line for each variant, the layers from the first to the last."""
    figure = style.new_figure(5.2)
    axes = figure.subplots(1, 2, sharey=True)
    everything = [norm for values in norms.values() for norm in values.values()]
    low, high = min(everything), max(everything)
    for ax, (scale, title) in zip(axes, ((1.0, "weights as initialised"), (0.5, "all weights halved")), strict=True):
        layers = list(norms[scale, "neither"])
        for variant, (_, _, color, marker) in VARIANTS.items():
            values = norms[scale, variant]
            ax.plot(
                [values[name] for name in layers], range(len(layers)), color=color, marker=marker, ms=5, label=variant
            )
        ax.set(title=title, xscale="log", xlabel="norm of the weight's gradient", ylim=(len(layers) - 0.5, -0.5))
        ax.set_yticks(range(len(layers)), layers)
        ax.set_xticks([10.0**k for k in range(-8, 3, 2)])
        ax.xaxis.set_major_formatter(style.power_of_ten)
        ax.set_xlim(low / 2, high * 2)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw gradient_norms.png into ``out``. Returns the norms of the first, the deepest and the last layer."""
    norms = compute(tiny)
    style.save(draw(norms), out / "gradient_norms.png")
    lines = ["norm of the gradient of the weight of the first layer, the bottleneck's second, and the head's:"]
    for (scale, variant), values in norms.items():
        first, deep, last = (values[name] for name in ("down1.conv1", "bottleneck.conv2", "head"))
        lines.append(f"weights x {scale:<4g} {variant:21} {first:9.2e} {deep:9.2e} {last:9.2e}")
    for variant in VARIANTS:
        ratios = [norms[0.5, variant][name] / norms[1.0, variant][name] for name in norms[1.0, variant]]
        lines.append(
            f"halving the weights changes the norms of {variant!r} by factors {min(ratios):.3g} to {max(ratios):.3g}"
        )
    return lines
