"""Images that are arrays of one's own, float and of any number of channels, go all the way that read ones go."""

from dataclasses import replace

import numpy as np
import pytest

from minunet import UNet, engines
from minunet.base.archive import load
from minunet.base.errors import UserError
from minunet.data import verify
from minunet.data.augment import PRESETS
from minunet.data.normalize import Normalization
from minunet.data.slices import SliceSet
from minunet.data.splits import split_by_patient
from minunet.results.report import write_samples, write_test
from minunet.training.config import TrainingConfig
from minunet.training.evaluation import predict_slices
from minunet.training.loop import Hooks, TrainingData, fit

NORMALIZATION = Normalization("volume")
CONFIG = TrainingConfig(epochs=3, batch_size=4, augmentation=PRESETS["strong"], lr=0.02, batch_norm_momentum=0.5)


@pytest.fixture(scope="module")
def parts():
    """Discs in noise, in the last of five channels; the values are far from those of grey images."""
    draw = np.random.default_rng(0)
    row, column = np.indices((16, 16))
    centres = draw.uniform(4, 12, (30, 2))
    masks = np.stack([(row - r) ** 2 + (column - c) ** 2 < 12 for r, c in centres])
    images = draw.normal(-1000, 3, (30, 16, 16, 5))
    images[..., 4] += 10 * masks
    slices = SliceSet.from_arrays(images, masks, groups=[f"group {n // 3}" for n in range(30)])
    return [slices.subset(part) for part in split_by_patient(slices.patients)]


def run(parts, folder, config=CONFIG, normalization=NORMALIZATION, choice="auto", **options):
    train, validation, _ = parts
    net = UNet(in_channels=5, widths=(4, 8), dropout=0.1, up_kernel=2)
    size = (16, 16) if config.crop is None else (config.crop, config.crop)
    with engines.build(net, config.loss, config.batch_size, size, choice=choice) as engine:
        data = TrainingData(train, validation, normalization)
        return fit(engine, data, config, folder, progress_bar=False, **options), net


@pytest.mark.parametrize("crop", [None, 8])
def test_a_network_learns_from_floats_of_five_channels(parts, tmp_path, crop):
    """With the engine that a run takes: its room for a batch is for bytes, and floats are prepared beside it."""
    config = replace(CONFIG, crop=crop, epochs=6)
    progress, net = run(parts, tmp_path / "run", config)
    assert load(tmp_path / "run" / "last.npz")[1]["engine"].startswith("cpu, ")
    assert progress.history[-1]["validation_dice"] > 0.5
    assert progress.history[-1]["train_loss"] < 0.7 * progress.history[0]["train_loss"]
    plain, _ = run(parts, tmp_path / "plain", replace(config, epochs=1), choice="plain")
    assert plain.history[0]["train_loss"] == pytest.approx(
        run(parts, tmp_path / "auto", replace(config, epochs=1))[0].history[0]["train_loss"], rel=1e-3
    )
    test = parts[2]
    found = predict_slices(net, test, Normalization(), side=16 if crop else None)
    assert found.shape == test.masks.shape


def test_a_run_on_floats_is_resumed_bit_for_bit_and_on_no_others(parts, tmp_path):
    whole, net = run(parts, tmp_path / "whole", choice="plain")
    run(parts, tmp_path / "two", choice="plain", hooks=Hooks(iter([False, True]).__next__))
    resumed, twin = run(parts, tmp_path / "two", choice="plain", resume=True)
    assert resumed == whole
    assert all(np.array_equal(array, twin.parameters()[name]) for name, array in net.parameters().items())
    other = replace(parts[0], images=np.nextafter(parts[0].images, np.float32(0)))
    with pytest.raises(UserError, match="belongs to another run .train_sha256 was"):
        run([other, *parts[1:]], tmp_path / "two", choice="plain", resume=True)


def test_inputs_that_are_normalised_already_stay_as_they_are(parts, tmp_path):
    ready = [replace(part, images=(part.images + 1000) / 5) for part in parts]
    progress, net = run(ready, tmp_path, replace(CONFIG, epochs=6), Normalization("none"), choice="plain")
    assert progress.history[-1]["validation_dice"] > 0.5
    test = ready[2]
    np.testing.assert_array_equal(predict_slices(net, test, Normalization("none")), net.predict(test.images))


def test_floats_are_verified_and_drawn(parts, tmp_path):
    report = verify.inspect(parts[0])
    assert f"{len(parts[0].patient_names())} groups, {len(parts[0])} images, 16 x 16 pixels" in str(report)
    assert report.faults == ()
    write_samples(tmp_path, parts[0], CONFIG, Normalization())
    test = parts[2]
    table = write_test(tmp_path, test, test.masks.astype("float32"), Normalization())
    assert "Dice" in table
    for name in ("samples.png", "predictions.png", "per_patient.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
