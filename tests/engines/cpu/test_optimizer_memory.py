"""The CPU engine's optimiser: parameters and moments in the memory that the processes share, a part for each."""

import numpy as np
import pytest

from minunet.base import rng
from minunet.engines.cpu.engine import CpuEngine
from minunet.network.layers import map_arrays
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.training.optim import AdamW, clip_by_global_norm

KEY = rng.Key(seed=1)


def problem(seed=0, widths=(3, 4)):
    random = np.random.default_rng(seed)
    net = UNet(widths=widths, dropout=0.0, seed=seed, dtype="float64")
    x = random.normal(size=(2, 8, 8, 3))
    return net, x, (random.random((2, 8, 8, 1)) > 0.5).astype(float)


def assert_same_state(optimizer, plain):
    assert optimizer.steps == plain.steps
    for kind in ("parameters", "first_moment", "second_moment"):
        for name, array in getattr(plain, kind).items():
            np.testing.assert_array_equal(getattr(optimizer, kind)[name], array, err_msg=f"{kind} of {name}")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("widths", [(3, 4), (8, 64)], ids=["a block an array", "arrays of several blocks"])
def test_steps_through_the_engines_optimizer_are_those_of_adamw(widths, workers):
    net, x, target = problem(widths=widths)
    twin = map_arrays(net, np.copy)
    options = {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6, "no_decay": ["head.bias", "down1.norm1.gamma"]}
    plain = AdamW(twin.parameters(), 1e-2, **options)
    with CpuEngine(net, SegmentationLoss(), 2, (8, 8), workers=workers) as engine:
        optimizer = engine.optimizer(net.parameters(), 1e-2, **options)
        for step in range(4):
            _, grads, _ = engine.loss_and_grads(x, target, KEY._replace(step=step))
            copies = {name: grad.copy() for name, grad in grads.items()}
            rate = 0.1 if step == 1 else None
            # Any other gradients than the engine's are this process's matter, and go the same way.
            optimizer.step(copies if step == 2 else grads, rate)
            plain.step(copies, rate)
            assert_same_state(optimizer, plain)
        with pytest.raises(ValueError, match="grads must name every parameter"):
            optimizer.step({})
    # The engine has gone: the network has what it learned, and works.
    np.testing.assert_array_equal(net.predict(x), twin.predict(x))
    optimizer.step(copies)
    plain.step(copies)
    assert_same_state(optimizer, plain)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("max_norm", [0.01, 1e6, np.inf])
def test_gradients_are_clipped_in_place_to_the_same_norm(max_norm, workers):
    net, x, target = problem(widths=(8, 64))
    with CpuEngine(net, SegmentationLoss(), 2, (8, 8), workers=workers) as engine:
        _, grads, _ = engine.loss_and_grads(x, target, KEY)
        copies = {name: grad.copy() for name, grad in grads.items()}
        expected, norm = clip_by_global_norm(copies, max_norm)
        assert 0.01 < norm < 1e6
        clipped, found = engine.clip(grads, max_norm)
        assert found == pytest.approx(norm, rel=1e-12, abs=0)
        for name, array in expected.items():
            assert clipped[name] is grads[name]
            np.testing.assert_allclose(clipped[name], array, rtol=1e-12, err_msg=name)
        # Those of someone else are left alone.
        others, found = engine.clip(copies, 0.01)
        assert found == norm
        assert all(others[name] is not array for name, array in copies.items())
        with pytest.raises(ValueError, match="max_norm must be positive"):
            engine.clip(grads, 0.0)


def test_a_second_optimizer_has_moments_of_its_own():
    net, x, target = problem()
    with CpuEngine(net, SegmentationLoss(), 2, (8, 8), workers=1) as engine:
        first, second = engine.optimizer(net.parameters(), 1e-2), engine.optimizer(net.parameters(), 1e-3)
        _, grads, _ = engine.loss_and_grads(x, target, KEY)
        first.step(grads)
        assert not any(moment.any() for moment in second.first_moment.values())
        second.step(grads)
        np.testing.assert_array_equal(first.first_moment["head.weight"], second.first_moment["head.weight"])


def test_a_prediction_by_another_network_leaves_the_trained_one_alone():
    net, x, target = problem()
    other, _, _ = problem(seed=5)
    with CpuEngine(net, SegmentationLoss(), 2, (8, 8), workers=1) as engine:
        engine.optimizer(net.parameters(), 1e-2)
        before = {name: parameter.copy() for name, parameter in net.parameters().items()}
        np.testing.assert_allclose(engine.predict(x, other), other.predict(x), rtol=1e-10)
        np.testing.assert_allclose(engine.predict(x), net.predict(x), rtol=1e-10)
        for name, parameter in net.parameters().items():
            np.testing.assert_array_equal(parameter, before[name], err_msg=name)
        np.testing.assert_allclose(engine.loss_and_grads(x, target, KEY)[0], _plain_loss(net, x, target), rtol=1e-12)


def test_an_optimizer_of_other_arrays_leaves_the_network_where_it_is():
    net, _, _ = problem()
    with CpuEngine(net, SegmentationLoss(), 2, (8, 8), workers=1) as engine:
        before = net.parameters()
        engine.optimizer({name: parameter.copy() for name, parameter in before.items()}, 1e-2)
        assert all(array is before[name] for name, array in net.parameters().items())


def _plain_loss(net, x, target):
    logits, _ = net.forward(x, training=True, key=KEY)
    return SegmentationLoss().forward(logits, target)[0].item()
