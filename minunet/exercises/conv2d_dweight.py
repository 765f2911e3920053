"""Exercise conv2d_dweight: a weight collects the gradient from every place where it was used."""

from typing import Any

import numpy as np

from minunet.exercises.backward import Backward, Case
from minunet.ops import conv2d_backward, conv2d_forward
from minunet.ops.conv2d import Conv2dCache


def _case(seed: int, x: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> Case:
    rng = np.random.default_rng(seed)
    fixed = {"x": rng.standard_normal(x), "bias": None, **options}
    return Case({"weight": rng.standard_normal(weight)}, fixed)


_CASES = (
    _case(1, (2, 4, 5, 2), (3, 3, 2, 3), padding=0),
    _case(2, (2, 4, 5, 3), (3, 3, 3, 3), padding="same"),
    _case(3, (1, 6, 4, 2), (2, 3, 2, 1), stride=2, padding="same"),
    _case(4, (1, 5, 5, 1), (3, 3, 1, 2), stride=2, padding=1),
)


def _right(dy: np.ndarray, cache: Conv2dCache) -> np.ndarray:
    return conv2d_backward(dy, cache)[1]


def _of_image(dy: np.ndarray, cache: Conv2dCache, image: int) -> np.ndarray:
    one = np.zeros_like(dy)
    one[image] = dy[image]
    return _right(one, cache)


def _cropped(dy: np.ndarray, cache: Conv2dCache, rows: slice, columns: slice) -> np.ndarray:
    part = np.zeros_like(dy)
    part[:, rows, columns] = dy[:, rows, columns]
    return _right(part, cache)


_MISTAKES = {
    "dweight": {
        "rows and columns of the kernel are exchanged: dweight[v, u] where it should be dweight[u, v]": lambda dy, c: (
            _right(dy, c).swapaxes(0, 1)
        ),
        "the kernel is turned by 180 degrees: forward does not flip it, so backward must not": lambda dy, c: _right(
            dy, c
        )[::-1, ::-1],
        "input and output channels are exchanged: a tap is (C_in, C_out), x.T @ dy and not dy.T @ x": lambda dy, c: (
            _right(dy, c).swapaxes(2, 3)
        ),
        "the upstream gradient is ignored: dy is taken as 1 everywhere": lambda dy, c: _right(np.ones_like(dy), c),
        "only the last image has counted: = where it should be +=": lambda dy, c: _of_image(dy, c, -1),
        "only the first image has counted: sum over n as well": lambda dy, c: _of_image(dy, c, 0),
        "only the last pixel has counted: = where it should be +=": lambda dy, c: _of_image(
            np.pad(dy[:, -1:, -1:], ((0, 0), (dy.shape[1] - 1, 0), (dy.shape[2] - 1, 0), (0, 0))), c, -1
        ),
        "the last row or column of dy is left out: a range or a slice ends one too early": lambda dy, c: _cropped(
            dy, c, slice(-1), slice(-1)
        ),
        "the absolute values or squares of something: signs are lost": lambda dy, c: np.abs(_right(dy, c)),
        "the padding of forward is missing, so that every tap meets other pixels": lambda dy, c: _shifted(dy, c),
        "the stride of forward is missing: tap (u, v) meets the pixels s*i + u, s*j + v": lambda dy, c: _unstrided(
            dy, c
        ),
    }
}


def _shifted(dy: np.ndarray, cache: Conv2dCache) -> np.ndarray:
    """As if the padding stood at the bottom and right alone."""
    (top, bottom), (left, right) = cache.pad
    return _right(dy, cache._replace(pad=((0, top + bottom), (0, left + right))))


def _unstrided(dy: np.ndarray, cache: Conv2dCache) -> np.ndarray:
    return _right(dy, cache._replace(stride=1))


_HINTS = (
    "A weight is used at every place of every image. What does the chain rule do with several ways to the loss?",
    "For one tap (u, v): dweight[u, v] (C_in, C_out) is the sum over n, i, j of x_pad[n, s*i + u, s*j + v] (C_in) "
    "times "
    "dy[n, i, j] (C_out).",
    "Pad x as forward did: np.pad(x, ((0, 0), *cache.pad, (0, 0))). For each tap, met = x_pad[:, u : u + s*H : s, "
    "v : v + s*W : s] with H, W of dy; then np.einsum('nijc,nijo->co', met, dy).",
)

EXERCISE = Backward(
    function="conv2d_dweight",
    forward=conv2d_forward,
    reference=_right,
    results=("dweight",),
    cases=_CASES,
    mistakes=_MISTAKES,
).exercise("conv2d_dweight", "convolution: what a weight learns", _HINTS)
