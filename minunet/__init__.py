"""minunet: a U-Net from scratch, with every gradient derived by hand, in Python on NumPy and CuPy.

Read it in this order:

1. ``minunet.ops``: the mathematics. One op a file, forward followed by its backward. Begin with ``relu``, then
   ``conv2d``.
2. ``minunet.losses``, ``minunet.optim``: what is made small, and how.
3. ``minunet.layers``, ``minunet.blocks``, ``minunet.unet``: the network.
4. ``minunet.data``, ``minunet.training``: the work.
5. ``minunet.gradcheck``, ``minunet.metrics``: why to believe it.

docs/tour.md walks through the same rooms with more words.
"""

from minunet.losses import SegmentationLoss
from minunet.optim import AdamW
from minunet.unet import UNet

__version__ = "0.1.0"
__all__ = ["AdamW", "SegmentationLoss", "UNet", "__version__"]
