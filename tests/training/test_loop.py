"""The run: what it leaves, what it chooses, and that a resumed run is the unbroken one."""

import csv
import math
import os
from dataclasses import replace

import numpy as np
import pytest

from minunet.base.archive import load, save, sha256_of_arrays
from minunet.base.durable import TEMPORARY_NAME
from minunet.base.environment import environment
from minunet.base.errors import Diverged, UserError
from minunet.data.augment import PRESETS, Augmentation
from minunet.network.loss import SegmentationLoss, SoftmaxLoss
from minunet.network.unet import UNet
from minunet.training import loop, metrics
from minunet.training.checkpoint import load_net
from minunet.training.config import TrainingConfig
from minunet.training.evaluation import Evaluation, predict_slices
from minunet.training.loop import Hooks, TrainingData, fit
from minunet.training.step import Engine
from tests.tools import crash_states
from tests.training.cases import NORMALIZATION, all_arrays, tiny_net

CONFIG = TrainingConfig(
    epochs=3,
    batch_size=4,
    images_per_epoch=10,
    sampling="tumour",
    augmentation=PRESETS["strong"],
    lr=0.01,
    warmup_epochs=1,
    clip_norm=1.0,
    batch_norm_momentum=0.5,
    ema_decay=0.9,
)


def engine(net=None, config=CONFIG):
    return Engine(net or tiny_net(dtype="float32"), config.loss)


def run(slices, folder, config=CONFIG, net=None, should_stop=None, **options):
    data, hooks = TrainingData(*slices, NORMALIZATION), Hooks(should_stop)
    return fit(engine(net, config), data, config, folder, hooks=hooks, progress_bar=False, **options)


@pytest.fixture(scope="module")
def whole(slices, tmp_path_factory):
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    run(slices, folder)
    return folder


def final_weights(folder, name="last.npz"):
    arrays, _ = load(folder / name)
    return sha256_of_arrays(arrays)


def stop_after(steps):
    count = iter(range(1, steps + 1))
    return lambda: next(count) == steps


def test_a_run_leaves_its_history_and_checkpoints(slices, tmp_path):
    progress = run(slices, tmp_path)
    assert progress.finished
    assert [row["epoch"] for row in progress.history] == [1, 2, 3]
    with (tmp_path / "history.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == progress.history
    best = max(progress.history, key=lambda row: row["validation_dice"])
    assert (progress.best_epoch, progress.best_value) == (best["epoch"], best["validation_dice"])
    arrays, metadata = load(tmp_path / "best.npz")
    assert metadata["progress"]["best_epoch"] == len(arrays["history/epoch"]) == best["epoch"]
    net, _ = load_net(tmp_path / "best.npz")
    _, validation = slices
    probabilities = predict_slices(net, validation, NORMALIZATION)
    counts = metrics.count(probabilities > 0.5, validation.masks > 0)
    assert metrics.dice(counts) == pytest.approx(best["validation_dice"], abs=1e-6)


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8])  # in the first epoch, at its end, in the middle of the second, ...
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(slices, whole, tmp_path, stop):
    progress = run(slices, tmp_path, should_stop=stop_after(stop))
    assert not progress.finished
    other = tiny_net(dtype="float32")
    for array in other.parameters().values():
        array[...] = 7  # whatever it was: all comes from the checkpoint
    progress = run(slices, tmp_path, net=other, resume=True)
    assert progress.finished
    for name in ("last.npz", "best.npz"):
        assert final_weights(whole, name) == final_weights(tmp_path, name)
    assert (whole / "history.csv").read_text() == (tmp_path / "history.csv").read_text()


@pytest.mark.skipif(os.name != "posix", reason="fsync of folders as POSIX has it")
def test_from_every_state_after_a_power_cut_at_the_end_of_an_epoch_the_run_is_resumed(
    slices, whole, tmp_path, monkeypatch
):
    """The end of an epoch writes three files. What is left of them is the unbroken run after a resume."""
    before, calls = {}, []

    def recorded_finish(self, finish=loop._Run.finish_epoch):
        if self.progress.epoch != 1:
            return finish(self)
        before.update({path.name: path.read_bytes() for path in self.folder.iterdir()})
        self.progress.best_value = -1.0  # so that the second epoch is the best one so far
        with crash_states.recorded() as made:
            finish(self)
        calls.extend(made)

    monkeypatch.setattr(loop._Run, "finish_epoch", recorded_finish)
    run(slices, tmp_path / "recorded", should_stop=stop_after(7))
    monkeypatch.undo()
    renamed = [call.new for call in calls if isinstance(call, crash_states.Rename)]
    assert renamed == ["best.npz", "last.npz", "history.csv"]
    left = {  # without the temporary files
        frozenset((name, data) for name, data in state.files.items() if not TEMPORARY_NAME.fullmatch(name))
        for state in crash_states.states(before, crash_states.merged(calls))
    }
    assert len(left) == 4  # none of the three files is the new one, the first is, two are, all are
    for number, files in enumerate(left):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, data in files:
            (folder / name).write_bytes(data)
        assert run(slices, folder, resume=True).finished
        assert final_weights(folder) == final_weights(whole)
        assert (folder / "history.csv").read_text() == (whole / "history.csv").read_text()


