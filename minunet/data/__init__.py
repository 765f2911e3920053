"""Data: slices of MR volumes with their masks, from files or drawn by the package itself.

In reading order:

1. ``slices``     ``SliceSet``, what every other module passes around: images, masks, and whose they are
2. ``lgg``        reads the folders of the Kaggle data set "lgg-mri-segmentation", and others laid out like them
3. ``phantom``    draws synthetic patients: the data that the examples use when they are given none
4. ``splits``     who is trained on, who chooses the best epoch, who is tested on: by patient
5. ``normalize``  grey values to network inputs, by statistics that are kept with the model
6. ``augment``    one random draw turns, zooms and flips an image and its mask alike
7. ``batches``    which slices meet in a batch
8. ``verify``     what is wrong with a data set, and what is unusual; ``manifest`` finds a changed file

``lgg`` needs Pillow and imports it when it reads or writes a file; the others need NumPy alone.
"""

from minunet.data.slices import SliceSet

__all__ = ["SliceSet"]
