"""What people do to a program: the 34 cases of docs/reliability.md, and more, through the real command line.

Unless its case says otherwise, a command ends with exit code 2 and one line, ``error: ...``, that names the file or
flag, and leaves every file as it was. A case is a function of a folder, in which it lays out what is wrong; it returns
what to run, and what has to come of it. Every one of them is run as a process of its own.
"""

import contextlib
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minunet import UNet
from minunet.base import archive, cli
from tests.command_line import (
    EXAMPLES,
    NO_PICTURES,
    SMALL,
    command,
    progress,
    run,
    tree,
    weights,
    write_patients,
)
from tests.tools.fuzz_tiff import damaged, sound_files, tiff

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and limits as POSIX has them")

CASES = {}


def case(name):
    def add(function):
        assert name not in CASES
        CASES[name] = function
        return function

    return add


@dataclass(frozen=True)
class Refused:
    """A command that has to be refused: one line with all ``words``, and nothing written or deleted.

    Several faults of a data set are a list below that line.
    """

    script: str
    arguments: tuple
    words: tuple
    env: dict | None = None
    before: str = ""

    def check(self, folder):
        before = tree(folder)
        ended = run(self.script, *self.arguments, cwd=folder, env=self.env, before=self.before)
        assert ended.code == 2, ended
        line, *faults = ended.err.splitlines()
        assert line.startswith("error: ")
        assert len(faults) in (0, *range(2, 22))
        assert faults == [] or line.endswith(" faults")
        assert all(fault.startswith("  ") for fault in faults)
        for word in self.words:
            assert str(word) in ended.err, ended
        assert tree(folder) == before


@dataclass(frozen=True)
class Trained:
    """A training that has to succeed, and to say all ``words``."""

    arguments: tuple
    words: tuple = ()
    env: dict | None = None

    def check(self, folder):
        ended = run("train_lgg", *self.arguments, *SMALL, "--epochs", "1", "--output", "out", cwd=folder, env=self.env)
        assert (ended.code, ended.err) == (0, ""), ended
        for word in self.words:
            assert word in ended.out, ended
        arrays, metadata = archive.load(folder / "out" / "last.npz")
        assert metadata["progress"]["finished"]
        assert len(arrays["history/epoch"]) == 1
        assert all(np.isfinite(array).all() for array in arrays.values())
        assert (folder / "out" / "metrics.json").exists()


@dataclass(frozen=True)
class RefusedAtOnce:
    """Flags that have to be refused, one after the other: ``arguments`` with each of the values, in this process.

    A process for each would say the same: a flag is read before anything else, and ``cli.run`` is all that an example
    calls. The first value goes through the real command line too.
    """

    script: str
    arguments: tuple
    flag: str
    values: tuple

    def check(self, folder):
        first, *others = (Refused(self.script, self._with(value), (self.flag, value[:9])) for value in self.values)
        first.check(folder)
        main = runpy.run_path(str(EXAMPLES / f"{self.script}.py"))["main"]
        for one in others:
            with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
                assert cli.run(main, [str(argument) for argument in one.arguments]) == 2
            (line,) = err.getvalue().splitlines()
            assert line.startswith("error: ")
            assert all(word in line for word in one.words), line
        assert tree(folder) == {}

    def _with(self, value):
        return (*self.arguments, f"{self.flag}={value}", "--output", str(OUTPUT))


OUTPUT = Path("nowhere") / "out"


def refused(*arguments, words, **options):
    return Refused("train_lgg", (*arguments, "--quiet", "--output", "out"), words, **options)


def resumed(folder, *words, **options):
    return Refused("train_lgg", ("--resume", folder, "--quiet"), words, **options)


def predicted(*arguments, words, **options):
    return Refused("predict", (*arguments, "--output", "out"), words, **options)


# ------------------------------------------------------------------------------------------ what the cases start from


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    return write_patients(tmp_path_factory.mktemp("patients") / "kaggle_3m")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, patients):
    """The folder of a training on the patients, two epochs long."""
    folder = tmp_path_factory.mktemp("finished")
    ended = run("train_lgg", "--data", patients, *SMALL, "--epochs", "2", "--output", "run", cwd=folder)
    assert ended.code == 0, ended
    return folder / "run"


@pytest.fixture
def place(tmp_path, patients, finished):
    """An empty folder to work in, that knows where the patients and the finished run are.

    The folder above it is empty, too: a message may point to data that lie there, as those of another test would.
    """
    (tmp_path / "here").mkdir()
    with contextlib.ExitStack() as scope:
        yield Place(
            tmp_path / "here", patients, finished, lambda command: scope.callback(subprocess.run, command, check=True)
        )


