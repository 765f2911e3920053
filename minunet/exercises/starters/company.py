"""Lab company: what is predicted for a slice depends on the slices beside it.

The network was good in training. Used on one slice after the other it is not, and the same slice gets another mask in
another batch. Run this file and see; then mend it, keeping the names of the functions.

    python FILE                                  shows the symptom
    python -m minunet.exercises company FILE     says whether you have found the cause
    python -m minunet.exercises company --hint 1 (then 2, 3)
"""

import numpy as np

from minunet.base.backend import Array


class Net:
    """A pixel-wise network: batch norm on each channel, a weighted sum, a sigmoid."""

    def __init__(self, channels: int) -> None:
        self.gamma, self.beta = np.ones(channels), np.zeros(channels)
        self.weight = np.linspace(-1.0, 2.0, channels)
        self.running_mean, self.running_var = np.zeros(channels), np.ones(channels)


def forward(net: Net, x: Array, training: bool = True) -> tuple[Array, Array, Array]:
    """The probabilities of images ``x`` (N, H, W, C), and the mean and variance that normalised them."""
    if training:
        mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    else:
        mean, var = net.running_mean, net.running_var
    x_hat = (x - mean) / np.sqrt(var + 1e-3)
    logits = (net.gamma * x_hat + net.beta) @ net.weight
    return 1 / (1 + np.exp(-logits)), mean, var


def train_step(net: Net, x: Array, momentum: float = 0.9) -> Array:
    """The part of a training step that batch norm needs: forward, and the running averages."""
    probabilities, mean, var = forward(net, x, training=True)
    net.running_mean = momentum * net.running_mean + (1 - momentum) * mean
    net.running_var = momentum * net.running_var + (1 - momentum) * var
    return probabilities


def predict(net: Net, x: Array) -> Array:
    """The probabilities of images ``x``, each for itself."""
    probabilities, _, _ = forward(net, x)
    return probabilities


def main() -> None:
    """Show the symptom: the mean probability of one and the same slice, in three batches."""
    rng = np.random.default_rng(0)
    net = Net(channels=3)
    for _ in range(100):
        train_step(net, 2 * rng.standard_normal((8, 4, 4, 3)) + 1)
    slice_1 = 2 * rng.standard_normal((1, 4, 4, 3)) + 1
    dark, bright = np.full((7, 4, 4, 3), -3.0), np.full((7, 4, 4, 3), 5.0)
    print("the same slice, its mean probability")
    print(f"  alone                {predict(net, slice_1)[0].mean():.3f}")
    print(f"  beside dark slices   {predict(net, np.concatenate([slice_1, dark]))[0].mean():.3f}")
    print(f"  beside bright ones   {predict(net, np.concatenate([slice_1, bright]))[0].mean():.3f}")


if __name__ == "__main__":
    main()
