"""Image files: found, opened with care, decoded, resized.

A file is not to be trusted: it may be cut short, be something else under the name of a picture, claim a size that
fills the memory, or be a pipe that never ends. ``_open`` is the only door in.

An image comes as its file has it: grey or RGB, of 8 or 16 bits a channel. A microscope or scanner often fills 12 of the
16 bits. That is 16-bit data like any other, and nothing is scaled here: one file does not tell the scale, and the
normalisation by volume (``data.normalize``) needs none.
"""

import io
import logging
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minunet.base.durable import open_regular
from minunet.base.errors import UserError
from minunet.data.slices import IGNORE

if TYPE_CHECKING:
    from PIL import ImageFile

#: No image above this many pixels is decoded: 8192 x 8192.
MAX_PIXELS = 64 * 2**20
#: No file of more bytes for each such pixel is read: RGB of 16 bits needs six.
BYTES_A_PIXEL = 6
#: So many bytes are read before the size of the image must be known: a list of a million strips is not read to its end.
MAX_HEADER_BYTES = 2 * 2**20

#: What a file must be, by its ending, in Pillow's names. Files of a folder with another ending are no images.
FORMATS = {".tif": "TIFF", ".tiff": "TIFF", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}

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
                visible = (
                    file
                    for file in sorted(path.iterdir(), key=lambda file: natural(file.name))
                    if not file.name.startswith(".")
                )
                files = [file for file in visible if file.suffix.lower() in FORMATS]
            else:
                files = [path]
        except OSError as error:
            raise UserError(f"{shown(path)}: cannot be read ({error.strerror}), check its permissions") from None
        images = [file for file in files if not _NO_IMAGE.fullmatch(file.stem)]
        if not images:
            endings = ", ".join(FORMATS)
            raise UserError(
                f"{shown(path)}: no image found, give images ({endings}; masks and overlays left out) or their folder"
            )
        for file in images:
            if not file.exists():
                raise UserError(f"{shown(file)}: no such file or folder, check the path")
            volumes.setdefault(file.parent.resolve(), {})[file] = None
    return [list(files) for files in volumes.values()]


