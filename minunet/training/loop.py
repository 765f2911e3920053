"""The run: it draws the batches, takes the steps, looks at the validation patients after each epoch, and saves.

It can go on from a checkpoint as if nothing had happened, because all randomness is a function of (seed, epoch, step,
stream, image), and of nothing that would have to be remembered.
"""

import hashlib
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np

from minunet.base import rng
from minunet.base.archive import sha256_of_arrays
from minunet.base.backend import Array
from minunet.base.durable import held, is_same, json_text, write_text
from minunet.base.environment import differences, environment
from minunet.base.errors import Diverged, UserError
from minunet.base.run_folder import next_free_folder
from minunet.data.batches import Batch, epoch_order, in_chunks, prefetch
from minunet.data.images import shown
from minunet.data.normalize import Normalization, VolumeStatistics
from minunet.data.slices import SliceSet
from minunet.network.layers import frozen_norms, map_arrays, norms_frozen
from minunet.network.loss import SegmentationLoss, SoftmaxLoss
from minunet.network.unet import UNet
from minunet.training.checkpoint import load_history, load_metadata, load_training, save_training
from minunet.training.config import TrainingConfig
from minunet.training.evaluation import Evaluation, evaluate
from minunet.training.optim import named, norms_and_biases
from minunet.training.step import Engine, train_step


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from, what it chooses its best epoch on, and how the images of both are normalised."""

    train: SliceSet
    validation: SliceSet
    normalization: Normalization
    test: SliceSet | None = None  # fit never looks at it, but a resumed run has to find the same one


@dataclass
class Progress:
    """How far a run has come: what a checkpoint stores beside the network."""

    epoch: int = 0  # epochs done
    step: int = 0  # steps done in the epoch that runs
    loss_sum: float = 0.0  # over its steps
    best_epoch: int | None = None  # from 1, as in the history
    best_value: float | None = None  # of the monitored quantity
    history: list[dict[str, float]] = field(default_factory=list)  # one row an epoch
    finished: bool = False

    @property
    def epoch_number(self) -> int:
        """The number of the epoch that runs, from 1, as people count and the history does."""
        return self.epoch + 1

    def stored(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What :meth:`read` takes: all but the history, and the history's columns, each of one value an epoch."""
        entries = {name: value for name, value in vars(self).items() if name != "history"}
        return entries, {name: np.array([row[name] for row in self.history]) for name in COLUMNS}

    @classmethod
    def read(cls, stored: Any, columns: Mapping[str, np.ndarray], epochs: int, steps: int) -> "Progress":
        """The progress that a checkpoint has stored, of a run of so many epochs of so many steps.

        Without ``columns`` the history is in ``stored``, one dict a row, as earlier versions wrote it.

        Raises ValueError if no such run can have got there: anybody may have written the file.
        """
        try:
            progress = cls(**stored)
            if missing := {"epoch", "step", "loss_sum", "best_epoch", "best_value", "finished"} - stored.keys():
                raise ValueError(f"lacks {missing}")
            if columns:
                values = zip(*(columns[name].tolist() for name in COLUMNS), strict=True)
                progress.history = [dict(zip(COLUMNS, row, strict=True)) for row in values]
            rows = [_is_row(row, epoch) for epoch, row in enumerate(progress.history, start=1)]
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise ValueError("no progress of a run") from error
        epoch, best = progress.epoch, progress.best_epoch
        holds = (
            _is_count(epoch, epochs)
            and _is_count(progress.step, steps)
            and _is_number(progress.loss_sum)
            and (_is_count(best, epoch) and best > 0 and _is_number(progress.best_value) if epoch else best is None)
            and type(progress.history) is list
            and (len(rows), all(rows)) == (epoch, True)
            and type(progress.finished) is bool
            and (progress.finished or epoch < epochs)
        )
        if not holds:
            raise ValueError("no progress of such a run")
        return progress


#: What a row of the history holds.
COLUMNS = "epoch", "learning_rate", "train_loss", "validation_loss", "train_dice", "validation_dice"


def _is_count(value: Any, largest: int) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= largest


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # an int may be too large for a float


def _is_row(row: Mapping[str, Any], epoch: int) -> bool:
    """Whether ``row`` may be the history's of that epoch."""
    scores = row.get("train_dice"), row.get("validation_dice")
    return (
        set(row) == set(COLUMNS)
        and all(map(_is_number, row.values()))
        and row["epoch"] == epoch
        and row["learning_rate"] >= 0
        and all(0 <= score <= 1 for score in scores if score is not None)
    )


