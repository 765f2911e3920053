"""What each part of benchmarks/gpu.py measures. Runs in a process of its own; results are written as they come."""

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gpu_model, gpu_sizes
from benchmarks.gpu_machine import Machine, failing, ratio, take_turns
from benchmarks.gpu_sizes import conv_shapes
from minunet import engines
from minunet.base.backend import Array, to_numpy
from minunet.base.durable import json_text, write_text
from minunet.base.rng import Key
from minunet.engines.cuda import choice
from minunet.engines.cuda.row3 import Row3Kernels
from minunet.engines.cuda.specification import SpecificationKernels, Weight
from minunet.network.layers import map_arrays
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.summary import summary
from minunet.training import loop
from minunet.training.optim import AdamW
from minunet.training.step import loss_and_grads, train_step

ROOT = Path(__file__).resolve().parents[1]
LOSS = SegmentationLoss()
#: Largest distance of all gradients, as one vector, from float64's, over its length. Where a value lies within
#: rounding of 0 its ReLU may flip, which is why it is not rounding alone.
BOUNDS = {"float32": 2e-3, "tf32": 3e-2, "bf16": 2.5e-1}


def run(part: str, options: argparse.Namespace, folder: Path) -> None:
    """Measure, and write what was found to ``folder``/PART.part after each measurement."""
    found: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        found[name] = value
        write_text(folder / f"{part}.part", json_text(found))

    # CuPy looks at this once, before its first product: then tf32 is tf32 where the matrix products are CuPy's.
    os.environ["CUPY_TF32"] = "1" if "tf32" in options.precision else "0"
    machine = Machine(options.dry_run)
    note("machine", machine.describe())
    PARTS[part](machine, options, note)


# --- Correctness ----------------------------------------------------------------------------------------------------

TESTS = (
    "tests/test_devices.py",
    "tests/engines/cuda/test_engine.py",
    "tests/base/test_backend.py",
    "tests/engines/cuda",
)


def correctness(machine: Machine, options: argparse.Namespace, note: Callable[[str, Any], None]) -> None:
    widths, size = ((2, 4), 8) if options.dry_run else ((16, 32, 64), 64)
    for precision in ("float32",) if options.dry_run else ("float32", "tf32", "bf16"):
        note(f"engine, {precision}", failing(partial(against_float64, machine, precision, widths, size)))
    if options.dry_run:
        return
    existing = [name for name in TESTS if (ROOT / name).exists()]
    side_by_side = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        *side_by_side,
        *existing,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CUPY_TF32": "0"})
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    note("tests", {"passed": done.returncode == 0, "summary": lines[-1], "failed": failed[:20]})


def against_float64(machine: Machine, precision: str, widths: tuple[int, ...], size: int) -> dict[str, Any]:
    """Gradients of a step against float64 on the CPU; and three steps of training, twice, bit for bit."""
    host = UNet(widths=widths, dropout=0.3, seed=1)
    draw = np.random.default_rng(0)
    x = draw.standard_normal((4, size, size, 3), dtype=np.float32)
    target = (draw.random((4, size, size, 1)) < 0.2).astype(np.float32)
    exact = map_arrays(host, lambda array: array.astype("float64"))
    value, grads, _ = loss_and_grads(exact, x.astype("float64"), target.astype("float64"), LOSS, Key(0))
    probabilities = exact.predict(x.astype("float64"))

    weights = []
    for _ in range(2):
        net = map_arrays(host, lambda array: machine.put(array.copy()))
        with engines.build(net, LOSS, 4, (size, size), "cuda", precision=precision) as engine:
            found, ours, _ = engine.loss_and_grads(machine.put(x), machine.put(target), Key(0))
            ours = {name: to_numpy(array).copy() for name, array in ours.items()}
            distance = float(np.abs(to_numpy(engine.predict(machine.put(x))) - probabilities).max())
            optimizer = engine.optimizer(net.parameters(), 1e-3)
            for step in range(3):
                train_step(
                    net,
                    optimizer,
                    machine.put(x),
                    machine.put(target),
                    LOSS,
                    Key(0, step=step),
                    lr=1e-3,
                    clip_norm=1.0,
                    engine=engine,
                )
            weights.append({name: to_numpy(array).tobytes() for name, array in net.parameters().items()})
            name = engine.name + (f" ({engine.reason})" if engine.reason else "")
    error = norm({n: ours[n] - grads[n] for n in grads}) / norm(grads)
    return {
        "engine": name,
        "gradients": error,
        "loss": abs(found - value) / abs(value),
        "probabilities": distance,
        "bound": BOUNDS[precision],
        "same bits twice": weights[0] == weights[1],
        "passed": error <= BOUNDS[precision] and weights[0] == weights[1],
    }


