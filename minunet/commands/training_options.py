"""What a training is asked to do: the flags, the settings that a resumed run had, and the preset with its changes."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from minunet import engines
from minunet.base import cli
from minunet.base.backend import Device
from minunet.base.durable import read_text
from minunet.base.errors import UserError
from minunet.data import verify
from minunet.data.augment import PRESETS as AUGMENTATIONS
from minunet.training.checkpoint import Weights
from minunet.training.presets import PRESETS, Preset


def parse(arguments: list[str], program: str, description: str) -> argparse.Namespace:
    """The options; with --resume those that the run was started with, from its config.json."""
    parser = flags(program, description)
    options = parser.parse_args(arguments)
    if options.resume is None:
        check_together(options)
        return with_defaults(options)
    if extra := [name for name in SETTINGS if name not in PLACES and getattr(options, name) is not None]:
        raise UserError(f"{flag(extra[0])}: not together with --resume, which takes the run's settings")
    settings = read_settings(Path(options.resume) / "config.json", parser)
    moved = {name: getattr(options, name) for name in PLACES if getattr(options, name) is not None}
    vars(options).update(settings, output=options.resume, **moved)
    return options


def check_together(options: argparse.Namespace) -> None:
    """Raise UserError for flags of a new run that do not go together."""
    verify.folder_options(options)
    if options.data is None:
        for name in ("folders", "classes", "invert_masks", "target_name"):
            if getattr(options, name) is not None:
                raise UserError(f"{flag(name)}: says how --data is read, and there is none, give --data")
    if options.init_weights is not None and options.init is None:
        raise UserError("--init-weights: says which weights of --init are taken, and there is none, give --init")
    if options.split_file is not None:
        for name in ("split", "fold"):
            if getattr(options, name) is not None:
                raise UserError(f"{flag(name)}: not together with --split-file, which says who is in which part")


def flags(program: str, description: str) -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog=program, description=description)
    add = parser.add_argument
    add("--data", metavar="DIR", help="the folder kaggle_3m, or your own; left out: synthetic patients")
    verify.add_folder_arguments(parser)
    add("--preset", choices=sorted(PRESETS), help="the recipe; left out: quick, or small with --data")
    add("--output", metavar="DIR", help="the run's folder; left out: runs/<preset>, or the next free name")
    add("--resume", metavar="DIR", help="go on with the run in this folder; with --data, if its data have moved")
    add("--init", metavar="CHECKPOINT", help="begin with the weights of this best.npz or last.npz; all else is new")
    add("--init-weights", choices=get_args(Weights), help="averaged (ema), the last step's (raw); default as predict's")
    add("--train-only", metavar="NAME,NAME", help="train these parts of the network, such as up1,head, and no other")
    add("--split-file", metavar="CSV", help="who is in which part: a line group,part, then one for each group")
    add("--split", choices=("patient", "slice"), help="slice repeats a flaw of the reference: neighbours on both sides")
    add(
        "--augment",
        choices=(*AUGMENTATIONS, "image-only"),
        help="how images are turned, stretched, changed in brightness; image-only repeats the other flaw: masks stay",
    )
    add("--fold", type=cli.integer(0, 4), help="which fifth of the groups is the test set (default 0)")
    add("--epochs", type=cli.positive_int, metavar="N", help="left out: as many as the preset has")
    add("--images-per-epoch", type=cli.positive_int, metavar="N", help="left out: the preset's; fewer take less time")
    add("--batch-size", type=cli.positive_int, metavar="N", help="images a step; left out: the preset's")
    add("--image-size", type=cli.image_size, help="pixels: the longer side of every image, which is resized")
    add("--crop", type=cli.image_size, help="pixels: learn from squares of this side, of images that are not resized")
    add("--learning-rate", type=cli.positive_float, help="the largest of the run; left out: the preset's")
    add("--seed", type=cli.seed, help="default 0")
    cli.add_device_argument(parser)
    engines.add_engine_arguments(parser)
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def with_defaults(given: argparse.Namespace) -> argparse.Namespace:
    """The options with the defaults of those settings that were not given."""
    options = argparse.Namespace(**vars(given))
    options.preset = given.preset or ("quick" if given.data is None else "small")
    options.split = given.split or "patient"
    options.fold = given.fold or 0
    options.seed = given.seed or 0
    options.allow_missing = bool(given.allow_missing)
    options.invert_masks = bool(given.invert_masks)
    return options


def flag(setting: str) -> str:
    """The flag of a setting.

    >>> flag("batch_size")
    '--batch-size'
    """
    return f"--{setting.replace('_', '-')}"


#: The options that decide what a run computes: stored in config.json, taken from there by --resume.
SETTINGS = (
    "data",
    "preset",
    "split",
    "augment",
    "fold",
    "epochs",
    "batch_size",
    "image_size",
    "crop",
    "learning_rate",
    "seed",
    "allow_missing",
    "folders",
    "classes",
    "invert_masks",
    "target_name",
    "split_file",
    "images_per_epoch",
    "init",
    "init_weights",
    "train_only",
)

#: Those that say where a file or folder lies: it may be another place when the run is resumed.
PLACES = ("data", "split_file")

#: What those settings are that the runs of earlier versions did not have.
NEW = (
    "crop",
    "folders",
    "classes",
    "target_name",
    "split_file",
    "images_per_epoch",
    "init",
    "init_weights",
    "train_only",
)
OLD = dict.fromkeys(NEW) | {"invert_masks": False}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings as config.json stores them: places as whole paths."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    paths = [name for name in (*PLACES, "init") if settings[name] is not None]
    return settings | {name: str(Path(settings[name]).resolve()) for name in paths}


def read_settings(path: Path, parser: cli.Parser) -> dict[str, Any]:
    """The settings in a run's config.json, checked as flags are: anybody may have written the file."""
    try:
        stored = OLD | json.loads(read_text(path))["options"]
        stored = {name: stored[name] for name in SETTINGS}
    except FileNotFoundError:
        raise UserError(f"{path}: not found, give --resume the folder of a run") from None
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise UserError(f"{path}: no settings of a run ({type(error).__name__}), start a new run") from None
    given: list[str] = []
    for name, value in stored.items():
        if isinstance(value, list):
            given += [flag(name), *map(str, value)]
        elif value is not None and value is not False:
            given.append(flag(name) if value is True else f"{flag(name)}={value}")
    try:
        options = with_defaults(parser.parse_args(given))
    except UserError as error:
        raise UserError(
            f"{path}: no settings of a run ({str(error).removesuffix(', see --help')}), start a new run"
        ) from None
    for name, value in stored.items():
        if getattr(options, name) != value:  # "3" is a number on a command line, but not here
            raise UserError(f"{path}: no settings of a run ({name} cannot be {value!r:.80}), start a new run")
    return stored


