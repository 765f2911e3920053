"""Damages small TIFFs in a thousand ways, has each read, and says what came of it::

    python -m tests.tools.fuzz_tiff --count 1000 --seed 0

A file is read whole, or refused in one line that names it: never a traceback, a crash, a hang, or more memory than a
real file may take. (Where the damage hits the pixels alone, they are others then, and only a manifest can tell.)

The files are read in a process of their own, under a limit of memory. It reports case by case; a case that is not
reported is a hang or a crash, after which another process goes on. After the damaged files come a few that are built
to do harm (``HOSTILE``). Case i of a seed and a count is always the same file; ``--case i`` writes it to stdout.
"""

import argparse
import io
import json
import os
import queue
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from minunet.base.errors import UserError
from minunet.data import reader
from minunet.data.images import MAX_PIXELS, read_image, read_mask

CPU_LIMIT = 5.0  # seconds of computing for a file: more counts as a hang
WALL_LIMIT = 60.0  # seconds until a process that does not report is killed: the machine may be busy
MEMORY_LIMIT = 2 * 2**30  # bytes of addresses that the reading process gets

# Tags of a TIFF, and the types of their values.
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES, ROWS, COUNTS = (
    256,
    257,
    258,
    259,
    262,
    273,
    277,
    278,
    279,
)
SHORT, LONG = 3, 4


# ------------------------------------------------------------------------------------------ sound files


@cache
def sound_files() -> dict[str, bytes]:
    """Small TIFFs of the kinds that are met: images, masks, plain and compressed, of several strips and pages."""
    random = np.random.default_rng(0)
    grey = Image.fromarray(random.integers(0, 256, (24, 20), dtype=np.uint8))
    image = Image.fromarray(random.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    mask = Image.fromarray(random.integers(0, 2, (24, 20), dtype=np.uint8) * np.uint8(255))
    deep = Image.fromarray(random.integers(0, 2, (24, 20), dtype=np.uint16) * np.uint16(65535))

    def saved(picture: Image.Image, **options: object) -> bytes:
        file = io.BytesIO()
        picture.save(file, "TIFF", **options)
        return file.getvalue()

    return {
        "image": saved(image),
        "image, strips": saved(image, strip_size=240),
        "image, LZW": saved(image, compression="tiff_lzw"),
        "image, deflate": saved(image, compression="tiff_adobe_deflate"),
        "image, JPEG": saved(image, compression="jpeg"),
        "image, packbits": saved(image, compression="packbits"),
        "image, BigTIFF": saved(image, big_tiff=True),
        "image, metadata": saved(image, description="x" * 100, dpi=(72, 72), icc_profile=bytes(200)),
        "image, two pages": saved(image, save_all=True, append_images=[image]),
        "image, big-endian": tiff(
            {BITS: (SHORT, [8] * 3), PHOTOMETRIC: (SHORT, [2]), SAMPLES: (SHORT, [3])},
            image.tobytes(),
            20,
            24,
            order=">",
        ),
        "mask": saved(mask),
        "mask, strips": saved(mask, strip_size=100),
        "mask, LZW": saved(mask, compression="tiff_lzw"),
        "mask, 1 bit": saved(mask.convert("1")),
        "mask, fax": saved(mask.convert("1"), compression="group4"),
        "mask, 16 bits": saved(deep),
        "grey": saved(grey),
        "palette": saved(grey.convert("P")),
    }


def tiff(
    tags: dict[int, tuple[int, list[int]]], pixels: bytes, width: int, height: int, order: str = "<", next_: int = 0
) -> bytes:
    """A TIFF with one strip of ``pixels`` and the given tags, each a type (SHORT, LONG) and its values."""
    default = {
        WIDTH: (LONG, [width]),
        HEIGHT: (LONG, [height]),
        BITS: (SHORT, [8]),
        COMPRESSION: (SHORT, [1]),
        PHOTOMETRIC: (SHORT, [1]),
        OFFSETS: (LONG, [8]),
        SAMPLES: (SHORT, [1]),
        ROWS: (LONG, [height]),
        COUNTS: (LONG, [len(pixels)]),
    }
    tags = default | tags
    pixels += bytes(len(pixels) % 2)
    directory = 8 + len(pixels)
    place = directory + 2 + 12 * len(tags) + 4  # of the values that do not fit into their entry
    entries, values = b"", b""
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == SHORT else 'I'}", *numbers)
        if len(packed) > 4:
            values, packed = values + packed, struct.pack(order + "I", place + len(values))
        entries += struct.pack(order + "HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", directory)
    return header + pixels + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", next_) + values


