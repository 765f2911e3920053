"""What each CUDA kernel computes, in a few lines of ``xp``: the definition that the kernels are tested against.

``CudaEngine`` (minunet.engines.cuda.engine) calls the methods of one object, and does not know whether it is this one
or ``CupyKernels`` (minunet.engines.cuda.kernels), which launches the kernels of the ``.cu`` files. So the engine's
order of operations is tested on NumPy, and each kernel by itself, against this file, wherever it can be run.

Every method writes its results into the arrays given, whole, and allocates nothing that lasts. Arrays are channels
last. Activations have the dtype ``kernels.dtype``: float32, or for "bf16" uint16, the upper half of a float32's bits.
All else is float32. An activation may be a view of some channels of a larger array.
"""

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minunet import ops
from minunet.base import rng
from minunet.base.backend import Array, accumulation_dtype
from minunet.data.augment import PLAIN
from minunet.network.loss import SegmentationLoss
from minunet.ops.batch_norm2d import BatchNorm2dCache
from minunet.ops.conv2d import Conv2dCache
from minunet.training.optim import adamw_update


class Norm(NamedTuple):
    """A batch norm and what it is applied to."""

    y: Array  # an activation (N, H, W, C): the output of a convolution
    mean: Array  # (C,), of y: in training the batch's own, else the running one, less the bias that y is without
    var: Array  # (C,), biased; likewise
    gamma: Array  # (C,)
    beta: Array  # (C,)
    eps: float  # added to var


class Mask(NamedTuple):
    """A dropout mask, for all channels of an image or for some: the concatenation is written by halves."""

    bits: Array  # uint16 (N, words), see dropout_bits
    channels: int  # of the image whose values the bits number
    first: int  # where the channels that are written begin among them
    scale: float  # what is kept is multiplied by it: 1 / (1 - rate)


class Weight(NamedTuple):
    """The weight of a convolution, and of which kind it is."""

    array: Array  # (K, K, C_in, C_out)
    transposed: bool


