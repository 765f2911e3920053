"""Checkpoints: a resumed run is the unbroken one, and a network comes back, or nothing does."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet import AdamW, UNet
from minunet.base import archive
from minunet.base.archive import Reader, Spec
from minunet.base.environment import differences, environment
from minunet.base.errors import Diverged, UserError
from minunet.network.blocks import DoubleConv
from minunet.network.layers import map_arrays
from minunet.training import checkpoint
from minunet.training.optim import WeightEMA
from tests.base.test_archive import assert_same

SETTINGS = {"widths": (2, 3, 5), "up_kernel": 2, "conv_bias": False}


class Run:
    """A network, its optimiser and its averaged weights, trained on gradients that are functions of the step."""

    def __init__(self, move=lambda array: array, **changes):
        self.move = move
        self.net = map_arrays(UNet(**SETTINGS | changes), move)
        self.optimizer = AdamW(self.net.parameters())
        self.ema = WeightEMA(self.net.parameters() | self.net.buffers())

    def train(self, steps):
        for _ in range(steps):
            rng = np.random.default_rng(self.optimizer.steps)
            values = {n: self.move(rng.normal(size=p.shape).astype("f4")) for n, p in self.net.parameters().items()}
            self.optimizer.step(values)
            for buffer in self.net.buffers().values():
                buffer[...] = buffer * 0.9 + self.move(rng.random(buffer.shape).astype("f4"))
            self.ema.update(self.net.parameters() | self.net.buffers())
        return self

    def save(self, path, **metadata):
        checkpoint.save_training(path, net=self.net, optimizer=self.optimizer, ema=self.ema, metadata=metadata)
        return self

    def load(self, path):
        return checkpoint.load_training(path, self.net, self.optimizer, self.ema)

    def state(self):
        return archive.sha256_of_arrays(
            checkpoint._training_arrays(self.net, self.optimizer, self.ema)
            | {"counts": np.array([self.optimizer.steps, self.ema.updates])}
        )


def test_an_array_that_was_not_expected_is_named_before_any_is_read(tmp_path):
    path = tmp_path / "a.npz"
    archive.save(path, {"a": np.zeros((2, 3)), "b": np.zeros(4, "f4")}, {})
    with Reader(path) as reader:
        stored = reader.specs

    def refused(**expected):
        specs = {name: Spec(shape, np.dtype(dtype)) for name, (shape, dtype) in expected.items()}
        with pytest.raises(UserError) as error:
            checkpoint._check_same_arrays(path, stored, specs)
        return str(error.value)

    same = {"a": ((2, 3), "f8"), "b": ((4,), "f4")}
    assert "a is float64 (2, 3) in the file and float64 (3, 2) here)" in refused(**same | {"a": ((3, 2), "f8")})
    assert "b is float32 (4,) in the file and float64 (4,) here)" in refused(**same | {"b": ((4,), "f8")})
    assert "c is not in the file)" in refused(**same | {"c": ((), "f8")})
    assert "b is only in the file)" in refused(a=same["a"])
    assert "c is not in the file; and 2 more arrays differ)" in refused(c=((), "f8"))
    checkpoint._check_same_arrays(path, stored, {name: Spec(shape, np.dtype(t)) for name, (shape, t) in same.items()})


def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(tmp_path):
    path = tmp_path / "last.npz"
    unbroken = Run().train(3).save(path, epoch=1).train(4)
    resumed = Run(seed=0)
    resumed.train(1)  # whatever was there before is replaced
    metadata = resumed.load(path)
    assert resumed.state() != unbroken.state()
    assert resumed.train(4).state() == unbroken.state()
    assert metadata["epoch"] == 1
    assert metadata["optimizer"] == {"steps": 3}
    assert metadata["ema"] == {"updates": 3}
    assert differences(metadata["environment"], environment()) == []


def test_without_an_average(tmp_path):
    path = tmp_path / "last.npz"
    run = Run().train(2)
    checkpoint.save_training(path, net=run.net, optimizer=run.optimizer, metadata={})
    other = Run()
    metadata = checkpoint.load_training(path, other.net, other.optimizer)
    assert metadata["ema"] is None
    other.ema = run.ema
    assert other.state() == run.state()
    with pytest.raises(UserError, match=r"ema/down1.conv1.weight is not in the file; and \d+ more"):
        Run().load(path)
    Run().save(path)
    with pytest.raises(UserError, match=r"ema/down1.conv1.weight is only in the file"):
        checkpoint.load_training(path, other.net, other.optimizer)


def test_the_arrays_have_their_names(tmp_path):
    Run().train(1).save(tmp_path / "last.npz")
    arrays, metadata = archive.load(tmp_path / "last.npz")
    groups = ["parameters/", "adamw/first_moment/", "adamw/second_moment/", "ema/"]
    assert {f"{group}up1.up.weight" for group in groups} <= arrays.keys()
    assert {"buffers/up1.norm2.running_var", "ema/up1.norm2.running_var"} <= arrays.keys()
    assert not any(name.startswith("adamw/") and "running" in name for name in arrays)
    assert metadata["model"] == UNet(**SETTINGS).config | {"widths": [2, 3, 5]}


def test_training_resumes_on_the_device(tmp_path, device):
    path = tmp_path / "last.npz"
    unbroken = Run(device.put).train(2).save(path)
    resumed = Run(device.put)
    resumed.load(path)
    assert resumed.state() == unbroken.state()
    on_host = Run()
    on_host.load(path)
    assert on_host.state() == unbroken.state()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"widths": (2, 4, 5)}, r"holds another network \(widths was \[2, 3, 5\], is \[2, 4, 5\]\), use the settings"),
        ({"dropout": 0.1}, r"dropout was 0\.3, is 0\.1"),
        ({"dtype": "float64", "seed": 3}, r"seed was 0, is 3; dtype was 'float32', is 'float64'"),
    ],
)
def test_a_checkpoint_of_another_network_changes_nothing(tmp_path, changes, expected):
    Run().train(1).save(tmp_path / "last.npz")
    other = Run(**changes).train(2)
    before = other.state()
    with pytest.raises(UserError, match=expected):
        other.load(tmp_path / "last.npz")
    assert other.state() == before


def test_a_damaged_checkpoint_changes_nothing(tmp_path):
    path = tmp_path / "last.npz"
    Run().train(1).save(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") - 1] ^= 1  # the last byte of the last array
    path.write_bytes(data)
    other = Run().train(2)
    before = other.state()
    with pytest.raises(UserError, match="damaged checkpoint"):
        other.load(path)
    assert other.state() == before


@pytest.mark.parametrize("steps", [-1, 2**63, 1.5, None, "3"])
@pytest.mark.parametrize(("part", "entry"), [("optimizer", "steps"), ("ema", "updates")])
def test_counts_that_are_none_are_refused(tmp_path, part, entry, steps):
    run = Run()
    counts = {"optimizer": {"steps": 1}, "ema": {"updates": 1}} | {part: {entry: steps}}
    arrays = checkpoint._training_arrays(run.net, run.optimizer, run.ema)
    archive.save(tmp_path / "a.npz", arrays, {"model": run.net.config} | counts)
    with pytest.raises(UserError, match=f"its metadata lacks the {part}'s {entry}"):
        run.load(tmp_path / "a.npz")


@pytest.mark.parametrize("where", ["parameters", "buffers", "moments", "average"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, where):
    path = tmp_path / "last.npz"
    run = Run().train(1).save(path)
    before = path.read_bytes()
    groups = {
        "parameters": run.net.parameters(),
        "buffers": run.net.buffers(),
        "moments": run.optimizer.second_moment,
        "average": run.ema.average,
    }
    name, array = list(groups[where].items())[3]
    array[0] = np.nan
    with pytest.raises(Diverged, match=rf"{name}: \d+ of {array.size} values are NaN or infinite"):
        run.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("entry", ["model", "optimizer", "ema", "environment"])
def test_metadata_cannot_replace_what_a_resume_needs(tmp_path, entry):
    with pytest.raises(ValueError, match=f"must not have the entries .*{entry}"):
        Run().save(tmp_path / "a.npz", **{entry: 1})


def another_activation(net):
    """Other code, but the same arrays."""

    class Linear(DoubleConv):
        pass

    net.bottleneck.__class__ = Linear


def another_eps(net):
    net.downs[0].convs.norm2.eps = 0.1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (another_activation, "bottleneck is a Linear"),
        (another_eps, "down1.norm2 has eps 0.1, not 0.001"),
        (lambda net: setattr(net.ups[0].dropout, "rate", 0.0), "up1.dropout has rate 0.0, not 0.3"),
        (lambda net: setattr(net.head, "padding", 1), "head has padding 1, not same"),
        (lambda net: setattr(net.ups[1].up, "stride", 1), "up2.up has stride 1, not 2"),
    ],
)
def test_a_network_that_was_changed_by_hand_comes_back_as_nothing_else(tmp_path, change, found):
    """Without a word, load_net would build a plain U-Net, which computes something else with the same arrays."""
    path = tmp_path / "last.npz"
    run = Run()
    change(run.net)
    run.save(path)
    here = "all code is the package's own"
    with pytest.raises(UserError, match=rf"^\S*last\.npz: holds another network \(there {found}, here {here}\), give"):
        checkpoint.load_net(path)
    plain = Run().train(1)
    before = plain.state()
    with pytest.raises(UserError, match=rf"there {found}, here {here}"):
        plain.load(path)
    assert plain.state() == before
    twin = Run().train(1)
    change(twin.net)
    twin.load(path)
    assert twin.state() == run.state()
    plain.save(path)
    with pytest.raises(UserError, match=rf"there {here}, here {found}"):
        twin.load(path)


def test_a_file_from_before_the_eps_was_a_setting_has_that_of_keras(tmp_path):
    path = tmp_path / "last.npz"
    run = Run().save(path)
    arrays, metadata = archive.load(path)
    del metadata["model"]["batch_norm_eps"], metadata["own_code"], metadata["class"]
    archive.save(path, arrays, metadata)
    assert checkpoint.load_net(path)[0].config == run.net.config
    Run().train(1).load(path)
    with pytest.raises(UserError, match=r"batch_norm_eps was 0\.001, is 0\.1"):
        Run(batch_norm_eps=0.1).load(path)


def test_a_file_from_before_there_were_outputs_has_sigmoids(tmp_path):
    path = tmp_path / "last.npz"
    run = Run(out_channels=3).save(path)
    arrays, metadata = archive.load(path)
    del metadata["model"]["output"]
    archive.save(path, arrays, metadata)
    assert checkpoint.load_net(path)[0].config == run.net.config
    Run(out_channels=3).train(1).load(path)
    with pytest.raises(UserError, match=r"output was 'sigmoid', is 'softmax'"):
        Run(out_channels=3, output="softmax").load(path)


def test_the_output_comes_back(tmp_path):
    run = Run(out_channels=3, output="softmax").save(tmp_path / "last.npz")
    net, _ = checkpoint.load_net(tmp_path / "last.npz", "raw")
    logits = np.random.default_rng(0).standard_normal((1, 4, 4, 3)).astype("float32")
    assert np.array_equal(net.probabilities(logits), run.net.probabilities(logits))
    assert net.probabilities(logits).sum(axis=-1) == pytest.approx(1, rel=1e-6)


def test_the_eps_comes_back(tmp_path):
    Run(batch_norm_eps=0.1).save(tmp_path / "last.npz")
    net, _ = checkpoint.load_net(tmp_path / "last.npz")
    assert net.bottleneck.norm1.eps == 0.1


# ---------------------------------------------------------------------------------------------------------------------
# A network for prediction
# ---------------------------------------------------------------------------------------------------------------------


def test_the_network_comes_back_with_either_weights(tmp_path):
    path = tmp_path / "last.npz"
    run = Run().train(3).save(path, threshold=0.5)
    raw = run.net.parameters() | run.net.buffers()
    for weights, expected in {"auto": run.ema.average, "ema": run.ema.average, "raw": raw}.items():
        net, metadata = checkpoint.load_net(path, weights)
        assert net.config == run.net.config
        assert_same(net.parameters() | net.buffers(), expected)
        assert metadata["threshold"] == 0.5
    with pytest.raises(ValueError, match="weights must be 'auto', 'ema' or 'raw', got 'best'"):
        checkpoint.load_net(path, "best")


def test_the_network_of_a_run_without_average(tmp_path):
    path = tmp_path / "last.npz"
    run = Run().train(3)
    checkpoint.save_training(path, net=run.net, optimizer=run.optimizer, metadata={})
    for weights in ("auto", "raw"):
        net, _ = checkpoint.load_net(path, weights)
        assert_same(net.parameters() | net.buffers(), run.net.parameters() | run.net.buffers())
    with pytest.raises(UserError, match=r"last\.npz: holds no averaged weights \(EMA\), ask for the raw ones"):
        checkpoint.load_net(path, "ema")


def test_start_weights_fit_a_network_of_another_seed_dropout_and_dtype(tmp_path):
    path = tmp_path / "last.npz"
    run = Run().train(3).save(path)
    raw = run.net.parameters() | run.net.buffers()
    for weights, expected in {"auto": run.ema.average, "raw": raw}.items():
        net = UNet(**SETTINGS, seed=5, dropout=0.1, dtype="float64")
        config = net.config
        metadata = checkpoint.load_weights(path, net, weights)
        assert net.config == config
        assert metadata["model"]["seed"] == 0
        arrays = net.parameters() | net.buffers()
        assert {array.dtype for array in arrays.values()} == {np.dtype("float64")}
        assert_same({name: array.astype("f4") for name, array in arrays.items()}, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 1}, "in_channels is 3 there and 1 here"),
        ({"batch_norm_eps": 0.1}, "batch_norm_eps is 0.001 there and 0.1 here"),
        ({"widths": (3, 5)}, r"widths is \(2, 3, 5\) there and \(3, 5\) here"),
    ],
)
def test_start_weights_of_another_architecture_are_refused_and_change_nothing(tmp_path, change, message):
    path = tmp_path / "last.npz"
    Run().save(path)
    net, twin = (UNet(**SETTINGS | change) for _ in range(2))
    with pytest.raises(UserError, match=rf"last\.npz: its weights do not fit \({message}\), give a checkpoint"):
        checkpoint.load_weights(path, net)
    assert_same(net.parameters() | net.buffers(), twin.parameters() | twin.buffers())


@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    kernels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    conv_bias=st.booleans(),
)
def test_kernels_are_counted_as_the_network_has_them(widths, channels, kernels, conv_bias):
    net = UNet(*channels, widths, up_kernel=kernels[0], head_kernel=kernels[1], conv_bias=conv_bias)
    kernels = [array.size for name, array in net.parameters().items() if name.endswith("weight")]
    assert checkpoint._kernel_values(net.config) == sum(kernels)


@pytest.mark.parametrize(
    "changes",
    [
        {"widths": [10**9, 10**9]},
        {"widths": [1] * 100_000},
        {"widths": []},
        {"widths": ["a"]},
        {"widths": [2.5]},
        {"widths": None},
        {"widths": [-(10**6), 10**6]},
        {"in_channels": 10**12},
        {"out_channels": 10**12},
        {"up_kernel": 10**6},
        {"head_kernel": 10**6},
        {"dtype": "S1000000000"},
        {"dtype": ["f4"]},
        {"dropout": "high"},
        {"batch_norm_eps": "small"},
        {"output": "tanh"},
        {"output": "softmax"},  # of one channel
        {"batch_norm_eps": 0},
        {"dtype": "float16"},
        {"dropout": math.nan},
        {"seed": -1},
        {"seed": "x"},
        {"unknown": 1},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_hostile_settings_build_no_network(tmp_path, changes):
    path = tmp_path / "a.npz"
    net = UNet(**SETTINGS)
    arrays = checkpoint._prefixed("parameters/", net.parameters()) | checkpoint._prefixed("buffers/", net.buffers())
    archive.save(path, arrays, {"model": net.config})
    assert_same(checkpoint.load_net(path)[0].parameters(), net.parameters())
    archive.save(path, arrays, {"model": net.config | changes})
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.npz: damaged checkpoint \(model: "):
            checkpoint.load_net(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize("model", [None, [], {}, {"widths": [2, 3, 5]}])
def test_a_checkpoint_without_settings_builds_no_network(tmp_path, model):
    archive.save(tmp_path / "a.npz", {"parameters/a": np.arange(3.0)}, {"model": model})
    with pytest.raises(UserError, match=r"a\.npz: damaged checkpoint \(model: "):
        checkpoint.load_net(tmp_path / "a.npz")


def test_arrays_that_do_not_fit_the_settings_are_refused(tmp_path):
    net = UNet(**SETTINGS)
    arrays = checkpoint._prefixed("parameters/", net.parameters())
    archive.save(tmp_path / "a.npz", arrays, {"model": net.config})
    with pytest.raises(UserError, match=r"buffers/down1.norm1.running_mean is not in the file"):
        checkpoint.load_net(tmp_path / "a.npz")
