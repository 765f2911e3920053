"""Lab astray: ``=`` for ``+=`` where windows overlap."""

import numpy as np

from minunet.exercises.exercise import Exercise, require_equal
from minunet.exercises.learner import Learner
from minunet.exercises.starters import astray as starter
from minunet.ops import conv2d_backward, conv2d_forward


def check(learner: Learner) -> list[str]:
    """Raise NotYet unless blur is as it was and blur_backward is its backward."""
    rng = np.random.default_rng(0)
    for shape, kernel in (((5, 6), 3), ((4, 4), 2)):
        x, weight = rng.standard_normal(shape), rng.standard_normal((kernel, kernel))
        y, cache = conv2d_forward(x[None, :, :, None], weight[:, :, None, None], None, padding=0)
        require_equal("blur (it was right: put it back)", learner.call("blur", x, weight), y[0, :, :, 0])
        dy = rng.standard_normal(y.shape)
        windows = dy[0, :, :, 0]
        before = windows.tobytes()
        found = learner.call("blur_backward", windows, weight)

        def dx(dy: np.ndarray, cache: object = cache) -> np.ndarray:
            return conv2d_backward(dy, cache)[0][0, :, :, 0]  # type: ignore[arg-type]

        turned = cache._replace(weight=np.ascontiguousarray(cache.weight[::-1, ::-1]))
        counts = dx(np.ones_like(dy), cache._replace(weight=np.ones_like(cache.weight)))
        require_equal(
            f"blur_backward, kernel {kernel} x {kernel}",
            found,
            dx(dy),
            {
                "still = where it should be +=: a pixel is seen by several windows, and only the last one counts": (
                    starter.blur_backward(windows, weight)
                ),
                "the kernel is turned by 180 degrees: blur does not turn it": dx(dy, turned),
                "the mean of the windows that see a pixel: their gradients are added": dx(dy) / counts,
                "the first window is kept, the later ones are lost: add them": _first_wins(windows, weight),
                "the largest contribution is kept: add them": _combined(windows, weight, np.fmax),
            },
        )
        require_equal("dy after blur_backward", np.frombuffer(before), windows.ravel())
    return [
        "that was the cause: each window overwrote what its neighbours had sent back to the pixels they share",
        "blur_backward agrees with conv2d_backward for kernels of 2 x 2 and 3 x 3",
    ]


def _first_wins(dy: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return _combined(dy, weight, lambda old, new: np.where(np.isnan(old), new, old))


def _combined(dy: np.ndarray, weight: np.ndarray, combine: object) -> np.ndarray:
    """A backward in which ``combine(old, new)`` stands for the sum; NaN where nothing has come yet."""
    k = len(weight)
    dx = np.full((dy.shape[0] + k - 1, dy.shape[1] + k - 1), np.nan)
    for i in range(dy.shape[0]):
        for j in range(dy.shape[1]):
            window = (slice(i, i + k), slice(j, j + k))
            dx[window] = combine(dx[window], dy[i, j] * weight)  # type: ignore[operator]
    return dx


EXERCISE = Exercise(
    name="astray",
    title="a descent that goes uphill",
    functions=("blur", "blur_backward", "sharpen"),
    hints=(
        "Small steps along the right gradient never go uphill. How would you find out whether a gradient is right?",
        "Give blur_backward a dy that is 1 in one place, then one that is 1 in two neighbouring places. What should "
        "the "
        "second be, by the first?",
        "Windows overlap, and a pixel that is seen by nine of them gets nine contributions: they are added up.",
    ),
    check=check,
)
