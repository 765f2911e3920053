"""The optimiser's passes over all parameters, block by block: the same numbers in a third of the time.

Specification: :class:`minunet.training.optim.AdamW`, :class:`minunet.training.optim.WeightEMA` (the same bits) and
:func:`minunet.training.optim.clip_by_global_norm` (up to the order of the sum).

The idea: a step of AdamW passes some twenty times over each parameter, its gradient and its moments. In blocks that
fit the cache only the first of these passes reads from memory, and only the last one writes there. The blocks are
parameters of their own, with names of their own, for the plain optimiser, which does the work.

And the blocks are shared out among the processes of a team (:class:`Update`), which takes the moments to lie in the
memory that all of them see.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import Any

import numpy as np

from minunet.base.backend import Array
from minunet.engines.cpu.member import Member
from minunet.engines.cpu.team import Team
from minunet.network.layers import Arrays
from minunet.training.optim import AdamW, WeightEMA

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


def count_of_blocks(shapes: Iterable[tuple[int, ...]]) -> int:
    """How many blocks arrays of these shapes have.

    >>> count_of_blocks([(3, 3, 64, 64), (64,)])
    4
    """
    return sum(-(-prod(shape) // BLOCK) for shape in shapes)


class BlockAdamW(AdamW):
    """:class:`minunet.training.optim.AdamW` on NumPy arrays that are contiguous."""

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
        self._cut_up()

    def _cut_up(self) -> None:
        self._plain = AdamW({}, self.lr, self.betas, self.eps, self.weight_decay)
        self._plain.parameters = blocks_of(self.parameters)
        exempt = (name for name in self._plain.parameters if name.rpartition(" ")[0] in self.no_decay)
        self._plain.no_decay = frozenset(exempt)
        self._plain.first_moment = blocks_of(self.first_moment)
        self._plain.second_moment = blocks_of(self.second_moment)

    def step(self, grads: Mapping[str, Array], lr: float | None = None) -> None:
        """As :meth:`minunet.training.optim.AdamW.step`."""
        if grads.keys() != self.parameters.keys():
            super().step(grads, lr)  # which says what is wrong
        self._plain.steps = self.steps
        self._plain.step(blocks_of(grads), self.lr if lr is None else lr)
        self.steps = self._plain.steps


class Update:
    """One process's share of what is done to all parameters: every second block, if the processes are two.

    ``shared`` are the arrays of all processes: the parameters ("net:"), gradients and moments, and a place for each
    block's sum of squares.
    """

    def __init__(self, shared: Arrays, names: Iterable[str], member: Member) -> None:
        self.mine = slice(member.rank, None, member.size)
        self.squares = shared["squares:"]
        self.plain = AdamW({})
        self.plain.parameters, self.plain.first_moment, self.plain.second_moment, self.grads = (
            dict(list(blocks_of({name: shared[f"{kind}:{name}"] for name in names}).items())[self.mine])
            for kind in ("net", "first_moment", "second_moment", "grad")
        )

    def configure(self, betas: list[float], eps: float, weight_decay: float, no_decay: list[str]) -> None:
        """The options of :class:`minunet.training.optim.AdamW`."""
        self.plain.betas, self.plain.eps, self.plain.weight_decay = (betas[0], betas[1]), eps, weight_decay
        self.plain.no_decay = frozenset(name for name in self.plain.parameters if name.rpartition(" ")[0] in no_decay)

    def step(self, steps: int, lr: float) -> None:
        """The step behind so many."""
        self.plain.steps = steps
        self.plain.step(self.grads, lr)

    def add_squares(self) -> None:
        """The sum of the squares of each block of the gradient."""
        self.squares[self.mine] = [sum_of_squares(block) for block in self.grads.values()]

    def scale(self, factor: float) -> None:
        """The gradient times ``factor``."""
        for block in self.grads.values():
            block *= factor


class TeamAdamW(BlockAdamW):
    """AdamW on the parameters and moments that a team shares, a part by each of its processes."""

    def __init__(self, team: Team, shared: Arrays, parameters: Arrays, lr: float, **options: Any) -> None:
        super().__init__({name: array[:0] for name, array in parameters.items()}, lr, **options)  # which checks them
        self.team, self.parameters = team, parameters
        self.grads = {name: shared[f"grad:{name}"] for name in parameters}
        self.first_moment = {name: shared[f"first_moment:{name}"] for name in parameters}
        self.second_moment = {name: shared[f"second_moment:{name}"] for name in parameters}
        super()._cut_up()
        betas, eps, decay = [float(beta) for beta in self.betas], float(self.eps), float(self.weight_decay)
        team.run(["adamw", "configure", betas, eps, decay, sorted(self.no_decay)])

    def step(self, grads: Mapping[str, Array], lr: float | None = None) -> None:
        """As :meth:`minunet.training.optim.AdamW.step`; of other gradients than the engine's, by this process alone."""
        if self.team.closed or not same_arrays(grads, self.grads):
            super().step(grads, lr)
            return
        self.team.run(["adamw", "step", self.steps, float(self.lr if lr is None else lr)])
        self.steps += 1


def same_arrays(some: Mapping[str, Array], others: Mapping[str, Array]) -> bool:
    """Whether two dicts hold the very same arrays by the same names."""
    return some.keys() == others.keys() and all(array is others[name] for name, array in some.items())


class BlockWeightEMA(WeightEMA):
    """:class:`minunet.training.optim.WeightEMA` on NumPy arrays that are contiguous."""

    def __init__(self, values: Mapping[str, Array], max_decay: float = 0.999) -> None:
        super().__init__(values, max_decay)
        self._plain = WeightEMA({}, max_decay)
        self._plain.average = blocks_of(self.average)

    def update(self, values: Mapping[str, Array]) -> None:
        """As :meth:`minunet.training.optim.WeightEMA.update`."""
        self._plain.updates = self.updates
        self._plain.update(blocks_of({name: values[name] for name in self.average}))
        self.updates = self._plain.updates


def clip_by_team(team: Team, shared: Arrays, max_norm: float) -> float:
    """:func:`minunet.training.optim.clip_by_global_norm` of the team's gradients, in place. Returns the old norm."""
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    team.run(["adamw", "add_squares"])
    norm = math.sqrt(sum(shared["squares:"].tolist()))
    if max_norm < norm < math.inf:
        team.run(["adamw", "scale", max_norm / norm])
    return norm


def sum_of_squares(block: Array) -> float:
    """In float64: squares of float32 soon overflow."""
    wide = block.astype(np.float64)
    return (wide * wide).sum().item()
