"""The picture of docs/trust.md: how far three ways to differentiate numerically are off, by their step size.

    python docs/figures/step_size.py [picture.png]

The derivative is that of the segmentation loss of a tiny U-Net, whose weights move along one random direction. Its
true value is taken from the backward pass, which the complex step confirms to the last digit.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from minunet import SegmentationLoss, UNet
from minunet.layers import map_arrays
from minunet.rng import Key

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
    return (loss_at(h) - loss_at(-h)) / (2 * h)


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

steps = 10.0 ** np.arange(-20, 0.01, 0.25)
figure = Figure(figsize=(8, 5), layout="constrained")
axes = figure.subplots()
for method, color, label in (
    (central, "#D55E00", "central difference"),
    (richardson, "#0072B2", "Richardson: two central differences"),
    (complex_step, "#009E73", "complex step"),
):
    errors = [abs(method(h) - truth) / abs(truth) for h in steps]
    axes.loglog(steps, np.maximum(errors, 1e-17), color=color, marker="o", markersize=3, label=label)
    print(f"{label:36} best {min(errors):.1e} at h = {steps[int(np.argmin(errors))]:.0e}")
axes.axhline(np.finfo(float).eps, color="0.5", linestyle=":", label="one rounding of float64")
axes.set(
    xlabel="step size h",
    ylabel="error, relative to the derivative",
    title="A derivative of a U-Net's loss, found numerically",
    ylim=(5e-18, 1e2),
)
axes.spines[["top", "right"]].set_visible(False)
axes.grid(True, color="0.9")
figure.legend(loc="outside lower center", ncols=2, frameon=False)
path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "pictures" / "step_size.png"
figure.savefig(path, dpi=120)
print(f"the picture: {path}")
