"""A network of one's own is a first-class use: what works on a U-Net works on one with other blocks in it."""

from typing import NamedTuple

import numpy as np
import pytest

from minunet import UNet, engines, ops
from minunet.base import rng
from minunet.base.backend import to_device, to_numpy
from minunet.base.errors import UserError
from minunet.data import phantom
from minunet.data.slices import SliceSet
from minunet.gradcheck import check_layer, check_net
from minunet.network.layers import BatchNorm2d, Conv2d, Layer, map_arrays
from minunet.network.loss import SegmentationLoss
from minunet.results.prediction import Predictor
from minunet.summary import summary
from minunet.training.checkpoint import load_net, load_training, save_training
from minunet.training.config import TrainingConfig
from minunet.training.divergence import first_non_finite
from minunet.training.evaluation import predict_slices
from minunet.training.loop import Hooks, TrainingData, fit
from minunet.training.optim import AdamW, WeightEMA
from minunet.training.step import loss_and_grads, train_step
from tests.training.cases import NORMALIZATION

LOSS, KEY = SegmentationLoss(), rng.Key(0)


class ResidualCache(NamedTuple):
    conv1: object
    norm1: object
    relu1: object
    conv2: object
    norm2: object
    shortcut: object
    relu2: object


class Residual(Layer):
    """Two convolutions, and a third of 1 x 1 beside them."""

    def __init__(self, ins, outs, **options):
        self.conv1, self.norm1 = Conv2d(ins, outs, **options), BatchNorm2d(outs, dtype=options["dtype"])
        self.conv2, self.norm2 = Conv2d(outs, outs, **options), BatchNorm2d(outs, dtype=options["dtype"])
        self.shortcut = Conv2d(ins, outs, 1, **options)

    def forward(self, x, *, training):
        y, conv1 = self.conv1.forward(x)
        y, norm1 = self.norm1.forward(y, training=training)
        y, relu1 = ops.relu_forward(y)
        y, conv2 = self.conv2.forward(y)
        y, norm2 = self.norm2.forward(y, training=training)
        straight, shortcut = self.shortcut.forward(x)
        y, relu2 = ops.relu_forward(y + straight)
        return y, ResidualCache(conv1, norm1, relu1, conv2, norm2, shortcut, relu2)

    def backward(self, dy, cache):
        grads = {}
        dsum = ops.relu_backward(dy, cache.relu2)
        dstraight, grads["shortcut"] = self.shortcut.backward(dsum, cache.shortcut)
        dx, grads["norm2"] = self.norm2.backward(dsum, cache.norm2)
        dx, grads["conv2"] = self.conv2.backward(dx, cache.conv2)
        dx = ops.relu_backward(dx, cache.relu1)
        dx, grads["norm1"] = self.norm1.backward(dx, cache.norm1)
        dx, grads["conv1"] = self.conv1.backward(dx, cache.conv1)
        return dx + dstraight, {f"{name}.{own}": array for name, each in grads.items() for own, array in each.items()}


class Triple(Layer):
    """Three convolutions, each with batch norm and ReLU: the layers in a tuple, their caches in a list."""

    def __init__(self, ins, outs, **options):
        sizes = [ins, outs, outs]
        self.steps = tuple(
            {"conv": Conv2d(size, outs, **options), "norm": BatchNorm2d(outs, dtype=options["dtype"])} for size in sizes
        )

    def forward(self, x, *, training):
        steps = []
        for step in self.steps:
            x, conv = step["conv"].forward(x)
            x, norm = step["norm"].forward(x, training=training)
            x, relu = ops.relu_forward(x)
            steps.append({"conv": conv, "norm": norm, "relu": relu})
        return x, {"steps": steps}

    def backward(self, dy, cache):
        grads = {}
        for k in (2, 1, 0):
            step, kept = self.steps[k], cache["steps"][k]
            dy = ops.relu_backward(dy, kept["relu"])
            dy, of_norm = step["norm"].backward(dy, kept["norm"])
            dy, of_conv = step["conv"].backward(dy, kept["conv"])
            grads |= {f"steps.{k}.norm.{name}": array for name, array in of_norm.items()}
            grads |= {f"steps.{k}.conv.{name}": array for name, array in of_conv.items()}
        return dy, grads


