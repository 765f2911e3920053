"""What a network is made of and what it costs, layer by layer, without running it::

    python -m minunet.summary --widths 64,128,256,512,1024 --size 224

:func:`summary` walks through a :class:`~minunet.network.unet.UNet` as its ``forward`` does, with the shape of the array
in its hand instead of the array, and asks each layer that it meets for its weights.

**FLOPs** are those of the forward pass, a multiplication with its addition counted as 2, and only of convolutions
and transposed convolutions: all the rest (biases, batch norm, ReLU, pooling, dropout) is less than 1 % of the
arithmetic of a wide U-Net, though a larger part of its time. The zeros of the padding are multiplied too, and
counted. Backward does two products of the same size for each one of forward, for dx and for dweight: a
training step takes about three times as much.

**Activation bytes** are those of the layer's output. Their sum is what one forward pass writes. Backward needs
about 0.6 of it, and a training step of the plain path peaks at about the whole sum (0.93 to 1.08 times it, measured
on networks of base 16 and 32, with the gradients; the weights and the optimiser's moments come on top).

**The receptive field** of an output pixel is the square of image pixels that can influence it; its side is given here,
as it is in the interior, so it can be larger than the image. (In training, batch norm lets every pixel of
the batch influence every other; the receptive field is that of inference.) **The jump** is how many image pixels apart
two neighbouring pixels of the output are.

A convolution of side k sees k neighbours, each with its own field, a jump apart: the field grows by (k - 1) * jump.
Max-pooling does the same and doubles the jump; a transposed convolution halves it again. In the decoder two paths
meet, a short one over the skip and a long one through the levels below, and a pixel sees what *either* of
them sees: the union of both, which the long one decides. After a transposed convolution neighbours are no longer
alike (with a kernel of 2, the pixels 2i and 2i + 1 are painted by the same pixel i), and adding up formulas is then no
longer exact. So the fields themselves are followed: the first and the last image row that each row sees,
for the 2^depth rows after which the pattern repeats, and the largest extent is reported. Of a block of one's own the
layers are taken one after the other: where it has paths side by side, the field is an upper bound.
Further reading: Araujo, Norris & Sim 2019, "Computing receptive fields of convolutional neural networks".
"""

import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minunet.base import cli
from minunet.base.errors import UserError
from minunet.network.blocks import DoubleConv, Down, Up
from minunet.network.layers import BatchNorm2d, Conv2d, ConvTranspose2d, Dropout, Layer
from minunet.network.unet import UNet
from minunet.ops.conv2d import output_size
from minunet.ops.conv_transpose2d import transposed_size


class Row(NamedTuple):
    """One layer."""

    name: str  # dotted, the start of its parameters' names: "down1.conv1"
    kind: str  # the op in minunet.ops, and its kernel or rate: "conv2d 3x3"
    shape: tuple[int, ...]  # of the output: (N, H, W, C)
    parameters: int
    flops: int  # forward, for the whole batch
    activation_bytes: int  # of the output, for the whole batch
    receptive_field: int  # side of the square of image pixels that an output pixel sees
    jump: int  # image pixels between two neighbouring output pixels


