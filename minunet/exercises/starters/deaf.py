"""Lab deaf: a network that trains, and whose first layer does not listen.

A U of one level learns one slice by heart. The loss falls, if not as far as it should; and the weights of the first
convolution go another way than in a U-Net that is right. Run this file and see; then mend it, keeping the names of the
functions.

    python FILE                               shows the symptom
    python -m minunet.exercises deaf FILE     says whether you have found the cause
    python -m minunet.exercises deaf --hint 1 (then 2, 3)
"""

from typing import Any

import numpy as np

from minunet.base.backend import Array
from minunet.ops import (
    concat_backward,
    concat_forward,
    conv2d_backward,
    conv2d_forward,
    conv_transpose2d_backward,
    conv_transpose2d_forward,
    max_pool2d_backward,
    max_pool2d_forward,
    relu_backward,
    relu_forward,
)
from minunet.ops.bce_with_logits import bce_with_logits_backward, bce_with_logits_forward


def new_parameters(seed: int = 0) -> dict[str, Array]:
    """conv1 sees the image, conv2 works at half the size, up brings it back, head joins both."""
    rng = np.random.default_rng(seed)
    shapes = {"conv1": (3, 3, 1, 4), "conv2": (3, 3, 4, 6), "up": (2, 2, 6, 4), "head": (3, 3, 8, 1)}
    return {name: rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:3])) for name, shape in shapes.items()}


def forward(x: Array, p: dict[str, Array]) -> tuple[Array, dict[str, Any]]:
    """The logits of images ``x`` (N, H, W, 1), and the cache of each line."""
    cache: dict[str, Any] = {}
    x, cache["conv1"] = conv2d_forward(x, p["conv1"], None)
    skip, cache["relu1"] = relu_forward(x)
    x, cache["pool"] = max_pool2d_forward(skip)
    x, cache["conv2"] = conv2d_forward(x, p["conv2"], None)
    x, cache["relu2"] = relu_forward(x)
    x, cache["up"] = conv_transpose2d_forward(x, p["up"], None)
    x, cache["concat"] = concat_forward(x, skip)
    logits, cache["head"] = conv2d_forward(x, p["head"], None)
    return logits, cache


def backward(dlogits: Array, cache: dict[str, Any]) -> dict[str, Array]:
    """The gradient of each parameter."""
    grads = {}
    dx, grads["head"], _ = conv2d_backward(dlogits, cache["head"])
    dx, dskip = concat_backward(dx, cache["concat"])
    dx, grads["up"], _ = conv_transpose2d_backward(dx, cache["up"])
    dx = relu_backward(dx, cache["relu2"])
    dx, grads["conv2"], _ = conv2d_backward(dx, cache["conv2"])
    dskip = max_pool2d_backward(dx, cache["pool"])
    dx = relu_backward(dskip, cache["relu1"])
    dx, grads["conv1"], _ = conv2d_backward(dx, cache["conv1"])
    return grads


def main() -> None:
    """Show the symptom: what backward says of a small change of each layer's weights, and what it really does."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 8, 8, 1))
    target = (x > 0.5).astype("float64")
    p = new_parameters()

    def loss(parameters: dict[str, Array]) -> float:
        return float(bce_with_logits_forward(forward(x, parameters)[0], target)[0])

    logits, cache = forward(x, p)
    _, loss_cache = bce_with_logits_forward(logits, target)
    grads = backward(bce_with_logits_backward(loss_cache), cache)
    print("a step of 0.0001 along the gradient of one layer: how much the loss grows")
    print("layer   by the backward pass   really")
    for name, g in grads.items():
        h = 1e-4 / np.sqrt((g**2).sum())
        really = loss({**p, name: p[name] + h * g}) - loss(p)
        print(f"{name:6}  {h * (g**2).sum():20.3e}  {really:.3e}")


if __name__ == "__main__":
    main()