class OwnUNet(UNet):
    """A U-Net with other blocks."""

    block = Residual

    def __init__(self, **config):
        super().__init__(**config)
        options = {"generator": rng.generator(rng.Key(1)), "dtype": self.config["dtype"]}
        for part, layer in self.parts():
            if part.kind == "bottleneck":
                self.bottleneck = self.block(*part.channels, **options)
            elif part.kind != "head":
                ins = 2 * part.out_channels if part.kind == "up" else part.in_channels
                layer.convs = self.block(ins, part.out_channels, **options)


class TripleUNet(OwnUNet):
    block = Triple


@pytest.fixture(scope="module")
def slices():
    made = phantom.make(patients=2, size=16, seed=1)
    return [made.subset([i for i, p in enumerate(made.patients) if p == name][:8]) for name in made.patient_names()]


own = pytest.mark.parametrize("network", [OwnUNet, TripleUNet])
CONFIG = {"widths": (3, 4, 5), "up_kernel": 2, "dropout": 0.3}


def batch(dtype="float32"):
    draw = np.random.default_rng(0)
    return draw.standard_normal((2, 8, 8, 3)).astype(dtype), (draw.random((2, 8, 8, 1)) < 0.4).astype(dtype)


@pytest.mark.parametrize("block", [Residual, Triple])
def test_gradients_of_a_block(block):
    layer = block(3, 4, generator=rng.generator(rng.Key(0)), dtype="float64")
    assert check_layer(layer, batch("float64")[0], training=True).ok(1e-12)


@own
def test_gradients_of_a_network(network):
    few = {"exhaustive": 4, "samples": 2, "directions": 1}
    assert check_net(network(**CONFIG), *batch("float64"), key=KEY, sampling=few).ok(1e-12)


@own
def test_parameters_and_batch_statistics_are_found(network):
    net = network(**CONFIG)
    _, grads, stats = loss_and_grads(net, *batch(), LOSS, KEY)
    assert grads.keys() == net.parameters().keys()
    assert stats.keys() == net.buffers().keys()
    name = "up1.steps.2.conv.weight" if network is TripleUNet else "up1.shortcut.weight"
    assert net.parameters()[name].shape[-1] == 3
    assert all(array.shape == grads[name].shape for name, array in net.parameters().items())


@own
def test_the_summary_counts_every_parameter(network):
    net = network(**CONFIG)
    assert summary(net, 8, 8).parameters == sum(array.size for array in net.parameters().values())


