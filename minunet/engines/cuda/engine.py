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
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minunet.base import rng
from minunet.base.backend import Array, array_module
from minunet.base.errors import UserError
from minunet.data.augment import PixelPasses
from minunet.engines import memory
from minunet.engines.cuda.optimizer import MultiTensorAdamW, MultiTensorEMA
from minunet.engines.cuda.specification import Mask, Norm, SpecificationKernels, Weight
from minunet.network.blocks import DoubleConv
from minunet.network.layers import Arrays, BatchNorm2d, Conv2d, ConvTranspose2d, Dropout, map_arrays
from minunet.network.loss import Loss, SegmentationLoss
from minunet.network.own_code import own_loss
from minunet.network.unet import UNet
from minunet.training.step import Engine


def takes(net: UNet, loss: Loss) -> str | None:
    """Why the engine cannot take this network with this loss, or None."""
    config = net.config
    if not isinstance(loss, SegmentationLoss) or own_loss(loss):
        return own_loss(loss)
    if loss.over == "class":
        return "the CUDA engine has no Dice class by class"
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
        self.segmentation_loss = loss  # the only one that it takes
        self.lock = threading.RLock()
        xp = array_module(net.head.weight)
        self.kernels, self.reason = kernels, reason
        self.passes = KernelPasses(kernels)
        self.name = f"cuda, {kernels.precision}, {kernels.name}"
        free = memory.available_bytes(net)
        try:
            self.buffers: Buffers | None = Buffers(xp.empty, net, max_batch, *image_size, kernels.dtype)
            # One long array: its norm is one sum. The gradients of conv biases are 0 and stay so.
            size = sum(array.size for array in net.parameters().values())
            self.all_grads = xp.zeros(size, dtype=net.head.weight.dtype)
        except MemoryError:
            needed = partial(step_bytes, precision=kernels.precision, row3=kernels.name == "row3")
            advice = memory.advice(net, image_size, max_batch, free, needed)
            raise UserError(f"--batch-size: out of GPU memory, {advice}") from None
        self.results = _results(net, self.all_grads)
        self.grads: Arrays = self.results.parameters()
        self.stats: Arrays = self.results.buffers()
        self.stats_table = kernels.table([list(net.buffers().values()), list(self.stats.values())])

    def close(self) -> None:
        self.buffers = self.results = self.all_grads = None
        self.grads = {}

    # --- The training step --------------------------------------------------------------------------------------------

    def loss_and_grads(self, x: Array, target: Array, key: rng.Key) -> tuple[float, Arrays, Arrays]:
        buffers, n = self.buffers, len(x)
        assert buffers is not None, "the engine has been closed"
        _, height, width, _ = buffers.bottleneck.y1.shape
        # Images of another size go the plain way; and one value a channel at the bottom, which it refuses: no variance.
        if not buffers.take(x) or n * height * width == 1:
            return super().loss_and_grads(x, target, key)
        self.claim_training()
        with self.lock:
            step = _Step(self.kernels, self.net, self.results, buffers, n, training=True)
            step.forward(x, key)
            value = step.backward(target, self.segmentation_loss)
            return value.item(), self.grads, self.stats  # the first line that waits for the device

    def logits(self, x: Array, net: UNet | None = None) -> Array:
        """As the plain path. Images of another size or number than the engine's get buffers of their own."""
        with self.lock:
            step = _Step(self.kernels, net or self.net, self.results, self._buffers(x), len(x), training=False)
            return step.forward(x).copy()

    def predict(self, x: Array, net: UNet | None = None) -> Array:
        """As the plain path: the images are padded for the network, and the result is cropped."""
        logits = self.logits((net or self.net).pad(x), net)
        return (net or self.net).probabilities(logits[:, : x.shape[1], : x.shape[2]])

    def _buffers(self, x: Array) -> "Buffers":
        """The engine's buffers if they take images ``x``, else new ones, which last for this call."""
        assert self.buffers is not None, "the engine has been closed"
        if self.buffers.take(x):
            return self.buffers
        n, height, width, _ = x.shape
        return Buffers(array_module(x).empty, self.net, n, height, width, self.kernels.dtype)

    # --- After it -----------------------------------------------------------------------------------------------------

    def clip(self, grads: Arrays, max_norm: float) -> tuple[Arrays, float]:
        """As the plain path. The engine's own gradients are scaled in place, all in one."""
        if grads is not self.grads:
            return super().clip(grads, max_norm)
        norm = math.sqrt(self.kernels.sum_of_squares(self.all_grads).item())
        if max_norm < norm < math.inf:
            self.all_grads *= max_norm / norm
        return grads, norm

    def update_running_stats(self, batch_stats: Mapping[str, Array], momentum: float) -> None:
        """As the plain path. What the engine has found itself is averaged in one launch."""
        if batch_stats is self.stats:
            self.kernels.lerp(self.stats_table, momentum)
        else:
            super().update_running_stats(batch_stats, momentum)

    def optimizer(self, parameters: Arrays, lr: float, **options: Any) -> MultiTensorAdamW:
        return MultiTensorAdamW(self.kernels, parameters, lr, **options)

    def average(self, values: Arrays, max_decay: float) -> MultiTensorEMA:
        return MultiTensorEMA(self.kernels, values, max_decay)


