"""Transposed convolution: every input pixel paints a small weighted patch into a larger output.

    full[n, s*i + u, s*j + v, o] += sum over c of  x[n, i, j, c] * weight[u, v, c, o]

and y is a crop of ``full``, plus the bias. With stride s it makes an image s times as large: the learned
way up in a U-Net. Its forward is the backward (dx) of a convolution and its backward is a convolution,
which is where the name comes from: it is multiplication by the transposed matrix.

Derivation: docs/derivations/conv_transpose2d.md. Source: Dumoulin & Visin 2016, chapter 4; the padding
"same" is Keras'.
"""

from typing import NamedTuple

from minunet.base.backend import Array, accumulation_dtype, array_module
from minunet.ops.checks import check_array, check_images, check_kernel, check_stride_and_padding


class ConvTranspose2dCache(NamedTuple):
    """What :func:`conv_transpose2d_backward` needs."""

    x: Array  # dweight multiplies the pixels by the dy of the patch that each has painted
    weight: Array  # dx gathers dy through the same weights
    has_bias: bool  # and so a dbias
    stride: int  # where each patch lies
    full_size: tuple[int, int]  # rows and columns before the crop
    crop: tuple[slice, slice]  # the rows and columns of the full result that y kept
    y_shape: tuple[int, ...]  # what dy must look like


def conv_transpose2d_forward(
    x: Array, weight: Array, bias: Array | None, stride: int = 2, padding: int | str = "same"
) -> tuple[Array, ConvTranspose2dCache]:
    """Transposed convolution of ``x`` (N, H, W, C_in) with ``weight`` (KH, KW, C_in, C_out).

    ``bias`` is (C_out,) or None. With ``padding="same"`` the output has stride * H rows: of the full result
    max(KH - stride, 0) rows are cropped, half of them, rounded down, at the top. With a number, that many
    pixels are cropped on each side: (H - 1) * stride + KH - 2 * padding rows remain (PyTorch's padding).

    Returns y (N, H_out, W_out, C_out), of the dtype of x, and the cache.
    Raises ValueError if shapes or dtypes do not fit, or if the crop leaves nothing.

    >>> import numpy as np
    >>> x = np.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    >>> y, cache = conv_transpose2d_forward(x, np.ones((2, 2, 1, 1)), None)
    >>> y[0, :, :, 0]
    array([[1., 1., 2., 2.],
           [1., 1., 2., 2.],
           [3., 3., 4., 4.],
           [3., 3., 4., 4.]])
    """
    xp = array_module(x)
    check_images("x", x)
    check_kernel(weight, x.shape[3], x.dtype)
    check_stride_and_padding(stride, padding)
    if bias is not None:
        check_array("bias", bias, (weight.shape[3],), x.dtype)

    n, height, width, _ = x.shape
    kernel_height, kernel_width, _, out_channels = weight.shape
    full_height, kept_rows = transposed_size(height, kernel_height, stride, padding)
    full_width, kept_columns = transposed_size(width, kernel_width, stride, padding)
    if kept_rows.stop <= kept_rows.start or kept_columns.stop <= kept_columns.start:
        raise ValueError(f"padding {padding} crops away all of the {full_height} x {full_width} pixels")

    full = xp.zeros((n, full_height, full_width, out_channels), dtype=x.dtype)
    for u in range(kernel_height):
        for v in range(kernel_width):
            # The output pixels s*i + u, s*j + v: where tap (u, v) of each patch lies.
            rows, columns = slice(u, u + stride * height, stride), slice(v, v + stride * width, stride)
            full[:, rows, columns] += x @ weight[u, v]
    y = full[:, kept_rows, kept_columns].copy()
    if bias is not None:
        y += bias
    crop = (kept_rows, kept_columns)
    return y, ConvTranspose2dCache(x, weight, bias is not None, stride, (full_height, full_width), crop, y.shape)


def conv_transpose2d_backward(dy: Array, cache: ConvTranspose2dCache) -> tuple[Array, Array, Array | None]:
    """The gradients of :func:`conv_transpose2d_forward`: (dx, dweight, dbias), dbias None if there was no bias.

    Forward adds ``x @ weight[u, v]`` to ``full[rows, columns]`` for each tap. By the product rule each tap
    gathers ``dfull[rows, columns] @ weight[u, v].T`` for dx, and ``x.T @ dfull[rows, columns]`` for its weights.
    """
    x, weight, has_bias, stride, full_size, (kept_rows, kept_columns), y_shape = cache
    xp = array_module(dy)
    check_array("dy", dy, y_shape, x.dtype)

    n, height, width, _ = x.shape
    dfull = xp.zeros((n, *full_size, y_shape[3]), dtype=dy.dtype)
    dfull[:, kept_rows, kept_columns] = dy  # what was cropped away has no influence: its gradient is 0
    dx = xp.zeros_like(x)
    dweight = xp.empty_like(weight)
    # (KH, KW, C_out, C_in), laid out anew: a matrix product with a transposed view takes twice the time.
    weight_t = xp.ascontiguousarray(weight.swapaxes(2, 3))
    sum_dtype = accumulation_dtype(x.dtype)
    for u in range(weight.shape[0]):
        for v in range(weight.shape[1]):
            rows, columns = slice(u, u + stride * height, stride), slice(v, v + stride * width, stride)
            dpatch = dfull[:, rows, columns]
            dx += dpatch @ weight_t[u, v]
            # One (C_in, C_out) product for each image row, then the sum over images and rows.
            dweight[u, v] = (x.swapaxes(2, 3) @ dpatch).sum(axis=(0, 1), dtype=sum_dtype)
    dbias = dy.sum(axis=(0, 1, 2), dtype=sum_dtype).astype(dy.dtype) if has_bias else None
    return dx, dweight, dbias


def transposed_size(size: int, kernel: int, stride: int, padding: int | str) -> tuple[int, slice]:
    """The full result's length along one axis, and the slice of it that the output keeps.

    >>> transposed_size(4, kernel=3, stride=2, padding="same")
    (9, slice(0, 8, None))
    >>> transposed_size(4, kernel=3, stride=2, padding=1)
    (9, slice(1, 8, None))
    """
    full = stride * (size - 1) + kernel
    if padding != "same":
        pad = int(padding)
        return full, slice(pad, full - pad)
    start = max(kernel - stride, 0) // 2
    # A kernel smaller than the stride does not reach the last rows: they are zeros, and part of the output.
    return max(full, stride * size), slice(start, start + stride * size)
