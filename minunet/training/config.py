"""The settings of a run, and the learning rate that they give each step."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from minunet.base.choices import check_choice
from minunet.data.augment import Augmentation
from minunet.data.batches import Sampling
from minunet.network.loss import Loss, SegmentationLoss
from minunet.network.own_code import class_name
from minunet.training.optim import warmup_cosine

Schedule = Literal["cosine", "constant"]
Monitor = Literal["dice", "loss"]


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides what a run computes, beside the network and the data.

    Raises ValueError for values out of range.
    """

    epochs: int = 30
    batch_size: int = 16
    images_per_epoch: int | None = None  # None: as many as there are training slices
    sampling: Sampling = "shuffle"  # see minunet.data.batches.epoch_order
    crop: int | None = None  # pixels: train on a square of this side from each image; None: on the whole image
    augmentation: Augmentation = field(default_factory=Augmentation)
    augment_masks: bool = True  # False repeats a flaw of the reference system
    loss: Loss = field(default_factory=SegmentationLoss)  # SoftmaxLoss for exclusive classes
    lr: float = 1e-3  # the peak, if there is a schedule
    schedule: Schedule = "cosine"  # of the learning rate
    warmup_epochs: float = 0.0
    weight_decay: float = 0.004
    decay_norms_and_biases: bool = True  # Keras' choice; False is the usual one
    clip_norm: float | None = None
    batch_norm_momentum: float = 0.99
    ema_decay: float | None = None  # None: no average of the weights
    monitor: Monitor = "dice"  # what makes an epoch the best, on the validation patients
    patience: int | None = None  # epochs without a new best after which to stop; None: never
    #: The parts of the network that learn, by the beginnings of their parameters' names: ("up1", "head"). None: all.
    train_only: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "images_per_epoch", "crop", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if isinstance(self.train_only, str) or (self.train_only is not None and not self.train_only):
            raise ValueError(f"train_only must be a tuple of one name or more, or None, got {self.train_only!r}")
        check_choice("sampling", self.sampling, Sampling)
        check_choice("schedule", self.schedule, Schedule)
        check_choice("monitor", self.monitor, Monitor)
        if not 0 <= self.batch_norm_momentum < 1:
            raise ValueError(f"batch_norm_momentum must be in [0, 1), got {self.batch_norm_momentum}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must be in [0, epochs = {self.epochs}), got {self.warmup_epochs}")

    def settings(self) -> dict[str, Any]:
        """All of it as JSON can hold it: what a run's files keep, and what a resumed run must have again.

        >>> TrainingConfig().settings()["loss"]
        {'dice_weight': 1.0, 'bce_weight': 1.0, 'smooth': 1.0, 'over': 'batch'}
        """
        loss: dict[str, Any] = getattr(self.loss, "__dict__", {})
        if type(self.loss) is not SegmentationLoss:
            plain = {name: value for name, value in loss.items() if isinstance(value, int | float | str | None)}
            loss = {"class": class_name(type(self.loss)), **plain}
        settings = {**asdict(self), "loss": loss}
        for name in ("crop", "train_only"):  # as in the files of runs from before there were these
            if settings[name] is None:
                del settings[name]
        return settings

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of optimiser step ``step``, from 0."""
        if self.schedule == "constant":
            return self.lr
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        return warmup_cosine(step, self.epochs * steps_per_epoch, self.lr, warmup_steps)
