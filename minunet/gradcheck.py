"""Is a backward pass right? Its gradient against a derivative that only ever ran the forward pass.

A backward pass is derived by hand, so a sign, a transpose or a forgotten term can be wrong, and training
often still works, a little worse. The check needs no second derivation: wiggle one input number of the
scalar function ``L``, watch ``L``, and compare with what the backward pass says about that number.

**Central differences** wiggle by a small real step ``h``::

    dL/dx = (L(x + h) - L(x - h)) / 2h  +  O(h^2)

A large ``h`` leaves the curvature in; a small one subtracts two numbers that agree in nearly all of their
digits. The best compromise in float64, ``h`` about 1e-5, still loses 5 to 6 of the 16 digits, so a small mistake
hides behind the tolerance that the method itself needs. And if a kink (ReLU at 0, a tie in max pooling) lies between
the two points, the result is the slope of neither side. A kink gives itself away: the slopes before and after the
point differ. Then a smaller step is taken, which leaves the kink outside.

**The complex step** (Squire & Trapp 1998, SIAM Review 40(1), 110-112; Martins, Sturdza & Alonso 2003, ACM TOMS
29(3), 245-262) wiggles along the imaginary axis. Taylor's series of an analytic ``L`` with real coefficients is ::

    L(x + ih) = L(x) + ih L'(x) - h^2 L''(x)/2 - i h^3 L'''(x)/6 + ...      so      Im L(x + ih) / h = L'(x) + O(h^2)

Nothing is subtracted: the derivative stands alone in the imaginary part, in a floating-point number of its
own. So ``h`` can be 1e-20. What remains of the higher derivatives, 1e-40 times one of them, is far below one
rounding error, and the derivative comes out with all of its 16 digits. As the real part does not move, no kink is
crossed. The price: every line of the forward pass must be right for complex numbers. It compares on ``.real``, and
never calls ``abs`` or ``float``, nor casts the imaginary part away.

**The error** is one number for a whole call: the largest difference between backward pass and derivative, divided
by the largest gradient, both taken over all inputs together. Together, because some true gradients are exactly zero
(that of a convolution's bias before batch normalisation), and a rounding error divided by itself says nothing.
There is no absolute tolerance, which a gradient of 1e-9 would pass with any mistake in it. If every gradient is 0,
each derivative must be exactly 0.

>>> from minunet.ops import sigmoid_forward, sigmoid_backward
>>> x = np.linspace(-3, 3, 8).reshape(1, 2, 2, 2)
>>> check_op(sigmoid_forward, sigmoid_backward, {"x": x}).ok(1e-12)
True
>>> print(check_op(sigmoid_forward, lambda dy, cache: 2 * sigmoid_backward(dy, cache), {"x": x}))  # doctest: +ELLIPSIS
sigmoid_forward: error 5.0e-01 (complex step, largest gradient ...)
  x  5.0e-01  worst at [...]: backward ..., derivative ..., difference ...

``python -m minunet.gradcheck`` checks everything that minunet differentiates and prints one table.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minunet import ops
from minunet.base import cli
from minunet.base.backend import Array, array_module
from minunet.base.choices import check_choice
from minunet.base.rng import Key
from minunet.network import loss as network_loss
from minunet.network.blocks import DoubleConv
from minunet.network.layers import BatchNorm2d, Conv2d, ConvTranspose2d, Dropout, map_arrays
from minunet.network.loss import Loss, SegmentationLoss, SoftmaxLoss
from minunet.network.unet import UNet

#: Error below which a complex-step check passes: a few thousand rounding errors of float64 (2e-16 each).
TOLERANCE = 1e-12
#: Error that central differences leave even where the backward pass is right (see above).
CENTRAL_TOLERANCE = 1e-6

Method = Literal["complex", "central"]

#: The name of a comparison along a random direction through all inputs.
TOGETHER = "(together)"

_DEFAULT_LOSS = SegmentationLoss()


@dataclass(frozen=True)
class Comparison:
    """One derivative, found in two ways."""

    name: str  # of the input, or TOGETHER
    index: tuple[int, ...] | None  # of the element; None: along a random direction
    analytic: float  # what the backward pass says
    numeric: float  # what the forward pass shows

    @property
    def difference(self) -> float:
        """How far the two are apart."""
        return abs(self.analytic - self.numeric)


@dataclass(frozen=True)
class Report:
    """What a check found. ``print`` it: it says what differs, where and by how much."""

    title: str
    method: str  # "complex step" or "central difference"
    largest: float  # the largest |gradient| of the backward pass, over all elements of all inputs
    comparisons: tuple[Comparison, ...]

    def _relative(self, difference: float) -> float:
        if self.largest == 0:
            return 0.0 if difference == 0 else float("inf")
        return difference / self.largest

    @property
    def worst(self) -> dict[str, Comparison]:
        """For each input, the comparison that differs most; a NaN differs more than any number."""

        def rank(comparison: Comparison) -> tuple[bool, float]:
            return bool(np.isnan(comparison.difference)), comparison.difference

        worst: dict[str, Comparison] = {}
        for comparison in self.comparisons:
            if comparison.name not in worst or rank(comparison) > rank(worst[comparison.name]):
                worst[comparison.name] = comparison
        return worst

    @property
    def errors(self) -> dict[str, float]:
        """The error of each input: its largest difference over the largest gradient of the whole call."""
        return {name: self._relative(comparison.difference) for name, comparison in self.worst.items()}

    @property
    def error(self) -> float:
        """The largest of ``errors``; NaN if one of them is NaN."""
        return float(np.max(list(self.errors.values())))

    def ok(self, tolerance: float = TOLERANCE) -> bool:
        """Whether the error is at most ``tolerance``. For central differences pass ``CENTRAL_TOLERANCE``."""
        return self.error <= tolerance  # False for NaN

    def __str__(self) -> str:
        lines = [f"{self.title}: error {self.error:.1e} ({self.method}, largest gradient {self.largest:.4g})"]
        width = max(len(name) for name in self.worst)
        for name, worst in self.worst.items():
            where = "along a random direction" if worst.index is None else f"at {list(worst.index)}"
            lines.append(
                f"  {name:{width}}  {self.errors[name]:.1e}  worst {where}: backward {worst.analytic:.17g}, "
                f"derivative {worst.numeric:.17g}, difference {worst.difference:.1e}"
            )
        return "\n".join(lines)


# --- The two methods ------------------------------------------------------------------------------------------


def complex_step(
    function: Callable[..., Array],
    inputs: Mapping[str, Array],
    gradients: Mapping[str, Array],
    *,
    step: float = 1e-20,
    title: str = "function",
    **sampling: int,
) -> Report:
    """Compare ``gradients`` with the imaginary part of ``function`` after an imaginary step.

    function:  ``function(**inputs) -> scalar``, right for complex numbers; it gets every floating array of
               ``inputs`` as complex128.
    inputs:    name -> array (any shape) or None for an argument that is left out.
    gradients: name -> d function / d input, of the shape of the input. Inputs that are not named are held fixed.
    sampling:  what is compared, by these numbers. Each number of an input that has at most ``exhaustive`` (64) of
               them; of a larger input ``samples`` (8) numbers, which tell where a mistake is, and the slopes along
               ``directions`` (2) random directions, to which all its numbers contribute. And the slopes along
               ``together`` (1) random directions through all inputs at once. All is drawn by ``seed`` (0).

    Raises ValueError if a gradient has another shape than its input, or if the result is a real number.

    >>> x = np.array([1.0, 2.0, 3.0])
    >>> complex_step(lambda x: (x**3).sum(), {"x": x}, {"x": 3 * x**2}).error <= 1e-15
    True
    """
    point = {name: _cast(x, np.complex128) for name, x in inputs.items()}

    def derivative(direction: Mapping[str, Array]) -> float:
        value = function(**{**point, **{name: point[name] + 1j * step * d for name, d in direction.items()}})
        if np.dtype(value.dtype).kind != "c":
            raise ValueError(
                f"function must keep the imaginary part, got a {value.dtype} result: "
                "look for abs, float(), norm or a cast in the forward pass"
            )
        return float(value.imag) / step

    return _compare(derivative, inputs, gradients, title, "complex step", **sampling)


def central_difference(
    function: Callable[..., Array],
    inputs: Mapping[str, Array],
    gradients: Mapping[str, Array],
    *,
    step: float = 1e-5,
    title: str = "function",
    **sampling: int,
) -> Report:
    """Compare ``gradients`` with the slope of ``function`` between ``step`` before and ``step`` after.

    Arguments as in :func:`complex_step`; ``function`` gets every floating array as float64. The default step is near
    the cube root of a rounding error (6e-6), where rounding and curvature harm equally. Where the slopes on
    the two sides differ by more than a thousandth, as at a kink, the step is made ten times smaller, at most twice.

    >>> x = np.array([1.0, 2.0, 3.0])
    >>> 1e-15 < central_difference(lambda x: (x**3).sum(), {"x": x}, {"x": 3 * x**2}).error < 1e-9
    True
    """
    point = {name: _cast(x, np.float64) for name, x in inputs.items()}

    here = float(function(**point))

    def derivative(direction: Mapping[str, Array]) -> float:
        for h in (step, step / 10, step / 100):
            after = function(**{**point, **{name: point[name] + h * d for name, d in direction.items()}})
            before = function(**{**point, **{name: point[name] - h * d for name, d in direction.items()}})
            right, left = (float(after) - here) / h, (here - float(before)) / h
            if abs(right - left) <= 1e-3 * max(abs(right), abs(left)):
                break
        return (right + left) / 2

    return _compare(derivative, inputs, gradients, title, "central difference", **sampling)


METHODS: dict[Method, Callable[..., Report]] = {"complex": complex_step, "central": central_difference}


def _compare(
    derivative: Callable[[Mapping[str, Array]], float],
    inputs: Mapping[str, Array],
    gradients: Mapping[str, Array],
    title: str,
    method: str,
    *,
    exhaustive: int = 64,
    samples: int = 8,
    directions: int = 2,
    together: int = 1,
    seed: int = 0,
) -> Report:
    """Compare ``gradients`` with ``derivative(direction)``, the slope along a direction: name -> array.

    The slope in one number is that along the direction which is 1 there and 0 elsewhere.
    """
    if not gradients:
        raise ValueError("gradients must name at least one input, got none: nothing would be checked")
    rng = np.random.default_rng(seed)
    comparisons, largest = [], 0.0

    def compare_along_random(name: str, parts: Mapping[str, Array]) -> None:
        direction = _random_direction(parts, rng)
        analytic = sum(float((gradients[part] * d).sum()) for part, d in direction.items())
        comparisons.append(Comparison(name, None, analytic, derivative(direction)))

    for name, gradient in gradients.items():
        if name not in inputs or inputs[name] is None:
            raise ValueError(f"gradients must be of given inputs, got one of {name!r}")
        x = inputs[name]
        xp = array_module(x)
        if gradient.shape != x.shape:
            raise ValueError(f"the gradient of {name} must have its shape {x.shape}, got {gradient.shape}")
        if x.size == 0:
            raise ValueError(f"{name} must hold at least one number, got shape {x.shape}: nothing would be checked")
        largest = float(np.max([largest, float(xp.abs(gradient).max())]))  # np.max keeps a NaN
        chosen = (
            range(x.size) if x.size <= exhaustive else sorted(rng.choice(x.size, min(samples, x.size), replace=False))
        )
        for flat in chosen:
            index = tuple(int(i) for i in np.unravel_index(flat, x.shape))
            one = xp.zeros(x.shape)
            one[index] = 1.0
            comparisons.append(Comparison(name, index, float(gradient[index]), derivative({name: one})))
        for _ in range(directions if x.size > exhaustive else 0):
            compare_along_random(name, {name: x})
    for _ in range(together):
        compare_along_random(TOGETHER, {name: inputs[name] for name in gradients})
    if not comparisons:
        raise ValueError("sampling must compare something, got zeros")
    return Report(title, method, largest, tuple(comparisons))


def _random_direction(inputs: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """A random unit vector in the space of all ``inputs`` together, each part on the device of its input."""
    parts = {name: rng.standard_normal(x.shape) for name, x in inputs.items()}
    length = np.sqrt(sum((part**2).sum() for part in parts.values()))
    return {name: array_module(inputs[name]).asarray(part / length) for name, part in parts.items()}


def _cast(x: Array, dtype: type) -> Array:
    """A copy of a floating array in ``dtype``; anything else (integers, None, options of an op) as it is."""
    is_floating = hasattr(x, "astype") and x.dtype.kind == "f"
    return x.astype(dtype) if is_floating else x


# --- One call each for an op, a layer, a network ---------------------------------------------------------------


def check_op(
    forward: Callable[..., tuple[Array, Any]],
    backward: Callable[..., Any],
    inputs: Mapping[str, Array],
    seed: int = 0,
    method: Method = "complex",
    sampling: Mapping[str, int] | None = None,
    **options: Any,
) -> Report:
    """Check ``backward`` of an op or of a loss, in float64.

    forward:  ``forward(**inputs, **options) -> y, cache``. An op's ``y`` is an array: what is differentiated is then
              ``sum(dy * y)`` with a random ``dy``. (With ``dy`` all ones, a mistake that cancels in the sum over the
              outputs stays unseen.) A loss' ``y`` is a scalar already.
    backward: ``backward(dy, cache)``, or ``backward(cache)`` for a loss; it returns one gradient, or a tuple of them
              in the order of ``inputs``. The gradient of an input that is None must be None.
    inputs:   the arguments to differentiate, by name. Arguments to hold fixed go into ``options``.
    sampling: those of :func:`complex_step`, in a dict.
    """
    check_choice("method", method, Method)
    inputs = {name: _cast(x, np.float64) for name, x in inputs.items()}

    def call(**arrays: Array) -> tuple[Array, Any]:
        """Forward, with the arrays among the options in the dtype of the inputs."""
        dtype = next(x.dtype for x in arrays.values() if x is not None)
        return forward(**arrays, **{name: _cast(value, dtype) for name, value in options.items()})

    y, cache = call(**inputs)
    if y.ndim == 0:
        gradients, dy = backward(cache), None
    else:
        dy = _random_like(y, seed)
        gradients = backward(dy, cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    if len(gradients) != len(inputs):
        raise ValueError(f"backward must return a gradient for each of {list(inputs)}, got {len(gradients)}")
    named = dict(zip(inputs, gradients, strict=True))
    for name, gradient in named.items():
        if (gradient is None) != (inputs[name] is None):
            raise ValueError(
                f"the gradient of {name} must be None where {name} is None, and only there, got {gradient}"
            )

    def function(**arrays: Array) -> Array:
        y, _ = call(**arrays)
        return y if dy is None else (dy * y).sum()

    given = {name: gradient for name, gradient in named.items() if gradient is not None}
    title = getattr(forward, "__name__", "op")
    return METHODS[method](function, inputs, given, title=title, seed=seed, **(sampling or {}))


def check_layer(
    layer: Any,
    x: Array,
    seed: int = 0,
    method: Method = "complex",
    sampling: Mapping[str, int] | None = None,
    **options: Any,
) -> Report:
    """Check the gradients of a layer, a block or a network in its input and in each of its parameters, in float64.

    layer:   ``layer.forward(x, **options) -> y, cache``; ``layer.backward(dy, cache) -> dx, grads``;
             ``layer.parameters()`` with the names of ``grads``. It is not changed: copies of it are.
    options: such as ``training=True`` and ``key=...``, the same at every call, so that dropout draws the same mask.

    Raises ValueError if ``grads`` and ``parameters()`` differ in their names.
    """
    check_choice("method", method, Method)
    layer64, x64 = map_arrays(layer, lambda a: _cast(a, np.float64)), _cast(x, np.float64)
    y, cache = layer64.forward(x64, **options)
    dy = _random_like(y, seed)
    dx, grads = layer64.backward(dy, cache)

    def function(trial: Any, x: Array) -> Array:
        return (dy * trial.forward(x, **options)[0]).sum()

    return _check_owner(layer64, x64, function, dx, grads, seed, method, sampling)


def check_net(
    net: UNet,
    x: Array,
    target: Array,
    loss: Loss = _DEFAULT_LOSS,
    key: Key | None = None,
    seed: int = 0,
    method: Method = "complex",
    sampling: Mapping[str, int] | None = None,
) -> Report:
    """Check a whole network's gradient of the loss: in the image and in every parameter, in float64.

    The network trains: batch norm uses the batch's statistics, and dropout is on, with the same ``key`` at every call.

    x:      (N, H, W, C), H and W multiples of 2^depth.
    target: (N, H, W, out_channels).
    loss:   anything with ``forward(logits, target) -> scalar, cache`` and ``backward(cache) -> dlogits``.
    """
    check_choice("method", method, Method)
    net64, x64, target = (
        map_arrays(net, lambda a: _cast(a, np.float64)),
        _cast(x, np.float64),
        _cast(target, np.float64),
    )
    logits, cache = net64.forward(x64, training=True, key=key)
    _, loss_cache = loss.forward(logits, target)
    dx, grads = net64.backward(loss.backward(loss_cache), cache)

    def function(trial: UNet, x: Array) -> Array:
        logits, _ = trial.forward(x, training=True, key=key)
        return loss.forward(logits, target)[0]

    return _check_owner(net64, x64, function, dx, grads, seed, method, sampling)


def _check_owner(
    owner: Any,
    x: Array,
    function: Callable[[Any, Array], Array],
    dx: Array,
    grads: Mapping[str, Array],
    seed: int,
    method: Method,
    sampling: Mapping[str, int] | None,
) -> Report:
    """Check ``function(owner, x)`` in ``x`` and in the parameters that ``owner`` (a layer or a network) owns."""
    parameters = owner.parameters()
    if set(grads) != set(parameters):
        raise ValueError(f"grads must name the parameters, got a difference in {sorted(set(grads) ^ set(parameters))}")

    def with_parameters(x: Array, **values: Array) -> Array:
        trial = map_arrays(owner, lambda a: _cast(a, x.dtype))
        for name, parameter in trial.parameters().items():
            parameter[...] = values[name]
        return function(trial, x)

    title = type(owner).__name__
    inputs, gradients = {"x": x, **parameters}, {"x": dx, **grads}
    return METHODS[method](with_parameters, inputs, gradients, title=title, seed=seed, **(sampling or {}))


def _random_like(y: Array, seed: int) -> Array:
    """A random upstream gradient for ``y``, on its device."""
    return array_module(y).asarray(np.random.default_rng([seed, 1]).standard_normal(y.shape))


# --- Everything that minunet differentiates, in one table -----------------------------------------------------------


def everything() -> dict[str, dict[str, Callable[[Method], Report]]]:
    """Part -> name -> check, where ``check("complex")`` or ``check("central")`` gives the report."""
    rng = np.random.default_rng(0)
    key = Key(seed=0)

    def images(channels: int, size: int = 4) -> np.ndarray:
        return rng.standard_normal((2, size, size, channels))

    def kernel(size: int) -> np.ndarray:
        return rng.standard_normal((size, size, 3, 2))

    def op(name: str, inputs: dict[str, Any], **options: Any) -> Callable[[Method], Report]:
        module = ops if hasattr(ops, f"{name}_forward") else network_loss
        forward, backward = getattr(module, f"{name}_forward"), getattr(module, f"{name}_backward")
        return lambda method: check_op(forward, backward, inputs, method=method, **options)

    def layer(owner: Any, **options: Any) -> Callable[[Method], Report]:
        x = images(3)
        return lambda method: check_layer(owner, x, method=method, **options)

    def classes(size: int = 4) -> np.ndarray:
        """One of three classes for each pixel, as one-hot; or none, where all three are 0."""
        return np.eye(4, 3, dtype="uint8")[rng.integers(0, 4, (2, size, size))]

    def network(loss: Loss = _DEFAULT_LOSS, **config: Any) -> Callable[[Method], Report]:
        net = UNet(widths=(2, 3, 4), dropout=0.3, **config)
        x, target = images(3, size=8), (images(net.config["out_channels"], size=8) > 0).astype("uint8")
        if net.config["output"] == "softmax":
            target = classes(size=8)
        sampling = {"exhaustive": 4, "samples": 2, "directions": 1}
        return lambda method: check_net(net, x, target, loss, key=key, method=method, sampling=sampling)

    bias = rng.standard_normal(2)
    norm = {"x": images(3), "gamma": rng.standard_normal(3), "beta": rng.standard_normal(3)}
    running = {"running_mean": rng.standard_normal(3), "running_var": rng.random(3) + 0.5}
    probabilities, logits, target = rng.random((2, 4, 4, 1)), images(1), (images(1) > 0).astype("uint8")
    return {
        "op": {
            "conv2d 3x3": op("conv2d", {"x": images(3), "weight": kernel(3), "bias": bias}),
            "conv2d 2x2, stride 2, padding 1": op(
                "conv2d", {"x": images(3), "weight": kernel(2), "bias": None}, stride=2, padding=1
            ),
            "conv_transpose2d 3x3": op("conv_transpose2d", {"x": images(3), "weight": kernel(3), "bias": bias}),
            "conv_transpose2d 2x2": op("conv_transpose2d", {"x": images(3), "weight": kernel(2), "bias": None}),
            "max_pool2d": op("max_pool2d", {"x": images(3)}),
            "batch_norm2d, training": op("batch_norm2d", norm, training=True, **running),
            "batch_norm2d, inference": op("batch_norm2d", norm, training=False, **running),
            "relu": op("relu", {"x": images(3)}),
            "sigmoid": op("sigmoid", {"x": 4 * images(3)}),
            "softmax": op("softmax", {"x": 4 * images(3)}),
            "dropout": op("dropout", {"x": images(3)}, rate=0.3, key=key),
            "concat": op("concat", {"up": images(3), "skip": images(2)}),
        },
        "loss": {
            "dice_loss, over the batch": op("dice_loss", {"probabilities": probabilities}, target=target),
            "dice_loss, over each image": op(
                "dice_loss", {"probabilities": probabilities}, target=target, over="image"
            ),
            "dice_loss, over each class": op(
                "dice_loss", {"probabilities": rng.random((2, 4, 4, 3))}, target=classes(), over="class"
            ),
            "bce_with_logits": op("bce_with_logits", {"logits": logits}, target=target),
            "softmax_cross_entropy": op("softmax_cross_entropy", {"logits": images(3)}, target=classes()),
            "segmentation: dice + bce": op("segmentation_loss", {"logits": logits}, target=target),
            "softmax: dice + cross entropy": op("softmax_loss", {"logits": images(3)}, target=classes()),
        },
        "layer": {
            "Conv2d": layer(Conv2d(3, 2)),
            "ConvTranspose2d": layer(ConvTranspose2d(3, 2)),
            "BatchNorm2d": layer(BatchNorm2d(3), training=True),
            "Dropout": layer(Dropout(0.3), key=key),
            "DoubleConv": layer(DoubleConv(3, 2, conv_bias=True, generator=rng, dtype="float64"), training=True),
        },
        "net": {
            "UNet, depth 2": network(),
            "UNet, 2 masks, up 2x2, no conv bias": network(out_channels=2, up_kernel=2, conv_bias=False),
            "UNet, 3 classes, softmax": network(SoftmaxLoss(), out_channels=3, output="softmax"),
        },
    }


def main(arguments: list[str], program: str = "python -m minunet.gradcheck") -> None:
    """Print the table. Leaves with exit code 1 if a gradient is wrong; ``program`` is how the command line begins."""
    cli.Parser(
        prog=program, description="Check every gradient of minunet against two other ways of differentiating."
    ).parse_args(arguments)
    start = time.perf_counter()
    print("Gradients of the backward passes against derivatives of the forward passes, in float64.")
    print("Error: largest difference / largest gradient. The networks train: batch norm on the batch, dropout on.\n")
    print(f"{'':5}  {'':36}  {'compared':>8}  {'complex step':>12}  {'central difference':>18}")
    print(f"{'':5}  {'tolerance':36}  {'':8}  {TOLERANCE:12.0e}  {CENTRAL_TOLERANCE:18.0e}")
    failed = []
    for part, checks in everything().items():
        print("-" * 87)
        for name, check in checks.items():
            report, classic = check("complex"), check("central")
            ok = report.ok() and classic.ok(CENTRAL_TOLERANCE)
            if not ok:
                failed += [report, classic]
            verdict = "" if ok else "  WRONG"
            compared = len(report.comparisons)
            print(f"{part:5}  {name:36}  {compared:8}  {report.error:12.1e}  {classic.error:18.1e}{verdict}")
            part = ""
    print("-" * 87)
    for report in failed:
        print(f"\n{report}")
    print("wrong" if failed else f"all right, in {time.perf_counter() - start:.1f} s")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(cli.run(main))
