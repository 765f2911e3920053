"""Lab astray: a blurred picture is to be made sharp again, and the descent goes astray.

If x is sharp and blur(x) = y is known, then x is what makes |blur(x) - y|^2 / 2 small: begin with grey, and go
downhill by the gradient in each pixel. By the right gradient the error falls at every step, if the steps are small.
Here it falls at first, and then it grows. Run this file and see; then mend it, keeping the names of the functions.

    python FILE                                  shows the symptom
    python -m minunet.exercises astray FILE     says whether you have found the cause
    python -m minunet.exercises astray --hint 1 (then 2, 3)
"""

import numpy as np

from minunet.base.backend import Array


def blur(x: Array, weight: Array) -> Array:
    """Each window of ``x`` (H, W), weighted by ``weight`` (K, K) and summed: (H - K + 1, W - K + 1)."""
    k = len(weight)
    y = np.zeros((x.shape[0] - k + 1, x.shape[1] - k + 1))
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            y[i, j] = (x[i : i + k, j : j + k] * weight).sum()
    return y


def blur_backward(dy: Array, weight: Array) -> Array:
    """The gradient in x, given ``dy``, the gradient in y."""
    k = len(weight)
    dx = np.zeros((dy.shape[0] + k - 1, dy.shape[1] + k - 1))
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            dx[i : i + k, j : j + k] = dy[i, j] * weight
    return dx


def sharpen(y: Array, weight: Array, steps: int, rate: float) -> tuple[Array, list[float]]:
    """Descend from grey. Returns x, and the error |blur(x) - y|^2 / 2 before each step."""
    x = np.full((y.shape[0] + len(weight) - 1, y.shape[1] + len(weight) - 1), 0.5)
    errors = []
    for _ in range(steps):
        difference = blur(x, weight) - y
        errors.append(float((difference**2).sum() / 2))
        x -= rate * blur_backward(difference, weight)
    return x, errors


def main() -> None:
    """Show the symptom: the error of the descent."""
    sharp = (np.add.outer(np.arange(12), np.arange(12)) % 5 == 0).astype("float64")
    weight = np.outer([1.0, 2.0, 1.0], [1.0, 2.0, 1.0]) / 16
    _, errors = sharpen(blur(sharp, weight), weight, steps=81, rate=1.0)
    for step in range(0, 81, 10):
        print(f"step {step:3}  error {errors[step]:.5f}  {'#' * round(60 * errors[step] / errors[0])}")


if __name__ == "__main__":
    main()
