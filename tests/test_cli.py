"""What the command lines share: exit codes, one line for people, signals, flags, the run folder."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minunet import backend, cli
from minunet.durable import write_text
from minunet.errors import Diverged, UserError

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and locks as POSIX has them")


def start(script, *arguments):
    """A Python process that runs ``script``, its input and output in pipes."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], text=True, env=BUFFERED, **pipes)


def wait_for(process, line):
    """Read what ``process`` prints up to ``line``."""
    for found in process.stdout:
        if found == line + "\n":
            return
    raise AssertionError(process.stderr.read())


def finish(process):
    """Close the input; the exit code and what was printed to stderr."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes
# ---------------------------------------------------------------------------------------------------------------------


def raises(error):
    def main(arguments):
        print("something")
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.tif: empty, remove it"), 2, "error: a.tif: empty, remove it\n"),
        (UserError("a\nb\x1b[31m.tif: empty"), 2, "error: a\\nb\\x1b[31m.tif: empty\n"),
        (Diverged("epoch 2: loss is nan"), 3, "error: epoch 2: loss is nan\n"),
        (KeyboardInterrupt(), 130, "error: stopped by Ctrl-C\n"),
        (cli.Terminated(), 143, "error: stopped by SIGTERM\n"),
        (MemoryError(), 2, "error: out of memory, use a smaller batch, image size or network\n"),
        (MemoryError("9 GiB"), 2, "error: out of memory (9 GiB), use a smaller batch, image size or network\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "h.csv"),
            2,
            "error: h.csv: No space left on device, put that right and try again\n",
        ),
        (OSError("odd"), 2, "error: odd, put that right and try again\n"),
        (SystemExit(7), 7, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_end_has_its_exit_code_and_one_line(capsys, error, code, line):
    assert cli.run(raises(error), []) == code
    output = capsys.readouterr()
    assert output.err == line
    assert output.out == "something\n"


def test_success_is_zero_and_main_gets_the_arguments(capsys, monkeypatch):
    seen = []
    assert cli.run(seen.append, ["--epochs", "3"]) == 0
    monkeypatch.setattr(sys, "argv", ["train.py", "--quiet"])
    assert cli.run(seen.append) == 0
    assert seen == [["--epochs", "3"], ["--quiet"]]
    assert capsys.readouterr().err == ""


def test_a_bug_shows_its_traceback(capsys):
    assert cli.run(raises(ZeroDivisionError("here")), []) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert errors.endswith("ZeroDivisionError: here\nerror: a bug in minunet, please report it with the lines above\n")


@pytest.mark.parametrize("error", [UserError("a.tif: empty"), Diverged("loss is nan")])
def test_debug_shows_the_traceback_too(capsys, error):
    cli.run(raises(error), ["--debug"])
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert errors.endswith(f"error: {error}\n")


def test_an_exit_with_text_is_left_to_python():
    with pytest.raises(SystemExit, match="text"):
        cli.run(raises(SystemExit("text")), [])


def test_a_file_name_that_is_no_text_can_be_printed():
    script = "import sys; from minunet import cli; sys.exit(cli.run(lambda a: print('file \\udcff')))"
    process = start(script)
    assert process.communicate(timeout=60)[0] == "file \\udcff\n"
    assert process.returncode == 0


@POSIX
@pytest.mark.parametrize("count", [1, 100_000], ids=["flushed at the end", "in the middle"])
def test_a_reader_that_has_gone_is_no_error(count):
    process = start(f"""
import sys
from minunet import cli

def main(arguments):
    print("first", flush=True)
    sys.stdin.read()  # until the reader has gone
    for _ in range({count}):
        print("more")

