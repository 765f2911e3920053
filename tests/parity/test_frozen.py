"""minunet computes what PyTorch computed: the answers frozen in fixtures.npz, without PyTorch."""

import datetime

import numpy as np
import pytest

from tests.parity import report
from tests.parity.problems import FIXTURES, TOLERANCE, errors, load_fixtures, solve
from tests.strategies import OPS

FROZEN, MADE = load_fixtures()
CASES = [(name, dtype) for name, (_, answers) in FROZEN.items() for dtype in answers]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_minunet_is_pytorch(name, dtype):
    problem, answers = FROZEN[name]
    found = errors(solve(problem.cast(dtype)), answers[dtype])
    assert max(found.values()) <= TOLERANCE[dtype], found


def test_every_op_and_loss_is_among_them():
    assert {problem.settings.get("op") for problem, _ in FROZEN.values()} - {None} == {op.name for op in OPS}
    assert {problem.kind for problem, _ in FROZEN.values()} == {"op", "unet", "adamw", "training"}
    assert {name for name, dtype in CASES if dtype == "float64"} == FROZEN.keys()


def test_the_problems_are_what_they_should_be():
    adamw = FROZEN["adamw"].problem
    norms = FROZEN["adamw"].answers["float64"]["norms"]
    assert adamw.settings["steps"] == len(norms) == 100
    assert (norms > adamw.settings["clip"]).sum() > 20  # clipped
    assert (norms < adamw.settings["clip"]).sum() > 20  # and not
    rates = FROZEN["adamw"].answers["float64"]["learning_rates"]
    assert 0 < rates.argmax() < 99  # up, then down
    conv = FROZEN["conv2d-same_stride2"].problem
    assert (conv.arrays["inputs/x"].shape[1] - 3) % 2 == 1  # so that "same" pads one side more than the other
    assert FROZEN["unet-training"].answers["float64"]["gradients/x"].all()


def test_the_file_says_how_it_was_made_and_is_small():
    assert MADE["torch"].startswith("2.13.0")
    assert MADE["numpy"]
    assert datetime.date.fromisoformat(MADE["date"]).year >= 2026
    assert FIXTURES.stat().st_size < 500_000


def test_an_error_is_relative_to_the_largest_of_its_group():
    expected = {"y": np.array([4.0, 0.0]), "gradients/a": np.array([2.0]), "gradients/b": np.array(8.0)}
    found = {"y": np.array([4.0, 1.0]), "gradients/a": np.array([1.0]), "gradients/b": np.array(8.0)}
    assert errors(found, expected) == {"y": 1 / 4, "gradients": 1 / 8}
    assert errors(expected, expected) == {"y": 0, "gradients": 0}
    zero = {"y": np.zeros(2)}
    assert errors(zero, zero) == {"y": 0}
    assert errors({"y": np.array([0, 1e-300])}, zero) == {"y": np.inf}
    for wrong in ({}, {"y": np.zeros(3)}, {"y": np.array([0, np.nan])}, {"y": np.zeros(2), "x": np.zeros(2)}):
        with pytest.raises(AssertionError):
            errors(wrong, zero)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_small_mistake_would_be_found(name, dtype):
    """Each answer, changed in one value by ten times the tolerance, is refused: no array is left out."""
    expected = FROZEN[name].answers[dtype]
    scales = {key.partition("/")[0]: 0.0 for key in expected}
    for key, array in expected.items():
        group = key.partition("/")[0]
        scales[group] = max(scales[group], np.abs(array).max())
    for key, array in expected.items():
        wrong = array.astype("float64")
        wrong.flat[wrong.size // 2] += 10 * TOLERANCE[dtype] * scales[key.partition("/")[0]]
        assert max(errors({**expected, key: wrong}, expected).values()) > TOLERANCE[dtype]


def test_the_report_prints_every_case(capsys, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)  # as without PyTorch
    assert report.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} | {dtype} | " in printed for name, dtype in CASES)
    assert "PyTorch is not installed" in printed


def test_the_report_says_what_is_beyond_its_tolerance(capsys):
    rows = [report.Row("conv2d", "float64", 2e-12, "y", 1e-12), report.Row("relu", "float64", 0.0, "y", 1e-12)]
    assert not report.table(iter(rows))
    assert "| conv2d | float64 | 2.0e-12 **beyond** | y | 1e-12 |" in capsys.readouterr().out
    assert report.table(iter(rows[1:]))
