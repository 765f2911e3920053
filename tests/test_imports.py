"""The house has floors: no import points upward, none goes round in a circle, and NumPy alone is needed at first."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import minunet

PACKAGE = Path(minunet.__file__).parent
HEAVY = ["scipy", "matplotlib", "PIL", "tqdm", "cupy", "hypothesis", "pytest"]

#: Every folder of the package and the files in it, bottom to top: a file imports only what stands before it here.
#: minunet's own ``__init__`` is above all, and no file imports it.
FLOORS = [
    (
        "base",
        "version errors choices rng backend durable archive environment control_groups signals run_folder cli __init__",
    ),
    ("ops", "checks relu sigmoid softmax conv2d conv_transpose2d max_pool2d concat dropout batch_norm2d"),
    ("ops", "dice_loss bce_with_logits softmax_cross_entropy __init__"),
    ("network", "initializers layers blocks unet loss own_code bridge __init__"),
    ("", "gradcheck summary"),
    ("data", "slices images reader normalize phantom splits manifest verify augment batches __init__"),
    ("training", "metrics optim divergence step config presets checkpoint tiles evaluation loop __init__"),
    ("engines", "memory selfcheck"),
    ("engines.cpu", "winograd member team buffers chunks rows tiles taps adamw plan norm bands work"),
    ("engines.cpu", "convolution channels resample filters head loss preparation program engine choice __init__"),
    ("engines.cuda", "specification programs device kernels row3 optimizer engine trial choice __init__"),
    ("engines", "__init__"),
    ("results", "overlays plots prediction report __init__"),
    ("exercises", "exercise learner backward starters relu max_pool2d conv2d_dweight conv2d_dx batch_norm2d skip"),
    ("exercises", "dice_loss adamw shifted astray deaf smeared negative company timid stubborn __init__ __main__"),
    ("commands", "training_options train predict evaluate __init__"),
    ("", "__main__"),
]


def loaded_after(statement):
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert result.stderr == ""
    return {name.partition(".")[0] for name in json.loads(result.stdout)}


@pytest.mark.parametrize(
    "statement",
    ["import minunet", "import minunet.ops, minunet.network.unet, minunet.training.loop, minunet.gradcheck"],
)
def test_import_loads_numpy_alone(statement):
    loaded = loaded_after(statement)
    assert {"minunet", "numpy"} <= loaded
    assert loaded.isdisjoint(HEAVY)


# --- No import points upward ----------------------------------------------------------------------------------------


def heights():
    """``{module: height}``, such as "training.step", from 0 at the bottom; an ``__init__`` has its folder's name."""
    order = [
        f"{folder}.{name}".strip(".").removesuffix(".__init__") for folder, files in FLOORS for name in files.split()
    ]
    return {module: height for height, module in enumerate(order)}


def module_of(path, package=PACKAGE):
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def modules(package=PACKAGE):
    """``{module: its file}``: all files of the package; minunet's own ``__init__`` is ""."""
    return {module_of(path, package): path for path in package.rglob("*.py")}


def imported(path, known):
    """The modules of minunet that a file imports anywhere in it, also inside a function or by a name in a string."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            names = {name if name.removeprefix("minunet.") in known else str(node.module) for name in names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            (argument,) = node.args
            names = {ast.unparse(argument).lstrip("f").strip("'\"").partition("{")[0].rstrip(".")}
        else:
            continue
        found |= {name.removeprefix("minunet").lstrip(".") for name in names if name.split(".")[0] == "minunet"}
    return found


def wrong_imports(package=PACKAGE):
    """A line for each import that points upward, and for each file without a place or place without a file."""
    height, files = heights(), modules(package)
    places = {name for name in files if not name.startswith("exercises.starters.")} - {""}
    found = [f"{name}: has no place in FLOORS" for name in sorted(places - height.keys())]
    found += [f"{name}: is no file" for name in sorted(height.keys() - places)]
    for module in sorted(places & height.keys()):
        for other in sorted(imported(files[module], files) - {module}):
            if other.startswith("exercises.starters."):
                other = "exercises.starters"
            if other == "":
                found.append(f"{module}: imports minunet itself, which is above all")
            elif height.get(other, -1) >= height[module]:
                found.append(f"{module}: imports {other}, which is above it")
    return found


def test_no_import_points_upward():
    assert wrong_imports() == []


def test_there_is_no_circle():
    files = modules()
    graph = {name: imported(path, files) - {name} for name, path in files.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert len(graph) > 100


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (
            "ops/relu.py",
            "from minunet.network.layers import Layer",
            "ops.relu: imports network.layers, which is above it",
        ),
        ("ops/relu.py", "from minunet.ops import sigmoid", "ops.relu: imports ops.sigmoid, which is above it"),
        (
            "training/step.py",
            "def f():\n    from minunet import engines",
            "training.step: imports engines, which is above it",
        ),
        (
            "engines/cuda/engine.py",
            "importlib.import_module('minunet.engines.cuda.trial')",
            "engines.cuda.engine: imports engines.cuda.trial, which is above it",
        ),
        ("data/new.py", "", "data.new: has no place in FLOORS"),
    ],
)
def test_what_points_upward_is_found(tmp_path, file, line, message):
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    with (tmp_path / file).open("a") as changed:
        changed.write(f"\n{line}\n")
    assert wrong_imports(tmp_path) == [message]


def test_the_folder_shows_its_floors():
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert len(entries) <= 14
    folders = {folder for folder, _ in FLOORS if folder and "." not in folder}
    assert entries == folders | {"gradcheck.py", "summary.py", "__main__.py", "__init__.py", "py.typed"}


# --- CuPy -----------------------------------------------------------------------------------------------------------


CUPY = ("cupy", "cupyx", "cupy_backends")
ITS_OWN = ("cuda", "RawModule", "RawKernel", "ElementwiseKernel", "asnumpy", "get_default_memory_pool", "memGetInfo")


def cupy_names(source):
    """What in a source names CuPy, or is of CuPy alone: ``xp.cuda``, its memory pool, its kernels."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        named += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        named += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        found |= {name for name in named if name.split(".")[0] in CUPY and " " not in name}
        if isinstance(node, ast.Attribute) and node.attr in ITS_OWN:
            found.add(ast.unparse(node))
    return found


def test_only_backend_knows_cupy():
    naming = {name: found for name, path in modules().items() if (found := cupy_names(path.read_text()))}
    assert naming.keys() == {"base.backend"}, naming


@pytest.mark.parametrize(
    "line", ["import cupy", "import_module('cupy.cuda')", "xp.cuda.Device()", "xp.asnumpy(x)", "from cupyx import jit"]
)
def test_a_use_of_cupy_is_found(line):
    assert cupy_names(line)
