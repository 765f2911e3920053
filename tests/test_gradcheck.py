"""The checker itself: it accepts what is right, finds what is wrong, and says where."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minunet
from minunet import gradcheck, ops
from minunet.base import cli
from minunet.base.rng import Key
from minunet.gradcheck import TOGETHER, central_difference, check_layer, check_net, check_op, complex_step, everything
from minunet.network.layers import BatchNorm2d, Conv2d
from minunet.network.loss import SoftmaxLoss
from minunet.network.unet import UNet
from minunet.ops.bce_with_logits import bce_with_logits_backward, bce_with_logits_forward
from tests.strategies import seeds

both = pytest.mark.parametrize(
    ("method", "tolerance"), [(complex_step, 1e-15), (central_difference, 1e-9)], ids=["complex", "central"]
)


def cubes(a, b):
    """sum(a^3) + prod of a and b, summed: a function of two arrays with a known gradient."""
    return (a**3).sum() + (a * b).sum()


def cubes_gradients(a, b):
    return {"a": 3 * a**2 + b, "b": a.copy()}


def point(seed=0, size=5):
    rng = np.random.default_rng(seed)
    return {"a": rng.standard_normal((size, 2)), "b": rng.standard_normal((size, 2))}


# --- The comparison -----------------------------------------------------------------------------------------------


@both
@given(seed=seeds, size=st.integers(1, 60))
def test_a_right_gradient_passes(method, tolerance, seed, size):
    inputs = point(seed, size)
    report = method(cubes, inputs, cubes_gradients(**inputs), seed=seed)
    assert report.ok(10 * tolerance), str(report)


@both
@given(seed=seeds, place=st.integers(0, 9), by=st.sampled_from([1e-6, 1.0, 1e6]))
def test_one_wrong_number_is_found_and_named(method, tolerance, seed, place, by):
    inputs = point(seed)
    gradients = cubes_gradients(**inputs)
    index = divmod(place, 2)
    gradients["a"][index] += by
    report = method(cubes, inputs, gradients, together=0)
    largest = max(np.abs(g).max() for g in gradients.values())
    assert report.largest == largest
    assert not report.ok(0.5 * by / largest)
    assert report.error == pytest.approx(by / largest, rel=1e-2)
    assert report.ok(report.error)
    assert report.errors["a"] == report.error
    assert report.errors["b"] <= 10 * tolerance
    worst = report.worst["a"]
    assert worst.index == index
    assert worst.analytic == gradients["a"][index]
    assert f"a  {by / largest:.1e}"[:4] in str(report)
    assert f"at {list(index)}" in str(report)


@both
def test_a_large_input_is_sampled_and_a_wrong_number_still_shows(method, tolerance):
    inputs = point(size=500)
    gradients = cubes_gradients(**inputs)
    report = method(cubes, inputs, gradients)
    counts = {name: sum(c.name == name for c in report.comparisons) for name in report.errors}
    assert counts == {"a": 8 + 2, "b": 8 + 2, TOGETHER: 1}
    assert report.ok(10 * tolerance)
    gradients["b"][123, 1] += 0.1  # not among the eight: the random directions see it
    wrong = method(cubes, inputs, gradients)
    assert wrong.worst["b"].index is None
    assert wrong.errors["b"] > 1e-5
    assert wrong.errors[TOGETHER] > 1e-5
    assert "along a random direction" in str(wrong)


@both
def test_sampling_is_what_was_asked(method, tolerance):
    inputs = point(size=5)
    gradients = cubes_gradients(**inputs)
    report = method(cubes, inputs, gradients, exhaustive=9, samples=3, directions=4, together=2)
    assert len(report.comparisons) == 2 * (3 + 4) + 2
    other = method(cubes, inputs, gradients, exhaustive=9, samples=3, directions=4, together=2, seed=1)
    assert [c.index for c in other.comparisons] != [c.index for c in report.comparisons]
    every_one = method(cubes, inputs, gradients, exhaustive=0, samples=10, directions=0, together=0)
    assert [c.index for c in every_one.comparisons] == 2 * list(np.ndindex(5, 2))  # none is drawn twice
    exhaustive = method(cubes, inputs, gradients, exhaustive=10, directions=4, together=0)
    assert [c.index for c in exhaustive.comparisons] == 2 * list(np.ndindex(5, 2))


def test_negative_gradients_have_a_size_and_the_first_of_equal_errors_is_named():
    x, gradient = np.ones(4), np.array([-2.0, -3.0, -2.0, -3.0])
    report = complex_step(lambda x: -(x**2).sum(), {"x": x}, {"x": gradient}, together=0)
    assert report.largest == 3
    assert report.error == 1 / 3
    assert report.worst["x"].index == (1,)


def test_a_flat_function_needs_one_step():
    function, asked = slopes(0.0, 0.0)
    assert central_difference(function, {"x": np.zeros(1)}, {"x": np.zeros(1)}, together=0).error == 0
    assert len(asked) == 3


def test_up_to_64_numbers_are_all_compared_unless_said():
    for size, compared in ((64, 64 + 1), (65, 8 + 2 + 1)):
        report = complex_step(lambda x: (x**2).sum(), {"x": np.ones(size)}, {"x": np.full(size, 2.0)})
        assert len(report.comparisons) == compared


@both
def test_a_comparison_says_which_value_is_whose(method, tolerance):
    """A backward that is twice too large, number by number and along directions."""
    inputs = point(size=50)
    gradients = {name: 2 * g for name, g in cubes_gradients(**inputs).items()}
    report = method(cubes, inputs, gradients)
    assert {c.index is None for c in report.comparisons} == {True, False}
    for c in report.comparisons:
        assert c.analytic == pytest.approx(2 * c.numeric, rel=1e-6, abs=0)
        assert (type(c.analytic), type(c.numeric)) == (float, float)


def slopes(right, left):
    """A function of one number with a kink at 0, and the places at which it is asked for its value."""
    asked = []

    def function(x):
        asked.append(x.item())
        return np.where(x > 0, right * x, left * x).sum()

    return function, asked


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("larger", [0, 1])
@pytest.mark.parametrize(("difference", "steps"), [(0.0010005, [1e-5]), (0.00101, [1e-5, 1e-6, 1e-7])])
def test_central_differences_take_a_smaller_step_where_the_two_sides_differ_by_a_thousandth(
    sign, larger, difference, steps
):
    sides = [sign, sign]
    sides[larger] *= 1 + difference
    function, asked = slopes(*sides)
    report = central_difference(function, {"x": np.zeros(1)}, {"x": np.array([sign])}, together=0)
    assert asked == pytest.approx([0.0] + [place for h in steps for place in (h, -h)], rel=1e-12, abs=0)
    assert report.comparisons[0].numeric == pytest.approx(sum(sides) / 2, rel=1e-9)


def test_the_complex_step_sees_what_central_differences_cannot():
    inputs = point()
    gradients = cubes_gradients(**inputs)
    gradients["a"][0, 0] += 1e-11
    assert central_difference(cubes, inputs, gradients).ok(gradcheck.CENTRAL_TOLERANCE)
    assert not complex_step(cubes, inputs, gradients).ok()


def test_a_zero_gradient_must_be_exactly_zero():
    x = {"x": np.ones(3)}
    assert complex_step(lambda x: (0 * x).sum(), x, {"x": np.zeros(3)}).error == 0
    tiny = complex_step(lambda x: (1e-300 * x).sum(), x, {"x": np.zeros(3)})
    assert tiny.error == math.inf
    assert not tiny.ok()


def test_a_small_gradient_is_judged_by_its_own_size():
    """There is no absolute tolerance that a gradient of 1e-30 could hide under."""
    x = {"x": np.ones(3)}
    assert complex_step(lambda x: 1e-30 * (x**2).sum(), x, {"x": np.full(3, 2e-30)}).ok()
    assert complex_step(lambda x: 1e-30 * (x**2).sum(), x, {"x": np.full(3, 1e-30)}).error == pytest.approx(1)


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_never_passes(place, bad):
    gradient = np.full(3, 2.0)
    gradient[place] = bad
    report = complex_step(lambda x: (x**2).sum(), {"x": np.ones(3)}, {"x": gradient}, together=0)
    assert not report.ok(1e300)
    assert report.worst["x"].index == (place,)
    assert math.isnan(report.error)


def test_a_derivative_that_is_nan_never_passes():
    report = complex_step(lambda x: (np.nan * x).sum(), {"x": np.ones(3)}, {"x": np.ones(3)})
    assert not report.ok(1e300)


def test_inputs_without_a_gradient_are_held_fixed():
    inputs = {**point(), "b": np.ones((5, 2))}
    report = complex_step(cubes, inputs, {"a": 3 * inputs["a"] ** 2 + 1})
    assert report.ok(1e-15)
    assert set(report.errors) == {"a", TOGETHER}


def test_float32_and_integer_inputs():
    """A float32 input is cast up, so that the derivative is exact; an integer one stays as it is."""
    inputs = {"a": np.ones((2, 2), "float32"), "b": np.arange(4).reshape(2, 2)}

    def function(a, b):
        assert (a.dtype, b.dtype) == (np.complex128, np.int64)
        return cubes(a, b)

    assert complex_step(function, inputs, {"a": 3 * inputs["a"] ** 2 + inputs["b"]}).ok()


def test_inputs_are_left_alone():
    inputs = point()
    before = {name: x.copy() for name, x in inputs.items()}
    for method in (complex_step, central_difference):
        method(cubes, inputs, cubes_gradients(**inputs))
    assert all(np.array_equal(inputs[name], before[name]) for name in inputs)


def test_a_forward_that_loses_the_imaginary_part_is_named():
    with pytest.raises(ValueError, match=r"^function must keep the imaginary part, got a float64 result"):
        complex_step(lambda x: x.real.sum(), {"x": np.ones(3)}, {"x": np.ones(3)})


@both
@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"a": np.ones(5)}, r"^the gradient of a must have its shape \(5, 2\), got \(5,\)"),
        ({"c": np.ones((5, 2))}, "^gradients must be of given inputs, got one of 'c'"),
        ({}, "^gradients must name at least one input"),
    ],
)
def test_refuses(method, tolerance, gradients, message):
    with pytest.raises(ValueError, match=message):
        method(cubes, point(), gradients)


@both
def test_refuses_to_compare_nothing(method, tolerance):
    x = {"x": np.ones(9)}
    with pytest.raises(ValueError, match="^sampling must compare something"):
        method(lambda x: x.sum(), x, x, exhaustive=0, samples=0, directions=0, together=0)
    empty = {"x": np.ones((0, 2))}
    with pytest.raises(ValueError, match="^x must hold at least one number"):
        method(lambda x: x.sum(), empty, empty)


# --- An op ----------------------------------------------------------------------------------------------------------


def convolution(bias=True):
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 3, 3, 2), "weight": (3, 3, 2, 2), "bias": (2,) if bias else None}
    return {name: None if shape is None else rng.standard_normal(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("method", "tolerance"), [("complex", 1e-14), ("central", 1e-8)])
def test_check_op(bias, method, tolerance):
    report = check_op(ops.conv2d_forward, ops.conv2d_backward, convolution(bias), method=method, stride=2)
    assert report.ok(tolerance), str(report)
    assert set(report.errors) == {"x", "weight", TOGETHER} | ({"bias"} if bias else set())
    lines = str(report).splitlines()
    assert lines[0].startswith("conv2d_forward: error ")
    assert {line.index("  worst ") for line in lines[1:]} == {2 + len(TOGETHER) + 2 + len("1.0e-16")}  # in columns
    sampling = {"exhaustive": 0, "samples": 1, "directions": 1, "together": 3}
    few = check_op(ops.conv2d_forward, ops.conv2d_backward, convolution(bias), method=method, sampling=sampling)
    assert len(few.comparisons) == (3 if bias else 2) * 2 + 3


WRONG_CONV2D = {
    "dx of the wrong sign": lambda dx, dweight, dbias: (-dx, dweight, dbias),
    "dx of a kernel that is not turned": lambda dx, dweight, dbias: (dx[:, ::-1, ::-1].copy(), dweight, dbias),
    "dweight without its last tap": lambda dx, dweight, dbias: (
        dx,
        dweight * (np.arange(36).reshape(3, 3, 2, 2) < 35),
        dbias,
    ),
    "the mean for the sum in dbias": lambda dx, dweight, dbias: (dx, dweight, dbias / 9),
    "one rounding too many": lambda dx, dweight, dbias: (dx.astype("float32").astype("float64"), dweight, dbias),
}


@pytest.mark.parametrize("wrong", WRONG_CONV2D.values(), ids=WRONG_CONV2D)
def test_check_op_finds(wrong):
    def backward(dy, cache):
        return wrong(*ops.conv2d_backward(dy, cache))

    assert not check_op(ops.conv2d_forward, backward, convolution()).ok()


def test_check_op_draws_a_random_dy():
    """With ones for dy, a batch norm backward that lacks its third term looks right: sum(x_hat) is 0."""

    def without_third_term(dy, cache):
        dx, dgamma, dbeta = ops.batch_norm2d_backward(dy, cache)
        m = dy[..., 0].size
        return dx + cache.x_hat * dgamma / m * cache.gamma * cache.inverse_std, dgamma, dbeta

    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((2, 2, 2, 2)), "gamma": rng.standard_normal(2), "beta": rng.standard_normal(2)}
    options = {"running_mean": np.zeros(2), "running_var": np.ones(2), "training": True}
    assert check_op(ops.batch_norm2d_forward, ops.batch_norm2d_backward, inputs, **options).ok()
    assert check_op(ops.batch_norm2d_forward, without_third_term, inputs, **options).error > 0.01


def test_the_seed_decides_dy_and_the_directions():
    errors = [str(check_op(ops.conv2d_forward, ops.conv2d_backward, convolution(), seed=seed)) for seed in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2]


def test_the_seed_is_0_unless_said_and_decides_what_is_sampled():
    x = np.random.default_rng(0).standard_normal((1, 5, 5, 4))  # more than 64 numbers
    net, image, target = network_and_data()
    small = {"exhaustive": 0, "samples": 1, "directions": 1}
    for check in (
        lambda **seed: check_op(ops.sigmoid_forward, ops.sigmoid_backward, {"x": x}, **seed),
        lambda **seed: check_layer(Conv2d(4, 2), x, **seed),
        lambda **seed: check_net(net, image, target, key=Key(seed=0), sampling=small, **seed),
    ):
        assert check() == check(seed=0)
        assert [c.index for c in check().comparisons] != [c.index for c in check(seed=1).comparisons]
    few = check_layer(Conv2d(4, 2), x, sampling=small)
    assert len(few.comparisons) == 3 * 2 + 1


def test_check_op_of_a_loss():
    logits, target = np.linspace(-2, 3, 8).reshape(2, 2, 2, 1), np.arange(8).reshape(2, 2, 2, 1) % 2
    report = check_op(bce_with_logits_forward, bce_with_logits_backward, {"logits": logits}, target=target)
    assert report.ok()
    wrong = check_op(
        bce_with_logits_forward, lambda cache: 8 * bce_with_logits_backward(cache), {"logits": logits}, target=target
    )
    assert wrong.error == pytest.approx(7 / 8)


def test_check_op_casts_float32_up_also_in_options():
    inputs = {name: value.astype("float32") for name, value in point().items()}
    inputs = {"x": inputs["a"].reshape(1, 5, 1, 2), "gamma": np.ones(2, "float32"), "beta": np.ones(2, "float32")}
    options = {"running_mean": np.zeros(2, "float32"), "running_var": np.ones(2, "float32"), "training": False}
    assert check_op(ops.batch_norm2d_forward, ops.batch_norm2d_backward, inputs, **options).ok()


@pytest.mark.parametrize(
    ("backward", "message"),
    [
        (lambda dy, cache: dy, r"^backward must return a gradient for each of \['x', 'weight', 'bias'\], got 1"),
        (
            lambda dy, cache: (cache.x, cache.weight, None),
            "^the gradient of bias must be None where bias is None, and only there",
        ),
        (
            lambda dy, cache: (cache.x, cache.x, np.ones(2)),
            r"^the gradient of weight must have its shape \(3, 3, 2, 2\)",
        ),
    ],
)
def test_check_op_refuses(backward, message):
    with pytest.raises(ValueError, match=message):
        check_op(ops.conv2d_forward, backward, convolution())


def test_check_op_refuses_a_gradient_of_an_absent_bias():
    def backward(dy, cache):
        return cache.x, cache.weight, np.ones(2)

    with pytest.raises(ValueError, match=r"^the gradient of bias must be None where bias is None"):
        check_op(ops.conv2d_forward, backward, convolution(bias=False))


def test_refuses_another_method():
    with pytest.raises(ValueError, match=r"^method must be 'complex' or 'central', got 'forward'$"):
        check_op(ops.relu_forward, ops.relu_backward, {"x": np.ones((1, 1, 1, 1))}, method="forward")
    with pytest.raises(ValueError, match=r"^method must be .*got 'forward'"):
        check_layer(Conv2d(1, 1), np.ones((1, 1, 1, 1)), method="forward")
    net, x, target = network_and_data()
    with pytest.raises(ValueError, match=r"^method must be .*got 'forward'"):
        check_net(net, x, target, key=Key(seed=0), method="forward")


# --- A layer, a network -------------------------------------------------------------------------------------------


class Halved(Conv2d):
    """A convolution whose backward forgets half of its weight's gradient."""

    def backward(self, dy, cache):
        dx, grads = super().backward(dy, cache)
        return dx, {**grads, "weight": grads["weight"] / 2}


