"""Exercise adamw: the step itself, against minunet.training.optim.AdamW."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minunet.exercises.exercise import Exercise, NotYet, require_equal
from minunet.exercises.learner import Learner
from minunet.training.optim import AdamW


class State(NamedTuple):
    """What goes into a step, and comes out of it."""

    theta: np.ndarray
    m: np.ndarray
    v: np.ndarray


class Settings(NamedTuple):
    """The numbers of a run. eps and weight_decay are large here, so that a mistake with them can be seen."""

    lr: float = 0.03
    beta1: float = 0.8
    beta2: float = 0.95
    eps: float = 1e-2
    weight_decay: float = 0.4


Step = Callable[[State, np.ndarray, int, Settings], State]


def right(state: State, g: np.ndarray, t: int, s: Settings) -> State:
    """The step of minunet's own optimiser."""
    parameters = {"theta": state.theta.copy()}
    optimizer = AdamW(parameters, s.lr, (s.beta1, s.beta2), s.eps, s.weight_decay)
    optimizer.first_moment["theta"][...], optimizer.second_moment["theta"][...] = state.m, state.v
    optimizer.steps = t - 1
    optimizer.step({"theta": g})
    return State(parameters["theta"], optimizer.first_moment["theta"], optimizer.second_moment["theta"])


def _variant(
    decay: Callable[[np.ndarray, Settings], np.ndarray] = lambda theta, s: theta - s.lr * s.weight_decay * theta,
    update: Callable[[np.ndarray, np.ndarray, Settings], np.ndarray] = lambda m, v, s: s.lr * m / (np.sqrt(v) + s.eps),
    corrected: tuple[bool, bool] = (True, True),
    late: int = 0,
) -> Step:
    """A step in which one part is not as it should be."""

    def step(state: State, g: np.ndarray, t: int, s: Settings) -> State:
        m = s.beta1 * state.m + (1 - s.beta1) * g
        v = s.beta2 * state.v + (1 - s.beta2) * g * g
        t = t + late
        with np.errstate(all="ignore"):
            m_hat = m / (1 - s.beta1**t) if corrected[0] else m
            v_hat = v / (1 - s.beta2**t) if corrected[1] else v
            return State(decay(state.theta, s) - update(m_hat, v_hat, s), m, v)

    return step


def _with_settings(change: Callable[[Settings], Settings]) -> Step:
    return lambda state, g, t, s: right(state, g, t, change(s))


def _l2(state: State, g: np.ndarray, t: int, s: Settings) -> State:
    return right(state, g + s.weight_decay * state.theta, t, s._replace(weight_decay=0.0))


def _decay_afterwards(state: State, g: np.ndarray, t: int, s: Settings) -> State:
    theta, m, v = right(state, g, t, s._replace(weight_decay=0.0))
    return State(theta - s.lr * s.weight_decay * theta, m, v)


MISTAKES: dict[str, Step] = {
    "weight decay is part of the gradient (L2), where it is divided by sqrt(v_hat) with it: it stands apart": _l2,
    "weight decay is missing": _with_settings(lambda s: s._replace(weight_decay=0.0)),
    "the decay is not multiplied by lr": _variant(decay=lambda theta, s: theta - s.weight_decay * theta),
    "the decay has the wrong sign: weights grow": _variant(
        decay=lambda theta, s: theta + s.lr * s.weight_decay * theta
    ),
    "the decay is taken of theta after the step: it is taken of theta before": _decay_afterwards,
    "neither m nor v is corrected for having started at 0": _variant(corrected=(False, False)),
    "m is not corrected for having started at 0": _variant(corrected=(False, True)),
    "v is not corrected for having started at 0": _variant(corrected=(True, False)),
    "t is one too small: the first step is t = 1": _variant(late=-1),
    "t is one too large: t counts from 1 already": _variant(late=1),
    "eps stands inside of the root: it is added to sqrt(v_hat)": _variant(
        update=lambda m, v, s: s.lr * m / np.sqrt(v + s.eps)
    ),
    "eps is missing": _with_settings(lambda s: s._replace(eps=0.0)),
    "the root is missing: divide by sqrt(v_hat), not by v_hat": _variant(update=lambda m, v, s: s.lr * m / (v + s.eps)),
    "the step goes uphill: subtract it": _variant(update=lambda m, v, s: -s.lr * m / (np.sqrt(v) + s.eps)),
    "lr is missing in the step": _variant(update=lambda m, v, s: m / (np.sqrt(v) + s.eps)),
    "beta1 and beta2 are exchanged": _with_settings(lambda s: s._replace(beta1=s.beta2, beta2=s.beta1)),
}

