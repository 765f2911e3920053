"""The prediction for an image of any size, tile by tile, and exactly the one for the whole image.

A pixel of the prediction depends on the pixels in its receptive field and on no other. So a window of the image
gives the right prediction wherever the field lies inside of it, or is cut off by a border that the image has as well.
Two things have to be right:

- **The margin.** Near an edge of the window that is no border of the image, the layers pad with zeros where the image
  goes on. ``summary(net, ...).reach`` says how far such an edge is felt: that far from it nothing is kept.
- **The grid.** Max-pooling takes the rows in pairs 0 and 1, 2 and 3, ..., and does so at every level. A window that
  began at row 1 would pair others. So windows begin at multiples of the period, 2^depth.

What is kept of the windows then covers the image, each pixel once. Derivation and measurement: docs/tiles.md. Source:
Ronneberger, Fischer & Brox 2015, "U-Net", figure 2, the overlap-tile strategy (their network pads nothing, so that it
needs mirrored pixels at the border).
"""

from collections.abc import Iterator
from typing import NamedTuple

from minunet.network.unet import UNet
from minunet.summary import summary


class Span(NamedTuple):
    """A window along one axis of the image, and what is kept of its prediction: in pixels of the image."""

    start: int
    stop: int  # may lie beyond the end, by less than a period: there the edge is repeated, as UNet.pad does
    keep_start: int
    keep_stop: int

    @property
    def window(self) -> slice:
        """Where the window is read from the image."""
        return slice(self.start, self.stop)

    @property
    def kept(self) -> slice:
        """Where the kept part goes in the image's prediction."""
        return slice(self.keep_start, self.keep_stop)

    @property
    def inside(self) -> slice:
        """Where the kept part is in the window's prediction."""
        return slice(self.keep_start - self.start, self.keep_stop - self.start)


def spans(length: int, side: int, period: int, margin: int) -> list[Span]:
    """Windows of ``side`` pixels over an axis of ``length`` pixels: all of one size, the last one up to the end.

    ``side`` and ``margin`` are multiples of ``period``. Raises ValueError if nothing is left between two margins.

    >>> for span in spans(length=100, side=48, period=4, margin=8):
    ...     print(*span)
    0 48 0 40
    32 80 40 60
    52 100 60 100
    """
    padded = -(-length // period) * period
    if side >= padded:
        return [Span(0, padded, 0, length)]
    step = side - 2 * margin
    if step < period:
        raise ValueError(f"side must be at least two margins and a period, {2 * margin + period}, got {side}")
    starts = [*range(0, padded - side, step), padded - side]
    keep = [0, *(start + margin for start in starts[1:]), length]
    return [Span(start, start + side, *keep[k : k + 2]) for k, start in enumerate(starts)]


def tiles(net: UNet, height: int, width: int, side: int) -> Iterator[tuple[Span, Span]]:
    """The windows, rows and columns, whose predictions by ``net`` make up that of an image of height x width pixels.

    They have ``side`` x ``side`` pixels, or a little more, so that it is a multiple of the period and leaves something
    between two margins; an image that is no larger is one window.
    """
    period = 2**net.depth
    margin = margin_of(net)
    side = max(-(-side // period) * period, 2 * margin + period)
    columns = spans(width, side, period, margin)
    for rows in spans(height, side, period, margin):
        for column in columns:
            yield rows, column


def margin_of(net: UNet) -> int:
    """How many pixels at each edge of a window are not kept: the reach of ``net``, as a multiple of the period.

    >>> margin_of(UNet(widths=(2, 3, 4), up_kernel=2))
    24
    """
    period = 2**net.depth
    reach = max(summary(net, period, period).reach)
    return -(-reach // period) * period
