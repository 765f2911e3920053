"""Train a U-Net to find brain tumours on MR slices, or what your own masks mark, and say honestly how well it does.

    minunet train                                  on synthetic patients, minutes on a laptop
    minunet train --data kaggle_3m --preset small  on LGG-MRI, on a laptop
    minunet train --data kaggle_3m --preset best   on LGG-MRI, on a GPU
    minunet train --data my_data                   on your own images: docs/your_data.md
    minunet train --data my_data --init runs/small/best.npz --train-only up1,head
                                                   fine-tune a trained network: docs/library.md
    minunet train --resume runs/small              go on with a run that was stopped

Everything a run computes lies in its folder when it ends: config.json, history.csv, metrics.json, four pictures,
and the checkpoints best.npz and last.npz, from which images are predicted.
"""

import argparse
import hashlib
import json
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minunet import engines
from minunet.base import cli
from minunet.base.backend import Device, gpu_pool_bytes, to_device
from minunet.base.durable import json_text, open_regular, read_text, write_text
from minunet.base.environment import differences, environment
from minunet.base.errors import UserError
from minunet.base.run_folder import next_free_folder, run_folder
from minunet.base.signals import StopRequest
from minunet.commands.training_options import PLACES, choose_preset, parse, settings_of
from minunet.data import images, phantom, reader, verify
from minunet.data.slices import SliceSet
from minunet.data.splits import split_by_file, split_by_patient, split_by_slice
from minunet.engines import memory
from minunet.network.layers import map_arrays
from minunet.network.loss import Loss, SegmentationLoss, SoftmaxLoss
from minunet.network.unet import UNet
from minunet.summary import summary
from minunet.training.checkpoint import Weights, load_metadata, load_net, load_weights
from minunet.training.evaluation import predict_slices
from minunet.training.loop import FolderLost, Hooks, TrainingData, check_batches, fit
from minunet.training.optim import named
from minunet.training.presets import Preset
from minunet.training.step import Engine
from minunet.training.tiles import tiles


def main(arguments: list[str], program: str = "minunet train") -> None:
    """Train as the command line says; ``program`` is how it begins, for the lines that tell how to use it."""
    options = parse(arguments, program, (__doc__ or "").replace("minunet train", program))
    from minunet.results import report  # not above: matplotlib takes half a second, too long for --help

    engines.limit_cores(options.cores)
    device = cli.announce_device(options.device)
    preset = choose_preset(options, device)
    parts = read_data(options, preset)
    preset = for_targets(preset, parts.train)
    net = make_network(preset, options.seed, parts.train, device)
    init = start_weights(net, preset, parts.train, options)
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
                    metadata={"preprocessing": preprocessing(preset), **of_data(parts.train), **init},
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
            again = f"{program} {shlex.join([f'--resume={folder}'])}"
            print(f"stopped in epoch {progress.epoch_number}; go on with: {images.shown(again)}")
        stop.exit_if_requested()
        named = parts.train.words, parts.train.target_names()
        report.write_curves(folder, progress.history, progress.best_epoch, *named)
        test(folder, parts.test, preset, device, options)
        files = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
        print(f"everything lies in {images.shown(folder)}: {images.shown(', '.join(files))}")


class Parts(NamedTuple):
    """The slices to train, validate and test on."""

    train: SliceSet
    validation: SliceSet
    test: SliceSet


def for_targets(preset: Preset, slices: SliceSet) -> Preset:
    """The preset with the network's output and the loss that the masks ask for. For one mask it is as it was."""
    loss, channels = preset.training.loss, len(slices.classes) or slices.masks.shape[3]
    if slices.is_binary or not isinstance(loss, SegmentationLoss):
        return preset
    model: dict[str, Any] = {**preset.model, "out_channels": channels}
    of_targets: Loss = replace(loss, over="class")
    if slices.classes:
        model["output"] = "softmax"
        of_targets = SoftmaxLoss(loss.dice_weight, loss.bce_weight, loss.smooth)
    return replace(preset, model=model, training=replace(preset.training, loss=of_targets))


def make_network(preset: Preset, seed: int, train: SliceSet, device: Device) -> UNet:
    """The network of the preset, on ``device``."""
    net = UNet(**preset.model, in_channels=train.images.shape[3], seed=seed)
    check_batches(net, train, preset.training)
    try:
        named(net.parameters(), preset.training.train_only)
    except ValueError as error:
        raise UserError(f"--train-only: {error}") from None
    size = summary(net, preset.image_size, preset.image_size)
    said = f"network: {size.parameters:,} parameters, {size.flops / 1e9:.2f} GFLOP an image forward"
    if not train.is_binary:
        names = ", ".join(train.classes or train.target_names())
        output = "a softmax over the classes" if train.classes else "a sigmoid for each mask, which may overlap:"
        said += f"; {output} {names}; {type(preset.training.loss).__name__}"
    print(said, flush=True)
    on_device: UNet = map_arrays(net, lambda array: to_device(array, device))
    return on_device


def start_weights(net: UNet, preset: Preset, train: SliceSet, options: argparse.Namespace) -> dict[str, Any]:
    """Give ``net`` the weights of ``--init``, if that was given. Returns what the run's checkpoints note of them.

    A line says if the images of that network were prepared in another way than those of this run.
    """
    if options.init is None:
        return {}
    if options.resume is not None:  # its last.npz has the weights, and the note
        return {"init": load_metadata(Path(options.resume) / "last.npz").get("init")}
    weights: Weights = options.init_weights or "auto"
    found = load_weights(options.init, net, weights)
    now = {**preprocessing(preset), **of_data(train)}
    then = found.get("preprocessing")
    then = {**(then if isinstance(then, dict) else {}), "kind": found.get("kind")}
    prepared = ("image_size", "normalization", "kind")
    if changed := differences({name: then.get(name) for name in prepared}, {name: now[name] for name in prepared}):
        print(f"note: --init: the images of that network were not prepared as these are ({'; '.join(changed)})")
    with open_regular(options.init) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"network: begins with the weights of {images.shown(options.init)}", flush=True)
    return {"init": {"path": str(Path(options.init).resolve()), "sha256": digest, "weights": weights}}


