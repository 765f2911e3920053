"""Exercise relu: the gate that forward has set decides what goes back."""

import numpy as np

from minunet.exercises.backward import Backward, Case
from minunet.ops import relu_backward, relu_forward


def _cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(1)
    return tuple(Case({"x": rng.standard_normal(shape)}) for shape in ((2, 3, 4, 2), (1, 1, 5, 1)))


_MISTAKES = {
    "dx": {
        "dy goes back everywhere: where x <= 0 nothing may pass": lambda dy, cache: dy,
        "the gate alone, without dy: the upstream gradient is ignored": lambda dy, cache: cache.passed * 1.0,
        "the gate is inverted: dy goes back where x <= 0": lambda dy, cache: np.where(cache.passed, 0.0, dy),
        "the negative half is let through with a minus sign, as for abs(x)": lambda dy, cache: np.where(
            cache.passed, dy, -dy
        ),
        "relu(dy): the gate is set by the sign of dy, and it was set by the sign of x": lambda dy, cache: np.maximum(
            dy, 0.0
        ),
        "dy passes only where it is positive as well: the gate was set by x alone": lambda dy, cache: (
            np.maximum(dy, 0.0) * cache.passed
        ),
    }
}

_HINTS = (
    "Where x > 0, y is x. What is the slope of y there? And where x <= 0, where y is 0 whatever x is?",
    "dx has the shape of dy. Each of its numbers is either the number of dy at the same place, or 0.",
    "cache.passed is True where the gate was open. np.where(condition, a, b) takes a where the condition holds, else "
    "b.",
)

EXERCISE = Backward(
    function="relu_backward",
    forward=relu_forward,
    reference=relu_backward,
    results=("dx",),
    cases=_cases(),
    mistakes=_MISTAKES,
    blocked_nan=True,
).exercise("relu", "the first backward: one line", _HINTS)