def norm(arrays: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in arrays.values()))


# --- Ceilings -------------------------------------------------------------------------------------------------------


def ceilings(machine: Machine, options: argparse.Namespace, note: Callable[[str, Any], None]) -> None:
    count, side = (2**10, 16) if options.dry_run else (2**29, 8192)
    seconds = take_turns(machine, {"copy": copying(machine, count)}, options.rounds, 3)["copy"]
    note("copy, TB/s", 2 * 4 * count / statistics.median(seconds) / 1e12)
    machine.free()

    draw = np.random.default_rng(0)
    a, b = (draw.standard_normal((side, side), dtype=np.float32) for _ in range(2))
    products: dict[str, Callable[[], Any]] = {}
    ours = machine.put(a), machine.put(b)
    products[f"CuPy float32, CUPY_TF32={os.environ['CUPY_TF32']}"] = partial(operator.matmul, *ours)
    if machine.torch is not None:
        theirs = [machine.torch.from_numpy(part).to(machine.torch_device) for part in (a, b)]
        halves = [part.to(machine.torch.bfloat16) for part in theirs]
        products["PyTorch TF32"] = lambda: theirs[0] @ theirs[1]
        products["PyTorch bf16"] = lambda: halves[0] @ halves[1]
    for name, times in take_turns(machine, products, options.rounds, 3).items():
        note(f"{name}, TFLOP/s", 2 * side**3 / statistics.median(times) / 1e12)


def copying(machine: Machine, count: int) -> Callable[[], None]:
    source = machine.put(np.random.default_rng(0).random(count, dtype=np.float32))
    goal = machine.xp.empty(count, dtype="float32")

    def copy() -> None:
        goal[...] = source

    return copy


# --- Layers ---------------------------------------------------------------------------------------------------------


def layers(machine: Machine, options: argparse.Namespace, note: Callable[[str, Any], None]) -> None:
    n = options.batch[0]
    note("batch", n)
    for precision in options.precision:
        for name, size, in_channels, out_channels in conv_shapes(options.width, options.size):
            label = f"{precision}, {name}, {size} x {size}, {in_channels} to {out_channels}"
            shape = (n, size, in_channels, out_channels)
            note(label, failing(partial(conv_layer, machine, options, precision, *shape)))
            machine.free()


def conv_layer(
    machine: Machine,
    options: argparse.Namespace,
    precision: str,
    n: int,
    size: int,
    in_channels: int,
    out_channels: int,
) -> dict[str, Any]:
    """Forward, grad-input and grad-weight of one convolution: TFLOP/s of minunet's, and ratios to PyTorch's."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((n, size, size, in_channels), dtype=np.float32)
    dy = draw.standard_normal((n, size, size, out_channels), dtype=np.float32)
    weight = draw.standard_normal((3, 3, in_channels, out_channels), dtype=np.float32) / 100
    passes: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "grad-input": {}, "grad-weight": {}}
    for kernels in kernels_for(machine, precision):
        add_ours(passes, machine, kernels, x, dy, weight)
    if machine.torch is not None:
        add_theirs(passes, machine, precision, x, dy, weight)
    flop = 2 * 9 * n * size * size * in_channels * out_channels
    result: dict[str, Any] = {}
    for name, peers in passes.items():
        seconds = take_turns(machine, peers, options.rounds, 1 if options.dry_run else 5)
        entry: dict[str, Any] = {peer: flop / statistics.median(times) / 1e12 for peer, times in seconds.items()}
        ours = next(iter(seconds))
        if "PyTorch" in seconds:
            entry["ratio"] = ratio(seconds[ours], seconds["PyTorch"])
        result[name] = entry
    return result


def kernels_for(machine: Machine, precision: str) -> list[SpecificationKernels]:
    """What minunet has for a precision, the engine's choice first."""
    chosen = choice.make(machine.xp, precision, choice.choose(precision))
    slower = chosen.name != "row3" and precision == "float32"
    return [chosen, Row3Kernels(machine.xp, precision)] if slower else [chosen]


