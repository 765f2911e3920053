"""Train a U-Net to find brain tumours on MR slices, and say honestly how well it does.

    python examples/train_lgg.py                                  on synthetic patients, minutes on a laptop
    python examples/train_lgg.py --data kaggle_3m --preset small  on LGG-MRI, on a laptop
    python examples/train_lgg.py --data kaggle_3m --preset best   on LGG-MRI, on a GPU
    python examples/train_lgg.py --data my_data                   on your own images: docs/your_data.md
    python examples/train_lgg.py --resume runs/small              go on with a run that was stopped

Everything a run computes lies in its folder when it ends: config.json, history.csv, metrics.json, four pictures,
and the checkpoints best.npz and last.npz, which examples/predict.py takes.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from minunet import UNet, engines
from minunet.base import cli
from minunet.base.backend import Device, gpu_pool_bytes, to_device
from minunet.base.durable import json_text, read_text, write_text
from minunet.base.environment import environment
from minunet.base.errors import UserError
from minunet.base.run_folder import next_free_folder, run_folder
from minunet.base.signals import StopRequest
from minunet.data import images, lgg, phantom, verify
from minunet.data.augment import PRESETS as AUGMENTATIONS
from minunet.data.slices import SliceSet
from minunet.data.splits import split_by_file, split_by_patient, split_by_slice
from minunet.engines import memory
from minunet.network.layers import map_arrays
from minunet.results.report import write_curves, write_samples, write_test
from minunet.summary import summary
from minunet.training.checkpoint import load_net
from minunet.training.evaluation import predict_slices
from minunet.training.loop import FolderLost, Hooks, TrainingData, check_batches, fit
from minunet.training.presets import PRESETS, Preset
from minunet.training.step import Engine
from minunet.training.tiles import tiles


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    engines.limit_cores(options.cores)
    device = cli.announce_device(options.device)
    preset = choose_preset(options, device)
    parts = read_data(options, preset)
    net = make_network(preset, options.seed, parts.train, device)
    needed = step_bytes(net, preset, device, options)
    config = config_of(options, preset, net, parts)
    output = options.output or next_free_folder("runs", options.preset)
    with run_folder(output, resume=options.resume is not None) as folder:
        if options.resume is None:
            write_start(folder, config, preset, parts)
        with StopRequest() as stop, step_explained(net, preset, needed), ExitStack() as scope:
            engine = scope.enter_context(build(net, preset, device, options))
            crop = preset.training.crop is not None
            judging = scope.enter_context(judge(net, parts.train, preset, device, options)) if crop else engine
            if options.engine == "auto":
                print(f"engine: {engine.description}", flush=True)
            try:
                progress = fit(
                    engine,
                    TrainingData(parts.train, parts.validation, preset.normalization, parts.test),
                    preset.training,
                    folder,
                    resume=options.resume is not None,
                    metadata={"preprocessing": preprocessing(preset), **of_data(parts.train)},
                    hooks=Hooks(should_stop=lambda: stop.requested),
                    progress_bar=not options.quiet,
                    judge=judging,
                    side=side_of(net, preset),
                )
            except FolderLost as lost:
                write_start(lost.folder, config, preset, parts)  # a resume reads its settings there
                raise
        if options.resume is not None:
            keep_places(folder, config["options"])
        if not progress.finished:
            again = shlex.join(["python", sys.argv[0], f"--resume={folder}"])
            print(f"stopped in epoch {progress.epoch_number}; go on with: {images.shown(again)}")
        stop.exit_if_requested()
        write_curves(folder, progress.history, progress.best_epoch, parts.train.words)
        test(folder, parts.test, preset, device, options)
        files = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
        print(f"everything lies in {images.shown(folder)}: {images.shown(', '.join(files))}")


class Parts(NamedTuple):
    """The slices to train, validate and test on."""

    train: SliceSet
    validation: SliceSet
    test: SliceSet


def make_network(preset: Preset, seed: int, train: SliceSet, device: Device) -> UNet:
    """The network of the preset, on ``device``."""
    net = UNet(**preset.model, in_channels=train.images.shape[3], seed=seed)
    check_batches(net, train, preset.training)
    size = summary(net, preset.image_size, preset.image_size)
    print(f"network: {size.parameters:,} parameters, {size.flops / 1e9:.2f} GFLOP an image forward", flush=True)
    on_device: UNet = map_arrays(net, lambda array: to_device(array, device))
    return on_device


def build(net: UNet, preset: Preset, device: Device, options: argparse.Namespace, *, training: bool = True) -> Engine:
    """The engine for ``net`` that the options ask for."""
    chosen = device, options.engine, options.precision
    return engines.build(net, preset.training.loss, *sizes(preset), *chosen, training=training)


def step_bytes(net: UNet, preset: Preset, device: Device, options: argparse.Namespace) -> memory.StepBytes:
    """How much memory a step of that engine needs. Raises UserError if it cannot be had: before anything is written."""
    plain = engines.unsupported(net, preset.training.loss, *sizes(preset), device, options.engine, options.precision)
    return engines.step_bytes(device, options.engine if plain is None else "plain", options.precision)


def preprocessing(preset: Preset) -> dict[str, Any]:
    """How the images are prepared: what a prediction finds in the checkpoint."""
    return {
        "image_size": None if preset.training.crop else preset.image_size,
        "normalization": preset.normalization.to_dict(),
        "flip_average": preset.flip_average,
        "keep_ratio": True,
    }


def of_data(slices: SliceSet) -> dict[str, Any]:
    """What a checkpoint notes of its data: which images a prediction may take, and what it calls them."""
    return {"kind": images.kind_of(slices.images[0])._asdict(), "words": asdict(slices.words)}


def config_of(options: argparse.Namespace, preset: Preset, net: UNet, parts: Parts) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "options": settings_of(options),
        "model": net.config,
        "training": preset.training.settings(),
        "preprocessing": preprocessing(preset),
        "patients": {name: part.patient_names() for name, part in parts._asdict().items()},
        "environment": environment(),
    }


def write_start(folder: Path, config: dict[str, Any], preset: Preset, parts: Parts) -> None:
    """config.json and the picture of the samples."""
    write_text(folder / "config.json", json_text(config))
    write_samples(folder, parts.train, preset.training, preset.normalization)


def keep_places(folder: Path, options: dict[str, Any]) -> None:
    """Write into config.json where the files of a resumed run lie now: the same, but they may have been moved."""
    config = json.loads(read_text(folder / "config.json"))
    places = {name: options[name] for name in PLACES}
    if any(config["options"].get(name) != place for name, place in places.items()):
        config["options"] |= places
        write_text(folder / "config.json", json_text(config))


def test(folder: Path, slices: SliceSet, preset: Preset, device: Device, options: argparse.Namespace) -> None:
    """Test the checkpoint that the preset keeps, and write and print the table."""
    checkpoint = folder / f"{preset.keep}.npz"
    kept, _ = load_net(checkpoint)
    kept = map_arrays(kept, lambda array: to_device(array, device))
    with judge(kept, slices, preset, device, options) as engine:
        probabilities = predict_slices(
            kept,
            slices,
            preset.normalization,
            batch_size=preset.training.batch_size,
            flip_average=preset.flip_average,
            engine=engine,
            side=side_of(kept, preset),
        )
    split = options.split if options.split_file is None else "file"
    extra: dict[str, Any] = {"checkpoint": checkpoint.name, "split": split}
    if device == "cuda":
        extra["gpu_memory_bytes"] = gpu_pool_bytes()
        print(f"GPU memory: {extra['gpu_memory_bytes'] / 1e9:.2f} GB at the peak")
    own = None if options.data is None else read_again(slices, options)
    print(write_test(folder, slices, probabilities, preset.normalization, own, **extra))


def read_again(slices: SliceSet, options: argparse.Namespace) -> SliceSet:
    """The test slices at the size of their files."""
    again = lgg.read_folder(options.data, None, patients=slices.patient_names(), **verify.folder_options(options))
    wanted = set(zip(slices.patients, slices.numbers, strict=True))
    slices_there = enumerate(zip(again.patients, again.numbers, strict=True))
    return again.subset([place for place, slice_ in slices_there if slice_ in wanted])


def sizes(preset: Preset) -> tuple[int, tuple[int, int]]:
    """What an engine is built for: images a batch, height and width."""
    side = preset.training.crop or preset.image_size
    return preset.training.batch_size, (side, side)


def side_of(net: UNet, preset: Preset) -> int | None:
    """The side of the windows in which whole images are predicted, if the network is trained on crops of them."""
    return memory.window_side(net) if preset.training.crop else None


def judge(net: UNet, slices: SliceSet, preset: Preset, device: Device, options: argparse.Namespace) -> Engine:
    """The engine that predicts: made for the windows of whole images, if the network is trained on crops of them."""
    if (side := side_of(net, preset)) is None:
        return build(net, preset, device, options, training=False)
    height, width = slices.images.shape[1:3]
    rows, columns = next(tiles(net, height, width, side))
    chosen = device, options.engine, options.precision
    return engines.build(net, preset.training.loss, 1, (rows.stop, columns.stop), *chosen, training=False)


@contextmanager
def explained(flag: str, needed: int, free: int | None, advice: str) -> Iterator[None]:
    """Says what would fit, if memory seems to be too little and if it is. What was saved last stays."""
    if free is not None and needed > free:
        print(f"warning: memory may run out, and the system may then kill this run: {advice}", flush=True)
    try:
        yield
    except MemoryError:
        raise UserError(f"{flag}: out of memory, {advice}") from None


def step_explained(net: UNet, preset: Preset, needed: memory.StepBytes) -> AbstractContextManager[None]:
    (batch, size), free = sizes(preset), memory.available_bytes(net)
    return explained("--batch-size", needed(net, size, batch), free, memory.advice(net, size, batch, free, needed))


def data_explained(options: argparse.Namespace, preset: Preset) -> AbstractContextManager[None]:
    size, free = preset.image_size, memory.host_bytes()
    if preset.training.crop is not None:  # how large the images are, is not known yet
        return nullcontext()
    if options.data is None:  # at most 24 patients of 25 slices, which are in memory twice when they are joined
        return explained("--image-size", 2 * memory.data_bytes(24 * 25, size), free, "choose smaller images")
    count = len(lgg.list_folder(options.data, folders=options.folders).pairs[: preset.limit])
    return explained("--image-size", memory.data_bytes(count, size), free, memory.data_advice(count, size, free))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; with --resume those that the run was started with, from its config.json."""
    parser = flags()
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
    if options.data is None:
        for name in ("folders", "invert_masks", "target_name"):
            if getattr(options, name) is not None:
                raise UserError(f"{flag(name)}: says how --data is read, and there is none, give --data")
    if options.split_file is not None:
        for name in ("split", "fold"):
            if getattr(options, name) is not None:
                raise UserError(f"{flag(name)}: not together with --split-file, which says who is in which part")


