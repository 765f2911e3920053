"""The bridge to PyTorch, without PyTorch: names, layouts, files. tests/parity/test_live.py runs it against PyTorch."""

import json
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet import UNet
from minunet.base.errors import UserError
from minunet.network.bridge import export_safetensors, from_torch_names, import_safetensors, to_torch_names
from minunet.network.layers import map_arrays

SETTINGS = {"in_channels": 2, "widths": (2, 3, 5)}


def arrays_of(net):
    return net.parameters() | net.buffers()


def random_net(seed=0, dtype="float32", **settings):
    rng = np.random.default_rng(seed)
    net = UNet(**{**SETTINGS, **settings}, dtype=dtype)
    net = map_arrays(net, lambda array: rng.standard_normal(array.shape).astype(array.dtype))
    for name, array in net.buffers().items():
        if name.endswith("running_var"):
            array[...] = abs(array)
    return net


def bits(arrays):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


# --- Names and layouts ------------------------------------------------------------------------------------------------


def test_every_number_is_where_pytorch_has_it():
    rng = np.random.default_rng(0)
    kernel, up = rng.standard_normal((3, 3, 4, 5)), rng.standard_normal((2, 2, 4, 5))
    arrays = {"down2.conv1.weight": kernel, "up1.up.weight": up, "head.weight": kernel[:1]}
    theirs = to_torch_names(arrays)
    assert list(theirs) == list(arrays)
    for u, v, c, o in np.ndindex(3, 3, 4, 5):
        assert theirs["down2.conv1.weight"][o, c, u, v] == kernel[u, v, c, o]
    for u, v, c, o in np.ndindex(2, 2, 4, 5):
        assert theirs["up1.up.weight"][c, o, u, v] == up[u, v, c, o]
    assert theirs["head.weight"].shape == (5, 4, 1, 3)


def test_batch_norm_changes_its_names_and_brings_a_counter():
    names = ["gamma", "beta", "running_mean", "running_var"]
    theirs = to_torch_names({f"up2.norm1.{name}": np.full(3, float(value)) for value, name in enumerate(names)})
    assert {name: array.tolist() for name, array in theirs.items()} == {
        "up2.norm1.weight": [0] * 3,
        "up2.norm1.bias": [1] * 3,
        "up2.norm1.running_mean": [2] * 3,
        "up2.norm1.num_batches_tracked": 0,
        "up2.norm1.running_var": [3] * 3,
    }
    assert theirs["up2.norm1.num_batches_tracked"].dtype == np.int64


nets = st.builds(
    random_net,
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["float32", "float64"]),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    up_kernel=st.integers(1, 3),
    head_kernel=st.integers(1, 3),
    conv_bias=st.booleans(),
)


@given(net=nets)
def test_there_and_back_loses_nothing(net):
    arrays = arrays_of(net)
    before = bits(arrays)
    theirs = to_torch_names(arrays)
    back = from_torch_names(theirs)
    assert bits(back) == before
    assert list(back) == list(arrays)
    for array in (*theirs.values(), *back.values()):
        assert array.flags.c_contiguous
        array[...] = 7  # results are the caller's to overwrite: neither way gives views
    assert bits(arrays) == before


def test_a_part_will_do(device):
    """Gradients, say, which have no running statistics; and arrays on another device come to the host."""
    parameters = random_net().parameters()
    on_device = {name: device.put(array) for name, array in parameters.items()}
    assert bits(to_torch_names(on_device)) == bits(to_torch_names(parameters))
    theirs = to_torch_names(parameters)
    assert not any("num_batches_tracked" in name for name in theirs)
    put = {name: device.put(array) for name, array in theirs.items()}
    assert bits(from_torch_names(put)) == bits(parameters)


@pytest.mark.parametrize("convert", [to_torch_names, from_torch_names])
@pytest.mark.parametrize(
    "name", ["", "weight", "conv1.weight", "down0.conv1.weight", "down1.conv3.weight", "down1.up.weight", "Head.weight"]
)
def test_a_name_that_no_unet_has_is_refused(convert, name):
    with pytest.raises(ValueError, match="arrays must have the names of a UNet's") as caught:
        convert({name: np.zeros((1, 1, 1, 1))})
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("convert", "name"),
    [
        (to_torch_names, "down1.norm1.weight"),
        (to_torch_names, "down1.norm1.num_batches_tracked"),
        (from_torch_names, "down1.norm1.gamma"),
        (to_torch_names, "down1.conv1.gamma"),
        (from_torch_names, "head.num_batches_tracked"),
        (from_torch_names, "head.weight.extra"),
    ],
)
def test_the_names_of_the_other_side_are_refused(convert, name):
    with pytest.raises(ValueError, match="arrays must have the names of a UNet's"):
        convert({name: np.zeros(2)})


