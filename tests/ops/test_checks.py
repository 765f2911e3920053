"""The checks of arguments, where no op's own test reaches them."""

import numpy as np
import pytest

from minunet.ops import conv2d_forward


def test_the_message_of_an_integer_image_says_what_to_do():
    with pytest.raises(ValueError, match=r"^x must be floating, got uint8; convert it first"):
        conv2d_forward(np.ones((1, 4, 4, 1), "uint8"), np.ones((1, 1, 1, 1)), None)
