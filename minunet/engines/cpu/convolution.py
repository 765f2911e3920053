"""The stages of a 3 x 3 convolution whose pixels are shared out among the processes: forward, and backward in one go.

A chunk is taken up by its source, transformed, multiplied, transformed back, and its sums are taken, all within the
second-level cache. Backward does three things with a chunk while it is there: the gradient with respect to the input
(the same convolution with flipped filters), that with respect to the filters, and what the target does with the
former.
"""

from math import prod

import numpy as np

from minunet.engines.cpu import rows, tiles
from minunet.engines.cpu.bands import Band, carve, rows_of
from minunet.engines.cpu.chunks import Chunk, Cut
from minunet.engines.cpu.norm import ChannelRow, ChannelSums
from minunet.engines.cpu.plan import Unit
from minunet.engines.cpu.work import Work

#: Bytes of one chunk's planes: about what fits a second-level cache of 1 MiB. Twice that for rows: fewer calls are
#: worth more there.
ROWS_BUDGET = 2_200_000
TILES_BUDGET = (1_200_000, 3_000_000)  # at least; at most, and half of what the filters take in between
#: Bytes of the gradient of the transformed filters that are made at a time.
FILTERS_BUDGET = 5_000_000
#: So many tiles are collected before the gradient of the filters is multiplied out: adding to it costs as much as 20.
TILES_TOGETHER = 150


