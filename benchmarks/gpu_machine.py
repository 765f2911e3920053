"""The GPU that benchmarks/gpu.py measures, with CuPy and PyTorch on it, and how the time of several peers is taken."""

import contextlib
import gc
import importlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from minunet.base.backend import Array, resolve_device, to_device


class Machine:
    """The GPU with CuPy and, if it is there, PyTorch. In a dry run the stand-in for CuPy, and PyTorch on the CPU."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        if dry_run:
            from tests import strict_cupy

            sys.modules["cupy"] = strict_cupy.module
        else:
            resolve_device("cuda")
        self.xp: ModuleType = importlib.import_module("cupy")
        self.torch: Any = None
        self.no_torch: str | None = None
        try:
            self.torch = importlib.import_module("torch")
            if not dry_run and not self.torch.cuda.is_available():
                self.torch, self.no_torch = None, "PyTorch sees no GPU"
        except ImportError as error:
            self.no_torch = f"PyTorch is not there ({error})"
        self.torch_device = "cpu" if dry_run else "cuda"
        if self.torch is not None and not dry_run:
            self.torch.backends.cudnn.benchmark = True
            self.torch.backends.cuda.matmul.allow_tf32 = self.torch.backends.cudnn.allow_tf32 = True

    def describe(self) -> dict[str, str]:
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        if not self.dry_run:
            properties = self.xp.cuda.runtime.getDeviceProperties(0)
            versions["gpu"] = properties["name"].decode()
            versions["driver"] = str(self.xp.cuda.runtime.driverGetVersion())
            versions["cupy"] = self.xp.__version__
        else:
            versions["gpu"] = "none: a dry run on a stand-in, whose figures mean nothing"
        versions["torch"] = self.no_torch or self.torch.__version__
        return versions

    def synchronize(self) -> None:
        if not self.dry_run:
            self.xp.cuda.runtime.deviceSynchronize()

    def put(self, array: np.ndarray) -> Array:
        return to_device(array, "cuda")

    def free(self) -> None:
        """Give all memory that nobody uses back to the driver."""
        gc.collect()
        if not self.dry_run:
            self.xp.get_default_memory_pool().free_all_blocks()
            if self.torch is not None:
                self.torch.cuda.empty_cache()

    def torch_bytes(self, *, peak: bool) -> int:
        """What PyTorch's allocator has given out: now, or at most since it was last asked what it has now."""
        if self.dry_run:
            return 0
        if peak:
            return int(self.torch.cuda.max_memory_allocated())
        self.torch.cuda.reset_peak_memory_stats()
        return int(self.torch.cuda.memory_allocated())

    def tensor(self, array: np.ndarray, channels_last: bool = False) -> Any:
        """Images (N, H, W, C) as PyTorch's (N, C, H, W)."""
        tensor = self.torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2))).to(self.torch_device)
        return tensor.contiguous(memory_format=self.torch.channels_last) if channels_last else tensor

    def from_torch(self, tensor: Any) -> Array:
        """A tensor as an array of CuPy's."""
        tensor = tensor.detach().contiguous()
        return self.put(tensor.numpy()) if self.dry_run else self.xp.from_dlpack(tensor)

    def autocast(self, precision: str) -> Any:
        if precision != "bf16":
            return contextlib.nullcontext()
        return self.torch.autocast(self.torch_device, dtype=self.torch.bfloat16)


def take_turns(
    machine: Machine, peers: dict[str, Callable[[], Any]], rounds: int, inner: int
) -> dict[str, list[float]]:
    """Seconds of a call, for each peer and round: ``inner`` calls at a time, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds + 1):
        for name, call in peers.items():
            machine.synchronize()
            started = time.perf_counter()
            for _ in range(inner):
                call()
            machine.synchronize()
            if turn > 0:
                seconds[name].append((time.perf_counter() - started) / inner)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> list[float]:
    """Median, smallest and largest of the rounds' ratios, theirs over ours."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def failing(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, or {"error": ...}: a measurement that fails costs only itself."""
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
