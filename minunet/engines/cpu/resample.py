"""The stages that change the size: max-pooling on the way down, the transposed convolution on the way up.

Specification: :func:`minunet.ops.max_pool2d_forward`, ``conv_transpose2d_forward`` (stride 2, kernel 2 or 3, padding
"same") and their backward, with the ReLU in front of them and the dropout behind the pool.
"""

import numpy as np
from numpy.lib.stride_tricks import as_strided

from minunet.engines.cpu.bands import carve, copy_pixels, rows_of
from minunet.engines.cpu.channels import SMALL
from minunet.engines.cpu.chunks import Chunk
from minunet.engines.cpu.norm import ChannelRow, ChannelSums, with_row
from minunet.engines.cpu.work import Work

POOL_BUDGET = 300_000  # bytes of the rows of the skip that are pooled at a time
UP_BUDGET = 500_000  # bytes of the products of one chunk
TURNED = 64  # channels of the weight that are laid out anew at a time, so that both sides fit the cache


class PoolForward:
    """pooled <- the largest of each 2 x 2 values of the activation, times the dropout mask."""

    def __init__(self, level: int, work: Work) -> None:
        self.work, unit = work, work.description.skip(level)
        self.width, self.channels = unit.width, unit.c_out
        row = 2 * unit.width * unit.c_out
        self.pieces = work.cut(unit.height // 2, 1, row * work.dtype.itemsize, POOL_BUDGET)
        rows = self.pieces.images * self.pieces.rows
        self.z, self.relu = work.arrays[f"z:{unit.conv}"], work.relu(unit)
        self.slope = ChannelRow(unit.width // 2, unit.c_out, work.scratch, work.dtype)
        self.norm = work.norms[unit.conv]
        self.pooled = work.arrays[f"pooled:{level + 1}"]
        self.kept = work.arrays[f"kept_pooled:{level + 1}"] if work.dropout else None
        self.values, self.of_pairs = work.take(rows * row), work.take(rows * row // 2)

    def run(self) -> None:
        self.relu.prepare()
        self.slope.set(self.norm.input_slope)
        for chunk in self.work.chunks(self.pieces):
            rows = rows_of(chunk)
            z = self.z[rows[0], 2 * rows[1].start : 2 * rows[1].stop]
            values = carve(self.values, z.shape)
            self.relu(z, values)
            columns = values.reshape(-1, self.width // 2, 2, self.channels)
            of_pairs = carve(self.of_pairs, (len(columns), self.width // 2, self.channels))
            np.maximum(columns[:, :, 0], columns[:, :, 1], out=of_pairs)
            pairs = of_pairs.reshape(-1, 2, self.width // 2 * self.channels)
            pooled = self.pooled[rows]
            np.maximum(pairs[:, 0], pairs[:, 1], out=pooled.reshape(len(pairs), -1))
            with_row(np.multiply, pooled, self.slope, pooled)
            if self.kept is not None:
                np.multiply(pooled, self.kept[rows], out=pooled)


class PoolBackward:
    """The skip's whole gradient: the pool's, to the first largest of each 2 x 2, added; and then through the ReLU.

    First largest in reading order: of each row's two, the left one unless the right is larger; of the two rows, the
    upper one unless the lower is larger. Each loser gets what the winner leaves of the gradient, which is nothing.
    """

    def __init__(self, level: int, work: Work) -> None:
        self.work, unit = work, work.description.skip(level)
        self.width, self.channels = unit.width, unit.c_out
        row = 2 * unit.width * unit.c_out
        self.pieces = work.cut(unit.height // 2, 1, row * work.dtype.itemsize, POOL_BUDGET)
        rows = self.pieces.images * self.pieces.rows
        self.z, self.g, self.relu = work.arrays[f"z:{unit.conv}"], work.arrays[f"g:{unit.conv}"], work.relu(unit)
        self.dpooled = work.arrays[f"dpooled:{level + 1}"]
        self.values, self.spread = work.take(rows * row), work.take(rows * row)
        self.of_pairs, self.of_rows = work.take(rows * row // 2), work.take(rows * row // 2)
        self.flags = work.take(rows * row, dtype=np.dtype(bool))
        self.target = work.activation_target(unit, rows * 2 * unit.width)

    def run(self) -> None:
        self.relu.prepare()
        self.target.prepare()
        half = self.width // 2
        for chunk in self.work.chunks(self.pieces):
            rows = rows_of(chunk)
            doubled = chunk._replace(first_row=2 * chunk.first_row, rows=2 * chunk.rows)
            z, g = self.z[rows_of(doubled)], self.g[rows_of(doubled)]
            values = carve(self.values, z.shape)
            self.relu(z, values)
            columns = values.reshape(-1, half, 2, self.channels)
            of_pairs = carve(self.of_pairs, (len(columns), half, self.channels))
            np.maximum(columns[:, :, 0], columns[:, :, 1], out=of_pairs)
            pairs = of_pairs.reshape(-1, 2, half * self.channels)
            upper = carve(self.flags, (len(pairs), half * self.channels))
            np.greater_equal(pairs[:, 0], pairs[:, 1], out=upper)
            dpooled = self.dpooled[rows].reshape(upper.shape)
            of_rows = carve(self.of_rows, pairs.shape)
            np.multiply(dpooled, upper, out=of_rows[:, 0])
            np.subtract(dpooled, of_rows[:, 0], out=of_rows[:, 1])
            left = carve(self.flags, of_pairs.shape)
            np.greater_equal(columns[:, :, 0], columns[:, :, 1], out=left)
            dpairs = of_rows.reshape(of_pairs.shape)
            spread = carve(self.spread, columns.shape)
            np.multiply(dpairs, left, out=spread[:, :, 0])
            np.subtract(dpairs, spread[:, :, 0], out=spread[:, :, 1])
            dskip = spread.reshape(g.shape)
            np.add(dskip, g, out=dskip)
            self.target(doubled, dskip, values)
        self.target.finish()


def up_budget(c_in: int, taps: int, c_out: int, work: Work) -> int:
    """Bytes of one chunk: what fits the cache or, if the filters do not, as much as the filters take."""
    return max(UP_BUDGET, c_in * taps * c_out * work.dtype.itemsize)


class UpForward:
    """up <- the transposed convolution of the activation below.

    All pixels times one tap is a matrix product, (pixels, C_in) x (C_in, C_out), and gives a plane. With stride 2 the
    planes of the taps 0 and 1 are a pixel's own four outputs; tap 2, if there is one, falls on the next pixel's first.
    So a chunk needs what tap 2 of the row above gives: the last chunk's last row, moved, not made again.
    """

    def __init__(self, level: int, work: Work) -> None:
        self.work, self.below = work, work.description.below(level)
        self.kernel, self.level = work.description.up_kernel, level
        height, width, c_in = self.below.height, self.below.width, self.below.c_out
        self.c_out = work.description.widths[level - 1]
        taps = self.kernel**2
        row = (width + 1) * (c_in + taps * self.c_out) * work.dtype.itemsize
        budget = up_budget(c_in, taps, self.c_out, work)
        self.pieces = work.cut(height, 1, row, budget)
        images, rows = self.pieces.images, self.pieces.rows
        # One column more to the left, from which tap 2 comes.
        self.padded, self.values = work.take(images, rows, width + 1, c_in), work.take(rows * width * c_in)
        self.source = work.activation(self.below)
        self.slope = ChannelRow(width, c_in, work.scratch, work.dtype)
        self.planes = work.take(taps, images, rows, width + 1, self.c_out)
        self.above = work.take(self.kernel, images, 1, width + 1, self.c_out)
        self.bias = work.take(width, self.c_out)  # repeated, for long inner loops
        self.up = work.arrays[f"up:{level}"]

    def run(self) -> None:
        self.source.prepare()
        self.padded.fill(0)
        arrays, k, c_in, c_out = self.work.arrays, self.kernel, self.below.c_out, self.c_out
        self.slope.set(self.work.norms[self.below.conv].input_slope)
        weight = arrays[f"net:up{self.level}.up.weight"].reshape(k * k, c_in, c_out)
        self.bias[...] = arrays[f"net:up{self.level}.up.bias"]
        follows = None  # the image and row at which a chunk would continue the last one
        for chunk in self.work.chunks(self.pieces):
            n, rows = chunk.images, chunk.rows
            planes = carve(self.planes, (k, k, n, rows, self.below.width + 1, c_out))
            if k == 3:
                self._row_above(chunk, weight, follows == (chunk.first_image, chunk.first_row))
            follows = chunk.first_image, chunk.first_row + rows
            self._multiply(chunk, weight, planes)
            first = 2 * chunk.first_row
            up = self.up[chunk.first_image : chunk.first_image + n, first : first + 2 * rows]
            out = up.reshape(n, rows, 2, self.below.width, 2, c_out)
            for row in (0, 1):
                for column in (0, 1):
                    total = planes[row, column, :, :, 1:]
                    if k == 3 and row == 0:
                        self._add_above(total, planes[2, column, :, :, 1:], self.above[column, :n, :, 1:])
                    if k == 3 and column == 0:
                        np.add(total, planes[row, 2, :, :, :-1], out=total)
                    if k == 3 and row == column == 0:
                        self._add_above(total, planes[2, 2, :, :, :-1], self.above[2, :n, :, :-1])
                    np.add(total, self.bias, out=total)
                    copy_pixels(total, out[:, :, row, :, column])

    def _multiply(self, chunk: Chunk, weight: np.ndarray, planes: np.ndarray) -> None:
        """planes <- the rows of ``chunk`` times each tap of ``weight`` (taps, C_in, C_out)."""
        rows, width, c_in = chunk.rows, self.below.width, self.below.c_out
        values = carve(self.values, (rows, width, c_in))
        padded = carve(self.padded, (chunk.images, rows, width + 1, c_in))
        for image, place in enumerate(padded, start=chunk.first_image):
            self.source(image, chunk.first_row, chunk.first_row + rows, values)
            with_row(np.multiply, values, self.slope, values)
            copy_pixels(values, place[:, 1:])
        np.matmul(padded.reshape(-1, c_in), weight, out=planes.reshape(len(weight), -1, self.c_out))

    def _row_above(self, chunk: Chunk, weight: np.ndarray, known: bool) -> None:
        """What tap 2 gives of the row above the chunk: zero at the top of an image."""
        if known:  # from the last chunk, which had all the rows that a chunk can have
            self.above[...] = self.planes[-3:, :, -1:]
        elif chunk.first_row:
            before = chunk._replace(images=1, first_row=chunk.first_row - 1, rows=1)
            self._multiply(before, weight[-3:], self.above[:, :1])
        else:
            self.above.fill(0)

    @staticmethod
    def _add_above(total: np.ndarray, plane: np.ndarray, above: np.ndarray) -> None:
        """total <- total + what the rows above have in ``plane``, the first of them in ``above``."""
        np.add(total[:, 1:], plane[:, :-1], out=total[:, 1:])
        np.add(total[:, :1], above, out=total[:, :1])


class UpBackward:
    """dweight and dbias, and the gradient of the activation below."""

    def __init__(self, level: int, work: Work) -> None:
        self.work, self.below = work, work.description.below(level)
        self.kernel, self.level = work.description.up_kernel, level
        height, width, c_in = self.below.height, self.below.width, self.below.c_out
        self.c_out, taps = work.description.widths[level - 1], self.kernel**2
        row = (width + 1) * (2 * c_in + (taps + 4) * self.c_out) * work.dtype.itemsize
        budget = up_budget(c_in, taps, self.c_out, work)
        self.pieces = work.cut(height, 1, row, budget)
        images, rows = self.pieces.images, self.pieces.rows
        pixels = images * rows * width
        self.dup = work.arrays[f"dup:{level}"]
        # What tap 2 of the last row and column meets lies outside the image, and is zero.
        self.padded = work.take(images, 2 * rows + 1, 2 * width + 1, self.c_out)
        self.patches = work.take(pixels * taps * self.c_out)
        self.dx, self.values = work.take(pixels * c_in), work.take(pixels * c_in)
        self.z, self.relu = work.arrays[f"z:{self.below.conv}"], work.relu(self.below)
        self.weight_t = work.take(taps, self.c_out, c_in)
        self.part = work.take(c_in, self.c_out)
        self.sums = ChannelSums(4 * pixels, work.dtype)
        self.target = work.activation_target(self.below, pixels)

    def run(self) -> None:
        k, c_in, c_out, width = self.kernel, self.below.c_out, self.c_out, self.below.width
        weight = self.work.arrays[f"net:up{self.level}.up.weight"].reshape(k * k, c_in, c_out)
        for first in range(0, c_in, TURNED):
            block = slice(first, first + TURNED)
            self.weight_t[:, :, block] = weight[:, block].swapaxes(1, 2)
        weight_t = self.weight_t.reshape(k * k * c_out, c_in)
        self.relu.prepare()
        self.target.prepare()
        self.padded.fill(0)
        dweight = self.work.partial_gradient(f"up{self.level}.up.weight").reshape(k * k, c_in, c_out)
        dweight.fill(0)
        dbias = np.zeros(c_out)
        for chunk in self.work.chunks(self.pieces):
            first = 2 * chunk.first_row
            rows = slice(chunk.first_image, chunk.first_image + chunk.images), slice(first, first + 2 * chunk.rows)
            self.sums.add(self.dup[rows], dbias)
            patches = self._patches(chunk)
            z = self.z[rows_of(chunk)]
            dx, values = carve(self.dx, z.shape), carve(self.values, z.shape)
            together = _divisor(width, SMALL // (k * k * c_out * c_in)) or len(dx.reshape(-1, c_in))
            np.matmul(patches.reshape(-1, together, k * k * c_out), weight_t, out=dx.reshape(-1, together, c_in))
            self.relu(z, values)
            by_tap = patches.reshape(-1, k * k, c_out)
            for tap in range(k * k):
                np.matmul(values.reshape(-1, c_in).T, by_tap[:, tap], out=self.part)
                np.add(dweight[tap], self.part, out=dweight[tap])
            self.target(chunk, dx, values)
        self.target.finish()
        slope = self.work.norms[self.below.conv].input_slope.astype(self.work.dtype)
        dweight *= slope[:, None]
        self.work.partial_gradient(f"up{self.level}.up.bias")[...] = dbias

    def _patches(self, chunk: Chunk) -> np.ndarray:
        """For each pixel below, the gradients that its taps had a part in: (images, rows, W, K, K * C_out)."""
        n, k, height, width = chunk.images, self.kernel, self.below.height, self.below.width
        first, last = 2 * chunk.first_row, 2 * (chunk.first_row + chunk.rows)
        after = min(last + 1, 2 * height)  # one row more, if the image has one
        copy_pixels(
            self.dup[chunk.first_image : chunk.first_image + n, first:after], self.padded[:n, : after - first, :-1]
        )
        if after == last:
            self.padded[:, last - first] = 0
        image, row, pixel, item = self.padded.strides
        shape = (n, chunk.rows, width, k, k * self.c_out)
        patches = carve(self.patches, shape)
        copy_pixels(as_strided(self.padded, shape, (image, 2 * row, 2 * pixel, row, item)), patches)
        return patches


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``; 0 if it would be too small to gain.

    >>> _divisor(112, 60), _divisor(112, 10)
    (56, 0)
    """
    best = max((d for d in range(1, number + 1) if number % d == 0 and d <= limit), default=1)
    return best if best >= 16 else 0
