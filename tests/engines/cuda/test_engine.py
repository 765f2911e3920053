"""The CUDA engine's order of operations and its memory, against the plain path.

The kernels are here their own specification, in float64 on NumPy: then the engine has to agree to 1e-10 or so. On the
strict stand-in for CuPy, and on a GPU where one answers, the engine runs with the kernels that it chooses for itself.
"""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet import ops
from minunet.base import cli, rng
from minunet.base.archive import load, sha256_of_arrays
from minunet.base.backend import to_device, to_numpy
from minunet.base.errors import UserError
from minunet.data import phantom
from minunet.data.augment import PRESETS, augment
from minunet.data.normalize import Normalization
from minunet.engines.cuda import choice, row3
from minunet.engines.cuda.engine import Buffers, CudaEngine, step_bytes, takes
from minunet.engines.cuda.row3 import Row3Kernels
from minunet.engines.cuda.specification import SpecificationKernels, flipped
from minunet.network.layers import map_arrays
from minunet.network.loss import SegmentationLoss, SoftmaxLoss
from minunet.network.unet import UNet
from minunet.training.config import TrainingConfig
from minunet.training.loop import TrainingData, fit
from minunet.training.optim import AdamW, WeightEMA
from minunet.training.step import loss_and_grads, train_step
from tests.command_line import write_patients
from tests.engines.cases import train

LOSS = SegmentationLoss(dice_weight=0.7, bce_weight=1.3, over="image")
KEY = rng.Key(seed=5, epoch=2, step=3, image=7)


def network(seed=0, dtype="float64", **config):
    """A network none of whose arrays are as they start: gammas of both signs and 0, and running statistics."""
    net = UNet(**{"widths": (3, 5, 8), "dropout": 0.3, "seed": seed, "dtype": dtype, **config})
    draw = np.random.default_rng(seed)
    for name, array in (net.parameters() | net.buffers()).items():
        if not name.endswith("weight"):
            array[...] = draw.uniform(0.5, 2, array.shape) if "var" in name else draw.standard_normal(array.shape)
        if name.endswith("gamma"):
            array[0] = 0
    return net


def batch(net, n, height, width, seed=0):
    config, draw = net.config, np.random.default_rng(seed)
    x = draw.standard_normal((n, height, width, config["in_channels"]))
    target = draw.random((n, height, width, config["out_channels"])) < 0.4
    return x.astype(config["dtype"]), target.astype(config["dtype"])


def engine_for(net, n, height, width, kernels=SpecificationKernels):
    return CudaEngine(net, LOSS, n, (height, width), kernels=kernels(np, dtype=net.config["dtype"]))


def assert_close(result, expected, tolerance):
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert np.abs(result - expected).max() <= tolerance * max(np.abs(expected).max(), 1)


def assert_all_close(results, expected, tolerance):
    assert list(results) == list(expected)
    for name, array in expected.items():
        assert_close(results[name], array, tolerance)


# --- Row3 -----------------------------------------------------------------------------------------------------------


@given(
    shape=st.tuples(*(st.integers(1, 6) for _ in range(5))),
    group=st.sampled_from([1, 1000, row3.GROUP]),
    seed=st.integers(0, 2**32),
)
def test_row3_is_a_convolution_and_its_gradients(shape, group, seed):
    n, height, width, in_channels, out_channels = shape
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, height, width, in_channels))
    weight = draw.standard_normal((3, 3, in_channels, out_channels))
    y, cache = ops.conv2d_forward(x, weight, None)
    dy = draw.standard_normal(y.shape)
    dx, dweight, _ = ops.conv2d_backward(dy, cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row3, "GROUP", group)  # one image at a time, some, all
        assert_close(row3.conv3x3(x, weight), y, 1e-13)
        assert_close(row3.conv3x3(dy, flipped(np, weight)), dx, 1e-13)
        assert_close(row3.conv3x3_grad_weight(x, dy), dweight, 1e-13)


# --- One step -------------------------------------------------------------------------------------------------------


