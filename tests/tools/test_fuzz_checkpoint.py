"""A sample of ``python -m tests.tools.fuzz_checkpoint``, and a file of the first version."""

from pathlib import Path

from minunet import AdamW
from minunet.base.archive import load, sha256_of_arrays
from minunet.training.checkpoint import load_net, load_training
from minunet.training.optim import WeightEMA
from tests.tools.fuzz_checkpoint import DAMAGES, fuzz

FIRST = Path(__file__).parents[1] / "fixtures" / "checkpoint-1.npz"


def test_damaged_checkpoints_are_refused_or_unharmed(tmp_path):
    results = fuzz(tmp_path, count=100, seed=1)
    assert {kind for kind, _ in results} == {damage.__name__ for damage in DAMAGES}
    wrong = [(kind, found) for kind, found in results if found.verdict not in ("refused", "unharmed")]
    assert wrong == []
    assert sum(found.verdict == "refused" for _, found in results) > 80


def test_a_file_of_the_first_version_still_loads():
    """Written once by ``make_checkpoint``, its environment left out, and never again: runs of that day go on."""
    arrays, metadata = load(FIRST)
    assert sha256_of_arrays(arrays) == "73b3d1a5453821ed9acc5ed7acd2483016e1fecd90c9997144e2bb762b36fb64"
    assert metadata["progress"] == {"epoch": 3}
    net, _ = load_net(FIRST)
    optimizer = AdamW(net.parameters())
    ema = WeightEMA(net.parameters() | net.buffers())
    load_training(FIRST, net, optimizer, ema)
    assert (optimizer.steps, ema.updates) == (3, 3)
