"""The stages of the loss: the sums that it is made of, and then the gradient of the logits.

Specification: :func:`minunet.network.loss.segmentation_loss_forward` and its backward. Each process takes its images or
rows; between the two stages they wait for each other's sums. The probabilities wait where their gradients will be.
"""

import numpy as np

from minunet.base.backend import Array
from minunet.engines.cpu.filters import FlippedFilters
from minunet.engines.cpu.work import Work
from minunet.network.loss import Loss

LOSS_BUDGET = 200_000  # bytes of the logits of one chunk
OVERLAP, PROBABILITY, TARGET, ENTROPY = range(4)  # the sums of an image: of p t, p, t and the cross entropy


def probabilities(z: np.ndarray, e: np.ndarray) -> np.ndarray:
    """The sigmoid of the logits ``z``, from ``e`` = exp(-abs(z)): as :func:`minunet.ops.sigmoid_forward`."""
    return np.where(z > 0, 1, e) / (1 + e)


class LossSums:
    """dlogits <- the probabilities; and the sums of each image."""

    def __init__(self, work: Work) -> None:
        self.work = work
        row = work.plan.width * work.plan.out_channels * work.dtype.itemsize
        self.pieces = work.cut(work.plan.height, 1, row, LOSS_BUDGET)
        self.logits, self.target, self.dlogits = (
            work.arrays[buffer] for buffer in (work.plan.logits, work.plan.target, work.plan.dlogits)
        )
        self.sums = work.arrays[work.plan.loss_sums][work.member.rank]

    def run(self) -> None:
        self.sums[...] = 0
        for chunk in self.work.chunks(self.pieces):
            rows = self.work.in_whole(chunk)
            z, t = self.logits[rows], self.target[rows]
            e = np.exp(-abs(z))
            p = probabilities(z, e)
            self.dlogits[rows] = p
            entropy = np.maximum(z, 0) - t * z + np.log1p(e)
            for kind, values in ((OVERLAP, p * t), (PROBABILITY, p), (TARGET, t), (ENTROPY, entropy)):
                self.sums[rows[0], kind] += values.sum(axis=(1, 2, 3), dtype=np.float64)


class LossGradient:
    """The loss, and dlogits; and then, while nothing else is to do, the filters of the backward pass."""

    def __init__(self, work: Work) -> None:
        self.work, self.loss = work, work.plan.loss
        self.pieces = LossSums(work).pieces
        self.target, self.dlogits, self.sums = (
            work.arrays[buffer] for buffer in (work.plan.target, work.plan.dlogits, work.plan.loss_sums)
        )
        self.flipped = FlippedFilters(work)
        self.value = 0.0

    def run(self) -> None:
        loss = self.loss
        assert loss is not None
        dice_weight, bce_weight = loss.dice_weight, loss.bce_weight
        images = self.work.whole_batch
        sums = self.sums[:, :images].sum(axis=0)
        if loss.over == "batch":
            sums = sums.sum(axis=0, keepdims=True)
        count = images * self.dlogits[0].size
        denominator = sums[:, PROBABILITY] + sums[:, TARGET] + loss.smooth
        dice = (2 * sums[:, OVERLAP] + loss.smooth) / denominator
        self.value = dice_weight * (1 - dice).mean() + bce_weight * sums[:, ENTROPY].sum() / count
        # dL/dp = (Dice - 2 t) * slope, for the Dice of the pixel's image, or of the batch.
        slope = dice_weight / (denominator * len(dice))
        dice, slope = (np.broadcast_to(v, images).astype(self.work.dtype)[:, None, None, None] for v in (dice, slope))
        for chunk in self.work.chunks(self.pieces):
            rows = self.work.in_whole(chunk)
            p, t = self.dlogits[rows], self.target[rows]
            ddice = (dice[rows[0]] - 2 * t) * slope[rows[0]] * p * (1 - p)
            self.dlogits[rows] = ddice + (p - t) * self.work.dtype.type(bce_weight / count)
        self.flipped.run()


class AnyLoss:
    """The stage of a loss that the stages above do not compute: one for classes, or one of your own.

    The process that called the engine works it out with the loss's own code, on all images, while the others make the
    filters of the backward pass.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.flipped = work, FlippedFilters(work)
        self.loss: Loss | None = None  # of that process, as is the target
        self.target: Array = None
        self.value = 0.0

    def run(self) -> None:
        if self.loss is not None:
            images, arrays, plan = self.work.whole_batch, self.work.arrays, self.work.plan
            value, cache = self.loss.forward(arrays[plan.logits][:images], self.target)
            arrays[plan.dlogits][:images] = self.loss.backward(cache)
            self.value = value.item()
        self.flipped.run()
