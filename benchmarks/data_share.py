"""How much of an epoch is not the step: one real epoch of training, taken apart.

    python benchmarks/data_share.py                                        the embedded default
    python benchmarks/data_share.py --data kaggle_3m --preset small        on LGG-MRI

Runs ``minunet.training.loop.fit`` for one epoch, with a clock at the functions it calls. Where a thread prepares
batches while steps run, their cost is no wait: it is what the thread takes from the step, of the cores and of Python's
lock. So every second step is taken once more, on the same batch, when the thread has nothing left to do: that is a step
by itself. What the epoch took longer than so many of these is the share of everything outside of the step: sampling,
reading, normalising, augmenting, waiting. What comes once a run, and what comes once an epoch after its steps, have
rows of their own.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from minunet import engines
from minunet.base.environment import environment
from minunet.data import phantom, reader
from minunet.data.splits import split_by_patient
from minunet.network.unet import UNet
from minunet.training import loop
from minunet.training.presets import PRESETS

CLOCKED = ("epoch_order", "train_step", "evaluate", "save_training")


class Clock:
    """Starts and ends of the calls of some functions of ``minunet.training.loop``; of steps by themselves, "alone"."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[float, float]]] = {name: [] for name in (*CLOCKED, "alone")}

    def __enter__(self) -> "Clock":
        self._before = {name: getattr(loop, name) for name in CLOCKED}
        for name, function in self._before.items():
            setattr(loop, name, self._clocked(function, name))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, function in self._before.items():
            setattr(loop, name, function)

    def _clocked(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def clocked(*arguments: Any, **options: Any) -> Any:
            result = self._call(name, function, *arguments, **options)
            if name == "train_step" and len(self.calls[name]) % 2 == 0:
                self._call("alone", function, *arguments, **options)
            return result

        return clocked

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        result = function(*arguments, **options)
        self.calls[name].append((begun, time.perf_counter()))
        return result

    def seconds(self, name: str) -> float:
        """The time in all calls of a function together."""
        return sum(end - begun for begun, end in self.calls[name])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder kaggle_3m; without it, synthetic patients")
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--engine", choices=get_args(engines.EngineChoice), default="auto")
    parser.add_argument("--images", type=int, help="images an epoch, to have it shorter")
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]
    config = replace(preset.training, epochs=1, warmup_epochs=0.0)
    if options.images:
        config = replace(config, images_per_epoch=options.images)

    begun = time.perf_counter()
    size = preset.image_size
    slices = phantom.make(size=size, seed=0) if options.data is None else reader.read_folder(options.data, size)
    loaded = time.perf_counter()
    parts = split_by_patient(slices.patients, 0)
    train, validation = slices.subset(parts.train), slices.subset(parts.validation)
    split = time.perf_counter()
    preset.normalization.statistics(train)
    counted = time.perf_counter()

    net = UNet(**preset.model, seed=0)
    build = engines.build(net, config.loss, config.batch_size, (size, size), choice=options.engine)
    with Clock() as clock, tempfile.TemporaryDirectory() as folder, build as engine:
        loop.fit(engine, loop.TrainingData(train, validation, preset.normalization), config, folder, progress_bar=False)
    steps, alone = (len(clock.calls[name]) for name in ("train_step", "alone"))
    epoch = clock.calls["train_step"][-1][1] - clock.calls["epoch_order"][0][0]
    epoch -= sum(end - begun for begun, end in clock.calls["alone"] if end < clock.calls["train_step"][-1][1])
    step, by_itself = clock.seconds("train_step") / steps, clock.seconds("alone") / alone
    rows = {
        f"once: reading {len(slices)} slices": f"{loaded - begun:.2f} s",
        "once: splitting": f"{split - loaded:.2f} s",
        "once: the volumes' statistics": f"{counted - split:.2f} s",
        f"the steps of an epoch, {steps} of {config.batch_size} images": f"{epoch:.2f} s",
        "a step by itself": f"{1e3 * by_itself:.1f} ms",
        "a step in the epoch": f"{1e3 * step:.1f} ms",
        "from one step to the next": f"{1e3 * (epoch / steps - step):.1f} ms",
        "sampling": f"{1e3 * clock.seconds('epoch_order'):.1f} ms",
        "**outside of the step**": f"**{100 * (1 - steps * by_itself / epoch):.1f} %**",
        "after the steps: validation and training Dice": f"{clock.seconds('evaluate'):.2f} s",
        "after the steps: checkpoints": f"{clock.seconds('save_training'):.2f} s",
    }
    machine = environment()
    print(f"{machine['cpu']}, NumPy {machine['numpy']}; preset {options.preset}, {size} x {size}\n")
    print("| what | figure |\n|---|---|")
    for what, figure in rows.items():
        print(f"| {what} | {figure} |")


if __name__ == "__main__":
    main(sys.argv[1:])