def flags() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="DIR", help="the folder kaggle_3m, or your own; left out: synthetic patients")
    verify.add_folder_arguments(parser)
    add("--preset", choices=sorted(PRESETS), help="the recipe; left out: quick, or small with --data")
    add("--output", metavar="DIR", help="the run's folder; left out: runs/<preset>, or the next free name")
    add("--resume", metavar="DIR", help="go on with the run in this folder; with --data, if its data have moved")
    add("--split-file", metavar="CSV", help="who is in which part: a line group,part, then one for each group")
    add("--split", choices=("patient", "slice"), help="slice repeats a flaw of the reference: neighbours on both sides")
    add("--augment", choices=(*AUGMENTATIONS, "image-only"), help="image-only repeats the other: masks stay in place")
    add("--fold", type=cli.integer(0, 4), help="which fifth of the patients is the test set (default 0)")
    add("--epochs", type=cli.positive_int)
    add("--images-per-epoch", type=cli.positive_int, metavar="N")
    add("--batch-size", type=cli.positive_int)
    add("--image-size", type=cli.image_size, help="pixels: the longer side of every image, which is resized")
    add("--crop", type=cli.image_size, help="pixels: learn from squares of this side, of images that are not resized")
    add("--learning-rate", type=cli.positive_float)
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
    "invert_masks",
    "target_name",
    "split_file",
    "images_per_epoch",
)

