"""What minunet and PyTorch are both given to solve, and minunet's answers. Nothing here needs PyTorch.

A ``Problem`` is data: arrays in minunet's names and layouts, and settings. ``solve`` here answers it with minunet,
``tests.parity.torch_reference.solve`` with PyTorch, and both answers are arrays under the same names, so that
``errors`` can compare them. The part of a name before the first "/" is what is compared together: the gradients of a
call, say, relative to the largest of them. Four kinds of problem:

    op         inputs, options, upstream gradient dy      y, gradients; of batch norm also the batch's statistics
    unet       weights, images, target                    loss, logits, gradients, running statistics
    adamw      weights, the gradients of every step       weights on the way, moments; learning rates, norms
    training   weights, batches                           losses, weights, running statistics, then logits in inference
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from minunet import ops
from minunet.base import archive
from minunet.base.rng import Key
from minunet.network import loss as network_loss
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.training.optim import AdamW, clip_by_global_norm, norms_and_biases, warmup_cosine
from minunet.training.step import train_step, update_running_stats
from tests.strategies import Case, Op, seeds

#: How far apart minunet and PyTorch may be, of the largest value, when both compute in this dtype.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6}

FIXTURES = Path(__file__).with_name("fixtures.npz")

Arrays = dict[str, np.ndarray]


class Problem(NamedTuple):
    kind: str
    settings: dict[str, Any]  # what JSON can hold
    arrays: Arrays

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name} {array.shape}" for name, array in self.arrays.items() if not name.startswith("weights/")
        )
        return f"{self.kind} {self.settings} {shapes}"

    def part(self, name: str) -> Arrays:
        """The arrays ``name/...``, by what follows."""
        return {key.removeprefix(f"{name}/"): array for key, array in self.arrays.items() if key.startswith(f"{name}/")}

    def cast(self, dtype: str) -> "Problem":
        return self._replace(arrays={name: array.astype(dtype) for name, array in self.arrays.items()})


def flat(**parts: Arrays) -> Arrays:
    """One dict of several: ``flat(gradients={"x": dx})`` is ``{"gradients/x": dx}``."""
    return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def errors(found: Arrays, expected: Arrays) -> dict[str, float]:
    """For each group of arrays the largest difference over the largest expected value, all arrays of it together.

    Where all that is expected is 0, what was found must be exactly 0: the error is 0 or infinite.
    """
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    differences: dict[str, float] = {}
    scales: dict[str, float] = {}
    for name, array in expected.items():
        assert found[name].shape == array.shape, f"{name}: {found[name].shape}, {array.shape}"
        assert np.isfinite(found[name]).all(), f"{name} is not finite"
        group = name.partition("/")[0]
        difference = np.abs(found[name].astype("float64") - array).max().item()
        differences[group] = max(differences.get(group, 0.0), difference)
        scales[group] = max(scales.get(group, 0.0), np.abs(array).max().item())
    with np.errstate(divide="ignore"):
        return {
            group: 0.0 if difference == 0 else float(np.divide(difference, scales[group]))
            for group, difference in differences.items()
        }


# --- The frozen problems ----------------------------------------------------------------------------------------------


class Frozen(NamedTuple):
    problem: Problem
    answers: dict[str, Arrays]  # PyTorch's, by the dtype in which it computed


def save_fixtures(frozen: dict[str, Frozen], metadata: dict[str, Any]) -> None:
    """Write problems and PyTorch's answers to the fixture file: a minunet checkpoint, exact, and each array summed.

    What is given is stored in float32, which must hold it exactly: so float64 and float32 start from the same.
    """
    vectors, index = {}, {}
    for name, (problem, answers) in frozen.items():
        given = problem.cast("float32").arrays
        assert all((given[key] == array).all() for key, array in problem.arrays.items()), name
        shapes = {}
        for part, arrays in {"given": given, **answers}.items():
            vectors[f"{name}/{part}"], shapes[part] = pack(arrays)
        index[name] = {"kind": problem.kind, "settings": problem.settings, "shapes": shapes}
    archive.save(FIXTURES, vectors, {**metadata, "problems": index})


def load_fixtures() -> tuple[dict[str, Frozen], dict[str, Any]]:
    """The frozen problems by name; and with which versions and when the answers were made."""
    vectors, metadata = archive.load(FIXTURES)
    frozen = {}
    for name, entry in metadata.pop("problems").items():
        parts = {part: unpack(vectors[f"{name}/{part}"], shapes) for part, shapes in entry["shapes"].items()}
        frozen[name] = Frozen(Problem(entry["kind"], entry["settings"], parts.pop("given")), parts)
    return frozen, metadata


def pack(arrays: Arrays) -> tuple[np.ndarray, dict[str, list[int]]]:
    """One vector of many arrays, whose own headers and sums would take more room than they do; and their shapes."""
    return np.concatenate([array.ravel() for array in arrays.values()]), {n: list(a.shape) for n, a in arrays.items()}


def unpack(vector: np.ndarray, shapes: dict[str, list[int]]) -> Arrays:
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    pieces = np.split(vector, ends[:-1])
    return {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


# --- minunet's answers ------------------------------------------------------------------------------------------------


def solve(problem: Problem) -> Arrays:
    return SOLVERS[problem.kind](problem)


def solve_op(problem: Problem) -> Arrays:
    name, options = problem.settings["op"], options_of(problem)
    module = ops if hasattr(ops, f"{name}_forward") else network_loss
    forward, backward = getattr(module, f"{name}_forward"), getattr(module, f"{name}_backward")
    inputs = problem.part("inputs")
    y, cache = forward(**inputs, **options)
    gradients = backward(cache) if "dy" not in problem.arrays else backward(problem.arrays["dy"], cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    found = [gradient for gradient in gradients if gradient is not None]
    answer = {"y": np.asarray(y), **flat(gradients=dict(zip(inputs, found, strict=True)))}
    if name == "batch_norm2d" and options["training"]:
        answer |= flat(statistics={"mean": cache.batch_mean, "var": cache.batch_var})
    return answer


def options_of(problem: Problem) -> dict[str, Any]:
    """An op's keyword arguments beside those that are differentiated."""
    options = {**problem.settings["options"], **problem.part("options")}
    if options.get("key") is not None:
        options["key"] = Key(*options["key"])
    return options