@dataclass(frozen=True)
class Hooks:
    """What a caller may want to do in the course of a run: functions that :func:`fit` calls."""

    #: After each step. If it says yes, ``last.npz`` is written in mid-epoch, and fit returns.
    should_stop: Callable[[], bool] | None = None
    #: When everything of an epoch is written, with the progress, whose ``history[-1]`` is the epoch's row, and the
    #: network that was judged. If it returns True, fit returns. It may raise, too: ``last.npz`` is then the state after
    #: that epoch, and ``resume`` continues with the next one.
    after_epoch: Callable[[Progress, UNet], bool | None] | None = None


class FolderLost(UserError):
    """The run's folder was deleted, moved or replaced while it ran. Its state was saved in ``folder``, a new one."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


# What overflows here is no warning: the same step finds it, and names the place.
@np.errstate(all="ignore")
def fit(
    engine: Engine,
    data: TrainingData,
    config: TrainingConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    metadata: Mapping[str, Any] | None = None,
    hooks: Hooks = Hooks(),
    progress_bar: bool = True,
    judge: Engine | None = None,
    side: int | None = None,
) -> Progress:
    """Train the network of ``engine`` on ``data.train``, and choose the best epoch on ``data.validation``.

    A new run begins with the weights that the network has, be they drawn or another run's. ``engine`` comes from
    ``minunet.engines.build``, or is the plain path, ``Engine(net, config.loss)``.

    After each epoch ``folder`` receives ``last.npz``, from which ``resume`` goes on bit for bit, ``best.npz``, the
    checkpoint of the best epoch so far, and ``history.csv``. The first ``last.npz`` is written before the first step:
    a disk without room for it is found then. ``metadata`` is stored in the checkpoints: how the images were prepared,
    so that a prediction can do the same.

    With ``config.train_only`` the other parameters stay as they are, bit for bit: the optimiser has no moments of them,
    and they neither decay nor count in the clipped norm. A batch norm of which nothing is trained is frozen as Keras
    freezes it: it normalises by its running statistics, and keeps them. No engine has such batch norms: the steps then
    take the plain path, which a line says, and ``engine`` judges.

    With ``config.crop`` the network learns from squares of the images and is judged on whole ones, in tiles of about
    ``side`` pixels (None: whole images at once), by the engine ``judge``, which was built for them (None: ``engine``).

    Raises Diverged, naming epoch, step and files, when a loss or gradient is NaN or infinite (``last.npz`` is then
    the state before that epoch, or where the run was stopped in it), FolderLost if ``folder`` was deleted, moved or
    replaced in the meantime, UserError if there is nothing to resume, it belongs to another run, or
    :func:`check_batches` refuses, and ValueError if the engine was built for another loss than the config's, if the
    loss, the network's output and the data are not all of masks or all of classes, or if ``config.train_only`` names a
    part that the network does not have.
    """
    if engine.loss != config.loss:
        raise ValueError(f"engine must be one for the config's loss, {config.loss}, got one for {engine.loss}")
    wanted = {SegmentationLoss: "sigmoid", SoftmaxLoss: "softmax"}.get(type(config.loss))
    if wanted is not None and engine.net.config["output"] != wanted:
        found = engine.net.config["output"]
        raise ValueError(f"the network must have output={wanted!r} for a {type(config.loss).__name__}, got {found!r}")
    if classes := len(data.train.classes):
        if type(config.loss) is SegmentationLoss:  # which would learn from the pixels that are to be ignored
            raise ValueError(f"data of {classes} classes need a SoftmaxLoss and a network with output='softmax'")
        if (channels := engine.net.config["out_channels"]) != classes:
            raise ValueError(f"data of {classes} classes need a network with out_channels={classes}, got {channels}")
    trained = named(engine.net.parameters(), config.train_only)
    check_batches(engine.net, data.train, config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config.crop is not None:
        side = side or max(data.train.images.shape[1:3])
    with held(folder), norms_frozen(engine.net, trained):
        judge = judge or engine
        if (frozen := frozen_norms(engine.net)) and type(engine) is not Engine:
            plain = Engine(engine.net, engine.loss)
            plain.reason = f"{frozen[0]} is frozen, which the engine cannot compute"
            print(f"engine of the steps: {plain.description}", flush=True)
            engine = plain
        run = _Run(engine, data, config, folder, dict(metadata or {}), judge, side)
        if resume:
            run.resume()
        else:
            run.save("last.npz")
        try:
            while not run.progress.finished:
                if not run.train_epoch(hooks.should_stop, progress_bar):
                    run.save("last.npz")
                    break
                run.finish_epoch()
                if hooks.after_epoch is not None and hooks.after_epoch(run.progress, run.averaged_net()):
                    break
        except UserError:
            if not is_same(folder):
                run.save_elsewhere()
            raise
        return run.progress


def check_batches(net: UNet, train: SliceSet, config: TrainingConfig) -> None:
    """Raise UserError if a batch of an epoch is too small for batch norm, which needs two values in each channel.

    Only an image that the bottleneck sees as a single pixel can be too few, when it is alone in its batch: as all
    are with a batch size of 1, and the last one where the batch size does not divide the number of images.
    """
    height, width = train.images.shape[1:3] if config.crop is None else (config.crop, config.crop)
    last = (config.images_per_epoch or len(train)) % config.batch_size or config.batch_size
    if last == 1 and (height, width) == (2**net.depth, 2**net.depth):
        raise UserError(
            f"--batch-size: {config.batch_size} leaves a batch of one image, which at {width} x {height} pixels is one "
            "pixel in the bottleneck and too little for batch norm, choose another one or larger images"
        )


class _Run:
    """The state of one call of :func:`fit`, and its parts."""

    def __init__(
        self,
        engine: Engine,
        data: TrainingData,
        config: TrainingConfig,
        folder: Path,
        metadata: dict[str, Any],
        judge: Engine,
        side: int | None,
    ) -> None:
        self.engine, self.net = engine, engine.net
        self.judge, self.side = judge, side
        self.config, self.folder = config, folder
        parameters = named(self.net.parameters(), config.train_only)
        no_decay = () if config.decay_norms_and_biases else norms_and_biases(parameters)
        self.optimizer = engine.optimizer(parameters, config.lr, weight_decay=config.weight_decay, no_decay=no_decay)
        # An average of what does not change would change it, by rounding.
        frozen = frozen_norms(self.net)
        buffers = {name: a for name, a in self.net.buffers().items() if name.rpartition(".")[0] not in frozen}
        self.ema = None if config.ema_decay is None else engine.average(parameters | buffers, config.ema_decay)
        statistics = data.normalization.statistics
        self.train, self.train_statistics = data.train, statistics(data.train)
        self.validation, self.validation_statistics = data.validation, statistics(data.validation)
        # Training Dice is measured as the validation's is, on whole patients as they are: the two curves compare.
        self.train_sample = _some_patients(data.train, len(data.validation))
        self.images_per_epoch = config.images_per_epoch or len(data.train)
        self.steps_per_epoch = -(-self.images_per_epoch // config.batch_size)
        self.progress = Progress()
        self.metadata = {
            **metadata,
            "training": config.settings(),
            "data": _described(data),
            "engine": engine.name,
        }

    def resume(self) -> None:
        path = self.folder / "last.npz"
        self._check_same_run(path, load_metadata(path), "resume with the same settings and data")
        history = load_history(path)
        found = load_training(path, self.net, self.optimizer, self.ema)
        environment_then = found.get("environment")
        then = {
            **(environment_then if isinstance(environment_then, dict) else {}),
            "engine": found.get("engine", "plain"),
        }
        if changed := differences(then, environment() | {"engine": self.engine.name}):
            print(f"warning: not as it was, so that the last bits may differ: {'; '.join(changed)}", flush=True)
        try:
            self.progress = Progress.read(found.get("progress"), history, self.config.epochs, self.steps_per_epoch)
            self._check_progress()
        except ValueError:
            raise UserError(f"{path}: does not say how far its run had come, start a new run") from None
        self._write_history()  # a kill may have come between last.npz and history.csv
        best = self.folder / "best.npz"
        if self.progress.best_epoch is not None and not best.exists():
            print(f"warning: {shown(best)}: missing, the state in last.npz takes its place", flush=True)
            self.progress.best_epoch = self.progress.epoch
            self.progress.best_value = self._value(self.progress.history[-1])
            self.save("best.npz")
        elif self.progress.best_epoch is not None:
            self._check_same_run(best, load_metadata(best), "remove it and resume: last.npz takes its place")

    def _check_same_run(self, path: Path, found: Mapping[str, Any], advice: str) -> None:
        """Raise UserError unless the metadata ``found`` in a checkpoint have the settings and the data of this run."""
        stored = found.get("data")
        # Earlier versions noted less of the data.
        always = "train_slices", "train_sha256", "validation_slices", "validation_sha256"
        known = {*always, *(stored if isinstance(stored, dict) else ())}
        data = {name: value for name, value in self.metadata["data"].items() if name in known}
        for part, now in (("training", self.metadata["training"]), ("data", data)):
            if changed := differences(found.get(part), now):
                raise UserError(f"{path}: belongs to another run ({'; '.join(changed)}), {advice}")

    def _check_progress(self) -> None:
        """Raise ValueError unless the counts of steps, and the best epoch, are those of such a progress."""
        progress = self.progress
        steps = progress.epoch * self.steps_per_epoch + progress.step
        if self.optimizer.steps != steps or (self.ema is not None and self.ema.updates != steps):
            raise ValueError("other steps")
        best = progress.best_epoch
        if best is not None and progress.best_value != self._value(progress.history[best - 1]):
            raise ValueError("another value of the best epoch")

    def train_epoch(self, should_stop: Callable[[], bool] | None, progress_bar: bool) -> bool:
        """Take the steps of this epoch that are not done yet. False if ``should_stop`` said so before its end."""
        config, progress = self.config, self.progress
        key = rng.Key(config.seed, epoch=progress.epoch)
        order = epoch_order(self.train, config.sampling, self.images_per_epoch, key)
        chunks = in_chunks(order, config.batch_size)
        steps = range(progress.step, len(chunks))

        def prepare(step: int) -> Batch:
            return self.engine.prepare_batch(
                self.train,
                self.train_statistics,
                chunks[step],
                crop=config.crop,
                augmentation=config.augmentation,
                move_masks=config.augment_masks,
                key=self._key(step),
            )

        with _bar(f"epoch {progress.epoch_number}/{config.epochs}", len(chunks), progress.step, progress_bar) as bar:
            batches = prefetch(prepare, steps, self.engine.ahead)
            for step, batch in zip(steps, batches, strict=True):
                try:
                    loss, _ = train_step(
                        self.net,
                        self.optimizer,
                        batch.x,
                        batch.target,
                        config.loss,
                        self._key(step),
                        lr=config.learning_rate(self.optimizer.steps, self.steps_per_epoch),
                        clip_norm=config.clip_norm,
                        batch_norm_momentum=config.batch_norm_momentum,
                        ema=self.ema,
                        engine=self.engine,
                    )
                except Diverged as error:
                    place = f"epoch {progress.epoch_number}, step {step + 1}"
                    raise Diverged(
                        f"{place}: {error}; lower the learning rate or look at the images; "
                        f"the batch was {', '.join(batch.files)}"
                    ) from None
                progress.step = step + 1
                progress.loss_sum += loss
                bar.set_postfix(loss=f"{progress.loss_sum / progress.step:.4f}", **self._last_dice(), refresh=False)
                bar.update()
                if should_stop is not None and should_stop():
                    batches.close()
                    return False
        return True

    def finish_epoch(self) -> None:
        """Measure, judge and save: what follows on the last step of an epoch."""
        row = self._measure()
        is_best = self._judge(row)
        if is_best:
            self.save("best.npz")
        self.save("last.npz")
        self._write_history()

    def _write_history(self) -> None:
        if self.progress.history:
            write_text(self.folder / "history.csv", history_csv(self.progress.history))

    def _measure(self) -> dict[str, float]:
        """The epoch's row of the history. Raises Diverged if a loss is not finite."""
        progress, net = self.progress, self.averaged_net()
        on_validation = self._evaluate(net, self.validation, self.validation_statistics)
        on_train = self._evaluate(net, self.train, self.train_statistics, self.train_sample)
        group = self.train.words.group
        for part, loss in (("validation", on_validation.loss), ("training", on_train.loss)):
            if not math.isfinite(loss):
                raise Diverged(
                    f"epoch {progress.epoch_number}, after its last step: the loss on {part} {group}s is {loss}, "
                    "lower the learning rate"
                )
        learning_rate = self.config.learning_rate(self.optimizer.steps - 1, self.steps_per_epoch)
        train_loss = progress.loss_sum / progress.step
        measured = train_loss, on_validation.loss, on_train.dice, on_validation.dice
        return dict(zip(COLUMNS, (progress.epoch_number, learning_rate, *measured), strict=True))

    def _judge(self, row: dict[str, float]) -> bool:
        """Whether the epoch is the best so far; the run then stands at the start of the next one, or is finished."""
        config, progress = self.config, self.progress
        progress.history.append(row)
        value = self._value(row)
        is_best = progress.best_value is None or value > progress.best_value
        if is_best:
            progress.best_epoch, progress.best_value = progress.epoch_number, value
        assert progress.best_epoch is not None
        waited = progress.epoch_number - progress.best_epoch
        progress.epoch, progress.step, progress.loss_sum = progress.epoch_number, 0, 0.0
        out_of_patience = config.patience is not None and waited >= config.patience
        progress.finished = progress.epoch == config.epochs or out_of_patience
        return is_best

    def _value(self, row: dict[str, float]) -> float:
        """What makes an epoch the best: the larger, the better."""
        return row["validation_dice"] if self.config.monitor == "dice" else -row["validation_loss"]

    def save(self, name: str) -> None:
        progress, history = self.progress.stored()
        save_training(
            self.folder / name,
            net=self.net,
            optimizer=self.optimizer,
            ema=self.ema,
            history=history,
            metadata={**self.metadata, "progress": progress},
        )

    def save_elsewhere(self) -> NoReturn:
        """Save the state in a new folder: beside the run's own, which is gone, or where temporary files go."""
        gone = self.folder
        for parent in (gone.parent, Path(tempfile.gettempdir())):
            try:
                self.folder = next_free_folder(parent, f"rescued-{gone.name}")
                self.save("last.npz")
                self._write_history()
            except UserError:
                continue
            raise FolderLost(
                f"{gone}: was deleted or moved while the run was at work; its state is saved in {self.folder}, "
                f"go on with --resume {self.folder}",
                self.folder,
            )
        raise UserError(
            f"{gone}: was deleted or moved while the run was at work, and nothing can be written beside it or in "
            f"{parent}; the state of the run is lost, start a new run in a folder that stays"
        )

    def averaged_net(self) -> UNet:
        """The network that is judged and kept: with averaged weights, if the run averages them."""
        return self.net if self.ema is None else with_arrays(self.net, self.ema.average)

    def _evaluate(
        self, net: UNet, slices: SliceSet, statistics: VolumeStatistics, places: np.ndarray | None = None
    ) -> Evaluation:
        batch_size, loss = self.config.batch_size, self.config.loss
        return evaluate(
            net, slices, statistics, loss, places=places, batch_size=batch_size, engine=self.judge, side=self.side
        )

    def _key(self, step: int) -> rng.Key:
        return rng.Key(self.config.seed, epoch=self.progress.epoch, step=step)

    def _last_dice(self) -> dict[str, str]:
        history = self.progress.history
        return {"validation_dice": f"{history[-1]['validation_dice']:.4f}"} if history else {}


