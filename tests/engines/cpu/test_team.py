"""A team computes together, says what went wrong, and leaves nothing behind, however it ends."""

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minunet.base.signals import ENDING
from minunet.engines.cpu import team as team_module
from minunet.engines.cpu.team import Team, TeamError, usable_size
from tests.engines.cpu.team_programs import build

pytestmark = pytest.mark.skipif(os.name != "posix", reason="teams of processes are of POSIX systems alone")

ROOT = Path(__file__).resolve().parents[3]
NBYTES = 1024


@pytest.fixture
def started(monkeypatch):
    """The processes started meanwhile, of which the ``returncode`` is None until they are waited for."""
    processes = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return processes


def start(size, **arguments):
    return Team(size, build, arguments, NBYTES)


def processes(team):
    """The process of each rank."""
    team.run(["note_process"])
    return team.array(512, (team.size,), "int64").tolist()


def exists(process):
    """Whether there is such a process, a zombie included."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def state(process):
    """Linux's letter for what a process does: "T" is stopped, "Z" has ended; "" if it is gone, or this is no Linux."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def works(process):
    """Whether the process lives; what has ended and was inherited by init may wait there to be collected."""
    return state(process) not in ("", "Z") if Path("/proc").exists() else exists(process)


def wait_until(condition, seconds=60.0):
    """Whether ``condition()`` comes true within ``seconds``, of which a busy machine may need many."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_sees_what_all_have_written_before_a_barrier(size):
    with start(size) as team:
        for rounds in (1, 500):
            expected = size * rounds * (rounds - 1) / 2 + rounds * size * (size - 1) / 2
            assert team.run(["sum", rounds]) == expected
        team.run(["wait_for_each_other", 0.02])  # longer than anyone spins
        assert team.run(["sum", 5]) == size * 10 + 5 * size * (size - 1) / 2


def test_all_ranks_get_a_command_alike():
    with start(2) as team:
        team.run(("note_kind", (1, 2)))
        assert team.array(512, (2,), "int64").tolist() == [1, 1]


def test_a_command_that_is_no_json_is_refused_before_it_is_sent():
    with start(2) as team:
        with pytest.raises(TypeError, match="JSON"):
            team.run(["sum", {1, 2}])
        assert team.run(["sum", 1]) == 1


def test_arrays_start_at_a_cache_line_and_at_zero():
    with start(2) as team:
        first, second = team.array(0, (3, 5)), team.array(64, (2,), "complex128")
        assert not first.any()
        assert [array.ctypes.data % 64 for array in (first, second)] == [0, 0]
        assert second.ctypes.data - first.ctypes.data == 64


@pytest.mark.parametrize(("offset", "count"), [(4, 1), (-64, 1), (960, 17), (1024, 1), (0, 257)])
@pytest.mark.parametrize("size", [1, 2])
def test_an_array_that_does_not_fit_is_refused(size, offset, count):
    with start(size) as team, pytest.raises(ValueError, match=f"offset must be a multiple of 64.*got {offset}"):
        team.array(offset, (count,), "float32")


def test_workers_have_one_blas_thread_and_so_has_rank_0_in_a_run():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(2), start(2) as team:
        team.run(["note_blas_threads"])
        assert team.array(512, (2,), "int64").tolist() == [1, 1]
        assert {library["num_threads"] for library in threadpoolctl.threadpool_info()} == {2}


@pytest.mark.parametrize("rank", [1, 2])
def test_a_killed_worker_is_named(rank):
    team = start(3)
    members = processes(team)
    words = rf"^worker {rank} \(process {members[rank]}\) was killed by SIGKILL, perhaps because memory ran out"
    with pytest.raises(TeamError, match=words):
        team.run(["signal", rank, signal.SIGKILL])
    assert team.closed
    assert not any(exists(process) for process in members[1:])
    with pytest.raises(TeamError, match="closed"):
        team.run(["sum", 1])


def test_a_worker_killed_between_two_runs_is_named_by_the_next():
    team = start(2)
    _, worker = processes(team)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not works(worker))
    with pytest.raises(TeamError, match="worker 1 .* was killed by SIGKILL"):
        team.run(["sum", 1])


def test_a_worker_that_leaves_is_named():
    team = start(2)
    with pytest.raises(TeamError, match="worker 1 .* left with code 7$"):
        team.run(["leave", 1, 7])


@pytest.mark.parametrize("rank", [1, 2])
def test_an_exception_of_a_worker_comes_with_its_traceback(rank):
    team = start(3)
    members = processes(team)
    with pytest.raises(TeamError, match=f"worker {rank} .* failed:\nTraceback") as caught:
        team.run(["fail", rank])
    assert "team_programs.py" in str(caught.value)
    assert str(caught.value).endswith("ValueError: a planted failure")
    assert team.closed
    assert not any(exists(process) for process in members[1:])


@pytest.mark.parametrize(("command", "error"), [(["fail", 0], ValueError), (["interrupt"], KeyboardInterrupt)])
@pytest.mark.parametrize("size", [1, 2])
def test_an_exception_of_rank_0_is_raised_as_it_is(size, command, error):
    team = start(size)
    members = processes(team)
    with pytest.raises(error):
        team.run(command)
    assert team.closed
    assert not any(exists(process) for process in members[1:])


def test_a_build_that_fails_ends_the_team(started):
    with pytest.raises(TeamError, match=r"worker 1 .* failed:[\s\S]*a planted failure to build"):
        start(3, fails=1)
    with pytest.raises(ValueError, match="a planted failure to build"):
        start(2, fails=0)
    assert [process.returncode is None for process in started] == [False] * 3  # no child is left, alive or dead


@pytest.mark.parametrize("number", ENDING)
def test_workers_leave_it_to_rank_0_what_a_signal_means(number):
    with start(2) as team:
        team.run(["signal", 1, number])
        assert team.run(["sum", 1]) == 1


def test_close_can_be_called_again():
    team = start(2)
    members = processes(team)
    team.close()
    team.close()
    assert not exists(members[1])
    assert team.array(0, (2,), "float64").tolist() == [0.0, 0.0]  # still there: someone may hold it


def test_a_team_that_nobody_holds_ends():
    team = start(2)
    members = processes(team)
    del team
    gc.collect()
    assert not exists(members[1])


def test_teams_come_and_go_without_a_trace(started):
    def left():
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir())), len(Path("/proc/self/maps").read_text().splitlines())

    if not Path("/proc/self/fd").exists():
        pytest.skip("there is no /proc to count in")
    for number in range(50):
        with start(2 if number % 2 else 1) as team:
            team.run(["sum", 1])
        del team
        if number == 4:
            descriptors, maps = left()
    now = left()
    # 45 teams would leave 45 or more of each; Python's own may come and go.
    assert now[0] <= descriptors + 5
    assert now[1] <= maps + 20
    assert [process.returncode is None for process in started] == [False] * 25


def test_the_shared_memory_has_no_name():
    """So that nothing is left of it under /dev/shm when the processes have gone, in whatever way."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("there is no /proc to look in")
    with start(2) as team:
        for process in processes(team):
            lines = Path(f"/proc/{process}/maps").read_text().splitlines()
            shared = [line for line in lines if line.split()[1] == "rw-s"]
            assert shared
            assert [line for line in shared if not line.endswith(" (deleted)")] == []


