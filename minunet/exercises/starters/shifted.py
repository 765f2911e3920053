"""Lab shifted: every outline lies one pixel too far down and to the right.

The weights of this network were trained in Keras and copied over, number by number. Everything runs, shapes and sizes
are right, and yet each outline is a little off. Padding is "same", as there. Run this file and see; then mend it,
keeping the names of the functions.

    python FILE                                  shows the symptom
    python -m minunet.exercises shifted FILE     says whether you have found the cause
    python -m minunet.exercises shifted --hint 1 (then 2, 3)
"""

import numpy as np

from minunet.base.backend import Array


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """How many zeros to put (before, after) ``size`` pixels, so that there are ceil(size / stride) results."""
    results = -(-size // stride)
    total = max((results - 1) * stride + kernel - size, 0)
    after = total // 2
    return total - after, after


def convolve(x: Array, weight: Array, stride: int) -> Array:
    """The convolution of ``x`` (H, W) with ``weight`` (KH, KW), padded to the same size: (ceil(H / stride), ...)."""
    kernel_height, kernel_width = weight.shape
    rows = same_padding(x.shape[0], kernel_height, stride)
    columns = same_padding(x.shape[1], kernel_width, stride)
    x_pad = np.pad(x, (rows, columns))
    height, width = -(-x.shape[0] // stride), -(-x.shape[1] // stride)
    y = np.zeros((height, width), x.dtype)
    for i in range(height):
        for j in range(width):
            window = x_pad[i * stride : i * stride + kernel_height, j * stride : j * stride + kernel_width]
            y[i, j] = (window * weight).sum()
    return y


def main() -> None:
    """Show the symptom: a tumour from column 4 to column 8, at half the size."""
    x = np.zeros((12, 12))
    x[4:9, 4:9] = 1.0
    weight = np.outer([1.0, 2.0, 1.0], [1.0, 2.0, 1.0]) / 16
    print("row 3 of the result, stride 2")
    print("  Keras:     [0.   0.25 1.   1.   0.25 0.  ]")
    print("  this file:", convolve(x, weight, stride=2)[3].round(2))


if __name__ == "__main__":
    main()
