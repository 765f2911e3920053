"""3 x 3 convolution of a chunk of image rows by tiles, Winograd F(4x4, 3x3): for many channels.

Specification: :func:`minunet.ops.conv2d_forward` and ``conv2d_backward`` with a 3 x 3 kernel, padding "same".

The idea. F(4, 3) in both directions needs 36 products for a tile of 4 x 4 outputs, where the plain sum needs 144. The
products of all tiles for one of the 36 positions are a matrix product over the channels, (tiles, C_in) x (C_in,
C_out). The transforms are matrix products too, on strided views: first of whole rows (6 x 6 times 6 rows), then, tile
by tile, of six pixels, written straight to where the 36 matrices want them. Nothing is gathered and nothing is added
value by value, which in NumPy costs three to four times as much.

    rows  --B^T, columns-->  --B^T, tiles-->  36 x (P, C)
                                                  |  x filters 36 x (C, C_out)
    rows  <--A^T, columns--  <--A^T, tiles--  36 x (P, C_out)

The zeros around the image stand between the two directions, where the first one leaves them alone.

Measured on one core of an AMD EPYC (Zen 4), AVX-512, 2026-11-22, by ``python benchmarks/ops.py``:
docs/engines/cpu.md.
"""

from collections.abc import Callable
from functools import partial
from math import prod

import numpy as np
from numpy.lib.stride_tricks import as_strided

from minunet.engines.cpu.buffers import Scratch
from minunet.engines.cpu.chunks import SMALL, VECTOR
from minunet.engines.cpu.winograd import Matrices

Step = Callable[[], object]  # one prepared call: all its views are made


class Tiles:
    """The prepared calls for chunks of ``images`` x ``tile_rows`` rows of 4 x 4 tiles, in images ``width`` wide."""

    def __init__(self, matrices: Matrices, images: int, tile_rows: int, width: int) -> None:
        self.matrices, self.images, self.tile_rows, self.width = matrices, images, tile_rows, width
        self.columns = -(-width // 4)
        self.padded_width = 4 * self.columns + 2
        self.tiles = images * tile_rows * self.columns  # P
        self._halves: dict[int, np.ndarray] = {}
        self._pixels = np.zeros(0)

    def take_room(self, scratch: Scratch, *channels: int) -> None:
        """Room for what lies between the two directions of the transforms, for each number of channels."""
        dtype = self.matrices.inputs.dtype
        for c in set(channels):
            self._halves[c] = scratch.take((self.images, self.tile_rows, 6, self.padded_width, c), dtype)
        self._pixels = scratch.take((6 * 4 * self.tiles * max(channels),), dtype)

    def clear_room(self) -> None:
        """Set the border of zeros, which the transforms leave alone. Once before the chunks of a stage."""
        for half in self._halves.values():
            half.fill(0)

    def planes_shape(self, channels: int, chunks: int = 1) -> tuple[int, ...]:
        """The values of all tiles at the 36 positions."""
        return 36, self.tiles * chunks, channels

    def chunk(self, planes: np.ndarray, number: int) -> np.ndarray:
        """The place of one chunk in planes that hold several."""
        return planes[:, number * self.tiles : (number + 1) * self.tiles]

    def input_transform(self, band: np.ndarray, planes: np.ndarray) -> Step:
        """planes <- B^T x B of each window of 6 x 6 pixels, four apart, of ``band`` (images, 4T + 2, W, C)."""
        return self._both(self.matrices.inputs, band, planes, first_pixel=0)

    def gradient_transform(self, band: np.ndarray, planes: np.ndarray) -> Step:
        """planes <- A dy A^T of each 4 x 4 pixels of the rows of a gradient inside ``band`` (images, 4T + 2, W, C)."""
        return self._both(self.matrices.gradients, band[:, 1:], planes, first_pixel=1)

    def products(self, planes: np.ndarray, filters: np.ndarray, sums: np.ndarray) -> Step:
        """sums <- planes (36, P, C_in) times filters (36, C_in, C_out), position by position."""
        return _in_parts(planes, filters, sums)

    def output_transform(self, sums: np.ndarray) -> Callable[[np.ndarray], object]:
        """A function of ``out`` (images, tile rows, 4, W * C): out <- A^T y A of each tile's 36 sums."""
        channels = sums.shape[2]
        shape = (self.images, self.tile_rows, 6, self.columns, 4, channels)
        pixels = self._pixels[: prod(shape)].reshape(shape)
        rows = pixels.reshape(*shape[:3], -1)[..., : self.width * channels]
        tiles, outputs = self._positions(sums), self.matrices.outputs

        def transform(out: np.ndarray) -> None:
            np.matmul(outputs, tiles, out=pixels)
            np.matmul(outputs, rows[: len(out)], out=out)

        return transform

    def filter_gradient(self, planes: np.ndarray, gradients: np.ndarray, dfilters: np.ndarray) -> Step:
        """dfilters (36, C_in, C_out) <- for each position, (C_in, P) times (P, C_out)."""
        return _in_parts(planes.swapaxes(1, 2), gradients, dfilters)

    def _both(self, matrix: np.ndarray, band: np.ndarray, planes: np.ndarray, *, first_pixel: int) -> Step:
        """``matrix`` applied down the columns, then along the rows, tile by tile, into the planes."""
        channels, taps = planes.shape[2], matrix.shape[1]
        image, row, _, item = band.strides
        rows = as_strided(band, (self.images, self.tile_rows, taps, self.width * channels), (image, 4 * row, row, item))
        half = self._halves[channels]
        image, tile_row, row, pixel, item = half.strides
        inside = as_strided(half[:, :, :, 1:], (*half.shape[:3], rows.shape[3]), (image, tile_row, row, item))
        patches = as_strided(
            half[:, :, :, first_pixel:],
            (self.images, self.tile_rows, 6, self.columns, taps, channels),
            (image, tile_row, row, 4 * pixel, pixel, item),
        )
        positions = self._positions(planes)

        def transform() -> None:
            np.matmul(matrix, rows, out=inside)
            np.matmul(matrix, patches, out=positions)

        return transform

    def _positions(self, planes: np.ndarray) -> np.ndarray:
        """The planes (36, P, C) as (images, tile rows, 6 rows, tile columns, 6 pixels, C)."""
        position, tile, item = planes.strides
        shape = (self.images, self.tile_rows, 6, self.columns, 6, planes.shape[2])
        row = self.columns * tile
        return as_strided(planes, shape, (self.tile_rows * row, row, 6 * position, tile, position, item))


def _in_parts(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Step:
    """out <- a @ b; where OpenBLAS would pack the matrices, in blocks of columns that it does not pack."""
    columns, widest = b.shape[2], SMALL // (a.shape[1] * a.shape[2])
    count = -(-columns // max(widest, 1))
    width = -(-columns // count // VECTOR) * VECTOR
    if count == 1 or not 2 * VECTOR <= width <= widest:
        return partial(np.matmul, a, b, out=out)
    blocks = [slice(first, first + width) for first in range(0, columns, width)]
    parts = [partial(np.matmul, a, b[..., block], out=out[..., block]) for block in blocks]
    return lambda: [part() for part in parts]


def filters_shape(c_in: int, c_out: int) -> tuple[int, ...]:
    """The transformed filters: (36, C_in, C_out)."""
    return 36, c_in, c_out


def filter_transform(matrices: Matrices) -> np.ndarray:
    """What turns a weight laid out as (9, C_in * C_out) into the transformed filters: G in both directions."""
    return matrices.filters_2d
