"""Reads LGG-MRI as Kaggle has it ("lgg-mri-segmentation", Buda et al. 2019), and any folder laid out like it::

    kaggle_3m/
        TCGA_CS_4941_19960909/              one folder a patient: the patient's name, and maybe _<date>
            TCGA_CS_4941_19960909_1.tif         image, 8-bit RGB: pre-contrast, FLAIR, post-contrast
            TCGA_CS_4941_19960909_1_mask.tif    mask, one channel: 0 and 255, 0 and 1, 0 and 65535, or 1-bit
            ...
            TCGA_CS_4941_19960909_10.tif        comes after 9, not after 1: numbers are sorted as numbers

A folder of data is read once, before any training, and everything that is wrong in it is said at once, by file name.
A file is not to be trusted: it may be cut short, be something else under the name of a picture, claim a size that
fills the memory, or be a pipe that never ends. ``_open`` is the only door in.

An image of 16 bits a channel is refused, and not scaled: a scanner fills 12 of the 16, or 10, or all, so that one file
does not tell the scale, and Pillow would keep the upper 8 bits, in which 12-bit data have 16 grey values left.
"""

import io
import logging
import math
import os
import re
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minunet.base.errors import UserError
from minunet.data.slices import SliceSet

if TYPE_CHECKING:
    from PIL import Image, ImageFile

#: No image above this many pixels is decoded: 8192 x 8192.
MAX_PIXELS = 64 * 2**20
#: No file above this many bytes is opened: more than any such image needs.
MAX_BYTES = 4 * MAX_PIXELS
#: So many bytes are read before the size of the image must be known: a list of a million strips is not read to its end.
MAX_HEADER_BYTES = 2 * 2**20
#: So many faults of a data set are spelled out; the others are counted.
FAULTS_SHOWN = 20

#: Files are decoded in so many threads.
THREADS = min(4, os.cpu_count() or 1)

_LAYOUT = "<patient>/<name>_<number>.tif with <name>_<number>_mask.tif beside it"
NO_PAIRS = f"no pair of image and mask found; expected {_LAYOUT}"
_FILE_NAME = re.compile(r"(?P<stem>.+?)_(?P<number>\d{1,9})(?P<mask>_mask)?\.tiff?", re.IGNORECASE | re.DOTALL)


class Pair(NamedTuple):
    """One slice on disk."""

    patient: str
    number: int
    image: Path
    mask: Path


class Listing(NamedTuple):
    """What a folder holds, by file names alone."""

    pairs: list[Pair]  # in the order of patients, then of slice numbers
    unpaired: list[Path]  # images without a mask and masks without an image
    faults: list[str]  # what else is wrong, one line each


def patient_id(folder_name: str) -> str:
    r"""The patient in a folder's name: the name without a date of 8 digits at its end.

    Bytes that are no UTF-8 are escaped: not every library that gets the name can show them.

    >>> patient_id("TCGA_CS_4941_19960909"), patient_id("anna"), patient_id(os.fsdecode(b"ren\xe9"))
    ('TCGA_CS_4941', 'anna', 'ren\\udce9')
    """
    name = re.sub(r"(?<=.)_\d{8}\Z", "", folder_name)
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


# ------------------------------------------------------------------------------------------ reading a data set


