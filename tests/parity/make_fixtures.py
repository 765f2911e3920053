"""Freeze PyTorch's answers: write tests/parity/fixtures.npz. The one place where the frozen problems are listed.

    python -m tests.parity.make_fixtures        needs PyTorch; the file that stands was made by 2.13.0

tests/parity/test_frozen.py holds minunet against the file, without PyTorch. The file has what was given, so that
it does not depend on NumPy's streams of random numbers, and the versions and the date.
"""

from datetime import date
from typing import get_args

import numpy as np
import torch

from minunet.base.rng import Key
from minunet.ops.dice_loss import Over
from tests.parity import torch_reference
from tests.parity.problems import (
    FIXTURES,
    Frozen,
    Problem,
    adamw_problem,
    op_problem,
    save_fixtures,
    training_problem,
    unet_problem,
)
from tests.strategies import OPS, Case, class_target


def conv(x: tuple, weight: tuple, *, bias: bool, seed: int, **options: object) -> Case:
    rng = np.random.default_rng(seed)
    shape = {"x": x, "weight": weight, "bias": weight[-1:]}
    inputs = {name: rng.standard_normal(side) if name != "bias" or bias else None for name, side in shape.items()}
    return Case(inputs, options, rng)


def norm(seed: int, *, training: bool, eps: float) -> Case:
    rng = np.random.default_rng(seed)
    inputs = {
        "x": 3 + 2 * rng.standard_normal((2, 4, 3, 3)),
        "gamma": rng.uniform(0.5, 2, 3),
        "beta": rng.normal(size=3),
    }
    running = {"running_mean": rng.standard_normal(3), "running_var": rng.uniform(0.1, 2, 3)}
    return Case(inputs, {**running, "training": training, "eps": eps}, rng)


def images(seed: int, scale: float = 1.0, **options: object) -> Case:
    rng = np.random.default_rng(seed)
    return Case({"x": scale * rng.standard_normal((2, 6, 6, 3))}, options, rng)


def prediction(argument: str, seed: int, **options: object) -> Case:
    """Three images of two classes; the last image has an empty mask."""
    rng = np.random.default_rng(seed)
    shape = (3, 5, 4, 2)
    values = rng.uniform(0.02, 0.98, shape) if argument == "probabilities" else 8 * rng.standard_normal(shape)
    target = (rng.random(shape) > 0.6).astype(float)
    target[-1] = 0
    return Case({argument: values}, {"target": target, **options}, rng)


def of_classes(seed: int, *, soft: bool = False, **options: object) -> Case:
    """Three images of four classes; some pixels of the first two are to be ignored, and all of the last."""
    rng = np.random.default_rng(seed)
    shape = (3, 5, 4, 4)
    target = class_target(rng, shape, 0.2, soft=soft)
    target[-1] = 0
    return Case({"logits": 3 * rng.standard_normal(shape)}, {"target": target, **options}, rng)