def with_arrays(net: UNet, arrays: Mapping[str, Array]) -> UNet:
    """A copy of ``net`` in which the parameters and buffers that are in ``arrays``, too, have the values there."""
    twin: UNet = map_arrays(net, lambda array: array.copy())
    own = twin.parameters() | twin.buffers()
    for name, array in arrays.items():
        own[name][...] = array
    return twin


def history_csv(history: list[dict[str, float]]) -> str:
    """The rows of a history as CSV, with a line of names.

    >>> print(history_csv([{"epoch": 1, "train_loss": 0.5}]), end="")
    epoch,train_loss
    1,0.5
    """
    lines = [",".join(history[0])] + [",".join(repr(value) for value in row.values()) for row in history]
    return "\n".join(lines) + "\n"


def _described(data: TrainingData) -> dict[str, Any]:
    """What a resumed run has to find again: so many slices in each part, and the same pixels in them."""
    described: dict[str, Any] = {}
    for name, slices in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if slices is not None:
            pixels = sha256_of_arrays({"images": slices.images, "masks": slices.masks})
            whose = json_text([slices.patients, slices.numbers], indent=None)
            described |= {
                f"{name}_slices": len(slices),
                f"{name}_sha256": pixels,
                f"{name}_patients": hashlib.sha256(whose.encode()).hexdigest(),
            }
    return described


def _some_patients(slices: SliceSet, about: int) -> np.ndarray:
    """The indices of whole patients, evenly spread over ``slices``, with about that many slices together."""
    count = len(slices.patient_names())
    wanted = max(1, min(count, round(count * about / len(slices))))
    chosen = np.linspace(0, count - 1, wanted).round()
    return np.flatnonzero(np.isin(slices.patient_indices(), chosen))


def _bar(description: str, total: int, initial: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(desc=description, total=total, initial=initial, disable=not shown, unit="step", dynamic_ncols=True)
