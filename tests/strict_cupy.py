"""A stand-in for CuPy on a machine without a GPU, stricter than CuPy, so that mixing host and device memory shows.

``strict_cupy.module`` goes into ``sys.modules["cupy"]``. Its ``ndarray`` keeps its values in a private NumPy array and

- refuses a NumPy array in every operation, also as the left operand, and every ``np.`` function on itself;
- refuses to become a NumPy array (``np.asarray``): only ``cupy.asnumpy`` and ``.get()`` bring values to the host;
- has only the functions, methods and arguments listed below, each with the signature that CuPy 14 gives it (a test
  compares them where CuPy is installed). ``out=`` and ``where=`` of a ufunc, ``np.errstate`` and their like are absent.

What it accepts it computes with NumPy, so results equal NumPy's bit for bit.
"""

import ast
import copy
import inspect
import operator
from inspect import Parameter
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

#: The functions of CuPy that minunet may use, as CuPy declares them. ``/`` ends what is passed by position only.
FUNCTIONS = """
abs(x, /)
arange(start, stop=None, step=1, dtype=None)
ascontiguousarray(a, dtype=None)
broadcast_to(array, shape)
clip(a, a_min, a_max, out=None)
concatenate(tup, axis=0, out=None, *, dtype=None, casting="same_kind")
empty(shape, dtype=float, order="C")
empty_like(prototype, dtype=None, order="K", subok=None, shape=None)
exp(x, /)
flip(a, axis=None)
floor(x, /)
full(shape, fill_value, dtype=None, order="C")
isfinite(x, /)
isnan(x, /)
log(x, /)
log1p(x, /)
max(a, axis=None, out=None, keepdims=False)
maximum(x1, x2, /)
min(a, axis=None, out=None, keepdims=False)
minimum(x1, x2, /)
nonzero(a)
ones(shape, dtype=float, order="C")
ones_like(a, dtype=None, order="K", subok=None, shape=None)
pad(array, pad_width, mode="constant", **kwargs)
round(a, decimals=0, out=None)
shares_memory(a, b, max_work=None)
sqrt(x, /)
stack(tup, axis=0, out=None, *, dtype=None, casting="same_kind")
sum(a, axis=None, dtype=None, out=None, keepdims=False)
take_along_axis(a, indices, axis)
where(condition, x=None, y=None)
zeros(shape, dtype=float, order="C")
zeros_like(a, dtype=None, order="K", subok=None, shape=None)
"""

#: The methods of ``cupy.ndarray`` that minunet may use, as CuPy declares them.
METHODS = """
all(axis=None, out=None, keepdims=False)
any(axis=None, out=None, keepdims=False)
argmax(axis=None, out=None, dtype=None, keepdims=False)
astype(dtype, order="K", casting=None, subok=None, copy=True)
conj()
copy(order="C")
fill(value)
item()
max(axis=None, out=None, keepdims=False)
mean(axis=None, dtype=None, out=None, keepdims=False)
min(axis=None, out=None, keepdims=False)
ravel(order="C")
reshape(*shape, order="C")
squeeze(axis=None)
sum(axis=None, dtype=None, out=None, keepdims=False)
swapaxes(axis1, axis2)
take(indices, axis=None, out=None)
transpose(*axes)
view(dtype=None)
"""

#: NumPy's own objects that CuPy hands through.
SHARED = "bool_ complex128 dtype finfo float32 float64 iinfo inf int32 int64 nan newaxis pi uint8 uint16"

BINARY = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
COMPARISONS = "lt le eq ne gt ge"
IN_PLACE = {
    "iadd": np.add,
    "isub": np.subtract,
    "imul": np.multiply,
    "itruediv": np.true_divide,
    "ipow": np.power,
    "iand": np.bitwise_and,
    "ior": np.bitwise_or,
    "ixor": np.bitwise_xor,
}


def _signatures(listing: str) -> dict[str, inspect.Signature]:
    """Name -> signature, for lines of the form ``name(arguments)``."""
    return {line.partition("(")[0]: _signature(line) for line in listing.split("\n") if line}