@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple),
    up_kernel=st.sampled_from([2, 3]),
    head_kernel=st.sampled_from([1, 3]),
    conv_bias=st.booleans(),
    batch_norm_eps=st.sampled_from([1e-3, 0.5]),
    dropout=st.sampled_from([0.0, 0.3]),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    n=st.integers(1, 3),
    spare=st.integers(0, 2),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernels=st.sampled_from([SpecificationKernels, Row3Kernels]),
    seed=st.integers(0, 2**32),
)
def test_a_step_is_the_plain_path(
    widths, up_kernel, head_kernel, conv_bias, batch_norm_eps, dropout, channels, n, spare, size, kernels, seed
):
    in_channels, out_channels = channels
    net = network(
        seed=seed,
        widths=widths,
        up_kernel=up_kernel,
        head_kernel=head_kernel,
        conv_bias=conv_bias,
        batch_norm_eps=batch_norm_eps,
        dropout=dropout,
        in_channels=in_channels,
        out_channels=out_channels,
    )
    height, width = (2**net.depth * s for s in size)
    if n * size[0] * size[1] == 1:
        n = 2  # one value a channel in the bottleneck: the plain path refuses it
    x, target = batch(net, n, height, width, seed)
    expected = loss_and_grads(net, x, target, LOSS, KEY)
    with engine_for(net, n + spare, height, width, kernels) as engine:
        for array in arrays_in(vars(engine.buffers).values()):
            if array.dtype == "float64":
                array.fill(np.nan)  # what is read before it is written shows
        value, grads, stats = engine.loss_and_grads(x, target, KEY)
        assert value == pytest.approx(expected[0], rel=1e-10)
        assert_all_close(grads, expected[1], 1e-9)
        assert_all_close(stats, expected[2], 1e-10)
        assert_close(engine.logits(x), net.forward(x, training=False)[0], 1e-10)


def arrays_in(values):
    """The arrays among the values, and in the lists and tuples among them."""
    for value in values:
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, list | tuple):
            yield from arrays_in(value)


def test_each_batch_norm_has_its_own_eps():
    net = network()
    x, target = batch(net, 2, 8, 8)
    norms = [
        norm for convs in (net.downs[0].convs, net.bottleneck, net.ups[1].convs) for norm in (convs.norm1, convs.norm2)
    ]
    for place, norm in enumerate(norms, start=1):
        norm.eps = 0.1 * place
    value, grads, _ = loss_and_grads(net, x, target, LOSS, KEY)
    with engine_for(net, 2, 8, 8) as engine:
        found, engine_grads, _ = engine.loss_and_grads(x, target, KEY)
        assert found == pytest.approx(value, rel=1e-10)
        assert_all_close(engine_grads, grads, 1e-9)
        assert_close(engine.predict(x), net.predict(x), 1e-10)


def test_a_step_after_another_starts_afresh():
    net = network()
    x, target = batch(net, 2, 8, 8)
    with engine_for(net, 2, 8, 8) as engine:
        first = {name: a.copy() for name, a in engine.loss_and_grads(x, target, KEY)[1].items()}
        engine.loss_and_grads(2 * x, 1 - target, KEY._replace(step=9))
        engine.predict(3 * x)
        again = engine.loss_and_grads(x, target, KEY)[1]
    assert all(again[name].tobytes() == array.tobytes() for name, array in first.items())


def test_images_and_parameters_are_only_read():
    net = network()
    x, target = batch(net, 2, 8, 8)
    before = [a.copy() for a in (x, target, *net.parameters().values(), *net.buffers().values())]
    with engine_for(net, 2, 8, 8) as engine:
        engine.loss_and_grads(x, target, KEY)
        engine.predict(x)
    after = (x, target, *net.parameters().values(), *net.buffers().values())
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("config", [{}, {"out_channels": 3, "output": "softmax"}], ids=["masks", "classes"])
@pytest.mark.parametrize(("n", "height", "width"), [(1, 8, 12), (3, 8, 12), (2, 5, 3), (1, 16, 4)])
def test_any_batch_and_any_size_is_predicted_and_another_network(n, height, width, config):
    net, other = network(**config), network(seed=1, **config)
    x, _ = batch(net, n, height, width)
    with engine_for(net, 2, 8, 12) as engine:
        assert_close(engine.predict(x), net.predict(x), 1e-12)
        assert_close(engine.predict(x, other), other.predict(x), 1e-12)


@pytest.mark.parametrize(("n", "height", "width"), [(3, 8, 12), (2, 4, 4)])
def test_a_batch_that_the_buffers_cannot_take_is_trained_on_the_plain_path(n, height, width):
    net = network()
    x, target = batch(net, n, height, width)
    expected = loss_and_grads(net, x, target, LOSS, KEY)
    with engine_for(net, 2, 8, 12) as engine:
        value, grads, _ = engine.loss_and_grads(x, target, KEY)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        assert engine.clip(grads, math.inf)[1] == pytest.approx(norm, abs=0)
    assert value == expected[0]
    assert all(np.array_equal(grads[name], array) for name, array in expected[1].items())