# ------------------------------------------------------------------------------------------ damage


def damaged(content: bytes, random: np.random.Generator) -> tuple[bytes, str]:
    """``content`` with one to three damages of random kinds, and their names."""
    names = []
    for _ in range(random.integers(1, 4)):
        kind = DAMAGES[random.integers(len(DAMAGES))]
        content = kind(bytearray(content), random)
        names.append(kind.__name__)
    return content, " + ".join(names)


def cut(content: bytearray, random: np.random.Generator) -> bytes:
    return bytes(content[: random.integers(len(content) + 1)])


def flip_bits(content: bytearray, random: np.random.Generator) -> bytes:
    for place in random.integers(0, max(len(content), 1), random.integers(1, 9)):
        if content:
            content[place] ^= 1 << random.integers(8)
    return bytes(content)


def overwrite(content: bytearray, random: np.random.Generator) -> bytes:
    start, length = random.integers(len(content) + 1), random.integers(1, 33)
    content[start : start + length] = random.bytes(int(min(length, len(content) - start)))
    return bytes(content)


def insert_or_remove(content: bytearray, random: np.random.Generator) -> bytes:
    start, length = random.integers(len(content) + 1), random.integers(1, 33)
    content[start : start + length * random.integers(2)] = random.bytes(int(length * random.integers(2)))
    return bytes(content)


def change_header(content: bytearray, random: np.random.Generator) -> bytes:
    """Another byte order, another version, or another place of the first directory."""
    start, value = [(0, b"MM"), (0, b"II"), (2, b"\x2a\0"), (2, b"\x2b\0"), (4, nasty(content, random))][
        random.integers(5)
    ]
    content[start : start + len(value)] = value
    return bytes(content)


def change_entry(content: bytearray, random: np.random.Generator) -> bytes:
    """An entry of the directory: its tag, its type, its count, or its value or the place of its values."""
    if entries := find_entries(content):
        entry = entries[random.integers(len(entries))]
        start, length = [(0, 2), (2, 2), (4, 4), (8, 4), (8, 4)][random.integers(5)]
        content[entry + start : entry + start + length] = nasty(content, random)[:length]
    return bytes(content)


def change_size(content: bytearray, random: np.random.Generator) -> bytes:
    return set_tag(
        content, [WIDTH, HEIGHT, ROWS, COUNTS, OFFSETS, SAMPLES, BITS][random.integers(7)], nasty(content, random)
    )


def change_compression(content: bytearray, random: np.random.Generator) -> bytes:
    codes = [1, 2, 3, 4, 5, 6, 7, 8, 32773, 32809, 32946, 34676, 34925, 50000, 50001, 65535]
    return set_tag(content, COMPRESSION, struct.pack("<I", codes[random.integers(len(codes))]))


def change_directory(content: bytearray, random: np.random.Generator) -> bytes:
    """The number of entries of the directory, or the place of the next one: circles, chains, the end of the file."""
    if entries := find_entries(content):
        if random.integers(2):
            content[entries[0] - 2 : entries[0]] = nasty(content, random)[:2]
        else:
            content[entries[-1] + 12 : entries[-1] + 16] = nasty(content, random)
    return bytes(content)


DAMAGES = [
    cut,
    flip_bits,
    overwrite,
    insert_or_remove,
    change_header,
    change_entry,
    change_entry,
    change_size,
    change_size,
    change_compression,
    change_directory,
]


def nasty(content: bytearray, random: np.random.Generator) -> bytes:
    """Four bytes (little-endian) of a number at which programs stumble."""
    directory = int.from_bytes(content[4:8], "little")
    numbers = [0, 1, 2, 3, 255, 4096, 8192, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
    numbers += [len(content), len(content) - 1, 8, directory, directory + 2, int(random.integers(2**32))]
    return struct.pack("<I", numbers[random.integers(len(numbers))] % 2**32)


def find_entries(content: bytearray) -> list[int]:
    """Where the 12 bytes of each entry of the first directory of a little-endian TIFF begin, as far as it has one."""
    directory = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[directory : directory + 2], "little")
    starts = range(directory + 2, directory + 2 + 12 * count, 12)
    return [start for start in starts[:64] if start + 12 <= len(content)]


def set_tag(content: bytearray, tag: int, value: bytes) -> bytes:
    for entry in find_entries(content):
        if int.from_bytes(content[entry : entry + 2], "little") == tag:
            content[entry + 2 : entry + 4] = struct.pack("<H", LONG)
            content[entry + 8 : entry + 12] = value
    return bytes(content)


# ------------------------------------------------------------------------------------------ files built to do harm