@pytest.mark.parametrize(
    ("size", "function", "match"),
    [
        (0, build, "size must be in"),
        (65, build, "size must be in"),
        (2, lambda member: None, "workers can import, got .*lambda"),
    ],
)
def test_wrong_arguments_are_refused(size, function, match):
    with pytest.raises(ValueError, match=match):
        Team(size, function, {}, NBYTES)
    with pytest.raises(ValueError, match="nbytes must be >= 0, got -1"):
        Team(1, build, {}, -1)


# Scripts: processes of their own, which can be killed.

SCRIPT = """
import os, signal, sys, time
from minunet.engines.cpu.team import Team, TeamError
from tests.engines.cpu.team_programs import build
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a job in the background
team = Team(2, build, {}, 1024)
team.run(["note_process"])
print(*team.array(512, (2,), "int64"), flush=True)
"""


# A fork that lives until there is a file "over"; Python 3.12 warns of one in a process with threads.
FORK = """
import warnings
warnings.simplefilter("ignore")
if os.fork() == 0:
    while not os.access("over", os.F_OK):
        time.sleep(0.01)
    os._exit(0)
"""


def last_words(process):
    """What a process says until it ends by itself. If it does not, it is killed, and the test fails."""
    try:
        return process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise


def script(rest, folder, as_file=False, **options):
    """A process that makes a team, prints the process of each rank, and runs ``rest``; and these processes."""
    text = SCRIPT + rest
    command = ["-c", text]
    if as_file:
        command = [str(folder / "script.py")]
        Path(command[0]).write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout is not None
    return process, [int(word) for word in process.stdout.readline().split()]


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(("rest", "code"), [("print(team.run(['sum', 3]))", 0), ("sys.exit(4)", 4), ("os._exit(5)", 5)])
def test_a_script_needs_no_guard_and_no_close(tmp_path, rest, code, as_file):
    process, members = script(rest, tmp_path, as_file)
    out, err = last_words(process)
    assert (process.returncode, out, err) == (code, "9.0\n" if code == 0 else "", "")
    assert len(members) == 2
    assert wait_until(lambda: not works(members[1]))


