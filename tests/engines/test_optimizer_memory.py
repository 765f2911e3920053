"""Where the CPU engine's optimiser keeps the parameters: in the memory that the processes share."""

import numpy as np
import pytest

from minunet import rng
from minunet.engines.cpu.engine import CpuEngine
from minunet.layers import map_arrays
from minunet.losses import SegmentationLoss
from minunet.optim import AdamW
from minunet.unet import UNet

KEY = rng.Key(seed=1)


def problem(seed=0):
    random = np.random.default_rng(seed)
    net = UNet(widths=(3, 4), dropout=0.0, seed=seed, dtype="float64")
    x = random.normal(size=(2, 8, 8, 3))
    return net, x, (random.random((2, 8, 8, 1)) > 0.5).astype(float)


@pytest.mark.parametrize("workers", [1, 2])
def test_steps_through_the_engines_optimizer_are_those_of_adamw(workers):
    net, x, target = problem()
    twin = map_arrays(net, np.copy)
    plain = AdamW(twin.parameters(), 1e-2)
    with CpuEngine(net, SegmentationLoss(), 2, (8, 8), workers=workers) as engine:
        optimizer = engine.optimizer(net.parameters(), 1e-2)
        for step in range(3):
            _, grads, _ = engine.loss_and_grads(x, target, KEY._replace(step=step))
            copies = {name: grad.copy() for name, grad in grads.items()}
            optimizer.step(grads)
            plain.step(copies)
            for name, parameter in net.parameters().items():
                np.testing.assert_array_equal(parameter, twin.parameters()[name], err_msg=name)
    # The engine has gone: the network has what it learned, and works.
    np.testing.assert_array_equal(net.predict(x), twin.predict(x))


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
