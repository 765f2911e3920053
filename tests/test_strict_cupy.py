"""The stand-in for CuPy refuses what it must, computes what NumPy computes, and has no more than CuPy has."""

import copy
import importlib
import inspect
import operator
import sys

import numpy as np
import pytest

from tests import strict_cupy
from tests.implementations import IMPLEMENTATIONS
from tests.strict_cupy import FUNCTION_SIGNATURES, METHOD_SIGNATURES, SHARED
from tests.strict_cupy import module as cupy

HOST = np.array([[1.0, -2.0], [3.0, 4.0]])


@pytest.fixture
def x():
    return cupy.asarray(HOST)


MIXED = {
    "device + host": lambda x: x + HOST,
    "host + device": lambda x: HOST + x,
    "host @ device": lambda x: HOST @ x,
    "device @ host": lambda x: x @ HOST,
    "device < host": lambda x: x < HOST,
    "host < device": lambda x: operator.lt(HOST, x),
    "device += host": lambda x: operator.iadd(x, HOST),
    "host += device": lambda x: operator.iadd(HOST.copy(), x),
    "0-d host": lambda x: x * np.array(2.0),
    "x[i] = host": lambda x: operator.setitem(x, 0, HOST[0]),
    "x[host]": lambda x: x[HOST > 0],
    "x[host] = 1": lambda x: operator.setitem(x, HOST > 0, 1.0),
    "host[device]": lambda x: HOST[x > 0],
    "host[i] = device": lambda x: operator.setitem(HOST.copy(), 0, x[0]),
    "cupy of host": lambda x: cupy.exp(HOST),
    "cupy of both": lambda x: cupy.where(x > 0, x, HOST),
    "cupy of a list with host": lambda x: cupy.concatenate([x, HOST]),
    "cupy keyword host": lambda x: cupy.pad(x, 1, constant_values=HOST[0, 0].reshape(1)),
    "method of host": lambda x: x.take(np.array([0, 1])),
}
NUMPY = {
    "np.asarray": np.asarray,
    "np.array": np.array,
    "np ufunc": np.exp,
    "np function": np.sum,
    "np.concatenate": lambda x: np.concatenate([x, x]),
    "np.pad": lambda x: np.pad(x, 1),
    "np.where": lambda x: np.where(x > 0, x, 0.0),
    "np.isfinite": np.isfinite,
    "np.linalg": np.linalg.norm,
    "float of many": float,
    "range of a number": lambda x: range(x.astype("int64").sum()),
    "slice up to a number": lambda x: x[: (x > 0).sum()],
    "as a shape": lambda x: np.zeros(x.astype("int64").sum()),
    "math": __import__("math").sqrt,
    "hash": hash,
    "buffer": memoryview,
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_refuses_to_mix_host_and_device(x, mix):
    with pytest.raises((TypeError, IndexError)):
        mix(x)
    assert np.array_equal(cupy.asnumpy(x), HOST)


@pytest.mark.parametrize("function", NUMPY.values(), ids=NUMPY)
def test_refuses_numpy_and_implicit_conversion(x, function):
    with pytest.raises(TypeError):
        function(x)


@pytest.mark.parametrize("name", ["errstate", "random", "norm", "linalg", "vectorize", "ufunc", "load"])
def test_has_no_more_than_is_listed(name):
    with pytest.raises(AttributeError):
        getattr(cupy, name)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: cupy.sum(x, where=x > 0),
        lambda x: cupy.exp(x, out=x),
        lambda x: cupy.max(x, initial=0.0),
        lambda x: x.sum(initial=0.0),
        lambda x: x.item(0),
        lambda x: cupy.zeros_like(x, device="cpu"),
        lambda x: cupy.broadcast_to(x, (2, 2, 2), subok=True),
    ],
)
def test_refuses_arguments_that_cupy_has_not(x, call):
    with pytest.raises(TypeError, match=r"^cupy\.\w+: "):
        call(x)


def test_looks_like_cupy(x):
    assert type(x).__module__ == "cupy"
    assert isinstance(x, cupy.ndarray)
    assert (x.shape, x.ndim, x.size, x.dtype, x.nbytes, len(x)) == ((2, 2), 2, 4, np.float64, 32, 2)