class Forgotten(Conv2d):
    """A convolution whose backward forgets its bias."""

    def backward(self, dy, cache):
        dx, grads = super().backward(dy, cache)
        return dx, {"weight": grads["weight"]}


def test_check_layer():
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 2))
    report = check_layer(Conv2d(2, 3), x)
    assert report.ok()
    assert str(report).startswith("Conv2d: error ")
    assert set(report.errors) == {"x", "weight", "bias", TOGETHER}
    assert check_layer(Conv2d(2, 3), x, method="central").ok(1e-8)
    assert check_layer(BatchNorm2d(2), x, training=True).ok()
    wrong = check_layer(Halved(2, 3), x)
    assert max(wrong.errors["weight"], wrong.errors["bias"]) == wrong.errors["weight"] > 0.1
    assert wrong.errors["bias"] <= 1e-14
    with pytest.raises(ValueError, match=r"^grads must name the parameters, got a difference in \['bias'\]"):
        check_layer(Forgotten(2, 3), x)


def test_check_layer_leaves_the_layer():
    layer = Conv2d(2, 3)
    before = layer.weight.copy()
    check_layer(layer, np.ones((1, 3, 3, 2)))
    assert layer.weight.dtype == np.float32
    assert np.array_equal(layer.weight, before)


def network_and_data():
    rng = np.random.default_rng(0)
    net = UNet(widths=(2, 3))
    return net, rng.standard_normal((2, 4, 4, 3)), (rng.random((2, 4, 4, 1)) < 0.5).astype("uint8")


