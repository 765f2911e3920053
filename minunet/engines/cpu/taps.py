"""Which taps of a transposed convolution meet in which output: stride 2, kernel 2 or 3, padding "same".

A pixel has four outputs, two by two. Taps 0 and 1 of the kernel fall on the pixel's own outputs, tap 2 on the first
one of the next pixel. Seen from the outputs: (0, 0) is made of four pixels, the own, the one to the left, the one
above, and that one's left; (0, 1) and (1, 0) are made of two; (1, 1) of the own alone. With those four pixels side by
side, each output is a product with the taps that meet in it, one below the other.
"""

import numpy as np

Tap = tuple[int, int]  # row and column of the kernel


def neighbours(kernel: int) -> list[tuple[int, int]]:
    """The pixels that the outputs of a pixel are made of, (rows above, columns to the left), the own one last."""
    steps = range((kernel - 1) // 2, -1, -1)
    return [(above, left) for left in steps for above in steps]


def stacks(kernel: int) -> dict[tuple[int, int], list[Tap | None]]:
    """For each output (row, column) its taps, for the last of the :func:`neighbours`; None: that one has no part.

    >>> stacks(3)[0, 0], stacks(3)[0, 1]
    ([(2, 2), (0, 2), (2, 0), (0, 0)], [(2, 1), (0, 1)])
    >>> stacks(3)[1, 0], stacks(3)[1, 1]
    ([(1, 2), None, (1, 0)], [(1, 1)])
    """
    found: dict[tuple[int, int], list[Tap | None]] = {}
    for output in ((0, 0), (0, 1), (1, 0), (1, 1)):
        taps = [(output[0] + 2 * above, output[1] + 2 * left) for above, left in neighbours(kernel)]
        met = [tap if max(tap) < kernel else None for tap in taps]
        found[output] = met[next(k for k, tap in enumerate(met) if tap) :]
    return found


def count(kernel: int) -> int:
    """The taps of all stacks, those that are None included."""
    return sum(map(len, stacks(kernel).values()))


def lay_out(weight: np.ndarray, channels: slice, out: np.ndarray) -> None:
    """out (taps, C_in, C_out) <- the stacks of ``weight`` (K, K, C_in, C_out), for some input ``channels``.

    Where a tap is None, ``out`` stays zero.
    """
    taps = [tap for stack in stacks(len(weight)).values() for tap in stack]
    for tap, place in zip(taps, out, strict=True):
        if tap is not None:
            place[channels] = weight[tap][channels]


def by_output(kernel: int, laid_out: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """The stack of each output as a matrix, (taps * C_in, C_out)."""
    found, first = {}, 0
    for output, stack in stacks(kernel).items():
        found[output] = laid_out[first : first + len(stack)].reshape(-1, laid_out.shape[2])
        first += len(stack)
    return found
