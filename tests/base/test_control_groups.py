"""The groups of a process, as both versions of control groups tell them, and the limits that they set."""

import pytest

from minunet.base import control_groups
from minunet.engines import memory
from minunet.engines.cpu import team
from minunet.network.unet import UNet
from tests.command_line import SMALL, run

MB = 10**6


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A function that puts the process into the group of these lines, in a tree of its own."""

    def put(lines):
        (tmp_path / "own").write_text(lines)
        monkeypatch.setattr(control_groups, "OF_THIS_PROCESS", tmp_path / "own")
        monkeypatch.setattr(control_groups, "ROOT", tmp_path)
        return tmp_path

    return put


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def version_2(folder, limit, used, of_files=0):
    statistics = f"anon 1\ninactive_file {of_files}\nactive_file 0"
    write(folder, memory__max=limit, memory__current=used, memory__stat=statistics)


def version_1(folder, limit, used, of_files=0):
    statistics = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {of_files}\ntotal_active_file 0"
    write(folder, memory__limit_in_bytes=limit, memory__usage_in_bytes=used, memory__stat=statistics)


@pytest.mark.parametrize(
    ("lines", "resource", "names"),
    [
        ("0::/a/b\n", "memory", ["a/b", "a", "."]),
        ("0::/\n", "cpu", ["."]),
        ("0::/../other\n", "memory", ["../other", ".."]),  # a group outside of what a container sees
        ("4:memory:/a\n1:cpu,cpuacct:/b\n0::/\n", "memory", ["memory/a", "memory", "."]),
        ("4:memory:/a\n1:cpu,cpuacct:/b\n0::/\n", "cpu", ["cpu/b", "cpu", "."]),
    ],
)
def test_the_groups_of_a_process(place, lines, resource, names):
    root = place(lines)
    assert control_groups.groups(resource)[: len(names)] == [root / name for name in names]


def test_without_control_groups_there_are_none(monkeypatch, tmp_path):
    monkeypatch.setattr(control_groups, "OF_THIS_PROCESS", tmp_path / "nothing")
    assert control_groups.groups("memory") == []
    assert memory._control_groups() is None
    assert team._quota() == team.MOST


@pytest.mark.parametrize("level", ["job/step", "job", "."])
def test_the_least_of_all_groups_is_what_is_free(place, level):
    """Version 2, whose root has no such files, unless a container sees its own group there."""
    root = place("0::/job/step\n")
    for name in ("job/step", "job"):
        version_2(root / name, "max", 100 * MB)
    version_2(root / level, 500 * MB, 150 * MB, of_files=50 * MB)
    assert memory.available_bytes(UNet(widths=(2, 3))) == 400 * MB


@pytest.mark.parametrize("level", ["job/step", "job", "."])
def test_the_same_in_version_1(place, level):
    root = place("9:name=systemd:/\n4:memory:/job/step\n0::/\n")
    for name in ("job/step", "job", "."):
        version_1(root / "memory" / name, 2**63 - 4096, 100 * MB)
    version_1(root / "memory" / level, 500 * MB, 150 * MB, of_files=50 * MB)
    assert memory.available_bytes(UNet(widths=(2, 3))) == 400 * MB


@pytest.mark.parametrize("files", [{}, {"memory__max": "max"}, {"memory__max": 1, "memory__stat": "inactive_file"}])
def test_a_group_that_does_not_say_sets_no_limit(place, files):
    write(place("0::/job\n") / "job", **files)
    assert memory._control_groups() is None


def test_a_group_that_is_full_leaves_nothing(place):
    version_2(place("0::/job\n") / "job", 100 * MB, 101 * MB)
    assert memory._control_groups() == 0


@pytest.mark.parametrize(("level", "cores"), [("job/step", 2), ("job", 2), (".", 2)])
def test_the_quota_on_cores_is_the_least_of_all_groups(place, level, cores):
    root = place("0::/job/step\n")
    write(root / "job/step", cpu__max="max 100000")
    write(root / level, cpu__max="250000 100000")
    assert team._quota() == cores


def test_a_training_says_what_a_group_leaves(place, tmp_path):
    root = place("0::/job/step\n")
    version_2(root / "job", 110 * MB, 100 * MB)
    before = f"""
from pathlib import Path
from minunet.base import control_groups
control_groups.OF_THIS_PROCESS, control_groups.ROOT = Path({str(root / "own")!r}), Path({str(root)!r})"""
    ended = run("train_lgg", *SMALL, "--epochs", "1", "--batch-size", "100", cwd=tmp_path, before=before)
    assert (ended.code, ended.err) == (0, "")
    assert "warning: memory may run out, " in ended.out
    assert " and 0.0 GB are free, choose at most " in ended.out