def test_check_net():
    net, x, target = network_and_data()
    sampling = {"exhaustive": 0, "samples": 2, "directions": 1}
    report = check_net(net, x, target, key=Key(seed=0), sampling=sampling)
    assert report.ok(), str(report)
    assert set(report.errors) == {"x", TOGETHER, *net.parameters()}
    assert net.head.weight.dtype == np.float32


def test_check_net_finds_a_skip_whose_gradient_was_dropped(monkeypatch):
    net, x, target = network_and_data()
    down = net.downs[0]
    backward = type(down).backward
    monkeypatch.setattr(type(down), "backward", lambda self, dx, dskip, cache: backward(self, dx, 0 * dskip, cache))
    report = check_net(net, x, target, key=Key(seed=0), sampling={"exhaustive": 0, "samples": 1, "directions": 1})
    assert not report.ok(1e-3)
    wrong = {name for name, error in report.errors.items() if error > 1e-12}
    assert "down1.conv1.weight" in wrong
    assert not any(name.startswith(("up1", "bottleneck", "head")) for name in wrong)


def test_check_net_refuses_dropout_without_a_key():
    net, x, target = network_and_data()
    with pytest.raises(ValueError, match=r"^key must be given in training"):
        check_net(net, x, target)


# --- The command --------------------------------------------------------------------------------------------------


