"""receptive_field.png: which pixels of the image a pixel of the prediction looks at, by theory and by measurement.

Theory is :func:`minunet.summary.summary`. The measurement is a backward pass that begins with a 1 at one logit and 0
at all others: the gradient that arrives at the image is not 0 just at the pixels that this logit depends on. What is
seen is that both agree; and that *how much* it depends on them falls off so fast that most of the field is hardly
used. (Luo et al. 2016, "Understanding the effective receptive field", show the same for networks without skips.)
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from docs.figures import style, trained
from docs.figures.style import BLUE, GREY, ORANGE, VERMILION
from minunet import UNet
from minunet.data.normalize import apply
from minunet.network.layers import map_arrays
from minunet.summary import summary

KINDS = {"untrained": BLUE, "trained": VERMILION}


def field_by_theory(net: UNet) -> int:
    """The side of the square of pixels that one logit can depend on."""
    side = 2**net.depth
    return summary(net, side, side).receptive_field


def field_by_gradient(net: UNet) -> list[tuple[int, int]]:
    """The same, measured for each row of one period, 2^depth: the first and the last image row that a logit sees.

    Both are counted from the logit's own row. All weights and the image are made positive, so that every ReLU passes
    and no two paths cancel.
    """
    net = map_arrays(net, lambda array: abs(array).astype("float64"))
    period, theory = 2**net.depth, field_by_theory(net)
    size = -(-2 * theory // period) * period + 2 * period
    # At inference the images of a batch do not meet: image k asks about the logit at row middle + k.
    # Columns are like rows, so few of them tell the same in less time; but enough of them that of the pixels in the
    # outermost row some win in their pooling windows.
    x = np.random.default_rng(0).uniform(1, 2, (1, size, 8 * period, 3)).repeat(period, axis=0)
    places = size // 2 // period * period + np.arange(period)
    seen = [np.flatnonzero(image.any(axis=1)) for image in gradient_of_logit(net, x, places, 0 * places + 4 * period)]
    return [(int(rows[0] - place), int(rows[-1] - place)) for rows, place in zip(seen, places, strict=True)]


def extent(rows: tuple[int, int]) -> int:
    """How many rows lie from the first to the last."""
    return rows[1] - rows[0] + 1


def gradient_of_logit(net: UNet, x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """How strongly the logit at ``rows[n]``, ``columns[n]`` of image n depends on each pixel: (N, H, W).

    Channels are added up, by magnitude.
    """
    logits, cache = net.forward(x, training=False)
    dlogits = np.zeros_like(logits)
    dlogits[np.arange(len(x)), rows, columns] = 1
    dx, _ = net.backward(dlogits, cache)
    return abs(dx).sum(axis=3)


class Effective(NamedTuple):
    """What a network makes of its field, a mean over slices."""

    theory: int
    rows: tuple[int, int]  # the field of the asked pixels, by gradient: first and last row, from the pixel's own
    maps: dict[str, np.ndarray]  # kind -> (side, side), the asked pixel in the middle, the sum 1
    shares: dict[str, np.ndarray]  # kind -> the share of the gradient within the middle square of side 1, 3, 5, ...
    side_95: dict[str, int]  # kind -> the side of the square that holds 95 %
    side_50: dict[str, int]


def effective(tiny: bool = False) -> Effective:
    """Asks the logit in the middle of the tumour, in many slices of test patients, before and after training.

    The fields of neighbouring pixels are not alike, they repeat with the period 2^depth. So that the mean is one of
    like fields, the pixels asked are those next to the middle that have the same place in the period: that of the
    largest field.
    """
    run = trained.network(tiny)
    slices, last = run.test, max(run.after_epoch)
    nets = {"untrained": run.after_epoch[0], "trained": run.after_epoch[last]}
    fields = field_by_gradient(nets["trained"])
    place = int(np.argmax([extent(rows) for rows in fields]))
    period, half = len(fields), max(abs(row) for row in fields[place]) + 1
    chosen = trained.largest_tumours(slices, 2 if tiny else 24)
    x = apply(slices.images[chosen], trained.NORMALIZATION.statistics(slices).take(slices.patient_indices()[chosen]))
    # What lies outside of the field has gradient 0, so only a window around the pixel is looked at: a whole number of
    # periods more on each side than the field reaches. Beyond the image lies air.
    margin = -(-half // period) * period
    x = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="edge")
    windows = []
    for image, mask in zip(x, slices.masks[chosen], strict=True):
        i, j = np.argwhere(mask[..., 0]).mean(axis=0).astype(int) // period * period
        windows.append(image[i : i + 2 * margin + period, j : j + 2 * margin + period])
    asked = np.full(len(windows), margin + place)
    field = slice(margin + place - half, margin + place + half + 1)
    maps, shares, side_95, side_50 = {}, {}, {}, {}
    for kind, net in nets.items():
        gradient = gradient_of_logit(net, np.stack(windows), asked, asked)[:, field, field]
        mean = (gradient / gradient.sum(axis=(1, 2), keepdims=True)).mean(axis=0)
        maps[kind] = mean / mean.sum()
        shares[kind] = np.array(
            [maps[kind][half - k : half + k + 1, half - k : half + k + 1].sum() for k in range(half + 1)]
        )
        side_95[kind] = int(2 * np.argmax(shares[kind] >= 0.95) + 1)
        side_50[kind] = int(2 * np.argmax(shares[kind] >= 0.50) + 1)
    return Effective(field_by_theory(nets["trained"]), fields[place], maps, shares, side_95, side_50)


def by_depth(tiny: bool = False) -> dict[int, tuple[int, int]]:
    """Depth -> field by theory and by gradient."""
    fields = {}
    for depth in range(3 if tiny else 5):
        net = UNet(widths=(2,) * (depth + 1), dropout=0.0, up_kernel=2, head_kernel=1)
        fields[depth] = (field_by_theory(net), max(extent(rows) for rows in field_by_gradient(net)))
    return fields


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def draw(found: Effective, fields: dict[int, tuple[int, int]]) -> Figure:
    """Above the two maps, below what they hold and the comparison by depth."""
    figure = style.new_figure(7.6)
    axes = figure.subplots(2, 2)
    largest = max(values.max() for values in found.maps.values())
    for ax, (kind, values) in zip(axes[0], found.maps.items(), strict=True):
        picture = _map(ax, kind, values, found, largest)
    figure.colorbar(picture, ax=axes[0], label="share of the gradient, a pixel", format=style.power_of_ten)
    share_ax, depth_ax = axes[1]
    for kind, color in KINDS.items():
        sides = 2 * np.arange(len(found.shares[kind])) + 1
        share_ax.plot(sides, 100 * found.shares[kind], color=color, linewidth=2, label=kind)
        share_ax.plot(found.side_95[kind], 95, "o", color=color)
    share_ax.axhline(95, color=GREY, linestyle=":")
    share_ax.axvline(found.theory, color=ORANGE, linewidth=2, label="field by theory")
    share_ax.set(
        title="how much lies within", xlabel="side of the square, pixels", ylabel="% of the gradient", ylim=(0, 103)
    )
    share_ax.legend(loc="lower right", bbox_to_anchor=(0.88, 0.0))
    depths = list(fields)
    depth_ax.plot(depths, [theory for theory, _ in fields.values()], color=ORANGE, linewidth=2, label="by theory")
    depth_ax.plot(depths, [measured for _, measured in fields.values()], "o", color="black", label="by gradient")
    for depth, (_, measured) in fields.items():
        depth_ax.annotate(str(measured), (depth, measured), (0, 7), textcoords="offset points", ha="right", fontsize=9)
    depth_ax.set(title="side of the field", xlabel="depth of the U", ylabel="pixels", xticks=depths)
    depth_ax.legend(loc="upper left")
    return figure


def _map(ax: Axes, kind: str, values: np.ndarray, found: Effective, largest: float) -> AxesImage:
    half = len(values) // 2
    edge = half + 0.5
    shown = np.maximum(values, largest * 1e-6)
    picture = ax.imshow(shown, cmap="cividis", norm=LogNorm(largest * 1e-6, largest), extent=(-edge, edge, edge, -edge))
    first, last = found.rows
    side, square = last - first + 1, found.side_95[kind]
    for corner, width, color, line in ((first - 0.5, side, ORANGE, "-"), (-square / 2, square, "white", "--")):
        ax.add_patch(Rectangle((corner, corner), width, width, fill=False, ec=color, linestyle=line, linewidth=2))
    style.bare(ax)
    ax.set_title(f"{kind}: 95 % within {square} x {square}")
    return picture


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw receptive_field.png into ``out``. Returns the fields as text."""
    found, fields = effective(tiny), by_depth(tiny)
    style.save(draw(found, fields), out / "receptive_field.png")
    lines = [
        f"depth {depth}: field {theory} by theory, {measured} by gradient"
        for depth, (theory, measured) in fields.items()
    ]
    for kind in found.maps:
        lines.append(
            f"{kind}: field {found.theory} by theory; half of the gradient lies within a square of "
            f"{found.side_50[kind]}, 95 % within {found.side_95[kind]}"
        )
    return lines
