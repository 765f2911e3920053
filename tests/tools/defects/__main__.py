"""``python -m tests.tools.defects``: plant each seeded defect, and name the test that catches it."""

import argparse
import os
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: one thread for each trial

import hypothesis  # noqa: F401
import numpy  # noqa: F401
import scipy.ndimage  # noqa: F401

from tests.tools.mutation.mutants import digest
from tests.tools.mutation.trial import ROOT, Outcome, Results, Trial, own_tests, run_trials, run_undamaged


class Defect(NamedTuple):
    """One mistake, as defects.toml has it."""

    name: str
    why: str
    file: str
    old: str
    new: str

    def source(self) -> str | None:
        """The damaged file; None if the old line is not there exactly once, or nothing would change."""
        text = (ROOT / self.file).read_text()
        return text.replace(self.old, self.new) if text.count(self.old) == 1 and self.old != self.new else None


LIST = Path(__file__).with_name("defects.toml")


def defects(path: Path = LIST) -> list[Defect]:
    """All of them, in the order of the list."""
    return [Defect(**entry) for entry in tomllib.loads(path.read_text())["defect"]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.defects", description="Seeded defects, one at a time.")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run this defect (repeatable)")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "minunet-defects")
    parser.add_argument("--list", type=Path, default=LIST, help="another list of defects")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(arguments)
    chosen = [defect for defect in defects(options.list) if defect.name in options.only or not options.only]
    if unknown := set(options.only) - {defect.name for defect in chosen}:
        parser.error(f"no defect is called {sorted(unknown)}")
    options.results.mkdir(parents=True, exist_ok=True)
    results = Results(options.results / "defects.jsonl")

    missing = [defect for defect in chosen if defect.source() is None]
    planted = {digest(defect.file, defect.source() or ""): defect for defect in chosen if defect not in missing}
    waiting = {
        key: defect
        for key, defect in planted.items()
        if key not in results.outcomes or results.outcomes[key].status != "killed"
    }

    # The undamaged copy first: where its tests fail, or none runs, a failure would mean nothing.
    files = dict.fromkeys(defect.file for defect in waiting.values())
    undamaged = {file: run_undamaged(own_tests(file), options.results) for file in files}
    sound = {file for file, outcome in undamaged.items() if outcome.status == "survived"}

    def done(trial: Trial, outcome: Outcome) -> None:
        results.add(trial.key, outcome)
        print(f"{outcome.status:9} {waiting[trial.key].name}: {outcome.test}", flush=True)

    trials = [
        Trial(
            key, {defect.file: str(defect.source())}, own_tests(defect.file), 30 + 10 * undamaged[defect.file].seconds
        )
        for key, defect in waiting.items()
        if defect.file in sound
    ]
    run_trials(trials, options.results, done, options.jobs)

    print("\n| defect | file | caught by |\n|---|---|---|")
    caught = 0
    for key, defect in planted.items():
        outcome = results.outcomes.get(key)
        is_caught = outcome is not None and outcome.status == "killed" and outcome.tests_run > 0
        caught += is_caught
        verdict = (
            f"`{outcome.test}`" if outcome and is_caught else f"**{outcome.status if outcome else 'ERROR: not run'}**"
        )
        print(f"| {defect.name} | {defect.file} | {verdict} |")
    for defect in missing:
        print(f"| {defect.name} | {defect.file} | **ERROR: the old line is not there exactly once** |")
    for file in undamaged.keys() - sound:
        print(f"error: {file}: its tests fail without any defect, or none ran: {undamaged[file]}", file=sys.stderr)
    print(f"\n{caught} of {len(chosen)} defects caught ({len(trials)} run now, the others before)")
    return 0 if caught == len(chosen) > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
