"""The layers own arrays and hand them to the ops; the initialisers fill them; map_arrays copies the whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet import ops
from minunet.base.rng import DROPOUT, Key
from minunet.gradcheck import TOGETHER, check_layer
from minunet.network.blocks import DoubleConv, Down, Up
from minunet.network.initializers import glorot_uniform, he_normal
from minunet.network.layers import BatchNorm2d, Conv2d, ConvTranspose2d, Dropout, map_arrays, prefixed
from minunet.network.unet import UNet
from tests.strategies import seeds, tie_free

KEY = Key(seed=3, epoch=1, step=2)


def images(channels, seed=0, size=4, dtype="float64"):
    return tie_free(np.random.default_rng(seed), (2, size, size, channels)).astype(dtype)


def randomise(layer, seed=0):
    """A float64 copy of ``layer`` whose arrays are all random: a bias of zeros or a gamma of ones hides mistakes."""
    rng = np.random.default_rng(seed)
    return map_arrays(layer, lambda a: rng.uniform(0.5, 1.5, a.shape) * rng.choice([-1, 1], a.shape))


def double_conv(conv_bias=True):
    return DoubleConv(3, 2, conv_bias=conv_bias, generator=np.random.default_rng(0), dtype="float64")


#: Name -> a layer with its options, for an x of three channels. Each has forward, backward, parameters, buffers.
LAYERS = {
    "Conv2d": (Conv2d(3, 2), {}),
    "Conv2d without bias, strided": (Conv2d(3, 2, 2, stride=2, padding=1, bias=False), {}),
    "ConvTranspose2d": (ConvTranspose2d(3, 2), {}),
    "ConvTranspose2d without bias, padded": (ConvTranspose2d(3, 2, 4, stride=3, padding=1, bias=False), {}),
    "BatchNorm2d, training": (BatchNorm2d(3), {"training": True}),
    "BatchNorm2d, inference": (BatchNorm2d(3), {"training": False}),
    "Dropout": (Dropout(0.4, 2), {"key": KEY}),
    "Dropout, inference": (Dropout(0.4, 2), {"key": None}),
    "DoubleConv": (double_conv(), {"training": True}),
    "DoubleConv without bias": (double_conv(conv_bias=False), {"training": True}),
}
layers = pytest.mark.parametrize(("layer", "options"), LAYERS.values(), ids=LAYERS)


@layers
@given(seed=seeds)
def test_gradients(layer, options, seed):
    layer = randomise(layer, seed)
    if "running_var" in layer.buffers():
        layer.running_var = np.abs(layer.running_var)
    sampling = {"exhaustive": 3, "samples": 2, "directions": 1}
    report = check_layer(layer, images(3, seed), seed, sampling=sampling, **options)
    assert report.ok(1e-12), str(report)
    assert {comparison.name for comparison in report.comparisons} == {"x", TOGETHER, *layer.parameters()}


@layers
def test_grads_have_the_names_shapes_and_dtypes_of_the_parameters(layer, options):
    for dtype in ("float32", "float64"):
        cast = map_arrays(layer, lambda a, dtype=dtype: a.astype(dtype))
        y, cache = cast.forward(images(3, dtype=dtype), **options)
        dx, grads = cast.backward(y, cache)
        assert dx.dtype == y.dtype == dtype
        parameters = cast.parameters()
        assert list(grads) == list(parameters)
        assert all((g.shape, g.dtype) == (parameters[name].shape, dtype) for name, g in grads.items())


@layers
def test_nothing_is_remembered_between_calls(layer, options):
    """Two forwards, then their backwards in the order of the forwards: as if each had been alone."""
    layer = randomise(layer)
    if "running_var" in layer.buffers():
        layer.running_var = np.abs(layer.running_var)
    before = {name: a.copy() for name, a in {**layer.parameters(), **layer.buffers()}.items()}
    alone = []
    for seed in (1, 2):
        y, cache = layer.forward(images(3, seed), **options)
        alone.append(layer.backward(y, cache)[0])
    forwards = [layer.forward(images(3, seed), **options) for seed in (1, 2)]
    together = [layer.backward(y, cache)[0] for y, cache in forwards]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    for name, array in {**layer.parameters(), **layer.buffers()}.items():
        assert np.array_equal(array, before[name]), name


def test_parameters_and_buffers_are_the_layers_own_arrays():
    conv, norm = Conv2d(2, 3), BatchNorm2d(3)
    assert conv.parameters() == {"weight": conv.weight, "bias": conv.bias}
    assert list(Conv2d(2, 3, bias=False).parameters()) == ["weight"]
    assert conv.buffers() == Dropout(0.1).parameters() == Dropout(0.1).buffers() == {}
    assert norm.parameters()["gamma"] is norm.gamma
    assert norm.parameters()["beta"] is norm.beta
    assert norm.buffers()["running_mean"] is norm.running_mean
    assert norm.buffers()["running_var"] is norm.running_var


def test_first_values():
    conv, up, norm = Conv2d(2, 3, 5), ConvTranspose2d(2, 3, 2), BatchNorm2d(4)
    assert conv.weight.shape == (5, 5, 2, 3)
    assert up.weight.shape == (2, 2, 2, 3)
    assert not conv.bias.any()
    assert not up.bias.any()
    assert norm.gamma.tolist() == norm.running_var.tolist() == [1] * 4
    assert norm.beta.tolist() == norm.running_mean.tolist() == [0] * 4
    assert norm.eps == 1e-3
    assert {a.dtype for a in (conv.weight, conv.bias, up.weight, norm.gamma, norm.running_var)} == {np.dtype("float32")}


def test_a_convolution_draws_from_he_and_a_transposed_one_from_glorot():
    def drawn(rule, layer):
        return rule(layer.weight.shape, np.random.default_rng(7), "float32")

    conv, up = (kind(4, 5, generator=np.random.default_rng(7)) for kind in (Conv2d, ConvTranspose2d))
    assert np.array_equal(conv.weight, drawn(he_normal, conv))
    assert np.array_equal(up.weight, drawn(glorot_uniform, up))


def test_layers_pass_their_arguments_to_the_ops():
    x = images(3)
    conv = randomise(Conv2d(3, 2, 2, stride=2, padding=1))
    up = randomise(ConvTranspose2d(3, 2, 4, stride=3, padding=1))
    norm = randomise(BatchNorm2d(3, eps=0.5))
    norm.running_var = np.abs(norm.running_var)
    assert np.array_equal(conv.forward(x)[0], ops.conv2d_forward(x, conv.weight, conv.bias, 2, 1)[0])
    assert np.array_equal(up.forward(x)[0], ops.conv_transpose2d_forward(x, up.weight, up.bias, 3, 1)[0])
    for training in (True, False):
        arguments = (x, norm.gamma, norm.beta, norm.running_mean, norm.running_var)
        expected, _ = ops.batch_norm2d_forward(*arguments, training=training, eps=0.5)
        assert np.array_equal(norm.forward(x, training=training)[0], expected)


def test_dropout_draws_from_the_stream_of_its_index():
    x = images(3)
    for index in (0, 5):
        expected, _ = ops.dropout_forward(x, 0.4, key=KEY._replace(stream=DROPOUT + index))
        assert np.array_equal(Dropout(0.4, index).forward(x, key=KEY)[0], expected)
    assert np.array_equal(Dropout(0.4).forward(x, key=KEY)[0], Dropout(0.4, 0).forward(x, key=KEY)[0])


def test_batch_stats_have_the_names_of_the_buffers():
    x = images(3)
    norm, pair = BatchNorm2d(3, dtype="float64"), double_conv()
    _, cache = norm.forward(x, training=True)
    stats = norm.batch_stats(cache)
    assert stats.keys() == norm.buffers().keys()
    assert np.abs(stats["running_mean"] - x.mean(axis=(0, 1, 2))).max() <= 1e-15
    assert np.abs(stats["running_var"] - x.var(axis=(0, 1, 2))).max() <= 1e-15
    _, cache = pair.forward(x, training=True)
    stats = pair.batch_stats(cache)
    assert stats.keys() == pair.buffers().keys()
    assert np.array_equal(stats["norm2.running_var"], cache.norm2.batch_var)
    assert np.array_equal(stats["norm1.running_mean"], cache.norm1.batch_mean)


# --- Blocks: the two whose forward or backward has more than one array --------------------------------------------


def test_down_hands_out_its_skip_and_takes_its_gradient_back():
    options = {"conv_bias": True, "generator": np.random.default_rng(0), "dtype": "float64"}
    down = randomise(Down(3, 2, dropout=Dropout(0.4, 1), **options))
    x = images(3)
    y, skip, cache = down.forward(x, training=True, key=KEY)
    expected_skip, convs = down.convs.forward(x, training=True)
    assert np.array_equal(skip, expected_skip)
    pooled, _ = ops.max_pool2d_forward(skip)
    assert np.array_equal(y, Dropout(0.4, 1).forward(pooled, key=KEY)[0])

    # The gradient of the skip and the one through the pool add up before they go on.
    dy, dskip = images(2, 1, size=2), images(2, 2)
    dx, grads = down.backward(dy, dskip, cache)
    through_pool = ops.max_pool2d_backward(ops.dropout_backward(dy, cache.dropout), cache.pool)
    expected_dx, expected = down.convs.backward(dskip + through_pool, convs)
    assert np.array_equal(dx, expected_dx)
    assert all(np.array_equal(grads[name], expected[name]) for name in expected)
    assert list(grads) == list(down.parameters())


def test_up_joins_what_comes_up_with_the_skip():
    options = {"conv_bias": True, "generator": np.random.default_rng(0), "dtype": "float64"}
    up = randomise(Up(3, 2, up_kernel=3, dropout=Dropout(0.4, 1), **options))
    x, skip = images(3, size=2), images(2)
    y, cache = up.forward(x, skip, training=True, key=KEY)
    joined = np.concatenate([up.up.forward(x)[0], skip], axis=3)
    dropped, _ = Dropout(0.4, 1).forward(joined, key=KEY)
    assert np.array_equal(y, up.convs.forward(dropped, training=True)[0])
    dx, dskip, grads = up.backward(images(2, 5), cache)
    assert dx.shape == x.shape
    assert dskip.shape == skip.shape
    assert list(grads) == list(up.parameters())


# --- Initialisers -------------------------------------------------------------------------------------------------


def test_he_normal_has_its_variance_and_is_cut_off():
    shape = (3, 3, 40, 60)
    w = he_normal(shape, np.random.default_rng(0), "float64")
    std = np.sqrt(2 / (3 * 3 * 40))  # fan_in: what one output sums
    assert abs(w.std() / std - 1) < 0.01
    assert abs(w.mean()) < 0.01 * std
    # Keras draws from a normal distribution cut off at two of ITS standard deviations, and then widens the rest.
    assert 0.99 * 2 / 0.8796 < np.abs(w).max() / std <= 2 / 0.87962566


def test_glorot_uniform_fills_its_interval():
    shape = (3, 2, 20, 30)
    w = glorot_uniform(shape, np.random.default_rng(0), "float64")
    limit = np.sqrt(6 / (3 * 2 * 20 + 3 * 2 * 30))
    assert 0.99 * limit < w.max() <= limit
    assert -limit <= w.min() < -0.99 * limit
    assert abs(w.std() / (limit / np.sqrt(3)) - 1) < 0.02


@pytest.mark.parametrize("rule", [he_normal, glorot_uniform])
@given(seed=seeds, dtype=st.sampled_from(["float32", "float64"]))
def test_the_same_generator_gives_the_same_weights(rule, seed, dtype):
    first, second = (rule((3, 3, 2, 2), np.random.default_rng(seed), dtype) for _ in range(2))
    assert first.dtype == dtype
    assert np.array_equal(first, second)
    assert not np.array_equal(first, rule((3, 3, 2, 2), np.random.default_rng(seed + 1), dtype))


# --- map_arrays and names -----------------------------------------------------------------------------------------


def test_map_arrays_copies_the_whole_and_leaves_the_original():
    net = UNet(3, 1, (2, 3, 4), seed=1)
    before = {name: a.copy() for name, a in {**net.parameters(), **net.buffers()}.items()}
    twin = map_arrays(net, lambda a: a.astype("float64") + 1.0)
    for arrays, twins in ((net.parameters(), twin.parameters()), (net.buffers(), twin.buffers())):
        assert list(arrays) == list(twins)
        for name, array in arrays.items():
            assert np.array_equal(array, before[name])
            assert twins[name].dtype == np.float64
            assert np.array_equal(twins[name], array.astype("float64") + 1.0)
            assert not np.shares_memory(twins[name], array)


def test_map_arrays_meets_every_array_once():
    net, met = UNet(3, 1, (2, 3)), []
    map_arrays(net, lambda a: (met.append(id(a)), a)[1])
    assert sorted(met) == sorted(id(a) for a in {**net.parameters(), **net.buffers()}.values())


def test_prefixed():
    assert prefixed({"a": {"w": 1}, "b": {}, "c": {"d.w": 2, "e": 3}}) == {"a.w": 1, "c.d.w": 2, "c.e": 3}
