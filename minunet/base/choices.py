"""Choices: a ``Literal`` type says which names there are, and a name is checked against it once, where it enters."""

from typing import Any, get_args


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError, naming the argument ``name``, unless ``value`` is one of ``choices``, a ``Literal`` type.

    >>> from typing import Literal
    >>> check_choice("device", "tpu", Literal["auto", "cpu", "cuda"])
    Traceback (most recent call last):
        ...
    ValueError: device must be 'auto', 'cpu' or 'cuda', got 'tpu'
    """
    if value not in get_args(choices):
        *most, last = map(repr, get_args(choices))
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, got {value!r}")