def read_folder(
    folder: str | os.PathLike[str],
    size: int,
    *,
    allow_missing: bool = False,
    limit: int | None = None,
    patients: Sequence[str] | None = None,
) -> SliceSet:
    """All slices below ``folder``, resized to ``size`` x ``size`` pixels (a side ratio other than 1 is not kept).

    folder         the folder of the patients' folders, or one that holds it under the name ``kaggle_3m``
    allow_missing  leave out an image without a mask and a mask without an image (they are listed in the
                   result's ``skipped``) instead of refusing the folder
    limit          read the first so many slices only, in the order of the result (the reference reads 1600)
    patients       read these patients only (names as in ``patient_id``)

    Raises UserError with everything that is wrong, and ValueError if ``size`` or ``limit`` is below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    pairs, unpaired, faults = list_folder(folder, patients=patients)
    if not allow_missing:
        faults += missing_partners(unpaired)
    pairs = pairs[:limit]

    images = np.empty((len(pairs), size, size, 3), np.uint8)
    masks = np.empty((len(pairs), size, size, 1), np.uint8)

    def keep(index: int, image: np.ndarray, mask: np.ndarray) -> None:
        # Resized at once and put in its place, so that at no time more than a few full-size slices are in memory.
        images[index], masks[index, ..., 0] = resize_image(image, size), resize_mask(mask, size)

    faults += read_pairs(pairs, keep)
    if faults:
        raise UserError(_one_line(folder, faults))
    if not pairs:
        raise UserError(f"{shown(folder)}: {NO_PAIRS}")
    return SliceSet(
        images=images,
        masks=masks,
        patients=tuple(pair.patient for pair in pairs),
        numbers=tuple(pair.number for pair in pairs),
        files=tuple(str(pair.image) for pair in pairs),
        skipped=tuple(str(path) for path in unpaired),
    )


def read_pairs(pairs: Sequence[Pair], use: Callable[[int, np.ndarray, np.ndarray], None]) -> list[str]:
    """Reads the slices and hands each over, ``use(index, image, mask)``; returns what is wrong with the others.

    image uint8 (H, W, 3), mask uint8 (H, W) of 0 and 1, as large as in their files. ``use`` is called from several
    threads, for one index once. Slices of one patient that differ in size are handed over, and are a fault.
    """

    def read(index: int) -> tuple[tuple[int, ...] | None, list[str]]:
        image, mask, found = _read_pair(pairs[index])
        if image is None or mask is None:
            return None, found
        use(index, image, mask)
        return image.shape[:2], found

    # Pillow decodes and resizes outside Python's lock, so that a few threads do help.
    with _pillow_warnings(), ThreadPoolExecutor(max_workers=THREADS) as pool:
        results = list(pool.map(read, range(len(pairs))))

    faults = []
    first_of: dict[str, int] = {}
    for index, (shape, found) in enumerate(results):
        faults += found
        if shape is None:
            continue
        first = first_of.setdefault(pairs[index].patient, index)
        expected = results[first][0]
        if shape != expected:
            neighbour = f"{shown(pairs[first].image)} of the same patient has {_pixels(expected)}"
            faults.append(f"{shown(pairs[index].image)}: {_pixels(shape)}, but {neighbour}; make them equal")
    return faults


def list_folder(folder: str | os.PathLike[str], *, patients: Sequence[str] | None = None) -> Listing:
    """Finds the slices below ``folder`` by their names; opens no file.

    Hidden files, and files that are not named ``.tif`` or ``.tiff``, are passed over.

    Raises UserError if ``folder`` is absent, not a folder or unreadable, or a patient asked for is not there.
    """
    root = Path(folder)
    if _is_folder(root / "kaggle_3m"):
        root = root / "kaggle_3m"
    folders: dict[str, Path] = {}
    faults = []
    for name in _names_in(root):
        if name.startswith(".") or not _is_folder(root / name):
            continue
        other = folders.setdefault(patient_id(name), root / name)
        if other != root / name:
            faults.append(f"{shown(root / name)}: the same patient as {shown(other.name)}; keep one scan a patient")
    if patients is not None:
        absent = sorted(set(patients) - set(folders))
        if absent:
            raise UserError(f"{shown(root)}: no folder of patient {', '.join(absent[:FAULTS_SHOWN])}")
        folders = {name: path for name, path in folders.items() if name in set(patients)}

    pairs: list[Pair] = []
    unpaired: list[Path] = []
    for patient in sorted(folders):
        try:
            images, masks = _find_images(folders[patient], faults)
        except UserError as error:
            faults.append(str(error))
            continue
        for number in sorted(images.keys() | masks.keys()):
            if number in images and number in masks:
                pairs.append(Pair(patient, number, images[number], masks[number]))
            else:
                unpaired.append(images.get(number) or masks[number])
    return Listing(pairs, unpaired, faults)


def _find_images(folder: Path, faults: list[str]) -> tuple[dict[int, Path], dict[int, Path]]:
    """The images and the masks in one patient's folder, by slice number; what does not fit is added to ``faults``."""
    images: dict[int, Path] = {}
    masks: dict[int, Path] = {}
    for name in _names_in(folder):
        path = folder / name
        if name.startswith(".") or path.suffix.lower() not in (".tif", ".tiff"):
            continue
        match = _FILE_NAME.fullmatch(name)
        if match is None:
            faults.append(
                f"{shown(path)}: not named <name>_<number>.tif or <name>_<number>_mask.tif; rename or remove it"
            )
            continue
        kind = masks if match["mask"] else images
        other = kind.setdefault(int(match["number"]), path)
        if other != path:
            faults.append(f"{shown(path)}: the same slice number as {shown(other.name)}; keep one of them")
    return images, masks


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no permission to look, a name too long: not one that can be read
        return False


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        raise UserError(f"{shown(folder)}: no such folder; expected one that holds {_LAYOUT}") from None
    except NotADirectoryError:
        raise UserError(f"{shown(folder)}: not a folder; expected one that holds {_LAYOUT}") from None
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be listed ({error.strerror}); check its permissions") from None


