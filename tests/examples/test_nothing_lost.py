"""A run outlives what happens to its files: through the real command line, a process for each training."""

import errno
import json
import os
import re
import shutil
import signal
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from minunet.commands import train, training_options
from minunet.data.splits import fold_of
from tests import command_line
from tests.command_line import BECOMES_A_PIPE, NO_PICTURES, SMALL, progress, tree, weights, write_patients

pytestmark = pytest.mark.skipif(os.name != "posix", reason="folders and signals as POSIX has them")

ARGUMENTS = ("--data", "kaggle_3m", *SMALL, "--epochs", "2", "--output", "run")


def run(*command, before="", **options):
    """The command, but for drawing: none of these tests looks at a picture."""
    return command_line.run(*command, before=NO_PICTURES + before, **options)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of the data and of a training to which nothing happens."""
    folder = tmp_path_factory.mktemp("unbroken")
    write_patients(folder / "kaggle_3m")
    ended = run("train_lgg", *ARGUMENTS, cwd=folder)
    assert (ended.code, ended.err) == (0, "")
    return folder


@pytest.fixture
def place(unbroken, tmp_path):
    """A folder with the same data and no run."""
    (tmp_path / "kaggle_3m").symlink_to(unbroken / "kaggle_3m")
    return tmp_path


def assert_same_run(folder, unbroken):
    assert progress(folder)["finished"]
    for name in ("last.npz", "best.npz"):
        assert weights(folder, name) == weights(unbroken / "run", name)
    assert (folder / "history.csv").read_bytes() == (unbroken / "run" / "history.csv").read_bytes()


# ------------------------------------------------------------------------------------------ folders without fsync


REFUSE_FOLDERS = """
import os, stat
def fsync(descriptor, fsync=os.fsync):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError({0}, os.strerror({0}))
    fsync(descriptor)
os.fsync = fsync
"""


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_run_on_a_file_system_that_syncs_no_folders(place, unbroken, number):
    ended = run("train_lgg", *ARGUMENTS, cwd=place, before=REFUSE_FOLDERS.format(number))
    assert (ended.code, ended.err) == (0, "")
    assert_same_run(place / "run", unbroken)


def test_a_failing_disk_is_not_passed_over(place):
    ended = run("train_lgg", *ARGUMENTS, cwd=place, before=REFUSE_FOLDERS.format(errno.EIO))
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("error: run: cannot be written (Input/output error), ")
    assert "may be lost in a power cut" in line


# ------------------------------------------------------------------------------------------ long runs


# The run has come to epoch 20,000 when its first one ends; all but the last rows of its history are copies.
LONG_AGO = """
import os, signal
from minunet.training import loop
def judge(run, row, judge=loop._Run._judge):
    best = judge(run, row)
    if run.progress.epoch == 1:
        run.progress.history = [{**row, "epoch": number} for number in range(1, 20_001)]
        run.progress.epoch, run.progress.finished = 20_000, False
        run.optimizer.steps = run.ema.updates = 20_000 * run.steps_per_epoch
        os.kill(os.getpid(), signal.SIGTERM)  # after the first step of epoch 20,001
    return best
loop._Run._judge = judge
"""


def test_20000_epochs_of_history_are_saved_and_resumed(place):
    arguments = ("--data", "kaggle_3m", *SMALL, "--epochs", "20002", "--output", "run")
    ended = run("train_lgg", *arguments, cwd=place, before=LONG_AGO)
    assert ended.code == 143, ended
    assert progress(place / "run")["epoch"] == 20_000
    ended = run("train_lgg", "--resume", "run", "--quiet", cwd=place)
    assert (ended.code, ended.err) == (0, "")
    assert progress(place / "run")["finished"]
    names, *rows = (place / "run" / "history.csv").read_text().splitlines()
    assert names.split(",")[0] == "epoch"
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, 20_003))
    assert rows[19_999].split(",")[1:] == rows[0].split(",")[1:]


# ------------------------------------------------------------------------------------------ history.csv


KILL_BEFORE_HISTORY = """
import os, signal
from minunet.training import loop
def write_text(path, text, write_text=loop.write_text):
    if text.count("\\n") == 1 + {}:
        os.kill(os.getpid(), signal.SIGKILL)
    write_text(path, text)
