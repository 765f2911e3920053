"""backward_graph.png: the backward pass of a whole U-Net, every op in the order in which it runs.

The order is not written down here: a backward pass is run, and each op notes that it was called. What is drawn is
that note, and ``compute`` refuses to go on if it is not the mirror image of the forward pass. What is seen is that the
gradient goes down the right side and up the left one, that each op takes from the cache what it needs, and that at each
skip two gradients are added.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from docs.figures import style
from docs.figures.style import BLUE, GREY, ORANGE, SKY, VERMILION, light
from docs.figures.trained import NORMALIZATION, largest_tumours
from minunet import SegmentationLoss, UNet, ops
from minunet.base.rng import Key
from minunet.data import phantom
from minunet.data.batches import prepare_batch

#: For each op what its backward takes from the cache, and which gradients of parameters it leaves on its way.
ROLES = {
    "conv2d": ("x, weight", "dweight, dbias"),
    "conv_transpose2d": ("x, weight", "dweight, dbias"),
    "batch_norm2d": ("x_hat, gamma, inverse_std", "dgamma, dbeta"),
    "relu": ("passed", ""),
    "dropout": ("kept, scale", ""),
    "max_pool2d": ("winner", ""),
    "concat": ("up_channels", ""),
}
CONVS = (
    ("relu2", "relu"),
    ("norm2", "batch_norm2d"),
    ("conv2", "conv2d"),
    ("relu1", "relu"),
    ("norm1", "batch_norm2d"),
    ("conv1", "conv2d"),
)
#: The lines of each room's backward, as in minunet/network/blocks.py: (name, op).
LINES = {
    "head": (("head", "conv2d"),),
    "up": (*CONVS, ("dropout", "dropout"), ("concat", "concat"), ("up", "conv_transpose2d")),
    "bottleneck": CONVS,
    "down": (("dropout", "dropout"), ("pool", "max_pool2d"), *CONVS),
}


class Call(NamedTuple):
    """One op's backward, as it was called."""

    room: str
    name: str  # of its line: "conv1"
    op: str  # "conv2d"
    dy: np.ndarray
    results: tuple[np.ndarray, ...]  # what it returned: dx first (of concat: dup, dskip)


def compute(depth: int = 2, dropout: float = 0.3) -> list[Call]:
    """All calls of the backward pass of a small, untrained U-Net on two slices of 16 x 16, in their order.

    Raises RuntimeError if they are not those that the rooms of the U have in LINES.
    """
    net = UNet(widths=[4 * 2**level for level in range(depth + 1)], dropout=dropout)
    slices = phantom.make(patients=2, size=16)
    batch = prepare_batch(slices, NORMALIZATION.statistics(slices), largest_tumours(slices, 2), "cpu")
    loss = SegmentationLoss()
    logits, cache = net.forward(batch.x, training=True, key=Key(seed=0))
    _, loss_cache = loss.forward(logits, batch.target)
    dlogits = loss.backward(loss_cache)
    noted: list[tuple[str, np.ndarray, tuple[np.ndarray, ...]]] = []

    def noting(op: str, backward: Callable[..., Any]) -> Callable[..., Any]:
        def call(dy: np.ndarray, op_cache: Any) -> Any:
            result = backward(dy, op_cache)
            noted.append((op, dy, result if isinstance(result, tuple) else (result,)))
            return result

        return call

    spies: dict[str, Any] = {f"{op}_backward": noting(op, getattr(ops, f"{op}_backward")) for op in ROLES}
    with mock.patch.multiple(ops, **spies):
        net.backward(dlogits, cache)

    levels = range(1, depth + 1)
    rooms = ["head", *(f"up{k}" for k in levels), "bottleneck", *(f"down{k}" for k in reversed(levels))]
    expected = [(room, name, op) for room in rooms for name, op in LINES[room.rstrip("0123456789")]]
    if [op for _, _, op in expected] != [op for op, _, _ in noted]:
        raise RuntimeError(
            "the backward pass no longer runs its ops in the order that docs/figures/backward_graph.py has"
        )
    return [Call(*place, dy, results) for place, (_, dy, results) in zip(expected, noted, strict=True)]


# ---- Drawing ---------------------------------------------------------------------------------------------------------

ROW = 0.215  # inches
BOX = 3.55  # inches: the width of a room
LEFT, RIGHT = 0.1, 8.0 - 0.1 - BOX


