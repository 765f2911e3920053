"""How training, evaluation and prediction get an engine, use it for everything, and close it: with a tiny fake one."""

import contextlib
import sys

import numpy as np
import pytest

from minunet import engines
from minunet.base import rng
from minunet.base.archive import load, sha256_of_arrays
from minunet.base.errors import Diverged, UserError
from minunet.base.signals import Terminated
from minunet.data import phantom
from minunet.data.augment import Augmentation
from minunet.data.normalize import Normalization
from minunet.engines.cpu import choice
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.results.prediction import Predictor
from minunet.training import loop
from minunet.training.config import TrainingConfig
from minunet.training.optim import AdamW, WeightEMA
from minunet.training.step import Engine, loss_and_grads
from tests.command_line import run
from tests.engines.cases import train

CONFIG = TrainingConfig(epochs=2, batch_size=4, images_per_epoch=6, augmentation=Augmentation(), ema_decay=0.9)
SIZE = 16


class FakeEngine(Engine):
    """The plain path, which writes down what is asked of it."""

    name = "fake, 2 processes"
    made: list["FakeEngine"] = []  # noqa: RUF012  (each test starts with an empty one)

    def __init__(self, net, loss, max_batch, image_size):
        super().__init__(net, loss)
        self.max_batch, self.image_size = max_batch, image_size
        self.steps = self.closed = 0
        self.nets = []  # that logits or predict were asked of
        self.made.append(self)

    def loss_and_grads(self, x, target, key):
        assert not self.closed
        self.steps += 1
        return super().loss_and_grads(x, target, key)

    def logits(self, x, net=None):
        assert not self.closed
        self.nets.append(net)
        return super().logits(x, net)

    def predict(self, x, net=None):
        assert not self.closed
        self.nets.append(net)
        return super().predict(x, net)

    def close(self):
        self.closed += 1


def refuse_odd_widths(net, loss, max_batch, image_size, precision):
    return "an odd width" if any(width % 2 for width in net.config["widths"]) else None


@pytest.fixture
def fake(monkeypatch):
    """The module of an engine for the CPU, which takes even widths only."""

    def made(net, loss, max_batch, image_size, precision):
        return FakeEngine(net, loss, max_batch, image_size)

    monkeypatch.setattr(choice, "unsupported", refuse_odd_widths)
    monkeypatch.setattr(choice, "build", made)
    monkeypatch.setattr(FakeEngine, "made", [])
    monkeypatch.setattr(engines, "difference", lambda *arguments, **options: None)  # test_selfcheck.py has it


@pytest.fixture(scope="module")
def slices():
    made = phantom.make(patients=2, size=SIZE, seed=1)
    first, second = (
        made.subset([i for i, patient in enumerate(made.patients) if patient == name][:12])
        for name in made.patient_names()
    )
    return first, second


def small_net(widths=(2, 4)):
    return UNet(widths=widths, dropout=0.2, seed=2)


def fit(slices, folder, net=None, config=CONFIG, **options):
    return train(net or small_net(), slices, config, folder, **options)


def build(net, **options):
    return engines.build(net, SegmentationLoss(), 4, (SIZE, SIZE), **options)


# --- Which engine ---------------------------------------------------------------------------------------------------


def test_auto_is_the_engine_of_the_device(fake):
    net = small_net()
    with build(net) as engine:
        assert isinstance(engine, FakeEngine)
        assert (engine.net, engine.max_batch, engine.image_size, engine.reason) == (net, 4, (SIZE, SIZE), None)
    assert engine.closed == 1


def test_plain_is_the_plain_path_and_needs_no_reason(fake):
    with build(small_net(), choice="plain") as engine:
        assert (type(engine), engine.name, engine.reason) == (Engine, "plain", None)
    assert not FakeEngine.made


def test_what_the_engine_cannot_take_runs_on_the_plain_path(fake):
    with build(small_net((3, 5))) as engine:
        assert (type(engine), engine.name, engine.reason) == (Engine, "plain", "an odd width")


def test_an_engine_that_cannot_be_imported_is_no_reason_to_fail(monkeypatch):
    monkeypatch.setitem(sys.modules, "minunet.engines.cpu.choice", None)
    monkeypatch.delattr("minunet.engines.cpu.choice")
    with build(small_net()) as engine:
        assert engine.name == "plain"
        assert engine.reason.startswith("the engine cannot be imported: ")
        assert engine.description == f"plain ({engine.reason})"


