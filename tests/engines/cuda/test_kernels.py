"""Each CUDA kernel against the op that specifies it: on the emulator, and on a GPU where one answers.

The reference is the specification in float64, on the same stored numbers. These are such that the tensor cores can hold
(TF32: 10 bits of mantissa), so the products are exact, and what differs is the rounding of sums and of what is stored.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from minunet.base import rng
from minunet.data.augment import PLAIN
from minunet.engines.cuda.kernels import CupyKernels, Kernels
from minunet.engines.cuda.programs import PRECISIONS, PROGRAMS
from minunet.engines.cuda.specification import Mask, Norm, SpecificationKernels
from minunet.network.loss import SegmentationLoss
from minunet.training.optim import AdamW
from tests.engines.cuda.emulator import COMPILER, EmulatedKernels, kernel_names
from tests.implementations import gpu_capability

SUMS = 5e-6  # what float32 sums of the tests' lengths are allowed, relative to the largest value
STORED = {"float32": SUMS, "tf32": 6e-4, "bf16": 5e-3}  # an activation: float32, or 10 or 7 bits of mantissa

DEVICES = (["emulator"] if COMPILER else []) + (["gpu"] if gpu_capability() >= 80 else [])
if not DEVICES:
    pytest.skip("neither g++ nor a GPU is here", allow_module_level=True)


def make(device: str, precision: str, seed: int = 0) -> Kernels:
    if device.startswith("gpu"):
        return CupyKernels(precision, hopper=device == "gpu")
    return EmulatedKernels(precision, seed=seed, hopper=device != "emulator")


@pytest.fixture(
    params=[(device, precision) for device in DEVICES for precision in PRECISIONS], ids=lambda p: "-".join(p)
)
def kernels(request):
    return make(*request.param)


#: Hopper GPUs have convolutions of their own for tf32 and bf16, and of the gradient of the weights for bf16. If those
#: fail, such a GPU gets what the others have.
HOPPER = (["hopper"] if COMPILER else []) + (["gpu-mma.sync"] if gpu_capability() == 90 else [])


@pytest.fixture(
    params=[(device, precision) for device in DEVICES for precision in PRECISIONS]
    + [(device, precision) for device in HOPPER for precision in ("tf32", "bf16")],
    ids=lambda p: "-".join(p),
)
def convolutions(request):
    return make(*request.param)


@dataclass
class Activation:
    """Channels ``first`` to ``first + C`` of an activation of ``total`` channels: an input, or NaN for an output."""

    values: np.ndarray  # (N, H, W, C)
    total: int = 0
    first: int = 0


class Numbers:
    """Random arguments, which the tensor cores of a precision can hold exactly."""

    def __init__(self, precision: str, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)
        self.dropped_bits = np.uint32(0xFFFF if precision == "bf16" else 0x1FFF)

    def __call__(self, *shape: int) -> np.ndarray:
        values = self.generator.standard_normal(shape, dtype="float32")
        return (values.view("uint32") & ~self.dropped_bits).view("float32")

    def activation(self, *shape: int, extra: int = 0) -> Activation:
        """``extra`` channels lie before those of the view, as in a concatenation."""
        return Activation(self(*shape), shape[3] + extra, extra)

    def norm(self, y: Activation) -> Norm:
        """A batch norm of ``y``."""
        channels = y.values.shape[3]
        return Norm(y, self(channels), np.abs(self(channels)), self(channels), self(channels), 1e-3)


def empty(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, "float32")


def output(*shape: int, extra: int = 0) -> Activation:
    return Activation(empty(*shape), shape[3] + extra, extra)


def single(arguments: Iterable[Any]) -> Iterator[Any]:
    """The arguments, and in the place of a group its fields."""
    for argument in arguments:
        yield from argument if isinstance(argument, Norm | Mask) else (argument,)


def call(kernels: SpecificationKernels, method: str, *arguments: Any) -> list[np.ndarray]:
    """Run a method on copies of the arguments; afterwards the values of all that are arrays, as NumPy arrays."""
    placed: dict[int, Any] = {}

    def place(argument: Any) -> Any:
        if isinstance(argument, Activation):
            n, height, width, channels = argument.values.shape
            total = argument.total or channels
            whole = kernels.xp.zeros((n, height, width, total), kernels.dtype)
            part = whole[..., argument.first : argument.first + channels]
            kernels.store(part, kernels.xp.asarray(argument.values))
            return part
        if not isinstance(argument, np.ndarray):
            return argument
        wide = argument.dtype == np.float32 and kernels.dtype == "float64"
        return kernels.xp.array(argument, dtype="float64" if wide else argument.dtype)

    def placed_once(argument: Any) -> Any:
        if isinstance(argument, Norm | Mask):
            return argument._make(map(placed_once, argument))
        if not isinstance(argument, np.ndarray | Activation):
            return argument
        if id(argument) not in placed:
            placed[id(argument)] = place(argument)
        return placed[id(argument)]

    values = [placed_once(argument) for argument in arguments]
    getattr(kernels, method)(*values)
    results = []
    for argument, value in zip(single(arguments), single(values), strict=True):
        if isinstance(argument, np.ndarray | Activation):
            loaded = kernels.load(value) if isinstance(argument, Activation) else value
            results.append(loaded if isinstance(loaded, np.ndarray) else loaded.get())
    return results


def assert_agrees(kernels: Kernels, method: str, *arguments: Any) -> None:
    """The method does what its specification does in float64, to the rounding of sums and of storage."""
    found = call(kernels, method, *arguments)
    expected = call(SpecificationKernels(np, dtype="float64"), method, *arguments)
    arrays = [argument for argument in single(arguments) if isinstance(argument, np.ndarray | Activation)]
    for place, (argument, got, wanted) in enumerate(zip(arrays, found, expected, strict=True)):
        tolerance = STORED[kernels.precision] if isinstance(argument, Activation) else SUMS
        error = np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-6)
        assert error <= tolerance, (
            f"array {place} of {method}: relative error {error:.2e} (NaN where nothing was written)"
        )


# n, height, width, channels in and out: a single pixel, odd numbers, several tiles each way, all three tiles; and more
# steps than there are stages.
CONVOLUTIONS = [
    (1, 1, 1, 3, 1),
    (1, 5, 7, 3, 8),
    (2, 6, 10, 24, 40),
    (1, 9, 18, 20, 70),
    (3, 17, 9, 5, 33),
    (2, 20, 20, 40, 72),
]


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv3x3(convolutions, shape):
    n, height, width, c, o = shape
    numbers = Numbers(convolutions.precision)
    x, weight, dy = (
        numbers.activation(n, height, width, c),
        numbers(3, 3, c, o),
        numbers.activation(n, height, width, o),
    )
    assert_agrees(convolutions, "conv3x3", x, weight, output(n, height, width, o), empty(o), empty(o))
    assert_agrees(convolutions, "conv3x3_grad_input", dy, weight, output(n, height, width, c))
    assert_agrees(convolutions, "conv3x3_grad_weight", x, dy, empty(3, 3, c, o))


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("shape", CONVOLUTIONS[:3], ids=str)
def test_conv_transpose(convolutions, shape, kernel):
    n, height, width, c, o = shape
    numbers = Numbers(convolutions.precision)
    x, weight, bias = numbers.activation(n, height, width, c), numbers(kernel, kernel, c, o), numbers(o)
    dy = numbers.activation(n, 2 * height, 2 * width, o, extra=8)  # the right half of a concatenation
    assert_agrees(convolutions, "conv_transpose", x, weight, bias, output(n, 2 * height, 2 * width, o, extra=8))
    assert_agrees(convolutions, "conv_transpose_grad_input", dy, weight, output(n, height, width, c))
    assert_agrees(convolutions, "conv_transpose_grad_weight", x, dy, empty(kernel, kernel, c, o), empty(o))


@pytest.mark.parametrize("channels", [3, 8, 40])
def test_statistics_of_nearly_constant_channels(channels):
    """1000 +- 1: the squares alone would leave 1 or 2 digits of the variance."""
    kernels = make(DEVICES[0], "float32")
    numbers = Numbers("tf32")
    x = Activation(1000 + np.round(numbers(2, 6, 5, 3) * 8) / 8)
    weight = np.zeros((3, 3, 3, channels), "float32")
    weight[1, 1, 0] = 1
    assert_agrees(kernels, "conv3x3", x, weight, output(2, 6, 5, channels), empty(channels), empty(channels))


@pytest.mark.parametrize("channels", [3, 8])
def test_dropout_in_the_convolutions(convolutions, channels):
    """The mask of an image of 2 x channels, of which the transposed convolution writes the left or the right half."""
    numbers, shape = Numbers(convolutions.precision), (2, 4, 6)
    bits = random_bits((*shape, 2 * channels))
    dy, weight = numbers.activation(*shape, 5), numbers(3, 3, 2 * channels, 5)
    mask = Mask(bits, 2 * channels, 0, 1 / 0.7)
    assert_agrees(convolutions, "conv3x3_grad_input", dy, weight, output(*shape, 2 * channels), mask)
    x, up, bias = numbers.activation(2, 2, 3, 5), numbers(2, 2, 5, channels), numbers(channels)
    for first in (0, channels):
        half = output(*shape, channels)
        assert_agrees(convolutions, "conv_transpose", x, up, bias, half, mask._replace(first=first))


def test_a_mask_of_too_many_values_is_refused():
    """The kernels count them in 32 bits."""
    numbers, bits = Numbers("float32"), np.broadcast_to(np.uint16(0), (1, 2**27))
    kernels, images = make(DEVICES[0], "float32"), np.zeros((1, 2, 2, 8), "float32")
    dy, weight, mask = kernels.xp.asarray(images), kernels.xp.asarray(numbers(3, 3, 8, 8)), Mask(bits, 8, 0, 1.0)
    with pytest.raises(ValueError, match="fewer than 2\\*\\*31 values an image, got 2147483648"):
        kernels.conv3x3_grad_input(dy, weight, images, mask)


def test_masks_of_two_scales_are_refused(float_kernels):
    """The kernel has one for both."""
    bits, norm = random_bits((1, 2, 2, 8)), Numbers("float32").norm(output(1, 2, 2, 8))
    masks = Mask(bits, 8, 0, 1.25), Mask(bits, 8, 0, 2.0)
    with pytest.raises(ValueError, match=r"must have the same scale, got \[1.25, 2.0\]"):
        call(float_kernels, "norm_relu_pool", norm, output(1, 2, 2, 8), output(1, 1, 1, 8), *masks)


def random_bits(shape: tuple[int, ...], rate: float = 0.3) -> np.ndarray:
    bits = np.zeros((shape[0], -(-int(np.prod(shape[1:])) // 16)), "uint16")
    SpecificationKernels(np).dropout_bits(bits, rng.Key(1), rate)
    return bits


@pytest.mark.parametrize("shape", [(1, 2, 2, 3), (2, 4, 6, 8), (3, 2, 2, 40)], ids=str)
@pytest.mark.parametrize("dropout", [False, True])
def test_norm_relu_pool(kernels, shape, dropout):
    n, height, width, c = shape
    numbers = Numbers(kernels.precision)
    norm = numbers.norm(numbers.activation(*shape))
    assert_agrees(kernels, "norm_relu", norm, output(*shape, extra=c))
    half = (n, height // 2, width // 2, c)
    skip_mask = Mask(random_bits((n, height, width, 2 * c)), 2 * c, c, 1 / 0.7)
    masks = (skip_mask, Mask(random_bits(half), c, 0, 1 / 0.7)) if dropout else ()
    assert_agrees(kernels, "norm_relu_pool", norm, output(*shape, extra=c), output(*half), *masks)
    da, dpooled = numbers.activation(*shape, extra=c), numbers.activation(*half)
    results = (output(*shape), empty(c), empty(c))
    assert_agrees(kernels, "norm_relu_backward", da, norm, *results)
    assert_agrees(kernels, "norm_relu_pool_backward", da, dpooled, norm, *results)


def test_backward_in_place(kernels):
    """dy may be y or da, dx of the head may be x: the engine saves memory so."""
    numbers, shape = Numbers(kernels.precision), (2, 4, 6, 8)
    y, da, dpooled = numbers.activation(*shape), numbers.activation(*shape), numbers.activation(2, 2, 3, 8)
    norm, sums = numbers.norm(y), (empty(8), empty(8))
    *_, apart, _, _ = call(kernels, "norm_relu_backward", da, norm, output(*shape), *sums)
    for place in (y, da):
        *_, dy, _, _ = call(kernels, "norm_relu_backward", da, norm, place, *sums)
        np.testing.assert_array_equal(dy, apart)
    *_, apart, _, _ = call(kernels, "norm_relu_pool_backward", da, dpooled, norm, output(*shape), *sums)
    *_, dy, _, _ = call(kernels, "norm_relu_pool_backward", da, dpooled, norm, y, *sums)
    np.testing.assert_array_equal(dy, apart)
    for k in (1, 2):
        dlogits, weight = numbers(2, 4, 6, k), numbers(3, 3, 8, k)
        apart = call(kernels, "head_backward", dlogits, y, weight, output(*shape), empty(3, 3, 8, k), empty(k))
        shared = call(kernels, "head_backward", dlogits, y, weight, y, empty(3, 3, 8, k), empty(k))
        for got, wanted in zip(shared[2:], apart[2:], strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_nan_does_not_hide(kernels):
    y = Numbers(kernels.precision).activation(1, 2, 2, 8)
    y.values[0, 1, 1, 3] = np.nan
    one, zero = np.ones(8, "float32"), np.zeros(8, "float32")
    norm, results = Norm(y, zero, one, one, zero, 1e-3), (output(1, 2, 2, 8), output(1, 1, 1, 8))
    *_, skip, pooled = call(kernels, "norm_relu_pool", norm, *results)
    assert np.argwhere(np.isnan(skip)).tolist() == [[0, 1, 1, 3]]
    assert np.argwhere(np.isnan(pooled)).tolist() == [[0, 0, 0, 3]]


# n, height, width, channels, outputs. A strip is 16 columns, and 4 rows forward; 16 threads take 64 channels of it. So:
# several strips each way, parts of strips, a strip of one column; images that share a block; more than 64 channels.
HEADS = [
    (1, 5, 3, 3, 2),
    (2, 4, 6, 8, 1),
    (1, 3, 3, 70, 3),
    (3, 9, 37, 20, 1),
    (1, 6, 17, 132, 1),
    (2, 8, 32, 64, 1),
    (1, 5, 18, 40, 2),
]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_head(kernels, shape, kernel):
    n, height, width, c, k = shape
    numbers = Numbers(kernels.precision)
    x, weight, bias = numbers.activation(n, height, width, c, extra=8), numbers(kernel, kernel, c, k), numbers(k)
    assert_agrees(kernels, "head", x, weight, bias, empty(n, height, width, k))
    results = (output(n, height, width, c, extra=4), empty(*weight.shape), empty(k))
    assert_agrees(kernels, "head_backward", numbers(n, height, width, k), x, weight, *results)


@pytest.fixture(params=DEVICES)
def float_kernels(request):
    return make(request.param, "float32")


@pytest.mark.parametrize("over", ["batch", "image"])
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (3, 5, 7, 2), (2, 40, 30, 1)], ids=str)
def test_loss(float_kernels, shape, over):
    numbers = Numbers("float32")
    logits, target = 30 * numbers(*shape), (numbers(*shape) > 0).astype("float32")
    loss = SegmentationLoss(0.7, 0.6, 0.8, over)
    assert_agrees(float_kernels, "loss", logits, target, loss, empty(1), empty(*shape))


@pytest.mark.parametrize("key", [rng.Key(0), rng.Key(2**63 + 5, epoch=7, step=2**40, stream=17, image=2**33)], ids=str)
def test_dropout_bits_are_numpys(float_kernels, key):
    bits = np.zeros((3, 300), "uint16")  # more than a block's 256 words
    found = call(float_kernels, "dropout_bits", bits, key, 0.3)[0]
    np.testing.assert_array_equal(found, call(SpecificationKernels(np), "dropout_bits", bits, key, 0.3)[0])
    assert 0.68 < np.unpackbits(found.view("uint8")).mean() < 0.72


def test_adamw_has_numpys_bits(float_kernels):
    """Several steps over tensors shorter and longer than a chunk, moments that become denormal among them."""
    kernels, numbers = float_kernels, Numbers("float32")
    shapes, decays = [(3,), (9000,), (2, 5)], [0.0, 0.01, 0.004]
    theta, first = [[numbers(*shape) for shape in shapes] for _ in range(2)]
    second = [np.abs(numbers(*shape)) for shape in shapes]
    first[0][:] = [1e-38, -1e-39, 1.2e-38]
    steps = [[numbers(*shape) if shape != (3,) else np.zeros(3, "float32") for shape in shapes] for _ in range(2)]

    on_device = [[kernels.xp.array(array) for array in column] for column in (theta, steps[0], first, second)]
    table = kernels.table(on_device)
    for step, grads in enumerate(steps, start=3):
        for array, grad in zip(on_device[1], grads, strict=True):
            array[...] = kernels.xp.asarray(grad)
        kernels.adamw(table, 3e-3, (0.9, 0.999), 1e-7, step, decays)
        for i, decay in enumerate(decays):
            adam = AdamW({"w": theta[i]}, 3e-3, (0.9, 0.999), 1e-7, decay)
            adam.first_moment, adam.second_moment, adam.steps = {"w": first[i]}, {"w": second[i]}, step - 1
            adam.step({"w": grads[i]})
    for column, expected in ((0, theta), (2, first), (3, second)):
        for got, wanted in zip(on_device[column], expected, strict=True):
            np.testing.assert_array_equal(got if isinstance(got, np.ndarray) else got.get(), wanted)
    assert first[0][1] == 0  # the flush had work to do


def test_lerp_and_sum_of_squares(float_kernels):
    kernels, numbers = float_kernels, Numbers("float32")
    averages, values = [[numbers(*shape) for shape in ((3,), (9000,))] for _ in range(2)]
    on_device = [[kernels.xp.array(array) for array in column] for column in (averages, values)]
    kernels.lerp(kernels.table(on_device), 0.9)
    for got, average, value in zip(on_device[0], averages, values, strict=True):
        wanted = 0.9 * average + (1 - 0.9) * value
        np.testing.assert_array_equal(got if isinstance(got, np.ndarray) else got.get(), wanted)
    flat = numbers(70001)
    total = kernels.sum_of_squares(kernels.xp.asarray(flat)).item()
    assert total == pytest.approx((flat.astype("float64") ** 2).sum(), rel=1e-13)


def test_a_table_refuses_what_a_kernel_would_misread(float_kernels):
    wrong = float_kernels.xp.zeros((4, 4), "float32")[:, ::2]
    with pytest.raises(ValueError, match="contiguous float32 arrays"):
        float_kernels.table([[wrong], [wrong]])


def test_affine(float_kernels):
    """A quarter turn, whose places are halves of pixels by rounding, and maps that lead far outside."""
    kernels, generator = float_kernels, np.random.default_rng(0)
    images = generator.standard_normal((3, 7, 10, 3), dtype="float32")
    masks = (generator.random((3, 7, 10, 2)) > 0.5).astype("float32")
    matrices = generator.standard_normal((3, 2, 2))
    matrices[0] = [[np.cos(np.pi / 2), -1], [1, np.cos(np.pi / 2)]]
    moved = [kernels.xp.array(images), kernels.xp.array(masks)]
    kernels.affine(kernels.xp.asarray(images), kernels.xp.asarray(masks), matrices, *moved)
    moved_images, moved_masks = (array if isinstance(array, np.ndarray) else array.get() for array in moved)
    expected_images, expected_masks = PLAIN.warp(images, masks, matrices)
    np.testing.assert_array_equal(moved_images, expected_images)
    np.testing.assert_array_equal(moved_masks, expected_masks)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 3), (2, 16, 40, 3)])
@pytest.mark.parametrize("key", [rng.Key(1), rng.Key(2**64 - 1, 2**63, 7, 5, 2**40)])
def test_noise_is_numpys(float_kernels, shape, key):
    """To the last bits of log, sine and cosine, of numbers up to 7. One image has no noise at all."""
    kernels, numbers = float_kernels, Numbers("float32")
    images, strength = numbers(*shape), 1 + np.abs(numbers(shape[0], 1, 1, 1))
    strength[0] = 0 if shape[0] > 1 else 1
    found = call(kernels, "add_noise", images, strength, key, empty(*shape))
    expected = PLAIN.add_noise(images, strength, key)
    assert np.abs(found[2] - expected).max() <= 3e-6 * strength.max()
    assert (np.abs(found[2] - images).max(axis=(1, 2, 3)) > 0).tolist() == [size > 0 for size in strength.ravel()]
    in_place = kernels.xp.array(images)
    kernels.add_noise(in_place, kernels.xp.asarray(strength), key, in_place)
    np.testing.assert_array_equal(in_place if isinstance(in_place, np.ndarray) else in_place.get(), found[2])


def test_the_same_bits_in_every_order_of_threads():
    """No sum depends on who comes first: two seeds of the emulator, or two runs on a GPU."""
    results = []
    for seed in (1, 2):
        kernels, numbers = make(DEVICES[0], "tf32", seed), Numbers("tf32")
        x, dy, weight = numbers.activation(3, 9, 8, 8), numbers.activation(3, 9, 8, 8), numbers(3, 3, 8, 8)
        norm = numbers.norm(x)
        logits, target = numbers(2, 9, 9, 1), (numbers(2, 9, 9, 1) > 0).astype("float32")
        results.append(
            call(kernels, "conv3x3", x, weight, output(3, 9, 8, 8), empty(8), empty(8))
            + call(kernels, "conv3x3_grad_weight", x, dy, empty(3, 3, 8, 8))
            + call(kernels, "norm_relu_backward", dy, norm, output(3, 9, 8, 8), empty(8), empty(8))
            + call(kernels, "loss", logits, target, SegmentationLoss(), empty(1), empty(2, 9, 9, 1))
        )
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_kernels_that_are_launched_are_those_of_the_files():
    for program in PROGRAMS.values():
        assert set(program.kernels) == kernel_names(program.file), program.file


@pytest.mark.parametrize(
    ("method", "arrays"),
    [
        ("conv3x3", [(1, 4, 4, 3), (3, 3, 4, 8), (1, 4, 4, 8)]),
        ("conv3x3", [(1, 4, 4, 3), (3, 3, 3, 8), (1, 4, 5, 8)]),
        ("conv3x3_grad_weight", [(1, 4, 4, 3), (1, 4, 4, 8), (3, 3, 8, 3)]),
        ("conv_transpose", [(1, 4, 4, 3), (2, 2, 3, 8), (8,), (1, 4, 4, 8)]),
        ("conv_transpose", [(1, 4, 4, 3), (4, 4, 3, 8), (8,), (1, 8, 8, 8)]),
        ("head", [(1, 4, 4, 3), (5, 5, 3, 1), (1,), (1, 4, 4, 1)]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(float_kernels, method, arrays):
    with pytest.raises(ValueError, match="must have shape"):
        getattr(float_kernels, method)(*(float_kernels.xp.zeros(shape, "float32") for shape in arrays))


def test_augmentation_refuses_what_a_kernel_would_misread(float_kernels):
    kernels = float_kernels
    zeros = kernels.xp.zeros
    images, masks, matrices = zeros((2, 4, 4, 3), "float32"), zeros((2, 4, 4, 1), "float32"), np.zeros((2, 2, 2))
    strength, key = zeros((2, 1, 1, 1), "float32"), rng.Key(0)
    for arguments in (
        (images, masks[:1], matrices, images, masks[:1]),
        (images, masks, matrices[:1], images, masks),
        (images, masks, matrices, images[:1], masks),
        (images, masks, matrices, images, zeros((2, 4, 4, 2), "float32")),
    ):
        with pytest.raises(ValueError, match="must have shape"):
            kernels.affine(*arguments)
    with pytest.raises(ValueError, match="strength must have shape"):
        kernels.add_noise(images, strength[0], key, images)
    for wrong in (zeros((2, 4, 4, 3), "float64"), zeros((2, 4, 4, 6), "float32")[..., ::2]):
        with pytest.raises(ValueError, match="must be contiguous float32 arrays"):
            kernels.add_noise(wrong, strength, key, images)
        with pytest.raises(ValueError, match="must be contiguous float32 arrays"):
            kernels.affine(images, masks, matrices, wrong, masks)