@pytest.mark.parametrize("way", ["returns True", "raises"])
def test_a_function_after_each_epoch_may_stop_the_run_and_nothing_is_lost(slices, whole, tmp_path, way):
    rows, on_validation = [], []

    def after_epoch(progress, net):
        rows.append(progress.history[-1])
        probabilities = predict_slices(net, slices[1], NORMALIZATION)
        on_validation.append(metrics.dice(metrics.count(probabilities > 0.5, slices[1].masks > 0)))
        assert load(tmp_path / "last.npz")[1]["progress"]["epoch"] == progress.epoch == len(rows)
        if way == "raises" and len(rows) == 2:
            raise ZeroDivisionError("in the hook")
        return len(rows) == 2

    data, hooks = TrainingData(*slices, NORMALIZATION), Hooks(after_epoch=after_epoch)
    if way == "raises":
        with pytest.raises(ZeroDivisionError, match="in the hook"):
            fit(engine(), data, CONFIG, tmp_path, hooks=hooks, progress_bar=False)
    else:
        progress = fit(engine(), data, CONFIG, tmp_path, hooks=hooks, progress_bar=False)
        assert not progress.finished
    finished = fit(engine(), data, CONFIG, tmp_path, hooks=hooks, progress_bar=False, resume=True)
    assert finished.finished
    assert rows == finished.history
    assert on_validation == pytest.approx([row["validation_dice"] for row in rows], abs=1e-6)
    assert final_weights(tmp_path) == final_weights(whole)


def test_a_finished_run_has_nothing_to_resume(slices, tmp_path):
    run(slices, tmp_path)
    before = final_weights(tmp_path)
    assert run(slices, tmp_path, resume=True).finished
    assert final_weights(tmp_path) == before


def test_another_configuration_or_no_checkpoint_cannot_be_resumed(slices, tmp_path):
    with pytest.raises(UserError, match=r"last\.npz"):
        run(slices, tmp_path, resume=True)
    run(slices, tmp_path, should_stop=stop_after(1))
    with pytest.raises(UserError, match=r"lr was 0\.01, is 0\.02"):
        run(slices, tmp_path, replace(CONFIG, lr=0.02), resume=True)


def test_patience_ends_a_run_that_has_stopped_getting_better(slices, tmp_path):
    config = replace(CONFIG, epochs=20, lr=1e-12, monitor="loss", ema_decay=None, patience=2, warmup_epochs=0)
    progress = run(slices, tmp_path, config)
    assert progress.finished
    assert len(progress.history) < 20
    assert len(progress.history) == progress.best_epoch + 2


@pytest.mark.parametrize("monitor", ["dice", "loss"])
def test_the_monitored_quantity_chooses_the_best_epoch(slices, tmp_path, monitor):
    progress = run(slices, tmp_path, replace(CONFIG, monitor=monitor))
    chosen = {
        "dice": max(progress.history, key=lambda row: row["validation_dice"]),
        "loss": min(progress.history, key=lambda row: row["validation_loss"]),
    }
    assert progress.best_epoch == chosen[monitor]["epoch"]


def test_divergence_names_the_place_and_the_files_and_keeps_the_last_checkpoint(slices, tmp_path):
    train, _ = slices
    net = tiny_net(dtype="float32")
    before = sha256_of_arrays(all_arrays(net))
    config = replace(CONFIG, lr=1e30, clip_norm=None, warmup_epochs=0)
    with pytest.raises(Diverged, match=r"epoch 1, step \d+: the loss is .*, first in the .*; the batch was ") as raised:
        run(slices, tmp_path, config, net=net)
    assert any(file in str(raised.value) for file in train.files)
    kept, _ = load_net(tmp_path / "last.npz", "raw")
    assert sha256_of_arrays(all_arrays(kept)) == before


