"""What is compiled for the GPU: the ``.cu`` files with their settings, and the tiles that their blocks work on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent

PRECISIONS = {"float32": "PRECISION_F32", "tf32": "PRECISION_TF32", "bf16": "PRECISION_BF16"}


@dataclass(frozen=True)
class Program:
    """A ``.cu`` file and how it is compiled."""

    file: str
    kernels: tuple[str, ...]
    defines: Mapping[str, int] = field(default_factory=dict)
    precise: bool = True  # whether it depends on the precision
    like_numpy: bool = False  # a * b + c is rounded twice, as NumPy does it, and not once
    only: str | None = None  # the one precision that it is for
    hopper: bool = False  # uses instructions that only GPUs of compute capability 9.0 have


def _convolution(warps_m: int, warps_n: int, fragments_n: int) -> Program:
    return Program("conv.cu", ("convolve",), {"WARPS_M": warps_m, "WARPS_N": warps_n, "FRAGMENTS_N": fragments_n})


def _wgmma_convolution(fragments: int) -> Program:
    return Program("conv_wgmma.cu", ("convolve",), {"FRAGMENTS": fragments}, hopper=True)


def _wgmma_grad_weight(tap_rows: int, taps: int, fragments: int) -> Program:
    defines = {"ROWS": 8, "TAP_ROWS": tap_rows, "TAPS": taps, "FRAGMENTS": fragments}
    return Program("grad_weight_wgmma.cu", ("grad_weight",), defines, hopper=True, only="bf16")


#: Everything that is compiled. A convolution's tile is so many pixels x output channels.
PROGRAMS = {
    "conv_128x128": _convolution(2, 2, 8),
    "conv_256x64": _convolution(4, 1, 8),
    "conv_256x32": _convolution(4, 1, 4),
    **{f"wgmma_{channels}": _wgmma_convolution(channels // 8) for channels in (128, 64, 32)},
    **{f"grad_weight_{rows}": Program("grad_weight.cu", ("grad_weight",), {"ROWS": rows}) for rows in (8, 4)},
    "grad_weight_3x3": _wgmma_grad_weight(3, 3, 8),
    "grad_weight_2x2": _wgmma_grad_weight(2, 2, 16),
    "weights": Program("weights.cu", ("prepare_weight",)),
    "windows": Program("windows.cu", ("windows",)),
    "reduce": Program("reduce.cu", ("sum_partials", "sum_many_partials", "column_sums", "finish_statistics")),
    "norm": Program("norm.cu", ("norm_relu", "norm_relu_pool", "norm_relu_reduce", "norm_relu_gradient")),
    "head": Program("head.cu", ("head", "head_backward")),
    "dropout": Program("dropout.cu", ("dropout_bits",), precise=False),
    "loss": Program("loss.cu", ("loss_sums", "loss_value", "loss_gradient"), precise=False),
    "optimizer": Program("optimizer.cu", ("adamw", "lerp", "squares", "sum_doubles"), precise=False, like_numpy=True),
    "augment": Program("augment.cu", ("affine", "add_noise"), precise=False, like_numpy=True),
}


def source(file: str, included: set[str] | None = None) -> str:
    """The text of a ``.cu`` file with its ``.cuh`` files put in: CuPy's cache of compiled programs sees this text."""
    included = set() if included is None else included
    lines = []
    for number, line in enumerate((FOLDER / file).read_text(encoding="utf-8").split("\n"), start=1):
        if line.startswith('#include "'):
            header = line.split('"')[1]
            if header not in included:
                included.add(header)
                lines += [f'#line 1 "{header}"', source(header, included), f'#line {number + 1} "{file}"']
        elif line != "#pragma once":
            lines.append(line)
    return "\n".join(lines)


def options(program: Program, precision: str) -> tuple[str, ...]:
    """The compiler's options, but for the architecture."""
    defines = [f"-D{name}={value}" for name, value in program.defines.items()]
    precise = [f"-D{PRECISIONS[precision]}"] if program.precise else []
    return ("-std=c++17", *precise, *defines, *(["--fmad=false"] if program.like_numpy else []))


@dataclass(frozen=True)
class Tile:
    """The tile of a block of conv.cu or conv_wgmma.cu, and the dynamic shared memory that it takes."""

    program: str
    pixels: int
    channels: int
    threads: int
    shared: int
    blocks: int = 2  # that a multiprocessor of an H100 can have at a time


def _mma_tile(program: str, pixels: int, channels: int) -> Tile:
    patch = 180 if pixels == 128 else 340  # PATCH in conv.cuh; three stages of rows of 80 bytes, PITCH in conv.cu
    return Tile(program, pixels, channels, 128, max(3 * (patch + channels) * 80, _result_bytes(pixels, channels)))


def _wgmma_tile(channels: int) -> Tile:
    blocks = 1 if channels == 128 else 2
    threads = 256 + 32 + (32 if channels == 64 else 96)  # multiply, bring weights, bring pixels
    # PATCHES planes of PATCH_PLANE pixels, and STAGES rows of three taps, 64 bytes each: conv_wgmma.cu.
    patches, weights = 3 * 64 * 346, (4 if blocks == 1 else 3) * 3 * 64 * channels
    shared = max(patches + weights, _result_bytes(256, channels))
    return Tile(f"wgmma_{channels}", 256, channels, threads, shared, blocks)


def _result_bytes(pixels: int, channels: int) -> int:
    """Of a tile of the result in shared memory: RESULT_PITCH of conv.cuh."""
    return pixels * ((channels * 9 // 8 + 7) // 16 * 16 + 8) * 4


#: The tiles of a convolution, by the output channels that they have room for.
TILES = {
    128: _mma_tile("conv_128x128", 128, 128),
    64: _mma_tile("conv_256x64", 256, 64),
    32: _mma_tile("conv_256x32", 256, 32),
}
WGMMA_TILES = {channels: _wgmma_tile(channels) for channels in (128, 64, 32)}


@dataclass(frozen=True)
class Summing:
    """A program for the gradient of the weights: for so many channels of the pixels, by so many threads.

    A tile of 8 rows in 4-byte elements needs 177 KB of shared memory. Hopper GPUs have 227 KB for a block, the A100 has
    163 and most others 99: there a tile has 4 rows.
    """

    program: str
    channels: int
    threads: int
    shared: int
    rows: int = 8  # of a tile of pixels


def _wgmma_summing(program: str) -> Summing:
    defines = PROGRAMS[program].defines
    channels = 8 * defines["FRAGMENTS"]
    # Three stages of PATCH_PLANE and PIXEL_PLANE pixels, 16 bytes for each 8 channels: grad_weight_wgmma.cu.
    return Summing(program, channels, 128 * (defines["TAP_ROWS"] + 1), 3 * (8 * 185 + channels // 8 * 129) * 16)


#: No kernel has more static shared memory than this, beside what a launch asks for.
STATIC_BYTES = 2048

WGMMA_SUMMING = {3: _wgmma_summing("grad_weight_3x3"), 2: _wgmma_summing("grad_weight_2x2")}