@dataclass(frozen=True)
class Place:
    folder: Path
    patients: Path
    finished: Path
    at_the_end: Callable  # takes a command that is run then

    def data(self, change=lambda image, mask: None):
        """A copy of the patients as ``data``, whose first image and mask ``change`` may change."""
        subprocess.run(["cp", "-r", self.patients, self.folder / "data"], check=True)
        image = min(path for path in (self.folder / "data").rglob("*.tif") if not path.stem.endswith("_mask"))
        mask = image.with_name(f"{image.stem}_mask.tif")
        change(image, mask)
        return image, mask

    def run(self, change=lambda folder: None):
        """A copy of the finished run as ``run``, which ``change`` may change."""
        subprocess.run(["cp", "-r", self.finished, self.folder / "run"], check=True)
        change(self.folder / "run")
        return self.folder / "run"


def saved(path, array, mode=None, **options):
    picture = Image.fromarray(array)
    (picture if mode is None else picture.convert(mode)).save(path, "TIFF", **options)


def bad_image(place, change, *words):
    """The case of a data set one image of which is bad."""
    image, _ = place.data(change)
    return refused("--data", "data", words=(image.name, *words))


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


RGB = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------ the 34 cases: data


@case("01 data folder absent")
def _(place):
    return refused("--data", "nowhere", words=("nowhere", "no such folder"))


@case("01 data folder is a file")
def _(place):
    (place.folder / "data").write_text("not a folder")
    return refused("--data", "data", words=("data: not a folder",))


@case("01 data folder unreadable")
def _(place):
    # Root may read every folder, whatever its mode: a link in a circle cannot be listed by anybody.
    (place.folder / "data").symlink_to("data")
    return refused("--data", "data", words=("data: cannot be listed",))


@case("02 data folder empty")
def _(place):
    (place.folder / "data" / "patient").mkdir(parents=True)
    return refused("--data", "data", words=("data: no pair of image and mask", "NAME_mask.png"))


WRONG_LEVELS = {
    "two levels too high": ("mri", "mri/lgg/slices"),
    "one level too high": ("mri/lgg", "mri/lgg/slices"),
    "one patient's": ("mri/lgg/slices/{patient}", "mri/lgg/slices"),
    "one level too low": ("mri/lgg/slices/{patient}/more", "mri/lgg/slices"),
    "an image": ("mri/lgg/slices/{patient}/{image}", "mri/lgg/slices"),
}
for level, (given, fits) in WRONG_LEVELS.items():

    @case(f"02 data folder {level}")
    def _(place, given=given, fits=fits):
        image, _ = place.data()
        (image.parent / "more").mkdir()
        (place.folder / "mri" / "lgg").mkdir(parents=True)
        (place.folder / "data").rename(place.folder / fits)
        given = given.format(patient=image.parent.name, image=image.name)
        return refused("--data", given, words=(f"{given}: no", f"; {fits} is such a folder"))


@case("03 image without mask, mask without image")
def _(place):
    image, _ = place.data(lambda image, mask: mask.unlink())
    other = sorted(image.parent.glob("*_mask.tif"))[0]
    other.with_name(other.name.replace("_mask", "")).unlink()
    words = ("2 faults", f"{image.name}: no mask", f"{other.name}: no image", "--allow-missing")
    return refused("--data", "data", words=words)


@case("03 many images without a mask")
class _:
    """A list, and no endless line."""

    def __init__(self, place):
        place.data()
        for mask in sorted((place.folder / "data").rglob("*_mask.tif"))[1:]:
            mask.unlink()

    def check(self, folder):
        ended = run("train_lgg", "--data", "data", "--quiet", cwd=folder)
        first, *faults, last = ended.err.splitlines()
        assert (ended.code, len(faults)) == (2, 20)
        assert re.fullmatch(r"error: data: \d+ faults", first)
        assert re.fullmatch(r"  and \d+ more", last)
        for fault in faults:
            assert re.fullmatch(r"  data/\S+\.tif: no mask \S+_mask\.tif beside it; add it, or leave .*", fault)


@case("03 --allow-missing leaves out and counts")
def _(place):
    image, _ = place.data(lambda image, mask: mask.unlink())
    return Trained(("--data", "data", "--allow-missing"), ("1 file without a partner", image.name))


