"""conv_transpose2d.gif, conv_transpose2d.png: a transposed convolution step by step, forward and backward.

An image of 2 x 2 pixels becomes one of 4 x 4: a kernel of 3 x 3, stride 2, padding "same". What is seen is that each
pixel of x paints the kernel, times its own value, into a larger picture; that patches overlap and add up; and that the
last row and column are cropped. Backward, each pixel looks at the patch that it has painted.

Every number is minunet's. The partial sums of the animation are those of an image that holds only the first pixels:
forward and dweight are linear in x, so that they add up.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.figures import style
from docs.figures.style import GREY, ORANGE, PALE_GREY, SKY, VERMILION, light, number
from minunet.ops import conv_transpose2d_backward, conv_transpose2d_forward

X = np.array([[1.0, 2.0], [3.0, 4.0]])
WEIGHT = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 2.0], [1.0, 0.0, 1.0]])
DY = np.array([[1.0, 0.0, 2.0, 1.0], [0.0, 1.0, -1.0, 0.0], [2.0, 0.0, 1.0, 1.0], [-1.0, 1.0, 0.0, 2.0]])
PIXELS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # of x


class Result(NamedTuple):
    """All 2-D: one image, one channel."""

    full: np.ndarray  # (5, 5): before the crop
    y: np.ndarray
    dx: np.ndarray
    dweight: np.ndarray


def compute(x: np.ndarray = X) -> Result:
    """Forward of ``x`` (2, 2) and WEIGHT, and backward of DY, by minunet."""
    weight = WEIGHT[:, :, None, None]
    y, cache = conv_transpose2d_forward(x[None, :, :, None], weight, np.zeros(1), stride=2, padding="same")
    full, _ = conv_transpose2d_forward(x[None, :, :, None], weight, np.zeros(1), stride=2, padding=0)
    dx, dweight, _ = conv_transpose2d_backward(DY[None, :, :, None], cache)
    return Result(full[0, :, :, 0], y[0, :, :, 0], dx[0, :, :, 0], dweight[:, :, 0, 0])


def dfull() -> np.ndarray:
    """The gradient of the full result: DY, and 0 for what was cropped."""
    return np.pad(DY, ((0, 1), (0, 1)))


def patch(i: int, j: int) -> tuple[slice, slice]:
    """The pixels of the full result that x[i, j] paints."""
    return slice(2 * i, 2 * i + 3), slice(2 * j, 2 * j + 3)


def nonzero_products(left: np.ndarray, right: np.ndarray) -> str:
    """The terms of a sum of products that are not 0, written out: "1·1 + 2·(−1)"."""
    pairs = [(a, b) for a, b in zip(left.ravel(), right.ravel(), strict=True) if a * b != 0]
    return " + ".join("·".join(f"({number(f)})" if f < 0 else number(f) for f in pair) for pair in pairs)


# ---- Drawing ---------------------------------------------------------------------------------------------------------

CELL = 0.4
#: Where the grids begin, in inches. A gradient stands below what it belongs to.
LEFT = {"x": 0.75, "weight": 2.45, "y": 5.3, "dx": 0.75, "dweight": 2.45, "dy": 5.3}


def draw(step: int, phase: str) -> Figure:
    """One frame: ``step`` pixels of x have been gone through, in the ``phase`` "forward" or "backward"."""
    figure, ax = style.new_canvas(6.0)
    top = _tops(5.5)
    i, j = PIXELS[step - 1]
    done = np.zeros((2, 2), bool)
    for pixel in PIXELS[:step]:
        done[pixel] = True
    forward = phase == "forward"
    so_far, whole = compute(np.where(done, X, 0.0)), compute()
    rows, columns = patch(i, j)
    painted = [(a, b) for a in range(5)[rows] for b in range(5)[columns]]
    kernel = [(a, b) for a in range(3) for b in range(3)]
    pixel_fill, weight_fill, patch_fill = (light(c) for c in (VERMILION, ORANGE, SKY))
    full = so_far.full if forward else whole.full
    fills = {
        "x": {(i, j): pixel_fill},
        "weight": dict.fromkeys(kernel, weight_fill),
        "y": dict.fromkeys(painted, weight_fill) if forward else {},
        "dx": {(i, j): pixel_fill},
        "dweight": dict.fromkeys(kernel, patch_fill),
        "dy": dict.fromkeys(painted, patch_fill),
    }
    shown = {"dx": done, "dweight": None, "dy": None}
    if forward:
        shown = {name: np.zeros((5, 5), bool) for name in shown}
        fills.update(dx={}, dweight={}, dy={})
    grids = {"x": X, "weight": WEIGHT, "y": full, "dx": whole.dx, "dweight": so_far.dweight, "dy": dfull()}
    for name, values in grids.items():
        _put(ax, name, values, top[name], fills[name], shown.get(name))
    _signs(ax, top)

    place = f"{2 * i}:{2 * i + 3}, {2 * j}:{2 * j + 3}"
    factor, slope = number(X[i, j]), number(whole.dx[i, j])
    if forward:
        lines = [
            f"forward, step {step} of 4: x[{i}, {j}] = {factor} paints the kernel, {factor} times",
            f"full[{place}] += {factor} · weight",
        ]
    else:
        lines = [
            f"backward, step {step} of 4: x[{i}, {j}] looks at the patch that it has painted",
            f"dx[{i}, {j}] = sum(dfull[{place}] · weight) = {slope}          dweight += {factor} · dfull[{place}]",
        ]
    ax.text(4.0, 0.55, lines[0], ha="center", fontsize=10.5, fontweight="bold")
    ax.text(4.0, 0.2, lines[1], ha="center", fontsize=10.5)
    return figure


def _tops(first: float) -> dict[str, float]:
    """Where the grids begin, in inches from below: the gradients stand under what they belong to."""
    return {name: first - 2.6 * name.startswith("d") for name in LEFT}


def _put(ax: Axes, name: str, values: np.ndarray, top: float, fill: dict, shown: np.ndarray | None) -> None:
    titles = {
        "y": "full, 5 x 5; framed in black is y, 4 x 4",
        "dy": "dfull, 5 x 5: dy, and 0 where it was cropped",
    }
    if name in titles:
        edge = {(a, b): PALE_GREY for a in range(5) for b in range(5) if 4 in (a, b)}
        fill = edge | fill
    title = titles.get(name, f"{name}, {values.shape[0]} x {values.shape[1]}")
    style.grid(ax, values, LEFT[name], top, cell=CELL, title=title, fill=fill, shown=shown)
    if name in titles:  # the border of the crop stays visible under a patch
        style.frame(ax, LEFT[name], top, slice(0, 4), slice(0, 4), "black", cell=CELL)


def _signs(ax: Axes, top: dict[str, float]) -> None:
    """Which way the numbers flow."""
    for name, start, end in (("forward", 4.05, 4.9), ("backward", 4.9, 4.05)):
        y = top["dx" if name == "backward" else "x"] - 0.6
        style.arrow(ax, (start, y), (end, y))
        ax.text(0.15, y, name, rotation=90, ha="left", va="center", fontsize=10, color=GREY)
        ax.text(2.0, y + 0.2, "and", ha="center", va="center", fontsize=10, color=GREY)


def draw_still() -> Figure:
    """All of it in one picture, with the sums written out."""
    figure, ax = style.new_canvas(7.2)
    top = _tops(6.75)
    result = compute()
    grids = {"x": X, "weight": WEIGHT, "y": result.full, "dx": result.dx, "dweight": result.dweight, "dy": dfull()}
    for name, values in grids.items():
        _put(ax, name, values, top[name], {}, None)
    # Two of the four pixels, and the patches that they paint; they meet in one pixel of the result.
    for (i, j), color, inset in (((0, 0), SKY, 0.05), ((1, 1), VERMILION, 0.09)):
        for name in ("x", "dx"):
            style.frame(ax, LEFT[name], top[name], slice(i, i + 1), slice(j, j + 1), color, cell=CELL, inset=inset)
        for name in ("y", "dy"):
            style.frame(ax, LEFT[name], top[name], *patch(i, j), color, cell=CELL, inset=0.04)
    _signs(ax, top)
    for row, line in enumerate(_sums(result)):
        ax.text(0.35, 1.6 - 0.27 * row, line, fontsize=9.5)
    return figure


def _sums(result: Result) -> list[str]:
    """What stands below the still. full[2, 2] is where all four patches meet, each with another corner tap."""
    lines = [f"full[2, 2] = {nonzero_products(X, WEIGHT[::-2, ::-2])} = {number(result.full[2, 2])}"]
    for i, j in ((0, 0), (1, 1)):
        terms = nonzero_products(dfull()[patch(i, j)], WEIGHT)
        lines.append(f"dx[{i}, {j}] = {terms} = {number(result.dx[i, j])}")
    for u, v in ((0, 0), (2, 2)):
        # Tap (u, v) of the four patches lies two pixels apart, because of the stride.
        terms = nonzero_products(X, dfull()[u : u + 3 : 2, v : v + 3 : 2])
        lines.append(f"dweight[{u}, {v}] = {terms} = {number(result.dweight[u, v])}")
    return lines


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw conv_transpose2d.gif and conv_transpose2d.png into ``out``. ``tiny`` changes nothing. Returns the sums."""
    frames = [draw(step, phase) for phase in ("forward", "backward") for step in range(1, 5)]
    style.save_animation(frames, [2.0, 2.0, 2.0, 2.5, 3.0, 3.0, 3.0, 5.0], out / "conv_transpose2d.gif")
    style.save(draw_still(), out / "conv_transpose2d.png")
    return _sums(compute())
