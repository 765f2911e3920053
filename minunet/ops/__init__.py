"""The mathematics: one op a file, its forward followed at once by its hand-derived backward.

An op is a pair of pure functions. ``<op>_forward`` returns the result and a cache: what backward will need,
and why. ``<op>_backward`` takes ``dy``, the gradient of the loss with respect to the result, and returns the
gradient with respect to each input. The gradients begin at a loss, so its backward takes the cache alone. Images are
(N, H, W, C): image, row, column, channel.
"""

from minunet.ops.batch_norm2d import batch_norm2d_backward, batch_norm2d_forward
from minunet.ops.bce_with_logits import bce_with_logits_backward, bce_with_logits_forward
from minunet.ops.concat import concat_backward, concat_forward
from minunet.ops.conv2d import conv2d_backward, conv2d_forward
from minunet.ops.conv_transpose2d import conv_transpose2d_backward, conv_transpose2d_forward
from minunet.ops.dice_loss import dice_loss_backward, dice_loss_forward
from minunet.ops.dropout import dropout_backward, dropout_forward
from minunet.ops.max_pool2d import max_pool2d_backward, max_pool2d_forward
from minunet.ops.relu import relu_backward, relu_forward
from minunet.ops.sigmoid import sigmoid_backward, sigmoid_forward
from minunet.ops.softmax import softmax_backward, softmax_forward
from minunet.ops.softmax_cross_entropy import softmax_cross_entropy_backward, softmax_cross_entropy_forward

__all__ = [
    "batch_norm2d_backward",
    "batch_norm2d_forward",
    "bce_with_logits_backward",
    "bce_with_logits_forward",
    "concat_backward",
    "concat_forward",
    "conv2d_backward",
    "conv2d_forward",
    "conv_transpose2d_backward",
    "conv_transpose2d_forward",
    "dice_loss_backward",
    "dice_loss_forward",
    "dropout_backward",
    "dropout_forward",
    "max_pool2d_backward",
    "max_pool2d_forward",
    "relu_backward",
    "relu_forward",
    "sigmoid_backward",
    "sigmoid_forward",
    "softmax_backward",
    "softmax_cross_entropy_backward",
    "softmax_cross_entropy_forward",
    "softmax_forward",
]
