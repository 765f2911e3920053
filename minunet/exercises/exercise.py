"""What an exercise is, and how it says what was expected and what came.

A check that only says "wrong" teaches nothing. So a wrong array is compared with the arrays that typical mistakes
give on the same input: if one of them fits to the last digits, that mistake is the likely cause, and is named.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


class NotYet(Exception):
    """The solution is not right yet. The message says what was checked, what was expected, what came, and why."""

    def __init__(self, what: str, *, cause: str = "", **lines: object) -> None:
        """``lines`` are further lines by their heading, such as ``expected=...`` and ``found=...``."""
        shown = {"checked": what, **{name: str(value) for name, value in lines.items()}}
        if cause:
            shown["likely cause"] = cause
        self.cause = cause
        super().__init__("\n".join(f"  {name:<13} {value}" for name, value in shown.items()))


@dataclass(frozen=True)
class Exercise:
    """One exercise. ``check`` gets the learner's file and returns what it found right, or raises :class:`NotYet`."""

    name: str
    title: str  # one line for the list
    functions: tuple[str, ...]  # what the learner's file must define
    hints: tuple[str, str, str]  # from a nudge to nearly the solution
    check: Callable[[Any], list[str]]


#: A cause in words, and the array that a solution with this mistake gives.
Mistakes = Mapping[str, "np.ndarray | np.floating"]

#: Two arrays that were computed by one formula differ by rounding only: by less than this, of the largest value.
ROUNDING = 1e-9


@np.errstate(all="ignore")
def same(a: np.ndarray, b: np.ndarray, tolerance: float = ROUNDING) -> bool:
    """Whether two arrays of one shape differ by at most ``tolerance`` of the largest value of ``b``; NaN equals NaN."""
    if a.shape != b.shape:
        return False
    finite = np.isfinite(b)
    if not (np.isfinite(a[finite]).all() and np.array_equal(a[~finite], b[~finite], equal_nan=True)):
        return False
    largest = np.abs(b[finite]).max(initial=0.0)
    return bool(np.abs(a[finite] - b[finite]).max(initial=0.0) <= tolerance * largest)


def require_tuple(what: str, found: Any, names: str) -> tuple[Any, ...]:
    """``found``, if it is a tuple of as many things as ``names`` ("dx, dgamma, dbeta") has; else raise NotYet."""
    if isinstance(found, tuple) and len(found) == len(names.split(", ")):
        return found
    shown = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
    cause = "the function has no return statement" if found is None else ""
    raise NotYet(what, expected=f"a tuple ({names})", found=shown, cause=cause)


def require_number(what: str, found: Any) -> np.float64:
    """``found`` as a number, if it is one; else raise NotYet."""
    if isinstance(found, float | int | np.floating | np.integer):
        return np.float64(found)
    cause = "the function has no return statement" if found is None else ""
    raise NotYet(what, expected="a number", found=type(found).__name__, cause=cause)


