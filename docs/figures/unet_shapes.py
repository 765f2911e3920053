"""unet_shapes.png: the U, with the shape, the bytes and the parameters of every room.

The network is the reference's, on one image of 224 x 224. All numbers are those of :func:`minunet.summary.summary`,
which asks the layers; ``python -m minunet.summary`` prints them layer by layer. What is seen is that going down the
pixels become fewer by 4 and the channels more by 2, so that the bytes are at the top and the parameters at the
bottom.
"""

from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from docs.figures import style
from docs.figures.style import BLUE, GREEN, GREY, ORANGE, SKY, light
from minunet import UNet
from minunet.summary import Summary, summary


class Room(NamedTuple):
    """A part of the U."""

    name: str  # "down1", "bottleneck", "up1", "head"
    shape: tuple[int, ...]  # of what its last ReLU (or the head) puts out: (N, H, W, C)
    parameters: int
    activation_bytes: int  # of all its layers together


def compute(tiny: bool = False) -> Summary:
    """The summary of the reference's network for one image; of a very small one if ``tiny``."""
    return summary(UNet(widths=(2, 4, 8, 16, 32)), 32, 32) if tiny else summary(UNet(), 224, 224)


def rooms(table: Summary) -> list[Room]:
    """The rooms in the order of the forward pass."""
    found: dict[str, Room] = {}
    for row in table.rows:
        name = row.name.partition(".")[0]
        old = found.get(name, Room(name, (), 0, 0))
        shape = old.shape if row.name.endswith(("pool", "dropout")) else row.shape
        found[name] = Room(name, shape, old.parameters + row.parameters, old.activation_bytes + row.activation_bytes)
    return list(found.values())


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def millions(count: int) -> str:
    """A number of parameters in words."""
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"


def totals(table: Summary) -> list[str]:
    """What stands below the U."""
    return [
        f"{table.parameters:,} parameters; {size(table.activation_bytes)} written by all layers, {table.dtype}",
        f"{table.flops / 1e9:.2f} GFLOP forward; each output pixel sees at most "
        f"{table.receptive_field} x {table.receptive_field} pixels",
    ]


# ---- Drawing ---------------------------------------------------------------------------------------------------------

BROWN = "#8A5A00"  # bytes, in letters: orange is too light to read
LEFT, MIDDLE, RIGHT = 2.55, 4.0, 5.45  # inches


def slab(ax: Axes, room: Room, x: float, y: float, level: int, color: str) -> tuple[float, float]:
    """A room as a slab around (x, y): high as its image, wide as its channels, both drawn in logarithm."""
    height, width = 0.95 * 0.72**level, 0.16 + 0.11 * level
    corner = (x - width / 2, y - height / 2)
    ax.add_patch(Rectangle(corner, width, height, facecolor=light(color, 0.5), edgecolor=color, linewidth=1.5))
    return width, height


def caption(ax: Axes, room: Room, x: float, y: float, align: str) -> None:
    """Name, shape, parameters and bytes of a room beside its slab."""
    _, height, width, channels = room.shape
    ax.text(x, y + 0.2, room.name, ha=align, va="center", fontsize=10, fontweight="bold")
    ax.text(x, y, f"{height} x {width} x {channels}", ha=align, va="center", fontsize=9.5)
    weights = f"{millions(room.parameters)} parameters"
    ax.text(x, y - 0.19, weights, ha=align, va="center", fontsize=9, color=BLUE)
    ax.text(x, y - 0.37, size(room.activation_bytes), ha=align, va="center", fontsize=9, color=BROWN)


