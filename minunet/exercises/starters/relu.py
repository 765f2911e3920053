"""Exercise relu: write relu_backward.

Forward, for each number:  y = x where x > 0, else 0.

You are given dy, the gradient of the loss with respect to y: how much the loss grows for each unit that this
number of y grows. Return dx, the same for x. Nothing else: dy and the cache stay as they are.

    python -m minunet.exercises relu FILE        checks this file
    python -m minunet.exercises relu --hint 1    (then 2, 3)

To read: docs/derivations/relu.md, down to "The lines it becomes".
"""

import numpy as np

from minunet.base.backend import Array
from minunet.ops.relu import ReluCache


def relu_backward(dy: Array, cache: ReluCache) -> Array:
    """Return dx.

    dy            (N, H, W, C), the gradient with respect to y
    cache.passed  (N, H, W, C), True where x > 0
    """
    raise NotImplementedError
