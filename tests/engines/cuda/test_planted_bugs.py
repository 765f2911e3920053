"""Bugs of the kind that a GPU hides until it does not, planted in the kernels: the emulator must catch each.

A patch names the exact text that it replaces, so a kernel that has moved on makes its test fail rather than pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from minunet.engines.cuda.kernels import Kernels
from minunet.network.loss import SegmentationLoss
from tests.engines.cuda.emulator import COMPILER, EmulatedKernels, KernelError, Patch, load
from tests.engines.cuda.test_kernels import Numbers, assert_agrees, empty, output

if COMPILER is None:
    pytest.skip("no g++ here", allow_module_level=True)

SEEDS = range(8)  # orders of threads; one of them has to show the bug


def convolution(kernels: Kernels) -> None:
    numbers = Numbers(kernels.precision)
    x, weight = numbers.activation(1, 5, 9, 32), numbers(3, 3, 32, 24)
    assert_agrees(kernels, "conv3x3", x, weight, output(1, 5, 9, 24), empty(24), empty(24))


def weight_gradient(kernels: Kernels) -> None:
    numbers = Numbers(kernels.precision)
    x, dy = numbers.activation(2, 17, 9, 8), numbers.activation(2, 17, 9, 24)
    assert_agrees(kernels, "conv3x3_grad_weight", x, dy, empty(3, 3, 8, 24))


def long_weight_gradient(kernels: Kernels) -> None:
    """More tiles a block than there are stages."""
    numbers = Numbers(kernels.precision)
    x, dy = numbers.activation(4, 33, 20, 8), numbers.activation(4, 33, 20, 8)
    assert_agrees(kernels, "conv3x3_grad_weight", x, dy, empty(3, 3, 8, 8))


def transposed_weight_gradient(kernels: Kernels) -> None:
    numbers = Numbers(kernels.precision)
    x, dy = numbers.activation(2, 17, 3, 8), numbers.activation(2, 34, 6, 8)
    assert_agrees(kernels, "conv_transpose_grad_weight", x, dy, empty(3, 3, 8, 8), empty(8))


def norm_gradient(kernels: Kernels) -> None:
    numbers = Numbers(kernels.precision)
    da, y = numbers.activation(2, 6, 6, 8), numbers.activation(2, 6, 6, 8)
    assert_agrees(kernels, "norm_relu_backward", da, numbers.norm(y), output(2, 6, 6, 8), empty(8), empty(8))


def norm(kernels: Kernels) -> None:
    numbers = Numbers(kernels.precision)
    assert_agrees(kernels, "norm_relu", numbers.norm(numbers.activation(1, 3, 3, 8)), output(1, 3, 3, 8))


def head(kernels: Kernels) -> None:
    numbers = Numbers(kernels.precision)
    x, weight, bias = numbers.activation(1, 4, 4, 40), numbers(3, 3, 40, 1), numbers(1)
    assert_agrees(kernels, "head", x, weight, bias, empty(1, 4, 4, 1))


def wide_head(kernels: Kernels) -> None:
    numbers = Numbers(kernels.precision)
    x, weight, bias = numbers.activation(1, 2, 16, 8), numbers(3, 3, 8, 1), numbers(1)
    assert_agrees(kernels, "head", x, weight, bias, empty(1, 2, 16, 1))


def small_head(kernels: Kernels) -> None:
    numbers = Numbers(kernels.precision)
    x, weight, bias = numbers.activation(1, 3, 3, 8), numbers(1, 1, 8, 1), numbers(1)
    assert_agrees(kernels, "head", x, weight, bias, empty(1, 3, 3, 1))


def head_in_place(kernels: Kernels) -> None:
    numbers = Numbers(kernels.precision)
    x, weight = numbers.activation(1, 3, 20, 8), numbers(3, 3, 8, 2)
    results = (x, empty(3, 3, 8, 2), empty(2))
    assert_agrees(kernels, "head_backward", numbers(1, 3, 20, 2), x, weight, *results)


def loss(kernels: Kernels) -> None:
    numbers = Numbers("float32")
    logits, target = numbers(2, 9, 9, 1), (numbers(2, 9, 9, 1) > 0).astype("float32")
    weights = SegmentationLoss(0.7, 0.6, 0.8, "batch")
    assert_agrees(kernels, "loss", logits, target, weights, empty(1), empty(2, 9, 9, 1))


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    old: str
    new: str
    scene: Callable[[Kernels], None]
    message: str  # a part of what is said
    precision: str = "tf32"
    hopper: bool = False


WRONG = "relative error"

BUGS = [
    Bug(
        "the barrier of the main loop is missing: a fast warp reads what others have not brought yet",
        "conv.cu",
        "        __syncthreads();  // everyone's has, and",
        "        // everyone's has, and",
        convolution,
        WRONG,
    ),
    Bug(
        "the wait lets one group of copies too many be under way",
        "conv.cu",
        "copy_wait<STAGES - 2>();",
        "copy_wait<STAGES - 1>();",
        convolution,
        WRONG,
    ),
    Bug(
        "the tile of the result overwrites patches that a slow warp still reads",
        "conv.cu",
        "    __syncthreads();  // from here on shared memory holds the tile of the result, in rows of channels",
        "",
        convolution,
        WRONG,
    ),
    Bug(
        "the wait for the copies is missing",
        "grad_weight.cu",
        "        copy_wait<0>();\n        __syncthreads();  // the tile is there",
        "        __syncthreads();  // the tile is there",
        weight_gradient,
        WRONG,
    ),
    Bug(
        "copies into the buffer in use: one stage where two are needed",
        "grad_weight.cu",
        "unsigned char* to = shared + tile % STAGES * STAGE_BYTES;",
        "unsigned char* to = shared;",
        weight_gradient,
        WRONG,
    ),
    Bug(
        "a fragment's rows in the order of its columns",
        "grad_weight.cu",
        "a[m][2 * k] = two.x, a[m][2 * k + 1] = two.y;",
        "a[m][k] = two.x, a[m][k + 2] = two.y;",
        weight_gradient,
        WRONG,
    ),
    Bug(
        "the lanes name the rows of a bf16 fragment in the wrong order",
        "grad_weight.cu",
        "return (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 16;",
        "return (lane % 8 + lane / 8 % 2 * 8) * PITCH + lane / 16 * 16;",
        weight_gradient,
        WRONG,
        precision="bf16",
    ),
    Bug(
        "warps without work leave while the others wait for them",
        "grad_weight.cu",
        "        if (tap_row >= s.tap_rows) continue;",
        "        if (tap_row >= s.tap_rows) return;",
        transposed_weight_gradient,
        "ends with copies that it never waited for",
    ),
    Bug(
        "a race on a reduction: the scratch is filled anew while it is summed",
        "reduce.cuh",
        "value[i] += scratch[threadIdx.x + g * wide];\n        __syncthreads();",
        "value[i] += scratch[threadIdx.x + g * wide];",
        norm_gradient,
        WRONG,
    ),
    Bug(
        # This kernel was first written so. On a GPU these threads are of one warp, whose luck might have hidden it.
        "the last barrier of a sum by halving is missing",
        "loss.cu",
        "    __syncthreads();  // thread 0 has the sums, and threads 1 to 3 write them, too",
        "",
        loss,
        WRONG,
        precision="float32",
    ),
    Bug(
        "lanes of one warp pass numbers through shared memory without __syncwarp",
        "loss.cu",
        "            total[threadIdx.x] += sum;\n        }\n        __syncwarp();",
        "            total[threadIdx.x] += sum;\n        }",
        loss,
        WRONG,
        precision="float32",
    ),
    Bug(
        "a shuffle names fewer lanes than take part",
        "head.cu",
        "__shfl_xor_sync(0xffffffffu, total[0], bits)",
        "__shfl_xor_sync(0x00ffffffu, total[0], bits)",
        head,
        "is not in its own mask",
    ),
    Bug(
        "lanes that have no strip leave before a shuffle that needs them",
        "head.cu",
        "    const bool inside = image < images;  // who is not still takes part in the shuffles",
        "    const bool inside = image < images;\n    if (!inside) return;",
        small_head,
        "deadlock: it waits in __shfl_xor_sync",
    ),
    Bug(
        "lanes give away the half of the rows that they should keep",
        "head.cu",
        "const float theirs = upper ? total[r] : total[r + half];",
        "const float theirs = upper ? total[r + half] : total[r];",
        head,
        WRONG,
    ),
    Bug(
        "a strip ends before the column that its last logits need",
        "head.cu",
        "j <= first + COLUMNS; ++j",
        "j < first + COLUMNS; ++j",
        wide_head,
        WRONG,
    ),
    Bug(
        "dx is written over x, which the next output still needs",
        "head.cu",
        "                    if (k < outputs - 1) continue;  // x is needed once more",
        "",
        head_in_place,
        WRONG,
    ),
    Bug(
        "a barrier that half of the threads pass in another place",
        "loss.cu",
        "        __syncthreads();\n        if (threadIdx.x < half)",
        "        if (threadIdx.x < half) __syncthreads();\n        else\n            __syncthreads();\n"
        "        if (threadIdx.x < half)",
        loss,
        "__syncthreads in line",
        precision="float32",
    ),
    Bug(
        "one pixel too many",
        "norm.cu",
        "pixel < pixels; pixel += w.step",
        "pixel <= pixels; pixel += w.step",
        norm,
        "access to forbidden memory",
        precision="float32",
    ),
    Bug(
        "a register more than the tile has columns: shared memory written beyond its end",
        "conv.cuh",
        "constexpr int RESULT_PITCH = (CHANNELS * 9 / 8 + 7) / 16 * 16 + 8;",
        "constexpr int RESULT_PITCH = 3 * CHANNELS + 8;",
        convolution,
        "access to forbidden memory",
    ),
    Bug(
        "a stage is free before the products that read it are over",
        "conv_wgmma.cu",
        "            products_wait<1>();  // those of the step before are over",
        "            // those of the step before are over",
        convolution,
        WRONG,
        hopper=True,
    ),
    Bug(
        "wgmma is not told that copies have written what it reads",
        "conv_wgmma.cu",
        "            if (patch != 1) {\n                written_for_products();",
        "            if (patch != 1) {",
        convolution,
        "without fence.proxy.async",
        hopper=True,
    ),
    Bug(
        "the weights are said to be there a step too early",
        "conv_wgmma.cu",
        "copy_wait<LATE>();",
        "copy_wait<LATE + 1>();",
        convolution,
        "without fence.proxy.async",
        hopper=True,
    ),
    Bug(
        "the strides of a matrix in shared memory, exchanged",
        "wgmma.cuh",
        "static_cast<Matrix>(sum >> 4) << 16 | static_cast<Matrix>(rows >> 4) << 32",
        "static_cast<Matrix>(rows >> 4) << 16 | static_cast<Matrix>(sum >> 4) << 32",
        convolution,
        "wgmma reads outside of shared memory",
        hopper=True,
    ),
    Bug(
        "a tile's rows are found while a slow warp still copies the tile that had their place before",
        "grad_weight.cu",
        "        copy_wait<0>();\n        __syncthreads();  // the tile is there",
        "        copy_wait<0>();\n        find_rows(tile + 2);\n        __syncthreads();  // the tile is there",
        long_weight_gradient,
        WRONG,
    ),
    Bug(
        "a stage is filled while a warpgroup still multiplies it",
        "grad_weight_wgmma.cu",
        "                if (tile >= STAGES) barrier_wait(FREE + tile % STAGES, MULTIPLIERS + LOADERS);",
        "",
        long_weight_gradient,
        "",
        precision="bf16",
        hopper=True,
    ),
    Bug(
        "the sums of a channel's warps overwrite results that another warp still reads",
        "conv.cuh",
        "    __syncthreads();  // nobody reads the result any more",
        "",
        convolution,
        WRONG,
    ),
    Bug(
        "lanes that have the same channels do not add up their shares of the statistics",
        "conv.cuh",
        "    for (int lanes = PARTS; lanes < 32; lanes *= 2) {",
        "    for (int lanes = 2 * PARTS; lanes < 32; lanes *= 2) {",
        convolution,
        WRONG,
        precision="bf16",
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.file}-{bug.name[:40]}")
def test_a_planted_bug_is_caught(bug):
    """The kernel as it stands passes in the same scene, and with the bug fails as expected in some order of threads."""

    def kernels(seed: int, patches: Sequence[Patch]) -> EmulatedKernels:
        return EmulatedKernels(bug.precision, seed=seed, patches=patches, hopper=bug.hopper)

    bug.scene(kernels(0, []))
    for seed in SEEDS:
        try:
            bug.scene(kernels(seed, [(bug.file, bug.old, bug.new)]))
        except (AssertionError, KernelError) as error:
            assert bug.message in str(error)  # noqa: PT017  # which of the seeds raises is chance
            return
    pytest.fail(f"not caught: {bug.name}")


def test_a_patch_must_find_its_text():
    with pytest.raises(ValueError, match="found 0 times"):
        load("loss", "float32", (("loss.cu", "no such text", ""),))


def test_arguments_of_the_wrong_size_are_refused():
    """What a GPU's driver would take as it comes."""
    kernels = EmulatedKernels("float32")
    numbers = np.zeros(4, "float32")
    with pytest.raises(KernelError, match="the kernel takes arguments pip, got pdp"):
        kernels.device.launch("optimizer", "sum_doubles", 1, 256, (numbers, np.float64(4), numbers), 0)


def test_rows_of_fragments_lie_in_different_banks():
    """ldmatrix reads 8 rows of 16 bytes a cycle, if no two of them share banks: with 64 bytes a row they would."""
    for precision in ("tf32", "bf16"):
        kernels = EmulatedKernels(precision)
        convolution(kernels)
        weight_gradient(kernels)
        assert kernels.emulated.row_conflicts["convolve"] == kernels.emulated.row_conflicts["grad_weight"] == 0
    kernels = EmulatedKernels("tf32", patches=[("conv.cu", "PITCH = 64 + 16;", "PITCH = 64;")])
    convolution(kernels)
    assert kernels.emulated.row_conflicts["convolve"] > 0
