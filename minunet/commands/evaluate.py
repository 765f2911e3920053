"""Score a trained network on images with masks, each at its own size.

    minunet evaluate runs/small/best.npz kaggle_3m --output scores
    minunet evaluate runs/membranes/best.npz em --folders image label --invert-masks --output scores

The images are prepared as the checkpoint says that the training's were; those of one group count as one volume. Masks
of classes are read as the checkpoint names these; of several targets, every score and picture is by target. The
folder receives metrics.json (all scores), per_image.csv (a line for each image), and the pictures of a run's test.
"""

import argparse
import csv
import io
from pathlib import Path
from typing import get_args

import numpy as np

from minunet import engines
from minunet.base import cli
from minunet.base.durable import write_text
from minunet.base.errors import UserError
from minunet.base.run_folder import run_folder
from minunet.data import reader, verify
from minunet.data.images import shown
from minunet.data.slices import IGNORE, SliceSet
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
    with Predictor.load(
        options.checkpoint,
        weights=options.weights,
        device=device,
        engine=options.engine,
        precision=options.precision,
    ) as predictor:
        slices = read(options, predictor)
        print(verify.inspect(slices, grouped=True), flush=True)  # nothing is split here
        probabilities = predict(predictor, slices)
        normalization = predictor.normalization
    with run_folder(options.output, resume=False) as folder:
        print(report.write_test(folder, slices, probabilities, normalization, checkpoint=str(options.checkpoint)))
        write_text(folder / "per_image.csv", per_image(slices, probabilities))
        print(f"everything lies in {shown(folder)}: metrics.json, per_image.csv, per_patient.png, predictions.png")


def read(options: argparse.Namespace, predictor: Predictor) -> SliceSet:
    """The images and masks, at the size of their files. Raises UserError if these are not what the network finds."""
    reading = verify.folder_options(options)
    if options.classes is not None and reading["classes"] != predictor.classes:
        known = ", ".join(predictor.classes) or "none"
        raise UserError(f"--classes: the network knows {known}; leave the flag out, the checkpoint names them")
    reading["classes"] = predictor.classes
    try:
        reader.check_classes(predictor.classes, options.folders, reading["invert_masks"])
    except ValueError as error:
        raise UserError(f"{shown(options.checkpoint)}: is a network of classes: {error}") from None
    slices = reader.read_folder(options.data, None, **reading)
    expected, found = predictor.words.targets, slices.words.targets
    if expected and found and expected != found:
        advice = f"the network was trained on {', '.join(expected)}; give --folders in that order, with these names"
        raise UserError(f"{shown(options.data)}: masks of {', '.join(found)}, but {advice}")
    masks, channels = slices.masks.shape[3], predictor.net.config["out_channels"]
    if not predictor.classes and masks != channels:
        advice = "name the folder of each by --folders IMAGES MASKS MASKS ..."
        raise UserError(f"{shown(options.data)}: masks of {masks} targets, but the network finds {channels}; {advice}")
    return slices


def predict(predictor: Predictor, slices: SliceSet) -> np.ndarray:
    """The probabilities (S, H, W, K) for ``slices``, which are as large as their files, one group after the other."""
    found = np.zeros((*slices.masks.shape[:3], predictor.net.config["out_channels"]), np.float32)
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
    """A table as CSV: each image with its group, its Dice, and how many pixels are marked and found.

    Of several targets each image has a line for each.
    """
    names = slices.target_names()
    predicted = metrics.predicted_masks(probabilities, len(slices.classes))
    if slices.classes:
        predicted *= slices.masks != IGNORE
    counts = metrics.count(predicted, slices.marked(np.arange(len(slices))), axis=(1, 2))  # (S, T)
    dices = metrics.dice(counts)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    columns = ["file", "group", *([] if slices.is_binary else ["target"]), "dice", "pixels_marked", "pixels_found"]
    writer.writerow(columns)
    for s, k in np.ndindex(dices.shape):
        whose = [shown(slices.files[s]), shown(slices.patients[s]), *([] if slices.is_binary else [names[k]])]
        marked, found = counts.tp[s, k] + counts.fn[s, k], counts.tp[s, k] + counts.fp[s, k]
        writer.writerow([*whose, f"{dices[s, k]:.4f}", marked, found])
    return table.getvalue()
