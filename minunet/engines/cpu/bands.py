"""What a convolution takes up and gives back, band by band: everything that lies between two convolutions.

On the way down and up, a convolution reads the ReLU of another one's output, a pooled array, or the concatenation of
what comes up with the skip. None of these is ever stored whole: a *source* makes the rows of a band when they are
needed, in forward and again in backward. A *target* does the opposite: it takes the rows of a gradient and passes
them through the ReLU, the dropout or the split of the concatenation, to where the next stage looks for them.

A source leaves out what is a factor of a whole channel (the slope of a batch norm, the scale of dropout): the filters
of the convolution that reads it carry that factor, :meth:`minunet.engines.cpu.work.Work.input_scale`.

Specification: :func:`minunet.ops.relu_forward`, ``concat_forward``, ``dropout_forward`` and their backward, as
:mod:`minunet.network.blocks` puts them together.
"""

from math import prod
from typing import Protocol

import numpy as np

from minunet.engines.cpu.chunks import Chunk
from minunet.engines.cpu.norm import ChannelRow, ChannelSums, Norm, NormBackward, Relu, with_row


class Source(Protocol):
    """Makes the rows ``first`` to ``last`` of an image, into ``out`` (rows, W, C), contiguous."""

    def prepare(self) -> None:
        """Called once before the chunks of a stage, when the sums of the batch are known."""

    def __call__(self, image: int, first: int, last: int, out: np.ndarray) -> None: ...


class Stored:
    """An array as it is: what was pooled."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def prepare(self) -> None:
        pass

    def __call__(self, image: int, first: int, last: int, out: np.ndarray) -> None:
        out[...] = self.array[image, first:last]


class Activation:
    """The ReLU of the batch norm of ``z``, divided by the norm's slope."""

    def __init__(self, z: np.ndarray, relu: Relu) -> None:
        self.z, self.relu = z, relu

    def prepare(self) -> None:
        self.relu.prepare()

    def __call__(self, image: int, first: int, last: int, out: np.ndarray) -> None:
        self.relu(self.z[image, first:last], out)


class ScaledActivation(Activation):
    """The activation as it is, with the norm's slope."""

    def __init__(self, z: np.ndarray, relu: Relu, slope: ChannelRow) -> None:
        super().__init__(z, relu)
        self.slope = slope

    def prepare(self) -> None:
        super().prepare()
        self.slope.set(self.relu.norm.input_slope)

    def __call__(self, image: int, first: int, last: int, out: np.ndarray) -> None:
        super().__call__(image, first, last, out)
        with_row(np.multiply, out, self.slope, out)


class Concat:
    """[up, skip], the skip being an activation, times the dropout mask ``kept`` if there is one."""

    def __init__(self, up: np.ndarray, skip: Activation, kept: np.ndarray | None, room: np.ndarray) -> None:
        self.up, self.skip, self.kept, self.room = up, skip, kept, room

    def prepare(self) -> None:
        self.skip.prepare()

    def __call__(self, image: int, first: int, last: int, out: np.ndarray) -> None:
        up = self.up[image, first:last]
        skip = carve(self.room, up.shape)
        self.skip(image, first, last, skip)
        channels = up.shape[2]
        copy_pixels(up, out[..., :channels])
        copy_pixels(skip, out[..., channels:])
        if self.kept is not None:
            np.multiply(out, self.kept[image, first:last], out=out)


class Gradient:
    """The gradient of a convolution's output z, from the gradient ``g`` behind its batch norm and ReLU.

    It leaves out the norm's slope, unless ``scale`` has it.
    """

    def __init__(
        self, g: np.ndarray, z: np.ndarray, backward: NormBackward, room: np.ndarray, scale: ChannelRow | None
    ) -> None:
        self.g, self.z, self.backward, self.room, self.scale = g, z, backward, room, scale

    def prepare(self) -> None:
        self.backward.prepare()

    def __call__(self, image: int, first: int, last: int, out: np.ndarray) -> None:
        z = self.z[image, first:last]
        self.backward(self.g[image, first:last], z, carve(self.room, z.shape), out)
        if self.scale:
            with_row(np.multiply, out, self.scale, out)


