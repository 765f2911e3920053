"""The one container of data: image slices, their masks, and whose slices they are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

#: In a mask of classes: nobody knows the class of this pixel. It counts for nothing, in the loss and in the scores.
IGNORE = 255


def read_names(stored: Any) -> tuple[str, ...]:
    """The names in a file that anybody may have written. Raises ValueError unless they are a few printable letters."""
    if not isinstance(stored, list | tuple):
        raise ValueError(f"names must be a list, got {stored!r:.80}")
    for name in stored:
        if not isinstance(name, str) or not name.isprintable() or len(name) > 40:
            raise ValueError(f"words must be printable, of at most 40 letters, got {name!r:.80}")
    if len(set(stored)) < len(stored):
        raise ValueError(f"names must differ from each other, got {', '.join(stored)!r:.80}")
    return tuple(stored)


@dataclass(frozen=True)
class Words:
    """What the things of a data set are called in messages, tables and pictures.

    >>> Words(target="road")
    Words(target='road', group='group', image='image', pooled='pooled', channels=(), targets=())
    """

    target: str = "foreground"  # what the masks mark
    group: str = "group"  # images that belong together, and go to one part of a split
    image: str = "image"
    pooled: str = "pooled"  # how the scores of a group count its images: together, as one volume
    channels: tuple[str, ...] = ()  # their names, if the channels are MR sequences and no colours
    targets: tuple[str, ...] = ()  # what each mask marks, where an image has several that may overlap

    @classmethod
    def read(cls, stored: Any) -> "Words":
        """The words that a checkpoint holds (``dataclasses.asdict``); LGG-MRI's, if it is older than they are.

        Raises ValueError for anything else: anybody may have written the file.
        """
        if stored is None:
            return LGG
        try:
            lists = {"channels": tuple(stored["channels"]), "targets": tuple(stored.get("targets", ()))}
            words = cls(**{**stored, **lists})
        except (TypeError, KeyError, AttributeError):
            raise ValueError("words must hold target, group, image, pooled and channels") from None
        for name in (words.target, words.group, words.image, words.pooled):
            read_names((name,))
        return replace(words, channels=read_names(words.channels), targets=read_names(words.targets))


#: What an image's values may be. float32 is taken as it is; what was read from files is uint8 or uint16.
IMAGE_DTYPES = ("uint8", "uint16", "float32")


#: The words of LGG-MRI, and of the phantom.
LGG = Words("tumour", "patient", "slice", "in 3-D", ("pre-contrast", "FLAIR", "post-contrast"))


@dataclass(frozen=True, eq=False)
class SliceSet:
    """S slices of one size with their masks. A patient's slices stand together, from the lowest number to the highest.

    Because of that order a patient is one block of rows, a 3-D volume: what a 3-D Dice or a normalisation
    by volume needs is a slice of the arrays.

    What is to be found is one *target*, or several. Without ``classes`` each channel of the masks is one: 1 where it
    is, else 0, and masks of several channels may overlap. With ``classes`` each pixel has one of them: the masks have
    one channel, that holds its number, and the targets are the classes but the first, which is the background.

    Raises ValueError if the shapes, dtypes or lengths do not fit together, an image holds a value that is not finite, a
    mask one that is not allowed, a patient's slices are not contiguous or their numbers do not ascend.

    >>> slices = SliceSet(
    ...     images=np.zeros((3, 8, 8, 3), np.uint8),
    ...     masks=np.zeros((3, 8, 8, 1), np.uint8),
    ...     patients=("anna", "anna", "ben"),
    ...     numbers=(9, 10, 1),
    ...     files=("anna_9.tif", "anna_10.tif", "ben_1.tif"),
    ... )
    >>> len(slices), slices.patient_names()
    (3, ('anna', 'ben'))
    >>> slices.patient_indices()
    array([0, 0, 1])
    >>> slices.subset([1, 2]).files
    ('anna_10.tif', 'ben_1.tif')
    """

    images: np.ndarray  # uint8, uint16 or float32 (S, H, W, C); of LGG-MRI: pre-contrast, FLAIR, post-contrast
    masks: np.ndarray  # uint8 (S, H, W, K): 1 where a human drew what is to be found, else 0; with classes see there
    patients: tuple[str, ...]  # whose slice it is, one name a slice
    numbers: tuple[int, ...]  # its place in the patient's volume
    files: tuple[str, ...]  # the file it came from, so that an error can name it
    skipped: tuple[str, ...] = ()  # files that the reader was allowed to leave out, because they had no partner
    #: int (S, 2): the height and width of each image, which lies at the top left; the rest is padding. None: all of it.
    #: In the padding a mask is 0, one of classes IGNORE: nobody has looked there.
    extents: np.ndarray | None = None
    words: Words = Words()
    #: The names of the classes, the background first. The masks are then (S, H, W, 1): 0, 1, ... or IGNORE.
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.images)
        if self.images.dtype not in IMAGE_DTYPES or self.images.ndim != 4 or 0 in self.images.shape[1:]:
            found = f"{self.images.dtype} {self.images.shape}"
            raise ValueError(f"images must be uint8, uint16 or float32 (S, H, W, C), got {found}")
        if len(self.classes) == 1 or len(self.classes) > IGNORE or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be none, or from 2 to {IGNORE} different names, got {self.classes!r:.80}")
        channels = len(self.words.targets) or (self.masks.shape[3] if self.masks.ndim == 4 else 0)
        expected = (*self.images.shape[:3], 1 if self.classes else max(channels, 1))
        if self.masks.dtype != np.uint8 or self.masks.shape != expected:
            raise ValueError(f"masks must be uint8 {expected} here, got {self.masks.dtype} {self.masks.shape}")
        if not self.classes and self.masks.max(initial=0) > 1:
            found = f"got {int(self.masks.max())}; masks of classes need their names (classes=)"
            raise ValueError(f"masks must hold 0 and 1 only, {found}")
        if self.classes and (strange := _values(self.masks) - {*range(len(self.classes)), IGNORE}):
            allowed = f"0 to {len(self.classes) - 1}, or {IGNORE} for a pixel to be ignored"
            raise ValueError(f"masks must hold the numbers of the classes, {allowed}, got {min(strange)}")
        for field in ("patients", "numbers", "files"):
            if len(getattr(self, field)) != count:
                raise ValueError(f"{field} must have one entry a slice, {count}, got {len(getattr(self, field))}")
        if self.images.dtype == np.float32:
            for file, image in zip(self.files, self.images, strict=True):
                if not np.isfinite(image).all():
                    raise ValueError(f"images must be finite, got NaN or infinite values in {file!r}")
        extents = np.ones((count, 2), int) if self.extents is None else self.extents
        if extents.shape != (count, 2) or np.any(extents < 1) or np.any(extents > self.masks.shape[1:3]):
            raise ValueError(f"extents must be (S, 2), each within [1, H] and [1, W], got {extents.tolist()}")
        seen: set[str] = set()
        for i, patient in enumerate(self.patients):
            if i > 0 and patient == self.patients[i - 1]:
                if self.numbers[i] <= self.numbers[i - 1]:
                    found = f"{self.numbers[i]} after {self.numbers[i - 1]} in {patient!r}"
                    raise ValueError(f"numbers must ascend within a patient, got {found}")
            elif patient in seen:
                raise ValueError(f"patients must be contiguous, got {patient!r} again at slice {i}")
            seen.add(patient)

    @classmethod
    def from_arrays(
        cls,
        images: ArrayLike,
        masks: ArrayLike,
        groups: Sequence[str] | None = None,
        *,
        classes: Sequence[str] = (),
        targets: Sequence[str] = (),
    ) -> "SliceSet":
        """Images and masks that are arrays already.

        images   real numbers (S, H, W, C), any C, or (S, H, W); uint8, uint16 and float32 are taken as they are and are
                 not copied, all others become float32
        masks    bool, or integers 0 and 1, (S, H, W, K) or (S, H, W); with classes integers, the number of each pixel's
                 class, or IGNORE, (S, H, W, 1) or (S, H, W)
        groups   the name of the group of each image (a patient, a field, a street), which a split keeps together; the
                 images of one group stand together. None: each image is a group of its own
        classes  the names of the classes of which each pixel has one, the background first
        targets  what each of K masks marks, if there are several

        Raises ValueError as the constructor does, also for masks of another dtype.

        >>> images, masks = np.zeros((3, 8, 8, 2)), np.zeros((3, 8, 8), bool)
        >>> slices = SliceSet.from_arrays(images, masks, ["anna", "anna", "ben"])
        >>> slices.images.dtype, slices.masks.shape, slices.patient_names()
        (dtype('float32'), (3, 8, 8, 1), ('anna', 'ben'))
        >>> SliceSet.from_arrays(images, masks.astype(int), classes=("sky", "road", "car")).target_names()
        ('road', 'car')
        """
        pixels, marks = (a[..., None] if a.ndim == 3 else a for a in (np.asarray(images), np.asarray(masks)))
        if pixels.dtype not in IMAGE_DTYPES:
            if pixels.dtype.kind not in "biuf":
                raise ValueError(f"images must be real numbers, got {pixels.dtype}")
            with np.errstate(over="ignore"):  # what is too large for float32 is found by the constructor
                pixels = pixels.astype(np.float32)
        if marks.dtype.kind not in "biu":
            advice = "give the numbers of the classes" if classes else "give masks > 0.5, say"
            raise ValueError(
                f"masks must be bool or integers{'' if classes else ' 0 and 1'}, got {marks.dtype}; {advice}"
            )
        # Before uint8 makes 0 of 256; which of these numbers are classes, the constructor knows.
        if marks.min(initial=0) < 0 or marks.max(initial=0) > (IGNORE if classes else 1):
            found = f"{marks.min()} to {marks.max()}"
            if classes:
                raise ValueError(f"masks must hold the numbers of the classes, or {IGNORE} to ignore, got {found}")
            advice = "give masks > 0, say, or the names of the classes, if these are their numbers"
            raise ValueError(f"masks must hold 0 and 1 only, got {found}; {advice}")
        if marks.ndim != 4 or marks.shape[:3] != pixels.shape[:3]:
            raise ValueError(
                f"masks must be (S, H, W, K) or (S, H, W), and images (S, H, W, C), channels last; "
                f"got masks {marks.shape} and images {pixels.shape}"
            )
        numbers = tuple(range(len(pixels)))
        names = tuple(map(str, numbers if groups is None else groups))
        files = tuple(f"image {number}" for number in numbers)
        words, labels = Words(targets=tuple(targets)), tuple(classes)
        return cls(pixels, marks.astype(np.uint8, copy=False), names, numbers, files, words=words, classes=labels)

    @classmethod
    def unlabelled(cls, images: np.ndarray) -> "SliceSet":
        """The volume ``images``, (S, H, W, C), in which nobody has drawn a tumour yet: its masks are empty."""
        count, masks = len(images), np.zeros((*images.shape[:3], 1), np.uint8)
        return cls(images, masks, patients=("volume",) * count, numbers=tuple(range(count)), files=("",) * count)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def is_binary(self) -> bool:
        """Whether there is one target alone, marked by 1 in masks of 0 and 1."""
        return not self.classes and self.masks.shape[3] == 1

    def target_names(self) -> tuple[str, ...]:
        """What is to be found: the classes but the background, or what each channel of the masks marks.

        >>> SliceSet.unlabelled(np.zeros((1, 8, 8, 3), np.uint8)).target_names()
        ('foreground',)
        """
        if self.classes:
            return self.classes[1:]
        if self.words.targets:
            return self.words.targets
        if self.is_binary:
            return (self.words.target,)
        return tuple(f"{self.words.target} {k + 1}" for k in range(self.masks.shape[3]))

    def marked(self, index: int | np.ndarray) -> np.ndarray:
        """The masks at ``index``, a number or several, target by target: uint8 (..., H, W, T) of 0 and 1."""
        return target_masks(self.masks[index], len(self.classes))

    def areas(self) -> np.ndarray:
        """How many pixels of each target are marked on each slice: int64 (S, T)."""
        if not self.classes:
            return self.masks.sum(axis=(1, 2), dtype=np.int64)
        counts = [np.bincount(mask.ravel(), minlength=IGNORE + 1)[1 : len(self.classes)] for mask in self.masks]
        return np.array(counts, np.int64).reshape(len(self), -1)

    def patient_names(self) -> tuple[str, ...]:
        """The patients' names, each once, in the order of their slices."""
        return tuple(dict.fromkeys(self.patients))

    def patient_indices(self) -> np.ndarray:
        """For each slice the place of its patient in ``patient_names()``: int (S,), read-only."""
        return self._patient_indices

    @cached_property  # every batch asks for it
    def _patient_indices(self) -> np.ndarray:
        place = {name: index for index, name in enumerate(self.patient_names())}
        indices = np.array([place[name] for name in self.patients], dtype=np.intp)
        indices.setflags(write=False)
        return indices

    def extent(self, index: int) -> tuple[slice, slice]:
        """The rows and columns of the arrays at ``index`` that the image has; the others are padding."""
        height, width = self.masks.shape[1:3] if self.extents is None else self.extents[index].tolist()
        return slice(0, height), slice(0, width)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "SliceSet":
        """The slices at ``indices``, as a SliceSet with copied arrays.

        Raises ValueError if the indices do not ascend or lie outside [0, S): in another order a patient's
        slices would not be a volume any more.
        """
        index = np.asarray(indices, dtype=np.intp)
        if index.ndim != 1 or np.any(np.diff(index) <= 0):
            raise ValueError("indices must be one row of ascending integers, each at most once")
        if index.size and (index[0] < 0 or index[-1] >= len(self)):
            raise ValueError(f"indices must be in [0, {len(self)}), got {index[0]} to {index[-1]}")
        return self._part(index, self.images[index], self.masks[index])

    def split(self, parts: Sequence[np.ndarray]) -> list["SliceSet"]:
        """The slices at the indices of each part, as SliceSets that share this one's memory: large data fit only once.

        For that the slices are put in the order of the parts, in place: this SliceSet must not be used afterwards.

        Raises ValueError if the indices of a part do not ascend, or a slice is not in exactly one part.
        """
        order = np.concatenate(parts)
        if any(np.any(np.diff(part) <= 0) for part in parts) or not np.array_equal(np.sort(order), range(len(self))):
            raise ValueError("parts must hold the index of each slice once, ascending within a part")
        for array in (self.images, self.masks):
            _reorder(array, order)
        ends = np.cumsum([len(part) for part in parts])
        rows = [slice(end - len(part), end) for part, end in zip(parts, ends, strict=True)]
        return [self._part(part, self.images[r], self.masks[r]) for part, r in zip(parts, rows, strict=True)]

    def _part(self, index: np.ndarray, images: np.ndarray, masks: np.ndarray) -> "SliceSet":
        return SliceSet(
            images=images,
            masks=masks,
            patients=tuple(self.patients[i] for i in index),
            numbers=tuple(self.numbers[i] for i in index),
            files=tuple(self.files[i] for i in index),
            skipped=self.skipped,
            extents=None if self.extents is None else self.extents[index],
            words=self.words,
            classes=self.classes,
        )