CONTENTS = {
    "truncated": lambda content: content[: len(content) // 2],
    "0 bytes": lambda content: b"",
    "text": lambda content: b"an image, to be sure\n",
    "HTML": lambda content: b"<!doctype html><title>404</title>",
    "a PNG": lambda content: b"\x89PNG\r\n\x1a\n" + bytes(100),
}
for kind, content in CONTENTS.items():

    @case(f"04 {kind} named .tif")
    def _(place, content=content):
        return bad_image(place, lambda image, mask: image.write_bytes(content(image.read_bytes())), "cannot be read")


@case("05 300 fuzzed files")
def _(place):
    good = sound_files()["image"]
    for number in range(300):
        random = np.random.default_rng(number)
        folder = place.folder / "data" / f"patient{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"a_{number}.tif").write_bytes(damaged(good, random)[0])
        (folder / f"a_{number}_mask.tif").write_bytes(sound_files()["mask"])
    return refused("--data", "data", words=("data: ", " faults\n  ", "a_10.tif", "\n  and ", " more"))


@case("06 sizes differ within a pair")
def _(place):
    image, mask = place.data(lambda image, mask: saved(image, np.zeros((16, 20, 3), np.uint8)))
    return refused("--data", "data", words=(image.name, "20 x 16", mask.name, "16 x 16"))


@case("06 sizes differ between slices")
def _(place):
    def change(image, mask):
        saved(image, np.zeros((16, 20, 3), np.uint8))
        saved(mask, np.zeros((16, 20), np.uint8))

    return bad_image(place, change, "20 x 16", "of the same patient has 16 x 16")


@case("07 mask not binary")
def _(place):
    _, mask = place.data(lambda image, mask: saved(mask, np.arange(256, dtype=np.uint8).reshape(16, 16)))
    return refused("--data", "data", words=(mask.name, "0, 1, 2", "threshold"))


@case("07 masks of 0 and 1, and of 1 bit")
def _(place):
    def change(image, mask):
        for number, path in enumerate(sorted(image.parent.glob("*_mask.tif"))):
            values = pixels(path) > 0
            saved(path, values if number % 2 else values.astype(np.uint8))

    place.data(change)
    return Trained(("--data", "data"))


@case("08 16-bit grey image among others of 8-bit RGB")
def _(place):
    words = ("grey of 16 bits, but ", " has RGB of 8 bits; make them alike")
    return bad_image(place, lambda image, mask: saved(image, np.full((16, 16), 999, np.uint16)), *words)


@case("08 predict: a 16-bit grey image for a network of 8-bit RGB")
def _(place):
    saved(place.folder / "deep.tif", np.full((16, 16), 999, np.uint16))
    words = ("deep.tif: grey of 16 bits, but the network was trained on RGB of 8 bits",)
    return predicted(place.finished / "best.npz", "deep.tif", words=words)


@case("08 32-bit integer image")
def _(place):
    return bad_image(place, lambda image, mask: saved(image, np.full((16, 16), 999, np.int32)), "32 bits")


for mode, words in {"RGBA": "transparency", "P": "palette", "CMYK": "CMYK"}.items():

    @case(f"09 {mode} image")
    def _(place, mode=mode, words=words):
        return bad_image(place, lambda image, mask: saved(image, RGB, mode), words, "expected grey or RGB")


@case("10 several pages")
def _(place):
    pages = [Image.fromarray(RGB)]
    return bad_image(
        place, lambda image, mask: saved(image, RGB, save_all=True, append_images=pages), "more than one picture"
    )


@case("10 several planes behind one header, as ImageJ writes them")
def _(place):
    def change(image, mask):
        saved(image, RGB, tiffinfo={270: "ImageJ=1.11a\nimages=3\n"})
        with image.open("ab") as file:
            file.write(2 * RGB.tobytes())

    return bad_image(place, change, "more than one picture")


@case("11 NaN pixels")
def _(place):
    return bad_image(place, lambda image, mask: saved(image, np.full((16, 16), np.nan, np.float32)), "32 bits")


@case("12 constant image")
def _(place):
    image, _ = place.data(lambda image, mask: saved(image, np.full((16, 16, 3), 77, np.uint8)))
    return Trained(("--data", "data"), ("warning: 1 image of one grey value", image.name))


@case("12 constant volume")
def _(place):
    def change(image, mask):
        for path in image.parent.glob("*.tif"):
            if not path.stem.endswith("_mask"):
                saved(path, np.full((16, 16, 3), 77, np.uint8))

    image, _ = place.data(change)
    return Trained(("--data", "data"), ("warning: ", "of one grey value", image.name))


@case("13 no tumour anywhere")
def _(place):
    def change(image, mask):
        for path in (place.folder / "data").rglob("*_mask.tif"):
            saved(path, np.zeros((16, 16), np.uint8))

    place.data(change)
    return Trained(("--data", "data"), ("warning: no mask shows any tumour", "Dice of two empty masks is 1"))


@case("14 too few patients")
def _(place):
    write_patients(place.folder / "data", patients=2)
    return refused("--data", "data", words=("split: ", "need 3 groups", "found 2, read more"))


@case("15 one image under two patients")
def _(place):
    image, _ = place.data()
    other = max(path for path in (place.folder / "data").rglob("*.tif") if not path.stem.endswith("_mask"))
    other.write_bytes(image.read_bytes())
    return Trained(("--data", "data"), ("warning: 1 image under two patients", image.name, other.name))


@case("16 sides of 13 x 21 pixels")
class _:
    """Not refused: padded, cropped back, and as large as it came."""

    def __init__(self, place):
        self.place = place

    def check(self, folder):
        Image.fromarray(np.resize(RGB, (13, 21, 3))).save(folder / "a.png")
        ended = run("predict", self.place.finished / "best.npz", "a.png", "--output", "out", cwd=folder)
        assert (ended.code, ended.err) == (0, ""), ended
        for name in ("a_mask.png", "a_overlay.png"):
            assert pixels(folder / "out" / name).shape[:2] == (13, 21)


@case("16 --image-size no multiple of 2^depth")
def _(place):
    return refused("--image-size", "100", words=("--image-size", "100", "multiple of 8"))


@case("17 smaller than 2^depth")
def _(place):
    return refused("--image-size", "8", "--preset", "small", words=("--image-size", "8", "multiple of 16"))


@case("17 one value a channel in batch norm")
def _(place):
    arguments = ("--preset", "small", "--image-size", "16", "--batch-size", "1")
    return refused(*arguments, words=("--batch-size: 1 leaves a batch of one image, which at 16 x 16 pixels",))


@case("18 an image of 1 x 1 pixels")
def _(place):
    def change(image, mask):
        for path in image.parent.glob("*.tif"):
            is_mask = path.stem.endswith("_mask")
            saved(path, np.zeros((1, 1), np.uint8) if is_mask else np.full((1, 1, 3), 9, np.uint8))

    place.data(change)
    return Trained(("--data", "data"))


@case("18 a bomb of 15000 x 15000 pixels")
def _(place):
    def change(image, mask):
        Image.new("1", (15000, 15000)).save(image, "TIFF", compression="group4")
        assert image.stat().st_size < 100_000

    return bad_image(place, change, "more pixels than the ceiling")


@case("18 a header of 10^9 pixels")
def _(place):
    return bad_image(
        place, lambda image, mask: image.write_bytes(tiff({}, bytes(100), 31623, 31623)), "pixels", "ceiling"
    )


@case("19 odd paths")
def _(place):
    deep = place.folder / ("größe mit leer\nzeile" * 6) / "-dash" / ("x" * 200) / "数据"
    deep.parent.mkdir(parents=True)
    place.data()
    (place.folder / "data").rename(deep)
    first, second, *_ = sorted(deep.iterdir())
    first.rename(deep / "-patient -x")
    second.rename(deep / "paul\nanna")
    return Trained((f"--data={deep}",))


@case("20 links, a pipe and a device named .tif")
def _(place):
    def change(image, mask):
        patient = image.parent
        for number, target in {900: "a_900.tif", 901: "nothing", 902: "/dev/zero"}.items():
            (patient / f"a_{number}.tif").symlink_to(target)
            (patient / f"a_{number}_mask.tif").write_bytes(mask.read_bytes())
        os.mkfifo(patient / "a_903.tif")
        (patient / "a_903_mask.tif").write_bytes(mask.read_bytes())

    place.data(change)
    return refused("--data", "data", words=("4 faults", *(f"a_{number}.tif" for number in range(900, 904))))


# ------------------------------------------------------------------------------------------ the 34 cases: the machine


@case("21 output is a file")
def _(place):
    (place.folder / "out").write_text("mine")
    return refused(words=("out: cannot be a run folder (File exists)",))


@case("21 output cannot be written")
def _(place):
    return Refused("train_lgg", ("--quiet", "--output", "/proc/nowhere"), ("/proc/nowhere: cannot be a run folder",))


@case("22 two runs in one folder")
class _:
    def __init__(self, place):
        self.place = place

    def check(self, folder):
        hold = (
            f"from minunet.base.run_folder import run_folder; f = run_folder({str(folder / 'out')!r}); f.__enter__(); "
        )
        before = hold + "print('held', flush=True); import sys; sys.stdin.read(); sys.exit()"
        first = subprocess.Popen(command("train_lgg", before=before), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert first.stdout.readline() == b"held\n"
        try:
            refused(words=(f"out: in use by another run (process {first.pid})",)).check(folder)
        finally:
            first.communicate(timeout=60)


FLAGS = {
    "--epochs": ("0", "-1", "1.5", "nan", "1e400", ""),
    "--batch-size": ("0", "-8", "inf", "9" * 30),
    "--learning-rate": ("0", "-1", "nan", "inf", "1e400", "1e-400", "fast"),
    "--image-size": ("0", "7", "4097", "nan"),
    "--fold": ("5", "-1"),
    "--seed": ("-1", str(2**63), "1e3"),
}
for flag, values in FLAGS.items():

    @case(f"23 {flag} out of range")
    def _(place, flag=flag, values=values):
        return RefusedAtOnce("train_lgg", (), flag, values)


@case("24 --resume of a missing folder")
def _(place):
    return resumed("nowhere", "nowhere", "give --resume the folder of a run")


@case("24 --resume without its checkpoint")
def _(place):
    place.run(lambda folder: (folder / "last.npz").unlink())
    return resumed("run", "last.npz: no such file")


def rewritten(place, change, *words):
    """The case of a run whose last.npz was changed."""

    def rewrite(folder):
        path = folder / "last.npz"
        path.write_bytes(change(path.read_bytes()))

    place.run(rewrite)
    return resumed("run", "run/last.npz: ", *words)


def flipped(content):
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    return bytes(changed)


@case("24 --resume of a truncated file")
def _(place):
    return rewritten(place, lambda content: content[:-1000], "damaged checkpoint", "truncated")


@case("24 --resume of a bit-flipped file")
def _(place):
    return rewritten(place, flipped, "damaged checkpoint (")


@case("24 --resume of a pickle")
def _(place):
    return rewritten(place, lambda content: b"\x80\x04K\x01.", "a pickle, which could run code")


def with_metadata(path, arrays=None, **changes):
    stored, metadata = archive.load(path)
    archive.save(path, stored if arrays is None else arrays, metadata | changes)


@case("24 --resume of another architecture")
def _(place):
    net = UNet(widths=(2, 3), up_kernel=2)
    place.run(lambda folder: with_metadata(folder / "last.npz", model=net.config))
    return resumed("run", "last.npz: holds another network (", "widths was [2, 3]")


@case("24 --resume of a newer format")
def _(place):
    before = "import minunet.base.archive as a; a.VERSION = 0"  # what is newer than this program
    place.run()
    return resumed("run", "last.npz: written by a newer minunet (format 2", before=before)


@case("24 --resume of a bomb")
def _(place):
    def bomb(content):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("metadata.json", bytes(10**8))
        return file.getvalue()

    return rewritten(place, bomb, "is compressed")


NO_CUPY = "import sys; sys.modules['cupy'] = None"
BROKEN = {
    "without CuPy": NO_CUPY,
    "without a driver": """
import sys, types
cupy = types.ModuleType("cupy")
class Runtime:
    def getDeviceCount(self): raise RuntimeError("CUDA driver version is insufficient\\nfor this")
cupy.cuda = types.SimpleNamespace(runtime=Runtime())
sys.modules["cupy"] = cupy
""",
    "without a device": """
import sys, types
cupy = types.ModuleType("cupy")
cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=lambda: 0))
sys.modules["cupy"] = cupy
""",
    "with half a CuPy": """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "cupy": raise RuntimeError("libcuda is not what it was")
sys.meta_path.insert(0, Broken())
""",
}
for kind, before in BROKEN.items():

    @case(f"25 --device cuda {kind}")
    def _(place, before=before):
        return refused("--device", "cuda", words=("--device cuda: CuPy", "--device cpu"), before=before)

    @case(f"26 --device auto {kind}")
    def _(place, before=before):
        return Announced(before)


@dataclass(frozen=True)
class Announced:
    """``auto`` says in one line why it takes the CPU. (The run then ends with the data folder, which is not there.)"""

    before: str

    def check(self, folder):
        ended = run("train_lgg", "--data", "nowhere", "--quiet", cwd=folder, before=self.before)
        assert ended.code == 2
        assert [line[:18] for line in ended.out.splitlines() if "CuPy" in line] == ["device: cpu (CuPy "]
        assert (
            ended.err == "error: nowhere: no such folder; expected one that holds " + ended.err.partition("holds ")[2]
        )
        assert tree(folder) == {}


# What is run after the first epoch of a training, in its process.
AFTER_AN_EPOCH = """
from minunet.training import loop
def once_an_epoch(run, finish=loop._Run.finish_epoch):
    finish(run)
    {}
loop._Run.finish_epoch = once_an_epoch
"""


@dataclass(frozen=True)
class Broken:
    """A training of two epochs to which something happens after the first one.

    It ends with ``code`` and one line with all ``words``; last.npz is that of the first epoch, and loads; and without
    what happened, the run goes on to the end.
    """

    place: Place
    happens: str  # in Python; ``run`` is the own state of loop.fit
    code: int
    words: tuple
    arguments: tuple = ()
    output: str = "out"
    mend: Callable[[], object] = lambda: None  # undoes what happened, where it does not end with the process

    def check(self, folder):
        arguments = ("--data", self.place.patients, *SMALL, *self.arguments, "--epochs", "2", "--output", self.output)
        before = NO_PICTURES + AFTER_AN_EPOCH.format(self.happens)
        ended = run("train_lgg", *arguments, cwd=folder, before=before)
        assert ended.code == self.code, ended
        (line,) = ended.err.splitlines()
        assert line.startswith("error: ")
        for word in self.words:
            assert word in line, ended
        assert progress(folder / self.output)["epoch"] == 1
        assert sorted(path.name for path in (folder / self.output).iterdir()) == UNFINISHED
        self.mend()
        ended = run("train_lgg", "--resume", self.output, "--quiet", cwd=folder, before=NO_PICTURES)
        assert (ended.code, ended.err) == (0, "")
        assert progress(folder / self.output)["finished"]


UNFINISHED = sorted([".lock", "best.npz", "config.json", "history.csv", "last.npz", "samples.png"])
NO_MORE_MEMORY = """
    import ctypes, pathlib, resource
    ctypes.CDLL(None).malloc_trim(0)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, resource.RLIM_INFINITY))"""


@case("27 out of memory")
def _(place):
    words = ("--batch-size: out of memory, a step on a batch of 300 takes about ", " GB are free, choose at most ")
    # At 64 pixels the arrays of a step are too large for the allocator to keep: freed, they leave the process. And the
    # plain path: the CPU's engine has all its memory before the first step, and asks for no more.
    arguments = ("--batch-size", "300", "--image-size", "64", "--engine", "plain")
    return Broken(place, NO_MORE_MEMORY, 2, words, arguments)


def disk(place, megabytes):
    """A small disk of its own at ``disk``, taken off when the test ends. Root alone may do that."""
    (place.folder / "disk").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", place.folder / "disk"]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    place.at_the_end(["umount", "-l", place.folder / "disk"])


@case("21 the disk fills up in mid-run")
def _(place):
    disk(place, 24)
    happens = """
    with open("disk/filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)): pass
        except OSError: pass"""
    words = ("npz: cannot be written (No space left on device), free some space", "what was there before is unchanged")
    return Broken(place, happens, 2, words, output="disk/out", mend=lambda: (place.folder / "disk" / "filler").unlink())


@case("21 the disk becomes read-only in mid-run")
def _(place):
    disk(place, 24)

    def remount(how):
        subprocess.run(["mount", "-o", f"remount,{how}", place.folder / "disk"], check=True)

    # A file open for writing, as the lock is, keeps a disk from becoming read-only.
    happens = """
    import os, subprocess
    for number in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{number}") and os.readlink(f"/proc/self/fd/{number}").endswith(".lock"):
            os.dup2(os.open(os.devnull, os.O_RDWR), int(number))
    subprocess.run(["mount", "-o", "remount,ro", "disk"], check=True)"""
    words = ("npz: cannot be written (Read-only file system), choose a folder you may write to",)
    return Broken(place, happens, 2, words, output="disk/out", mend=lambda: remount("rw"))


@case("21 a quota on the size of files in mid-run")
def _(place):
    happens = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))"
    return Broken(
        place, happens, 2, ("npz: cannot be written (File too large), raise the limit on file sizes (ulimit -f)",)
    )


