"""benchmarks/gpu.py where there is no GPU: its dry run, its report from stub measurements, parts that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_machine, gpu_model, gpu_report, gpu_sizes, gpu_stages
from minunet.base.errors import UserError
from minunet.engines.cuda.programs import FOLDER
from minunet.network.unet import UNet

SCRIPT = Path(gpu.__file__)


def bench(*arguments, cwd):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_a_dry_run_writes_its_report(tmp_path):
    names = ["correctness", "sizes", "ceilings", "layers", "step", "profile"]
    parts = [word for name in names for word in ("--part", name)]
    done = bench("--dry-run", *parts, "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    assert done.stdout.endswith(report + "\n")
    assert "Not complete" not in report
    assert "| passed |" in report
    assert "minunet, cuda, float32, row3" in report
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(found) == names
    assert '"error"' not in json.dumps(found)
    assert {"conv3x3", "conv3x3, 16 pixels", "adamw"} < found["profile"]["float32"]["kinds"].keys()
    assert found["correctness"]["engine, float32"]["gradients"] < 1e-5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [f"{name}.json" for name in names] + ["report.md", "report.json"]
    )


def test_without_a_gpu_each_part_says_so_and_the_report_is_written(tmp_path):
    done = bench("--part", "ceilings", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ceilings: ")]
    assert "--device cuda" in line
    assert "**Not complete:** --device cuda" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--size", "100"], "--size"),
        (["--part", "all"], "--part"),
        (["--precision", "tf32", "--precision", "float32"], "--precision"),
    ],
)
def test_wrong_flags_are_refused(arguments, word):
    with pytest.raises(UserError, match=word):
        gpu.parse(arguments)


def test_parts_and_their_defaults():
    options = gpu.parse([])
    assert options.part == ["correctness", "sizes", "ceilings", "layers", "step", "profile"]
    assert sum(gpu.PARTS[part] for part in options.part) <= 600
    assert (options.batch, options.size, options.precision) == ([16, 32], 224, ["tf32", "bf16"])
    assert gpu.without_parts(["--part", "step", "--part=layers", "--rounds", "3"]) == ["--rounds", "3"]


def test_a_part_that_runs_out_of_time_keeps_what_it_had_found(tmp_path, monkeypatch):
    def hang(command, timeout, **options):
        (tmp_path / "layers.part").write_text('{"batch": 16}')
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    result = gpu.run_part("layers", [], tmp_path, limit=5)
    assert (result["batch"], result["error"]) == (16, "stopped after 5 s")
    assert not list(tmp_path.iterdir())


RESULTS = {
    "correctness": {
        "machine": {"gpu": "a GPU", "torch": "2"},
        "date": "2026-01-02",
        "engine, tf32": {
            "engine": "cuda, tf32, kernels",
            "gradients": 4e-4,
            "loss": 1e-5,
            "probabilities": 1e-3,
            "bound": 3e-2,
            "same bits twice": False,
            "passed": False,
        },
        "engine, bf16": {"error": "RuntimeError: no | such kernel"},
        "tests": {"passed": False, "summary": "1 failed, 9 passed", "failed": ["FAILED tests/test_x.py::test_y"]},
    },
    "sizes": {
        "batch": 16,
        "bf16, up1.up": {"distances": {"forward": 2e-3, "dbias": 1e-7}, "passed": False},
        "tf32, the network's gradients": {"error": "RuntimeError: no"},
    },
    "layers": {
        "batch": 16,
        "tf32, up1.conv1, 224 x 224, 128 to 64": {
            "forward": {"kernels": 201.234, "row3": 150.0, "PyTorch": 190.0, "ratio": [1.06, 1.0, 1.1]},
            "grad-input": {"kernels": 100.0},
            "grad-weight": {"kernels": 50.0},
        },
        "error": "stopped after 100 s",
    },
    "step": {
        "tf32, batch 16": {
            "minunet, cuda, tf32, kernels": {"ms": 20.0, "images/s": 589.0, "GB": 3.4},
            "PyTorch, channels last": {
                "ms": 30.0,
                "images/s": 393.0,
                "GB": 6.8,
                "ratio": [1.5, 1.4, 1.6],
                "memory ratio": 0.5,
            },
        },
        "bf16, batch 32": {"error": "OutOfMemoryError: too much"},
    },
    "profile": {
        "batch": 16,
        "ceilings": {"copy": 4.28},
        "tf32": {
            "step, ms": 41.0,
            "calls, ms": 40.0,
            "kinds": {
                "conv3x3": {"calls": 18, "ms": 8.5, "floor": 2.9},
                "conv3x3, 224 pixels": {"calls": 4, "ms": 2.5, "floor": 0.7},
            },
        },
        "bf16": {"error": "ValueError: no"},
    },
}


def test_the_report_says_what_was_found_and_what_failed():
    report = gpu_report.markdown(RESULTS)
    for words in (
        "| gpu | a GPU |",
        "| engine, tf32 | cuda, tf32, kernels | 4.0e-04 | 3.0e-02 | **no** | **failed** |",
        "| engine, bf16 | RuntimeError: no / such kernel |",
        "Tests: **failed** (1 failed, 9 passed)",
        "- `FAILED tests/test_x.py::test_y`",
        "| bf16, up1.up | forward 2.0e-03, dbias 1.0e-07 | **failed** |",
        "**Not complete:** stopped after 100 s",
        "| kernels 201, row3 150 (1.06) | kernels 100 | kernels 50 |",
        "| 20.0 | 589 (50%) |  | 3.40 |  |",
        "| 30.0 | 393 (33%) | 1.50 (1.40 to 1.60) | 6.80 | 0.50 |",
        "| bf16, batch 32 | OutOfMemoryError: too much |",
        "tf32: a step of 41.00 ms; the kernels take 40.00 ms of it.",
        "| conv3x3 | 18 | 8.50 | 2.90 |",
        "| conv3x3, 224 pixels | 4 | 2.50 | 0.70 |",
        "bf16: ValueError: no",
        "RuntimeError: no",
    ):
        assert words in report
    widths = {line.count("|") for line in report.splitlines() if line.startswith("| tf32, batch 16")}
    assert widths == {8}


def test_a_ratio_is_theirs_over_ours_round_by_round():
    assert gpu_machine.ratio([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == [1.0, 0.5, 2.0]


def test_the_layers_are_those_of_the_network():
    shapes = {name: shape for name, *shape in gpu_sizes.conv_shapes(64, 224)}
    parameters = UNet().parameters()
    for name, (_, in_channels, out_channels) in shapes.items():
        assert parameters[f"{name}.weight"].shape == (3, 3, in_channels, out_channels)
    assert (shapes["down1.conv1"][0], shapes["bottleneck.conv2"][0], shapes["up4.conv1"][0]) == (224, 14, 28)


def test_a_steps_calls_are_counted_with_the_arrays_of_their_groups():
    calls = gpu_model.count(UNet(widths=(2, 4), dropout=0.3), size=8, batch=2, precision="bf16")
    counted = {name: (work, moved) for name, work, moved in calls}
    assert counted["conv3x3_grad_weight"] == (2 * 9 * 3 * 2 * 2 * 64, 2 * 2 * 64 * (3 + 2) + 4 * 9 * 3 * 2)
    of_level, of_channels = 2 * 2 * 64, 4 * 2  # bytes a channel, bytes of a vector
    assert counted["norm_relu_backward"] == (0, 2 * (3 * 2 * of_level + 6 * of_channels))
    assert counted["norm_relu_pool_backward"] == (0, 2 * (3.25 * 2 * of_level + 6 * of_channels))


def test_a_measurement_that_fails_costs_only_itself():
    def fail():
        raise RuntimeError("first line\nsecond")

    assert gpu_machine.failing(fail) == {"error": "RuntimeError: first line"}


def test_what_is_left_out_of_a_kernel_is_there():
    for changes in gpu_stages.STAGES.values():
        for file, old, new in changes:
            assert (FOLDER / file).read_text(encoding="utf-8").count(old) == 1
            assert old != new


def test_stages_without_a_gpu(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, gpu_stages.__file__]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: --device cuda")
