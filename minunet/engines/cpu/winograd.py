"""Winograd's minimal filtering F(4, 3): four outputs of a three-tap filter for six products instead of twelve.

    y = A^T [ (G w) * (B^T x) ]          x: 6 inputs, w: 3 taps, y: 4 outputs, *: value by value

``B^T`` turns the inputs, ``G`` the taps, and ``A^T`` turns the six products back. Read backwards, the same three
matrices give the gradient with respect to the taps: ``dw = G^T [ (B^T x) * (A dy) ]``. The gradient with respect to
the inputs is again a convolution, of dy with the flipped filter, and so again the first formula.

Two convolutions are made of it: :mod:`.rows` filters down the columns only, :mod:`.tiles` in both directions, as
F(4x4, 3x3).
Where the matrices come from, and what they do to the last digits: docs/engines/winograd.md.

Source: Winograd 1980, "Arithmetic complexity of computations"; Lavin & Gray 2016, "Fast algorithms for convolutional
neural networks", section 4. The points are 0, 1, -1, 2, -2 and infinity.
"""

from typing import NamedTuple

import numpy as np

OUTPUTS, TAPS, INPUTS = 4, 3, 6  # m, r and m + r - 1 of F(m, r)

INPUT_TRANSFORM = (  # B^T
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
FILTER_TRANSFORM = (  # G
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUT_TRANSFORM = (  # A^T
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


class Matrices(NamedTuple):
    """The three transforms in one dtype; ``filters_2d`` is G in both directions, for a 3 x 3 filter laid out flat."""

    inputs: np.ndarray  # B^T (6, 6)
    filters: np.ndarray  # G (6, 3)
    filters_2d: np.ndarray  # G kron G (36, 9)
    outputs: np.ndarray  # A^T (4, 6)
    gradients: np.ndarray  # A (6, 4)


def matrices(dtype: str | np.dtype) -> Matrices:
    """The transforms, rounded once to ``dtype``.

    >>> m = matrices("float64")
    >>> x, w = np.array([1.0, 2, 3, 4, 5, 6]), np.array([1.0, 0, -1])
    >>> (m.outputs @ ((m.filters @ w) * (m.inputs @ x))).round(12)
    array([-2., -2., -2., -2.])
    """
    filters = np.array(FILTER_TRANSFORM)
    return Matrices(
        inputs=np.array(INPUT_TRANSFORM, dtype),
        filters=filters.astype(dtype),
        filters_2d=np.kron(filters, filters).astype(dtype),
        outputs=np.array(OUTPUT_TRANSFORM, dtype),
        gradients=np.array(OUTPUT_TRANSFORM, dtype).T.copy(),
    )
