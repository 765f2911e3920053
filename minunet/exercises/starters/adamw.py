"""Exercise adamw: write one step of AdamW, as a function without a memory.

Adam keeps two means for each parameter, of its gradient (m) and of its square (v), and moves theta by lr * m / sqrt(v),
both corrected for having started at 0. Weight decay takes the share lr * weight_decay of theta away, and is not part of
the gradient. Return the new (theta, m, v) as new arrays; those that are given stay as they are.

    python -m minunet.exercises adamw FILE        checks this file
    python -m minunet.exercises adamw --hint 1    (then 2, 3)

To read: docs/derivations/adamw.md, down to "The lines it becomes"; Loshchilov & Hutter 2019, algorithm 2.
"""

import numpy as np

from minunet.base.backend import Array


def adamw_step(
    theta: Array,
    m: Array,
    v: Array,
    g: Array,
    t: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Array, Array, Array]:
    """Return theta, m and v after step ``t``, which counts from 1. All arrays have one shape and dtype."""
    raise NotImplementedError
