"""``minunet train --init`` and ``--train-only``: a run that begins with the weights of another, and trains a part."""

import hashlib
import json
from functools import partial

import numpy as np
import pytest

from minunet.base import cli
from minunet.base.archive import load
from minunet.base.signals import StopRequest
from minunet.commands import train
from minunet.data import phantom
from minunet.training.checkpoint import load_net, save_training
from minunet.training.optim import AdamW

SMALL = ("--image-size=16", "--epochs=1", "--images-per-epoch=16", "--quiet", "--device=cpu", "--engine=plain")


@pytest.fixture(scope="module", autouse=True)
def few_patients():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "make", partial(phantom.make, patients=4))
        yield


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The best checkpoint of a finished run."""
    folder = tmp_path_factory.mktemp("before") / "run"
    assert cli.run(train.main, [*SMALL, f"--output={folder}"]) == 0
    return folder / "best.npz"


def refused(capsys, *arguments):
    """The line of a command that is wrong."""
    capsys.readouterr()
    assert cli.run(train.main, list(map(str, arguments))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(("flags", "weights"), [((), "ema"), (("--init-weights=raw",), "raw")])
def test_a_run_begins_with_the_weights_and_trains_the_part(before, tmp_path, capsys, flags, weights):
    folder = tmp_path / "run"
    arguments = [*SMALL, f"--init={before}", *flags, "--train-only=up1,head", "--seed=1", f"--output={folder}"]
    assert cli.run(train.main, arguments) == 0
    out = capsys.readouterr().out
    assert f"network: begins with the weights of {before}\n" in out
    assert "note: --init" not in out
    start, _ = load_net(before, weights)
    found, metadata = load_net(folder / "last.npz", "raw")
    for name, array in start.parameters().items():
        trained = name.startswith(("up1.", "head."))
        assert np.array_equal(array, found.parameters()[name]) != trained, name
    digest = hashlib.sha256(before.read_bytes()).hexdigest()
    assert metadata["init"] == {"path": str(before), "sha256": digest, "weights": "raw" if flags else "auto"}
    assert metadata["training"]["train_only"] == ["up1", "head"]
    assert metadata["optimizer"]["steps"] == 2  # they start anew
    options = json.loads((folder / "config.json").read_text())["options"]
    assert (options["init"], options["train_only"]) == (str(before), "up1,head")


def test_the_run_is_resumed_without_the_checkpoint_that_it_began_with(before, tmp_path, monkeypatch, capsys):
    copy, folder = tmp_path / "copy.npz", tmp_path / "run"
    copy.write_bytes(before.read_bytes())
    arguments = [*SMALL, f"--init={copy}", "--train-only=head"]
    assert cli.run(train.main, [*arguments, f"--output={tmp_path / 'whole'}"]) == 0
    monkeypatch.setattr(StopRequest, "requested", property(lambda self: True))
    monkeypatch.setattr(StopRequest, "exit_if_requested", lambda self: None)
    monkeypatch.setattr(train, "test", lambda *arguments: None)
    monkeypatch.setattr("minunet.results.report.write_curves", lambda *arguments: None)  # there is no epoch yet
    assert cli.run(train.main, [*arguments, f"--output={folder}"]) == 0
    assert "stopped in epoch 1" in capsys.readouterr().out
    monkeypatch.undo()
    copy.unlink()
    assert cli.run(train.main, [f"--resume={folder}", "--quiet", "--device=cpu", "--engine=plain"]) == 0
    (whole, metadata), (resumed, again) = (load(tmp_path / name / "last.npz") for name in ("whole", "run"))
    assert again["init"] == metadata["init"]
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(array, resumed[name]) for name, array in whole.items())


def test_images_that_were_prepared_in_another_way_are_said(before, tmp_path, capsys):
    arguments = [*SMALL, "--image-size=32", f"--init={before}", f"--output={tmp_path / 'run'}"]
    assert cli.run(train.main, arguments) == 0
    line = "note: --init: the images of that network were not prepared as these are (image_size was 16, is 32)\n"
    assert line in capsys.readouterr().out


def test_a_checkpoint_that_says_nothing_of_its_images_may_begin_a_run(before, tmp_path, capsys):
    net, _ = load_net(before)
    save_training(tmp_path / "net.npz", net=net, optimizer=AdamW(net.parameters()), metadata={"preprocessing": 5})
    arguments = [*SMALL, f"--init={tmp_path / 'net.npz'}", f"--output={tmp_path / 'run'}"]
    assert cli.run(train.main, arguments) == 0
    assert "(image_size was None, is 16; normalization was None, " in capsys.readouterr().out
    averaged = refused(capsys, *arguments[:-1], "--init-weights=ema", f"--output={tmp_path / 'other'}")
    assert "net.npz: holds no averaged weights" in averaged
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--preset=small",), "best.npz: its weights do not fit (widths is (12, 24, 48, 96) there and (16, 32, 64, "),
        (("--train-only=up1,hed",), "--train-only: 'hed' names no part of the network; there are down1, down2, down3,"),
        (("--train-only=up1,",), "--train-only: '' names no part of the network"),
        (("--train-only=head", "--precision=tf32"), "--precision: tf32 is not available with --train-only, "),
    ],
)
def test_what_does_not_go_together_is_one_line_and_nothing_is_written(
    before, tmp_path, monkeypatch, capsys, flags, words
):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *SMALL, f"--init={before}", *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_takes_no_other_weights(before, capsys):
    line = refused(capsys, "--resume=run", f"--init={before}")
    assert line == "error: --init: not together with --resume, which takes the run's settings"


def test_a_missing_checkpoint_and_weights_of_none_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *SMALL, "--init=gone.npz") == "error: gone.npz: no such file, give the path of a checkpoint"
    assert refused(capsys, *SMALL, "--init-weights=raw").startswith("error: --init-weights: says which weights")
    assert list(tmp_path.iterdir()) == []
