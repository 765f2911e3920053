"""The one file that knows whether CuPy is there, with CuPy absent, present and broken."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from minunet.base.backend import accumulation_dtype, array_module, resolve_device, to_device, to_numpy
from minunet.base.errors import UserError
from tests import strict_cupy


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", strict_cupy.module)
    return strict_cupy.module


@pytest.fixture
def no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # import cupy raises ImportError


def fail(error):
    def raise_it(*args):
        raise error

    return raise_it


def fake_cupy(count=lambda: 1, zeros=np.zeros):
    return SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=count)), zeros=zeros)


def test_array_module(standin):
    assert array_module(np.zeros(2)) is np
    assert array_module(np.float32(1)) is np
    assert array_module(standin.zeros(2)) is standin


@pytest.mark.parametrize("value", [[1.0], 1.0, None, "numpy"])
def test_array_module_refuses_what_is_no_array(value):
    with pytest.raises(TypeError, match=f"^expected a NumPy or CuPy array, got {type(value).__name__}$"):
        array_module(value)


def test_array_module_refuses_an_array_of_a_module_whose_name_only_begins_like_numpys():
    stranger = type("Array", (), {"__module__": "numpy_like.core"})()
    with pytest.raises(TypeError, match="got Array"):
        array_module(stranger)


def test_there_and_back(standin):
    x = np.arange(6.0).reshape(2, 3)
    on_device = to_device(x, "cuda")
    assert isinstance(on_device, standin.ndarray)
    assert to_device(on_device, "cuda") is not x
    assert np.array_equal(to_numpy(on_device), x)
    assert np.array_equal(to_device(on_device, "cpu"), x)


def test_what_is_there_is_not_copied():
    x = np.zeros(3)
    assert to_device(x, "cpu") is x
    assert to_numpy(x) is x


@pytest.mark.parametrize(("real", "wide"), [("float16", "float64"), ("float32", "float64"), ("float64", "float64")])
def test_accumulation_dtype(real, wide):
    assert accumulation_dtype(np.dtype(real)) == wide


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_accumulation_dtype_keeps_the_imaginary_part(dtype):
    assert accumulation_dtype(np.dtype(dtype)) == "complex128"


def test_resolve_device_with_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    assert resolve_device("auto") == ("cuda", None)
    assert resolve_device("cuda") == ("cuda", None)
    assert resolve_device("cpu") == ("cpu", None)


def test_resolve_device_cpu_does_not_ask_for_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(count=fail(AssertionError("asked"))))
    assert resolve_device("cpu") == ("cpu", None)


BROKEN = {
    "no device": (fake_cupy(count=lambda: 0), "CuPy finds no CUDA device"),
    "no driver": (fake_cupy(count=fail(RuntimeError("no driver\nmore lines"))), "finds no working GPU (no driver)"),
    "no library": (fake_cupy(zeros=fail(OSError("libnvrtc missing"))), "finds no working GPU (libnvrtc missing)"),
    "silent": (fake_cupy(zeros=fail(RuntimeError())), "finds no working GPU (RuntimeError)"),
    "not installed": (None, "CuPy is not installed"),
}


def test_a_stream_for_each_thread_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    monkeypatch.setenv("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "1")
    with pytest.raises(UserError, match="^--device cuda: CUPY_CUDA_PER_THREAD_DEFAULT_STREAM is set, .* unset it; "):
        resolve_device("cuda")
    monkeypatch.setenv("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "0")
    assert resolve_device("cuda") == ("cuda", None)


@pytest.mark.parametrize(("cupy", "reason"), BROKEN.values(), ids=BROKEN)
def test_without_a_gpu_auto_falls_back_and_says_why(monkeypatch, cupy, reason):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    device, why = resolve_device("auto")
    assert device == "cpu"
    assert reason in why
    assert "\n" not in why


@pytest.mark.parametrize(("cupy", "reason"), BROKEN.values(), ids=BROKEN)
def test_without_a_gpu_cuda_is_an_error_for_people(monkeypatch, cupy, reason):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(UserError) as caught:
        resolve_device("cuda")
    message = str(caught.value)
    assert message.startswith("--device cuda: ")
    assert reason in message
    assert "pip install" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "cuda:0"])
def test_refuses_another_name(name):
    with pytest.raises(ValueError, match=f"^device must be 'auto', 'cpu' or 'cuda', got {name!r}"):
        resolve_device(name)
