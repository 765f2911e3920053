"""Where a training left the numbers: the first place, in the order of the computation, with a NaN or an infinity.

A loss that is NaN says only that something went wrong somewhere. This file does the step once more and looks:
at the images, at the weights, at what each layer kept on the way down and up the U, at the gradients on the way
back. The first hit is the place to look at.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from minunet.base import rng
from minunet.base.backend import Array, array_module
from minunet.network.layers import Layer
from minunet.network.loss import Loss
from minunet.network.unet import UNet


def first_non_finite(net: UNet, x: Array, target: Array, loss: Loss, key: rng.Key) -> str:
    """In words: where the training step on images ``x`` and masks ``target`` first meets a value that is not finite.

    >>> from minunet.network.loss import SegmentationLoss
    >>> net = UNet(widths=(2, 3), dropout=0.0)
    >>> net.parameters()["down1.conv2.weight"][0, 0, 0, 0] = np.inf
    >>> x = np.zeros((1, 4, 4, 3), "float32")
    >>> first_non_finite(net, x, x[..., :1], SegmentationLoss(), rng.Key(seed=0))
    'first in the weights down1.conv2.weight'
    """
    if not _is_finite(x):
        return "first in the images of the batch"
    for name, array in (net.parameters() | net.buffers()).items():
        if not _is_finite(array):
            return f"first in the weights {name}"
    with np.errstate(all="ignore"):
        logits, cache = net.forward(x, training=True, key=key)
        for layer, array in _kept_by_layers(net, cache):
            if not _is_finite(array):
                return f"first in the activations at {layer}"
        if not _is_finite(logits):
            return "first in the logits"
        _, loss_cache = loss.forward(logits, target)
        _, grads = net.backward(loss.backward(loss_cache), cache)
    for name in reversed(grads):  # backward meets the head first
        if not _is_finite(grads[name]):
            return f"first in the gradient of {name}"
    return "first in the loss"


def _is_finite(array: Array) -> bool:
    return bool(array_module(array).isfinite(array).all())


def _kept_by_layers(layer: Layer, cache: Any, name: str = "") -> Iterator[tuple[str, Array]]:
    """For each layer without children, in forward order, the input or the normalised input that its cache keeps."""
    children = layer.children()
    for part, part_cache in layer.child_caches(cache).items():
        yield from _kept_by_layers(children[part], part_cache, f"{name}.{part}".lstrip("."))
    for field in ("x", "x_hat"):
        if not children and hasattr(cache, field):
            yield name, getattr(cache, field)
