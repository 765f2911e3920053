"""Arrays on the CPU (NumPy) and on a GPU (CuPy): the only file that knows whether CuPy is there.

Everything else in minunet is written once, against ``xp = array_module(x)``: the module that made ``x``.
CuPy is imported the first time that something asks for a GPU, never by ``import minunet``.
"""

import importlib
import os
from types import ModuleType
from typing import Any

import numpy as np

from minunet.errors import UserError

#: An array of NumPy or of CuPy. The docstrings give shapes and dtypes; the type checker cannot see CuPy.
Array = Any

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


def resolve_device(name: str) -> tuple[str, str | None]:
    """The device to use for ``name`` ("auto", "cpu" or "cuda"), and for "auto" on a CPU the reason why no GPU is used.

    Raises UserError if "cuda" is asked for and CuPy, the driver or a device is missing, and ValueError
    for any other name.

    >>> resolve_device("cpu")
    ('cpu', None)
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")
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


def to_device(x: Array, device: str) -> Array:
    """``x`` on ``device`` ("cpu" or "cuda"); the same object if it is there already.

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
