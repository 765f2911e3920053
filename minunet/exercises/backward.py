"""What every hand-written backward is held to: the values, by the complex step; and the rules of all ops.

The expected gradients come from the forward pass alone (:mod:`minunet.gradcheck`): each number of each input is
moved by 1e-20 along the imaginary axis. The upstream gradient ``dy`` is random. Beside the values, as in
tests/ops/test_contract.py: shape and dtype; ``dy`` and the cache stay as they are; no result shares memory with them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minunet import gradcheck
from minunet.exercises.exercise import Exercise, NotYet, require_array, require_equal, require_tuple
from minunet.exercises.learner import Learner

#: A cause in words, and a backward with this mistake: ``(dy, cache) -> gradient``, or ``(cache) -> gradient``.
WrongBackward = Mapping[str, Callable[..., np.ndarray]]


@dataclass(frozen=True)
class Case:
    """One call of forward. ``inputs`` are differentiated, in the order of the results; ``options`` are held fixed."""

    inputs: dict[str, np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Backward:
    """A backward to write, and how it is checked.

    mistakes: for each result, such as "dx", backwards that are wrong in a known way.
    blocked_nan: whether a NaN of dy has to vanish where nothing passes: the gradient is chosen, not multiplied.
    """

    function: str
    forward: Callable[..., tuple[Any, Any]]
    reference: Callable[..., Any]  # minunet's own, for what the complex step does not say
    results: tuple[str, ...]
    cases: tuple[Case, ...]
    mistakes: Mapping[str, WrongBackward]
    blocked_nan: bool = False

    def exercise(self, name: str, title: str, hints: tuple[str, str, str]) -> Exercise:
        """The exercise that has this check."""
        return Exercise(name, title, (self.function,), hints, self.check)

    def check(self, learner: Learner) -> list[str]:
        """Raise NotYet at the first thing that is wrong; else say what was found right."""
        compared, error = 0, 0.0
        for seed, case in enumerate(self.cases):
            report = self._check_values(learner, case, seed)
            compared, error = compared + len(report.comparisons), max(error, report.error)
        self._check_float32(learner, self.cases[0])
        if self.blocked_nan:
            self._check_blocked_nan(learner, self.cases[0])
        return [
            f"{', '.join(self.results)}: {compared} numbers agree with the complex step, largest error {error:.0e}",
            "the upstream gradient and the cache are as they were, and no result shares memory with them",
            "float32 stays float32" + (", and a NaN does not pass where nothing passes" if self.blocked_nan else ""),
        ]

    def _check_values(self, learner: Learner, case: Case, seed: int) -> gradcheck.Report:
        calls = []

        def backward(*arguments: Any) -> tuple[np.ndarray, ...]:
            gradients = self._call(learner, arguments, case.inputs)
            calls.append((arguments, gradients))
            return gradients

        # Every number of every input is compared: the inputs are small, and the learner wants to see which is wrong.
        sampling = {"exhaustive": 10**6, "together": 0}
        report = gradcheck.check_op(self.forward, backward, case.inputs, seed=seed, sampling=sampling, **case.options)
        if report.ok():
            return report
        arguments, gradients = calls[0]
        expected = {name: np.zeros(x.shape) for name, x in case.inputs.items()}
        for comparison in report.comparisons:
            expected[comparison.name][comparison.index] = comparison.numeric
        largest = max(np.abs(gradient).max() for gradient in expected.values())
        for result, gradient, right in zip(self.results, gradients, expected.values(), strict=True):
            mistakes = {}
            for cause, wrong in self.mistakes.get(result, {}).items():
                try:
                    with np.errstate(all="ignore"):
                        mistakes[cause] = wrong(*arguments)
                except (ValueError, IndexError):  # this mistake does not run on these shapes
                    continue
            what = f"{result} of {self.function}, on {describe(case)}"
            # Several gradients may be of very different size: the tolerance is that of the report, over all of them.
            tolerance = gradcheck.TOLERANCE * largest / (np.abs(right).max() or 1.0)
            require_equal(what, gradient, right, mistakes, sizes(arguments, case), tolerance)
        raise NotYet(self.function, found=str(report))  # pragma: no cover - one of the results must have differed

    def _call(self, learner: Learner, arguments: tuple[Any, ...], inputs: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        """The learner's gradients, which have the right number, shapes and dtype, and have changed nothing."""
        before = snapshot(arguments)
        returned = learner.call(self.function, *arguments)
        if len(self.results) == 1:
            if isinstance(returned, tuple):
                raise NotYet(
                    self.function, expected=f"one array, {self.results[0]}", found=f"a tuple of {len(returned)}"
                )
            gradients = (returned,)
        else:
            gradients = require_tuple(self.function, returned, ", ".join(self.results))
        if snapshot(arguments) != before:
            is_dy = len(arguments) == 2 and snapshot(arguments[:1]) != before[:1]
            changed = "dy, the upstream gradient," if is_dy else "the cache"
            raise NotYet(
                self.function,
                expected=f"{changed} as it was before the call",
                found="other numbers in it",
                cause="an operation in place (+=, x[...] = ...) on an array that belongs to the caller, or on a view "
                "of "
                "it: with a skip connection the same array is used twice. Work on a copy",
            )
        for result, gradient, x in zip(self.results, gradients, inputs.values(), strict=True):
            require_array(f"{result} of {self.function}", gradient, x.shape, x.dtype)
            if any(np.shares_memory(gradient, array) for array in arrays_in(arguments)):
                raise NotYet(
                    f"{result} of {self.function}",
                    expected="memory of its own",
                    found="memory shared with dy or with the cache",
                    cause="a view was returned, or the array itself: who changes the one changes the other. Return a "
                    "copy",
                )
        for i, gradient in enumerate(gradients):
            if any(np.shares_memory(gradient, other) for other in gradients[:i]):
                raise NotYet(self.function, expected="results with memory of their own", found="two that share theirs")
        return gradients

    def _check_float32(self, learner: Learner, case: Case) -> None:
        inputs, options = cast(case.inputs, np.float32), cast(case.options, np.float32)
        y, cache = self.forward(**inputs, **options)
        dy = np.random.default_rng(0).standard_normal(y.shape).astype(np.float32)
        arguments = (cache,) if y.ndim == 0 else (dy, cache)
        gradients = self._call(learner, arguments, inputs)
        expected = self.reference(*arguments)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for result, gradient, right in zip(self.results, gradients, expected, strict=True):
            require_equal(f"{result} of {self.function}, in float32", gradient, right, tolerance=1e-4)

    def _check_blocked_nan(self, learner: Learner, case: Case) -> None:
        y, cache = self.forward(**case.inputs, **case.options)
        dy = np.full(y.shape, np.nan)
        (gradient,) = self._call(learner, (dy, cache), case.inputs)
        multiplied = "0 * NaN is NaN: the gradient is multiplied by a mask where it has to be chosen, as np.where does"
        require_equal(
            f"{self.results[0]} of {self.function}, where dy is NaN",
            gradient,
            self.reference(dy, cache),
            {multiplied: np.full(gradient.shape, np.nan)},
        )


