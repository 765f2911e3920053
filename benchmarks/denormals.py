"""What denormal moments cost, and what it costs to be rid of them: a step of AdamW, with its flush and without.

    python benchmarks/denormals.py

A channel that has died (its ReLU is never positive) has gradient 0 for ever. Its moments then shrink by 0.9 and 0.999
a step, down to the denormal numbers below 1e-38, and stay there: 0.9 of the fifth-smallest number rounds to the
fifth-smallest number. Processors work on denormal numbers in microcode. Prints one Markdown table, medians of a step.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np

from minunet.base.environment import environment
from minunet.training.optim import AdamW

COUNT = 20_000  # parameters
REPEATS = 301
NORMAL, DENORMAL = 1e-6, 1e-42  # of all moments before the step


def step_without_flush(optimizer: AdamW, grads: dict[str, np.ndarray]) -> None:
    """``AdamW.step``, the flush left out."""
    beta1, beta2 = optimizer.betas
    optimizer.steps += 1
    for name, theta in optimizer.parameters.items():
        g, m, v = grads[name], optimizer.first_moment[name], optimizer.second_moment[name]
        theta -= optimizer.lr * optimizer.weight_decay * theta
        m[...] = beta1 * m + (1 - beta1) * g
        v[...] = beta2 * v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1**optimizer.steps)
        v_hat = v / (1 - beta2**optimizer.steps)
        theta -= optimizer.lr * m_hat / (np.sqrt(v_hat) + optimizer.eps)


def milliseconds(step: Callable[[AdamW, dict[str, np.ndarray]], None], moment: float, gradient: float) -> float:
    """The median time of a step, with all moments as given before the first: what they become is part of it."""
    optimizer = AdamW({"w": np.full(COUNT, 0.05, "float32")})
    optimizer.first_moment["w"][...] = moment
    optimizer.second_moment["w"][...] = moment
    optimizer.steps = 10_000
    grads = {"w": np.full(COUNT, gradient, "float32")}
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        step(optimizer, grads)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def main() -> None:
    plain = [milliseconds(step_without_flush, *values) for values in ((NORMAL, 1e-3), (DENORMAL, 0.0))]
    flushed = [milliseconds(AdamW.step, *values) for values in ((NORMAL, 1e-3), (DENORMAL, 0.0))]
    print(f"{environment()['cpu']}, NumPy {np.__version__}; {COUNT:,} parameters, float32, milliseconds a step\n")
    print("| moments | without the flush | with it |\n|---|---|---|")
    print(f"| normal | {plain[0]:.2f} | {flushed[0]:.2f} |")
    print(f"| of a dead channel | {plain[1]:.2f} | {flushed[1]:.2f} |")
    print(f"| the second over the first | {plain[1] / plain[0]:.1f} | {flushed[1] / flushed[0]:.1f} |")


if __name__ == "__main__":
    main()
