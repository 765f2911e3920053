"""Score a trained network on images with masks, each at its own size.

    minunet evaluate runs/small/best.npz kaggle_3m --output scores
    minunet evaluate runs/membranes/best.npz em --folders image label --invert-masks --output scores

The images are prepared as the checkpoint says that the training's were; those of one group count as one volume. The
folder receives metrics.json (all scores), per_image.csv (a line for each image), and the pictures of a run's test.
"""

import csv
import io
from pathlib import Path
from typing import get_args

import numpy as np

from minunet import engines
from minunet.base import cli
from minunet.base.durable import write_text
from minunet.base.run_folder import run_folder
from minunet.data import reader, verify
from minunet.data.images import shown
from minunet.data.slices import SliceSet
from minunet.results.prediction import Predictor
from minunet.training import metrics
from minunet.training.checkpoint import Weights


def main(arguments: list[str], program: str = "minunet evaluate") -> None:
    """Score what the command line names; ``program`` is how it begins."""
    parser = cli.Parser(prog=program, description=(__doc__ or "").replace("minunet evaluate", program))
    parser.add_argument("checkpoint", help="a best.npz or last.npz of a run")
    parser.add_argument("data", metavar="DIR", help="a folder of images and masks, as for training")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder for the scores and pictures")
    verify.add_folder_arguments(parser)
    parser.add_argument("--weights", choices=get_args(Weights), default="auto", help="averaged, or the last step's")
    cli.add_device_argument(parser)
    engines.add_engine_arguments(parser)
    options = parser.parse_args(arguments)
    from minunet.results import report  # not above: matplotlib takes half a second, too long for --help

    device = cli.announce_device(options.device)
    slices = reader.read_folder(options.data, None, **verify.folder_options(options))
    print(verify.inspect(slices), flush=True)
    with Predictor.load(
        options.checkpoint,
        weights=options.weights,
        device=device,
        engine=options.engine,
        precision=options.precision,
        max_batch=max(slices.patients.count(name) for name in slices.patient_names()),
    ) as predictor:
        probabilities = predict(predictor, slices)
        normalization = predictor.normalization
    with run_folder(options.output, resume=False) as folder:
        print(report.write_test(folder, slices, probabilities, normalization, checkpoint=str(options.checkpoint)))
        write_text(folder / "per_image.csv", per_image(slices, probabilities))
        print(f"everything lies in {shown(folder)}: metrics.json, per_image.csv, per_patient.png, predictions.png")


def predict(predictor: Predictor, slices: SliceSet) -> np.ndarray:
    """The probabilities (S, H, W, 1) for ``slices``, which are as large as their files, one group after the other."""
    found = np.zeros(slices.masks.shape, np.float32)
    owners = np.array(slices.patients)
    for group in slices.patient_names():
        places = np.flatnonzero(owners == group)
        files = [Path(slices.files[place]) for place in places]
        for place, (_, image, tiles) in zip(places, predictor.volume(files, predictor.prepare(files)), strict=True):
            whole = found[place, : image.shape[0], : image.shape[1]]
            for part, p in tiles:
                whole[part] = p
    return found


def per_image(slices: SliceSet, probabilities: np.ndarray) -> str:
    """A table as CSV: each image with its group, its Dice, and how many pixels are marked and found."""
    counts = metrics.count(probabilities > 0.5, slices.masks > 0, axis=(1, 2, 3))
    dices = (f"{dice:.4f}" for dice in metrics.dice(counts))
    names = map(shown, slices.files), map(shown, slices.patients)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "group", "dice", "pixels_marked", "pixels_found"])
    writer.writerows(zip(*names, dices, counts.tp + counts.fn, counts.tp + counts.fp, strict=True))
    return table.getvalue()
