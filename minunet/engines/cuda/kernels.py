"""The kernels of the ``.cu`` files behind the methods of ``SpecificationKernels``: which launch, over how many blocks.

A method checks shapes, chooses tiles and launches; the arithmetic is in the ``.cu`` file that it names. The launching
itself is a device's (device.py): ``CupyDevice``, or the emulator's in tests/engines/cuda, so that the
tests run this very code without a GPU. Which of them have run on one, and how fast: docs/engines/gpu.md.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from minunet.base import rng
from minunet.base.backend import Array
from minunet.engines.cuda.device import CupyDevice, Device
from minunet.engines.cuda.programs import (
    PRECISIONS,
    STATIC_BYTES,
    TILES,
    WGMMA_SUMMING,
    WGMMA_TILES,
    Summing,
    Tile,
)
from minunet.engines.cuda.specification import Mask, Norm, SpecificationKernels, Weight
from minunet.network.loss import SegmentationLoss


class Direction(IntEnum):
    """What a convolution's kernel is used for: the enum of this name in conv.cuh."""

    FORWARD = 0
    GRAD_INPUT = 1
    UP = 2  # transposed, stride 2
    UP_GRAD_INPUT = 3


class Kernels(SpecificationKernels):
    """The methods of the specification, by kernels on ``device``. They raise ValueError for shapes that do not fit."""

    def __init__(self, device: Device, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {sorted(PRECISIONS)}, got {precision!r}")
        super().__init__(device.xp, precision)
        self.device = device
        self.elements = 8 if precision == "bf16" else 4  # in 16 bytes
        self._scratch = device.xp.empty(0, "float32")
        self._window_scratch = device.xp.empty(0, self.dtype)
        self._weights: dict[tuple[int, tuple[int, ...], bool], _Prepared] = {}

    def _launch(self, program: str, kernel: str, blocks: int, threads: int, *arguments: Any, shared: int = 0) -> None:
        self.device.launch(program, kernel, blocks, threads, arguments, shared)

    def _partials(self, size: int, dtype: str = "float32") -> Array:
        """Scratch for ``size`` numbers, valid until the next call of a method."""
        floats = size * (2 if dtype == "float64" else 1)
        if self._scratch.size < floats:
            self._scratch = self.xp.empty(0, "float32")  # freed before the larger one is made
            self._scratch = self.xp.empty(floats, "float32")
        return self._scratch[:floats].view(dtype)

    def store(self, out: Array, values: Array) -> None:
        """As specified: ``values`` go to ``out`` in its format. In tf32 they are first rounded to its 10 bits.

        The next convolution multiplies what is stored here, the images above all, as it stands. Rounding is to the
        nearest, ties away from zero, as the kernels round what they store themselves (to_factor in element.cuh).
        """
        if self.precision == "tf32":
            bits = self.xp.ascontiguousarray(values, dtype="float32").view("uint32")
            # float32 has 23 bits behind the point. Half of the 10th, added, carries into it; the other 13 are cleared.
            rounded = ((bits + 0x1000) & 0xFFFFE000).astype("uint32").view("float32")
            values = self.xp.where(self.xp.isfinite(values), rounded, values)
        super().store(out, values)

    # --- Convolutions: conv.cu, grad_weight.cu, weights.cu ------------------------------------------------------------

    def prepare_weights(self, weights: list[Weight]) -> None:
        """Lay out ``weights`` for the kernels, in the memory of their former layouts; those of others are forgotten."""
        former, self._weights = self._weights, {}
        for weight, transposed in weights:
            windows = not transposed and self._takes_windows(weight)
            key = (self.device.address(weight), weight.shape, windows)
            self._weights[key] = self._prepare(weight, windows, former.get(key))

    def _prepare(self, weight: Array, windows: bool, into: "_Prepared | None" = None) -> "_Prepared":
        """The two layouts of ``weight``, in new memory or ``into`` those of an earlier step."""
        height, width, in_channels, out_channels = weight.shape
        taps = height * width
        if into is None:
            forward = (1, taps * in_channels, out_channels) if windows else (taps, in_channels, out_channels)
            into = _Prepared(self._panels(*forward), self._panels(taps, out_channels, in_channels))
        blocks = _parts(max(into.forward.size, into.grad_input.size) // self.elements, 256)
        tiles = self._tile(out_channels).channels, self._tile(in_channels).channels
        sizes = (taps, in_channels, out_channels, *tiles, windows)
        self._launch("weights", "prepare_weight", blocks, 256, weight, into.forward, into.grad_input, *sizes)
        return into

    def _panels(self, taps: int, in_channels: int, out_channels: int) -> Array:
        """Memory for a layout of weights, see _Prepared."""
        panels, tile = _parts(in_channels, 4 * self.elements), self._tile(out_channels).channels
        return self.xp.empty((taps, panels, _parts(out_channels, tile), 4, tile, self.elements), self.dtype)

    def _prepared(self, weight: Array, windows: bool = False) -> "_Prepared":
        """The layouts that prepare_weights has made of ``weight``, or else new ones; ``windows``: for windows.cu."""
        found = self._weights.get((self.device.address(weight), weight.shape, windows))
        return self._prepare(weight, windows) if found is None else found

    def conv3x3(self, x: Array, weight: Array, y: Array, mean: Array | None = None, var: Array | None = None) -> None:
        """A 3x3 convolution of x into y. The statistics of y are taken tile by tile, and then put together."""
        _check_weight(weight, (3,), x.shape[3], y.shape[3])
        _check_images("y", y, x.shape[:3])
        windows, kernel = self._takes_windows(weight), 3
        laid_out = self._prepared(weight, windows)
        if windows:
            x, kernel = self._windows(x), 1
        if mean is None or var is None:
            self._convolve(Direction.FORWARD, kernel, x, laid_out.forward, y)
            return
        tile = self._tile(y.shape[3])
        tiles, _ = _pixel_tiles(tile, *x.shape[:3])
        partials = self._partials(tiles * 3 * y.shape[3])  # count, mean, squares: finish_statistics in reduce.cu
        self._convolve(Direction.FORWARD, kernel, x, laid_out.forward, y, partials=partials)
        blocks = _parts(y.shape[3], 32)
        self._launch("reduce", "finish_statistics", blocks, 1024, partials, tiles, y.shape[3], mean, var)

    def _takes_windows(self, weight: Array) -> bool:
        """Whether a convolution has so few input channels that it is done on its windows (windows.cu).

        A window has at most 64 numbers then: as many channels as a block of grad_weight.cu takes.
        """
        return weight.shape[0] == 3 and 9 * weight.shape[2] <= 64

    def _windows(self, x: Array) -> Array:
        """The windows of images ``x``, in memory that holds them until the next call."""
        n, height, width, channels = x.shape
        parts = 4 * _parts(9 * channels, 4 * self.elements)
        size = n * height * width * parts * self.elements
        if self._window_scratch.size < size:
            self._window_scratch = self.xp.empty(0, self.dtype)  # freed before the larger one is made
            self._window_scratch = self.xp.empty(size, self.dtype)
        windows = self._window_scratch[:size]
        sizes = (n, height, width, channels, parts)
        blocks = _parts(n * height * width, 256 // parts)
        self._launch("windows", "windows", blocks, 256, x, _pitch("x", x), windows, *sizes)
        return windows.reshape(n, height, width, parts * self.elements)

    def conv3x3_grad_input(self, dy: Array, weight: Array, dx: Array, mask: Mask | None = None) -> None:
        """The gradient of a 3x3 convolution's input: a convolution of dy, into dx, through the dropout mask of x."""
        _check_weight(weight, (3,), dx.shape[3], dy.shape[3])
        _check_images("dx", dx, dy.shape[:3])
        laid_out = self._prepared(weight, self._takes_windows(weight))
        self._convolve(Direction.GRAD_INPUT, 3, dy, laid_out.grad_input, dx, mask=mask, rounded=True)

    def conv_transpose(self, x: Array, weight: Array, bias: Array, y: Array, mask: Mask | None = None) -> None:
        """A transposed convolution of x, stride 2, into y, of twice the size; with its bias and then dropout."""
        n, height, width, _ = x.shape
        _check_weight(weight, (2, 3), x.shape[3], y.shape[3])
        _check_images("y", y, (n, 2 * height, 2 * width))
        laid_out = self._prepared(weight).forward
        self._convolve(Direction.UP, weight.shape[0], x, laid_out, y, bias=bias, mask=mask, rounded=True)

    def conv_transpose_grad_input(self, dy: Array, weight: Array, dx: Array) -> None:
        """The gradient of a transposed convolution's input: a convolution of dy with stride 2, into dx."""
        n, height, width, _ = dx.shape
        _check_weight(weight, (2, 3), dx.shape[3], dy.shape[3])
        _check_images("dy", dy, (n, 2 * height, 2 * width))
        self._convolve(Direction.UP_GRAD_INPUT, weight.shape[0], dy, self._prepared(weight).grad_input, dx)

    def _convolve(
        self,
        direction: Direction,
        kernel: int,
        x: Array,
        weight: Array,
        y: Array,
        bias: Array | None = None,
        mask: Mask | None = None,
        partials: Array | None = None,
        rounded: bool = False,
    ) -> None:
        """The launch behind every convolution: from ``x`` into ``y``, by a ``weight`` that is laid out for the kernel.

        ``kernel`` is its side. ``partials`` receives the statistics of each tile; ``rounded``: y is rounded to what a
        tensor core can multiply. The arguments of the launch are those of conv.cuh.
        """
        n, height, width, _ = y.shape if direction == Direction.UP_GRAD_INPUT else x.shape  # the smaller images
        tile = self._tile(y.shape[3])
        tiles, columns_log2 = _pixel_tiles(tile, n, height, width)
        parities = 4 if direction == Direction.UP else 1  # of the row and the column of y
        blocks = tiles * _parts(y.shape[3], tile.channels) * parities
        self._launch(
            tile.program, "convolve", blocks, tile.threads,
            x, _pitch("x", x), weight, y, _pitch("y", y), n, height, width, x.shape[3], y.shape[3],
            direction, kernel, columns_log2, bias, *_mask_arguments(mask), partials, rounded,
            shared=tile.shared,
        )  # fmt: skip

    def _tile(self, out_channels: int) -> Tile:
        """The tile of a convolution with ``out_channels``: the narrowest that has room for them, or the widest."""
        tiles = WGMMA_TILES if self.device.hopper and self.precision != "float32" else TILES
        return tiles[128 if out_channels > 64 else 64 if out_channels > 32 else 32]

    def conv3x3_grad_weight(self, x: Array, dy: Array, dweight: Array) -> None:
        """The gradient of a 3x3 convolution's weights. With few input channels its windows are one tap (windows.cu)."""
        _check_weight(dweight, (3,), x.shape[3], dy.shape[3])
        _check_images("dy", dy, x.shape[:3])
        if not self._takes_windows(dweight):
            self._grad_weight(x, dy, dweight, transposed=False)
            return
        windows = self._windows(x)
        padded = self.xp.empty((1, 1, windows.shape[3], dy.shape[3]), "float32")
        self._grad_weight(windows, dy, padded, transposed=False)
        dweight[...] = padded[0, 0, : 9 * x.shape[3]].reshape(dweight.shape)

    def conv_transpose_grad_weight(self, x: Array, dy: Array, dweight: Array, dbias: Array) -> None:
        """The gradients of a transposed convolution's weights, and of its bias: the sum of dy over all pixels."""
        n, height, width, _ = x.shape
        _check_weight(dweight, (2, 3), x.shape[3], dy.shape[3])
        _check_images("dy", dy, (n, 2 * height, 2 * width))
        self._grad_weight(dy, x, dweight, transposed=True)
        pixels, channels = 4 * n * height * width, dy.shape[3]
        wide, parts = self._wide(channels, dy)
        rows, blocks = self._rows(pixels, parts, 5)
        partials = self._partials(rows * channels)
        self._launch("reduce", "column_sums", blocks, 256, dy, _pitch("dy", dy), pixels, channels, wide, partials)
        self._sum(partials, rows, channels, dbias)

    def _grad_weight(self, patch: Array, pixels: Array, dweight: Array, transposed: bool) -> None:
        """The gradient of the weights, as partial sums over tiles of pixels, which are then added up.

        For each tap it sums the products of ``pixels`` and of the pixels of ``patch`` that the tap pairs them with:
        ``pixels`` is dy and ``patch`` x, and in a transposed convolution the other way round (grad_weight.cuh).
        """
        n, height, width, _ = pixels.shape
        kernel, size = dweight.shape[0], dweight.size
        summing = self._summing(kernel, transposed)
        tiles = _parts(n * (height + 1), summing.rows) * _parts(width, 16)
        blocks = _parts(patch.shape[3], 64) * _parts(pixels.shape[3], summing.channels) * (4 if transposed else 1)
        # Enough blocks to fill the GPU twice, and partial sums of at most 256 MB.
        splits = max(1, min(tiles, 2 * self.device.multiprocessors // blocks, 2**26 // size))
        partials = self._partials(splits * size)
        strides = (1, patch.shape[3]) if transposed else (pixels.shape[3], 1)  # of their channels in dweight
        self._launch(
            summing.program, "grad_weight", blocks * splits, summing.threads,
            patch, _pitch("x", patch), patch.shape[3], pixels, _pitch("dy", pixels), pixels.shape[3], n, height, width,
            transposed, kernel, splits, *strides, partials,
            shared=summing.shared,
        )  # fmt: skip
        self._sum(partials, splits, size, dweight)

    def _summing(self, kernel: int, transposed: bool) -> Summing:
        """The program for the gradient of the weights of a convolution whose side is ``kernel``."""
        if self.device.hopper and self.precision == "bf16":
            return WGMMA_SUMMING[3 if kernel == 3 and not transposed else 2]
        pitch = 64 * 16 // self.elements + (16 if self.elements == 8 else 32)  # PITCH in grad_weight.cu
        threads = 128 * (kernel - 1 if transposed else kernel)
        for rows in (8, 4):  # of a tile; the larger one if it fits
            shared = 2 * (18 * (rows + 2) + 16 * rows) * pitch
            if shared + STATIC_BYTES <= self.device.shared_bytes:
                break
        return Summing(f"grad_weight_{rows}", 64, threads, shared, rows)

    def _sum(self, partials: Array, count: int, size: int, out: Array) -> None:
        """Into ``out``: the sum of the ``count`` rows of ``size`` numbers."""
        if size < 4096:  # a thread a number would be too few threads: here it is 32
            self._launch("reduce", "sum_many_partials", _parts(size, 32), 1024, partials, count, size, out)
        else:
            self._launch("reduce", "sum_partials", _parts(size, 256), 256, partials, count, size, out)

    # --- Batch norm and ReLU: norm.cu ---------------------------------------------------------------------------------

    def _wide(self, channels: int, *arrays: Array, at_once: int | None = None) -> tuple[int, int]:
        """Whether a thread can read ``at_once`` channels (16 bytes, if None), and how many parts a pixel then has."""
        at_once = at_once or self.elements
        whole = all(_pitch("an argument", array) % at_once == 0 for array in arrays)
        aligned = all(self.device.address(array) % (16 // self.elements * at_once) == 0 for array in arrays)
        wide = channels % at_once == 0 and whole and aligned
        return int(wide), channels // at_once if wide else channels

    def _rows(self, pixels: int, parts: int, at_a_time: int) -> tuple[int, int]:
        """Over how many blocks the pixels are spread, and the blocks in all (the struct Worker of reduce.cuh).

        As many as run at a time, ``at_a_time`` on each multiprocessor (as many as the kernel's registers allow): what a
        thread prepares before its first pixel, and adds up after its last, is then done once. But no more than have
        four pixels for each thread.
        """
        side_by_side = min(parts, 256)
        tiles = _parts(parts, side_by_side)
        rows = max(1, min(_parts(pixels, 256 // side_by_side * 4), at_a_time * self.device.multiprocessors // tiles))
        return rows, rows * tiles

    def norm_relu(self, norm: Norm, out: Array) -> None:
        """Batch norm and ReLU of y, into out."""
        n, height, width, channels = norm.y.shape
        _check_images("out", out, (n, height, width), channels)
        wide, parts = self._wide(channels, norm.y, out)
        _, blocks = self._rows(n * height * width, parts, 4)
        self._launch(
            "norm", "norm_relu", blocks, 256,
            norm.y, _pitch("y", norm.y), out, _pitch("out", out), n * height * width, channels,
            *_statistics(norm), wide,
        )  # fmt: skip

    def norm_relu_pool(
        self,
        norm: Norm,
        skip: Array,
        pooled: Array,
        skip_mask: Mask | None = None,
        pooled_mask: Mask | None = None,
    ) -> None:
        """Batch norm and ReLU of y into skip, and max-pooled into pooled, each with dropout: one pass over memory."""
        n, height, width, channels = pooled.shape
        _check_images("y", norm.y, (n, 2 * height, 2 * width), channels)
        _check_images("skip", skip, norm.y.shape[:3], channels)
        scales = {mask.scale for mask in (skip_mask, pooled_mask) if mask is not None} or {1.0}
        if len(scales) > 1:
            raise ValueError(f"skip_mask and pooled_mask must have the same scale, got {sorted(scales)}")
        wide, parts = self._wide(channels, norm.y, skip, pooled)
        _, blocks = self._rows(n * height * width, parts, 4)
        self._launch(
            "norm", "norm_relu_pool", blocks, 256,
            norm.y, _pitch("y", norm.y), skip, _pitch("skip", skip), pooled, _pitch("pooled", pooled),
            n, height, width, channels, *_statistics(norm),
            *_mask_arguments(skip_mask)[:4], *_mask_arguments(pooled_mask)[:2], float(scales.pop()), wide,
        )  # fmt: skip

    def norm_relu_backward(self, da: Array, norm: Norm, dy: Array, dgamma: Array, dbeta: Array) -> None:
        """From da, the gradient of relu(norm(y)), to dy, dgamma and dbeta."""
        self._norm_relu_backward(da, None, norm, dy, dgamma, dbeta)

    def norm_relu_pool_backward(
        self, dskip: Array, dpooled: Array, norm: Norm, dy: Array, dgamma: Array, dbeta: Array
    ) -> None:
        """From the gradients of relu(norm(y)) and of its max-pool to dy, dgamma and dbeta."""
        n, height, width, channels = norm.y.shape
        _check_images("dpooled", dpooled, (n, height // 2, width // 2), channels)
        self._norm_relu_backward(dskip, dpooled, norm, dy, dgamma, dbeta)

    def _norm_relu_backward(
        self, da: Array, dpooled: Array | None, norm: Norm, dy: Array, dgamma: Array, dbeta: Array
    ) -> None:
        """The backward of ReLU and batch norm, and of the max-pool after them unless ``dpooled`` is None.

        Two passes over memory: the sums dgamma and dbeta, and dy, which needs them.
        """
        y = norm.y
        n, height, width, channels = y.shape
        _check_images("da", da, y.shape[:3], channels)
        _check_images("dy", dy, y.shape[:3], channels)
        arrays = [da, y, dy] if dpooled is None else [da, y, dy, dpooled]
        wide, parts = self._wide(channels, *arrays, at_once=None if dpooled is None else 4)  # POOLED in norm.cu
        rows, blocks = self._rows(n * height * width // (1 if dpooled is None else 4), parts, 3)
        partials = self._partials((rows + 1) * 2 * channels)
        sums = partials[rows * 2 * channels :]  # dgamma, then dbeta
        pool_pitch = 0 if dpooled is None else _pitch("dpooled", dpooled)
        read = (da, _pitch("da", da), dpooled, pool_pitch, y, _pitch("y", y))
        sizes = (n, height, width, channels, *_statistics(norm))
        self._launch("norm", "norm_relu_reduce", blocks, 256, *read, *sizes, wide, partials)
        self._sum(partials, rows, 2 * channels, sums)
        dgamma[...], dbeta[...] = sums[:channels], sums[channels:]
        written = (dy, _pitch("dy", dy))
        self._launch("norm", "norm_relu_gradient", blocks, 256, *read, *written, *sizes, dgamma, dbeta, wide)

    # --- Dropout, head, loss: dropout.cu, head.cu, loss.cu ------------------------------------------------------------

    def dropout_bits(self, bits: Array, key: rng.Key, rate: float) -> None:
        """Draw a dropout mask. A thread makes a word: 16 values."""
        n, words = bits.shape
        threshold = round(rate * 2**16)
        blocks = _parts(n * words, 256)
        self._launch("dropout", "dropout_bits", blocks, 256, bits, words, n, *_key_words(key), threshold)

    def head(self, x: Array, weight: Array, bias: Array, logits: Array) -> None:
        """The last convolution, of side 1 or 3, into float32 logits."""
        n, height, width, channels = x.shape
        outputs = weight.shape[3]
        _check_weight(weight, (1, 3), channels, outputs)
        wide, _ = self._head_parts(channels, outputs, x)
        blocks = _parts(n * _parts(height, 4) * _parts(width, 16), 16)  # 16 strips of 4 x 16 pixels a block
        sizes = (n, height, width, channels, outputs, weight.shape[0])
        self._launch("head", "head", blocks, 256, x, _pitch("x", x), weight, bias, logits, *sizes, wide)

    def head_backward(self, dlogits: Array, x: Array, weight: Array, dx: Array, dweight: Array, dbias: Array) -> None:
        """The backward of the head: dx, and the sums dweight and dbias, first for each block."""
        n, height, width, channels = x.shape
        outputs, size = weight.shape[3], weight.size + dbias.size
        _check_weight(weight, (1, 3), channels, outputs)
        wide, parts = self._head_parts(channels, outputs, x, dx)
        rows, blocks = self._rows(n * height * _parts(width, 16), parts, 2)  # strips
        partials = self._partials((rows + 1) * size)
        sums = partials[rows * size :]
        self._launch(
            "head", "head_backward", blocks, 256,
            dlogits, x, _pitch("x", x), weight, dx, _pitch("dx", dx),
            n, height, width, channels, outputs, weight.shape[0], wide, partials,
        )  # fmt: skip
        self._sum(partials, rows, size, sums)
        dweight[...], dbias[...] = sums[: weight.size].reshape(weight.shape), sums[weight.size :]

    def _head_parts(self, channels: int, outputs: int, *arrays: Array) -> tuple[int, int]:
        """Whether a thread of head.cu has four channels, and how many threads a pixel then has."""
        return self._wide(channels, *arrays, at_once=4) if outputs == 1 else (0, channels)

    def loss(self, logits: Array, target: Array, loss: SegmentationLoss, value: Array, dlogits: Array) -> None:
        """The loss and its gradient: the sums that Dice and cross entropy need, the value, then dlogits."""
        n, values = len(logits), logits[0].size
        # Blocks an image: four values for each of their threads, or four blocks a multiprocessor in all.
        per_image = max(1, min(_parts(values, 1024), 4 * self.device.multiprocessors // n))
        partials = self._partials(n * per_image * 4 + n, "float64")
        dice = partials[n * per_image * 4 :].view("float32")  # two numbers an image
        self._launch("loss", "loss_sums", n * per_image, 256, logits, target, values, per_image, partials)
        weights = (np.float64(loss.dice_weight), np.float64(loss.bce_weight), np.float64(loss.smooth))
        over_batch = loss.over == "batch"
        self._launch("loss", "loss_value", 1, 32, partials, n, per_image, values, *weights, over_batch, value, dice)
        scales = (float(loss.dice_weight), float(loss.bce_weight / (n * values)))
        blocks = _parts(n * values, 256)
        self._launch("loss", "loss_gradient", blocks, 256, logits, target, values, n, dice, *scales, dlogits)

    # --- What follows the gradients: optimizer.cu ---------------------------------------------------------------------

    def sum_of_squares(self, flat: Array) -> Array:
        """The sum of the squares of a long array, in float64: a sum for each block, and the sum of these."""
        blocks = min(_parts(flat.size, 2048), 8 * self.device.multiprocessors)  # 8 numbers a thread, or more
        partials = self._partials(blocks, "float64")
        total = self.xp.empty(1, "float64")
        self._launch("optimizer", "squares", blocks, 256, flat, np.int64(flat.size), partials)
        self._launch("optimizer", "sum_doubles", 1, 256, partials, blocks, total)
        return total

    def table(self, columns: list[list[Array]]) -> "Table":
        return Table(self.device, columns)

    def adamw(
        self, table: "Table", lr: float, betas: tuple[float, float], eps: float, steps: int, decays: list[float]
    ) -> None:
        """A step of AdamW for all rows (theta, gradient, first and second moment), in one launch."""
        beta1, beta2 = betas
        corrections = (1 - beta1**steps, 1 - beta2**steps)
        numbers = [float(number) for number in (beta1, 1 - beta1, beta2, 1 - beta2, eps, *corrections)]
        arguments = (*table.arguments, table.decays(decays), np.float64(lr), *numbers)
        self._launch("optimizer", "adamw", table.blocks, 256, *arguments)

    def lerp(self, table: "Table", decay: float) -> None:
        """For all rows (average, value), in one launch: average = decay * average + (1 - decay) * value."""
        self._launch("optimizer", "lerp", table.blocks, 256, *table.arguments, float(decay), float(1 - decay))

    # --- Augmentation: augment.cu -------------------------------------------------------------------------------------

    def affine(
        self, images: Array, masks: Array, matrices: np.ndarray, moved_images: Array, moved_masks: Array
    ) -> None:
        """Images and masks, each moved by its matrix. A thread makes an output pixel of both."""
        n, height, width, channels = images.shape
        sizes = (n, height, width, channels, masks.shape[3])
        _check_like("moved_images", moved_images, images)
        _check_images("masks", masks, (n, height, width))
        _check_like("moved_masks", moved_masks, masks)
        if matrices.shape != (n, 2, 2):
            raise ValueError(f"matrices must have shape {(n, 2, 2)}, got {matrices.shape}")
        moves = self.xp.asarray(np.ascontiguousarray(matrices, dtype="float64"))
        blocks = _parts(n * height * width, 256)
        self._launch("augment", "affine", blocks, 256, images, masks, moves, moved_images, moved_masks, *sizes)

    def add_noise(self, images: Array, strength: Array, key: rng.Key, noisy: Array) -> None:
        """Images with Gaussian noise, into noisy. A thread draws eight numbers."""
        _check_like("noisy", noisy, images)
        n, values = len(images), images[0].size
        if strength.shape != (n, 1, 1, 1):
            raise ValueError(f"strength must have shape {(n, 1, 1, 1)}, got {strength.shape}")
        blocks = _parts(n * _parts(values, 8), 256)
        words = _key_words(key._replace(stream=rng.NOISE))
        self._launch("augment", "add_noise", blocks, 256, images, strength, noisy, values, n, *words)


class Table:
    """The arrays of several lists, side by side, as a kernel finds them: pointers, sizes, which block works where."""

    chunk = 8192  # CHUNK in optimizer.cu

    def __init__(self, device: Device, columns: list[list[Array]]) -> None:
        rows = list(zip(*columns, strict=True))
        for row in rows:
            for array in row:
                if array.dtype != np.float32 or array.shape != row[0].shape or not array.flags.c_contiguous:
                    raise ValueError(f"a table takes contiguous float32 arrays of one shape a row, got {array.shape}")
        self.xp = device.xp
        pointers = np.array([[device.address(array) for array in row] for row in rows], dtype="uint64")
        sizes = np.array([row[0].size for row in rows], dtype="int64")
        chunks = [(tensor, place) for tensor, size in enumerate(sizes) for place in range(_parts(size, self.chunk))]
        self.blocks = len(chunks)
        self.arrays = columns  # kept alive: the kernels know only where they are
        self.arguments = tuple(map(self.xp.asarray, (pointers, sizes, np.array(chunks, dtype="int32"))))
        self._decays: tuple[list[float], Array] = ([], None)

    def decays(self, decays: list[float]) -> Array:
        """The weight decay of each row, on the device; copied there when it changes."""
        if self._decays[0] != decays:
            self._decays = (list(decays), self.xp.asarray(np.array(decays, dtype="float64")))
        return self._decays[1]


class CupyKernels(Kernels):
    """The kernels on the current GPU, compiled by NVRTC when first used (CuPy keeps what it compiled on disk).

    ``hopper``: whether a Hopper GPU gets those that only it can run.
    """

    def __init__(self, precision: str, hopper: bool = True) -> None:
        super().__init__(CupyDevice(precision, hopper), precision)
        self.name = "wgmma" if self.device.hopper and precision != "float32" else "mma.sync"


@dataclass(frozen=True)
class _Prepared:
    """A convolution's weights in the two layouts of weights.cu.

    (taps, panels of input channels, tiles of output channels, 4, channels of a tile, elements of a part), where the
    grad-input has C_out input channels and C_in output channels.
    """

    forward: Array  # for windows.cu of one tap
    grad_input: Array


def _pixel_tiles(tile: Tile, n: int, height: int, width: int) -> tuple[int, int]:
    """How many tiles cover the images (stacked, with a row between two), and log2 of their width.

    16 or 8 pixels wide, whichever covers with fewer.
    """
    counts = {log2: _parts(n * (height + 1), tile.pixels >> log2) * _parts(width, 1 << log2) for log2 in (4, 3)}
    columns_log2 = min(counts, key=lambda log2: counts[log2])
    return counts[columns_log2], columns_log2


def _parts(size: int, part: int) -> int:
    return -(-size // part)


def _mask_arguments(mask: Mask | None) -> tuple[Array | None, int, int, int, float]:
    """A mask as the kernels take it: bits (null: there is none), words an image, channels, the first of them, scale."""
    if mask is None:
        return None, 0, 0, 0, 1.0
    words = mask.bits.shape[1]
    if words >= 2**27:
        raise ValueError(f"bits must be of fewer than 2**31 values an image, got {16 * words}")
    return mask.bits, words, mask.channels, mask.first, float(mask.scale)


def _statistics(norm: Norm) -> tuple[Array, Array, Array, Array, float]:
    """What the kernels need of a batch norm beside y."""
    return norm.mean, norm.var, norm.gamma, norm.beta, float(norm.eps)


def _key_words(key: rng.Key) -> list[np.uint64]:
    """A key as philox.cuh takes it."""
    return [np.uint64(word) for word in (key.seed, key.epoch, key.step, key.stream, key.image)]


def _pitch(name: str, x: Array) -> int:
    """How many elements lie between two pixels of ``x``, a view of some channels of a contiguous (N, H, W, C) array."""
    item, (_, height, width, channels) = x.dtype.itemsize, x.shape
    pitch = x.strides[2]
    fits = channels == 1 or x.strides[3] == item
    fits = fits and (height == 1 or x.strides[1] == width * pitch)
    fits = fits and (len(x) == 1 or x.strides[0] == height * width * pitch)
    if not fits:
        raise ValueError(f"{name} must be a view of the last axis of a contiguous array, got strides {x.strides}")
    return pitch // item


def _check_weight(weight: Array, kernels: tuple[int, ...], in_channels: int, out_channels: int) -> None:
    side = weight.shape[0]
    if side not in kernels or weight.shape != (side, side, in_channels, out_channels):
        raise ValueError(
            f"weight must have shape (k, k, {in_channels}, {out_channels}), k in {kernels}, got {weight.shape}"
        )


def _check_images(name: str, x: Array, images: tuple[int, ...], channels: int | None = None) -> None:
    if x.shape[:3] != tuple(images) or (channels is not None and x.shape[3] != channels):
        raise ValueError(f"{name} must have shape {(*images, channels or 'C')}, got {x.shape}")
    if math.prod(x.shape[:3]) >= 2**31:
        raise ValueError(f"{name} must have fewer than 2**31 pixels, got {x.shape}")


def _check_like(name: str, x: Array, example: Array) -> None:
    _check_images(name, x, example.shape[:3], example.shape[3])
    for array in (x, example):
        if array.dtype != np.float32 or not array.flags.c_contiguous:
            raise ValueError(f"{name} and what it is made of must be contiguous float32 arrays, got {array.dtype}")
