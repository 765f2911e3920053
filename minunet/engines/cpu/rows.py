"""3 x 3 convolution of a chunk of image rows, Winograd F(4, 3) down the columns: for few channels.

Specification: :func:`minunet.ops.conv2d_forward` and ``conv2d_backward`` with a 3 x 3 kernel, padding "same".

The idea. Down the columns the convolution is a three-tap filter, and F(4, 3) gives four rows of it for six products
instead of twelve. Along a row nothing needs to be transformed: in channels-last memory the three neighbours of a
pixel are 3C numbers in a row, so that "the windows of every third pixel" is a legal matrix, (pixels / 3, 3C), without
a copy. Three such matrices, one for each phase of the pixels, times the filters (3C, C_out) are all products there
are.

    rows (4T + 2, W C)  --B^T-->  6 planes (L, C)
                                         |  x filters 6 x (3C, C_out)
    rows (4T, W C_out)  <--A^T--  6 planes (L, C_out)

The zeros around the image stand in the planes, where the transform leaves them alone: rows are W_p = W + 2 pixels
long there.

Measured on one core of an AMD EPYC (Zen 4), AVX-512, 2026-11-22, by ``python benchmarks/ops.py``:
docs/engines/cpu.md.
"""

from collections.abc import Callable
from functools import partial
from math import prod

import numpy as np
from numpy.lib.stride_tricks import as_strided

from minunet.engines.cpu.buffers import Scratch
from minunet.engines.cpu.winograd import Matrices

Step = Callable[[], object]  # one prepared call: all its views are made


class Rows:
    """The prepared calls for chunks of ``images`` x ``4 * tile_rows`` rows of ``width`` pixels."""

    def __init__(self, matrices: Matrices, images: int, tile_rows: int, width: int) -> None:
        self.matrices, self.images, self.tile_rows, self.width = matrices, images, tile_rows, width
        # A pixel of zeros on each side; a multiple of 3, so that the three phases are equally long.
        self.padded_width = -(-(width + 2) // 3) * 3
        self.pixels = images * tile_rows * self.padded_width  # L, of one plane

    def take_room(self, scratch: Scratch, *channels: int) -> None:
        """Nothing: transforms in one direction need no room in between, as those of :class:`.tiles.Tiles` do."""

    def clear_room(self) -> None:
        """Nothing."""

    def planes_shape(self, channels: int, chunks: int = 1) -> tuple[int, ...]:
        """The six transformed planes. The last window of a plane reads on behind it: three pixels more."""
        return 6, self.pixels * chunks + 3, channels

    def chunk(self, planes: np.ndarray, number: int) -> np.ndarray:
        """The place of one chunk in planes that hold several."""
        return planes[:, number * self.pixels : (number + 1) * self.pixels]

    def input_transform(self, band: np.ndarray, planes: np.ndarray) -> Step:
        """planes <- B^T applied to each window of six rows, four rows apart, of ``band`` (images, 4T + 2, W, C).

        The first pixel of each row of the planes, and those behind the last one, stay as they are: zeros.
        """
        return self._down_columns(self.matrices.inputs, band, self._columns(planes[:, 1:], prod(band.shape[2:])))

    def gradient_transform(self, band: np.ndarray, planes: np.ndarray) -> Step:
        """planes <- A applied to each four of the rows of a gradient inside ``band`` (images, 4T + 2, W, C).

        They begin at the first pixel, so that they stand where the windows begin that they belong to.
        """
        return self._down_columns(self.matrices.gradients, band[:, 1:], self._columns(planes, prod(band.shape[2:])))

    def _down_columns(self, matrix: np.ndarray, band: np.ndarray, out: np.ndarray) -> Step:
        image, row, _, item = band.strides
        shape = (self.images, self.tile_rows, matrix.shape[1], out.shape[3])
        return partial(np.matmul, matrix, as_strided(band, shape, (image, 4 * row, row, item)), out=out)

    def products(self, planes: np.ndarray, filters: np.ndarray, sums: np.ndarray) -> Step:
        """sums <- the windows of three pixels times the filters (6, 3, C_in, C_out), plane by plane."""
        c_in, c_out = filters.shape[2:]
        plane, pixel, item = planes.strides
        windows = as_strided(planes, (6, 3, self.pixels // 3, 3 * c_in), (plane, pixel, 3 * pixel, item))
        plane, pixel, item = sums.strides
        phases = as_strided(sums, (6, 3, self.pixels // 3, c_out), (plane, pixel, 3 * pixel, item))
        return partial(np.matmul, windows, filters.reshape(6, 1, 3 * c_in, c_out), out=phases)

    def output_transform(self, sums: np.ndarray) -> Callable[[np.ndarray], object]:
        """A function of ``out`` (images, tile rows, 4, W * C): out <- A^T applied to the six planes."""
        rows = self._columns(sums, self.width * sums.shape[2])
        return lambda out: np.matmul(self.matrices.outputs, rows[: len(out)], out=out)

    def filter_gradient(self, planes: np.ndarray, gradients: np.ndarray, dfilters: np.ndarray) -> Step:
        """dfilters (6, 3, C_in, C_out) <- for each tap, the pixels that it met times the gradients there."""
        pixels = gradients.shape[1] - 3
        plane, pixel, item = planes.strides
        shifted = as_strided(planes, (6, 3, planes.shape[2], pixels), (plane, pixel, item, pixel))
        return partial(np.matmul, shifted, gradients[:, None, :pixels], out=dfilters)

    def _columns(self, planes: np.ndarray, values: int) -> np.ndarray:
        """The planes as (images, tile rows, 6, values): the six values of each column one below the other."""
        plane, pixel, item = planes.strides
        row = self.padded_width * pixel
        return as_strided(planes, (self.images, self.tile_rows, 6, values), (self.tile_rows * row, row, plane, item))


def filters_shape(c_in: int, c_out: int) -> tuple[int, ...]:
    """The transformed filters: (6, taps along the row, C_in, C_out)."""
    return 6, 3, c_in, c_out


def filter_transform(matrices: Matrices) -> np.ndarray:
    """What turns a weight laid out as (3, 3 * C_in * C_out) into the transformed filters (6, 3 * C_in * C_out): G."""
    return matrices.filters
