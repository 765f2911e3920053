"""A batch, prepared by all processes: each normalises and augments its share of the images.

Specification: :func:`minunet.data.batches.prepare_batch` (the same bits).

The idea: a thread that prepares batches beside the steps takes the core of one process, and at the next barrier the
others wait for that one. Between two steps all cores are free.
"""

from typing import Any

import numpy as np

from minunet.base import rng
from minunet.data.augment import Augmentation
from minunet.data.batches import prepare_batch
from minunet.data.normalize import VolumeStatistics
from minunet.data.slices import SliceSet
from minunet.engines.cpu.chunks import share
from minunet.engines.cpu.member import Member


class Preparation:
    """One process's share of preparing a batch. ``arrays``, which all processes share: images, masks, x and target.

    ``slices`` are those of the batch, as if each had a patient of its own; ``x`` and ``target`` what becomes of them.
    """

    def __init__(self, arrays: list[np.ndarray], member: Member) -> None:
        self.member = member
        images, masks, self.x, self.target = arrays
        numbers = range(len(images))
        names = tuple(map(str, numbers))
        self.slices = SliceSet(images=images, masks=masks, patients=names, numbers=tuple(numbers), files=names)

    def run(
        self,
        statistics: list[list[list[float]]],
        augmentation: dict[str, float] | None,
        move_masks: bool,
        key: list[int] | None,
    ) -> None:
        """The arguments of ``prepare_batch`` as JSON has them; ``statistics`` have a row for each image."""
        of_images = VolumeStatistics(*map(np.array, statistics))
        options: dict[str, Any] = {"move_masks": move_masks}
        if augmentation is not None:
            options["augmentation"] = Augmentation(**augmentation)
        for n in share(len(of_images.low), self.member.rank, self.member.size):
            if key is not None:
                first = rng.Key(*key)
                options["key"] = first._replace(image=first.image + n)
            one = prepare_batch(self.slices, of_images, np.array([n]), "cpu", **options)
            self.x[n], self.target[n] = one.x[0], one.target[0]
