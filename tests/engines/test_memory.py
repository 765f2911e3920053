"""The estimate of a training step's memory, against what NumPy takes; and what is free, against the limits set."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from minunet.base.rng import Key
from minunet.engines import memory
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.training.optim import AdamW, WeightEMA
from minunet.training.step import train_step


@pytest.mark.parametrize(("widths", "size", "batch"), [((8, 16, 32), 64, 6), ((16, 32, 64, 128), 16, 1)])
def test_a_step_takes_about_what_is_estimated(widths, size, batch):
    x = np.random.default_rng(0).standard_normal((batch, size, size, 3), "float32")
    target = (x[..., :1] > 1).astype("float32")
    tracemalloc.start()
    try:
        net = UNet(widths=widths, up_kernel=2)
        optimizer = AdamW(net.parameters())
        ema = WeightEMA(net.parameters() | net.buffers())
        for step in range(2):
            train_step(net, optimizer, x, target, SegmentationLoss(), Key(0, step=step), lr=1e-3, ema=ema)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.7 * peak < memory.training_bytes(net, size, batch) < 1.4 * peak


@pytest.mark.parametrize("batch", [1, 2, 7, 300])
def test_the_largest_batch_fits_and_the_next_does_not(batch):
    net = UNet(widths=(4, 8), up_kernel=2)
    needed = memory.training_bytes(net, 32, batch)
    assert memory.largest_batch(net, 32, needed) == batch
    assert memory.largest_batch(net, 32, needed - 1) == batch - 1


def test_the_advice_is_never_the_batch_that_has_failed():
    net = UNet(widths=(4, 8), up_kernel=2)
    assert memory.advice(net, 32, batch=8, available=10**15).endswith("choose at most 7")
    assert memory.advice(net, 32, batch=1, available=10**15).endswith("choose smaller images or a smaller network")
    assert memory.advice(net, 32, batch=8, available=10).endswith("choose smaller images or a smaller network")
    assert memory.advice(net, 32, batch=8, available=None).endswith(" GB, choose a smaller one")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is of Linux")
def test_a_limit_on_addresses_is_what_is_free():
    script = """
import resource
from minunet.engines import memory
from minunet.network.unet import UNet
net = UNet(widths=(2, 3))
assert memory.available_bytes(net) > 10**8
used = memory._kilobytes("/proc/self/status", "VmSize")
resource.setrlimit(resource.RLIMIT_AS, (used + 10**8, resource.RLIM_INFINITY))
print(memory.available_bytes(net))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert 0.9e8 < int(done.stdout) <= 1e8


def test_the_advice_on_data_is_a_size_that_fits_and_never_the_one_that_has_failed():
    for side, available in ((256, 10**7), (64, 10**6), (8, 500)):
        advice = memory.data_advice(100, side, available)
        fits = int(advice.partition("choose at most ")[2].split()[0])
        assert memory.data_bytes(100, fits) <= available < memory.data_bytes(100, fits + 1)
    assert "choose at most 7 " in memory.data_advice(100, side=8, available=10**9)
    assert memory.data_advice(100, 8, None).endswith("take 0.0 GB, choose a smaller one or fewer patients")
    assert memory.data_advice(100, 8, 399).endswith("are free, choose fewer patients")
    assert "0 slices" in memory.data_advice(0, 8, 10**9)