def _signature(line: str) -> inspect.Signature:
    """The signature that a line declares. Defaults are all None here: NumPy, which is called, has its own."""
    declared = ast.parse(f"def {line}: ...").body[0].args  # type: ignore[attr-defined]
    positional = [*declared.posonlyargs, *declared.args]
    required = len(positional) - len(declared.defaults)
    parameters = []
    for place, argument in enumerate(positional):
        kind = Parameter.POSITIONAL_ONLY if place < len(declared.posonlyargs) else Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(Parameter(argument.arg, kind, default=Parameter.empty if place < required else None))
    if declared.vararg:
        parameters.append(Parameter(declared.vararg.arg, Parameter.VAR_POSITIONAL))
    parameters += [Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=None) for argument in declared.kwonlyargs]
    if declared.kwarg:
        parameters.append(Parameter(declared.kwarg.arg, Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)


FUNCTION_SIGNATURES = _signatures(FUNCTIONS)
METHOD_SIGNATURES = _signatures(METHODS)


def _to_host(value: Any) -> Any:
    """``value`` with each stand-in array replaced by its private NumPy array. A NumPy array in it is refused."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}: a NumPy array met a CuPy array")
    if isinstance(value, list):
        return [_to_host(item) for item in value]
    return tuple(_to_host(item) for item in value) if isinstance(value, tuple) else value


def _to_device(value: Any) -> Any:
    """``value`` with each NumPy array or scalar wrapped: a reduction returns a 0-d array, which stays on the device."""
    if isinstance(value, np.ndarray | np.generic):
        return ndarray(np.asarray(value))
    return tuple(_to_device(item) for item in value) if isinstance(value, tuple) else value


class ndarray:
    """The array of the stand-in."""

    __module__ = "cupy"
    __slots__ = ("_host",)
    __array_ufunc__ = None  # np.exp(x), and numpy_array + x before it reaches __radd__, are refused
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: np.ndarray):
        self._host = host

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct one explicitly."
        )

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"np.{function.__name__} was called on a CuPy array")

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: self._host.flags)
    real = property(lambda self: ndarray(self._host.real))
    imag = property(lambda self: ndarray(self._host.imag))
    T = property(lambda self: ndarray(self._host.T))

    def get(self) -> np.ndarray:
        return self._host.copy()

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> "ndarray":
        index = _to_host(index if isinstance(index, tuple) else (index,))
        if not any(part is Ellipsis for part in index):
            index = (*index, Ellipsis)  # one number is then a 0-d view, as CuPy's, and not a NumPy scalar
        return ndarray(self._host[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[_to_host(index)] = _to_host(value)

    def __neg__(self) -> "ndarray":
        return _to_device(-self._host)

    def __invert__(self) -> "ndarray":
        return _to_device(~self._host)

    def __abs__(self) -> "ndarray":
        return _to_device(abs(self._host))

    # These wait for the device and bring one number to the host, as in CuPy. There is no __index__, as in CuPy.
    def __bool__(self) -> bool:
        return bool(self._host)

    def __int__(self) -> int:
        return int(self._host)

    def __float__(self) -> float:
        return float(self._host)

    def __complex__(self) -> complex:
        return complex(self._host)

    def __repr__(self) -> str:
        return f"strict_cupy.{self._host!r}"

    def __str__(self) -> str:
        return str(self._host)

    def __format__(self, specification: str) -> str:
        return format(self._host if self._host.ndim else self._host.item(), specification)

    def __copy__(self) -> "ndarray":
        return ndarray(self._host.copy())

    def __deepcopy__(self, memo: dict) -> "ndarray":
        return ndarray(copy.deepcopy(self._host, memo))


def _add_operators() -> None:
    def forward(operation: Any) -> Any:
        return lambda self, other: _to_device(operation(self._host, _to_host(other)))

    def reflected(operation: Any) -> Any:
        return lambda self, other: _to_device(operation(_to_host(other), self._host))

    def in_place(ufunc: np.ufunc) -> Any:
        def method(self: ndarray, other: Any) -> ndarray:
            ufunc(self._host, _to_host(other), out=self._host)  # refuses a cast that loses something, as CuPy
            return self

        return method

    for name in BINARY.split():
        operation = getattr(operator, f"__{name}__")
        setattr(ndarray, f"__{name}__", forward(operation))
        setattr(ndarray, f"__r{name}__", reflected(operation))
    for name in COMPARISONS.split():
        setattr(ndarray, f"__{name}__", forward(getattr(operator, f"__{name}__")))
    for name, ufunc in IN_PLACE.items():
        setattr(ndarray, f"__{name}__", in_place(ufunc))


def _restricted(name: str, function: Any, signature: inspect.Signature, is_method: bool) -> Any:
    """``function`` of NumPy on stand-in arrays, with the arguments that CuPy has and no others."""

    def call(*args: Any, **kwargs: Any) -> Any:
        first, rest = (args[0], args[1:]) if is_method else (None, args)
        try:
            signature.bind(*rest, **kwargs)
        except TypeError as error:
            raise TypeError(f"cupy.{name}: {error}") from None
        rest, kwargs = _to_host(rest), {key: _to_host(value) for key, value in kwargs.items()}
        if is_method:
            return first._host.item() if name == "item" else _to_device(getattr(first._host, name)(*rest, **kwargs))
        return _to_device(function(*rest, **kwargs))

    call.__name__ = name
    return call


def _asarray(a: Any, dtype: Any = None, order: Any = None) -> ndarray:
    """To the device: the one function that takes a NumPy array. Device memory is never host memory, so it copies."""
    if isinstance(a, ndarray):
        return ndarray(np.asarray(a._host, dtype=dtype, order=order))
    return ndarray(np.array(a if isinstance(a, np.ndarray) else _to_host(a), dtype=dtype, order=order, copy=True))


def _array(obj: Any, dtype: Any = None, copy: bool = True) -> ndarray:
    array = _asarray(obj, dtype)
    return ndarray(array._host.copy()) if copy else array


def _asnumpy(a: Any) -> np.ndarray:
    """To the host: a copy."""
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def _build() -> ModuleType:
    _add_operators()
    for name, signature in METHOD_SIGNATURES.items():
        setattr(ndarray, name, _restricted(name, None, signature, is_method=True))
    cupy = ModuleType("cupy", "A strict stand-in for CuPy.")
    for name, signature in FUNCTION_SIGNATURES.items():
        setattr(cupy, name, _restricted(name, getattr(np, name), signature, is_method=False))
    for name in SHARED.split():
        setattr(cupy, name, getattr(np, name))
    cupy.ndarray, cupy.asarray, cupy.array, cupy.asnumpy = ndarray, _asarray, _array, _asnumpy  # type: ignore[attr-defined]
    runtime = SimpleNamespace(getDeviceCount=lambda: 1, memGetInfo=lambda: (2**33, 2**34))
    pool = SimpleNamespace(total_bytes=lambda: 2**20, free_bytes=lambda: 2**10)
    cupy.cuda = SimpleNamespace(runtime=runtime)  # type: ignore[attr-defined]
    cupy.get_default_memory_pool = lambda: pool  # type: ignore[attr-defined]
    return cupy


#: What to put into ``sys.modules["cupy"]``.
module = _build()
