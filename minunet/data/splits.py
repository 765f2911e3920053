"""Who is trained on, who chooses the best epoch, who is tested on: a split by patient, and the flawed one by slice.

Neighbouring slices of one patient are nearly the same picture. If some are trained on and others tested on, the test
asks what the network remembers, not what it has understood. So a patient goes to one part whole.

Where a patient goes is a function of the patient's name alone, by a hash: whichever patients are present, in whatever
order, a patient is in the same fold on every machine. Two people who own different halves of the data can
compare results without ever having trained on each other's test patients.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minunet.base.errors import UserError
from minunet.base.rng import SAMPLE, Key, generator


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

    Raises UserError if a part has no patient, and ValueError for arguments out of range.

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
    for part in Split._fields:
        if part not in part_of.values():
            raise UserError(
                f"split by patient: of {len(part_of)} patients none falls to {part} "
                f"(fold {test_fold} of {folds} is the test), read more patients or choose another test fold"
            )
    parts = np.array([part_of[patient] for patient in patients])
    return Split(*(np.flatnonzero(parts == part) for part in Split._fields))


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
