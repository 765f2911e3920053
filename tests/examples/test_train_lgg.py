"""examples/train_lgg.py as people run it: a process, real files, real signals."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minunet.base.archive import load, sha256_of_arrays
from minunet.data import phantom
from tests import command_line
from tests.base.processes import POSIX

SCRIPT = Path(__file__).parents[2] / "examples" / "train_lgg.py"
FILES = ["config.json", "history.csv", "metrics.json", "best.npz", "last.npz"]
PICTURES = ["samples.png", "curves.png", "predictions.png", "per_patient.png"]
SMALL = ["--image-size", "16", "--epochs", "3", "--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    """A few synthetic patients as TIFFs in the layout of the download, in a path that is not easy."""
    folder = tmp_path_factory.mktemp("données with spaces") / "kaggle_3m"
    slices = phantom.make(patients=12, size=16, seed=3)
    keep = [i for i, number in enumerate(slices.numbers) if number % 3 == 0]
    phantom.write_kaggle(folder, slices.subset(keep))
    return folder


def command(*arguments):
    return [sys.executable, "-W", "error", str(SCRIPT), *map(str, arguments)]


def train(*arguments, cwd):
    """In a process of its own, on all cores."""
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=600)


def weights(folder, name="last.npz"):
    return sha256_of_arrays(load(Path(folder) / name)[0])


def assert_refused(result, *words):
    """One line that says what is wrong, exit code 2, no traceback."""
    assert result.code == 2, result
    (line,) = result.err.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def unbroken(kaggle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    result = train("--data", kaggle, "--preset", "quick", "--output", "run", *SMALL, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result, folder / "run"


def test_a_run_on_tiffs_leaves_everything_it_promises(unbroken):
    result, folder = unbroken
    for name in FILES + PICTURES:
        assert (folder / name).stat().st_size > 0, name
        assert name in result.stdout
    for name in PICTURES:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "history.csv").read_text().count("\n") == 4
    scores = json.loads((folder / "metrics.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert scores["test"]["per_patient"]["names"] == config["patients"]["test"]
    parts = [set(config["patients"][part]) for part in ("train", "validation", "test")]
    assert all(parts)
    assert len(set.union(*parts)) == sum(map(len, parts)) == 12  # no patient on two sides
    assert 0 <= scores["best_flair_threshold"]["raw"]["mean_dice"] <= 1
    mean = scores["test"]["per_patient"]["summary"]["dice"]["mean"]
    assert f"{mean:.3f}" in result.stdout
    assert result.stderr == ""


@POSIX
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_run_that_was_ended_resumes_to_the_same_bits(kaggle, unbroken, tmp_path, name):
    number = getattr(signal, name)
    arguments = ("--data", kaggle, "--preset", "quick", "--output", "run", *SMALL)
    process = subprocess.Popen(command(*arguments), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "last.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=600)
    # Where the signal came too late, the run is finished, and resuming it still has to end with the same bits. It may
    # even have come after the last handler. How a training ends by a signal, test_bad_input.py sees for certain.
    assert process.returncode in (0, -number, 128 + number)

    result = train("--resume", "run", "--quiet", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    _, folder = unbroken
    assert weights(tmp_path / "run") == weights(folder)
    assert weights(tmp_path / "run", "best.npz") == weights(folder, "best.npz")
    assert (tmp_path / "run" / "history.csv").read_text() == (folder / "history.csv").read_text()


def test_two_runs_that_start_together_have_a_folder_each(kaggle, tmp_path):
    arguments = command("--data", kaggle, "--preset", "quick", "--image-size", "16", "--epochs", "1", "--quiet")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(arguments, cwd=tmp_path, text=True, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=3600) for process in both]
    assert [(process.returncode, err) for process, (_, err) in zip(both, said, strict=True)] == [(0, "")] * 2
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["quick", "quick-2"]
    assert all((tmp_path / "runs" / name / "metrics.json").exists() for name in ("quick", "quick-2"))


def test_without_arguments_the_phantom_is_used(tmp_path):
    ended = command_line.run("train_lgg", "--image-size", "16", "--epochs", "1", "--quiet", cwd=tmp_path)
    assert ended.code == 0, ended
    assert "synthetic" in ended.out
    assert (tmp_path / "runs" / "quick" / "metrics.json").exists()


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "module://gone", "gone"])
def test_a_backend_that_is_not_installed_is_no_error(kaggle, tmp_path, backend):
    """As a notebook leaves it in the environment of the commands that are run from it."""
    before = "import sys; sys.modules['matplotlib_inline'] = None"
    for script, arguments in (
        ("predict", ["--help"]),
        ("train_lgg", ["--data", kaggle, "--preset", "quick", *SMALL[:2], "--epochs", "1", "--quiet", "--cores", "1"]),
    ):
        ended = command_line.run(script, *arguments, cwd=tmp_path, before=before, env={"MPLBACKEND": backend})
        assert (ended.code, ended.err) == (0, "")
    assert all((tmp_path / "runs" / "quick" / name).exists() for name in PICTURES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "nowhere"), ("nowhere", "no such folder")),
        (("--epochs", "0"), ("--epochs", "0")),
        (("--learning-rate", "nan"), ("--learning-rate", "nan")),
        (("--image-size", "100"), ("--image-size", "100", "multiple of 8")),
        (("--fold", "5"), ("--fold", "5")),
        (("--preset", "huge"), ("--preset", "huge")),
        (("--resume", "nowhere"), ("nowhere",)),
        (("--resume", "run", "--epochs", "5"), ("--epochs", "--resume")),
        (("--no-such-flag",), ("--no-such-flag",)),
    ],
)
def test_wrong_flags_are_named_before_anything_is_written(arguments, words, tmp_path):
    assert_refused(command_line.run("train_lgg", *arguments, "--quiet", cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_a_gpu_is_refused_and_auto_says_why_not(tmp_path):
    no_gpu = {"CUDA_VISIBLE_DEVICES": "-1"}
    ended = command_line.run("train_lgg", "--device", "cuda", "--quiet", cwd=tmp_path, env=no_gpu)
    assert_refused(ended, "--device cuda", "--device cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_bad_data_folder_is_named(kaggle, tmp_path):
    broken = tmp_path / "data"
    phantom.write_kaggle(broken, phantom.make(patients=6, size=16))
    patient = sorted(broken.iterdir())[0]
    first, second = sorted(path for path in patient.iterdir() if not path.name.endswith("_mask.tif"))[:2]
    first.with_name(f"{first.stem}_mask.tif").unlink()
    assert_refused(command_line.run("train_lgg", "--data", broken, "--quiet", cwd=tmp_path), first.name)
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    assert_refused(command_line.run("train_lgg", "--data", broken, "--quiet", cwd=tmp_path), second.name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_folder_with_a_run_in_it_is_not_overwritten(unbroken, tmp_path):
    _, folder = unbroken
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert_refused(command_line.run("train_lgg", *SMALL, "--output", folder, cwd=tmp_path), str(folder), "not empty")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
