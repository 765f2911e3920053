"""The whole network: wired as the figure, its gradient, its names, any image size."""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet import ops
from minunet.base.rng import DROPOUT, Key
from minunet.gradcheck import TOGETHER, check_net
from minunet.network.layers import BatchNorm2d, map_arrays
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from tests.strategies import seeds

KEY = Key(seed=3, epoch=1, step=2)


def build(seed=0, **config):
    """A tiny float64 network whose arrays are all random: a bias of zeros or a gamma of ones hides mistakes."""
    net = UNet(**{"widths": (2, 3), "seed": seed, "dtype": "float64", **config})
    rng = np.random.default_rng(seed)
    for name, array in {**net.parameters(), **net.buffers()}.items():
        array += rng.uniform(-0.3, 0.3, array.shape)
        assert not name.endswith("running_var") or (array > 0).all()
    return net


def images(net, seed=0, n=2, height=4, width=4):
    return np.random.default_rng([seed, 7]).standard_normal((n, height, width, net.config["in_channels"]))


def masks(net, seed=0, n=2, height=4, width=4):
    return np.random.default_rng([seed, 8]).random((n, height, width, net.config["out_channels"])) < 0.4


# --- Forward: the figure of the paper, written down a second time, in one piece -----------------------------------


def figure(net, x, training, key):
    """The logits of ``net``, from its arrays by name and the ops."""
    arrays = {**net.parameters(), **net.buffers()}
    depth, rate = len(net.config["widths"]) - 1, net.config["dropout"]

    def conv(x, name):
        return ops.conv2d_forward(x, arrays[f"{name}.weight"], arrays.get(f"{name}.bias"))[0]

    def block(x, name):
        for k in (1, 2):
            x = conv(x, f"{name}.conv{k}")
            norm = [arrays[f"{name}.norm{k}.{part}"] for part in ("gamma", "beta", "running_mean", "running_var")]
            x, _ = ops.batch_norm2d_forward(x, *norm, training=training, eps=1e-3)
            x = np.maximum(x, 0)
        return x

    def dropout(x, layer):
        layer_key = key._replace(stream=DROPOUT + layer) if training and key else None
        return ops.dropout_forward(x, rate, key=layer_key)[0]

    skips = {}
    for level in range(1, depth + 1):
        skips[level] = block(x, f"down{level}")
        x = dropout(ops.max_pool2d_forward(skips[level])[0], layer=level - 1)
    x = block(x, "bottleneck")
    for level in range(depth, 0, -1):
        x, _ = ops.conv_transpose2d_forward(x, arrays[f"up{level}.up.weight"], arrays[f"up{level}.up.bias"])
        x = np.concatenate([x, skips[level]], axis=3)
        x = block(dropout(x, layer=depth + level - 1), f"up{level}")
    return conv(x, "head")