def test_a_network_that_overflows_on_whole_patients_has_diverged(slices, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *arguments, **options: Evaluation(np.inf, 0.0))
    with pytest.raises(Diverged, match="epoch 1, after its last step: the loss on validation patients is inf"):
        run(slices, tmp_path)
    assert load(tmp_path / "last.npz")[1]["progress"]["epoch"] == 0


def test_what_is_not_as_it_was_is_said_on_resuming(slices, tmp_path, monkeypatch, capsys):
    run(slices, tmp_path, should_stop=stop_after(4))
    monkeypatch.setattr(loop, "environment", lambda: environment() | {"numpy": "1.0"})
    assert run(slices, tmp_path, resume=True).finished
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"warning: not as it was, so that the last bits may differ: numpy was {np.__version__!r}, is '1.0'"


def renamed(part, **changes):
    return replace(part, **changes)


@pytest.mark.parametrize("part", [0, 1])
def test_slices_of_other_patients_are_other_data(slices, tmp_path, part):
    """The same pixels in the same order; but what is one patient, and which slice it is, is part of the data."""
    run(slices, tmp_path, should_stop=stop_after(5))
    for change in ({"patients": ("one",) * len(slices[part])}, {"numbers": tuple(n + 1 for n in slices[part].numbers)}):
        if "patients" in change:
            change["numbers"] = tuple(range(len(slices[part])))
        other = list(slices)
        other[part] = renamed(slices[part], **change)
        name = ("train", "validation")[part]
        with pytest.raises(UserError, match=rf"last\.npz: belongs to another run \({name}_patients was "):
            run(other, tmp_path, resume=True)
    assert run(slices, tmp_path, resume=True).finished


def test_the_best_epoch_of_another_run_is_not_taken_for_this_ones(slices, tmp_path):
    run(slices, tmp_path / "a")
    run(slices, tmp_path / "b", replace(CONFIG, seed=1))
    (tmp_path / "a" / "best.npz").write_bytes((tmp_path / "b" / "best.npz").read_bytes())
    with pytest.raises(
        UserError, match=r"best\.npz: belongs to another run \(seed was 1, is 0\), remove it and resume"
    ):
        run(slices, tmp_path / "a", resume=True)
    (tmp_path / "a" / "best.npz").unlink()
    assert run(slices, tmp_path / "a", resume=True).finished


@pytest.mark.parametrize(
    "change", [{"optimizer": {"steps": 0}}, {"optimizer": {"steps": 2**62}}, {"ema": {"updates": 0}}]
)
def test_counts_of_steps_that_are_not_those_of_the_progress_are_refused(slices, tmp_path, change):
    run(slices, tmp_path, should_stop=stop_after(5))
    arrays, metadata = load(tmp_path / "last.npz")
    save(tmp_path / "last.npz", arrays, metadata | change)
    with pytest.raises(UserError, match=r"last\.npz: does not say how far its run had come"):
        run(slices, tmp_path, resume=True)


@pytest.mark.parametrize("environment", [None, [], 5, {}])
def test_without_its_environment_a_run_goes_on_with_a_warning(slices, tmp_path, capsys, environment):
    run(slices, tmp_path, should_stop=stop_after(5))
    arrays, metadata = load(tmp_path / "last.npz")
    save(tmp_path / "last.npz", arrays, metadata | {"environment": environment})
    assert run(slices, tmp_path, resume=True).finished
    assert capsys.readouterr().out.startswith("warning: not as it was, so that the last bits may differ: ")


