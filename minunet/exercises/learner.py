"""The learner's file: read it, call its functions, show the line that raised."""

import sys
import traceback
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from minunet.base.errors import UserError
from minunet.exercises.exercise import NotYet, require_tuple

_MODULE = "minunet_exercise"  # the name under which the file runs; not "__main__", so that it shows no symptom


class Learner:
    """A file that was run, whose functions can be called.

    Raises UserError if the file is missing, cannot be read, raises when it is run, or lacks one of ``functions``.
    """

    def __init__(self, path: Path, functions: tuple[str, ...]) -> None:
        self.path = path
        self._module = _run(path)
        for name in functions:
            if not callable(getattr(self._module, name, None)):
                raise UserError(f"{path}: has no function {name}, which this exercise calls; keep the starter's names")

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """What the learner's function returns. Raises NotYet, with the line of theirs that raised, if it does."""
        return self._call(name, getattr(self._module, name), *arguments, **options)

    def call_for(self, results: str, name: str, *arguments: Any, **options: Any) -> tuple[Any, ...]:
        """The same of a function that has to return a tuple, of what ``results`` ("theta, m, v") names."""
        return require_tuple(name, self.call(name, *arguments, **options), results)

    def call_method(self, owner: Any, name: str, *arguments: Any) -> Any:
        """The same of a method of an object that the learner's class has made."""
        return self._call(name, self.attribute(owner, name), *arguments)

    def attribute(self, owner: Any, name: str) -> Any:
        """An attribute of such an object. Raises NotYet if it has none of this name."""
        if not hasattr(owner, name):
            raise NotYet(type(owner).__name__, expected=f"an attribute {name}, as in the starter", found="none")
        return getattr(owner, name)

    def _call(self, name: str, function: Any, *arguments: Any, **options: Any) -> Any:
        try:
            with np.errstate(all="ignore"):  # a NaN is found by the check, which can say more than a warning
                return function(*arguments, **options)
        except NotImplementedError:
            raise NotYet(name, found="not written yet", cause="the task is at the top of the file") from None
        except (Exception, SystemExit) as error:
            number, line = _own_line(error.__traceback__, self.path)
            message = str(error).partition("\n")[0]
            where = f"line {number}: {line}" if number else "the call itself: are the arguments those of the starter?"
            raise NotYet(f"a call of {name}", raised=f"{type(error).__name__}: {message}", at=where) from error


def _run(path: Path) -> ModuleType:
    try:
        source = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: not found, write one to begin with: python -m minunet.exercises start NAME") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason}), give a Python file") from None
    module = ModuleType(_MODULE)
    module.__file__ = str(path)
    sys.modules[_MODULE] = module  # dataclasses look their module up there
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes
        number, _ = _own_line(error.__traceback__, path)
        number = getattr(error, "lineno", None) or number
        raise UserError(f"{path}, line {number}: {_message(error)}, mend that first") from None
    except (Exception, SystemExit) as error:
        number, line = _own_line(error.__traceback__, path)
        raise UserError(f"{path}, line {number}: {_message(error)} in: {line}; mend that first") from None
    return module


def _message(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}"


def _own_line(trace: TracebackType | None, path: Path) -> tuple[int, str]:
    """The number and the text of the last line of ``path`` in a traceback; (0, "") if none of them is in it."""
    own = [frame for frame in traceback.extract_tb(trace) if frame.filename == str(path)]
    return (own[-1].lineno or 0, own[-1].line or "") if own else (0, "")
