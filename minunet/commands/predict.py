"""Find in new images what a network was trained to find.

    minunet predict runs/quick/best.npz slice.png --output out
    minunet predict runs/best/best.npz kaggle_3m/TCGA_CS_4941_19960909 --output out

For each image, of any size, the folder receives NAME_mask.png (255 where the network finds it, else 0) and
NAME_overlay.png (the same as a tint and an outline on the image), both as large as the image. The images are prepared
as the checkpoint says that the training's were: those of one folder count as one volume, unless each image of the
training was a group of its own.

A network of classes writes the number of each pixel's class into NAME_mask.png, and shows it in its colour. One that
was trained on several masks writes NAME_mask1.png, NAME_mask2.png and so on.
"""

import os
from pathlib import Path
from typing import get_args

import numpy as np

from minunet import engines
from minunet.base import cli
from minunet.base.errors import UserError
from minunet.data.images import MAX_PIXELS, find_volumes, shown
from minunet.data.slices import target_masks
from minunet.results.overlays import display_image, overlay, overlay_targets
from minunet.results.prediction import Predictor, Tiles, write_png
from minunet.training.checkpoint import Weights


def main(arguments: list[str], program: str = "minunet predict") -> None:
    """Predict what the command line names; ``program`` is how it begins."""
    parser = cli.Parser(prog=program, description=(__doc__ or "").replace("minunet predict", program))
    parser.add_argument("checkpoint", help="a best.npz or last.npz of a run")
    parser.add_argument("images", nargs="+", help="images (TIFF, PNG, JPEG), or folders of images")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="where the masks go; nothing there is overwritten"
    )
    parser.add_argument(
        "--max-pixels", type=cli.positive_int, default=MAX_PIXELS, help=f"of the largest image ({MAX_PIXELS})"
    )
    parser.add_argument(
        "--threshold",
        type=cli.fraction,
        default=0.5,
        help="found is what is more probable (0.5); not of classes",
    )
    parser.add_argument("--weights", choices=get_args(Weights), default="auto", help="averaged, or the last step's")
    cli.add_device_argument(parser)
    engines.add_engine_arguments(parser)
    options = parser.parse_args(arguments)
    engines.limit_cores(options.cores)

    # Whatever can be wrong with the input is found before anything is written.
    device, output = cli.announce_device(options.device), Path(options.output)
    volumes = find_volumes(options.images)
    with Predictor.load(
        options.checkpoint,
        weights=options.weights,
        device=device,
        engine=options.engine,
        precision=options.precision,
        max_batch=max(map(len, volumes)),
        max_pixels=options.max_pixels,
    ) as predictor:
        if predictor.volume_of == "image":
            volumes = [[file] for files in volumes for file in files]
        classes = predictor.classes
        channels = 1 if classes else predictor.net.config["out_channels"]
        check_results(volumes, output, channels)
        prepared = [predictor.prepare(files) for files in volumes]

        said = None
        for files, of_volume in zip(volumes, prepared, strict=True):
            for file, image, tiles in predictor.volume(files, of_volume):
                if predictor.engine is not None and predictor.engine.reason not in (None, said):
                    said = predictor.engine.reason
                    print(f"engine: {predictor.engine.description}")
                masks = marked(tiles, image.shape[:2], channels, options.threshold, exclusive=bool(classes))
                output.mkdir(parents=True, exist_ok=True)
                step = -(-max(masks.shape) // OVERLAY_SIDE)
                picture = display_image(image[::step, ::step], predictor.words)
                for k, (mask_path, overlay_path) in enumerate(results(file, output, channels)):
                    mask = masks[..., k]
                    write_png(mask_path, mask if classes else 255 * mask, overwrite=False)
                    small = mask[::step, ::step]
                    if classes:
                        tinted = overlay_targets(picture, target_masks(small[..., None], len(classes)))
                    else:
                        tinted = overlay(picture, small)
                    write_png(overlay_path, tinted, overwrite=False)
                    print(f"{shown(mask_path)}: {found(mask, k, predictor)} of {shown(file)}")
                if step > 1:
                    print(f"{shown(overlay_path)}: reduced, one pixel in {step} along each side")


def marked(tiles: Tiles, shape: tuple[int, ...], channels: int, threshold: float, *, exclusive: bool) -> np.ndarray:
    """The masks (H, W, channels), uint8: of 0 and 1, or one mask of the numbers of ``exclusive`` classes.

    The tiles of an image may come class by class, so that the probabilities of all classes are never together: of each
    pixel the largest so far is kept.
    """
    masks = np.zeros((*shape, channels), np.uint8)
    largest = np.full(shape, -1.0, np.float32) if exclusive else None
    for (rows, columns, *which), probabilities in tiles:
        ks = range(probabilities.shape[2]) if not which else range(which[0].start, which[0].stop)
        for k, p in zip(ks, np.moveaxis(probabilities, -1, 0), strict=True):
            if largest is None:
                masks[rows, columns, k] = p > threshold
            else:
                masks[rows, columns, 0][p > largest[rows, columns]] = k
                np.maximum(p, largest[rows, columns], out=largest[rows, columns])
    return masks


def found(mask: np.ndarray, k: int, predictor: Predictor) -> str:
    """How much of a mask is marked, for the line about it."""
    if not predictor.classes:
        target = f"{predictor.words.targets[k]}, " if predictor.words.targets else ""
        return f"{target}{mask.sum(dtype=np.int64)} of {mask.size} pixels"
    counts = np.bincount(mask.ravel(), minlength=len(predictor.classes))
    shares = (f"{number} {name} {counts[number] / mask.size:.1%}" for number, name in enumerate(predictor.classes))
    return ", ".join(shares)


#: An overlay is for eyes: a larger image's is reduced to at most so many pixels along a side.
OVERLAY_SIDE = 4096


def results(file: Path, output: Path, channels: int) -> list[tuple[Path, Path]]:
    """Where mask and overlay of an image go, for each of the network's output channels (numbered, if several)."""
    numbers = [""] if channels == 1 else [str(k + 1) for k in range(channels)]
    return [(output / f"{file.stem}_mask{n}.png", output / f"{file.stem}_overlay{n}.png") for n in numbers]


def check_results(volumes: list[list[Path]], output: Path, channels: int) -> None:
    """Raise UserError if two images would have one result, or a result is there already: it may be somebody's work."""
    owners: dict[Path, Path] = {}
    for file in (file for files in volumes for file in files):
        for path in (path for pair in results(file, output, channels) for path in pair):
            if path in owners:
                raise UserError(f"{shown(file)}: named like {shown(owners[path])}, predict them into two folders")
            if os.path.lexists(path):  # a link that leads nowhere, too
                raise UserError(f"{shown(path)}: is there already, choose another folder as --output")
            owners[path] = file
