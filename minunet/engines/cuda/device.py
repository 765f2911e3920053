"""What launches a kernel: the current GPU, through CuPy. (Another one is in tests/engines/cuda: an emulator.)"""

import hashlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from minunet.base import backend
from minunet.base.backend import Array
from minunet.base.durable import write_bytes
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
        gpu = backend.current_gpu()
        self.xp, self.precision = backend.gpu_array_module(), precision
        self.multiprocessors, self.shared_bytes = gpu.multiprocessors, gpu.shared_bytes
        self.hopper = hopper and gpu.capability == 90
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, str, int], Any] = {}

    def address(self, array: Array) -> int:
        return backend.gpu_address(array)

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
            return backend.compile_kernels(code, settings)
        # CuPy compiles for sm_90, and wgmma is in sm_90a: so this is compiled here, and kept where CuPy keeps its own.
        settings = (*settings, "--gpu-architecture=sm_90a")
        digest = hashlib.sha256(repr((code, settings, backend.compiler_version())).encode()).hexdigest()
        folder = backend.kernel_cache()
        path = folder / f"minunet-{digest[:32]}.cubin"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            cubin = backend.compile_cubin(code, program.file, settings)
            write_bytes(path, cubin)
        return backend.load_kernels(path)

    def launch(
        self, program: str, kernel: str, blocks: int, threads: int, arguments: Sequence[Any], shared: int
    ) -> None:
        values = tuple(kernel_argument(value, self.address) for value in arguments)
        self.function(program, kernel, shared)((blocks,), (threads,), values, shared_mem=shared)


def kernel_argument(value: Any, address: Any) -> np.generic:
    """``value`` as a NumPy scalar of the size that the kernel takes: an array becomes its address."""
    if value is None:
        return np.uintp(0)
    if isinstance(value, np.generic):
        return value
    if isinstance(value, int):
        return np.int32(value)
    return np.float32(value) if isinstance(value, float) else np.uintp(address(value))
