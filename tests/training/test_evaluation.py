"""What a network does on a set of slices."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.base.errors import UserError
from minunet.data.normalize import apply
from minunet.data.slices import SliceSet
from minunet.network.loss import SegmentationLoss, SoftmaxLoss
from minunet.training.evaluation import evaluate, predict_slices
from minunet.training.step import Engine
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


# --- Several classes, several masks ---------------------------------------------------------------------------------


class Answers(Engine):
    """A plain engine that has been told the logits and the target of every slice."""

    ahead = 0

    def __init__(self, net, logits, target):
        super().__init__(net, SoftmaxLoss() if net.config["output"] == "softmax" else SegmentationLoss())
        self.answers, self.targets = logits, target

    def prepare_batch(self, slices, statistics, indices, **options):
        self.indices = indices
        return super().prepare_batch(slices, statistics, indices, **options)._replace(target=self.targets[indices])

    def logits(self, x, net=None):
        return self.answers[self.indices]


def dice_of(predicted, true):
    """2 |A and B| / (|A| + |B|) by sets of pixels; 1 if both are empty."""
    a, b = (set(map(tuple, np.argwhere(mask))) for mask in (predicted, true))
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def test_dice_of_classes_is_taken_one_by_one_without_background_and_ignored_pixels(slices):
    train, _ = slices
    draw = np.random.default_rng(0)
    shape = (*train.masks.shape[:3], 4)
    classes, likeliest = draw.integers(0, 5, shape[:3]), draw.integers(0, 4, shape[:3])  # 4: to be ignored
    target, logits = np.eye(5, 4, dtype="float32")[classes], draw.random(shape).astype("float32")
    np.put_along_axis(logits, likeliest[..., None], 2.0, axis=-1)
    net = tiny_net(out_channels=4, output="softmax", dtype="float32")
    engine = Answers(net, logits, target)
    found = evaluate(net, train, NORMALIZATION.statistics(train), engine.loss, engine=engine, batch_size=7)
    expected = []
    for patient in range(2):
        mine = (train.patient_indices() == patient)[:, None, None] & (classes < 4)
        expected.append(np.mean([dice_of(mine & (likeliest == k), mine & (classes == k)) for k in (1, 2, 3)]))
    assert found.dice == pytest.approx(np.mean(expected), rel=1e-14)
    order = evaluate(net, train, NORMALIZATION.statistics(train), engine.loss, engine=engine, batch_size=len(train))
    assert order.dice == found.dice
    assert order.loss == pytest.approx(engine.loss.forward(logits, target)[0].item(), rel=1e-5)


def test_perfect_classes_have_dice_1_and_a_missed_one_its_share(slices):
    train, _ = slices
    classes = np.random.default_rng(0).integers(0, 3, train.masks.shape[:3])
    target = np.eye(3, dtype="float32")[classes]
    net = tiny_net(out_channels=3, output="softmax", dtype="float32")
    statistics = NORMALIZATION.statistics(train)
    missed = np.eye(3, dtype="float32")[np.where(classes == 2, 0, classes)]
    for logits, dice in ((target, 1.0), (missed, 0.5)):
        engine = Answers(net, 9 * logits, target)
        assert evaluate(net, train, statistics, engine.loss, engine=engine).dice == dice


def test_dice_of_masks_that_overlap_is_taken_one_by_one(slices):
    train, _ = slices
    draw = np.random.default_rng(1)
    shape = (*train.masks.shape[:3], 2)
    target, logits = (draw.random(shape) < [0.5, 0.02]).astype("float32"), draw.standard_normal(shape).astype("float32")
    net = tiny_net(out_channels=2, dtype="float32")
    engine = Answers(net, logits, target)
    found = evaluate(net, train, NORMALIZATION.statistics(train), engine.loss, engine=engine)
    expected = []
    for patient in range(2):
        mine = train.patient_indices() == patient
        expected.append(np.mean([dice_of(logits[mine, ..., k] > 0, target[mine, ..., k] == 1) for k in range(2)]))
    assert found.dice == pytest.approx(np.mean(expected), rel=1e-14)


@pytest.mark.parametrize("flip_average", [False, True])
def test_slices_are_predicted_by_the_activation_of_the_network(slices, flip_average):
    _, validation = slices
    net = tiny_net(out_channels=3, output="softmax", dtype="float32")
    p = predict_slices(net, validation, NORMALIZATION, flip_average=flip_average)
    assert p.shape == (*validation.masks.shape[:3], 3)
    assert np.abs(p.sum(axis=-1) - 1).max() <= 1e-6
    if not flip_average:
        x = apply(validation.images[:1], NORMALIZATION.statistics(validation))
        assert np.abs(p[:1] - net.predict(x)).max() <= 1e-6


# --- Whole images of any size, in tiles -----------------------------------------------------------------------------


def of_sizes(sizes, seed=0):
    """One patient's slices of these sizes, in arrays as large as the largest."""
    draw = np.random.default_rng(seed)
    height, width = np.max(sizes, axis=0)
    images = draw.integers(0, 256, (len(sizes), height, width, 3), dtype=np.uint8)
    masks = np.zeros((len(sizes), height, width, 1), np.uint8)
    for n, (rows, columns) in enumerate(sizes):
        masks[n, :rows, :columns] = draw.random((rows, columns, 1)) < 0.3
    names = tuple(map(str, range(len(sizes))))
    return SliceSet(images, masks, ("p",) * len(sizes), tuple(range(len(sizes))), names, extents=np.array(sizes))