def add_ours(
    passes: dict[str, dict[str, Callable[[], Any]]],
    machine: Machine,
    kernels: SpecificationKernels,
    x: np.ndarray,
    dy: np.ndarray,
    weight: np.ndarray,
) -> None:
    def activation(array: np.ndarray) -> Array:
        stored = machine.xp.empty(array.shape, dtype=kernels.dtype)
        kernels.store(stored, machine.put(array))
        return stored

    images, gradient, w = activation(x), activation(dy), machine.put(weight)
    y, dx, dw = machine.xp.empty_like(gradient), machine.xp.empty_like(images), machine.xp.empty_like(w)
    mean, var = (machine.xp.empty(weight.shape[3], dtype="float32") for _ in range(2))
    kernels.prepare_weights([Weight(w, transposed=False)])
    passes["forward"][kernels.name] = lambda: kernels.conv3x3(images, w, y, mean, var)
    passes["grad-input"][kernels.name] = lambda: kernels.conv3x3_grad_input(gradient, w, dx)
    passes["grad-weight"][kernels.name] = lambda: kernels.conv3x3_grad_weight(images, gradient, dw)


def add_theirs(
    passes: dict[str, dict[str, Callable[[], Any]]],
    machine: Machine,
    precision: str,
    x: np.ndarray,
    dy: np.ndarray,
    weight: np.ndarray,
) -> None:
    """PyTorch's convolution, channels last, and its backward, one gradient at a time."""
    torch = machine.torch
    images, gradient = machine.tensor(x, channels_last=True), machine.tensor(dy, channels_last=True)
    kernel = torch.from_numpy(np.ascontiguousarray(weight.transpose(3, 2, 0, 1))).to(machine.torch_device)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    if precision == "bf16":
        images, gradient, kernel = (part.to(torch.bfloat16) for part in (images, gradient, kernel))

    def backward(mask: list[bool]) -> Callable[[], Any]:
        return lambda: torch.ops.aten.convolution_backward(
            gradient, images, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
        )

    passes["forward"]["PyTorch"] = lambda: torch.nn.functional.conv2d(images, kernel, padding=1)
    passes["grad-input"]["PyTorch"] = backward([True, False, False])
    passes["grad-weight"]["PyTorch"] = backward([False, True, False])


# --- Steps ----------------------------------------------------------------------------------------------------------


def step(machine: Machine, options: argparse.Namespace, note: Callable[[str, Any], None]) -> None:
    if machine.no_torch:
        note("PyTorch", machine.no_torch)
    widths = tuple(options.width << level for level in range(5))
    size = summary(UNet(widths=widths), options.size, options.size)
    note("GFLOP an image, forward", size.flops / 1e9)
    # The compiled module last: compiling takes longest, and what was measured before is kept.
    for compiled in (False, True):
        if compiled and (options.no_compile or options.dry_run or machine.torch is None):
            break
        for precision, batch in itertools.product(options.precision, options.batch):
            label = f"{precision}, batch {batch}" + (", compiled" if compiled else "")
            note(label, failing(partial(one_case, machine, options, widths, precision, batch, compiled)))
            machine.free()


def one_case(
    machine: Machine, options: argparse.Namespace, widths: tuple[int, ...], precision: str, batch: int, compiled: bool
) -> dict[str, Any]:
    """Milliseconds a step, images a second, ratios, and peak memory, of minunet and of PyTorch."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((batch, options.size, options.size, 3), dtype=np.float32)
    target = (draw.random((batch, options.size, options.size, 1)) < 0.1).astype(np.float32)
    memory: dict[str, float] = {}
    peers: dict[str, Callable[[], Any]] = {}
    with contextlib.ExitStack() as scope:
        name, call = our_step(machine, scope, widths, precision, x, target)
        memory[name] = our_peak(machine, call)
        peers[name] = call
        if machine.torch is not None:
            for layout in ("channels last",) if compiled else ("channels last", "contiguous"):
                label = f"PyTorch, {layout}" + (", compiled" if compiled else "")
                before = machine.torch_bytes(peak=False)
                call = their_step(machine, widths, precision, x, target, layout == "channels last", compiled)
                call()
                call()
                memory[label] = (machine.torch_bytes(peak=True) - before) / 1e9
                peers[label] = call
        seconds = take_turns(machine, peers, options.rounds, 1 if options.dry_run else 3)
    entry: dict[str, Any] = {}
    for peer, times in seconds.items():
        typical = statistics.median(times)
        entry[peer] = {"ms": 1e3 * typical, "images/s": batch / typical, "GB": memory[peer]}
        if peer != name:
            entry[peer]["ratio"] = ratio(seconds[name], times)
            entry[peer]["memory ratio"] = memory[name] / memory[peer] if memory[peer] else 0.0
    return entry


def our_step(
    machine: Machine,
    scope: contextlib.ExitStack,
    widths: tuple[int, ...],
    precision: str,
    x: np.ndarray,
    target: np.ndarray,
) -> tuple[str, Callable[[], Any]]:
    net = map_arrays(UNet(widths=widths, dropout=0.3, seed=0), machine.put)
    engine = scope.enter_context(
        engines.build(net, LOSS, len(x), (x.shape[1], x.shape[2]), "cuda", precision=precision)
    )
    optimizer = engine.optimizer(net.parameters(), 1e-4)
    images, masks, steps = machine.put(x), machine.put(target), itertools.count()

    def call() -> None:
        key = Key(0, step=next(steps))
        train_step(net, optimizer, images, masks, LOSS, key, lr=1e-4, engine=engine)

    return f"minunet, {engine.name}", call


def our_peak(machine: Machine, call: Callable[[], Any]) -> float:
    """GB that CuPy's pool holds after two steps: it gives nothing back, so that is the peak."""
    call()
    call()
    machine.synchronize()
    return 0.0 if machine.dry_run else machine.xp.get_default_memory_pool().total_bytes() / 1e9


