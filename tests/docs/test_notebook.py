"""The notebook is what its script makes of it, and runs from the first cell to the last: as a script, as a notebook."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from docs.notebook.__main__ import NOTEBOOK, SCRIPT, notebook
from tests.implementations import Implementation
from tests.strict_cupy import module as standin

ROOT = Path(__file__).resolve().parents[2]
#: What a run takes seconds with. Of 16 synthetic patients, one is in the test fold.
TINY = {"EPOCHS": 1, "IMAGE_SIZE": 16, "PATIENTS": 16}
PICTURES = ["batch.png", "curves.png", "one_batch.png", "per_patient.png", "predictions.png", "samples.png"]


def tiny(text):
    """``text`` with the tiny settings in the places of its own."""
    for name, value in TINY.items():
        text, count = re.subn(rf"^{name} = \w+", f"{name} = {value}", text, flags=re.MULTILINE)
        assert count == 1, name
    return text


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "main_job.py"
    path.write_text(tiny(SCRIPT.read_text()))
    return path


def assert_done(output, folder):
    """The run has said and left what each of its stages promises."""
    assert re.search(r"to train +11 patients", output)
    first, last = re.search(r"loss: (\S+) at first, (\S+) after 19 steps", output).groups()
    assert float(last) < 0.8 * float(first)
    assert re.search(r"^  Dice  +0\.\d+", output, re.MULTILINE)
    run = folder / "runs" / "notebook"
    assert sorted(path.name for path in run.glob("*.png")) == PICTURES
    assert json.loads((run / "metrics.json").read_text())["checkpoint"] == "best.npz"


def test_the_notebook_is_up_to_date():
    assert NOTEBOOK.read_text() == notebook(SCRIPT.read_text()), "run: python -m docs.notebook"


def test_cells():
    content = json.loads(NOTEBOOK.read_text())
    script = SCRIPT.read_text()
    kinds = [(cell["cell_type"], "parameters" in cell["metadata"].get("tags", [])) for cell in content["cells"]]
    assert len(kinds) == len(re.findall("^# %%", script, re.MULTILINE))
    assert kinds.count(("code", True)) == 1
    code = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    assert ast.dump(ast.parse("\n".join(code))) == ast.dump(ast.parse(script))
    assert not any(cell.get("outputs") for cell in content["cells"])


@pytest.mark.parametrize("script", ["x = 1\n", "# %% [raw]\nx\n"])
def test_what_is_no_script_of_cells_is_refused(script):
    with pytest.raises(ValueError, match="the script must begin with|a cell is marked"):
        notebook(script)


@pytest.mark.parametrize(
    ("source", "folder", "driver", "installed"),
    [
        (None, ROOT / "docs" / "notebook", None, f"minunet @ {ROOT.as_uri()}"),
        (None, ROOT, "| CUDA Version: 12.4 |", f"minunet[cuda12] @ {ROOT.as_uri()}"),
        ("git+https://host/minunet", None, "| CUDA Version: 13.0 |", "minunet[cuda13] @ git+https://host/minunet"),
        ("git+https://host/minunet", None, "no devices", "minunet @ git+https://host/minunet"),
        (None, None, None, None),
    ],
)
def test_it_installs_what_is_missing(source, folder, driver, installed, tmp_path, monkeypatch):
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]]
    (cell,) = (cell for cell in cells if "def install" in cell)
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=driver)

    monkeypatch.chdir(folder or tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    monkeypatch.setattr("shutil.which", lambda program: program if driver else None)
    monkeypatch.setattr("subprocess.run", run)
    if installed is None:
        with pytest.raises(SystemExit, match="run this notebook in a clone of it, or set SOURCE"):
            exec(cell, {"SOURCE": source})
        assert commands == []
    else:
        exec(cell, {"SOURCE": source})
        assert commands[-1] == [sys.executable, "-m", "pip", "install", "--quiet", installed]


def test_it_runs_as_a_script(script):
    command = [sys.executable, "-W", "error", script.name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=script.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_done(done.stdout, script.parent)


def test_it_runs_on_a_device(script, monkeypatch, capsys):
    """On the strict stand-in for CuPy, which refuses to mix host and device arrays: the script picks it by itself."""
    monkeypatch.chdir(script.parent)
    with Implementation("standin", lambda: standin).active():
        runpy.run_path(script.name, run_name="__main__")
    output = capsys.readouterr().out
    assert output.startswith("device: cuda\n")
    assert_done(output, script.parent)


def test_it_runs_as_a_notebook(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    content = nbformat.reads(notebook(tiny(SCRIPT.read_text())), as_version=4)
    nbformat.validate(content)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert_done(printed, tmp_path)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(PICTURES)
