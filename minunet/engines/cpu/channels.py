"""The stages of a 3 x 3 convolution with many channels and few pixels: processes share its channels, not its pixels.

At the bottom of the U the filters, once transformed, are much larger than the images. So each process takes all tiles
of the batch, and a part of the channels: it transforms the filters of a few channels, multiplies all tiles with them
while they are in the cache, and goes on to the next few. The transformed filters never exist as a whole, and no
process transforms what another has transformed. It costs two more stages, in which the tiles are made and, backward,
given to the target.
"""

import numpy as np

from minunet.engines.cpu import tiles
from minunet.engines.cpu.bands import ActivationTarget, Band, carve, rows_of
from minunet.engines.cpu.chunks import SMALL, VECTOR, Cut, share
from minunet.engines.cpu.convolution import Sums
from minunet.engines.cpu.plan import Planes, Unit
from minunet.engines.cpu.work import Work


def blocks(channels: int, others: int, work: Work) -> list[slice]:
    """The channels of this process, in blocks of 32, or of 16 where ``others``, on the other side, are very many."""
    width = 2 * VECTOR if SMALL // (2 * VECTOR * others) >= 2 * VECTOR - 2 else VECTOR
    mine = share(-(-channels // VECTOR), work.member.rank, work.member.size)
    last = min(mine.stop * VECTOR, channels)
    return [slice(first, min(first + width, last)) for first in range(mine.start * VECTOR, last, width)]


def widest(parts: list[slice]) -> int:
    """The channels of the widest block; a process may have none."""
    return max((part.stop - part.start for part in parts), default=0)


def parts(total: int, one: int) -> list[slice]:
    """0 to ``total`` in equal parts, so that a product of which each costs ``one`` stays within :data:`SMALL`.

    >>> parts(100, 25_000)
    [slice(0, 33, None), slice(33, 66, None), slice(66, 100, None)]
    """
    count = -(-total * one // SMALL)
    return [slice(total * k // count, total * (k + 1) // count) for k in range(count)]


class _Images:
    """What the stages share: whole images as chunks, and the calls for one."""

    def __init__(self, unit: Unit, work: Work) -> None:
        self.unit, self.work = unit, work
        self.tile_rows = -(-unit.height // 4)
        self.pieces = Cut(unit.height, 4 * self.tile_rows, 1)
        self.calls = tiles.Tiles(work.matrices, 1, self.tile_rows, unit.width)
        self.calls.take_room(work.scratch, unit.c_in, unit.c_out)
        self.transform = tiles.filter_transform(work.matrices)

    def take_band(self, channels: int) -> np.ndarray:
        """Scratch memory for the rows of an image and their border."""
        return self.work.take(1, 4 * self.tile_rows + 2, self.unit.width, channels)

    def of_batch(self, planes: Planes) -> np.ndarray:
        """The shared planes of the tiles that the whole batch has."""
        return self.work.arrays[planes][:, : self.work.whole_batch * self.calls.tiles]

    def places(self, planes: Planes) -> list[np.ndarray]:
        """The place of each image of the largest batch in the shared planes."""
        return [self.calls.chunk(self.work.arrays[planes], image) for image in range(self.work.plan.max_batch)]

    def write(self, sums: np.ndarray, room: np.ndarray, factor: np.ndarray, out: np.ndarray) -> None:
        """out (N, H, W, a block of channels), strided <- the transformed ``sums`` (36, P, block), times ``factor``."""
        height, width, channels = out.shape[1:]
        rows = carve(room, (1, self.tile_rows, 4, width * channels))
        for image in range(self.work.whole_batch):
            self.calls.output_transform(self.calls.chunk(sums, image))(rows)
            np.multiply(rows.reshape(4 * self.tile_rows, width, channels)[:height], factor, out=out[image])


class IntoPlanes(_Images):
    """The tiles of what the source gives, image by image, into the shared planes."""

    def __init__(self, unit: Unit, work: Work) -> None:
        super().__init__(unit, work)
        band = self.take_band(unit.c_in)
        self.band = Band(band, unit.height, work.source(unit, band.size // unit.c_in))
        self.into_planes = [self.calls.input_transform(band, place) for place in self.places(unit.input_planes)]

    def run(self) -> None:
        self.band.prepare()
        self.calls.clear_room()
        scale = self.work.input_scale(self.unit)
        for chunk in self.work.chunks(self.pieces):
            values = self.band.load(chunk)
            values *= scale
            self.into_planes[self.work.first + chunk.first_image]()


class ChannelsForward(_Images):
    """all_z <- the products of all tiles with the filters of this process's channels."""

    def __init__(self, unit: Unit, work: Work) -> None:
        super().__init__(unit, work)
        self.blocks = blocks(unit.c_out, unit.c_in, work)
        width = widest(self.blocks)
        self.filters = work.take(36 * (unit.c_in * width + VECTOR))
        self.products = work.take(36 * work.plan.max_batch * self.calls.tiles * width)
        self.room = work.take(16 * self.calls.tiles * width)

    def run(self) -> None:
        unit, work = self.unit, self.work
        weight = work.weights[f"{unit.conv}.weight"].reshape(9, unit.c_in, unit.c_out)
        z = work.arrays[unit.all_z][: work.whole_batch]
        planes, sign = self.of_batch(unit.input_planes), work.norms[unit].sign
        for block in self.blocks:
            channels = block.stop - block.start
            # A cache line between the 36 positions: a power of two apart, all would claim the same places of the cache.
            filters = carve(self.filters, (36, unit.c_in * channels + VECTOR))[:, :-VECTOR]
            filters = filters.reshape(36, unit.c_in, channels)
            np.matmul(self.transform, weight[:, :, block].swapaxes(0, 1), out=filters.swapaxes(0, 1))
            products = carve(self.products, (36, planes.shape[1], channels))
            for part in parts(planes.shape[1], unit.c_in * channels):
                np.matmul(planes[:, part], filters, out=products[:, part])
            self.write(products, self.room, sign[block], z[..., block])


class Collect:
    """z <- this process's images of all_z; and their sums, in training."""

    def __init__(self, unit: Unit, work: Work) -> None:
        self.work = work
        self.pieces = Cut(unit.height, unit.height, 1)
        self.all_z, self.z = work.arrays[unit.all_z], work.arrays[unit.z]
        self.sums = Sums(unit, work, unit.height * unit.width)

    def run(self) -> None:
        self.sums.prepare()
        for chunk in self.work.chunks(self.pieces):
            z = self.z[rows_of(chunk)]
            z[...] = self.all_z[self.work.in_whole(chunk)]
            if self.work.training:
                self.sums.add(z)


class PlanesBackward(_Images):
    """The tiles of the input and of the gradient, the latter transformed for dweight and for dx."""

    def __init__(self, unit: Unit, work: Work) -> None:
        super().__init__(unit, work)
        x, dz = self.take_band(unit.c_in), self.take_band(unit.c_out)
        pixels = x.size // unit.c_in
        self.x = Band(x, unit.height, work.source(unit, pixels))
        self.dz = Band(dz, unit.height, work.gradient(unit, pixels))
        calls = self.calls
        self.x_into_planes = [calls.input_transform(x, place) for place in self.places(unit.input_planes)]
        self.dz_into_planes = [calls.gradient_transform(dz, place) for place in self.places(unit.gradient_planes)]
        self.dz_into_flipped = [calls.input_transform(dz, place) for place in self.places(unit.flipped_planes)]

    def run(self) -> None:
        self.x.prepare()
        self.dz.prepare()
        self.calls.clear_room()
        input_scale, output_scale = self.work.input_scale(self.unit), self.work.output_scale(self.unit)
        for chunk in self.work.chunks(self.pieces):
            image = self.work.first + chunk.first_image
            x = self.x.load(chunk)
            x *= input_scale
            self.x_into_planes[image]()
            dz = self.dz.load(chunk)
            dz *= output_scale
            self.dz_into_planes[image]()
            self.dz_into_flipped[image]()


class ChannelsBackward(_Images):
    """dweight and dx of this process's input channels."""

    def __init__(self, unit: Unit, work: Work) -> None:
        super().__init__(unit, work)
        self.blocks = blocks(unit.c_in, unit.c_out, work)
        width = widest(self.blocks)
        self.filters, self.exchanged = (work.take(36 * width * unit.c_out) for _ in range(2))
        self.products = work.take(36 * work.plan.max_batch * self.calls.tiles * width)
        self.room = work.take(16 * self.calls.tiles * width)
        self.turned = np.ascontiguousarray(self.transform[:, ::-1])  # for the filters turned by 180 degrees
        self.transform_t = np.ascontiguousarray(self.transform.T)

    def run(self) -> None:
        unit, work = self.unit, self.work
        weight = work.weights[f"{unit.conv}.weight"].reshape(9, -1)
        dweight = work.arrays[work.plan.grads[f"{unit.conv}.weight"]].reshape(9, -1)
        x, dz, flipped = map(self.of_batch, (unit.input_planes, unit.gradient_planes, unit.flipped_planes))
        tiles_of_batch, scale = x.shape[1], np.full(unit.c_in, work.dropout_scale(unit), work.dtype)
        for block in self.blocks:
            channels = block.stop - block.start
            columns = slice(block.start * unit.c_out, block.stop * unit.c_out)
            filters = carve(self.filters, (36, channels, unit.c_out))
            if unit.source is not None:
                np.matmul(self.turned, weight[:, columns], out=filters.reshape(36, -1))
                # Laid out anew: small products with a transposed matrix take twice the time.
                exchanged = carve(self.exchanged, (36, unit.c_out, channels))
                exchanged[...] = filters.swapaxes(1, 2)
                products = carve(self.products, (36, tiles_of_batch, channels))
                for part in parts(tiles_of_batch, unit.c_out * channels):
                    np.matmul(flipped[:, part], exchanged, out=products[:, part])
                dinput = work.arrays[unit.dinput][: work.whole_batch]
                self.write(products, self.room, scale[block], dinput[..., block])
            for part in parts(unit.c_out, tiles_of_batch * channels):
                np.matmul(x[..., block].swapaxes(1, 2), dz[..., part], out=filters[..., part])
            np.matmul(self.transform_t, filters.reshape(36, -1), out=dweight[:, columns])


class SpreadBackward:
    """The gradient of the input, image by image, to the target."""

    def __init__(self, unit: Unit, work: Work) -> None:
        self.unit, self.work = unit, work
        self.pieces = Cut(unit.height, unit.height, 1)
        pixels = unit.height * unit.width
        self.source = work.source(unit, pixels)
        self.x = work.take(1, unit.height, unit.width, unit.c_in)
        self.target = work.target(unit, pixels)

    def run(self) -> None:
        if self.target is None:
            return
        dinput = self.work.arrays[self.unit.dinput]
        self.target.prepare()
        self.source.prepare()
        for chunk in self.work.chunks(self.pieces):
            if isinstance(self.target, ActivationTarget):
                self.source(chunk.first_image, 0, self.unit.height, self.x[0])
            self.target(chunk, dinput[self.work.in_whole(chunk)], self.x)
        self.target.finish()
