"""Arrays on the CPU (NumPy) and on a GPU (CuPy): the only file that knows whether CuPy is there.

Everything else in minunet is written once, against ``xp = array_module(x)``: the module that made ``x``.
CuPy is imported the first time that something asks for a GPU, never by ``import minunet``.
"""

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from minunet.base.choices import check_choice
from minunet.base.errors import UserError

#: An array of NumPy or of CuPy. The docstrings give shapes and dtypes; the type checker cannot see CuPy.
Array = Any

#: Where an array is.
Device = Literal["cpu", "cuda"]
#: What a person asks for; "auto" is a GPU if there is one.
DeviceChoice = Literal["auto", "cpu", "cuda"]

_INSTALL_HINT = 'pip install "minunet[cuda12]" (or "minunet[cuda13]"), or use --device cpu'


def array_module(x: Array) -> ModuleType:
    """The module whose functions work on ``x``: ``numpy`` or ``cupy``.

    >>> array_module(np.zeros(3)).__name__
    'numpy'

    Raises TypeError if ``x`` is not an array of either.
    """
    root = type(x).__module__.partition(".")[0]
    if root == "numpy":
        return np
    if root == "cupy":
        return importlib.import_module("cupy")
    raise TypeError(f"expected a NumPy or CuPy array, got {type(x).__name__}")


def resolve_device(name: DeviceChoice) -> tuple[Device, str | None]:
    """The device to use for ``name``, and for "auto" on a CPU the reason why no GPU is used.

    Raises UserError if "cuda" is asked for and CuPy, the driver or a device is missing, and ValueError
    for any other name.

    >>> resolve_device("cpu")
    ('cpu', None)
    """
    check_choice("device", name, DeviceChoice)
    if name == "cpu":
        return "cpu", None
    missing = _why_no_gpu()
    if missing is None:
        return "cuda", None
    if name == "auto":
        return "cpu", missing
    raise UserError(f"--device cuda: {missing}; {_INSTALL_HINT}")


def _why_no_gpu() -> str | None:
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        return "CuPy is not installed" if error.name == "cupy" else f"CuPy cannot be imported ({error})"
    except Exception as error:  # an installation that is not whole
        return f"CuPy cannot be imported ({str(error).partition(chr(10))[0]})"
    if os.environ.get("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "0") != "0":
        # The thread that prepares a batch and the one that trains on it rely on one stream, which keeps their order.
        return "CUPY_CUDA_PER_THREAD_DEFAULT_STREAM is set, and minunet's threads share one stream: unset it"
    try:
        # The first call into the driver is where a missing driver or library shows itself.
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "CuPy finds no CUDA device"
        cupy.zeros(1).sum()
    except Exception as error:  # CuPy raises several types here, RuntimeError and CUDARuntimeError among them
        reason = str(error).partition("\n")[0] or type(error).__name__
        return f"CuPy is installed but finds no working GPU ({reason})"
    return None


def device_of(x: Array) -> Device:
    """Where ``x`` is.

    >>> device_of(np.zeros(3))
    'cpu'
    """
    return "cpu" if array_module(x) is np else "cuda"


def to_device(x: Array, device: Device) -> Array:
    """``x`` on ``device``; the same object if it is there already.

    >>> to_device(np.arange(3), "cpu")
    array([0, 1, 2])
    """
    if device == "cpu":
        return to_numpy(x)
    return importlib.import_module("cupy").asarray(x)


def to_numpy(x: Array) -> np.ndarray:
    """``x`` as a NumPy array; the same object if it is one.

    >>> to_numpy(np.arange(3))
    array([0, 1, 2])
    """
    xp = array_module(x)
    return x if xp is np else xp.asnumpy(x)


def accumulation_dtype(dtype: Any) -> np.dtype:
    """The dtype for a sum over many values of ``dtype``: float64, or complex128 under the complex step.

    >>> accumulation_dtype("float32")
    dtype('float64')
    """
    return np.result_type(dtype, np.float64)


# ---------------------------------------------------------------------------------------------------------------------
# What the engines ask of a GPU
# ---------------------------------------------------------------------------------------------------------------------

_EXCLUSIVE_PROCESS = 3  # the compute mode of a GPU that takes one process at a time, by CUDA's numbers


class Gpu(NamedTuple):
    """The current GPU."""

    number: int
    capability: int  # 90 for compute capability 9.0
    multiprocessors: int
    shared_bytes: int  # the most shared memory that a block of threads may have
    exclusive: bool  # takes one process at a time


def current_gpu() -> Gpu:
    """What the driver says of the current GPU. Raises what CuPy raises without one: several types."""
    device = gpu_array_module().cuda.Device()
    attributes = device.attributes
    return Gpu(
        int(device.id),
        int(device.compute_capability),
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["ComputeMode"] == _EXCLUSIVE_PROCESS,
    )


def gpu_array_module() -> ModuleType:
    """CuPy. Raises ImportError where it is not installed."""
    return importlib.import_module("cupy")


def use_gpu(number: int) -> None:
    """Let the GPU of this number be the current one of this thread."""
    gpu_array_module().cuda.Device(number).use()


def free_gpu_bytes() -> int:
    """The memory of the current GPU that an array could still have."""
    cupy = gpu_array_module()
    return int(cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes())


def gpu_pool_bytes() -> int:
    """What CuPy's memory pool holds on the current GPU: since it gives nothing back, its peak."""
    return int(gpu_array_module().get_default_memory_pool().total_bytes())


def gpu_address(x: Array) -> int:
    """Where ``x`` begins in the GPU's memory."""
    return int(x.data.ptr)


def compile_kernels(code: str, options: tuple[str, ...]) -> Any:
    """CUDA kernels, compiled for the current GPU: a module of CuPy, which keeps the machine code in its cache."""
    return gpu_array_module().RawModule(code=code, options=options, backend="nvrtc")


def load_kernels(cubin: Path) -> Any:
    """The same from machine code that :func:`compile_cubin` has made."""
    return gpu_array_module().RawModule(path=str(cubin))


def kernel_cache() -> Path:
    """The folder in which CuPy keeps machine code."""
    return Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()


def compiler_version() -> tuple[int, int]:
    """Of NVIDIA's compiler that CuPy uses."""
    version: tuple[int, int] = _nvrtc().getVersion()
    return version


def compile_cubin(code: str, name: str, options: tuple[str, ...]) -> bytes:
    """The machine code of a CUDA source for the architecture in ``options``. Raises RuntimeError with what is wrong."""
    nvrtc = _nvrtc()
    handle = nvrtc.createProgram(code, name, (), ())
    try:
        nvrtc.compileProgram(handle, options)
        cubin: bytes = nvrtc.getCUBIN(handle)
        return cubin
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{name} does not compile: {nvrtc.getProgramLog(handle)}") from error
    finally:
        nvrtc.destroyProgram(handle)


def _nvrtc() -> ModuleType:
    """CuPy's binding to the compiler."""
    return importlib.import_module("cupy_backends.cuda.libs.nvrtc")