loop.write_text = write_text
"""


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_kill_between_last_npz_and_history_csv_costs_no_row(place, unbroken, epoch):
    ended = run("train_lgg", *ARGUMENTS, cwd=place, before=KILL_BEFORE_HISTORY.format(epoch))
    assert ended.code == -signal.SIGKILL
    assert progress(place / "run")["epoch"] == epoch
    assert (place / "run" / "history.csv").exists() == (epoch == 2)  # with the row of the first epoch alone
    ended = run("train_lgg", "--resume", "run", "--quiet", cwd=place)
    assert (ended.code, ended.err) == (0, "")
    assert_same_run(place / "run", unbroken)


# ------------------------------------------------------------------------------------------ folders that disappear


# What is run after the first epoch of a training, in its process.
AFTER_AN_EPOCH = """
import os, resource, shutil, signal
from minunet.training import loop
def once_an_epoch(run, finish=loop._Run.finish_epoch):
    finish(run)
    if run.progress.epoch == 1:
        {}
loop._Run.finish_epoch = once_an_epoch
"""

FOLDER_LOST = {
    "deleted": ("shutil.rmtree('runs/run')", "runs/rescued-run"),
    "moved": ("os.rename('runs/run', 'elsewhere')", "runs/rescued-run"),
    "deleted with the one above it": ("shutil.rmtree('runs')", "runs/rescued-run"),
    "moved, and another in its place": (
        "os.rename('runs/run', 'elsewhere'); shutil.copytree('precious', 'runs/run')",
        "runs/rescued-run",
    ),
    "moved, and a link in its place": (
        "os.rename('runs/run', 'elsewhere'); os.symlink('../precious', 'runs/run')",
        "runs/rescued-run",
    ),
    "deleted, and made again": ("shutil.rmtree('runs/run'); os.mkdir('runs/run')", "runs/rescued-run"),
    "replaced by a file": ("shutil.rmtree('runs/run'); open('runs/run', 'w')", "runs/rescued-run"),
    "a rescued one is there already": (
        "shutil.rmtree('runs/run'); os.mkdir('runs/rescued-run')",
        "runs/rescued-run-2",
    ),
    "no place beside it": ("shutil.rmtree('runs'); open('runs', 'w')", "tmp/rescued-run"),
    "deleted, then stopped": (
        "shutil.rmtree('runs/run'); os.kill(os.getpid(), signal.SIGTERM)",
        "runs/rescued-run",
    ),
}


def make_precious(place):
    """A folder of somebody's, with files named like those of a run."""
    (place / "precious").mkdir()
    for name in ("best.npz", "last.npz", "history.csv", "metrics.json", "samples.png", "curves.png"):
        (place / "precious" / name).write_text("a day's work")
    return tree(place / "precious")


@pytest.mark.parametrize("name", FOLDER_LOST)
def test_a_run_whose_folder_disappears_is_saved_elsewhere_and_goes_on(place, unbroken, name):
    happens, rescued = FOLDER_LOST[name]
    (place / "tmp").mkdir()
    precious = make_precious(place)
    ended = run(
        "train_lgg",
        *ARGUMENTS[:-1],
        "runs/run",
        cwd=place,
        before=AFTER_AN_EPOCH.format(happens),
        env={"TMPDIR": str(place / "tmp")},
    )
    assert ended.code == 2, ended
    line = ended.err.splitlines()[-1]
    assert line.startswith("error: runs/run: was deleted or moved while the run was at work; ")
    assert line.endswith(f"{rescued}, go on with --resume {line.split()[-1]}")
    assert "unchanged" not in line
    assert tree(place / "precious") == precious
    if "another in its place" in name:
        assert tree(place / "runs" / "run") == precious
    if "made again" in name:
        assert tree(place / "runs" / "run") == {}
    ended = run("train_lgg", "--resume", rescued, "--quiet", cwd=place)
    assert (ended.code, ended.err) == (0, "")
    assert weights(place / rescued) == weights(unbroken / "run")
    assert (place / rescued / "history.csv").read_bytes() == (unbroken / "run" / "history.csv").read_bytes()
    assert (place / rescued / "metrics.json").exists()


# Once a function has returned, a link to a folder of somebody's is where the run's folder was.
REPLACED_AFTER = """
import os
from minunet.results import report
from minunet.training import loop, metrics
def then_replace(*arguments, function={0}.{1}, **options):
    result = function(*arguments, **options)
    os.rename("run", "elsewhere")
    os.symlink("precious", "run")
    return result
{0}.{1} = then_replace
"""


@pytest.mark.parametrize(
    ("module", "function", "missing"),
    [
        ("report", "write_samples", "last.npz"),
        ("loop", "fit", "curves.png"),
        ("metrics", "evaluate_masks", "metrics.json"),
        ("report", "plot_per_patient", "predictions.png"),
    ],
)
def test_a_folder_that_is_replaced_before_or_after_the_training_is_not_written_into(place, module, function, missing):
    precious = make_precious(place)
    ended = run("train_lgg", *ARGUMENTS, cwd=place, before=REPLACED_AFTER.format(module, function))
    assert ended.code == 2, ended
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error: run: was deleted or moved while the run was at work, {missing} was not written; ")
    assert tree(place / "precious") == precious
    if missing != "last.npz":  # what the line says: the run can be resumed where it lies now
        ended = run("train_lgg", "--resume", "elsewhere", "--quiet", cwd=place)
        assert (ended.code, ended.err) == (0, "")
        assert (place / "elsewhere" / "predictions.png").exists()


