"""The CUDA engine: the U-Net's training step as a sequence of kernels on buffers that are planned once.

Specification: minunet.training.step.loss_and_grads. This file is the order of the kernels and who owns which memory;
what each computes is in specification.py, and the fast ones are in the ``.cu`` files beside it.

What makes it quicker than one op after the other:

- Kernels do what belongs together in one pass over memory: batch norm, ReLU, max-pool and dropout; the batch's
  statistics while the convolution still holds its output; the dropout of a gradient where it is written.
- The skip is written straight into its half of the concatenation, the transposed convolution into the other.
- A bias in front of a batch norm is left out: the norm would subtract it again. Its gradient is 0; the mean that the
  running average needs is the output's mean plus the bias.

And smaller:

- Of a double convolution only the two outputs of the convolutions, y1 and y2, are kept. Their normalised and rectified
  values are worked out again where backward needs them: reading y once more is cheaper than keeping 1.5 times as much.
- Backward writes over forward: dy over y, the gradient of a concatenation over the concatenation (the gradient of the
  weights has then been taken), that of a pooled image over the pooled image. One scratch of the largest activation
  serves all levels.

In floats for each pixel of level l, with C channels, that is 2C (y1, y2) on each side, 2C (concat) and C/4 (pooled).
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from minunet.base import rng
from minunet.base.backend import Array, array_module
from minunet.base.errors import UserError
from minunet.data.augment import PixelPasses
from minunet.engines import memory
from minunet.engines.cuda.optimizer import MultiTensorAdamW, MultiTensorEMA
from minunet.engines.cuda.specification import SpecificationKernels
from minunet.network.layers import Arrays
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.ops import sigmoid_forward
from minunet.training.step import Engine

EPS = 1e-3  # of the batch norms


def takes(net: UNet) -> str | None:
    """Why the engine cannot take this network, or None."""
    config = net.config
    if config["dtype"] != "float32":
        return f"the CUDA engine works in float32, and the network's dtype is {config['dtype']}"
    if net.depth == 0:
        return "the CUDA engine needs a network with at least two widths"
    if config["up_kernel"] not in (2, 3) or config["head_kernel"] not in (1, 3):
        return "the CUDA engine has transposed convolutions of side 2 and 3, and heads of side 1 and 3"
    return None


class CudaEngine(Engine):
    """The engine for a GPU, which launches ``kernels``; choice.py knows those that suit the device.

    ``reason`` says why they are not faster ones.
    Raises UserError, saying which batch would fit, if the buffers do not fit into the GPU's memory.
    """

    def __init__(
        self,
        net: UNet,
        loss: SegmentationLoss,
        max_batch: int,
        image_size: tuple[int, int],
        kernels: SpecificationKernels,
        reason: str | None = None,
    ) -> None:
        super().__init__(net, loss)
        xp = array_module(net.head.weight)
        self.kernels, self.reason = kernels, reason
        self.passes = KernelPasses(kernels)
        self.name = f"cuda, {kernels.precision}, {kernels.name}"
        self.dtype = str(net.head.weight.dtype)
        free = memory.available_bytes(net)
        try:
            self.buffers: Buffers | None = Buffers(xp, net, max_batch, *image_size, self.kernels.dtype)
            sizes = {name: array.size for name, array in net.parameters().items()}
            # One long array: its norm is one sum. The gradients of conv biases are 0 and stay so.
            self.all_grads = xp.zeros(sum(sizes.values()), dtype=self.dtype)
        except MemoryError:
            needed = partial(step_bytes, precision=kernels.precision, row3=kernels.name == "row3")
            advice = memory.advice(net, image_size, max_batch, free, needed)
            raise UserError(f"--batch-size: out of GPU memory, {advice}") from None
        self.grads: Arrays = {}
        start = 0
        for name, array in net.parameters().items():
            self.grads[name] = self.all_grads[start : start + array.size].reshape(array.shape)
            start += array.size

        running = net.buffers()
        self.stats: Arrays = {name: xp.empty_like(array) for name, array in running.items()}
        self.stats_table = self.kernels.table([list(running.values()), list(self.stats.values())])

    def close(self) -> None:
        self.buffers = None
        self.grads, self.all_grads = {}, None

    # --- The training step --------------------------------------------------------------------------------------------

    def loss_and_grads(self, x: Array, target: Array, key: rng.Key) -> tuple[float, Arrays, Arrays]:
        buffers, n = self.buffers, len(x)
        assert buffers is not None, "the engine has been closed"
        bottom = buffers.levels[-1]
        # Images of another size go the plain way; and one value a channel at the bottom, which it refuses: no variance.
        if not buffers.take(x) or n * bottom.height * bottom.width == 1:
            return super().loss_and_grads(x, target, key)
        step = _Step(self.kernels, self.net, buffers, n, self.loss, self.grads)
        step.forward(x, True, key)
        value = step.backward(target)
        step.batch_stats(self.stats)
        return value.item(), self.grads, self.stats  # the first line that waits for the device

    def logits(self, x: Array, net: UNet | None = None) -> Array:
        step = _Step(self.kernels, net or self.net, self._buffers(x), len(x), self.loss, self.grads)
        return step.forward(x, False).copy()

    def predict(self, x: Array, net: UNet | None = None) -> Array:
        xp = array_module(x)
        _, height, width, _ = x.shape
        multiple = 2**self.net.depth
        padding = ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0))
        logits = self.logits(xp.pad(x, padding, mode="edge"), net)
        probabilities, _ = sigmoid_forward(logits[:, :height, :width])
        return probabilities

    def _buffers(self, x: Array) -> "Buffers":
        """The engine's buffers if they take images ``x``, else new ones, which last for this call."""
        assert self.buffers is not None, "the engine has been closed"
        if self.buffers.take(x):
            return self.buffers
        n, height, width, _ = x.shape
        return Buffers(array_module(x), self.net, n, height, width, self.kernels.dtype)

    # --- After it -----------------------------------------------------------------------------------------------------

    def clip(self, grads: Arrays, max_norm: float) -> tuple[Arrays, float]:
        if grads is not self.grads:
            return super().clip(grads, max_norm)
        norm = math.sqrt(self.kernels.sum_of_squares(self.all_grads).item())
        if max_norm < norm < math.inf:
            self.all_grads *= max_norm / norm
        return grads, norm

    def update_running_stats(self, batch_stats: Mapping[str, Array], momentum: float) -> None:
        if batch_stats is self.stats:
            self.kernels.lerp(self.stats_table, momentum)
        else:
            super().update_running_stats(batch_stats, momentum)

    def optimizer(self, parameters: Arrays, lr: float, **options: Any) -> MultiTensorAdamW:
        return MultiTensorAdamW(self.kernels, parameters, lr, **options)

    def average(self, values: Arrays, max_decay: float) -> MultiTensorEMA:
        return MultiTensorEMA(self.kernels, values, max_decay)


