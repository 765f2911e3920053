"""gradient_flow_skip.png: how a gradient is split at the concat, crosses over, and is added at the skip.

The arrays are those of one backward pass (that of backward_graph.png, without dropout): at level 1 of a small U-Net,
the gradients of one channel, of 4 x 4 pixels where they are large. Units are 1e-5 of the loss a unit of
feature.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.figures import backward_graph, style
from docs.figures.style import GREY, SIGNED, VERMILION

UNIT = 1e-5


class Gradients(NamedTuple):
    """At level 1, all of shape (N, H, W, C): the features of this level that come up and those that came across."""

    dconcat_up: np.ndarray  # the first half of the channels of what arrives at the concat
    dconcat_skip: np.ndarray  # the second half
    dup: np.ndarray  # what the concat sends down, to the transposed convolution
    dskip: np.ndarray  # what the concat sends across
    dpool: np.ndarray  # what arrives from below, through the pool
    total: np.ndarray  # what the left side's ReLU is given


def compute() -> Gradients:
    """The gradients around the skip of level 1."""
    calls = {(call.room, call.name): call for call in backward_graph.compute(dropout=0.0)}
    concat, pool = calls["up1", "concat"], calls["down1", "pool"]
    dup, dskip = concat.results
    channels = dup.shape[3]
    return Gradients(
        concat.dy[..., :channels],
        concat.dy[..., channels:],
        dup,
        dskip,
        pool.results[0],
        calls["down1", "relu2"].dy,
    )


def crop(gradients: Gradients) -> tuple[slice, slice, int]:
    """Rows, columns and channel of image 0 where pool and skip both say much; on the grid of the pool's windows.

    Of such places the first at which the rounded numbers that are shown add up, as a reader will check, and fit.
    """
    # Product of the two sums of magnitudes over each block of 4 x 4: large only where both are.
    blocks = [g[0].reshape(4, 4, 4, 4, -1).swapaxes(1, 2) for g in (gradients.dskip, gradients.dpool, gradients.total)]
    sums = [abs(block).sum(axis=(2, 3)) for block in blocks[:2]]
    shown = [(block / UNIT).round() for block in blocks]
    good = ((shown[0] + shown[1] == shown[2]) & (abs(shown[2]) < 1000)).all(axis=(2, 3))
    i, j, channel = np.unravel_index((sums[0] * sums[1] * good).argmax(), good.shape)
    return slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4), int(channel)


# ---- Drawing ---------------------------------------------------------------------------------------------------------

CELL = 0.4


def draw(gradients: Gradients) -> Figure:
    """The three rows of the picture: what arrives at the concat, what becomes of it, what is added at the skip."""
    rows, columns, channel = crop(gradients)
    tiles = {name: g[0, rows, columns, channel] / UNIT for name, g in gradients._asdict().items()}
    largest = max(abs(tile).max() for tile in tiles.values())
    figure, ax = style.new_canvas(7.3)
    side = 4 * CELL

    def put(name: str, left: float, top: float, title: str) -> None:
        values = tiles[name]
        colors = SIGNED(0.5 + 0.38 * values / largest)
        fill = {(i, j): colors[i, j] for i in range(4) for j in range(4)}
        style.grid(ax, values, left, top, cell=CELL, title=title, fill=fill, digits=".0f", fontsize=9)

    top = 6.8
    ax.text(0.15, top, f"units of {UNIT:g}, rounded", fontsize=9.5, color=GREY, va="center")
    put("dconcat_up", 3.2, top, f"dy, channel {channel} of up")
    put("dconcat_skip", 5.4, top, f"dy, channel {channel} of skip")
    _say(
        ax,
        0.15,
        top - 0.5,
        "up1, concat backward",
        ["dy has the channels of", "both: those that came up,", "then those of the skip.", "It is split between them."],
    )
    middle = 4.35
    put("dup", 3.2, middle, "dup, the same numbers")
    put("dskip", 5.4, middle, "dskip, the same numbers")
    for left in (3.2, 5.4):
        style.arrow(ax, (left + side / 2, top - side - 0.05), (left + side / 2, middle + 0.33), VERMILION, width=2)
    style.arrow(ax, (3.2 - 0.08, middle - side / 2), (2.35, middle - side / 2), VERMILION, width=2)
    _say(ax, 0.15, middle - side / 2 + 0.3, "", ["to the transposed", "convolution and on,", "down the U"])

    bottom = 1.8
    put("dpool", 0.6, bottom, "from below, by the pool")
    put("dskip", 3.2, bottom, "dskip, from across")
    put("total", 5.8, bottom, "their sum")
    style.arrow(ax, (6.2, middle - side - 0.05), (4.0, bottom + 0.33), VERMILION, width=2)
    for x, sign in ((2.7, "+"), (5.3, "=")):
        ax.text(x, bottom - side / 2, sign, ha="center", va="center", fontsize=20)
    _say(ax, 0.15, bottom + 0.75, "down1, where the skip had left", [])
    return figure


def _say(ax: Axes, x: float, y: float, head: str, lines: list[str]) -> None:
    if head:
        ax.text(x, y, head, fontsize=10, fontweight="bold", va="center")
    for row, line in enumerate(lines, start=1):
        ax.text(x, y - 0.22 * row, line, fontsize=9.5, va="center", color=GREY)


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw gradient_flow_skip.png into ``out``. ``tiny`` changes nothing. Returns the tiles and the norms as text."""
    gradients = compute()
    style.save(draw(gradients), out / "gradient_flow_skip.png")
    rows, columns, channel = crop(gradients)
    lines = [
        f"image 0, rows {rows.start} to {rows.stop - 1}, columns {columns.start} to {columns.stop - 1}, "
        f"channel {channel}, in units of {UNIT:g}"
    ]
    for name in ("dpool", "dskip", "total"):
        tile = getattr(gradients, name)[0, rows, columns, channel] / UNIT
        lines += [f"{name}:", *(" ".join(f"{value:8.1f}" for value in row) for row in tile)]
    norms = {name: float(np.linalg.norm(g)) for name, g in gradients._asdict().items()}
    lines.append(
        f"norms over all pixels and channels of level 1: dskip {norms['dskip']:.2e}, "
        f"from the pool {norms['dpool']:.2e}, their sum {norms['total']:.2e}"
    )
    nonzero = (gradients.dpool != 0).mean()
    lines.append(f"the gradient from the pool is not zero at {100 * nonzero:.1f} % of the places: one winner of four")
    error = abs(gradients.dskip + gradients.dpool - gradients.total).max() / abs(gradients.total).max()
    lines.append(f"dskip + dpool against what the left side was given: largest difference {error:.0e} of the largest")
    return lines
