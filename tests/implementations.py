"""What the contract tests run: the ops and losses of minunet on NumPy, on the strict stand-in for CuPy, on a GPU.

Another implementation of an op (an engine's) joins by a line in ``IMPLEMENTATIONS``: the same tests then hold it.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from minunet import ops
from minunet.network import loss
from tests import strict_cupy


def plain(name: str) -> Callable:
    """The readable function called ``name``, such as ``conv2d_forward``."""
    return getattr(ops, name, None) or getattr(loss, name)


@dataclass(frozen=True)
class Implementation:
    """Functions, and the array module that they work on."""

    name: str
    xp: Callable[[], ModuleType]
    function: Callable[[str], Callable] = plain

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, ``import cupy`` gives this implementation's module."""
        before = sys.modules.get("cupy")
        if self.name == "standin":
            sys.modules["cupy"] = strict_cupy.module
        try:
            yield
        finally:
            if before is not None:
                sys.modules["cupy"] = before
            else:
                sys.modules.pop("cupy", None)

    def put(self, value: Any) -> Any:
        """An array, or the arrays of a dict, on this implementation's device; anything else as it is."""
        if isinstance(value, dict):
            return {name: self.put(part) for name, part in value.items()}
        return self.xp().asarray(value) if isinstance(value, np.ndarray) else value

    def get(self, value: Any) -> Any:
        """The reverse of ``put``."""
        if isinstance(value, dict):
            return {name: self.get(part) for name, part in value.items()}
        return value if isinstance(value, np.ndarray | np.generic) or value is None else self.xp().asnumpy(value)

    def forward(self, op: Any, inputs: dict, options: dict) -> tuple[Any, Any]:
        """``y, cache`` of an ``Op`` of tests.strategies."""
        return self.function(f"{op.name}_forward")(**inputs, **options)

    def backward(self, op: Any, dy: Any, cache: Any) -> tuple:
        """The gradients as a tuple, in the order of the inputs. A loss has no ``dy``: its y is the scalar itself."""
        backward = self.function(f"{op.name}_backward")
        gradients = backward(cache) if op.is_loss else backward(dy, cache)
        return gradients if isinstance(gradients, tuple) else (gradients,)


def _cupy() -> ModuleType:
    return importlib.import_module("cupy")


def gpu_capability() -> int:
    """Of the GPU that answers, 90 for 9.0; 0 if none does."""
    try:
        return int(_cupy().cuda.Device().compute_capability)
    except Exception:  # no CuPy, no driver, no device: CuPy raises several types
        return 0


IMPLEMENTATIONS = [Implementation("numpy", lambda: np), Implementation("standin", lambda: strict_cupy.module)]
if gpu_capability():
    IMPLEMENTATIONS.append(Implementation("cupy", _cupy))
