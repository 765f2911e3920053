"""Whoever edits the code and trains sees the edit: an engine that computes another function is not taken."""

import numpy as np
import pytest

from minunet import engines, ops
from minunet.data import phantom
from minunet.engines.cpu import bands, norm, resample
from minunet.engines.cpu.engine import CpuEngine
from minunet.network import loss as loss_module
from minunet.network.blocks import DoubleConv
from minunet.network.layers import BatchNorm2d, Dropout
from minunet.network.loss import SegmentationLoss, SoftmaxLoss
from minunet.network.unet import UNet
from minunet.training import optim, step
from minunet.training.config import TrainingConfig
from minunet.training.optim import AdamW
from tests.engines.cases import train
from tests.network.test_own_blocks import OwnUNet

SIZE = (16, 24)


def small_net(**config):
    return UNet(**{"widths": (4, 6, 8), "dropout": 0.3, "seed": 2, **config})


def built(net=None, loss=None, size=SIZE, **options):
    with engines.build(net or small_net(), loss or SegmentationLoss(), 4, size, **options) as engine:
        return engine.name, engine.reason


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({}, SIZE),
        ({"dtype": "float64"}, SIZE),
        ({"up_kernel": 2, "conv_bias": False, "dropout": 0.0, "out_channels": 2}, SIZE),
        ({"widths": (4,)}, (9, 13)),
        ({"widths": (2, 2, 2, 2, 2)}, (16, 16)),
    ],
)
def test_the_engine_as_it_is_passes(config, size):
    name, reason = built(small_net(**config), size=size)
    assert (name.partition(",")[0], reason) == ("cpu", None)


def changed(function, change):
    """``function``, whose result goes through ``change`` (the first of it, if there are several)."""

    def edited(*arguments, **options):
        result = function(*arguments, **options)
        return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)

    return edited


def with_option(function, **fixed):
    return lambda *arguments, **options: function(*arguments, **{**options, **fixed})


def leaky_relu_forward(x):
    y, cache = RELU(x)
    return np.where(cache.passed, y, 0.1 * x), cache


def average_pool(x):
    _, cache = POOL(x)
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4)), cache


def unbiased_batch_stats(self, cache):
    return {"running_mean": cache.batch_mean, "running_var": cache.batch_var * 1.01}


RELU, POOL = ops.relu_forward, ops.max_pool2d_forward

#: What is edited, its name, and what it becomes: the plain path computes with it, and the engine does not.
EDITS = {
    "ReLU: leaky": (ops, "relu_forward", leaky_relu_forward),
    "ReLU: cut off at 5": (ops, "relu_forward", changed(ops.relu_forward, lambda y: np.minimum(y, 5))),
    "ReLU: its backward lets all pass": (ops, "relu_backward", lambda dy, cache: dy.copy()),
    "max-pool: the mean": (ops, "max_pool2d_forward", average_pool),
    "max-pool: its backward halved": (ops, "max_pool2d_backward", changed(ops.max_pool2d_backward, lambda dx: dx / 2)),
    "conv2d: twice": (ops, "conv2d_forward", changed(ops.conv2d_forward, lambda y: 2 * y)),
    "conv2d: its dx": (ops, "conv2d_backward", changed(ops.conv2d_backward, lambda dx: 1.001 * dx)),
    "transposed convolution: shifted": (
        ops,
        "conv_transpose2d_forward",
        changed(ops.conv_transpose2d_forward, lambda y: np.roll(y, 1, axis=1)),
    ),
    "concat: [skip, up]": (ops, "concat_forward", lambda up, skip: (CONCAT(skip, up)[0], CONCAT(up, skip)[1])),
    "dropout: not scaled": (ops, "dropout_forward", changed(ops.dropout_forward, lambda y: y * np.float32(0.7))),
    "batch norm: another eps": (ops, "batch_norm2d_forward", with_option(ops.batch_norm2d_forward, eps=2e-3)),
    "batch norm: its backward forgets the variance": (
        ops,
        "batch_norm2d_backward",
        lambda dy, cache: (dy * cache.gamma * cache.inverse_std, *NORM(dy, cache)[1:]),
    ),
    "batch norm: its statistics": (BatchNorm2d, "batch_stats", unbiased_batch_stats),
    "the block: no second ReLU": (
        DoubleConv,
        "forward",
        changed(DoubleConv.forward, lambda y: y + np.float32(0.01)),
    ),
    "dropout: one stream for all": (
        Dropout,
        "forward",
        lambda self, x, *, key: DROPOUT(Dropout(self.rate, 0), x, key=key),
    ),
    "the U: logits shifted": (UNet, "forward", changed(UNet.forward, lambda y: y + np.float32(0.1))),
    "the U: gradients scaled": (
        UNet,
        "backward",
        lambda self, dy, cache: (lambda dx, grads: (dx, {n: 1.001 * g for n, g in grads.items()}))(
            *BACKWARD(self, dy, cache)
        ),
    ),
    "the loss: Dice twice": (
        loss_module,
        "dice_loss_forward",
        changed(loss_module.dice_loss_forward, lambda loss: 2 * loss),
    ),
    "the loss: the gradient of the cross entropy": (
        loss_module,
        "bce_with_logits_backward",
        changed(loss_module.bce_with_logits_backward, lambda dz: 2 * dz),
    ),
    "AdamW: no bias correction": (
        AdamW,
        "_update",
        lambda self, theta, g, m, v, lr, decay: optim.adamw_update(
            theta, g, m, v, 1000, lr, self.betas, self.eps, decay
        ),
    ),
    "AdamW: no decay": (AdamW, "_update", lambda self, *arrays: UPDATE(self, *arrays[:-1], 0.0)),
    "clipping: not at all": (step, "clip_by_global_norm", lambda grads, norm: (dict(grads), CLIP(grads, norm)[1])),
}
CONCAT, NORM, DROPOUT, BACKWARD = ops.concat_forward, ops.batch_norm2d_backward, Dropout.forward, UNet.backward
UPDATE, CLIP = AdamW._update, optim.clip_by_global_norm


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_of_the_code_is_what_trains(monkeypatch, edit):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # no team: what is edited is the plain path
    monkeypatch.setattr(*edit)
    name, reason = built()
    assert name == "plain"
    assert reason.startswith("it differs from the code by "), reason


