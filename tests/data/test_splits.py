"""Splits: nobody on two sides, and a patient's side depends on nobody else, unless there are too few for that."""

import hashlib
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.data.reader import list_folder
from minunet.data.splits import _dealt, fold_of, split_by_file, split_by_patient, split_by_slice
from tests.data.cases import refusal

MANY = tuple(f"patient {n}" for n in range(400) for _ in range(1 + n % 3))


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


def by_name(patients, test_fold=0):
    """The rule by name alone, written down anew: part by patient."""
    part_of = {}
    for patient in patients:
        quotient, fold = divmod(int(hashlib.sha256(patient.encode()).hexdigest(), 16), 5)
        validates = quotient % 10**6 < 125_000
        part_of[patient] = "test" if fold == test_fold else "validation" if validates else "train"
    return part_of


def parts_of(split, patients):
    return {patients[i]: part for part, indices in split._asdict().items() for i in indices}


@given(st.sets(st.integers(0, 399), min_size=3, max_size=60), st.randoms(use_true_random=False), st.integers(0, 4))
def test_where_the_rule_by_name_works_it_holds_whoever_else_is_there(chosen, shuffle, test_fold):
    some = [f"patient {n}" for n in chosen]
    shuffle.shuffle(some)
    expected, found = by_name(some, test_fold), parts_of(split_by_patient(some, test_fold), some)
    if len(set(expected.values())) == 3:
        assert found == expected
    else:
        assert set(found.values()) == {"train", "validation", "test"}


@given(st.sets(st.text(min_size=1, max_size=8), min_size=3, max_size=30), st.integers(0, 4))
def test_every_part_gets_its_share_from_three_groups_on(names, test_fold):
    names = sorted(name.encode("utf-8", "replace").decode() for name in names)
    names = sorted(set(names) | {"a", "b", "c"})
    split = split_by_patient(names, test_fold)
    assert all(len(part) > 0 for part in split)
    assert sorted(np.concatenate(split).tolist()) == list(range(len(names)))


@pytest.mark.parametrize("count", range(3, 31))
def test_few_groups_dealt_out_are_tested_once_each_and_have_their_shares(count):
    ranked = [f"group {n}" for n in range(count)]
    parts = [_dealt(ranked, fold, 5, 1 / 8) for fold in range(5)]
    tested = [name for part_of in parts for name, part in part_of.items() if part == "test"]
    assert set(tested) == set(ranked)
    assert len(tested) == max(5, count)  # of fewer than five, some are tested in two folds
    for part_of in parts:
        sizes = Counter(part_of.values())
        assert abs(sizes["test"] - count / 5) < 1
        assert abs(sizes["validation"] - (count - sizes["test"]) / 8) < 1
        assert sizes["train"] >= 1


def test_the_folds_of_lgg_mri_and_of_the_phantom_stay_what_they_are():
    patients = tuple(f"PHANTOM_00_{number:04d}" for number in range(1, 25))
    sizes = [[len(part) for part in split_by_patient(patients, fold)] for fold in range(5)]
    assert parts_of(split_by_patient(patients), patients) == by_name(patients)
    assert sizes[0] == [15, 4, 5]
    lgg = [f"TCGA_{site}_{number}" for site in ("CS", "DU", "FG", "HT") for number in range(4941, 4969)]
    if "MINUNET_LGG" in os.environ:
        lgg = sorted({pair.patient for pair in list_folder(os.environ["MINUNET_LGG"]).pairs})
    for fold in range(5):
        assert parts_of(split_by_patient(lgg, fold), lgg) == by_name(lgg, fold)


def test_more_validation_share_moves_patients_from_train_to_validation_only():
    smaller, larger = split_by_patient(MANY, validation_share=0.1), split_by_patient(MANY, validation_share=0.3)
    np.testing.assert_array_equal(smaller.test, larger.test)
    assert set(smaller.validation) < set(larger.validation)


@pytest.mark.parametrize("patients", [[], ["anna"], ["anna", "ben"]])
def test_too_few_patients_is_one_clear_line(patients):
    message = refusal(split_by_patient, patients)
    expected = f"need 3 groups (patients) at least, found {len(patients)}, read more"
    assert message == f"split: training, validation and test {expected}"


def test_a_split_by_file(tmp_path):
    path = tmp_path / "split.csv"
    path.write_text('\ufeffgroup,part\r\nanna,test\r\n\r\n"ben, junior", train\r\ncarl,validation\r\n', "utf-8")
    patients = ["anna", "anna", "ben, junior", "carl"]
    assert parts_of(split_by_file(patients, path), patients) == {
        "anna": "test",
        "ben, junior": "train",
        "carl": "validation",
    }


SOUND = "anna,test\nben,train\ncarl,validation\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "begins with '', expected the line group,part"),
        ("group;part\nanna;test\n", "begins with 'group;part', expected the line group,part"),
        (SOUND, "begins with 'anna,test', expected the line group,part"),
        ("group,part\nanna,exam\n", "a line 'anna,exam', expected a group, a comma and train, validation or test"),
        ("group,part\nanna\n", "a line 'anna', expected a group, a comma and"),
        (f"group,part\n{SOUND}anna,train\n", "names the group 'anna' twice, keep one of the lines"),
        (f"group,part\n{SOUND}dora,test\nemil,test\n", "groups that are not in the data: dora, emil; give"),
        (f"group,part\n{SOUND.replace('ben', 'be')}", "groups that are not in the data: be; give"),
        ("group,part\nanna,test\n", "groups that are not in the file: ben, carl; give"),
        (f"group,part\n{SOUND.replace('validation', 'train')}", "no group has the part validation, give each part"),
        (b"group,part\n\xff,test\n", "no CSV file in UTF-8"),
        (b"group,part\n" + b"x" * 2**18, "no CSV file in UTF-8"),
        (b"group,part\n" + bytes(2**23), "above the ceiling of 8388608 bytes"),
    ],
)
def test_a_split_file_with_a_fault_is_refused_in_one_line(tmp_path, content, expected):
    path = tmp_path / "split.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    message = refusal(split_by_file, ["anna", "ben", "carl"], path)
    assert message.startswith(f"{path}: {expected}")


def test_a_split_file_that_is_not_there(tmp_path):
    assert "no such file" in refusal(split_by_file, ["anna"], tmp_path / "absent.csv")
    assert "not a regular file" in refusal(split_by_file, ["anna"], tmp_path)


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