def draw(table: Summary) -> Figure:
    """The U."""
    by_name = {room.name: room for room in rooms(table)}
    depth = sum(name.startswith("down") for name in by_name)
    figure, ax = style.new_canvas(7.1)
    heights = [5.75 - 1.13 * level for level in range(depth)] + [1.35]
    itemsize = by_name["head"].activation_bytes // (table.rows[-1].shape[1] * table.rows[-1].shape[2])

    batch, rows, columns, channels = table.input_shape
    ax.text(LEFT, 6.75, f"image {rows} x {columns} x {channels}", ha="center", fontsize=9.5)
    style.arrow(ax, (LEFT, 6.68), (LEFT, heights[0] + 0.5))
    head = by_name["head"]
    style.arrow(ax, (RIGHT, heights[0] + 0.5), (RIGHT, 6.68), GREEN)
    logits = f"head: logits {head.shape[1]} x {head.shape[2]} x {head.shape[3]}, {millions(head.parameters)} parameters"
    ax.text(RIGHT, 6.75, logits, ha="center", fontsize=9.5)

    for level in range(depth):
        down, up = by_name[f"down{level + 1}"], by_name[f"up{level + 1}"]
        y = heights[level]
        width, height = slab(ax, down, LEFT, y, level, SKY)
        slab(ax, up, RIGHT, y, level, GREEN)
        caption(ax, down, LEFT - 0.45, y, "right")
        caption(ax, up, RIGHT + 0.45, y, "left")
        style.arrow(ax, (LEFT + width / 2 + 0.05, y), (RIGHT - width / 2 - 0.05, y), ORANGE, width=2)
        _, h, w, c = down.shape
        ax.text(MIDDLE, y + 0.07, f"skip {h} x {w} x {c}", ha="center", va="bottom", fontsize=9)
        ax.text(MIDDLE, y - 0.09, size(batch * h * w * c * itemsize), ha="center", va="top", fontsize=9, color=BROWN)
        if level + 1 < depth:
            below = heights[level + 1] + 0.475 * 0.72 ** (level + 1) + 0.04
            style.arrow(ax, (LEFT, y - height / 2 - 0.04), (LEFT, below), SKY)
            style.arrow(ax, (RIGHT, below), (RIGHT, y - height / 2 - 0.04), GREEN)
    bottleneck = by_name["bottleneck"]
    width, _ = slab(ax, bottleneck, MIDDLE, heights[-1], depth, GREY)
    _, h, w, c = bottleneck.shape
    y = heights[-1]
    ax.text(MIDDLE, y + 0.45, bottleneck.name, ha="center", va="center", fontsize=10, fontweight="bold")
    ax.text(MIDDLE, y + 0.26, f"{h} x {w} x {c}", ha="center", va="center", fontsize=9.5)
    weights = f"{millions(bottleneck.parameters)} parameters"
    ax.text(MIDDLE, y - 0.27, weights, ha="center", va="center", fontsize=9, color=BLUE)
    ax.text(MIDDLE, y - 0.45, size(bottleneck.activation_bytes), ha="center", va="center", fontsize=9, color=BROWN)
    end = heights[depth - 1] - 0.475 * 0.72 ** (depth - 1) - 0.04
    left, right = MIDDLE - width / 2 - 0.05, MIDDLE + width / 2 + 0.05
    style.arrow(ax, (LEFT, end), (left, y), SKY, bend="angle,angleA=-90,angleB=180,rad=8")
    words = "max-pool: half\nthe rows and columns"
    ax.text(LEFT - 0.1, y + 0.1, words, ha="right", va="center", fontsize=9, color=GREY)
    style.arrow(ax, (right, y), (RIGHT, end), GREEN, bend="angle,angleA=0,angleB=90,rad=8")
    words = "transposed convolution:\ntwice the rows and columns"
    ax.text(RIGHT + 0.1, y + 0.1, words, ha="left", va="center", fontsize=9, color=GREY)
    for row, line in enumerate(totals(table)):
        ax.text(4.0, 0.42 - 0.22 * row, line, ha="center", va="center", fontsize=9.5, fontweight="bold")
    return figure


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw unet_shapes.png into ``out``. Returns the rooms and the totals as text."""
    table = compute(tiny)
    style.save(draw(table), out / "unet_shapes.png")
    lines = [
        f"{room.name:11} {' x '.join(map(str, room.shape[1:])):18} {room.parameters:>11,} parameters"
        f" {room.activation_bytes / 1e6:>9.2f} MB"
        for room in rooms(table)
    ]
    return [*lines, *totals(table)]
