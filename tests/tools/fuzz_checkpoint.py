"""Damages a checkpoint in a thousand ways, has each loaded, and says what came of it::

    python -m tests.tools.fuzz_checkpoint --count 1000 --seed 0

A damaged file is refused in one line that names it, or, where the damage hit a byte that means nothing (a date in the
ZIP), loads as what was saved, to the last bit. All else is a failure: another value, another exception, more than
5 seconds, more than 50 MB. Case i of a seed is always the same file.
"""

import argparse
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minunet import AdamW, UNet
from minunet.base import cli
from minunet.base.archive import load, sha256_of_arrays
from minunet.base.durable import json_text
from minunet.base.errors import UserError
from minunet.training.checkpoint import load_net, save_training
from minunet.training.optim import WeightEMA

SECONDS, BYTES = 5.0, 50e6  # what a case may take


def make_checkpoint(path: Path) -> None:
    """The checkpoint of a tiny run."""
    net = UNet(widths=(2, 3), up_kernel=2)
    optimizer = AdamW(net.parameters())
    ema = WeightEMA(net.parameters() | net.buffers())
    random = np.random.default_rng(0)
    for _ in range(3):
        optimizer.step({name: random.standard_normal(p.shape, "float32") for name, p in net.parameters().items()})
        ema.update(net.parameters() | net.buffers())
    save_training(path, net=net, optimizer=optimizer, ema=ema, metadata={"progress": {"epoch": 3}})


# ------------------------------------------------------------------------------------------ damage


def flip_a_bit(content: bytearray, random: np.random.Generator) -> bytes:
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    return bytes(content)


def flip_bits(content: bytearray, random: np.random.Generator) -> bytes:
    for place in random.integers(len(content), size=random.integers(2, 100)):
        content[place] ^= 1 << random.integers(8)
    return bytes(content)


def cut(content: bytearray, random: np.random.Generator) -> bytes:
    return bytes(content[: random.integers(len(content))])


def overwrite(content: bytearray, random: np.random.Generator) -> bytes:
    start = random.integers(len(content))
    stretch = random.bytes(random.integers(1, 200))
    content[start : start + len(stretch)] = stretch
    return bytes(content)


def blank_a_sector(content: bytearray, random: np.random.Generator) -> bytes:
    start = 512 * random.integers(len(content) // 512)
    content[start : start + 512] = bytes(512)
    return bytes(content)


def remove(content: bytearray, random: np.random.Generator) -> bytes:
    start = random.integers(len(content))
    return bytes(content[:start] + content[start + random.integers(1, 50) :])


def insert(content: bytearray, random: np.random.Generator) -> bytes:
    start = random.integers(len(content))
    return bytes(content[:start] + random.bytes(random.integers(1, 50)) + content[start:])


def exchange(content: bytearray, random: np.random.Generator) -> bytes:
    """Two stretches of equal length change places: every byte of the file is still there."""
    length = int(random.integers(8, 400))
    first, second = sorted(int(place) for place in random.integers(len(content) - length, size=2))
    if second < first + length:
        return flip_a_bit(content, random)
    one, two = content[first : first + length], content[second : second + length]
    content[first : first + length], content[second : second + length] = two, one
    return bytes(content)


def lie_in_the_directory(content: bytearray, random: np.random.Generator) -> bytes:
    """A number in the ZIP's table of contents, at the file's end, becomes a large one."""
    start = content.index(b"PK\x01\x02")
    place = random.integers(start, len(content) - 4)
    content[place : place + 4] = int(random.integers(2**24, 2**32)).to_bytes(4, "little")
    return bytes(content)


def a_digit(content: bytearray, random: np.random.Generator) -> bytes:
    """A digit of a number in the metadata, or in an array's header, becomes another."""
    digits = [place for place, byte in enumerate(content) if 48 <= byte <= 57]
    place = digits[random.integers(len(digits))]
    content[place] = 48 + (content[place] - 48 + random.integers(1, 10)) % 10
    return bytes(content)


DAMAGES: list[Callable[[bytearray, np.random.Generator], bytes]] = [
    flip_a_bit,
    flip_bits,
    cut,
    overwrite,
    blank_a_sector,
    remove,
    insert,
    exchange,
    lie_in_the_directory,
    a_digit,
]


def damaged(content: bytes, case: int, seed: int) -> tuple[bytes, str]:
    """The file of a case, and the kind of its damage."""
    random = np.random.default_rng([seed, case])
    kind = DAMAGES[case % len(DAMAGES)]
    return kind(bytearray(content), random), kind.__name__


# ------------------------------------------------------------------------------------------ loading it


class Outcome(NamedTuple):
    """What came of a case."""

    verdict: str  # "refused", "unharmed", or what is wrong
    seconds: float
    peak: int  # bytes that were allocated at one time


def contents(path: Path) -> str:
    """Everything in a checkpoint, as one string: arrays, metadata, and the network that is built of them."""
    arrays, metadata = load(path)
    net, again = load_net(path)
    values = sha256_of_arrays(arrays) + sha256_of_arrays(net.parameters() | net.buffers())
    return values + json_text([metadata, again], exact=True)


def outcome(path: Path, expected: str) -> Outcome:
    tracemalloc.start()
    started = time.perf_counter()
    try:
        verdict = "unharmed" if contents(path) == expected else "SILENTLY WRONG"
    except UserError as error:
        line = str(error)
        verdict = "refused" if line.startswith(f"{path}: ") and cli.one_line(line) == line else f"NOT ONE LINE: {line}"
    except Exception as error:
        verdict = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if verdict in ("refused", "unharmed") and seconds > SECONDS:
        verdict = "TOO SLOW"
    if verdict in ("refused", "unharmed") and peak > BYTES:
        verdict = "TOO MUCH MEMORY"
    return Outcome(verdict, seconds, peak)


def fuzz(folder: Path, count: int, seed: int) -> list[tuple[str, Outcome]]:
    """The kind of damage and what came of it, case by case."""
    path = folder / "last.npz"
    make_checkpoint(path)
    good, expected = path.read_bytes(), contents(path)
    results = []
    for case in range(count):
        content, kind = damaged(good, case, seed)
        path.write_bytes(content)
        results.append((kind, outcome(path, expected)))
    return results


def main(arguments: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=cli.positive_int, default=1000)
    parser.add_argument("--seed", type=cli.seed, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        results = fuzz(Path(folder), options.count, options.seed)
    for case, (kind, found) in enumerate(results):
        if found.verdict not in ("refused", "unharmed"):
            print(f"case {case}, {kind}: {found.verdict}")
    verdicts = Counter(found.verdict for _, found in results)
    bad = len(results) - verdicts["refused"] - verdicts["unharmed"]
    print(
        f"{len(results)} damaged checkpoints: {verdicts['refused']} refused in one line, "
        f"{verdicts['unharmed']} unharmed"
    )
    print(f"{bad} failures: silently wrong, tracebacks, hangs or too much memory")
    print(
        f"at most {max(found.seconds for _, found in results):.2f} s a file "
        f"and {max(found.peak for _, found in results) / 1e6:.1f} MB"
    )
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(cli.run(main))