class KernelPasses(PixelPasses):
    """The passes over the pixels of a batch, by ``kernels``.

    The thread that prepares batches calls them while a step runs: they use no memory of the engine.
    """

    def __init__(self, kernels: SpecificationKernels) -> None:
        self.kernels = kernels

    def warp(self, images: Array, masks: Array, matrices: np.ndarray) -> tuple[Array, Array]:
        xp = array_module(images)
        moved_images, moved_masks = xp.empty_like(images), xp.empty_like(masks)
        self.kernels.affine(images, masks, matrices, moved_images, moved_masks)
        return moved_images, moved_masks

    def add_noise(self, images: Array, strength: Array, key: rng.Key) -> Array:
        noisy = array_module(images).empty_like(images)
        self.kernels.add_noise(images, strength, key, noisy)
        return noisy


class Level:
    """The buffers of one level of the U; the bottleneck has no right side."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        self.height, self.width, self.channels = height, width, channels
        self.left: tuple[Array, Array]  # y1, y2 (N, H, W, C) of the way down
        self.right: tuple[Array, Array]  # and of the way up
        self.concat: Array  # (N, H, W, 2C): what came up, then the skip
        self.pooled: Array  # (N, H/2, W/2, C)
        self.concat_bits: Array | None = None  # dropout masks, 16 values a word
        self.pooled_bits: Array | None = None


class Buffers:
    """All memory that a step on up to ``max_batch`` images of ``height`` x ``width`` pixels writes to."""

    def __init__(self, xp: ModuleType, net: UNet, max_batch: int, height: int, width: int, dtype: str) -> None:
        self.max_batch = max_batch
        real = str(net.head.weight.dtype)
        arrays = {
            name: xp.empty(shape, dtype={"activation": dtype, "bits": "uint16", "real": real}[kind])
            for name, kind, shape in plan(net, max_batch, height, width)
        }
        self.images, self.scratch = arrays["images"], arrays["scratch"]
        self.logits, self.dlogits = arrays["logits"], arrays["dlogits"]
        self.value = xp.empty(1, dtype=real)
        self.levels = []
        for i, channels in enumerate(net.config["widths"]):
            level = Level(height >> i, width >> i, channels)
            level.left = arrays[f"{i}.left1"], arrays[f"{i}.left2"]
            if i < net.depth:
                level.right = arrays[f"{i}.right1"], arrays[f"{i}.right2"]
                level.concat, level.pooled = arrays[f"{i}.concat"], arrays[f"{i}.pooled"]
                level.concat_bits, level.pooled_bits = arrays.get(f"{i}.concat_bits"), arrays.get(f"{i}.pooled_bits")
            self.levels.append(level)

    def take(self, x: Array) -> bool:
        """Whether they are large enough for images ``x`` of just this size."""
        top = self.levels[0]
        return len(x) <= self.max_batch and x.shape[1:3] == (top.height, top.width)

    def scratch_for(self, n: int, level: Level) -> Array:
        """The scratch as ``n`` images of a level."""
        shape = (n, level.height, level.width, level.channels)
        return self.scratch[: math.prod(shape)].reshape(shape)


def plan(net: UNet, n: int, height: int, width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, kind ("activation", "bits" or "real") and shape of each buffer."""
    config = net.config
    largest = 0
    yield "images", "activation", (n, height, width, config["in_channels"])
    for i, channels in enumerate(config["widths"]):
        h, w = height >> i, width >> i
        largest = max(largest, n * h * w * channels)
        names = [f"{i}.left1", f"{i}.left2"] + ([f"{i}.right1", f"{i}.right2"] if i < net.depth else [])
        for name in names:
            yield name, "activation", (n, h, w, channels)
        if i < net.depth:
            yield f"{i}.concat", "activation", (n, h, w, 2 * channels)
            yield f"{i}.pooled", "activation", (n, h // 2, w // 2, channels)
            if config["dropout"] > 0:
                yield f"{i}.concat_bits", "bits", (n, -(-h * w * 2 * channels // 16))
                yield f"{i}.pooled_bits", "bits", (n, -(-h // 2 * (w // 2) * channels // 16))
    yield "scratch", "activation", (largest,)
    for name in ("logits", "dlogits"):
        yield name, "real", (n, height, width, config["out_channels"])


def step_bytes(
    net: UNet, image_size: tuple[int, int], batch: int, precision: str = "float32", row3: bool = False
) -> int:
    """About what a training step needs at its peak, in bytes; with large matrix products if ``row3``.

    The buffers; five arrays for each parameter (value, gradient, two moments, average); and while they work, the
    kernels two more of each weight (laid out as they read it), the windows of the images, and a quarter of a gigabyte
    of partial sums, the large matrix products some six arrays of the size of the scratch.

    >>> net = UNet(widths=(16, 32, 64))
    >>> [round(step_bytes(net, (256, 256), 16, precision) / 1e9, 2) for precision in ("float32", "tf32", "bf16")]
    [1.16, 1.16, 0.73]
    """
    sizes = {"activation": 2 if precision == "bf16" else 4, "bits": 2, "real": 4}
    buffers = {name: sizes[kind] * math.prod(shape) for name, kind, shape in plan(net, batch, *image_size)}
    weights = sum(array.nbytes for array in net.parameters().values())
    if row3:
        working = 6 * buffers["scratch"]
    else:
        windows = 9 * buffers["images"] * 32 // 27  # of the first convolution: 27 numbers, filled up to 32 (windows.cu)
        working = 2 * weights * sizes["activation"] // 4 + windows + 2**28
    return sum(buffers.values()) + 5 * weights + working


class _Norm:
    """One convolution and the batch norm after it: its output, and its statistics."""

    def __init__(self, y: Array, parameters: Arrays, block: str, number: int) -> None:
        self.y, self.conv, self.norm = y, f"{block}.conv{number}", f"{block}.norm{number}"
        self.weight = parameters[f"{self.conv}.weight"]
        self.bias = parameters.get(f"{self.conv}.bias")
        self.gamma, self.beta = parameters[f"{self.norm}.gamma"], parameters[f"{self.norm}.beta"]
        self.mean: Array
        self.var: Array

    @property
    def arguments(self) -> tuple[Array, Array, Array, Array, Array]:
        """What every kernel of a batch norm begins with."""
        return self.y, self.mean, self.var, self.gamma, self.beta


class _Step:
    """One pass of ``net`` over ``n`` images in ``buffers``: forward, and in training backward."""

    def __init__(
        self,
        kernels: SpecificationKernels,
        net: UNet,
        buffers: Buffers,
        n: int,
        loss: SegmentationLoss,
        grads: Arrays,
    ) -> None:
        self.kernels, self.net, self.buffers, self.n, self.loss, self.grads = kernels, net, buffers, n, loss, grads
        self.parameters, self.running = net.parameters(), net.buffers()
        self.scale = 1 / (1 - net.config["dropout"])
        self.training = False
        self.norms: dict[str, tuple[_Norm, _Norm]] = {}
        levels = buffers.levels
        for i, level in enumerate(levels):
            name = "bottleneck" if i == net.depth else f"down{i + 1}"
            self.norms[name] = self._pair(name, level.left)
            if i < net.depth:
                self.norms[f"up{i + 1}"] = self._pair(f"up{i + 1}", level.right)

    def _pair(self, block: str, ys: tuple[Array, Array]) -> tuple[_Norm, _Norm]:
        first, second = (_Norm(y[: self.n], self.parameters, block, k) for k, y in enumerate(ys, start=1))
        return first, second

    # --- Forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Array, training: bool, key: rng.Key | None = None) -> Array:
        """The logits, in their buffer. Raises ValueError where ``net.forward`` does."""
        self.net.check_input(x, training, key)
        kernels, n, levels, depth = self.kernels, self.n, self.buffers.levels, self.net.depth
        self.training = training
        kernels.prepare_weights(self.parameters)
        if training and key is not None:
            self._draw_masks(key)
        image = self.buffers.images[:n]
        kernels.store(image, x)

        for i, level in enumerate(levels[:-1]):
            last = self._double_conv(f"down{i + 1}", level, image)
            image = level.pooled[:n]
            c = level.channels
            kernels.norm_relu_pool(
                *last.arguments,
                level.concat[:n, :, :, c:],
                image,
                EPS,
                self._mask(level.concat_bits),
                (2 * c, c),
                self._mask(level.pooled_bits),
                self.scale,
            )
        last = self._double_conv("bottleneck", levels[-1], image)
        for i in reversed(range(depth)):
            level, below = levels[i], levels[i + 1]
            c, up = level.channels, f"up{i + 1}.up"
            a = self.buffers.scratch_for(n, below)
            kernels.norm_relu(*last.arguments, a, EPS)
            kernels.conv_transpose(
                a,
                self.parameters[f"{up}.weight"],
                self.parameters[f"{up}.bias"],
                level.concat[:n, :, :, :c],
                self._mask(level.concat_bits),
                (2 * c, 0),
                self.scale,
            )
            last = self._double_conv(f"up{i + 1}", level, level.concat[:n])
        a = self.buffers.scratch_for(n, levels[0])
        kernels.norm_relu(*last.arguments, a, EPS)
        logits = self.buffers.logits[:n]
        kernels.head(a, self.parameters["head.weight"], self.parameters["head.bias"], logits)
        return logits

    def _double_conv(self, block: str, level: Level, x: Array) -> _Norm:
        """Both convolutions of a block. Returns the second, whose batch norm is still to be applied."""
        first, second = self.norms[block]
        a = self.buffers.scratch_for(self.n, level)
        self._conv(first, x)
        self.kernels.norm_relu(*first.arguments, a, EPS)
        self._conv(second, a)
        return second

    def _conv(self, norm: _Norm, x: Array) -> None:
        """A convolution without its bias, and the statistics that its batch norm will use."""
        if self.training:
            empty_like = array_module(norm.gamma).empty_like
            norm.mean, norm.var = empty_like(norm.gamma), empty_like(norm.gamma)
            self.kernels.conv3x3(x, norm.weight, norm.y, norm.mean, norm.var)
        else:
            mean, norm.var = self.running[f"{norm.norm}.running_mean"], self.running[f"{norm.norm}.running_var"]
            norm.mean = mean if norm.bias is None else mean - norm.bias
            self.kernels.conv3x3(x, norm.weight, norm.y)

    def _draw_masks(self, key: rng.Key) -> None:
        rate, depth = self.net.config["dropout"], self.net.depth
        if rate == 0:
            return
        for i, level in enumerate(self.buffers.levels[:-1]):
            for bits, stream in ((level.pooled_bits, i), (level.concat_bits, depth + i)):
                assert bits is not None
                self.kernels.dropout_bits(bits[: self.n], key._replace(stream=rng.DROPOUT + stream), rate)

    def _mask(self, bits: Array | None) -> Array | None:
        return bits[: self.n] if self.training and bits is not None else None

    # --- Backward -----------------------------------------------------------------------------------------------------

    def backward(self, target: Array) -> Array:
        """The loss (1,). Fills the gradients, and leaves the buffers of forward without their values.

        Raises ValueError if ``target`` has not the shape of the logits.
        """
        kernels, n, levels, depth = self.kernels, self.n, self.buffers.levels, self.net.depth
        grads, parameters = self.grads, self.parameters
        logits, dlogits, value = self.buffers.logits[:n], self.buffers.dlogits[:n], self.buffers.value
        loss = self.loss
        if target.shape != logits.shape:
            raise ValueError(f"target must have the shape of the prediction, {logits.shape}, got {target.shape}")
        target = array_module(target).ascontiguousarray(target, dtype=logits.dtype)
        kernels.loss(logits, target, loss.dice_weight, loss.bce_weight, loss.smooth, loss.over, value, dlogits)

        da = self.buffers.scratch_for(n, levels[0])  # forward has left the head's input here
        kernels.head_backward(dlogits, da, parameters["head.weight"], da, grads["head.weight"], grads["head.bias"])
        # Down the right side of the U. A transposed convolution's input is worked out again, for the gradient of its
        # weights; then the gradient of that input is written over it.
        for i in range(depth):
            level, below = levels[i], levels[i + 1]
            self._last_norm_backward(f"up{i + 1}", level)
            concat = level.concat[:n]
            self._double_conv_backward(f"up{i + 1}", level, concat, self._mask(level.concat_bits))
            dup, up = concat[:, :, :, : level.channels], f"up{i + 1}.up"
            a = self.buffers.scratch_for(n, below)
            _, last = self.norms["bottleneck" if i + 1 == depth else f"up{i + 2}"]
            kernels.norm_relu(*last.arguments, a, EPS)
            kernels.conv_transpose_grad_weight(a, dup, grads[f"{up}.weight"], grads[f"{up}.bias"])
            kernels.conv_transpose_grad_input(dup, parameters[f"{up}.weight"], a)
        self._last_norm_backward("bottleneck", levels[-1])
        # Up the left side: a level's gradient is that of its skip and that of its pooled image together.
        for i in reversed(range(depth + 1)):
            name = "bottleneck" if i == depth else f"down{i + 1}"
            if i < depth:
                level = levels[i]
                _, last = self.norms[name]
                kernels.norm_relu_pool_backward(
                    level.concat[:n, :, :, level.channels :],
                    level.pooled[:n],
                    *last.arguments,
                    last.y,
                    grads[f"{last.norm}.gamma"],
                    grads[f"{last.norm}.beta"],
                    EPS,
                )
            if i > 0:
                above = levels[i - 1]
                self._double_conv_backward(name, levels[i], above.pooled[:n], self._mask(above.pooled_bits))
            else:
                self._double_conv_backward(name, levels[i], self.buffers.images[:n], None, is_first=True)
        return value

    def _last_norm_backward(self, block: str, level: Level) -> None:
        """From the gradient of a block's result, in the scratch, to that of its second convolution, over y2."""
        _, second = self.norms[block]
        self._norm_backward(self.buffers.scratch_for(self.n, level), second)

    def _norm_backward(self, da: Array, norm: _Norm) -> None:
        dgamma, dbeta = self.grads[f"{norm.norm}.gamma"], self.grads[f"{norm.norm}.beta"]
        self.kernels.norm_relu_backward(da, *norm.arguments, norm.y, dgamma, dbeta, EPS)

    def _double_conv_backward(
        self, block: str, level: Level, x: Array, bits: Array | None, is_first: bool = False
    ) -> None:
        """From dy2, which lies in y2, to the gradient of the block's input ``x``, over x, through its dropout mask."""
        kernels = self.kernels
        first, second = self.norms[block]
        scratch = self.buffers.scratch_for(self.n, level)
        kernels.norm_relu(*first.arguments, scratch, EPS)
        kernels.conv3x3_grad_weight(scratch, second.y, self.grads[f"{second.conv}.weight"])
        kernels.conv3x3_grad_input(second.y, second.weight, scratch)
        self._norm_backward(scratch, first)
        kernels.conv3x3_grad_weight(x, first.y, self.grads[f"{first.conv}.weight"])
        if not is_first:  # nobody asks for the gradient of the images
            kernels.conv3x3_grad_input(first.y, first.weight, x, bits, self.scale)

    def batch_stats(self, out: Arrays) -> None:
        """The batch's statistics under the names of the running ones, the biases that were left out put back in."""
        for name, array in out.items():
            block, layer, statistic = name.split(".")
            norm = self.norms[block][int(layer[-1]) - 1]
            if statistic == "running_var":
                array[...] = norm.var
            else:
                array[...] = norm.mean if norm.bias is None else norm.mean + norm.bias