@own
def test_training_checkpoint_and_loading_by_class(network, tmp_path):
    path = tmp_path / "last.npz"

    def start(seed):
        net = network(**CONFIG, seed=seed)
        return net, AdamW(net.parameters(), 1e-2), WeightEMA(net.parameters() | net.buffers())

    net, optimizer, ema = start(0)
    losses = [train_step(net, optimizer, *batch(), LOSS, KEY, lr=1e-2, ema=ema)[0] for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    save_training(path, net=net, optimizer=optimizer, ema=ema, metadata={})
    other, other_optimizer, other_ema = start(0)
    load_training(path, other, other_optimizer, other_ema)
    found, metadata = load_net(path, "raw", network=network)
    assert type(found) is network
    assert metadata["class"] == f"{__name__}.{network.__name__}"
    for twin in (other, found):
        for name, array in (net.parameters() | net.buffers()).items():
            assert np.array_equal((twin.parameters() | twin.buffers())[name], array)
    with pytest.raises(UserError, match=rf"last\.npz: holds a {metadata['class']}, .*network="):
        load_net(path)


class Halved:
    """A loss of one's own, no dataclass: cross entropy, divided by a number."""

    def __init__(self, by=2.0):
        self.by = by

    def forward(self, logits, target):
        value, cache = ops.bce_with_logits_forward(logits, target)
        return value / self.by, cache

    def backward(self, cache):
        return ops.bce_with_logits_backward(cache) / self.by


@own
def test_fit_a_loss_of_ones_own_and_resuming(network, slices, tmp_path):
    """The history is that of a plain loop; a run that was stopped goes on, with the same loss and no other."""
    data = TrainingData(*slices, NORMALIZATION)

    def run(folder, loss, **options):
        net = network(**CONFIG)
        config = TrainingConfig(epochs=2, batch_size=4, images_per_epoch=8, loss=loss)
        with engines.build(net, loss, 4, (16, 16)) as engine:
            assert engine.name == "plain"
            return fit(engine, data, config, folder, progress_bar=False, **options), net

    whole, net = run(tmp_path / "whole", Halved())
    run(tmp_path / "two", Halved(), hooks=Hooks(should_stop=iter([False, True]).__next__))
    resumed, twin = run(tmp_path / "two", Halved(), resume=True)
    assert resumed == whole
    assert all(np.array_equal(twin.parameters()[name], array) for name, array in net.parameters().items())
    best, metadata = load_net(tmp_path / "two" / "best.npz", network=network)
    assert type(best) is network
    assert metadata["training"]["loss"] == {"class": f"{__name__}.Halved", "by": 2.0}
    for other in (Halved(3.0), LOSS):
        with pytest.raises(UserError, match=r"last\.npz: belongs to another run \(loss was"):
            run(tmp_path / "two", other, resume=True)


@own
def test_a_predictor_takes_it_by_its_class(network, tmp_path):
    path = tmp_path / "best.npz"
    net = network(**CONFIG)
    preparation = {"image_size": 8, "normalization": NORMALIZATION.to_dict(), "flip_average": False}
    metadata = {"preprocessing": preparation}
    save_training(path, net=net, optimizer=AdamW(net.parameters()), metadata=metadata)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    with Predictor.load(path, network=network) as predictor:
        found = predictor.probabilities(images)
    expected = predict_slices(net, SliceSet.unlabelled(images), NORMALIZATION, batch_size=2)
    assert np.array_equal(found, expected)
    with pytest.raises(UserError, match=r"best\.npz: holds a .*network="):
        Predictor.load(path)


@own
def test_it_moves_to_the_device(device, network):
    host = network(**CONFIG)
    net = map_arrays(host, lambda array: to_device(array, "cuda"))
    x, target = batch()
    value, grads, _ = loss_and_grads(host, x, target, LOSS, KEY)
    found, device_grads, _ = loss_and_grads(net, to_device(x, "cuda"), to_device(target, "cuda"), LOSS, KEY)
    assert found == pytest.approx(value, rel=1e-5)
    for name, grad in grads.items():
        assert np.abs(to_numpy(device_grads[name]) - grad).max() <= 1e-3 * np.abs(grad).max()


@own
def test_a_value_that_is_not_finite_is_traced_to_its_layer(network):
    net = network(**CONFIG, dtype="float64")
    where = "steps.1.conv" if network is TripleUNet else "conv2"
    net.parameters()[f"bottleneck.{where}.weight"][...] = 1e308
    x, target = batch("float64")
    found = first_non_finite(net, 1e6 * x, target, LOSS, KEY)
    assert found == f"first in the activations at bottleneck.{where.replace('conv', 'norm')}"


def test_an_array_that_nobody_names_is_refused_when_it_would_be_left_behind():
    class Scaled(Layer):
        def __init__(self):
            self.conv, self.scale = Conv2d(1, 1), np.ones(1)

    with pytest.raises(TypeError, match=r"Scaled\.scale is an array that neither parameters\(\) nor buffers\(\) has"):
        map_arrays(Scaled(), np.copy)


def test_layers_in_lists_tuples_and_dicts_are_found():
    class Nested(Layer):
        def __init__(self):
            self.first = [Conv2d(1, 1, 1, bias=False)]
            self.second = ({"a": BatchNorm2d(2)},)

    layer = Nested()
    names = ["first.0.weight", "second.0.a.gamma", "second.0.a.beta"]
    assert list(layer.parameters()) == names
    twin = map_arrays(layer, np.copy)
    assert twin.first[0].weight is not layer.first[0].weight
    assert np.array_equal(twin.first[0].weight, layer.first[0].weight)
    assert twin.second[0]["a"].eps == 1e-3
