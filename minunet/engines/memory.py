"""How much memory a step, a prediction or the data take, how much there is, and what would fit."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minunet.base import control_groups
from minunet.base.backend import device_of, free_gpu_bytes
from minunet.network.unet import UNet
from minunet.summary import summary

#: The side of square images in pixels, or height and width.
Size = int | tuple[int, int]
StepBytes = Callable[[UNet, Any, int], int]


def training_bytes(net: UNet, size: Size, batch: int) -> int:
    """About what a training step on ``batch`` images of ``size`` needs at its peak on the plain path, in bytes.

    The outputs of all layers (see ``minunet.summary``), and six arrays for each parameter: its value, its gradient,
    two moments, an average, and what the optimiser holds while it works.

    >>> net = UNet(widths=(8, 16), up_kernel=2)
    >>> round(training_bytes(net, size=64, batch=16) / 1e6)
    43
    """
    return 6 * _weights(net) + _activations(net, size, batch)


def prediction_bytes(net: UNet, size: Size, batch: int) -> int:
    """About what a prediction of ``batch`` images of ``size`` needs on the plain path, in bytes. Engines need no more.

    The weights, and most outputs of the layers: forward keeps what backward would need, though none follows. Of four
    networks at 512 x 512 pixels the peak was 0.75 to 0.77 of the outputs of all layers.

    >>> round(prediction_bytes(UNet(widths=(8, 16), up_kernel=2), size=64, batch=16) / 1e6)
    33
    """
    return _weights(net) + 77 * _activations(net, size, batch) // 100


#: What the prediction for one tile of a large image may take, in bytes.
WINDOW_BYTES = 3 * 2**28


def window_side(net: UNet) -> int:
    """The side in pixels of the largest square that ``net`` predicts within WINDOW_BYTES, a multiple of 2^depth.

    The same on every machine, and so are the tiles.

    >>> window_side(UNet(widths=(16, 32, 64, 128, 256), up_kernel=2, head_kernel=1, conv_bias=False))
    688
    """
    period = 2**net.depth
    periods = math.isqrt((WINDOW_BYTES - _weights(net)) // (prediction_bytes(net, period, 1) - _weights(net)))
    return max(1, periods) * period


def _weights(net: UNet) -> int:
    return sum(array.nbytes for array in net.parameters().values())


def _activations(net: UNet, size: Size, batch: int) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    return summary(net, height, width, batch).activation_bytes


def largest_batch(net: UNet, size: Size, available: int, step_bytes: StepBytes = training_bytes) -> int:
    """The largest batch for which ``step_bytes`` is at most ``available``; 0 if no batch is small enough.

    >>> net = UNet(widths=(8, 16), up_kernel=2)
    >>> largest_batch(net, size=64, available=training_bytes(net, size=64, batch=16))
    16
    """
    one, two = step_bytes(net, size, 1), step_bytes(net, size, 2)
    return max(0, (available - one) // (two - one) + 1)


def available_bytes(net: UNet) -> int | None:
    """The memory that is free now on the device of ``net``, in bytes: :func:`host_bytes`, or that of the GPU."""
    return free_gpu_bytes() if device_of(net.head.weight) == "cuda" else host_bytes()


def host_bytes() -> int | None:
    """The memory that is free now for this process, in bytes: the machine's, within the limits on the process.

    None where the system does not say (other systems than Linux).
    """
    limits = [_kilobytes("/proc/meminfo", "MemAvailable"), _address_space(), _control_groups()]
    return min((limit for limit in limits if limit is not None), default=None)


def advice(net: UNet, size: Size, batch: int, available: int | None, step_bytes: StepBytes = training_bytes) -> str:
    """What a step on ``batch`` images needs, and the batch to choose instead; ``available`` is what is free before.

    ``step_bytes`` is :func:`training_bytes`, or what an engine needs in its stead.

    >>> net = UNet(widths=(8, 16), up_kernel=2)
    >>> print(advice(net, size=64, batch=1000, available=10**9))
    a step on a batch of 1000 takes about 2.7 GB and 1.0 GB are free, choose at most 369
    """
    needed = f"a step on a batch of {batch} takes about {step_bytes(net, size, batch) / 1e9:.1f} GB"
    if available is None:
        return f"{needed}, choose a smaller one"
    fits = min(largest_batch(net, size, available, step_bytes), batch - 1)
    choice = f"at most {fits}" if fits > 0 else "smaller images or a smaller network"
    return f"{needed} and {available / 1e9:.1f} GB are free, choose {choice}"


def data_bytes(slices: int, side: int) -> int:
    """What so many slices of ``side`` x ``side`` pixels take in bytes: three channels of an image, and a mask."""
    return 4 * slices * side**2


def data_advice(slices: int, side: int, available: int | None) -> str:
    """What so many slices need, and the image size to choose instead; ``available`` is what is free before.

    >>> print(data_advice(3960, side=256, available=3 * 10**8))
    3960 slices of 256 x 256 pixels take 1.0 GB and 0.3 GB are free, choose at most 137 or fewer patients
    """
    needed = f"{slices} slices of {side} x {side} pixels take {data_bytes(slices, side) / 1e9:.1f} GB"
    if available is None:
        return f"{needed}, choose a smaller one or fewer patients"
    fits = min(math.isqrt(available // data_bytes(max(1, slices), 1)), side - 1)
    choice = f"at most {fits} or fewer patients" if fits > 0 else "fewer patients"
    return f"{needed} and {available / 1e9:.1f} GB are free, choose {choice}"


def _kilobytes(file: str, name: str) -> int | None:
    """The entry ``name`` of a file of /proc with lines like ``MemAvailable:  1234 kB``, in bytes."""
    try:
        match = re.search(rf"^{name}:\s*(\d+) kB$", Path(file).read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if match is None else 1024 * int(match[1])


def _address_space() -> int | None:
    """What ``ulimit -v`` leaves, if it limits this process."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], _kilobytes("/proc/self/status", "VmSize")
    return None if limit == resource.RLIM_INFINITY or used is None else max(0, limit - used)


def _control_groups() -> int | None:
    """What the groups that this process is in leave: a container's, a batch job's."""
    left = (_left_in(group) for group in control_groups.groups("memory"))
    return min((bytes_left for bytes_left in left if bytes_left is not None), default=None)


def _left_in(group: Path) -> int | None:
    """The limit of one control group less what is used. Pages of files count as used, but make room when asked."""
    version_2 = (group / "memory.max").exists()
    limit, used = ("max", "current") if version_2 else ("limit_in_bytes", "usage_in_bytes")
    files = ("inactive_file", "active_file") if version_2 else ("total_inactive_file", "total_active_file")
    try:
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken = int((group / f"memory.{used}").read_text()) - sum(int(statistics[name]) for name in files)
        return max(0, int((group / f"memory.{limit}").read_text()) - max(0, taken))
    except (OSError, ValueError, KeyError):  # no such file, or no limit: "max"
        return None
