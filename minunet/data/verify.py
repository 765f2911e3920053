"""Look a data set over before a network is trained on it.

    python -m minunet.data.verify kaggle_3m                               what it holds, faults, warnings
    python -m minunet.data.verify kaggle_3m --write-manifest lgg.sha256   and notes what each file holds now
    python -m minunet.data.verify kaggle_3m --manifest lgg.sha256         and finds the files that have changed since

A fault is what training refuses: a file that cannot be read, an image without its mask. A warning is what training
takes without a word, and a person should know: one image in two groups, a sequence that is a copy of another, a set
whose masks are empty. Groups are what is split as one: of LGG-MRI the patients.
"""

# Training reads a set once: ``inspect`` looks at the slices that it has read, ``inspect_folder`` at the files. Both
# note a few facts of each slice (``slice_facts``) and make their report of these alone (``summarize``).

import argparse
import hashlib
import itertools
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minunet.base import cli
from minunet.base.durable import json_text
from minunet.base.errors import UserError
from minunet.data import reader
from minunet.data.images import shown
from minunet.data.manifest import check_new, differences, digests, read_manifest, write_manifest
from minunet.data.reader import FAULTS_SHOWN, THREADS
from minunet.data.slices import IGNORE, SliceSet, Words

NAMES_SHOWN = 8  # of the files or patients that a warning is about; --json prints them all

#: What it means that pre-contrast equals FLAIR, FLAIR post-contrast, and post-contrast pre-contrast: none, one or all.
COPIES = {
    (True, True, True): "pre- and post-contrast are copies of FLAIR",
    (True, False, False): "pre-contrast is a copy of FLAIR",
    (False, True, False): "post-contrast is a copy of FLAIR",
    (False, False, True): "post-contrast is a copy of pre-contrast",
}


class SliceFacts(NamedTuple):
    """What is kept of one slice."""

    patient: str
    number: int
    file: str
    shape: tuple[int, ...]  # height, width
    tumour: int  # pixels of what the masks mark, of several targets in any of them
    labels: tuple[int, ...]  # of classes, or of several masks: pixels of each; else empty
    ignored: int  # pixels of which nobody knows the class
    constant: bool  # whether the image has one grey value all over
    equal: tuple[bool, ...]  # whether channels 0 and 1 are, 1 and 2, 2 and 0; empty unless there are three
    digest: bytes  # of the image: equal for equal images


@dataclass(frozen=True)
class Remark:
    """A warning: what was found, in which files or patients, and what to do about it."""

    found: str
    names: tuple[str, ...]
    advice: str

    def __str__(self) -> str:
        names = f": {', '.join(self.names[:NAMES_SHOWN])}" if self.names else ""
        more = f" and {len(self.names) - NAMES_SHOWN} more" if len(self.names) > NAMES_SHOWN else ""
        return f"{self.found}{names}{more}; {self.advice}"


@dataclass(frozen=True)
class Label:
    """How often a class, or one of several masks, is seen."""

    share: float  # of all pixels
    images: int


