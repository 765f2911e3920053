"""The optimiser against the algorithm one number at a time, and the schedule, the clipping and the average by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.training.optim import AdamW, WeightEMA, clip_by_global_norm, norms_and_biases, warmup_cosine
from tests import oracles
from tests.strategies import seeds


def arrays(seed, dtype="float64"):
    rng = np.random.default_rng(seed)
    shapes = {"conv.weight": (2, 1, 2, 3), "conv.bias": (3,), "norm.gamma": (3,)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


# --- AdamW ----------------------------------------------------------------------------------------------------------


@given(
    seed=seeds,
    weight_decay=st.sampled_from([0.0, 0.004, 0.3]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.99), (0.5, 0.5)]),
    eps=st.sampled_from([1e-7, 1e-2]),
    steps=st.integers(1, 12),
    dtype=st.sampled_from([("float64", 1e-12), ("float32", 2e-6)]),
)
def test_adamw_is_the_algorithm(seed, weight_decay, betas, eps, steps, dtype):
    dtype, tolerance = dtype
    theta = arrays(seed, dtype)
    start = {name: value.astype("float64") for name, value in theta.items()}
    grads = [arrays([seed, t], dtype) for t in range(steps)]
    rates = [0.1 / (1 + t) for t in range(steps)]  # a schedule scales step and decay alike
    optimizer = AdamW(theta, lr=9.0, betas=betas, eps=eps, weight_decay=weight_decay, no_decay=["conv.bias"])
    for g, lr in zip(grads, rates, strict=True):
        optimizer.step(g, lr=lr)
    for name, value in theta.items():
        decay = 0.0 if name == "conv.bias" else weight_decay
        expected = np.array(
            [
                oracles.adamw(start[name][i], [float(g[name][i]) for g in grads], rates, *betas, eps, decay)
                for i in np.ndindex(value.shape)
            ]
        ).reshape(value.shape)
        assert value.dtype == dtype
        assert np.abs(value - expected).max() <= tolerance * np.abs(expected).max()


def test_adamw_100_steps():
    theta, grads = {"w": np.array([1.0, -2.0])}, [np.array([math.sin(t), 1e-3 * t]) for t in range(100)]
    start = theta["w"].copy()
    optimizer = AdamW(theta, lr=0.01, weight_decay=0.1)
    for g in grads:
        optimizer.step({"w": g})
    for i in range(2):
        expected = oracles.adamw(start[i], [g[i] for g in grads], [0.01] * 100, 0.9, 0.999, 1e-7, 0.1)
        assert abs(theta["w"][i] - expected) <= 1e-12 * abs(expected)


def test_the_decay_is_not_part_of_the_gradient():
    """Without a gradient, the weight shrinks by lr * weight_decay of itself, and Adam's moments stay 0."""
    theta = {"w": np.array([2.0])}
    optimizer = AdamW(theta, lr=0.5, weight_decay=0.1)
    optimizer.step({"w": np.zeros(1)})
    assert theta["w"].item() == 2.0 - 0.5 * 0.1 * 2.0
    assert optimizer.first_moment["w"].item() == optimizer.second_moment["w"].item() == 0


def test_defaults_are_those_of_keras():
    optimizer = AdamW({"w": np.zeros(1)})
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (1e-3, (0.9, 0.999), 1e-7, 0.004)


def test_steps_in_place_and_leaves_the_gradients():
    theta, grads = arrays(0), arrays(1)
    held, copies = dict(theta), {name: g.copy() for name, g in grads.items()}
    optimizer = AdamW(theta, lr=0.1)
    optimizer.step(grads)
    assert optimizer.steps == 1
    for name, before in arrays(0).items():
        assert theta[name] is held[name]
        assert (theta[name] != before).all()
        assert np.array_equal(grads[name], copies[name])


def test_moments_below_the_smallest_normal_number_are_0_and_that_number_is_not():
    tiny = float(np.finfo(np.float64).tiny)
    optimizer = AdamW({"w": np.zeros(4)}, betas=(0.0, 0.0))
    optimizer.step({"w": np.array([tiny, tiny / 2, -tiny, -tiny / 2])})
    assert optimizer.first_moment["w"].tolist() == [tiny, 0.0, -tiny, 0.0]