def build(net: UNet, preset: Preset, device: Device, options: argparse.Namespace, *, training: bool = True) -> Engine:
    """The engine for ``net`` that the options ask for."""
    batch, size = sizes(preset)
    chosen = device, options.engine, options.precision
    return engines.build(net, preset.training.loss, batch, size, *chosen, training=training)


def step_bytes(net: UNet, preset: Preset, device: Device, options: argparse.Namespace) -> memory.StepBytes:
    """How much memory a step of that engine needs. Raises UserError if it cannot be had: before anything is written."""
    plain = engines.unsupported(net, preset.training.loss, *sizes(preset), device, options.engine, options.precision)
    fast = plain is None and preset.training.train_only is None  # frozen batch norms take the plain path
    return engines.step_bytes(device, options.engine if fast else "plain", options.precision)


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
    alone = len(slices.patient_names()) == len(slices)
    noted = {
        "kind": images.kind_of(slices.images[0])._asdict(),
        "words": asdict(slices.words),
        "volume": "image" if alone else "group",  # whose grey values are normalised together
    }
    return {**noted, "classes": slices.classes} if slices.classes else noted


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
    from minunet.results import report

    write_text(folder / "config.json", json_text(config))
    report.write_samples(folder, parts.train, preset.training, preset.normalization)


def keep_places(folder: Path, options: dict[str, Any]) -> None:
    """Write into config.json where the files of a resumed run lie now: the same, but they may have been moved."""
    config = json.loads(read_text(folder / "config.json"))
    places = {name: options[name] for name in PLACES}
    if any(config["options"].get(name) != place for name, place in places.items()):
        config["options"] |= places
        write_text(folder / "config.json", json_text(config))


def test(folder: Path, slices: SliceSet, preset: Preset, device: Device, options: argparse.Namespace) -> None:
    """Test the checkpoint that the preset keeps, and write and print the table."""
    from minunet.results import report

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
    print(report.write_test(folder, slices, probabilities, preset.normalization, own, **extra))


def read_again(slices: SliceSet, options: argparse.Namespace) -> SliceSet:
    """The test slices at the size of their files."""
    again = reader.read_folder(options.data, None, patients=slices.patient_names(), **verify.folder_options(options))
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
    """:func:`explained`, for the steps."""
    (batch, size), free = sizes(preset), memory.available_bytes(net)
    return explained("--batch-size", needed(net, size, batch), free, memory.advice(net, size, batch, free, needed))


def data_explained(options: argparse.Namespace, preset: Preset) -> AbstractContextManager[None]:
    """:func:`explained`, for reading the data."""
    size, free = preset.image_size, memory.host_bytes()
    if preset.training.crop is not None:  # how large the images are, is not known yet
        return nullcontext()
    if options.data is None:  # at most 24 patients of 25 slices, which are in memory twice when they are joined
        return explained("--image-size", 2 * memory.data_bytes(24 * 25, size), free, "choose smaller images")
    count = len(reader.list_folder(options.data, folders=options.folders).pairs[: preset.limit])
    return explained("--image-size", memory.data_bytes(count, size), free, memory.data_advice(count, size, free))


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
            slices = reader.read_folder(options.data, size, limit=preset.limit, **verify.folder_options(options))
        print(verify.inspect(slices, grouped=options.split_file is not None), flush=True)
    crop, (height, width) = preset.training.crop, slices.images.shape[1:3]
    if crop is not None and crop > max(height, width):
        largest = f"{width} x {height} pixels at most"
        raise UserError(f"--crop: {crop} is larger than every image ({largest}), choose a smaller one")
    words = slices.words
    if options.split_file is not None:
        indices = split_by_file(slices.patients, options.split_file)
    elif options.split == "slice":
        sides = f"{words.image}s of one {words.group} on both sides"
        print(f"note: --split slice puts {sides}; its figures say little about new {words.group}s")
        indices = split_by_slice(len(slices), options.seed)
    else:
        indices = split_by_patient(slices.patients, options.fold)
    parts = Parts(*slices.split(indices))
    shares = (f"{describe(part)} to {what}" for what, part in zip(("train", "validate", "test"), parts, strict=True))
    print(f"data: {', '.join(shares)}", flush=True)
    for what, part in zip(("training", "validation", "test"), parts, strict=True):
        if not part.is_binary and (unseen := never_marked(part)):
            print(
                f"warning: {what}: no {words.image} shows {', '.join(unseen)}; its figures say nothing of it",
                flush=True,
            )
    return parts


def never_marked(slices: SliceSet) -> list[str]:
    """The targets that are on none of the slices."""
    on_each = [slices.marked(index).any(axis=(0, 1)) for index in range(len(slices))]
    return [name for name, on_any in zip(slices.target_names(), np.any(on_each, axis=0), strict=True) if not on_any]


def describe(slices: SliceSet) -> str:
    """How many groups and images there are, in the words of the data set."""
    words = slices.words
    return f"{len(slices.patient_names())} {words.group}s ({len(slices)} {words.image}s)"