def joined(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    return Case({"up": rng.standard_normal((2, 3, 4, 2)), "skip": rng.standard_normal((2, 3, 4, 3))}, {}, rng)


def op_problems() -> dict[str, Problem]:
    image, kernel = (2, 6, 5, 3), (3, 3, 3, 2)
    small = (2, 4, 3, 3)
    key = Key(seed=5, epoch=1, step=2, stream=17)
    cases = {
        "conv2d": {
            "same": conv(image, kernel, bias=True, seed=1, stride=1, padding="same"),
            "same_stride2": conv(image, kernel, bias=True, seed=2, stride=2, padding="same"),
            "same_even_kernel": conv(image, (2, 4, 3, 2), bias=True, seed=3, stride=1, padding="same"),
            "padding1_stride2": conv(image, kernel, bias=False, seed=4, stride=2, padding=1),
            "padding0": conv(image, kernel, bias=True, seed=5, stride=1, padding=0),
        },
        "conv_transpose2d": {
            "same_kernel3": conv(small, kernel, bias=True, seed=6, stride=2, padding="same"),
            "same_kernel2": conv(small, (2, 2, 3, 2), bias=True, seed=7, stride=2, padding="same"),
            "same_stride3": conv(small, (2, 4, 3, 2), bias=True, seed=8, stride=3, padding="same"),
            "padding0": conv(small, kernel, bias=False, seed=9, stride=2, padding=0),
            "padding1": conv(small, kernel, bias=True, seed=10, stride=2, padding=1),
        },
        "max_pool2d": {"size2": images(11, size=2), "size3": images(12, size=3)},
        "batch_norm2d": {
            "training": norm(13, training=True, eps=1e-3),
            "training_eps1e-5": norm(14, training=True, eps=1e-5),
            "inference": norm(15, training=False, eps=1e-3),
            "inference_eps1e-5": norm(16, training=False, eps=1e-5),
        },
        "relu": {"": images(17)},
        "sigmoid": {"": images(18, scale=4), "saturated": images(19, scale=30)},
        "softmax": {"": images(26, scale=2), "saturated": images(27, scale=30)},
        "dropout": {"": images(20, rate=0.3, key=key), "inference": images(21, rate=0.3, key=None)},
        "concat": {"": joined(22)},
        "dice_loss": {over: prediction("probabilities", 23, smooth=1.0, over=over) for over in get_args(Over)},
        "bce_with_logits": {"": prediction("logits", 24)},
        "softmax_cross_entropy": {"": of_classes(28), "soft": of_classes(29, soft=True)},
        "segmentation_loss": {
            over: prediction("logits", 25, dice_weight=0.7, bce_weight=1.5, smooth=0.5, over=over)
            for over in get_args(Over)
        },
        "softmax_loss": {"": of_classes(30, dice_weight=0.7, cross_entropy_weight=1.5, smooth=0.5)},
    }
    losses = {op.name for op in OPS if op.is_loss}
    return {
        f"{op}-{variant}".rstrip("-"): op_problem(op, case, is_loss=op in losses)
        for op, variants in cases.items()
        for variant, case in variants.items()
    }


def net_problems() -> dict[str, Problem]:
    base = {"in_channels": 3, "out_channels": 1, "dropout": 0.3, "up_kernel": 3, "head_kernel": 3, "conv_bias": True}
    other = {**base, "out_channels": 2, "up_kernel": 2, "head_kernel": 1, "conv_bias": False}
    shape = (2, 8, 12)
    return {
        "unet-training": unet_problem({**base, "widths": [3, 4, 5]}, shape, seed=31, training=True),
        "unet-inference": unet_problem({**base, "widths": [3, 4]}, shape, seed=32, training=False),
        "unet-kernel2": unet_problem({**other, "widths": [3, 4]}, shape, seed=33, loss={"over": "image"}),
        "adamw": adamw_problem(
            {"norm.gamma": (4,), "conv.weight": (2, 3, 4), "tiny.weight": (3,)}, seed=34, snapshots=[1, 10, 100]
        ),
        "training": training_problem({**other, "widths": [3, 4]}, (2, 4, 6), seed=35, steps=8),
    }


def answers(name: str, problem: Problem) -> dict:
    # Eight steps of training in float32 part from one another by more than a tolerance that says anything.
    dtypes = ["float64"] if name == "training" else ["float64", "float32"]
    return {dtype: torch_reference.solve(problem.cast(dtype)) for dtype in dtypes}


def main() -> None:
    problems = {**op_problems(), **net_problems()}
    # Values that float32 can hold, so that both dtypes are given the same.
    problems = {name: problem.cast("float32").cast("float64") for name, problem in problems.items()}
    frozen = {name: Frozen(problem, answers(name, problem)) for name, problem in problems.items()}
    made = {"torch": torch.__version__, "numpy": np.__version__, "date": date.today().isoformat()}
    save_fixtures(frozen, {"made_by": "python -m tests.parity.make_fixtures", **made})
    print(f"{len(frozen)} problems, {FIXTURES.stat().st_size / 1000:.0f} kB: {FIXTURES}")


if __name__ == "__main__":
    main()
