"""The training step: what it computes, what it changes, and what stops it."""

import math

import numpy as np
import pytest

from minunet.base.archive import sha256_of_arrays
from minunet.base.errors import Diverged
from minunet.training import optim
from minunet.training.optim import AdamW, WeightEMA
from minunet.training.step import loss_and_grads, train_step, update_running_stats
from tests.training.cases import KEY, LOSS, all_arrays, batch, tiny_net


def test_loss_and_grads_is_forward_loss_backward_and_changes_nothing():
    net, (x, target) = tiny_net(), batch()
    before = sha256_of_arrays(all_arrays(net))
    loss, grads, stats = loss_and_grads(net, x, target, LOSS, KEY)
    logits, cache = net.forward(x, training=True, key=KEY)
    value, loss_cache = LOSS.forward(logits, target)
    _, expected = net.backward(LOSS.backward(loss_cache), cache)
    assert loss == value
    assert isinstance(loss, float)
    assert grads.keys() == net.parameters().keys()
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, expected[name])
    assert stats.keys() == net.buffers().keys()
    np.testing.assert_array_equal(stats["down1.norm1.running_mean"], cache.downs[0].convs.norm1.batch_mean)
    np.testing.assert_array_equal(stats["up1.norm2.running_var"], cache.ups[0].convs.norm2.batch_var)
    assert sha256_of_arrays(all_arrays(net)) == before


def test_running_stats_are_averaged_as_keras_does():
    net = tiny_net()
    old = {name: value.copy() for name, value in net.buffers().items()}
    _, _, stats = loss_and_grads(net, *batch(), LOSS, KEY)
    update_running_stats(net, stats, momentum=0.9)
    for name, running in net.buffers().items():
        np.testing.assert_allclose(running, 0.9 * old[name] + 0.1 * stats[name], rtol=1e-13)
        assert not np.array_equal(running, old[name])


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_a_step_is_clip_optimise_average(clip_norm):
    net, twin, (x, target) = tiny_net(), tiny_net(), batch()
    ema = WeightEMA(all_arrays(net))
    options = {"lr": 0.01, "clip_norm": clip_norm, "batch_norm_momentum": 0.8, "ema": ema}
    loss, norm = train_step(net, AdamW(net.parameters()), x, target, LOSS, KEY, **options)

    expected_loss, grads, stats = loss_and_grads(twin, x, target, LOSS, KEY)
    clipped, expected_norm = optim.clip_by_global_norm(grads, clip_norm or math.inf)
    expected_ema = WeightEMA(all_arrays(twin))
    AdamW(twin.parameters()).step(clipped, 0.01)
    update_running_stats(twin, stats, 0.8)
    expected_ema.update(all_arrays(twin))
    assert (loss, norm) == (expected_loss, expected_norm)
    assert norm > 0.01
    assert sha256_of_arrays(all_arrays(net)) == sha256_of_arrays(all_arrays(twin))
    assert sha256_of_arrays(ema.average) == sha256_of_arrays(expected_ema.average)


def test_steps_make_the_loss_small():
    net, (x, target) = tiny_net(dropout=0.0), batch()
    optimizer = AdamW(net.parameters())
    losses = [train_step(net, optimizer, x, target, LOSS, KEY, lr=0.02)[0] for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def plant(value, where, net, x):
    array = x if where == "images" else all_arrays(net)[where]
    array[(0,) * array.ndim] = value


@pytest.mark.parametrize(
    ("value", "where", "found"),
    [
        (np.nan, "images", "images of the batch"),
        (np.inf, "images", "images of the batch"),
        (np.nan, "down1.conv1.weight", "weights down1.conv1.weight"),
        (np.inf, "up1.norm2.gamma", "weights up1.norm2.gamma"),
        (1e308, "down1.conv1.weight", "activations at down1.norm1"),
        (1e308, "bottleneck.conv2.weight", "activations at bottleneck.norm2"),
        (1e308, "down1.norm2.gamma", "activations at bottleneck"),
        (1e308, "head.weight", "logits"),
    ],
)
def test_a_non_finite_value_stops_before_anything_is_changed_and_is_found(value, where, found):
    net, (x, target) = tiny_net(widths=(3, 4), dropout=0.0), batch()
    x *= 1e3
    optimizer = AdamW(net.parameters())
    plant(value, where, net, x)
    before = sha256_of_arrays(all_arrays(net) | optimizer.first_moment)
    with np.errstate(all="ignore"), pytest.raises(Diverged, match=f"first in the {found}"):
        train_step(net, optimizer, x, target, LOSS, KEY, lr=0.01)
    assert sha256_of_arrays(all_arrays(net) | optimizer.first_moment) == before
    assert optimizer.steps == 0
