"""Reads LGG-MRI as Kaggle has it ("lgg-mri-segmentation", Buda et al. 2019), and any folder laid out like it::

    kaggle_3m/
        TCGA_CS_4941_19960909/              one folder a patient: the patient's name, and maybe _<date>
            TCGA_CS_4941_19960909_1.tif         image, 8-bit RGB: pre-contrast, FLAIR, post-contrast
            TCGA_CS_4941_19960909_1_mask.tif    mask, one channel: 0 and 255, 0 and 1, 0 and 65535, or 1-bit
            ...
            TCGA_CS_4941_19960909_10.tif        comes after 9, not after 1: numbers are sorted as numbers

A folder of data is read once, before any training, and everything that is wrong in it is said at once, by file name.
"""

import itertools
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minunet.base.errors import UserError
from minunet.data.images import decode_image, decode_mask, pillow_warnings, pixels_of, resize_image, resize_mask, shown
from minunet.data.slices import SliceSet

#: So many faults of a data set are spelled out; the others are counted.
FAULTS_SHOWN = 20

#: Files are decoded in so many threads.
THREADS = min(4, os.cpu_count() or 1)

_LAYOUT = "<patient>/<name>_<number>.tif with <name>_<number>_mask.tif beside it"
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
        raise _refusal(folder, faults)
    if not pairs:
        raise UserError(no_pairs(folder))
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
    with pillow_warnings(), ThreadPoolExecutor(max_workers=THREADS) as pool:
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
            neighbour = f"{shown(pairs[first].image)} of the same patient has {pixels_of(expected)}"
            faults.append(f"{shown(pairs[index].image)}: {pixels_of(shape)}, but {neighbour}; make them equal")
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
            image, mask = images.get(number), masks.get(number)
            if image is not None and mask is not None and mask.stem[: -len("_mask")] == image.stem:
                pairs.append(Pair(patient, number, image, mask))
            else:  # the mask of another name is not this image's, though it has the same number
                unpaired += [path for path in (image, mask) if path is not None]
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


def no_pairs(folder: str | os.PathLike[str]) -> str:
    """What is wrong with a folder without a single pair; a folder above or below that would fit is named."""
    return f"{shown(folder)}: no pair of image and mask found; expected {_LAYOUT}{_neighbour(Path(folder))}"


def _neighbour(folder: Path) -> str:
    """Names a folder of patients up to two levels above or below ``folder``, if there is one."""
    above = [Path(os.path.normpath(folder / up)) for up in ("..", "../..")]
    below = itertools.chain(*(folder.glob(pattern) for pattern in ("*", "*/*")))
    for place in itertools.chain(above, itertools.islice(below, 1000)):  # not a whole disk
        try:
            if _is_folder(place) and list_folder(place).pairs:
                return f"; {shown(place)} is such a folder"
        except (UserError, OSError):
            continue
    return ""


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # no permission to look, a name too long, or no name: not one that can be read
        return False


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, ValueError):  # ValueError: half a character or a NUL, which no name can have
        raise UserError(f"{shown(folder)}: no such folder; expected one that holds {_LAYOUT}") from None
    except NotADirectoryError:
        raise UserError(
            f"{shown(folder)}: not a folder; expected one that holds {_LAYOUT}{_neighbour(folder)}"
        ) from None
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be listed ({error.strerror}); check its permissions") from None


def _read_pair(pair: Pair) -> tuple[np.ndarray | None, np.ndarray | None, list[str]]:
    """Image (H, W, 3) and mask (H, W) of one slice, None for one that cannot be read, and what is wrong with them."""
    image = mask = None
    faults = []
    try:
        image = decode_image(pair.image, ("TIFF",))
    except UserError as error:
        faults.append(str(error))
    try:
        mask = decode_mask(pair.mask, ("TIFF",))
    except UserError as error:
        faults.append(str(error))
    if image is not None and mask is not None and image.shape[:2] != mask.shape:
        its_mask = f"its mask {shown(pair.mask)} has {pixels_of(mask.shape)}"
        faults.append(f"{shown(pair.image)}: {pixels_of(image.shape)}, but {its_mask}; make them equal")
        image = mask = None
    return image, mask, faults


def missing_partners(unpaired: Sequence[Path]) -> list[str]:
    """A fault for each image without a mask and each mask without an image."""
    return [
        f"{shown(path)}: no {_partner(path)} beside it; add it, or leave such files out with --allow-missing"
        for path in unpaired
    ]


def _partner(path: Path) -> str:
    """What an image or a mask lacks: "mask X_3_mask.tif" of X_3.tif."""
    if path.stem.lower().endswith("_mask"):
        return f"image {shown(path.stem[: -len('_mask')])}.tif"
    return f"mask {shown(path.stem)}_mask.tif"


def _refusal(folder: str | os.PathLike[str], faults: Sequence[str]) -> UserError:
    """The error for these faults: each names its file already; the folder and the count come first if several."""
    if len(faults) == 1:
        return UserError(faults[0])
    more = [f"and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
    return UserError(f"{shown(folder)}: {len(faults)} faults", [*faults[:FAULTS_SHOWN], *more])
