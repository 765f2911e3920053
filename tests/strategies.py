"""What the tests of the ops and losses draw: shapes, options and a seed from Hypothesis, values from the seed.

``OPS`` is the registry that the contract tests (tests/ops/test_contract.py) run over. Values are never drawn one by
one: Hypothesis makes many of them equal, and a gradient has no meaning at a tie of max pooling or the kink of ReLU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from minunet.base.rng import Key
from tests import oracles

seeds = st.integers(0, 2**32 - 1)
batches = st.integers(1, 2)
channels = st.integers(1, 3)
dtypes = st.sampled_from(["float32", "float64"])


class Case(NamedTuple):
    """The arguments of one call, float64 and on the host."""

    inputs: dict[str, Any]  # differentiated, in the order of the gradients; None where an argument is left out
    options: dict[str, Any]  # held fixed
    rng: np.random.Generator  # for more values, such as dy

    def __repr__(self) -> str:
        def brief(value: Any) -> str:
            return f"array{value.shape}" if isinstance(value, np.ndarray) else repr(value)

        return ", ".join(f"{name}={brief(value)}" for name, value in {**self.inputs, **self.options}.items())


@dataclass(frozen=True)
class Op:
    """An op or a loss, and what the contract tests must know of it."""

    name: str
    cases: SearchStrategy[Case]
    oracle: Callable[..., np.ndarray]  # takes the arguments of forward
    is_loss: bool = False  # y is a scalar, and backward takes no dy
    per_image: tuple[str, ...] = ()  # the arguments to slice, if each image of a batch is treated alone
    homogeneous: tuple[tuple[str, ...], ...] = ()  # inputs in which y, without a bias, is linear, at least along a ray


def tie_free(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values between -2 and 2, all different and none 0: a shuffled, evenly spaced line."""
    size = int(np.prod(shape))
    values = (np.arange(size) - size / 2 + 0.25) * (4 / size)
    return rng.permutation(values).reshape(shape)


def case(seed: int, inputs: dict[str, Any], options: dict[str, Any] | None = None) -> Case:
    """A case whose shapes, given as tuples, have become tie-free values."""
    rng = np.random.default_rng(seed)
    values = {name: tie_free(rng, value) if isinstance(value, tuple) else value for name, value in inputs.items()}
    return Case(values, options or {}, rng)


@st.composite
def conv2d_cases(draw: Any) -> Case:
    n, c_in, c_out = draw(batches), draw(channels), draw(channels)
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    padding = draw(st.sampled_from(["same", 0, 1, 2]))
    room = 0 if padding == "same" else 2 * padding
    largest = [4 if padding == "same" else min(4, size + room) for size in (height, width)]
    kernel = [draw(st.integers(1, side)) for side in largest]
    bias = (c_out,) if draw(st.booleans()) else None
    inputs = {"x": (n, height, width, c_in), "weight": (*kernel, c_in, c_out), "bias": bias}
    return case(draw(seeds), inputs, {"stride": draw(st.integers(1, 3)), "padding": padding})


@st.composite
def conv_transpose2d_cases(draw: Any) -> Case:
    n, c_in, c_out = draw(batches), draw(channels), draw(channels)
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    stride = draw(st.integers(1, 3))
    smallest = min(stride * (size - 1) + side for size, side in zip((height, width), kernel, strict=True))
    padding = draw(st.sampled_from(["same", *range(min(3, (smallest + 1) // 2))]))
    bias = (c_out,) if draw(st.booleans()) else None
    inputs = {"x": (n, height, width, c_in), "weight": (*kernel, c_in, c_out), "bias": bias}
    return case(draw(seeds), inputs, {"stride": stride, "padding": padding})


@st.composite
def max_pool2d_cases(draw: Any) -> Case:
    size = draw(st.integers(1, 3))
    shape = (draw(batches), size * draw(st.integers(1, 3)), size * draw(st.integers(1, 3)), draw(channels))
    return case(draw(seeds), {"x": shape}, {"size": size})


@st.composite
def batch_norm2d_cases(draw: Any, training: bool | None = None) -> Case:
    c = draw(channels)
    training = draw(st.booleans()) if training is None else training
    n, height, width = draw(
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)).filter(lambda shape: np.prod(shape) > 1)
    )
    drawn = case(draw(seeds), {"x": (n, height, width, c), "gamma": (c,), "beta": (c,)})
    options = {
        "running_mean": drawn.rng.standard_normal(c),
        "running_var": drawn.rng.uniform(0.1, 2, c),
        "training": training,
        "eps": draw(st.sampled_from([1e-3, 1e-5, 0.5])),
    }
    return drawn._replace(options=options)


@st.composite
def elementwise_cases(draw: Any, scale: float = 1.0) -> Case:
    shape = (draw(batches), draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(channels))
    drawn = case(draw(seeds), {"x": shape})
    return drawn._replace(inputs={"x": scale * drawn.inputs["x"]})


@st.composite
def keys(draw: Any) -> Key:
    small = st.integers(0, 3)
    return Key(draw(seeds), draw(small), draw(small), draw(st.integers(16, 19)), draw(small))


@st.composite
def dropout_cases(draw: Any) -> Case:
    rate = draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9]))
    return draw(elementwise_cases())._replace(options={"rate": rate, "key": draw(st.one_of(keys(), st.none()))})


