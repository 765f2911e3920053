"""The stages that change the size: max-pooling on the way down, the transposed convolution on the way up.

Specification: :func:`minunet.ops.max_pool2d_forward`, ``conv_transpose2d_forward`` (stride 2, kernel 2 or 3, padding
"same") and their backward, with the ReLU in front of them and the dropout behind the pool.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import as_strided

from minunet.engines.cpu import taps
from minunet.engines.cpu.bands import Band, as_pixels, carve, copy_pixels, rows_of
from minunet.engines.cpu.chunks import SMALL, Chunk
from minunet.engines.cpu.norm import ChannelRow, ChannelSums, with_row
from minunet.engines.cpu.plan import Pool, Up
from minunet.engines.cpu.work import Work

POOL_BUDGET = 300_000  # bytes of the rows of the skip that are pooled at a time
UP_BUDGET = 1_500_000  # bytes of the products of one chunk
TURNED = 64  # channels of the weight that are laid out anew at a time, so that both sides fit the cache


class PoolForward:
    """pooled <- the largest of each 2 x 2 values of the activation, times the dropout mask."""

    def __init__(self, pool: Pool, work: Work) -> None:
        self.work, unit = work, pool.skip
        self.width, self.channels = unit.width, unit.c_out
        row = 2 * unit.width * unit.c_out
        self.pieces = work.cut(unit.height // 2, 1, row * work.dtype.itemsize, POOL_BUDGET)
        rows = self.pieces.images * self.pieces.rows
        self.z, self.relu = work.arrays[unit.z], work.relu(unit)
        self.slope = ChannelRow(unit.width // 2, unit.c_out, work.scratch, work.dtype)
        self.norm = work.norms[unit]
        self.pooled = work.arrays[pool.pooled]
        self.kept = work.arrays[pool.kept] if work.dropout else None
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

    def __init__(self, pool: Pool, work: Work) -> None:
        self.work, unit = work, pool.skip
        self.width, self.channels = unit.width, unit.c_out
        row = 2 * unit.width * unit.c_out
        self.pieces = work.cut(unit.height // 2, 1, row * work.dtype.itemsize, POOL_BUDGET)
        rows = self.pieces.images * self.pieces.rows
        self.z, self.g, self.relu = work.arrays[unit.z], work.arrays[unit.g], work.relu(unit)
        self.dpooled = work.arrays[pool.dpooled]
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

    The pixels that a pixel's outputs are made of are laid side by side, and each output is one matrix product with the
    taps that meet in it: :mod:`.taps`. Two rows of outputs are made of a row: they lie apart until the bias is added,
    which takes both to their place.
    """

    def __init__(self, up: Up, work: Work) -> None:
        self.work, self.below = work, up.below
        height, width, c_in = self.below.height, self.below.width, self.below.c_out
        self.kernel, c_out = work.plan.up_kernel, up.channels
        pixels = len(taps.neighbours(self.kernel))
        row = width * ((1 + pixels) * c_in + 4 * c_out) * work.dtype.itemsize
        self.pieces = work.cut(height, 1, row, up_budget(c_in, self.kernel**2, c_out, work))
        images, rows = self.pieces.images, self.pieces.rows
        self.band = Band(work.take(images, rows + 2, width, c_in), height, work.scaled_activation(self.below))
        self.pixels = work.take(images, rows, width, pixels, c_in)
        self.outputs = work.take(2, images, rows, width, 2, c_out)  # the rows 2i of up, and then the rows 2i + 1
        side_by_side = self.pixels.reshape(-1, pixels * c_in)
        outputs = self.outputs.reshape(2, -1, 2, c_out)
        self.products = [
            product(side_by_side[:, -len(stack) :], stack, outputs[row, :, column])
            for (row, column), stack in taps.by_output(self.kernel, work.arrays[up.taps]).items()
        ]
        self.places = []  # the band's pixels as one item each, and where they go
        for number, (above, left) in enumerate(taps.neighbours(self.kernel)):
            values = self.band.values[:, 1 - above : 1 - above + rows, : width - left]
            self.places.append((as_pixels(values), as_pixels(self.pixels[:, :, left:, number])))
        self.bias, self.row = work.weights[f"{up.conv}.bias"], work.take(2 * width * c_out)
        self.up = work.arrays[up.up]

    def run(self) -> None:
        self.band.prepare()
        self.pixels.fill(0)  # those left of the image stay zero
        self.row.reshape(-1, len(self.bias))[...] = self.bias  # repeated, for long inner loops
        for chunk in self.work.chunks(self.pieces):
            self.band.load(chunk)
            for values, place in self.places:
                np.copyto(place, values)
            for multiply in self.products:
                multiply()
            images, first = slice(chunk.first_image, chunk.first_image + chunk.images), 2 * chunk.first_row
            up = self.up[images, first : first + 2 * chunk.rows].reshape(chunk.images, chunk.rows, 2, -1)
            for row, outputs in enumerate(self.outputs):
                rows = outputs[: chunk.images, : chunk.rows]
                np.add(rows.reshape(*rows.shape[:2], -1), self.row, out=up[:, :, row])