def many_pages(count: int) -> bytes:
    """A chain of directories, each of them a page."""
    length = 2 + 9 * 12 + 4
    pages = [tiff({}, bytes(16), 4, 4, next_=24 + i * length)[24:] for i in range(1, count)]
    last = tiff({}, bytes(16), 4, 4)
    return last[:24] + b"".join(pages) + last[24:]


def many_strips(count: int) -> bytes:
    return tiff({OFFSETS: (LONG, [8] * count), ROWS: (LONG, [1])}, bytes(16), 4, 4)


def many_entries(count: int) -> bytes:
    """Each entry claims the same 60,000 bytes for itself."""
    entries = b"".join(struct.pack("<HHII", tag, 7, 60_000, 8) for tag in range(1000, 1000 + count))
    return b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4)


def deflated(width: int, height: int) -> bytes:
    """A few kilobytes that unpack to a mask as large as it says, with tumour in its last row."""
    pixels = zlib.compress(bytes(width * (height - 1)) + b"\xff" * width, 9)
    return tiff({COMPRESSION: (SHORT, [8]), ROWS: (LONG, [height])}, pixels, width, height)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "a directory that follows itself": lambda: tiff({}, bytes(16), 4, 4, next_=24),
    "30,000 pages": lambda: many_pages(30_000),
    "50,000 strips": lambda: many_strips(50_000),
    "a million strips": lambda: many_strips(1_000_000),
    "40,000 entries": lambda: many_entries(40_000),
    "8192 x 8192 in kilobytes": lambda: deflated(8192, 8192),
    "8193 x 8192 in kilobytes": lambda: deflated(8193, 8192),
    "2**26 x 1 in kilobytes": lambda: deflated(2**26, 1),
    "30,000 x 30,000 claimed": lambda: tiff({}, bytes(16), 30_000, 30_000),
    "2**31 x 2**31 claimed": lambda: tiff({}, bytes(16), 2**31, 2**31),
}


# ------------------------------------------------------------------------------------------ the reading process


def cases(count: int, seed: int, start: int = 0) -> Iterator[tuple[str, bytes]]:
    """What file ``start``, ``start + 1``, ... is, and its content: ``count`` damaged ones, then the hostile ones."""
    kinds = list(sound_files().items())
    for number in range(start, count):
        name, sound = kinds[number % len(kinds)]
        content, damage = damaged(sound, np.random.default_rng([seed, number]))
        yield f"{name}: {damage}", content
    for name, build in list(HOSTILE.items())[max(start - count, 0) :]:
        yield name, build()


READ, CHANGED, REFUSED = "read", "read with other pixels", "refused"


@dataclass
class Read:
    """How it ended: in one of the words above, or in what must not be."""

    end: str
    seconds: float  # of computing
    pixels: str = ""  # shape and checksum


