"""The stages of the last convolution, which has few output channels: to the logits, and from their gradient back.

Specification: :func:`minunet.ops.conv2d_forward` and ``conv2d_backward``.

The idea. With one output channel a convolution is a matrix product only if its taps take the channels' place: all
pixels times all taps, (taps * C_out, C) x (C, pixels), and then each tap's plane is added where it belongs.
"""

import numpy as np

from minunet.engines.cpu.bands import carve, rows_of
from minunet.engines.cpu.chunks import Chunk, Cut
from minunet.engines.cpu.work import Work

HEAD_BUDGET = 500_000  # bytes of the rows of one chunk


class _Head:
    """The shapes that both directions share."""

    def __init__(self, work: Work) -> None:
        self.work, self.unit = work, work.plan.units[-1]
        self.kernel, self.c_out = work.plan.head_kernel, work.plan.out_channels
        self.before = (self.kernel - 1) // 2  # of the zeros around the image, those above and to the left
        self.row = (self.unit.width + self.kernel) * (2 * self.unit.c_out + self.kernel**2 * self.c_out)

    def cut(self) -> Cut:
        """The chunks: rows of about so many bytes."""
        nbytes = self.row * self.work.dtype.itemsize
        return self.work.cut(self.unit.height, 1, nbytes, HEAD_BUDGET)

    def weight(self) -> np.ndarray:
        """The weight as (taps * C_out, C)."""
        weight = self.work.weights["head.weight"]
        return np.ascontiguousarray(weight.transpose(0, 1, 3, 2)).reshape(-1, self.unit.c_out)

    def slope(self) -> np.ndarray:
        """What the last activation leaves to the weight, (C,)."""
        return self.work.norms[self.unit].input_slope.astype(self.work.dtype)


class HeadForward(_Head):
    """logits <- the last convolution of the last activation."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.pieces = self.cut()
        images, rows, k = self.pieces.images, self.pieces.rows, self.kernel
        self.padded = work.take(images, rows + k - 1, self.unit.width + k - 1, self.unit.c_out)
        self.source = work.activation(self.unit)
        self.values = work.take(self.padded.shape[1] * self.unit.width * self.unit.c_out)
        self.products = work.take(k, k, self.c_out, *self.padded.shape[:3])
        self.sum = work.take(self.c_out, images, rows, self.unit.width)

    def run(self) -> None:
        self.source.prepare()
        self.padded.fill(0)
        weight, bias = self.weight() * self.slope(), self.work.weights["head.bias"]
        before, k = self.before, self.kernel
        flat = self.padded.reshape(-1, self.unit.c_out)
        width = self.unit.width
        for chunk in self.work.chunks(self.pieces):
            n, top = chunk.images, chunk.first_row - before
            first, last = max(top, 0), min(top + self.padded.shape[1], self.unit.height)
            self.padded[:, : first - top] = 0
            self.padded[:, last - top :] = 0
            values = carve(self.values, (last - first, width, self.unit.c_out))
            for place in range(n):
                self.source(chunk.first_image + place, first, last, values)
                self.padded[place, first - top : last - top, before : before + width] = values
            np.matmul(weight, flat.T, out=self.products.reshape(len(weight), -1))
            total = self.sum[:, :n, : chunk.rows]
            total[...] = bias[:, None, None, None]
            for u in range(k):
                for v in range(k):
                    total += self.products[u, v, :, :n, u : u + chunk.rows, v : v + width]
            self.work.arrays[self.work.plan.logits][self.work.in_whole(chunk)] = total.transpose(1, 2, 3, 0)


class HeadBackward(_Head):
    """dweight and dbias of the last convolution, and the gradient of the last activation."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.pieces = self.cut()
        images, rows, k = self.pieces.images, self.pieces.rows, self.kernel
        width, channels, taps = self.unit.width, self.unit.c_out, self.kernel**2 * self.c_out
        pixels = images * rows * width
        self.padded = work.take(self.c_out, images, rows + k - 1, width + k - 1)
        self.patches = work.take(taps * pixels)
        self.dx, self.values = work.take(pixels * channels), work.take(pixels * channels)
        self.z, self.relu = work.arrays[self.unit.z], work.relu(self.unit)
        self.part, self.dweight = work.take(taps, channels), work.take(taps, channels)
        self.dlogits = work.arrays[work.plan.dlogits]
        self.target = work.activation_target(self.unit, pixels)

    def run(self) -> None:
        self.relu.prepare()
        self.target.prepare()
        self.dweight.fill(0)
        weight, k = self.weight(), self.kernel
        dbias = np.zeros(self.c_out)
        for chunk in self.work.chunks(self.pieces):
            patches = self._patches(chunk)
            dbias += self.dlogits[self.work.in_whole(chunk)].sum(axis=(0, 1, 2), dtype=np.float64)
            z = self.z[rows_of(chunk)]
            dx, values = carve(self.dx, z.shape), carve(self.values, z.shape)
            np.matmul(patches.T, weight, out=dx.reshape(-1, self.unit.c_out))
            self.relu(z, values)
            np.matmul(patches, values.reshape(-1, self.unit.c_out), out=self.part)
            np.add(self.dweight, self.part, out=self.dweight)
            self.target(chunk, dx, values)
        self.target.finish()
        dweight = (self.dweight * self.slope()).reshape(k, k, self.c_out, -1).transpose(0, 1, 3, 2)
        self.work.partial_gradient("head.weight")[...] = dweight
        self.work.partial_gradient("head.bias")[...] = dbias

    def _patches(self, chunk: Chunk) -> np.ndarray:
        """For each tap the gradients of the logits that it had a part in, (taps * C_out, pixels)."""
        k, n, width = self.kernel, chunk.images, self.unit.width
        # Logit p took up pixel p + tap - before: so pixel p meets the gradients p + before - tap.
        after = k - 1 - self.before
        top = chunk.first_row - after
        first, last = max(top, 0), min(top + self.padded.shape[2], self.unit.height)
        self.padded.fill(0)
        images = self.work.in_whole(chunk)[0]
        dlogits = self.dlogits[images, first:last]
        self.padded[:, :n, first - top : last - top, after : after + width] = dlogits.transpose(3, 0, 1, 2)
        patches = carve(self.patches, (k, k, self.c_out, n, chunk.rows, width))
        for u in range(k):
            for v in range(k):
                row, column = k - 1 - u, k - 1 - v
                patches[u, v] = self.padded[:, :n, row : row + chunk.rows, column : column + width]
        return patches.reshape(k * k * self.c_out, -1)