def test_one_value_a_channel_is_refused_as_the_plain_path_does():
    net = network()
    x, target = batch(net, 1, 4, 4)
    with engine_for(net, 2, 4, 4) as engine, pytest.raises(ValueError, match="more than one value a channel"):
        engine.loss_and_grads(x, target, KEY)


def test_bf16_is_near_and_repeats():
    """The bf16 of the specification: activations and weights with 8 bits of mantissa, everything else in float32."""
    net = network(dtype="float32", widths=(4, 8), dropout=0.0)
    x, target = batch(net, 2, 8, 8)
    value, grads, _ = loss_and_grads(net, x, target, LOSS, KEY)
    results = []
    for _ in range(2):
        with CudaEngine(net, LOSS, 2, (8, 8), SpecificationKernels(np, "bf16")) as engine:
            found, rounded, _ = engine.loss_and_grads(x, target, KEY)
            results.append({name: array.copy() for name, array in rounded.items()})
    assert found == pytest.approx(value, rel=0.05)
    whole, difference = _norms(results[0], grads)
    assert 0 < difference < 0.2 * whole
    assert all(results[1][name].tobytes() == array.tobytes() for name, array in results[0].items())


def _norms(rounded, grads):
    """The norm of all gradients, and of the difference."""
    whole = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    return whole, math.sqrt(sum(float(((rounded[name] - g) ** 2).sum()) for name, g in grads.items()))


# --- Before a step: the passes over the pixels of a batch -------------------------------------------------------------


class Recorded(SpecificationKernels):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.calls = []

    def affine(self, *arguments):
        self.calls.append("affine")
        super().affine(*arguments)

    def add_noise(self, *arguments):
        self.calls.append("add_noise")
        super().add_noise(*arguments)


@pytest.mark.parametrize("move_masks", [True, False])
@pytest.mark.parametrize(("preset", "calls"), [("none", []), ("mild", ["affine"]), ("strong", ["affine", "add_noise"])])
def test_a_batch_is_augmented_by_the_kernels_of_the_engine(preset, calls, move_masks):
    net = network()
    x, target = batch(net, 3, 8, 8)
    before = x.copy(), target.copy()
    expected = augment(x, target, PRESETS[preset], KEY, move_masks=move_masks)
    with engine_for(net, 3, 8, 8, Recorded) as engine:
        found = augment(x, target, PRESETS[preset], KEY, move_masks=move_masks, passes=engine.passes)
        assert engine.kernels.calls == calls
    for got, wanted, given_array, copy in zip(found, expected, (x, target), before, strict=True):
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(given_array, copy)
        assert got.dtype == wanted.dtype
        assert not np.shares_memory(got, given_array)


def test_training_augments_with_its_engine(tmp_path):
    """Once for each of 8 images, since the arrays are NumPy's, and for none of an evaluation."""
    made = phantom.make(patients=2, size=16, seed=1)
    train, validation = (made.subset(np.flatnonzero(made.patient_indices() == p)[:8]) for p in (0, 1))
    net = UNet(widths=(2, 4), seed=2)
    config = TrainingConfig(epochs=1, batch_size=4, augmentation=PRESETS["strong"])
    with CudaEngine(net, config.loss, 4, (16, 16), Recorded(np)) as engine:
        fit(engine, TrainingData(train, validation, Normalization()), config, tmp_path, progress_bar=False)
        assert engine.kernels.calls == ["affine", "add_noise"] * 8


# --- A training -----------------------------------------------------------------------------------------------------


def test_training_steps_are_those_of_the_plain_path():
    results = []
    for use_engine in (False, True):
        net = network()
        x, target = batch(net, 3, 8, 8)
        engine = engine_for(net, 3, 8, 8) if use_engine else None
        make_optimizer, make_average = (engine.optimizer, engine.average) if engine else (AdamW, WeightEMA)
        optimizer = make_optimizer(net.parameters(), 1e-3, no_decay=["head.bias"])
        ema = make_average(net.parameters() | net.buffers(), 0.9)
        norms = [
            train_step(
                net, optimizer, x, target, LOSS, KEY._replace(step=step), lr=1e-3, clip_norm=0.5, ema=ema, engine=engine
            )
            for step in range(3)
        ]
        arrays = net.parameters() | net.buffers()
        results.append((norms, {n: a for n, a in arrays.items() if not is_cancelled_bias(n)}, ema.average))
    (norms, arrays, average), (engine_norms, engine_arrays, engine_average) = results
    assert np.allclose(engine_norms, norms, rtol=1e-8)
    assert norms[0][1] > 0.5  # the clipping had something to do
    assert_all_close(engine_arrays, arrays, 1e-8)
    assert_all_close({n: a for n, a in engine_average.items() if n in arrays}, {n: average[n] for n in arrays}, 1e-8)