print("go", flush=True)
sys.exit(cli.run(main))
""")
    wait_for(process, "first")
    process.stdout.close()
    process.stdout = None
    assert finish(process) == (141, "")


@POSIX
@pytest.mark.parametrize(
    ("redirection", "code", "errors"),
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        pytest.param(
            ">/dev/full",
            2,
            "error: No space left on device, put that right and try again\n",
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full"),
        ),
    ],
)
def test_output_that_is_closed_or_full(redirection, code, errors):
    script = "import sys; from minunet import cli; sys.exit(cli.run(print))"
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, script]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=BUFFERED, timeout=60)
    assert (result.returncode, result.stderr) == (code, errors)


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------

TRAINING = """
import signal, sys, time
from minunet import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a job in the background
mode = sys.argv[1]

def main(arguments):
    try:
        with cli.StopRequest() as stop:
            print("ready", flush=True)
            while not stop.requested or mode == "deaf":
                time.sleep(0.01)
        print("saved", flush=True)
        stop.exit_if_requested()
    finally:
        print("closed", flush=True)

def unguarded(arguments):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("closed", flush=True)

sys.exit(cli.run(unguarded if mode == "unguarded" else main))
"""
BOTH = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


@POSIX
@BOTH
def test_a_signal_lets_the_loop_save_its_state(number, code):
    process = start(TRAINING, "polite")
    wait_for(process, "ready")
    process.send_signal(number)
    wait_for(process, "saved")
    assert finish(process) == (code, "\nstopping after this step, once the state is saved; again to leave at once\n")


@POSIX
@BOTH
def test_a_second_signal_leaves_at_once(number, code):
    process = start(TRAINING, "deaf")
    wait_for(process, "ready")
    process.send_signal(signal.SIGINT)
    assert "again to leave at once" in process.stderr.readline() + process.stderr.readline()
    time.sleep(cli._GRACE + 0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, "")


@POSIX
def test_a_second_signal_that_is_an_echo_of_the_first_changes_nothing(monkeypatch):
    monkeypatch.setattr(cli, "_GRACE", 60)
    with cli.StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert stop.requested
    assert stop.exit_code == 143


@POSIX
@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_outside_of_the_loop_closes_what_is_open(number, code, name):
    process = start(TRAINING, "unguarded")
    wait_for(process, "ready")
    process.send_signal(number)
    wait_for(process, "closed")
    assert finish(process) == (code, f"error: stopped by {name}\n")


@POSIX
def test_handlers_are_put_back():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with cli.StopRequest():
        assert all(signal.getsignal(number) not in before for number in numbers)
    assert [signal.getsignal(number) for number in numbers] == before
    cli.run(lambda arguments: None, [])
    assert [signal.getsignal(number) for number in numbers] == before


def test_without_a_signal_nothing_is_requested():
    with cli.StopRequest() as stop:
        assert not stop.requested
    stop.exit_if_requested()
    assert stop.exit_code == 0


def test_another_thread_does_without_signals():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.run(lambda arguments: None, [])))
    thread.start()
    thread.join()
    assert codes == [0]


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


def parse(kind, text):
    parser = cli.Parser(prog="train.py")
    parser.add_argument("--value", type=kind)
    return parser.parse_args([f"--value={text}"]).value


ACCEPTED = [
    (cli.positive_int, "1", 1),
    (cli.positive_int, "2147483647", 2**31 - 1),
    (cli.non_negative_int, "0", 0),
    (cli.seed, "0", 0),
    (cli.seed, str(2**63 - 1), 2**63 - 1),
    (cli.image_size, "8", 8),
    (cli.image_size, "4096", 4096),
    (cli.integer(-3, 3), "-3", -3),
    (cli.positive_float, "1e-300", 1e-300),
    (cli.positive_float, "3", 3.0),
    (cli.non_negative_float, "0", 0.0),
    (cli.fraction, "0", 0.0),
    (cli.fraction, "0.999", 0.999),
]
REFUSED = [
    *((kind, text) for kind in (cli.positive_int, cli.non_negative_int, cli.seed, cli.image_size) for text in
      ("", "a", "1.5", "1e3", "nan", "inf", "1e400", "-1", "9" * 5000, str(2**63))),
    (cli.positive_int, "0"),
    (cli.positive_int, "2147483648"),
    (cli.image_size, "7"),
    (cli.image_size, "4097"),
    (cli.integer(-3, 3), "-4"),
    *((kind, text) for kind in (cli.positive_float, cli.non_negative_float, cli.fraction) for text in
      ("", "a", "nan", "-nan", "inf", "-inf", "1e400", "-1e-300", "1,5")),
    (cli.positive_float, "0"),
    (cli.positive_float, "-0.0"),
    (cli.positive_float, "1e-400"),
    (cli.fraction, "1"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "value"), ACCEPTED)
def test_numbers_in_range_are_taken(kind, text, value):
    found = parse(kind, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("kind", "text"), REFUSED, ids=lambda value: value[:10] if isinstance(value, str) else "")
def test_numbers_out_of_range_are_refused(kind, text):
    with pytest.raises(UserError, match=r"^--value: must be a (whole )?number .*, got .*, see --help$") as caught:
        parse(kind, text)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nothing"], "unrecognized arguments: --nothing, see --help"),
        (["--epo", "3"], "unrecognized arguments: --epo 3, see --help"),
        (["--epochs"], "--epochs: expected one argument, see --help"),
        (["--epochs", "0"], "--epochs: must be a whole number of at least 1, got '0', see --help"),
        (["--fold", "5"], "--fold: must be a whole number from 0 to 4, got '5', see --help"),
        (["--lr", "0"], "--lr: must be a number greater than 0, got '0', see --help"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, arguments, message):
    def main(given):
        parser = cli.Parser()
        parser.add_argument("--epochs", type=cli.positive_int)
        parser.add_argument("--fold", type=cli.integer(0, 4))
        parser.add_argument("--lr", type=cli.positive_float)
        parser.parse_args(given)

    assert cli.run(main, arguments) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_help_leaves_with_zero(capsys):
    assert cli.run(lambda given: cli.Parser(description="Train.").parse_args(given), ["--help"]) == 0
    output = capsys.readouterr()
    assert "Train." in output.out
    assert "--debug" in output.out
    assert output.err == ""


def test_debug_is_a_flag_of_every_parser():
    assert cli.Parser().parse_args(["--debug"]).debug is True
    assert cli.Parser().parse_args([]).debug is False


def test_the_device_flag():
    parser = cli.Parser()
    cli.add_device_argument(parser)
    assert parser.parse_args([]).device == "auto"
    assert parser.parse_args(["--device", "cuda"]).device == "cuda"
    with pytest.raises(UserError, match="--device: invalid choice: 'gpu'"):
        parser.parse_args(["--device", "gpu"])


def test_a_fall_back_to_the_cpu_is_announced_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(backend, "_why_no_gpu", lambda: "CuPy is not\ninstalled")
    assert cli.announce_device("auto") == "cpu"
    assert capsys.readouterr().out == "device: cpu (CuPy is not\\ninstalled)\n"
    assert cli.announce_device("cpu") == "cpu"
    with pytest.raises(UserError, match="--device cuda: CuPy is not"):
        cli.announce_device("cuda")
    monkeypatch.setattr(backend, "_why_no_gpu", lambda: None)
    assert cli.announce_device("auto") == "cuda"
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_is_made_with_those_above_it(tmp_path):
    with cli.run_folder(tmp_path / "a" / "b é\n") as folder:
        assert folder == tmp_path / "a" / "b é\n"
        assert folder.is_dir()
    with cli.run_folder(folder):  # a run that has written nothing leaves it free
        pass


def test_a_folder_with_something_in_it_is_refused_unless_it_is_resumed(tmp_path):
    write_text(tmp_path / "last.npz", "x")
    with pytest.raises(UserError, match=r"is not empty \(last\.npz, \.\.\.\), choose another folder or resume"):
        cli.run_folder(tmp_path).__enter__()
    assert names(tmp_path) == ["last.npz"]
    with cli.run_folder(tmp_path, resume=True) as folder:
        assert (folder / "last.npz").read_text() == "x"


def test_what_a_kill_has_left_is_removed_and_nothing_else(tmp_path):
    stale = tmp_path / ".0123456789abcdef.minunet-tmp"
    others = [".0123456789abcdef.tmp", "0123456789abcdef.minunet-tmp", ".0123456789abcdeg.minunet-tmp", "last.npz"]
    for path in [stale, *(tmp_path / name for name in others)]:
        path.touch()
    with cli.run_folder(tmp_path, resume=True):
        assert names(tmp_path) == sorted([*others, ".lock"])


def test_a_temporary_file_alone_does_not_make_a_folder_full(tmp_path):
    (tmp_path / ".0123456789abcdef.minunet-tmp").touch()
    with cli.run_folder(tmp_path):
        assert names(tmp_path) == [".lock"]


def test_only_what_is_there_can_be_resumed(tmp_path):
    with pytest.raises(UserError, match="no such run folder, give the folder of the run to resume"):
        cli.run_folder(tmp_path / "none", resume=True).__enter__()
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["file", "file/below", "dangling/below", "x" * 300])
def test_what_cannot_be_a_folder_is_a_user_error(tmp_path, place):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot be a run folder \(.*\), choose another one"):
        cli.run_folder(tmp_path / place).__enter__()
    assert names(tmp_path) == ["dangling", "file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # as root, whom no mode of a folder stops, a real one would not fail
    with pytest.raises(UserError, match=r"cannot be a run folder \(Permission denied\)"):
        cli.run_folder(tmp_path).__enter__()


HOLDER = """
import sys, time
from minunet import cli
with cli.run_folder(sys.argv[1]):
    print("ready", flush=True)
    time.sleep(60)