@dataclass(frozen=True)
class Summary:
    """The layers of a network in the order of its forward pass. ``print`` it: it is a table."""

    rows: tuple[Row, ...]
    input_shape: tuple[int, ...]
    dtype: str
    #: The prediction for the rows 0 ... 2^depth - 1 of an image depends on so many rows above them and below them.
    reach: tuple[int, int]

    @property
    def parameters(self) -> int:
        """The number of learned numbers."""
        return sum(row.parameters for row in self.rows)

    @property
    def flops(self) -> int:
        """Of one forward pass of the batch."""
        return sum(row.flops for row in self.rows)

    @property
    def training_flops(self) -> int:
        """Of one forward and backward pass of the batch, about: three times those of forward."""
        return 3 * self.flops

    @property
    def activation_bytes(self) -> int:
        """Of the outputs of all layers together, for the batch."""
        return sum(row.activation_bytes for row in self.rows)

    @property
    def receptive_field(self) -> int:
        """Side in pixels of the square of the image that one pixel of the prediction depends on."""
        return self.rows[-1].receptive_field

    def __str__(self) -> str:
        total = Row("total", "", (), self.parameters, self.flops, self.activation_bytes, self.receptive_field, 0)
        header = ("layer", "kind", "output", "parameters", "MFLOP", "MB", "field", "jump")
        table = [header, *(_cells(row) for row in self.rows), _cells(total)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        sides = "<<<>>>>>"  # words to the left, numbers to the right
        head, *body, total_line = (
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True)).rstrip()
            for cells in table
        )
        rule = "-" * len(head)
        lines, room = [head], None
        for row, line in zip(self.rows, body, strict=True):
            if row.name.partition(".")[0] != room:  # a rule between the rooms of the U: down1, down2, ...
                room = row.name.partition(".")[0]
                lines.append(rule)
            lines.append(line)
        batch, *image = self.input_shape
        return "\n".join(
            [
                f"batch of {batch}, images of {' x '.join(map(str, image))}, {self.dtype}",
                *lines,
                rule,
                total_line,
                "",
                f"parameters   {self.parameters:,}",
                f"forward      {_flop(self.flops)} for the batch, a multiply-add counted as 2",
                f"training     {_flop(self.training_flops)} a step, about",
                f"activations  {self.activation_bytes / 1e6:,.1f} MB: the outputs of all layers",
                f"field        each pixel of the prediction depends on at most {self.receptive_field} x "
                f"{self.receptive_field} pixels of the image",
            ]
        )


def _flop(count: int) -> str:
    unit, size = ("GFLOP", 1e9) if count >= 1e8 else ("MFLOP", 1e6)
    return f"{count / size:,.2f} {unit}"


def _cells(row: Row) -> tuple[str, ...]:
    """A row in words; nothing where there is nothing to count."""
    return (
        row.name,
        row.kind,
        " x ".join(map(str, row.shape[1:])),
        f"{row.parameters:,}" if row.parameters else "",
        f"{row.flops / 1e6:,.1f}" if row.flops else "",
        f"{row.activation_bytes / 1e6:,.2f}",
        str(row.receptive_field),
        str(row.jump) if row.jump else "",
    )


def summary(net: UNet, height: int, width: int, batch: int = 1) -> Summary:
    """The layers of ``net`` and their costs for a batch of ``batch`` images of ``height`` x ``width`` pixels.

    Raises ValueError if one of the three is below 1, or if 2^depth does not divide height and width.

    >>> table = summary(UNet(widths=(8, 16), up_kernel=2), 32, 32)
    >>> table.rows[0]
    Row(name='down1.conv1', kind='conv2d 3x3', shape=(1, 32, 32, 8), parameters=224, flops=442368,
        activation_bytes=32768, receptive_field=3, jump=1)
    >>> table.parameters, table.receptive_field, table.reach
    (6761, 20, (10, 10))
    """
    multiple = 2**net.depth
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % multiple:
            raise ValueError(f"{name} must be a positive multiple of 2^depth = {multiple}, got {value}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")

    # From here on as in UNet.forward.
    walk = _Walk(period=multiple, itemsize=net.head.weight.dtype.itemsize)
    shape = (batch, height, width, net.config["in_channels"])
    x = _Signal(shape, jump=1, first=np.arange(multiple), last=np.arange(multiple))
    skips = []
    for (name, *_), layer in net.parts():
        match layer:
            case Down():
                skips.append(walk.block(name, layer.convs, x))
                x = walk.max_pool2d(f"{name}.pool", skips[-1])
                x = walk.dropout(f"{name}.dropout", layer.dropout, x)
            case Up():
                x = walk.conv_transpose2d(f"{name}.up", layer.up, x)
                x = walk.concat(f"{name}.concat", x, skips.pop())
                x = walk.dropout(f"{name}.dropout", layer.dropout, x)
                x = walk.block(name, layer.convs, x)
            case Conv2d():
                x = walk.conv2d(name, layer, x)
            case _:  # the bottleneck
                x = walk.block(name, layer, x)
    reach = -int(x.first.min()), int(x.last.max()) - (multiple - 1)
    return Summary(tuple(walk.rows), shape, str(net.head.weight.dtype), reach)