def their_step(
    machine: Machine,
    widths: tuple[int, ...],
    precision: str,
    x: np.ndarray,
    target: np.ndarray,
    channels_last: bool,
    compiled: bool,
) -> Callable[[], Any]:
    torch = machine.torch
    from benchmarks.torch_unet import TorchUNet

    layout = torch.channels_last if channels_last else torch.contiguous_format
    module: Any = TorchUNet(list(widths), 0.3).to(machine.torch_device).to(memory_format=layout)
    parameters = list(module.parameters())
    if compiled:
        module = torch.compile(module)
    defaults = AdamW({})
    optimizer = torch.optim.AdamW(
        parameters, 1e-4, defaults.betas, defaults.eps, defaults.weight_decay, fused=not machine.dry_run
    )
    images, masks = machine.tensor(x, channels_last), machine.tensor(target, channels_last)

    def call() -> None:
        optimizer.zero_grad()
        with machine.autocast(precision):
            logits = module(images).float()
            probabilities = torch.sigmoid(logits)
            overlap = (probabilities * masks).sum()
            dice = (2 * overlap + 1) / (probabilities.sum() + masks.sum() + 1)
            loss = 1 - dice + torch.nn.functional.binary_cross_entropy_with_logits(logits, masks)
        loss.backward()
        optimizer.step()
        loss.item()  # as minunet's step does: who trains looks at the loss

    return call


# --- Where a step's time goes ---------------------------------------------------------------------------------------


class Stopwatch:
    """Kernels that note, of each call, its name, its arrays, and an event of the GPU before and after it."""

    def __init__(self, machine: Machine, kernels: SpecificationKernels) -> None:
        self.machine, self.kernels = machine, kernels
        self.calls: list[tuple[str, list[Array], Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.kernels, name)
        if name in ("load", "table") or name not in vars(SpecificationKernels) or not callable(method):
            return method

        def timed(*arguments: Any, **named: Any) -> Any:
            before = self.moment()
            result = method(*arguments, **named)
            arrays = [single for single in gpu_model.singles(arguments) if hasattr(single, "nbytes")]
            self.calls.append((name, arrays, before, self.moment()))
            return result

        return timed

    def moment(self) -> Any:
        if self.machine.dry_run:
            return time.perf_counter()
        event = self.machine.xp.cuda.Event()
        event.record()
        return event

    def milliseconds(self) -> list[float]:
        """Of each call since the last time. All have to be over."""
        calls, self.calls = self.calls, []
        if self.machine.dry_run:
            return [1e3 * (after - before) for _, _, before, after in calls]
        return [self.machine.xp.cuda.get_elapsed_time(before, after) for _, _, before, after in calls]


def profile(machine: Machine, options: argparse.Namespace, note: Callable[[str, Any], None]) -> None:
    """The time of each kind of call in a training step, beside the least that its arithmetic and its bytes take."""
    batch = options.batch[0]
    note("batch", batch)
    ceilings_found = ceilings_of(options)
    note("ceilings", ceilings_found)
    for precision in options.precision:
        note(precision, failing(partial(profile_step, machine, options, precision, batch, ceilings_found)))
        machine.free()


def ceilings_of(options: argparse.Namespace) -> dict[str, float]:
    """TB/s and TFLOP/s: what the part ceilings has found, or else what an H100 is said to have."""
    path = Path(options.output) / "ceilings.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return {
        "copy": found.get("copy, TB/s", 3.0),
        "tf32": found.get("PyTorch TF32, TFLOP/s", 400.0),
        "bf16": found.get("PyTorch bf16, TFLOP/s", 800.0),
    }


