"""``import minunet`` needs NumPy alone: what is heavy is loaded by what uses it. And no import points upward."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import minunet

PACKAGE = Path(minunet.__file__).parent
HEAVY = ["scipy", "matplotlib", "PIL", "tqdm", "cupy", "hypothesis", "pytest"]


def loaded_after(statement):
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert result.stderr == ""
    return {name.partition(".")[0] for name in json.loads(result.stdout)}


@pytest.mark.parametrize(
    "statement",
    [
        "import minunet",
        "import minunet.ops, minunet.losses, minunet.unet, minunet.optim, minunet.metrics, minunet.gradcheck",
    ],
)
def test_import_loads_numpy_alone(statement):
    loaded = loaded_after(statement)
    assert {"minunet", "numpy"} <= loaded
    assert loaded.isdisjoint(HEAVY)


#: What may import what: a module only those in rows above its own.
FLOORS = [
    ["errors"],
    ["backend", "rng"],
    ["ops"],
    ["losses", "initializers"],
    ["layers"],
    ["blocks"],
    ["unet"],
    ["optim", "gradcheck"],
]


def imported_parts(path):
    """The parts of minunet, such as "ops" of minunet.ops.relu, that a file imports anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            parts |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            module = str(node.module)
            parts |= {f"minunet.{alias.name}" for alias in node.names} if module == "minunet" else {module}
    return {part.split(".")[1] for part in parts if part.startswith("minunet.")}


@pytest.mark.parametrize("part", [part for floor in FLOORS for part in floor])
def test_no_import_points_upward(part):
    folder = PACKAGE / part
    paths = sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]
    assert paths
    height = next(i for i, floor in enumerate(FLOORS) if part in floor)
    below = {name for floor in FLOORS[:height] for name in floor} | ({part} if folder.is_dir() else set())
    for path in paths:
        assert imported_parts(path) <= below, path.name


def test_only_backend_knows_cupy():
    naming = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            named += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            named += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            if any(name.split(".")[0] in ("cupy", "cupyx") and " " not in name for name in named):
                naming.add(path.relative_to(PACKAGE).as_posix())
    assert {name for name in naming if not name.startswith("engines/")} == {"backend.py"}