class SpecificationKernels:
    """What the engine calls, each method by the op that defines it; ``xp`` is NumPy or CuPy.

    ``dtype`` is that of the arithmetic (float64 in tests); ``precision`` "tf32" computes as "float32" does here.
    """

    name = "specification"

    def __init__(self, xp: ModuleType, precision: str = "float32", dtype: str = "float32") -> None:
        self.xp, self.precision = xp, precision
        self.dtype = "uint16" if precision == "bf16" else dtype

    # --- Storage ----------------------------------------------------------------------------------------------------

    def load(self, array: Array) -> Array:
        """The values of an activation array."""
        if self.precision != "bf16":
            return array
        return (array.astype("uint32") << self.xp.asarray(16, "uint32")).view("float32")

    def store(self, out: Array, values: Array) -> None:
        """Write ``values`` into an activation array; bf16 rounds to the nearest, ties to even, and keeps a NaN."""
        if self.precision != "bf16":
            out[...] = values
            return
        xp = self.xp
        bits = xp.ascontiguousarray(values.astype("float32")).view("uint32")
        # The lower half falls away. Added first is just under half of the last bit that stays, and that bit itself: so
        # what lies in the middle goes up from an odd number only. 0x7FC0 is a NaN.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        out[...] = xp.where(xp.isnan(values), 0x7FC0, rounded).astype("uint16")

    def prepare_weights(self, weights: list[Weight]) -> None:
        """Called once before a step or a prediction uses ``weights``: kernels lay them out here (weights.cu).

        They are those of all convolutions of one network but its head.
        """

    def _rounded(self, weight: Array) -> Array:
        """``weight`` as the products see it."""
        if self.precision != "bf16":
            return weight
        bits = self.xp.empty(weight.shape, "uint16")
        self.store(bits, weight)
        return self.load(bits)

    # --- Convolutions 3x3, without bias -----------------------------------------------------------------------------

    def conv3x3(self, x: Array, weight: Array, y: Array, mean: Array | None = None, var: Array | None = None) -> None:
        """ops.conv2d_forward; ``mean`` and ``var`` (C_out,) receive the biased statistics over images and pixels."""
        values = self._conv(self.load(x), self._rounded(weight))
        self.store(y, values)
        if mean is not None and var is not None:
            sum_dtype = accumulation_dtype(values.dtype)
            mean[...] = values.mean(axis=(0, 1, 2), dtype=sum_dtype)
            centred = values - mean
            var[...] = (centred * centred).mean(axis=(0, 1, 2), dtype=sum_dtype)

    def conv3x3_grad_input(self, dy: Array, weight: Array, dx: Array, mask: Mask | None = None) -> None:
        """The dx of ops.conv2d_backward, then through ops.dropout_backward if there is a ``mask``."""
        values = self._conv(self.load(dy), flipped(self.xp, self._rounded(weight)))
        self.store(dx, self._dropped(values, mask))

    def conv3x3_grad_weight(self, x: Array, dy: Array, dweight: Array) -> None:
        """The dweight of ops.conv2d_backward."""
        dweight[...] = self._conv_grad_weight(self.load(x), self.load(dy))

    def _conv(self, x: Array, weight: Array) -> Array:
        y, _ = ops.conv2d_forward(x, weight, None)
        return y

    def _conv_grad_weight(self, x: Array, dy: Array) -> Array:
        weight = self.xp.zeros((3, 3, x.shape[3], dy.shape[3]), dtype=x.dtype)  # only dx depends on it
        _, dweight, _ = ops.conv2d_backward(dy, Conv2dCache(x, weight, False, 1, ((1, 1), (1, 1)), dy.shape))
        return dweight

    # --- Batch norm and ReLU ----------------------------------------------------------------------------------------

    def norm_relu(self, norm: Norm, out: Array) -> None:
        """Into ``out``: relu(gamma * (y - mean) / sqrt(var + eps) + beta)."""
        a, _ = ops.relu_forward(self._norm(norm)[0])
        self.store(out, a)

    def norm_relu_pool(
        self,
        norm: Norm,
        skip: Array,
        pooled: Array,
        skip_mask: Mask | None = None,
        pooled_mask: Mask | None = None,
    ) -> None:
        """norm_relu into ``skip`` and, max-pooled 2x2, into ``pooled``; then the dropout of each, if it has a mask.

        The masks have the same scale.
        """
        a, _ = ops.relu_forward(self._norm(norm)[0])
        largest, _ = ops.max_pool2d_forward(a)
        self.store(skip, self._dropped(a, skip_mask))
        self.store(pooled, self._dropped(largest, pooled_mask))

    def norm_relu_backward(self, da: Array, norm: Norm, dy: Array, dgamma: Array, dbeta: Array) -> None:
        """The backward of relu and batch norm in training. ``dy`` may be the array ``norm.y`` or ``da``."""
        self._norm_backward(self.load(da), norm, dy, dgamma, dbeta)

    def norm_relu_pool_backward(
        self, dskip: Array, dpooled: Array, norm: Norm, dy: Array, dgamma: Array, dbeta: Array
    ) -> None:
        """As norm_relu_backward, with da = dskip + the max-pool's backward. ``dy`` may be the array ``norm.y``.

        The winners of the pool are found again.
        """
        a, _ = ops.relu_forward(self._norm(norm)[0])
        _, cache = ops.max_pool2d_forward(a)
        da = self.load(dskip) + ops.max_pool2d_backward(self.load(dpooled), cache)
        self._norm_backward(da, norm, dy, dgamma, dbeta)

    def _norm(self, norm: Norm) -> tuple[Array, Array, Array]:
        """Normalised, scaled and shifted; x_hat; and 1 / sqrt(var + eps)."""
        inverse_std = 1 / self.xp.sqrt(norm.var + norm.eps)
        x_hat = (self.load(norm.y) - norm.mean) * inverse_std
        return norm.gamma * x_hat + norm.beta, x_hat, inverse_std

    def _norm_backward(self, da: Array, norm: Norm, dy: Array, dgamma: Array, dbeta: Array) -> None:
        """norm_relu_backward of the values ``da``."""
        z, x_hat, inverse_std = self._norm(norm)
        _, relu_cache = ops.relu_forward(z)
        dz = ops.relu_backward(da, relu_cache)
        cache = BatchNorm2dCache(x_hat, norm.gamma, inverse_std, True, None, None)
        dx, dgamma[...], dbeta[...] = ops.batch_norm2d_backward(dz, cache)
        self.store(dy, dx)

    # --- Dropout ----------------------------------------------------------------------------------------------------

    def dropout_bits(self, bits: Array, key: rng.Key, rate: float) -> None:
        """The mask of ops.dropout_forward for ``key``, 16 values a word: bit k of ``bits[n, b]`` keeps value 16 b + k.

        Values are numbered through an image: (i * W + j) * C + c.
        """
        n, words = bits.shape
        draws = np.stack([rng.random_uint16(key._replace(image=key.image + i), 16 * words) for i in range(n)])
        kept = (draws >= round(rate * 2**16)).reshape(n, words, 16)
        bits[...] = self.xp.asarray((kept << np.arange(16)).sum(axis=2).astype("uint16"))

    def _dropped(self, values: Array, mask: Mask | None) -> Array:
        """Dropout of ``values`` (N, H, W, C), if there is a mask."""
        if mask is None:
            return values
        xp = self.xp
        n, height, width, channels = values.shape
        kept = (mask.bits[:, :, None] >> xp.arange(16, dtype="uint16")) & xp.asarray(1, "uint16")
        kept = kept.reshape(n, -1)[:, : height * width * mask.channels].reshape(n, height, width, mask.channels)
        kept = kept[..., mask.first : mask.first + channels]
        return xp.where(kept > 0, values * mask.scale, values.dtype.type(0))

    # --- Transposed convolution, head, loss --------------------------------------------------------------------------

    def conv_transpose(self, x: Array, weight: Array, bias: Array, y: Array, mask: Mask | None = None) -> None:
        """ops.conv_transpose2d_forward, stride 2, "same"; then dropout, if there is a ``mask``."""
        values, _ = ops.conv_transpose2d_forward(self.load(x), self._rounded(weight), bias)
        self.store(y, self._dropped(values, mask))

    def conv_transpose_grad_input(self, dy: Array, weight: Array, dx: Array) -> None:
        """The dx of ops.conv_transpose2d_backward."""
        n, height, width, _ = dx.shape
        zeros = self.xp.zeros((n, height, width, weight.shape[2]), dtype=weight.dtype)
        _, cache = ops.conv_transpose2d_forward(zeros, self._rounded(weight), None)
        values, _, _ = ops.conv_transpose2d_backward(self.load(dy), cache)
        self.store(dx, values)

    def conv_transpose_grad_weight(self, x: Array, dy: Array, dweight: Array, dbias: Array) -> None:
        """The dweight and dbias of ops.conv_transpose2d_backward."""
        _, cache = ops.conv_transpose2d_forward(self.load(x), dweight, dbias)
        _, dweight[...], dbias[...] = ops.conv_transpose2d_backward(self.load(dy), cache)

    def head(self, x: Array, weight: Array, bias: Array, logits: Array) -> None:
        """ops.conv2d_forward; the logits are float32."""
        logits[...], _ = ops.conv2d_forward(self.load(x), weight, bias)

    def head_backward(self, dlogits: Array, x: Array, weight: Array, dx: Array, dweight: Array, dbias: Array) -> None:
        """ops.conv2d_backward. ``dx`` may be the array ``x``."""
        _, cache = ops.conv2d_forward(self.load(x), weight, dbias)
        values, dweight[...], dbias[...] = ops.conv2d_backward(dlogits, cache)
        self.store(dx, values)

    def loss(self, logits: Array, target: Array, loss: SegmentationLoss, value: Array, dlogits: Array) -> None:
        """``loss``, forward into ``value`` (1,) and backward into ``dlogits``."""
        value[...], cache = loss.forward(logits, target)
        dlogits[...] = loss.backward(cache)

    # --- What follows the gradients -----------------------------------------------------------------------------------

    def sum_of_squares(self, flat: Array) -> Array:
        """The sum of the squares of one long array, float64 (1,)."""
        wide = flat.astype("float64")
        return (wide * wide).sum().reshape(1)

    def table(self, columns: list[list[Array]]) -> Any:
        """What the next two methods take: the arrays of several dicts, side by side. Made once, used often."""
        return columns

    def adamw(
        self, table: Any, lr: float, betas: tuple[float, float], eps: float, steps: int, decays: list[float]
    ) -> None:
        """optim.AdamW.step number ``steps`` for all rows (theta, gradient, first and second moment) of the table."""
        for theta, g, m, v, decay in zip(*table, decays, strict=True):
            adamw_update(theta, g, m, v, steps, lr, betas, eps, decay)

    def lerp(self, table: Any, decay: float) -> None:
        """For all rows (average, value) of the table: average = decay * average + (1 - decay) * value."""
        for average, value in zip(*table, strict=True):
            average[...] = decay * average + (1 - decay) * value

    # --- Augmentation -------------------------------------------------------------------------------------------------

    def affine(
        self, images: Array, masks: Array, matrices: np.ndarray, moved_images: Array, moved_masks: Array
    ) -> None:
        """data.augment.PixelPasses.warp; ``matrices`` (N, 2, 2) are NumPy's."""
        moved_images[...], moved_masks[...] = PLAIN.warp(images, masks, matrices)

    def add_noise(self, images: Array, strength: Array, key: rng.Key, noisy: Array) -> None:
        """data.augment.PixelPasses.add_noise. ``noisy`` may be the array ``images``."""
        noisy[...] = PLAIN.add_noise(images, strength, key)


def flipped(xp: ModuleType, weight: Array) -> Array:
    """The weights (KH, KW, C_out, C_in) with which a convolution of dy is the grad-input of one with ``weight``."""
    return xp.ascontiguousarray(weight[::-1, ::-1].swapaxes(2, 3))