def profile_step(
    machine: Machine, options: argparse.Namespace, precision: str, batch: int, ceiling: dict[str, float]
) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    x = machine.put(draw.standard_normal((batch, options.size, options.size, 3), dtype=np.float32))
    target = machine.put((draw.random((batch, options.size, options.size, 1)) < 0.1).astype(np.float32))
    net = map_arrays(UNet(widths=tuple(options.width << level for level in range(5)), dropout=0.3), machine.put)
    with engines.build(net, LOSS, batch, (options.size, options.size), "cuda", precision=precision) as engine:
        watch = Stopwatch(machine, engine.kernels)  # type: ignore[attr-defined]
        engine.kernels = watch  # type: ignore[attr-defined]
        optimizer = engine.optimizer(net.parameters(), 1e-4)
        walls, rounds = [], []
        for step in range(options.rounds + 2):
            names = []
            machine.synchronize()
            started = time.perf_counter()
            train_step(net, optimizer, x, target, LOSS, Key(0, step=step), lr=1e-4, engine=engine)
            machine.synchronize()
            walls.append(1e3 * (time.perf_counter() - started))
            names = [(name, arrays) for name, arrays, _, _ in watch.calls]
            rounds.append(watch.milliseconds())
    typical = [statistics.median(times) for times in zip(*rounds[2:], strict=True)]
    kinds: dict[str, dict[str, float]] = {}
    for (name, arrays), ms in zip(names, typical, strict=True):
        side = max((array.shape[1] for array in arrays if array.ndim == 4), default=0)
        for kind in (name, f"{name}, {side} pixels"):
            entry = kinds.setdefault(kind, {"calls": 0, "ms": 0.0, "floor": 0.0})
            entry["calls"] += 1
            entry["ms"] += ms
            entry["floor"] += 1e3 * gpu_model.floor(name, arrays, ceiling.get(precision, 50.0), ceiling["copy"])
    return {"step, ms": statistics.median(walls[2:]), "calls, ms": sum(typical), "kinds": kinds}


# --- A training -----------------------------------------------------------------------------------------------------


def reference(machine: Machine, options: argparse.Namespace, note: Callable[[str, Any], None]) -> None:
    """A run of examples/train_lgg.py in this process, its steps timed."""
    import runpy

    spent = {"steps": 0.0, "images": 0, "epochs": 0.0}
    one_step, one_epoch = loop.train_step, loop._Run.train_epoch

    def timed_step(net: UNet, optimizer: AdamW, x: Array, *rest: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = one_step(net, optimizer, x, *rest, **named)  # it reads the loss, so that the device is done
        spent["steps"] += time.perf_counter() - started
        spent["images"] += len(x)
        return result

    def timed_epoch(*positional: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = one_epoch(*positional, **named)
        spent["epochs"] += time.perf_counter() - started
        return result

    loop.train_step, loop._Run.train_epoch = timed_step, timed_epoch  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "run"
        preset = "quick" if options.dry_run else options.preset
        arguments = ["--preset", preset, "--epochs", str(options.epochs), "--output", str(output), "--quiet"]
        if options.data:
            arguments += ["--data", options.data]
        if options.dry_run:
            arguments += ["--image-size", "16", "--device", "cpu", "--engine", "plain"]
        else:
            arguments += ["--device", "cuda", "--precision", options.precision[0]]
        note("command", f"train_lgg.py {' '.join(arguments)}".replace(str(output), "DIR"))
        started = time.perf_counter()
        train_lgg = runpy.run_path(str(ROOT / "examples" / "train_lgg.py"))
        train_lgg["main"](arguments)
        note("seconds in all", time.perf_counter() - started)
        note("images/s in the steps", spent["images"] / spent["steps"])
        note("images/s in the epochs", spent["images"] / spent["epochs"])
        note("share of the steps in the epochs", spent["steps"] / spent["epochs"])
        note("history", (output / "history.csv").read_text().splitlines())
        metrics = json.loads((output / "metrics.json").read_text())
        note("test", metrics["test"]["per_patient"]["summary"]["dice"])
        note("gpu memory, GB", metrics.get("gpu_memory_bytes", 0) / 1e9)


PARTS: dict[str, Callable[[Machine, argparse.Namespace, Callable[[str, Any], None]], None]] = {
    "correctness": correctness,
    "sizes": gpu_sizes.sizes,
    "ceilings": ceilings,
    "layers": layers,
    "step": step,
    "profile": profile,
    "reference": reference,
}