def test_a_dead_parameter_does_not_move_and_is_not_nan():
    theta = {"w": np.array([3.0])}
    optimizer = AdamW(theta, lr=0.1, eps=1e-7, weight_decay=0.0)
    for _ in range(3):
        optimizer.step({"w": np.zeros(1)})
    assert theta["w"].item() == 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "^lr must be a finite number >= 0, got -1.0"),
        ({"lr": np.nan}, "^lr must be .*got nan"),
        ({"lr": np.inf}, "^lr must be .*got inf"),
        ({"eps": -1e-8}, "^eps must be .*got -1e-08"),
        ({"weight_decay": -0.1}, "^weight_decay must be .*got -0.1"),
        ({"betas": (1.0, 0.9)}, r"^betas must be in \[0, 1\), got \(1.0, 0.9\)"),
        ({"betas": (0.9, 1.0)}, r"^betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, r"^betas must be in \[0, 1\)"),
        ({"no_decay": ["conv.bais"]}, r"^no_decay names parameters that do not exist: \['conv.bais'\]"),
    ],
)
def test_adamw_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        AdamW(arrays(0), **change)


def test_adamw_refuses_half_precision():
    """Its second moment would be 0 for small gradients, and the step 42.5 where float32 takes 0.005."""
    with pytest.raises(ValueError, match=r"^parameters must be float32 or float64, got float16 for conv\.weight"):
        AdamW({"conv.weight": np.zeros(2, np.float16)})


def test_step_refuses_other_names_and_changes_nothing():
    theta = arrays(0)
    optimizer = AdamW(theta)
    missing = {name: g for name, g in arrays(1).items() if name != "conv.bias"}
    more = {**arrays(1), "head.weight": np.zeros(1)}
    for wrong, names in ((missing, "'conv.bias'"), (more, "'head.weight'"), ({**missing, "b": 0}, "'b', 'conv.bias'")):
        with pytest.raises(ValueError, match=rf"^grads must name every parameter, and no other: \[{names}\]$"):
            optimizer.step(wrong)
    assert optimizer.steps == 0
    assert all(np.array_equal(theta[name], before) for name, before in arrays(0).items())


def test_norms_and_biases():
    names = ["down1.conv1.weight", "down1.conv1.bias", "down1.norm1.gamma", "down1.norm1.beta", "head.weight"]
    assert norms_and_biases(dict.fromkeys(names, 0)) == {"down1.conv1.bias", "down1.norm1.gamma", "down1.norm1.beta"}


# --- The schedule ---------------------------------------------------------------------------------------------------


def test_warmup_cosine_at_its_corners():
    rates = [warmup_cosine(step, total_steps=12, peak=2.0, warmup_steps=4, final=0.5) for step in range(14)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]  # (step + 1) / 4 of the peak
    assert rates[4] == 2.0
    assert rates[8] == pytest.approx(1.25, rel=1e-15)  # halfway between peak and final
    assert rates[6] == pytest.approx(0.5 + 0.75 * (1 + math.sqrt(0.5)), rel=1e-15)  # cos(pi / 4)
    assert rates[12] == rates[13] == 0.5  # and no further
    assert rates[4:13] == sorted(rates[4:13], reverse=True)


def test_without_warmup_it_begins_at_the_peak_and_ends_at_zero():
    assert warmup_cosine(0, total_steps=5, peak=0.3) == 0.3
    assert warmup_cosine(5, total_steps=5, peak=0.3) == 0.0
    assert warmup_cosine(2, total_steps=4, peak=0.3) == pytest.approx(0.15, rel=1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 1.0, 5), r"^warmup_steps must be in \[0, total_steps = 5\), got 5"),
        ((0, 5, 1.0, -1), r"^warmup_steps must be in .*got -1"),
        ((0, 0, 1.0, 0), r"^warmup_steps must be in \[0, total_steps = 0\)"),
        ((-1, 5, 1.0, 0), "^step must not be negative, got -1"),
    ],
)
def test_warmup_cosine_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        warmup_cosine(*arguments)


# --- Clipping -------------------------------------------------------------------------------------------------------


@given(seed=seeds, max_norm=st.sampled_from([1e-3, 1.0, 3.0, 100.0]), dtype=st.sampled_from(["float32", "float64"]))
def test_clipping(seed, max_norm, dtype):
    grads = arrays(seed, dtype)
    exact = math.sqrt(math.fsum(float(value) ** 2 for g in grads.values() for value in g.ravel()))
    clipped, norm = clip_by_global_norm(grads, max_norm)
    assert abs(norm - exact) <= 1e-14 * exact  # in float64, also where the gradients are not
    factor = min(1.0, max_norm / exact)
    for name, g in grads.items():
        assert clipped[name].dtype == dtype
        assert np.abs(clipped[name] - factor * g).max() <= (1e-15 if dtype == "float64" else 1e-7) * np.abs(g).max()


