"""How far minunet and PyTorch are apart: the worst error of every op, loss, network and optimiser, as a table.

    python -m tests.parity.report                   PyTorch's frozen answers; and, where PyTorch is installed,
    python -m tests.parity.report --examples 1000   as many problems of each kind drawn at random, and solved by both

An error is the largest difference over the largest value, of y, of all gradients together, and so on; the table has the
worst of these and says of what. Exit code 1 if one is beyond its tolerance.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from tests.parity import problems
from tests.parity.problems import TOLERANCE, Arrays, Problem, errors, load_fixtures, solve
from tests.strategies import OPS


class Row(NamedTuple):
    what: str
    dtype: str
    error: float
    group: str  # whose error is the worst
    tolerance: float

    def __str__(self) -> str:
        beyond = "" if self.error <= self.tolerance else " **beyond**"
        return f"| {self.what} | {self.dtype} | {self.error:.1e}{beyond} | {self.group} | {self.tolerance:.0e} |"


#: What is drawn at random, and its tolerance. Training is a chain: AdamW divides by the size of a gradient, so that
#: rounding noise in a small one grows from step to step.
DRAWN: dict[str, tuple[SearchStrategy[Problem], float]] = {
    **{op.name: (problems.drawn_op(op), TOLERANCE["float64"]) for op in OPS},
    "unet": (problems.drawn_unet(), TOLERANCE["float64"]),
    "adamw": (problems.drawn_adamw(), TOLERANCE["float64"]),
    "training": (problems.drawn_training(), 1e-10),
}


def row(what: str, dtype: str, found: dict[str, float], tolerance: float) -> Row:
    group = max(found, key=lambda name: found[name])
    return Row(what, dtype, found[group], group, tolerance)


def frozen_rows() -> Iterator[Row]:
    frozen, _ = load_fixtures()
    for name, (problem, answers) in frozen.items():
        for dtype, expected in answers.items():
            yield row(name, dtype, errors(solve(problem.cast(dtype)), expected), TOLERANCE[dtype])


def live_rows(reference: Callable[[Problem], Arrays], examples: int) -> Iterator[Row]:
    for name, (strategy, tolerance) in DRAWN.items():
        yield row(name, "float64", worst_errors(strategy, reference, examples), tolerance)


def worst_errors(
    strategy: SearchStrategy[Problem], reference: Callable[[Problem], Arrays], examples: int
) -> dict[str, float]:
    """The worst error of each group over so many problems, always the same ones."""
    worst: dict[str, float] = {}

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(strategy)
    def compare(problem: Problem) -> None:
        for group, error in errors(solve(problem), reference(problem)).items():
            worst[group] = max(worst.get(group, 0.0), error)

    compare()
    return worst


def table(rows: Iterator[Row]) -> bool:
    """Print the rows as they come. Whether all of them are within their tolerance."""
    print("| what | dtype | worst error | of | tolerance |\n|---|---|---|---|---|")
    within = True
    for line in rows:
        print(line, flush=True)
        within = within and line.error <= line.tolerance
    return within


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=50, help="problems of each kind to draw (default: %(default)s)")
    examples = parser.parse_args(arguments).examples

    made = load_fixtures()[1]
    print(f"minunet on NumPy {np.__version__} against the frozen answers of PyTorch {made['torch']} ({made['date']})\n")
    within = table(frozen_rows())
    if importlib.util.find_spec("torch") is None:
        print("\nPyTorch is not installed: no problems drawn at random.")
    else:
        import torch

        from tests.parity import torch_reference

        print(f"\nand against PyTorch {torch.__version__} on {examples} problems of each kind drawn at random\n")
        within = table(live_rows(torch_reference.solve, examples)) and within
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
