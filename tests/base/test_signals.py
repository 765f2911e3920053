"""Signals that end a run: the loop saves its state, a second one leaves at once."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from minunet.base import cli, signals
from minunet.base.signals import StopRequest
from tests.base.processes import POSIX, finish, start, wait_for

TRAINING = """
import signal, sys, time
from minunet.base import cli
from minunet.base.signals import StopRequest

signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a job in the background
mode = sys.argv[1]

def main(arguments):
    try:
        with StopRequest() as stop:
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
EACH = pytest.mark.parametrize("number", signals.ENDING, ids=lambda number: number.name)


@POSIX
def test_the_exit_codes():
    codes = [128 + number for number in signals.ENDING]
    assert codes == [130, 143, 129, 138 if signal.SIGUSR1 == 10 else 158]  # macOS counts otherwise


@POSIX
@EACH
def test_a_signal_lets_the_loop_save_its_state(number):
    process = start(TRAINING, "polite")
    wait_for(process, "ready")
    process.send_signal(number)
    wait_for(process, "saved")
    code, errors = finish(process)
    assert code == 128 + number
    assert errors == "\nstopping after this step, once the state is saved; again to leave at once\n"


@POSIX
@EACH
def test_a_second_signal_leaves_at_once_with_its_own_code(number):
    process = start(TRAINING, "deaf")
    wait_for(process, "ready")
    process.send_signal(signal.SIGINT)
    assert "again to leave at once" in process.stderr.readline() + process.stderr.readline()
    time.sleep(signals._GRACE + 0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (128 + number, "")


@POSIX
def test_a_second_signal_that_is_an_echo_of_the_first_changes_nothing(monkeypatch):
    monkeypatch.setattr(signals, "_GRACE", 60)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert stop.requested
    assert stop.exit_code == 143


@POSIX
@EACH
def test_a_signal_outside_of_the_loop_closes_what_is_open(number):
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    process = start(TRAINING, "unguarded")
    wait_for(process, "ready")
    process.send_signal(number)
    wait_for(process, "closed")
    assert finish(process) == (128 + number, f"error: stopped by {name}\n")


@POSIX
@pytest.mark.parametrize("mode", ["polite", "unguarded"])
@pytest.mark.parametrize("number", [n for n in signals.ENDING if n != signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_that_is_ignored_stays_ignored(number, mode):
    """As ``nohup`` starts a program."""
    process = start(f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\n{TRAINING}", mode)
    wait_for(process, "ready")
    process.send_signal(number)
    process.send_signal(signal.SIGINT)  # which is of a lower number than SIGTERM: what comes first does not count here
    assert finish(process)[0] == 130


@POSIX
def test_a_ctrl_c_that_a_shell_has_set_to_be_ignored_is_heard_all_the_same():
    process = start(TRAINING.replace("signal.default_int_handler", "signal.SIG_IGN"), "polite")
    wait_for(process, "ready")
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


@POSIX
@pytest.mark.parametrize(("mode", "end"), [("polite", "saved"), ("unguarded", "closed")])
def test_a_terminal_that_is_closed_is_no_error(mode, end, tmp_path):
    """SIGHUP comes, and nothing can be printed any more."""
    own_terminal = "os.login_tty(0); notes = open(sys.argv[2], 'w')"
    script = f"""
import os
def note(text, flush):
    print(text, flush=True)
    print(text, file=notes, flush=True)
{TRAINING.replace("print(", "note(").replace("mode = ", f"{own_terminal}; mode = ")}"""
    terminal, its_end = os.openpty()
    command = [sys.executable, "-c", script, mode, str(tmp_path / "notes")]
    process = subprocess.Popen(command, stdin=its_end, stdout=its_end, stderr=its_end)
    os.close(its_end)
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    assert process.wait(60) == 129
    assert end in (tmp_path / "notes").read_text().split()


@POSIX
def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in signals.ENDING]
    with StopRequest():
        assert all(signal.getsignal(number) not in before for number in signals.ENDING)
    assert [signal.getsignal(number) for number in signals.ENDING] == before
    cli.run(lambda arguments: None, [])
    assert [signal.getsignal(number) for number in signals.ENDING] == before


def test_without_a_signal_nothing_is_requested():
    with StopRequest() as stop:
        assert not stop.requested
    stop.exit_if_requested()
    assert stop.exit_code == 0


def test_another_thread_does_without_signals():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.run(lambda arguments: None, [])))
    thread.start()
    thread.join()
    assert codes == [0]