def draw(calls: list[Call]) -> Figure:
    """The U, each room a list of its ops, numbered as they run."""
    figure, ax = style.new_canvas(9.0)
    places: dict[tuple[str, str], float] = {}  # room and line -> the height at which the line stands
    edges: dict[str, tuple[float, float]] = {}  # room -> bottom and top
    numbered = list(enumerate(calls, start=1))

    def room(name: str, left: float, top: float) -> None:
        lines: list[tuple[str, Call | None]] = [(str(n), call) for n, call in numbered if call.room == name]
        if name.startswith("down"):
            lines.insert(2, ("", None))  # the sum of the two gradients of the skip
            lines.reverse()  # the left side runs upwards
        bottom = top - (len(lines) + 1.1) * ROW - 0.06
        edges[name] = (bottom, top)
        ax.add_patch(
            FancyBboxPatch(
                (left, bottom), BOX, top - bottom, boxstyle="round,pad=0,rounding_size=0.06", fc="white", ec=GREY, lw=1
            )
        )
        dx = lines[0 if name.startswith("down") else -1][1]
        assert dx is not None
        shape = " x ".join(map(str, dx.results[0].shape))
        ax.text(left + 0.1, top - 0.62 * ROW, name, va="center", fontsize=9.5, fontweight="bold")
        ax.text(left + BOX - 0.1, top - 0.62 * ROW, f"leaves with dx {shape}", ha="right", va="center", fontsize=8.5)
        for row, (number, call) in enumerate(lines, start=1):
            y = top - (row + 0.6) * ROW
            places[name, call.name if call else "+"] = y
            _line(ax, left, y, number, call)

    top = 8.1
    heads = {"head": top}
    room("head", RIGHT, heads["head"])
    for level in (1, 2):
        room(f"up{level}", RIGHT, edges["head" if level == 1 else "up1"][0] - 0.22)
        # The + stands beside the concat that sends it the gradient.
        plus = places[f"up{level}", "concat"]
        room(f"down{level}", LEFT, plus + 7.6 * ROW)
    room("bottleneck", (8.0 - BOX) / 2, edges["up2"][0] - 0.45)

    middle_right, middle_left = RIGHT + BOX / 2, LEFT + BOX / 2
    ax.text(middle_right, 8.72, "the loss: dlogits = ∂L/∂logits", ha="center", fontsize=9.5, fontweight="bold")
    flow = [((middle_right, 8.66), (middle_right, edges["head"][1]))]
    flow += [((middle_right, edges[a][0]), (middle_right, edges[b][1])) for a, b in (("head", "up1"), ("up1", "up2"))]
    flow += [((middle_right, edges["up2"][0]), (4.9, edges["bottleneck"][1]))]
    flow += [((3.1, edges["bottleneck"][1]), (middle_left, edges["down2"][0]))]
    flow += [((middle_left, edges["down2"][1]), (middle_left, edges["down1"][0]))]
    flow += [((middle_left, edges["down1"][1]), (middle_left, edges["down1"][1] + 0.5))]
    for start, end in flow:
        style.arrow(ax, start, end, VERMILION, width=2)
    ax.text(middle_left, edges["down1"][1] + 0.56, "dx, the gradient of the images", ha="center", fontsize=9.5)
    for level in (1, 2):
        y = places[f"up{level}", "concat"]
        style.arrow(ax, (RIGHT - 0.02, y), (LEFT + BOX + 0.02, y), VERMILION, width=2)
        ax.text((LEFT + BOX + RIGHT) / 2, y + 0.08, f"dskip{level}", ha="center", fontsize=9, color=VERMILION)
    words = "grey: what the op takes from its cache; blue: the gradients that it leaves for the optimiser"
    ax.text(4.0, 0.12, words, ha="center", fontsize=9)
    return figure


def _line(ax: Axes, left: float, y: float, number: str, call: Call | None) -> None:
    """One line of a room: the number of the step, the op, what it takes and what it leaves. None: the sum."""
    ground = light(VERMILION, 0.3) if call is None else light(ORANGE, 0.3) if ROLES[call.op][1] else light(SKY, 0.18)
    ax.add_patch(Rectangle((left + 0.06, y - ROW / 2 + 0.012), BOX - 0.12, ROW - 0.024, facecolor=ground))
    if call is None:
        ax.text(left + 0.42, y, "+   dskip and the gradient from below", va="center", fontsize=8.5, fontweight="bold")
        return
    takes, leaves = ROLES[call.op]
    ax.text(left + 0.34, y, number, ha="right", va="center", fontsize=8.5, color=GREY)
    ax.text(left + 0.42, y, call.name, va="center", fontsize=8.5)
    ax.text(left + 0.95, y, takes, va="center", fontsize=8, color=GREY)
    ax.text(left + BOX - 0.1, y, leaves, ha="right", va="center", fontsize=8, color=BLUE)


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw backward_graph.png into ``out``. ``tiny`` changes nothing. Returns the steps as text."""
    calls = compute()
    style.save(draw(calls), out / "backward_graph.png")
    return [
        f"{n:2} {call.room + '.' + call.name:18} {call.op + '_backward':26} dy {call.dy.shape}"
        f" -> {', '.join(str(result.shape) for result in call.results)}"
        for n, call in enumerate(calls, start=1)
    ]