@dataclass(frozen=True)
class Report:
    """What a data set holds, what is wrong with it and what is odd about it. ``print(report)`` shows it.

    The figures are those of the slices that could be read; a share is a part of 1. The names of the fields are those of
    LGG-MRI for every data set: a patient is a group, and tumour what the masks mark.
    """

    patients: int
    slices: int
    sizes: dict[str, int]  # slices by "width x height", the most frequent size first
    tumour_slices: int
    tumour_share: float  # of all pixels
    tumour_share_by_patient: tuple[float, float, float]  # least, median and greatest
    patients_without_tumour: int
    faults: tuple[str, ...]  # one line each
    warnings: tuple[Remark, ...]
    words: Words
    labels: dict[str, Label]  # by its name, each class or each of several masks; empty if there is one mask of 0 and 1
    ignored_share: float  # of all pixels: those of which nobody knows the class

    def __str__(self) -> str:
        lines = []
        if self.slices:
            sizes = [f"{count} of {size}" if len(self.sizes) > 1 else size for size, count in self.sizes.items()]
            shown_sizes = ", ".join(sizes[:8]) + (", ..." if len(sizes) > 8 else "")
            words = self.words
            lines = [
                f"data: {_count(self.patients, words.group)}, {_count(self.slices, words.image)}, {shown_sizes} pixels"
            ]
            lines += self._label_lines() if self.labels else [self._tumour_line()]
        lines += [f"fault: {fault}" for fault in self.faults[:FAULTS_SHOWN]]
        if len(self.faults) > FAULTS_SHOWN:
            lines.append(f"fault: and {len(self.faults) - FAULTS_SHOWN} more")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _tumour_line(self) -> str:
        words = self.words
        without = _count(self.patients_without_tumour, words.group)
        least, median, greatest = (f"{share:.2%}" for share in self.tumour_share_by_patient)
        return (
            f"data: {words.target} on {_count(self.tumour_slices, words.image)} "
            f"({self.tumour_slices / self.slices:.1%}), "
            f"{self.tumour_share:.2%} of all pixels; by {words.group} {least} to {greatest}, median {median}"
            + (f", none in {without}" if self.patients_without_tumour else "")
        )

    def _label_lines(self) -> list[str]:
        lines = [
            f"data: {name} on {_count(label.images, self.words.image)} ({label.images / self.slices:.1%}), "
            f"{label.share:.2%} of all pixels"
            for name, label in self.labels.items()
        ]
        return lines + ([f"data: to be ignored, {self.ignored_share:.2%} of all pixels"] if self.ignored_share else [])


# ------------------------------------------------------------------------------------------ two ways to a report


def inspect(slices: SliceSet, *, grouped: bool = False) -> Report:
    """The report on slices that have been read. There are no faults: reading would have refused them.

    If somebody has ``grouped`` them by a split file, images that are groups of their own get no warning.

    >>> images = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    >>> masks = np.array([[1] + 15 * [0], 16 * [0]], np.uint8).reshape(2, 4, 4, 1)
    >>> print(inspect(SliceSet(images, masks, ("anna", "anna"), (1, 4), ("anna_1.tif", "anna_4.tif"))))
    data: 1 group, 2 images, 4 x 4 pixels
    data: foreground on 1 image (50.0%), 3.12% of all pixels; by group 3.12% to 3.12%, median 3.12%
    warning: image numbers are left out in 1 group: anna 2 to 3; their volumes have gaps, add them if you have them
    """

    def facts(index: int) -> SliceFacts:
        whose = slices.patients[index], slices.numbers[index], slices.files[index]
        rows, columns = slices.extent(index)
        pixels = slices.images[index, rows, columns], slices.masks[index, rows, columns]
        return slice_facts(*whose, *pixels, len(slices.classes))

    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        found = list(pool.map(facts, range(len(slices))))
    names = slices.classes or (() if slices.is_binary else slices.target_names())
    return summarize(found, slices.words, warnings=_left_out(slices.skipped), names=names, grouped=grouped)


def inspect_folder(
    folder: Path,
    *,
    allow_missing: bool = False,
    manifest: Path | None = None,
    folders: Sequence[str] | None = None,
    invert_masks: bool = False,
    target_name: str | None = None,
    classes: Sequence[str] = (),
) -> Report:
    """The report on the files in ``folder``, each read at its own size.

    allow_missing  an image without a mask and a mask without an image are worth a warning, and are no faults
    manifest       to compare the files with

    The others as ``reader.read_folder`` takes them.

    Raises UserError if the folder cannot be listed or the manifest cannot be read.
    """
    reader.check_classes(classes, folders, invert_masks)
    expected = None if manifest is None else read_manifest(manifest)
    listing = reader.list_folder(folder, folders=folders)
    facts: list[SliceFacts | None] = [None] * len(listing.pairs)

    def note(index: int, image: np.ndarray, mask: np.ndarray) -> None:
        pair = listing.pairs[index]
        facts[index] = slice_facts(pair.patient, pair.number, str(pair.image), image, mask, len(classes))

    faults = listing.faults + reader.read_pairs(listing, note, invert_masks=invert_masks, classes=len(classes))
    if not allow_missing:
        faults += reader.missing_partners(listing)
    if expected is not None:
        faults += differences(expected, digests(listing))
    warnings = _left_out([str(path) for path in listing.unpaired]) if allow_missing else []
    words = reader.words_of(listing, target_name)
    if 0 < len(groups := {pair.patient for pair in listing.pairs}) < 3:
        found = f"too few {words.group}s ({len(groups)}) for training, validation and test"
        warnings.append(Remark(found, (), f"add {words.group}s, 3 at least"))
    known = [fact for fact in facts if fact is not None]
    return summarize(known, words, faults, warnings, names=tuple(classes) or words.targets)


