"""A power cut during a save: every state that it may leave loads, and a save with a defect is found out."""

import os

import pytest

from minunet.base import durable
from minunet.base.durable import TEMPORARY_NAME
from tests.tools.crash_states import (
    PLANTED,
    SAVES,
    Create,
    Rename,
    Returned,
    State,
    Sync,
    SyncFolder,
    Write,
    calls_of_a_save,
    count,
    merged,
    states,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="fsync of folders as POSIX has it")

KINDS = [(name, existing) for name in SAVES for existing in (True, False)]
KIND_NAMES = [f"{name} {'replaced' if existing else 'written first'}" for name, existing in KINDS]
#: There are about 2700 and 18; the exact counts are those of zipfile's and Python's writes.
AT_LEAST = {"last.npz": 1000, "history.csv": 10}


@pytest.mark.parametrize(("name", "existing"), KINDS, ids=KIND_NAMES)
def test_every_state_loads_as_the_old_file_or_the_new_one(tmp_path, name, existing):
    before, calls = calls_of_a_save(tmp_path, name, existing)
    counts = count(tmp_path, name, before, calls)
    assert counts.lost == 0
    assert counts.old > AT_LEAST[name]
    assert counts.new >= 2  # before the save has returned, and after


@pytest.mark.parametrize(("name", "existing"), KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("defect", PLANTED)
def test_a_planted_defect_is_found(tmp_path, name, existing, defect):
    before, calls = calls_of_a_save(tmp_path, name, existing)
    planted = PLANTED[defect](calls)
    assert planted != calls
    assert count(tmp_path, name, before, planted).lost > 0


def test_a_fsync_of_the_folder_that_is_missing_in_the_program_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "_sync_folder", lambda folder: None)
    before, calls = calls_of_a_save(tmp_path, "last.npz", existing=True)
    assert count(tmp_path, "last.npz", before, calls).lost > 0


@pytest.mark.parametrize(("name", "existing"), KINDS, ids=KIND_NAMES)
def test_the_recorded_calls_are_all_that_the_save_does(tmp_path, name, existing):
    before, calls = calls_of_a_save(tmp_path, name, existing)
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert list(states(before, calls))[-1] == State(there, returned=True)
    assert merged(calls)[1].data == there[name]
    assert TEMPORARY_NAME.fullmatch(calls[0].name)


# ------------------------------------------------------------------------------------------ the rule itself


def contents(calls, name="a", before=None):
    """What may stand under a name, None for nothing, after a cut anywhere in the calls."""
    return {state.files.get(name) for state in states(before or {}, calls)}


def test_what_was_forced_is_there():
    calls = [Create(0, "t"), Write(0, 0, b"new"), Sync(0), Rename(0, "t", "a"), SyncFolder(), Returned()]
    assert contents(calls, before={"a": b"old"}) == {b"old", b"new"}
    after = [state.files for state in states({"a": b"old"}, calls) if state.returned]
    assert after == [{"a": b"new"}]


def test_what_was_not_forced_may_be_there_in_part_and_in_any_order():
    calls = [Create(0, "t"), Write(0, 0, b"abcd"), Write(0, 4, b"efgh"), Rename(0, "t", "a")]
    found = contents(calls)
    assert found >= {None, b"", b"abcd", b"abcdefgh", b"\0\0\0\0efgh"}  # the second write without the first
    assert found >= {b"ab", b"\0\0cd", b"ab\0\0", b"\0\0\0\0", b"abcdef", b"ab\0\0efgh"}  # one of them torn
    assert all(data is None or set(data) <= set(b"abcdefgh\0") for data in found)


def test_names_may_come_late_and_in_any_order():
    calls = [Create(0, "t"), Sync(0), Rename(0, "t", "a"), Create(1, "u"), Sync(1), SyncFolder(), Create(2, "v")]
    found = {frozenset(state.files) for state in states({}, calls)}
    assert found == {frozenset(names.split()) for names in ("", "t", "a", "u", "t u", "a u", "a u v")}


def test_a_fsync_holds_for_its_own_file_alone():
    calls = [Create(0, "a"), Create(1, "b"), SyncFolder(), Write(0, 0, b"x"), Write(1, 0, b"y"), Sync(1), Returned()]
    last = [(state.files["a"], state.files["b"]) for state in states({}, calls) if state.returned]
    assert set(last) == {(b"", b"y"), (b"x", b"y"), (b"\0", b"y")}
