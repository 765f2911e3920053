"""The validation curves of several runs in one picture, and their test Dice in one table.

python benchmarks/curves.py runs/small runs/small-2 --label plain "engine, seed 0" --output curves.png
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument("--label", nargs="+", help="what to call them; left out: their folders' names")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    flags = parser.parse_args()
    labels = flags.label or [run.name for run in flags.runs]
    if len(labels) != len(flags.runs):
        parser.error(f"--label: {len(labels)} labels for {len(flags.runs)} runs, give one for each")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    print("| run | mean 3-D Dice | 95 % interval | median |\n|---|---|---|---|")
    for run, label in zip(flags.runs, labels, strict=True):
        with (run / "history.csv").open() as file:
            rows = list(csv.DictReader(file))
        epochs = [int(row["epoch"]) for row in rows]
        for axis, column in zip(axes, ("validation_loss", "validation_dice"), strict=True):
            axis.plot(epochs, [float(row[column]) for row in rows], label=label)
        dice = json.loads((run / "metrics.json").read_text())["test"]["per_patient"]["summary"]["dice"]
        low, high = dice["mean_interval"]
        print(f"| {label} | {dice['mean']:.3f} | {low:.3f} to {high:.3f} | {dice['median']:.3f} |")
    for axis, title in zip(axes, ("validation loss", "validation Dice (mean of patients)"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[1].legend()
    figure.savefig(flags.output, dpi=110)


if __name__ == "__main__":
    main()
