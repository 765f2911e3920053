"""A 3x3 convolution as three large matrix products ("row3"), for any array module.

Specification: ops.conv2d_forward and its backward (stride 1, "same", no bias). The readable op makes nine products of
shifted images, each reading x again and adding to y again. This one lays x out once so that three products are enough,
each with nine times the depth, and nothing is added up outside of them.

The idea. Put a zero column to the left and the right of the image, and beside each pixel its neighbours above and
below: 3 C numbers a pixel. In that row of numbers, three pixels that follow each other hold a whole 3x3 window: 9 C
numbers, without a gap. So the windows of pixels 0, 3, 6, ... are the rows of the same memory seen as a matrix (Q, 9 C);
those of pixels 1, 4, 7, ... are the matrix that begins one pixel later, and so the third. Each times the weights, as
a matrix (9 C_in, C_out), gives a third of the output. Windows that reach over the end of an image row are computed too,
and thrown away: two in W + 2.

A library's matrix product runs near a GPU's peak on such shapes, and no kernel of one's own is needed. This copy of x
(to make it is called "lowering") costs three times its memory, so the images are worked on in groups. Counted to be
fast, measured to be slow (docs/engines/gpu.md): what lies around the products takes far longer than they do. It runs
where our kernels do not.
"""

from collections.abc import Iterator

from minunet.base.backend import Array, accumulation_dtype, array_module
from minunet.engines.cuda.specification import SpecificationKernels

#: Bytes of lowered images at a time: they are written and read back at once, so they should stay in the L2 cache.
GROUP = 32 * 2**20


class Row3Kernels(SpecificationKernels):
    """The specification with its 3x3 convolutions as large matrix products: what runs where no kernel of ours does."""

    name = "row3"

    def _conv(self, x: Array, weight: Array) -> Array:
        return conv3x3(x, weight)

    def _conv_grad_weight(self, x: Array, dy: Array) -> Array:
        return conv3x3_grad_weight(x, dy)


def conv3x3(x: Array, weight: Array) -> Array:
    """ops.conv2d_forward(x, weight, None): x (N, H, W, C_in), weight (3, 3, C_in, C_out), y (N, H, W, C_out)."""
    xp = array_module(x)
    n, height, width, _ = x.shape
    matrix = _as_matrix(weight)
    y = xp.empty((n, height, width, weight.shape[3]), dtype=x.dtype)
    for images in _groups(x):
        windows = lower(x[images])
        count = len(windows[0])
        thirds = xp.empty((3, count, weight.shape[3]), dtype=x.dtype)
        for r in range(3):
            thirds[r] = windows[r] @ matrix
        # The window of pixel 3 q + r is row q of third r; `every`: those of all pixels, in order.
        every = thirds.transpose(1, 0, 2).reshape(3 * count, -1)
        size = len(x[images]) * height * (width + 2)
        y[images] = every[:size].reshape(-1, height, width + 2, weight.shape[3])[:, :, :width]
    return y


def conv3x3_grad_weight(x: Array, dy: Array) -> Array:
    """The dweight (3, 3, C_in, C_out) of ops.conv2d_backward.

    Forward is windows @ matrix, so the gradient of the matrix is windows.T @ dy, with dy = 0 for the windows thrown
    away. The products of the groups are summed in their order, in float64: the same bits every time.
    """
    xp = array_module(x)
    _, height, width, in_channels = x.shape
    out_channels = dy.shape[3]
    total = xp.zeros((9 * in_channels, out_channels), dtype=accumulation_dtype(x.dtype))
    for images in _groups(x):
        windows = lower(x[images])
        count = len(windows[0])
        n = len(x[images])
        every = xp.zeros((3 * count, out_channels), dtype=dy.dtype)
        every[: n * height * (width + 2)].reshape(n, height, width + 2, out_channels)[:, :, :width] = dy[images]
        thirds = xp.ascontiguousarray(every.reshape(count, 3, out_channels).transpose(1, 0, 2))
        for r in range(3):
            total += windows[r].T @ thirds[r]
    dweight = total.astype(x.dtype).reshape(3, 3, in_channels, out_channels)
    return xp.ascontiguousarray(dweight.swapaxes(0, 1))


def lower(x: Array) -> list[Array]:
    """The three matrices (Q, 9 C) of windows of images ``x`` (n, H, W, C): row q of matrix r is pixel 3 q + r's.

    The pixels are those of the image with its two zero columns, W + 2 in a row. A row holds the window's columns v,
    in each its rows u, in each its channels. The matrices share their memory.
    """
    xp = array_module(x)
    n, height, width, channels = x.shape
    pixels = n * height * (width + 2)
    count = -(-pixels // 3)
    flat = xp.zeros((3 * count + 2) * 3 * channels, dtype=x.dtype)  # + 2: the third matrix begins two pixels later
    padded = flat[: pixels * 3 * channels].reshape(n, height, width + 2, 3, channels)
    inner = padded[:, :, 1:-1]
    inner[:, 1:, :, 0] = x[:, :-1]  # the neighbour above; there is none in the first row
    inner[:, :, :, 1] = x
    inner[:, :-1, :, 2] = x[:, 1:]
    step = 3 * channels
    return [flat[r * step : (r + 3 * count) * step].reshape(count, 3 * step) for r in range(3)]


def _as_matrix(weight: Array) -> Array:
    """(3, 3, C_in, C_out) to (9 C_in, C_out), in the order of a window: columns, rows, channels."""
    return weight.swapaxes(0, 1).reshape(-1, weight.shape[3])


def _groups(x: Array) -> Iterator[slice]:
    """Slices of as many images as may be lowered at a time."""
    n, height, width, channels = x.shape
    size = max(1, GROUP // (height * (width + 2) * 3 * channels * x.dtype.itemsize))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