def test_a_run_whose_working_folder_disappears_is_saved_among_the_temporary_files(place, unbroken, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")
    happens = "shutil.rmtree(os.getcwd())"
    before, env = AFTER_AN_EPOCH.format(happens), {"TMPDIR": str(temporary)}
    ended = run("train_lgg", *ARGUMENTS, cwd=place, before=before, env=env)
    assert ended.code == 2
    rescued = temporary / "rescued-run"
    assert ended.err.endswith(f"its state is saved in {rescued}, go on with --resume {rescued}\n")
    arguments = ("--resume", rescued, "--data", unbroken / "kaggle_3m", "--quiet")
    ended = run("train_lgg", *arguments, cwd=temporary)
    assert (ended.code, ended.err) == (0, "")
    assert weights(rescued) == weights(unbroken / "run")


def test_a_run_that_is_stopped_in_its_first_epoch_when_its_folder_is_gone(place, unbroken):
    happens = """
import os, shutil, signal
from minunet.training import loop
def step(*arguments, train_step=loop.train_step, **options):
    shutil.rmtree("run")
    os.kill(os.getpid(), signal.SIGTERM)
    return train_step(*arguments, **options)
loop.train_step = step
"""
    ended = run("train_lgg", *ARGUMENTS, cwd=place, before=happens)
    assert ended.code == 2
    assert ended.err.endswith("its state is saved in rescued-run, go on with --resume rescued-run\n")
    assert progress(place / "rescued-run")["epoch"] == 0
    ended = run("train_lgg", "--resume", "rescued-run", "--quiet", cwd=place)
    assert (ended.code, ended.err) == (0, "")
    assert_same_run(place / "rescued-run", unbroken)


def test_a_run_that_finds_no_place_at_all_says_that_it_is_lost(place):
    happens = "shutil.rmtree('run'); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))"
    ended = run("train_lgg", *ARGUMENTS, cwd=place, before=AFTER_AN_EPOCH.format(happens))
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("error: run: was deleted or moved while the run was at work, and ")
    assert "the state of the run is lost" in line


@pytest.mark.parametrize("monitored", ["in mid-run", "at the end"])
def test_a_missing_best_npz_is_replaced_by_the_last_state(place, unbroken, monitored):
    before = AFTER_AN_EPOCH.format("os.kill(os.getpid(), signal.SIGTERM)") if monitored == "in mid-run" else ""
    assert run("train_lgg", *ARGUMENTS, cwd=place, before=before).code == (143 if before else 0)
    (place / "run" / "best.npz").unlink()
    ended = run("train_lgg", "--resume", "run", "--quiet", cwd=place)
    assert (ended.code, ended.err) == (0, "")
    assert "warning: run/best.npz: missing, the state in last.npz takes its place\n" in ended.out
    assert weights(place / "run") == weights(unbroken / "run")
    assert (place / "run" / "metrics.json").exists()


def test_settings_that_become_a_pipe_when_they_are_read_do_not_hang(place, unbroken):
    shutil.copytree(unbroken / "run", place / "run")
    ended = run("train_lgg", "--resume", "run", cwd=place, before=BECOMES_A_PIPE.format("config.json"))
    assert ended.code == 2
    assert ended.err == "error: run/config.json: no settings of a run (ValueError), start a new run\n"


def test_an_image_that_becomes_a_pipe_when_it_is_read_does_not_hang(place, unbroken):
    (place / "kaggle_3m").unlink()
    shutil.copytree(unbroken / "kaggle_3m", place / "kaggle_3m")
    name = min(place.rglob("*.tif")).name
    ended = run("train_lgg", *ARGUMENTS, cwd=place, before=BECOMES_A_PIPE.format(name))
    assert_refused(ended, f"{name}: cannot be read (not a regular file); replace or remove it")
    assert not (place / "run").exists()


# ------------------------------------------------------------------------------------------ data that have moved


@pytest.fixture
def stopped(place, unbroken):
    """A run on data of its own that was stopped in its second epoch; then the data moved."""
    (place / "kaggle_3m").unlink()
    shutil.copytree(unbroken / "kaggle_3m", place / "kaggle_3m")
    stop = AFTER_AN_EPOCH.format("os.kill(os.getpid(), signal.SIGTERM)")
    assert run("train_lgg", *ARGUMENTS, cwd=place, before=stop).code == 143
    (place / "kaggle_3m").rename(place / "moved")
    return place


def assert_refused(ended, *words):
    assert ended.code == 2, ended
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_data_that_have_moved_are_found_by_a_flag_and_then_remembered(stopped, unbroken):
    ended = run("train_lgg", "--resume", "run", "--quiet", cwd=stopped)
    assert_refused(ended, "kaggle_3m: no such folder, say by --data where the run's data are now")
    # Stopped once more: the new place is that of the run from now on.
    stop = "import os, signal\nfrom minunet.training import loop\n" + (
        "loop.train_step = lambda *a, step=loop.train_step, **o: os.kill(os.getpid(), signal.SIGTERM) or step(*a, **o)"
    )
    ended = run("train_lgg", "--resume", "run", "--data", "moved", "--quiet", cwd=stopped, before=stop)
    assert ended.code == 143, ended
    assert not progress(stopped / "run")["finished"]
    settings = json.loads((stopped / "run" / "config.json").read_text())["options"]
    assert settings["data"] == str((stopped / "moved").resolve())
    ended = run("train_lgg", "--resume", "run", "--quiet", cwd=stopped)
    assert (ended.code, ended.err) == (0, "")
    assert_same_run(stopped / "run", unbroken)


def change_a_pixel(folder):
    path = next(path for path in sorted(folder.rglob("*.tif")) if not path.stem.endswith("_mask"))
    with Image.open(path) as picture:
        changed = np.array(picture)
    changed[3, 3] ^= 1
    Image.fromarray(changed).save(path)


def remove_a_patient(folder):
    shutil.rmtree(min(folder.iterdir()))


def rename_a_patient(folder):
    """To the other end of the alphabet, and to another part of the split."""
    first = min(folder.iterdir())
    for number in range(10):
        if fold_of(f"Z{number}") != fold_of(first.name):
            first.rename(folder / f"Z{number}")
            return


@pytest.mark.parametrize("change", [change_a_pixel, remove_a_patient, rename_a_patient])
def test_other_data_are_refused_wherever_they_lie(stopped, change):
    change(stopped / "moved")
    before = tree(stopped)
    ended = run("train_lgg", "--resume", "run", "--data", "moved", "--quiet", cwd=stopped)
    assert_refused(ended, "run/last.npz: belongs to another run (", " was ", "same settings and data")
    assert tree(stopped) == before


# ------------------------------------------------------------------------------------------ memory for the data


# So that hardly more than what the program takes itself is left when it reads the data.
LITTLE_MEMORY = """
import pathlib, resource
import PIL.Image, matplotlib.pyplot, scipy.ndimage, tqdm
from minunet import engines
from minunet.data import reader, phantom, verify
from minunet.results import report
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 10**8, resource.RLIM_INFINITY))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is of Linux")
@pytest.mark.parametrize("source", ["read", "drawn"])
def test_data_that_do_not_fit_are_said_before_and_when_memory_is_out(place, source):
    data = ARGUMENTS[:2] if source == "read" else ()
    before = tree(place)
    arguments = (*data, "--preset", "quick", "--device", "cpu", "--image-size", "2048", "--output", "run")
    ended = run("train_lgg", *arguments, cwd=place, before=LITTLE_MEMORY)
    need = r"77 slices of 2048 x 2048 pixels take 1\.3 GB and 0\.\d GB are free"
    words = {"read": rf"{need}, choose at most \d+ or fewer patients", "drawn": "choose smaller images"}[source]
    assert ended.code == 2, ended
    assert re.fullmatch(f"error: --image-size: out of memory, {words}\n", ended.err), ended.err
    warning = f"warning: memory may run out, and the system may then kill this run: {words}\n"
    assert len(re.findall(warning, ended.out)) == 1, ended.out
    assert tree(place) == before


def test_data_are_in_memory_once(place, monkeypatch):
    """Reading and splitting take little more than the pixels."""
    monkeypatch.chdir(place)
    for split in ("patient", "slice"):
        arguments = ["--data", "kaggle_3m", "--image-size", "128", "--split", split, "--output", "run"]
        options = training_options.parse(arguments, "minunet train", "")
        preset = training_options.choose_preset(options, "cpu")
        train.read_data(options, preset)  # what is imported and cached then does not count
        tracemalloc.start()
        try:
            parts = train.read_data(options, preset)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        pixels = sum(part.images.nbytes + part.masks.nbytes for part in parts)
        assert pixels == 77 * 128 * 128 * 4
        assert peak < 1.25 * pixels