@case("21 a disk too small for one checkpoint")
class _:
    """Found before the first step. What was written whole stays; nothing is there by half."""

    def __init__(self, place):
        disk(place, 3)

    def check(self, folder):
        ended = run("train_lgg", *SMALL, "--epochs", "1", "--output", "disk/out", cwd=folder)
        assert ended.code == 2, ended
        assert ended.err.startswith("error: disk/out/last.npz: cannot be written (No space left on device), free some")
        assert set(tree(folder / "disk" / "out")) == {".lock", "config.json", "samples.png"}


@case("28 a weight is not finite")
def _(place):
    happens = "run.net.parameters()['up1.conv2.weight'][0, 0, 0, 0] = float('nan')"
    words = ("epoch 2, step 1: ", "first in the weights up1.conv2.weight", "lower the learning rate", "PHANTOM_")
    return Broken(place, happens, 3, words)


@case("28 an image is not finite")
def _(place):
    happens = """
    def spoiled(*a, prepare=type(run.engine).prepare_batch, **o):
        batch = prepare(*a, **o)
        batch.x[1, 2, 3, 0] = float("inf")
        return batch
    type(run.engine).prepare_batch = spoiled"""
    return Broken(
        place, happens, 3, ("epoch 2, step 1: ", "first in the images of the batch", "the batch was ", "PHANTOM_")
    )