#: Defects of the engine itself, planted in this process alone: its share of the work is wrong then.
DEFECTS = {
    "ReLU": (norm.Relu, "__call__", lambda self, z, out: np.maximum(z, 0, out=out)),
    "pool": (resample.PoolForward, "run", lambda self: None),
    "the border of a band": (bands.Band, "load", lambda self, chunk: LOAD(self, chunk._replace(first_row=1))),
    "the loss": (CpuEngine, "loss_and_grads", changed(CpuEngine.loss_and_grads, lambda value: 1.01 * value)),
    "an exception": (resample.UpBackward, "run", lambda self: {}["nothing"]),
}
LOAD = bands.Band.load


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_an_engine_with_a_defect_does_not_train(monkeypatch, defect):
    monkeypatch.setattr(*defect)
    name, reason = built()
    assert name == "plain"
    assert reason.startswith(("it differs from the code by ", "it fails where the code does not (")), reason


def test_another_eps_in_one_norm_is_taken_by_the_engine():
    net = small_net()
    net.downs[1].convs.norm2.eps = 0.1
    name, reason = built(net)
    assert (name.partition(",")[0], reason) == ("cpu", None)


class TenTimes(SegmentationLoss):
    def forward(self, logits, target):
        loss, cache = super().forward(logits, target)
        return 10 * loss, cache


class NoDataclass:
    def forward(self, logits, target):
        return SegmentationLoss().forward(logits, target)

    def backward(self, cache):
        return SegmentationLoss().backward(cache)


def patched_net():
    net = small_net()
    net.bottleneck.forward = net.bottleneck.forward
    return net


@pytest.mark.parametrize(
    ("net", "loss", "reason"),
    [
        (OwnUNet(widths=(2, 4)), None, "the network is a OwnUNet"),
        (patched_net(), None, "bottleneck has a forward of its own"),
    ],
    ids=["network", "a method"],
)
def test_own_code_is_named(net, loss, reason):
    assert built(net, loss) == ("plain", reason)


class OnlyEmpty(NoDataclass):
    """A loss that does not take the masks of the self-check."""

    def forward(self, logits, target):
        if target.any():
            raise ValueError("target must be empty")
        return super().forward(logits, target)


def test_the_engine_takes_a_loss_of_ones_own():
    for loss in (TenTimes(), NoDataclass(), SoftmaxLoss(), SegmentationLoss(over="class")):
        net = small_net(output="softmax", out_channels=3) if type(loss) is SoftmaxLoss else small_net()
        assert built(net, loss) == ("cpu, 2 processes", None)
    assert built(None, OnlyEmpty()) == (
        "plain",
        "its loss cannot be tried out beforehand (target must be empty)",
    )


def test_a_block_of_ones_own_is_named():
    net = small_net()
    net.downs[0].convs = OwnUNet(widths=(4, 6, 8)).downs[0].convs
    assert built(net) == ("plain", "down1.convs is a Residual")


def test_a_network_of_ones_own_trains_as_it_is_read(tmp_path):
    """With the default engine its own forward is called, and the result is that of the plain path."""
    calls = []

    class Counted(OwnUNet):
        def forward(self, *arguments, **options):
            calls.append(options["training"])
            return super().forward(*arguments, **options)

    made = phantom.make(patients=2, size=16, seed=1)
    slices = [made.subset([i for i, p in enumerate(made.patients) if p == name][:8]) for name in made.patient_names()]
    config = TrainingConfig(epochs=1, batch_size=4)
    net, twin = (Counted(widths=(2, 4), up_kernel=2, seed=1) for _ in range(2))
    auto = train(net, slices, config, tmp_path / "auto")
    assert sum(calls) == 2
    assert auto.history == train(twin, slices, config, tmp_path / "plain", choice="plain").history
