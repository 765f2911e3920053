"""One step of training: forward, loss, backward, clip, optimise. And the interface of what takes it faster, an engine.

``loss_and_grads`` is the first three, ``train_step`` all of them. What an engine computes is defined here: it overrides
what it does faster and inherits the rest.
"""

import math
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self

import numpy as np

from minunet.base import rng
from minunet.base.backend import Array, Device, device_of
from minunet.base.errors import Diverged
from minunet.data.augment import PLAIN, PixelPasses
from minunet.data.batches import Batch, prepare_batch
from minunet.data.normalize import VolumeStatistics
from minunet.data.slices import SliceSet
from minunet.network.layers import Arrays
from minunet.network.loss import Loss
from minunet.network.unet import UNet
from minunet.training.divergence import first_non_finite
from minunet.training.optim import AdamW, WeightEMA, clip_by_global_norm


def loss_and_grads(net: UNet, x: Array, target: Array, loss: Loss, key: rng.Key) -> tuple[float, Arrays, Arrays]:
    """One training pass over images ``x`` (N, H, W, C) and masks ``target`` (N, H, W, K): forward, loss, backward.

    ``key`` names the dropout masks. Changes nothing. Returns the loss, the gradient of each parameter, and the
    statistics of the batch under the names of the running ones.
    """
    logits, cache = net.forward(x, training=True, key=key)
    value, loss_cache = loss.forward(logits, target)
    _, grads = net.backward(loss.backward(loss_cache), cache)
    return value.item(), grads, net.batch_stats(cache)


def train_step(
    net: UNet,
    optimizer: AdamW,
    x: Array,
    target: Array,
    loss: Loss,
    key: rng.Key,
    *,
    lr: float,
    clip_norm: float | None = None,
    batch_norm_momentum: float = 0.99,
    ema: WeightEMA | None = None,
    engine: "Engine | None" = None,
) -> tuple[float, float]:
    """One step of training, which changes ``net``, ``optimizer`` and ``ema``. Returns the loss and the gradient's norm.

    What ``optimizer`` lacks of the parameters is not trained: it stays as it is, and its gradient, which backward
    works out all the same, has no part in the norm. ``engine`` is one that was built for ``net`` and ``loss``, or None
    for the plain path.
    Raises Diverged, before anything is changed, if the loss or a gradient is NaN or infinite; the message says where
    the step first met such a value.
    """
    engine = engine or Engine(net, loss)
    value, grads, batch_stats = engine.loss_and_grads(x, target, key)
    if grads.keys() > optimizer.parameters.keys():
        grads = {name: grads[name] for name in optimizer.parameters}
    grads, norm = engine.clip(grads, math.inf if clip_norm is None else clip_norm)
    if not (math.isfinite(value) and math.isfinite(norm)):
        where = first_non_finite(net, x, target, loss, key)
        raise Diverged(f"the loss is {value} and the norm of the gradient {norm}, {where}")
    optimizer.step(grads, lr)
    engine.update_running_stats(batch_stats, batch_norm_momentum)
    if ema is not None:
        ema.update(net.parameters() | net.buffers())
    return value, norm


def update_running_stats(net: UNet, batch_stats: Mapping[str, Array], momentum: float) -> None:
    """In place: running <- momentum * running + (1 - momentum) * batch, as Keras does it, with the biased variance.

    The running statistics that ``batch_stats`` lacks, those of frozen batch norms, stay as they are.
    """
    buffers = net.buffers()
    for name, batch in batch_stats.items():
        running = buffers[name]
        running[...] = momentum * running + (1 - momentum) * batch


