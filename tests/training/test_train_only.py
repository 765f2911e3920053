"""A run that trains a part of the network: what stays as it is, to the last bit, and what does not."""

from dataclasses import replace

import numpy as np
import pytest

from minunet import engines
from minunet.base.archive import load
from minunet.base.errors import UserError
from minunet.data.augment import PRESETS
from minunet.engines.cuda.engine import CudaEngine
from minunet.engines.cuda.specification import SpecificationKernels
from minunet.gradcheck import check_net
from minunet.network.layers import frozen_norms, norms_frozen
from minunet.training.checkpoint import load_net
from minunet.training.config import TrainingConfig
from minunet.training.loop import Hooks, TrainingData, fit
from minunet.training.optim import AdamW, named
from minunet.training.step import Engine, loss_and_grads, train_step, update_running_stats
from tests.training.cases import KEY, LOSS, NORMALIZATION, all_arrays, batch, tiny_net

CONFIG = TrainingConfig(
    epochs=2,
    batch_size=4,
    images_per_epoch=8,
    augmentation=PRESETS["mild"],
    lr=0.01,
    weight_decay=0.1,
    clip_norm=1.0,
    batch_norm_momentum=0.5,
    ema_decay=0.9,
    train_only=("up1", "head"),
)
#: Everything but the head: a part of which every batch norm is trained.
BODY = ("down1", "bottleneck", "up1")


def used_net(**options):
    """A network whose arrays are none of those that a new one has."""
    net, draw = tiny_net(dtype="float32", **options), np.random.default_rng(0)
    for name, array in all_arrays(net).items():
        if name.rpartition(".")[2] != "weight":
            array[...] = draw.uniform(0.5, 1.5, array.shape)
    return net


def run(slices, folder, config=CONFIG, net=None, engine=None, **options):
    data = TrainingData(*slices, NORMALIZATION)
    engine = engine or Engine(net or used_net(), config.loss)
    return fit(engine, data, config, folder, progress_bar=False, **options)


def learns(name, parts=CONFIG.train_only):
    return name.partition(".")[0] in parts


def test_what_is_not_trained_keeps_its_bits_in_the_network_the_average_and_the_batch_norms(slices, tmp_path):
    before, net = all_arrays(used_net()), used_net()
    run(slices, tmp_path, net=net)
    raw, _ = load_net(tmp_path / "last.npz", "raw")
    averaged, _ = load_net(tmp_path / "last.npz", "ema")
    for found in (net, raw, averaged):
        for name, array in all_arrays(found).items():
            assert np.array_equal(array, before[name]) != learns(name), name
    assert frozen_norms(net) == []  # fit leaves the network as it found it


def test_the_optimiser_has_no_moments_of_what_is_not_trained(slices, tmp_path):
    run(slices, tmp_path / "part", replace(CONFIG, epochs=1))
    run(slices, tmp_path / "all", replace(CONFIG, epochs=1, train_only=None))
    names = {part: load(tmp_path / part / "last.npz")[0].keys() for part in ("part", "all")}
    missing = names["all"] - names["part"]
    assert names["part"] < names["all"]
    assert all(name.startswith("adamw/") for name in missing)
    moments = [name.split("/")[-1] for name in names["part"] if name.startswith("adamw/")]
    assert set(moments) == {name for name in used_net().parameters() if learns(name)}
    assert (tmp_path / "part" / "last.npz").stat().st_size < (tmp_path / "all" / "last.npz").stat().st_size


def test_names_of_single_arrays_and_layers_are_parts_too(slices, tmp_path):
    before, net = all_arrays(used_net()), used_net()
    run(slices, tmp_path, replace(CONFIG, epochs=1, train_only=("down1.norm1", "head.bias")), net=net)
    changed = {name for name, array in all_arrays(net).items() if not np.array_equal(array, before[name])}
    norm = ("gamma", "beta", "running_mean", "running_var")
    assert changed == {"head.bias", *(f"down1.norm1.{name}" for name in norm)}


