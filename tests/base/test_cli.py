"""What the command lines share: exit codes, one line for people, flags."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from minunet.base import backend, cli
from minunet.base.errors import Diverged, UserError
from tests.base.processes import BUFFERED, POSIX, finish, start, wait_for


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
        pytest.param(cli.Terminated(1), 129, "error: stopped by SIGHUP\n", marks=POSIX),
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
    script = "import sys; from minunet.base import cli; sys.exit(cli.run(lambda a: print('file \\udcff')))"
    process = start(script)
    assert process.communicate(timeout=60)[0] == "file \\udcff\n"
    assert process.returncode == 0


@POSIX
@pytest.mark.parametrize("count", [1, 100_000], ids=["flushed at the end", "in the middle"])
def test_a_reader_that_has_gone_is_no_error(count):
    process = start(f"""
import sys
from minunet.base import cli

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
    script = "import sys; from minunet.base import cli; sys.exit(cli.run(print))"
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, script]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=BUFFERED, timeout=60)
    assert (result.returncode, result.stderr) == (code, errors)


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


def test_a_message_of_a_million_characters_is_cut(capsys):
    def main(arguments):
        raise UserError("a" * 10**6 + "b" * 10**6)

    assert cli.run(main, []) == 2
    assert capsys.readouterr().err == f"error: {'a' * 2000} ... {'b' * 2000}\n"


@pytest.mark.parametrize("arguments", [["--output", ""], ["--output="], ["a", ""]])
def test_an_empty_value_is_no_folder(arguments):
    parser = cli.Parser()
    parser.add_argument("images", nargs="*")
    parser.add_argument("--output")
    assert parser.parse_args(["a", "--output", "b"]).output == "b"
    with pytest.raises(UserError, match=r"^--(output|images): must not be empty, see --help"):
        parser.parse_args(arguments)
