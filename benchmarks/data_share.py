"""How much of an epoch is not the step: one real epoch of training, taken apart.

    python benchmarks/data_share.py                                        the embedded default
    python benchmarks/data_share.py --data kaggle_3m --preset small        on LGG-MRI

Runs ``minunet.training.fit`` for one epoch, with a clock at the functions it calls. Batches are prepared by a thread
while steps run, so that their cost is no wait: it is what the thread takes from the step, of the cores and of Python's
lock. So the step is timed once more by itself, over and over on one batch with no thread beside it, and what the epoch
took longer than so many of these is the share of everything outside of the step: sampling, reading, normalising,
augmenting, waiting. What comes once a run, and what comes once an epoch after its steps, have rows of their own.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minunet import engines, training
from minunet.checkpoint import environment
from minunet.data import lgg, phantom
from minunet.data.batches import prepare_batch
from minunet.data.splits import split_by_patient
from minunet.presets import PRESETS
from minunet.rng import Key
from minunet.unet import UNet

CLOCKED = ("epoch_order", "prepare_batch", "train_step", "evaluate", "save_training")


class Clock:
    """Starts, ends and processor times of the calls of some functions of ``minunet.training``."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CLOCKED}

    def __enter__(self) -> "Clock":
        self._before = {name: getattr(training, name) for name in CLOCKED}
        for name, function in self._before.items():
            setattr(training, name, self._clocked(function, self.calls[name]))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, function in self._before.items():
            setattr(training, name, function)

    @staticmethod
    def _clocked(function: Callable[..., Any], calls: list[tuple[float, float, float]]) -> Callable[..., Any]:
        def clocked(*arguments: Any, **options: Any) -> Any:
            begun, worked = time.perf_counter(), time.thread_time()
            result = function(*arguments, **options)
            calls.append((begun, time.perf_counter(), time.thread_time() - worked))
            return result

        return clocked

    def seconds(self, name: str) -> float:
        """The time in all calls of a function together."""
        return sum(end - begun for begun, end, _ in self.calls[name])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder kaggle_3m; without it, synthetic patients")
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--engine", choices=engines.CHOICES, default="auto")
    parser.add_argument("--images", type=int, help="images an epoch, to have it shorter")
    parser.add_argument("--repeats", type=int, default=30, help="steps by themselves")
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]
    config = replace(preset.training, epochs=1, warmup_epochs=0.0)
    if options.images:
        config = replace(config, images_per_epoch=options.images)

    begun = time.perf_counter()
    size = preset.image_size
    slices = phantom.make(size=size, seed=0) if options.data is None else lgg.read_folder(options.data, size)
    loaded = time.perf_counter()
    parts = split_by_patient(slices.patients, 0)
    train, validation = slices.subset(parts.train), slices.subset(parts.validation)
    split = time.perf_counter()
    of_train = preset.normalization.statistics(train)
    counted = time.perf_counter()

    net = UNet(**preset.model, seed=0)
    with Clock() as clock, tempfile.TemporaryDirectory() as folder:
        training.fit(
            net,
            train,
            validation,
            config,
            normalization=preset.normalization,
            folder=folder,
            engine=options.engine,
            progress_bar=False,
        )
    # Of prepare_batch, only the calls that made the steps' batches: evaluation prepares its own.
    steps = clock.calls["train_step"]
    last = steps[-1][1]
    prepared = [worked for _, end, worked in clock.calls["prepare_batch"] if end < last]
    epoch = last - clock.calls["epoch_order"][0][0]

    batch = prepare_batch(
        train,
        of_train,
        np.arange(config.batch_size),
        "cpu",
        augmentation=config.augmentation,
        key=Key(0),
    )
    with engines.build(net, config.loss, config.batch_size, (size, size), choice=options.engine) as engine:
        optimizer = engine.optimizer(net.parameters(), config.lr)
        ema = None if config.ema_decay is None else engine.average(net.parameters() | net.buffers(), config.ema_decay)
        alone = []
        for step in range(options.repeats + 2):
            started = time.perf_counter()
            training.train_step(
                net,
                optimizer,
                batch.x,
                batch.target,
                config.loss,
                Key(0, step=step),
                lr=config.lr,
                clip_norm=config.clip_norm,
                ema=ema,
                engine=engine,
            )
            alone.append(time.perf_counter() - started)
        step_alone = statistics.median(alone[2:])
        name = engine.name
    rows = {
        f"once: reading {len(slices)} slices": f"{loaded - begun:.2f} s",
        "once: splitting": f"{split - loaded:.2f} s",
        "once: the volumes' statistics": f"{counted - split:.2f} s",
        f"the steps of an epoch, {len(steps)} of {config.batch_size} images": f"{epoch:.2f} s",
        "a step by itself": f"{1e3 * step_alone:.1f} ms",
        "a step in the epoch, beside the preparing thread": f"{1e3 * clock.seconds('train_step') / len(steps):.1f} ms",
        "preparing a batch, processor time": f"{1e3 * statistics.median(prepared):.1f} ms",
        "sampling": f"{1e3 * clock.seconds('epoch_order'):.1f} ms",
        "**outside of the step**": f"**{100 * (1 - len(steps) * step_alone / epoch):.1f} %**",
        "after the steps: validation and training Dice": f"{clock.seconds('evaluate'):.2f} s",
        "after the steps: checkpoints": f"{clock.seconds('save_training'):.2f} s",
    }
    machine = environment()
    print(f"{machine['cpu']}, NumPy {machine['numpy']}; preset {options.preset}, {size} x {size}, engine: {name}\n")
    print("| what | figure |\n|---|---|")
    for what, figure in rows.items():
        print(f"| {what} | {figure} |")


if __name__ == "__main__":
    main(sys.argv[1:])