def test_a_batch_norm_of_which_anything_is_trained_is_not_frozen(slices, tmp_path):
    before, net = all_arrays(used_net()), used_net()
    run(slices, tmp_path, replace(CONFIG, epochs=1, train_only=("down1.norm1.beta",)), net=net)
    changed = {name for name, array in all_arrays(net).items() if not np.array_equal(array, before[name])}
    assert changed == {f"down1.norm1.{name}" for name in ("beta", "running_mean", "running_var")}


def test_only_what_is_trained_counts_in_the_norm():
    net, (x, target) = tiny_net(), batch()
    _, grads, _ = loss_and_grads(net, x, target, LOSS, KEY)
    head = {name: array for name, array in net.parameters().items() if name.startswith("head.")}
    _, norm = train_step(net, AdamW(head), x, target, LOSS, KEY, lr=0.01)
    assert norm == pytest.approx(np.sqrt(sum((grads[name] ** 2).sum() for name in head)), rel=1e-12, abs=0)


def test_a_frozen_batch_norm_is_the_one_of_inference_and_its_gradient_is_right():
    net, (x, target) = tiny_net(dropout=0.0), batch()
    for name, array in net.buffers().items():
        array += 0.5 if name.endswith("var") else 0.1
    inference, _ = net.forward(x, training=False)
    with norms_frozen(net, ()):
        assert len(frozen_norms(net)) == 6
        frozen, cache = net.forward(x, training=True, key=KEY)
        assert net.batch_stats(cache) == {}
        assert check_net(net, x, target, key=KEY).ok(1e-12)
    np.testing.assert_array_equal(frozen, inference)
    with norms_frozen(net, ("up1.norm1.gamma",)):
        assert "up1.norm1" not in frozen_norms(net)
        mixed, cache = net.forward(x, training=True, key=KEY)
        stats = net.batch_stats(cache)
        assert stats.keys() == {"up1.norm1.running_mean", "up1.norm1.running_var"}
        before = {name: array.copy() for name, array in net.buffers().items()}
        update_running_stats(net, stats, 0.5)
        assert {name for name, a in net.buffers().items() if not np.array_equal(a, before[name])} == stats.keys()
        assert check_net(net, x, target, key=KEY).ok(1e-12)
    assert not np.array_equal(mixed, inference)
    assert frozen_norms(net) == []


def test_a_batch_norm_that_was_frozen_before_stays_so():
    net = tiny_net()
    net.bottleneck.norm1.frozen = True
    with norms_frozen(net, net.parameters()):
        assert frozen_norms(net) == ["bottleneck.norm1"]
    with pytest.raises(KeyError), norms_frozen(net, ()):
        raise KeyError
    assert frozen_norms(net) == ["bottleneck.norm1"]


def test_a_resumed_run_is_the_unbroken_one_and_trains_the_same_part(slices, tmp_path):
    run(slices, tmp_path / "whole")
    run(slices, tmp_path / "two", hooks=Hooks(iter([False, False, True]).__next__))
    for other in (None, ("head",), ("head", "up1")):
        with pytest.raises(UserError, match=r"last\.npz: belongs to another run \(train_only was \['up1', 'head'\]"):
            run(slices, tmp_path / "two", replace(CONFIG, train_only=other), resume=True)
    other = used_net()
    for array in other.parameters().values():
        array[...] = 7  # also what is not trained comes from the checkpoint
    run(slices, tmp_path / "two", net=other, resume=True)
    whole, two = (load(tmp_path / folder / "last.npz")[0] for folder in ("whole", "two"))
    assert whole.keys() == two.keys()
    assert all(np.array_equal(array, two[name]) for name, array in whole.items())