def target_masks(masks: np.ndarray, classes: int) -> np.ndarray:
    """``masks`` (..., 1) of the numbers of ``classes`` as one mask a target: uint8 (..., classes - 1) of 0 and 1.

    The background is no target. With 0 ``classes`` the masks are that already.

    >>> target_masks(np.array([[0], [2], [IGNORE]], np.uint8), 3)
    array([[0, 0],
           [0, 1],
           [0, 0]], dtype=uint8)
    """
    return masks if not classes else (masks == np.arange(1, classes)).astype(np.uint8)


def _values(masks: np.ndarray) -> set[int]:
    """The different values of ``masks``, mask by mask: np.unique would sort them all."""
    found = np.zeros(256, np.int64)
    for mask in masks:
        found += np.bincount(mask.ravel(), minlength=256)
    return set(np.flatnonzero(found).tolist())


def _reorder(array: np.ndarray, order: np.ndarray) -> None:
    """``array[:] = array[order]``, with one row aside instead of a copy of all.

    >>> values = np.array([10, 11, 12, 13])
    >>> _reorder(values, np.array([2, 0, 1, 3]))
    >>> values
    array([12, 10, 11, 13])
    """
    placed = np.zeros(len(order), bool)
    for start in range(len(order)):
        if placed[start]:
            continue
        # The row that goes here leaves its own place free for the next one, and so on, until the circle closes.
        first, row = array[start].copy(), start
        while order[row] != start:
            array[row] = array[order[row]]
            placed[row] = True
            row = order[row]
        array[row] = first
        placed[row] = True