GOOD = {
    "epoch": 1,
    "step": 2,
    "loss_sum": 0.5,
    "best_epoch": 1,
    "best_value": 0.25,
    "history": [dict.fromkeys(loop.COLUMNS, 0.5) | {"epoch": 1}],
    "finished": False,
}


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 4, "history": 4 * GOOD["history"]},  # of three
        {"epoch": 3, "history": 3 * GOOD["history"]},  # all done, but not finished
        {"epoch": -1},
        {"epoch": 1.0},
        {"epoch": True},
        {"epoch": "1"},
        {"epoch": 2},  # the history has one
        {"step": 4},  # of three
        {"step": -1},
        {"step": None},
        {"loss_sum": math.nan},
        {"loss_sum": "0.5"},
        {"best_epoch": None},
        {"best_epoch": 0},
        {"best_epoch": 2},
        {"best_value": None},
        {"best_value": math.inf},
        {"history": None},
        {"history": []},
        {"history": [1]},
        {"history": {"0": GOOD["history"][0]}},
        {"history": [{"epoch": 1}]},
        {"history": [GOOD["history"][0] | {"train_loss": "low"}]},
        {"history": [GOOD["history"][0] | {"epoch": 2}]},
        {"history": [GOOD["history"][0] | {"train_dice": 1.5}]},
        {"history": [GOOD["history"][0] | {"validation_dice": -0.5}]},
        {"history": [GOOD["history"][0] | {"learning_rate": -1.0}]},
        {"loss_sum": 10**400},
        {"best_value": -(10**400)},
        {"history": [GOOD["history"][0] | {"train_loss": math.nan}]},
        {"finished": 0},
        {"finished": None},
        {"another": 1},
    ],
    ids=repr,
)
def test_progress_that_cannot_be_that_of_the_run_is_refused(change):
    assert loop.Progress.read(GOOD, {}, epochs=3, steps=3) == loop.Progress(**GOOD)
    with pytest.raises(ValueError, match="no progress of"):
        loop.Progress.read(GOOD | change, {}, epochs=3, steps=3)


@pytest.mark.parametrize("missing", GOOD)
def test_progress_that_lacks_an_entry_is_refused(missing):
    """With the default in its place a run would begin anew, with the weights that it has."""
    with pytest.raises(ValueError, match="no progress of"):
        loop.Progress.read({name: value for name, value in GOOD.items() if name != missing}, {}, epochs=3, steps=3)


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": None},  # a column is missing
        {"train_loss": np.array([0.5, 0.5])},  # two rows, where one epoch is done
        {"train_loss": np.array([])},
        {"train_loss": np.array([[0.5]])},
        {"train_loss": np.array(0.5)},
        {name: np.array([0.5, 0.5]) for name in loop.COLUMNS},
        {name: np.array([]) for name in loop.COLUMNS},
    ],
    ids=repr,
)
def test_columns_that_cannot_be_those_of_the_run_are_refused(change):
    entries, columns = loop.Progress(**GOOD).stored()
    assert "history" not in entries
    assert loop.Progress.read(entries, columns, epochs=3, steps=3) == loop.Progress(**GOOD)
    changed = {name: column for name, column in (columns | change).items() if column is not None}
    with pytest.raises(ValueError, match="no progress of"):
        loop.Progress.read(entries, changed, epochs=3, steps=3)


@pytest.mark.parametrize("stored", [None, [], "progress", 5])
def test_what_is_no_progress_is_refused(stored):
    with pytest.raises(ValueError, match="no progress of"):
        loop.Progress.read(stored, {}, epochs=3, steps=3)


@pytest.mark.parametrize("epochs", [0, 1, 20_000])
def test_a_history_comes_back_to_the_last_bit(epochs):
    random = np.random.default_rng(0)
    history = [dict(zip(loop.COLUMNS, (n + 1, *random.random(size=5).tolist()), strict=True)) for n in range(epochs)]
    best = {"best_epoch": 1, "best_value": 0.1} if epochs else {}
    progress = loop.Progress(epoch=epochs, history=history, **best)
    found = loop.Progress.read(*progress.stored(), epochs=20_001, steps=3)
    assert repr(found) == repr(progress)
    assert repr(found.history[:1]) == repr(history[:1])


def test_a_run_whose_history_is_in_its_metadata_is_resumed(slices, whole, tmp_path, monkeypatch):
    """As format 1 had it, which a long run outgrew."""
    run(slices, tmp_path, should_stop=stop_after(5))
    arrays, metadata = load(tmp_path / "last.npz")
    columns = {name: arrays.pop(f"history/{name}").tolist() for name in loop.COLUMNS}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    assert len(rows) == 1
    monkeypatch.setattr("minunet.base.archive.VERSION", 1)
    save(tmp_path / "last.npz", arrays, metadata | {"progress": metadata["progress"] | {"history": rows}})
    monkeypatch.undo()
    assert run(slices, tmp_path, resume=True).finished
    assert final_weights(whole) == final_weights(tmp_path)
    assert (whole / "history.csv").read_text() == (tmp_path / "history.csv").read_text()


def test_forged_progress_ends_in_one_line(slices, tmp_path):
    run(slices, tmp_path, should_stop=stop_after(1))
    arrays, metadata = load(tmp_path / "last.npz")
    save(tmp_path / "last.npz", arrays, metadata | {"progress": metadata["progress"] | {"epoch": 9}})
    with pytest.raises(UserError, match=r"last\.npz: does not say how far its run had come, start a new run"):
        run(slices, tmp_path, resume=True)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("array", ["images", "masks"])