@pytest.mark.parametrize(
    "rest",
    [
        "team.run(['go_on', 'begun', 'until'])",
        "open('begun', 'w').close(); time.sleep(60)",
        # what rank 0 has forked holds the other ends of the sockets open
        FORK + "team.run(['go_on', 'begun', 'until'])",
    ],
    ids=["in a run", "idle", "in a run, with a fork alive"],
)
def test_workers_leave_when_rank_0_is_killed(tmp_path, rest):
    process, members = script(rest, tmp_path)
    try:
        assert wait_until((tmp_path / "begun").exists)
        process.kill()
        assert wait_until(lambda: not works(members[1]))
    finally:
        (tmp_path / "over").touch()
    process.stdout.close()
    process.stderr.close()
    process.wait()


def test_ctrl_c_can_let_the_run_end(tmp_path):
    """As the command line of minunet does it: the first signal only asks to stop after the step."""
    rest = "signal.signal(signal.SIGINT, lambda *_: open('until', 'w').close())\n"
    rest += "team.run(['go_on', 'begun', 'until'])\nprint(team.run(['sum', 3]))"
    process, members = script(rest, tmp_path, start_new_session=True)
    assert wait_until((tmp_path / "begun").exists)
    os.killpg(process.pid, signal.SIGINT)
    out, err = last_words(process)
    assert (process.returncode, out, err) == (0, "9.0\n", "")
    assert wait_until(lambda: not works(members[1]))


def test_ctrl_c_ends_a_run_that_does_not_answer_it(tmp_path):
    process, members = script("team.run(['go_on', 'begun', 'until'])", tmp_path, start_new_session=True)
    assert wait_until((tmp_path / "begun").exists)
    os.killpg(process.pid, signal.SIGINT)
    _, err = last_words(process)
    assert process.returncode == -signal.SIGINT
    # Rank 0's own, and none of a worker. Its traceback may have parts, if it was handling another exception.
    assert err.splitlines().count("KeyboardInterrupt") == 1
    assert ", in work\n" not in err
    assert wait_until(lambda: not works(members[1]))


STOPPED_WORKER = """
from minunet.base import signals
from minunet.base.signals import StopRequest
from minunet.engines.cpu import member
member.LATE, signals._GRACE = 2, 0
with StopRequest() as stop:
    team.run(["go_on", "begun", "until"])
sys.exit(stop.exit_code)
"""


def stop_a_worker(folder):
    process, (_, worker) = script(STOPPED_WORKER, folder)
    assert wait_until((folder / "begun").exists)
    os.kill(worker, signal.SIGSTOP)
    assert wait_until(lambda: state(worker) in ("T", ""))
    return process, worker


