"""One source for NumPy and CuPy: a whole training step on the stand-in, and on a GPU where one answers, as on NumPy.

The stand-in computes with NumPy underneath, so its results must equal NumPy's bit for bit, and it refuses every mix of
host and device memory. A GPU sums in another order: there the results are close.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.base import rng
from minunet.base.backend import to_device, to_numpy
from minunet.data.augment import PRESETS, Augmentation, augment
from minunet.data.batches import prepare_batch
from minunet.data.normalize import Normalization, apply
from minunet.data.slices import SliceSet
from minunet.network.layers import map_arrays
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.training.evaluation import evaluate, predict_slices
from minunet.training.optim import AdamW, WeightEMA, clip_by_global_norm
from minunet.training.step import loss_and_grads, train_step
from tests.implementations import IMPLEMENTATIONS
from tests.strategies import OPS

KEY = rng.Key(seed=3, epoch=1, step=2)


def assert_equal(device, result, expected, tolerance=1e-5, scale=None):
    """``result`` on the device equals ``expected`` on the host: on the stand-in in every bit.

    On a GPU to ``tolerance`` times ``scale``, the largest expected value if None.
    """
    assert isinstance(result, device.xp().ndarray)
    result = device.get(result)
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    if device.name == "standin":
        assert result.tobytes() == expected.tobytes()
    else:
        scale = np.abs(expected).max() if scale is None else scale
        assert np.abs(result - expected).max() <= tolerance * scale


def assert_all_equal(device, results, expected, tolerance=1e-5):
    """The same for all arrays, whose largest value is the scale: a bias before a batch norm has a gradient of 0."""
    assert list(results) == list(expected)
    scale = max(np.abs(array).max() for array in expected.values())
    for name, array in expected.items():
        assert_equal(device, results[name], array, tolerance, scale)


# --- Ops and losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [implementation.name for implementation in IMPLEMENTATIONS[1:]])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@given(data=st.data(), dtype=st.sampled_from(["float32", "float64"]))
def test_ops_and_losses(op, name, data, dtype):
    device = next(implementation for implementation in IMPLEMENTATIONS if implementation.name == name)
    host = IMPLEMENTATIONS[0]
    case = data.draw(op.cases)
    inputs, options = (
        {name: v.astype(dtype) if isinstance(v, np.ndarray) else v for name, v in part.items()}
        for part in (case.inputs, case.options)
    )
    y, cache = host.forward(op, inputs, options)
    dy = case.rng.standard_normal(y.shape).astype(dtype)
    gradients = host.backward(op, dy, cache)
    with device.active():
        device_y, device_cache = device.forward(op, device.put(inputs), device.put(options))
        device_gradients = device.backward(op, device.put(dy), device_cache)
    assert_equal(device, device_y, np.asarray(y))
    for result, expected in zip(device_gradients, gradients, strict=True):
        assert (result is None) == (expected is None)
        if expected is not None:
            assert_equal(device, result, expected)


# --- The network and its training -----------------------------------------------------------------------------------


def network(**config):
    return UNet(**{"widths": (2, 3, 4), "seed": 1, **config})


def on_device(net):
    return map_arrays(net, lambda a: to_device(a, "cuda"))


def batch(net, size=8):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((2, size, size, 3)).astype("float32")
    return x, (draw.random((2, size, size, net.config["out_channels"])) < 0.4).astype("float32")


@pytest.mark.parametrize("config", [{}, {"up_kernel": 2, "out_channels": 2, "conv_bias": False}])
def test_network_forward_and_backward(device, config):
    host_net = network(**config)
    net = on_device(host_net)
    x, target = batch(host_net)
    value, grads, stats = loss_and_grads(host_net, x, target, SegmentationLoss(), KEY)
    device_value, device_grads, device_stats = loss_and_grads(
        net, to_device(x, "cuda"), to_device(target, "cuda"), SegmentationLoss(), KEY
    )
    assert device_value == pytest.approx(value, rel=0 if device.name == "standin" else 1e-5)
    assert_all_equal(device, device_grads, grads, tolerance=1e-3)
    assert_all_equal(device, device_stats, stats)


@pytest.mark.parametrize("size", [8, 5])
def test_predict(device, size):
    host_net = network()
    x = np.random.default_rng(0).standard_normal((2, size, size + 2, 3)).astype("float32")
    assert_equal(device, on_device(host_net).predict(to_device(x, "cuda")), host_net.predict(x))


def test_network_comes_back_as_it_went(device):
    host_net = network()
    back = map_arrays(on_device(host_net), to_numpy)
    for arrays, expected in ((back.parameters(), host_net.parameters()), (back.buffers(), host_net.buffers())):
        assert all(np.array_equal(arrays[name], array) for name, array in expected.items())


def test_optimizer_clipping_and_average(device):
    draw = np.random.default_rng(0)
    start = {"w": draw.standard_normal((3, 2)).astype("float32"), "bias": draw.standard_normal(2).astype("float32")}
    theta, device_theta = {name: a.copy() for name, a in start.items()}, device.put(start)
    adam, device_adam = (AdamW(t, lr=0.1, no_decay=["bias"]) for t in (theta, device_theta))
    ema, device_ema = WeightEMA(theta), WeightEMA(device_theta)
    for step in range(3):
        grads = {name: draw.standard_normal(a.shape).astype("float32") for name, a in start.items()}
        clipped, norm = clip_by_global_norm(grads, 0.5)
        device_clipped, device_norm = clip_by_global_norm(device.put(grads), 0.5)
        assert device_norm == pytest.approx(norm, rel=0 if device.name == "standin" else 1e-12)
        adam.step(clipped, lr=0.1 / (step + 1))
        device_adam.step(device_clipped, lr=0.1 / (step + 1))
        ema.update(theta)
        device_ema.update(device_theta)
    assert_all_equal(device, device_theta, theta)
    assert_all_equal(device, device_adam.first_moment, adam.first_moment)
    assert_all_equal(device, device_adam.second_moment, adam.second_moment)
    assert_all_equal(device, device_ema.average, ema.average)


def test_training_steps(device):
    results = []
    for where in ("cpu", "cuda"):
        net = map_arrays(network(), lambda a, where=where: to_device(a.copy(), where))
        optimizer, ema = AdamW(net.parameters(), 1e-2), WeightEMA(net.parameters() | net.buffers())
        values = []
        for step in range(3):
            x, target = (to_device(part, where) for part in batch(net))
            values.append(
                train_step(
                    net,
                    optimizer,
                    x,
                    target,
                    SegmentationLoss(),
                    KEY._replace(step=step),
                    lr=1e-2,
                    clip_norm=0.1,
                    ema=ema,
                )
            )
        results.append((values, net.parameters() | net.buffers(), ema.average))
    (values, arrays, average), (device_values, device_arrays, device_average) = results
    if device.name == "standin":
        assert device_values == values
    assert_all_equal(device, device_arrays, arrays, tolerance=1e-2)
    assert_all_equal(device, device_average, average, tolerance=1e-2)


# --- Data -----------------------------------------------------------------------------------------------------------


def slices():
    draw = np.random.default_rng(0)
    return SliceSet(
        images=draw.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8),
        masks=draw.integers(0, 2, (4, 8, 8, 1), dtype=np.uint8),
        patients=("anna", "anna", "ben", "ben"),
        numbers=(1, 2, 1, 2),
        files=("a1.tif", "a2.tif", "b1.tif", "b2.tif"),
    )


@pytest.mark.parametrize("kind", ["volume", "scale"])
def test_normalisation(device, kind):
    data = slices()
    statistics = Normalization(kind).statistics(data).take(data.patient_indices())
    assert_equal(device, apply(to_device(data.images, "cuda"), statistics), apply(data.images, statistics))


AUGMENTATIONS = {**PRESETS, "everything": Augmentation(0.5, 0.5, 72.0, 0.2, 0.3, 0.25, 0.3, 0.1, 0.5)}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
@pytest.mark.parametrize("move_masks", [True, False])
def test_augmentation(device, augmentation, move_masks):
    draw = np.random.default_rng(0)
    images, masks = (
        draw.standard_normal((3, 8, 8, 3)).astype("float32"),
        draw.integers(0, 2, (3, 8, 8, 1)).astype("float32"),
    )
    expected = augment(images, masks, augmentation, KEY, move_masks=move_masks)
    moved = augment(to_device(images, "cuda"), to_device(masks, "cuda"), augmentation, KEY, move_masks=move_masks)
    for result, array in zip(moved, expected, strict=True):
        assert_equal(device, result, array)


def test_a_whole_batch(device):
    data = slices()
    statistics, indices = Normalization().statistics(data), np.array([2, 0, 3])
    options = {"augmentation": AUGMENTATIONS["everything"], "key": KEY}
    expected = prepare_batch(data, statistics, indices, "cpu", **options)
    prepared = prepare_batch(data, statistics, indices, "cuda", **options)
    assert_equal(device, prepared.x, expected.x)
    assert_equal(device, prepared.target, expected.target)
    assert prepared.files == expected.files == ("b1.tif", "a1.tif", "b2.tif")


@pytest.mark.parametrize("flip_average", [True, False])
def test_prediction_and_evaluation_of_slices(device, flip_average):
    data, host_net = slices(), network()
    net, normalization = on_device(host_net), Normalization()
    expected = predict_slices(host_net, data, normalization, batch_size=3, flip_average=flip_average)
    p = predict_slices(net, data, normalization, batch_size=3, flip_average=flip_average)
    assert isinstance(p, np.ndarray)
    assert np.abs(p - expected).max() <= (0 if device.name == "standin" else 1e-5)
    statistics = normalization.statistics(data)
    evaluations = [
        evaluate(some_net, data, statistics, SegmentationLoss(), batch_size=3) for some_net in (host_net, net)
    ]
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-15 if device.name == "standin" else 1e-3)
