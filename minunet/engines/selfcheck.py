"""Does the engine compute what the code says? Two images through both, at the start of every run.

Whoever edits an op, a block, the loss or the optimiser and then trains has to see the edit; and an engine with a defect
must not train at all. So before the first step the engine and the plain path take one step on the same two images, of
the run's own size, on a copy of the network whose arrays are all random: gammas of both signs, betas, biases, running
statistics; dropout is on. Where the two differ by more than rounding, the plain path is taken.

Rounding alone decides which way a value goes that lies on the kink of a ReLU, and then whole gradients differ. So the
betas are 4 and -4: most values lie far from 0, on either side. What this cannot see: docs/trust.md.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minunet.base import rng
from minunet.base.backend import Array, to_device, to_numpy
from minunet.base.errors import UserError
from minunet.data.augment import PRESETS
from minunet.data.normalize import Normalization
from minunet.data.slices import SliceSet
from minunet.network.layers import Arrays, map_arrays
from minunet.network.loss import Loss, SegmentationLoss
from minunet.network.own_code import own_loss
from minunet.network.unet import UNet
from minunet.training.optim import norms_and_biases
from minunet.training.step import Engine

KEY = rng.Key(seed=0, epoch=1, step=2)


class Bounds(NamedTuple):
    """What counts as rounding."""

    largest: float  # a difference over the largest value; of gradients, over the largest of all gradients
    each: float  # the length of a difference over the length of the array


#: By dtype, and by the engine's precision.
BOUNDS = {
    "float64": Bounds(1e-10, 1e-7),
    "float32": Bounds(1e-4, 1e-2),
    "tf32": Bounds(5e-2, 0.3),
    "bf16": Bounds(0.1, 0.5),
}


@np.errstate(all="ignore")  # weights that overflow are no business of this check
def difference(
    make: Callable[[UNet, Loss], Engine],
    net: UNet,
    loss: Loss,
    images: int,
    image_size: tuple[int, int],
    precision: str,
    *,
    training: bool,
) -> str | None:
    """How the engine that ``make`` builds differs from the plain path for a network like ``net``; None if it does not.

    ``images`` of ``image_size`` go through both; without ``training`` only a prediction does. Where the two differ,
    they are compared on other numbers, too: a value may have come to lie on a kink after all.
    """
    loss = copy.deepcopy(loss)  # one of your own may have a state
    bounds = BOUNDS[precision if net.head.weight.dtype == np.float32 else str(net.head.weight.dtype)]
    found = None
    for seed in (0, 1):
        found = _on(_Sample(net, images, image_size, seed), make, loss, bounds, training)
        if found is None:
            return None
    return found


def _on(
    sample: "_Sample",
    make: Callable[[UNet, Loss], Engine],
    loss: Loss,
    bounds: Bounds,
    training: bool,
) -> str | None:
    """As :func:`difference`, on one sample."""
    try:
        expected = sample.results(Engine(sample.network(), loss), training)
    except ValueError as error:  # a loss of one's own may ask for other targets than the sample's
        if own_loss(loss) is None:
            raise
        return f"its loss cannot be tried out beforehand ({error})"
    try:
        with make(sample.network(), loss) as engine:
            found = sample.results(engine, training)
    except (MemoryError, KeyboardInterrupt, UserError):
        raise
    except Exception as error:  # of any kind: the plain path has just done the same
        return f"it fails where the code does not ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return next(
        (line for name, group in expected.items() if (line := _differs(name, found[name], group, bounds))), None
    )


def _differs(name: str, found: Arrays, expected: Arrays, bounds: Bounds) -> str | None:
    """Which array of a group differs by more than rounding, and by how much."""
    largest = max(abs(array).max() for array in expected.values())
    for part, array in expected.items():
        where = f"{name} {part}".strip()
        if found[part].shape != array.shape:
            return f"it gives {where} another shape than the code"
        over_largest = float(abs(found[part] - array).max() / largest)
        length, apart = float(np.linalg.norm(array)), float(np.linalg.norm(found[part] - array))
        # Where an array is all rounding, as the gradient of a bias that batch norm takes away, it has no length.
        over_length = apart / length if name in JUDGED_EACH and length > 1e-5 * largest else 0.0
        if not (over_largest <= bounds.largest and over_length <= bounds.each):
            worse = over_largest if not over_largest <= bounds.largest else over_length
            return f"it differs from the code by {worse:.1e} in {where}"
    return None


#: Groups whose arrays are judged by their own length, too: a layer far from the loss has small gradients.
JUDGED_EACH = ("the gradient of", "the batch statistics")

Results = dict[str, Arrays]


class _Sample:
    """What goes through both."""

    def __init__(self, net: UNet, images: int, image_size: tuple[int, int], seed: int) -> None:
        self.net, self.draw = net, np.random.default_rng(seed)
        self.device = Engine(net, SegmentationLoss()).device
        shape, config = (images, *image_size), net.config
        self.x = self._to(self.draw.standard_normal((*shape, config["in_channels"])))
        self.target = self._to(self._classes(shape) if net.config["output"] == "softmax" else self._masks(shape))
        pixels = self.draw.integers(0, 256, (*shape, config["in_channels"]), dtype=np.uint8)
        masks = (self.draw.random((*shape, 1)) < 0.3).astype(np.uint8)
        numbers = tuple(range(images))
        self.slices = SliceSet(pixels, masks, tuple(map(str, numbers)), numbers, ("",) * images)
        self.arrays = {name: self._random(name, array) for name, array in _arrays(net).items()}

    def _masks(self, shape: tuple[int, ...]) -> np.ndarray:
        """Independent masks (N, H, W, K)."""
        return self.draw.random((*shape, self.net.config["out_channels"])) < 0.3

    def _classes(self, shape: tuple[int, ...]) -> np.ndarray:
        """For each pixel one class of K, (N, H, W, K), and in a tenth of the pixels none: they are to be ignored."""
        classes = np.eye(self.net.config["out_channels"])[
            self.draw.integers(self.net.config["out_channels"], size=shape)
        ]
        return classes * (self.draw.random((*shape, 1)) < 0.9)

    def _to(self, values: np.ndarray) -> Array:
        return to_device(values.astype(str(self.net.head.weight.dtype)), self.device)

    def _random(self, name: str, array: Array) -> Array:
        """Values for a parameter or a running statistic; the kernels of the convolutions keep theirs."""
        sign = self.draw.choice([-1, 1], array.shape)
        match name.rpartition(".")[2]:
            case "gamma":
                return self._to(self.draw.uniform(0.5, 0.8, array.shape) * sign)
            case "beta":
                return self._to(4.0 * sign)
            case "running_var":
                return self._to(self.draw.uniform(0.5, 2, array.shape))
            case "bias" | "running_mean":
                return self._to(self.draw.standard_normal(array.shape))
        return array

    def network(self) -> UNet:
        """A copy of the network with these arrays."""
        twin: UNet = map_arrays(self.net, lambda array: array.copy())
        for name, array in _arrays(twin).items():
            array[...] = self.arrays[name]
        return twin

    def results(self, engine: Engine, training: bool) -> Results:
        """What an engine makes of it: groups of arrays, each judged by the largest value of its group."""
        results: Results = {"the logits": _named({"": engine.logits(self.x)})}
        if not training:
            return results
        net = engine.net
        # In the order of a run. With eps = 1 a step follows the gradient; with a small one it would be its sign.
        options: dict[str, Any] = {"eps": 1.0, "weight_decay": 0.1, "no_decay": norms_and_biases(net.parameters())}
        optimizer = engine.optimizer(net.parameters(), 1.0, **options)
        average = engine.average(_arrays(net), 0.9)
        before = _named(_arrays(net))
        value, grads, stats = engine.loss_and_grads(self.x, self.target, KEY)
        results["the loss"] = {"": np.array([value])}
        results["the gradient of"], results["the batch statistics"] = _named(grads), _named(stats)
        grads, norm = engine.clip(grads, 0.5 * _length(results["the gradient of"]))
        results["the norm of the gradient"] = {"": np.array([norm])}
        optimizer.step(grads, 1.0)
        engine.update_running_stats(stats, 0.8)
        average.update(_arrays(net))
        after = _named(_arrays(net))
        results["the step of"] = {name: after[name] - before[name] for name in net.parameters()}
        results["the running statistics"] = {name: after[name] for name in net.buffers()}
        results["the average of"] = {name: array - before[name] for name, array in _named(average.average).items()}
        statistics = Normalization().statistics(self.slices)
        augmentation = PRESETS["strong"]
        indices = np.arange(len(self.slices))
        batch = engine.prepare_batch(self.slices, statistics, indices, augmentation=augmentation, key=KEY)
        results["a batch's"] = _named({"images": batch.x, "masks": batch.target})
        return results


def _arrays(net: UNet) -> Arrays:
    return net.parameters() | net.buffers()


def _named(arrays: Arrays) -> Arrays:
    """Copies on the host."""
    return {name: np.array(to_numpy(array)) for name, array in arrays.items()}


def _length(arrays: Arrays) -> float:
    return math.sqrt(sum(float((array.astype(np.float64) ** 2).sum()) for array in arrays.values()))
