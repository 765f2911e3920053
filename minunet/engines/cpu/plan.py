"""What the engine will do, stage by stage, and where every array lies: worked out once, before the first step.

A stage is a piece of work after which all processes wait for each other, because the next one needs what all of them
made: the sums of a batch norm, or the rows beyond its own. The plan lists the stages of a training step and of a
prediction, with the buffers that each of them touches. A buffer lives from the first stage that names it to the last;
:func:`minunet.engines.cpu.buffers.pack` gives those that never meet the same memory.

Every process computes the same plan from the same arguments, so that only small commands have to be sent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np

from minunet.engines.cpu import rows, taps, tiles
from minunet.engines.cpu.adamw import count_of_blocks
from minunet.engines.cpu.buffers import Lifetime, aligned, pack
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import Part, topology

TILE_CHANNELS = 32  # from so many channels on, on both sides, tiles beat rows

# ---------------------------------------------------------------------------------------------------------------------
# Buffers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Buffer:
    """An array of the plan, there from the first step to the last. It is its own key: no two buffers are equal."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(eq=False)
class ImageBuffer(Buffer):
    """Something of each image, (N, *shape), from one stage to another."""

    whole: bool = False  # all processes need that of all images; else it is cut up by image, or by row

    def for_images(self, count: int) -> tuple[int, ...]:
        """The shape for so many images."""
        return count, *self.shape


@dataclass(eq=False)
class Planes(ImageBuffer):
    """The transformed tiles of images, (36, N * tiles, C); ``shape`` is (tiles, C)."""

    def for_images(self, count: int) -> tuple[int, ...]:
        tiles_of_image, channels = self.shape
        return 36, count * tiles_of_image, channels


