"""Proofs about a whole network at work: full size, split batches, several threads, a complete training step."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from minunet.base.backend import to_numpy
from minunet.base.rng import Key
from minunet.data import phantom
from minunet.data.augment import PRESETS
from minunet.data.batches import prepare_batch
from minunet.data.normalize import Normalization
from minunet.gradcheck import check_net
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet
from minunet.training.step import loss_and_grads

KEY = Key(seed=3, epoch=2, step=7)
ONE_DIRECTION = {"exhaustive": 0, "samples": 0, "directions": 0, "together": 1}


def images_and_masks(n, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, size, size, 3)), (rng.random((n, size, size, 1)) < 0.3).astype("float64")


def test_one_direction_through_all_34_million_parameters_of_the_reference_network():
    net = UNet()
    assert sum(parameter.size for parameter in net.parameters().values()) == 34_525_633
    report = check_net(net, *images_and_masks(1, 32), key=KEY, sampling=ONE_DIRECTION)
    assert report.ok(1e-12), str(report)


def test_gradients_of_two_half_batches_average_to_that_of_the_batch():
    """True for what treats each image alone: batch norm that infers, Dice over the image."""
    net, loss = UNet(widths=(3, 4, 5), dtype="float64"), SegmentationLoss(over="image")
    x, target = images_and_masks(4, 8)

    def gradient(part):
        logits, cache = net.forward(x[part], training=False)
        _, loss_cache = loss.forward(logits, target[part])
        return net.backward(loss.backward(loss_cache), cache)[1]

    whole, first, second = gradient(slice(0, 4)), gradient(slice(0, 2)), gradient(slice(2, 4))
    largest = max(np.abs(g).max() for g in whole.values())
    for name, g in whole.items():
        assert np.abs((first[name] + second[name]) / 2 - g).max() <= 1e-13 * largest
    assert any(not np.allclose(first[name], g) for name, g in whole.items())


def test_half_batches_drop_what_the_whole_batch_drops():
    net = UNet(widths=(3, 4), dropout=0.5, dtype="float64")
    x, _ = images_and_masks(4, 4)
    masks = [net.forward(x, training=True, key=KEY)[1].downs[0].dropout.kept]
    for start in (0, 2):
        key = KEY._replace(image=start)
        masks.append(net.forward(x[start : start + 2], training=True, key=key)[1].downs[0].dropout.kept)
    np.testing.assert_array_equal(masks[0], np.concatenate(masks[1:]))


def test_one_network_serves_several_threads():
    net, loss = UNet(widths=(3, 4, 5), dtype="float64"), SegmentationLoss()
    jobs = [(*images_and_masks(2, 8, seed), Key(seed)) for seed in range(12)]

    def work(job):
        x, target, key = job
        value, grads, stats = loss_and_grads(net, x, target, loss, key)
        return [value, *(array.tobytes() for array in (grads | stats).values())]

    alone = [work(job) for job in jobs]
    with ThreadPoolExecutor(max_workers=6) as pool:
        together = list(pool.map(work, jobs))
    assert together == alone
    assert len({result[0] for result in alone}) == len(jobs)


@pytest.mark.parametrize("preset", ["reference", "strong"])
def test_the_gradient_of_a_complete_training_step(preset):
    """From slices by the key of the step: normalisation, augmentation, dropout, batch norm on the batch, loss."""
    slices = phantom.make(patients=1, size=16)
    statistics = Normalization("volume").statistics(slices)
    indices = np.array([3, 8, 9])

    def batch():
        return prepare_batch(slices, statistics, indices, "cpu", augmentation=PRESETS[preset], key=KEY)

    x, target, _ = batch()
    np.testing.assert_array_equal(x, batch().x)  # the key decides all of it
    net = UNet(widths=(2, 3, 4), dropout=0.3)
    report = check_net(net, to_numpy(x), to_numpy(target), key=KEY, sampling={"exhaustive": 4, "samples": 2})
    assert report.ok(1e-12), str(report)
