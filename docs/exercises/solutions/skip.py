"""Solution of skip.

Joining is undone by splitting. The features were used twice, by the pool and by the concat, so two gradients come back
to them, and they are added: if a feature grows by a little, the loss grows by what it does there plus what it does
here.
"""

from minunet.base.backend import Array
from minunet.exercises.starters.skip import LevelCache
from minunet.ops import conv_transpose2d_backward, max_pool2d_backward


def level_backward(dy: Array, cache: LevelCache) -> tuple[Array, Array]:
    """level_forward, read from the last line to the first."""
    up_channels = cache.concat.up_channels
    dup, dskip = dy[..., :up_channels], dy[..., up_channels:]
    dpooled, dweight, _ = conv_transpose2d_backward(dup, cache.up)
    dfeatures = dskip + max_pool2d_backward(dpooled, cache.pool)
    return dfeatures, dweight