SIZES = [(40, 33), (17, 50), (8, 7), (50, 50)]


@pytest.mark.parametrize("side", [1, 24, 1000])
def test_each_image_is_predicted_alone_and_whole_at_its_own_size(side):
    slices, net = of_sizes(SIZES), tiny_net(dtype="float32")
    statistics = NORMALIZATION.statistics(slices)
    found = predict_slices(net, slices, NORMALIZATION, side=side)
    for n, (height, width) in enumerate(SIZES):
        x = apply(slices.images[n : n + 1, :height, :width], statistics)
        assert np.abs(found[n, :height, :width] - net.predict(x)[0]).max() <= 1e-6
        assert not found[n, height:].any()
        assert not found[n, :, width:].any()


def test_an_image_and_its_mirror_image_in_tiles():
    """Mirrored about the middle of the image with its padding: that is where its pooling windows end."""
    slices, net = of_sizes([(40, 32)]), tiny_net(dtype="float32")
    mirrored = replace(slices, images=slices.images[:, :, ::-1].copy())
    plain, other = (predict_slices(net, s, NORMALIZATION) for s in (slices, mirrored))
    both = predict_slices(net, slices, NORMALIZATION, flip_average=True, side=20)
    np.testing.assert_allclose(both, (plain + other[:, :, ::-1]) / 2, atol=1e-6)


def test_an_evaluation_in_tiles_is_that_of_the_whole_images():
    slices, net, loss = of_sizes(SIZES), tiny_net(dtype="float32"), SegmentationLoss()
    statistics = NORMALIZATION.statistics(slices)
    found = evaluate(net, slices, statistics, loss, side=20)
    losses, tp, positive = [], 0, 0
    for n, (height, width) in enumerate(SIZES):
        target = slices.masks[n : n + 1, :height, :width].astype("float32")
        logits, _ = net.forward(net.pad(apply(slices.images[n : n + 1, :height, :width], statistics)), training=False)
        logits = logits[:, :height, :width]
        losses.append(float(loss.forward(logits, target)[0]))
        tp += np.sum((logits > 0) & (target > 0))
        positive += np.sum(logits > 0) + np.sum(target > 0)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.dice == pytest.approx(2 * tp / positive, rel=1e-12)


def test_an_evaluation_of_classes_in_tiles_is_that_of_the_whole_images():
    """Of two classes, whose indices are those of a mask."""
    slices, loss = replace(of_sizes(SIZES), classes=("background", "tumour")), SoftmaxLoss()
    net, statistics = tiny_net(out_channels=2, output="softmax", dtype="float32"), NORMALIZATION.statistics(slices)
    found = evaluate(net, slices, statistics, loss, side=20)
    losses, tp, positive = [], 0, 0
    for n, (height, width) in enumerate(SIZES):
        mask = slices.masks[n : n + 1, :height, :width]
        logits, _ = net.forward(net.pad(apply(slices.images[n : n + 1, :height, :width], statistics)), training=False)
        logits = logits[:, :height, :width]
        losses.append(float(loss.forward(logits, np.concatenate([1 - mask, mask], axis=-1))[0]))
        predicted = logits[..., 1:] > logits[..., :1]
        tp += np.sum(predicted & (mask > 0))
        positive += np.sum(predicted) + np.sum(mask)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.dice == pytest.approx(2 * tp / positive, rel=1e-12)


def test_what_is_found_in_the_padding_does_not_count():
    """Of images that lie in larger arrays, also where whole arrays are predicted."""
    slices, net, loss = of_sizes([(8, 16), (16, 4)]), tiny_net(dtype="float32"), SegmentationLoss()
    net.head.bias[...] = 100.0  # all is foreground
    net.head.weight[...] = 0.0
    found = predict_slices(net, slices, NORMALIZATION)
    assert found.sum() == 8 * 16 + 16 * 4
    dice = 2 * slices.masks.sum() / (slices.masks.sum() + 8 * 16 + 16 * 4)
    assert evaluate(net, slices, NORMALIZATION.statistics(slices), loss).dice == pytest.approx(dice, rel=1e-12)


@pytest.mark.parametrize("side", [None, 20])
def test_an_answer_that_is_not_a_number_is_no_empty_mask(side):
    slices, net = of_sizes([(8, 8)]), tiny_net(dtype="float32")
    net.bottleneck.norm1.gamma[...] = 3e38
    with pytest.raises(UserError, match="^the network answers with values that are not numbers"):
        predict_slices(net, slices, NORMALIZATION, side=side)