@st.composite
def concat_cases(draw: Any) -> Case:
    grid = (draw(batches), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return case(draw(seeds), {"up": (*grid, draw(channels)), "skip": (*grid, draw(channels))})


def _target(draw: Any, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A mask, or one with soft edges, with many empty images among them."""
    target = rng.random(shape)
    if not draw(st.booleans()):
        target = (target > draw(st.sampled_from([0.3, 0.8, 1.0]))).astype(float)
    return target


@st.composite
def loss_shapes(draw: Any) -> tuple[int, ...]:
    return draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 2))


smooths = st.sampled_from([0.1, 1.0, 100.0])
overs = st.sampled_from(["batch", "image", "class"])


@st.composite
def dice_loss_cases(draw: Any) -> Case:
    shape = draw(loss_shapes())
    drawn = case(draw(seeds), {"probabilities": shape})
    probabilities = 0.5 + 0.24 * drawn.inputs["probabilities"]
    options = {"target": _target(draw, drawn.rng, shape), "smooth": draw(smooths), "over": draw(overs)}
    return Case({"probabilities": probabilities}, options, drawn.rng)


@st.composite
def bce_with_logits_cases(draw: Any) -> Case:
    shape = draw(loss_shapes())
    drawn = case(draw(seeds), {"logits": shape})
    return Case({"logits": 4 * drawn.inputs["logits"]}, {"target": _target(draw, drawn.rng, shape)}, drawn.rng)


@st.composite
def segmentation_loss_cases(draw: Any) -> Case:
    drawn = draw(bce_with_logits_cases())
    weights = draw(st.sampled_from([(1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0.0, 1.0)]))
    weighted = dict(zip(("dice_weight", "bce_weight"), weights, strict=True))
    return drawn._replace(options={**drawn.options, **weighted, "smooth": draw(smooths), "over": draw(overs)})


@st.composite
def softmax_cases(draw: Any) -> Case:
    # Several pixels: where the dy of the classes of a pixel are alike, its gradient is all rounding.
    shape = (draw(batches), draw(st.integers(2, 4)), draw(st.integers(2, 4)), draw(st.integers(2, 4)))
    return case(draw(seeds), {"x": shape})


def class_target(rng: np.random.Generator, shape: tuple[int, ...], ignored: float, *, soft: bool) -> np.ndarray:
    """One-hot, or with soft edges; a share of the pixels is to be ignored."""
    values = rng.random(shape)
    target = values / values.sum(axis=-1, keepdims=True) if soft else np.eye(shape[3])[values.argmax(axis=-1)]
    return target * (rng.random((*shape[:3], 1)) >= ignored)


@st.composite
def softmax_cross_entropy_cases(draw: Any) -> Case:
    drawn = draw(softmax_cases())
    logits = drawn.inputs["x"]
    ignored, soft = draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.booleans())
    return drawn._replace(
        inputs={"logits": logits}, options={"target": class_target(drawn.rng, logits.shape, ignored, soft=soft)}
    )


@st.composite
def softmax_loss_cases(draw: Any) -> Case:
    drawn = draw(softmax_cross_entropy_cases())
    weights = draw(st.sampled_from([(1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0.0, 1.0)]))
    weighted = dict(zip(("dice_weight", "cross_entropy_weight"), weights, strict=True))
    return drawn._replace(options={**drawn.options, **weighted, "smooth": draw(smooths)})


OPS = [
    Op("conv2d", conv2d_cases(), oracles.conv2d, per_image=("x",), homogeneous=(("x",), ("weight",))),
    Op(
        "conv_transpose2d",
        conv_transpose2d_cases(),
        oracles.conv_transpose2d,
        per_image=("x",),
        homogeneous=(("x",), ("weight",)),
    ),
    Op("max_pool2d", max_pool2d_cases(), oracles.max_pool2d, per_image=("x",), homogeneous=(("x",),)),
    Op("batch_norm2d", batch_norm2d_cases(), oracles.batch_norm2d, homogeneous=(("gamma", "beta"),)),
    Op("relu", elementwise_cases(), oracles.relu, per_image=("x",), homogeneous=(("x",),)),
    Op("sigmoid", elementwise_cases(scale=4), oracles.sigmoid, per_image=("x",)),
    Op("dropout", dropout_cases(), oracles.dropout, homogeneous=(("x",),)),
    Op("concat", concat_cases(), oracles.concat, per_image=("up", "skip"), homogeneous=(("up", "skip"),)),
    Op("dice_loss", dice_loss_cases(), oracles.dice_loss, is_loss=True),
    Op("bce_with_logits", bce_with_logits_cases(), oracles.bce_with_logits, is_loss=True),
    Op("segmentation_loss", segmentation_loss_cases(), oracles.segmentation_loss, is_loss=True),
    Op("softmax", softmax_cases(), oracles.softmax, per_image=("x",)),
    Op("softmax_cross_entropy", softmax_cross_entropy_cases(), oracles.softmax_cross_entropy, is_loss=True),
    Op("softmax_loss", softmax_loss_cases(), oracles.softmax_loss, is_loss=True),
]