@pytest.mark.parametrize(
    ("options", "word"),
    [({"choice": "fast"}, "choice"), ({"precision": "int8"}, "precision"), ({"device": "tpu"}, "device")],
)
def test_unknown_words_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        build(small_net(), **options)
    with pytest.raises(ValueError, match="max_batch"):
        engines.build(small_net(), SegmentationLoss(), 0, (SIZE, SIZE))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"precision": "tf32"}, "tf32 needs a GPU"),
        ({"precision": "bf16", "choice": "plain"}, "bf16 needs a GPU"),
        ({"precision": "bf16", "choice": "plain", "device": "cuda"}, "the plain path computes in float32"),
    ],
)
def test_a_precision_that_is_not_to_be_had_is_refused(options, why):
    with pytest.raises(UserError, match=f"^--precision: .*{why}.*leave it out"):
        build(small_net(), **options)


def test_the_plain_engine_computes_what_the_network_does():
    net, other, loss = small_net(), small_net(), SegmentationLoss()
    other.parameters()["head.bias"][...] = 3
    draw = np.random.default_rng(0)
    x = draw.standard_normal((2, 8, 8, 3)).astype("float32")
    target = (draw.random((2, 8, 8, 1)) < 0.4).astype("float32")
    key = rng.Key(seed=1)
    with Engine(net, loss) as engine:
        value, grads, stats = engine.loss_and_grads(x, target, key)
        expected_value, expected_grads, expected_stats = loss_and_grads(net, x, target, loss, key)
        assert value == expected_value
        assert sha256_of_arrays(grads) == sha256_of_arrays(expected_grads)
        assert sha256_of_arrays(stats) == sha256_of_arrays(expected_stats)
        for each, given in ((net, None), (net, net), (other, other)):
            assert np.array_equal(engine.logits(x, given), each.forward(x, training=False)[0])
            assert np.array_equal(engine.predict(x[:, :5], given), each.predict(x[:, :5]))


# --- A run ----------------------------------------------------------------------------------------------------------


def test_a_run_takes_all_its_steps_and_measurements_from_one_engine(fake, slices, tmp_path, capsys):
    net = small_net()
    fit(slices, tmp_path / "fake", net)
    (engine,) = FakeEngine.made
    assert (engine.net, engine.max_batch, engine.image_size) == (net, CONFIG.batch_size, (SIZE, SIZE))
    assert engine.steps == 2 * 2
    assert engine.nets
    assert all(twin is not net for twin in engine.nets)  # the averaged weights are measured
    assert engine.closed == 1

    fit(slices, tmp_path / "plain", choice="plain")
    assert len(FakeEngine.made) == 1
    assert capsys.readouterr().out == ""
    for name in ("last.npz", "best.npz"):
        fake_arrays, plain_arrays = (load(tmp_path / folder / name)[0] for folder in ("fake", "plain"))
        assert sha256_of_arrays(fake_arrays) == sha256_of_arrays(plain_arrays)


def test_a_description_has_name_and_reason(fake):
    with build(small_net()) as fast, build(small_net((3, 5))) as slow:
        assert (fast.description, slow.description) == ("fake, 2 processes", "plain (an odd width)")


def test_an_engine_for_another_loss_is_refused_before_the_first_step(slices, tmp_path):
    engine = Engine(small_net(), SegmentationLoss(bce_weight=0.5))
    with pytest.raises(ValueError, match=r"engine must be one for the config's loss.*bce_weight=1\.0.*bce_weight=0\.5"):
        loop.fit(engine, loop.TrainingData(*slices, Normalization()), CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_engine_chooses_what_is_done_with_the_gradients(fake, slices, tmp_path, monkeypatch):
    seen = set()

    class Noted:
        def __init__(self, *arguments, **options):
            seen.add(type(self))
            super().__init__(*arguments, **options)

    class NotedAdamW(Noted, AdamW):
        pass

    class NotedEMA(Noted, WeightEMA):
        pass

    def clip(grads, max_norm):
        seen.add(max_norm)
        return {name: 0 * gradient for name, gradient in grads.items()}, 1.0

    monkeypatch.setattr(FakeEngine, "optimizer", staticmethod(NotedAdamW))
    monkeypatch.setattr(FakeEngine, "average", staticmethod(NotedEMA))
    monkeypatch.setattr(FakeEngine, "clip", staticmethod(clip))
    net = small_net()
    before = {name: array.copy() for name, array in net.parameters().items()}
    fit(slices, tmp_path, net, TrainingConfig(epochs=1, batch_size=6, ema_decay=0.5, weight_decay=0.0, clip_norm=0.25))
    assert seen == {NotedAdamW, NotedEMA, 0.25}
    assert all(np.array_equal(net.parameters()[name], array) for name, array in before.items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, Terminated, RuntimeError, Diverged, MemoryError])
