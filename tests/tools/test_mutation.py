"""Mutation testing itself: what it plants, what it makes of a trial, and a fixed sample.

All of it: ``python -m tests.tools.mutation``.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.tools.mutation.__main__ import MODULES, known_equivalents, place
from tests.tools.mutation.mutants import mutants
from tests.tools.mutation.trial import ROOT

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forked")


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = a + b", {"x = (a - b)"}),
        ("x += b", {"x -= b", "x = b", "pass"}),
        ("x = a <= 2", {"x = (a < 2)", "x = a <= 3", "x = a <= 1"}),
        ("x = a and not b", {"x = (a or not b)", "x = a and (b)"}),
        ("x = a[b:c]", {"x = a[c:b]"}),
        ("x = a[::b]", {"x = a[:]"}),
        ("f(a, b, axis=c)", {"pass", "f(b, a, axis=c)", "f(a, b)"}),
        ("x = a.sum()", {"x = a.mean()"}),
        ("x = a.copy()", {"x = (a)"}),
        ("x[a] = b", {"pass"}),
        ("x = -a", {"x = (a)"}),
        ("x = b if a else c", {"x = b if (not (a)) else c"}),
        ("x: a = True", {"x: a = False"}),
        ("if a:\n    raise E(f'{b + 1}')", {"if (not (a)):", "pass"}),
        ("'a string, 1 + 1'", set()),
        ("x = 'a string'", set()),
        ("from a import b", set()),
        ("def f(x: 3) -> 4: return x", set()),
    ],
)
def test_what_is_planted(line, expected):
    found = mutants("m.py", line)
    assert {mutant.new for mutant in found} == expected
    assert all(mutant.source != line for mutant in found)


@pytest.mark.parametrize("module", MODULES)
def test_there_are_mutants_and_every_listed_equivalent_is_one(module):
    found = mutants(module, (ROOT / module).read_text())
    assert len(found) >= 15
    assert len({mutant.key for mutant in found}) == len(found)
    assert {entry for entry in known_equivalents() if entry[0] == module} <= {place(mutant) for mutant in found}


@forks
def test_a_sample_is_killed_and_is_not_run_again(tmp_path):
    command = ["-m", "tests.tools.mutation", "minunet/ops/concat.py", "minunet/ops/relu.py"]
    options = ["--sample", "5", "--results", str(tmp_path)]
    table = run(*command, *options)
    outcomes = [json.loads(line) for line in (tmp_path / "mutants.jsonl").read_text().splitlines()]
    assert [outcome[1] for outcome in outcomes] == ["killed"] * 10
    assert all(tests_run >= 1 for _, _, _, tests_run, _ in outcomes)
    assert "| all | 10 | 10 | 10 | 0 | 0 | 0 | 0 | 0 | 100.0 % |" in table
    assert "| all | 10 | 10 | 10 |" in run(*command, *options)
    assert len((tmp_path / "mutants.jsonl").read_text().splitlines()) == 10


OUTCOMES = """
import sys
from pathlib import Path
from tests.tools.mutation.trial import ROOT, Trial, own_tests, run_trials

module = "minunet/ops/relu.py"
source, tests = (ROOT / module).read_text(), own_tests(module)
line = "    passed = ~(x.real <= 0)"
assert source.count(line) == 1
trials = [
    Trial("undamaged", {}, tests, 100),
    Trial("killed", {module: source.replace(line, line.replace("~", ""))}, tests, 100),
    Trial("invalid", {module: "import does_not_exist"}, tests, 100),
    Trial("timeout", {module: source.replace(line, "    while True: pass")}, tests, 5),
    Trial("no test", {}, ["tests/ops/test_relu.py", "-k", "no_test_is_called_this"], 100),
    Trial("undamaged again", {}, tests, 100),
]
run_trials(trials, Path(sys.argv[1]), lambda trial, o: print(trial.key, o.status, o.tests_run > 0, sep=": "), jobs=2)
"""


@forks
def test_what_becomes_of_a_trial(tmp_path):
    before = (ROOT / "minunet/ops/relu.py").read_bytes()
    lines = run("-c", OUTCOMES, str(tmp_path)).splitlines()
    assert sorted(lines) == [
        "invalid: invalid: False",
        "killed: killed: True",
        "no test: error: False",
        "timeout: timeout: False",
        "undamaged again: survived: True",
        "undamaged: survived: True",
    ]
    assert (ROOT / "minunet/ops/relu.py").read_bytes() == before
