"""The optimiser's passes over all parameters, block by block: the same numbers in a third of the time.

Specification: :class:`minunet.training.optim.AdamW`, :class:`minunet.training.optim.WeightEMA` (the same bits) and
:func:`minunet.training.optim.clip_by_global_norm` (up to the order of the sum).

The idea: a step of AdamW passes some twenty times over each parameter, its gradient and its moments. In blocks that
fit the cache only the first of these passes reads from memory, and only the last one writes there.

And the blocks are shared out among the processes of a team (:class:`Update`), which takes the moments to lie in the
memory that all of them see.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from minunet.base.backend import Array
from minunet.engines.cpu.member import Member
from minunet.engines.cpu.team import Team
from minunet.network.layers import Arrays
from minunet.training.optim import AdamW, WeightEMA, adamw_update

BLOCK = 16_384  # values: 64 KiB of float32


def blocks_of(*arrays: Array) -> Iterator[list[Array]]:
    """Views of at most :data:`BLOCK` values of contiguous arrays of one size: those of the first block, and so on.

    >>> [(a.size, b.size) for a, b in blocks_of(np.zeros((3, 3, 64, 64)), np.zeros((3, 3, 64, 64)))]
    [(16384, 16384), (16384, 16384), (4096, 4096)]
    """
    flat = [array.reshape(-1) for array in arrays]
    for first in range(0, flat[0].size, BLOCK):
        yield [array[first : first + BLOCK] for array in flat]


def count_of_blocks(shapes: Iterable[tuple[int, ...]]) -> int:
    """How many blocks arrays of these shapes have.

    >>> count_of_blocks([(3, 3, 64, 64), (64,)])
    4
    """
    return sum(-(-prod(shape) // BLOCK) for shape in shapes)


class BlockAdamW(AdamW):
    """:class:`minunet.training.optim.AdamW` on NumPy arrays that are contiguous."""

    def _update(self, theta: Array, g: Array, m: Array, v: Array, lr: float, weight_decay: float) -> None:
        for theta_block, g_block, m_block, v_block in blocks_of(theta, g, m, v):
            super()._update(theta_block, g_block, m_block, v_block, lr, weight_decay)


class Parameters(NamedTuple):
    """What the optimiser reads and changes, by the parameters' names, in memory that all processes share."""

    values: Arrays
    grads: Arrays
    first_moment: Arrays
    second_moment: Arrays


class Update:
    """One process's share of what is done to all parameters: every second block, if the processes are two.

    ``squares`` has a place for the sum of squares of each block.
    """

    def __init__(self, parameters: Parameters, squares: np.ndarray, member: Member) -> None:
        self.mine, self.squares = slice(member.rank, None, member.size), squares
        every = [
            (name, block) for name in parameters.values for block in blocks_of(*(arrays[name] for arrays in parameters))
        ]
        self.blocks = every[self.mine]
        self.betas, self.eps, self.weight_decay, self.no_decay = (0.0, 0.0), 0.0, 0.0, frozenset[str]()

    def configure(self, betas: list[float], eps: float, weight_decay: float, no_decay: list[str]) -> None:
        """The options of :class:`minunet.training.optim.AdamW`."""
        self.betas, self.eps = (betas[0], betas[1]), eps
        self.weight_decay, self.no_decay = weight_decay, frozenset(no_decay)

    def step(self, number: int, lr: float) -> None:
        """Step ``number``, from 1."""
        for name, (theta, g, m, v) in self.blocks:
            decay = 0.0 if name in self.no_decay else self.weight_decay
            adamw_update(theta, g, m, v, number, lr, self.betas, self.eps, decay)

    def add_squares(self) -> None:
        """The sum of the squares of each block of the gradient."""
        self.squares[self.mine] = [sum_of_squares(g) for _, (_, g, _, _) in self.blocks]

    def scale(self, factor: float) -> None:
        """The gradient times ``factor``."""
        for _, (_, g, _, _) in self.blocks:
            g *= factor


class TeamAdamW(BlockAdamW):
    """AdamW on the parameters and moments that a team shares, a part by each of its processes."""

    def __init__(self, team: Team, parameters: Parameters, lr: float, **options: Any) -> None:
        empty = {name: array[:0] for name, array in parameters.values.items()}
        super().__init__(empty, lr, **options)  # which checks the options
        self.team = team
        self.parameters, self.grads, self.first_moment, self.second_moment = parameters
        betas, eps, decay = [float(beta) for beta in self.betas], float(self.eps), float(self.weight_decay)
        team.run(["adamw", "configure", betas, eps, decay, sorted(self.no_decay)])

    def step(self, grads: Mapping[str, Array], lr: float | None = None) -> None:
        """As :meth:`minunet.training.optim.AdamW.step`; of other gradients than the engine's, by this process alone."""
        if self.team.closed or not same_arrays(grads, self.grads):
            super().step(grads, lr)
            return
        self.team.run(["adamw", "step", self.steps + 1, float(self.lr if lr is None else lr)])
        self.steps += 1


def same_arrays(some: Mapping[str, Array], others: Mapping[str, Array]) -> bool:
    """Whether two dicts hold the very same arrays by the same names."""
    return some.keys() == others.keys() and all(array is others[name] for name, array in some.items())


class BlockWeightEMA(WeightEMA):
    """:class:`minunet.training.optim.WeightEMA` on NumPy arrays that are contiguous."""

    def _move(self, average: Array, value: Array, decay: float) -> None:
        for average_block, value_block in blocks_of(average, value):
            super()._move(average_block, value_block, decay)


def clip_by_team(team: Team, squares: np.ndarray, max_norm: float) -> float:
    """:func:`minunet.training.optim.clip_by_global_norm` of the team's gradients, in place. Returns the old norm."""
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    team.run(["adamw", "add_squares"])
    norm = math.sqrt(sum(squares.tolist()))
    if max_norm < norm < math.inf:
        team.run(["adamw", "scale", max_norm / norm])
    return norm


def sum_of_squares(block: Array) -> float:
    """In float64: squares of float32 soon overflow."""
    wide = block.astype(np.float64)
    return (wide * wide).sum().item()
