"""What the package never does, read off its source; and that the workflow runs pinned actions with read-only rights."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("minunet", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
BANNED_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "torch"}
BANNED_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "np.load",
    "numpy.load",
    "cupy.load",
    "xp.load",
    "tempfile.mktemp",
}


def faults(source: str, name: str) -> list[str]:
    """What in ``source`` is banned, one phrase each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            found += [f"{where}: imports {a.name}" for a in node.names if a.name.partition(".")[0] in BANNED_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in BANNED_MODULES:
            found.append(f"{where}: imports {node.module}")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in BANNED_CALLS:
                found.append(f"{where}: calls {called}")
            if arguments.get("shell", "False") != "False":
                found.append(f"{where}: starts a shell")
            if arguments.get("allow_pickle", "False") != "False":
                found.append(f"{where}: allows pickle")
            if called.endswith("Image.open") and "formats" not in arguments:
                found.append(f"{where}: Image.open takes any format")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_dangerous_is_called(path):
    allowed: tuple[str, ...] = ()
    if "benchmarks" in path.parts:  # may measure torch as a peer
        allowed = ("imports torch",)
    if path == ROOT / "minunet" / "exercises" / "learner.py":  # runs the file that its user has written and names
        allowed = ("calls exec", "calls compile")
    found = faults(path.read_text(encoding="utf-8"), path.name)
    assert [fault for fault in found if not any(phrase in fault for phrase in allowed)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import nn",
        "import joblib.numpy_pickle",
        "eval('1')",
        "exec(code)",
        "import os\nos.system('ls')",
        "np.load('weights.npz')",
        "subprocess.run('ls', shell=True)",
        "read(path, allow_pickle=True)",
        "Image.open(path)",
    ],
)
def test_the_check_finds_what_it_looks_for(source):
    assert faults(source, "planted") != []


def test_the_workflow_pins_its_actions_and_may_only_read():
    (path,) = (ROOT / ".github" / "workflows").glob("*.yml")
    text = path.read_text(encoding="utf-8")
    uses = re.findall(r"uses:\s*(\S+)", text)
    assert uses
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in uses)
    assert re.search(r"^permissions:\n  contents: read\n", text, re.MULTILINE)
    assert text.count("permissions:") == 1


def test_the_locked_requirements_have_hashes_only():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    pins = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert len(pins) > 5
    for pin in pins:
        assert re.match(r"[a-z0-9-]+(\[[\w,-]+\])?==\S+\s", pin), pin
        assert "--hash=sha256:" in pin, pin


def test_an_older_python_is_what_pip_complains_of():
    """What has no release for it must not be asked for there: older versions of pip would name that instead."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11"
    (pillow,) = (Requirement(text) for text in project["dependencies"] if text.startswith("pillow"))
    assert not pillow.marker.evaluate({"python_version": "3.10"})
    assert pillow.marker.evaluate({"python_version": "3.11"})
