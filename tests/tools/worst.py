"""The worst errors of every op, loss and of whole networks over many random cases: ``python -m tests.tools.worst``.

The tests assert that each error stays within its bound; this prints how far within. Cases are those that the
property tests draw (tests/strategies.py), ``--examples`` of them for each op.

    oracle     forward against loops that spell out the definition (tests/oracles.py)        bound 1e-13
    complex    backward against the complex step                                             bound 1e-12
    central    backward against central differences                                          bound 1e-6
    adjoint    <A x, dy> - <x, A' dy> over |A x| |dy|, where the op is linear in x            bound 1e-14
"""

import argparse
import sys
import warnings

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from minunet import ops
from minunet.base.rng import Key
from minunet.gradcheck import check_net, check_op
from minunet.network import loss as network_loss
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from tests.strategies import OPS, Op

BOUNDS = {"oracle": 1e-13, "complex": 1e-12, "central": 1e-6, "adjoint": 1e-14}
SAMPLING = {"exhaustive": 12, "samples": 6, "directions": 2}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200, help="random cases of each op (200)")
    examples = parser.parse_args(arguments).examples
    print(f"{'':22}" + "".join(f"{name:>12}" for name in BOUNDS) + f"{'cases':>8}")
    print(f"{'bound':22}" + "".join(f"{bound:12.0e}" for bound in BOUNDS.values()))
    wrong = False
    for name, worst, cases in [*(of_op(op, examples) for op in OPS), of_networks(examples // 10)]:
        cells = [f"{worst[kind]:12.1e}" if kind in worst else f"{'':12}" for kind in BOUNDS]
        beyond = [kind for kind, error in worst.items() if not error <= BOUNDS[kind]]
        print(f"{name:22}" + "".join(cells) + f"{cases:8}" + (f"  BEYOND: {', '.join(beyond)}" if beyond else ""))
        wrong |= bool(beyond) or cases == 0
    return 1 if wrong else 0


def drawn(strategy: st.SearchStrategy, examples: int, visit: object) -> None:
    """``visit(case)`` for so many cases of ``strategy``, the same ones at every run."""
    quiet = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    quiet(given(strategy)(visit))()


def of_op(op: Op, examples: int) -> tuple[str, dict[str, float], int]:
    module = ops if hasattr(ops, f"{op.name}_forward") else network_loss
    forward, backward = getattr(module, f"{op.name}_forward"), getattr(module, f"{op.name}_backward")
    worst: dict[str, float] = {}
    count = 0

    def note(kind: str, error: float) -> None:
        worst[kind] = max(worst.get(kind, 0.0), error)

    def visit(case: object) -> None:
        nonlocal count
        count += 1
        inputs, options = case.inputs, case.options
        y, _ = forward(**inputs, **options)
        expected = op.oracle(**inputs, **options)
        largest = np.abs(expected).max()
        note("oracle", float(np.abs(y - expected).max() / largest) if largest > 0 else float(np.abs(y).max() > 0))
        for method, kind in (("complex", "complex"), ("central", "central")):
            note(kind, check_op(forward, backward, inputs, method=method, sampling=SAMPLING, **options).error)
        for names in op.homogeneous:
            note("adjoint", adjoint_error(forward, backward, names, inputs, options, case.rng))

    drawn(op.cases, examples, visit)
    return op.name, worst, count


def adjoint_error(forward, backward, names, inputs, options, rng) -> float:
    if "weight" in inputs:  # without a bias, which is no part of A, and without cancellation in A x
        inputs = {"x": np.abs(inputs["x"]), "weight": np.abs(inputs["weight"]), "bias": None}
    y, cache = forward(**inputs, **options)
    dy = rng.standard_normal(y.shape)
    gradients = backward(dy, cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    dx = dict(zip(inputs, gradients, strict=True))
    right = sum(np.vdot(inputs[name], dx[name]) for name in names)
    size = np.linalg.norm(y) * np.linalg.norm(dy)
    difference = abs(np.vdot(y, dy) - right)
    return float(difference / size) if size > 0 else float(difference > 0)


def of_networks(examples: int) -> tuple[str, dict[str, float], int]:
    worst = {"complex": 0.0, "central": 0.0}
    sampling = {"exhaustive": 2, "samples": 2, "directions": 1}
    for seed in range(examples):
        rng = np.random.default_rng(seed)
        widths = tuple(int(width) for width in rng.integers(1, 5, size=rng.integers(2, 4)))
        outputs = int(rng.integers(1, 3))
        net = UNet(widths=widths, out_channels=outputs, up_kernel=int(rng.integers(2, 4)), seed=seed)
        x, target = rng.standard_normal((2, 8, 8, 3)), (rng.random((2, 8, 8, outputs)) < 0.3).astype("float64")
        for method in worst:
            report = check_net(net, x, target, SegmentationLoss(), Key(seed), method=method, sampling=sampling)
            worst[method] = max(worst[method], report.error)
    return "whole U-Nets", worst, examples


if __name__ == "__main__":
    warnings.simplefilter("error")
    sys.exit(main(sys.argv[1:]))