@pytest.mark.parametrize("convert", [to_torch_names, from_torch_names])
def test_a_kernel_has_four_axes(convert):
    with pytest.raises(ValueError, match=r"arrays\['up1.up.weight'\] must have four axes, got shape \(3, 3\)"):
        convert({"up1.up.weight": np.zeros((3, 3))})


# --- Files ------------------------------------------------------------------------------------------------------------


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for transfer in (export_safetensors, import_safetensors):
        with pytest.raises(UserError, match=r'not installed, run pip install "minunet\[bridge\]"$'):
            transfer(tmp_path / "net.safetensors", random_net())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.numpy")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("settings", [{}, {"widths": (3,)}, {"conv_bias": False, "up_kernel": 2, "head_kernel": 1}])
def test_a_file_brings_the_weights_back(safetensors, tmp_path, settings, dtype):
    path = tmp_path / "net.safetensors"
    net, other = random_net(1, dtype, **settings), random_net(2, dtype, **settings)
    export_safetensors(path, net)
    live = arrays_of(other)
    import_safetensors(path, other)
    assert bits(arrays_of(other)) == bits(arrays_of(net))
    assert all(arrays_of(other)[name] is array for name, array in live.items())  # filled, not replaced
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


def test_the_file_holds_pytorchs_arrays_and_says_how_to_build_the_module(safetensors, tmp_path):
    path = tmp_path / "net.safetensors"
    net = random_net()
    export_safetensors(path, net)
    assert bits(safetensors.load_file(path)) == bits(to_torch_names(arrays_of(net)))
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    assert UNet(**json.loads(metadata["config"])).config == net.config
    assert float(metadata["batch_norm_eps"]) == 1e-3
    assert metadata["format"] == "pt"
    assert metadata["concat"] == "up, skip"
    assert metadata["output"] == "sigmoid"


def test_another_eps_is_another_network(safetensors, tmp_path):
    path = tmp_path / "net.safetensors"
    export_safetensors(path, random_net(batch_norm_eps=0.1))
    assert refused(path, random_net(1)).startswith(
        "its network has batch_norm_eps '0.1', not '0.001'; load it into a network"
    )
    import_safetensors(path, random_net(1, batch_norm_eps=0.1))


def test_classes_are_not_loaded_as_masks(safetensors, tmp_path):
    path = tmp_path / "net.safetensors"
    classes = random_net(out_channels=3, output="softmax")
    export_safetensors(path, classes)
    assert refused(path, random_net(1, out_channels=3)).startswith(
        "its network has output 'softmax', not 'sigmoid'; load it into a network"
    )
    twin = random_net(1, out_channels=3, output="softmax")
    import_safetensors(path, twin)
    assert bits(arrays_of(twin)) == bits(arrays_of(classes))


@pytest.mark.parametrize(
    ("entry", "value"),
    [("concat", "skip, up"), ("concat", "x" * 10**6), ("batch_norm_eps", "1e-5"), ("batch_norm_eps", "")],
)
def test_a_file_of_another_module_is_refused(safetensors, tmp_path, entry, value):
    path = tmp_path / "net.safetensors"
    safetensors.save_file(to_torch_names(arrays_of(random_net())), path, {entry: value})
    message = refused(path, random_net(1))
    assert message.startswith(f"its network has {entry} ")
    assert len(message) < 200


def test_a_variance_below_0_is_refused(safetensors, tmp_path):
    path = tmp_path / "net.safetensors"
    net = random_net()
    net.bottleneck.norm2.running_var[0] = -1e-30
    export_safetensors(path, net)
    assert refused(path, random_net(1)).startswith("bottleneck.norm2.running_var is a variance below 0")


def leaky():
    class LeakyUNet(UNet):
        pass

    return LeakyUNet(widths=(2, 3))


def with_another_eps():
    net = random_net()
    net.bottleneck.norm1.eps = 0.1
    return net


@pytest.mark.parametrize(
    ("make", "found"),
    [(leaky, "the network is a LeakyUNet"), (with_another_eps, "bottleneck.norm1 has eps 0.1, not 0.001")],
)
def test_a_network_of_ones_own_is_not_exported_as_a_unet(safetensors, tmp_path, make, found):
    with pytest.raises(UserError, match=rf"^\S*a\.safetensors: only the package's own U-Net .*\({found}\), save a"):
        export_safetensors(tmp_path / "a.safetensors", make())
    assert not list(tmp_path.iterdir())


