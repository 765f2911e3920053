"""The optimiser and what goes with it: AdamW, a learning-rate schedule, gradient clipping, an average of the weights.

Everything is a dict of arrays by name, the names of ``UNet.parameters()``.

Derivation: docs/derivations/adamw.md. Sources: Kingma & Ba 2015, "Adam", algorithm 1; Loshchilov & Hutter 2019,
"Decoupled weight decay regularization", algorithm 2; Loshchilov & Hutter 2017, "SGDR" (cosine); Pascanu,
Mikolov & Bengio 2013, "On the difficulty of training recurrent neural networks", algorithm 1 (clipping).
"""

import math
from collections.abc import Collection, Mapping

from minunet.base.backend import Array, accumulation_dtype, array_module
from minunet.network.layers import Arrays

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-7, 0.004  # Keras' defaults


class AdamW:
    """Adam with decoupled weight decay, on the arrays of ``parameters``, which :meth:`step` changes in place.

        theta <- theta - lr * weight_decay * theta
        m     <- beta1 * m + (1 - beta1) * g              the mean of the gradients
        v     <- beta2 * v + (1 - beta2) * g^2            the mean of their squares
        theta <- theta - lr * m_hat / (sqrt(v_hat) + eps)

    where m_hat = m / (1 - beta1^t) and v_hat = v / (1 - beta2^t) undo that m and v started at 0. The decay is
    not part of the gradient: otherwise it would be divided by sqrt(v_hat), and weights with large gradients
    would hardly decay. The names in ``no_decay`` do not decay. Defaults are Keras' (which adds eps before it
    corrects v, a difference of order eps).

    Raises ValueError for numbers out of range, for names in ``no_decay`` that no parameter has, and for parameters that
    are not float32 or float64: in float16 the squares of small gradients are 0, and the steps far too large.

    >>> import numpy as np
    >>> theta = {"w": np.array([1.0, -1.0])}
    >>> AdamW(theta, lr=0.1, weight_decay=0.0).step({"w": np.array([5.0, -0.01])})
    >>> theta["w"].round(4)  # the first step is lr against the sign, whatever the gradient's size
    array([ 0.9, -0.9])
    """

    def __init__(
        self,
        parameters: Arrays,
        lr: float = 1e-3,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        weight_decay: float = WEIGHT_DECAY,
        no_decay: Collection[str] = (),
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        for name, parameter in parameters.items():
            if parameter.dtype not in ("float32", "float64"):
                raise ValueError(f"parameters must be float32 or float64, got {parameter.dtype} for {name}")
        if unknown := set(no_decay) - parameters.keys():
            raise ValueError(f"no_decay names parameters that do not exist: {sorted(unknown)}")
        self.parameters = parameters
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.no_decay = frozenset(no_decay)
        self.steps = 0
        self.first_moment = {name: array_module(p).zeros_like(p) for name, p in parameters.items()}
        self.second_moment = {name: array_module(p).zeros_like(p) for name, p in parameters.items()}

    def step(self, grads: Mapping[str, Array], lr: float | None = None) -> None:
        """Change every parameter by its gradient, at learning rate ``lr`` (that of the constructor if None).

        Raises ValueError if the names of ``grads`` are not those of the parameters.
        """
        self._check_names(grads)
        self.steps += 1
        for name, theta in self.parameters.items():
            decay = 0.0 if name in self.no_decay else self.weight_decay
            arrays = theta, grads[name], self.first_moment[name], self.second_moment[name]
            self._update(*arrays, self.lr if lr is None else lr, decay)

    def _update(self, theta: Array, g: Array, m: Array, v: Array, lr: float, weight_decay: float) -> None:
        adamw_update(theta, g, m, v, self.steps, lr, self.betas, self.eps, weight_decay)

    def _check_names(self, grads: Mapping[str, Array]) -> None:
        if wrong := sorted(grads.keys() ^ self.parameters.keys()):
            raise ValueError(f"grads must name every parameter, and no other: {wrong}")


def adamw_update(
    theta: Array,
    g: Array,
    m: Array,
    v: Array,
    t: int,
    lr: float,
    betas: tuple[float, float] = BETAS,
    eps: float = EPS,
    weight_decay: float = WEIGHT_DECAY,
) -> None:
    """Step ``t`` of :class:`AdamW`, from 1, for one parameter: changes ``theta`` and its moments in place."""
    beta1, beta2 = betas
    if weight_decay > 0:
        theta -= lr * weight_decay * theta
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * g * g
    # Where the gradient stays 0, in a dead channel, the moments shrink to denormal numbers, and by rounding get
    # stuck there; a processor is many times slower on these. So below the smallest normal number they are 0.
    for moment in (m, v):
        moment *= abs(moment) >= float(array_module(m).finfo(m.dtype).tiny)
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    theta -= lr * m_hat / (array_module(v).sqrt(v_hat) + eps)


def norms_and_biases(parameters: Mapping[str, Array]) -> set[str]:
    """The names that usually do not decay: scales and shifts of batch norms, and biases.

    Decay is there to keep functions simple, and these have no part in that; a gamma pulled to 0 only loses signal.

    >>> sorted(norms_and_biases({"head.weight": 0, "head.bias": 0, "down1.norm1.gamma": 0}))
    ['down1.norm1.gamma', 'head.bias']
    """
    return {name for name in parameters if name.rpartition(".")[2] in ("bias", "gamma", "beta")}


def named(parameters: Mapping[str, Array], parts: Collection[str] | None) -> Arrays:
    """Those of ``parameters`` that are called as one of ``parts``, or that begin so before a dot; all if it is None.

    Raises ValueError for a part that names none, and lists what there is.

    >>> sorted(named({"up1.up.weight": 0, "up10.up.weight": 0, "head.bias": 0}, ("up1", "head.bias")))
    ['head.bias', 'up1.up.weight']
    """
    if parts is None:
        return dict(parameters)
    for part in parts:
        if not any(_is_part(part, name) for name in parameters):
            there_are = ", ".join(dict.fromkeys(name.partition(".")[0] for name in parameters))
            raise ValueError(
                f"{part!r:.80} names no part of the network; there are {there_are}, and what is in them, "
                f"such as {next(iter(parameters))}"
            )
    return {name: array for name, array in parameters.items() if any(_is_part(part, name) for part in parts)}


def _is_part(part: str, name: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def warmup_cosine(step: int, total_steps: int, peak: float, warmup_steps: int = 0, final: float = 0.0) -> float:
    """The learning rate of ``step``, from 0: a straight line up to ``peak``, then half a cosine down to ``final``.

    The first step has peak / warmup_steps, step ``warmup_steps`` has the peak, step ``total_steps`` has ``final``.
    Raises ValueError unless 0 <= warmup_steps < total_steps and step >= 0.

    >>> [warmup_cosine(step, total_steps=6, peak=1.0, warmup_steps=2) for step in (0, 1, 2, 4, 6)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must be in [0, total_steps = {total_steps}), got {warmup_steps}")
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def clip_by_global_norm(grads: Mapping[str, Array], max_norm: float) -> tuple[Arrays, float]:
    """``grads`` scaled down so that their norm, taken over all arrays together, is at most ``max_norm``.

    The direction stays. Returns the gradients (the same arrays, if nothing had to be done) and the norm that
    they had: NaN or infinite if a gradient is. Raises ValueError unless max_norm is positive.

    >>> import numpy as np
    >>> clip_by_global_norm({"a": np.array([3.0]), "b": np.array([4.0])}, max_norm=1.0)
    ({'a': array([0.6]), 'b': array([0.8])}, 5.0)
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    wide = (g.astype(accumulation_dtype(g.dtype)) for g in grads.values())  # squares of float32 soon overflow
    norm = math.sqrt(sum((g * g).sum().item() for g in wide))
    if not max_norm < norm < math.inf:
        return dict(grads), norm
    return {name: g * (max_norm / norm) for name, g in grads.items()}, norm


class WeightEMA:
    """An exponential moving average of the weights, and of the running statistics that belong to them.

        average <- decay * average + (1 - decay) * value,     decay = min(max_decay, (1 + t) / (10 + t))

    It averages the noise of the last steps away and usually predicts better than the weights themselves.
    The decay grows with the number of updates t, so that the first, poor weights are soon forgotten.

    >>> import numpy as np
    >>> w = {"w": np.array([0.0])}
    >>> ema = WeightEMA(w)
    >>> w["w"][...] = 10.0
    >>> ema.update(w)
    >>> ema.average["w"].round(6)  # decay 2/11 at t = 1
    array([8.181818])
    """

    def __init__(self, values: Mapping[str, Array], max_decay: float = 0.999) -> None:
        if not 0 <= max_decay < 1:
            raise ValueError(f"max_decay must be in [0, 1), got {max_decay}")
        self.max_decay = max_decay
        self.updates = 0
        self.average = {name: value.copy() for name, value in values.items()}

    def update(self, values: Mapping[str, Array]) -> None:
        """Move the average towards ``values``, which have the names that the constructor saw, and perhaps more."""
        self.updates += 1
        decay = min(self.max_decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self.average.items():
            self._move(average, values[name], decay)

    def _move(self, average: Array, value: Array, decay: float) -> None:
        average[...] = decay * average + (1 - decay) * value
