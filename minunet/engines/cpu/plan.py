"""What the engine will do, stage by stage, and where every array lies: worked out once, before the first step.

A stage is a piece of work after which all processes wait for each other, because the next one needs what all of them
made: the sums of a batch norm, or the rows beyond its own. The plan lists the stages of a training step and of a
prediction, with the arrays that each of them touches. An array lives from the first stage that names it to the last;
:func:`minunet.engines.cpu.buffers.pack` gives those that never meet the same memory.

Every process computes the same plan from the same description, so that only small commands have to be sent.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from minunet.engines.cpu import rows, taps, tiles
from minunet.engines.cpu.adamw import count_of_blocks
from minunet.engines.cpu.buffers import aligned, pack
from minunet.network.loss import SegmentationLoss

TILE_CHANNELS = 32  # from so many channels on, on both sides, tiles beat rows


class Unit(NamedTuple):
    """A 3 x 3 convolution, the batch norm behind it and the ReLU behind that."""

    conv: str  # its name in the network: "down1.conv1"
    norm: str
    height: int
    width: int
    c_in: int
    c_out: int
    source: str  # what it convolves: "image", "relu" of another unit, "pooled" or "concat" of a level
    of: str | int  # the name of that unit, or the level
    most_tiles: int  # the tiles of 4 x 4 pixels of the largest batch

    @property
    def method(self) -> str:
        """How it is convolved: "rows", "tiles", or "channels": by tiles, but the processes share out channels.

        The latter where the transformed filters take more memory than the transformed images.
        """
        fewest = min(self.c_in, self.c_out)
        if fewest < TILE_CHANNELS:
            return "rows"
        return "channels" if self.most_tiles <= fewest else "tiles"


class Stage(NamedTuple):
    """One stage of the plan. ``what`` is the unit or the level that it works on."""

    kind: str
    what: Any
    arrays: tuple[str, ...]  # what it reads or writes in the shared memory


class Description:
    """The network, the loss and the largest batch: all that the plan follows from.

    ``config`` is :attr:`minunet.network.unet.UNet.config`; ``eps`` that of its batch norms.
    """

    def __init__(
        self, config: Mapping[str, Any], eps: float, loss: SegmentationLoss, max_batch: int, image_size: tuple[int, int]
    ) -> None:
        self.dtype = np.dtype(config["dtype"])
        self.in_channels, self.out_channels = config["in_channels"], config["out_channels"]
        self.widths = tuple(config["widths"])
        self.dropout, self.up_kernel, self.head_kernel = config["dropout"], config["up_kernel"], config["head_kernel"]
        self.conv_bias, self.eps, self.loss = config["conv_bias"], eps, loss
        self.max_batch, (self.height, self.width) = max_batch, image_size
        self.depth = len(self.widths) - 1
        self.units = {unit.conv: unit for unit in self._units()}
        self.last_unit = list(self.units.values())[-1]

    def size(self, level: int) -> tuple[int, int]:
        """Height and width of level 1, 2, ..., depth + 1 (the bottleneck)."""
        return self.height >> (level - 1), self.width >> (level - 1)

    def below(self, level: int) -> Unit:
        """The unit whose ReLU the transposed convolution of ``level`` takes up."""
        return self.units["bottleneck.conv2" if level == self.depth else f"up{level + 1}.conv2"]

    def skip(self, level: int) -> Unit:
        """The unit whose ReLU is the skip of ``level``."""
        return self.units[f"down{level}.conv2"]

    def _units(self) -> Iterable[Unit]:
        source: tuple[str, str | int] = ("image", "")
        channels = self.in_channels
        for level in range(1, self.depth + 2):
            name = f"down{level}" if level <= self.depth else "bottleneck"
            yield from self._pair(name, level, channels, source)
            channels, source = self.widths[level - 1], ("pooled", level + 1)
        for level in range(self.depth, 0, -1):
            yield from self._pair(f"up{level}", level, 2 * self.widths[level - 1], ("concat", level))

    def _pair(self, name: str, level: int, c_in: int, source: tuple[str, str | int]) -> Iterable[Unit]:
        height, width = self.size(level)
        c_out = self.widths[level - 1]
        most = self.max_batch * -(-height // 4) * -(-width // 4)
        yield Unit(f"{name}.conv1", f"{name}.norm1", height, width, c_in, c_out, *source, most)
        yield Unit(f"{name}.conv2", f"{name}.norm2", height, width, c_out, c_out, "relu", f"{name}.conv1", most)

    # The arrays by name, and their shapes. z: what a convolution gives; g: the gradient behind its ReLU;
    # pooled and dpooled, up and dup: by level; kept: the dropout masks, one byte a value.

    def shape(self, array: str, images: int) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of an array, for so many images."""
        kind, _, name = array.partition(":")
        n = images
        if kind in ("z", "g", "all_z"):
            unit = self.units[name]
            return (n, unit.height, unit.width, unit.c_out), self.dtype
        if kind in ("images", "logits", "target", "dlogits"):
            channels = self.in_channels if kind == "images" else self.out_channels
            return (n, self.height, self.width, channels), self.dtype
        if kind in ("input_planes", "gradient_planes", "flipped_planes", "dinput"):
            unit = self.units[name]
            if kind == "dinput":
                return (n, unit.height, unit.width, unit.c_in), self.dtype
            channels = unit.c_in if kind == "input_planes" else unit.c_out
            tiles_of_an_image = -(-unit.height // 4) * -(-unit.width // 4)
            return (36, n * tiles_of_an_image, channels), self.dtype
        level = int(name)
        if kind in ("up", "dup"):
            return (n, *self.size(level), self.widths[level - 1]), self.dtype
        if kind in ("pooled", "dpooled"):
            return (n, *self.size(level), self.widths[level - 2]), self.dtype
        if kind == "kept_pooled":
            return (n, *self.size(level), self.widths[level - 2]), np.dtype(bool)
        assert kind == "kept_concat", array
        return (n, *self.size(level), 2 * self.widths[level - 1]), np.dtype(bool)

    def source_arrays(self, unit: Unit, training: bool) -> tuple[str, ...]:
        """What the convolution of ``unit`` reads."""
        if unit.source == "image":
            return ("images:",)
        if unit.source == "relu":
            return (f"z:{unit.of}",)
        if unit.source == "pooled":
            return (f"pooled:{unit.of}",)
        kept = (f"kept_concat:{unit.of}",) if training and self.dropout else ()
        return (f"up:{unit.of}", f"z:{self.skip(int(unit.of)).conv}", *kept)

    def target_arrays(self, unit: Unit) -> tuple[str, ...]:
        """What the backward pass of ``unit`` writes, and reads in order to write it."""
        if unit.source == "image":
            return ()
        if unit.source == "relu":
            return (f"g:{unit.of}", f"z:{unit.of}")
        if unit.source == "pooled":
            return (f"dpooled:{unit.of}", *((f"kept_pooled:{unit.of}",) if self.dropout else ()))
        kept = (f"kept_concat:{unit.of}",) if self.dropout else ()
        return (f"dup:{unit.of}", f"g:{self.skip(int(unit.of)).conv}", *kept)

    def forward_stages(self, training: bool) -> list[Stage]:
        """From the images to the logits."""
        stages = [Stage("filters", None, ())]
        if training and self.dropout:
            masks = [f"kept_pooled:{level + 1}" for level in range(1, self.depth + 1)]
            masks += [f"kept_concat:{level}" for level in range(self.depth, 0, -1)]
            stages = [Stage("filters_and_masks", None, tuple(masks))]
        for unit in self.units.values():
            if unit.source == "pooled":
                kept = (f"kept_pooled:{unit.of}",) if training and self.dropout else ()
                skip = f"z:{self.skip(int(unit.of) - 1).conv}"
                stages.append(Stage("pool", int(unit.of) - 1, (skip, f"pooled:{unit.of}", *kept)))
            if unit.source == "concat":
                level = int(unit.of)
                stages.append(Stage("up", level, (f"z:{self.below(level).conv}", f"up:{level}")))
            arrays = (*self.source_arrays(unit, training), f"z:{unit.conv}")
            if unit.method == "channels":
                planes, all_z = f"input_planes:{unit.conv}", f"all_z:{unit.conv}"
                stages.append(Stage("conv_planes", unit, (*self.source_arrays(unit, training), planes)))
                stages.append(Stage("conv_channels", unit, (planes, all_z)))
                stages.append(Stage("conv_collect", unit, (all_z, f"z:{unit.conv}")))
            else:
                stages.append(Stage("conv", unit, arrays))
        return [*stages, Stage("head", None, (f"z:{self.last_unit.conv}", "logits:"))]

    def backward_stages(self) -> list[Stage]:
        """From the logits to the gradients: the mirror image."""
        last = self.last_unit.conv
        stages = [
            Stage("loss_sums", None, ("logits:", "target:", "dlogits:")),
            Stage("loss_gradient", None, ("target:", "dlogits:")),
            Stage("head_backward", None, ("dlogits:", f"z:{last}", f"g:{last}")),
        ]
        for unit in reversed(self.units.values()):
            arrays = (
                f"g:{unit.conv}",
                f"z:{unit.conv}",
                *self.source_arrays(unit, training=True),
                *self.target_arrays(unit),
            )
            if unit.method == "channels":
                planes = tuple(f"{kind}_planes:{unit.conv}" for kind in ("input", "gradient", "flipped"))
                dinput = f"dinput:{unit.conv}"
                stages.append(Stage("conv_planes_backward", unit, (*arrays, *planes)))
                stages.append(Stage("conv_channels_backward", unit, (*arrays, *planes, dinput)))
                stages.append(Stage("conv_spread_backward", unit, (*arrays, dinput)))
            else:
                stages.append(Stage("conv_backward", unit, arrays))
            if unit.source == "concat":
                level = int(unit.of)
                below = self.below(level).conv
                stages.append(Stage("up_backward", level, (f"dup:{level}", f"z:{below}", f"g:{below}")))
            if unit.source == "pooled":
                skip = self.skip(int(unit.of) - 1).conv
                stages.append(
                    Stage("pool_backward", int(unit.of) - 1, (f"dpooled:{unit.of}", f"z:{skip}", f"g:{skip}"))
                )
        return [*stages, Stage("gradients", None, ())]

    def training_stages(self) -> list[Stage]:
        """A training step."""
        return self.forward_stages(training=True) + self.backward_stages()

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The network's parameters, in the order of ``net.parameters()``."""
        shapes: dict[str, tuple[int, ...]] = {}
        k, c = self.up_kernel, self.widths
        for unit in self.units.values():
            if unit.source == "concat":
                level = int(unit.of)
                shapes[f"up{level}.up.weight"] = (k, k, c[level], c[level - 1])
                shapes[f"up{level}.up.bias"] = (c[level - 1],)
            shapes[f"{unit.conv}.weight"] = (3, 3, unit.c_in, unit.c_out)
            if self.conv_bias:
                shapes[f"{unit.conv}.bias"] = (unit.c_out,)
            shapes[f"{unit.norm}.gamma"] = shapes[f"{unit.norm}.beta"] = (unit.c_out,)
        k = self.head_kernel
        shapes["head.weight"] = (k, k, c[0], self.out_channels)
        shapes["head.bias"] = (self.out_channels,)
        return shapes

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The running statistics, by name."""
        units = self.units.values()
        return {f"{unit.norm}.{name}": (unit.c_out,) for unit in units for name in ("running_mean", "running_var")}


#: The arrays, with a lifetime, that all processes need as a whole. The others are cut up by image, or by row.
WHOLE = (
    "images",
    "logits",
    "target",
    "dlogits",
    "input_planes",
    "gradient_planes",
    "flipped_planes",
    "all_z",
    "dinput",
)

Places = dict[str, tuple[int, tuple[int, ...], np.dtype]]  # offset, shape and dtype by name


class Memory(NamedTuple):
    """Where the arrays of a training step, or of a prediction, lie.

    In memory that all processes share: :attr:`whole`, and :attr:`by_rows`, if the processes share out rows. If they
    share out images, each has those that are not whole for its own images in memory of its own: :attr:`by_images`.
    """

    whole: Places
    by_rows: Places
    by_images: Places


class Layout(NamedTuple):
    """All of it, with the bytes of shared memory, and of each process's own."""

    permanent: Places
    training: Memory
    inference: Memory
    shared_bytes: int
    own_bytes: int


def layout(description: Description, processes: int) -> Layout:
    """Where everything lies, for so many processes."""
    dtype, total = description.dtype, 0
    permanent: Places = {}

    def place(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        nonlocal total
        permanent[name] = (total, shape, dtype)
        total += aligned(prod(shape) * dtype.itemsize)

    parameters = description.parameter_shapes()
    for name, shape in (parameters | description.buffer_shapes()).items():
        # Those of the network that is trained, and those of one that predicts: it may be another, such as an average.
        place(f"net:{name}", shape, dtype)
        place(f"predictor:{name}", shape, dtype)
    for unit in description.units.values():
        # Sums over the pixels, a slot for each process: of z and z^2 forward, of g and g z backward.
        place(f"sums:{unit.conv}", (2, processes, 2, unit.c_out), np.dtype(np.float64))
        if unit.method != "channels":
            filters = (rows if unit.method == "rows" else tiles).filters_shape
            place(f"filters:{unit.conv}", filters(unit.c_in, unit.c_out), dtype)
            # Those of the backward pass take the place of those of the forward pass.
            permanent[f"flipped:{unit.conv}"] = (
                permanent[f"filters:{unit.conv}"][0],
                filters(unit.c_out, unit.c_in),
                dtype,
            )
    for level, c_out in enumerate(description.widths[:-1], start=1):
        shape = (taps.count(description.up_kernel), description.widths[level], c_out)
        place(f"taps:{level}", shape, dtype)
    # The batch that is prepared, from slices, which have three channels. It lasts until the next one.
    pixels = (description.max_batch, description.height, description.width)
    for name, channels, of in (
        ("images", 3, np.uint8),
        ("masks", 1, np.uint8),
        ("x", 3, "float32"),
        ("target", 1, "float32"),
    ):
        place(f"batch:{name}", (*pixels, channels), np.dtype(of))
    place("loss:", (processes, description.max_batch, 4), np.dtype(np.float64))
    for name, shape in parameters.items():
        place(f"grad:{name}", shape, dtype)
        # Of the optimiser. Memory that nobody touches, as in a prediction, is never given.
        place(f"first_moment:{name}", shape, dtype)
        place(f"second_moment:{name}", shape, dtype)
    place("squares:", (count_of_blocks(parameters.values()),), np.dtype(np.float64))
    for process in range(1, processes):
        for name, shape in parameters.items():
            if adds_up(description, name):
                place(f"grad{process}:{name}", shape, dtype)

    memories, shared_bytes, own_bytes = [], total, 0
    for stages in (description.training_stages(), description.forward_stages(training=False)):
        whole, end = _packed(description, stages, description.max_batch, total, whole=True)
        by_rows, rows_end = _packed(description, stages, description.max_batch, end, whole=False)
        by_images, own_end = _packed(description, stages, -(-description.max_batch // processes), 0, whole=False)
        memories.append(Memory(whole, by_rows if processes > 1 else {}, by_images))
        shared_bytes = max(shared_bytes, rows_end if processes > 1 else end)
        own_bytes = max(own_bytes, own_end)
    return Layout(permanent, memories[0], memories[1], shared_bytes, own_bytes)


def _packed(
    description: Description, stages: list[Stage], images: int, start: int, *, whole: bool
) -> tuple[Places, int]:
    """The places of the arrays that live during ``stages``, from offset ``start`` on, and where they end."""
    lifetimes: dict[str, tuple[int, int, int]] = {}
    for number, stage in enumerate(stages):
        for array in stage.arrays:
            if (array.partition(":")[0] in WHOLE) == whole:
                shape, dtype = description.shape(array, images)
                first = lifetimes[array][1] if array in lifetimes else number
                # Images and target are there before the first stage, the logits behind the last one.
                first = 0 if array in ("images:", "target:") else first
                last = len(stages) if array == "logits:" else number
                lifetimes[array] = (prod(shape) * dtype.itemsize, first, last)
    offsets, nbytes = pack(lifetimes)
    return {
        array: (start + offset, *description.shape(array, images)) for array, offset in offsets.items()
    }, start + nbytes


def adds_up(description: Description, parameter: str) -> bool:
    """Whether the gradient of ``parameter`` is a sum over pixels, of which each process has a part."""
    name, _, kind = parameter.rpartition(".")
    if name in description.units:
        return kind == "weight" and description.units[name].method != "channels"
    return name == "head" or name.endswith(".up")
