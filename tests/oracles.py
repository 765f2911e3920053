"""The definitions of the ops and losses, one number at a time: slow, and too plain to be wrong in the same way.

Each takes the arguments of its ``<op>_forward`` and returns y. Nothing is shared with minunet but the random numbers
of dropout, which ``tests/base/test_rng.py`` holds against a Philox of its own. The backward passes need no oracle: the
complex step derives them from the forward passes that are compared with these.
"""

import math
from itertools import product

import numpy as np

from minunet.base.rng import Key, random_uint16


def indices(*lengths):
    """All index tuples of an array of this shape."""
    return product(*(range(length) for length in lengths))


def conv2d(x, weight, bias, stride=1, padding="same"):
    n_images, height, width, _ = x.shape
    kernel_height, kernel_width, in_channels, out_channels = weight.shape

    def output_and_padding(size, kernel):
        if padding != "same":
            return (size + 2 * padding - kernel) // stride + 1, padding
        output = math.ceil(size / stride)
        # Pixels that the last window reaches beyond the image; of an odd number, the smaller half comes before it.
        missing = max((output - 1) * stride + kernel - size, 0)
        return output, missing // 2

    out_height, top = output_and_padding(height, kernel_height)
    out_width, left = output_and_padding(width, kernel_width)
    y = np.zeros((n_images, out_height, out_width, out_channels))
    for n, i, j, o in indices(*y.shape):
        total = 0.0 if bias is None else float(bias[o])
        for u, v in indices(kernel_height, kernel_width):
            row, column = stride * i + u - top, stride * j + v - left
            if 0 <= row < height and 0 <= column < width:
                for c in range(in_channels):
                    total += float(x[n, row, column, c]) * float(weight[u, v, c, o])
        y[n, i, j, o] = total
    return y


def conv_transpose2d(x, weight, bias, stride=2, padding="same"):
    n_images, height, width, in_channels = x.shape
    kernel_height, kernel_width, _, out_channels = weight.shape

    def output_and_first(size, kernel):
        if padding != "same":
            return stride * (size - 1) + kernel - 2 * padding, padding
        return stride * size, max(kernel - stride, 0) // 2

    out_height, top = output_and_first(height, kernel_height)
    out_width, left = output_and_first(width, kernel_width)
    y = np.zeros((n_images, out_height, out_width, out_channels))
    if bias is not None:
        y += bias
    for n, i, j, c in indices(n_images, height, width, in_channels):
        for u, v, o in indices(kernel_height, kernel_width, out_channels):
            row, column = stride * i + u - top, stride * j + v - left
            if 0 <= row < out_height and 0 <= column < out_width:
                y[n, row, column, o] += x[n, i, j, c] * weight[u, v, c, o]
    return y