"""


@POSIX
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(tmp_path):
    process = start(HOLDER, tmp_path)
    wait_for(process, "ready")
    try:
        for resume in (True, False):
            with pytest.raises(UserError, match=rf"in use by another run \(process {process.pid}\), wait for it"):
                cli.run_folder(tmp_path, resume=resume).__enter__()
    finally:
        process.kill()  # SIGKILL: the lock goes with the process, whatever ends it
    assert finish(process)[0] == -signal.SIGKILL
    with cli.run_folder(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


@POSIX
def test_a_run_that_wrote_while_this_one_took_the_lock_is_noticed(tmp_path, monkeypatch):
    lock = cli._lock

    def lock_late(folder):
        write_text(folder / "last.npz", "x")
        return lock(folder)

    monkeypatch.setattr(cli, "_lock", lock_late)
    with pytest.raises(UserError, match="is not empty"):
        cli.run_folder(tmp_path).__enter__()
    monkeypatch.undo()
    with cli.run_folder(tmp_path, resume=True):  # the refused one has given its lock back
        pass


def test_the_lock_names_its_process_alone(tmp_path):
    (tmp_path / ".lock").write_text("9" * 20)  # of a run that has ended
    with cli.run_folder(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_the_lock_is_given_back_when_the_run_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), cli.run_folder(tmp_path):
        raise ZeroDivisionError
    with cli.run_folder(tmp_path):
        pass


def test_where_there_are_no_locks_runs_go_unlocked(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "fcntl", None)
    with cli.run_folder(tmp_path) as first, cli.run_folder(tmp_path) as second:
        assert first == second == tmp_path


@POSIX
def test_a_file_system_without_locks_lets_runs_go_unlocked(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cli.fcntl, "flock", refuse)
    with cli.run_folder(tmp_path) as first, cli.run_folder(tmp_path) as second:
        assert first == second == tmp_path


def test_the_next_free_folder(tmp_path):
    assert cli.next_free_folder(tmp_path, "quick") == tmp_path / "quick"
    (tmp_path / "quick").mkdir()
    assert cli.next_free_folder(tmp_path, "quick") == tmp_path / "quick-2"
    (tmp_path / "quick-2").symlink_to("nowhere")
    (tmp_path / "quick-4").touch()
    assert cli.next_free_folder(str(tmp_path), "quick") == Path(tmp_path / "quick-3")