def test_arrays_in_another_order_are_not_scrambled(safetensors, tmp_path):
    net = random_net()
    export_safetensors(tmp_path / "a", net)
    export_safetensors(tmp_path / "b", map_arrays(net, np.asfortranarray))
    a, b = safetensors.load_file(tmp_path / "a"), safetensors.load_file(tmp_path / "b")
    assert bits(a) == bits(b) == bits(to_torch_names(arrays_of(net)))


def refused(path, net):
    """What the UserError of importing ``path`` says after the file's name; ``net`` must be as before."""
    before = bits(arrays_of(net))
    with pytest.raises(UserError) as caught:
        import_safetensors(path, net)
    assert bits(arrays_of(net)) == before
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_no_file(safetensors, tmp_path):
    assert refused(tmp_path / "absent", random_net()).startswith("no such file, give the path")
    assert refused(tmp_path, random_net()).startswith("no such file, give the path")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_does_not_hang(safetensors, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert refused(tmp_path / "fifo", random_net()).startswith("no such file")


@pytest.mark.parametrize("keep", [0, 3, 8, 100, 2000, -1])
def test_a_truncated_file(safetensors, tmp_path, keep):
    path = tmp_path / "net.safetensors"
    export_safetensors(path, random_net())
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(path, random_net(1)).startswith("cannot be read as safetensors (")


def test_something_else(safetensors, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"\x80\x04" * 5000)
    assert refused(path, random_net()).startswith("cannot be read as safetensors (")


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"widths": (2, 4, 5)}, "down2.conv1.weight is F32 (3, 2, 3, 3) in the file and F32 (4, 2, 3, 3) here; and "),
        ({"widths": (2, 3)}, "bottleneck.conv1.weight is F32 (5, 3, 3, 3) in the file and F32 (3, 2, 3, 3) here; and "),
        ({"widths": (2, 3, 5, 6)}, "down3.conv1.weight is not in the file; and "),
        ({"conv_bias": False}, "bottleneck.conv1.bias is only in the file; and 9 more arrays differ"),
        ({"head_kernel": 1}, "head.weight is F32 (1, 2, 3, 3) in the file and F32 (1, 2, 1, 1) here)"),
        ({"dtype": "float64"}, "down1.conv1.weight is F32 (2, 2, 3, 3) in the file and F64 (2, 2, 3, 3) here; and "),
    ],
)
def test_another_network(safetensors, tmp_path, settings, difference):
    path = tmp_path / "net.safetensors"
    export_safetensors(path, random_net())
    message = refused(path, random_net(1, **settings))
    assert message.startswith("holds another network (")
    assert difference in message
    assert message.endswith("build the network as its metadata's config says")


def test_an_array_too_few(safetensors, tmp_path):
    path = tmp_path / "net.safetensors"
    state = to_torch_names(arrays_of(random_net()))
    del state["up1.norm2.running_var"]
    safetensors.save_file(state, path)
    assert "(up1.norm2.running_var is not in the file)" in refused(path, random_net(1))


def test_the_counters_may_be_missing(safetensors, tmp_path):
    path = tmp_path / "net.safetensors"
    net, other = random_net(1), random_net(2)
    state = to_torch_names(arrays_of(net))
    safetensors.save_file({name: array for name, array in state.items() if "num_batches" not in name}, path)
    import_safetensors(path, other)
    assert bits(arrays_of(other)) == bits(arrays_of(net))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite(safetensors, tmp_path, value):
    path = tmp_path / "net.safetensors"
    net = random_net()
    net.head.bias[0] = value
    export_safetensors(path, net)
    assert refused(path, random_net(1)).startswith("head.bias holds 1 values that are NaN or infinite")


def test_a_write_that_fails_leaves_the_old_file(safetensors, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"old")

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"net\.safetensors: cannot be written \(No space left on device\)"):
        export_safetensors(path, random_net())
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("net.safetensors", b"old")]


def test_import_on_a_device(safetensors, tmp_path, device):
    path = tmp_path / "net.safetensors"
    net = random_net(1)
    export_safetensors(path, map_arrays(net, device.put))
    other = map_arrays(random_net(2), device.put)
    import_safetensors(path, other)
    assert bits({name: device.get(array) for name, array in arrays_of(other).items()}) == bits(arrays_of(net))