# ------------------------------------------------------------------------------------------ from slices to a report


def slice_facts(
    patient: str, number: int, file: str, image: np.ndarray, mask: np.ndarray, classes: int = 0
) -> SliceFacts:
    """What is to be known of a slice: ``image`` uint8 or uint16 (H, W, C), ``mask`` (H, W, K) as SliceSet has it."""
    labels, ignored = (), 0
    if classes:
        counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)
        labels, ignored = tuple(counts[:classes].tolist()), int(counts[IGNORE])
    elif mask.shape[2] > 1:
        labels = tuple(mask.sum(axis=(0, 1), dtype=np.int64).tolist())
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return SliceFacts(
        patient=patient,
        number=number,
        file=file,
        shape=mask.shape[:2],
        tumour=sum(labels[1:]) if classes else int(mask.any(axis=2).sum()),
        labels=labels,
        ignored=ignored,
        constant=bool(image.min() == image.max()),
        # Every eighth row tells most channels apart; only the others are compared in full.
        equal=tuple(
            np.array_equal(image[::8, :, a], image[::8, :, b]) and np.array_equal(image[..., a], image[..., b])
            for a, b in ((0, 1), (1, 2), (2, 0))
            if image.shape[2] == 3
        ),
        digest=digest.digest(),
    )


def summarize(
    facts: Sequence[SliceFacts],
    words: Words,
    faults: Sequence[str] = (),
    warnings: Sequence[Remark] = (),
    names: Sequence[str] = (),
    grouped: bool = False,
) -> Report:
    """The report on the slices of which ``facts`` are known, in the order of patients and numbers.

    ``names`` are those of the classes, or of several masks; none for a single mask of 0 and 1.
    """
    volumes: dict[str, list[SliceFacts]] = defaultdict(list)
    for fact in facts:
        volumes[fact.patient].append(fact)
    shares = [_tumour_share(volume) for volume in volumes.values()] or [0.0]
    pixels = sum(fact.shape[0] * fact.shape[1] for fact in facts) or 1
    labels = {
        name: Label(sum(fact.labels[k] for fact in facts) / pixels, sum(fact.labels[k] > 0 for fact in facts))
        for k, name in enumerate(names)
    }
    of_masks = _never_seen(facts, labels) if names else _tumour(volumes, words)
    odd = [*of_masks, *_shared(facts, words), *_constant(facts)]
    if words.channels:
        odd += _copies(volumes)
    if not faults:  # else what could not be read would look like a gap
        odd += _gaps(volumes, words)
    odd += [] if grouped else _ungrouped(facts)
    return Report(
        patients=len(volumes),
        slices=len(facts),
        sizes=dict(Counter("{1} x {0}".format(*fact.shape) for fact in facts).most_common()),
        tumour_slices=sum(fact.tumour > 0 for fact in facts),
        tumour_share=_tumour_share(facts),
        tumour_share_by_patient=(min(shares), statistics.median(shares), max(shares)),
        patients_without_tumour=sum(share == 0 for share in shares) if volumes else 0,
        faults=tuple(faults),
        warnings=(*odd, *warnings),
        words=words,
        labels=labels,
        ignored_share=sum(fact.ignored for fact in facts) / pixels,
    )


def _tumour_share(facts: Sequence[SliceFacts]) -> float:
    pixels = sum(fact.shape[0] * fact.shape[1] for fact in facts)
    return sum(fact.tumour for fact in facts) / pixels if pixels else 0.0


