"""What every op and every loss promises, tested once for all of them, on every implementation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet import gradcheck
from tests.strategies import OPS

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def named(*names):
    return [op for op in OPS if op.name in names]


def draw(data, op):
    """A case of ``op``, and a random upstream gradient of the shape of its result (a loss takes none)."""
    case = data.draw(op.cases)
    y = op.oracle(**case.inputs, **case.options)
    return case, case.rng.standard_normal(y.shape)


def cast(arrays, dtype):
    return {name: v.astype(dtype) if isinstance(v, np.ndarray) else v for name, v in arrays.items()}


def run(implementation, op, inputs, options, dy):
    """y and the gradients, on the host, of arrays on the host."""
    inputs, options, dy = (implementation.put(part) for part in (inputs, options, dy))
    y, cache = implementation.forward(op, inputs, options)
    return implementation.get(y), [implementation.get(gradient) for gradient in implementation.backward(op, dy, cache)]


def relative_error(result, expected):
    """Largest difference over largest expected value; where that is 0, the result must be exactly 0."""
    assert result.shape == expected.shape
    difference, largest = np.abs(result - expected).max(), np.abs(expected).max()
    return 0.0 if difference == 0 else difference / largest if largest > 0 else np.inf


def overall_error(results, expected):
    """The same over several arrays together, any of which may be None in both."""
    assert [result is None for result in results] == [e is None for e in expected]
    flat = [np.concatenate([array.ravel() for array in arrays if array is not None]) for arrays in (results, expected)]
    return relative_error(*flat)


def bits(implementation, value):
    """A snapshot of an array, or of a cache, that is equal only if every bit is."""
    if isinstance(value, tuple | list):
        return [bits(implementation, part) for part in value]
    if isinstance(value, dict):
        return {name: bits(implementation, part) for name, part in value.items()}
    if hasattr(value, "dtype"):
        value = implementation.get(value)
        return value.dtype, value.shape, value.tobytes()
    return value


# --- The result and its gradient ------------------------------------------------------------------------------


@every_op
@given(data=st.data())
def test_forward_is_the_definition(implementation, op, data):
    case, dy = draw(data, op)
    y, _ = run(implementation, op, case.inputs, case.options, dy)
    assert relative_error(y, op.oracle(**case.inputs, **case.options)) <= 1e-13


@every_op
@given(data=st.data())
def test_gradient_by_complex_step(implementation, op, data):
    check_gradient(implementation, op, data, method="complex", tolerance=1e-12)


@every_op
@given(data=st.data())
def test_gradient_by_central_differences(implementation, op, data):
    check_gradient(implementation, op, data, method="central", tolerance=1e-6)


def check_gradient(implementation, op, data, method, tolerance):
    case = data.draw(op.cases)
    report = gradcheck.check_op(
        implementation.function(f"{op.name}_forward"),
        implementation.function(f"{op.name}_backward"),
        implementation.put(case.inputs),
        seed=int(case.rng.integers(2**32)),
        method=method,
        sampling={"exhaustive": 12, "samples": 6, "directions": 2},
        **implementation.put(case.options),
    )
    assert report.ok(tolerance), str(report)


@every_op
@given(data=st.data())
def test_float32_is_float64_rounded(implementation, op, data):
    case, dy = draw(data, op)
    # Both get the same values: those that float32 can hold.
    inputs, options, dy = cast(case.inputs, "float32"), cast(case.options, "float32"), dy.astype("float32")
    y64, grads64 = run(implementation, op, cast(inputs, "float64"), cast(options, "float64"), dy.astype("float64"))
    y32, grads32 = run(implementation, op, inputs, options, dy)
    assert relative_error(y32, y64) <= 2e-6
    assert overall_error(grads32, grads64) <= 1e-5


# --- Purity ---------------------------------------------------------------------------------------------------


@every_op
@given(data=st.data())
def test_changes_nothing_and_repeats_bit_for_bit(implementation, op, data):
    case, dy = draw(data, op)
    arguments = [implementation.put(part) for part in (case.inputs, case.options)]
    dy = implementation.put(dy)
    before = bits(implementation, [*arguments, dy])
    y, cache = implementation.forward(op, *arguments)
    y_bits, cache_bits = bits(implementation, y), bits(implementation, cache)
    first = bits(implementation, implementation.backward(op, dy, cache))
    second = bits(implementation, implementation.backward(op, dy, cache))
    assert bits(implementation, [*arguments, dy]) == before
    assert bits(implementation, cache) == cache_bits
    assert bits(implementation, y) == y_bits
    assert second == first
    assert bits(implementation, implementation.forward(op, *arguments)[0]) == y_bits


@every_op
@given(data=st.data())
def test_results_are_the_callers_to_overwrite(implementation, op, data):
    """No result shares memory with an input or with dy, and overwriting results spoils no later backward."""
    case, dy = draw(data, op)
    inputs, options, dy = (implementation.put(part) for part in (case.inputs, case.options, dy))
    y, cache = implementation.forward(op, inputs, options)
    given_arrays = [array for array in [*inputs.values(), *options.values(), dy] if hasattr(array, "dtype")]
    shares_memory = implementation.xp().shares_memory
    assert not any(shares_memory(y, array) for array in given_arrays)
    expected = bits(implementation, implementation.backward(op, dy, cache))
    if not op.is_loss:
        y[...] = 7.0
    gradients = [gradient for gradient in implementation.backward(op, dy, cache) if gradient is not None]
    for i, gradient in enumerate(gradients):
        assert not any(shares_memory(gradient, array) for array in [*given_arrays, *gradients[:i]])
        gradient[...] = 7.0
    assert bits(implementation, implementation.backward(op, dy, cache)) == expected


@every_op
@given(data=st.data(), dtype=st.sampled_from(["float32", "float64"]))
def test_keeps_shape_and_dtype(implementation, op, data, dtype):
    case, dy = draw(data, op)
    inputs, options, dy = cast(case.inputs, dtype), cast(case.options, dtype), dy.astype(dtype)
    y, gradients = run(implementation, op, inputs, options, dy)
    assert y.dtype == dtype
    for x, gradient in zip(inputs.values(), gradients, strict=True):
        assert (gradient is None) == (x is None)
        assert x is None or (gradient.shape, gradient.dtype) == (x.shape, x.dtype)


@every_op
@given(data=st.data())
def test_layout_in_memory_does_not_matter(implementation, op, data):
    case, dy = draw(data, op)
    expected_y, expected = run(implementation, op, case.inputs, case.options, dy)
    scatter = data.draw(st.sampled_from([every_other, backwards, transposed]))

    def scattered(arrays):
        return {name: scatter(implementation, v) if isinstance(v, np.ndarray) else v for name, v in arrays.items()}

    y, cache = implementation.forward(op, scattered(case.inputs), scattered(case.options))
    gradients = implementation.backward(op, scattered({"dy": dy})["dy"], cache)
    assert relative_error(implementation.get(y), expected_y) <= 1e-13
    assert overall_error([implementation.get(gradient) for gradient in gradients], expected) <= 1e-13


def every_other(implementation, array):
    """The same values with gaps of NaN between them."""
    if array.ndim == 0:
        return implementation.put(array)
    wide = implementation.xp().full((*array.shape[:-1], 2 * array.shape[-1]), np.nan)
    wide[..., ::2] = implementation.put(array)
    return wide[..., ::2]


def backwards(implementation, array):
    """The same values, read from the last to the first."""
    flipped = tuple(slice(None, None, -1) for _ in array.shape)
    return implementation.put(np.ascontiguousarray(array[flipped]))[flipped]


def transposed(implementation, array):
    """The same values in Fortran's order."""
    return implementation.put(np.ascontiguousarray(array.T)).T