def choose_preset(options: argparse.Namespace, device: Device) -> Preset:
    """The preset, with what the options change."""
    preset = PRESETS[options.preset]
    if preset.slow_without_gpu and device == "cpu":
        print(
            f"note: the preset {options.preset} is made for a GPU; on this CPU it takes days. --preset small does not."
        )
    changes: dict[str, Any] = {"seed": options.seed}
    if options.epochs is not None:
        share = preset.training.warmup_epochs / preset.training.epochs
        changes.update(epochs=options.epochs, warmup_epochs=share * options.epochs)
    if options.batch_size is not None:
        changes["batch_size"] = options.batch_size
    if options.images_per_epoch is not None:
        changes["images_per_epoch"] = options.images_per_epoch
    if options.learning_rate is not None:
        changes["lr"] = options.learning_rate
    if options.augment == "image-only":
        changes["augment_masks"] = False
    elif options.augment is not None:
        changes["augmentation"] = AUGMENTATIONS[options.augment]
    if options.train_only is not None:
        changes["train_only"] = tuple(options.train_only.split(","))
        if options.precision != "float32":  # what the plain path does not have
            raise UserError(f"--precision: {options.precision} is not available with --train-only, drop one of the two")
    changes["crop"] = options.crop
    if options.crop is not None and options.image_size is not None:
        raise UserError("--image-size: not together with --crop, which takes images at their own size")
    image_size = options.image_size or preset.image_size
    multiple = 2 ** (len(preset.model["widths"]) - 1)
    for name, value in (("--image-size", image_size), ("--crop", options.crop or multiple)):
        if value % multiple:
            raise UserError(f"{name}: {value} is not a multiple of {multiple}, choose one that is")
    if options.data is None and image_size < 16:
        raise UserError(f"--image-size: {image_size} is too small to draw a synthetic patient, choose 16 or more")
    return replace(preset, image_size=image_size, training=replace(preset.training, **changes))
