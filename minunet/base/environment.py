"""What the bits of a result may depend on, beside the program and its input; and what of it has changed."""

import json
import os
import platform
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minunet.base.durable import json_text
from minunet.base.version import __version__


def environment() -> dict[str, Any]:
    """What the bits of a result may depend on: versions, processor, the number of threads that was asked for.

    >>> sorted(environment())
    ['blas', 'cores', 'cpu', 'minunet', 'numpy', 'platform', 'python', 'threads']
    """
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    return {
        "minunet": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": {name: os.environ[name] for name in variables if name in os.environ},
    }


def _cpu_name() -> str:
    """The processor's model: BLAS picks its kernels, and so the order of its sums, by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def differences(saved: Any, current: Mapping[str, Any]) -> list[str]:
    """What differs between a dict from a checkpoint's metadata and its ``current`` counterpart, one phrase an entry.

    >>> differences({"numpy": "2.0.0", "widths": [8, 16]}, {"numpy": "2.1.0", "widths": (8, 16)})
    ["numpy was '2.0.0', is '2.1.0'"]
    """
    saved = saved if isinstance(saved, dict) else {}
    now = json.loads(json_text(dict(current), exact=True))  # tuples become lists, as they did in the file
    names = [*now, *(name for name in saved if name not in now)]
    return [
        f"{reprlib.repr(name).strip(chr(39))} was {reprlib.repr(saved.get(name))}, is {reprlib.repr(now.get(name))}"
        for name in names
        if saved.get(name) != now.get(name)
    ]
