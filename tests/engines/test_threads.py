"""One engine and several threads: right numbers, or an error at once."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from minunet.base import rng
from minunet.data.normalize import Normalization
from minunet.engines.cpu.engine import CpuEngine
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.results.prediction import Predictor

NET = UNet(widths=(4, 6), dropout=0.3, seed=1)
LOSS, KEY = SegmentationLoss(), rng.Key(0)


@pytest.fixture(params=["all cores", "one core"])
def cores(request):
    """The test runs on these cores."""
    if request.param == "all cores":
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("the cores of a process, as Linux has them")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_predictor_used_by_four_threads_is_right_each_time(workers, frozen):
    draw = np.random.default_rng(0)
    volumes = [draw.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8) for _ in range(4)]
    net = UNet(widths=(4, 6), dropout=0.3, seed=1)
    with CpuEngine(net, LOSS, 2, (16, 16), workers=workers) as engine:
        if frozen:
            engine.freeze()
        predictor = Predictor(net, Normalization(), 16, True, engine, batch=2)
        expected = [predictor.probabilities(volume) for volume in volumes]
        assert not np.allclose(expected[0], expected[1])

        def ask(number):
            return [predictor.probabilities(volumes[number]) for _ in range(30)]

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, range(4)))
    for number, found in enumerate(answers):
        assert all(np.array_equal(each, expected[number]) for each in found)


def test_steps_of_two_threads_are_an_error_at_the_first_of_the_second():
    x = np.zeros((2, 16, 16, 3), "float32")
    with CpuEngine(NET, LOSS, 2, (16, 16), workers=1) as engine:
        engine.loss_and_grads(x, x[..., :1], KEY)
        raised = []

        def other():
            try:
                engine.loss_and_grads(x, x[..., :1], KEY)
            except RuntimeError as error:
                raised.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert raised == ["this engine takes the steps of another thread, build one for each"]
        engine.loss_and_grads(x, x[..., :1], KEY)  # and the first one goes on