def solve_unet(problem: Problem) -> Arrays:
    settings, arrays = problem.settings, problem.arrays
    net = build(problem)
    loss = SegmentationLoss(**settings["loss"])
    logits, cache = net.forward(arrays["x"], training=settings["training"], key=Key(*settings["key"]))
    value, loss_cache = loss.forward(logits, arrays["target"])
    dx, grads = net.backward(loss.backward(loss_cache), cache)
    answer = {"loss": np.asarray(value), "logits": logits, **flat(gradients={"x": dx, **grads})}
    if settings["training"]:
        update_running_stats(net, net.batch_stats(cache), settings["momentum"])
        answer |= flat(running=net.buffers())
    return answer


def build(problem: Problem) -> UNet:
    """The network of a problem, with its weights and running statistics."""
    net = UNet(**problem.settings["config"], dtype=str(problem.arrays["x"].dtype))
    live = net.parameters() | net.buffers()
    for name, array in problem.part("weights").items():
        live.pop(name)[...] = array
    assert not live, f"no weights for {sorted(live)}"
    return net


def solve_adamw(problem: Problem) -> Arrays:
    settings, gradients = problem.settings, problem.part("gradients")
    parameters = {name: array.copy() for name, array in problem.part("weights").items()}
    optimizer = AdamW(parameters, **settings["optimizer"])
    answer: Arrays = {}
    rates, norms = [], []
    for step in range(settings["steps"]):
        grads, norm = clip_by_global_norm({name: array[step] for name, array in gradients.items()}, settings["clip"])
        rates.append(warmup_cosine(step, settings["steps"], **settings["schedule"]))
        norms.append(norm)
        optimizer.step(grads, rates[-1])
        if step + 1 in settings["snapshots"]:
            answer |= {f"weights/{step + 1}/{name}": array.copy() for name, array in parameters.items()}
    moments = {"first_moment": optimizer.first_moment, "second_moment": optimizer.second_moment}
    return {**answer, **flat(**moments), "learning_rates": np.array(rates), "norms": np.array(norms)}