def test_command_checks_what_its_rows_say(monkeypatch):
    def shapes(arrays):
        return {name: getattr(value, "shape", value) for name, value in arrays.items()}

    def op(forward, backward, inputs, method, **options):
        assert backward.__name__ == forward.__name__.replace("forward", "backward")
        if forward in (ops.sigmoid_forward, ops.softmax_forward):
            assert np.abs(inputs["x"]).max() > 8  # well beyond where it is straight
        assert np.all((inputs.get("probabilities", 0.5) > 0) & (inputs.get("probabilities", 0.5) < 1))
        assert np.all(options.get("running_var", 1) >= 0.5)
        if "target" in options:
            assert 0.15 < options["target"].mean() < 0.75
            assert options["target"].dtype == np.uint8
        if "softmax" in forward.__name__ and "target" in options:
            assert set(options["target"].sum(axis=-1).ravel().tolist()) == {0, 1}
        return forward.__name__.removesuffix("_forward"), shapes(inputs), shapes(options)

    def layer(owner, x, method, **options):
        return type(owner).__name__, x.shape, shapes(owner.parameters()), options

    def net(network, x, target, loss, key, method, sampling):
        assert set(np.unique(target)) == {0, 1}
        assert 0.15 < target.mean() < 0.75
        assert target.dtype == np.uint8
        assert (type(loss) is SoftmaxLoss) == (network.config["output"] == "softmax")
        names = "widths", "dropout", "out_channels", "up_kernel", "conv_bias", "output"
        config = {name: network.config[name] for name in names}
        return config, x.shape, target.shape, key is not None, sampling

    for name, recorder in (("check_op", op), ("check_layer", layer), ("check_net", net)):
        monkeypatch.setattr(gradcheck, name, recorder)
    checks = {part: {name: check("complex") for name, check in rows.items()} for part, rows in everything().items()}

    images, image, three = (2, 4, 4, 3), (2, 4, 4, 1), (3,)
    x, norm = {"x": images}, {"x": images, "gamma": three, "beta": three}
    running = {"running_mean": three, "running_var": three}
    target, classes, weight_3, weight_2 = {"target": image}, {"target": images}, (3, 3, 3, 2), (2, 2, 3, 2)
    key = {"key": Key(seed=0)}
    assert checks["op"] == {
        "conv2d 3x3": ("conv2d", {"x": images, "weight": weight_3, "bias": (2,)}, {}),
        "conv2d 2x2, stride 2, padding 1": (
            "conv2d",
            {"x": images, "weight": weight_2, "bias": None},
            {"stride": 2, "padding": 1},
        ),
        "conv_transpose2d 3x3": ("conv_transpose2d", {"x": images, "weight": weight_3, "bias": (2,)}, {}),
        "conv_transpose2d 2x2": ("conv_transpose2d", {"x": images, "weight": weight_2, "bias": None}, {}),
        "max_pool2d": ("max_pool2d", x, {}),
        "batch_norm2d, training": ("batch_norm2d", norm, {"training": True, **running}),
        "batch_norm2d, inference": ("batch_norm2d", norm, {"training": False, **running}),
        "relu": ("relu", x, {}),
        "sigmoid": ("sigmoid", x, {}),
        "softmax": ("softmax", x, {}),
        "dropout": ("dropout", x, {"rate": 0.3, **key}),
        "concat": ("concat", {"up": images, "skip": (2, 4, 4, 2)}, {}),
    }
    assert checks["loss"] == {
        "dice_loss, over the batch": ("dice_loss", {"probabilities": image}, target),
        "dice_loss, over each image": ("dice_loss", {"probabilities": image}, {**target, "over": "image"}),
        "dice_loss, over each class": ("dice_loss", {"probabilities": images}, {**classes, "over": "class"}),
        "bce_with_logits": ("bce_with_logits", {"logits": image}, target),
        "softmax_cross_entropy": ("softmax_cross_entropy", {"logits": images}, classes),
        "segmentation: dice + bce": ("segmentation_loss", {"logits": image}, target),
        "softmax: dice + cross entropy": ("softmax_loss", {"logits": images}, classes),
    }
    convs = {"conv1.weight": weight_3, "conv1.bias": (2,), "conv2.weight": (3, 3, 2, 2), "conv2.bias": (2,)}
    norms = {f"norm{n}.{name}": (2,) for n in (1, 2) for name in ("gamma", "beta")}
    assert checks["layer"] == {
        "Conv2d": ("Conv2d", images, {"weight": weight_3, "bias": (2,)}, {}),
        "ConvTranspose2d": ("ConvTranspose2d", images, {"weight": weight_3, "bias": (2,)}, {}),
        "BatchNorm2d": ("BatchNorm2d", images, {"gamma": three, "beta": three}, {"training": True}),
        "Dropout": ("Dropout", images, {}, key),
        "DoubleConv": ("DoubleConv", images, {**convs, **norms}, {"training": True}),
    }
    config = {"widths": (2, 3, 4), "dropout": 0.3, "out_channels": 1, "up_kernel": 3, "conv_bias": True}
    config["output"] = "sigmoid"
    softmax = {"out_channels": 3, "output": "softmax"}
    other = {"out_channels": 2, "up_kernel": 2, "conv_bias": False}
    sampling = {"exhaustive": 4, "samples": 2, "directions": 1}
    assert checks["net"] == {
        "UNet, depth 2": (config, (2, 8, 8, 3), (2, 8, 8, 1), True, sampling),
        "UNet, 2 masks, up 2x2, no conv bias": ({**config, **other}, (2, 8, 8, 3), (2, 8, 8, 2), True, sampling),
        "UNet, 3 classes, softmax": ({**config, **softmax}, (2, 8, 8, 3), (2, 8, 8, 3), True, sampling),
    }


