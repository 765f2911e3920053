"""A sample of ``python -m tests.tools.kill``."""

import os

import pytest

from tests.tools.kill import kill_runs, kill_saves

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX systems alone")


def test_killed_runs_resume_to_the_bits_of_the_unbroken_one(tmp_path):
    assert [killed.same for killed in kill_runs(tmp_path, count=1)] == [True]


def test_killed_saves_lose_no_checkpoint(tmp_path):
    saves = kill_saves(tmp_path, count=10)
    assert (saves.kills, saves.lost) == (10, 0)
    assert saves.saved > 0
