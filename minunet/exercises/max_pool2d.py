"""Exercise max_pool2d: the winner takes it all."""

from collections.abc import Callable

import numpy as np

from minunet.exercises.backward import Backward, Case
from minunet.ops import max_pool2d_backward, max_pool2d_forward
from minunet.ops.max_pool2d import MaxPool2dCache


def _cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(2)
    # A tie has no derivative, so it cannot be checked by differentiating; what wins is in the cache, and so no case.
    shapes_and_sizes = (((2, 4, 6, 2), 2), ((1, 6, 3, 1), 3), ((1, 2, 2, 3), 1))
    return tuple(Case({"x": rng.standard_normal(shape)}, {"size": size}) for shape, size in shapes_and_sizes)


def spread(dy: np.ndarray, size: int) -> np.ndarray:
    """Each number of dy at all pixels of its window."""
    return dy.repeat(size, axis=1).repeat(size, axis=2)


def _pooled(choose: Callable[[np.ndarray, int, int, int], np.ndarray]) -> Callable[..., np.ndarray]:
    """A backward that puts dy where ``choose(winner, u, v, size)`` says so."""

    def backward(dy: np.ndarray, cache: MaxPool2dCache) -> np.ndarray:
        dx = spread(np.zeros_like(dy), cache.size)
        for u in range(cache.size):
            for v in range(cache.size):
                dx[:, u :: cache.size, v :: cache.size] = np.where(choose(cache.winner, u, v, cache.size), dy, 0.0)
        return dx

    return backward


_right = _pooled(lambda winner, u, v, size: winner == u * size + v)
_MISTAKES = {
    "dx": {
        "dy goes to every pixel of the window: only the winner has any influence on the maximum": lambda dy, cache: (
            spread(dy, cache.size)
        ),
        "dy is shared among all pixels of the window, as for average pooling": lambda dy, cache: (
            spread(dy, cache.size) / cache.size**2
        ),
        "a 1 at each winner: the upstream gradient is ignored": lambda dy, cache: _right(np.ones_like(dy), cache),
        "rows and columns are exchanged: the winner's number is u * size + v, u the row": _pooled(
            lambda winner, u, v, size: winner == v * size + u
        ),
        "everyone but the winner gets dy: the condition is inverted": _pooled(
            lambda winner, u, v, size: winner != u * size + v
        ),
        "always the first pixel of the window: the winner in the cache is not asked": _pooled(
            lambda winner, u, v, size: np.full(winner.shape, u + v == 0)
        ),
        "always the last pixel of the window: the winner in the cache is not asked": _pooled(
            lambda winner, u, v, size: np.full(winner.shape, u + v == 2 * size - 2)
        ),
        "the winner's number is off by one: they are counted from 0": _pooled(
            lambda winner, u, v, size: winner == u * size + v + 1
        ),
        "counted from the wrong end: the windows are turned by 180 degrees": _pooled(
            lambda winner, u, v, size: winner == size**2 - 1 - (u * size + v)
        ),
        "the gradient is divided by the number of pixels of a window: this is no mean": lambda dy, cache: (
            _right(dy, cache) / cache.size**2
        ),
    }
}

_HINTS = (
    "Wiggle a pixel that is not the largest of its window: what happens to y? And the one that is?",
    "dx is as large as x: size times dy along rows and columns. It is 0 but for one pixel a window, the winner, which "
    "gets the number of dy of its window.",
    "Go through the places (u, v) of a window. dx[:, u::size, v::size] are the pixels at this place, one for each "
    "window: "
    "give them dy where cache.winner is u * size + v, else 0.",
)

EXERCISE = Backward(
    function="max_pool2d_backward",
    forward=max_pool2d_forward,
    reference=max_pool2d_backward,
    results=("dx",),
    cases=_cases(),
    mistakes=_MISTAKES,
    blocked_nan=True,
).exercise("max_pool2d", "a choice goes back to who was chosen", _HINTS)
