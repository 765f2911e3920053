"""Exercise conv2d_dx: every output pixel hands its gradient back to the pixels it has seen."""

from typing import Any

import numpy as np

from minunet.exercises.backward import Backward, Case
from minunet.ops import conv2d_backward, conv2d_forward
from minunet.ops.conv2d import Conv2dCache


def _case(seed: int, x: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> Case:
    rng = np.random.default_rng(seed)
    fixed = {"weight": rng.standard_normal(weight), "bias": None, **options}
    return Case({"x": rng.standard_normal(x)}, fixed)


_CASES = (
    _case(1, (2, 4, 5, 2), (3, 3, 2, 2), padding=0),
    _case(2, (2, 4, 5, 2), (3, 3, 2, 3), padding="same"),
    _case(3, (1, 6, 4, 2), (2, 3, 2, 1), stride=2, padding="same"),
    _case(4, (1, 6, 6, 1), (3, 3, 1, 2), stride=2, padding="same"),
)


def _right(dy: np.ndarray, cache: Conv2dCache) -> np.ndarray:
    return conv2d_backward(dy, cache)[0]


def _with_weight(dy: np.ndarray, cache: Conv2dCache, weight: np.ndarray) -> np.ndarray:
    return _right(dy, cache._replace(weight=weight))


def _overwritten(dy: np.ndarray, cache: Conv2dCache) -> np.ndarray:
    """With ``=`` for ``+=``: where windows overlap, the last tap stays."""
    s, (_, height, width, _) = cache.stride, dy.shape
    dx_pad = np.zeros(np.pad(cache.x, ((0, 0), *cache.pad, (0, 0))).shape)
    for u in range(cache.weight.shape[0]):
        for v in range(cache.weight.shape[1]):
            dx_pad[:, u : u + s * height : s, v : v + s * width : s] = dy @ cache.weight[u, v].T
    return _crop(dx_pad, cache)


def _overwritten_by_window(dy: np.ndarray, cache: Conv2dCache) -> np.ndarray:
    """The same, of a loop over the pixels of dy: the last window stays."""
    s, (kernel_height, kernel_width, _, _) = cache.stride, cache.weight.shape
    dx_pad = np.zeros(np.pad(cache.x, ((0, 0), *cache.pad, (0, 0))).shape)
    for i in range(dy.shape[1]):
        for j in range(dy.shape[2]):
            window = np.einsum("no,uvco->nuvc", dy[:, i, j], cache.weight)
            dx_pad[:, s * i : s * i + kernel_height, s * j : s * j + kernel_width] = window
    return _crop(dx_pad, cache)


def _crop(dx_pad: np.ndarray, cache: Conv2dCache) -> np.ndarray:
    (top, _), (left, _) = cache.pad
    return dx_pad[:, top : top + cache.x.shape[1], left : left + cache.x.shape[2]]


def _cropped_at_the_end(dy: np.ndarray, cache: Conv2dCache) -> np.ndarray:
    """The first rows and columns kept: the border of zeros taken from the bottom and the right alone."""
    (top, bottom), (left, right) = cache.pad
    return _right(dy, cache._replace(pad=((0, top + bottom), (0, left + right))))


_MISTAKES = {
    "dx": {
        "= where it should be +=: windows overlap, and all but the last contribution to a pixel are lost": _overwritten,
        "= where it should be +=: windows overlap, and all but the last window's contribution are lost": (
            _overwritten_by_window
        ),
        "weight[u, v] is not transposed: forward multiplies by (C_in, C_out), back goes its transpose": lambda dy, c: (
            _with_weight(dy, c, np.ascontiguousarray(c.weight.swapaxes(2, 3)))
        ),
        "the kernel is turned by 180 degrees, but dy is added as if it were not: one of the two": lambda dy, c: (
            _with_weight(dy, c, c.weight[::-1, ::-1])
        ),
        "rows and columns of the kernel are exchanged: weight[v, u]": lambda dy, c: _with_weight(
            dy, c, c.weight.swapaxes(0, 1)
        ),
        "the upstream gradient is ignored: dy is taken as 1 everywhere": lambda dy, c: _right(np.ones_like(dy), c),
        "only the first tap of the kernel has sent anything back": lambda dy, c: _with_weight(
            dy, c, _only(c.weight, 0)
        ),
        "only the last tap of the kernel has sent anything back": lambda dy, c: _with_weight(
            dy, c, _only(c.weight, -1)
        ),
        "the border is cut off at the wrong side: the first pixel of x is pixel (top, left) of x_pad": (
            _cropped_at_the_end
        ),
        "the stride of forward is missing: tap (u, v) meets the pixels s*i + u, s*j + v": lambda dy, c: _right(
            dy, c._replace(stride=1)
        ),
        "only the middle tap of the kernel has sent anything back": lambda dy, c: _with_weight(
            dy, c, _only(c.weight, len(c.weight) // 2)
        ),
    }
}


def _only(weight: np.ndarray, tap: int) -> np.ndarray:
    """``weight`` with all taps but (tap, tap) cleared."""
    kept = np.zeros_like(weight)
    kept[tap, tap] = weight[tap, tap]
    return kept


_HINTS = (
    "A pixel in the middle of the image is seen by several windows. What does the chain rule do with several ways to "
    "the "
    "loss?",
    "Read forward from the side of dy: tap (u, v) has read pixel (s*i + u, s*j + v) of x_pad for y[i, j]. So it adds "
    "dy[n, i, j] @ weight[u, v].T, of shape (C_in,), to that very pixel.",
    "Begin with zeros of the shape of the padded x. For each tap: dx_pad[:, u : u + s*H : s, v : v + s*W : s] += "
    "dy @ weight[u, v].T, with H, W of dy. Then cut the border off: dx begins at row top and column left.",
)

EXERCISE = Backward(
    function="conv2d_dx",
    forward=conv2d_forward,
    reference=_right,
    results=("dx",),
    cases=_CASES,
    mistakes=_MISTAKES,
).exercise("conv2d_dx", "convolution: what goes back to the image", _HINTS)