def is_cancelled_bias(name):
    """A bias that a batch norm subtracts again: its gradient is 0, or in the plain path rounding, which AdamW enlarges.

    The running means follow the biases.
    """
    return ("conv" in name and name.endswith("bias")) or name.endswith("running_mean")


def test_the_optimizer_refuses_other_names():
    net = network()
    with engine_for(net, 1, 8, 8) as engine, pytest.raises(ValueError, match=r"grads must name .*'w'"):
        engine.optimizer(net.parameters(), 1e-3).step({"w": np.zeros(1)})


# --- What it takes, and how much memory ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"widths": (4,)}, "widths"),
        ({"up_kernel": 4}, "2 and 3"),
        ({"head_kernel": 5}, "1 and 3"),
        ({"loss": SoftmaxLoss()}, "the loss is a SoftmaxLoss"),
        ({"loss": SegmentationLoss(over="class")}, "class by class"),
        ({}, None),
    ],
)
def test_what_the_engine_takes(config, word):
    loss = config.get("loss", SegmentationLoss())
    reason = takes(
        UNet(**{"widths": (2, 4), **{name: value for name, value in config.items() if name != "loss"}}), loss
    )
    assert reason is None if word is None else word in reason


def test_what_a_step_is_said_to_take_is_what_is_allocated():
    net = network(dtype="float32")
    buffers = Buffers(np.empty, net, 3, 8, 16, "float32")
    allocated = sum(array.nbytes for array in arrays_in(vars(buffers).values()))
    weights = 5 * sum(array.nbytes for array in net.parameters().values())
    assert step_bytes(net, (8, 16), 3, row3=True) == allocated + weights + 6 * buffers.scratch.nbytes
    assert step_bytes(net, (512, 512), 3, "bf16") < step_bytes(net, (512, 512), 3, "tf32")


@pytest.mark.parametrize("training_step", [True, False])
def test_wrong_images_and_masks_are_refused_as_the_plain_path_does(training_step):
    net = network()
    x, target = batch(net, 2, 8, 8)
    with engine_for(net, 2, 8, 8) as engine:

        def call(x, target=target):
            return engine.loss_and_grads(x, target, KEY) if training_step else engine.logits(x)

        for wrong in (x[..., :1], x.astype("float32")):
            with pytest.raises(ValueError, match="x must have"):
                call(wrong)
        if training_step:
            with pytest.raises(ValueError, match="target must have the shape"):
                call(x, target[:1])


def test_memory_that_does_not_suffice_is_said_with_the_batch_that_fits(monkeypatch):
    def refuse(empty, *arguments):
        if empty is np.empty:
            raise MemoryError
        return Buffers(empty, *arguments)  # which takes no memory

    monkeypatch.setattr("minunet.engines.cuda.engine.Buffers", refuse)
    monkeypatch.setattr("minunet.engines.memory.available_bytes", lambda net: step_bytes(net, (16, 16), 5))
    net = network(dtype="float32")
    with pytest.raises(UserError, match="^--batch-size: out of GPU memory, a step on a batch of 9 .* at most 5$"):
        CudaEngine(net, LOSS, 9, (16, 16), kernels=SpecificationKernels(np))


# --- With the kernels of the .cu files ------------------------------------------------------------------------------


def test_the_emulated_kernels_take_the_same_step():
    """The unmodified CUDA sources, run on the CPU. (test_kernels.py has each kernel by itself.)"""
    emulator = pytest.importorskip("tests.engines.cuda.emulator")
    if emulator.COMPILER is None:
        pytest.skip("the emulator needs a C++ compiler")
    net = network(dtype="float32", widths=(8, 16), seed=3)
    x, target = batch(net, 2, 4, 4)
    expected = loss_and_grads(net, x, target, LOSS, KEY)
    with CudaEngine(net, LOSS, 2, (4, 4), kernels=emulator.EmulatedKernels("float32")) as engine:
        value, grads, stats = engine.loss_and_grads(x, target, KEY)
        assert value == pytest.approx(expected[0], rel=1e-5)
        whole, difference = _norms(grads, expected[1])
        assert difference < 1e-4 * whole
        assert_all_close(stats, expected[2], 1e-5)
        moved = augment(x, target, PRESETS["strong"], KEY, passes=engine.passes)
        for got, wanted in zip(moved, augment(x, target, PRESETS["strong"], KEY), strict=True):
            assert_close(got, wanted, 1e-5)


