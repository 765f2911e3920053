"""Exercise batch_norm2d: three terms, because mean and variance move as well."""

from collections.abc import Callable

import numpy as np

from minunet.exercises.backward import Backward, Case
from minunet.ops import batch_norm2d_backward, batch_norm2d_forward
from minunet.ops.batch_norm2d import BatchNorm2dCache


def _case(seed: int, shape: tuple[int, ...], training: bool) -> Case:
    rng = np.random.default_rng(seed)
    channels = shape[3]
    running = {"running_mean": rng.standard_normal(channels), "running_var": rng.random(channels) + 0.5}
    inputs = {
        "x": 3 * rng.standard_normal(shape) + 1,
        "gamma": rng.standard_normal(channels),
        "beta": rng.standard_normal(channels),
    }
    return Case(inputs, {**running, "training": training})


_AXES = (0, 1, 2)


def _dx(
    dbeta_share: float = 1.0, dgamma_share: float = 1.0, m: Callable[[np.ndarray], int] | None = None
) -> Callable[..., np.ndarray]:
    """A dx with these shares of its second and third term, and another count ``m`` of values."""

    def backward(dy: np.ndarray, cache: BatchNorm2dCache) -> np.ndarray:
        count = dy[..., 0].size if m is None else m(dy)
        dgamma, dbeta = (dy * cache.x_hat).sum(axis=_AXES), dy.sum(axis=_AXES)
        correction = dbeta_share * dbeta / count + dgamma_share * cache.x_hat * dgamma / count
        return (dy - correction) * cache.gamma * cache.inverse_std

    return backward


def _right(dy: np.ndarray, cache: BatchNorm2dCache) -> np.ndarray:
    return batch_norm2d_backward(dy, cache)[0]


_MISTAKES = {
    "dx": {
        "mean and variance are taken for constants, as in inference: both of their terms are missing": _dx(0, 0),
        "the mean's term is missing: every x also moves the mean, which takes dbeta / m out of dy": _dx(0, 1),
        "the variance's term is missing: every x also moves the variance, which takes x_hat * dgamma / m out": _dx(
            1, 0
        ),
        "the mean's term has the wrong sign": _dx(-1, 1),
        "the variance's term has the wrong sign": _dx(1, -1),
        "m is N, the number of images: it is the number of values of a channel, N*H*W": _dx(m=len),
        "m is H*W, the pixels of one image: it is the number of values of a channel, N*H*W": _dx(
            m=lambda dy: dy.shape[1] * dy.shape[2]
        ),
        "m is the number of all values: it is that of one channel, N*H*W": _dx(m=lambda dy: dy.size),
        "m - 1 for m: the variance here is the biased one": _dx(m=lambda dy: dy[..., 0].size - 1),
        "the sums are not divided by m": _dx(m=lambda dy: 1),
        "dgamma lacks its x_hat, and the variance's term is made of it": lambda dy, c: (
            (dy - (1 + c.x_hat) * dy.mean(axis=_AXES)) * c.gamma * c.inverse_std
        ),
        "gamma is missing": lambda dy, c: _right(dy, c._replace(gamma=np.ones_like(c.gamma))),
        "inverse_std is missing": lambda dy, c: _right(dy, c._replace(inverse_std=np.ones_like(c.inverse_std))),
        "inverse_std is squared: one belongs to x_hat already": lambda dy, c: _right(dy, c) * c.inverse_std,
        "divided by inverse_std, which is 1 / std already: multiply": lambda dy, c: _right(dy, c) / c.inverse_std**2,
        "in inference the running statistics are constants: only the first term stays (cache.training is False)": (
            lambda dy, c: _dx()(dy, c)
        ),
    },
    "dgamma": {
        "x_hat is missing: gamma multiplies x_hat, so that is its slope": lambda dy, c: dy.sum(axis=_AXES),
        "a mean where it should be a sum": lambda dy, c: (dy * c.x_hat).mean(axis=_AXES),
        "gamma is too much here: y = gamma * x_hat + beta has slope x_hat in gamma": lambda dy, c: (
            c.gamma * (dy * c.x_hat).sum(axis=_AXES)
        ),
        "only x_hat, without dy: the upstream gradient is ignored": lambda dy, c: c.x_hat.sum(axis=_AXES),
        "x_hat times inverse_std: x_hat is divided by the standard deviation already": lambda dy, c: (
            c.inverse_std * (dy * c.x_hat).sum(axis=_AXES)
        ),
    },
    "dbeta": {
        "a mean where it should be a sum": lambda dy, c: dy.mean(axis=_AXES),
        "x_hat is too much here: beta stands alone": lambda dy, c: (dy * c.x_hat).sum(axis=_AXES),
        "gamma is too much here: beta stands alone": lambda dy, c: c.gamma * dy.sum(axis=_AXES),
    },
}

_HINTS = (
    "Begin with dgamma and dbeta: gamma and beta stand in every y of their channel. For dx: if all x of a channel "
    "grow by "
    "the same amount, what happens to y? So what must the sum of dx over a channel be?",
    "In training dx = gamma * inverse_std * (dy - a - x_hat * b), where a is the mean of dy over the channel, and b "
    "the "
    "mean of dy * x_hat. In inference a and b are 0: why?",
    "m = dy[..., 0].size, the values of a channel. dgamma = (dy * x_hat).sum(axis=(0, 1, 2)), dbeta = dy.sum(axis=(0, "
    "1, 2)), "
    "and a = dbeta / m, b = dgamma / m.",
)

EXERCISE = Backward(
    function="batch_norm2d_backward",
    forward=batch_norm2d_forward,
    reference=batch_norm2d_backward,
    results=("dx", "dgamma", "dbeta"),
    cases=(_case(1, (3, 2, 4, 2), True), _case(2, (2, 3, 1, 3), True), _case(3, (2, 2, 2, 2), False)),
    mistakes=_MISTAKES,
).exercise("batch_norm2d", "every x moves every y of its channel", _HINTS)