@case("28 a huge learning rate")
class _:
    def __init__(self, place):
        pass

    def check(self, folder):
        ended = run("train_lgg", *SMALL, "--learning-rate", "1e300", "--epochs", "1", "--output", "out", cwd=folder)
        assert ended.code == 3, ended
        (line,) = ended.err.splitlines()
        # The first step's learning rate is finite, its weights are not: the second step finds them.
        assert line.startswith(
            "error: epoch 1, step 2: the loss is nan and the norm of the gradient nan, first in the "
        )
        _, metadata = archive.load(folder / "out" / "last.npz")
        assert (metadata["progress"]["epoch"], metadata["optimizer"]["steps"]) == (0, 0)


@dataclass(frozen=True)
class Signalled:
    """A training of two epochs that gets a signal in its second one, ends with ``code``, and can be resumed."""

    number: int
    code: int
    place: Place

    def check(self, folder):
        arguments = ("--data", self.place.patients, *SMALL, "--epochs", "2", "--output", "out")
        before = NO_PICTURES + AFTER_AN_EPOCH.format(f"import os; os.kill(os.getpid(), {int(self.number)})")
        ended = run("train_lgg", *arguments, cwd=folder, before=before)
        assert ended.code == self.code, ended
        if self.number == signal.SIGKILL:
            assert ended.err == ""
        else:
            assert ended.err == "\nstopping after this step, once the state is saved; again to leave at once\n"
        assert sorted(path.name for path in (folder / "out").iterdir()) == UNFINISHED
        assert run("train_lgg", "--resume", "out", "--quiet", cwd=folder, before=NO_PICTURES).code == 0
        assert weights(folder / "out") == weights(self.place.finished)
        assert weights(folder / "out", "best.npz") == weights(self.place.finished, "best.npz")