# --- On the device ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_on_the_device_it_is_the_plain_path_too(device, dropout):
    host_net = network(dtype="float32", dropout=dropout, widths=(4, 8, 16))
    net = map_arrays(host_net, lambda a: to_device(a, "cuda"))
    x, target = batch(host_net, 2, 16, 8)
    value, grads, stats = loss_and_grads(host_net, x, target, LOSS, KEY)
    with choice.build(net, LOSS, 2, (16, 8), "float32") as engine:
        found, device_grads, device_stats = engine.loss_and_grads(to_device(x, "cuda"), to_device(target, "cuda"), KEY)
        assert all(isinstance(array, device.xp().ndarray) for array in device_grads.values())
        assert found == pytest.approx(value, rel=1e-5)
        assert_all_close({n: to_numpy(a) for n, a in device_grads.items()}, grads, 1e-3)
        assert_all_close({n: to_numpy(a) for n, a in device_stats.items()}, stats, 1e-4)
        first = {name: to_numpy(array).tobytes() for name, array in device_grads.items()}
        again = engine.loss_and_grads(to_device(x, "cuda"), to_device(target, "cuda"), KEY)[1]
        assert first == {name: to_numpy(array).tobytes() for name, array in again.items()}
        x = x[:, :13]
        assert_close(to_numpy(engine.predict(to_device(x, "cuda"))), host_net.predict(x), 1e-4)


@pytest.fixture
def slices():
    made = phantom.make(patients=2, size=16, seed=1)
    halves = ([i for i, p in enumerate(made.patients) if p == name][:10] for name in made.patient_names())
    return [made.subset(half) for half in halves]


def test_a_run_on_the_device_learns_as_on_the_cpu_and_resumes_bit_for_bit(device, slices, tmp_path):
    config = TrainingConfig(epochs=2, batch_size=4, augmentation=PRESETS["mild"], clip_norm=1.0, ema_decay=0.9)

    def network(where):
        return map_arrays(UNet(widths=(2, 4), dropout=0.2, seed=2), lambda a: to_device(a.copy(), where))

    def run(folder, where, **options):
        return train(network(where), slices, config, folder, device=where, **options)

    on_cpu = run(tmp_path / "cpu", "cpu", choice="plain")
    with choice.build(network("cuda"), config.loss, 4, (16, 16), "float32") as engine:
        if device.name == "standin":
            assert engine.description.startswith("cuda, float32, row3 (the GPU does not say what it is")
        else:
            assert engine.description == "cuda, float32, mma.sync"
    whole = run(tmp_path / "whole", "cuda")
    for row, expected in zip(whole.history, on_cpu.history, strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    stops = iter([False, False, False, True])
    assert not run(tmp_path / "stopped", "cuda", should_stop=lambda: next(stops)).finished
    assert run(tmp_path / "stopped", "cuda", resume=True).finished
    for name in ("last.npz", "best.npz"):
        arrays, resumed = (load(tmp_path / folder / name)[0] for folder in ("whole", "stopped"))
        assert sha256_of_arrays(arrays) == sha256_of_arrays(resumed)


def test_the_main_job_runs_on_the_device_and_reports_its_memory(device, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = Path(__file__).parents[3] / "examples" / "train_lgg.py"
    main = runpy.run_path(str(example))["main"]
    write_patients(tmp_path / "data", patients=6)
    data = ["--data", "data", "--preset", "quick", "--image-size", "16"]
    arguments = [*data, "--epochs", "1", "--device", "cuda", "--quiet", "--output", "run"]
    assert cli.run(main, arguments) == 0
    out = capsys.readouterr().out
    assert f"engine: cuda, float32, {'row3' if device.name == 'standin' else 'mma.sync'}" in out
    assert "GPU memory: 0.00 GB at the peak" in out or device.name != "standin"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["gpu_memory_bytes"] == 2**20 or device.name != "standin"
    assert cli.run(main, [*arguments[:-1], "bf16", "--precision", "bf16"]) == (2 if device.name == "standin" else 0)
    if device.name == "standin":
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --precision: bf16 is not to be had (bf16 needs the engine's own kernels: ")
        assert not (tmp_path / "bf16").exists()
