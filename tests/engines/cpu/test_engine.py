"""The contract of the CPU engine: the loss, every gradient, every statistic and prediction of the plain path.

In float64 the two agree to rounding, whatever the network and the batch. In float32 a value near the kink of a ReLU,
or two nearly equal ones in a pool, may fall on either side, and a gradient then differs by more than rounding: there
the batches are such that no value is near a decision.
"""

import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minunet import engines, ops
from minunet.data import phantom
from minunet.data.augment import PRESETS
from minunet.data.batches import prepare_batch
from minunet.data.normalize import Normalization
from minunet.data.slices import IGNORE
from minunet.engines.cpu.choice import unsupported
from minunet.engines.cpu.engine import CpuEngine
from minunet.network.layers import map_arrays
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from tests.engines.cpu.cases import KEY, Problem, plain, problem, relative, worst_differences
from tests.strategies import seeds

SIZES = [1, pytest.param(2, marks=pytest.mark.skipif(os.name != "posix", reason="teams are of POSIX systems alone"))]
LOSS = SegmentationLoss()
DOUBLE, SINGLE = 1e-10, 1e-4  # relative to the largest value of an array


@st.composite
def options_and_shapes(draw):
    """Arguments of :func:`problem`: few channels (rows), many (tiles, or channels where images are small), or both."""
    few, many = st.integers(1, 9), st.sampled_from([32, 33, 40, 48])
    widths = draw(st.lists(draw(st.sampled_from([few, many, st.one_of(few, many)])), min_size=1, max_size=4))
    multiple = 2 ** (len(widths) - 1)
    most = max(2, 18 // multiple)
    # Not one pixel at the bottom: there some gradients are 0 but for rounding, and compare with nothing.
    size = tuple(multiple * draw(st.integers(2, most)) for _ in range(2))
    batch = draw(st.integers(1, 5))
    options = {
        "widths": tuple(widths),
        "in_channels": draw(st.sampled_from([1, 3, 4])),
        "out_channels": draw(st.sampled_from([1, 1, 3])),
        "dropout": draw(st.sampled_from([0.0, 0.3, 0.5])),
        "up_kernel": draw(st.sampled_from([2, 3])),
        "head_kernel": draw(st.sampled_from([1, 2, 3, 5])),
        "conv_bias": draw(st.booleans()),
        "batch_norm_eps": draw(st.sampled_from([1e-3, 0.5])),
    }
    return batch, size, options


@st.composite
def losses(draw):
    dice_weight, bce_weight = draw(st.sampled_from([(1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0.0, 1.0)]))
    return SegmentationLoss(dice_weight, bce_weight, draw(st.sampled_from([0.1, 1.0])), draw(st.sampled_from(OVERS)))


OVERS = ["batch", "image"]


def engine_for(case: Problem, loss=LOSS, workers=1, more=0):
    """An engine that would take ``more`` images than the batch has."""
    return CpuEngine(case.net, loss, len(case.x) + more, case.x.shape[1:3], workers=workers)


def check_it(case: Problem, loss=LOSS, bound=DOUBLE, workers=1, more=0):
    """A step, a prediction between two steps, and the logits."""
    expected = plain(case, loss)
    logits, _ = case.net.forward(case.x, training=False)
    before = {name: array.copy() for name, array in (case.net.parameters() | case.net.buffers()).items()}
    with engine_for(case, loss, workers, more) as engine:
        assert engine._team.size == workers
        for _ in range(2):  # what the first step has left in the buffers does not matter
            worst = worst_differences(engine.loss_and_grads(case.x, case.target, KEY), expected)
            assert max(worst.values()) <= bound, max((value, name) for name, value in worst.items())
            assert relative(engine.logits(case.x), logits) <= bound
        assert relative(engine.predict(case.x), case.net.predict(case.x)) <= bound
    for name, array in (case.net.parameters() | case.net.buffers()).items():
        assert np.array_equal(array, before[name]), name


# One process ---------------------------------------------------------------------------------------------------------


@given(options_and_shapes(), losses(), seeds, st.integers(0, 2))
@example((2, (10, 14), {"widths": (32, 40)}), LOSS, 1, 0)
@example((1, (8, 8), {"widths": (3, 4, 5), "dropout": 0.0}), LOSS, 2, 3)
@example((5, (8, 8), {"widths": (4, 33, 5, 36)}), LOSS, 3, 1)  # one pixel at the bottom
@example((3, (5, 7), {"widths": (6,), "head_kernel": 2}), SegmentationLoss(over="image"), 4, 0)
def test_it_is_the_plain_path_in_float64(shapes, loss, seed, more):
    batch, size, options = shapes
    check_it(problem(batch, size, seed=seed, dtype="float64", **options), loss, more=more)


#: Between them: all three ways to convolve, tiles that end beyond the image, images cut up and images put together.
FIXED = {
    "rows": (3, (12, 20), {"widths": (4, 6, 8)}),
    "tiles": (4, (28, 36), {"widths": (32, 34), "dropout": 0.0}),
    "channels": (2, (12, 20), {"widths": (40, 48, 64), "up_kernel": 2, "head_kernel": 1}),
    "all": (5, (24, 20), {"widths": (16, 32, 80), "out_channels": 2, "conv_bias": False}),
}


def test_the_fixed_problems_convolve_in_every_way():
    met = {}
    for name, (batch, size, options) in FIXED.items():
        with engine_for(problem(batch, size, **options)) as engine:
            met[name] = {unit.method for unit in engine._program.plan.units}
    assert met["rows"] == {"rows"}
    assert met["tiles"] == {"rows", "tiles"}  # the images have three channels
    assert met["channels"] == {"rows", "channels"}
    assert met["all"] == {"rows", "tiles", "channels"}


def away_from_decisions(batch, size, **options):
    """The first problem of float32 in which no value is near a kink, and no two in a pool's window are nearly equal.

    That is seen in float64: near is within 1e-5 of values that batch norm has given a deviation of about 1.
    """
    for seed in range(200):
        case = problem(batch, size, seed=seed, hard=False, dtype="float32", **options)
        twin = map_arrays(case.net, lambda array: array.astype("float64"))
        _, cache = twin.forward(case.x.astype("float64"), training=True, key=KEY)
        pairs = [
            (y, name.rpartition("."))
            for convs, place in _double_convs(twin, cache)
            for y, name in _normalized(convs, place)
        ]
        pools = [y for y, (place, _, norm) in pairs if place.startswith("down") and norm == "norm2"]
        if min(abs(y).min() for y, _ in pairs) > 1e-5 and min(map(_smallest_lead, pools), default=1) > 1e-5:
            return case
    raise AssertionError("no seed keeps all values away from decisions")


def _double_convs(net, cache):
    parts = [(down.convs, f"down{level}") for level, down in enumerate(cache.downs, 1)]
    parts += [(cache.bottleneck, "bottleneck")]
    parts += [(up.convs, f"up{level}") for level, up in enumerate(cache.ups, 1)]
    parameters = net.parameters()
    return [(convs, (name, parameters)) for convs, name in parts]


def _normalized(convs, place):
    """The two outputs of batch norm of a double convolution, in front of their ReLU."""
    name, parameters = place
    for norm in ("norm1", "norm2"):
        cache = getattr(convs, norm)
        yield cache.gamma * cache.x_hat + parameters[f"{name}.{norm}.beta"], f"{name}.{norm}"


def _smallest_lead(y):
    """By how much the largest value of a 2 x 2 window leads the second, where it is positive."""
    n, height, width, channels = y.shape
    windows = y.reshape(n, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3).reshape(-1, 4, channels)
    ordered = np.sort(np.maximum(windows, 0), axis=1)
    lead = (ordered[:, 3] - ordered[:, 2])[ordered[:, 3] > 0]
    return lead.min() if lead.size else np.inf


@pytest.mark.parametrize("workers", SIZES)
@pytest.mark.parametrize("name", ["rows", "channels", "all"])
def test_it_is_the_plain_path_in_float32(name, workers):
    batch, size, options = FIXED[name]
    # Smaller, so that some seed keeps all values away from a decision.
    case = away_from_decisions(min(batch, 2), (size[0] // 2 // 4 * 4, size[1] // 2 // 4 * 4), **options)
    check_it(case, bound=SINGLE, workers=workers)


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="teams of processes are of POSIX systems alone")
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize(("batch", "workers"), [(1, 2), (3, 2), (2, 3), (5, 3)])
def test_processes_share_the_work_of_the_plain_path(name, batch, workers):
    """By rows with one image for two, or two for three; by images otherwise."""
    _, size, options = FIXED[name]
    case = problem(batch, (size[0] // 2 // 4 * 4, size[1] // 2 // 4 * 4), seed=7, dtype="float64", **options)
    check_it(case, workers=workers, more=batch % 2)


@pytest.mark.skipif(os.name != "posix", reason="teams of processes are of POSIX systems alone")
@given(options_and_shapes(), losses(), seeds, st.sampled_from([2, 3]))
@settings(max_examples=max(4, settings.default.max_examples // 8))
def test_processes_share_any_work(shapes, loss, seed, workers):
    batch, size, options = shapes
    check_it(problem(batch, size, seed=seed, dtype="float64", **options), loss, workers=workers)


@pytest.mark.skipif(os.name != "posix", reason="teams of processes are of POSIX systems alone")
def test_whether_rows_or_images_are_shared_out():
    case = problem(1, (8, 8), widths=(3, 4))
    with CpuEngine(case.net, LOSS, 6, (8, 8), workers=2) as engine:
        shared = [engine._program.steps_for(True, batch).work.by_images for batch in (1, 2, 3, 4, 5, 6)]
    assert shared == [False, True, True, True, True, True]


# Ties, constants and what is not a number ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_of_equal_values_the_first_gets_the_gradient_of_the_pool(dtype):
    """The stages themselves, on whole numbers of which many are equal."""
    draw = np.random.default_rng(3)
    case = problem(3, (8, 12), widths=(5, 4), hard=False, dropout=0.0, dtype=dtype)
    with engine_for(case) as engine:
        engine.loss_and_grads(case.x, case.target, KEY)
        steps = engine._program.steps_for(True, 3)
        stages = {stage.kind: made for stage, made in steps.stages}
        (planned,) = steps.work.plan.pools
        z, g = steps.work.arrays[planned.skip.z], steps.work.arrays[planned.skip.g]
        norm = steps.work.norms[planned.skip]
        norm.slope, norm.input_slope, norm.offset = np.full(5, 0.5), np.full(5, 0.5), np.full(5, 1.0)
        values = draw.integers(-3, 3, z.shape).astype(dtype)
        dpooled = draw.standard_normal((3, 4, 6, 5)).astype(dtype)
        z[...] = values
        y, relu = ops.relu_forward(0.5 * (values + 1))
        pooled, pool = ops.max_pool2d_forward(y)
        stages["pool"].run()
        assert np.array_equal(steps.work.arrays[planned.pooled], pooled)
        z[...], g[...] = values, 0  # their places may have been others' meanwhile
        steps.work.arrays[planned.dpooled][...] = dpooled
        stages["pool_backward"].run()
        assert np.array_equal(g, ops.relu_backward(ops.max_pool2d_backward(dpooled, pool), relu))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gamma", [0.0, 1e-20])
def test_where_gamma_is_0_all_values_of_a_pool_are_equal(gamma, dtype):
    """Each window's first value gets the gradient then, and the gradient of gamma tells which one it was."""
    case = problem(2, (8, 12), widths=(4, 6), seed=2, hard=False, dtype=dtype)
    norm = case.net.downs[0].convs.norm2
    norm.gamma[1:] = gamma
    norm.beta[...] = [0.3, 0.7, 0.1, -0.2]
    check_it(case, bound=DOUBLE if dtype == "float64" else SINGLE)


@pytest.mark.parametrize("workers", SIZES)
def test_constant_images_with_constant_features_are_no_exception(workers):
    case = problem(4, (8, 8), widths=(3, 4, 6), seed=4, hard=False, dtype="float64")
    for array in case.net.parameters().values():
        if array.ndim == 4:  # the middle tap alone: the border is as all the rest
            array[np.arange(len(array)) != len(array) // 2] = 0
            array[:, np.arange(len(array)) != len(array) // 2] = 0
    case.x[...] = np.arange(4).reshape(4, 1, 1, 1)
    expected, _, expected_stats = plain(case, LOSS)
    with engine_for(case, workers=workers) as engine:
        loss, grads, stats = engine.loss_and_grads(case.x, case.target, KEY)
        assert loss == pytest.approx(expected, rel=1e-9)
        for name, array in expected_stats.items():
            assert np.allclose(stats[name], array, rtol=1e-9, atol=1e-12), name
        assert all(np.isfinite(array).all() for array in grads.values())


@pytest.mark.parametrize("workers", SIZES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_not_lost(value, workers):
    case = problem(2, (8, 8), widths=(3, 33), hard=False)
    case.x[1, 3, 2, 0] = value
    with engine_for(case, workers=workers) as engine, np.errstate(all="ignore"):
        assert not np.isfinite(plain(case, LOSS)[0])
        assert not np.isfinite(engine.loss_and_grads(case.x, case.target, KEY)[0])
        assert not np.isfinite(engine.logits(case.x)[1]).all()
        case.x[1, 3, 2, 0] = 1.0  # and none of it stays behind
        worst = worst_differences(engine.loss_and_grads(case.x, case.target, KEY), plain(case, LOSS))
    assert np.isfinite(list(worst.values())).all()
    assert worst["loss"] <= 1e-5


# The interface -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", SIZES)
def test_it_sees_what_has_become_of_the_parameters(workers):
    case, other = (problem(2, (8, 12), widths=(4, 32), seed=seed, dtype="float64") for seed in (1, 2))
    with engine_for(case, workers=workers) as engine:
        engine.loss_and_grads(case.x, case.target, KEY)
        assert relative(engine.predict(case.x, other.net), other.net.predict(case.x)) <= DOUBLE
        assert relative(engine.logits(case.x, other.net), other.net.forward(case.x, training=False)[0]) <= DOUBLE
        for name, array in (case.net.parameters() | case.net.buffers()).items():
            array[...] = (other.net.parameters() | other.net.buffers())[name]
        worst = worst_differences(engine.loss_and_grads(case.x, case.target, KEY), plain(case, LOSS))
        assert max(worst.values()) <= DOUBLE
        next_key = KEY._replace(step=KEY.step + 1)
        worst = worst_differences(engine.loss_and_grads(case.x, case.target, next_key), plain(case, LOSS, next_key))
        assert max(worst.values()) <= DOUBLE


@pytest.mark.parametrize("workers", SIZES)
def test_a_frozen_network_is_predicted_as_before_whatever_happens_between(workers):
    case, other = (problem(2, (8, 12), widths=(4, 32), seed=seed, dtype="float64") for seed in (1, 2))
    kept = case.net.parameters() | case.net.buffers()
    expected, others = case.net.predict(case.x), other.net.predict(case.x)
    with engine_for(case, workers=workers) as engine:
        engine.predict(case.x, other.net)  # whose filters must not stay
        engine.freeze()
        assert relative(engine.predict(case.x), expected) <= DOUBLE
        first = engine.predict(case.x[:1])  # by rows now
        assert relative(first, expected[:1]) <= DOUBLE
        assert (
            max(worst_differences(engine.loss_and_grads(case.x, case.target, KEY), plain(case, LOSS)).values())
            <= DOUBLE
        )
        assert relative(engine.predict(case.x), expected) <= DOUBLE
        assert relative(engine.predict(case.x, other.net), others) <= DOUBLE
        assert np.array_equal(engine.predict(case.x[:1]), first)
    frozen = case.net.parameters() | case.net.buffers()
    assert {name: array.tobytes() for name, array in kept.items()} == {k: a.tobytes() for k, a in frozen.items()}


def test_a_frozen_network_cannot_be_changed_unseen():
    case, other = (problem(2, (8, 8), widths=(4, 32), seed=seed, dtype="float64") for seed in (1, 2))
    with engine_for(case) as engine:
        engine.freeze()
        engine.predict(case.x)
        for array in (case.net.parameters() | case.net.buffers()).values():
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
        case.net.head.weight = other.net.head.weight
        assert relative(engine.predict(case.x), case.net.predict(case.x)) <= DOUBLE


@pytest.mark.parametrize(("batch", "size"), [(3, (8, 8)), (2, (4, 12))])
def test_a_batch_that_the_buffers_cannot_take_is_computed_on_the_plain_path(batch, size):
    case = problem(batch, size, widths=(3, 4))
    with CpuEngine(case.net, LOSS, 2, (8, 8), workers=1) as engine:
        worst = worst_differences_of_bits(engine.loss_and_grads(case.x, case.target, KEY), plain(case, LOSS))
        assert worst == []
        assert np.array_equal(engine.predict(case.x[:, :3]), case.net.predict(case.x[:, :3]))


def worst_differences_of_bits(found, expected):
    """The arrays that are not the same to the last bit."""
    (loss, grads, stats), (expected_loss, expected_grads, expected_stats) = found, expected
    arrays, wanted = grads | stats, expected_grads | expected_stats
    return [name for name in wanted if not np.array_equal(arrays[name], wanted[name])] + ["loss"] * (
        loss != expected_loss
    )


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_any_number_of_channels(channels):
    slices = phantom.make(patients=1, size=16, seed=1)
    slices = replace(slices, images=slices.images[..., np.arange(channels) % 3])
    statistics, indices = Normalization("volume").statistics(slices), np.array([9, 3])
    net = UNet(in_channels=channels, widths=(2, 3))
    with CpuEngine(net, LOSS, 2, (16, 16), workers=2) as engine:
        batch = engine.prepare_batch(slices, statistics, indices)
        assert np.array_equal(batch.x, prepare_batch(slices, statistics, indices, "cpu").x)
    with engines.build(net, LOSS, 2, (16, 16), "cpu", "auto", "float32") as engine:
        assert engine.reason is None  # it has shown that it computes what the plain path does


def test_wrong_arguments_are_refused_as_the_plain_path_does():
    case = problem(2, (8, 8), widths=(3, 4))
    with engine_for(case) as engine:
        with pytest.raises(ValueError, match="dtype float32, got float64"):
            engine.loss_and_grads(case.x.astype("float64"), case.target, KEY)
        with pytest.raises(ValueError, match="target"):
            engine.loss_and_grads(case.x, case.target[:, :4], KEY)
        with pytest.raises(ValueError, match="target"):
            engine.loss_and_grads(case.x, 255 * case.target, KEY)
        worst = worst_differences(engine.loss_and_grads(case.x, case.target.astype(bool), KEY), plain(case, LOSS))
    assert worst["loss"] <= 1e-6


@pytest.mark.parametrize("workers", SIZES)
@pytest.mark.parametrize("move_masks", [True, False])
def test_a_batch_has_the_bits_of_the_plain_path(workers, move_masks):
    slices, key = phantom.make(patients=2, size=16, seed=1), KEY._replace(image=3)
    statistics = Normalization("volume").statistics(slices)
    strong = {"augmentation": PRESETS["strong"], "move_masks": move_masks, "key": key}
    with CpuEngine(UNet(widths=(2, 3)), LOSS, 5, (16, 16), workers=workers) as engine:
        for indices in ([0, 30, 7, 7, 2], [9], [3, 1, 2], range(6)):  # the last is more than the buffers can take
            for options in ({}, strong):
                wanted = prepare_batch(slices, statistics, np.array(indices), "cpu", **options)
                batch = engine.prepare_batch(slices, statistics, np.array(indices), **options)
                assert np.array_equal(batch.x, wanted.x)
                assert np.array_equal(batch.target, wanted.target)
                assert batch.files == wanted.files
                assert batch.x.dtype == batch.target.dtype == np.float32
        with pytest.raises(ValueError, match="key"):
            engine.prepare_batch(slices, statistics, np.array([0]), augmentation=PRESETS["strong"])
        larger = phantom.make(patients=1, size=32, seed=1)
        deep = replace(slices, images=slices.images.astype(np.uint16) * 9)
        statistics = Normalization("volume").statistics(deep)
        wanted = prepare_batch(deep, statistics, np.array([3, 1]), "cpu", **strong)
        assert np.array_equal(engine.prepare_batch(deep, statistics, np.array([3, 1]), **strong).x, wanted.x)
        statistics = Normalization("scale").statistics(larger)
        batch = engine.prepare_batch(larger, statistics, np.array([1]))
        assert np.array_equal(batch.x, prepare_batch(larger, statistics, np.array([1]), "cpu").x)


@pytest.mark.parametrize("kind", ["classes", "overlapping"])
def test_the_target_of_several_is_the_plain_path_s(kind):
    slices = phantom.make(patients=1, size=16, seed=1)
    random, shape = np.random.default_rng(0), slices.images.shape[:3]
    if kind == "classes":
        masks = random.choice(np.array([0, 1, 2, IGNORE], np.uint8), (*shape, 1))
        slices = replace(slices, masks=masks, classes=("background", "a", "b"))
    else:
        slices = replace(slices, masks=random.integers(0, 2, (*shape, 3), dtype=np.uint8))
    statistics, indices = Normalization("volume").statistics(slices), np.array([2, 9, 4])
    strong = {"augmentation": PRESETS["strong"], "key": KEY}
    with CpuEngine(UNet(widths=(2, 3), out_channels=3), LOSS, 3, (16, 16), workers=2) as engine:
        for options in ({}, strong, {"crop": 16, **strong}, {"crop": 8, **strong}):
            wanted = prepare_batch(slices, statistics, indices, "cpu", **options)
            batch = engine.prepare_batch(slices, statistics, indices, **options)
            assert wanted.target.shape[3] == 3
            assert np.array_equal(batch.x, wanted.x)
            assert np.array_equal(batch.target, wanted.target)
            assert batch.target.dtype == np.float32


def test_one_value_a_channel_is_refused_as_the_plain_path_does():
    case = problem(1, (2, 2), widths=(3, 4))
    with pytest.raises(ValueError, match="more than one") as expected:
        plain(case, LOSS)
    with engine_for(case) as engine, pytest.raises(ValueError, match="more than one") as found:
        engine.loss_and_grads(case.x, case.target, KEY)
    assert str(found.value) == str(expected.value)


def test_what_it_cannot_take_runs_on_the_plain_path_and_says_why():
    assert "5" in unsupported(UNet(widths=(2, 3), up_kernel=5), LOSS, 2, (8, 8), "float32")
    assert "10 x 8" in unsupported(UNet(widths=(2, 3, 4)), LOSS, 2, (10, 8), "float32")
    with engines.build(UNet(widths=(2, 3), up_kernel=5), LOSS, 2, (8, 8)) as engine:
        assert (engine.name, engine.reason) == ("plain", unsupported(engine.net, LOSS, 2, (8, 8), "float32"))
    with engines.build(UNet(widths=(2, 3)), LOSS, 2, (8, 8)) as engine:
        assert isinstance(engine, CpuEngine)


# The same bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", SIZES)
def test_the_bits_of_a_step_repeat(workers):
    case = problem(3, (12, 20), widths=(8, 32, 40), dropout=0.3)
    results = []
    for _ in range(2):
        with engine_for(case, workers=workers) as engine:
            for step in (1, 2):  # the second one in buffers that the first has used
                value, grads, stats = engine.loss_and_grads(case.x, case.target, KEY._replace(step=step))
            grads = {name: array.copy() for name, array in grads.items()}
            results.append((value, grads, stats))
    assert worst_differences_of_bits(*results) == []