@case("29 Ctrl-C")
def _(place):
    return Signalled(signal.SIGINT, 130, place)


@case("30 SIGTERM")
def _(place):
    return Signalled(signal.SIGTERM, 143, place)


@case("30 SIGHUP, a closed terminal")
def _(place):
    return Signalled(signal.SIGHUP, 129, place)


@case("30 SIGUSR1, a scheduler's warning")
def _(place):
    return Signalled(signal.SIGUSR1, 128 + signal.SIGUSR1, place)


@case("31 SIGKILL")
def _(place):
    return Signalled(signal.SIGKILL, -9, place)


@case("32 stdout closed")
class _:
    """As before ``| head``: whatever is printed then is nobody's. Exit code 141 and not a word."""

    def __init__(self, place):
        pass

    def check(self, folder):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            command("train_lgg", "--quiet", *SMALL, "--output", "out"),
            cwd=folder,
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=600,
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (141, b"")
        assert tree(folder) == {}


class Changed:
    """A run that is stopped after its first epoch and cannot be resumed when ``change`` has been at its folder."""

    def __init__(self, place, change, part):
        self.place, self.change, self.part = place, change, part

    def check(self, folder):
        self.place.data()
        before = NO_PICTURES + AFTER_AN_EPOCH.format("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
        arguments = ("--data", "data", *SMALL, "--epochs", "2", "--output", "out")
        assert run("train_lgg", *arguments, cwd=folder, before=before).code == 143
        self.change(folder)
        resumed("out", f"last.npz: belongs to another run ({self.part}_sha256 was ").check(folder)


@case("33 data changed between two parts of a run")
def _(place):
    def change(folder):
        for path in (folder / "data").rglob("*.tif"):
            if not path.stem.endswith("_mask"):
                saved(path, pixels(path) ^ 1)

    return Changed(place, change, "train")


@case("34 a last batch of one")
def _(place):
    # The phantom has 300 training slices, and the preset draws as many: 299 and 1.
    return Trained(("--batch-size", "299"))


# ------------------------------------------------------------------------------------------ ten more


@case("x01 a flag that does not exist")
def _(place):
    return refused("--epoch", "3", words=("--epoch",))


@case("x02 a flag together with --resume")
def _(place):
    place.run()
    return Refused("train_lgg", ("--resume", "run", "--epochs", "9"), ("--epochs", "not together with --resume"))


@case("x03 a run's config.json that is no JSON")
def _(place):
    place.run(lambda folder: (folder / "config.json").write_text("{"))
    return resumed("run", "config.json: no settings of a run")


def with_settings(**changes):
    """A change of a run folder: other settings in its config.json."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["options"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return change


FORGED_SETTINGS = {
    "preset=[]": {"preset": []},
    "preset of another name": {"preset": "huge"},
    "preset gone": {"preset": None},
    "epochs a string": {"epochs": "3"},
    "epochs a truth": {"epochs": True},
    "epochs negative": {"epochs": -1},
    "fold=9": {"fold": 9},
    "fold a fraction": {"fold": 0.5},
    "learning rate a string": {"learning_rate": "NaN"},
    "learning rate not a number": {"learning_rate": math.nan},
    "learning rate infinite": {"learning_rate": math.inf},
    "data=5": {"data": 5},
    "data a list": {"data": ["data"]},
    "data no text": {"data": "\ud800"},
    "data with a zero": {"data": "a\0b"},
    "split=5": {"split": 5},
    "augment an object": {"augment": {"flip": 1}},
    "image size of a billion": {"image_size": 1e9},
    "image size of nine digits": {"image_size": 10**9},
    "batch size of a hundred digits": {"batch_size": 10**100},
    "seed a fraction": {"seed": 1.0 + 1e-9},
    "allow_missing a string": {"allow_missing": "yes"},
}

for forgery, settings in FORGED_SETTINGS.items():

    @case(f"x16 forged settings: {forgery}")
    def _(place, settings=settings):
        place.run(with_settings(**settings))
        a_path = isinstance(settings.get("data"), str)
        return resumed("run", "no such folder" if a_path else "config.json: no settings of a run (")


@case("x17 a config.json of brackets")
def _(place):
    place.run(lambda folder: (folder / "config.json").write_text("[" * 200_000))
    return resumed("run", "config.json: no settings of a run (RecursionError)")


@case("x18 a config.json that is a pipe")
def _(place):
    def change(folder):
        (folder / "config.json").unlink()
        os.mkfifo(folder / "config.json")

    place.run(change)
    return resumed("run", "config.json: no settings of a run (ValueError)")


@case("x19 an endless config.json")
def _(place):
    def change(folder):
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to("/dev/zero")

    place.run(change)
    return resumed("run", "config.json: no settings of a run (ValueError)")


@case("x04 a run's data that have gone")
def _(place):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["options"]["data"] = str(place.folder / "gone")
        (folder / "config.json").write_text(json.dumps(config))

    place.run(change)
    return resumed("run", "gone: no such folder")


@case("x05 one patient in two folders")
def _(place):
    image, _ = place.data()
    image.parent.rename(image.parent.with_name("anna_20010101"))
    subprocess.run(
        ["cp", "-r", place.folder / "data" / "anna_20010101", place.folder / "data" / "anna_20020202"], check=True
    )
    return refused("--data", "data", words=("anna_20020202: the same patient as anna_20010101",))


@case("x06 a socket named .tif")
def _(place):
    image, _ = place.data()
    server = socket.socket(socket.AF_UNIX)
    # The path of a socket may not be long: bound from its folder.
    here = os.open(".", os.O_RDONLY)
    os.chdir(image.parent)
    try:
        image.unlink()
        server.bind(image.name)
    finally:
        os.fchdir(here)
        os.close(here)
        server.close()
    return refused("--data", "data", words=(image.name, "not a regular file"))


@case("x07 a TIFF whose strips lie behind its end")
def _(place):
    def change(image, mask):
        content = bytearray(tiff({258: (3, [8] * 3), 262: (3, [2]), 277: (3, [3])}, RGB.tobytes(), 16, 16))
        place_of_offset = content.index(struct.pack("<HHI", 273, 4, 1)) + 8
        content[place_of_offset : place_of_offset + 4] = struct.pack("<I", 2**31)
        image.write_bytes(content)

    return bad_image(place, change, "cannot be read")


@case("x08 predictions that are there already")
def _(place):
    Image.fromarray(RGB).save(place.folder / "a.png")
    (place.folder / "out").mkdir()
    (place.folder / "out" / "a_mask.png").write_text("hours of work by hand")
    return predicted(place.finished / "best.npz", "a.png", words=("out/a_mask.png: is there already",))


@case("x09 two images with one name")
def _(place):
    for name in ("first", "second"):
        (place.folder / name).mkdir()
        Image.fromarray(RGB).save(place.folder / name / "a.png")
    return predicted(place.finished / "best.npz", "first", "second", words=("a.png: named like", "two folders"))


@case("x10 checkpoint and image exchanged")
def _(place):
    Image.fromarray(RGB).save(place.folder / "a.png")
    return predicted("a.png", place.finished / "best.npz", words=("a.png: not a minunet checkpoint",))


@case("x11 an image cut short among those to predict")
def _(place):
    for name in ("a", "b"):
        Image.fromarray(RGB).save(place.folder / f"{name}.png")
    content = (place.folder / "b.png").read_bytes()
    (place.folder / "b.png").write_bytes(content[:200])
    return predicted(place.finished / "best.npz", "a.png", "b.png", words=("b.png: cannot be read",))


@case("x12 a threshold out of range")
def _(place):
    return RefusedAtOnce("predict", ("run.npz", "a.png"), "--threshold", ("1", "-0.1", "nan", "half"))


@case("x13 synthetic patients of 8 x 8 pixels")
def _(place):
    return refused("--image-size", "8", words=("--image-size: 8 is too small",))


@case("x14 test patients changed between two parts of a run")
def _(place):
    def change(folder):
        tested = json.loads((folder / "out" / "config.json").read_text())["patients"]["test"]
        for path in (folder / "data").rglob("*_mask.tif"):
            if path.name.startswith(tuple(tested)):
                saved(path, pixels(path)[::-1])

    return Changed(place, change, "test")


@case("x15 control characters in names")
class _:
    """A terminal would obey them: clear the screen, rename the window, colour a line."""

    def __init__(self, place):
        self.place = place

    def check(self, folder):
        evil = "\x1b[2J\x1b]0;x\x07\n\r"
        shutil.copytree(self.place.patients, folder / f"data{evil}")
        for patient in [path for path in (folder / f"data{evil}").iterdir() if path.is_dir()]:
            patient.rename(patient.with_name(patient.name + evil))
        before = AFTER_AN_EPOCH.format("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
        arguments = ("--data", f"data{evil}", *SMALL, "--epochs", "2", "--output", f"out{evil}")
        first = run("train_lgg", *arguments, cwd=folder, before=before)
        second = run("train_lgg", "--resume", f"out{evil}", cwd=folder)
        slices = sorted((folder / f"data{evil}").iterdir())[0]
        third = run("predict", folder / f"out{evil}" / "best.npz", slices, "--output", f"masks{evil}", cwd=folder)
        assert [ended.code for ended in (first, second, third)] == [143, 0, 0], (first, second, third)
        for ended in (first, second, third):
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", ended.out), repr(ended.out)
        assert r"go on with: " in first.out
        assert r"everything lies in out\x1b[2J\x1b]0;x\x07\n\r: best.npz, " in second.out


# ------------------------------------------------------------------------------------------ the test


def test_every_case_is_there():
    numbers = {name[:2] for name in CASES}
    assert {f"{number:02}" for number in range(1, 35)} <= numbers
    assert sum(name.startswith("x") for name in CASES) >= 10


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, place):
    CASES[name](place).check(place.folder)
