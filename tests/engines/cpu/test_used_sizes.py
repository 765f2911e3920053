"""The contract of test_engine.py at the sizes that people train at, where each image is cut into several bands.

Small images fit into one band, and then whatever goes wrong between two bands goes unseen.
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minunet.engines.cpu import chunks, work
from minunet.network.layers import map_arrays
from minunet.training.step import loss_and_grads
from tests.engines.cases import USED
from tests.engines.cpu.cases import KEY, problem, relative
from tests.engines.cpu.test_engine import FIXED, LOSS, check_it, engine_for, losses, options_and_shapes
from tests.strategies import seeds

POSIX = pytest.mark.skipif(os.name != "posix", reason="teams of processes are of POSIX systems alone")
NETWORKS = {
    "rows": {"widths": (4, 6, 8)},
    "tiles": {"widths": (32, 34), "dropout": 0.0},
    "all": {"widths": (16, 32, 48), "up_kernel": 2, "conv_bias": False},
}


def bands(engine, kind):
    """Into how many bands each stage of a kind cuts an image."""
    stages = engine._program.steps_for(True, 2).stages
    return [runnable.pieces.bands for stage, runnable in stages if stage.kind == kind]


# At the sizes themselves ---------------------------------------------------------------------------------------------


def test_there_images_are_cut_into_bands():
    with engine_for(problem(2, (224, 224), **NETWORKS["all"])) as engine:
        for kind in ("conv", "conv_backward", "pool", "pool_backward", "up", "up_backward", "head", "loss_sums"):
            assert max(bands(engine, kind)) > 1, kind


@pytest.mark.parametrize(
    ("name", "size"),
    [*(("rows", size) for size in USED), ("tiles", USED[0]), ("tiles", USED[4]), ("all", USED[1]), ("all", USED[3])],
    ids=str,
)
def test_it_is_the_plain_path(name, size):
    check_it(problem(2, size, seed=3, dtype="float64", **NETWORKS[name]))


@POSIX
@pytest.mark.parametrize(
    ("batch", "workers", "size"),
    [(1, 2, (224, 224)), (2, 3, (132, 236)), (3, 2, (224, 224)), (2, 5, (132, 236)), (5, 3, (132, 236))],
    ids=str,
)
def test_processes_share_it(batch, workers, size):
    """By rows with fewer images than processes, by images otherwise."""
    check_it(problem(batch, size, seed=4, dtype="float64", **NETWORKS["rows"]), workers=workers, more=batch % 2)


@POSIX
@pytest.mark.parametrize(("batch", "workers"), [(1, 2), (2, 5), (3, 3)])
def test_processes_share_it_in_every_way_to_convolve(batch, workers):
    check_it(problem(batch, (148, 124), seed=5, dtype="float64", **NETWORKS["all"]), workers=workers)


# Sums of large numbers -----------------------------------------------------------------------------------------------


def moved(case, scale, offset):
    """The problem with images far from 0. A batch norm takes both out again, if its sums are added up with care."""
    return case._replace(x=(scale * case.x + offset).astype(case.x.dtype))


@pytest.mark.parametrize(("scale", "offset"), [(1, 300), (1, -300), (1e4, 0), (1e-4, 0), (255, 1e5), (255, -1e5)])
def test_offsets_of_both_signs(scale, offset):
    check_it(moved(problem(2, (132, 236), seed=6, dtype="float64", **NETWORKS["rows"]), scale, offset), bound=1e-8)


@pytest.mark.parametrize("offset", [-30, 0, 30])
@pytest.mark.parametrize("name", NETWORKS)
def test_offsets_in_float32(name, offset):
    """Compared with float64. Only what is continuous: of a kink, rounding decides on which side a value lies."""
    case = moved(problem(2, (148, 124), seed=7, hard=False, dtype="float32", **NETWORKS[name]), 1, offset)
    exact = map_arrays(case.net, lambda array: array.astype("float64"))
    x, target = case.x.astype("float64"), case.target.astype("float64")
    loss, _, statistics = loss_and_grads(exact, x, target, LOSS, KEY)
    with engine_for(case) as engine:
        found, _, of_batch = engine.loss_and_grads(case.x, case.target, KEY)
        assert found == pytest.approx(loss, rel=1e-5)
        for statistic, array in statistics.items():
            assert relative(of_batch[statistic], array) <= 1e-3, statistic  # 1.7e-4 was seen, 6e-6 without the offset
        assert relative(engine.logits(case.x), exact.forward(x, training=False)[0]) <= 1e-5


# In the finest bands -------------------------------------------------------------------------------------------------


@pytest.fixture
def finely(monkeypatch):
    """Lets each stage take a number of units at a time, whatever its budget of bytes: a row, or four."""

    def set_units(units):
        def cut(height, unit_rows, bytes_per_unit, budget, max_batch, processes):
            return chunks.cut(height, unit_rows, bytes_per_unit, units * bytes_per_unit, max_batch, processes)

        monkeypatch.setattr(work, "cut", cut)

    return set_units


@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("name", FIXED)
def test_every_level_in_several_bands(name, units, finely):
    finely(units)
    batch, size, options = FIXED[name]
    factor = 5 if (name, units) == ("rows", 3) else 3  # so that the lowest level has several bands too
    size = tuple(factor * side for side in size)
    case = problem(batch, size, seed=8, dtype="float64", **options)
    with engine_for(case) as engine:
        for kind in ("conv", "conv_backward", "pool", "pool_backward", "up", "up_backward", "head", "loss_sums"):
            assert min(bands(engine, kind), default=2) > 1, kind
    check_it(case)


@given(options_and_shapes(), losses(), seeds, st.integers(1, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_network_in_fine_bands(finely, shapes, loss, seed, units):
    finely(units)
    batch, size, options = shapes
    check_it(problem(batch, size, seed=seed, dtype="float64", **options), loss)