# ------------------------------------------------------------------------------------------ reading a file


def read_image(
    path: str | os.PathLike[str], size: int | None = None, formats: Sequence[str] = ("TIFF", "PNG", "JPEG")
) -> np.ndarray:
    """One image as uint8 (H, W, 3), resized to ``size`` x ``size`` if a size is given.

    Raises UserError, naming the file, unless it is a regular file that holds one 8-bit RGB image in one of
    ``formats`` (Pillow's names).
    """
    with _pillow_warnings():
        image = _decode_image(Path(path), formats)
    return image if size is None else resize_image(image, size)


def read_mask(path: str | os.PathLike[str], formats: Sequence[str] = ("TIFF", "PNG")) -> np.ndarray:
    """One mask as uint8 (H, W) of 0 and 1.

    Raises UserError, naming the file, unless it is a regular file that holds one image of one channel whose values
    are 0 and 255, or 0 and 1, or, with 16 bits, 0 and 65535.
    """
    with _pillow_warnings():
        return _decode_mask(Path(path), formats)


def _read_pair(pair: Pair) -> tuple[np.ndarray | None, np.ndarray | None, list[str]]:
    """Image (H, W, 3) and mask (H, W) of one slice, None for one that cannot be read, and what is wrong with them."""
    image = mask = None
    faults = []
    try:
        image = _decode_image(pair.image, ("TIFF",))
    except UserError as error:
        faults.append(str(error))
    try:
        mask = _decode_mask(pair.mask, ("TIFF",))
    except UserError as error:
        faults.append(str(error))
    if image is not None and mask is not None and image.shape[:2] != mask.shape:
        its_mask = f"its mask {shown(pair.mask)} has {_pixels(mask.shape)}"
        faults.append(f"{shown(pair.image)}: {_pixels(image.shape)}, but {its_mask}; make them equal")
        image = mask = None
    return image, mask, faults


def _decode_image(path: Path, formats: Sequence[str]) -> np.ndarray:
    with _open(path, formats) as picture:
        if picture.mode == "L":
            raise UserError(
                f"{shown(path)}: one grey channel, expected 8-bit RGB (three channels); "
                'if it is to count as all three, save Image.open(path).convert("RGB")'
            )
        if picture.mode != "RGB":
            raise UserError(f"{shown(path)}: {_described(picture)}, expected 8-bit RGB (three channels); convert it")
        return np.array(picture)


