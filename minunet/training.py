"""The training loop: one step, one epoch, one run, and what is measured on the way.

A step is forward, loss, backward, clip, optimise: ``loss_and_grads`` (minunet.engines.plain) is the first three,
``train_step`` all of them. ``fit`` is the run: it draws the batches, takes the steps, looks at the validation
patients after each epoch, and writes checkpoints from which it can go on as if nothing had happened, because all
randomness is a function of (seed, epoch, step, stream, image), and of nothing that would have to be remembered.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minunet import engines, metrics, rng
from minunet.backend import Array, to_numpy
from minunet.checkpoint import differences, environment, load_training, save_training, sha256_of_arrays
from minunet.data.augment import Augmentation
from minunet.data.batches import Batch, epoch_order, prefetch
from minunet.data.normalize import Normalization, VolumeStatistics
from minunet.data.slices import SliceSet
from minunet.divergence import first_non_finite
from minunet.durable import write_text
from minunet.engines.plain import Engine
from minunet.engines.plain import loss_and_grads as loss_and_grads
from minunet.engines.plain import update_running_stats as update_running_stats
from minunet.errors import Diverged, UserError
from minunet.layers import map_arrays
from minunet.losses import SegmentationLoss
from minunet.optim import AdamW, WeightEMA, norms_and_biases, warmup_cosine
from minunet.unet import UNet


def train_step(
    net: UNet,
    optimizer: AdamW,
    x: Array,
    target: Array,
    loss: SegmentationLoss,
    key: rng.Key,
    *,
    lr: float,
    clip_norm: float | None = None,
    batch_norm_momentum: float = 0.99,
    ema: WeightEMA | None = None,
    engine: Engine | None = None,
) -> tuple[float, float]:
    """One step of training, which changes ``net``, ``optimizer`` and ``ema``. Returns the loss and the gradient's norm.

    ``engine`` is one that was built for ``net`` and ``loss``, or None for the plain path.
    Raises Diverged, before anything is changed, if the loss or a gradient is NaN or infinite; the message says where
    the step first met such a value.
    """
    engine = engine or Engine(net, loss)
    value, grads, batch_stats = engine.loss_and_grads(x, target, key)
    grads, norm = engine.clip(grads, math.inf if clip_norm is None else clip_norm)
    if not (math.isfinite(value) and math.isfinite(norm)):
        where = first_non_finite(net, x, target, loss, key)
        raise Diverged(f"the loss is {value} and the norm of the gradient {norm}, {where}")
    optimizer.step(grads, lr)
    engine.update_running_stats(batch_stats, batch_norm_momentum)
    if ema is not None:
        ema.update(net.parameters() | net.buffers())
    return value, norm


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides what a run computes, beside the network and the data.

    Raises ValueError for values out of range.
    """

    epochs: int = 30
    batch_size: int = 16
    images_per_epoch: int | None = None  # None: as many as there are training slices
    sampling: str = "shuffle"  # or "tumour", see minunet.data.batches.epoch_order
    augmentation: Augmentation = field(default_factory=Augmentation)
    augment_masks: bool = True  # False repeats a flaw of the reference system
    loss: SegmentationLoss = field(default_factory=SegmentationLoss)
    lr: float = 1e-3  # the peak, if there is a schedule
    schedule: str = "cosine"  # or "constant"
    warmup_epochs: float = 0.0
    weight_decay: float = 0.004
    decay_norms_and_biases: bool = True  # Keras' choice; False is the usual one
    clip_norm: float | None = None
    batch_norm_momentum: float = 0.99
    ema_decay: float | None = None  # None: no average of the weights
    monitor: str = "dice"  # or "loss": what makes an epoch the best, on the validation patients
    patience: int | None = None  # epochs without a new best after which to stop; None: never
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "images_per_epoch", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, choices in (
            ("sampling", ("shuffle", "tumour")),
            ("schedule", ("cosine", "constant")),
            ("monitor", ("dice", "loss")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not 0 <= self.batch_norm_momentum < 1:
            raise ValueError(f"batch_norm_momentum must be in [0, 1), got {self.batch_norm_momentum}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must be in [0, epochs = {self.epochs}), got {self.warmup_epochs}")

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of optimiser step ``step``, from 0."""
        if self.schedule == "constant":
            return self.lr
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        return warmup_cosine(step, self.epochs * steps_per_epoch, self.lr, warmup_steps)


class Evaluation(NamedTuple):
    """What a network does on a set of slices, as the curves show it."""

    loss: float  # of the batches, averaged over their slices
    dice: float  # the mean over patients of the 3-D Dice, thresholded at 0.5


@dataclass
class Progress:
    """How far a run has come: what a checkpoint stores beside the arrays."""

    epoch: int = 0  # the epoch that runs, from 0
    step: int = 0  # steps done in this epoch
    loss_sum: float = 0.0  # over this epoch's steps
    best_epoch: int | None = None  # from 1, as in the history
    best_value: float | None = None  # of the monitored quantity
    history: list[dict[str, float]] = field(default_factory=list)  # one row an epoch
    finished: bool = False


def predict_slices(
    net: UNet,
    slices: SliceSet,
    normalization: Normalization,
    *,
    device: str = "cpu",
    batch_size: int = 16,
    flip_average: bool = False,
    engine: Engine | None = None,
) -> np.ndarray:
    """The probabilities for all slices, float32 (S, H, W, K), each patient normalised as one volume.

    ``flip_average`` predicts every slice and its mirror image, and averages the two. ``engine`` is one that was built
    for a network like ``net``, or None for the plain path.
    """
    engine = engine or Engine(net, SegmentationLoss())
    statistics = normalization.statistics(slices)

    def probabilities(batch: Batch) -> np.ndarray:
        p = engine.predict(batch.x, net)
        if flip_average:
            p = (p + engine.predict(batch.x[:, :, ::-1], net)[:, :, ::-1]) / 2
        return to_numpy(p)

    batches = prefetch(
        lambda indices: engine.prepare_batch(slices, statistics, indices, device),
        _chunks(np.arange(len(slices)), batch_size),
        engine.ahead,
    )
    return np.concatenate([probabilities(batch) for batch in batches])


def evaluate(
    net: UNet,
    slices: SliceSet,
    statistics: VolumeStatistics,
    loss: SegmentationLoss,
    *,
    device: str = "cpu",
    batch_size: int = 16,
    engine: Engine | None = None,
) -> Evaluation:
    """Loss and per-patient Dice of ``net``, inferring, on ``slices``, whose patients have the ``statistics``.

    ``engine`` is one that was built for a network like ``net``, or None for the plain path.
    The slices are visited in a random order, always the same one: neighbours are alike, and the Dice loss of a batch
    with no tumour at all is not what training sees.
    """
    engine = engine or Engine(net, loss)
    losses, counts = [], []
    order = rng.generator(rng.Key(seed=0, stream=rng.SAMPLE)).permutation(len(slices))
    batches = prefetch(
        lambda indices: engine.prepare_batch(slices, statistics, indices, device),
        _chunks(order, batch_size),
        engine.ahead,
    )
    for batch in batches:
        logits = engine.logits(batch.x, net)
        value, _ = loss.forward(logits, batch.target)
        losses.append(value.item() * len(batch.x))
        predicted = logits > 0  # a probability above 0.5
        found = metrics.count(predicted, batch.target > 0, axis=(1, 2, 3))
        counts.append([to_numpy(c) for c in found])
    per_slice = metrics.Counts(*(np.concatenate(parts) for parts in zip(*counts, strict=True)))
    _, per_patient = metrics.per_patient_counts(per_slice, [slices.patients[place] for place in order])
    return Evaluation(math.fsum(losses) / len(slices), float(np.mean(metrics.dice(per_patient))))


# What overflows here is no warning: the same step finds it, and names the place.
@np.errstate(all="ignore")
def fit(
    net: UNet,
    train: SliceSet,
    validation: SliceSet,
    config: TrainingConfig,
    *,
    normalization: Normalization,
    folder: str | Path,
    device: str = "cpu",
    engine: str = "auto",
    precision: str = "float32",
    resume: bool = False,
    metadata: Mapping[str, Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress_bar: bool = True,
) -> Progress:
    """Train ``net``, whose arrays are on ``device``, on ``train``, and choose the best epoch on ``validation``.

    After each epoch ``folder`` receives ``last.npz``, from which ``resume`` goes on bit for bit, ``best.npz``, the
    checkpoint of the best epoch so far, and ``history.csv``. The first ``last.npz`` is written before the first step:
    a disk without room for it is found then. ``metadata`` is stored in the checkpoints: how the images were prepared,
    so that a prediction can do the same. ``should_stop`` is asked after each step; if it says yes, ``last.npz`` is
    written in mid-epoch and fit returns. ``engine`` and ``precision`` are those of ``minunet.engines.build``; one line
    says which engine "auto" has chosen.

    Raises Diverged, naming epoch, step and files, when a loss or gradient is NaN or infinite (``last.npz`` is then
    the state before that epoch, or where the run was stopped in it), and UserError if there is nothing to resume, it
    belongs to another run, or :func:`check_batches` refuses.
    """
    check_batches(net, train, config)
    Path(folder).mkdir(parents=True, exist_ok=True)
    height, width = train.images.shape[1:3]
    with engines.build(
        net, config.loss, config.batch_size, (height, width), device, choice=engine, precision=precision
    ) as built:
        if engine == "auto":
            print(f"engine: {built.name}" + (f" ({built.reason})" if built.reason else ""), flush=True)
        run = _Run(net, built, train, validation, config, normalization, Path(folder), device, dict(metadata or {}))
        if resume:
            run.resume()
        else:
            run.save("last.npz")
        while not run.progress.finished:
            if not run.train_epoch(should_stop, progress_bar):
                run.save("last.npz")
                break
            run.finish_epoch()
    return run.progress


def check_batches(net: UNet, train: SliceSet, config: TrainingConfig) -> None:
    """Raise UserError if a batch of an epoch is too small for batch norm, which needs two values in each channel.

    Only an image that the bottleneck sees as a single pixel can be too few, when it is alone in its batch: as all
    are with a batch size of 1, and the last one where the batch size does not divide the number of images.
    """
    height, width = train.images.shape[1:3]
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
        net: UNet,
        engine: Engine,
        train: SliceSet,
        validation: SliceSet,
        config: TrainingConfig,
        normalization: Normalization,
        folder: Path,
        device: str,
        metadata: dict[str, Any],
    ) -> None:
        self.net, self.engine, self.train, self.validation, self.config = net, engine, train, validation, config
        self.folder, self.device = folder, device
        parameters = net.parameters()
        no_decay = () if config.decay_norms_and_biases else norms_and_biases(parameters)
        self.optimizer = engine.optimizer(parameters, config.lr, weight_decay=config.weight_decay, no_decay=no_decay)
        self.ema = None if config.ema_decay is None else engine.average(parameters | net.buffers(), config.ema_decay)
        self.train_statistics = normalization.statistics(train)
        # Training Dice is measured as the validation's is, on whole patients as they are: the two curves compare.
        self.train_sample = _some_patients(train, len(validation))
        self.sample_statistics = normalization.statistics(self.train_sample)
        self.validation_statistics = normalization.statistics(validation)
        images = config.images_per_epoch or len(train)
        self.images_per_epoch, self.steps_per_epoch = images, -(-images // config.batch_size)
        self.progress = Progress()
        self.metadata = {
            **metadata,
            "training": asdict(config),
            "data": _described(train, "train") | _described(validation, "validation"),
            "engine": engine.name,
        }

    def resume(self) -> None:
        path = self.folder / "last.npz"
        found = load_training(path, self.net, self.optimizer, self.ema)
        for part in ("training", "data"):
            if changed := differences(found.get(part), self.metadata[part]):
                raise UserError(
                    f"{path}: belongs to another run ({'; '.join(changed)}), resume with the same settings and data"
                )
        then = {**found["environment"], "engine": found.get("engine", "plain")}
        if changed := differences(then, environment() | {"engine": self.engine.name}):
            print(f"warning: not as it was, so that the last bits may differ: {'; '.join(changed)}", flush=True)
        try:
            self.progress = Progress(**found["progress"])
        except (KeyError, TypeError):
            raise UserError(f"{path}: does not say how far its run had come, start a new run") from None

    def train_epoch(self, should_stop: Callable[[], bool], progress_bar: bool) -> bool:
        """Take the steps of this epoch that are not done yet. False if ``should_stop`` said so before its end."""
        config, progress = self.config, self.progress
        key = rng.Key(config.seed, epoch=progress.epoch)
        order = epoch_order(self.train, config.sampling, self.images_per_epoch, key)
        chunks = list(_chunks(order, config.batch_size))
        steps = range(progress.step, len(chunks))

        def prepare(step: int) -> Batch:
            return self.engine.prepare_batch(
                self.train,
                self.train_statistics,
                chunks[step],
                self.device,
                augmentation=config.augmentation,
                move_masks=config.augment_masks,
                key=self._key(step),
            )

        with _bar(f"epoch {progress.epoch + 1}/{config.epochs}", len(chunks), progress.step, progress_bar) as bar:
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
                    place = f"epoch {progress.epoch + 1}, step {step + 1}"
                    raise Diverged(
                        f"{place}: {error}; lower the learning rate or look at the images; "
                        f"the batch was {', '.join(batch.files)}"
                    ) from None
                progress.step = step + 1
                progress.loss_sum += loss
                bar.set_postfix(loss=f"{progress.loss_sum / progress.step:.4f}", **self._last_dice(), refresh=False)
                bar.update()
                if should_stop():
                    batches.close()
                    return False
        return True

    def finish_epoch(self) -> None:
        """Measure, remember, and write the checkpoints of an epoch whose steps are all done."""
        config, progress = self.config, self.progress
        net = self.averaged_net()
        on_validation = self._evaluate(net, self.validation, self.validation_statistics)
        on_train = self._evaluate(net, self.train_sample, self.sample_statistics)
        for patients, loss in (("validation", on_validation.loss), ("training", on_train.loss)):
            if not math.isfinite(loss):
                raise Diverged(
                    f"epoch {progress.epoch + 1}, after its last step: the loss on {patients} patients is {loss}, "
                    "lower the learning rate"
                )
        progress.history.append(
            {
                "epoch": progress.epoch + 1,
                "learning_rate": config.learning_rate(self.optimizer.steps - 1, self.steps_per_epoch),
                "train_loss": progress.loss_sum / progress.step,
                "validation_loss": on_validation.loss,
                "train_dice": on_train.dice,
                "validation_dice": on_validation.dice,
            }
        )
        value = on_validation.dice if config.monitor == "dice" else -on_validation.loss
        is_best = progress.best_value is None or value > progress.best_value
        if is_best:
            progress.best_epoch, progress.best_value = progress.epoch + 1, value
        assert progress.best_epoch is not None
        waited = progress.epoch + 1 - progress.best_epoch
        progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
        progress.finished = progress.epoch == config.epochs or (
            config.patience is not None and waited >= config.patience
        )
        if is_best:
            self.save("best.npz")
        self.save("last.npz")
        write_text(self.folder / "history.csv", history_csv(progress.history))

    def save(self, name: str) -> None:
        metadata = {**self.metadata, "progress": asdict(self.progress)}
        save_training(self.folder / name, net=self.net, optimizer=self.optimizer, ema=self.ema, metadata=metadata)

    def averaged_net(self) -> UNet:
        """The network that is judged and kept: with averaged weights, if the run averages them."""
        return self.net if self.ema is None else with_arrays(self.net, self.ema.average)

    def _evaluate(self, net: UNet, slices: SliceSet, statistics: VolumeStatistics) -> Evaluation:
        batch_size = self.config.batch_size
        return evaluate(
            net,
            slices,
            statistics,
            self.config.loss,
            device=self.device,
            batch_size=batch_size,
            engine=self.engine,
        )

    def _key(self, step: int) -> rng.Key:
        return rng.Key(self.config.seed, epoch=self.progress.epoch, step=step)

    def _last_dice(self) -> dict[str, str]:
        history = self.progress.history
        return {"validation_dice": f"{history[-1]['validation_dice']:.4f}"} if history else {}


def with_arrays(net: UNet, arrays: Mapping[str, Array]) -> UNet:
    """A copy of ``net`` whose parameters and buffers have the values of ``arrays``."""
    twin: UNet = map_arrays(net, lambda array: array.copy())
    for name, array in (twin.parameters() | twin.buffers()).items():
        array[...] = arrays[name]
    return twin


def history_csv(history: list[dict[str, float]]) -> str:
    """The rows of a history as CSV, with a line of names.

    >>> print(history_csv([{"epoch": 1, "train_loss": 0.5}]), end="")
    epoch,train_loss
    1,0.5
    """
    lines = [",".join(history[0])] + [",".join(repr(value) for value in row.values()) for row in history]
    return "\n".join(lines) + "\n"


def _described(slices: SliceSet, name: str) -> dict[str, Any]:
    """What a resumed run has to find again: so many slices, and the same pixels in them."""
    pixels = sha256_of_arrays({"images": slices.images, "masks": slices.masks})
    return {f"{name}_slices": len(slices), f"{name}_sha256": pixels}


def _chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _some_patients(slices: SliceSet, about: int) -> SliceSet:
    """Whole patients, evenly spread over ``slices``, with about that many slices together."""
    names = slices.patient_names()
    wanted = max(1, min(len(names), round(len(names) * about / len(slices))))
    chosen = {names[place] for place in np.linspace(0, len(names) - 1, wanted).round().astype(int)}
    return slices.subset([i for i, patient in enumerate(slices.patients) if patient in chosen])


def _bar(description: str, total: int, initial: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(desc=description, total=total, initial=initial, disable=not shown, unit="step", dynamic_ncols=True)