CONFIGS = {
    "depth 1": {},
    "depth 2": {"widths": (2, 3, 4)},
    "depth 3": {"widths": (1, 2, 2, 3)},
    "depth 0": {"widths": (2,)},
    "up 2x2": {"up_kernel": 2},
    "head 1x1": {"head_kernel": 1},
    "two masks": {"out_channels": 2},
    "no conv bias": {"conv_bias": False},
    "no dropout": {"dropout": 0.0},
    "one image channel": {"in_channels": 1},
    "widths that shrink": {"widths": (4, 2, 3)},
    "all of it": {"widths": (2, 3, 4), "up_kernel": 2, "head_kernel": 1, "out_channels": 2, "conv_bias": False},
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@configs
@pytest.mark.parametrize("training", [True, False])
def test_forward_is_the_figure(config, training):
    net = build(**config)
    side = 2 * 2**net.depth
    x = images(net, height=side, width=2 * side)
    logits, _ = net.forward(x, training=training, key=KEY)
    assert logits.shape == (*x.shape[:3], net.config["out_channels"])
    assert np.array_equal(logits, figure(net, x, training, KEY))


def test_inference_needs_no_key_and_ignores_one():
    net = build()
    x = images(net)
    assert np.array_equal(net.forward(x, training=False)[0], net.forward(x, training=False, key=KEY)[0])


def test_every_dropout_has_a_stream_of_its_own():
    net = build(widths=(2, 3, 4, 5))
    assert sorted(part.dropout.index for part in [*net.downs, *net.ups]) == list(range(6))


# --- Backward -----------------------------------------------------------------------------------------------------


@configs
def test_gradient_by_complex_step(config):
    net = build(**config)
    side = 2 * 2**net.depth
    x, target = images(net, height=side, width=side), masks(net, height=side, width=side)
    report = check_net(net, x, target, key=KEY, sampling={"exhaustive": 2, "samples": 1, "directions": 1})
    assert report.ok(1e-12), str(report)
    assert {comparison.name for comparison in report.comparisons} == {"x", TOGETHER, *net.parameters()}


def test_gradient_in_every_single_parameter():
    net = build(widths=(1, 2), in_channels=1, out_channels=2)
    x, target = images(net), masks(net)
    report = check_net(net, x, target, key=KEY, sampling={"exhaustive": 10**6})
    assert report.ok(1e-12), str(report)
    assert len(report.comparisons) == x.size + sum(p.size for p in net.parameters().values()) + 1


@pytest.mark.parametrize("up_kernel", [2, 3])
def test_gradient_by_central_differences(up_kernel):
    net = build(up_kernel=up_kernel)
    sampling = {"exhaustive": 2, "samples": 2, "directions": 1}
    report = check_net(net, images(net), masks(net), key=KEY, method="central", sampling=sampling)
    assert report.ok(1e-6), str(report)


@given(seed=seeds, over=st.sampled_from(["batch", "image"]), bce_weight=st.sampled_from([0.0, 1.0]))
def test_gradient_at_random_weights(seed, over, bce_weight):
    net = build(seed)
    loss = SegmentationLoss(bce_weight=bce_weight, over=over)
    sampling = {"exhaustive": 0, "samples": 0, "directions": 0, "together": 3}
    report = check_net(net, images(net, seed), masks(net, seed), loss, KEY._replace(seed=seed), seed, sampling=sampling)
    assert report.ok(1e-12), str(report)


def test_backward_twice_and_forward_twice_give_the_same_bits():
    net = build(widths=(2, 3, 4))
    x = images(net, height=8, width=8)
    before = {name: a.copy() for name, a in {**net.parameters(), **net.buffers()}.items()}
    logits, cache = net.forward(x, training=True, key=KEY)
    dlogits = images(build(in_channels=1), height=8, width=8)
    (dx, grads), (dx_again, grads_again) = (net.backward(dlogits, cache) for _ in range(2))
    assert np.array_equal(dx, dx_again)
    assert all(np.array_equal(grads[name], grads_again[name]) for name in grads)
    assert np.array_equal(net.forward(x, training=True, key=KEY)[0], logits)
    for name, array in {**net.parameters(), **net.buffers()}.items():
        assert np.array_equal(array, before[name]), name


def test_float32_is_close_to_float64():
    net = build(widths=(4, 8, 8))
    single = map_arrays(net, lambda a: a.astype("float32"))
    net = map_arrays(single, lambda a: a.astype("float64"))
    x = images(net, height=16, width=16).astype("float32")
    logits, cache = net.forward(x.astype("float64"), training=True, key=KEY)
    logits32, cache32 = single.forward(x, training=True, key=KEY)
    assert logits32.dtype == np.float32
    assert np.abs(logits32 - logits).max() <= 2e-5 * np.abs(logits).max()
    dlogits = np.random.default_rng(0).standard_normal(logits.shape).astype("float32")
    _, grads = net.backward(dlogits.astype("float64"), cache)
    _, grads32 = single.backward(dlogits, cache32)
    largest = max(np.abs(g).max() for g in grads.values())
    for name, g in grads32.items():
        assert g.dtype == np.float32
        assert np.abs(g - grads[name]).max() <= 1e-4 * largest, name


# --- Names --------------------------------------------------------------------------------------------------------


@configs
def test_parameters_grads_and_statistics_have_the_same_names(config):
    net = build(**config)
    side = 2 * 2**net.depth
    logits, cache = net.forward(images(net, height=side, width=side), training=True, key=KEY)
    dx, grads = net.backward(logits, cache)
    parameters, buffers = net.parameters(), net.buffers()
    assert dx.shape == (2, side, side, net.config["in_channels"])
    assert list(grads) == list(parameters)
    assert all(grads[name].shape == parameters[name].shape for name in parameters)
    stats = net.batch_stats(cache)
    assert list(stats) == list(buffers)
    assert all(stats[name].shape == buffers[name].shape for name in buffers)


def test_names_of_a_network_of_depth_1():
    net = UNet(3, 1, (2, 4), up_kernel=3)
    shapes = {name: array.shape for name, array in net.parameters().items()}
    assert shapes == {
        **block("down1", 3, 2),
        **block("bottleneck", 2, 4),
        "up1.up.weight": (3, 3, 4, 2),
        "up1.up.bias": (2,),
        **block("up1", 4, 2),
        "head.weight": (3, 3, 2, 1),
        "head.bias": (1,),
    }
    assert list(net.parameters()) == list(shapes)
    assert list(net.buffers()) == [
        f"{name}.norm{k}.running_{kind}"
        for name in ("down1", "bottleneck", "up1")
        for k in (1, 2)
        for kind in ("mean", "var")
    ]


def block(name, c_in, c_out):
    """The shapes of a double convolution's parameters, in order."""
    shapes = {}
    for k, channels in ((1, c_in), (2, c_out)):
        shapes[f"{name}.conv{k}.weight"], shapes[f"{name}.conv{k}.bias"] = (3, 3, channels, c_out), (c_out,)
        shapes[f"{name}.norm{k}.gamma"] = shapes[f"{name}.norm{k}.beta"] = (c_out,)
    return shapes


def test_conv_bias_false_leaves_out_only_what_a_batch_norm_undoes():
    with_bias, without = (set(UNet(widths=(2, 4), conv_bias=b).parameters()) for b in (True, False))
    assert with_bias - without == {f"{name}.conv{k}.bias" for name in ("down1", "bottleneck", "up1") for k in (1, 2)}
    assert without < with_bias


def test_parameters_and_buffers_are_the_networks_own_arrays():
    net = build()
    x = images(net)
    before, _ = net.forward(x, training=False)
    for arrays in (net.parameters(), net.buffers()):
        for name, array in arrays.items():
            array *= 1.5
            after, _ = net.forward(x, training=False)
            assert not np.array_equal(after, before), name
            before = after


def test_the_reference_network():
    """The defaults are the reference system's; built with widths of a sixteenth, as it takes seconds to draw."""
    defaults = {name: p.default for name, p in inspect.signature(UNet).parameters.items()}
    assert defaults.pop("widths") == (64, 128, 256, 512, 1024)
    total = 0
    for c_in, c_out in [(3, 4), (4, 8), (8, 16), (16, 32), (32, 64)]:  # two convolutions and two batch norms each
        total += 9 * (c_in + c_out) * c_out + 2 * c_out + 4 * c_out
    for c_in, c_out in [(64, 32), (32, 16), (16, 8), (8, 4)]:  # a transposed convolution, and the same on 2 c_out
        total += 9 * c_in * c_out + c_out + 9 * (2 * c_out + c_out) * c_out + 2 * c_out + 4 * c_out
    total += 9 * 4 + 1
    net = UNet(widths=(4, 8, 16, 32, 64))
    assert sum(p.size for p in net.parameters().values()) == total
    assert {p.dtype for p in net.parameters().values()} == {np.dtype("float32")}
    assert net.config == {**defaults, "widths": (4, 8, 16, 32, 64)}
    assert [defaults[name] for name in ("dropout", "up_kernel", "head_kernel", "conv_bias")] == [0.3, 3, 3, True]


def test_the_seed_decides_the_weights():
    def weights(seed):
        return np.concatenate([p.ravel() for p in UNet(widths=(2, 3), seed=seed).parameters().values()])

    assert np.array_equal(weights(5), weights(5))
    assert not np.array_equal(weights(5), weights(6))
    # No two layers have drawn the same numbers.
    net = UNet(widths=(3, 3), in_channels=3)
    assert not np.array_equal(net.parameters()["down1.conv1.weight"], net.parameters()["down1.conv2.weight"])


def test_head_and_transposed_convolutions_are_drawn_from_glorot_and_the_others_from_he():
    parameters = UNet(widths=(16, 16)).parameters()
    for name, array in parameters.items():
        if name.endswith("weight"):
            height, width, c_in, c_out = array.shape
            limit = np.sqrt(6 / (height * width * (c_in + c_out)))  # which he reaches beyond
            assert (np.abs(array).max() <= limit) == (name in ("head.weight", "up1.up.weight")), name


def test_config_builds_the_same_network():
    net = UNet(2, 3, [2, 4], 0.1, 2, 1, False, 9, "float64", 0.01, "softmax")
    assert net.config == {
        "in_channels": 2,
        "out_channels": 3,
        "widths": (2, 4),
        "dropout": 0.1,
        "up_kernel": 2,
        "head_kernel": 1,
        "conv_bias": False,
        "seed": 9,
        "dtype": "float64",
        "batch_norm_eps": 0.01,
        "output": "softmax",
    }
    twin = UNet(**net.config)
    assert all(np.array_equal(p, twin.parameters()[name]) for name, p in net.parameters().items())


def test_the_eps_is_that_of_every_batch_norm():
    net = UNet(widths=(2, 3, 4), batch_norm_eps=0.25)
    eps = [layer.eps for layer in net.leaves().values() if isinstance(layer, BatchNorm2d)]
    assert eps == 10 * [0.25]


# --- Predict ------------------------------------------------------------------------------------------------------


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


@given(seed=seeds, height=st.integers(1, 9), width=st.integers(1, 9))
def test_predict_takes_any_size(seed, height, width):
    net = build(seed, widths=(2, 2, 3), out_channels=2)
    x = images(net, seed, height=height, width=width)
    p = net.predict(x)
    assert p.shape == (2, height, width, 2)
    assert ((p > 0) & (p < 1)).all()
    # What is padded continues the edge, at the bottom and at the right; and it is cut off again.
    padded = np.pad(x, ((0, 0), (0, -height % 4), (0, -width % 4), (0, 0)), mode="edge")
    expected = sigmoid(net.forward(padded, training=False)[0])[:, :height, :width]
    assert np.abs(p - expected).max() <= 1e-15


def test_predict_of_a_fitting_size_is_the_sigmoid_of_forward():
    net = build()
    x = images(net, height=6, width=8)
    assert np.abs(net.predict(x) - sigmoid(net.forward(x, training=False)[0])).max() <= 1e-15


def test_predict_of_classes_is_the_softmax_of_forward():
    net = build(out_channels=3, output="softmax")
    x = images(net, height=6, width=7)
    p = net.predict(x)
    logits = net.forward(net.pad(x), training=False)[0][:, :6, :7]
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    assert np.abs(p - e / e.sum(axis=-1, keepdims=True)).max() <= 1e-15
    assert np.array_equal(net.probabilities(logits), p)
    masks = build(out_channels=3)
    assert np.array_equal(masks.predict(x), masks.probabilities(logits))  # the same weights, a sigmoid each
    assert np.abs(masks.predict(x) - sigmoid(logits)).max() <= 1e-15


def test_predict_leaves_its_argument_and_treats_each_image_alone():
    net = build()
    x = images(net, height=5, width=3)
    before = x.copy()
    p = net.predict(x)
    assert np.array_equal(x, before)
    alone = np.concatenate([net.predict(x[n : n + 1]) for n in range(2)])
    assert np.abs(alone - p).max() <= 1e-15


# --- What it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 6, 8, 3), (1, 8, 6, 3), (1, 2, 4, 3)])
def test_forward_refuses_a_size_that_2_to_the_depth_does_not_divide(shape):
    net = UNet(widths=(2, 3, 4))
    with pytest.raises(ValueError, match=r"^x must have a height and width that .*4 divides.*predict"):
        net.forward(np.zeros(shape, "float32"), training=False)


@pytest.mark.parametrize("method", ["forward", "predict"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 4, 4, 1), "float32"), r"^x must have shape \(N, H, W, 3\), got \(1, 4, 4, 1\)"),
        (np.zeros((4, 4, 3), "float32"), r"^x must have shape \(N, H, W, 3\), got \(4, 4, 3\)"),
        (np.zeros((0, 4, 4, 3), "float32"), r"^x must have shape \(N, H, W, 3\).*got \(0, 4, 4, 3\)"),
        (np.zeros((1, 0, 4, 3), "float32"), r"^x must have shape \(N, H, W, 3\).*got \(1, 0, 4, 3\)"),
        (np.zeros((1, 4, 4, 3)), "^x must have .*dtype float32, got float64"),
        (np.zeros((1, 4, 4, 3), "uint8"), "^x must have .*dtype float32, got uint8"),
    ],
)
def test_refuses_an_image(method, x, message):
    net = UNet(widths=(2, 3))
    with pytest.raises(ValueError, match=message):
        net.predict(x) if method == "predict" else net.forward(x, training=False)


