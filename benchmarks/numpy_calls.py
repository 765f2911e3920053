"""What NumPy's calls cost, where two ways to say the same thing differ: the facts that the CPU engine is built on.

    python benchmarks/numpy_calls.py

Each line times both ways in turn, many times, on arrays that lie in the second-level cache (or, for the pages of
memory, far outside it), and prints the medians and their ratio. What the engine makes of it: docs/engines/cpu.md.
"""

import mmap
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import numpy as np
from threadpoolctl import threadpool_limits

ROWS, WIDTH, CHANNELS = 16, 128, 16  # a band of the first level


def milliseconds(calls: dict[str, Callable[[], object]], seconds: float = 1.0) -> list[float]:
    """The median time of each call, the calls taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return [1e3 * statistics.median(values) for values in times.values()]


def compare(title: str, unit: float, unit_name: str, **calls: Callable[[], object]) -> None:
    """One line of the table: the first way, the second way, and how much faster the second is."""
    slow, fast = milliseconds({name.replace("_", " "): call for name, call in calls.items()})
    ways = " / ".join(name.replace("_", " ") for name in calls)
    print(f"| {title} | {ways} | {slow * unit:.3g} / {fast * unit:.3g} {unit_name} | {slow / fast:.1f} |", flush=True)


def values() -> None:
    """Element by element."""
    rng = np.random.default_rng(0)
    band = rng.normal(size=(ROWS, WIDTH, CHANNELS)).astype(np.float32)
    out, zeros, flat = np.empty_like(band), np.zeros_like(band), band.reshape(-1)
    channel = rng.normal(size=CHANNELS).astype(np.float32)
    row, pixels = np.tile(channel, 4 * WIDTH), band.reshape(-1, CHANNELS)
    ones, sums = np.ones((1, len(pixels)), np.float32), np.empty((1, CHANNELS), np.float32)
    wide = np.empty((ROWS * WIDTH, 2 * CHANNELS), np.float32)
    item = np.dtype((np.void, 4 * CHANNELS))
    ns = 1e6 / band.size
    compare(
        "maximum with zero",
        ns,
        "ns a value",
        a_scalar=lambda: np.maximum(flat, np.float32(0), out=out.reshape(-1)),
        an_array_of_zeros=lambda: np.maximum(flat, zeros.reshape(-1), out=out.reshape(-1)),
    )
    compare(
        "add a value for each channel",
        ns,
        "ns a value",
        broadcast_over_pixels=lambda: np.add(band, channel, out=out),
        broadcast_over_rows=lambda: np.add(flat.reshape(-1, row.size), row, out=out.reshape(-1, row.size)),
    )
    compare(
        "sum over the pixels",
        ns,
        "ns a value",
        add_reduce=lambda: np.add.reduce(pixels, axis=0, out=sums[0]),
        ones_times_matrix=lambda: np.matmul(ones, pixels, out=sums),
    )
    compare(
        "copy to one half of the channels",
        ns,
        "ns a value",
        as_numbers=lambda: np.copyto(wide[:, :CHANNELS], pixels),
        a_pixel_as_one_item=lambda: np.copyto(wide[:, :CHANNELS].view(item), pixels.view(item)),
    )


def products() -> None:
    """Matrix products."""
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    a, b, b_t, c = matrix(36, 56, 64), matrix(36, 64, 64), matrix(36, 64, 64), matrix(36, 56, 64)
    mflop = 36 * 2 * 56 * 64 * 64 / 1e6
    compare(
        "36 products of 56 x 64 x 64",
        1e3 / mflop,
        "us a MFLOP",
        second_matrix_transposed=lambda: np.matmul(a, b_t.swapaxes(1, 2), out=c),
        as_it_lies=lambda: np.matmul(a, b, out=c),
    )
    a, b, c = matrix(36, 196, 512), matrix(36, 512, 16), matrix(36, 196, 16)
    mflop = 36 * 2 * 196 * 512 * 16 / 1e6
    compare(
        "36 products of 196 x 512 x 16",
        1e3 / mflop,
        "us a MFLOP",
        whole=lambda: np.matmul(a, b, out=c),
        in_two_parts_below_a_million=lambda: [np.matmul(a[:, k : k + 98], b, out=c[:, k : k + 98]) for k in (0, 98)],
    )
    # im2col against Winograd down the columns: 16 rows of 128 pixels, 16 channels to 16.
    x, w = matrix(ROWS * WIDTH, 9 * CHANNELS), matrix(9 * CHANNELS, CHANNELS)
    y = matrix(ROWS * WIDTH, CHANNELS)
    planes, filters, sums = matrix(18, 176, 3 * CHANNELS), matrix(18, 3 * CHANNELS, CHANNELS), matrix(18, 176, CHANNELS)
    compare(
        "the products of a 3 x 3 convolution, 16 channels",
        1e6 / (ROWS * WIDTH),
        "ns a pixel",
        all_nine_taps=lambda: np.matmul(x, w, out=y),
        F_4_3_down_the_columns=lambda: np.matmul(planes, filters, out=sums),
    )


def pages() -> None:
    """Memory in pages of 4 KiB against 2 MiB: many arrays read in turn, as a training step does."""
    size = 1 << 27
    arrays = []
    for advice in (mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(advice)
        array = np.frombuffer(memory, np.float32).reshape(-1, 32_768)
        array[...] = 1
        arrays.append(array)
    order = np.random.default_rng(0).permutation(len(arrays[0]))
    room = np.empty(32_768, np.float32)
    small, large = (lambda a=a: [np.add(a[k], a[k - 1], out=room) for k in order] for a in arrays)
    compare("read 128 MiB, 128 KiB at a time", 1e6 / arrays[0].size, "ns a value", small_pages=small, large_pages=large)


def main() -> None:
    print(f"{date.today()}, {platform.processor() or platform.machine()}, one core, NumPy {np.__version__}\n")
    print("| what | two ways | times | faster |\n|---|---|---|---|")
    with threadpool_limits(1):
        values()
        products()
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages()


if __name__ == "__main__":
    main()
