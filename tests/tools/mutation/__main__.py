"""``python -m tests.tools.mutation``: plant every mutant, run the tests of its module, print the score and the
survivors.

It can be stopped at any time, and goes on from ``--results`` where it was: a mutant is known by the content of its
function. ``--again survived`` runs the survivors anew, after a test was added.
"""

import argparse
import os
import sys
import tempfile
import time
import tomllib
from collections import Counter
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: one thread for each trial

import hypothesis  # noqa: F401
import numpy  # noqa: F401
import scipy.ndimage  # noqa: F401

from tests.tools.mutation.mutants import Mutant, mutants
from tests.tools.mutation.trial import ROOT, Results, Trial, own_tests, run_trials, run_undamaged

#: The modules that the score is about, the fast ones first.
MODULES = [
    *(
        f"minunet/ops/{op}.py"
        for op in ("relu", "concat", "sigmoid", "softmax", "dropout", "max_pool2d", "batch_norm2d", "checks")
    ),
    "minunet/training/optim.py",
    "minunet/ops/dice_loss.py",
    "minunet/ops/bce_with_logits.py",
    "minunet/ops/softmax_cross_entropy.py",
    "minunet/network/loss.py",
    "minunet/ops/conv2d.py",
    "minunet/ops/conv_transpose2d.py",
    "minunet/data/augment.py",
    "minunet/training/metrics.py",
    "minunet/gradcheck.py",
]


Place = tuple[str, str, str, str]


def place(mutant: Mutant) -> Place:
    """What tells a mutant from all others, and stays when lines move."""
    return mutant.module, mutant.where, mutant.old, mutant.new


def known_equivalents() -> set[Place]:
    """The mutants that compute the same as the original; equivalent.toml has the reasons."""
    entries = tomllib.loads(Path(__file__).with_name("equivalent.toml").read_text())["equivalent"]
    assert all(entry["reason"] for entry in entries)
    return {(entry["module"], entry["where"], entry["old"], entry["new"]) for entry in entries}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.mutation", description="Mutation testing of minunet.")
    parser.add_argument("modules", nargs="*", help="such as minunet/ops/relu.py; all, if none is named")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "minunet-mutation")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--sample", type=int, help="only this many mutants of each module")
    parser.add_argument("--again", default="", help="outcomes to forget first, such as survived,timeout")
    parser.add_argument("--report", action="store_true", help="run nothing, print what is known")
    options = parser.parse_args(arguments)
    modules = options.modules or MODULES
    options.results.mkdir(parents=True, exist_ok=True)
    results = Results(options.results / "mutants.jsonl")
    planted = {module: mutants(module, (ROOT / module).read_text())[: options.sample] for module in modules}
    equivalent = known_equivalents()
    begin = time.monotonic()
    failed_undamaged = [] if options.report else _run(planted, results, options, equivalent)
    print(table(planted, results, equivalent))
    print(survivors(planted, results, equivalent))
    print(f"{time.monotonic() - begin:.0f} s")
    for module in failed_undamaged:
        print(
            f"error: {module}: the tests of the undamaged module fail, or none ran; nothing was learned",
            file=sys.stderr,
        )
    return 1 if failed_undamaged else 0


def _run(
    planted: dict[str, list[Mutant]],
    results: Results,
    options: argparse.Namespace,
    equivalent: set[Place],
) -> list[str]:
    """Run what has no outcome yet. Returns the modules whose tests do not pass undamaged."""
    again = set(options.again.split(","))
    failed = []
    for module, found in planted.items():
        waiting = [
            mutant
            for mutant in found
            if place(mutant) not in equivalent
            and (mutant.key not in results.outcomes or results.outcomes[mutant.key].status in again | {"error"})
        ]
        if not waiting:
            continue
        tests = own_tests(module)
        undamaged = run_undamaged(tests, options.results)
        if undamaged.status != "survived":
            failed.append(module)
            print(f"{module}: undamaged: {undamaged}", flush=True)
            continue
        print(f"{module}: {len(waiting)} mutants against {undamaged.tests_run} tests", flush=True)
        # Ten times the undamaged run's time, as the machine may be busy in between.
        limit = 10 + 10 * undamaged.seconds
        trials = [
            Trial(mutant.key, {module: mutant.source}, own_tests(module, mutant.where), limit) for mutant in waiting
        ]
        run_trials(trials, options.results, lambda trial, outcome: results.add(trial.key, outcome), options.jobs)
    return failed


def table(planted: dict[str, list[Mutant]], results: Results, equivalent: set[Place]) -> str:
    """One row a module. The score leaves out what is equivalent, and what cannot even be imported."""
    names = ("mutants", "executed", "killed", "timeout", "survived", "equivalent", "invalid", "error")
    rows, total = [], Counter[str]()
    for module, found in planted.items():
        counts = Counter[str](mutants=len(found))
        for mutant in found:
            outcome = results.outcomes.get(mutant.key)
            if place(mutant) in equivalent:
                counts["equivalent"] += 1
            elif outcome is not None:
                counts["executed"] += 1
                counts[outcome.status] += 1
        rows.append((module, counts))
        total += counts
    rows.append(("all", total))
    lines = ["", f"| module | {' | '.join(names)} | score |", f"|---|{'---:|' * (len(names) + 1)}"]
    for module, counts in rows:
        caught, judged = counts["killed"] + counts["timeout"], counts["executed"] - counts["invalid"] - counts["error"]
        score = f"{100 * caught / judged:.1f} %" if judged else "-"
        lines.append(f"| {module} | {' | '.join(str(counts[name]) for name in names)} | {score} |")
    return "\n".join(lines)


def survivors(planted: dict[str, list[Mutant]], results: Results, equivalent: set[Place]) -> str:
    """The mutants that no test has noticed, each with its place and the two lines."""
    lines = [""]
    for found in planted.values():
        for mutant in sorted(found, key=lambda mutant: mutant.line):
            outcome = results.outcomes.get(mutant.key)
            listed = place(mutant) in equivalent
            if outcome is not None and outcome.status in ("survived", "timeout", "error") and not listed:
                lines += [
                    f"{mutant.module}:{mutant.line} {mutant.where}: {outcome.status}",
                    f"  - {mutant.old}",
                    f"  + {mutant.new}",
                ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
