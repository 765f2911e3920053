"""step_size.png: how far three ways to differentiate numerically are off, by their step size (docs/trust.md).

The derivative is that of the segmentation loss of a tiny U-Net, whose weights move along one random direction. Its
true value is taken from the backward pass, which the complex step confirms to the last digit.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from docs.figures import style
from docs.figures.style import BLUE, GREEN, VERMILION
from minunet import SegmentationLoss, UNet
from minunet.base.rng import Key
from minunet.network.layers import map_arrays

COLORS = {
    "central difference": VERMILION,
    "Richardson: two central differences": BLUE,
    "complex step": GREEN,
}


def compute(tiny: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The steps, and for each way to differentiate its error at each step, relative to the derivative."""
    rng = np.random.default_rng(0)
    net = UNet(widths=(4, 8), dropout=0.3, dtype="float64")
    x, target = rng.standard_normal((2, 8, 8, 3)), (rng.random((2, 8, 8, 1)) < 0.3).astype("float64")
    direction = {name: rng.standard_normal(array.shape) for name, array in net.parameters().items()}
    length = np.sqrt(sum((d * d).sum() for d in direction.values()))
    loss, key = SegmentationLoss(), Key(seed=0)

    def loss_at(step: complex) -> complex:
        """The loss after the weights have moved by ``step`` along the direction."""
        dtype = np.result_type(type(step), "float64")
        moved = map_arrays(net, lambda array: array.astype(dtype))
        for name, array in moved.parameters().items():
            array += step * direction[name] / length
        logits, _ = moved.forward(x.astype(dtype), training=True, key=key)
        return loss.forward(logits, target)[0]

    def central(h: float) -> float:
        """The slope between h before and h after."""
        return ((loss_at(h) - loss_at(-h)) / (2 * h)).real

    def richardson(h: float) -> float:
        """Two central differences whose h^2 terms cancel: what is left is of order h^4."""
        return (4 * central(h / 2) - central(h)) / 3

    def complex_step(h: float) -> float:
        """The imaginary part after an imaginary step."""
        return loss_at(1j * h).imag / h

    logits, cache = net.forward(x, training=True, key=key)
    _, loss_cache = loss.forward(logits, target)
    _, grads = net.backward(loss.backward(loss_cache), cache)
    truth = sum((grads[name] * d).sum() for name, d in direction.items()) / length

    steps = 10.0 ** np.arange(-20, 0.01, 5.0 if tiny else 0.25)
    ways: tuple[Callable[[float], float], ...] = (central, richardson, complex_step)
    errors = {
        label: np.array([abs(way(h) - truth) / abs(truth) for h in steps])
        for label, way in zip(COLORS, ways, strict=True)
    }
    return steps, errors


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def draw(steps: np.ndarray, errors: dict[str, np.ndarray]) -> Figure:
    """Error over step, both in logarithm."""
    figure = style.new_figure(5)
    ax = figure.subplots()
    for label, values in errors.items():
        ax.loglog(steps, np.maximum(values, 1e-17), color=COLORS[label], marker="o", markersize=3, label=label)
    ax.axhline(np.finfo(float).eps, color="0.5", linestyle=":", label="one rounding of float64")
    ax.set(
        xlabel="step size h",
        ylabel="error, relative to the derivative",
        title="A derivative of a U-Net's loss, found numerically",
        ylim=(5e-18, 1e2),
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(style.power_of_ten)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def build(out: Path, tiny: bool = False) -> list[str]:
    """Draw step_size.png into ``out``. Returns the best step of each way and its error."""
    steps, errors = compute(tiny)
    style.save(draw(steps, errors), out / "step_size.png")
    return [
        f"{label:36} best {values.min():.1e} at h = {steps[values.argmin()]:.0e}" for label, values in errors.items()
    ]
