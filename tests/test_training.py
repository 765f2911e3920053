"""The training step and the run: what they compute, what they change, and that a resumed run is the unbroken one."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet import checkpoint, metrics, optim, training
from minunet.checkpoint import load, load_net, sha256_of_arrays
from minunet.data import phantom
from minunet.data.augment import PRESETS, Augmentation
from minunet.data.normalize import Normalization
from minunet.errors import Diverged, UserError
from minunet.losses import SegmentationLoss
from minunet.optim import AdamW, WeightEMA
from minunet.rng import Key
from minunet.training import TrainingConfig, loss_and_grads, train_step, update_running_stats
from minunet.unet import UNet

LOSS = SegmentationLoss()
KEY = Key(seed=0, epoch=1, step=2)
NORMALIZATION = Normalization("volume")


def tiny_net(**options):
    return UNet(**{"widths": (3, 4), "dropout": 0.3, "up_kernel": 2, "dtype": "float64", **options})


def batch(seed=0, size=8, dtype="float64"):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((2, size, size, 3)).astype(dtype)
    return x, (generator.random((2, size, size, 1)) < 0.3).astype(dtype)


def all_arrays(net):
    return net.parameters() | net.buffers()


def test_loss_and_grads_is_forward_loss_backward_and_changes_nothing():
    net, (x, target) = tiny_net(), batch()
    before = sha256_of_arrays(all_arrays(net))
    loss, grads, stats = loss_and_grads(net, x, target, LOSS, KEY)
    logits, cache = net.forward(x, training=True, key=KEY)
    value, loss_cache = LOSS.forward(logits, target)
    _, expected = net.backward(LOSS.backward(loss_cache), cache)
    assert loss == value
    assert isinstance(loss, float)
    assert grads.keys() == net.parameters().keys()
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, expected[name])
    assert stats.keys() == net.buffers().keys()
    np.testing.assert_array_equal(stats["down1.norm1.running_mean"], cache.downs[0].convs.norm1.batch_mean)
    np.testing.assert_array_equal(stats["up1.norm2.running_var"], cache.ups[0].convs.norm2.batch_var)
    assert sha256_of_arrays(all_arrays(net)) == before


def test_running_stats_are_averaged_as_keras_does():
    net = tiny_net()
    old = {name: value.copy() for name, value in net.buffers().items()}
    _, _, stats = loss_and_grads(net, *batch(), LOSS, KEY)
    update_running_stats(net, stats, momentum=0.9)
    for name, running in net.buffers().items():
        np.testing.assert_allclose(running, 0.9 * old[name] + 0.1 * stats[name], rtol=1e-13)
        assert not np.array_equal(running, old[name])


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_a_step_is_clip_optimise_average(clip_norm):
    net, twin, (x, target) = tiny_net(), tiny_net(), batch()
    ema = WeightEMA(all_arrays(net))
    options = {"lr": 0.01, "clip_norm": clip_norm, "batch_norm_momentum": 0.8, "ema": ema}
    loss, norm = train_step(net, AdamW(net.parameters()), x, target, LOSS, KEY, **options)

    expected_loss, grads, stats = loss_and_grads(twin, x, target, LOSS, KEY)
    clipped, expected_norm = optim.clip_by_global_norm(grads, clip_norm or math.inf)
    expected_ema = WeightEMA(all_arrays(twin))
    AdamW(twin.parameters()).step(clipped, 0.01)
    update_running_stats(twin, stats, 0.8)
    expected_ema.update(all_arrays(twin))
    assert (loss, norm) == (expected_loss, expected_norm)
    assert norm > 0.01
    assert sha256_of_arrays(all_arrays(net)) == sha256_of_arrays(all_arrays(twin))
    assert sha256_of_arrays(ema.average) == sha256_of_arrays(expected_ema.average)


def test_steps_make_the_loss_small():
    net, (x, target) = tiny_net(dropout=0.0), batch()
    optimizer = AdamW(net.parameters())
    losses = [train_step(net, optimizer, x, target, LOSS, KEY, lr=0.02)[0] for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def plant(value, where, net, x):
    array = x if where == "images" else all_arrays(net)[where]
    array[(0,) * array.ndim] = value


@pytest.mark.parametrize(
    ("value", "where", "found"),
    [
        (np.nan, "images", "images of the batch"),
        (np.inf, "images", "images of the batch"),
        (np.nan, "down1.conv1.weight", "weights down1.conv1.weight"),
        (np.inf, "up1.norm2.gamma", "weights up1.norm2.gamma"),
        (1e308, "down1.conv1.weight", "activations at down1.norm1"),
        (1e308, "bottleneck.conv2.weight", "activations at bottleneck.norm2"),
        (1e308, "down1.norm2.gamma", "activations at bottleneck"),
        (1e308, "head.weight", "logits"),
    ],
)
def test_a_non_finite_value_stops_before_anything_is_changed_and_is_found(value, where, found):
    net, (x, target) = tiny_net(widths=(3, 4), dropout=0.0), batch()
    x *= 1e3
    optimizer = AdamW(net.parameters())
    plant(value, where, net, x)
    before = sha256_of_arrays(all_arrays(net) | optimizer.first_moment)
    with np.errstate(all="ignore"), pytest.raises(Diverged, match=f"first in the {found}"):
        train_step(net, optimizer, x, target, LOSS, KEY, lr=0.01)
    assert sha256_of_arrays(all_arrays(net) | optimizer.first_moment) == before
    assert optimizer.steps == 0


def test_the_learning_rate_follows_its_schedule():
    config = TrainingConfig(epochs=4, warmup_epochs=1, lr=0.5)
    rates = [config.learning_rate(step, steps_per_epoch=10) for step in range(40)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[10] == max(rates) == 0.5
    assert rates[25] == pytest.approx(0.25)
    assert 0 < rates[39] < 0.002
    assert replace(config, schedule="constant").learning_rate(39, 10) == 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("images_per_epoch", -1),
        ("patience", 0),
        ("sampling", "some"),
        ("schedule", "step"),
        ("monitor", "iou"),
        ("batch_norm_momentum", 1.0),
        ("warmup_epochs", 30),
    ],
)
def test_a_config_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        TrainingConfig(**{field: value})


# ---- Whole runs ------------------------------------------------------------------------------------------------------

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


@pytest.fixture(scope="module")
def slices():
    made = phantom.make(patients=3, size=16, seed=1)
    first, second, third = made.patient_names()
    of = {name: made.subset([i for i, p in enumerate(made.patients) if p == name]) for name in (first, second, third)}
    return made.subset([i for i, p in enumerate(made.patients) if p != third]), of[third]


def run(slices, folder, config=CONFIG, net=None, **options):
    train, validation = slices
    net = net or tiny_net(dtype="float32")
    options = {"normalization": NORMALIZATION, "folder": folder, "progress_bar": False, "engine": "plain", **options}
    return training.fit(net, train, validation, config, **options)


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
    _, metadata = load(tmp_path / "best.npz")
    assert metadata["progress"]["best_epoch"] == len(metadata["progress"]["history"]) == best["epoch"]
    net, _ = load_net(tmp_path / "best.npz")
    _, validation = slices
    probabilities = training.predict_slices(net, validation, NORMALIZATION)
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
    monkeypatch.setattr(training, "evaluate", lambda *arguments, **options: training.Evaluation(np.inf, 0.0))
    with pytest.raises(Diverged, match="epoch 1, after its last step: the loss on validation patients is inf"):
        run(slices, tmp_path)
    assert load(tmp_path / "last.npz")[1]["progress"]["epoch"] == 0


def test_what_is_not_as_it_was_is_said_on_resuming(slices, tmp_path, monkeypatch, capsys):
    run(slices, tmp_path, should_stop=stop_after(4))
    monkeypatch.setattr(training, "environment", lambda: checkpoint.environment() | {"numpy": "1.0"})
    assert run(slices, tmp_path, resume=True).finished
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"warning: not as it was, so that the last bits may differ: numpy was {np.__version__!r}, is '1.0'"


def test_other_pixels_cannot_be_resumed_on(slices, tmp_path):
    run(slices, tmp_path, should_stop=stop_after(1))
    train, validation = slices
    images = train.images.copy()
    images[0, 0, 0, 0] ^= 1
    with pytest.raises(UserError, match="train_sha256 was .*, resume with the same settings and data"):
        run((replace(train, images=images), validation), tmp_path, resume=True)


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


def test_flip_average_is_the_mean_over_both_views(slices):
    _, validation = slices
    net = tiny_net(dtype="float32")
    mirrored = replace(validation, images=validation.images[:, :, ::-1].copy())
    plain, other = (training.predict_slices(net, s, NORMALIZATION, batch_size=5) for s in (validation, mirrored))
    both = training.predict_slices(net, validation, NORMALIZATION, flip_average=True)
    np.testing.assert_allclose(both, (plain + other[:, :, ::-1]) / 2, rtol=1e-5)
    assert plain.shape == validation.masks.shape


@given(batch_size=st.integers(1, 40))
def test_an_evaluation_does_not_depend_on_the_batch_size_but_for_the_loss_over_batches(slices, batch_size):
    _, validation = slices
    net, loss = tiny_net(dtype="float32"), SegmentationLoss(over="image")
    statistics = NORMALIZATION.statistics(validation)
    found = training.evaluate(net, validation, statistics, loss, batch_size=batch_size)
    whole = training.evaluate(net, validation, statistics, loss, batch_size=len(validation))
    assert found.dice == whole.dice
    assert found.loss == pytest.approx(whole.loss, rel=1e-5)


def test_the_training_sample_is_made_of_whole_patients(slices):
    train, _ = slices
    sample = training._some_patients(train, about=len(train) // 2)
    assert len(sample.patient_names()) == 1
    (name,) = sample.patient_names()
    assert len(sample) == train.patients.count(name)


def test_masks_that_stay_in_place_train_another_network(slices, tmp_path):
    config = replace(CONFIG, epochs=1, warmup_epochs=0, augmentation=Augmentation(rotation=72.0))
    run(slices, tmp_path / "honest", config)
    run(slices, tmp_path / "flawed", replace(config, augment_masks=False))
    assert final_weights(tmp_path / "honest") != final_weights(tmp_path / "flawed")
