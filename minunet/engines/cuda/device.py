"""What launches a kernel: the current GPU, through CuPy. (Another one is in tests/cuda: an emulator.)"""

import hashlib
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Protocol

import numpy as np

from minunet.backend import Array
from minunet.durable import write_durably
from minunet.engines.cuda.programs import PROGRAMS, Program, options, source


class Device(Protocol):
    """What can launch a kernel. Arrays are of its kind; whole numbers are int32 and fractions float32 to a kernel."""

    xp: ModuleType
    multiprocessors: int
    hopper: bool  # whether it runs programs that only a GPU of compute capability 9.0 runs
    shared_bytes: int  # the most shared memory that a block may have

    def address(self, array: Array) -> int:
        """Where an array begins in the device's memory."""

    def launch(
        self, program: str, kernel: str, blocks: int, threads: int, arguments: Sequence[Any], shared: int
    ) -> None:
        """Run ``kernel`` of PROGRAMS[program] with so many bytes of dynamic shared memory. None is a null pointer."""


class CupyDevice:
    """The current GPU, through CuPy."""

    def __init__(self, precision: str, hopper: bool = True) -> None:
        self.xp = importlib.import_module("cupy")
        self.precision = precision
        device = self.xp.cuda.Device()
        self.multiprocessors = device.attributes["MultiProcessorCount"]
        self.hopper = hopper and device.compute_capability == "90"
        self.shared_bytes = device.attributes["MaxSharedMemoryPerBlockOptin"]
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, str, int], Any] = {}

    def address(self, array: Array) -> int:
        return int(array.data.ptr)

    def function(self, program: str, kernel: str, shared: int) -> Any:
        key = (program, kernel, shared)
        if key not in self._functions:
            if program not in self._modules:
                self._modules[program] = self._module(PROGRAMS[program])
            function = self._modules[program].get_function(kernel)
            if shared > 48 * 1024:
                function.max_dynamic_shared_size_bytes = shared
                function.preferred_shared_memory_carveout = 100  # per cent: for as many blocks as fit
            self._functions[key] = function
        return self._functions[key]

    def _module(self, program: Program) -> Any:
        settings, code = options(program, self.precision), source(program.file)
        if not program.hopper:
            return self.xp.RawModule(code=code, options=settings, backend="nvrtc")
        # CuPy compiles for sm_90, and wgmma is in sm_90a: so this is compiled here, and kept where CuPy keeps its own.
        settings = (*settings, "--gpu-architecture=sm_90a")
        nvrtc = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
        digest = hashlib.sha256(repr((code, settings, nvrtc.getVersion())).encode()).hexdigest()
        folder = Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()
        path = folder / f"minunet-{digest[:32]}.cubin"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            cubin = compile_cubin(nvrtc, code, program.file, settings)
            write_durably(path, lambda file: _write(file, cubin))
        return self.xp.RawModule(path=str(path))

    def launch(
        self, program: str, kernel: str, blocks: int, threads: int, arguments: Sequence[Any], shared: int
    ) -> None:
        values = tuple(kernel_argument(value, self.address) for value in arguments)
        self.function(program, kernel, shared)((blocks,), (threads,), values, shared_mem=shared)


def compile_cubin(nvrtc: Any, code: str, name: str, settings: tuple[str, ...]) -> bytes:
    """The machine code of a source, by CuPy's binding to NVIDIA's compiler. Raises RuntimeError with its messages."""
    handle = nvrtc.createProgram(code, name, (), ())
    try:
        nvrtc.compileProgram(handle, settings)
        cubin: bytes = nvrtc.getCUBIN(handle)
        return cubin
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{name} does not compile: {nvrtc.getProgramLog(handle)}") from error
    finally:
        nvrtc.destroyProgram(handle)


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def kernel_argument(value: Any, address: Any) -> np.generic:
    """``value`` as a NumPy scalar of the size that the kernel takes: an array becomes its address."""
    if value is None:
        return np.uintp(0)
    if isinstance(value, bool | np.generic):
        return np.int32(value) if isinstance(value, bool) else value
    if isinstance(value, int):
        return np.int32(value)
    return np.float32(value) if isinstance(value, float) else np.uintp(address(value))
