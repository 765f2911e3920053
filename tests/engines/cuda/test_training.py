"""A training by the kernels, from the batch to the checkpoint: emulated, on the arrays of the stand-in for CuPy."""

import sys

import numpy as np
import pytest

from minunet.base.archive import load, sha256_of_arrays
from minunet.base.backend import to_device, to_numpy
from minunet.data import phantom
from minunet.data.augment import PRESETS
from minunet.engines.cuda import choice
from minunet.engines.cuda.choice import Choice
from minunet.network.layers import map_arrays
from minunet.network.unet import UNet
from minunet.training.config import TrainingConfig
from tests import strict_cupy
from tests.engines.cases import train
from tests.engines.cuda.emulator import COMPILER, EmulatedKernels


@pytest.mark.skipif(not COMPILER, reason="g++ is not here")
@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 1e-2), ("bf16", 5e-2)])
def test_a_training_by_the_kernels(monkeypatch, tmp_path, precision, tolerance):
    """It learns as the plain path on the CPU does, and resumes bit for bit."""

    def make(xp, precision, chosen):
        return EmulatedKernels(precision, hopper=True, xp=xp)

    monkeypatch.setitem(sys.modules, "cupy", strict_cupy.module)
    monkeypatch.setattr(choice, "choose", lambda precision: Choice("wgmma", "a reason"))
    monkeypatch.setattr(choice, "make", make)
    made = phantom.make(patients=2, size=16, seed=1)
    slices = [made.subset([i for i, p in enumerate(made.patients) if p == name][:4]) for name in made.patient_names()]
    config = TrainingConfig(epochs=2, batch_size=2, augmentation=PRESETS["strong"], clip_norm=1.0, ema_decay=0.9)

    def network(where):
        return map_arrays(UNet(widths=(3, 5), dropout=0.2, seed=2), lambda array: to_device(array.copy(), where))

    def run(folder, where, **options):
        net = network(where)
        return net, train(net, slices, config, tmp_path / folder, device=where, **options)

    host, on_cpu = run("cpu", "cpu", choice="plain")
    net, whole = run("whole", "cuda", precision=precision)
    with choice.build(network("cuda"), config.loss, 2, (16, 16), precision) as engine:
        assert engine.description == f"cuda, {precision}, emulator (a reason)"
    for row, expected in zip(whole.history, on_cpu.history, strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=tolerance)
        assert row["validation_loss"] == pytest.approx(expected["validation_loss"], rel=tolerance)
    for name, array in net.parameters().items():
        assert np.abs(to_numpy(array) - host.parameters()[name]).max() <= tolerance, name

    stops = iter([False, False, True])
    assert not run("stopped", "cuda", precision=precision, should_stop=lambda: next(stops))[1].finished
    assert run("stopped", "cuda", precision=precision, resume=True)[1].finished
    for name in ("last.npz", "best.npz"):
        arrays, resumed = (load(tmp_path / folder / name)[0] for folder in ("whole", "stopped"))
        assert sha256_of_arrays(arrays) == sha256_of_arrays(resumed)