class Engine:
    """What training asks of an engine; this class itself is the plain path, from the augmentation of a batch on.

    ``name`` is all of an engine that the last bits of a result depend on: a checkpoint keeps it, and a resumed run
    warns if it is another one. ``reason`` says why it is not a faster one, if that has to be said.
    An engine is closed when its ``with`` block ends, however it ends.
    """

    name = "plain"
    reason: str | None = None
    #: What is done to the pixels of a batch.
    passes: PixelPasses = PLAIN
    #: Batches that a thread prepares while a step runs. With 0 each is prepared when the step before is done.
    ahead = 2

    def __init__(self, net: UNet, loss: Loss) -> None:
        self.net, self.loss = net, loss
        #: Held by whoever predicts: an engine with memory of its own serves one thread at a time.
        self.lock: AbstractContextManager[Any] = nullcontext()
        self._training_thread: int | None = None

    def claim_training(self) -> None:
        """Raise RuntimeError if another thread has taken steps: the gradients of one are overwritten by the next."""
        thread = threading.get_ident()
        if self._training_thread not in (None, thread):
            raise RuntimeError("this engine takes the steps of another thread, build one for each")
        self._training_thread = thread

    @property
    def description(self) -> str:
        """For people: its name, and the reason why it is not a faster one.

        >>> from minunet.network.loss import SegmentationLoss
        >>> Engine(UNet(widths=(2, 3)), SegmentationLoss()).description
        'plain'
        """
        return self.name if self.reason is None else f"{self.name} ({self.reason})"

    @property
    def device(self) -> Device:
        """Where the network's arrays are."""
        return device_of(self.net.head.weight)

    def prepare_batch(
        self, slices: SliceSet, statistics: VolumeStatistics, indices: np.ndarray, **options: Any
    ) -> Batch:
        """:func:`minunet.data.batches.prepare_batch` for the network's device.

        If :attr:`ahead` is 0, the batch may lie in the engine's own memory, and holds until the next one.
        """
        return prepare_batch(slices, statistics, indices, self.device, passes=self.passes, **options)

    def loss_and_grads(self, x: Array, target: Array, key: rng.Key) -> tuple[float, Arrays, Arrays]:
        """:func:`loss_and_grads` of the network as it is now.

        The arrays returned may lie in the engine's own memory: they hold until its next call.
        """
        return loss_and_grads(self.net, x, target, self.loss, key)

    def logits(self, x: Array, net: UNet | None = None) -> Array:
        """The logits that ``net.forward(x, training=False)`` returns.

        ``net`` is the engine's own network if None, or another one with the same config and on the same device.
        """
        logits, _ = (net or self.net).forward(x, training=False)
        return logits

    def predict(self, x: Array, net: UNet | None = None) -> Array:
        """What ``net.predict(x)`` returns, for images of any size; ``net`` as in :meth:`logits`."""
        return (net or self.net).predict(x)

    # What is done with the gradients: a GPU wants it in one launch for all parameters.

    def clip(self, grads: Arrays, max_norm: float) -> tuple[Arrays, float]:
        """:func:`minunet.training.optim.clip_by_global_norm`; the gradients of this engine may be scaled in place."""
        return clip_by_global_norm(grads, max_norm)

    def optimizer(self, parameters: Arrays, lr: float, **options: Any) -> AdamW:
        """:class:`minunet.training.optim.AdamW`, which see."""
        return AdamW(parameters, lr, **options)

    def update_running_stats(self, batch_stats: Mapping[str, Array], momentum: float) -> None:
        """:func:`update_running_stats` of the network."""
        update_running_stats(self.net, batch_stats, momentum)

    def average(self, values: Arrays, max_decay: float) -> WeightEMA:
        """:class:`minunet.training.optim.WeightEMA`, which see."""
        return WeightEMA(values, max_decay)

    def freeze(self) -> None:
        """Say that the network will not change any more: predictions may keep what they have made of it.

        An engine that does so moves the network's arrays to memory of its own and makes them read-only, so that nobody
        changes them unseen: ``net.parameters()`` are other arrays then, with the same values, and no optimizer that
        was made before has them.
        """

    def close(self) -> None:
        """Give back what the engine holds, such as processes and memory. To close it again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