def solve_training(problem: Problem) -> Arrays:
    settings, arrays = problem.settings, problem.arrays
    net = build(problem)
    optimizer = AdamW(net.parameters(), **settings["optimizer"], no_decay=norms_and_biases(net.parameters()))
    loss = SegmentationLoss(**settings["loss"])
    values = []
    for step, (x, target) in enumerate(zip(arrays["x"], arrays["target"], strict=True)):
        value, _ = train_step(
            net,
            optimizer,
            x,
            target,
            loss,
            Key(*settings["key"])._replace(step=step),
            lr=warmup_cosine(step, settings["steps"], **settings["schedule"]),
            clip_norm=settings["clip"],
            batch_norm_momentum=settings["momentum"],
        )
        values.append(value)
    logits, _ = net.forward(arrays["x"][0], training=False)
    return {"losses": np.array(values), "logits": logits, **flat(weights=net.parameters(), running=net.buffers())}


SOLVERS: dict[str, Callable[[Problem], Arrays]] = {
    "op": solve_op,
    "unet": solve_unet,
    "adamw": solve_adamw,
    "training": solve_training,
}


# --- Problems made of random numbers ----------------------------------------------------------------------------------


def op_problem(name: str, case: Case, *, is_loss: bool = False) -> Problem:
    """The problem of a case of tests.strategies, with a random upstream gradient (a loss takes none)."""
    inputs = {key: value for key, value in case.inputs.items() if value is not None}
    absent = {key: None for key, value in case.inputs.items() if value is None}
    tables = {key: value for key, value in case.options.items() if isinstance(value, np.ndarray)}
    plain = {key: value for key, value in case.options.items() if key not in tables}
    problem = Problem("op", {"op": name, "options": {**plain, **absent}}, flat(inputs=inputs, options=tables))
    if not is_loss:
        forward = getattr(ops, f"{name}_forward")
        y, _ = forward(**inputs, **options_of(problem))
        problem.arrays["dy"] = case.rng.standard_normal(y.shape)
    return problem


def random_weights(config: dict[str, Any], rng: np.random.Generator) -> Arrays:
    """Weights and running statistics for ``UNet(**config)``, with nothing left at the 0 or 1 where it starts.

    The shifts of batch norm are positive, so that no channel is dead: what is constant in theory is rounding noise in
    practice, and its signs and maxima differ from library to library.
    """
    net = UNet(**config, dtype="float64")
    draws = {
        "gamma": lambda a: rng.uniform(0.5, 1.5, a.shape),
        "beta": lambda a: rng.uniform(0.05, 0.5, a.shape),
        "bias": lambda a: rng.standard_normal(a.shape) / 2,
        "running_mean": lambda a: rng.standard_normal(a.shape) / 2,
        "running_var": lambda a: rng.uniform(0.3, 2, a.shape),
        "weight": lambda a: a * rng.uniform(0.5, 2),
    }
    return {name: draws[name.rpartition(".")[2]](a) for name, a in (net.parameters() | net.buffers()).items()}


def unet_problem(config: dict[str, Any], shape: tuple[int, int, int], seed: int, **settings: Any) -> Problem:
    """One pass over ``shape`` = (N, H, W) random images."""
    rng = np.random.default_rng(seed)
    defaults = {"training": True, "momentum": 0.9, "key": list(Key(seed=seed, step=3)), "loss": {}}
    arrays = {
        "x": rng.standard_normal((*shape, config["in_channels"])),
        "target": (rng.random((*shape, config["out_channels"])) > 0.7).astype(float),
        **flat(weights=random_weights(config, rng)),
    }
    return Problem("unet", {"config": config, **defaults, **settings}, arrays)


