"""Splits: nobody on two sides, and a patient's side depends on nobody else."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.base.errors import UserError
from minunet.data.splits import fold_of, split_by_patient, split_by_slice

MANY = tuple(f"patient {n}" for n in range(400) for _ in range(1 + n % 3))
PART_OF = {MANY[i]: part for part, indices in enumerate(split_by_patient(MANY)) for i in indices}


@given(st.text(max_size=20), st.integers(1, 30))
def test_the_fold_is_the_hash_modulo_the_folds(name, folds):
    try:
        data = name.encode()
    except UnicodeEncodeError:  # a lone surrogate: bytes of a file name that were no UTF-8
        return
    assert fold_of(name, folds) == int(hashlib.sha256(data).hexdigest(), 16) % folds


def test_a_name_that_is_not_utf8_has_a_fold():
    assert fold_of("caf\udce9") == int(hashlib.sha256(b"caf\xe9").hexdigest(), 16) % 5


@pytest.mark.parametrize("test_fold", range(5))
def test_every_slice_is_in_one_part_and_every_patient_too(test_fold):
    split = split_by_patient(MANY, test_fold=test_fold)
    assert sorted(np.concatenate(split).tolist()) == list(range(len(MANY)))
    patients = [{MANY[i] for i in part} for part in split]
    assert sum(len(part) for part in patients) == 400
    assert all(fold_of(patient) == test_fold for patient in patients[2])
    assert all(np.all(np.diff(part) > 0) for part in split)
    # 400 patients: a share of 1/5 has a standard deviation of 0.02, one of 1/8 of the other 320 of 0.018.
    assert abs(len(patients[2]) / 400 - 1 / 5) < 0.08
    assert abs(len(patients[1]) / (400 - len(patients[2])) - 1 / 8) < 0.075


@given(st.sets(st.integers(0, 399), min_size=5, max_size=60), st.randoms(use_true_random=False))
def test_a_patients_part_does_not_depend_on_who_else_is_there_or_on_the_order(chosen, shuffle):
    some = [f"patient {n}" for n in chosen]
    shuffle.shuffle(some)
    try:
        split = split_by_patient(some)
    except UserError:
        assert {PART_OF[patient] for patient in some} != {0, 1, 2}
        return
    for part, indices in enumerate(split):
        assert all(PART_OF[some[i]] == part for i in indices)


def test_more_validation_share_moves_patients_from_train_to_validation_only():
    smaller, larger = split_by_patient(MANY, validation_share=0.1), split_by_patient(MANY, validation_share=0.3)
    np.testing.assert_array_equal(smaller.test, larger.test)
    assert set(smaller.validation) < set(larger.validation)


@pytest.mark.parametrize("patients", [[], ["anna"], ["anna", "ben"]])
def test_too_few_patients_is_one_clear_line(patients):
    with pytest.raises(
        UserError, match=r"split by patient: of \d patients none falls to \w+ .*read more patients"
    ) as found:
        split_by_patient(patients)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test_fold": 5}, "test_fold must be"),
        ({"test_fold": -1}, "test_fold must be"),
        ({"validation_share": 0.0}, "validation_share must be"),
        ({"validation_share": 1.0}, "validation_share must be"),
        ({"validation_share": float("nan")}, "validation_share must be"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_by_patient(MANY, **arguments)
    with pytest.raises(ValueError, match="folds must be at least 1"):
        fold_of("anna", 0)


@given(st.integers(3, 500), st.integers(0, 2**32))
def test_by_slice_every_slice_is_in_one_part(count, seed):
    split = split_by_slice(count, seed)
    assert sorted(np.concatenate(split).tolist()) == list(range(count))
    assert all(len(part) > 0 and np.all(np.diff(part) > 0) for part in split)
    assert abs(len(split.test) - 0.2 * count) < 1
    assert abs(len(split.validation) - 0.16 * count) < 1.2


def test_by_slice_is_shuffled_by_its_seed_alone():
    np.testing.assert_array_equal(split_by_slice(100, 7).test, split_by_slice(100, 7).test)
    assert set(split_by_slice(100, 7).test) != set(split_by_slice(100, 8).test)
    assert [len(part) for part in split_by_slice(1600, 0)] == [1024, 256, 320]
    with pytest.raises(ValueError, match="count must be at least 3"):
        split_by_slice(2, 0)
