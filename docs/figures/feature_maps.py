"""feature_maps.png: what the channels of each level show of one slice, in a trained network.

One row for each room of the U, in the order of the forward pass, with six of its channels, from the one that
varies most over the slice to the one that varies least. What is seen is that
the upper levels show edges and tissues sharply, the lower ones places, coarsely; and that on the way up the two are
put together.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from docs.figures import style, trained
from minunet import UNet
from minunet.data.normalize import apply
from minunet.results.overlays import ACTUAL, display_image

CHANNELS = 6


def activations(net: UNet, x: np.ndarray) -> dict[str, np.ndarray]:
    """What each room of ``net`` puts out for images ``x``, and the logits: the steps of UNet.forward, one by one."""
    found, skips = {}, []
    for level, down in enumerate(net.downs, start=1):
        x, skip, _ = down.forward(x, training=False, key=None)
        skips.append(skip)
        found[f"down{level}"] = skip
    x, _ = net.bottleneck.forward(x, training=False)
    found["bottleneck"] = x
    for level in range(net.depth, 0, -1):
        x, _ = net.ups[level - 1].forward(x, skips[level - 1], training=False, key=None)
        found[f"up{level}"] = x
    found["logits"], _ = net.head.forward(x)
    return found


def compute(tiny: bool = False) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """A slice (H, W, 3) with the largest tumour of all test patients, its mask (H, W), and (H, W, C) of each room."""
    run = trained.network(tiny)
    slices = run.test
    s = trained.largest_tumours(slices, 1)
    x = apply(slices.images[s], trained.NORMALIZATION.statistics(slices).take(slices.patient_indices()[s]))
    found = activations(run.after_epoch[max(run.after_epoch)], x)
    return slices.images[s[0]], slices.masks[s[0], ..., 0], {name: maps[0] for name, maps in found.items()}


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def draw(image: np.ndarray, mask: np.ndarray, maps: dict[str, np.ndarray]) -> Figure:
    """The slice above; one row a room; the logits beside the slice."""
    rooms = [name for name in maps if name != "logits"]
    figure = style.new_figure(1.22 * (len(rooms) + 1) + 0.2)
    axes = figure.subplots(len(rooms) + 1, CHANNELS)
    for ax in axes.flat:
        style.bare(ax)
    pictures = (("FLAIR", display_image(image), None), ("logits", maps["logits"][..., 0], "cividis"))
    for ax, (title, picture, colors) in zip(axes[0], pictures, strict=False):
        ax.imshow(picture, cmap=colors)
        ax.contour(mask, levels=[0.5], colors=[ACTUAL], linewidths=1.2)
        ax.set_title(title)
    words = axes[0, 2].text(
        0.05,
        0.5,
        "Below: six channels of each room, from the one that varies\n"
        "most to the one that varies least; each from its own\n"
        "smallest value (dark) to its own largest (bright).",
        transform=axes[0, 2].transAxes,
        va="center",
    )
    for ax in axes[0, 2:]:
        ax.set_axis_off()
    words.set_in_layout(False)  # or it would push the columns apart
    for row, name in zip(axes[1:], rooms, strict=True):
        values = maps[name].astype(np.float64)
        by_spread = np.argsort(-values.std(axis=(0, 1)), kind="stable")
        chosen = by_spread[np.linspace(0, len(by_spread) - 1, min(CHANNELS, len(by_spread))).round().astype(int)]
        for ax, channel in zip(row, chosen, strict=False):
            ax.imshow(values[..., channel], cmap="cividis")
        height, width, channels = values.shape
        row[0].set_ylabel(f"{name}\n{height} x {width} x {channels}", rotation=0, ha="right", va="center", fontsize=9)
    return figure


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw feature_maps.png into ``out``. Returns for each room how much of it is 0."""
    image, mask, maps = compute(tiny)
    style.save(draw(image, mask, maps), out / "feature_maps.png")
    return [
        f"{name:10} {' x '.join(map(str, values.shape)):13} {100 * (values == 0).mean():5.1f} % of the values are 0, "
        f"{int((values == 0).all(axis=(0, 1)).sum())} channels are 0 everywhere"
        for name, values in maps.items()
        if name != "logits"
    ]