def test_training_with_dropout_needs_a_key():
    x = np.zeros((1, 4, 4, 3), "float32")
    with pytest.raises(ValueError, match=r"^key must be given in training"):
        UNet(widths=(2, 3)).forward(x, training=True)
    logits, _ = UNet(widths=(2, 3), dropout=0.0).forward(x, training=True)
    assert logits.shape == (1, 4, 4, 1)


def test_a_batch_that_leaves_batch_norm_a_single_value_is_refused():
    x = np.zeros((1, 4, 4, 3), "float32")
    with pytest.raises(ValueError, match="more than one value a channel"):
        UNet(widths=(2, 3, 4), dropout=0.0).forward(x, training=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"widths": ()}, r"^widths must be .*got \(\)"),
        ({"batch_norm_eps": 0.0}, r"^batch_norm_eps must be in \(0, 1\], got 0.0"),
        ({"batch_norm_eps": float("nan")}, r"^batch_norm_eps must be in \(0, 1\], got nan"),
        ({"output": "tanh"}, "^output must be 'sigmoid' or 'softmax', got 'tanh'"),
        ({"output": "softmax"}, "^out_channels must be at least 2 for a softmax, the background and a class, got 1"),
        ({"dtype": "float16"}, "^dtype must be 'float32' or 'float64', got 'float16'"),
        ({"widths": (4, 0)}, r"^widths must be .*got \(4, 0\)"),
        ({"in_channels": 0}, "^in_channels must be at least 1, got 0"),
        ({"out_channels": 0}, "^out_channels must be at least 1, got 0"),
        ({"up_kernel": 0}, "^up_kernel must be .*got 0"),
        ({"head_kernel": 0}, "^head_kernel must be at least 1, got 0"),
        ({"dropout": 1.0}, r"^dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"^dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_refuses_a_config(config, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{"widths": (2, 3), **config})