# ------------------------------------------------------------------------------------------ what is odd


def _tumour(volumes: dict[str, list[SliceFacts]], words: Words) -> list[Remark]:
    facts = [fact for volume in volumes.values() for fact in volume]
    if facts and not any(fact.tumour for fact in facts):
        advice = (
            "a network will learn to find nothing, and Dice of two empty masks is 1; check that these are the masks"
        )
        return [Remark(f"no mask shows any {words.target}", (), advice)]
    found = f"more than half of the pixels are {words.target}"
    most = sum(_tumour_share([fact]) > 0.5 for fact in facts)
    if 2 * most > len(facts):
        advice = "check the masks; --invert-masks swaps 0 and 1 in all of them"
        return [Remark(f"{found} on {most} of {_count(len(facts), words.image)}", (), advice)]
    patients = [patient for patient, volume in volumes.items() if _tumour_share(volume) > 0.5]
    others = (fact for patient, volume in volumes.items() if patient not in patients for fact in volume)
    slices = [fact.file for fact in others if _tumour_share([fact]) > 0.5]
    advice = "check that these masks are not inverted"
    return [
        Remark(f"{found} {where} {_count(len(names), noun)}", _shown(names), advice)
        for where, noun, names in (("in", words.group, patients), ("on", words.image, slices))
        if names
    ]


def _never_seen(facts: Sequence[SliceFacts], labels: dict[str, Label]) -> list[Remark]:
    names = tuple(name for name, label in labels.items() if label.images == 0)
    advice = "what is never shown cannot be learnt, check the masks"
    if any(fact.ignored for fact in facts):
        advice += f" (pixels of the value {IGNORE} are ignored)"
    return [Remark("seen on no image", names, advice)] if names and facts else []


def _shared(facts: Sequence[SliceFacts], words: Words) -> list[Remark]:
    """Equal images of two groups. Images of one grey value are equal by nature, and do not count."""
    first: dict[bytes, SliceFacts] = {}
    pairs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for fact in facts:
        other = first.setdefault(fact.digest, fact)
        if other.patient != fact.patient and not fact.constant:
            pairs[other.patient, fact.patient].append(f"{shown(other.file)} = {shown(fact.file)}")
    if not pairs:
        return []
    found = f"{_count(sum(map(len, pairs.values())), 'image')} under two {words.group}s"
    examples = tuple(
        files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more of these two"
        for files in pairs.values()
    )
    advice = f"to train on one of them and test on the other proves nothing, keep one {words.group} of the two"
    return [Remark(found, examples, advice)]


def _constant(facts: Sequence[SliceFacts]) -> list[Remark]:
    files = [fact.file for fact in facts if fact.constant]
    advice = "nothing can be learnt from it, replace it if it should show something"
    return [Remark(f"{_count(len(files), 'image')} of one grey value all over", _shown(files), advice)] if files else []


def _copies(volumes: dict[str, list[SliceFacts]]) -> list[Remark]:
    """Sequences that were not taken of a patient, in whose place there is another."""
    patients: dict[str, list[str]] = defaultdict(list)
    for patient, volume in volumes.items():
        equal = tuple(all(column) for column in zip(*(fact.equal for fact in volume), strict=True))
        if equal in COPIES and not all(fact.constant for fact in volume):
            patients[COPIES[equal]].append(patient)
    advice = "what is a copy tells nothing, replace it if you have that sequence"
    return [
        Remark(f"{what} in {_count(len(names), 'patient')}", _shown(names), advice) for what, names in patients.items()
    ]


def _gaps(volumes: dict[str, list[SliceFacts]], words: Words) -> list[Remark]:
    names = []
    for patient, volume in volumes.items():
        numbers = [fact.number for fact in volume]
        gaps = [
            str(before + 1) if after == before + 2 else f"{before + 1} to {after - 1}"
            for before, after in itertools.pairwise(numbers)
            if after > before + 1
        ]
        if gaps:
            names.append(f"{shown(patient)} {', '.join(gaps[:3])}{', ...' if len(gaps) > 3 else ''}")
    advice = "their volumes have gaps, add them if you have them"
    found = f"{words.image} numbers are left out in {_count(len(names), words.group)}"
    return [Remark(found, tuple(names), advice)] if names else []