class Place(NamedTuple):
    """Where a buffer lies: the bytes before it, and what lies there."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


Places = dict[Buffer, Place]

# ---------------------------------------------------------------------------------------------------------------------
# The network, as the engine sees it
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Unit:
    """A 3 x 3 convolution, the batch norm behind it and the ReLU behind that."""

    conv: str  # its name in the network: "down1.conv1"
    norm: str
    eps: float  # of the norm
    height: int
    width: int
    c_in: int
    c_out: int
    source: "Unit | Pool | Up | None"  # what it convolves: the ReLU of another unit, ...; None: the images
    method: Literal["rows", "tiles", "channels"]
    z: ImageBuffer  # what the convolution gives
    g: ImageBuffer  # the gradient behind the ReLU
    sums: Buffer  # (2, processes, 2, C_out): of z and z^2 forward, of g and g z backward; a slot for each process
    # By method "rows" or "tiles": the transformed filters, and in the same place those of the backward pass.
    filters: Buffer
    flipped: Buffer
    # By method "channels": the tiles of the input, and of the gradient for dweight and for dx; z and dx of all images.
    input_planes: Planes
    gradient_planes: Planes
    flipped_planes: Planes
    all_z: ImageBuffer
    dinput: ImageBuffer


@dataclass(eq=False)
class Pool:
    """Max-pooling of a skip to half the size, and the dropout behind it."""

    skip: Unit  # whose ReLU is pooled
    pooled: ImageBuffer
    dpooled: ImageBuffer
    kept: ImageBuffer  # the dropout masks, one byte a value


@dataclass(eq=False)
class Up:
    """A transposed convolution, its result joined with a skip, and the dropout behind that."""

    conv: str  # its name in the network: "up1.up"
    below: Unit  # whose ReLU it takes up
    skip: Unit
    channels: int
    taps: Buffer  # its weight, laid out by :mod:`.taps`
    up: ImageBuffer
    dup: ImageBuffer
    kept: ImageBuffer


class Stage(NamedTuple):
    """One stage of the plan: its kind, what it works on, and the buffers that it reads or writes."""

    kind: str  # a key of program.STAGES
    what: Unit | Pool | Up | None
    buffers: tuple[ImageBuffer, ...]


class Memory(NamedTuple):
    """Where the image buffers of a training step, or of a prediction, lie.

    In memory that all processes share: :attr:`whole`, and :attr:`by_rows`, if the processes share out rows. If they
    share out images, each has those that are not whole for its own images in memory of its own: :attr:`by_images`.
    """

    whole: Places
    by_rows: Places
    by_images: Places


class Plan:
    """Everything that follows from the network, the loss, the largest batch and the number of processes.

    ``config`` is :attr:`minunet.network.unet.UNet.config`; ``loss`` is None if it is not one that the stages of
    :mod:`.loss` compute; ``parameters`` and ``buffers`` are the shapes of the
    network's arrays by name, ``eps`` those of its batch norms.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        parameters: Mapping[str, Iterable[int]],
        buffers: Mapping[str, Iterable[int]],
        eps: Mapping[str, float],
        loss: SegmentationLoss | None,
        max_batch: int,
        image_size: tuple[int, int],
        processes: int,
    ) -> None:
        self.dtype, self.loss, self.eps = np.dtype(config["dtype"]), loss, eps
        self.in_channels, self.out_channels = config["in_channels"], config["out_channels"]
        self.dropout, self.up_kernel, self.head_kernel = config["dropout"], config["up_kernel"], config["head_kernel"]
        self.max_batch, (self.height, self.width), self.processes = max_batch, image_size, processes
        self.parameters = {name: tuple(shape) for name, shape in parameters.items()}
        self.images, self.logits, self.target, self.dlogits = (
            ImageBuffer((self.height, self.width, channels), self.dtype, whole=True)
            for channels in (self.in_channels, *3 * (self.out_channels,))
        )
        self.units: list[Unit] = []
        self.pools: list[Pool] = []  # from the top
        self.ups: list[Up] = []  # from the bottom
        for part in topology(self.in_channels, self.out_channels, config["widths"]):
            self._add(part)
        self._place_permanent({name: tuple(shape) for name, shape in buffers.items()})
        self.training_memory = self._memory(self.training_stages())
        self.inference_memory = self._memory(self.forward_stages())

    # --- The units and levels --------------------------------------------------------------------------------------

    def _add(self, part: Part) -> None:
        """Add what there is of a part of the U: two units, and how they are joined to the others."""
        if part.kind == "head":
            return
        source: Pool | Up | None = self.pools[-1] if self.pools else None
        channels = part.in_channels
        if part.kind == "up":
            source, channels = self._up(part), 2 * part.out_channels
            self.ups.append(source)
        first = self._unit(part, 1, channels, source)
        second = self._unit(part, 2, part.out_channels, first)
        self.units += [first, second]
        if part.kind == "down":
            self.pools.append(self._pool(second))

    def _size(self, part: Part) -> tuple[int, int]:
        """Height and width at the level of a part."""
        return self.height >> (part.level - 1), self.width >> (part.level - 1)

    def _unit(self, part: Part, number: int, c_in: int, source: Unit | Pool | Up | None) -> Unit:
        """The first or the second unit of the double convolution ``part``, fed by ``source`` (None: the images)."""
        (height, width), c_out, norm = self._size(part), part.out_channels, f"{part.name}.norm{number}"
        tiles_of_image = -(-height // 4) * -(-width // 4)
        method = convolution_method(c_in, c_out, self.max_batch * tiles_of_image)
        filters_shape = rows.filters_shape if method == "rows" else tiles.filters_shape

        def image(channels: int, whole: bool = False) -> ImageBuffer:
            return ImageBuffer((height, width, channels), self.dtype, whole)

        def planes(channels: int) -> Planes:
            return Planes((tiles_of_image, channels), self.dtype, whole=True)

        return Unit(
            conv=f"{part.name}.conv{number}",
            norm=norm,
            eps=self.eps[norm],
            height=height,
            width=width,
            c_in=c_in,
            c_out=c_out,
            source=source,
            method=method,
            z=image(c_out),
            g=image(c_out),
            sums=Buffer((2, self.processes, 2, c_out), np.dtype(np.float64)),
            filters=Buffer(filters_shape(c_in, c_out), self.dtype),
            flipped=Buffer(filters_shape(c_out, c_in), self.dtype),
            input_planes=planes(c_in),
            gradient_planes=planes(c_out),
            flipped_planes=planes(c_out),
            all_z=image(c_out, whole=True),
            dinput=image(c_in, whole=True),
        )

    def _pool(self, skip: Unit) -> Pool:
        """The max-pool behind ``skip``, the last unit of a level on the way down."""
        shape = skip.height // 2, skip.width // 2, skip.c_out
        pooled, dpooled = (ImageBuffer(shape, self.dtype) for _ in range(2))
        return Pool(skip, pooled, dpooled, ImageBuffer(shape, np.dtype(bool)))

    def _up(self, part: Part) -> Up:
        """The transposed convolution of ``part``, from the last unit so far; its output joins the skip of its level."""
        below, skip = self.units[-1], self.pools[part.level - 1].skip
        (height, width), channels = self._size(part), part.out_channels
        stacks = Buffer((taps.count(self.up_kernel), below.c_out, channels), self.dtype)
        up, dup = (ImageBuffer((height, width, channels), self.dtype) for _ in range(2))
        kept = ImageBuffer((height, width, 2 * channels), np.dtype(bool))
        return Up(f"{part.name}.up", below, skip, channels, stacks, up, dup, kept)

    # --- The stages ------------------------------------------------------------------------------------------------

    def _kept(self, mask: ImageBuffer, training: bool = True) -> tuple[ImageBuffer, ...]:
        """The dropout mask, if there is one."""
        return (mask,) if training and self.dropout else ()

    def source_buffers(self, unit: Unit, training: bool) -> tuple[ImageBuffer, ...]:
        """What the convolution of ``unit`` reads."""
        match unit.source:
            case Unit() as other:
                return (other.z,)
            case Pool() as pool:
                return (pool.pooled,)
            case Up() as up:
                return (up.up, up.skip.z, *self._kept(up.kept, training))
        return (self.images,)

    def target_buffers(self, unit: Unit) -> tuple[ImageBuffer, ...]:
        """What the backward pass of ``unit`` writes, and reads in order to write it."""
        match unit.source:
            case Unit() as other:
                return (other.g, other.z)
            case Pool() as pool:
                return (pool.dpooled, *self._kept(pool.kept))
            case Up() as up:
                return (up.dup, up.skip.g, *self._kept(up.kept))
        return ()

    def forward_stages(self, training: bool = False) -> list[Stage]:
        """From the images to the logits."""
        stages = [Stage("filters", None, ())]
        if training and self.dropout:
            dropped: list[Pool | Up] = [*self.pools, *self.ups]
            masks = tuple(each.kept for each in dropped)
            stages = [Stage("filters_and_masks", None, masks)]
        for unit in self.units:
            match unit.source:
                case Pool() as pool:
                    stages.append(Stage("pool", pool, (pool.skip.z, pool.pooled, *self._kept(pool.kept, training))))
                case Up() as up:
                    stages.append(Stage("up", up, (up.below.z, up.up)))
            source = self.source_buffers(unit, training)
            if unit.method == "channels":
                stages.append(Stage("conv_planes", unit, (*source, unit.input_planes)))
                stages.append(Stage("conv_channels", unit, (unit.input_planes, unit.all_z)))
                stages.append(Stage("conv_collect", unit, (unit.all_z, unit.z)))
            else:
                stages.append(Stage("conv", unit, (*source, unit.z)))
        return [*stages, Stage("head", None, (self.units[-1].z, self.logits))]

    def backward_stages(self) -> list[Stage]:
        """From the logits to the gradients: the mirror image."""
        last = self.units[-1]
        used = self.logits, self.target, self.dlogits
        stages = [
            *(
                [Stage("any_loss", None, (self.logits, self.dlogits))]
                if self.loss is None
                else [Stage("loss_sums", None, used), Stage("loss_gradient", None, used[1:])]
            ),
            Stage("head_backward", None, (self.dlogits, last.z, last.g)),
        ]
        for unit in reversed(self.units):
            buffers = (unit.g, unit.z, *self.source_buffers(unit, training=True), *self.target_buffers(unit))
            if unit.method == "channels":
                planes = (unit.input_planes, unit.gradient_planes, unit.flipped_planes)
                stages.append(Stage("conv_planes_backward", unit, (*buffers, *planes)))
                stages.append(Stage("conv_channels_backward", unit, (*buffers, *planes, unit.dinput)))
                stages.append(Stage("conv_spread_backward", unit, (*buffers, unit.dinput)))
            else:
                stages.append(Stage("conv_backward", unit, buffers))
            match unit.source:
                case Up() as up:
                    stages.append(Stage("up_backward", up, (up.dup, up.below.z, up.below.g)))
                case Pool() as pool:
                    stages.append(Stage("pool_backward", pool, (pool.dpooled, pool.skip.z, pool.skip.g)))
        return [*stages, Stage("gradients", None, ())]

    def training_stages(self) -> list[Stage]:
        """A training step."""
        return self.forward_stages(training=True) + self.backward_stages()

    def adds_up(self, parameter: str) -> bool:
        """Whether the gradient of ``parameter`` is a sum over pixels, of which each process has a part."""
        name, _, kind = parameter.rpartition(".")
        of_unit = next((unit for unit in self.units if unit.conv == name), None)
        if of_unit is not None:
            return kind == "weight" and of_unit.method != "channels"
        return name == "head" or name.endswith(".up")

    # --- The memory ------------------------------------------------------------------------------------------------

    def _place_permanent(self, buffers: dict[str, tuple[int, ...]]) -> None:
        """Places for what lasts from the first step to the last, in memory that all processes share."""
        self.permanent: Places = {}
        self.shared_bytes = self.own_bytes = 0

        def place(buffer: Buffer) -> Buffer:
            self.permanent[buffer] = Place(self.shared_bytes, buffer.shape, buffer.dtype)
            self.shared_bytes += aligned(prod(buffer.shape) * buffer.dtype.itemsize)
            return buffer

        def place_all(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Buffer]:
            return {name: place(Buffer(shape, self.dtype)) for name, shape in shapes.items()}

        # Those of the network that is trained, and those of one that predicts: it may be another, such as an average.
        self.net, self.predictor = (place_all(self.parameters | buffers) for _ in range(2))
        for unit in self.units:
            place(unit.sums)
            if unit.method != "channels":
                place(unit.filters)
                self.permanent[unit.flipped] = self.permanent[unit.filters]._replace(shape=unit.flipped.shape)
        for up in self.ups:
            place(up.taps)
        # The batch that is prepared, from slices of 8 bits a channel. It lasts until the next one.
        pixels, of_image = (self.max_batch, self.height, self.width), self.in_channels
        kinds = ((of_image, np.uint8), (1, np.uint8), (of_image, np.float32), (1, np.float32))
        self.batch = [place(Buffer((*pixels, channels), np.dtype(of))) for channels, of in kinds]
        self.loss_sums = place(Buffer((self.processes, self.max_batch, 4), np.dtype(np.float64)))
        # Of the optimiser. Memory that nobody touches, as in a prediction, is never given.
        self.grads, self.first_moment, self.second_moment = (place_all(self.parameters) for _ in range(3))
        self.squares = place(Buffer((count_of_blocks(self.parameters.values()),), np.dtype(np.float64)))
        sums = {name: shape for name, shape in self.parameters.items() if self.adds_up(name)}
        #: By process: where it leaves its part of the gradients that are sums over pixels.
        self.partial_grads = [self.grads, *(place_all(sums) for _ in range(1, self.processes))]
        self._permanent_bytes = self.shared_bytes

    def _memory(self, stages: list[Stage]) -> Memory:
        """Places for the image buffers of ``stages``."""
        whole, end = self._packed(stages, self.max_batch, self._permanent_bytes, whole=True)
        by_rows, rows_end = self._packed(stages, self.max_batch, end, whole=False)
        by_images, own_end = self._packed(stages, -(-self.max_batch // self.processes), 0, whole=False)
        self.shared_bytes = max(self.shared_bytes, rows_end if self.processes > 1 else end)
        self.own_bytes = max(self.own_bytes, own_end)
        return Memory(whole, by_rows if self.processes > 1 else {}, by_images)

    def _packed(self, stages: list[Stage], images: int, start: int, *, whole: bool) -> tuple[Places, int]:
        """The places of the buffers that live during ``stages``, from offset ``start`` on, and where they end."""
        lifetimes: dict[ImageBuffer, Lifetime] = {}
        for number, stage in enumerate(stages):
            for buffer in stage.buffers:
                if buffer.whole == whole:
                    first = lifetimes[buffer].first if buffer in lifetimes else number
                    # Images and target are there before the first stage, the logits behind the last one.
                    first = 0 if buffer in (self.images, self.target) else first
                    last = len(stages) if buffer is self.logits else number
                    lifetimes[buffer] = Lifetime(prod(buffer.for_images(images)) * buffer.dtype.itemsize, first, last)
        offsets, nbytes = pack(lifetimes)
        places: Places = {
            buffer: Place(start + offset, buffer.for_images(images), buffer.dtype) for buffer, offset in offsets.items()
        }
        return places, start + nbytes


def convolution_method(c_in: int, c_out: int, most_tiles: int) -> Literal["rows", "tiles", "channels"]:
    """How a convolution is done whose largest batch has so many tiles of 4 x 4 pixels.

    "rows", "tiles", or "channels": by tiles, but the processes share out channels. The latter where the transformed
    filters take more memory than the transformed images.
    """
    fewest = min(c_in, c_out)
    if fewest < TILE_CHANNELS:
        return "rows"
    return "channels" if most_tiles <= fewest else "tiles"
