"""Batch norm between the bands: its sums, and the two lines that it becomes once they are known.

Specification: :func:`minunet.ops.batch_norm2d_forward` and ``batch_norm2d_backward``, followed by ReLU.

The idea. A batch norm is nothing but ``slope * z + shift`` in each channel, once the sums of z and z^2 over the batch
are known. They are taken while the convolution's output is still in the cache; the next stage applies them and the
ReLU to each band as it takes it up, so that neither the normalised values nor the activations are ever stored. The
slope is moved into the filters of the next convolution, which leaves one addition and one maximum a value. Backward
is of the same kind: with the sums of g and of g * z (g: the gradient behind the ReLU), the gradient before the norm
is ``slope * (g - (b * z + c))`` in each channel, and it too is made band by band, the slope again left to the
filters.

A convolution's bias does nothing here, since the norm takes the mean away again: it is left out of z, and added to
the mean that is reported.
"""

import numpy as np

from minunet.engines.cpu.buffers import Scratch

#: How many values the inner loop of a NumPy function should see: few enough for the cache, enough to hide its start.
RUN = 8192


class ChannelRow:
    """A vector with one value for each channel, repeated to whole image rows, of about :data:`RUN` values.

    NumPy would repeat a vector of 16 channels by starting its inner loop anew for each pixel: ten times slower.
    """

    def __init__(self, width: int, channels: int, scratch: Scratch, dtype: np.dtype) -> None:
        rows = max(1, RUN // (width * channels))
        self.row = scratch.take((rows * width, channels), dtype)

    def set(self, vector: np.ndarray | float) -> None:
        self.row[...] = vector


def with_row(ufunc: np.ufunc, values: np.ndarray, row: ChannelRow, out: np.ndarray) -> None:
    """out <- ufunc(values, row), for contiguous ``values`` and ``out`` of any shape (..., C)."""
    run = row.row.reshape(-1)
    size, length = values.size, run.size
    whole = size // length * length
    values, out = values.reshape(-1), out.reshape(-1)
    if whole:
        ufunc(values[:whole].reshape(-1, length), run, out=out[:whole].reshape(-1, length))
    if whole < size:
        ufunc(values[whole:], run[: size - whole], out=out[whole:])


class ChannelSums:
    """Sums of contiguous values (..., C) over their pixels, in float64 from chunk to chunk.

    A chunk's sums are a product with a row of ones: the fastest sum over the first axis that NumPy has.
    """

    def __init__(self, pixels: int, dtype: np.dtype) -> None:
        self._ones = np.ones((1, pixels), dtype)

    def add(self, values: np.ndarray, into: np.ndarray) -> None:
        """into (C,) float64 += the sums of ``values``."""
        pixels = values.reshape(-1, values.shape[-1])
        into += (self._ones[:, : len(pixels)] @ pixels)[0]


#: A batch norm whose gamma is 0, or so small against its beta, is a constant: this number, which no z changes in its
#: last digit, so that all values are equal, as pooling has to see them, times a slope that makes it the right one.
CONSTANT = 1e24


class Norm:
    """The batch norm of one unit and the ReLU behind it, as one process sees them.

    ``sums`` (2, processes, 2, C) float64: the slots in which each process leaves its sums of z and z^2 (forward), and
    of g and g * z (backward). All processes add the slots up in the same order, and so have the same bits.

    Where gamma is negative the convolution's output is stored with the other sign, so that here the slope is never
    negative, and ``relu(slope * z + shift) = slope * relu(z + offset)``: :attr:`slope` and :attr:`offset`.
    """

    def __init__(self, sums: np.ndarray, arrays: dict[str, np.ndarray], eps: float, dtype: np.dtype) -> None:
        self.sums, self.arrays, self.eps, self.dtype = sums, arrays, eps, dtype
        self.mean = self.var = self.inverse_std = self.slope = self.offset = np.zeros(0)
        self.pixels = 0  # values a channel in the batch

    @property
    def sign(self) -> np.ndarray:
        """-1 for the channels whose output is stored with the other sign, else 1."""
        return np.where(self.arrays["gamma"] < 0, -1, 1).astype(self.dtype)

    def from_batch(self, pixels: int) -> None:
        """From the sums of a batch with so many values a channel."""
        self.pixels = pixels
        total, squares = self.sums[0].sum(axis=0)
        mean = total / pixels
        self._set(mean, np.maximum(squares / pixels - mean * mean, 0), np.zeros(1))

    def from_running(self) -> None:
        """From the running statistics; here the convolution's bias counts."""
        mean, var = (self.arrays[name].astype(np.float64) for name in ("running_mean", "running_var"))
        self._set(self.sign * mean, var, self.sign * self.arrays.get("bias", np.zeros(1)))

    def _set(self, mean: np.ndarray, var: np.ndarray, bias: np.ndarray) -> None:
        """``mean`` and ``bias`` are of the output as it is stored."""
        self.mean, self.var = mean, var
        self.inverse_std = 1 / np.sqrt(var + self.eps)
        self.slope = abs(self.arrays["gamma"]) * self.inverse_std
        shift = self.arrays["beta"] + (bias - mean) * self.slope
        constant = abs(shift) >= CONSTANT * self.slope
        # relu(shift) = slope * relu(z + CONSTANT) with a slope of shift / CONSTANT; and nothing if shift <= 0.
        self.input_slope = np.where(constant, np.maximum(shift, 0) / CONSTANT, self.slope)
        offset = shift / np.where(constant, 1, self.slope)
        self.offset = np.where(constant, np.where(shift > 0, CONSTANT, -CONSTANT), offset)

    @property
    def batch_mean(self) -> np.ndarray:
        """The batch's mean as the network defines it, with the bias."""
        return (self.sign * self.mean + self.arrays.get("bias", 0)).astype(self.dtype)

    @property
    def batch_var(self) -> np.ndarray:
        """The batch's variance."""
        return self.var.astype(self.dtype)

    def gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """dgamma and dbeta: the sums of g * x_hat and of g."""
        dbeta, with_z = self.sums[1].sum(axis=0)
        return self.sign * (with_z - self.mean * dbeta) * self.inverse_std, dbeta

    def backward(self) -> tuple[np.ndarray, np.ndarray]:
        """b and c of dz = slope * (g - (b * z + c)).

        From dz = slope * (g - dbeta / m - x_hat * dgamma / m), with x_hat = (z - mean) * inverse_std.
        """
        dgamma, dbeta = self.gradients()
        b = self.inverse_std * self.sign * dgamma / self.pixels
        return b, dbeta / self.pixels - b * self.mean


class Relu:
    """``relu(z + offset)`` of contiguous values: the ReLU of the batch norm of z, divided by the slope."""

    def __init__(self, norm: Norm, width: int, channels: int, scratch: Scratch) -> None:
        self.norm = norm
        self._offset, self._zero = (ChannelRow(width, channels, scratch, norm.dtype) for _ in range(2))

    def prepare(self) -> None:
        self._offset.set(self.norm.offset)
        self._zero.set(0)

    def __call__(self, z: np.ndarray, out: np.ndarray) -> None:
        with_row(np.add, z, self._offset, out)
        with_row(np.maximum, out, self._zero, out)


class NormBackward:
    """``g - (b * z + c)`` of contiguous values: the gradient of z, divided by the slope."""

    def __init__(self, norm: Norm, width: int, channels: int, scratch: Scratch) -> None:
        self.norm = norm
        self._rows = [ChannelRow(width, channels, scratch, norm.dtype) for _ in range(2)]

    def prepare(self) -> None:
        for row, vector in zip(self._rows, self.norm.backward(), strict=True):
            row.set(vector)

    def __call__(self, g: np.ndarray, z: np.ndarray, room: np.ndarray, out: np.ndarray) -> None:
        b, c = self._rows
        with_row(np.multiply, z, b, room)
        with_row(np.add, room, c, room)
        np.subtract(g, room, out=out)