def _ungrouped(facts: Sequence[SliceFacts]) -> list[Remark]:
    """Images that lie in one folder, and are groups of their own for want of folders of groups."""
    folders = {Path(fact.file).parent for fact in facts}
    if len(folders) > 1 or len(facts) < 2 or len({fact.patient for fact in facts}) < len(facts):
        return []
    found = f"no group folders: each of the {len(facts)} images counts as a group of its own"
    return [Remark(found, (), "neighbouring slices of one stack belong in one part of the split, see --split-file")]


def _left_out(files: Sequence[str]) -> list[Remark]:
    found = f"{_count(len(files), 'file')} without a partner left out"
    return [Remark(found, _shown(files), "add the image or mask that is missing, if you have it")] if files else []


def _shown(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(shown(name) for name in names)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# ------------------------------------------------------------------------------------------ the command


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a folder of data is read; one that is not given is None."""
    add = parser.add_argument
    add(
        "--folders",
        nargs="+",
        metavar=("IMAGES", "MASKS"),
        help="the names of two folders: equal names in them pair; more folders of masks: masks that may overlap",
    )
    add(
        "--classes",
        type=cli.names,
        metavar="NAME,NAME,...",
        help="masks hold the numbers of these classes (0 is the first, the background; 255: to be ignored)",
    )
    add("--invert-masks", action="store_true", default=None, help="swap 0 and 1 in every mask")
    add("--target-name", type=cli.name, metavar="NAME", help='what the masks mark, such as "road"')
    add("--allow-missing", action="store_true", default=None, help="leave out images without a mask, and masks alone")


def folder_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``reader.read_folder`` and :func:`inspect_folder` that these flags are.

    Raises UserError for flags that do not go together.
    """
    folders = options.folders
    if folders is not None and (len(folders) < 2 or len(set(folders)) < len(folders)):
        raise UserError(
            f"--folders: give the names of two or more different folders, got {' '.join(map(shown, folders))}"
        )
    if options.target_name is not None and (options.classes is not None or len(folders or ()) > 2):
        raise UserError("--target-name: names what one mask of 0 and 1 marks; with several targets each has its name")
    if options.classes is not None and (options.invert_masks or len(folders or ()) > 2):
        other = "--invert-masks" if options.invert_masks else "several folders of masks"
        raise UserError(f"--classes: not together with {other}, each mask holds the numbers of all classes")
    return {
        "folders": options.folders,
        "invert_masks": bool(options.invert_masks),
        "target_name": options.target_name,
        "allow_missing": bool(options.allow_missing),
        "classes": () if options.classes is None else tuple(options.classes.split(",")),
    }


def main(arguments: list[str], program: str = "python -m minunet.data.verify") -> None:
    """Verify the folder that the command line names; ``program`` is how it begins."""
    parser = cli.Parser(prog=program, description=(__doc__ or "").replace("python -m minunet.data.verify", program))
    parser.add_argument("folder", metavar="DIR", help="the folder kaggle_3m, or one of your own (docs/your_data.md)")
    add_folder_arguments(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--manifest", type=Path, metavar="FILE", help="compare every file with what it held then")
    group.add_argument(
        "--write-manifest", type=Path, metavar="FILE", help="note what every file holds, if no fault is found"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with every name")
    options = parser.parse_args(arguments)
    folder = Path(options.folder)
    if options.write_manifest is not None:
        check_new(options.write_manifest)

    report = inspect_folder(folder, manifest=options.manifest, **folder_options(options))
    print(json_text(asdict(report)) if options.json else report)
    if len(report.faults) == 1:
        raise UserError(report.faults[0])
    if report.faults:
        raise UserError(f"{shown(folder)}: {len(report.faults)} faults, listed above; the first: {report.faults[0]}")
    if options.write_manifest is not None:
        write_manifest(options.write_manifest, digests(reader.list_folder(folder, folders=options.folders)))


if __name__ == "__main__":
    sys.exit(cli.run(main))