_MISTAKES_OF_MOMENTS: dict[str, Step] = {
    "beta1 and beta2 are exchanged": _with_settings(lambda s: s._replace(beta1=s.beta2, beta2=s.beta1)),
    "weight decay is part of the gradient (L2): it stands apart": _l2,
    "g is not squared: v is the mean of the squares": lambda state, g, t, s: State(
        state.theta, state.m, s.beta2 * state.v + (1 - s.beta2) * g
    ),
    "beta and 1 - beta are exchanged: most of the old mean stays": lambda state, g, t, s: State(
        state.theta, (1 - s.beta1) * state.m + s.beta1 * g, (1 - s.beta2) * state.v + s.beta2 * g * g
    ),
    "the factor 1 - beta is missing: a mean, and not a sum": lambda state, g, t, s: State(
        state.theta, s.beta1 * state.m + g, s.beta2 * state.v + g * g
    ),
    "the old mean is not kept: the moment of this step alone": lambda state, g, t, s: State(
        state.theta, (1 - s.beta1) * g, (1 - s.beta2) * g * g
    ),
    "the corrected moment is returned: what is kept from step to step is the uncorrected one": lambda state, g, t, s: (
        State(state.theta, right(state, g, t, s).m / (1 - s.beta1**t), right(state, g, t, s).v / (1 - s.beta2**t))
    ),
}


def check(learner: Learner) -> list[str]:
    """Raise NotYet at the first thing that is wrong; else say what was found right."""
    for dtype in ("float64", "float32"):
        rng = np.random.default_rng(5)
        shape = (2, 3)
        theta = (rng.standard_normal(shape) + 2 * np.sign(rng.standard_normal(shape))).astype(dtype)
        # In the midst of a run first: at t = 1, where m and v are 0, several mistakes look alike.
        state = State(theta, rng.standard_normal(shape).astype(dtype), rng.random(shape).astype(dtype))
        for t in (4, 5, 1, 2):
            if t == 1:
                state = State(theta, np.zeros(shape, dtype), np.zeros(shape, dtype))
            g = (rng.standard_normal(shape) * np.array([0.1, 1.0, 10.0])).astype(dtype)
            state = _check_step(learner, state, g, t, Settings())
    return [
        "theta, m and v are those of minunet.training.optim.AdamW at the first steps and later, in float64 and float32"
    ]


def _check_step(learner: Learner, state: State, g: np.ndarray, t: int, settings: Settings) -> State:
    given = (*state, g)
    before = [array.tobytes() for array in given]
    found = learner.call_for("theta, m, v", "adamw_step", *state, g, t, **settings._asdict())
    if [array.tobytes() for array in given] != before:
        raise NotYet(
            "adamw_step",
            expected="theta, m, v and g as they were before the call",
            found="other numbers in them",
            cause="an operation in place, such as theta -= ...: here new arrays are returned",
        )
    expected = right(state, g, t, settings)
    for name in ("m", "v", "theta"):  # the moments first: theta is made of them
        mistakes = MISTAKES if name == "theta" else _MISTAKES_OF_MOMENTS
        with np.errstate(all="ignore"):
            results = {cause: getattr(step(state, g, t, settings), name) for cause, step in mistakes.items()}
        tolerance = 1e-12 if g.dtype == np.float64 else 1e-5
        what = f"{name} after step t = {t}, {g.dtype}"
        require_equal(what, found[State._fields.index(name)], getattr(expected, name), results, tolerance=tolerance)
    return expected


EXERCISE = Exercise(
    name="adamw",
    title="the optimiser's step, line by line",
    functions=("adamw_step",),
    hints=(
        "Four lines, and their order matters: theta decays; m and v take in g; they are corrected; theta moves.",
        "m = beta1 * m + (1 - beta1) * g, and v the same with beta2 and g * g. m_hat = m / (1 - beta1**t): at t = 1 "
        "that "
        "is g itself. What is returned, and kept for the next step, is m and not m_hat.",
        "theta = theta - lr * weight_decay * theta, then theta = theta - lr * m_hat / (sqrt(v_hat) + eps). New arrays: "
        "theta -= ... would write into the caller's.",
    ),
    check=check,
)