class UpBackward:
    """dweight and dbias, and the gradient of the activation below."""

    def __init__(self, up: Up, work: Work) -> None:
        self.work, self.below = work, up.below
        self.kernel, self.conv = work.plan.up_kernel, up.conv
        height, width, c_in = self.below.height, self.below.width, self.below.c_out
        self.c_out, count = up.channels, self.kernel**2
        row = (width + 1) * (2 * c_in + (count + 4) * self.c_out) * work.dtype.itemsize
        budget = up_budget(c_in, count, self.c_out, work)
        self.pieces = work.cut(height, 1, row, budget)
        images, rows = self.pieces.images, self.pieces.rows
        pixels = images * rows * width
        self.dup = work.arrays[up.dup]
        # What tap 2 of the last row and column meets lies outside the image, and is zero.
        self.padded = work.take(images, 2 * rows + 1, 2 * width + 1, self.c_out)
        self.patches = work.take(images, rows, width, count, self.c_out)
        image, row, pixel, item = self.padded.strides
        shape = (images, rows, width, self.kernel, self.kernel * self.c_out)
        self.windows = as_strided(self.padded, shape, (image, 2 * row, 2 * pixel, row, item))
        self.dx, self.values = work.take(pixels * c_in), work.take(pixels * c_in)
        self.z, self.relu = work.arrays[self.below.z], work.relu(self.below)
        self.weight_t = work.take(count, self.c_out, c_in)
        self.together = _divisor(width, SMALL // (count * self.c_out * c_in))  # pixels in a product; 0: all
        # The gradients of so many taps are taken at a time: of all in a row, if they fit the cache.
        fit = self.kernel * c_in * self.c_out * work.dtype.itemsize <= UP_BUDGET
        self.part = work.take(self.kernel if fit else 1, c_in, self.c_out)
        self.sums = ChannelSums(4 * pixels, work.dtype)
        self.target = work.activation_target(self.below, pixels)

    def run(self) -> None:
        k, c_in, c_out = self.kernel, self.below.c_out, self.c_out
        weight = self.work.weights[f"{self.conv}.weight"].reshape(k * k, c_in, c_out)
        for first in range(0, c_in, TURNED):
            block = slice(first, first + TURNED)
            self.weight_t[:, :, block] = weight[:, block].swapaxes(1, 2)
        weight_t = self.weight_t.reshape(k * k * c_out, c_in)
        self.relu.prepare()
        self.target.prepare()
        self.padded.fill(0)
        dweight = self.work.partial_gradient(f"{self.conv}.weight").reshape(k * k, c_in, c_out)
        dweight.fill(0)
        dbias = np.zeros(c_out)
        for chunk in self.work.chunks(self.pieces):
            first = 2 * chunk.first_row
            rows = slice(chunk.first_image, chunk.first_image + chunk.images), slice(first, first + 2 * chunk.rows)
            self.sums.add(self.dup[rows], dbias)
            patches = self._patches(chunk)
            z = self.z[rows_of(chunk)]
            dx, values = carve(self.dx, z.shape), carve(self.values, z.shape)
            together = self.together or len(dx.reshape(-1, c_in))
            np.matmul(patches.reshape(-1, together, k * k * c_out), weight_t, out=dx.reshape(-1, together, c_in))
            self.relu(z, values)
            by_tap = patches.reshape(-1, k * k, c_out).swapaxes(0, 1)
            for tap in range(0, k * k, len(self.part)):
                some = slice(tap, tap + len(self.part))
                np.matmul(values.reshape(-1, c_in).T, by_tap[some], out=self.part)
                np.add(dweight[some], self.part, out=dweight[some])
            self.target(chunk, dx, values)
        self.target.finish()
        slope = self.work.norms[self.below].input_slope.astype(self.work.dtype)
        dweight *= slope[:, None]
        self.work.partial_gradient(f"{self.conv}.bias")[...] = dbias

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
        patches = self.patches[:n, : chunk.rows]
        copy_pixels(self.windows[:n, : chunk.rows], patches.reshape(n, chunk.rows, width, k, k * self.c_out))
        return patches


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Callable[[], object]:
    """out <- a @ b, in parts that OpenBLAS does not pack, unless ``b`` is too large for that."""
    together = _divisor(len(a), SMALL // b.size) or len(a)

    def parts(matrix: np.ndarray) -> np.ndarray:
        row, item = matrix.strides
        return as_strided(matrix, (len(a) // together, together, matrix.shape[1]), (together * row, row, item))

    return partial(np.matmul, parts(a), b, out=parts(out))


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``; 0 if it would be too small to gain.

    >>> _divisor(112, 60), _divisor(112, 10)
    (56, 0)
    """
    best = max((d for d in range(1, number + 1) if number % d == 0 and d <= limit), default=1)
    return best if best >= 16 else 0
