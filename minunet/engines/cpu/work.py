"""What the stages of one process have in common: arrays, norms, scratch memory, and its share of the batch."""

from collections.abc import Iterator

import numpy as np

from minunet.engines.cpu.bands import (
    Activation,
    ActivationTarget,
    Concat,
    ConcatTarget,
    Gradient,
    PooledTarget,
    ScaledActivation,
    Source,
    Stored,
    Target,
    rows_of,
)
from minunet.engines.cpu.buffers import Scratch
from minunet.engines.cpu.chunks import Chunk, Cut, cut, share
from minunet.engines.cpu.member import Member
from minunet.engines.cpu.norm import ChannelRow, ChannelSums, Norm, NormBackward, Relu
from minunet.engines.cpu.plan import Description, Unit
from minunet.engines.cpu.winograd import matrices


class Work:
    """The context in which the stages of one process are built and run.

    ``arrays`` by the names of :mod:`.plan`. If the processes share out images (``by_images``), this process has
    ``batch`` images of its own, of which the first is number ``first`` of all; otherwise all ``batch`` are everybody's,
    ``first`` is 0, and each process has a run of their rows.
    """

    def __init__(
        self,
        description: Description,
        member: Member,
        arrays: dict[str, np.ndarray],
        norms: dict[str, Norm],
        scratch: Scratch,
        *,
        training: bool,
        by_images: bool,
    ) -> None:
        self.description, self.member, self.arrays, self.norms = description, member, arrays, norms
        self.scratch, self.training, self.by_images = scratch, training, by_images
        self.dtype = description.dtype
        self.matrices = matrices(self.dtype)
        self.first = self.batch = 0
        self.whole_batch = 0  # of all processes

    def begin(self, batch: int) -> None:
        """A step with a batch of so many images."""
        mine = share(batch, self.member.rank, self.member.size) if self.by_images else range(batch)
        self.first, self.batch, self.whole_batch = mine.start, len(mine), batch

    @property
    def max_images(self) -> int:
        """The most images that the arrays of :attr:`batch` hold."""
        most = self.description.max_batch
        return -(-most // self.member.size) if self.by_images else most

    @property
    def dropout(self) -> bool:
        """Whether values are dropped."""
        return self.training and self.description.dropout > 0

    def input_scale(self, unit: Unit) -> np.ndarray:
        """What the source of ``unit``'s convolution leaves to the filters, (C_in,): slopes, and dropout's scale."""
        scale = np.ones(unit.c_in)
        if unit.source == "relu":
            scale *= self.norms[str(unit.of)].input_slope
        if unit.source == "concat":
            scale[unit.c_in // 2 :] = self.norms[self.description.skip(int(unit.of)).conv].input_slope
        if self.dropout and unit.source in ("pooled", "concat"):
            scale /= 1 - self.description.dropout
        return scale.astype(self.dtype)

    def output_scale(self, unit: Unit) -> np.ndarray:
        """What :meth:`gradient` leaves to the filters, (C_out,); and the sign with which the output is stored."""
        norm = self.norms[unit.conv]
        return (norm.slope * norm.sign).astype(self.dtype)

    def dropout_scale(self, unit: Unit) -> float:
        """The scale of the dropout in front of ``unit``'s convolution, which the gradient of its input carries too."""
        dropped = self.dropout and unit.source in ("pooled", "concat")
        return 1 / (1 - self.description.dropout) if dropped else 1.0

    def take(self, *shape: int, dtype: np.dtype | None = None) -> np.ndarray:
        """Scratch memory of the stage that is being built."""
        return self.scratch.take(shape, dtype or self.dtype)

    def chunks(self, cut: Cut) -> Iterator[Chunk]:
        """The chunks of the current batch that are this process's."""
        if self.by_images:
            return cut.chunks(self.batch, 0, 1)
        return cut.chunks(self.batch, self.member.rank, self.member.size)

    def cut(self, height: int, unit_rows: int, bytes_per_unit: int, budget: int) -> Cut:
        """Images of ``height`` rows cut into chunks: :func:`minunet.engines.cpu.chunks.cut`."""
        return cut(
            height, unit_rows, bytes_per_unit, budget, self.max_images, 1 if self.by_images else self.member.size
        )

    def in_whole(self, chunk: Chunk) -> tuple[slice, slice]:
        """The index of a chunk's rows in an array that holds the images of all processes."""
        return rows_of(chunk._replace(first_image=self.first + chunk.first_image))

    def relu(self, unit: Unit) -> Relu:
        """The batch norm and ReLU of ``unit``, in the scratch memory of the stage that is being built."""
        return Relu(self.norms[unit.conv], unit.width, unit.c_out, self.scratch)

    def activation(self, unit: Unit) -> Activation:
        """The activation of ``unit`` as a source."""
        return Activation(self.arrays[f"z:{unit.conv}"], self.relu(unit))

    def scaled_activation(self, unit: Unit) -> ScaledActivation:
        """The activation of ``unit`` with its slope, as a source."""
        slope = ChannelRow(unit.width, unit.c_out, self.scratch, self.dtype)
        return ScaledActivation(self.arrays[f"z:{unit.conv}"], self.relu(unit), slope)

    def source(self, unit: Unit, pixels: int) -> Source:
        """What the convolution of ``unit`` takes up, for bands of so many pixels."""
        arrays = self.arrays
        if unit.source == "image":
            return Images(arrays["images:"], self)
        if unit.source == "relu":
            return self.activation(self.description.units[str(unit.of)])
        if unit.source == "pooled":
            return Stored(arrays[f"pooled:{unit.of}"])
        skip = self.activation(self.description.skip(int(unit.of)))
        kept = arrays[f"kept_concat:{unit.of}"] if self.dropout else None
        return Concat(arrays[f"up:{unit.of}"], skip, kept, self.take(pixels * unit.c_in // 2))

    def gradient(self, unit: Unit, pixels: int, scale: ChannelRow | None = None) -> Gradient:
        """The gradient of the output of ``unit``'s convolution, for bands of so many pixels; and times ``scale``."""
        backward = NormBackward(self.norms[unit.conv], unit.width, unit.c_out, self.scratch)
        room = self.take(pixels * unit.c_out)
        return Gradient(self.arrays[f"g:{unit.conv}"], self.arrays[f"z:{unit.conv}"], backward, room, scale)

    def target(self, unit: Unit, pixels: int) -> Target | None:
        """Where the gradient of what ``unit``'s convolution took up goes; None for the images."""
        arrays = self.arrays
        if unit.source == "image":
            return None
        if unit.source == "relu":
            return self.activation_target(self.description.units[str(unit.of)], pixels)
        if unit.source == "pooled":
            kept = arrays[f"kept_pooled:{unit.of}"] if self.dropout else None
            return PooledTarget(arrays[f"dpooled:{unit.of}"], kept)
        kept = arrays[f"kept_concat:{unit.of}"] if self.dropout else None
        dskip = arrays[f"g:{self.description.skip(int(unit.of)).conv}"]
        return ConcatTarget(arrays[f"dup:{unit.of}"], dskip, kept)

    def activation_target(self, unit: Unit, pixels: int) -> ActivationTarget:
        """Backward through the ReLU of ``unit``, for chunks of so many pixels."""
        values = pixels * unit.c_out
        return ActivationTarget(
            self.arrays[f"g:{unit.conv}"],
            self.arrays[f"z:{unit.conv}"],
            self.norms[unit.conv],
            ChannelSums(pixels, self.dtype),
            self.slot(unit, backward=True),
            self.take(values),
            self.take(values, dtype=np.dtype(bool)),
        )

    def slot(self, unit: Unit, *, backward: bool) -> np.ndarray:
        """Where this process leaves its two sums of ``unit``'s batch norm, (2, C) float64."""
        return self.norms[unit.conv].sums[int(backward), self.member.rank]

    def partial_gradient(self, parameter: str) -> np.ndarray:
        """Where this process leaves its part of a gradient that is a sum over pixels."""
        rank = self.member.rank
        return self.arrays[f"grad{rank}:{parameter}" if rank else f"grad:{parameter}"]


class Images:
    """The images as a source: this process's part of those of all."""

    def __init__(self, images: np.ndarray, work: Work) -> None:
        self.images, self.work = images, work

    def prepare(self) -> None:
        pass

    def __call__(self, image: int, first: int, last: int, out: np.ndarray) -> None:
        out[...] = self.images[self.work.first + image, first:last]