def chunking(unit: Unit, work: Work) -> tuple[Cut, rows.Rows | tiles.Tiles]:
    """How the images of ``unit`` are cut up, and the calls for one chunk."""
    item, channels = work.dtype.itemsize, unit.c_in + unit.c_out
    if unit.method == "rows":
        tile_row, budget = 8 * unit.width * channels * item, ROWS_BUDGET
    else:
        tile_row = 36 * -(-unit.width // 4) * channels * item
        least, most = TILES_BUDGET
        budget = min(max(least, 36 * unit.c_in * unit.c_out * item // 2), most)
    pieces = work.cut(unit.height, 4, tile_row, budget)
    kind = rows.Rows if unit.method == "rows" else tiles.Tiles
    return pieces, kind(work.matrices, pieces.images, pieces.rows // 4, unit.width)


class Sums:
    """The sums of z and z^2 over the pixels, for the batch norm behind a convolution."""

    def __init__(self, unit: Unit, work: Work, pixels: int) -> None:
        self.slot = work.slot(unit, backward=False)
        self.sums = ChannelSums(pixels, work.dtype)
        self.room = work.take(pixels * unit.c_out)

    def prepare(self) -> None:
        self.slot[...] = 0

    def add(self, z: np.ndarray) -> None:
        self.sums.add(z, self.slot[0])
        squares = carve(self.room, z.shape)
        np.multiply(z, z, out=squares)
        self.sums.add(squares, self.slot[1])


class Output:
    """Where a chunk's output rows go: into ``array``; by way of ``room`` where its tiles do not end with the image."""

    def __init__(self, array: np.ndarray | None, pieces: Cut, width: int, channels: int, room: np.ndarray) -> None:
        self.array, self.pieces = array, pieces
        self.room = room.reshape(pieces.images, pieces.rows // 4, 4, width * channels)
        self.shape = (width, channels)

    def place(self, chunk: Chunk) -> np.ndarray:
        """(images, tile rows, 4, W * C) to write into."""
        if self.array is None or chunk.rows != self.pieces.rows:
            return self.room[: chunk.images]
        return self.array[rows_of(chunk)].reshape(chunk.images, *self.room.shape[1:])

    def rows(self, chunk: Chunk) -> np.ndarray:
        """The rows (images, rows, W, C) that were written, where they belong."""
        written = self.room[: chunk.images].reshape(chunk.images, self.pieces.rows, *self.shape)[:, : chunk.rows]
        if self.array is None:
            return written
        out = self.array[rows_of(chunk)]
        if chunk.rows != self.pieces.rows:
            out[...] = written
        return out


def scaled(filters: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """out <- the transformed filters (..., C, C'), each input channel times its ``scale`` (C,)."""
    np.multiply(filters, scale[:, None], out=out)


class ConvForward:
    """z <- the convolution of what the source gives; and its sums, in training."""

    def __init__(self, unit: Unit, work: Work) -> None:
        self.unit, self.work = unit, work
        self.pieces, self.calls = chunking(unit, work)
        calls = self.calls
        band = work.take(self.pieces.images, self.pieces.rows + 2, unit.width, unit.c_in)
        pixels = band.size // unit.c_in
        self.band = Band(band, unit.height, work.source(unit, pixels))
        calls.take_room(work.scratch, unit.c_in, unit.c_out)
        self.planes, sums = work.take(*calls.planes_shape(unit.c_in)), work.take(*calls.planes_shape(unit.c_out))
        self.shared_filters = work.arrays[unit.filters]
        # In a prediction they carry the source's scale already.
        self.filters = work.take(*self.shared_filters.shape) if work.training else self.shared_filters
        self.into_planes = calls.input_transform(band, self.planes)
        self.multiply = calls.products(self.planes, self.filters, sums)
        self.out_of_planes = calls.output_transform(sums)
        room = work.take(self.pieces.images * self.pieces.rows * unit.width * unit.c_out)
        self.output = Output(work.arrays[unit.z], self.pieces, unit.width, unit.c_out, room)
        self.sums = Sums(unit, work, pixels)

    def run(self) -> None:
        self.band.prepare()
        self.planes.fill(0)
        self.calls.clear_room()
        self.sums.prepare()
        if self.work.training:
            scaled(self.shared_filters, self.work.input_scale(self.unit), self.filters)
        for chunk in self.work.chunks(self.pieces):
            self.band.load(chunk)
            self.into_planes()
            self.multiply()
            self.out_of_planes(self.output.place(chunk))
            z = self.output.rows(chunk)
            if self.work.training:
                self.sums.add(z)


class ConvBackward:
    """dweight, and the gradient of the input for the target."""

    def __init__(self, unit: Unit, work: Work) -> None:
        self.unit, self.work = unit, work
        self.pieces, self.calls = chunking(unit, work)
        calls = self.calls
        calls.take_room(work.scratch, unit.c_in, unit.c_out)
        together = -(-TILES_TOGETHER // calls.tiles) if isinstance(calls, tiles.Tiles) else 1
        shape = (self.pieces.images, self.pieces.rows + 2, unit.width)
        x, dz = work.take(*shape, unit.c_in), work.take(*shape, unit.c_out)
        pixels = x.size // unit.c_in
        # The scale that the gradient leaves out goes where there are fewer values: to the filters, or to the gradient.
        few_pixels = work.max_images * unit.height * unit.width < 36 * unit.c_in
        gradient_is_less = few_pixels and unit.method == "tiles" and unit.source is not None
        self.scale = ChannelRow(unit.width, unit.c_out, work.scratch, work.dtype) if gradient_is_less else None
        self.dz = Band(dz, unit.height, work.gradient(unit, pixels, self.scale))
        self.x = Band(x, unit.height, work.source(unit, pixels))
        self.x_planes = work.take(*calls.planes_shape(unit.c_in, together))
        self.dz_planes = work.take(*calls.planes_shape(unit.c_out, together))
        self.places = [calls.chunk(self.dz_planes, number) for number in range(together)]
        self.dz_into_planes = [calls.gradient_transform(dz, place) for place in self.places]
        x_places = [calls.chunk(self.x_planes, number) for number in range(together)]
        self.x_into_planes = [calls.input_transform(x, place) for place in x_places]
        method = rows if unit.method == "rows" else tiles
        # The gradient of the filters, a block of input channels at a time.
        fit = max(1, FILTERS_BUDGET // (36 * unit.c_out * work.dtype.itemsize))
        self.blocks = [slice(first, min(first + fit, unit.c_in)) for first in range(0, unit.c_in, fit)]
        self.transform_t = np.ascontiguousarray(method.filter_transform(work.matrices).T)
        widest = min(fit, unit.c_in)
        self.dfilters = work.take(prod(method.filters_shape(widest, unit.c_out)))
        self.part = work.take(9 * widest * unit.c_out)
        self.dweight = work.partial_gradient(f"{unit.conv}.weight")
        self.multiply_filters = []
        for block in self.blocks:
            dfilters = carve(self.dfilters, method.filters_shape(block.stop - block.start, unit.c_out))
            self.multiply_filters.append(calls.filter_gradient(self.x_planes[..., block], self.dz_planes, dfilters))
        self.target = work.target(unit, pixels)
        if self.target is not None:
            self.flipped_planes, sums = (work.take(*calls.planes_shape(c)) for c in (unit.c_out, unit.c_in))
            self.shared_filters = work.arrays[unit.flipped]
            self.filters = self.shared_filters if self.scale else work.take(*self.shared_filters.shape)
            self.into_planes = calls.input_transform(dz, self.flipped_planes)
            self.multiply = calls.products(self.flipped_planes, self.filters, sums)
            self.out_of_planes = calls.output_transform(sums)
            room = work.take(self.pieces.images * self.pieces.rows * unit.width * unit.c_in)
            self.output = Output(None, self.pieces, unit.width, unit.c_in, room)

    def run(self) -> None:
        for band in (self.dz, self.x):
            band.prepare()
        for array in (self.x_planes, self.dz_planes, self.dweight):
            array.fill(0)
        self.calls.clear_room()
        if self.target is not None:
            self.target.prepare()
            self.flipped_planes.fill(0)
            scale = self.work.output_scale(self.unit) * self.work.dtype.type(self.work.dropout_scale(self.unit))
            if self.scale:
                self.scale.set(scale)
            else:
                scaled(self.shared_filters, scale, self.filters)
        waiting = 0
        for chunk in self.work.chunks(self.pieces):
            self.dz.load(chunk)
            if self.target is not None:
                self.into_planes()
                self.multiply()
                self.out_of_planes(self.output.place(chunk))
            self.dz_into_planes[waiting]()
            x = self.x.load(chunk)
            self.x_into_planes[waiting]()
            waiting = (waiting + 1) % len(self.places)
            if waiting == 0:
                self._add_filters()
            if self.target is not None:
                self.target(chunk, self.output.rows(chunk), x)
        if waiting:
            for place in self.places[waiting:]:
                place.fill(0)
            self._add_filters()
        if self.target is not None:
            self.target.finish()
        self._store_filters()

    def _add_filters(self) -> None:
        """Add what the collected chunks give to the gradient of the weight: the filters' transform, transposed."""
        taps, transformed = self.transform_t.shape
        for block, multiply in zip(self.blocks, self.multiply_filters, strict=True):
            multiply()
            dweight = self.dweight[:, :, block]
            dfilters = carve(self.dfilters, (transformed, dweight.size // taps))
            part = carve(self.part, (taps, dfilters.shape[1]))
            np.matmul(self.transform_t, dfilters, out=part)
            np.add(dweight, part.reshape(dweight.shape), out=dweight)

    def _store_filters(self) -> None:
        """The gradient of the weight, with the factors that source and gradient left out."""
        self.dweight *= self.work.input_scale(self.unit)[:, None]
        if self.scale:
            self.dweight *= 1 / self.work.dropout_scale(self.unit)
        else:
            self.dweight *= self.work.output_scale(self.unit)
