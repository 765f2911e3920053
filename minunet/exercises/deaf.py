"""Lab deaf: the gradient that comes across the skip is dropped."""

from collections.abc import Callable
from typing import Any

import numpy as np

from minunet import gradcheck
from minunet.exercises.exercise import Exercise, NotYet, require_equal
from minunet.exercises.learner import Learner
from minunet.exercises.starters import deaf as starter
from minunet.ops import concat_backward, conv2d_backward, conv_transpose2d_backward, max_pool2d_backward, relu_backward

_NAMES = (
    "head",
    "up",
    "conv2",
    "conv1",
)  # in the order of the backward pass: the first wrong one is nearest to the bug


def check(learner: Learner) -> list[str]:
    """Raise NotYet unless every gradient is that of the loss, by the complex step."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 4, 4, 1))
    parameters = starter.new_parameters(seed=3)
    logits, cache = learner.call_for("logits, cache", "forward", x, parameters)
    expected_logits, expected_cache = starter.forward(x, parameters)
    require_equal("the logits of forward (it was right: put it back)", logits, expected_logits, tolerance=1e-12)
    dlogits = rng.standard_normal(logits.shape)
    grads = learner.call("backward", dlogits, cache)
    if not isinstance(grads, dict) or grads.keys() != parameters.keys():
        found = sorted(grads) if isinstance(grads, dict) else type(grads).__name__
        raise NotYet("backward", expected=f"a dict with {', '.join(_NAMES)}", found=found)

    def function(**p: np.ndarray) -> np.ndarray:
        return (dlogits * starter.forward(x.astype(np.complex128), p)[0]).sum()

    wrong = starter.backward(dlogits, expected_cache)
    report = gradcheck.complex_step(function, parameters, wrong, exhaustive=10**6, together=0)
    for name in _NAMES:
        expected = np.zeros(parameters[name].shape)
        for comparison in report.comparisons:
            if comparison.name == name:
                expected[comparison.index] = comparison.numeric
        mistakes = _mistakes(dlogits, expected_cache) if name == "conv1" else {}
        require_equal(f"grads[{name!r}]", grads[name], expected, mistakes, tolerance=1e-10)
    return [
        "that was the cause: the skip's gradient was computed, and then overwritten by the one from below",
        "all four gradients agree with the complex step",
    ]


def _mistakes(dlogits: np.ndarray, cache: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the first layer's gradient would be with other things than the sum of both ways."""
    across = concat_backward(conv2d_backward(dlogits, cache["head"])[0], cache["concat"])[1]
    below = max_pool2d_backward(_below_pool(dlogits, cache), cache["pool"])

    def conv1(dskip: np.ndarray) -> np.ndarray:
        return conv2d_backward(relu_backward(dskip, cache["relu1"]), cache["conv1"])[1]

    combinations: dict[str, Callable[[], np.ndarray]] = {
        "the features are still told only what comes from below: they are used in the concat as well": lambda: below,
        "now the way down is dropped: what comes across is not all either": lambda: across,
        "the mean of what comes across and from below: gradients of two uses are added": lambda: (across + below) / 2,
        "what comes across is subtracted: gradients of two uses are added": lambda: below - across,
        "what comes across is counted twice": lambda: below + 2 * across,
        "what comes from below is counted twice": lambda: 2 * below + across,
    }
    return {cause: conv1(dskip()) for cause, dskip in combinations.items()}


def _below_pool(dlogits: np.ndarray, cache: dict[str, Any]) -> np.ndarray:
    """The gradient of what the pool has handed down."""
    dup, _ = concat_backward(conv2d_backward(dlogits, cache["head"])[0], cache["concat"])
    dx = conv_transpose2d_backward(dup, cache["up"])[0]
    return conv2d_backward(relu_backward(dx, cache["relu2"]), cache["conv2"])[0]


EXERCISE = Exercise(
    name="deaf",
    title="a network whose first layer does not listen",
    functions=("forward", "backward"),
    hints=(
        "Which layers are right? The bug lies between the first that is wrong and the last that is right, on the way "
        "back.",
        "In forward, which value is used in two places? What comes back to it from each of them, and which line joins "
        "the two?",
        "dskip comes out of the concat, and three lines later it is overwritten. It should be added to.",
    ),
    check=check,
)