def natural(name: str) -> list[str | int]:
    """A sort key by which numbers in names are numbers.

    >>> sorted(["a10", "a2", "b"], key=natural)
    ['a2', 'a10', 'b']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


class Kind(NamedTuple):
    """What all images of a set, and those that its network predicts, have in common."""

    channels: int
    bits: int  # a channel: 8 or 16

    def __str__(self) -> str:
        colours = {1: "grey", 3: "RGB"}
        return f"{colours.get(self.channels, f'{self.channels} channels')} of {self.bits} bits"


RGB = Kind(channels=3, bits=8)


def kind_of(image: np.ndarray) -> Kind:
    """The kind of an image, uint8 or uint16 (H, W, C).

    >>> print(kind_of(np.zeros((4, 4, 1), np.uint16)))
    grey of 16 bits
    """
    return Kind(image.shape[2], 8 * image.itemsize)


def read_image(path: str | os.PathLike[str], kind: Kind | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """One image, uint8 or uint16 (H, W, C), C = 1 or 3.

    The values are those that the file stores; 12-bit data come as uint16. The image is turned and mirrored as its
    orientation says (an EXIF or TIFF tag), and so is a mask. ``kind`` is the only one that is taken, such as that of
    the images that a network was trained on; None takes all.

    Raises UserError, naming the file, unless it is a regular file of the format that its ending says (any of TIFF,
    PNG and JPEG for another ending), and holds one grey or RGB image of 8 or 16 bits, of that kind.
    """
    with pillow_warnings(max_pixels):
        image = decode_image(Path(path), max_pixels)
    if kind is not None and kind_of(image) != kind:
        raise UserError(f"{shown(path)}: {kind_of(image)}, but the network was trained on {kind}; convert it")
    return image


def read_mask(path: str | os.PathLike[str], classes: int = 0) -> np.ndarray:
    """One mask as uint8 (H, W) of 0 and 1; with ``classes``, how many there are, of their numbers 0, 1, ... and IGNORE.

    The values are those that the file stores. A TIFF may say that 0 is to be shown as white ("photometric
    interpretation" 0), as tifffile does of boolean arrays and ImageJ of masks with its inverting colour table; what
    they call true or 255 is the foreground all the same.

    Raises UserError, naming the file, unless it is a regular TIFF or PNG file, as its ending says, that holds one
    image of one channel whose values are 0 and 255, or 0 and 1, or, with 16 bits, 0 and 65535. With ``classes`` the
    values are their numbers, and 255 or 65535 where a pixel is to be ignored; the file may have a palette, whose
    colours mean nothing here.
    """
    with pillow_warnings():
        return decode_mask(Path(path), classes)


def decode_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """As :func:`read_image`, for callers that are within :func:`pillow_warnings` already."""
    with _open(path, max_pixels) as (picture, bits):
        taken = picture.mode in ("L", "RGB") or picture.mode.startswith("I;16")
        if not taken or _channels_in_file(picture) != len(picture.getbands()):
            expected = "expected grey or RGB of 8 or 16 bits"
            raise UserError(f"{shown(path)}: {_described(picture)}, {expected}; convert it")
        if bits == 16 and _is_planar(picture):  # these Pillow reads wrongly
            raise UserError(f"{shown(path)}: RGB of 16 bits, plane by plane; save it pixel by pixel (interleaved)")
        image = _stored(picture)
    if picture.mode == "RGB" and bits == 16:
        # Pillow keeps the first byte of each value. Told that the bytes stand the other way round, it keeps the second.
        with _open(path, max_pixels, low_bytes=True) as (picture, _):
            image = 256 * image.astype(np.uint16) + np.array(picture)
    return image.reshape(*image.shape[:2], -1)


def decode_mask(path: Path, classes: int = 0) -> np.ndarray:
    """As :func:`read_mask`, for callers that are within :func:`pillow_warnings` already."""
    if FORMATS.get(path.suffix.lower()) == "JPEG":
        raise UserError(f"{shown(path)}: a mask as JPEG, which changes its values; save the mask as PNG or TIFF")
    with _open(path) as (picture, bits):
        if picture.mode not in (("L", "1", "P") if classes else ("L", "1")) and not picture.mode.startswith("I;16"):
            raise UserError(f"{shown(path)}: {_described(picture)}, {_EXPECTED_OF_CLASSES if classes else _EXPECTED}")
        mask = _stored(picture)
        if classes and picture.mode == "L" and bits < 8:
            mask //= 255 // (2**bits - 1)  # Pillow stretches grey of 2 and 4 bits to 8: back to what the file stores
    if classes:
        return _class_numbers(path, mask, classes)
    foreground = mask != 0
    if mask.max() not in (0, 1, 255, 65535) or np.any(foreground & (mask != mask.max())):
        raise UserError(
            f"{shown(path)}: a mask with the values {_listed(np.unique(mask))}; expected 0 and 255, or 0 and 1: "
            "threshold it first, or, if they are the numbers of classes, name these by --classes"
        )
    return foreground.astype(np.uint8)


_EXPECTED = (
    "expected a mask of one channel (8-bit grey or 1-bit); save it as one, the foreground 255 and all else 0, or, "
    "if its values are the numbers of classes, name these by --classes"
)
_EXPECTED_OF_CLASSES = "expected a mask of one channel (grey or a palette) that holds the numbers of the classes"


def _class_numbers(path: Path, mask: np.ndarray, classes: int) -> np.ndarray:
    """The values of a mask as numbers of ``classes``, and IGNORE."""
    ignored = (mask == IGNORE) | (mask == 65535)
    strange = np.unique(mask[~ignored & (mask >= classes)])
    if strange.size:
        allowed = f"0 to {classes - 1} for the {classes} classes, and 255 (or 65535) for a pixel to be ignored"
        raise UserError(
            f"{shown(path)}: a mask with the values {_listed(strange)}; allowed are {allowed}; change them, or name "
            "all classes by --classes"
        )
    return np.where(ignored, np.uint8(IGNORE), mask.astype(np.uint8))


def _listed(values: np.ndarray) -> str:
    return ", ".join(str(value) for value in values[:8]) + (", ..." if len(values) > 8 else "")


@contextmanager
def _open(
    path: Path, max_pixels: int = MAX_PIXELS, low_bytes: bool = False
) -> "Iterator[tuple[ImageFile.ImageFile, int]]":
    """The decoded picture in ``path``, and its bits a channel in the file.

    ``low_bytes`` asks for the second byte of each value of a 16-bit RGB picture, in place of the first. Whatever goes
    wrong, here or in the body, is a UserError that names the file.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    named = FORMATS.get(path.suffix.lower())
    formats = ("TIFF", "PNG", "JPEG") if named is None else (named,)
    try:
        with _Reader(open_regular(path)) as file, Image.open(file, formats=formats) as picture:
            # The header alone has been read. Nothing is decoded before its size is known to be sane.
            size = os.fstat(file.fileno()).st_size
            if size > BYTES_A_PIXEL * max_pixels:
                found = f"{size} bytes, above the ceiling of {BYTES_A_PIXEL * max_pixels}"
                raise UserError(f"{shown(path)}: {found}; make it smaller")
            width, height = picture.size
            if width * height > max_pixels:
                raise UserError(
                    f"{shown(path)}: {width} x {height} pixels, above the ceiling of {max_pixels}; make it smaller"
                )
            # is_animated and not n_frames, which follows a chain of any length.
            if getattr(picture, "is_animated", False) or _is_stack(picture, size):
                raise UserError(f"{shown(path)}: more than one picture in the file; save them one by one")
            bits = _bits(picture)
            if bits > 16:
                raise UserError(f"{shown(path)}: {bits} bits a channel, expected 8 or 16; scale all images alike")
            if low_bytes:
                picture.tile = [tile._replace(args=_bytes_swapped(tile.args)) for tile in picture.tile]
            file.allowance = math.inf
            with _STDERR_SILENCED if _is_compressed(picture) else nullcontext():
                picture.load()
            ImageOps.exif_transpose(picture, in_place=True)  # a TIFF's, Pillow has done already
            yield picture, bits
    except UserError:
        raise
    except Exception as error:
        # A decoder fed with garbage raises almost anything: SyntaxError, struct.error, KeyError, ...
        if isinstance(error, UnidentifiedImageError):
            found = f"not a readable {' or '.join(formats)} picture"
        elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            found = f"more pixels than the ceiling of {max_pixels}"
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


@contextmanager
def pillow_warnings(max_pixels: int = MAX_PIXELS) -> Iterator[None]:
    """Pillow's warning of a picture too large becomes an error; its remarks on odd metadata, which name no file, go.

    Warning filters and Pillow's own ceiling belong to the process: this is entered once, around the threads and not in
    them.
    """
    from PIL import Image

    logging.getLogger("PIL").addHandler(_NOWHERE)  # else, where nobody asked for a log, Python prints it
    ceiling = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max(ceiling or 0, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = ceiling


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
    packed = re.search(r";(16|4|2)", str(picture.tile))
    return 8 if packed is None else int(packed[1])


def _bytes_swapped(args: Any) -> Any:
    """What a decoder of Pillow's is told of a 16-bit RGB picture, with the bytes of each value the other way round."""
    swapped = {"RGB;16L": "RGB;16B", "RGB;16B": "RGB;16L"}
    swapped["RGB;16N"] = swapped["RGB;16L" if sys.byteorder == "little" else "RGB;16B"]  # N: native
    return swapped[args] if isinstance(args, str) else (swapped[args[0]], *args[1:])


def _channels_in_file(picture: "ImageFile.ImageFile") -> int:
    """How many channels the file has: of a TIFF with more than three Pillow may show three without a word."""
    from PIL import TiffImagePlugin

    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return int(picture.tag_v2.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
    return len(picture.getbands())


def _is_planar(picture: "ImageFile.ImageFile") -> bool:
    from PIL import TiffImagePlugin

    if not isinstance(picture, TiffImagePlugin.TiffImageFile) or picture.mode != "RGB":
        return False
    return bool(picture.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2)


def _stored(picture: "ImageFile.ImageFile") -> np.ndarray:
    """The values that the file stores, in this machine's byte order."""
    pixels = np.array(picture)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    return ~pixels if _is_white_at_0(picture) else pixels


def _is_stack(picture: "ImageFile.ImageFile", size: int) -> bool:
    """Whether a TIFF of ``size`` bytes has more planes behind the one that Pillow sees.

    Software for microscopes writes them behind one header, one after the other, and says so in a tag of its own.
    """
    from PIL import TiffImagePlugin

    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return False
    if picture.tag_v2.get(_IMAGE_DEPTH, 1) != 1:
        return True
    description = str(picture.tag_v2.get(TiffImagePlugin.IMAGEDESCRIPTION, ""))
    if description.startswith("ImageJ="):
        said = re.search(r"^images=(\d{1,9})\s*$", description, re.MULTILINE)
        planes = 1 if said is None else int(said[1])
    else:  # tifffile, with truncate=True
        planes = 2 if '"truncated": true' in description else 1
    start = min(picture.tag_v2.get(TiffImagePlugin.STRIPOFFSETS, (0,)))
    length = sum(picture.tag_v2.get(TiffImagePlugin.STRIPBYTECOUNTS, (0,)))
    return planes > 1 and start + planes * length <= size  # a plane cut out of a stack may have kept the description


_IMAGE_DEPTH = 32997  # a tag of SGI's, for volumes


def _is_white_at_0(picture: "ImageFile.ImageFile") -> bool:
    """Whether Pillow has swapped black and white, as a TIFF can ask for: of 1 and 8 bits it does, of 16 it does not."""
    from PIL import TiffImagePlugin

    if not isinstance(picture, TiffImagePlugin.TiffImageFile) or picture.mode not in ("1", "L"):
        return False
    return picture.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image of ``height`` x ``width`` whose longer side becomes ``size``: the ratio is kept.

    >>> fitted(600, 800, 128), fitted(7, 7, 128), fitted(1, 1000, 128)
    ((96, 128), (128, 128), (1, 128))
    """
    longer = max(height, width)
    rows, columns = ((2 * side * size + longer) // (2 * longer) for side in (height, width))  # rounded
    return max(1, rows), max(1, columns)


def place(canvas: np.ndarray, image: np.ndarray) -> None:
    """Writes ``image`` (h, w, ...) to the top left of ``canvas`` (H, W, ...); the rest repeats its last row and column.

    >>> canvas = np.zeros((3, 4), int)
    >>> place(canvas, np.array([[1, 2], [3, 4]]))
    >>> canvas
    array([[1, 2, 2, 2],
           [3, 4, 4, 4],
           [3, 4, 4, 4]])
    """
    height, width = image.shape[:2]
    canvas[:height, :width] = image
    canvas[:height, width:] = image[:, -1:]
    canvas[height:] = canvas[height - 1]


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """``image``, uint8 or uint16 (H, W, C), at ``height`` x ``width`` pixels; the same array if it has that size.

    Bilinear, and where it shrinks the triangle is as wide as the step between the new pixels: every old
    pixel counts, none is skipped (anti-aliasing).
    """
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[2])]
    resized = [np.asarray(channel.resize((width, height), Image.Resampling.BILINEAR)) for channel in channels]
    return np.stack(resized, axis=-1)


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """``mask``, uint8 (H, W) of 0 and 1, at ``height`` x ``width``: 1 where at least half of the new pixel's area is 1.

    >>> resize_mask(np.array([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]], np.uint8), 2, 2)
    array([[1, 0],
           [0, 0]], dtype=uint8)
    """
    if mask.shape == (height, width):
        return mask
    if not mask.any():
        return np.zeros((height, width), np.uint8)
    return (2 * _areas(mask, height, width) >= mask.size).astype(np.uint8)


def resize_classes(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """``mask``, uint8 (H, W) of classes, at ``height`` x ``width``: that which has the most of the new pixel's area.

    Of classes with equal areas the one with the smallest number; IGNORE counts as one, too.

    >>> resize_classes(np.array([[3, 3, 1, 2], [0, 3, 2, 1]], np.uint8), 1, 2)
    array([[3, 1]], dtype=uint8)
    """
    if mask.shape == (height, width):
        return mask
    found, largest = np.empty((height, width), np.uint8), np.zeros((height, width))
    for value in np.flatnonzero(np.bincount(mask.ravel())):
        area = _areas(mask == value, height, width)
        found[area > largest] = value
        np.maximum(area, largest, out=largest)
    return found


def _areas(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """How much of each new pixel is 1 in ``mask``, in units in which a whole one has ``mask.size``."""
    # In bands of 256 rows, so that the product's float64 copy of a large mask does not fill the memory.
    rows, columns = _overlaps(mask.shape[0], height), _overlaps(mask.shape[1], width)
    areas = sum(rows[:, i : i + 256] @ mask[i : i + 256] for i in range(0, len(mask), 256)) @ columns.T
    return np.asarray(areas)


@lru_cache(maxsize=16)
def _overlaps(old: int, new: int) -> np.ndarray:
    """(new, old): how much of each old pixel lies in each new one, along one axis.

    In units in which the whole axis is old * new long, an old pixel is ``new`` long and a new pixel ``old``. All
    overlaps are then whole numbers, float64 adds them exactly, and "at least half" has no rounding error.
    """
    old_start, new_start = new * np.arange(old), old * np.arange(new)[:, None]
    ends = np.minimum(old_start + new, new_start + old) - np.maximum(old_start, new_start)
    return np.maximum(ends, 0).astype(np.float64)


def _described(picture: "ImageFile.ImageFile") -> str:
    """The channels of a picture, in words."""
    words = {"RGBA": "RGB with transparency", "LA": "grey with transparency", "P": "palette colours", "1": "1 bit"}
    channels = _channels_in_file(picture)
    words |= {"L": f"{channels} channels", "RGB": "RGB" if channels == 3 else f"{channels} channels"}
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
