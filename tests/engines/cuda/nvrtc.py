"""NVIDIA's run-time compiler: it needs neither a GPU nor a driver, only the wheel ``nvidia-cuda-nvrtc-cu12``.

(CuPy's binding calls the same library. This one spares CI a download of CuPy, which it could not use otherwise.)
"""

import ctypes
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minunet.engines.cuda.programs import PROGRAMS, options, source


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of a kernel."""

    registers: int  # a thread
    shared_bytes: int  # static: what a launch asks for comes on top
    spilled_bytes: int  # registers that did not fit, stored to and loaded from memory
    stack_bytes: int  # arrays that are indexed at run time
    serialised: bool  # wgmma instructions that could run side by side do not


@cache
def library() -> ctypes.CDLL | None:
    """NVRTC, from the wheels for CUDA 12 or 13; None if neither is here."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for path in sorted(folder.glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
    return None


def compile_program(name: str, precision: str, architecture: str) -> dict[str, Compiled]:
    """What the assembler says of the kernels of a program of minunet.engines.cuda.programs.

    Raises ValueError with the compiler's messages if it refuses the source.
    """
    return _read(machine_code(name, precision, architecture)[1])


def machine_code(name: str, precision: str, architecture: str) -> tuple[bytes, str]:
    """A program compiled as CuPy would, and what the assembler says of it (its option -v). Raises as above."""
    nvrtc = library()
    assert nvrtc is not None
    program = PROGRAMS[name]
    feature = "a" if program.hopper else ""  # wgmma is not in what later GPUs will have
    flags = [*options(program, precision), f"--gpu-architecture={architecture}{feature}", "--ptxas-options=-v"]
    handle, size = ctypes.c_void_p(), ctypes.c_size_t()
    code = source(program.file).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(handle), code, program.file.encode(), 0, None, None) == 0
    try:
        failed = nvrtc.nvrtcCompileProgram(handle, len(flags), (ctypes.c_char_p * len(flags))(*map(str.encode, flags)))
        nvrtc.nvrtcGetProgramLogSize(handle, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(handle, log)
        text = log.value.decode()
        if failed:
            raise ValueError(f"{program.file} for {architecture}: {text}")
        assert nvrtc.nvrtcGetCUBINSize(handle, ctypes.byref(size)) == 0
        cubin = ctypes.create_string_buffer(size.value)
        assert nvrtc.nvrtcGetCUBIN(handle, cubin) == 0
        assert cubin.raw.startswith(b"\x7fELF")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(handle))
    return cubin.raw, text


def _read(log: str) -> dict[str, Compiled]:
    """The assembler's report, by kernel."""
    compiled = {}
    serialised = "wgmma.mma_async instructions are serialized" in log
    for part in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = _numbers(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        (registers,) = _numbers(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        compiled[part.partition("'")[0]] = Compiled(
            registers, int(shared[1]) if shared else 0, stores + loads, stack, serialised
        )
    return compiled


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    assert found is not None, text
    return [int(number) for number in found.groups()]