def serve(count: int, seed: int, start: int) -> None:
    """Have the files from ``start`` on read in the four ways there are, and print what came of each as JSON."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with tempfile.TemporaryDirectory() as folder:
        images, masks = Path(folder) / "images", Path(folder) / "masks"
        for patients in (images, masks):
            (patients / "anna").mkdir(parents=True)
            (patients / "anna" / "anna_1.tif").write_bytes(sound_files()["image"])
            (patients / "anna" / "anna_1_mask.tif").write_bytes(sound_files()["mask"])
        image, mask = images / "anna" / "anna_1.tif", masks / "anna" / "anna_1_mask.tif"

        def read(content: bytes) -> list[Read]:
            image.write_bytes(content)
            mask.write_bytes(content)
            return [
                attempt(lambda: read_image(image), image),
                attempt(lambda: read_mask(mask), mask),
                attempt(lambda: reader.read_folder(images, 8).images[0], image),
                attempt(lambda: reader.read_folder(masks, 8).masks[0, ..., 0], mask),
            ]

        sound = {name: read(content) for name, content in sound_files().items()}
        for name, content in cases(count, seed, start):
            reads = read(content)
            for one, other in zip(reads, sound.get(name.partition(":")[0], ()), strict=False):
                if one.end == other.end == READ and one.pixels != other.pixels:
                    one.end = CHANGED
            memory = peak_memory()
            ends = [(one.end, one.seconds) for one in reads]
            print(json.dumps({"name": name, "reads": ends, "memory": memory}), flush=True)


def attempt(function: Callable[[], np.ndarray], path: Path) -> Read:
    """How reading the file at ``path`` by ``function()`` ends."""
    started = time.process_time()
    try:
        array = function()
    except UserError as error:
        message = str(error)
        if str(path) not in message or not message.isprintable():
            end = f"not one line with the file's name: {message!r}"
        else:
            end = "out of memory" if "MemoryError" in message else REFUSED
        return Read(end, time.process_time() - started)
    except BaseException:
        return Read(traceback.format_exc(), time.process_time() - started)
    seconds = time.process_time() - started
    is_image = array.ndim == 3 and array.shape[2] in (1, 3) and array.dtype in (np.uint8, np.uint16)
    is_mask = array.ndim == 2 and array.max() <= 1 and array.dtype == np.uint8
    if not 0 < array.size <= 3 * MAX_PIXELS or not (is_image or is_mask):
        return Read(f"an array that is no image: {array.dtype} {array.shape}", seconds)
    return Read(READ, seconds, f"{array.shape} {zlib.crc32(np.ascontiguousarray(array).data)}")


# ------------------------------------------------------------------------------------------ the process that counts


@dataclass
class Figures:
    """What came of a run."""

    files: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # READ, CHANGED or REFUSED, of the four ways to read a file
    failures: list[str] = field(default_factory=list)  # whatever else has happened, with the file's number and name
    seconds: float = 0.0  # of computing, for the slowest file
    slowest: str = ""
    memory: int = 0  # bytes, the most that a reading process had at any time
    errors: str = ""  # what was printed to stderr

    def __str__(self) -> str:
        ends = ", ".join(f"{end} {number}" for end, number in self.ends.most_common())
        return (
            f"{self.files} files, each read in four ways: {ends}, anything else {len(self.failures)}\n"
            f"slowest: {self.seconds:.2f} s of computing ({self.slowest})\n"
            f"most memory: {self.memory / 2**20:.0f} MB"
        )


def run(count: int, seed: int = 0) -> Figures:
    """Read ``count`` damaged files and the hostile ones, in as many processes as it takes."""
    figures = Figures()
    total = count + len(HOSTILE)
    while figures.files < total:
        reported = figures.files
        end = collect(figures, count, seed, start=reported)
        if figures.files < total:  # the process ended, or had to be ended, over this file
            figures.failures.append(f"case {figures.files}: {end}")
            figures.files += 1
    return figures


def peak_memory() -> int:
    """The most memory that this process has had so far, in bytes.

    Linux's ``ru_maxrss`` would count what the process that started this one had at that moment.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)[1])  # type: ignore[index]
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def collect(figures: Figures, count: int, seed: int, start: int) -> str:
    """Add what one reading process reports to the figures; how it has ended."""
    command = [sys.executable, "-W", "error", "-m", "tests.tools.fuzz_tiff", "--serve", str(start)]
    command += ["--count", str(count), "--seed", str(seed)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # each of its threads takes addresses
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=Path(__file__).parents[2], env=environment
        ) as process,
    ):
        lines: queue.Queue[str] = queue.Queue()
        listener = threading.Thread(target=listen, args=(process.stdout, lines))
        listener.start()
        try:
            while line := lines.get(timeout=WALL_LIMIT):
                add(figures, json.loads(line))
            end = f"a crash, exit code {process.wait()}"
        except queue.Empty:
            end = f"a hang of more than {WALL_LIMIT} s"
        finally:
            process.kill()
            listener.join()
        errors.seek(0)
        figures.errors += errors.read()
    return end


def listen(stream: IO[str] | None, lines: "queue.Queue[str]") -> None:
    """Pass on each line, and at last an empty one: the end can be waited for with a limit, which a read cannot."""
    for line in stream or ():
        lines.put(line)
    lines.put("")


def add(figures: Figures, report: dict) -> None:
    for end, seconds in report["reads"]:
        if end in (READ, CHANGED, REFUSED):
            figures.ends[end] += 1
        else:
            figures.failures.append(f"case {figures.files}, {report['name']}: {end}")
        if seconds > CPU_LIMIT:
            figures.failures.append(f"case {figures.files}, {report['name']}: {seconds:.1f} s of computing")
        if seconds > figures.seconds:
            figures.seconds, figures.slowest = seconds, report["name"]
    figures.memory = max(figures.memory, report["memory"])
    figures.files += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="how many damaged files (1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="write this file to standard output instead")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.count, options.seed, options.serve)
        return 0
    if options.case is not None:
        sys.stdout.buffer.write(next(cases(options.count, options.seed, options.case))[1])
        return 0
    figures = run(options.count, options.seed)
    print(figures)
    for failure in figures.failures:
        print(failure)
    print(figures.errors, end="", file=sys.stderr)
    return 1 if figures.failures or figures.errors else 0


if __name__ == "__main__":
    sys.exit(main())
