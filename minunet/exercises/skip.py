"""Exercise skip: what is used twice gets two gradients, and they are added."""

import numpy as np

from minunet.exercises.backward import Backward, Case
from minunet.exercises.starters.skip import LevelCache, level_forward
from minunet.ops import concat_backward, conv_transpose2d_backward, max_pool2d_backward


def level_backward(dy: np.ndarray, cache: LevelCache) -> tuple[np.ndarray, np.ndarray]:
    """The right one, with minunet's own ops: (dfeatures, dweight)."""
    across, down, dweight = _parts(dy, cache)
    return across + down, dweight


def _parts(dy: np.ndarray, cache: LevelCache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two gradients of the features, from across and from below, and dweight."""
    dup, dskip = concat_backward(dy, cache.concat)
    dpooled, dweight, _ = conv_transpose2d_backward(dup, cache.up)
    return dskip, max_pool2d_backward(dpooled, cache.pool), dweight


def _swapped(dy: np.ndarray, cache: LevelCache) -> tuple[np.ndarray, np.ndarray]:
    """As if the order of the concat were [skip, up]."""
    skip_channels = dy.shape[3] - cache.concat.up_channels
    return level_backward(np.concatenate([dy[..., skip_channels:], dy[..., :skip_channels]], axis=3), cache)


def _case(seed: int, features: tuple[int, ...], up_channels: int) -> Case:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((2, 2, features[3], up_channels))
    return Case({"features": rng.standard_normal(features), "weight": weight})


_DOWN_ONLY = "the skip's gradient is dropped: the features were used twice, and only the way down has counted"
_ACROSS_ONLY = "the way down is dropped: the features were used twice, and only the skip has counted"
_ORDER = "the split is in the wrong order: forward has joined [up, skip]"

_MISTAKES = {
    "dfeatures": {
        _DOWN_ONLY: lambda dy, c: _parts(dy, c)[1],
        _ACROSS_ONLY: lambda dy, c: _parts(dy, c)[0],
        "the mean of the two gradients: they are added": lambda dy, c: level_backward(dy, c)[0] / 2,
        "the difference of the two gradients: they are added": lambda dy, c: _parts(dy, c)[0] - _parts(dy, c)[1],
        "the difference of the two gradients, the other way round: they are added": lambda dy, c: (
            _parts(dy, c)[1] - _parts(dy, c)[0]
        ),
        "the product of the two gradients: they are added": lambda dy, c: _parts(dy, c)[0] * _parts(dy, c)[1],
        "the larger of the two gradients: they are added": lambda dy, c: np.maximum(_parts(dy, c)[0], _parts(dy, c)[1]),
        "the skip's gradient is counted twice": lambda dy, c: 2 * _parts(dy, c)[0] + _parts(dy, c)[1],
        "the gradient from below is counted twice": lambda dy, c: _parts(dy, c)[0] + 2 * _parts(dy, c)[1],
        _ORDER: lambda dy, c: _swapped(dy, c)[0],
    },
    "dweight": {
        _ORDER: lambda dy, c: _swapped(dy, c)[1],
        "dup is taken as 1 everywhere: the upstream gradient is ignored": lambda dy, c: level_backward(
            np.ones_like(dy), c
        )[1],
    },
}

_HINTS = (
    "Draw the forward pass. Two arrows leave the features. Along each of them a gradient comes back: what does the "
    "chain "
    "rule do with several ways to the loss?",
    "Split dy where forward has joined: the first cache.concat.up_channels channels belong to up, the others to the "
    "skip. "
    "Then read level_forward from the last line to the first.",
    "dpooled, dweight, _ = conv_transpose2d_backward(dup, cache.up). Then dfeatures = dskip + "
    "max_pool2d_backward(dpooled, cache.pool): a new array, as dskip += ... would write into dy if dskip is a view of "
    "it.",
)

EXERCISE = Backward(
    function="level_backward",
    forward=level_forward,
    reference=level_backward,
    results=("dfeatures", "dweight"),
    # Equally many channels first: then a split in the wrong order fits, and its result can be recognised.
    cases=(_case(1, (2, 4, 6, 3), 3), _case(2, (2, 4, 2, 2), 3)),
    mistakes=_MISTAKES,
).exercise("skip", "concat's split and the skip's sum: one level of the U", _HINTS)