def test_a_norm_at_the_limit_is_left_alone():
    grads = {"a": np.array([3.0]), "b": np.array([[4.0]])}
    clipped, norm = clip_by_global_norm(grads, 5.0)
    assert norm == 5.0
    assert all(clipped[name] is grads[name] for name in grads)


def test_clipping_leaves_its_argument():
    grads = {"a": np.array([3.0, 4.0])}
    clip_by_global_norm(grads, 1.0)
    assert grads["a"].tolist() == [3.0, 4.0]


def test_the_square_of_a_large_float32_does_not_overflow():
    clipped, norm = clip_by_global_norm({"a": np.array([3e30, 4e30], "float32")}, 1.0)
    assert norm == pytest.approx(5e30, rel=1e-7, abs=0)
    assert clipped["a"] == pytest.approx([0.6, 0.8], rel=1e-6, abs=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_stays_as_it_is(bad):
    grads = {"a": np.array([bad, 1.0]), "b": np.ones(2)}
    clipped, norm = clip_by_global_norm(grads, 1.0)
    assert not math.isfinite(norm)
    assert all(np.array_equal(clipped[name], grads[name], equal_nan=True) for name in grads)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, np.nan])
def test_clipping_refuses(max_norm):
    with pytest.raises(ValueError, match=f"^max_norm must be positive, got {max_norm}"):
        clip_by_global_norm({}, max_norm)


# --- The average of the weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_decay", [0.999, 0.3])
def test_the_average_by_hand(max_decay):
    values = {"w": np.array([0.0, 10.0]), "running_mean": np.array([1.0])}
    ema = WeightEMA(values, max_decay)
    expected = {name: value.copy() for name, value in values.items()}
    for t in range(1, 30):
        for name, value in values.items():
            value += t  # in place, as the optimiser does: the average must not follow
            decay = min(max_decay, (1 + t) / (10 + t))
            expected[name] = decay * expected[name] + (1 - decay) * value
        ema.update(values)
    assert ema.updates == 29
    for name, value in values.items():
        assert np.abs(ema.average[name] - expected[name]).max() <= 1e-14 * np.abs(expected[name]).max()
        assert (ema.average[name] != value).all()


def test_the_decay_reaches_0_999_and_no_more():
    value = {"w": np.zeros(1)}
    ema = WeightEMA(value)
    ema.updates = 10**6
    ema.average["w"][...] = 1.0
    ema.update(value)
    assert ema.average["w"].item() == 0.999


def test_without_decay_the_average_is_the_last_value():
    value = {"w": np.zeros(1)}
    ema = WeightEMA(value, max_decay=0.0)
    ema.update({"w": np.array([3.0])})
    assert ema.average["w"].item() == 3.0


def test_the_average_keeps_dtype_and_arrays():
    values = {"w": np.zeros(2, "float32")}
    ema = WeightEMA(values)
    held = ema.average["w"]
    ema.update(values)
    assert ema.average["w"] is held
    assert held.dtype == np.float32
    assert not np.shares_memory(held, values["w"])


@pytest.mark.parametrize("max_decay", [-0.1, 1.0, np.nan])
def test_the_average_refuses(max_decay):
    with pytest.raises(ValueError, match=rf"^max_decay must be in \[0, 1\), got {max_decay}"):
        WeightEMA({}, max_decay)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_moments_of_a_dead_channel_become_zero_and_never_denormal(dtype):
    tiny = np.finfo(dtype).tiny
    optimizer = AdamW({"w": np.ones(2, dtype)}, weight_decay=0.0)
    optimizer.first_moment["w"][...] = 4 * tiny
    optimizer.second_moment["w"][...] = tiny
    optimizer.steps = 1000
    gradients = {"w": np.array([0.0, 1.0], dtype)}
    for _ in range(20):
        optimizer.step(gradients)
        moments = np.stack([optimizer.first_moment["w"], optimizer.second_moment["w"]])
        assert np.all((moments == 0) | (moments >= tiny))
    assert np.array_equal(moments > 0, [[False, True], [False, True]])