def test_command_prints_one_table_without_a_warning():
    command = [sys.executable, "-W", "error", "-m", "minunet.gradcheck"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(minunet.__file__).parent.parent
    )
    assert result.stderr == ""
    assert result.returncode == 0, result.stdout
    names = {path.stem for path in Path(ops.__file__).parent.glob("*.py")} - {"__init__", "checks"}
    assert all(f" {name}" in result.stdout for name in names)
    assert "UNet" in result.stdout
    assert "WRONG" not in result.stdout


@pytest.mark.parametrize("wrong", ["complex", "central", None])
def test_command_fails_and_says_what_is_wrong(monkeypatch, capsys, wrong):
    def check(method):
        factor = 2 if method == wrong else 1
        inputs = point()
        gradients = {name: factor * g for name, g in cubes_gradients(**inputs).items()}
        return gradcheck.METHODS[method](cubes, inputs, gradients, title="cubes")

    monkeypatch.setattr(gradcheck, "everything", lambda: {"op": {"cubes of two": check, "and again": check}})
    assert cli.run(gradcheck.main, []) == (1 if wrong else 0)
    printed = capsys.readouterr().out
    assert ("WRONG" in printed) == (wrong is not None)
    assert printed.count("cubes: error 5.0e-01") == (2 if wrong else 0)
    assert ("all right" in printed) == (wrong is None)
    lines = printed.splitlines()
    assert "Error: largest difference / largest gradient." in lines[1]
    assert lines[2] == ""
    assert [len(line) for line in lines[3:6]] == [87, 87, 87]  # two lines of head, a rule, and then the rows
    assert lines[5] == lines[8] == "-" * 87
    assert len(lines[6].removesuffix("  WRONG")) == 87
    assert lines[6].split()[:4] == ["op", "cubes", "of", "two"]


@pytest.mark.parametrize("distance", [3e-6, -3e-6, 3e-7])
def test_central_differences_step_around_a_kink_nearby(distance):
    x = np.full((1, 1, 1, 1), distance)
    report = check_op(ops.relu_forward, ops.relu_backward, {"x": x}, method="central")
    assert report.ok(1e-6), str(report)
    (comparison,) = (c for c in report.comparisons if c.index is not None)
    assert (comparison.numeric == 0) == (distance < 0)
