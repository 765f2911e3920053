"""Solution of adamw.

The decay is taken of theta as it was, the moments are kept without their correction, and eps is added to the root.
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
    """Decay, moments, correction, step."""
    theta = theta - lr * weight_decay * theta
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    theta = theta - lr * m_hat / (np.sqrt(v_hat) + eps)
    return theta, m, v
