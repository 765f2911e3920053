"""The summary against the network itself: what really runs, how large it is, and what a pixel really sees."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from minunet import ops
from minunet.base import cli
from minunet.base.rng import Key
from minunet.network.layers import map_arrays
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.summary import main, summary
from minunet.training.step import loss_and_grads

OPS = ("conv2d", "conv_transpose2d", "batch_norm2d", "relu", "max_pool2d", "dropout", "concat")
NETS = [
    {"widths": (2, 3, 5), "up_kernel": 2},
    {"widths": (2, 3), "up_kernel": 3, "conv_bias": False, "out_channels": 2, "dtype": "float64"},
    {"widths": (1, 2, 1, 2), "up_kernel": 3, "head_kernel": 1, "in_channels": 1},
    {"widths": (3,), "head_kernel": 5},
]


@pytest.fixture
def outputs(monkeypatch):
    """(op, output) of each op that runs during the test, in order."""
    ran = []
    for name in OPS:
        forward = getattr(ops, f"{name}_forward")

        def recording(*args, name=name, forward=forward, **kwargs):
            y, cache = forward(*args, **kwargs)
            ran.append((name, y))
            return y, cache

        monkeypatch.setattr(ops, f"{name}_forward", recording)
    return ran


@pytest.mark.parametrize("config", NETS)
def test_the_rows_are_the_ops_that_run(config, outputs):
    net = UNet(**config)
    height, width = 3 * 2**net.depth, 2 * 2**net.depth
    x = np.zeros((2, height, width, net.config["in_channels"]), net.config["dtype"])
    net.forward(x, training=True, key=Key(seed=0))
    rows = summary(net, height, width, batch=2).rows
    assert [(row.kind.split()[0], row.shape, row.activation_bytes) for row in rows] == [
        (op, y.shape, y.nbytes) for op, y in outputs
    ]


@pytest.mark.parametrize("config", NETS)
def test_the_parameters_are_those_of_the_network(config):
    net = UNet(**config)
    table = summary(net, 16, 16)
    sizes = {}
    for name, array in net.parameters().items():
        layer = name.rpartition(".")[0]
        sizes[layer] = sizes.get(layer, 0) + array.size
    assert {row.name: row.parameters for row in table.rows if row.parameters} == sizes
    assert table.parameters == sum(array.size for array in net.parameters().values())


@pytest.mark.parametrize("config", NETS)
def test_the_field_is_what_a_pixel_sees(config, outputs):
    """A NaN in one image pixel reaches exactly those numbers of each layer that the pixel can influence."""
    net = UNet(**config)
    period = 2**net.depth
    widest = summary(net, period, period).receptive_field
    height = period * -(-2 * (widest + period) // period)  # so high that the middle is free of the border
    images = np.random.default_rng(0).normal(size=(height, height, period, net.config["in_channels"]))
    images[np.arange(height), np.arange(height), 0] = np.nan  # image r: in row r
    net.forward(images.astype(net.config["dtype"]), training=False)

    table = summary(net, height, period, batch=height)
    assert len(table.rows) == len(outputs)
    for row, (_, y) in zip(table.rows, outputs, strict=True):
        sees = np.isnan(y).any(axis=(2, 3))  # (image row, row of y)
        middle = sees.shape[1] // 2
        places = range(middle, middle + period // row.jump)
        extents = [np.flatnonzero(sees[:, place]) for place in places]
        assert max(rows[-1] - rows[0] + 1 for rows in extents) == row.receptive_field, row.name
        assert sees.shape[1] * row.jump == height, row.name


def test_the_field_of_one_block_by_hand():
    rows = {row.name: row for row in summary(UNet(widths=(1, 1), up_kernel=2, head_kernel=1), 8, 8).rows}
    fields = {name: (row.receptive_field, row.jump) for name, row in rows.items()}
    assert fields["down1.conv1"] == (3, 1)
    assert fields["down1.conv2"] == (5, 1)
    assert fields["down1.pool"] == (6, 2)  # two neighbours, 1 apart
    assert fields["bottleneck.conv2"] == (14, 2)  # 6 + 2 * (3 - 1) * 2
    assert fields["up1.up"] == (14, 1)  # a kernel of 2: each pixel from one below
    assert fields["up1.concat"] == (14, 1)  # the skip sees 5 of these 14
    assert fields["up1.conv1"] == (16, 1)  # three neighbours lie on two pixels below: one more, 2 apart
    assert fields["up1.conv2"] == (18, 1)
    assert fields["head"] == (18, 1)


class Counting(np.ndarray):
    """An array whose matrix products are counted."""

    flops = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        plain = [x.view(np.ndarray) if isinstance(x, Counting) else x for x in inputs]
        if out is not None:
            kwargs["out"] = tuple(x.view(np.ndarray) if isinstance(x, Counting) else x for x in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        if ufunc is np.matmul:
            Counting.flops += 2 * result.size * inputs[0].shape[-1]
        return result


Counting.__module__ = "numpy"  # for array_module


@pytest.mark.parametrize("config", NETS)
def test_the_flops_are_those_of_the_matrix_products_that_run(config, monkeypatch):
    net = UNet(**{**config, "dtype": "float64"})
    size = 4 * 2**net.depth
    table = summary(net, size, size, batch=2)
    x = np.random.default_rng(0).normal(size=(2, size, size, net.config["in_channels"]))

    Counting.flops = 0
    counting_net = map_arrays(net, lambda array: array.view(Counting))
    counting_net.forward(x, training=True, key=Key(seed=0))
    assert Counting.flops == table.flops

    def counting(backward):
        def call(dy, cache):
            cache = cache._replace(x=cache.x.view(Counting), weight=cache.weight.view(Counting))
            return backward(dy.view(Counting), cache)

        return call

    for name in ("conv2d_backward", "conv_transpose2d_backward"):
        monkeypatch.setattr(ops, name, counting(getattr(ops, name)))
    monkeypatch.setattr(np, "ascontiguousarray", lambda x: np.array(x, order="C", subok=True))
    logits, cache = net.forward(x, training=True, key=Key(seed=0))
    Counting.flops = 0
    net.backward(np.random.default_rng(0).standard_normal(logits.shape).astype(logits.dtype), cache)
    assert Counting.flops == table.training_flops - table.flops


def test_the_activations_tell_the_memory_of_a_training_step():
    net = UNet(widths=(16, 32, 64), up_kernel=2)
    x, target = np.zeros((2, 64, 64, 3), "float32"), np.zeros((2, 64, 64, 1), "float32")
    tracemalloc.start()
    loss_and_grads(net, x, target, SegmentationLoss(), Key(seed=0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.85 < peak / summary(net, 64, 64, batch=2).activation_bytes < 1.15


@pytest.mark.parametrize(("up_kernel", "parameters", "gflop"), [(2, 31_044_033, 73.808), (3, 34_525_633, 77.918)])
def test_the_reference_network(up_kernel, parameters, gflop):
    net = UNet(up_kernel=up_kernel)
    table = summary(net, 224, 224)
    assert table.parameters == parameters
    assert table.flops / 1e9 == pytest.approx(gflop, abs=5e-4)
    assert table.rows[0].name == "down1.conv1"
    assert table.rows[-1].shape == (1, 224, 224, 1)
    assert summary(net, 224, 448, batch=3).flops == 6 * table.flops


def test_the_table_is_aligned_and_adds_up():
    table = summary(UNet(widths=(8, 16), up_kernel=2), 32, 64, batch=2)
    lines = str(table).splitlines()
    assert lines[0] == "batch of 2, images of 32 x 64 x 3, float32"
    body = lines[1 : lines.index("")]
    edges = {len(line) for line in body if not line.startswith("-") and line[-1].isdigit()}
    rules = {line for line in body if set(line) == {"-"}}
    assert len(rules) == 1
    assert edges == {len(rules.pop()), len(body[-1])}  # all rows end in the column of the jump, the total before it
    printed = {line.split()[0] for line in body}
    assert printed >= {row.name for row in table.rows}
    assert body[-1].split() == ["total", f"{table.parameters:,}", f"{table.flops / 1e6:,.1f}",
                                f"{table.activation_bytes / 1e6:,.2f}", str(table.receptive_field)]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((30, 32, 1), r"^height must be a positive multiple of 2\^depth = 4, got 30$"),
        ((32, 0, 1), r"^width must be a positive multiple of 2\^depth = 4, got 0$"),
        ((32, 32, 0), r"^batch must be at least 1, got 0$"),
    ],
)
def test_wrong_sizes_are_named(size, message):
    with pytest.raises(ValueError, match=message):
        summary(UNet(widths=(1, 1, 1)), *size)


def test_the_command_prints_the_table(capsys):
    assert cli.run(main, ["--widths", "4,8", "--size", "16", "--batch", "2", "--up-kernel", "2", "--no-conv-bias"]) == 0
    net = UNet(widths=(4, 8), up_kernel=2, conv_bias=False)
    assert capsys.readouterr().out == f"{summary(net, 16, 16, batch=2)}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--widths", "4,8,16", "--size", "18"], "--size: must be a multiple of 4 for 3 widths, got 18"),
        (["--widths", "4,x"], "--widths: must be a whole number from 1 to 4096, got 'x', see --help"),
        (["--widths", ""], "--widths: must be a whole number from 1 to 4096, got '', see --help"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    assert cli.run(main, flags) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_numpy_is_enough():
    code = "import sys, minunet.summary; print({'scipy', 'PIL', 'matplotlib', 'cupy', 'tqdm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
