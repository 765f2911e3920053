"""Lab stubborn: weight decay that works on some weights only.

Two weights begin at 1. Their gradients are noise about 0, small for the first and large for the second, so neither
learns anything: both should decay towards 0 by the same share. The second hardly does. Run this file and see; then
mend it, keeping the names of the functions.

    python FILE                                   shows the symptom
    python -m minunet.exercises stubborn FILE     says whether you have found the cause
    python -m minunet.exercises stubborn --hint 1 (then 2, 3)
"""

import numpy as np

from minunet.base.backend import Array


class Optimizer:
    """AdamW on one array, which ``step`` changes in place."""

    def __init__(self, theta: Array, lr: float = 0.001, weight_decay: float = 1.0) -> None:
        self.theta, self.lr, self.weight_decay = theta, lr, weight_decay
        self.m, self.v, self.t = np.zeros_like(theta), np.zeros_like(theta), 0

    def step(self, g: Array) -> None:
        """Move theta by its gradient ``g``."""
        beta1, beta2, eps = 0.9, 0.999, 1e-7
        self.t += 1
        g = g + self.weight_decay * self.theta
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        m_hat = self.m / (1 - beta1**self.t)
        v_hat = self.v / (1 - beta2**self.t)
        self.theta -= self.lr * m_hat / (np.sqrt(v_hat) + eps)


def main() -> None:
    """Show the symptom: two weights under noise."""
    rng = np.random.default_rng(0)
    theta = np.array([1.0, 1.0])
    optimizer = Optimizer(theta)
    print("step   small gradients   large gradients   decay alone")
    for step in range(1001):
        if step % 200 == 0:
            print(f"{step:4}   {theta[0]:15.3f}   {theta[1]:15.3f}   {(1 - 0.001) ** step:11.3f}")
        optimizer.step(rng.standard_normal(2) * np.array([0.1, 100.0]))


if __name__ == "__main__":
    main()
