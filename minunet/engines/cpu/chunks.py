"""How a stage's work is cut up: into chunks that fit into the cache, and those shared out among the processes.

A chunk is a few rows of one image or, where images are small, several whole images. Chunks are numbered through the
batch; each process takes a run of them, so that its rows lie side by side.
"""

from collections.abc import Iterator
from typing import NamedTuple

#: OpenBLAS multiplies matrices with M * N * K up to a million without packing them first, at up to twice the speed.
SMALL = 1_000_000
VECTOR = 16  # of channels, blocks have a multiple: a cache line of float32


class Chunk(NamedTuple):
    """Rows ``first_row`` to ``first_row + rows`` of ``images`` images from ``first_image`` on."""

    number: int
    first_image: int
    images: int
    first_row: int
    rows: int


def share(total: int, rank: int, size: int) -> range:
    """The part of 0, 1, ..., total - 1 that falls to process ``rank`` of ``size``.

    >>> [list(share(5, rank, 2)) for rank in (0, 1)]
    [[0, 1], [2, 3, 4]]
    """
    return range(total * rank // size, total * (rank + 1) // size)


class Cut:
    """Images of ``height`` rows cut into chunks of ``rows`` rows, or of ``images`` images where rows >= height."""

    def __init__(self, height: int, rows: int, images: int) -> None:
        self.height, self.rows, self.images = height, rows, images
        self.bands = -(-height // rows)

    def count(self, batch: int) -> int:
        """How many chunks a batch has."""
        return -(-batch // self.images) * self.bands

    def chunks(self, batch: int, rank: int, size: int) -> Iterator[Chunk]:
        """The chunks of process ``rank``, in order."""
        for number in share(self.count(batch), rank, size):
            group, band = divmod(number, self.bands)
            first_image, first_row = group * self.images, band * self.rows
            images = min(self.images, batch - first_image)
            yield Chunk(number, first_image, images, first_row, min(self.rows, self.height - first_row))


def cut(height: int, unit_rows: int, bytes_per_unit: int, budget: int, max_batch: int, processes: int) -> Cut:
    """Chunks of a whole number of ``unit_rows`` rows, of about ``budget`` bytes, all about equally large.

    They are smaller where there would not be one for each process.

    >>> c = cut(height=16, unit_rows=4, bytes_per_unit=100, budget=250, max_batch=8, processes=2)
    >>> c.rows, c.images, c.count(8)
    (8, 1, 16)
    """
    units = -(-height // unit_rows)
    fit = max(1, min(budget // bytes_per_unit, -(-units * max_batch // processes)))
    if fit >= units:
        return Cut(height, units * unit_rows, fit // units)
    bands = -(-units // fit)
    return Cut(height, -(-units // bands) * unit_rows, 1)
