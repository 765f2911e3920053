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
from minunet.engines.cpu.plan import Buffer, Plan, Pool, Unit, Up
from minunet.engines.cpu.winograd import matrices


class Work:
    """The context in which the stages of one process are built and run.

    ``arrays`` by the buffers of the plan, ``weights`` (the network's arrays) by their names. If the processes share out
    images (``by_images``), this process has ``batch`` images of its own, of which the first is number ``first`` of all;
    otherwise all ``batch`` are everybody's, ``first`` is 0, and each process has a run of their rows.
    """

    def __init__(
        self,
        plan: Plan,
        member: Member,
        arrays: dict[Buffer, np.ndarray],
        weights: dict[str, np.ndarray],
        norms: dict[Unit, Norm],
        scratch: Scratch,
        *,
        training: bool,
        by_images: bool,
    ) -> None:
        self.plan, self.member, self.arrays, self.weights, self.norms = plan, member, arrays, weights, norms
        self.scratch, self.training, self.by_images = scratch, training, by_images
        self.dtype = plan.dtype
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
        most = self.plan.max_batch
        return -(-most // self.member.size) if self.by_images else most

    @property
    def dropout(self) -> bool:
        """Whether values are dropped."""
        return self.training and self.plan.dropout > 0

    def input_scale(self, unit: Unit) -> np.ndarray:
        """What the source of ``unit``'s convolution leaves to the filters, (C_in,): slopes, and dropout's scale."""
        scale = np.ones(unit.c_in)
        match unit.source:
            case Unit() as other:
                scale *= self.norms[other].input_slope
            case Up() as up:
                scale[unit.c_in // 2 :] = self.norms[up.skip].input_slope
        if self._is_dropped(unit):
            scale /= 1 - self.plan.dropout
        return scale.astype(self.dtype)

    def _is_dropped(self, unit: Unit) -> bool:
        """Whether there is a dropout in front of ``unit``'s convolution."""
        return self.dropout and isinstance(unit.source, Pool | Up)

    def output_scale(self, unit: Unit) -> np.ndarray:
        """What :meth:`gradient` leaves to the filters, (C_out,); and the sign with which the output is stored."""
        norm = self.norms[unit]
        return (norm.slope * norm.sign).astype(self.dtype)

    def dropout_scale(self, unit: Unit) -> float:
        """The scale of the dropout in front of ``unit``'s convolution, which the gradient of its input carries too."""
        return 1 / (1 - self.plan.dropout) if self._is_dropped(unit) else 1.0

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
        return Relu(self.norms[unit], unit.width, unit.c_out, self.scratch)

    def activation(self, unit: Unit) -> Activation:
        """The activation of ``unit`` as a source."""
        return Activation(self.arrays[unit.z], self.relu(unit))

    def scaled_activation(self, unit: Unit) -> ScaledActivation:
        """The activation of ``unit`` with its slope, as a source."""
        slope = ChannelRow(unit.width, unit.c_out, self.scratch, self.dtype)
        return ScaledActivation(self.arrays[unit.z], self.relu(unit), slope)

    def source(self, unit: Unit, pixels: int) -> Source:
        """What the convolution of ``unit`` takes up, for bands of so many pixels."""
        arrays = self.arrays
        match unit.source:
            case Unit() as other:
                return self.activation(other)
            case Pool() as pool:
                return Stored(arrays[pool.pooled])
            case Up() as up:
                kept = arrays[up.kept] if self.dropout else None
                return Concat(arrays[up.up], self.activation(up.skip), kept, self.take(pixels * unit.c_in // 2))
        return Images(arrays[self.plan.images], self)

    def gradient(self, unit: Unit, pixels: int, scale: ChannelRow | None = None) -> Gradient:
        """The gradient of the output of ``unit``'s convolution, for bands of so many pixels; and times ``scale``."""
        backward = NormBackward(self.norms[unit], unit.width, unit.c_out, self.scratch)
        room = self.take(pixels * unit.c_out)
        return Gradient(self.arrays[unit.g], self.arrays[unit.z], backward, room, scale)

    def target(self, unit: Unit, pixels: int) -> Target | None:
        """Where the gradient of what ``unit``'s convolution took up goes; None for the images."""
        arrays = self.arrays
        match unit.source:
            case Unit() as other:
                return self.activation_target(other, pixels)
            case Pool() as pool:
                return PooledTarget(arrays[pool.dpooled], arrays[pool.kept] if self.dropout else None)
            case Up() as up:
                return ConcatTarget(arrays[up.dup], arrays[up.skip.g], arrays[up.kept] if self.dropout else None)
        return None

    def activation_target(self, unit: Unit, pixels: int) -> ActivationTarget:
        """Backward through the ReLU of ``unit``, for chunks of so many pixels."""
        values = pixels * unit.c_out
        return ActivationTarget(
            self.arrays[unit.g],
            self.arrays[unit.z],
            self.norms[unit],
            ChannelSums(pixels, self.dtype),
            self.slot(unit, backward=True),
            self.take(values),
            self.take(values, dtype=np.dtype(bool)),
        )

    def slot(self, unit: Unit, *, backward: bool) -> np.ndarray:
        """Where this process leaves its two sums of ``unit``'s batch norm, (2, C) float64."""
        return self.norms[unit].sums[int(backward), self.member.rank]

    def partial_gradient(self, parameter: str) -> np.ndarray:
        """Where this process leaves its part of a gradient that is a sum over pixels."""
        return self.arrays[self.plan.partial_grads[self.member.rank][parameter]]


class Images:
    """The images as a source: this process's part of those of all."""

    def __init__(self, images: np.ndarray, work: Work) -> None:
        self.images, self.work = images, work

    def prepare(self) -> None:
        pass

    def __call__(self, image: int, first: int, last: int, out: np.ndarray) -> None:
        out[...] = self.images[self.work.first + image, first:last]
