"""The CPU engine: a training step of the U-Net on NumPy alone, on all cores, in memory that is planned once.

Specification: :func:`minunet.training.step.loss_and_grads` and :meth:`minunet.network.unet.UNet.predict`.

The ideas, and where they are:

- convolutions by Winograd's minimal filtering, as matrix products on strided views: :mod:`.winograd`, :mod:`.rows`,
  :mod:`.tiles`;
- what lies between two convolutions (batch norm, ReLU, dropout, concatenation) is done to bands in the cache while
  they are taken up and given back, and never stored: :mod:`.norm`, :mod:`.bands`;
- the plan of the step and of its memory, made once: :mod:`.plan`, :mod:`.buffers`;
- several processes on shared memory, each with a share of the pixels or channels: :mod:`.team`, :mod:`.chunks`,
  :mod:`.channels`.

The gain, with machine and date: docs/engines/cpu.md; ``python benchmarks/train_step.py`` measures it.
"""

import threading
from dataclasses import asdict
from typing import Any, cast

import numpy as np

from minunet.base import rng
from minunet.base.backend import Array
from minunet.data.batches import Batch, as_target, cropped
from minunet.data.normalize import VolumeStatistics
from minunet.data.slices import SliceSet
from minunet.engines.cpu.adamw import BlockAdamW, BlockWeightEMA, TeamAdamW, clip_by_team, same_arrays
from minunet.engines.cpu.loss import AnyLoss, probabilities
from minunet.engines.cpu.program import Program, build, plan_of
from minunet.engines.cpu.team import Team, TeamError, usable_size
from minunet.network.layers import Arrays, BatchNorm2d, map_arrays
from minunet.network.loss import Loss, SegmentationLoss
from minunet.network.own_code import own_loss
from minunet.network.unet import UNet
from minunet.ops.checks import check_target
from minunet.training.optim import AdamW, WeightEMA
from minunet.training.step import Engine