def test_other_pixels_cannot_be_resumed_on(slices, tmp_path, part, array):
    train, validation = slices
    data = TrainingData(train, validation, NORMALIZATION, test=validation)
    fit(engine(), data, CONFIG, tmp_path, hooks=Hooks(stop_after(1)), progress_bar=False)
    old = getattr(data, part)
    values = getattr(old, array).copy()
    values[0, 0, 0, 0] ^= 1
    changed = replace(data, **{part: replace(old, **{array: values})})
    with pytest.raises(UserError, match=f"{part}_sha256 was .*, resume with the same settings and data"):
        fit(engine(), changed, CONFIG, tmp_path, resume=True, progress_bar=False)
    with pytest.raises(UserError, match=f"{part}_slices was .*, resume with the same settings and data"):
        fit(engine(), replace(data, **{part: old.subset([0])}), CONFIG, tmp_path, resume=True, progress_bar=False)


def test_a_run_that_noted_nothing_of_its_test_set_is_resumed(slices, tmp_path):
    run(slices, tmp_path, should_stop=stop_after(1))  # as earlier versions did
    data = TrainingData(*slices, NORMALIZATION, test=slices[1])
    assert fit(engine(), data, CONFIG, tmp_path, resume=True, progress_bar=False).finished


@pytest.mark.parametrize(("batch_size", "images", "refused"), [(1, 4, True), (4, 9, True), (4, 10, False)])
def test_one_value_a_channel_is_refused_before_the_first_step(slices, tmp_path, batch_size, images, refused):
    net = UNet(widths=(2, 2, 2, 2, 2), dropout=0.0)  # 16 x 16 pixels become one
    config = replace(CONFIG, epochs=1, warmup_epochs=0, batch_size=batch_size, images_per_epoch=images)
    if refused:
        with pytest.raises(
            UserError, match=f"--batch-size: {batch_size} leaves a batch of one image, which at 16 x 16"
        ):
            run(slices, tmp_path / "run", config, net=net)
        assert not (tmp_path / "run").exists()
    else:
        assert run(slices, tmp_path / "run", config, net=net).finished


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (
            SegmentationLoss(),
            {"out_channels": 2},
            "data of 2 classes need a SoftmaxLoss and a network with output='softm",
        ),
        (
            SoftmaxLoss(),
            {"out_channels": 3, "output": "softmax"},
            "data of 2 classes need a network with out_channels=2",
        ),
    ],
)
def test_a_network_or_loss_that_does_not_fit_data_of_classes_is_refused(slices, tmp_path, loss, options, message):
    """Else the pixels to be ignored would be learnt from as background."""
    of_classes = [replace(part, classes=("background", "tumour")) for part in slices]
    with pytest.raises(ValueError, match=message):
        run(of_classes, tmp_path, replace(CONFIG, loss=loss), tiny_net(dtype="float32", **options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("loss", "output", "words"),
    [
        (SegmentationLoss(), "softmax", "output='sigmoid' for a SegmentationLoss, got 'softmax'"),
        (SoftmaxLoss(), "sigmoid", "output='softmax' for a SoftmaxLoss, got 'sigmoid'"),
    ],
)
def test_a_loss_and_an_output_that_do_not_fit_are_refused_before_the_first_step(slices, tmp_path, loss, output, words):
    net = tiny_net(out_channels=3, output=output, dtype="float32")
    with pytest.raises(ValueError, match=f"^the network must have {words}$"):
        run(slices, tmp_path / "run", replace(CONFIG, loss=loss), net)
    assert not (tmp_path / "run").exists()


def test_the_training_sample_is_made_of_whole_patients(slices):
    train, _ = slices
    sample = loop._some_patients(train, about=len(train) // 2)
    (name,) = {train.patients[place] for place in sample}
    assert len(sample) == train.patients.count(name)
    assert len(loop._some_patients(train, about=len(train))) == len(train)


def test_masks_that_stay_in_place_train_another_network(slices, tmp_path):
    config = replace(CONFIG, epochs=1, warmup_epochs=0, augmentation=Augmentation(rotation=72.0))
    run(slices, tmp_path / "honest", config)
    run(slices, tmp_path / "flawed", replace(config, augment_masks=False))
    assert final_weights(tmp_path / "honest") != final_weights(tmp_path / "flawed")
