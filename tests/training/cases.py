"""A tiny network, a batch, and what the tests of training ask of both."""

import numpy as np

from minunet.base.rng import Key
from minunet.data.normalize import Normalization
from minunet.network.loss import SegmentationLoss
from minunet.network.unet import UNet

LOSS = SegmentationLoss()
KEY = Key(seed=0, epoch=1, step=2)
NORMALIZATION = Normalization("volume")


def tiny_net(**options):
    return UNet(**{"widths": (3, 4), "dropout": 0.3, "up_kernel": 2, "dtype": "float64", **options})


def batch(seed=0, size=8, dtype="float64"):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((2, size, size, 3)).astype(dtype)
    return x, (generator.random((2, size, size, 1)) < 0.3).astype(dtype)


def all_arrays(net):
    return net.parameters() | net.buffers()