def test_a_worker_that_is_stopped_is_waited_for_and_named(tmp_path):
    process, worker = stop_a_worker(tmp_path)
    assert process.stderr.readline() == "\n"
    line = process.stderr.readline()
    assert line.startswith(f"waiting for worker 1 (process {worker}) for 30 s; if it is stopped, kill -CONT {worker} ")
    (tmp_path / "until").touch()
    os.kill(worker, signal.SIGCONT)
    assert last_words(process) == ("", "")
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc that says what a process does")
def test_a_signal_wakes_a_worker_that_is_stopped_and_a_second_one_leaves_none_behind(tmp_path):
    process, worker = stop_a_worker(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert wait_until(lambda: state(worker) != "T")
    os.kill(worker, signal.SIGSTOP)  # once more
    assert wait_until(lambda: state(worker) == "T")
    process.send_signal(signal.SIGINT)
    last_words(process)
    assert process.returncode == 130
    assert wait_until(lambda: not works(worker))


def test_a_worker_that_is_stopped_leaves_without_a_word_when_rank_0_was_killed(tmp_path):
    process, worker = stop_a_worker(tmp_path)
    process.kill()
    process.wait()
    os.kill(worker, signal.SIGCONT)
    assert "Error" not in last_words(process)[1]
    assert wait_until(lambda: not works(worker))


def test_a_team_with_a_stopped_worker_can_be_closed(started, monkeypatch):
    monkeypatch.setattr(team_module, "_GRACE", 10**6)  # it is not killed in the end, but leaves by itself
    team = start(2)
    _, worker = processes(team)
    os.kill(worker, signal.SIGSTOP)
    team.close()
    assert [process.returncode for process in started] == [0]


def test_a_fork_leaves_the_team_to_its_owner(tmp_path):
    rest = """
import warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of a fork in a process with threads
child = os.fork()
if child == 0:
    assert team.closed
    try:
        team.run(["sum", 3])
    except TeamError:
        team.close()
        sys.exit(0)
    sys.exit(1)
assert os.waitpid(child, 0)[1] == 0
assert not team.closed
print(team.run(["sum", 3]))
"""
    process, _ = script(rest, tmp_path)
    out, err = last_words(process)
    assert (process.returncode, out, err) == (0, "9.0\n", "")


@pytest.mark.parametrize(
    "limit", ["resource.RLIMIT_NOFILE, len(os.listdir('/proc/self/fd')) + 3", "resource.RLIMIT_FSIZE, 0"]
)
def test_where_no_process_can_start_it_says_so(tmp_path, limit):
    rest = f"""
import resource
team.close()
kind, most = {limit}
resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
try:
    Team(2, build, {{}}, 1024)
except TeamError as error:
    print(error)
print(Team(1, build, {{}}, 1024).run(["sum", 3]))
"""
    process, _ = script(rest, tmp_path)
    out, err = last_words(process)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("a team of 2 processes cannot start: ")
    assert out.endswith("\n3.0\n")


# How large a team should be.


def test_as_many_as_asked_for():
    assert usable_size(3) == (3, "")
    with pytest.raises(ValueError, match="workers must be in"):
        usable_size(0)


def test_no_more_than_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert usable_size() == (1, "")


def test_two_threads_of_a_core_count_once(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.setattr(Path, "read_text", lambda path: "0,2" if path.parts[5] in ("cpu0", "cpu2") else "1,3")
    assert team_module._physical_cores() == 2


@pytest.mark.parametrize(
    ("value", "size"), [("1", 1), ("3", 3), ("2,4", 2), (" 2 ", 2), ("9", 4), ("", 4), ("0", 4), ("-1", 4), ("all", 4)]
)
def test_no_more_than_omp_num_threads_says(monkeypatch, value, size):
    monkeypatch.setattr(team_module, "_physical_cores", lambda: 4)
    monkeypatch.setattr(team_module, "_quota", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert usable_size() == (size, "")
    assert usable_size(5) == (5, "")


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.cfs_quota_us": "200000\n", "cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, 64),
        ({}, 64),
    ],
)
def test_the_quota_of_a_control_group(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert team_module._quota_of(tmp_path) == cores


@pytest.mark.parametrize(
    ("module", "name", "value", "reason"), [(os, "name", "nt", "Linux"), (sys, "executable", "", "no Python")]
)
def test_where_there_can_be_no_team_the_reason_is_given(monkeypatch, module, name, value, reason):
    monkeypatch.setattr(module, name, value)
    size, why = usable_size(4)
    monkeypatch.undo()
    assert size == 1
    assert reason in why


def refused_with(number):
    def memfd_create(name):
        raise OSError(number, os.strerror(number))

    return memfd_create


@pytest.mark.parametrize("refusal", [None, errno.ENOSYS, errno.EPERM], ids=["absent", "ENOSYS", "EPERM"])
def test_without_memfd_the_file_has_no_name_either(monkeypatch, tmp_path, refusal):
    if refusal is None:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    else:
        monkeypatch.setattr(os, "memfd_create", refused_with(refusal), raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with start(2) as team:
        assert list(tmp_path.iterdir()) == []
        assert team.run(["sum", 3]) == 9
        assert isinstance(team.array(0, (2,)), np.ndarray)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_cost_no_process(tmp_path, closed):
    """The first descriptors that the team makes would otherwise be those of the streams."""
    text = """
import sys
from minunet.engines.cpu.team import Team
from tests.engines.cpu.team_programs import build
with Team(2, build, {}, 1024) as team:
    open("sum", "w").write(str(team.run(["sum", 3])))
"""
    (tmp_path / "script.py").write_text(text)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "script.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "sum").read_text() == "9.0"
