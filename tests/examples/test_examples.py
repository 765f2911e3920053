"""The two short examples run as they stand, and reach what they promise."""

import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_one_layer_by_hand(tmp_path):
    output = run("one_layer_by_hand.py", cwd=tmp_path)
    # What is computed by hand is what the layer has printed at the top right.
    forward, backward, check, learning = re.split(r"^\d\. [A-Z]+", output, flags=re.MULTILINE)[1:]
    assert re.search(r"2\.8\]\n.*\n?top right by hand: 2\.800", forward)
    top_right = re.search(r"filter\n\[\[.* (\S+)\]\n", backward)[1]
    assert f"dweight at the top right by hand: {top_right}" in backward
    errors = dict(re.findall(r"^   (\w+ \w+) +(\S+)$", check, flags=re.MULTILINE))
    assert 1e-15 < float(errors["finite difference"]) < 1e-8
    assert float(errors["complex step"]) < 1e-15
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", learning)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-6
    assert learning.endswith("[[-1.  0.  1.]\n [-2.  0.  2.]\n [-1.  0.  1.]]\n")
    assert list(tmp_path.iterdir()) == []


def test_overfit_one_slice(tmp_path):
    output = run("overfit_one_slice.py", "picture.png", cwd=tmp_path)
    rows = [line.split() for line in output.splitlines()[1:-1]]
    assert [int(step) for step, _, _ in rows] == list(range(0, 10 * len(rows), 10))
    assert float(rows[-1][2]) > 0.95
    assert float(rows[-1][1]) < float(rows[0][1]) / 2
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG"