def test_transfers_copy():
    host = HOST.copy()
    x = cupy.asarray(host)
    host[0, 0] = 9
    assert cupy.asnumpy(x)[0, 0] == 1
    cupy.asnumpy(x)[0, 0] = 9
    x.get()[0, 0] = 9
    assert np.array_equal(x.get(), HOST)
    assert cupy.shares_memory(cupy.asarray(x), x)
    assert not cupy.shares_memory(cupy.array(x), x)
    assert not cupy.shares_memory(copy.deepcopy(x), x)
    assert not cupy.shares_memory(copy.copy(x), x)


def test_computes_what_numpy_computes(x):
    pairs = [
        (x + 1, HOST + 1),
        (2 - x, 2 - HOST),
        (1 / (1 + x * x), 1 / (1 + HOST * HOST)),
        (x @ x.T, HOST @ HOST.T),
        (np.float64(2.0) * x, 2 * HOST),
        (-x, -HOST),
        (~(x > 0), ~(HOST > 0)),
        (abs(x), abs(HOST)),
        (x**2, HOST**2),
        (x[:, ::-1], HOST[:, ::-1]),
        (x[x > 0], HOST[HOST > 0]),
        (x[None, ..., 0], HOST[None, ..., 0]),
        (cupy.where(x > 0, x, 0.0), np.where(HOST > 0, HOST, 0.0)),
        (cupy.pad(x, 1, mode="edge"), np.pad(HOST, 1, mode="edge")),
        (cupy.concatenate([x, x], axis=1), np.concatenate([HOST, HOST], axis=1)),
        (x.sum(axis=0, keepdims=True), HOST.sum(axis=0, keepdims=True)),
        (x.mean(), HOST.mean()),
        (x.astype("complex128").imag, np.zeros((2, 2))),
        (cupy.nonzero(x > 2)[0], np.nonzero(HOST > 2)[0]),
    ]
    for result, expected in pairs:
        assert isinstance(result, cupy.ndarray)
        assert np.array_equal(result.get(), expected)
    assert [row.get().tolist() for row in x] == HOST.tolist()


def test_views_and_in_place(x):
    x[0, 1] += 10
    x[1] *= 2
    x[:, 0] = cupy.asarray(np.array([7.0, 8.0]))
    part = x[1, 1]
    part -= 1
    assert x.get().tolist() == [[7, 8], [8, 7]]
    with pytest.raises(TypeError, match="same_kind"):
        x += 1j


def test_one_number_may_come_to_the_host(x):
    assert float(x.sum()) == x.sum().item() == 6.0
    assert int(x[0, 0]) == 1
    assert complex(x[0, 0]) == 1
    assert bool((x > -9).all())
    assert f"{x[1, 0]:.2f}" == "3.00"
    assert str(x[0, 0]) == "1.0"
    assert repr(x[0]).startswith("strict_cupy.array(")
    with pytest.raises(ValueError, match="ambiguous"):
        bool(x > 0)


def test_implementations_put_and_get_and_restore(monkeypatch):
    standin = next(implementation for implementation in IMPLEMENTATIONS if implementation.name == "standin")
    for before in (None, strict_cupy):
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        if before is not None:
            monkeypatch.setitem(sys.modules, "cupy", before)
        with standin.active():
            assert importlib.import_module("cupy") is cupy
        assert sys.modules.get("cupy") is before
    arrays = standin.put({"x": HOST, "stride": 2, "bias": None})
    assert isinstance(arrays["x"], cupy.ndarray)
    assert arrays["stride"] == 2
    assert np.array_equal(standin.get(arrays["x"]), HOST)
    assert standin.get(None) is None


# --- Against CuPy itself, where it is installed (no GPU is needed to look at its signatures) -------------------------


def kinds(signature):
    return {parameter.name: parameter.kind for parameter in signature.parameters.values()}


def test_cupy_has_the_functions_and_their_arguments():
    real = pytest.importorskip("cupy", exc_type=Exception)
    for name, signature in FUNCTION_SIGNATURES.items():
        function = getattr(real, name)
        # A ufunc takes its arrays by position, which is all that the listing allows.
        if not isinstance(function, real.ufunc) and name not in ("matmul", "einsum"):
            assert kinds(signature).items() <= kinds(inspect.signature(function)).items(), name
    assert all(hasattr(real, name) for name in SHARED.split())


def test_cupy_has_the_methods():
    real = pytest.importorskip("cupy", exc_type=Exception)
    assert all(callable(getattr(real.ndarray, name)) for name in METHOD_SIGNATURES)