def _decode_mask(path: Path, formats: Sequence[str]) -> np.ndarray:
    with _open(path, formats, bits=16) as picture:
        if picture.mode not in ("L", "1") and not picture.mode.startswith("I;16"):
            raise UserError(
                f"{shown(path)}: {_described(picture)}, expected a mask of one channel (8-bit grey or 1-bit); "
                "save it as one, tumour 255 and all else 0"
            )
        mask = np.array(picture)
    tumour = mask != 0
    if mask.max() not in (0, 1, 255, 65535) or np.any(tumour & (mask != mask.max())):
        values = np.unique(mask)
        listed = ", ".join(str(value) for value in values[:8]) + (", ..." if len(values) > 8 else "")
        raise UserError(
            f"{shown(path)}: a mask with the values {listed}; expected 0 and 255, or 0 and 1: threshold it first"
        )
    return tumour.astype(np.uint8)


@contextmanager
def _open(path: Path, formats: Sequence[str], bits: int = 8) -> "Iterator[ImageFile.ImageFile]":
    """The decoded picture in ``path``. Whatever goes wrong, here or in the body, is a UserError that names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        if size_of(path) > MAX_BYTES:
            raise UserError(f"{shown(path)}: above the ceiling of {MAX_BYTES} bytes; make it smaller")
        with _Reader(path.open("rb", buffering=0)) as file, Image.open(file, formats=tuple(formats)) as picture:
            # The header alone has been read. Nothing is decoded before its size is known to be sane.
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise UserError(
                    f"{shown(path)}: {width} x {height} pixels, above the ceiling of {MAX_PIXELS}; make it smaller"
                )
            if getattr(picture, "is_animated", False):  # and not n_frames, which follows a chain of any length
                raise UserError(f"{shown(path)}: more than one picture in the file; save them one by one")
            if _bits(picture) > bits:
                raise UserError(
                    f"{shown(path)}: {_bits(picture)} bits a channel, expected 8; scale it to 0 ... 255, "
                    "all slices of a patient by the same factor"
                )
            file.allowance = math.inf
            with _STDERR_SILENCED if _is_compressed(picture) else nullcontext():
                picture.load()
            yield picture
    except UserError:
        raise
    except Exception as error:
        # A decoder fed with garbage raises almost anything: SyntaxError, struct.error, KeyError, ...
        if isinstance(error, UnidentifiedImageError):
            found = f"not a readable {' or '.join(formats)} picture"
        elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            found = f"more pixels than the ceiling of {MAX_PIXELS}"
        elif isinstance(error, OSError) and error.strerror:
            found = error.strerror.lower()
        else:
            found = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{shown(path)}: cannot be read ({found}); replace or remove it") from None


class _Reader(io.BufferedReader):
    """A file that gives out no more than its allowance of bytes, which starts with those of a header."""

    allowance: float = MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.allowance -= len(data)
        if self.allowance < 0:
            # No OSError: Pillow takes that for the end of the file, and goes on.
            raise UserError(f"{shown(self.name)}: a header of more than {MAX_HEADER_BYTES} bytes; save it anew")
        return data


def size_of(path: Path) -> int:
    """The size of a regular file in bytes; raises UserError for anything else, and OSError where it cannot be seen.

    To be asked before opening: opening a pipe waits for whoever writes into it, reading a device may never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{shown(path)}: not a regular file; replace it by a picture or remove it")
    return status.st_size


@contextmanager
def _pillow_warnings() -> Iterator[None]:
    """Pillow's warning of a picture too large becomes an error; its remarks on odd metadata, which name no file, go.

    Warning filters belong to the process: this is entered once, around the threads and not in them.
    """
    from PIL import Image

    logging.getLogger("PIL").addHandler(_NOWHERE)  # else, where nobody asked for a log, Python prints it
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


_NOWHERE = logging.NullHandler()


