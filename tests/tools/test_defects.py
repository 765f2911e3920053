"""The seeded defects: the list fits the code, and a fixed sample is caught. All: ``python -m tests.tools.defects``."""

import json
import os
import subprocess
import sys

import pytest

from tests.tools.defects.__main__ import defects
from tests.tools.mutation.trial import ROOT, own_tests

SAMPLE = [
    "batch_norm2d: eps forgotten in backward",
    "batch_norm2d: third term dropped",
    "concat: views for copies",
    "relu: slope 1 at 0",
    "adamw: decay coupled into the gradient",
    "ema: weights exchanged",
]

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forked")


def run(results, *arguments):
    command = [sys.executable, "-m", "tests.tools.defects", "--results", str(results), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def outcomes(results):
    return [json.loads(line) for line in (results / "defects.jsonl").read_text().splitlines()]


def test_every_defect_fits_the_code_and_leaves_it_one_that_compiles():
    assert len(defects()) >= 44
    assert len({defect.name for defect in defects()}) == len(defects())
    assert [defect.name for defect in defects() if defect.source() is None] == []
    for defect in defects():
        assert compile(defect.source(), defect.file, "exec")
        assert [path for path in own_tests(defect.file) if "/" in path and not (ROOT / path).exists()] == []


@forks
def test_a_sample_is_caught_by_named_tests_and_is_not_run_again(tmp_path):
    only = [argument for name in SAMPLE for argument in ("--only", name)]
    process = run(tmp_path, *only)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "6 of 6 defects caught (6 run now, the others before)" in process.stdout
    for _, status, test, tests_run, _ in outcomes(tmp_path):
        assert status == "killed"
        assert tests_run >= 1
        assert test.startswith("tests/")
    assert len(outcomes(tmp_path)) == 6
    assert "6 of 6 defects caught (0 run now, the others before)" in run(tmp_path, *only).stdout


@forks
def test_what_is_not_caught_or_not_found_is_no_pass(tmp_path):
    (tmp_path / "list.toml").write_text(
        """
        [[defect]]
        name = "harmless"
        why = "A comment is no code."
        file = "minunet/ops/relu.py"
        old = "where y = x, and so where the gradient passes"
        new = "where the gradient passes"
        [[defect]]
        name = "nowhere"
        why = "The line is not there."
        file = "minunet/ops/relu.py"
        old = "passed = x.real > 12345"
        new = "passed = x.real > 0"
        [[defect]]
        name = "everywhere"
        why = "The line is there more than once."
        file = "minunet/ops/relu.py"
        old = "passed"
        new = "x"
        """
    )
    process = run(tmp_path, "--list", str(tmp_path / "list.toml"))
    assert process.returncode == 1
    assert "| harmless | minunet/ops/relu.py | **survived** |" in process.stdout
    for name in ("nowhere", "everywhere"):
        assert f"| {name} | minunet/ops/relu.py | **ERROR: the old line is not there exactly once** |" in process.stdout
    assert "0 of 3 defects caught" in process.stdout
    assert [outcome[1] for outcome in outcomes(tmp_path)] == ["survived"]