class _Signal(NamedTuple):
    """What travels from layer to layer in place of an array."""

    shape: tuple[int, int, int, int]
    jump: int
    first: np.ndarray  # the first image row that row q of the array sees, for the rows of one period
    last: np.ndarray  # the last one. Columns are like rows, since all kernels are square


class _Walk:
    """The ops of a forward pass, on signals. Each notes its row."""

    def __init__(self, period: int, itemsize: int) -> None:
        self.rows: list[Row] = []
        self.period = period  # image rows after which the pattern of fields repeats: 2^depth
        self.itemsize = itemsize

    def block(self, name: str, block: Layer, x: _Signal) -> _Signal:
        """The layers of a double convolution, with its ReLUs; those of another block one after the other."""
        for part, layer in block.leaves().items():
            x = self.layer(f"{name}.{part}", layer, x)
            if isinstance(block, DoubleConv) and isinstance(layer, BatchNorm2d):
                x = self.relu(f"{name}.{part.replace('norm', 'relu')}", x)
        return x

    def layer(self, name: str, layer: Layer, x: _Signal) -> _Signal:
        match layer:
            case Conv2d():
                return self.conv2d(name, layer, x)
            case ConvTranspose2d():
                return self.conv_transpose2d(name, layer, x)
            case BatchNorm2d():
                return self._note(name, "batch_norm2d", x, layer)
            case Dropout():
                return self.dropout(name, layer, x)
        return self._note(name, type(layer).__name__, x, layer)

    def conv2d(self, name: str, layer: Conv2d, x: _Signal) -> _Signal:
        kernel, _, in_channels, out_channels = layer.weight.shape
        batch, height, width, _ = x.shape
        out_height, (before, _) = output_size(height, kernel, layer.stride, layer.padding)
        out_width, _ = output_size(width, kernel, layer.stride, layer.padding)
        x = self._window(x, kernel, layer.stride, before)
        x = x._replace(shape=(batch, out_height, out_width, out_channels))
        # Each output number is a sum over the kernel's taps and the input channels.
        flops = 2 * kernel * kernel * in_channels * out_channels * batch * out_height * out_width
        return self._note(name, f"conv2d {kernel}x{kernel}", x, layer, flops)

    def conv_transpose2d(self, name: str, layer: ConvTranspose2d, x: _Signal) -> _Signal:
        kernel, _, in_channels, out_channels = layer.weight.shape
        batch, height, width, _ = x.shape
        _, rows = transposed_size(height, kernel, layer.stride, layer.padding)
        _, columns = transposed_size(width, kernel, layer.stride, layer.padding)
        # Each input pixel paints a patch of kernel x kernel output pixels.
        flops = 2 * kernel * kernel * in_channels * out_channels * batch * height * width
        x = self._patches(x, kernel, layer.stride, rows.start)
        x = x._replace(shape=(batch, rows.stop - rows.start, columns.stop - columns.start, out_channels))
        return self._note(name, f"conv_transpose2d {kernel}x{kernel}", x, layer, flops)

    def max_pool2d(self, name: str, x: _Signal, size: int = 2) -> _Signal:
        batch, height, width, channels = x.shape
        x = self._window(x, size, size, 0)._replace(shape=(batch, height // size, width // size, channels))
        return self._note(name, f"max_pool2d {size}x{size}", x)

    def concat(self, name: str, up: _Signal, skip: _Signal) -> _Signal:
        # A pixel sees what either of its halves sees: from the earlier first row to the later last row.
        first, last = np.minimum(up.first, skip.first), np.maximum(up.last, skip.last)
        channels = up.shape[3] + skip.shape[3]
        return self._note(name, "concat", _Signal((*skip.shape[:3], channels), up.jump, first, last))

    # One pixel in, one pixel out: shape and field stay.

    def relu(self, name: str, x: _Signal) -> _Signal:
        return self._note(name, "relu", x)

    def dropout(self, name: str, layer: Dropout, x: _Signal) -> _Signal:
        return self._note(name, f"dropout {layer.rate:g}", x, layer)

    def _note(self, name: str, kind: str, x: _Signal, layer: Layer | None = None, flops: int = 0) -> _Signal:
        parameters = 0 if layer is None else sum(array.size for array in layer.parameters().values())
        activation_bytes = int(np.prod(x.shape)) * self.itemsize
        field = int((x.last - x.first).max()) + 1
        self.rows.append(Row(name, kind, x.shape, parameters, flops, activation_bytes, field, x.jump))
        return x

    def _window(self, x: _Signal, kernel: int, stride: int, before: int) -> _Signal:
        """Row q of a convolution or a pooling sees what the rows stride * q - before + u, u < kernel, see."""
        rows = stride * np.arange(len(x.first) // stride) - before
        first = np.min([self._at(x.first, rows + u) for u in range(kernel)], axis=0)
        last = np.max([self._at(x.last, rows + u) for u in range(kernel)], axis=0)
        return _Signal(x.shape, x.jump * stride, first, last)

    def _patches(self, x: _Signal, kernel: int, stride: int, crop: int) -> _Signal:
        """Row q of a transposed convolution sees what the rows i see whose patch covers it.

        Patch i covers the rows stride * i + u - crop, u < kernel: so i runs from (q + crop - (kernel - 1)) / stride,
        rounded up, to (q + crop) / stride, rounded down.
        """
        rows = np.arange(len(x.first) * stride) + crop
        return _Signal(
            x.shape,
            x.jump // stride,
            self._at(x.first, -((kernel - 1 - rows) // stride)),
            self._at(x.last, rows // stride),
        )

    def _at(self, rows_seen: np.ndarray, q: np.ndarray) -> np.ndarray:
        """``rows_seen`` of any row q: as in the period that is known, so many periods further."""
        periods, place = np.divmod(q, len(rows_seen))
        return rows_seen[place] + self.period * periods


def main(arguments: list[str], program: str = "python -m minunet.summary") -> None:
    """Print the summary of the U-Net that the flags describe; ``program`` is how the command line begins."""
    parser = cli.Parser(prog=program, description="What a U-Net is made of, layer by layer, and what it costs.")
    parser.add_argument(
        "--widths", type=_widths, default=(64, 128, 256, 512, 1024), help="channels of each level, from the top"
    )
    parser.add_argument("--size", type=cli.image_size, default=224, help="height and width of the images in pixels")
    parser.add_argument("--batch", type=cli.positive_int, default=1)
    parser.add_argument("--in-channels", type=cli.positive_int, default=3)
    parser.add_argument("--out-channels", type=cli.positive_int, default=1)
    parser.add_argument("--up-kernel", type=cli.integer(2, 3), default=3)
    parser.add_argument("--head-kernel", type=cli.positive_int, default=3)
    parser.add_argument("--no-conv-bias", action="store_true", help="no bias where a batch norm follows")
    options = parser.parse_args(arguments)
    multiple = 2 ** (len(options.widths) - 1)
    if options.size % multiple:
        raise UserError(
            f"--size: must be a multiple of {multiple} for {len(options.widths)} widths, got {options.size}"
        )
    net = UNet(
        options.in_channels,
        options.out_channels,
        options.widths,
        up_kernel=options.up_kernel,
        head_kernel=options.head_kernel,
        conv_bias=not options.no_conv_bias,
    )
    print(summary(net, options.size, options.size, options.batch))


def _widths(text: str) -> tuple[int, ...]:
    width = cli.integer(1, 4096)
    return tuple(width(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(cli.run(main))
