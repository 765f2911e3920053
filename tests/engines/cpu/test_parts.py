"""Parts of the CPU engine by themselves: what the whole step would show only as a number that is a little off."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet import ops
from minunet.engines.cpu import resample, rows, tiles
from minunet.engines.cpu.adamw import BLOCK, BlockAdamW, BlockWeightEMA, blocks_of
from minunet.engines.cpu.buffers import ALIGNMENT, Lifetime, Scratch, aligned, pack
from minunet.engines.cpu.chunks import cut, share
from minunet.engines.cpu.winograd import FILTER_TRANSFORM, INPUT_TRANSFORM, OUTPUT_TRANSFORM, matrices
from minunet.training.optim import AdamW, WeightEMA
from tests.strategies import seeds

SIDES = st.integers(1, 11)


def test_winograd_gives_what_the_filter_does_for_every_input_and_tap():
    """Both are linear in x and in w, so the 18 products of unit vectors say it all."""
    inputs, filters, outputs = (np.array(m) for m in (INPUT_TRANSFORM, FILTER_TRANSFORM, OUTPUT_TRANSFORM))
    for i, x in enumerate(np.eye(6)):
        for k, w in enumerate(np.eye(3)):
            expected = np.zeros(4)
            if 0 <= i - k < 4:
                expected[i - k] = 1
            assert outputs @ ((filters @ w) * (inputs @ x)) == pytest.approx(expected, abs=1e-15)


@given(
    st.sampled_from([rows, tiles]),
    st.integers(1, 2),
    st.integers(1, 3),
    SIDES,
    st.integers(1, 5),
    st.integers(1, 5),
    seeds,
)
def test_the_calls_for_a_chunk_are_a_convolution_and_its_backward(method, images, tile_rows, width, c_in, c_out, seed):
    """Of images as high as the chunk, whose border rows are zeros."""
    draw = np.random.default_rng(seed)
    height, m = 4 * tile_rows, matrices("float64")
    x, dy = (draw.standard_normal((images, height, width, c)) for c in (c_in, c_out))
    weight = draw.standard_normal((3, 3, c_in, c_out))
    y, cache = ops.conv2d_forward(x, weight, None)
    dx, dweight, _ = ops.conv2d_backward(dy, cache)

    calls = (rows.Rows if method is rows else tiles.Tiles)(m, images, tile_rows, width)
    scratch = Scratch()
    calls.take_room(scratch, c_in, c_out)
    scratch.allocate()
    scratch.reset()
    calls.take_room(scratch, c_in, c_out)
    calls.clear_room()
    bands = [np.pad(values, ((0, 0), (1, 1), (0, 0), (0, 0))) for values in (x, dy)]
    transform = method.filter_transform(m)

    def convolved(band, weight):
        c, c2 = weight.shape[2:]
        planes, sums = (np.zeros(calls.planes_shape(channels)) for channels in (c, c2))
        filters = (transform @ weight.reshape(transform.shape[1], -1)).reshape(method.filters_shape(c, c2))
        calls.input_transform(band, planes)()
        calls.products(planes, filters, sums)()
        out = np.empty((images, tile_rows, 4, width * c2))
        calls.output_transform(sums)(out)
        return out.reshape(images, height, width, c2), planes

    found, planes = convolved(bands[0], weight)
    found_dx, _ = convolved(bands[1], np.ascontiguousarray(weight[::-1, ::-1].swapaxes(2, 3)))
    dy_planes = np.zeros(calls.planes_shape(c_out))
    calls.gradient_transform(bands[1], dy_planes)()
    dfilters = np.empty(method.filters_shape(c_in, c_out))
    calls.filter_gradient(planes, dy_planes, dfilters)()
    found_dweight = (transform.T @ dfilters.reshape(len(transform), -1)).reshape(weight.shape)
    for got, wanted in ((found, y), (found_dx, dx), (found_dweight, dweight)):
        assert abs(got - wanted).max() <= 1e-12 * abs(wanted).max()


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_arrays_that_live_at_one_time_never_share_memory(drawn):
    lifetimes = {str(i): Lifetime(nbytes, min(a, b), max(a, b)) for i, (nbytes, a, b) in enumerate(drawn)}
    offsets, total = pack(lifetimes)
    for stage in range(7):
        live = sorted(
            (offsets[name], offsets[name] + nbytes)
            for name, (nbytes, first, last) in lifetimes.items()
            if first <= stage <= last
        )
        assert all(end <= start for (_, end), (start, _) in pairwise(live))
        assert all(end <= total for _, end in live)
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    assert set(offsets) == set(lifetimes)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(40, 256, 128), (40, 256, 144), (3, 70, 999), (2000, 600, 4)])
def test_a_product_in_parts_is_the_product(rows, inner, columns):
    random = np.random.default_rng(0)
    a, b, out = (
        random.normal(size=(2, rows, inner)),
        random.normal(size=(2, inner, columns)),
        np.empty((2, rows, columns)),
    )
    tiles._in_parts(a, b, out)()
    np.testing.assert_allclose(out, a @ b, rtol=1e-12, atol=1e-12)
    resample.product(a[0], b[0], out[1])()
    np.testing.assert_allclose(out[1], a[0] @ b[0], rtol=1e-12, atol=1e-12)


def test_scratch_memory_is_what_the_greediest_stage_needs():
    scratch = Scratch()
    for _ in ("measure", "build"):
        for shapes in ([(3,), (5, 7)], [(100,)]):
            scratch.reset()
            arrays = [scratch.take(shape, "float32") for shape in shapes]
            assert [array.shape for array in arrays] == shapes
        if scratch.measuring:
            scratch.allocate()
    assert scratch.needed == max(aligned(12) + aligned(140), aligned(400))
    assert arrays[0].ctypes.data % ALIGNMENT == 0


@given(
    st.integers(1, 60), st.sampled_from([1, 4]), st.integers(1, 400), st.integers(1, 9), st.integers(1, 4), st.data()
)
def test_chunks_cover_every_row_of_every_image_once(height, unit_rows, nbytes, most, processes, data):
    pieces = cut(height, unit_rows, nbytes, 1000, most, processes)
    assert pieces.rows % unit_rows == 0
    batch = data.draw(st.integers(1, most))
    seen = np.zeros((batch, height), int)
    for rank in range(processes):
        for chunk in pieces.chunks(batch, rank, processes):
            assert 1 <= chunk.images <= pieces.images
            assert 1 <= chunk.rows <= pieces.rows
            here = slice(chunk.first_image, chunk.first_image + chunk.images)
            seen[here, chunk.first_row : chunk.first_row + chunk.rows] += 1
    assert (seen == 1).all()
    assert [i for rank in range(processes) for i in share(height, rank, processes)] == list(range(height))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_optimiser_block_by_block_has_the_same_bits(dtype):
    draw = np.random.default_rng(1)
    shapes = {"a.weight": (3, BLOCK // 2 + 7), "b.weight": (5,), "c.gamma": (BLOCK,)}

    def arrays():
        return {name: draw.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}

    first = arrays()
    second = {name: array.copy() for name, array in first.items()}
    plain = AdamW(first, 0.01, weight_decay=0.1, no_decay=("c.gamma",))
    quick = BlockAdamW(second, 0.01, weight_decay=0.1, no_decay=("c.gamma",))
    average, quick_average = WeightEMA(first, 0.9), BlockWeightEMA(second, 0.9)
    for step in range(3):
        grads = arrays()
        plain.step(grads, 0.02 if step == 1 else None)
        quick.step(grads, 0.02 if step == 1 else None)
        average.update(first)
        quick_average.update(second)
    assert (quick.steps, quick_average.updates) == (plain.steps, average.updates) == (3, 3)
    for name, array in first.items():
        assert np.array_equal(second[name], array)
        assert np.array_equal(quick.first_moment[name], plain.first_moment[name])
        assert np.array_equal(quick.second_moment[name], plain.second_moment[name])
        assert np.array_equal(quick_average.average[name], average.average[name])
    for array in first.values():
        assert sum(block.size for (block,) in blocks_of(array)) == array.size
