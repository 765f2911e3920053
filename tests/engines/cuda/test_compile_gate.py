"""Every kernel compiles to machine code for the GPUs that can run it, and fits them: no GPU is needed to see that.

A multiprocessor of an H100 has 65536 registers and 227 KB of shared memory. What a block takes of them decides how many
blocks run at a time; a kernel that needs more registers than it may have spills them to memory, and is slow.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import gpu_instructions, gpu_stages
from minunet.engines.cuda.kernels import Kernels
from minunet.engines.cuda.programs import (
    PRECISIONS,
    PROGRAMS,
    STATIC_BYTES,
    TILES,
    WGMMA_SUMMING,
    WGMMA_TILES,
)
from tests.engines.cuda.nvrtc import compile_program, library

if library() is None:
    pytest.skip("NVRTC is not here: pip install nvidia-cuda-nvrtc-cu12", allow_module_level=True)

#: The most registers a thread and bytes of static shared memory that each kernel may take, in any precision.
#: To raise one is a decision.
BOUNDS = {
    "convolve": (255, 1536),  # 128 threads, 2 blocks: 65536 / 256 = 256 registers
    "grad_weight": (168, 128),  # 384 threads, 1 block: 170 registers
    "prepare_weight": (40, 0),
    "windows": (40, 0),
    "sum_partials": (40, 0),
    "sum_many_partials": (64, 8448),
    "column_sums": (48, 1024),
    "finish_statistics": (64, 16896),  # 1024 threads: 64 registers
    "norm_relu": (64, 0),
    "norm_relu_pool": (112, 0),
    "norm_relu_reduce": (80, 1024),  # 256 threads, 3 blocks: 85 registers
    "norm_relu_gradient": (80, 0),
    "head": (80, 0),  # 256 threads, 3 blocks: 85 registers
    "head_backward": (128, 1024),  # 256 threads, 2 blocks: 128 registers
    "dropout_bits": (40, 0),
    "loss_sums": (48, 8192),
    "loss_value": (72, 32),
    "loss_gradient": (40, 0),
    "adamw": (40, 0),
    "lerp": (32, 0),
    "squares": (40, 2048),
    "sum_doubles": (40, 2048),
    "affine": (72, 0),
    "add_noise": (40, 0),
}

#: Both precisions of training for the GPU that minunet aims at, and one for the oldest that has the instructions.
CASES = [
    (name, architecture, precision)
    for architecture, precision in (("sm_90", "tf32"), ("sm_90", "bf16"), ("sm_80", "tf32"), ("sm_80", "bf16"))
    for name, program in PROGRAMS.items()
    if (program.precise or precision == "tf32")
    and program.only in (None, precision)
    and (architecture == "sm_90" or not program.hopper)
]

#: The threads of a program for Hopper that share the 65536 registers of a multiprocessor. (The others are in BOUNDS.)
HOPPER_THREADS = {
    **{tile.program: tile.blocks * tile.threads for tile in WGMMA_TILES.values()},
    **{summing.program: summing.threads for summing in WGMMA_SUMMING.values()},
}


@pytest.mark.parametrize(("program", "architecture", "precision"), CASES)
def test_kernels_compile_and_fit(program, architecture, precision):
    compiled = compile_program(program, precision, architecture)
    assert compiled.keys() == set(PROGRAMS[program].kernels)
    for name, kernel in compiled.items():
        registers, shared_bytes = BOUNDS[name]
        assert kernel.spilled_bytes == 0, f"{name} spills: {kernel}"
        assert kernel.stack_bytes == 0, f"{name} indexes registers at run time: {kernel}"
        if program in HOPPER_THREADS:
            registers = 65536 // HOPPER_THREADS[program] // 8 * 8
        assert kernel.registers <= registers, f"{name}: {kernel}"
        assert not kernel.serialised, f"{name}: the compiler lets each wgmma wait for the one before"
        assert kernel.shared_bytes <= shared_bytes, f"{name}: {kernel}"


@pytest.mark.parametrize("program", ["conv_128x128", "grad_weight_8", "grad_weight_4"])
def test_float32_as_three_products_compiles(program):
    for kernel in compile_program(program, "float32", "sm_90").values():
        assert kernel.spilled_bytes == kernel.stack_bytes == 0


def test_with_a_stage_left_out_the_kernels_still_compile(monkeypatch):
    """What benchmarks/gpu_stages.py changes."""
    for changes in gpu_stages.STAGES.values():
        monkeypatch.setattr("tests.engines.cuda.nvrtc.source", gpu_stages.changed(changes))
        compile_program("wgmma_128", "bf16", "sm_90")
        compile_program("grad_weight_3x3", "bf16", "sm_90")


def test_blocks_fit_into_shared_memory():
    """With the 1 KB that the system takes of each: those of a convolution on an H100, and one on a GPU that has least.

    Source: CUDA C++ Programming Guide, "Technical specifications per compute capability": 227 KB for a block with 9.0,
    163 KB with 8.0, 99 KB with 8.6, 8.9 and 12.0.
    """
    static = BOUNDS["convolve"][1]
    for tile in (*TILES.values(), *WGMMA_TILES.values()):
        assert tile.blocks * (tile.shared + static + 1024) <= 227 * 1024
    for tile in TILES.values():
        assert tile.shared + static <= 99 * 1024
    for summing in WGMMA_SUMMING.values():
        assert summing.shared + STATIC_BYTES <= 227 * 1024
    assert max(shared_bytes for name, (_, shared_bytes) in BOUNDS.items() if name in ("convolve", "grad_weight")) <= (
        STATIC_BYTES
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("available", "rows"), [(227, 8), (163, 4), (99, 4)])
def test_a_gradient_of_weights_takes_the_tile_that_fits(precision, available, rows):
    """On a GPU that is not Hopper; bf16, of half the bytes, fits everywhere."""
    device = SimpleNamespace(xp=np, multiprocessors=2, hopper=False, shared_bytes=available * 1024)
    summing = Kernels(device, precision)._summing(3, 0)
    assert summing.rows == (8 if precision == "bf16" else rows)
    static = compile_program(summing.program, precision, "sm_80")["grad_weight"].shared_bytes
    assert summing.shared + static <= available * 1024


#: (program, precision, kernel, opcode, at most so many instructions): of the loop that is densest in the opcode. A warp
#: with a role of its own is alone with them (docs/engines/gpu.md); compilers differ, so a tenth is left free.
LOOPS = [
    ("wgmma_128", "bf16", "convolve", "HGMMA", 175),  # the branches for two and for three taps together
    ("wgmma_128", "bf16", "convolve", "LDGSTS", 155),  # weights
    ("grad_weight_3x3", "bf16", "grad_weight", "HGMMA", 130),
    ("grad_weight_8", "tf32", "grad_weight", "HMMA", 106),  # a row of pixels
    ("norm", "bf16", "norm_relu", "F2FP", 45),
]


@pytest.mark.skipif(gpu_instructions.disassembler() is None, reason="nvdisasm is not here: pip install '.[kernels]'")
@pytest.mark.parametrize(("program", "precision", "kernel", "opcode", "most"), LOOPS)
def test_loops_have_few_instructions(program, precision, kernel, opcode, most):
    loops = gpu_instructions.loops(program, precision)[kernel]
    hot = max(
        (loop for loop in loops if loop.opcodes[opcode] >= 3), key=lambda loop: loop.opcodes[opcode] / loop.length
    )
    assert hot.length <= most


def test_what_the_machine_code_tells_the_scheduler():
    found = gpu_instructions.instruction(64, "LDS", None, (0b100001 << 11 | 7 << 8 | 2 << 5 | 1 << 4 | 9) << 41 | 123)
    assert (found.stall, found.raised, found.awaited) == (9, (2,), (0, 5))


def test_a_turn_of_a_loop_waits_for_what_it_has_read():
    read = gpu_instructions.Instruction(0, "LDS", None, 2, raised=(1,), awaited=())
    use, use_later = (gpu_instructions.Instruction(16, "FADD", None, 4, (), (1,)) for _ in range(2))
    other = gpu_instructions.Instruction(32, "IMAD", None, 50, (), ())
    assert gpu_instructions.Loop((read, use)).cycles == 30 + 4
    assert gpu_instructions.Loop((read, other, use_later)).cycles == 2 + 50 + 4
    assert gpu_instructions.Loop((use, read)).cycles == 30 + 4  # for what the turn before has read


@pytest.mark.skipif(gpu_instructions.disassembler() is None, reason="nvdisasm is not here: pip install '.[kernels]'")
@pytest.mark.parametrize("program", list(HOPPER_THREADS))
def test_the_products_of_a_step_are_one_group(program):
    """Made after a branch it is a second group, of an empty product: who waits for all but one then waits for all."""
    (loops,) = gpu_instructions.loops(program, "bf16").values()
    # Of a convolution 4 a tap, for the first, the second, or the second and third; of a gradient 8 a tap, for 3, or for
    # 1 and 2.
    written = 16 if program.startswith("wgmma") else 24
    assert max(loop.opcodes["HGMMA"] for loop in loops) == written


def test_a_source_that_does_not_compile_is_reported(monkeypatch):
    monkeypatch.setattr("tests.engines.cuda.nvrtc.source", lambda file: "extern __global__ void broken( {")
    with pytest.raises(ValueError, match="error"):
        compile_program("loss", "tf32", "sm_90")
