"""Engines: the same step of the same network, faster.

The network and its ops (minunet.network.unet, minunet.ops) say what is computed, and the plain path
(``minunet.training.step``) computes it in just that way. An engine computes the same, up to rounding, in the way that
suits a machine: ``engines.cpu`` a processor, ``engines.cuda`` a GPU. Training talks to an ``Engine`` and does not know
which one it has. Nobody has to read an engine to understand minunet.
"""

import argparse
import contextlib
import os
from typing import Literal, Protocol, get_args

from minunet.base import cli
from minunet.base.backend import Device
from minunet.base.choices import check_choice
from minunet.base.errors import UserError
from minunet.engines import memory
from minunet.engines.selfcheck import difference
from minunet.network.layers import frozen_norms
from minunet.network.loss import Loss
from minunet.network.own_code import own_code
from minunet.network.unet import UNet
from minunet.training.step import Engine

EngineChoice = Literal["auto", "plain"]
Precision = Literal["float32", "tf32", "bf16"]


class DeviceEngine(Protocol):
    """What the module of a device's engine has: engines/cpu/choice.py, engines/cuda/choice.py."""

    def unsupported(
        self, net: UNet, loss: Loss, max_batch: int, image_size: tuple[int, int], precision: Precision
    ) -> str | None:
        """Why the engine cannot take this network, or None."""

    def build(self, net: UNet, loss: Loss, max_batch: int, image_size: tuple[int, int], precision: Precision) -> Engine:
        """The engine."""

    def step_bytes_here(self, precision: Precision) -> memory.StepBytes:
        """The function that says how much memory a training step of it needs."""


def of_device(device: Device) -> DeviceEngine:
    """The module of the device's engine, imported when it is asked for: nobody loads both."""
    if device == "cuda":
        from minunet.engines.cuda import choice as cuda

        return cuda
    from minunet.engines.cpu import choice as cpu

    return cpu


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--engine auto|plain`` and ``--precision float32|tf32|bf16`` to ``parser``, for :func:`build`.

    And ``--cores N``, for :func:`limit_cores`.
    """
    parser.add_argument(
        "--engine",
        choices=get_args(EngineChoice),
        default="auto",
        help="plain: the readable code; auto (default): the same, faster",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="float32",
        help="on a GPU, of products (tf32) or of all activations (bf16); default float32",
    )
    parser.add_argument(
        "--cores", type=cli.positive_int, metavar="N", help="take at most N cores; default OMP_NUM_THREADS, or all"
    )


def limit_cores(count: int | None) -> None:
    """Let this process and the engines that it builds take at most ``count`` cores; None: all that they may.

    It is what OMP_NUM_THREADS says from then on, which a batch system may have set: the CPU's engine goes by that.
    """
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
        with contextlib.suppress(ImportError):
            from threadpoolctl import threadpool_limits

            threadpool_limits(count, user_api="blas")  # which has looked at it already


def build(
    net: UNet,
    loss: Loss,
    max_batch: int,
    image_size: tuple[int, int],
    device: Device = "cpu",
    choice: EngineChoice = "auto",
    precision: Precision = "float32",
    *,
    training: bool = True,
) -> Engine:
    """The engine for training and running ``net``, whose arrays are on ``device``; close it, or use it in a ``with``.

    It takes batches of up to ``max_batch`` images; it is made for those of ``image_size`` (height, width), and
    runs others. With ``choice="auto"`` it is the device's own engine, if that can take the network and computes what
    the code says (:mod:`.selfcheck`: without ``training``, only a prediction is compared), and else the plain path,
    whose ``reason`` then says why; with ``"plain"`` it is the plain path.
    ``precision`` is "float32", or, on a GPU, "tf32" (float32 in memory, 10 bits of mantissa in products) or "bf16"
    (activations with 8 bits of mantissa; parameters in float32).

    Raises ValueError for another choice, precision or device, and UserError for a precision that this device or
    the plain path does not have.

    >>> from minunet.network.loss import SegmentationLoss
    >>> with build(UNet(widths=(2, 3)), SegmentationLoss(), 4, (16, 16), choice="plain") as engine:
    ...     engine.name, engine.reason
    ('plain', None)
    """
    reason = unsupported(net, loss, max_batch, image_size, device, choice, precision)

    def make(net: UNet, loss: Loss) -> Engine:
        return of_device(device).build(net, loss, max_batch, image_size, precision)

    if choice == "auto" and reason is None:
        images = min(max_batch, 2)
        reason = difference(make, net, loss, images, image_size, precision, training=training)
    if choice == "auto" and reason is None:
        return make(net, loss)
    engine = Engine(net, loss)
    engine.reason = reason
    return engine


def unsupported(
    net: UNet,
    loss: Loss,
    max_batch: int,
    image_size: tuple[int, int],
    device: Device = "cpu",
    choice: EngineChoice = "auto",
    precision: Precision = "float32",
) -> str | None:
    """Why :func:`build` would take the plain path although ``choice`` is "auto"; None if it would not.

    Raises what :func:`build` raises: a program finds out here before it writes anything.
    """
    check_choice("choice", choice, EngineChoice)
    check_choice("precision", precision, Precision)
    check_choice("device", device, Device)
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")
    if precision != "float32" and device == "cpu":
        raise UserError(f"--precision: {precision} needs a GPU, leave it out on a CPU")
    if choice == "plain":
        reason = None
    else:
        try:
            module = of_device(device)
        except ImportError as error:  # what an engine needs beyond NumPy may be missing
            reason = f"the engine cannot be imported: {error}"
        else:
            own = own_code(net) or _frozen(net)
            reason = own or module.unsupported(net, loss, max_batch, image_size, precision)
    if precision != "float32" and (choice == "plain" or reason is not None):
        why = "the plain path computes in float32" if reason is None else reason
        raise UserError(f"--precision: {precision} is not to be had ({why}), leave it out")
    return reason


def _frozen(net: UNet) -> str | None:
    """Which batch norm normalises by its running statistics in training, too: no engine has a step for it."""
    return next((f"{name} is frozen, which the engine cannot compute" for name in frozen_norms(net)), None)


def step_bytes(device: Device, choice: EngineChoice, precision: Precision) -> memory.StepBytes:
    """The function that says how much memory a training step needs, see ``memory.training_bytes``."""
    return of_device(device).step_bytes_here(precision) if choice == "auto" else memory.training_bytes