# --- Linearity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [op for op in OPS if not op.is_loss], ids=lambda op: op.name)
@given(data=st.data())
def test_backward_is_linear_in_dy(implementation, op, data):
    case, dy = draw(data, op)
    other = case.rng.standard_normal(dy.shape)
    inputs, options = implementation.put(case.inputs), implementation.put(case.options)
    _, cache = implementation.forward(op, inputs, options)

    def backward(dy):
        return [implementation.get(gradient) for gradient in implementation.backward(op, implementation.put(dy), cache)]

    zeros = backward(np.zeros_like(dy))
    assert not any(gradient.any() for gradient in zeros if gradient is not None)
    # Over all gradients together, as their parts may cancel in one of them.
    one, two, both = backward(3 * dy), backward(other), backward(3 * dy + other)
    size = max(np.abs(gradient).max() for gradient in [*one, *two] if gradient is not None)
    for a, b, c in zip(one, two, both, strict=True):
        assert c is None or np.abs(a + b - c).max() <= 1e-13 * size


@pytest.mark.parametrize(
    ("op", "names"),
    [(op, names) for op in OPS for names in op.homogeneous],
    ids=lambda value: value.name if hasattr(value, "name") else "+".join(value),
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-14), ("float32", 1e-6)])
@given(data=st.data())
def test_backward_is_the_adjoint(implementation, op, names, dtype, tolerance, data):
    """<A x, dy> = <x, A' dy>, where y = A x.

    Max pooling and ReLU are no linear maps, but y = A(x) x holds with the A that has chosen the winners of x.
    """
    case, dy = draw(data, op)
    inputs, options, dy = cast(case.inputs, dtype), cast(case.options, dtype), dy.astype(dtype)
    if "weight" in inputs:
        # Without a bias, which is no part of A; and without cancellation in A x, which would make its norm small.
        inputs = {"x": np.abs(inputs["x"]), "weight": np.abs(inputs["weight"]), "bias": None}
    y, gradients = run(implementation, op, inputs, options, dy)
    dx = dict(zip(inputs, gradients, strict=True))
    left = inner(y, dy)
    right = sum(inner(inputs[name], dx[name]) for name in names)
    assert abs(left - right) <= tolerance * np.linalg.norm(y) * np.linalg.norm(dy)