def adamw_problem(shapes: dict[str, tuple[int, ...]], seed: int, steps: int = 100, **settings: Any) -> Problem:
    """Random weights, and gradients whose size changes from step to step, so that some are clipped and some are not.

    Those of the last parameter are of the size of eps, so that it matters where eps is added.
    """
    rng = np.random.default_rng(seed)
    defaults = {
        "steps": steps,
        "snapshots": [1, steps],
        "clip": 1.0,
        "optimizer": {"weight_decay": 0.01, "no_decay": [next(iter(shapes))]},
        "schedule": {"peak": 0.05, "warmup_steps": steps // 10, "final": 0.001},
    }
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    sizes = 10 ** rng.uniform(-1.5, 1, steps) / np.sqrt(total)
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    gradients = {
        name: rng.standard_normal((steps, *shape)) * sizes.reshape(-1, *(1 for _ in shape))
        for name, shape in shapes.items()
    }
    gradients[list(shapes)[-1]] *= 1e-7
    return Problem("adamw", {**defaults, **settings}, flat(weights=weights, gradients=gradients))


def training_problem(config: dict[str, Any], shape: tuple[int, int, int], seed: int, steps: int) -> Problem:
    """``steps`` steps of training, each on other images."""
    problem = unet_problem(config, shape, seed)
    rng = np.random.default_rng([seed, 1])
    masks = rng.random((steps, *shape, config["out_channels"])) > 0.7
    batches = {"x": rng.standard_normal((steps, *shape, config["in_channels"])), "target": masks.astype(float)}
    settings = {
        "steps": steps,
        "clip": 0.5,
        "optimizer": {"weight_decay": 0.01},
        "schedule": {"peak": 0.01, "warmup_steps": 2},
    }
    return Problem("training", {**problem.settings, **settings}, {**problem.arrays, **batches})


# --- Problems drawn by Hypothesis -------------------------------------------------------------------------------------


def drawn_op(op: Op) -> st.SearchStrategy[Problem]:
    return op.cases.map(lambda case: op_problem(op.name, case, is_loss=op.is_loss))


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    return {
        "in_channels": draw(st.integers(1, 3)),
        "out_channels": draw(st.integers(1, 2)),
        "widths": draw(st.lists(st.integers(2, 5), min_size=1, max_size=3)),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "up_kernel": draw(st.sampled_from([2, 3])),
        "head_kernel": draw(st.sampled_from([1, 3])),
        "conv_bias": draw(st.booleans()),
        "batch_norm_eps": draw(st.sampled_from([1e-3, 0.1])),
    }


@st.composite
def drawn_unet(draw: Any) -> Problem:
    config = draw(configs())
    multiple = 2 ** (len(config["widths"]) - 1)
    # At least four values a channel at the bottom: the variance of fewer may be so small that it magnifies rounding.
    shape = draw(st.integers(1, 2)), multiple * draw(st.integers(2, 3)), multiple * draw(st.integers(2, 3))
    loss = {"over": draw(st.sampled_from(["batch", "image"])), "bce_weight": draw(st.sampled_from([0.0, 1.0]))}
    return unet_problem(config, shape, draw(seeds), training=draw(st.booleans()), loss=loss)


@st.composite
def drawn_adamw(draw: Any) -> Problem:
    sides = st.integers(1, 4)
    shapes = {"a.bias": (draw(sides),), "a.weight": (draw(sides), draw(sides)), "b.weight": (draw(sides),)}
    steps = draw(st.integers(1, 100))
    warmup = draw(st.integers(0, steps - 1))
    optimizer = {
        "betas": [draw(st.sampled_from([0.0, 0.5, 0.9])), draw(st.sampled_from([0.9, 0.99, 0.999]))],
        "eps": draw(st.sampled_from([1e-7, 1e-8, 1e-3])),
        "weight_decay": draw(st.sampled_from([0.0, 0.004, 0.1])),
        "no_decay": draw(st.sampled_from([[], ["a.bias"]])),
    }
    return adamw_problem(
        shapes,
        draw(seeds),
        steps,
        clip=draw(st.sampled_from([0.1, 1.0])),
        optimizer=optimizer,
        schedule={"peak": 0.05, "warmup_steps": warmup, "final": draw(st.sampled_from([0.0, 0.001]))},
    )


@st.composite
def drawn_training(draw: Any) -> Problem:
    # A bias before a batch norm has gradient 0, so what is left of it is rounding noise, and AdamW makes steps of it.
    config = {**draw(configs()), "conv_bias": False}
    multiple = 2 ** (len(config["widths"]) - 1)
    return training_problem(config, (2, 2 * multiple, 2 * multiple), draw(seeds), steps=draw(st.integers(3, 8)))
