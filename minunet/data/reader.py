"""Reads folders of images and masks: LGG-MRI as Kaggle has it ("lgg-mri-segmentation", Buda et al. 2019), and yours.

::

    kaggle_3m/
        TCGA_CS_4941_19960909/              one folder a group, here a patient: the name, and maybe _<date>
            TCGA_CS_4941_19960909_1.tif         image: of LGG-MRI pre-contrast, FLAIR, post-contrast as RGB
            TCGA_CS_4941_19960909_1_mask.tif    mask, one channel: 0 and 255, 0 and 1, 0 and 65535, or 1-bit
            ...
            TCGA_CS_4941_19960909_10.tif        comes after 9, not after 1: numbers are sorted as numbers

An image and its mask are paired by their whole names: ``NAME.png`` and ``NAME_mask.png``, or, if two folders are named,
``image/NAME.png`` and ``label/NAME.tif``. Both may lie in group folders or directly in the data folder; there each
image is a group of its own. With several folders of masks an image has one in each, and they may overlap.

A folder of data is read once, before any training, and everything that is wrong in it is said at once, by file name.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minunet.base.errors import UserError
from minunet.data.images import (
    FORMATS,
    Kind,
    decode_image,
    decode_mask,
    fitted,
    kind_of,
    natural,
    pillow_warnings,
    pixels_of,
    place,
    resize_classes,
    resize_image,
    resize_mask,
    shown,
)
from minunet.data.slices import IGNORE, LGG, SliceSet, Words

#: So many faults of a data set are spelled out; the others are counted.
FAULTS_SHOWN = 20

#: Files are decoded in so many threads.
THREADS = min(4, os.cpu_count() or 1)

_LGG_FOLDER = re.compile(r"(TCGA|PHANTOM)_.+_\d{8}", re.DOTALL)
_MASK_SUFFIX = "_mask"
_LAYOUT = "NAME.png and NAME_mask.png (or TIFF) side by side, or two folders given by --folders IMAGES MASKS"
_LONGEST_NAME = 40  # letters of what a folder of masks is called in tables


class Pair(NamedTuple):
    """One slice on disk."""

    patient: str
    number: int
    image: Path
    masks: tuple[Path, ...]  # one, or one in each folder of masks


class Listing(NamedTuple):
    """What a folder holds, by file names alone."""

    root: Path  # the folder of the groups' folders, or of the images
    pairs: list[Pair]  # in the order of groups, then of slice numbers
    unpaired: list[Path]  # images without a mask and masks without an image
    faults: list[str]  # what else is wrong, one line each
    words: Words
    folders: Sequence[str] | None  # the names of the folder of images and of those of masks, if there are any


def patient_id(folder_name: str) -> str:
    r"""The patient in a folder's name: the name without a date of 8 digits at its end.

    Bytes that are no UTF-8 are escaped: not every library that gets the name can show them.

    >>> patient_id("TCGA_CS_4941_19960909"), patient_id("anna"), patient_id(os.fsdecode(b"ren\xe9"))
    ('TCGA_CS_4941', 'anna', 'ren\\udce9')
    """
    return _as_text(re.sub(r"(?<=.)_\d{8}\Z", "", folder_name))


def _as_text(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def read_folder(
    folder: str | os.PathLike[str],
    size: int | None,
    *,
    allow_missing: bool = False,
    limit: int | None = None,
    patients: Sequence[str] | None = None,
    folders: Sequence[str] | None = None,
    invert_masks: bool = False,
    target_name: str | None = None,
    classes: Sequence[str] = (),
) -> SliceSet:
    """All slices below ``folder``: uint8 or uint16 images of one or three channels, as the files have them.

    folder         the folder of the groups' folders or of the images, or one that holds it as ``kaggle_3m``
    size           the longer side of each image in the result, in pixels. The ratio of the sides is kept: what is left
                   of the square is padding (see ``images.place``; in masks 0, in those of classes IGNORE), and the
                   result's ``extents`` say so.
                   None: each image at its own size, padded to the largest height and width
    allow_missing  leave out an image without a mask and a mask without an image (they are listed in the
                   result's ``skipped``) instead of refusing the folder
    limit          read the first so many slices only, in the order of the result (the reference reads 1600)
    patients       read these groups only (names as in ``patient_id``)
    folders        the names of two folders, of images and of masks, see :func:`list_folder`; with more than two, each
                   folder of masks is one target, named after it
    invert_masks   swap 0 and 1 in every mask
    target_name    what the masks mark, for messages and pictures; None: tumour in LGG-MRI, else foreground
    classes        the names of the classes whose numbers the masks hold, the background first; none: masks of 0 and 1

    Raises UserError with everything that is wrong, and ValueError if ``size`` or ``limit`` is below 1, or with
    ``classes`` the masks are to be inverted or lie in several folders.
    """
    check_classes(classes, folders, invert_masks)
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    listing = list_folder(folder, patients=patients, folders=folders)
    faults = listing.faults + ([] if allow_missing else missing_partners(listing))
    pairs = listing.pairs[:limit]
    listing = listing._replace(pairs=pairs)

    # How large the arrays must be, and of which kind. With a size the first image is enough to know; whatever is wrong
    # is found again, and said, by the reading below.
    shapes: list[tuple[int, ...]] = []
    kinds: list[Kind] = []

    def look(index: int, image: np.ndarray, mask: np.ndarray) -> None:
        shapes.append(image.shape[:2])
        kinds.append(kind_of(image))

    first = listing._replace(pairs=pairs[:1]) if size is not None else listing
    read_pairs(first, look, classes=len(classes))
    height, width = np.max(shapes or [(1, 1)], axis=0).tolist() if size is None else (size, size)
    kind = kinds[0] if kinds else Kind(3, 8)
    images = np.empty((len(pairs), height, width, kind.channels), f"uint{kind.bits}")
    masks = np.full((len(pairs), height, width, _masks_of(folders)), IGNORE if classes else 0, np.uint8)
    resize_labels = resize_classes if classes else resize_mask
    extents = np.empty((len(pairs), 2), int)

    def keep(index: int, image: np.ndarray, mask: np.ndarray) -> None:
        if kind_of(image) != kind:
            return  # a fault of the set
        # Resized at once and put in its place, so that at no time more than a few full-size slices are in memory.
        rows, columns, _ = mask.shape
        if size is not None:
            rows, columns = fitted(rows, columns, size)
        place(images[index], resize_image(image, rows, columns))
        for k in range(mask.shape[2]):
            masks[index, :rows, :columns, k] = resize_labels(mask[..., k], rows, columns)
        extents[index] = rows, columns

    faults += read_pairs(listing, keep, invert_masks=invert_masks, classes=len(classes))
    if faults:
        raise _refusal(folder, faults)
    words = words_of(listing, target_name)
    if kind != Kind(3, 8):  # not the three sequences, whatever the folders are called
        words = replace(words, channels=())
    return SliceSet(
        images=images,
        masks=masks,
        patients=tuple(pair.patient for pair in pairs),
        numbers=tuple(pair.number for pair in pairs),
        files=tuple(str(pair.image) for pair in pairs),
        skipped=tuple(str(path) for path in listing.unpaired),
        extents=None if (extents == (height, width)).all() else extents,
        words=words,
        classes=tuple(classes),
    )


def check_classes(classes: Sequence[str], folders: Sequence[str] | None, invert_masks: bool) -> None:
    """Raise ValueError if masks of ``classes`` are asked for in a way that makes no sense."""
    if classes and invert_masks:
        raise ValueError("invert_masks swaps 0 and 1, and masks of classes hold other numbers")
    if classes and _masks_of(folders) > 1:
        raise ValueError(f"classes are the numbers in one mask, got {_masks_of(folders)} folders of masks")


def words_of(listing: Listing, target_name: str | None) -> Words:
    """What the things of a data set are called. Each of several folders of masks gives its name to a target.

    Raises UserError if two of these names are the same.
    """
    words = listing.words if target_name is None else replace(listing.words, target=target_name)
    if _masks_of(listing.folders) == 1 or listing.folders is None:
        return words
    targets = tuple(shown(name)[-_LONGEST_NAME:] for name in listing.folders[1:])
    if len(set(targets)) < len(targets):
        raise UserError(f"--folders: {', '.join(targets)}: names of masks that do not differ, rename the folders")
    return replace(words, targets=targets)


def _masks_of(folders: Sequence[str] | None) -> int:
    """How many masks an image has."""
    return 1 if folders is None else len(folders) - 1


def read_pairs(
    listing: Listing,
    use: Callable[[int, np.ndarray, np.ndarray], None],
    *,
    invert_masks: bool = False,
    classes: int = 0,
) -> list[str]:
    """Reads the slices and hands each over, ``use(index, image, mask)``; returns what is wrong with the others.

    image uint8 or uint16 (H, W, C), mask uint8 (H, W, K) as SliceSet has it, as large as in their files. ``use`` is
    called from several threads, for one index once. Images of another kind than most, and slices of one patient of
    LGG-MRI that differ in size, are handed over, and are a fault.
    """
    pairs = listing.pairs

    def read(index: int) -> tuple[tuple[tuple[int, ...], Kind] | None, list[str]]:
        image, mask, found = _read_pair(pairs[index], classes)
        if image is None or mask is None:
            return None, found
        use(index, image, 1 - mask if invert_masks else mask)
        return (image.shape[:2], kind_of(image)), found

    # Pillow decodes and resizes outside Python's lock, so that a few threads do help.
    with pillow_warnings(), ThreadPoolExecutor(max_workers=THREADS) as pool:
        results = list(pool.map(read, range(len(pairs))))

    faults = [fault for _, found in results for fault in found]
    seen = [(pair, *found) for pair, (found, _) in zip(pairs, results, strict=True) if found is not None]
    of_kind = {kind: pair for pair, _, kind in reversed(seen)}  # the first of each
    usual = max(of_kind, key=Counter(kind for *_, kind in seen).__getitem__, default=None)
    first: dict[str, tuple[Pair, tuple[int, ...]]] = {}
    for pair, shape, kind in seen:
        if usual is not None and kind != usual:
            other = f"{shown(of_kind[usual].image)} has {usual}"
            faults.append(f"{shown(pair.image)}: {kind}, but {other}; make them alike")
        neighbour, expected = first.setdefault(pair.patient, (pair, shape))
        if listing.words.channels and shape != expected:
            other = f"{shown(neighbour.image)} of the same patient has {pixels_of(expected)}"
            faults.append(f"{shown(pair.image)}: {pixels_of(shape)}, but {other}; make them equal")
    return faults


def list_folder(
    folder: str | os.PathLike[str],
    *,
    patients: Sequence[str] | None = None,
    folders: Sequence[str] | None = None,
    look_around: bool = True,
) -> Listing:
    """Finds the slices below ``folder`` by their names; opens no file.

    An image and its mask are ``NAME.<ending>`` and ``NAME_mask.<ending>`` in one folder, or with ``folders``, the names
    of two or more, ``NAME.<ending>`` in each. They lie in the folder of a group, or in ``folder`` itself; there each
    image is a group of its own. A slice's number is the one at the end of its name, or its place among the sorted names
    where a name has none or two have the same. Hidden files, and files with another ending than those of
    ``images.FORMATS``, are passed over. Where there is no pair, the fault names a folder above or below that has some,
    unless ``look_around`` is False.

    Raises UserError if ``folder`` is absent, not a folder or unreadable, or a patient asked for is not there.
    """
    root = Path(folder)
    if _is_folder(root / "kaggle_3m"):
        root = root / "kaggle_3m"
    faults: list[str] = []
    groups: dict[str, Path] = {}
    twice: list[tuple[Path, Path]] = []
    together = folders is not None and all(_is_folder(root / name) for name in folders)
    for name in [] if together else _names_in(root):
        path = root / name
        parts = [path] if folders is None else [path / part for part in folders]
        if path.is_symlink() and not path.exists():
            faults.append(f"{shown(path)}: a link that leads nowhere, mend or remove it")
        if name.startswith(".") or not all(map(_is_folder, parts)):
            continue
        other = groups.setdefault(patient_id(name), path)
        if other != path:
            twice.append((path, other))
    is_lgg = root.resolve().name == "kaggle_3m" or any(_LGG_FOLDER.fullmatch(path.name) for path in groups.values())
    words = LGG if is_lgg else Words()
    for path, other in twice:
        advice = f"keep one scan a {words.group}"
        faults.append(f"{shown(path)}: the same {words.group} as {shown(other.name)}; {advice}")

    pairs: list[Pair] = []
    unpaired: list[Path] = []
    without: list[Path] = []  # groups' folders
    for group in sorted(groups):
        if patients is not None and group not in patients:
            continue
        try:
            found, alone = _pairs(groups[group], folders, faults)
        except UserError as error:
            faults.append(str(error))
            continue
        pairs += [Pair(group, *slice_) for slice_ in found]
        unpaired += alone
        if not found and not alone:
            without.append(groups[group])
    of_one_patient = _LGG_FOLDER.fullmatch(root.resolve().name) is not None
    if (together or folders is None) and not of_one_patient:
        own_faults: list[str] = []
        found, alone = _pairs(root, folders, own_faults)
        if not pairs:
            pairs = [Pair(_as_text(image.stem), number, image, mask) for number, image, mask in found]
            unpaired += alone
            faults += own_faults
        elif found:
            advice = "move it into the folder of its group"
            faults.append(f"{shown(found[0][1])}: an image with its mask beside the folders of groups; {advice}")
    if patients is not None:
        absent = sorted(set(patients) - set(groups) - {pair.patient for pair in pairs})
        if absent:
            raise UserError(f"{shown(root)}: no folder of patient {', '.join(absent[:FAULTS_SHOWN])}")
        pairs = [pair for pair in pairs if pair.patient in patients]
    if pairs:  # else all of it is said below
        what = "holds pictures, but no image and mask where they are expected; put that right or move it"
        faults += [f"{shown(path)}: {what}" for path in without if _holds_pictures(path)]
    if not pairs and not faults:
        what = f"{shown(root)}: no data set, but the folder of one patient; expected the one that holds all of them"
        what = what if of_one_patient else _no_pairs(root, folders)
        faults.append(what + (_neighbour(root, folders) if look_around else ""))
    return Listing(root, pairs, unpaired, faults, words, folders)


def _pairs(
    folder: Path, folders: Sequence[str] | None, faults: list[str]
) -> tuple[list[tuple[int, Path, tuple[Path, ...]]], list[Path]]:
    """The numbered pairs in one folder, and the files without a partner; what does not fit is added to ``faults``."""
    # By the names of the slices: the images, and the masks of each kind.
    known: list[dict[str, Path]] = [{} for _ in range(1 + _masks_of(folders))]

    def note(known: dict[str, Path], name: str, path: Path) -> None:
        other = known.setdefault(name, path)
        if other != path:
            faults.append(f"{shown(path)}: the same name as {shown(other.name)} but for the end; keep one of them")

    if folders is None:
        for path in _pictures_in(folder):
            if path.stem.lower().endswith(_MASK_SUFFIX):
                note(known[1], path.stem[: -len(_MASK_SUFFIX)], path)
            else:
                note(known[0], path.stem, path)
    else:
        for of_folder, name in zip(known, folders, strict=True):
            for path in _pictures_in(folder / name):
                note(of_folder, path.stem, path)
    whole = set.intersection(*map(set, known))
    alone = [of_folder[name] for of_folder in known for name in sorted(of_folder.keys() - whole, key=natural)]
    names = sorted(whole, key=natural)
    ends = [re.search(r"(?<!\d)\d{1,9}\Z", name) for name in names]
    numbers = [int(end[0]) for end in ends if end is not None]
    if len(set(numbers)) < len(names):
        numbers = list(range(1, len(names) + 1))
    images, *masks = known
    numbered = sorted(zip(numbers, names, strict=True))
    return [(number, images[name], tuple(each[name] for each in masks)) for number, name in numbered], alone


def _holds_pictures(folder: Path) -> bool:
    below = (Path(name) for _, _, names in os.walk(folder) for name in names)
    return any(path.suffix.lower() in FORMATS for path in itertools.islice(below, 10_000))


def _pictures_in(folder: Path) -> list[Path]:
    names = (name for name in _names_in(folder) if not name.startswith("."))
    return [folder / name for name in names if Path(name).suffix.lower() in FORMATS]


def _no_pairs(root: Path, folders: Sequence[str] | None) -> str:
    """The fault of a folder without a single pair: what it holds, and which rule found nothing in it."""
    walk = (Path(place_, name).relative_to(root) for place_, _, names in os.walk(root) for name in names)
    files = sorted(itertools.islice(walk, 10_000), key=lambda path: natural(str(path)))
    endings = Counter(path.suffix.lower() or "without ending" for path in files)
    counts = ", ".join(f"{count} {shown(ending)}" for ending, count in endings.most_common(4))
    pictures = [file for file in files if file.suffix.lower() in FORMATS] or files
    examples = " and ".join(shown(file) for file in dict.fromkeys([*pictures[:1], *pictures[-1:]]))
    found = f"among {len(files)} files ({counts}), such as {examples}" if files else "in an empty folder"
    rule = _LAYOUT if folders is None else f"equal names in {_all_of(folders)} (--folders)"
    return f"{shown(root)}: no pair of image and mask found {found}; expected {rule}"


def _neighbour(folder: Path, folders: Sequence[str] | None = None) -> str:
    """Names a folder with pairs up to two levels above or below ``folder``, if there is one."""
    above = [Path(os.path.normpath(folder / up)) for up in ("..", "../..")]
    below = itertools.chain(*(folder.glob(pattern) for pattern in ("*", "*/*")))
    for near in itertools.chain(above, itertools.islice(below, 1000)):  # not a whole disk
        try:
            if _is_folder(near) and list_folder(near, folders=folders, look_around=False).pairs:
                return f"; {shown(near)} is such a folder"
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


def _read_pair(pair: Pair, classes: int) -> tuple[np.ndarray | None, np.ndarray | None, list[str]]:
    """Image (H, W, C) and mask (H, W, K) of a slice, None for one that cannot be read, and what is wrong with them."""
    image = None
    masks: list[np.ndarray] = []
    faults = []
    try:
        image = decode_image(pair.image)
    except UserError as error:
        faults.append(str(error))
    for path in pair.masks:
        try:
            masks.append(decode_mask(path, classes))
        except UserError as error:
            faults.append(str(error))
            continue
        if image is not None and image.shape[:2] != masks[-1].shape:
            its_mask = f"its mask {shown(path)} has {pixels_of(masks[-1].shape)}"
            faults.append(f"{shown(pair.image)}: {pixels_of(image.shape)}, but {its_mask}; make them equal")
    return (None, None, faults) if faults else (image, np.stack(masks, axis=-1), faults)


def missing_partners(listing: Listing) -> list[str]:
    """A fault for each image without a mask and each mask without an image, if anything has a partner at all."""
    if not listing.pairs:
        return []
    return [
        f"{shown(path)}: no {_partner(path, listing.folders)}; add it, or leave such files out with --allow-missing"
        for path in listing.unpaired
    ]


def _partner(path: Path, folders: Sequence[str] | None) -> str:
    """What an image or a mask lacks: "mask X_3_mask.tif beside it" of X_3.tif."""
    if folders is not None and len(folders) > 2:
        return f"partner {shown(path.stem)} in one or more of {_all_of(folders)}"
    if folders is not None:
        images, masks = folders
        kind, where = ("image", images) if path.parent.name == Path(masks).name else ("mask", masks)
        return f"{kind} {shown(path.stem)} in {shown(where)}"
    if path.stem.lower().endswith(_MASK_SUFFIX):
        return f"image {shown(path.stem[: -len(_MASK_SUFFIX)])}{path.suffix} beside it"
    return f"mask {shown(path.stem)}_mask{path.suffix} beside it"


def _all_of(folders: Sequence[str]) -> str:
    """The folders of images and masks, for a message: "two folders image and label"."""
    *others, last = map(shown, folders)
    return f"{'two' if len(folders) == 2 else len(folders)} folders {', '.join(others)} and {last}"


def _refusal(folder: str | os.PathLike[str], faults: Sequence[str]) -> UserError:
    """The error for these faults: each names its file already; the folder and the count come first if several."""
    if len(faults) == 1:
        return UserError(faults[0])
    more = [f"and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
    return UserError(f"{shown(folder)}: {len(faults)} faults", [*faults[:FAULTS_SHOWN], *more])
