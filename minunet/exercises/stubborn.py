"""Lab stubborn: weight decay as a part of the gradient."""

import numpy as np

from minunet.exercises.adamw import MISTAKES, Settings, State, right
from minunet.exercises.exercise import Exercise, require_equal
from minunet.exercises.learner import Learner

#: Those of the starter.
_SETTINGS = Settings(lr=0.02, beta1=0.9, beta2=0.999, eps=1e-7, weight_decay=0.5)


def check(learner: Learner) -> list[str]:
    """Raise NotYet unless the steps are those of AdamW."""
    rng = np.random.default_rng(0)
    state = State(rng.standard_normal(4), np.zeros(4), np.zeros(4))
    theta = state.theta.copy()
    optimizer = learner.call("Optimizer", theta, lr=_SETTINGS.lr, weight_decay=_SETTINGS.weight_decay)
    for t in range(1, 6):
        g = rng.standard_normal(4) * np.array([0.01, 0.1, 1.0, 10.0])
        expected = right(state, g, t, _SETTINGS)
        with np.errstate(all="ignore"):
            mistakes = {cause: step(state, g, t, _SETTINGS).theta for cause, step in MISTAKES.items()}
        mistakes["theta does not move: step has to change it in place, by -="] = state.theta
        learner.call_method(optimizer, "step", g.copy())
        require_equal(f"theta after step {t}", theta, expected.theta, mistakes, tolerance=1e-12)
        state = expected
    return [
        "that was the cause: the decay went into the gradient, and was divided by sqrt(v_hat) with it",
        "theta is that of minunet.training.optim.AdamW over five steps",
    ]


EXERCISE = Exercise(
    name="stubborn",
    title="weight decay that works on some weights only",
    functions=("Optimizer",),
    hints=(
        "Adam divides by the size of the gradients. What, here, is divided that should not be?",
        "Follow self.weight_decay * self.theta through the lines of step. By what is it divided in the end, for a "
        "weight "
        "with large gradients?",
        "The decay stands apart: theta -= lr * weight_decay * theta, before the step, and nothing of it in g "
        "(docs/derivations/adamw.md, Why the decay stands apart).",
    ),
    check=check,
)