#: Those that say where a file or folder lies: it may be another place when the run is resumed.
PLACES = ("data", "split_file")

#: What those settings are that the runs of earlier versions did not have.
OLD = dict.fromkeys(("crop", "folders", "target_name", "split_file", "images_per_epoch")) | {"invert_masks": False}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    settings = {name: getattr(options, name) for name in SETTINGS}
    return settings | {name: str(Path(settings[name]).resolve()) for name in PLACES if settings[name] is not None}


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


def read_data(options: argparse.Namespace, preset: Preset) -> Parts:
    """The slices, read or drawn, and split."""
    if options.data is None:
        print("data: no --data given, so synthetic patients are drawn (the phantom)")
        with data_explained(options, preset):
            slices = phantom.make(size=preset.image_size, seed=0)
    else:
        print(f"data: reading {images.shown(options.data)}", flush=True)
        if options.resume is not None and not Path(options.data).exists():
            raise UserError(f"{images.shown(options.data)}: no such folder, say by --data where the run's data are now")
        size = None if preset.training.crop else preset.image_size
        with data_explained(options, preset):
            slices = lgg.read_folder(options.data, size, limit=preset.limit, **verify.folder_options(options))
        print(verify.inspect(slices), flush=True)
    words = slices.words
    if options.split_file is not None:
        indices = split_by_file(slices.patients, options.split_file)
    elif options.split == "slice":
        sides = f"{words.image}s of one {words.group} on both sides"
        print(f"note: --split slice puts {sides}; its figures say little about new {words.group}s")
        indices = split_by_slice(len(slices), options.seed)
    else:
        indices = split_by_patient(slices.patients, options.fold)
    train, validation, test = slices.split(indices)
    print(f"data: {describe(train)} to train, {describe(validation)} to validate, {describe(test)} to test", flush=True)
    return Parts(train, validation, test)


def describe(slices: SliceSet) -> str:
    words = slices.words
    return f"{len(slices.patient_names())} {words.group}s ({len(slices)} {words.image}s)"


if __name__ == "__main__":
    sys.exit(cli.run(main))
