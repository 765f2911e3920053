"""loss_surface.png: what Dice and cross entropy see, and which way they push, the empty mask included.

An image of 32 x 32 pixels of which 10 are tumour (1 %, as in LGG-MRI). To have a surface that can be drawn, all
tumour pixels are given one probability, p, and all other pixels one, q: the loss is then a function of two numbers.
Values and gradients are those of :mod:`minunet.ops.dice_loss` and of cross entropy, of whole images, not of a
formula in two variables.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from docs.figures import style
from docs.figures.style import BLUE, GREY, VERMILION
from minunet.network.loss import SegmentationLoss

SIDE, TUMOUR = 32, 10
LOSSES = {
    "Dice": SegmentationLoss(dice_weight=1, bce_weight=0, smooth=1),
    "cross entropy": SegmentationLoss(dice_weight=0, bce_weight=1),
}


class Place(NamedTuple):
    """The loss where the logits of the tumour are ``z`` and those of the rest ``w``, and its slopes."""

    loss: float
    dz: float  # along the logit of all tumour pixels together
    dw: float  # along that of all others


def logit(probability: Any) -> Any:
    """The number whose sigmoid is ``probability``."""
    return np.log(probability) - np.log1p(-probability)


def at(loss: SegmentationLoss, z: float, w: float, tumour: int = TUMOUR) -> Place:
    """The loss of an image whose first ``tumour`` pixels are tumour, with logit ``z`` there and ``w`` elsewhere."""
    target = np.zeros(SIDE * SIDE)
    target[:tumour] = 1
    logits = np.where(target == 1, z, w).reshape(1, SIDE, SIDE, 1)
    value, cache = loss.forward(logits, target.reshape(logits.shape))
    dlogits = loss.backward(cache).ravel()
    return Place(value.item(), dlogits[:tumour].sum(), dlogits[tumour:].sum())


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def draw(points: int) -> Figure:
    """Above the two surfaces for a mask with tumour, below loss and gradient for an empty one."""
    figure = style.new_figure(7.4)
    axes = figure.subplots(2, 2)
    for ax, (name, loss) in zip(axes[0], LOSSES.items(), strict=True):
        surface = _surface(ax, name, loss, points)
    figure.colorbar(surface, ax=axes[0], label="loss", format=lambda value, _: f"{value:g}", ticks=LEVELS)
    _empty_mask(axes[1, 0], axes[1, 1], 4 * points)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


#: Where the colour changes: the loss, finer where it is small, the same for both losses.
LEVELS = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1, 2, 5)


def _surface(ax: Axes, name: str, loss: SegmentationLoss, points: int) -> Any:
    """Draws the loss over the two logits, with downhill arrows. Returns the filled contours."""
    z, w = np.linspace(-7, 7, points), np.linspace(-10, 4, points)
    values = np.array([[at(loss, a, b).loss for a in z] for b in w])
    surface = ax.contourf(z, w, values, levels=LEVELS, norm=BoundaryNorm(LEVELS, 256), cmap="cividis_r")
    # Downhill for the logits themselves: what one step of plain gradient descent does, up to its length.
    for a in np.linspace(-6.5, 4.5, 5):
        for b in np.linspace(-9, 3, 5):
            place = at(loss, a, b)
            # A step moves each tumour pixel by its own gradient, the mean of the sum; so for the others.
            step = -np.array([place.dz / TUMOUR, place.dw / (SIDE * SIDE - TUMOUR)])
            length = np.hypot(*step)
            drawn = 1.6 * step / length * min(1, max(0.25, 1 + np.log10(length / 1e-3) / 4))
            style.arrow(ax, (a, b), (a + drawn[0], b + drawn[1]), VERMILION)
    ax.set(title=f"{name}, {TUMOUR} of {SIDE * SIDE} pixels tumour", xlim=(-7, 7), ylim=(-10, 4))
    ax.set(xlabel="logit of the tumour pixels", ylabel="logit of the other pixels")
    ax.grid(False)
    return surface


def _empty_mask(loss_ax: Axes, gradient_ax: Axes, points: int) -> None:
    w = np.linspace(-14, 4, points)
    for (name, loss), color in zip(LOSSES.items(), (BLUE, VERMILION), strict=True):
        places = [at(loss, 0.0, b, tumour=0) for b in w]
        loss_ax.plot(w, [place.loss for place in places], color=color, label=name, linewidth=2)
        gradient_ax.plot(w, [place.dw for place in places], color=color, label=name, linewidth=2)
    loss_ax.set(title="an empty mask: the loss", xlabel="logit of all pixels", ylabel="loss", ylim=(-0.05, 2))
    gradient_ax.set(
        title="an empty mask: the gradient", xlabel="logit of all pixels", ylabel="gradient, all pixels together"
    )
    single = logit(1 / (SIDE * SIDE))
    for ax in (loss_ax, gradient_ax):
        ax.set_xticks(range(-14, 5, 3))
        ax.axvline(single, color=GREY, linestyle=":", label="the probabilities of all pixels add up to 1")


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw loss_surface.png into ``out``. Returns the gradients that a page may quote."""
    style.save(draw(points=6 if tiny else 41), out / "loss_surface.png")
    lines = ["gradient of one pixel's logit, at p = tumour pixels' and q = other pixels' probability:"]
    for p, q in ((0.5, 0.5), (0.01, 0.01), (0.001, 0.001), (0.999, 0.001)):
        for name, loss in LOSSES.items():
            place = at(loss, logit(p), logit(q))
            lines.append(
                f"p {p:<5} q {q:<5} {name:13} loss {place.loss:.4f}   tumour pixel {place.dz / TUMOUR:+.2e}"
                f"   other pixel {place.dw / (SIDE * SIDE - TUMOUR):+.2e}"
            )
    lines.append("an empty mask, all pixels at probability q; the gradient is that of all pixels together:")
    for q in (0.5, 0.1, 0.01, 0.001, 0.0001):
        for name, loss in LOSSES.items():
            place = at(loss, 0.0, logit(q), tumour=0)
            lines.append(f"q {q:<7} {name:13} loss {place.loss:.4f}   gradient {place.dw:+.2e}")
    return lines