def describe(case: Case) -> str:
    """The call in a few words: shapes and options.

    >>> describe(Case({"x": np.zeros((1, 2, 2, 1))}, {"size": 2}))
    'x (1, 2, 2, 1), size=2'
    """

    def one(name: str, value: Any) -> str:
        return f"{name} {value.shape}" if isinstance(value, np.ndarray) else f"{name}={value}"

    return ", ".join(one(name, value) for name, value in {**case.inputs, **case.options}.items())


def sizes(arguments: tuple[Any, ...], case: Case) -> dict[str, int]:
    """Numbers with a name by which a gradient is often too large or too small."""
    x = case.options.get("x", next(iter(case.inputs.values())))
    n, height, width, channels = x.shape
    named = {
        "N*H*W*C, the number of values": n * height * width * channels,
        "N*H*W, the number of values of a channel": n * height * width,
        "H*W, the number of pixels": height * width,
        "N, the number of images": n,
    }
    if len(arguments) == 2:
        named["the number of values of dy"] = arguments[0].size
        named["the number of pixels of dy, over all images"] = arguments[0][..., 0].size
    return {name: size for name, size in named.items() if size > 1}


def arrays_in(value: Any) -> list[np.ndarray]:
    """All arrays in nested tuples (caches are named tuples)."""
    if isinstance(value, np.ndarray):
        return [value]
    return [array for part in value for array in arrays_in(part)] if isinstance(value, tuple) else []


def snapshot(value: tuple[Any, ...]) -> list[list[tuple[tuple[int, ...], bytes]]]:
    """For each part of ``value`` its arrays, as something that is equal only if every bit is."""
    return [[(array.shape, array.tobytes()) for array in arrays_in((part,))] for part in value]


def cast(arrays: Mapping[str, Any], dtype: type) -> dict[str, Any]:
    """``arrays`` with those that are floating in ``dtype``."""
    return {
        name: value.astype(dtype) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
        for name, value in arrays.items()
    }
