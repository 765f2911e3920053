"""What each process runs: the stages of the plan, one after the other, with a barrier behind each."""

import contextlib
import ctypes
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Protocol

import numpy as np

from minunet.base import rng
from minunet.engines.cpu import channels, convolution, filters, head, loss, resample
from minunet.engines.cpu.adamw import Parameters, Update
from minunet.engines.cpu.buffers import ALIGNMENT, Scratch
from minunet.engines.cpu.member import Member
from minunet.engines.cpu.norm import Norm
from minunet.engines.cpu.plan import Buffer, Plan, Stage, Unit
from minunet.engines.cpu.preparation import Preparation
from minunet.engines.cpu.work import Work
from minunet.network.layers import Arrays
from minunet.network.loss import SegmentationLoss


class Runnable(Protocol):
    """A stage: :meth:`run` does this process's share of it."""

    def run(self) -> None: ...


#: By the kinds of the plan's stages: what is made of a stage's unit or level, if it has one, and the work.
STAGES: dict[str, Callable[..., Runnable]] = {
    "filters": filters.Filters,
    "filters_and_masks": filters.FiltersAndMasks,
    "conv": convolution.ConvForward,
    "conv_planes": channels.IntoPlanes,
    "conv_channels": channels.ChannelsForward,
    "conv_collect": channels.Collect,
    "pool": resample.PoolForward,
    "up": resample.UpForward,
    "head": head.HeadForward,
    "loss_sums": loss.LossSums,
    "loss_gradient": loss.LossGradient,
    "any_loss": loss.AnyLoss,
    "head_backward": head.HeadBackward,
    "conv_backward": convolution.ConvBackward,
    "conv_planes_backward": channels.PlanesBackward,
    "conv_channels_backward": channels.ChannelsBackward,
    "conv_spread_backward": channels.SpreadBackward,
    "up_backward": resample.UpBackward,
    "pool_backward": resample.PoolBackward,
    "gradients": filters.Gradients,
}


class Steps:
    """The stages of a training step, or of a prediction, with the processes sharing out images or rows.

    :attr:`stages` are the plan's, each with the object that runs it. Two of these objects are used between the steps,
    too: :attr:`masks` is told which dropout masks to draw (None where nothing is dropped: in a prediction, or at a rate
    of 0), and :attr:`loss` knows the loss of the step (None in a prediction).
    """

    def __init__(self, work: Work, stages: list[Stage]) -> None:
        """Make the object that runs each of ``stages``. It takes its arrays, and its scratch memory, from ``work``."""
        self.work = work
        self.stages: list[tuple[Stage, Runnable]] = []
        self.masks: filters.FiltersAndMasks | None = None
        self.loss: loss.LossGradient | loss.AnyLoss | None = None
        for stage in stages:
            work.scratch.reset()  # nothing in it outlives a stage, so that all stages use the same memory
            make = STAGES[stage.kind]
            made = make(work) if stage.what is None else make(stage.what, work)
            self.stages.append((stage, made))
            if isinstance(made, filters.FiltersAndMasks):
                self.masks = made
            elif isinstance(made, loss.LossGradient | loss.AnyLoss):
                self.loss = made

    def run(self, batch: int, first: int = 0) -> None:
        """The stages from number ``first`` on, with a barrier behind each."""
        work = self.work
        work.begin(batch)
        for stage, made in self.stages[first:]:
            made.run()
            work.member.barrier()
            if work.training and stage.kind in ("conv", "conv_collect") and isinstance(stage.what, Unit):
                work.norms[stage.what].from_batch(batch * stage.what.height * stage.what.width)


class Program:
    """The stages of a training step and of a prediction, built for one process.

    Sharing out images is faster: each process works in memory of its own, in large pages, where shared memory has small
    ones. So rows are shared out only where images would leave processes idle.
    """

    def __init__(self, plan: Plan, member: Member) -> None:
        self.plan, self.member = plan, member
        self.shared = {buffer: member.array(*place) for buffer, place in plan.permanent.items()}
        self._begun = False
        self.net, self.predictor, self.grads = map(self.named, (plan.net, plan.predictor, plan.grads))
        moments = self.named(plan.first_moment), self.named(plan.second_moment)
        self.parameters = Parameters({name: self.net[name] for name in plan.parameters}, self.grads, *moments)
        self.update = Update(self.parameters, self.shared[plan.squares], member)
        self.preparation = Preparation([self.shared[buffer] for buffer in plan.batch], member)
        self.norms: dict[bool, dict[Unit, Norm]] = {}  # by training
        own = own_memory(plan.own_bytes)
        scratch = Scratch()
        for _ in ("measure", "build"):
            self.steps: dict[tuple[bool, bool], Steps] = {}  # by (training, by images)
            for training, weights, memory, stages in (
                (True, self.net, plan.training_memory, plan.training_stages()),
                (False, self.predictor, plan.inference_memory, plan.forward_stages()),
            ):
                self.norms[training] = norms = {unit: self._norm(unit, weights) for unit in plan.units}
                whole = self.shared | {buffer: member.array(*place) for buffer, place in memory.whole.items()}
                by_images = {buffer: _view(own, *place) for buffer, place in memory.by_images.items()}
                by_rows = {buffer: member.array(*place) for buffer, place in memory.by_rows.items()}
                for images, arrays in ((True, by_images), (False, by_rows)):
                    if images or member.size > 1:
                        options = {"training": training, "by_images": images}
                        work = Work(plan, member, whole | arrays, weights, norms, scratch, **options)
                        self.steps[training, images] = Steps(work, stages)
            if scratch.measuring:
                scratch.allocate()

    def _norm(self, unit: Unit, weights: Arrays) -> Norm:
        """The batch norm of ``unit``; it reads the bias of the convolution in front of it, too."""
        arrays = {name: weights[f"{unit.norm}.{name}"] for name in ("gamma", "beta", "running_mean", "running_var")}
        if f"{unit.conv}.bias" in weights:
            arrays["bias"] = weights[f"{unit.conv}.bias"]
        return Norm(self.shared[unit.sums], arrays, unit.eps, self.plan.dtype)

    def named(self, buffers: Mapping[str, Buffer]) -> Arrays:
        """The arrays of permanent buffers, by the buffers' names."""
        return {name: self.shared[buffer] for name, buffer in buffers.items()}

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


def plan_of(arguments: Mapping[str, Any], processes: int) -> Plan:
    """The plan for what :func:`build` is given."""
    options, (height, width) = arguments["loss"], arguments["image_size"]
    loss = None if options is None else SegmentationLoss(**options)
    return Plan(**{**arguments, "loss": loss, "image_size": (height, width)}, processes=processes)


def build(member: Member, **arguments: Any) -> Program:
    """What a team's processes build, from the arguments of :class:`minunet.engines.cpu.plan.Plan` as JSON has them."""
    return Program(plan_of(arguments, member.size), member)
