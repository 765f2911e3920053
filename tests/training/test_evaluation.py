"""What a network does on a set of slices."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.network.loss import SegmentationLoss
from minunet.training.evaluation import evaluate, predict_slices
from tests.training.cases import NORMALIZATION, tiny_net


def test_flip_average_is_the_mean_over_both_views(slices):
    _, validation = slices
    net = tiny_net(dtype="float32")
    mirrored = replace(validation, images=validation.images[:, :, ::-1].copy())
    plain, other = (predict_slices(net, s, NORMALIZATION, batch_size=5) for s in (validation, mirrored))
    both = predict_slices(net, validation, NORMALIZATION, flip_average=True)
    np.testing.assert_allclose(both, (plain + other[:, :, ::-1]) / 2, rtol=1e-5)
    assert plain.shape == validation.masks.shape


@given(batch_size=st.integers(1, 40))
def test_an_evaluation_does_not_depend_on_the_batch_size_but_for_the_loss_over_batches(slices, batch_size):
    _, validation = slices
    net, loss = tiny_net(dtype="float32"), SegmentationLoss(over="image")
    statistics = NORMALIZATION.statistics(validation)
    found = evaluate(net, validation, statistics, loss, batch_size=batch_size)
    whole = evaluate(net, validation, statistics, loss, batch_size=len(validation))
    assert found.dice == whole.dice
    assert found.loss == pytest.approx(whole.loss, rel=1e-5)


def test_an_evaluation_of_some_patients_is_that_of_their_subset(slices):
    train, _ = slices
    net, loss = tiny_net(dtype="float32"), SegmentationLoss()
    places = np.flatnonzero(train.patient_indices() == 1)
    part = train.subset(places)
    assert 0 < len(part) < len(train)
    found = evaluate(net, train, NORMALIZATION.statistics(train), loss, places=places, batch_size=3)
    assert found == evaluate(net, part, NORMALIZATION.statistics(part), loss, batch_size=3)
