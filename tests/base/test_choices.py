"""Choices: what a Literal type allows passes, everything else is refused in one wording."""

import re
from typing import Literal

import pytest

from minunet.base.choices import check_choice

Two, Three = Literal["a", "b"], Literal["a", "b", "c"]


@pytest.mark.parametrize("value", ["a", "b", "c"])
def test_what_is_allowed_passes(value):
    assert check_choice("letter", value, Three) is None


@pytest.mark.parametrize(
    ("value", "choices", "message"),
    [
        ("c", Two, "letter must be 'a' or 'b', got 'c'"),
        ("d", Three, "letter must be 'a', 'b' or 'c', got 'd'"),
        ("A", Two, "letter must be 'a' or 'b', got 'A'"),
        ("", Two, "letter must be 'a' or 'b', got ''"),
        (None, Two, "letter must be 'a' or 'b', got None"),
        (["a"], Two, "letter must be 'a' or 'b', got ['a']"),
    ],
)
def test_everything_else_is_refused(value, choices, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_choice("letter", value, choices)
