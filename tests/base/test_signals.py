"""Ctrl-C and SIGTERM: the loop saves its state, a second one leaves at once."""

import signal
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
    time.sleep(signals._GRACE + 0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, "")


@POSIX
def test_a_second_signal_that_is_an_echo_of_the_first_changes_nothing(monkeypatch):
    monkeypatch.setattr(signals, "_GRACE", 60)
    with StopRequest() as stop:
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
    with StopRequest():
        assert all(signal.getsignal(number) not in before for number in numbers)
    assert [signal.getsignal(number) for number in numbers] == before
    cli.run(lambda arguments: None, [])
    assert [signal.getsignal(number) for number in numbers] == before


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
