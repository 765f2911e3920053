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
from minunet.engines.cuda.specification import SpecificationKernels


class Direction(IntEnum):
    """What a convolution's kernel is used for: the enum of this name in conv.cuh."""

    FORWARD = 0
    GRAD_INPUT = 1
    UP = 2  # transposed, stride 2
    UP_GRAD_INPUT = 3


class Kernels(SpecificationKernels):
    """The methods of the specification, by kernels on ``device``. What no kernel does the specification does."""

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
        """As specified; and for tf32 rounded to what a tensor core can multiply (to_factor in element.cuh)."""
        if self.precision == "tf32":
            bits = self.xp.ascontiguousarray(values, dtype="float32").view("uint32")
            rounded = ((bits + 0x1000) & 0xFFFFE000).astype("uint32").view("float32")
            values = self.xp.where(self.xp.isfinite(values), rounded, values)
        super().store(out, values)

    # --- Convolutions: conv.cu, grad_weight.cu, weights.cu ------------------------------------------------------------

    def prepare_weights(self, weights: dict[str, Array]) -> None:
        """Lay out the weights of all convolutions but the head's for the kernels. To be called when they change.

        ``weights`` are those of one network; the layouts of any other are forgotten.
        """
        former, self._weights = self._weights, {}
        for name, weight in weights.items():
            if weight.ndim == 4 and not name.startswith("head"):
                windows = not name.endswith("up.weight") and self._takes_windows(weight)
                key = (self.device.address(weight), weight.shape, windows)
                self._weights[key] = self._prepare(weight, windows, former.get(key))

    def _prepare(self, weight: Array, windows: bool, into: "_Prepared | None" = None) -> "_Prepared":
        """The two layouts of ``weight``, in new memory or ``into`` those of an earlier step."""
        height, width, in_channels, out_channels = weight.shape
        taps, panel = height * width, 4 * self.elements
        tiles = self._tile(out_channels).channels, self._tile(in_channels).channels
        if into is None:
            forward_taps, forward_ins = (1, taps * in_channels) if windows else (taps, in_channels)
            into = _Prepared(
                *(
                    self.xp.empty((taps, _parts(ins, panel), _parts(outs, tile), 4, tile, self.elements), self.dtype)
                    for taps, ins, outs, tile in (
                        (forward_taps, forward_ins, out_channels, tiles[0]),
                        (taps, out_channels, in_channels, tiles[1]),
                    )
                )
            )
        blocks = _parts(max(into.forward.size, into.grad_input.size) // self.elements, 256)
        sizes = (taps, in_channels, out_channels, *tiles, windows)
        self._launch("weights", "prepare_weight", blocks, 256, weight, into.forward, into.grad_input, *sizes)
        return into

    def _prepared(self, weight: Array, windows: bool = False) -> "_Prepared":
        """The layouts that prepare_weights has made of ``weight``, or else new ones; ``windows``: for windows.cu."""
        found = self._weights.get((self.device.address(weight), weight.shape, windows))
        return self._prepare(weight, windows) if found is None else found

    def conv3x3(self, x: Array, weight: Array, y: Array, mean: Array | None = None, var: Array | None = None) -> None:
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

    def conv3x3_grad_input(
        self, dy: Array, weight: Array, dx: Array, bits: Array | None = None, scale: float = 1.0
    ) -> None:
        _check_weight(weight, (3,), dx.shape[3], dy.shape[3])
        _check_images("dx", dx, dy.shape[:3])
        mask = (bits, dx.shape[3], 0, scale)
        laid_out = self._prepared(weight, self._takes_windows(weight))
        self._convolve(Direction.GRAD_INPUT, 3, dy, laid_out.grad_input, dx, mask=mask, rounded=1)

    def conv_transpose(
        self,
        x: Array,
        weight: Array,
        bias: Array,
        y: Array,
        bits: Array | None = None,
        channels: tuple[int, int] = (0, 0),
        scale: float = 1.0,
    ) -> None:
        if weight.shape[0] not in (2, 3):
            super().conv_transpose(x, weight, bias, y, bits, channels, scale)
            return
        n, height, width, _ = x.shape
        _check_weight(weight, (2, 3), x.shape[3], y.shape[3])
        _check_images("y", y, (n, 2 * height, 2 * width))
        total, first = channels if channels[0] else (y.shape[3], 0)
        mask = (bits, total, first, scale)
        laid_out = self._prepared(weight)
        self._convolve(Direction.UP, weight.shape[0], x, laid_out.forward, y, bias=bias, mask=mask, rounded=1)

    def conv_transpose_grad_input(self, dy: Array, weight: Array, dx: Array) -> None:
        if weight.shape[0] not in (2, 3):
            super().conv_transpose_grad_input(dy, weight, dx)
            return
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
        mask: tuple[Array | None, int, int, float] = (None, 0, 0, 1.0),
        partials: Array | None = None,
        rounded: int = 0,
    ) -> None:
        n, height, width, _ = (
            x.shape if direction != Direction.UP_GRAD_INPUT else y.shape
        )  # of the smaller image, where they differ
        tile = self._tile(y.shape[3])
        tiles, columns_log2 = _pixel_tiles(tile, n, height, width)
        parities = 4 if direction == Direction.UP else 1  # of the row and the column of y
        blocks = tiles * _parts(y.shape[3], tile.channels) * parities
        bits, total, first, scale = mask
        self._launch(
            tile.program, "convolve", blocks, tile.threads,
            x, _pitch("x", x), weight, y, _pitch("y", y), n, height, width, x.shape[3], y.shape[3],
            direction, kernel, columns_log2, bias, bits, _words(bits), total, first, float(scale), partials, rounded,
            shared=tile.shared,
        )  # fmt: skip

    def _tile(self, out_channels: int) -> Tile:
        """The tile for so many output channels: one as narrow as they need."""
        tiles = TILES
        if self.device.hopper and self.precision != "float32":
            tiles = WGMMA_TILES
        return tiles[128 if out_channels > 64 else 64 if out_channels > 32 else 32]

    def conv3x3_grad_weight(self, x: Array, dy: Array, dweight: Array) -> None:
        _check_weight(dweight, (3,), x.shape[3], dy.shape[3])
        _check_images("dy", dy, x.shape[:3])
        strides = (dy.shape[3], 1)
        if not self._takes_windows(dweight):
            self._grad_weight(x, dy, dweight, transposed=0, strides=strides)
            return
        windows = self._windows(x)
        padded = self.xp.empty((1, 1, windows.shape[3], dy.shape[3]), "float32")
        self._grad_weight(windows, dy, padded, transposed=0, strides=strides)
        dweight[...] = padded[0, 0, : 9 * x.shape[3]].reshape(dweight.shape)

    def conv_transpose_grad_weight(self, x: Array, dy: Array, dweight: Array, dbias: Array) -> None:
        if dweight.shape[0] not in (2, 3):
            super().conv_transpose_grad_weight(x, dy, dweight, dbias)
            return
        n, height, width, _ = x.shape
        _check_weight(dweight, (2, 3), x.shape[3], dy.shape[3])
        _check_images("dy", dy, (n, 2 * height, 2 * width))
        self._grad_weight(dy, x, dweight, transposed=1, strides=(1, dy.shape[3]))
        pixels, channels = 4 * n * height * width, dy.shape[3]
        wide, parts = self._wide(channels, dy)
        rows, blocks = self._rows(pixels, parts, 5)
        partials = self._partials(rows * channels)
        self._launch("reduce", "column_sums", blocks, 256, dy, _pitch("dy", dy), pixels, channels, wide, partials)
        self._sum(partials, rows, channels, dbias)

    def _grad_weight(
        self, patch: Array, pixels: Array, dweight: Array, transposed: int, strides: tuple[int, int]
    ) -> None:
        n, height, width, _ = pixels.shape
        kernel, size = dweight.shape[0], dweight.size
        summing = self._summing(kernel, transposed)
        tiles = _parts(n * (height + 1), summing.rows) * _parts(width, 16)
        blocks = _parts(patch.shape[3], 64) * _parts(pixels.shape[3], summing.channels) * (4 if transposed else 1)
        # Enough blocks to fill the GPU twice, and partial sums of at most 256 MB.
        splits = max(1, min(tiles, 2 * self.device.multiprocessors // blocks, 2**26 // size))
        partials = self._partials(splits * size)
        self._launch(
            summing.program, "grad_weight", blocks * splits, summing.threads,
            patch, _pitch("x", patch), patch.shape[3], pixels, _pitch("dy", pixels), pixels.shape[3], n, height, width,
            transposed, kernel, splits, *strides, partials,
            shared=summing.shared,
        )  # fmt: skip
        self._sum(partials, splits, size, dweight)

    def _summing(self, kernel: int, transposed: int) -> Summing:
        """The program for a gradient of the weights."""
        if self.device.hopper and self.precision == "bf16":
            return WGMMA_SUMMING[3 if kernel == 3 and not transposed else 2]
        pitch = 64 * 16 // self.elements + (16 if self.elements == 8 else 32)  # PITCH in grad_weight.cu
        threads = 128 * (kernel - 1 if transposed else kernel)
        large, small = (
            Summing(f"grad_weight_{rows}", 64, threads, 2 * (18 * (rows + 2) + 16 * rows) * pitch, rows)
            for rows in (8, 4)
        )
        fits = large.shared + STATIC_BYTES <= self.device.shared_bytes
        return large if fits else small

    def _sum(self, partials: Array, count: int, size: int, out: Array) -> None:
        """Into ``out``: the sum of the ``count`` rows of ``size`` numbers. Few numbers have 32 threads each."""
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

    def norm_relu(self, y: Array, mean: Array, var: Array, gamma: Array, beta: Array, out: Array, eps: float) -> None:
        n, height, width, channels = y.shape
        _check_images("out", out, y.shape[:3], channels)
        wide, parts = self._wide(channels, y, out)
        _, blocks = self._rows(n * height * width, parts, 4)
        self._launch(
            "norm", "norm_relu", blocks, 256,
            y, _pitch("y", y), out, _pitch("out", out), n * height * width, channels,
            mean, var, gamma, beta, float(eps), wide,
        )  # fmt: skip

    def norm_relu_pool(
        self,
        y: Array,
        mean: Array,
        var: Array,
        gamma: Array,
        beta: Array,
        skip: Array,
        pooled: Array,
        eps: float,
        skip_bits: Array | None = None,
        skip_channels: tuple[int, int] = (0, 0),
        pooled_bits: Array | None = None,
        scale: float = 1.0,
    ) -> None:
        n, height, width, channels = pooled.shape
        _check_images("y", y, (n, 2 * height, 2 * width), channels)
        _check_images("skip", skip, y.shape[:3], channels)
        total, first = skip_channels if skip_channels[0] else (channels, 0)
        wide, parts = self._wide(channels, y, skip, pooled)
        _, blocks = self._rows(n * height * width, parts, 4)
        self._launch(
            "norm", "norm_relu_pool", blocks, 256,
            y, _pitch("y", y), skip, _pitch("skip", skip), pooled, _pitch("pooled", pooled), n, height, width, channels,
            mean, var, gamma, beta, float(eps),
            skip_bits, _words(skip_bits), total, first, pooled_bits, _words(pooled_bits), float(scale), wide,
        )  # fmt: skip

    def norm_relu_backward(
        self,
        da: Array,
        y: Array,
        mean: Array,
        var: Array,
        gamma: Array,
        beta: Array,
        dy: Array,
        dgamma: Array,
        dbeta: Array,
        eps: float,
    ) -> None:
        self._norm_relu_backward(da, None, y, mean, var, gamma, beta, dy, dgamma, dbeta, eps)

    def norm_relu_pool_backward(
        self,
        dskip: Array,
        dpooled: Array,
        y: Array,
        mean: Array,
        var: Array,
        gamma: Array,
        beta: Array,
        dy: Array,
        dgamma: Array,
        dbeta: Array,
        eps: float,
    ) -> None:
        n, height, width, channels = y.shape
        _check_images("dpooled", dpooled, (n, height // 2, width // 2), channels)
        self._norm_relu_backward(dskip, dpooled, y, mean, var, gamma, beta, dy, dgamma, dbeta, eps)

    def _norm_relu_backward(
        self,
        da: Array,
        dpooled: Array | None,
        y: Array,
        mean: Array,
        var: Array,
        gamma: Array,
        beta: Array,
        dy: Array,
        dgamma: Array,
        dbeta: Array,
        eps: float,
    ) -> None:
        n, height, width, channels = y.shape
        _check_images("da", da, y.shape[:3], channels)
        _check_images("dy", dy, y.shape[:3], channels)
        arrays = [da, y, dy] if dpooled is None else [da, y, dy, dpooled]
        wide, parts = self._wide(channels, *arrays, at_once=None if dpooled is None else 4)  # POOLED in norm.cu
        rows, blocks = self._rows(n * height * width // (1 if dpooled is None else 4), parts, 3)
        partials = self._partials((rows + 1) * 2 * channels)
        sums = partials[rows * 2 * channels :]  # dgamma, then dbeta
        pool_pitch = 0 if dpooled is None else _pitch("dpooled", dpooled)
        gradients = (da, _pitch("da", da), dpooled, pool_pitch, y, _pitch("y", y))
        norm = (n, height, width, channels, mean, var, gamma, beta, float(eps))
        self._launch("norm", "norm_relu_reduce", blocks, 256, *gradients, *norm, wide, partials)
        self._sum(partials, rows, 2 * channels, sums)
        dgamma[...], dbeta[...] = sums[:channels], sums[channels:]
        written = (dy, _pitch("dy", dy))
        self._launch("norm", "norm_relu_gradient", blocks, 256, *gradients, *written, *norm, dgamma, dbeta, wide)

    # --- Dropout, head, loss: dropout.cu, head.cu, loss.cu ------------------------------------------------------------

    def dropout_bits(self, bits: Array, key: rng.Key, rate: float) -> None:
        n, words = bits.shape
        threshold = round(rate * 2**16)
        blocks = _parts(n * words, 256)
        self._launch("dropout", "dropout_bits", blocks, 256, bits, words, n, *_key_words(key), threshold)

    def head(self, x: Array, weight: Array, bias: Array, logits: Array) -> None:
        if weight.shape[0] not in (1, 3):
            super().head(x, weight, bias, logits)
            return
        n, height, width, channels = x.shape
        outputs = weight.shape[3]
        wide, _ = self._head_parts(channels, outputs, x)
        blocks = _parts(n * _parts(height, 4) * _parts(width, 16), 16)  # 16 strips of 4 x 16 pixels a block
        sizes = (n, height, width, channels, outputs, weight.shape[0])
        self._launch("head", "head", blocks, 256, x, _pitch("x", x), weight, bias, logits, *sizes, wide)

    def head_backward(self, dlogits: Array, x: Array, weight: Array, dx: Array, dweight: Array, dbias: Array) -> None:
        if weight.shape[0] not in (1, 3):
            super().head_backward(dlogits, x, weight, dx, dweight, dbias)
            return
        n, height, width, channels = x.shape
        outputs, size = weight.shape[3], weight.size + dbias.size
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

    def loss(
        self,
        logits: Array,
        target: Array,
        dice_weight: float,
        bce_weight: float,
        smooth: float,
        over: str,
        value: Array,
        dlogits: Array,
    ) -> None:
        n, values = len(logits), logits[0].size
        # Blocks an image: four values for each of their threads, or four blocks a multiprocessor in all.
        per_image = max(1, min(_parts(values, 1024), 4 * self.device.multiprocessors // n))
        partials = self._partials(n * per_image * 4 + n, "float64")
        dice = partials[n * per_image * 4 :].view("float32")  # two numbers an image
        self._launch("loss", "loss_sums", n * per_image, 256, logits, target, values, per_image, partials)
        weights = (np.float64(dice_weight), np.float64(bce_weight), np.float64(smooth), int(over == "batch"))
        self._launch("loss", "loss_value", 1, 32, partials, n, per_image, values, *weights, value, dice)
        scales = (float(dice_weight), float(bce_weight / (n * values)))
        blocks = _parts(n * values, 256)
        self._launch("loss", "loss_gradient", blocks, 256, logits, target, values, n, dice, *scales, dlogits)

    # --- What follows the gradients: optimizer.cu ---------------------------------------------------------------------

    def sum_of_squares(self, flat: Array) -> Array:
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
        beta1, beta2 = betas
        corrections = (1 - beta1**steps, 1 - beta2**steps)
        numbers = [float(number) for number in (beta1, 1 - beta1, beta2, 1 - beta2, eps, *corrections)]
        arguments = (*table.arguments, table.decays(decays), np.float64(lr), *numbers)
        self._launch("optimizer", "adamw", table.blocks, 256, *arguments)

    def lerp(self, table: "Table", decay: float) -> None:
        self._launch("optimizer", "lerp", table.blocks, 256, *table.arguments, float(decay), float(1 - decay))

    # --- Augmentation: augment.cu -------------------------------------------------------------------------------------

    def affine(
        self, images: Array, masks: Array, matrices: np.ndarray, moved_images: Array, moved_masks: Array
    ) -> None:
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


def _words(bits: Array | None) -> int:
    words = 0 if bits is None else bits.shape[1]
    if words >= 2**27:
        raise ValueError(f"bits must be of fewer than 2**31 values an image, got {16 * words}")
    return words


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
