"""Lab timid: a network that is never sure.

Each pixel's brightness says whether it is tumour, without exception. And yet no probability falls below 0.5 or rises
above 0.73, however long the training. Run this file and see; then mend it, keeping the names of the functions.

    python FILE                                shows the symptom
    python -m minunet.exercises timid FILE     says whether you have found the cause
    python -m minunet.exercises timid --hint 1 (then 2, 3)
"""

import numpy as np

from minunet.base.backend import Array


def sigmoid(z: Array) -> Array:
    """Any number to one between 0 and 1."""
    return 1 / (1 + np.exp(-z))


def network(x: Array, weight: float, bias: float) -> Array:
    """What the network says of pixels of brightness ``x``: a weighted sum, and the sigmoid as its last layer."""
    return sigmoid(weight * x + bias)


def probabilities(x: Array, weight: float, bias: float) -> Array:
    """The probability that each pixel is tumour."""
    return sigmoid(network(x, weight, bias))


def loss_and_gradient(x: Array, target: Array, weight: float, bias: float) -> tuple[float, float, float]:
    """The mean binary cross entropy, and its slope in ``weight`` and in ``bias``.

    With p = sigmoid(z), the cross entropy has slope p - target in z, and z = weight * x + bias.
    """
    p = probabilities(x, weight, bias)
    loss = -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
    dz = (p - target) / x.size
    return float(loss), float((dz * x).sum()), float(dz.sum())


def main() -> None:
    """Show the symptom: the loss of a training, and the least and the greatest probability."""
    x = np.linspace(-2.0, 2.0, 40)
    target = (x > 0.3).astype("float64")
    weight, bias = 0.0, 0.0
    for step in range(401):
        loss, dweight, dbias = loss_and_gradient(x, target, weight, bias)
        if step % 80 == 0:
            p = probabilities(x, weight, bias)
            print(f"step {step:3}  loss {loss:.3f}  probabilities from {p.min():.3f} to {p.max():.3f}")
        weight, bias = weight - dweight, bias - dbias


if __name__ == "__main__":
    main()