class _StderrSilenced:
    """While any thread is inside, what the process prints to stderr goes nowhere.

    libtiff, which decodes compressed TIFFs, prints what it thinks of a damaged one there and names no file.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stderr: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1 and sys.__stderr__ is not None:  # closed, its number may be another file's by now
                self._stderr = os.dup(2)
                _redirect_stderr(os.open(os.devnull, os.O_WRONLY))

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._stderr is not None:
                _redirect_stderr(self._stderr)
                self._stderr = None


_STDERR_SILENCED = _StderrSilenced()


def _redirect_stderr(descriptor: int) -> None:
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _is_compressed(picture: "ImageFile.ImageFile") -> bool:
    return any(tile[0] == "libtiff" for tile in picture.tile)


def _bits(picture: "ImageFile.ImageFile") -> int:
    """Bits a channel in the file. ``mode`` does not say: Pillow reduces 16-bit RGB to 8 bits without a word."""
    from PIL import TiffImagePlugin

    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return max(picture.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    return 16 if ";16" in str(picture.tile) else 8


# ------------------------------------------------------------------------------------------ resizing


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """``image``, uint8 (H, W, 3), at ``size`` x ``size`` pixels; the same array if it has that size.

    Bilinear, and where it shrinks the triangle is as wide as the step between the new pixels: every old
    pixel counts, none is skipped (anti-aliasing).
    """
    from PIL import Image

    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """``mask``, uint8 (H, W) of 0 and 1, at ``size`` x ``size``: 1 where at least half of the new pixel's area is 1.

    >>> resize_mask(np.array([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]], np.uint8), 2)
    array([[1, 0],
           [0, 0]], dtype=uint8)
    """
    height, width = mask.shape
    if (height, width) == (size, size) or not mask.any():
        return mask if (height, width) == (size, size) else np.zeros((size, size), np.uint8)
    # In bands of 256 rows, so that the product's float64 copy of a large mask does not fill the memory.
    rows = _overlaps(height, size)
    area = sum(rows[:, i : i + 256] @ mask[i : i + 256] for i in range(0, height, 256)) @ _overlaps(width, size).T
    return (2 * area >= height * width).astype(np.uint8)


@lru_cache(maxsize=16)
def _overlaps(old: int, new: int) -> np.ndarray:
    """(new, old): how much of each old pixel lies in each new one, along one axis.

    In units in which the whole axis is old * new long, an old pixel is ``new`` long and a new pixel ``old``. All
    overlaps are then whole numbers, float64 adds them exactly, and "at least half" has no rounding error.
    """
    old_start, new_start = new * np.arange(old), old * np.arange(new)[:, None]
    ends = np.minimum(old_start + new, new_start + old) - np.maximum(old_start, new_start)
    return np.maximum(ends, 0).astype(np.float64)


# ------------------------------------------------------------------------------------------ words for people


def _described(picture: "Image.Image") -> str:
    """The channels of a picture, in words."""
    words = {"RGB": "RGB", "RGBA": "RGB with transparency", "LA": "grey with transparency", "P": "palette colours"}
    return words.get(picture.mode, f"mode {picture.mode}")


def shown(path: str | os.PathLike[str]) -> str:
    r"""A path in one line: letters of any script stay, a newline or another character that does not print is escaped.

    >>> print(shown("größe 1" + chr(10) + ".tif"))
    größe 1\n.tif
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in os.fspath(path)
    )


def _pixels(shape: Sequence[int] | None) -> str:
    return "unknown" if shape is None else f"{shape[1]} x {shape[0]} pixels"


def missing_partners(unpaired: Sequence[Path]) -> list[str]:
    """A fault for each image without a mask and each mask without an image."""
    return [
        f"{shown(path)}: no {'image' if path.stem.lower().endswith('_mask') else 'mask'} beside it; "
        "add it, or leave such files out with --allow-missing"
        for path in unpaired
    ]


def _one_line(folder: str | os.PathLike[str], faults: Sequence[str]) -> str:
    """All faults as one line: each names its file already; the folder and the count come first if there are several."""
    if len(faults) == 1:
        return faults[0]
    more = f"; and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
    return f"{shown(folder)}: {len(faults)} faults: " + "; ".join(faults[:FAULTS_SHOWN]) + more