def inner(a, b):
    return float(np.vdot(a.astype("float64"), b.astype("float64")))


@pytest.mark.parametrize("op", [op for op in OPS if op.per_image], ids=lambda op: op.name)
@given(data=st.data())
def test_each_image_of_a_batch_is_treated_alone(implementation, op, data):
    case, dy = draw(data, op)
    y, gradients = run(implementation, op, case.inputs, case.options, dy)
    alone = []
    for n in range(len(dy)):
        image = {name: v[n : n + 1] if name in op.per_image else v for name, v in case.inputs.items()}
        alone.append(run(implementation, op, image, case.options, dy[n : n + 1]))
    assert relative_error(np.concatenate([y_n for y_n, _ in alone]), y) <= 1e-13
    for place, name in enumerate(case.inputs):
        parts = [gradients_n[place] for _, gradients_n in alone]
        if name in op.per_image:
            assert overall_error([np.concatenate(parts)], [gradients[place]]) <= 1e-13
        elif case.inputs[name] is not None:
            # The parameters are shared: their gradient is the sum over the images.
            assert np.abs(sum(parts) - gradients[place]).max() <= 1e-13 * sum(np.abs(part) for part in parts).max()


# --- Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [op for op in OPS if not op.is_loss], ids=lambda op: op.name)
@given(data=st.data())
def test_backward_refuses_a_dy_of_another_shape_or_dtype(implementation, op, data):
    case, dy = draw(data, op)
    _, cache = implementation.forward(op, implementation.put(case.inputs), implementation.put(case.options))
    for wrong in (dy[..., :-1], dy[:, np.newaxis], dy[0], dy.astype("float32")):
        with pytest.raises(ValueError, match=r"^dy must have "):
            implementation.backward(op, implementation.put(wrong), cache)


@every_op
@given(data=st.data())
def test_forward_refuses_what_is_no_batch_of_float_images(implementation, op, data):
    case = data.draw(op.cases)
    name = next(iter(case.inputs))
    x = case.inputs[name]
    for wrong in (x[0], x[..., :0], x[:0], x.astype("int64"), x > 0):
        with pytest.raises(ValueError, match=rf"^{name} must "):
            implementation.forward(
                op, implementation.put({**case.inputs, name: wrong}), implementation.put(case.options)
            )
