"""Lab timid: the sigmoid is gone through twice."""

import numpy as np

from minunet.exercises.exercise import Exercise, require_equal, require_number
from minunet.exercises.learner import Learner
from minunet.ops.bce_with_logits import bce_with_logits_forward


def _sigmoid(z: np.ndarray) -> np.ndarray:
    result: np.ndarray = 1 / (1 + np.exp(-z))
    return result


def check(learner: Learner) -> list[str]:
    """Raise NotYet unless probabilities, loss and slopes are those of one sigmoid."""
    rng = np.random.default_rng(0)
    for weight, bias in ((1.3, -0.4), (-2.0, 0.7)):
        x = 2 * rng.standard_normal(12)
        target = (rng.random(12) < 0.5).astype("float64")
        z = weight * x + bias
        p = _sigmoid(z)
        require_equal(
            "probabilities",
            learner.call("probabilities", x, weight, bias),
            p,
            {
                "still twice: the sigmoid of what is a probability already lies between 0.5 and 0.73": _sigmoid(p),
                "no sigmoid at all: these are the logits": z,
                "the probability of the other class": 1 - p,
            },
        )
        results = learner.call_for("loss, dweight, dbias", "loss_and_gradient", x, target, weight, bias)
        found = [
            require_number(f"a result of loss_and_gradient, number {n}", r) for n, r in enumerate(results, start=1)
        ]
        shape = (1, 1, 12, 1)
        loss, _ = bce_with_logits_forward(z.reshape(shape), target.reshape(shape))
        twice = _cross_entropy(_sigmoid(p), target)
        require_equal(
            "the loss",
            found[0],
            np.float64(loss),
            {
                "the loss still goes through the sigmoid twice": np.float64(twice),
                "a sum where it should be a mean": np.float64(loss * x.size),
                "the cross entropy of logits, which are no probabilities": np.float64(_cross_entropy(z, target)),
            },
        )
        step = 1e-20j  # the complex step, as in minunet.gradcheck
        slopes = {
            "dweight": np.imag(_cross_entropy(_sigmoid((weight + step) * x + bias), target)) / 1e-20,
            "dbias": np.imag(_cross_entropy(_sigmoid(z + step), target)) / 1e-20,
        }
        for place, (name, slope) in enumerate(slopes.items(), start=1):
            factor = x if name == "dweight" else np.ones(12)
            too_much = ((p - target) * p * (1 - p) * factor).mean()
            second = ((_sigmoid(p) - target) * factor).mean()
            mistakes = {
                "p (1 - p) is too much: p - t is the slope in z, with the sigmoid's own slope in it": np.float64(
                    too_much
                ),
                "the slope still comes from the sigmoid of the sigmoid": np.float64(second),
            }
            sizes = {"the number of pixels": x.size}
            require_equal(f"{name}", found[place], np.float64(slope), mistakes, sizes)
    return [
        "that was the cause: the last layer and the loss each applied a sigmoid, and the second saw only 0 to 1",
        "probabilities, loss and both slopes are those of one sigmoid",
    ]


def _cross_entropy(p: np.ndarray, target: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        result: np.ndarray = -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
    return result


EXERCISE = Exercise(
    name="timid",
    title="a network that is never sure",
    functions=("probabilities", "loss_and_gradient"),
    hints=(
        "0.5 and 0.73: which function has these values, and at which two places?",
        "sigmoid(0) = 0.5 and sigmoid(1) = 0.731. So what are the numbers that the last sigmoid is given?",
        "network ends in a sigmoid, and probabilities applies another one. One of the two has to go; the formula p - "
        "target "
        "holds for one sigmoid.",
    ),
    check=check,
)
