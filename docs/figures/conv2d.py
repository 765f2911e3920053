"""conv2d.gif, conv2d.png: a convolution step by step, forward and backward.

One image of 3 x 3 pixels, one channel in and out, a kernel of 2 x 2, no padding: the worked example of
docs/derivations/conv2d.md. What is seen is that a gradient has the shape of what it belongs to, and that one pixel of
dy does two things: it paints the kernel into dx, and it adds the window it has seen to dweight.

Every number is minunet's. The partial sums of the animation are those of a backward pass that was given only the first
pixels of dy: backward is linear in dy, so that they add up.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.figures import style
from docs.figures.style import GREY, ORANGE, SKY, VERMILION, light, number
from minunet.ops import conv2d_backward, conv2d_forward

X = np.arange(1.0, 10.0).reshape(3, 3)
WEIGHT = np.array([[1.0, 2.0], [3.0, 4.0]])
DY = np.array([[1.0, 0.0], [0.0, 2.0]])
PIXELS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # of y, in the order in which the window stops at them


class Result(NamedTuple):
    """All 2-D: one image, one channel."""

    y: np.ndarray
    dx: np.ndarray
    dweight: np.ndarray
    dbias: float


def compute(dy: np.ndarray = DY) -> Result:
    """Forward of X and WEIGHT, and backward of ``dy`` (2, 2), by minunet."""
    y, cache = conv2d_forward(X[None, :, :, None], WEIGHT[:, :, None, None], np.zeros(1), padding=0)
    dx, dweight, dbias = conv2d_backward(dy[None, :, :, None], cache)
    assert dbias is not None
    return Result(y[0, :, :, 0], dx[0, :, :, 0], dweight[:, :, 0, 0], dbias[0])


def window(i: int, j: int) -> tuple[slice, slice]:
    """The pixels of x that y[i, j] sees."""
    return slice(i, i + 2), slice(j, j + 2)


def products(left: np.ndarray, right: np.ndarray) -> str:
    """The terms of a sum of products, written out: "1·1 + 2·2"."""
    return " + ".join(f"{number(a)}·{number(b)}" for a, b in zip(left.ravel(), right.ravel(), strict=True))


# ---- Drawing ---------------------------------------------------------------------------------------------------------

CELL = 0.44
#: Where the grids begin, in inches. A gradient stands below what it belongs to.
LEFT = {"x": 0.9, "weight": 3.35, "y": 5.85, "dx": 0.9, "dweight": 3.35, "dy": 5.85}


def draw(step: int, phase: str) -> Figure:
    """One frame: ``step`` pixels of y (``phase`` "forward") or of dy ("backward") have been gone through."""
    figure, ax = style.new_canvas(5.0)
    top = {"x": 4.25, "weight": 4.25, "y": 4.25, "dx": 2.25, "dweight": 2.25, "dy": 2.25}
    i, j = PIXELS[step - 1]
    done = np.zeros((2, 2), bool)
    for pixel in PIXELS[:step]:
        done[pixel] = True
    forward = phase == "forward"
    result = compute(np.where(done, DY, 0.0))
    seen = [(a, b) for a in range(i, i + 2) for b in range(j, j + 2)]
    kernel = [(a, b) for a in range(2) for b in range(2)]
    x_fill, weight_fill, pixel_fill = (light(c) for c in (SKY, ORANGE, VERMILION))

    def put(name: str, values: np.ndarray, fill: dict, shown: np.ndarray | None = None) -> None:
        title = f"{name}, {values.shape[0]} x {values.shape[1]}"
        style.grid(ax, values, LEFT[name], top[name], cell=CELL, title=title, fill=fill, shown=shown)

    put("x", X, dict.fromkeys(seen, x_fill))
    put("weight", WEIGHT, dict.fromkeys(kernel, weight_fill))
    put("y", result.y, {(i, j): pixel_fill} if forward else {}, done if forward else None)
    hidden = np.full_like(X, forward) == 0
    # What dx receives is the kernel, what dweight receives is the window: each has the colour of what it receives.
    put("dx", result.dx, {} if forward else dict.fromkeys(seen, weight_fill), hidden)
    put("dweight", result.dweight, {} if forward else dict.fromkeys(kernel, x_fill), hidden[:2, :2])
    put("dy", DY, {} if forward else {(i, j): pixel_fill}, hidden[:2, :2])
    _signs(ax, top["x"], top["dx"])

    place = f"x[{i}:{i + 2}, {j}:{j + 2}]"
    if forward:
        lines = [
            f"forward, step {step} of 4: the window stops at {place}",
            f"y[{i}, {j}] = {products(X[window(i, j)], WEIGHT)} = {number(result.y[i, j])}",
        ]
    else:
        factor = number(DY[i, j])
        lines = [
            f"backward, step {step} of 4: y[{i}, {j}] has seen {place}, and hears dy[{i}, {j}] = {factor}",
            f"dx[{i}:{i + 2}, {j}:{j + 2}] += {factor} · weight          dweight += {factor} · {place}"
            + ("          nothing is added" if factor == "0" else ""),
        ]
    ax.text(4.0, 0.55, lines[0], ha="center", fontsize=10.5, fontweight="bold")
    ax.text(4.0, 0.2, lines[1], ha="center", fontsize=10.5)
    return figure


def _signs(ax: Axes, forward_top: float, backward_top: float) -> None:
    """Which way the numbers flow."""
    for name, top, start, end in (("forward", forward_top, 4.55, 5.45), ("backward", backward_top, 5.45, 4.55)):
        style.arrow(ax, (start, top - 0.45), (end, top - 0.45))
        ax.text(0.15, top - 0.65, name, rotation=90, ha="left", va="center", fontsize=10, color=GREY)
        ax.text(2.8, top - 0.45, "and", ha="center", va="center", fontsize=10, color=GREY)


def draw_still() -> Figure:
    """All of it in one picture, with the sums written out."""
    figure, ax = style.new_canvas(6.3)
    top = {"x": 5.75, "weight": 5.75, "y": 5.75, "dx": 3.85, "dweight": 3.85, "dy": 3.85}
    result = compute()
    for name, values in (
        ("x", X),
        ("weight", WEIGHT),
        ("y", result.y),
        ("dx", result.dx),
        ("dweight", result.dweight),
        ("dy", DY),
    ):
        title = f"{name}, {values.shape[0]} x {values.shape[1]}"
        style.grid(ax, values, LEFT[name], top[name], cell=CELL, title=title)
    # Two of the four windows, and the pixels that saw through them.
    for (i, j), color, inset in (((0, 0), SKY, 0.0), ((1, 1), VERMILION, 0.045)):
        for name in ("x", "dx"):
            style.frame(ax, LEFT[name], top[name], *window(i, j), color, cell=CELL, inset=inset)
        for name in ("y", "dy"):
            style.frame(ax, LEFT[name], top[name], slice(i, i + 1), slice(j, j + 1), color, cell=CELL, inset=inset)
    _signs(ax, top["x"], top["dx"])
    for column, lines in zip((0.35, 4.15), _sums(result), strict=True):
        for row, line in enumerate(lines):
            ax.text(column, 2.0 - 0.27 * row, line, fontsize=9.5, fontweight="bold" if row == 0 else None)
    return figure


def _sums(result: Result) -> tuple[list[str], list[str]]:
    """What stands below the still, left and right."""
    forward = ["forward: the window, times the weights"]
    dweight = ["backward: dy, times what each tap has met"]
    for a, b in PIXELS:
        forward.append(f"y[{a}, {b}] = {products(X[window(a, b)], WEIGHT)} = {number(result.y[a, b])}")
        # Tap (a, b) has met the pixels x[i + a, j + b]: a window again, of the size of dy.
        dweight.append(f"dweight[{a}, {b}] = {products(DY, X[window(a, b)])} = {number(result.dweight[a, b])}")
    # The middle pixel is the one that all four windows hold: y[i, j] saw it through weight[1 - i, 1 - j].
    forward += ["", f"dx[1, 1] = {products(DY, WEIGHT[::-1, ::-1])} = {number(result.dx[1, 1])}"]
    dweight += ["", f"dbias = {' + '.join(number(d) for d in DY.ravel())} = {number(result.dbias)}"]
    return forward, dweight


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw conv2d.gif and conv2d.png into ``out``. ``tiny`` changes nothing. Returns the sums as text."""
    frames = [draw(step, phase) for phase in ("forward", "backward") for step in range(1, 5)]
    style.save_animation(frames, [2.0, 2.0, 2.0, 2.5, 3.0, 3.0, 3.0, 5.0], out / "conv2d.gif")
    style.save(draw_still(), out / "conv2d.png")
    return [line for lines in _sums(compute()) for line in lines if line]
