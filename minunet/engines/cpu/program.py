"""What each process runs: the stages of the plan, one after the other, with a barrier behind each."""

import contextlib
import ctypes
from math import prod
from typing import Any, Protocol

import numpy as np

from minunet.base import rng
from minunet.engines.cpu import channels, convolution, filters, head, loss, resample
from minunet.engines.cpu.adamw import Update
from minunet.engines.cpu.buffers import ALIGNMENT, Scratch
from minunet.engines.cpu.member import Member
from minunet.engines.cpu.norm import Norm
from minunet.engines.cpu.plan import Description, Stage, layout
from minunet.engines.cpu.preparation import Preparation
from minunet.engines.cpu.work import Work
from minunet.network.loss import SegmentationLoss


class Runnable(Protocol):
    """A stage: :meth:`run` does this process's share of it."""

    def run(self) -> None: ...


UNIT_STAGES: dict[str, Any] = {
    "conv": convolution.ConvForward,
    "conv_backward": convolution.ConvBackward,
    "conv_planes": channels.Planes,
    "conv_channels": channels.ChannelsForward,
    "conv_collect": channels.Collect,
    "conv_planes_backward": channels.PlanesBackward,
    "conv_channels_backward": channels.ChannelsBackward,
    "conv_spread_backward": channels.SpreadBackward,
    "pool": resample.PoolForward,
    "pool_backward": resample.PoolBackward,
    "up": resample.UpForward,
    "up_backward": resample.UpBackward,
}
NETWORK_STAGES: dict[str, Any] = {
    "filters": filters.Filters,
    "filters_and_masks": filters.FiltersAndMasks,
    "head": head.HeadForward,
    "loss_sums": loss.LossSums,
    "loss_gradient": loss.LossGradient,
    "head_backward": head.HeadBackward,
    "gradients": filters.Gradients,
}


class Steps:
    """The stages of a training step, or of a prediction, with the processes sharing out images or rows."""

    def __init__(self, work: Work, plan: list[Stage]) -> None:
        self.work, self.stages = work, []
        self.masks: filters.FiltersAndMasks | None = None
        self.loss: loss.LossGradient | None = None
        for stage in plan:
            work.scratch.reset()
            kind = stage.kind
            made: Runnable = (
                NETWORK_STAGES[kind](work) if kind in NETWORK_STAGES else UNIT_STAGES[kind](stage.what, work)
            )
            self.stages.append((stage, made))
            if isinstance(made, filters.FiltersAndMasks):
                self.masks = made
            if isinstance(made, loss.LossGradient):
                self.loss = made

    def run(self, batch: int, first: int = 0) -> None:
        """The stages from number ``first`` on, with a barrier behind each."""
        work = self.work
        work.begin(batch)
        for stage, made in self.stages[first:]:
            made.run()
            work.member.barrier()
            if work.training and stage.kind in ("conv", "conv_collect"):
                unit = stage.what
                work.norms[unit.conv].from_batch(batch * unit.height * unit.width)


class Program:
    """The stages of a training step and of a prediction, built for one process.

    Sharing out images is faster: each process works in memory of its own, in large pages, where shared memory has small
    ones. So rows are shared out only where images would leave processes idle.
    """

    def __init__(self, description: Description, member: Member) -> None:
        self.description, self.member = description, member
        places = layout(description, member.size)
        self.shared = {name: member.array(*place) for name, place in places.permanent.items()}
        predictor = {f"net:{name[10:]}": array for name, array in self.shared.items() if name.startswith("predictor:")}
        shared = {True: self.shared, False: self.shared | predictor}  # by training
        self.norms = {
            training: {
                unit.conv: Norm(
                    arrays[f"sums:{unit.conv}"], norm_arrays(arrays, unit), description.eps, description.dtype
                )
                for unit in description.units.values()
            }
            for training, arrays in shared.items()
        }
        self._begun = False
        self.update = Update(self.shared, description.parameter_shapes(), member)
        self.preparation = Preparation(self.shared, member)
        own = own_memory(places.own_bytes)
        plans = {True: description.training_stages(), False: description.forward_stages(training=False)}
        scratch = Scratch()
        for _ in ("measure", "build"):
            self.steps: dict[tuple[bool, bool], Steps] = {}  # by (training, by images)
            for training, memory in ((True, places.training), (False, places.inference)):
                whole = shared[training] | {name: member.array(*place) for name, place in memory.whole.items()}
                by_images = {name: _view(own, *place) for name, place in memory.by_images.items()}
                by_rows = {name: member.array(*place) for name, place in memory.by_rows.items()}
                for images, arrays in ((True, by_images), (False, by_rows)):
                    if images or member.size > 1:
                        work = Work(
                            description,
                            member,
                            whole | arrays,
                            self.norms[training],
                            scratch,
                            training=training,
                            by_images=images,
                        )
                        self.steps[training, images] = Steps(work, plans[training])
            if scratch.measuring:
                scratch.allocate()

    def run(self, command: list[Any]) -> None:
        """A command.

        ``["train", batch, key]``, ``["infer", batch, kept]``, ``["adamw", method of Update, arguments ...]``, or
        ``["prepare", arguments of Preparation.run ...]``. ``kept``: norms and filters, which the first stage
        transforms, are those of the last prediction.
        """
        kind, *rest = command
        if kind == "prepare":
            self.preparation.run(*rest)
            return
        if kind == "adamw":
            method, *arguments = rest
            getattr(self.update, method)(*arguments)
            return
        if not self._begun:
            give_back_memory()
            self._begun = True
        batch, key_or_kept = rest
        steps = self.steps_for(kind == "train", batch)
        kept = kind == "infer" and key_or_kept
        if kind == "train" and steps.masks is not None:
            steps.masks.key = rng.Key(*key_or_kept)
        if kind == "infer" and not kept:
            for norm in self.norms[False].values():
                norm.from_running()
        steps.run(batch, first=1 if kept else 0)

    def steps_for(self, training: bool, batch: int) -> Steps:
        """By images if that keeps three quarters of the processes busy."""
        size = self.member.size
        by_images = 4 * batch >= 3 * size * -(-batch // size)
        return self.steps[training, by_images or size == 1]


def give_back_memory() -> None:
    """Give the system back what has been freed: a C library keeps it where something behind it is still in use.

    That is as much as the network takes, once its arrays have moved to the shared memory.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


def own_memory(nbytes: int) -> np.ndarray:
    """Memory of this process, for which NumPy asks large pages: it does so from 4 MiB on."""
    room = np.zeros(max(nbytes, 1 << 22) + ALIGNMENT, np.uint8)
    return room[-room.ctypes.data % ALIGNMENT :]


def _view(memory: np.ndarray, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def norm_arrays(arrays: dict[str, np.ndarray], unit: Any) -> dict[str, np.ndarray]:
    """What the batch norm of ``unit`` reads of the network, the bias of the convolution in front of it included."""
    found = {name: arrays[f"net:{unit.norm}.{name}"] for name in ("gamma", "beta", "running_mean", "running_var")}
    bias = arrays.get(f"net:{unit.conv}.bias")
    return found if bias is None else found | {"bias": bias}


def build(
    member: Member,
    config: dict[str, Any],
    eps: float,
    loss: dict[str, Any],
    max_batch: int,
    image_size: list[int],
) -> Program:
    """What a team's processes build."""
    height, width = image_size
    return Program(Description(config, eps, SegmentationLoss(**loss), max_batch, (height, width)), member)
