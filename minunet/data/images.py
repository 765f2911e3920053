"""Image files: found, opened with care, decoded, resized.

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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minunet.base.errors import UserError

if TYPE_CHECKING:
    from PIL import Image, ImageFile

#: No image above this many pixels is decoded: 8192 x 8192.
MAX_PIXELS = 64 * 2**20
#: No file above this many bytes is opened: more than any such image needs.
MAX_BYTES = 4 * MAX_PIXELS
#: So many bytes are read before the size of the image must be known: a list of a million strips is not read to its end.
MAX_HEADER_BYTES = 2 * 2**20

#: Files of a folder with another ending are no images.
IMAGE_ENDINGS = (".tif", ".tiff", ".png", ".jpg", ".jpeg")

#: Masks, and the overlays that examples/predict.py writes, are no images; with several classes they are numbered.
_NO_IMAGE = re.compile(r".*_(mask|overlay)\d*", re.IGNORECASE | re.DOTALL)


def find_volumes(paths: Iterable[str | os.PathLike[str]]) -> list[list[Path]]:
    """The image files that ``paths`` (files, and folders of files) name, those of one folder together.

    Files called ``<anything>_mask.<ending>`` or ``<anything>_overlay.<ending>`` are left out, so that a patient's
    folder of LGG-MRI can be given as it is, and one that holds predictions already. So are the hidden files of a
    folder (``._1.tif`` of a Mac). Folders in folders are not searched.

    Raises UserError for a path that is not there or holds no image.
    """
    volumes: dict[Path, dict[Path, None]] = {}  # by folder; the files as keys, each once and in order
    for path in map(Path, paths):
        try:
            if path.is_dir():
                visible = (file for file in sorted(path.iterdir()) if not file.name.startswith("."))
                files = [file for file in visible if file.suffix.lower() in IMAGE_ENDINGS]
            else:
                files = [path]
        except OSError as error:
            raise UserError(f"{shown(path)}: cannot be read ({error.strerror}), check its permissions") from None
        images = [file for file in files if not _NO_IMAGE.fullmatch(file.stem)]
        if not images:
            endings = ", ".join(IMAGE_ENDINGS)
            raise UserError(
                f"{shown(path)}: no image found, give images ({endings}; masks and overlays left out) or their folder"
            )
        for file in images:
            if not file.exists():
                raise UserError(f"{shown(file)}: no such file or folder, check the path")
            volumes.setdefault(file.parent.resolve(), {})[file] = None
    return [list(files) for files in volumes.values()]


def read_image(
    path: str | os.PathLike[str], size: int | None = None, formats: Sequence[str] = ("TIFF", "PNG", "JPEG")
) -> np.ndarray:
    """One image as uint8 (H, W, 3), resized to ``size`` x ``size`` if a size is given.

    It is turned and mirrored as its orientation says (an EXIF or TIFF tag), and so is a mask.

    Raises UserError, naming the file, unless it is a regular file that holds one 8-bit RGB image in one of
    ``formats`` (Pillow's names).
    """
    with pillow_warnings():
        image = decode_image(Path(path), formats)
    return image if size is None else resize_image(image, size)


def read_mask(path: str | os.PathLike[str], formats: Sequence[str] = ("TIFF", "PNG")) -> np.ndarray:
    """One mask as uint8 (H, W) of 0 and 1.

    The values are those that the file stores. A TIFF may say that 0 is to be shown as white ("photometric
    interpretation" 0), as tifffile does of boolean arrays and ImageJ of masks with its inverting colour table; what
    they call true or 255 is the tumour all the same.

    Raises UserError, naming the file, unless it is a regular file that holds one image of one channel whose values
    are 0 and 255, or 0 and 1, or, with 16 bits, 0 and 65535.
    """
    with pillow_warnings():
        return decode_mask(Path(path), formats)


def decode_image(path: Path, formats: Sequence[str]) -> np.ndarray:
    """As :func:`read_image`, for callers that are within :func:`pillow_warnings` already."""
    with _open(path, formats) as picture:
        if picture.mode == "L":
            raise UserError(
                f"{shown(path)}: one grey channel, expected 8-bit RGB (three channels); "
                'if it is to count as all three, save Image.open(path).convert("RGB")'
            )
        if picture.mode != "RGB":
            raise UserError(f"{shown(path)}: {_described(picture)}, expected 8-bit RGB (three channels); convert it")
        return np.array(picture)


def decode_mask(path: Path, formats: Sequence[str]) -> np.ndarray:
    """As :func:`read_mask`, for callers that are within :func:`pillow_warnings` already."""
    with _open(path, formats, bits=16) as picture:
        if picture.mode not in ("L", "1") and not picture.mode.startswith("I;16"):
            raise UserError(
                f"{shown(path)}: {_described(picture)}, expected a mask of one channel (8-bit grey or 1-bit); "
                "save it as one, tumour 255 and all else 0"
            )
        mask = np.array(picture)
        if _is_white_at_0(picture):
            mask = ~mask
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
    from PIL import Image, ImageOps, UnidentifiedImageError

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
            ImageOps.exif_transpose(picture, in_place=True)  # a TIFF's, Pillow has done already
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
def pillow_warnings() -> Iterator[None]:
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


def _is_white_at_0(picture: "ImageFile.ImageFile") -> bool:
    """Whether Pillow has swapped black and white, as a TIFF can ask for: of 1 and 8 bits it does, of 16 it does not."""
    from PIL import TiffImagePlugin

    if not isinstance(picture, TiffImagePlugin.TiffImageFile) or picture.mode not in ("1", "L"):
        return False
    return picture.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


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


def pixels_of(shape: Sequence[int] | None) -> str:
    """The size of an image of this shape, in words."""
    return "unknown" if shape is None else f"{shape[1]} x {shape[0]} pixels"