def max_pool2d(x, size=2):
    n_images, height, width, channels = x.shape
    y = np.zeros((n_images, height // size, width // size, channels))
    for n, i, j, c in indices(*y.shape):
        y[n, i, j, c] = max(float(x[n, size * i + u, size * j + v, c]) for u, v in indices(size, size))
    return y


def batch_norm2d(x, gamma, beta, running_mean, running_var, *, training, eps=1e-3):
    y = np.zeros(x.shape)
    for c in range(x.shape[3]):
        values = [float(value) for value in x[..., c].ravel()]
        if training:
            mean = math.fsum(values) / len(values)
            variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
        else:
            mean, variance = float(running_mean[c]), float(running_var[c])
        for n, i, j in indices(*x.shape[:3]):
            y[n, i, j, c] = gamma[c] * (x[n, i, j, c] - mean) / math.sqrt(variance + eps) + beta[c]
    return y


def relu(x):
    return _each(lambda value: value if value > 0 else 0.0, x)


def logistic(value):
    """1 / (1 + e^-value), without overflow."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def sigmoid(x):
    return _each(logistic, x)


def dropout(x, rate, *, key):
    if key is None:
        return x.copy()
    y = np.zeros(x.shape)
    for n in range(len(x)):
        image_key = Key(key.seed, key.epoch, key.step, key.stream, key.image + n)
        draws = iter(random_uint16(image_key, x[n].size).tolist())
        for i, j, c in indices(*x.shape[1:]):
            if next(draws) >= round(rate * 65536):
                y[n, i, j, c] = x[n, i, j, c] / (1 - rate)
    return y


def concat(up, skip):
    n_images, height, width, up_channels = up.shape
    y = np.zeros((n_images, height, width, up_channels + skip.shape[3]))
    for n, i, j, c in indices(*y.shape):
        y[n, i, j, c] = up[n, i, j, c] if c < up_channels else skip[n, i, j, c - up_channels]
    return y


def softmax(x):
    y = np.zeros(x.shape)
    for n, i, j in indices(*x.shape[:3]):
        y[n, i, j] = _probabilities(x[n, i, j].tolist())
    return y


def dice_loss(probabilities, target, smooth=1.0, over="batch"):
    axis = {"image": 0, "class": 3}.get(over)
    groups = [(probabilities, target)]
    if axis is not None:
        groups = zip(np.moveaxis(probabilities, axis, 0), np.moveaxis(target, axis, 0), strict=True)
    losses = []
    for p, t in groups:
        pairs = [(float(a), float(b)) for a, b in zip(p.ravel(), t.ravel(), strict=True)]
        overlap = math.fsum(a * b for a, b in pairs)
        total = math.fsum(a for a, _ in pairs) + math.fsum(b for _, b in pairs)
        losses.append(1 - (2 * overlap + smooth) / (total + smooth))
    return np.array(math.fsum(losses) / len(losses))


def bce_with_logits(logits, target):
    def loss(z, t):  # -log s(z) = log(1 + e^-z), and likewise for -z
        return t * _softplus(-z) + (1 - t) * _softplus(z)

    pairs = zip(logits.ravel().tolist(), target.ravel().tolist(), strict=True)
    return np.array(math.fsum(loss(z, t) for z, t in pairs) / logits.size)


def segmentation_loss(logits, target, dice_weight=1.0, bce_weight=1.0, smooth=1.0, over="batch"):
    dice = dice_loss(sigmoid(logits), target, smooth, over)
    return dice_weight * dice + bce_weight * bce_with_logits(logits, target)


def softmax_cross_entropy(logits, target):
    losses, counted = [], []
    for n, i, j in indices(*logits.shape[:3]):
        z, t = logits[n, i, j].tolist(), target[n, i, j].tolist()
        counted.append(math.fsum(t))
        for k, own in enumerate(z):  # -log p_k = log(1 + the sum of e^(z_l - z_k) over the others)
            losses.append(t[k] * math.log1p(math.fsum(math.exp(z[m] - own) for m in range(len(z)) if m != k)))
    return np.array(math.fsum(losses) / max(math.fsum(counted), 1))


def softmax_loss(logits, target, dice_weight=1.0, cross_entropy_weight=1.0, smooth=1.0):
    classes = range(1, logits.shape[3])
    p = softmax(logits) * target.sum(axis=3, keepdims=True)
    dice = [dice_loss(p[..., [k]], target[..., [k]], smooth).item() for k in classes]
    mean = math.fsum(dice) / len(dice)
    return dice_weight * mean + cross_entropy_weight * softmax_cross_entropy(logits, target)


def adamw(theta, gradients, lr, beta1, beta2, eps, weight_decay):
    """One number after steps with these gradients and learning rates: Loshchilov & Hutter 2019, algorithm 2.

    Their schedule eta_t times alpha is ``lr``, and it scales the decay too: theta -= lr_t * weight_decay * theta.
    """
    m = v = 0.0
    for t, (gradient, lr_t) in enumerate(zip(gradients, lr, strict=True), start=1):
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        theta = theta - lr_t * weight_decay * theta - lr_t * m_hat / (math.sqrt(v_hat) + eps)
    return theta


def _probabilities(z):
    """Each e^z over their sum, none of which overflows."""
    return [1 / math.fsum(math.exp(other - own) for other in z) for own in z]


def _softplus(value):
    """log(1 + e^value), without overflow."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def _each(function, x):
    return np.array([function(value) for value in x.ravel().tolist()]).reshape(x.shape)
