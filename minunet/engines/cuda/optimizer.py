"""AdamW and the average of the weights, each in one launch for all parameters.

Specification: minunet.training.optim. There each parameter costs some twenty launches of a few microseconds; a hundred
parameters then take longer than a training step on a small batch. Here one kernel walks over a table of all of them.
"""

from collections.abc import Mapping
from typing import Any

from minunet.base.backend import Array
from minunet.engines.cuda.specification import SpecificationKernels
from minunet.network.layers import Arrays
from minunet.training.optim import AdamW, WeightEMA


class MultiTensorAdamW(AdamW):
    """:class:`minunet.training.optim.AdamW`, its step by ``kernels``."""

    def __init__(self, kernels: SpecificationKernels, parameters: Arrays, lr: float, **options: Any) -> None:
        super().__init__(parameters, lr, **options)
        self.kernels = kernels
        self._table: Any = None
        self._grads: Mapping[str, Array] | None = None
        self._decays = [0.0 if name in self.no_decay else self.weight_decay for name in parameters]

    def step(self, grads: Mapping[str, Array], lr: float | None = None) -> None:
        self._check_names(grads)
        if self._grads is not grads:  # an engine's gradients are the same arrays each time
            columns = (self.parameters, grads, self.first_moment, self.second_moment)
            self._table = self.kernels.table([[column[name] for name in self.parameters] for column in columns])
            self._grads = grads
        self.steps += 1
        lr = self.lr if lr is None else lr
        self.kernels.adamw(self._table, lr, self.betas, self.eps, self.steps, self._decays)


class MultiTensorEMA(WeightEMA):
    """:class:`minunet.training.optim.WeightEMA`, its update by ``kernels``."""

    def __init__(self, kernels: SpecificationKernels, values: Arrays, max_decay: float = 0.999) -> None:
        super().__init__(values, max_decay)
        self.kernels = kernels
        self._arrays = list(values.values())  # a training's: changed in place, so that the table stays right
        self._table = kernels.table([list(self.average.values()), self._arrays])

    def update(self, values: Mapping[str, Array]) -> None:
        self.updates += 1
        decay = min(self.max_decay, (1 + self.updates) / (10 + self.updates))
        self.kernels.lerp(self._table, decay)
