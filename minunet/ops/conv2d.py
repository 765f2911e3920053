"""Convolution: every output pixel is a weighted sum over a small window of input pixels.

    y[n, i, j, o] = bias[o] + sum over u, v, c of  x_pad[n, s*i + u, s*j + v, c] * weight[u, v, c, o]

As in every deep-learning library this is cross-correlation: the kernel is not flipped. With the channels
last, each kernel tap (u, v) alone is a matrix product over the channel axis, so a convolution is a sum of
KH * KW matrix products of shifted images, and so is each part of its backward pass.

Derivation: docs/derivations/conv2d.md. Source: Dumoulin & Visin 2016, "A guide to convolution arithmetic
for deep learning", chapter 2; the padding "same" is Keras'.
"""

from typing import NamedTuple

from minunet.base.backend import Array, accumulation_dtype, array_module
from minunet.ops.checks import check_array, check_images, check_kernel, check_stride_and_padding


class Conv2dCache(NamedTuple):
    """What :func:`conv2d_backward` needs."""

    x: Array  # dweight multiplies dy by the pixels that each tap has met
    weight: Array  # dx sends dy back through the same weights
    has_bias: bool  # and so a dbias
    stride: int  # which pixels each tap has met
    pad: tuple[tuple[int, int], tuple[int, int]]  # pixels of padding: (top, bottom), (left, right)
    y_shape: tuple[int, ...]  # what dy must look like


def conv2d_forward(
    x: Array, weight: Array, bias: Array | None, stride: int = 1, padding: int | str = "same"
) -> tuple[Array, Conv2dCache]:
    """Convolve ``x`` (N, H, W, C_in) with ``weight`` (KH, KW, C_in, C_out).

    ``bias`` is (C_out,) or None. ``padding`` is a number of zero pixels on each side, or "same": the output
    has ceil(H / stride) rows, and an odd pixel of padding goes to the bottom and to the right.

    Returns y (N, H_out, W_out, C_out), of the dtype of x, and the cache.
    Raises ValueError if shapes or dtypes do not fit, or if the kernel is larger than the padded image.

    >>> import numpy as np
    >>> x = np.arange(16.0).reshape(1, 4, 4, 1)
    >>> y, cache = conv2d_forward(x, np.ones((3, 3, 1, 1)), None, padding=0)
    >>> y[0, :, :, 0]
    array([[45., 54.],
           [81., 90.]])
    """
    xp = array_module(x)
    check_images("x", x)
    check_kernel(weight, x.shape[3], x.dtype)
    check_stride_and_padding(stride, padding)
    if bias is not None:
        check_array("bias", bias, (weight.shape[3],), x.dtype)

    kernel_height, kernel_width, _, out_channels = weight.shape
    height, pad_rows = output_size(x.shape[1], kernel_height, stride, padding)
    width, pad_columns = output_size(x.shape[2], kernel_width, stride, padding)
    if height < 1 or width < 1:
        raise ValueError(f"x of {x.shape[1]} x {x.shape[2]} pixels with padding {padding} is smaller than the kernel")

    x_pad = xp.pad(x, ((0, 0), pad_rows, pad_columns, (0, 0)))
    y = xp.zeros((len(x), height, width, out_channels), dtype=x.dtype)
    for u in range(kernel_height):
        for v in range(kernel_width):
            # The input pixels s*i + u, s*j + v: those that tap (u, v) meets, one for each output pixel.
            rows, columns = slice(u, u + stride * height, stride), slice(v, v + stride * width, stride)
            y += x_pad[:, rows, columns] @ weight[u, v]
    if bias is not None:
        y += bias
    return y, Conv2dCache(x, weight, bias is not None, stride, (pad_rows, pad_columns), y.shape)


def conv2d_backward(dy: Array, cache: Conv2dCache) -> tuple[Array, Array, Array | None]:
    """The gradients of :func:`conv2d_forward`: (dx, dweight, dbias), dbias None if there was no bias.

    Forward adds ``x_pad[rows, columns] @ weight[u, v]`` to y for each tap. By the product rule that tap
    sends ``dy @ weight[u, v].T`` back to the same pixels, and collects ``x.T @ dy`` for its weights.
    """
    x, weight, has_bias, stride, (pad_rows, pad_columns), y_shape = cache
    xp = array_module(dy)
    check_array("dy", dy, y_shape, x.dtype)

    _, height, width, _ = y_shape
    x_pad = xp.pad(x, ((0, 0), pad_rows, pad_columns, (0, 0)))
    dx_pad = xp.zeros_like(x_pad)
    dweight = xp.empty_like(weight)
    # (KH, KW, C_out, C_in), laid out anew: a matrix product with a transposed view takes twice the time.
    weight_t = xp.ascontiguousarray(weight.swapaxes(2, 3))
    sum_dtype = accumulation_dtype(x.dtype)
    for u in range(weight.shape[0]):
        for v in range(weight.shape[1]):
            rows, columns = slice(u, u + stride * height, stride), slice(v, v + stride * width, stride)
            dx_pad[:, rows, columns] += dy @ weight_t[u, v]
            # One (C_in, C_out) product for each image row, then the sum over images and rows.
            products = x_pad[:, rows, columns].swapaxes(2, 3) @ dy
            dweight[u, v] = products.sum(axis=(0, 1), dtype=sum_dtype)

    (top, _), (left, _) = pad_rows, pad_columns  # the padding was no input: its part of the gradient is dropped
    dx = dx_pad[:, top : top + x.shape[1], left : left + x.shape[2]].copy()
    dbias = dy.sum(axis=(0, 1, 2), dtype=sum_dtype).astype(dy.dtype) if has_bias else None
    return dx, dweight, dbias


def output_size(size: int, kernel: int, stride: int, padding: int | str) -> tuple[int, tuple[int, int]]:
    """The output's length along one axis, and the zeros to put (before, after) the input's ``size`` pixels.

    >>> output_size(5, kernel=3, stride=2, padding="same")
    (3, (1, 1))
    >>> output_size(6, kernel=3, stride=2, padding="same")
    (3, (0, 1))
    """
    if padding != "same":
        pad = int(padding)
        return (size + 2 * pad - kernel) // stride + 1, (pad, pad)
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    return out, (total // 2, total - total // 2)