class Band:
    """The rows of a chunk and one more above and below, (images, rows + 2, W, C): zeros where an image ends.

    Two neighbouring chunks share two rows: they are moved, not made again.
    """

    def __init__(self, values: np.ndarray, height: int, source: Source) -> None:
        self.values, self.height, self.source = values, height, source
        self._next: tuple[int, int] | None = None  # image and row at which a chunk would continue the last one

    def prepare(self) -> None:
        self.source.prepare()
        self.values.fill(0)
        self._next = None

    def load(self, chunk: Chunk) -> np.ndarray:
        """Fill the band. Returns the chunk's own rows, (images, rows, W, C)."""
        rows, top = self.values.shape[1], chunk.first_row - 1
        first, last = max(top, 0), min(top + rows, self.height)
        if self._next == (chunk.first_image, chunk.first_row):
            self.values[0, :2] = self.values[0, -2:]
            first = chunk.first_row + 1
        elif top < 0:
            self.values[:, 0] = 0
        if first < last:
            for image, values in enumerate(self.values[: chunk.images], start=chunk.first_image):
                self.source(image, first, last, values[first - top : last - top])
        self.values[:, last - top :] = 0
        self.values[chunk.images :] = 0
        self._next = (chunk.first_image, chunk.first_row + rows - 2) if len(self.values) == 1 else None
        return self.values[: chunk.images, 1 : 1 + chunk.rows]


class Target(Protocol):
    """Takes the gradient ``dx`` (images, rows, W, C) of a chunk whose values were ``x``. It may change dx."""

    def prepare(self) -> None: ...

    def __call__(self, chunk: Chunk, dx: np.ndarray, x: np.ndarray) -> None: ...

    def finish(self) -> None:
        """Called once behind the chunks of a stage."""


class ActivationTarget:
    """Backward through the ReLU: g <- dx where the activation was positive; and the sums that its batch norm needs."""

    def __init__(
        self,
        g: np.ndarray,
        z: np.ndarray,
        norm: Norm,
        sums: ChannelSums,
        slot: np.ndarray,
        room: np.ndarray,
        flags: np.ndarray,
    ) -> None:
        self.g, self.z, self.norm, self.sums, self.slot = g, z, norm, sums, slot
        self.room, self.flags, self.from_z = room, flags, False

    def prepare(self) -> None:
        self.slot[...] = 0
        self.from_z = bool((abs(self.norm.offset) * self.norm.inverse_std).max() > 100)

    def __call__(self, chunk: Chunk, dx: np.ndarray, x: np.ndarray) -> None:
        rows = rows_of(chunk)
        g = self.g[rows]
        positive = carve(self.flags, g.shape)
        np.greater(x, 0, out=positive)
        np.multiply(dx, positive, out=g)
        self.sums.add(g, self.slot[0])
        product = carve(self.room, g.shape)
        # Where g is not 0, x is z + offset; x is in the cache. But with a large offset its last digits are lost.
        np.multiply(g, self.z[rows] if self.from_z else x, out=product)
        self.sums.add(product, self.slot[1])

    def finish(self) -> None:
        """The sum of g * z from that of g * x. Called when all chunks are done."""
        if not self.from_z:
            self.slot[1] -= self.norm.offset * self.slot[0]


class PooledTarget:
    """Backward through the dropout behind the pool."""

    def __init__(self, dpooled: np.ndarray, kept: np.ndarray | None) -> None:
        self.dpooled, self.kept = dpooled, kept

    def prepare(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def __call__(self, chunk: Chunk, dx: np.ndarray, x: np.ndarray) -> None:
        rows = rows_of(chunk)
        if self.kept is None:
            self.dpooled[rows] = dx
        else:
            np.multiply(dx, self.kept[rows], out=self.dpooled[rows])


class ConcatTarget:
    """Backward through dropout and concatenation: the first half goes up, the second half is the skip's.

    The skip's is not yet its whole gradient: the pool's part is added by the stage ``pool_backward``, which then passes
    the sum through the ReLU.
    """

    def __init__(self, dup: np.ndarray, dskip: np.ndarray, kept: np.ndarray | None) -> None:
        self.dup, self.dskip, self.kept = dup, dskip, kept

    def prepare(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def __call__(self, chunk: Chunk, dx: np.ndarray, x: np.ndarray) -> None:
        rows, channels = rows_of(chunk), self.dup.shape[3]
        if self.kept is not None:
            np.multiply(dx, self.kept[rows], out=dx)
        copy_pixels(dx[..., :channels], self.dup[rows])
        copy_pixels(dx[..., channels:], self.dskip[rows])


def rows_of(chunk: Chunk) -> tuple[slice, slice]:
    """The index of a chunk's rows in a whole array (N, H, W, C)."""
    return (
        slice(chunk.first_image, chunk.first_image + chunk.images),
        slice(chunk.first_row, chunk.first_row + chunk.rows),
    )


def carve(room: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The beginning of ``room`` as an array of ``shape``."""
    return room.reshape(-1)[: prod(shape)].reshape(shape)


def copy_pixels(values: np.ndarray, out: np.ndarray) -> None:
    """out <- values, (..., C) with contiguous channels: a pixel's channels move as one item, in half the time."""
    np.copyto(as_pixels(out), as_pixels(values))


def as_pixels(values: np.ndarray) -> np.ndarray:
    """``values`` (..., C) with each pixel's channels as one item."""
    return values.view(np.dtype((np.void, values.shape[-1] * values.itemsize)))