def _results(net: UNet, all_grads: Array) -> Any:
    """A copy of ``net`` whose arrays receive what a step finds.

    In the place of each parameter it has the parameter's gradient, a view of the long array ``all_grads``; in the place
    of the running statistics new arrays for those of the batch.
    """
    places = {id(array): array_module(array).empty_like(array) for array in net.buffers().values()}
    start = 0
    for array in net.parameters().values():
        places[id(array)] = all_grads[start : start + array.size].reshape(array.shape)
        start += array.size
    return map_arrays(net, lambda array: places[id(array)])


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


class Outputs(NamedTuple):
    """What the convolutions of a block give, without their biases. Backward writes the gradients over it."""

    y1: Array  # (N, H, W, C)
    y2: Array  # (N, H, W, C)


class Level(NamedTuple):
    """The buffers of one level of the U above the bottleneck."""

    down: Outputs  # of the block on the left side
    up: Outputs  # of the block on the right side
    concat: Array  # (N, H, W, 2C): what came up, then the skip
    pooled: Array  # (N, H/2, W/2, C)
    concat_bits: Array | None  # uint16 (N, words): the dropout mask of concat, 16 values a word; None without dropout
    pooled_bits: Array | None  # that of pooled


class Buffers:
    """All memory that a step on up to ``max_batch`` images of ``height`` x ``width`` pixels writes to.

    ``empty`` makes an array of a shape and a dtype, as NumPy's and CuPy's do. Activations have the dtype ``dtype``.
    """

    def __init__(
        self,
        empty: Callable[[tuple[int, ...], str], Array],
        net: UNet,
        max_batch: int,
        height: int,
        width: int,
        dtype: str,
    ) -> None:
        config = net.config

        def activation(level: int, channels: int) -> Array:
            return empty((max_batch, height >> (level - 1), width >> (level - 1), channels), dtype)

        def outputs(level: int, channels: int) -> Outputs:
            return Outputs(activation(level, channels), activation(level, channels))

        def bits(masked: Array) -> Array | None:
            words = -(-math.prod(masked.shape[1:]) // 16)
            return empty((max_batch, words), "uint16") if config["dropout"] > 0 else None

        self.images = activation(1, config["in_channels"])
        self.levels: list[Level] = []  # from the top
        for part in net.topology:
            level, channels = part.level, part.out_channels
            if part.kind == "down":
                down, up = outputs(level, channels), outputs(level, channels)
                concat, pooled = activation(level, 2 * channels), activation(level + 1, channels)
                self.levels.append(Level(down, up, concat, pooled, bits(concat), bits(pooled)))
            elif part.kind == "bottleneck":
                self.bottleneck = outputs(level, channels)
        largest = max([self.bottleneck.y1.size, *(level.down.y1.size for level in self.levels)])
        self.scratch = empty((largest,), dtype)  # as large as the largest y
        real, of_logits = str(net.head.weight.dtype), (max_batch, height, width, config["out_channels"])
        self.logits, self.dlogits = empty(of_logits, real), empty(of_logits, real)
        self.value = empty((1,), real)  # the loss

    def take(self, x: Array) -> bool:
        """Whether they are large enough for images ``x`` of just this size."""
        return len(x) <= len(self.images) and x.shape[1:3] == self.images.shape[1:3]


def step_bytes(
    net: UNet, image_size: tuple[int, int], batch: int, precision: str = "float32", row3: bool = False
) -> int:
    """About what a training step needs at its peak, in bytes of GPU memory. ``image_size`` is (H, W).

    ``row3`` says that no kernel of ours does the convolutions here, but the large matrix products of row3.py, which
    use more memory. Counted are the buffers of the step; five arrays for each parameter (its value, its gradient, the
    two moments of AdamW and the average of the weights); and what the convolutions allocate while they work.

    >>> net = UNet(widths=(16, 32, 64))
    >>> [round(step_bytes(net, (256, 256), 16, precision) / 1e9, 2) for precision in ("float32", "tf32", "bf16")]
    [1.16, 1.16, 0.73]
    """
    arrays: list[np.ndarray] = []

    def counted(shape: tuple[int, ...], dtype: str) -> np.ndarray:
        arrays.append(np.broadcast_to(np.empty((), dtype), shape))  # of this shape, but it takes no memory
        return arrays[-1]

    # NumPy has no bf16: any type of two bytes counts the same.
    buffers = Buffers(counted, net, batch, *image_size, "uint16" if precision == "bf16" else "float32")
    parameters = sum(array.nbytes for array in net.parameters().values())
    if row3:
        working = 6 * buffers.scratch.nbytes  # arrays between the operations, of the largest size
    else:
        layouts = 2 * parameters * buffers.images.itemsize // 4  # each weight as forward and as backward read it
        windows = 9 * buffers.images.nbytes * 32 // 27  # 3 x 3 x 3 numbers for each pixel, filled up to 32
        partial_sums = 2**28  # of the gradients of the weights, at most
        working = layouts + windows + partial_sums
    return sum(array.nbytes for array in arrays) + 5 * parameters + working


class _Conv(NamedTuple):
    """A convolution without its bias and the batch norm after it, in one step."""

    weight: Array  # (3, 3, C_in, C_out)
    bias: Array | None  # (C_out,), left out
    norm: Norm  # of the convolution's output y, over which backward writes dy
    dweight: Array  # where the gradients go
    dgamma: Array
    dbeta: Array


class _Block(NamedTuple):
    """A double convolution in one step."""

    x: Array  # (N, H, W, C_in), the input; backward writes dx over it, except over the images
    mask: Mask | None  # the dropout that x has gone through
    conv1: _Conv
    conv2: _Conv


class _Down(NamedTuple):
    """A step down the left side."""

    block: _Block
    skip: Array  # (N, H, W, C), the second half of the concatenation; then its gradient
    skip_mask: Mask | None
    pooled: Array  # (N, H/2, W/2, C), which is the x of the block below; then its gradient
    pooled_mask: Mask | None


class _Up(NamedTuple):
    """A step up the right side."""

    below: _Block  # the block whose result comes up
    weight: Array  # (K, K, C_below, C), of the transposed convolution
    bias: Array  # (C,)
    dweight: Array  # where their gradients go
    dbias: Array
    y: Array  # (N, H, W, C), its output: the first half of the concatenation; then dy
    block: _Block


class _Step:
    """One pass of ``net`` over ``n`` images in ``buffers``: forward, and in training backward.

    ``results`` is a network of the same layers. Its parameters receive the gradients, its running statistics those of
    the batch. ``ddown`` is the layer of ``results`` that belongs to the layer ``down``, and so with the others.
    """

    def __init__(
        self, kernels: SpecificationKernels, net: UNet, results: UNet, buffers: Buffers, n: int, training: bool
    ) -> None:
        self.kernels, self.net, self.dhead = kernels, net, results.head
        self.buffers, self.n, self.training = buffers, n, training
        self.images, self.logits = buffers.images[:n], buffers.logits[:n]
        # In the order of forward: the downs from the top, the ups from the bottom.
        self.downs: list[_Down] = []
        self.ups: list[_Up] = []
        x: Array = self.images
        mask: Mask | None = None
        for down, up, ddown, level in zip(net.downs, net.ups, results.downs, buffers.levels, strict=True):
            block = self._make_block(down.convs, ddown.convs, x, mask, level.down)
            channels = level.pooled.shape[3]
            skip = level.concat[:n, :, :, channels:]
            skip_mask = self._make_mask(level.concat_bits, up.dropout, 2 * channels, channels)
            x, mask = level.pooled[:n], self._make_mask(level.pooled_bits, down.dropout, channels)
            self.downs.append(_Down(block, skip, skip_mask, x, mask))
        block = self.bottleneck = self._make_block(net.bottleneck, results.bottleneck, x, mask, buffers.bottleneck)
        for up, dup, level in reversed(list(zip(net.ups, results.ups, buffers.levels, strict=True))):
            below, channels, x = block, level.pooled.shape[3], level.concat[:n]
            mask = self._make_mask(level.concat_bits, up.dropout, 2 * channels)
            block = self._make_block(up.convs, dup.convs, x, mask, level.up)
            y = x[:, :, :, :channels]
            self.ups.append(_Up(below, up.up.weight, up.up.bias, dup.up.weight, dup.up.bias, y, block))

    def _make_block(
        self, convs: DoubleConv, dconvs: DoubleConv, x: Array, mask: Mask | None, outputs: Outputs
    ) -> _Block:
        """The double convolution ``convs`` of ``x``; ``dconvs`` is its counterpart in ``results``."""
        conv1 = self._make_conv(convs.conv1, convs.norm1, dconvs.conv1, dconvs.norm1, outputs.y1)
        conv2 = self._make_conv(convs.conv2, convs.norm2, dconvs.conv2, dconvs.norm2, outputs.y2)
        return _Block(x, mask, conv1, conv2)

    def _make_conv(self, conv: Conv2d, norm: BatchNorm2d, dconv: Conv2d, dnorm: BatchNorm2d, y: Array) -> _Conv:
        """``conv`` into ``y`` and then ``norm``; ``dconv`` and ``dnorm`` are their counterparts in ``results``."""
        if self.training:
            mean, var = dnorm.running_mean, dnorm.running_var  # which the convolution fills
        else:
            var = norm.running_var
            mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias  # since y is without it
        applied = Norm(y[: self.n], mean, var, norm.gamma, norm.beta, norm.eps)
        return _Conv(conv.weight, conv.bias, applied, dconv.weight, dnorm.gamma, dnorm.beta)

    def _make_mask(self, bits: Array | None, dropout: Dropout, channels: int, first: int = 0) -> Mask | None:
        """In training: the mask in ``bits`` of images of ``channels``, of which those from ``first`` on are written."""
        if bits is None or not self.training:
            return None
        return Mask(bits[: self.n], channels, first, 1 / (1 - dropout.rate))

    def _scratch_like(self, y: Array) -> Array:
        """The scratch in the shape of ``y``."""
        return self.buffers.scratch[: y.size].reshape(y.shape)

    # --- Forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Array, key: rng.Key | None = None) -> Array:
        """The logits (N, H, W, K), in their buffer. Raises ValueError where ``net.forward`` does."""
        kernels, head = self.kernels, self.net.head
        self.net.check_input(x, self.training, key)
        kernels.prepare_weights(_weights(self.net))
        if key is not None:
            self._draw_masks(key)
        kernels.store(self.images, x)

        for down in self.downs:
            norm = self._double_conv(down.block)
            kernels.norm_relu_pool(norm, down.skip, down.pooled, down.skip_mask, down.pooled_mask)
        norm = self._double_conv(self.bottleneck)
        for up in self.ups:
            a = self._scratch_like(norm.y)
            kernels.norm_relu(norm, a)
            kernels.conv_transpose(a, up.weight, up.bias, up.y, up.block.mask)
            norm = self._double_conv(up.block)
        a = self._scratch_like(norm.y)
        kernels.norm_relu(norm, a)
        kernels.head(a, head.weight, head.bias, self.logits)
        return self.logits

    def _draw_masks(self, key: rng.Key) -> None:
        """Draw the dropout masks of a training step: of each level those of the pooled image and the concatenation."""
        for down, up, level in zip(self.net.downs, self.net.ups, self.buffers.levels, strict=True):
            for dropout, bits in ((down.dropout, level.pooled_bits), (up.dropout, level.concat_bits)):
                if bits is not None:
                    layer_key = key._replace(stream=rng.DROPOUT + dropout.index)
                    self.kernels.dropout_bits(bits[: self.n], layer_key, dropout.rate)

    def _double_conv(self, block: _Block) -> Norm:
        """Both convolutions of a block. Returns the second batch norm, which is still to be applied."""
        a = self._scratch_like(block.conv1.norm.y)
        self._convolve(block.x, block.conv1)
        self.kernels.norm_relu(block.conv1.norm, a)
        self._convolve(a, block.conv2)
        return block.conv2.norm

    def _convolve(self, x: Array, conv: _Conv) -> None:
        """A convolution without its bias; in training also the statistics that its batch norm will use."""
        statistics = (conv.norm.mean, conv.norm.var) if self.training else ()
        self.kernels.conv3x3(x, conv.weight, conv.norm.y, *statistics)

    # --- Backward -----------------------------------------------------------------------------------------------------

    def backward(self, target: Array, loss: SegmentationLoss) -> Array:
        """The loss (1,). Fills ``results``, and leaves the buffers of forward without their values.

        Raises ValueError if ``target`` has not the shape of the logits.
        """
        kernels, logits, dlogits, value = self.kernels, self.logits, self.buffers.dlogits[: self.n], self.buffers.value
        if target.shape != logits.shape:
            raise ValueError(f"target must have the shape of the prediction, {logits.shape}, got {target.shape}")
        target = array_module(target).ascontiguousarray(target, dtype=logits.dtype)
        kernels.loss(logits, target, loss, value, dlogits)

        da = self._scratch_like(self.ups[-1].block.conv2.norm.y)  # forward has left the head's input here
        kernels.head_backward(dlogits, da, self.net.head.weight, da, self.dhead.weight, self.dhead.bias)
        # Down the right side of the U. A transposed convolution's input is worked out again, for the gradient of its
        # weights; then the gradient of that input is written over it.
        for up in reversed(self.ups):
            self._norm_backward(da, up.block.conv2)
            self._double_conv_backward(up.block)
            below = up.below.conv2.norm
            da = self._scratch_like(below.y)
            kernels.norm_relu(below, da)
            kernels.conv_transpose_grad_weight(da, up.y, up.dweight, up.dbias)
            kernels.conv_transpose_grad_input(up.y, up.weight, da)
        self._norm_backward(da, self.bottleneck.conv2)
        self._double_conv_backward(self.bottleneck)
        # Up the left side: a level's gradient is that of its skip and that of its pooled image together.
        for down in reversed(self.downs):
            last = down.block.conv2
            kernels.norm_relu_pool_backward(down.skip, down.pooled, last.norm, last.norm.y, last.dgamma, last.dbeta)
            self._double_conv_backward(down.block)
        self._add_biases()
        return value

    def _norm_backward(self, da: Array, conv: _Conv) -> None:
        """From the gradient of relu(norm(y)) to that of y, over y."""
        self.kernels.norm_relu_backward(da, conv.norm, conv.norm.y, conv.dgamma, conv.dbeta)

    def _double_conv_backward(self, block: _Block) -> None:
        """From dy2, which lies in y2, to the gradient of the block's input x, over x, through its dropout mask."""
        kernels, conv1, conv2 = self.kernels, block.conv1, block.conv2
        dy1, dy2 = conv1.norm.y, conv2.norm.y  # where they lie, or will
        a = self._scratch_like(dy1)
        kernels.norm_relu(conv1.norm, a)
        kernels.conv3x3_grad_weight(a, dy2, conv2.dweight)
        kernels.conv3x3_grad_input(dy2, conv2.weight, a)
        self._norm_backward(a, conv1)
        kernels.conv3x3_grad_weight(block.x, dy1, conv1.dweight)
        if block.x is not self.images:  # nobody asks for the gradient of the images
            kernels.conv3x3_grad_input(dy1, conv1.weight, block.x, block.mask)

    def _add_biases(self) -> None:
        """Add the biases to the means of the batch, before the running averages take these up.

        Forward leaves the biases out: batch norm subtracts the mean, and with it any constant. But a prediction does
        add the bias, and subtracts the running mean, which therefore has to contain it.
        """
        for block in [*(down.block for down in self.downs), self.bottleneck, *(up.block for up in self.ups)]:
            for conv in (block.conv1, block.conv2):
                if conv.bias is not None:
                    mean = conv.norm.mean
                    mean += conv.bias  # in place


def _weights(net: UNet) -> list[Weight]:
    """The weights of all convolutions in the blocks of ``net``, in the order of forward. The head is in none."""
    layers = [layer for _, block in net.parts() for layer in block.children().values()]
    convolutions = [layer for layer in layers if isinstance(layer, Conv2d | ConvTranspose2d)]
    return [Weight(layer.weight, transposed=isinstance(layer, ConvTranspose2d)) for layer in convolutions]
