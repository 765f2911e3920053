"""What the time of a Hopper kernel is made of: the same kernel with one of its stages left out.

    python benchmarks/gpu_stages.py                 convolution and gradient of the weights, three layers, bf16
    python benchmarks/gpu_stages.py --wgmma         how fast wgmma is alone, and whether it minds where its factors lie

A stage is left out by changing the kernel's text before it is compiled: the results are then wrong, and only the time
is of interest. What a stage costs is not what is saved without it, since the stages run side by side; but a kernel that
is as fast without its products is not limited by its products. Needs a GPU of compute capability 9.0, and CuPy.
"""

import argparse
import importlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script, also where minunet is not installed
    sys.path.insert(0, str(ROOT))

from minunet.base import cli  # noqa: E402
from minunet.base.backend import resolve_device  # noqa: E402
from minunet.base.errors import UserError  # noqa: E402
from minunet.engines.cuda import device as engine_device  # noqa: E402
from minunet.engines.cuda.kernels import CupyKernels  # noqa: E402
from minunet.engines.cuda.specification import Weight  # noqa: E402

#: (file, text, what stands in its place). The compiler must not see that a stage is never run: `rounded` is 0 or 1.
Change = tuple[str, str, str]
FENCE = '    emulator::fence_proxy();\n#else\n    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");'
COPY = 'asm volatile(\n        "{.reg .pred none;'
WEIGHTS = "copy_async(to + q * 16, from + q * ELEMENTS);"
RESULT = "    write_result(c, tile, result, pixel_of);"
STAGES: dict[str, tuple[Change, ...]] = {
    "all of it": (),
    "no fences": (("wgmma.cuh", FENCE, "#else"),),
    "no 16-byte copies": (("ptx.cuh", COPY, f"if (to == 77) {COPY}"),),
    "no weights": (("conv_wgmma.cu", WEIGHTS, f"if (rounded == 77) {WEIGHTS}"),),
    "no pixels": (
        ("conv_wgmma.cu", "if (aligned(c)) load_patch", "if (rounded != 77) {} else if (aligned(c)) load_patch"),
    ),
    "no products": (
        ("conv_wgmma.cu", "multiply_group<0>(sum[q]", "if (blockDim.x == 77) multiply_group<0>(sum[q]"),
        ("grad_weight_wgmma.cu", "multiply_group<1>(sum[v]", "if (blockDim.x == 77) multiply_group<1>(sum[v]"),
    ),
    "no result": (("conv_wgmma.cu", RESULT, RESULT.replace("write", "if (rounded == 77) write")),),
}

#: wgmma alone: NWG warpgroups, each with NSQ products of 64 x 8 NF a step of 32 bytes. ACROSS: MN-major.
WGMMA = r"""
extern "C" __global__ void __launch_bounds__(128 * NWG, 1)
    products(long long* cycles, float* never, int steps, int a_first, int a_sum, int a_rows, int b_sum, int b_rows) {
    extern __shared__ __align__(1024) unsigned char shared[];
    for (int i = threadIdx.x; i < 200 * 256; i += 128 * NWG)
        reinterpret_cast<unsigned int*>(shared)[i] = i * 2654435761u;
    written_for_products();
    __syncthreads();
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
    float sum[NSQ][NF][4] = {};
    const Matrix a = matrix(shared + a_first + group * 4096, a_sum, a_rows), b = matrix(shared + 102400, b_sum, b_rows);
    const long long begin = clock64();
    for (int step = 0; step < steps; ++step) {
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int q = 0; q < NSQ; ++q) multiply_group<MN>(sum[q], later(a, q * 2048), b);
        products_commit();
        products_wait<1>();
    }
    products_wait<0>();
    if (threadIdx.x == 0 && blockIdx.x == 0) cycles[0] = clock64() - begin;
    for (int q = 0; q < NSQ; ++q)
        for (int f = 0; f < NF; ++f)
            for (int i = 0; i < 4; ++i)
                if (sum[q][f][i] == 0.123f) never[0] = 1;
}
"""


def changed(changes: Sequence[Change]) -> Callable[[str], str]:
    """``engine_device.source`` with some texts replaced, in the files that have them.

    Raises ValueError if a text is there more than once.
    """
    original = engine_device.source

    def source(file: str, included: set[str] | None = None) -> str:
        text = original(file, included)
        for _, old, new in changes:
            if text.count(old) > 1:
                raise ValueError(f"{file}: found {text.count(old)} times: {old}")
            text = text.replace(old, new)
        return text

    return source


