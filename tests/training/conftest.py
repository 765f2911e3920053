"""The slices that the tests of training share."""

import pytest

from minunet.data import phantom


@pytest.fixture(scope="module")
def slices():
    made = phantom.make(patients=3, size=16, seed=1)
    first, second, third = made.patient_names()
    of = {name: made.subset([i for i, p in enumerate(made.patients) if p == name]) for name in (first, second, third)}
    return made.subset([i for i, p in enumerate(made.patients) if p != third]), of[third]
