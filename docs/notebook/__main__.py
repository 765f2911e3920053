"""``python -m docs.notebook``: docs/notebook/main_job.py becomes docs/notebook/main_job.ipynb.

The script is the source. It runs as it stands, and it reads well in a diff, as a notebook does not. Cells begin with a
line ``# %%``, cells of text with ``# %% [markdown]``, and their lines with ``# ``: the format that editors know. The
cell of code that is marked ``# %% parameters`` gets that tag, so that tools can put other values in its place.

The notebook is a JSON file of a documented format (nbformat 4.5), so nothing but Python is needed to write it. It holds
no outputs: pictures of somebody's run would age. Cells are named by their number: the same script gives the same bytes.
"""

import json
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("main_job.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
MARK = "# %%"


def notebook(script: str) -> str:
    r"""The notebook of a script, as text.

    >>> cells = json.loads(notebook("# %% [markdown]\n# Hello\n\n# %%\nx = 1\n"))["cells"]
    >>> [(cell["cell_type"], cell["source"]) for cell in cells]
    [('markdown', ['Hello']), ('code', ['x = 1'])]
    """
    if not script.startswith(MARK):
        raise ValueError(f"the script must begin with a cell, {MARK!r}, got {script.partition(chr(10))[0]!r}")
    parts = script.removeprefix(MARK).split(f"\n{MARK}")
    cells = [_cell(number, part) for number, part in enumerate(parts, start=1)]
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, part: str) -> dict[str, Any]:
    kind, _, body = part.partition("\n")
    lines = body.strip("\n").split("\n")
    cell: dict[str, Any] = {"id": f"cell-{number:02d}", "metadata": {}}
    if kind.strip() == "[markdown]":
        lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cell["cell_type"] = "markdown"
    elif kind.strip() in ("", "parameters"):
        cell.update(cell_type="code", execution_count=None, outputs=[])
        if kind.strip():
            cell["metadata"] = {"tags": ["parameters"]}
    else:
        raise ValueError(f"a cell is marked {MARK}, {MARK} [markdown] or {MARK} parameters, got {MARK + kind!r}")
    cell["source"] = [line + "\n" for line in lines[:-1]] + lines[-1:]
    return dict(sorted(cell.items()))


def main() -> None:
    """Write the notebook."""
    NOTEBOOK.write_text(notebook(SCRIPT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{NOTEBOOK.name}: written from {SCRIPT.name}")


if __name__ == "__main__":
    sys.exit(main())
