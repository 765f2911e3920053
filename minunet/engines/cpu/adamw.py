"""The optimiser's passes over all parameters, block by block: the same numbers in a third of the time.

Specification: :class:`minunet.optim.AdamW`, :class:`minunet.optim.WeightEMA` (the same bits) and
:func:`minunet.optim.clip_by_global_norm` (up to the order of the sum).

The idea: a step of AdamW passes some twenty times over each parameter, its gradient and its moments. In blocks that
fit the cache only the first of these passes reads from memory, and only the last one writes there. The blocks are
parameters of their own, with names of their own, for the plain optimiser, which does the work.
"""

import math
from collections.abc import Collection, Mapping

import numpy as np

from minunet.backend import Array
from minunet.layers import Arrays
from minunet.optim import AdamW, WeightEMA

BLOCK = 16_384  # values: 64 KiB of float32


def blocks_of(arrays: Mapping[str, Array]) -> Arrays:
    """Views of at most :data:`BLOCK` values of each array, named by the array and a number.

    >>> [(name, block.size) for name, block in blocks_of({"w": np.zeros((3, 3, 64, 64))}).items()]
    [('w 0', 16384), ('w 1', 16384), ('w 2', 4096)]
    """
    return {
        f"{name} {number}": flat[first : first + BLOCK]
        for name, flat in ((name, array.reshape(-1)) for name, array in arrays.items())
        for number, first in enumerate(range(0, flat.size, BLOCK))
    }


class BlockAdamW(AdamW):
    """:class:`minunet.optim.AdamW` on NumPy arrays that are contiguous."""

    def __init__(
        self,
        parameters: Arrays,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
        weight_decay: float = 0.004,
        no_decay: Collection[str] = (),
    ) -> None:
        super().__init__(parameters, lr, betas, eps, weight_decay, no_decay)
        self._plain = AdamW({}, lr, betas, eps, weight_decay)
        self._plain.parameters = blocks_of(parameters)
        exempt = (name for name in self._plain.parameters if name.rpartition(" ")[0] in self.no_decay)
        self._plain.no_decay = frozenset(exempt)
        self._plain.first_moment = blocks_of(self.first_moment)
        self._plain.second_moment = blocks_of(self.second_moment)

    def step(self, grads: Mapping[str, Array], lr: float | None = None) -> None:
        """As :meth:`minunet.optim.AdamW.step`."""
        if grads.keys() != self.parameters.keys():
            super().step(grads, lr)  # which says what is wrong
        self._plain.steps = self.steps
        self._plain.step(blocks_of(grads), self.lr if lr is None else lr)
        self.steps = self._plain.steps


class BlockWeightEMA(WeightEMA):
    """:class:`minunet.optim.WeightEMA` on NumPy arrays that are contiguous."""

    def __init__(self, values: Mapping[str, Array], max_decay: float = 0.999) -> None:
        super().__init__(values, max_decay)
        self._plain = WeightEMA({}, max_decay)
        self._plain.average = blocks_of(self.average)

    def update(self, values: Mapping[str, Array]) -> None:
        """As :meth:`minunet.optim.WeightEMA.update`."""
        self._plain.updates = self.updates
        self._plain.update(blocks_of({name: values[name] for name in self.average}))
        self.updates = self._plain.updates


def clip_in_place(grads: Mapping[str, Array], max_norm: float) -> tuple[Arrays, float]:
    """As :func:`minunet.optim.clip_by_global_norm`, but it changes ``grads``, which are the engine's own."""
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    blocks = blocks_of(grads).values()
    wide = (block.astype(np.float64) for block in blocks)  # squares of float32 soon overflow
    # No dot product: outside of the team's work BLAS would start threads for it.
    norm = math.sqrt(sum((block * block).sum().item() for block in wide))
    if max_norm < norm < math.inf:
        for block in blocks:
            block *= max_norm / norm
    return dict(grads), norm
