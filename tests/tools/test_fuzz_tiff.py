"""A fixed sample of the damaged TIFFs, and that their harness notices what it is there to notice.

The full thousand: ``python -m tests.tools.fuzz_tiff --count 1000``.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from minunet.base.errors import UserError
from minunet.data.images import read_image, read_mask
from tests.tools import fuzz_tiff

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a limit of memory as POSIX has it")


def test_damaged_and_hostile_files_are_read_or_refused_in_one_line():
    figures = fuzz_tiff.run(150)
    assert figures.failures == []
    assert figures.errors == ""  # libtiff, too, keeps its remarks to itself
    assert figures.files == 150 + len(fuzz_tiff.HOSTILE)
    assert sum(figures.ends.values()) == 4 * figures.files
    assert figures.memory < 2**30
    # The damage is neither so heavy that nothing is decoded any more, nor so light that nothing is refused.
    assert figures.ends[fuzz_tiff.READ] > 20
    assert figures.ends[fuzz_tiff.CHANGED] > 10
    assert figures.ends[fuzz_tiff.REFUSED] > 300


def test_every_kind_of_damage_changes_files():
    changed = set()
    for kind in fuzz_tiff.DAMAGES:
        for seed in range(20):
            content = fuzz_tiff.sound_files()["mask, strips"]
            if kind(bytearray(content), np.random.default_rng(seed)) != content:
                changed.add(kind)
    assert changed == set(fuzz_tiff.DAMAGES)


def test_the_sound_files_are_those_that_are_meant(tmp_path):
    for name, content in fuzz_tiff.sound_files().items():
        (tmp_path / "a.tif").write_bytes(content)
        if name in ("grey", "palette", "image, two pages"):
            continue
        read = read_image if name.startswith("image") else read_mask
        assert read(tmp_path / "a.tif").shape[:2] == (24, 20), name


def raising(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    ("function", "end"),
    [
        (lambda: np.zeros((4, 4, 3), np.uint8), "read"),
        (lambda: np.full((4, 4), 255, np.uint8), "an array that is no image"),
        (lambda: np.zeros((4, 4, 3)), "an array that is no image"),
        (raising(UserError("a.tif: cannot be read")), "refused"),
        (raising(UserError("cannot be read")), "not one line"),
        (raising(UserError("a.tif: cannot\nbe read")), "not one line"),
        (raising(UserError("a.tif: cannot be read (MemoryError)")), "out of memory"),
        (raising(ValueError("a.tif")), "Traceback"),
        (raising(SystemExit()), "Traceback"),
    ],
)
def test_the_harness_tells_how_a_read_ends(function, end):
    assert fuzz_tiff.attempt(function, Path("a.tif")).end.startswith(end)


@pytest.mark.parametrize(
    ("script", "failure", "limit"), [("kill -SEGV $$", "a crash", 60), ("exec sleep 60", "a hang", 0.5)]
)
def test_the_harness_notices_a_process_that_crashes_or_hangs(tmp_path, monkeypatch, script, failure, limit):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(fuzz_tiff.sys, "executable", str(program))
    monkeypatch.setattr(fuzz_tiff, "WALL_LIMIT", limit)
    monkeypatch.setattr(fuzz_tiff, "HOSTILE", {})
    figures = fuzz_tiff.run(2)
    assert figures.files == 2
    assert [failure in line for line in figures.failures] == [True, True]


def test_a_slow_read_and_a_bad_end_are_failures():
    figures = fuzz_tiff.Figures()
    fuzz_tiff.add(figures, {"name": "x", "reads": [("read", 6.0), ("Traceback", 0.1), ("refused", 0.1)], "memory": 7})
    assert [line.split(": ", 1)[1] for line in figures.failures] == ["6.0 s of computing", "Traceback"]
    assert (figures.files, figures.seconds, figures.memory) == (1, 6.0, 7)
    assert figures.ends == {"read": 1, "refused": 1}