def test_however_a_run_ends_its_engine_is_closed(fake, slices, tmp_path, monkeypatch, error):
    def fail(self, x, target, key):
        raise error

    monkeypatch.setattr(FakeEngine, "loss_and_grads", fail)
    with pytest.raises(error):
        fit(slices, tmp_path)
    (engine,) = FakeEngine.made
    assert engine.closed == 1


def test_a_run_that_is_asked_to_stop_closes_its_engine_too(fake, slices, tmp_path):
    assert not fit(slices, tmp_path, should_stop=lambda: True).finished
    (engine,) = FakeEngine.made
    assert (engine.steps, engine.closed) == (1, 1)


def test_a_resumed_run_says_if_its_engine_is_another_one(fake, slices, tmp_path, capsys, monkeypatch):
    fit(slices, tmp_path, should_stop=lambda: True)
    monkeypatch.setattr(FakeEngine, "name", "fake, 3 processes")
    assert fit(slices, tmp_path, resume=True).finished
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert line.endswith("may differ: engine was 'fake, 2 processes', is 'fake, 3 processes'")
    assert fit(slices, tmp_path, resume=True).finished
    assert "warning" not in capsys.readouterr().out


def test_an_older_checkpoint_without_an_engine_is_of_the_plain_path(fake, slices, tmp_path, capsys, monkeypatch):
    written = loop.save_training
    monkeypatch.setattr(
        loop,
        "save_training",
        lambda path, *, metadata, **rest: written(
            path, metadata={name: value for name, value in metadata.items() if name != "engine"}, **rest
        ),
    )
    fit(slices, tmp_path, choice="plain", should_stop=lambda: True)
    assert fit(slices, tmp_path, choice="plain", resume=True).finished
    assert capsys.readouterr().out == ""


# --- A prediction ---------------------------------------------------------------------------------------------------


def test_a_predictor_uses_its_engine_and_closes_it(fake, slices, tmp_path):
    _, images = slices
    preprocessing = {"normalization": Normalization().to_dict(), "image_size": SIZE, "flip_average": True}
    fit(slices, tmp_path, metadata={"preprocessing": preprocessing}, choice="plain")
    plain = Predictor.load(tmp_path / "last.npz").probabilities(images.images)
    assert not FakeEngine.made
    with Predictor.load(tmp_path / "last.npz", engine="auto", max_batch=5) as predictor:
        probabilities = predictor.probabilities(images.images)
    (engine,) = FakeEngine.made
    assert (engine.max_batch, engine.image_size, engine.closed) == (5, (SIZE, SIZE), 1)
    assert len(engine.nets) == 2 * -(-len(images) // 5)  # every slice and its mirror image, five at a time
    assert np.abs(probabilities - plain).max() < 1e-6


# --- The command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", ["train_lgg", "predict"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--engine", "fast"), ("--engine", "fast", "'auto', 'plain'")),
        (("--precision", "int8"), ("--precision", "int8", "float32", "tf32", "bf16")),
    ],
)
def test_wrong_flags_are_named(example, flags, words, tmp_path):
    arguments = ("x.npz", "x.png", "--output", "out") if example == "predict" else ()
    ended = run(example, *arguments, *flags, cwd=tmp_path)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert all(word in line for word in words)


def test_a_precision_that_a_cpu_lacks_is_named_before_anything_is_written(tmp_path):
    arguments = ("--image-size", "16", "--epochs", "1", "--quiet", "--device", "cpu", "--precision", "tf32")
    ended = run("train_lgg", *arguments, cwd=tmp_path)
    assert ended.code == 2
    assert ended.err == "error: --precision: tf32 needs a GPU, leave it out on a CPU\n"
    assert list(tmp_path.iterdir()) == []


def test_closing_is_what_with_does():
    class Closing(Engine):
        closed = False

        def close(self):
            self.closed = True

    engine = Closing(small_net(), SegmentationLoss())
    with contextlib.suppress(ZeroDivisionError), engine:
        raise ZeroDivisionError
    assert engine.closed
