"""Who is trained on, who chooses the best epoch, who is tested on: a split by patient, and the flawed one by slice.

What is said of patients holds for any groups of images that belong together.

Neighbouring slices of one patient are nearly the same picture. If some are trained on and others tested on, the test
asks what the network remembers, not what it has understood. So a patient goes to one part whole.

Where a patient goes is a function of the patient's name alone, by a hash: whichever patients are present, in whatever
order, a patient is in the same fold on every machine. Two people who own different halves of the data can
compare results without ever having trained on each other's test patients. Only where there are so few patients that
this rule would leave a part empty are they dealt out among those present, in the order of their hashes.
"""

import csv
import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minunet.base.durable import open_regular
from minunet.base.errors import UserError
from minunet.base.rng import SAMPLE, Key, generator
from minunet.data.images import shown

#: No split file is larger: this one would list more than 100,000 groups.
MAX_BYTES = 2**23


class Split(NamedTuple):
    """Indices of slices, ascending: each slice is in one part. int arrays (S_part,), ready for ``SliceSet.subset``."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def fold_of(patient: str, folds: int = 5) -> int:
    """The fold, 0 ... folds - 1, of a patient: the SHA-256 of the name, as a number, modulo ``folds``.

    Raises ValueError if ``folds`` is below 1.

    >>> fold_of("TCGA_CS_4941"), fold_of("TCGA_CS_4942"), fold_of("TCGA_CS_4943")
    (1, 4, 1)
    """
    if folds < 1:
        raise ValueError(f"folds must be at least 1, got {folds}")
    return _hash(patient) % folds


def _hash(patient: str) -> int:
    # "surrogateescape" is how Python keeps bytes of a file name that are no UTF-8: any folder's name can be hashed.
    return int(hashlib.sha256(patient.encode("utf-8", "surrogateescape")).hexdigest(), 16)


def split_by_patient(
    patients: Sequence[str], test_fold: int = 0, folds: int = 5, validation_share: float = 1 / 8
) -> Split:
    """Tests on one fold of patients; of the others a share validates, the rest is trained on.

    patients          the patient of each slice (``slices.patients``)
    test_fold         every fold can be the test fold once: cross-validation
    validation_share  the expected share of the patients outside the test fold, in (0, 1). With few patients the
                      true share scatters around it, the price of a rule that looks at one name at a time

    Where that leaves a part empty, the patients are dealt out by the rank of their hash, and each part gets its share,
    one patient at least. (Other folds of the same patients may follow the rule by name: a patient can then be tested
    in two folds. ``split_by_file`` is the way to a cross-validation of few patients.)

    Raises UserError if there are fewer than 3 patients, and ValueError for arguments out of range.

    >>> split_by_patient(["anna", "anna", "ben", "carl", "dora", "emil"], test_fold=1, folds=2, validation_share=0.3)
    Split(train=array([2, 3]), validation=array([5]), test=array([0, 1, 4]))
    """
    if not 0 <= test_fold < folds:
        raise ValueError(f"test_fold must be in [0, folds) = [0, {folds}), got {test_fold}")
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must be in (0, 1), got {validation_share}")
    part_of = {}
    for patient in set(patients):
        # The remainder modulo ``folds`` has told the fold; the quotient is as good as a second, independent hash.
        # Its last six decimals are the patient's place in [0, 1).
        quotient, fold = divmod(_hash(patient), folds)
        place = quotient % 10**6 / 10**6
        part_of[patient] = "test" if fold == test_fold else "validation" if place < validation_share else "train"
    if set(part_of.values()) != set(Split._fields):
        part_of = _dealt(sorted(part_of, key=_hash), test_fold, folds, validation_share)
    return _split(patients, part_of)


def _dealt(ranked: Sequence[str], test_fold: int, folds: int, validation_share: float) -> dict[str, str]:
    """The part of each patient: the fold's share of the ``ranked`` tests, the next ones validate, the rest trains."""
    count = len(ranked)
    if count < len(Split._fields):
        raise UserError(
            f"split: training, validation and test need 3 groups (patients) at least, found {count}, read more"
        )
    start = test_fold * count // folds
    test = min(max(1, (test_fold + 1) * count // folds - start), count - 2)
    validation = min(max(1, round((count - test) * validation_share)), count - test - 1)
    parts = ["test"] * test + ["validation"] * validation + ["train"] * (count - test - validation)
    return {ranked[(start + place) % count]: part for place, part in enumerate(parts)}


def _split(patients: Sequence[str], part_of: dict[str, str]) -> Split:
    parts = np.array([part_of[patient] for patient in patients])
    return Split(*(np.flatnonzero(parts == part) for part in Split._fields))


def split_by_file(patients: Sequence[str], path: str | os.PathLike[str]) -> Split:
    """The split that a CSV file gives: a line ``group,part``, then one for each group, its part one of ``Split``'s.

    patients  the patient, or group, of each slice (``slices.patients``)

    Raises UserError if the file cannot be read or is no such table, names a group twice or one that is not there,
    leaves one out, or leaves a part empty.
    """
    name = shown(path)
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{name}: above the ceiling of {MAX_BYTES} bytes; give a table of groups and their parts")
        lines = content.decode("utf-8-sig").splitlines()  # -sig: a mark that Excel writes
        header, *rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if row] or [[]]
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({(error.strerror or str(error)).lower()}), check the path") from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{name}: no CSV file in UTF-8, save it as one") from None
    except ValueError as error:
        raise UserError(f"{name}: {error}; give a CSV file") from None
    expected = f"{', '.join(Split._fields[:-1])} or {Split._fields[-1]}"
    if header != ["group", "part"]:
        raise UserError(f"{name}: begins with {','.join(header)!r:.80}, expected the line group,part")
    part_of: dict[str, str] = {}
    for row in rows:
        if len(row) != 2 or row[1] not in Split._fields:
            raise UserError(f"{name}: a line {','.join(row)!r:.80}, expected a group, a comma and {expected}")
        if row[0] in part_of:
            raise UserError(f"{name}: names the group {row[0]!r:.80} twice, keep one of the lines")
        part_of[row[0]] = row[1]
    present = set(patients)
    for groups, found in ((part_of.keys() - present, "not in the data"), (present - part_of.keys(), "not in the file")):
        if groups:
            listed = ", ".join(sorted(groups)[:5]) + (", ..." if len(groups) > 5 else "")
            raise UserError(f"{name}: groups that are {found}: {shown(listed)}; give each group of the data a part")
    for part in Split._fields:
        if part not in part_of.values():
            raise UserError(f"{name}: no group has the part {part}, give each part one at least")
    return _split(patients, part_of)


def split_by_slice(count: int, seed: int) -> Split:
    """The reference's split: slices shuffled, 64 % to train, 16 % to validate, 20 % to test, whoever's they are.

    FLAWED, and here to be measured: a test slice's neighbours have been trained on. Of 1600 slices these are the
    reference's 1024, 256 and 320: a fifth to test, then a fifth of the rest, each rounded up.

    Raises ValueError if ``count`` is below 3, so that a part would be empty.

    >>> [len(part) for part in split_by_slice(1600, seed=0)]
    [1024, 256, 320]
    """
    if count < 3:
        raise ValueError(f"count must be at least 3, got {count}")
    test = -(-count // 5)
    validation = -(-(count - test) // 5)
    shuffled = generator(Key(seed=seed, stream=SAMPLE)).permutation(count)
    ends = np.split(shuffled, [test, test + validation])
    return Split(train=np.sort(ends[2]), validation=np.sort(ends[1]), test=np.sort(ends[0]))