def milliseconds(cupy: Any, call: Callable[[], Any], calls: int = 10, rounds: int = 5) -> float:
    """Of a call: the median of the rounds."""
    before, after, times = cupy.cuda.Event(), cupy.cuda.Event(), []
    for turn in range(rounds + 1):
        before.record()
        for _ in range(calls):
            call()
        after.record()
        after.synchronize()
        if turn > 0:
            times.append(cupy.cuda.get_elapsed_time(before, after) / calls)
    return statistics.median(times)


def left_out(cupy: Any, precision: str) -> None:
    print("| layer, batch 16 | left out | convolution, ms | TFLOP/s | gradient of the weights, ms | TFLOP/s |")
    print("|---|---|---|---|---|---|")
    original = engine_device.source
    draw = np.random.default_rng(0)
    for size, channels in ((28, 512), (112, 128), (224, 64)):
        shape = (16, size, size, channels)
        flop = 2 * 9 * np.prod(shape) * channels
        weight = cupy.asarray(draw.standard_normal((3, 3, channels, channels), dtype=np.float32) / 100)
        for name, changes in STAGES.items():
            engine_device.source = changed(changes)  # type: ignore[assignment]
            try:
                kernels = CupyKernels(precision)
                x, y = (cupy.empty(shape, kernels.dtype) for _ in range(2))
                for array in (x, y):
                    kernels.store(array, cupy.asarray(draw.standard_normal(shape, dtype=np.float32)))
                kernels.prepare_weights([Weight(weight, transposed=False)])
                dweight, result = cupy.empty_like(weight), cupy.empty_like(y)
                calls = (
                    lambda: kernels.conv3x3(x, weight, result),  # noqa: B023  # called in this turn
                    lambda: kernels.conv3x3_grad_weight(x, y, dweight),  # noqa: B023
                )
                times = [milliseconds(cupy, call) for call in calls]
            finally:
                engine_device.source = original
            cells = [f"{ms:.3f} | {flop / ms / 1e9:.0f}" for ms in times]
            print(f"| {size} x {size}, {channels} channels | {name} | {' | '.join(cells)} |", flush=True)


def wgmma_alone(cupy: Any) -> None:
    """Cycles of a wgmma, of which the tensor cores need N / 2, for factors that lie in different ways."""
    print("| warpgroups | products | N | major | ideal | all aligned | as the kernels have it |")
    print("|---|---|---|---|---|---|---|")
    nvrtc = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
    code = "#define PRECISION_BF16\n" + engine_device.source("wgmma.cuh") + WGMMA
    cycles, never = cupy.zeros(1, "int64"), cupy.zeros(1, "float32")
    steps, shared = 2000, 210 * 1024
    for groups, squares, fragments, across in ((2, 2, 16, 0), (2, 2, 8, 0), (3, 1, 8, 1), (2, 1, 16, 1)):
        defines = (f"-DNWG={groups}", f"-DNSQ={squares}", f"-DNF={fragments}", f"-DMN={across}")
        settings = ("-std=c++17", "--gpu-architecture=sm_90a", *defines)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "products.cubin"
            path.write_bytes(engine_device.compile_cubin(nvrtc, code, "products.cu", settings))
            function = cupy.RawModule(path=str(path)).get_function("products")
        function.max_dynamic_shared_size_bytes = shared
        # (first byte of a, its `sum` and `rows`, those of b): see wgmma.cuh
        aligned, as_it_is = ((0, 4096, 128, 4096, 128), (16, 5536, 288, 2048, 128))
        if across:
            aligned, as_it_is = ((0, 128, 2048, 128, 2048), (16, 128, 2960, 128, 2064))
        found = []
        for places in (aligned, as_it_is):
            for _ in range(2):
                arguments = (cycles, never, *map(np.int32, (steps, *places)))
                function((132,), (128 * groups,), arguments, shared_mem=shared)
            found.append(int(cycles[0]) / (steps * 4 * squares * groups))
        major, n = ("MN" if across else "K"), 8 * fragments
        print(f"| {groups} | {squares} | {n} | {major} | {n / 2:.0f} | {found[0]:.1f} | {found[1]:.1f} |", flush=True)


def main(arguments: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("tf32", "bf16"), default="bf16", help="default bf16")
    parser.add_argument("--wgmma", action="store_true", help="time wgmma alone")
    options = parser.parse_args(arguments)
    resolve_device("cuda")
    cupy = importlib.import_module("cupy")
    if cupy.cuda.Device().compute_capability != "90":
        raise UserError("this GPU has no wgmma: a GPU of compute capability 9.0 is needed")
    if options.wgmma:
        wgmma_alone(cupy)
    else:
        left_out(cupy, options.precision)


if __name__ == "__main__":
    sys.exit(cli.run(main))