def require_array(what: str, found: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Raise :class:`NotYet` unless ``found`` is a NumPy array (or NumPy number) of this shape and dtype."""
    if not isinstance(found, np.ndarray | np.generic):
        cause = "the function has no return statement" if found is None else ""
        raise NotYet(what, expected=f"an array of shape {shape}", found=type(found).__name__, cause=cause)
    if found.shape != shape:
        cause = ""
        if sorted(found.shape) == sorted(shape):
            cause = "axes are exchanged: the right lengths in the wrong order"
        elif found.ndim == len(shape) > 0 and all(f >= s for f, s in zip(found.shape, shape, strict=True)):
            cause = "too large: was padding left on it, which has to be cut off?"
        elif found.ndim < len(shape):
            cause = "an axis is gone: a sum or a mean runs over too many axes"
        raise NotYet(what, expected=f"shape {shape}", found=f"shape {found.shape}", cause=cause)
    if found.dtype != dtype:
        raise NotYet(
            what,
            expected=f"dtype {np.dtype(dtype)}",
            found=f"dtype {found.dtype}",
            cause="a new array was made without a dtype, or a wider array took part: the result has the dtype of the "
            "input",
        )


def require_equal(
    what: str,
    found: Any,
    expected: np.ndarray | np.floating,
    mistakes: Mistakes | None = None,
    sizes: Mapping[str, int] | None = None,
    tolerance: float = ROUNDING,
    cause: str | None = None,
) -> None:
    """Raise :class:`NotYet` unless ``found`` is ``expected``: shape, dtype, and every number but for rounding.

    ``mistakes`` are compared with what was found, in their order; ``sizes`` name numbers, such as N, by which a
    result may be too large or too small. A ``cause`` that is given is told instead of a guess.
    """
    require_array(what, found, expected.shape, expected.dtype)
    found, expected = np.asarray(found), np.asarray(expected)
    if same(found, expected, tolerance):
        return
    with np.errstate(all="ignore"):
        difference = np.where(np.isnan(found) & np.isnan(expected), 0.0, np.abs(found - expected))
    worst = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), expected.shape)
    index = [int(i) for i in worst]
    wrong = int((~(difference <= tolerance * np.abs(expected[np.isfinite(expected)]).max(initial=0.0))).sum())
    raise NotYet(
        what,
        **({"at": f"{index}, one of {wrong} numbers of {expected.size} that differ"} if index else {}),
        expected=f"{expected[worst]:.10g}",
        found=f"{found[worst]:.10g}",
        cause=likely_cause(found, expected, mistakes or {}, sizes or {}) if cause is None else cause,
    )


@np.errstate(all="ignore")
def likely_cause(found: np.ndarray, expected: np.ndarray, mistakes: Mistakes, sizes: Mapping[str, int]) -> str:
    """The mistake whose result is ``found``; else what can be seen from the numbers alone; else nothing.

    >>> likely_cause(np.array([4.0, 8.0]), np.array([1.0, 2.0]), {}, {"N": 4})
    'every number is 4 times what it should be, and 4 is N'
    """
    for cause, result in mistakes.items():
        if same(found, np.asarray(result)) and not same(np.asarray(result), expected):
            return cause
    if same(found, expected):
        return "nearly right: something was rounded on the way, to float32 for instance, or a tiny term is too much"
    if not np.isfinite(found).all():
        return "NaN or infinity: a division by 0, 0 * NaN, or memory that was allocated and never filled (np.empty)"
    if not found.any():
        return "all zeros: was the result allocated and never filled?"
    if not expected.any():
        return "everything here should be 0"
    ratio = float((found * expected).sum() / (expected * expected).sum())
    if same(found, ratio * expected) and (known := _known_ratio(ratio, sizes)):
        return known
    if found.size > 1 and same(found, ratio * expected):
        return f"every number is {ratio:.6g} times what it should be"
    if found.size > 1 and same(found, found.ravel()[0] * np.ones_like(found)):
        return "one and the same number everywhere"
    if found.size > 1 and same(found - expected, (found - expected).ravel()[0] * np.ones_like(found)):
        return "off by the same amount everywhere: a term that is added to every number is missing, or too much"
    for axis in range(expected.ndim):
        if same(found, np.flip(expected, axis)):
            return f"the right numbers, reversed along axis {axis}"
    if same(np.sort(found, axis=None), np.sort(expected, axis=None)):
        return "the right numbers at the wrong places"
    return ""


def _known_ratio(ratio: float, sizes: Mapping[str, int]) -> str:
    if abs(ratio + 1) < ROUNDING:
        return "the sign: every number is minus what it should be"
    for name, size in sizes.items():
        if abs(ratio / size - 1) < ROUNDING:
            return f"every number is {size} times what it should be, and {size} is {name}"
        if abs(ratio * size - 1) < ROUNDING:
            return f"every number is 1/{size} of what it should be, and {size} is {name}"
    return ""
