"""minunet computes what PyTorch computes, where it is installed: random problems, and weights carried over.

``python -m tests.parity.report --examples 1000`` prints the worst errors.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from minunet import UNet  # noqa: E402
from minunet.network.bridge import export_safetensors, from_torch_names, import_safetensors, to_torch_names  # noqa: E402
from minunet.ops import conv_transpose2d_forward  # noqa: E402
from tests.parity import problems, torch_reference  # noqa: E402
from tests.parity.problems import TOLERANCE, errors, load_fixtures, solve  # noqa: E402
from tests.parity.report import DRAWN, main  # noqa: E402


@pytest.mark.parametrize("what", DRAWN)
@given(data=st.data())
def test_minunet_is_pytorch(what, data):
    strategy, tolerance = DRAWN[what]
    problem = data.draw(strategy)
    found = errors(solve(problem), torch_reference.solve(problem))
    assert max(found.values()) <= tolerance, found


@pytest.mark.parametrize("name", load_fixtures()[0])
def test_the_frozen_answers_are_pytorchs(name):
    problem, answers = load_fixtures()[0][name]
    for dtype, answer in answers.items():
        found = errors(torch_reference.solve(problem.cast(dtype)), answer)
        assert max(found.values()) <= TOLERANCE[dtype], found


@given(config=problems.configs(), seed=st.integers(0, 99))
def test_the_bridge_names_every_array_of_the_module_and_no_other(config, seed):
    weights = problems.random_weights(config, np.random.default_rng(seed))
    state = to_torch_names(weights)
    module = torch_reference.TorchUNet(**config, momentum=0.9).double()
    theirs = module.state_dict()
    assert {name: array.shape for name, array in state.items()} == {n: tuple(t.shape) for n, t in theirs.items()}
    module.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=True)
    back = from_torch_names({name: tensor.numpy() for name, tensor in module.cpu().state_dict().items()})
    assert back.keys() == weights.keys()
    assert all(back[name].tobytes() == np.ascontiguousarray(weights[name]).tobytes() for name in weights)


def test_pytorchs_usual_transposed_convolution_is_shifted_by_one():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((1, 4, 5, 3)), rng.standard_normal((3, 3, 3, 2))
    same, _ = conv_transpose2d_forward(x, weight, None)
    arguments = torch_reference.to_nchw(torch.tensor(x)), torch.tensor(weight.transpose(2, 3, 0, 1).copy())
    usual = torch.nn.functional.conv_transpose2d(*arguments, stride=2, padding=1, output_padding=1)
    usual = torch_reference.to_nhwc(usual).numpy()
    assert usual.shape == same.shape
    assert errors({"y": usual[:, :-1, :-1]}, {"y": same[:, 1:, 1:]})["y"] <= 1e-15
    assert errors({"y": usual}, {"y": same})["y"] > 0.1
    full = torch.nn.functional.conv_transpose2d(*arguments, stride=2, padding=0)[:, :, :-1, :-1]
    assert errors({"y": torch_reference.to_nhwc(full).numpy()}, {"y": same})["y"] <= 1e-15


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_go_to_pytorch_and_back_by_file(tmp_path, dtype):
    safetensors = pytest.importorskip("safetensors.torch")
    config = {"in_channels": 3, "out_channels": 1, "widths": [3, 4, 5], "dropout": 0.3, "up_kernel": 3}
    config |= {"head_kernel": 3, "conv_bias": True}
    problem = problems.unet_problem(config, (1, 8, 12), seed=7).cast(dtype)
    net = problems.build(problem)
    export_safetensors(tmp_path / "net.safetensors", net)

    module = torch_reference.TorchUNet(**config, momentum=0.99).to(getattr(torch, dtype)).eval()
    module.load_state_dict(safetensors.load_file(tmp_path / "net.safetensors"), strict=True)
    logits, _ = net.forward(problem.arrays["x"], training=False)
    with torch.no_grad():
        theirs = torch_reference.to_nhwc(module(torch_reference.to_nchw(torch.tensor(problem.arrays["x"])))).numpy()
    assert errors({"y": logits}, {"y": theirs})["y"] <= TOLERANCE[dtype]

    safetensors.save_file(module.state_dict(), tmp_path / "module.safetensors")
    other = UNet(**config, seed=1, dtype=dtype)
    import_safetensors(tmp_path / "module.safetensors", other)
    ours, back = net.parameters() | net.buffers(), other.parameters() | other.buffers()
    assert all(back[name].tobytes() == ours[name].tobytes() for name in ours)


def test_the_report_has_a_row_for_each_kind(capsys):
    assert main(["--examples", "2"]) == 0
    live = capsys.readouterr().out.partition("drawn at random")[2]
    assert all(f"| {what} | float64 | " in live for what in DRAWN)