@pytest.mark.parametrize("part", ["up", "up10", "head.", "head.weight.x", "", "conv1"])
def test_a_part_that_there_is_not_is_refused_before_anything_is_written(slices, tmp_path, part):
    message = rf"'{part}' names no part of the network; there are down1, bottleneck, up1, head, and what is in them"
    with pytest.raises(ValueError, match=message):
        run(slices, tmp_path / "run", replace(CONFIG, train_only=("head", part)))
    assert not (tmp_path / "run").exists()


# --- Engines --------------------------------------------------------------------------------------------------------


def with_engine(slices, folder, config, choice, device="cpu"):
    """The history of a run, and the network that it trained."""
    net = used_net(widths=(4, 8))
    with engines.build(net, config.loss, 4, (16, 16), device, choice) as engine:
        assert (engine.name == "plain") == (choice == "plain")
        return run(slices, folder, config, engine=engine).history, net


def test_no_engine_takes_the_steps_of_frozen_batch_norms_and_a_line_says_so(slices, tmp_path, capsys):
    history, net = with_engine(slices, tmp_path / "auto", CONFIG, "auto")
    line = "engine of the steps: plain (down1.norm1 is frozen, which the engine cannot compute)\n"
    assert capsys.readouterr().out == line
    expected, twin = with_engine(slices, tmp_path / "plain", CONFIG, "plain")
    assert capsys.readouterr().out == ""
    assert [row["train_loss"] for row in history] == [row["train_loss"] for row in expected]  # the steps' own
    assert all(np.array_equal(array, all_arrays(twin)[name]) for name, array in all_arrays(net).items())
    assert load(tmp_path / "auto" / "last.npz")[1]["engine"] == "plain"


def test_an_engine_trains_a_part_of_which_no_batch_norm_is_frozen(slices, tmp_path, capsys):
    config = replace(CONFIG, train_only=BODY)
    history, net = with_engine(slices, tmp_path / "auto", config, "auto")
    assert capsys.readouterr().out == ""
    assert load(tmp_path / "auto" / "last.npz")[1]["engine"].startswith("cpu, ")
    expected, twin = with_engine(slices, tmp_path / "plain", config, "plain")
    for row, wanted in zip(history, expected, strict=True):
        assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-4)
    before = all_arrays(used_net(widths=(4, 8)))
    for name, array in all_arrays(net).items():
        assert np.array_equal(array, before[name]) != learns(name, BODY), name
        if name.rpartition(".")[2] == "weight" and learns(name, BODY):
            moved = all_arrays(twin)[name] - before[name]
            # Adam's first steps are as long where a gradient is nearly 0, and rounding turns those.
            assert np.linalg.norm(array - all_arrays(twin)[name]) < 0.1 * np.linalg.norm(moved), name


def test_the_cuda_engine_steps_on_a_part_as_the_plain_path_does():
    def steps(make):
        net = tiny_net(widths=(3, 5))
        x, target = batch()
        engine = make(net)
        optimizer = engine.optimizer(named(net.parameters(), BODY), 0.01, weight_decay=0.1, eps=1.0)
        options = {"lr": 0.01, "clip_norm": 0.01, "engine": engine}
        norms = [train_step(net, optimizer, x, target, LOSS, KEY._replace(step=n), **options)[1] for n in range(3)]
        return norms, all_arrays(net)

    norms, arrays = steps(
        lambda net: CudaEngine(net, LOSS, 2, (8, 8), kernels=SpecificationKernels(np, dtype="float64"))
    )
    expected_norms, expected = steps(lambda net: Engine(net, LOSS))
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-10)
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-9, atol=1e-9, err_msg=name)
        if name.startswith("head."):
            assert np.array_equal(array, all_arrays(tiny_net(widths=(3, 5)))[name])


def test_an_engine_for_a_network_with_a_frozen_batch_norm_is_the_plain_path():
    net = used_net()
    net.ups[0].convs.norm2.frozen = True
    with engines.build(net, LOSS, 4, (16, 16)) as engine:
        assert engine.description == "plain (up1.norm2 is frozen, which the engine cannot compute)"
