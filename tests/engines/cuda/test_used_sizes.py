"""The contract of test_engine.py at the sizes that people train at, with more than one image, and far from 0.

The kernels are their specification there, in float64: to emulate them at these sizes would take hours. At a fraction of
the sizes, where an image still takes many blocks and the last ones are not full, they are emulated.
"""

import pytest

from minunet.engines.cuda.engine import CudaEngine
from minunet.engines.cuda.row3 import Row3Kernels
from minunet.engines.cuda.specification import SpecificationKernels
from minunet.training.step import loss_and_grads
from tests.engines.cases import USED
from tests.engines.cuda.emulator import COMPILER, EmulatedKernels
from tests.engines.cuda.test_engine import KEY, LOSS, batch, engine_for, network


def over_largest(found, expected):
    """The largest difference of any array of a group, over the largest value of the group."""
    assert list(found) == list(expected)
    largest = max(abs(array).max() for array in expected.values())
    return max(abs(found[name] - array).max() for name, array in expected.items()) / largest


def check_it(engine, net, x, target, bound):
    """Loss, gradients, batch statistics and logits are those of the plain path."""
    loss, grads, statistics = loss_and_grads(net, x, target, LOSS, KEY)
    logits, _ = net.forward(x, training=False)
    with engine:
        found, engine_grads, engine_statistics = engine.loss_and_grads(x, target, KEY)
        assert found == pytest.approx(loss, rel=bound)
        assert over_largest(engine_grads, grads) <= bound
        assert over_largest(engine_statistics, statistics) <= bound
        assert over_largest({"": engine.logits(x)}, {"": logits}) <= bound


@pytest.mark.parametrize(
    ("kernels", "size", "n"),
    [
        *((SpecificationKernels, size, 2 + place % 2) for place, size in enumerate(USED)),
        *((Row3Kernels, size, 3 - place % 2) for place, size in enumerate(USED[-2:])),
    ],
    ids=str,
)
def test_it_is_the_plain_path(kernels, size, n):
    net = network(widths=(4, 6, 8), seed=n)
    check_it(engine_for(net, n, *size, kernels), net, *batch(net, n, *size), 1e-10)


@pytest.mark.parametrize(("scale", "offset"), [(1, 300), (1, -300), (1e4, 0), (1e-4, 0), (255, 1e5), (255, -1e5)])
def test_offsets_of_both_signs(scale, offset):
    net = network(widths=(4, 6, 8))
    x, target = batch(net, 2, 132, 236)
    check_it(engine_for(net, 2, 132, 236), net, scale * x + offset, target, 1e-8)


@pytest.mark.skipif(not COMPILER, reason="g++ is not here")
@pytest.mark.parametrize(
    ("precision", "hopper", "bound"), [("float32", False, 1e-5), ("tf32", True, 1e-2), ("bf16", False, 5e-2)]
)
def test_the_kernels_of_many_blocks(precision, hopper, bound):
    net = network(widths=(4, 6, 8), dtype="float32")
    x, target = batch(net, 2, 28, 44)
    engine = CudaEngine(net, LOSS, 2, (28, 44), kernels=EmulatedKernels(precision, hopper=hopper))
    check_it(engine, net, x, target, bound)