class CpuEngine(Engine):
    """The engine for batches of up to ``max_batch`` images of ``image_size`` (height, width).

    ``workers`` processes share the work; None: as many as this process may use cores, but no more than images.
    Where processes cannot be started it works in this one, and ``reason`` says why.

    Raises ValueError if ``workers`` is out of range, and TeamError from any method if a process has died.
    """

    ahead = 0  # a thread that prepares batches would take a core from a process

    def __init__(
        self,
        net: UNet,
        loss: Loss,
        max_batch: int,
        image_size: tuple[int, int],
        workers: int | None = None,
    ) -> None:
        super().__init__(net, loss)
        self.lock = threading.RLock()
        self.max_batch, self.image_size = max_batch, image_size
        self._arguments: dict[str, Any] = {
            "config": net.config,
            "parameters": {name: list(array.shape) for name, array in net.parameters().items()},
            "buffers": {name: list(array.shape) for name, array in net.buffers().items()},
            "eps": {name: layer.eps for name, layer in net.leaves().items() if isinstance(layer, BatchNorm2d)},
            "loss": known_loss(loss),
            "max_batch": max_batch,
            "image_size": list(image_size),
        }
        size, alone = usable_size(workers)
        self.reason = alone or None
        if workers is None:
            size = min(size, max(max_batch, 2))  # more would have less than an image each, and mostly wait
        try:
            self._team = self._start(size)
        except (TeamError, OSError) as error:
            if size == 1:
                raise
            self.reason = str(error)
            self._team = self._start(1)
        self._has_optimizer = False
        self._frozen: Arrays = {}  # the network's arrays, once they are read-only
        self._kept = False  # whether the filters in the shared memory are those of these arrays
        self._program = cast(Program, self._team.program)
        for unit in self._program.plan.units:
            if net.config["conv_bias"]:
                # Batch norm takes the mean away, and with it whatever a bias added: its gradient is 0.
                self._program.grads[f"{unit.conv}.bias"][...] = 0
        processes = "process" if self._team.size == 1 else "processes"
        self.name = f"cpu, {self._team.size} {processes}"

    def _start(self, size: int) -> Team:
        """A team of so many processes that run the program."""
        return Team(size, build, self._arguments, plan_of(self._arguments, size).shared_bytes)

    def prepare_batch(
        self, slices: SliceSet, statistics: VolumeStatistics, indices: np.ndarray, **options: Any
    ) -> Batch:
        """As the plain path. The batch is overwritten by the next call.

        The processes move masks of one channel, and do not know what is in it: the numbers of classes become a target
        here. Masks that overlap are left to the plain path.
        """
        prepared, count = self._program.preparation, len(indices)
        augmentation, crop, key = (options.get(name) for name in ("augmentation", "crop", "key"))
        keyless = key is None and (augmentation is not None or crop is not None)
        images, masks = cropped(slices, indices, crop, key)
        room = prepared.slices.images
        fits = (images.shape[1:], images.dtype) == (room.shape[1:], room.dtype) and masks.shape[3] == 1
        if keyless or not 1 <= count <= len(room) or not fits:
            # Which takes images of 16 bits and floats, too, for which there is no room, and knows what to refuse.
            return super().prepare_batch(slices, statistics, indices, **options)
        room[:count], prepared.slices.masks[:count] = images, masks
        of_images = [values.tolist() for values in statistics.take(slices.patient_indices()[indices])]
        drawn = None if augmentation is None else asdict(augmentation)
        self._team.run(["prepare", of_images, drawn, options.get("move_masks", True), key])
        target = as_target(prepared.target[:count], len(slices.classes))
        return Batch(prepared.x[:count], target, tuple(slices.files[i] for i in indices))

    def loss_and_grads(self, x: Array, target: Array, key: rng.Key) -> tuple[float, Arrays, Arrays]:
        """As the plain path. The gradients are overwritten by the next call."""
        one_pixel = len(x) * (x.shape[1] >> self.net.depth) * (x.shape[2] >> self.net.depth) == 1
        if key is None or one_pixel or not self._fits(x):
            return super().loss_and_grads(x, target, key)  # which knows what to refuse
        if self._program.plan.loss is not None:  # another loss says itself what it takes
            check_target(target, (*x.shape[:3], self._program.plan.out_channels))
        self.claim_training()
        with self.lock:
            return self._loss_and_grads(x, target, key)

    def _loss_and_grads(self, x: Array, target: Array, key: rng.Key) -> tuple[float, Arrays, Arrays]:
        _take_over(self.net, self._program.net)
        self._kept = False
        batch = len(x)
        steps, plan = self._program.steps_for(True, batch), self._program.plan
        assert steps.loss is not None
        steps.work.arrays[plan.images][:batch] = x
        if isinstance(steps.loss, AnyLoss):
            steps.loss.loss, steps.loss.target = self.loss, target
        else:
            steps.work.arrays[plan.target][:batch] = target
        self._team.run(["train", batch, list(key)])
        stats: Arrays = {}
        for unit, norm in self._program.norms[True].items():
            stats[f"{unit.norm}.running_mean"], stats[f"{unit.norm}.running_var"] = norm.batch_mean, norm.batch_var
        return float(steps.loss.value), self._program.grads, stats

    def logits(self, x: Array, net: UNet | None = None) -> Array:
        """As ``net.forward(x, training=False)[0]``."""
        net = net or self.net
        frozen = same_arrays(_arrays(net), self._frozen)
        if not self._fits(x) or (self._frozen and not frozen):  # whose arrays have the place
            return super().logits(x, net)
        with self.lock:
            kept = frozen and self._kept
            if not frozen:
                _take_over(net, self._program.predictor)
            arrays, plan = self._program.steps_for(False, len(x)).work.arrays, self._program.plan
            arrays[plan.images][: len(x)] = x
            self._team.run(["infer", len(x), kept])
            self._kept = True
            return arrays[plan.logits][: len(x)].copy()

    def predict(self, x: Array, net: UNet | None = None) -> Array:
        """As ``net.predict(x)``."""
        if not self._fits(x):
            return super().predict(x, net)
        z = self.logits(x, net)
        if (net or self.net).config["output"] != "sigmoid":
            return (net or self.net).probabilities(z)
        return probabilities(z, np.exp(-abs(z)))

    def clip(self, grads: Arrays, max_norm: float) -> tuple[Arrays, float]:
        """As the plain path; the engine's own gradients in place."""
        if self._team.closed or not same_arrays(grads, self._program.grads):
            return super().clip(grads, max_norm)
        return dict(grads), clip_by_team(self._team, self._program.update.squares, max_norm)

    def optimizer(self, parameters: Arrays, lr: float, **options: Any) -> AdamW:
        """AdamW, block by block.

        If ``parameters`` are the network's, they move first to the memory that the processes share, so that no step
        has to copy them there: ``net.parameters()`` are other arrays then, with the same values. The moments are there
        too, and each process takes its part of the blocks.
        """
        mine = self.net.parameters()
        if self._has_optimizer or not same_arrays(parameters, mine):
            return BlockAdamW(parameters, lr, **options)
        _take_over(self.net, self._program.net)
        _replace(self.net, self._program.parameters.values)
        optimizer = TeamAdamW(self._team, self._program.parameters, lr, **options)
        self._has_optimizer = True  # the one whose moments there is room for
        return optimizer

    def average(self, values: Arrays, max_decay: float) -> WeightEMA:
        """The average of the weights, block by block."""
        return BlockWeightEMA(values, max_decay)

    def freeze(self) -> None:
        """As the plain path's. A prediction then neither copies the parameters nor transforms the filters again.

        Networks with other arrays are predicted by the plain path from then on.
        """
        _take_over(self.net, self._program.predictor)
        _replace(self.net, {name: self._program.predictor[name].view() for name in _arrays(self.net)})
        self._frozen, self._kept = _arrays(self.net), False
        for array in self._frozen.values():
            array.flags.writeable = False

    def close(self) -> None:
        """End the processes."""
        self._team.close()

    def _fits(self, x: Array) -> bool:
        """Whether the buffers were planned for such a batch."""
        return (
            isinstance(x, np.ndarray)
            and x.ndim == 4
            and 1 <= len(x) <= self.max_batch
            and x.shape[1:] == (*self.image_size, self._program.plan.in_channels)
            and x.dtype == self._program.plan.dtype
        )


def known_loss(loss: Loss) -> dict[str, Any] | None:
    """The options of a loss whose stages the engine has; None for any other loss."""
    known = isinstance(loss, SegmentationLoss) and own_loss(loss) is None and loss.over != "class"
    return vars(loss) if known else None


def _arrays(net: UNet) -> Arrays:
    """All arrays of the network, by name."""
    return net.parameters() | net.buffers()


def _replace(net: UNet, others: Arrays) -> None:
    """Put ``others`` in the place of the network's arrays with these names."""
    by_id = {id(array): others[name] for name, array in _arrays(net).items() if name in others}
    vars(net).update(vars(map_arrays(net, lambda array: by_id.get(id(array), array))))


def _take_over(net: UNet, arrays: Arrays) -> None:
    """Copy the network's arrays to where all processes see them, but those that are there already."""
    for name, array in _arrays(net).items():
        if array is not arrays[name]:
            arrays[name][...] = array
