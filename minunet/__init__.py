"""minunet: a U-Net from scratch, with every gradient derived by hand, in Python on NumPy and CuPy.

Three floors. You can stop at any of them and have seen something whole. Read them in this order:

1. ``minunet.ops``, the mathematics: one op a file, its forward pass followed at once by its hand-derived backward pass.
2. ``minunet.network``, the network: layers own arrays and call ops; the U goes down, across and up, and back.
3. ``minunet.data`` and ``minunet.training``, the work: slices become batches, a step changes weights, a run repeats it.

``minunet.gradcheck`` is the reason to believe the gradients. Beside the floors:

- ``minunet.base``, underneath: arrays on a device, random numbers, files, errors, command lines; it knows no network.
- ``minunet.engines``, the speed: the same step on the cores of a processor and on a GPU. Nobody has to read them.
- ``minunet.results``, what people look at: pictures, the report of a run, masks for new images.
- ``minunet.commands``, the command line: ``minunet train`` and its siblings put the rooms together.
- ``minunet.exercises``, for practice: backward passes to write, planted bugs to find.

docs/tour.md walks through the same rooms file by file.
"""

from minunet.base.version import __version__
from minunet.network.loss import SegmentationLoss, SoftmaxLoss
from minunet.network.unet import UNet
from minunet.training.optim import AdamW

__all__ = ["AdamW", "SegmentationLoss", "SoftmaxLoss", "UNet", "__version__"]
